"""The ladder: the steps of the derivation as runs, and what people use instead of PPO.

    python -m data.ladder [--out_dir out]

trains the language model of a finished run on its learned reward once for each rung, seed and
setting, prints tables and draws ladder.png into the run's folder, in about 15 minutes on two cores.
Results are kept in studies.jsonl: the same command goes on where it was stopped.

All rungs get the same number of sampled tokens and the same prompts, GROUP responses to each. All
but PPO take one gradient step per batch and differ in the weight of ∇log π(a_t|s_t), see
`step_weights`. The learning rate of each is the one of RATES with the best objective E[score] − β KL
in half the tokens, with batches of 32, on a seed of its own. At the end each policy is measured on
the same held-out prompts. (Best of n, which trains nothing, is in `python -m data.frontier`.)
"""
import argparse
import math
from dataclasses import replace

import torch

import rlhf
from data import show
from data.frontier import canvas, figures, held_out, rows_of
from model import ActorCritic

COLOURS = {"REINFORCE": "#8c8c8c", "rewards-to-go": "#b8860b", "baseline": "#d1495b",
           "GAE": "#7b2d8b", "PPO": "#111111", "RLOO": "#1f77b4", "GRPO": "#2a9d5c"}
RUNGS = tuple(COLOURS)
CRITICS, ONE_STEP = ("baseline", "GAE", "PPO"), [rung for rung in RUNGS if rung != "PPO"]
SETTINGS = ((32, 0.0), (32, 5.0), (8, 0.0), (128, 0.0))  # (responses per batch, added to scores)
RATES = (1e-4, 3e-4, 1e-3)
GROUP, POINTS = 4, 6  # responses per prompt; points of a curve
COLUMNS = ("objective", "reward", "true_reward", "kl")


def group_weights(returns, group, divide=False):
    """RLOO: R_i minus the mean return of the other responses to the same prompt.

    That mean does not depend on τ_i: like any baseline b(s_0) it leaves the expectation of the
    gradient as it is. divide=True is GRPO, (R_i − mean) / std over the group. This is biased: the
    std depends on R_i too, and a prompt whose responses hardly differ counts as much as any.
    (Published GRPO also averages over each response's tokens and keeps the KL outside R.)
    returns: (B,), each `group` >= 2 neighbours answer one prompt    result: (B,)
    Source: Kool et al. 2019, Ahmadian et al. 2402.14740; GRPO: Shao et al. 2402.03300.
    """
    R = returns.view(-1, group)                                            # (prompts, group)
    above = R - R.mean(1, keepdim=True)
    if divide:
        return (above / (R.std(1, keepdim=True, correction=0) + 1e-4)).flatten()
    return (above * group / (group - 1)).flatten()  # the mean of the others leaves R_i out


def step_weights(rung, e, lam=0.95):
    """(B, T) weights w_t: R(τ), what was earned from t on, that minus V(s_t), or GAE."""
    if rung in CRITICS:
        return rlhf.gae(e.rewards, e.values, e.mask, lam=1.0 if rung == "baseline" else lam)
    if rung == "rewards-to-go":
        return rlhf.rewards_to_go(e.rewards, e.mask)
    total = e.rewards.sum(1)                                               # (B,) R(τ)
    if rung in ("RLOO", "GRPO"):
        total = group_weights(total, GROUP, divide=rung == "GRPO")
    return total[:, None].expand_as(e.rewards)


def add_gradient(rung, policy, e, config):
    """Add the gradient of the rung's loss on a batch of experience to .grad, by micro-batches.

    With a critic, value_coef · ½ Σ_t (V − R)² per trajectory is added, in the policy's units.
    """
    weights = step_weights(rung, e, config.lam)
    e = replace(e, advantages=weights, returns=weights + e.values)
    for rows, part in rlhf.micro_batches(e, config.micro_batch_size):
        log_probs, values, _ = rlhf.forward_responses(policy, part, config.temperature)
        loss = rlhf.policy_gradient_loss(log_probs, part.advantages, part.mask)
        if rung in CRITICS:
            error = rlhf.value_loss(values, part.values, part.returns, part.mask, clip=math.inf)
            loss = loss + config.value_coef * error * part.mask.sum() / len(rows)
        (loss * len(rows) / len(e.mask)).backward()


def batches(policy, run, shift, config, budget):
    """A generator: (step, tokens so far, Experience) until `budget` tokens are sampled."""
    tokens = step = 0
    while tokens < budget:
        generator = rlhf.seeded(config.seed, "ladder", step)
        prompts = rlhf.draw(run.data.train.prompts, config.ppo_batch_size // GROUP, generator,
                            "prompt")
        prompts = [prompt for prompt in prompts for _ in range(GROUP)]
        e = rlhf.collect(policy, run.lm, lambda sampled: run.score(sampled) + shift, prompts,
                         config, generator)
        step, tokens = step + 1, tokens + int(e.mask.sum())
        yield step, tokens, e


def settings(run, batch, seed, rate=0.0):
    """The run's Config for one job of the ladder."""
    return replace(run.config, seed=seed, ppo_lr=rate, ppo_batch_size=batch, gamma=1.0,
                   minibatch_size=batch // 4, ptx_coef=0.0, missing_eos_score=None)


def climb(run, rung, batch, shift, seed, rate, budget):
    """Train a policy by one rung: its figures on held-out prompts, and its curve in training."""
    config, policy, curve = settings(run, batch, seed, rate), ActorCritic(run.lm), []
    optimizer = rlhf.make_optimizer(policy)
    for step, tokens, e in batches(policy, run, shift, config, budget):
        curve.append(list(figures(run, e).values()))
        # Learn from the batch: PPO's epochs of minibatches, or one step of the policy gradient.
        rlhf.set_learning_rate(optimizer, rate, min(tokens, budget), budget, budget // 7)
        if rung == "PPO":
            rlhf.ppo_update(policy, optimizer, e, config, rlhf.seeded(seed, "ladder PPO", step))
        else:
            add_gradient(rung, policy, e, config)
            rlhf.gradient_step(policy, optimizer, config.max_grad_norm)
    row = held_out(run, policy, config)
    # The curve: KL and both rewards, the mean of each of POINTS parts.
    edges = [i * len(curve) // POINTS for i in range(POINTS + 1)]
    curve = [torch.tensor(curve[a:max(a + 1, b)]).mean(0) - torch.tensor([0, shift, 0])
             for a, b in zip(edges, edges[1:])]
    return row | {"objective": row["reward"] - config.kl_coef * row["kl"],
                  "curve": torch.stack(curve).tolist()}


def variance(run, shift, budget):
    """{rung: tr Cov of its gradient per trajectory} at the run's policy, on the same batches.

    It is that of the mean over a batch of 8 responses, times 8.
    """
    config, policy = settings(run, 8, seed=0), ActorCritic(run.lm)
    policy.load_state_dict(run.policy.state_dict())
    policy.value_head.bias.data += shift  # V as it would be with these scores
    total, squares = dict.fromkeys(ONE_STEP, 0), dict.fromkeys(ONE_STEP, 0)
    for n, _, e in batches(policy, run, shift, config, budget):
        for rung in ONE_STEP:
            policy.zero_grad()
            add_gradient(rung, policy, e, config)
            g = torch.cat([p.grad.flatten() for p in policy.gpt.parameters()]).double()
            total[rung], squares[rung] = total[rung] + g, squares[rung] + float(g @ g)
    return {rung: 8 * (squares[rung] - float(total[rung] @ total[rung]) / n) / (n - 1)
            for rung in ONE_STEP}


def study(run, seeds, budget, processes):
    """({(rung, batch, shift): (rate, rows)}, {shift: variances}); run: (folder, given)."""
    # Choose the learning rates: sorted by the objective, the best one is set last.
    jobs = [(*run, rung, 32, shift, max(seeds) + 1, rate, budget // 2)
            for shift in (0.0, 5.0) for rung in RUNGS for rate in RATES]
    tried = zip(jobs, rows_of(climb, jobs, processes))
    rates = {(job[2], job[4]): job[6] for job, _ in sorted(tried, key=lambda x: x[1]["objective"])}
    # Train with them.
    jobs = [(*run, rung, batch, shift, seed, rates[rung, shift], budget)
            for batch, shift in SETTINGS for rung in RUNGS for seed in seeds]
    runs = {}
    for job, row in zip(jobs, rows_of(climb, jobs, processes)):
        runs.setdefault(job[2:5], (job[6], []))[1].append(row)
    # Measure the variances.
    rows = rows_of(variance, [(*run, shift, budget) for shift in (0.0, 5.0)], processes)
    return runs, dict(zip((0.0, 5.0), rows))


def show_tables(runs, variances):
    """Print held-out figures of each setting, with what cannot be told apart, and the variances."""
    print("\nmean ± standard error over the seeds; a, p: not told apart from the rung above, from "
          "PPO\n(less than two standard errors). Rates: chosen with batches of 32.")
    for batch, shift in SETTINGS:
        print(f"\nbatches of {batch}, scores + {shift:g}\n{'':15}{'rate':>7}",
              *(f"{name:>15}" for name in COLUMNS), f"{'seconds':>9}")
        group, above = {rung: runs[rung, batch, shift] for rung in RUNGS}, None
        x = {rung: torch.tensor([[row[name] for name in COLUMNS] for row in rows])
             for rung, (_, rows) in group.items()}                         # (seeds, columns)
        for rung, (rate, rows) in group.items():
            marks = zip(alike(x[rung], above), alike(x[rung], x["PPO"] if rung != "PPO" else None))
            cells = zip(x[rung].mean(0), standard_error(x[rung]), marks)
            print(f"{rung:15}{rate:7g}", *(f"{m:7.2f} ±{s:4.2f} {'a' * a:1}{'p' * p:1}"
                                           for m, s, (a, p) in cells), f"{rows[0]['seconds']:8.0f}")
            above = x[rung]
    print("\nvariance of the gradient per trajectory, at the run's policy; in brackets, REINFORCE's "
          "is 1.\n+ 5 leaves baseline and GAE as they are, since it is added to V too: V has learnt "
          "it.\nPPO's first step is GAE's, but for whitened advantages.")
    for rung in ONE_STEP:
        print(f"{rung:15}", *(f"scores + {shift:g}: {v[rung]:8.1f} ({v[rung] / v[RUNGS[0]]:.3f})   "
                              for shift, v in variances.items()))


def standard_error(x):
    """Of the mean over seeds: (seeds, columns) -> (columns,)."""
    return x.std(0) / len(x)**0.5


def alike(x, y):
    """(columns,) whether two rungs' means differ by less than two standard errors."""
    if y is None:
        return [False] * x.shape[1]
    error = (standard_error(x)**2 + standard_error(y)**2).sqrt()
    return (~((x.mean(0) - y.mean(0)).abs() > 2 * error)).tolist()  # nan, of one seed: alike


def draw(runs, budget, path):
    """Rewards and KL against sampled tokens: the mean of the seeds, and their range as a band."""
    figure, axes = canvas(3, len(SETTINGS), (3.2 * len(SETTINGS), 8.5))
    x = (torch.arange(POINTS) + 0.5) * budget / POINTS / 1000
    for (rung, batch, shift), (_, rows) in runs.items():
        curves = torch.tensor([row["curve"] for row in rows]).permute(2, 0, 1)  # (3, seeds, POINTS)
        column = axes[:, SETTINGS.index((batch, shift))]
        for axis, y in zip(column, curves[[1, 2, 0]]):
            axis.plot(x, y.mean(0), color=COLOURS[rung], lw=2, label=rung)
            axis.fill_between(x, y.amin(0), y.amax(0), color=COLOURS[rung], alpha=0.12, lw=0)
            axis.grid(alpha=0.3)
        column[0].set_title(f"batches of {batch}, scores + {shift:g}")
        column[2].set_xlabel("sampled tokens, thousands")
    for axis, name in zip(axes[:, 0], ("learned reward", "true reward", "KL, nats per response")):
        axis.set_ylabel(name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=110)


def main():
    """`python -m data.ladder`: measure what is missing, print tables, draw."""
    parser = argparse.ArgumentParser("python -m data.ladder", allow_abbrev=False,
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=20_000, help="that each run samples (20,000)")
    parser.add_argument("--processes", type=int, default=2, help="that work at once (2)")
    given = show.parse(parser, rlhf.Config)
    seeds, tokens, processes = (given.pop(name) for name in ("seeds", "tokens", "processes"))
    out = given.get("out_dir", "out")
    runs, variances = study((out, tuple(given.items())), seeds, tokens, processes)
    show_tables(runs, variances)
    draw(runs, tokens, f"{out}/ladder.png")
    print(f"\nwritten: {out}/studies.jsonl, ladder.png")


if __name__ == "__main__":
    show.program("data.ladder", main)
