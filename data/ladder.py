"""The ladder: the steps of the derivation as runs, and what people use instead of PPO.

    python -m data.ladder [--out_dir out]

trains the language model of a finished run on its learned reward by each rung, prints tables and
draws ladder.png into the run's folder, in about 4 minutes on two cores. All rungs sample the same
number of tokens, GROUP responses to each of the same prompts. All but PPO take one gradient step
per batch and differ in `step_weights`. Each uses the one of RATES with the best E[score] − β KL on
a separate seed, with half the tokens in batches of 32. Best of n is in data/frontier.py.
"""
import argparse
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

import rlhf
from data import show
from data.frontier import figures, held_out, results
from model import ActorCritic

COLOURS = {"REINFORCE": "#8c8c8c", "rewards-to-go": "#b8860b", "baseline": "#d1495b",
           "GAE": "#7b2d8b", "PPO": "#111111", "RLOO": "#1f77b4", "GRPO": "#2a9d5c"}
RUNGS = tuple(COLOURS)
CRITICS = ("baseline", "GAE", "PPO")  # the rungs that learn V
SETTINGS = ((32, 0.0), (32, 5.0), (8, 0.0), (128, 0.0))  # (responses per batch, shift of scores)
SHIFTS, RATES = (0.0, 5.0), (1e-4, 3e-4, 1e-3)
GROUP, POINTS = 4, 6  # responses per prompt; points of a curve
COLUMNS = ("KL, nats", "learned reward", "true reward", "seconds")

def group_weights(returns, group, divide=False):
    """RLOO: R_i minus the mean return of the other responses to the same prompt.

    That mean does not depend on τ_i: like any baseline b(s_0) it leaves the expectation of the
    gradient as it is. divide=True is GRPO, (R_i − mean) / std over the group. This is biased: the
    std depends on R_i too, and a prompt whose responses hardly differ counts as much as any.
    (Published GRPO also averages over each response's tokens and keeps the KL outside R.)
    returns: (B,), every `group` >= 2 neighbours answer one prompt    result: (B,)
    Source: Kool et al. 2019, Ahmadian et al. 2402.14740; GRPO: Shao et al. 2402.03300.
    """
    R = returns.view(-1, group)                                            # (prompts, group)
    above = R - R.mean(1, keepdim=True)
    if divide:
        return (above / (R.std(1, keepdim=True, correction=0) + 1e-4)).flatten()
    return (above * group / (group - 1)).flatten()  # the mean of the others leaves R_i out

def step_weights(rung, e, lam=0.95):
    """(B, T) weights w_t: R(τ), rewards-to-go, those minus V(s_t), GAE, RLOO or GRPO."""
    if rung in CRITICS:
        return rlhf.gae(e.rewards, e.values, e.mask, lam=1.0 if rung == "baseline" else lam)
    if rung == "rewards-to-go":
        return rlhf.rewards_to_go(e.rewards, e.mask)
    total = e.rewards.sum(1)                                               # (B,) R(τ)
    if rung in ("RLOO", "GRPO"):
        total = group_weights(total, GROUP, divide=rung == "GRPO")
    return total[:, None].expand_as(e.rewards)

def add_gradient(rung, policy, e, config):
    """Add the gradient of the rung's loss, a mean over a batch of trajectories, to .grad."""
    weights = step_weights(rung, e, config.lam)
    e = replace(e, advantages=weights, returns=weights + e.values)
    for rows, part in rlhf.micro_batches(e, config.micro_batch_size):
        log_probs, values, _ = rlhf.forward_responses(policy, part, config.temperature)
        loss = rlhf.policy_gradient_loss(log_probs, part.advantages, part.mask)
        if rung in CRITICS:  # ½ Σ_t (V − R)² per trajectory, in the policy's units
            loss = loss + config.value_coef * 0.5 * ((values - part.returns)**2).sum() / len(rows)
        (loss * len(rows) / len(e.mask)).backward()

def batches(policy, run, batch, shift, seed, budget):
    """(step, tokens before it, Experience, Config) of batches until `budget` tokens are sampled."""
    config = replace(run.config, seed=seed, ppo_epochs=2, minibatch_size=batch // 4, gamma=1.0,
                     ptx_coef=0.0, missing_eos_score=None)
    tokens = step = 0
    while tokens < budget:
        generator = rlhf.seeded(seed, "ladder", step)
        drawn = rlhf.draw(run.data.train.prompts, batch // GROUP, generator, "prompt")
        prompts = [prompt for prompt in drawn for _ in range(GROUP)]
        e = rlhf.collect(policy, run.lm, lambda sampled: run.score(sampled) + shift, prompts,
                         config, generator)
        yield step, tokens, e, config
        step, tokens = step + 1, tokens + int(e.mask.sum())

def climb(run, rung, batch, shift, seed, rate, budget):
    """Train by one rung: (E[score] − β KL, COLUMNS) on held-out prompts, and training curves."""
    start, policy, curve = time.perf_counter(), ActorCritic(run.lm), []
    optimizer = rlhf.make_optimizer(policy)
    for step, tokens, e, config in batches(policy, run, batch, shift, seed, budget):
        curve.append(figures(run, replace(e, scores=e.scores - shift)))
        # Learn from the batch: PPO's epochs of minibatches, or one step of the policy gradient.
        rlhf.set_learning_rate(optimizer, rate, tokens, budget, warmup=0)
        if rung == "PPO":
            rlhf.ppo_update(policy, optimizer, e, config, rlhf.seeded(seed, "ladder PPO", step))
        else:
            add_gradient(rung, policy, e, config)
            rlhf.gradient_step(policy, optimizer, config.max_grad_norm)
    kl, reward, true_reward = held_out(run, policy, config)
    end = [kl, reward, true_reward, time.perf_counter() - start]
    curve = F.adaptive_avg_pool1d(torch.tensor(curve).T, POINTS)           # (3, POINTS)
    return reward - config.kl_coef * kl, end, curve.tolist()

def variance(run, rung, shift, budget):
    """tr Cov of a rung's gradient per trajectory, at the run's own policy, from batches of 8."""
    policy, gradients = ActorCritic(run.lm), []
    policy.load_state_dict(run.policy.state_dict())
    policy.value_head.bias.data += shift  # V as it would be with these scores
    for _, _, e, config in batches(policy, run, 8, shift, 0, budget):
        policy.zero_grad()
        add_gradient(rung, policy, e, config)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.gpt.parameters()]))
    return 8 * float(torch.stack(gradients).var(0).sum())  # means of 8 have 1/8 the variance

def study(folder, given, seeds, budget, processes):
    """(ends and curves (settings, rungs, seeds, …), {(rung, shift): rate}, {…: variance})."""
    # Choose the learning rates.
    pairs = [(rung, shift) for rung in RUNGS for shift in SHIFTS]
    jobs = [(folder, given, rung, 32, shift, max(seeds) + 1, rate, budget // 2)
            for rung, shift in pairs for rate in RATES]
    objectives, _, _ = zip(*results(climb, jobs, processes))
    best = torch.tensor(objectives).view(-1, len(RATES)).argmax(1)         # (pairs,)
    rates = {pair: RATES[i] for pair, i in zip(pairs, best)}
    # Train with them.
    jobs = [(folder, given, rung, batch, shift, seed, rates[rung, shift], budget)
            for batch, shift in SETTINGS for rung in RUNGS for seed in seeds]
    _, ends, curves = zip(*results(climb, jobs, processes))
    shape = (len(SETTINGS), len(RUNGS), len(seeds))
    ends, curves = (torch.tensor(x).unflatten(0, shape) for x in (ends, curves))
    # Measure the variances.
    variances = results(variance, [(folder, given, *pair, budget) for pair in pairs], processes)
    return ends, curves, rates, dict(zip(pairs, variances))

def show_tables(ends, rates, variances):
    """Print the figures of each setting, and which of them can be told apart."""
    for (batch, shift), x in zip(SETTINGS, ends):                          # (rungs, seeds, columns)
        mean, error = x.mean(1), (x.var(1, correction=0) / (x.shape[1] - 1)).sqrt()
        gap = (mean[:, None] - mean).abs()                                 # (rungs, rungs, columns)
        apart = gap > 2 * (error[:, None]**2 + error**2).sqrt()  # False for a single seed
        print(f"\nbatches of {batch}, scores + {shift:g}\n{'':15}{'rate':>7}",
              *(f"{name:>14}" for name in COLUMNS), f"{'variance':>11}")
        for i, rung in enumerate(RUNGS):
            above, ppo = apart[i, max(i - 1, 0)], apart[i, RUNGS.index("PPO")]  # 2 × (columns,)
            cells = [f"{m:z6.2f} ±{e:4.2f} {'a' if a else ' '}{'p' if p else ' '}"
                     for m, e, a, p in zip(mean[i], error[i], above, ppo)]
            print(f"{rung:15}{rates[rung, shift]:7g}", *cells, f"{variances[rung, shift]:9.0f}")
    print("\nMean ± standard error. a, p: over two standard errors from the rung above, from PPO."
          "\nVariance: of the gradient per trajectory, at the run's own policy; PPO starts as GAE.")

def draw(Figure, curves, budget, path):
    """Rewards and KL against sampled tokens: the mean of the seeds, and their range as a band."""
    figure = Figure(figsize=(12.8, 8.5), layout="constrained", facecolor="white")
    axes = figure.subplots(3, len(SETTINGS), squeeze=False)[[2, 0, 1]]  # KL at the bottom
    x = (torch.arange(POINTS) + 0.5) * budget / POINTS
    for column, (batch, shift), group in zip(axes.T, SETTINGS, curves):
        column[1].set_title(f"batches of {batch}, scores + {shift:g}")
        for (rung, colour), seeds in zip(COLOURS.items(), group):
            for axis, name, y in zip(column, COLUMNS, seeds.unbind(1)):    # y (seeds, POINTS)
                axis.plot(x, y.mean(0), color=colour, lw=2, label=rung)
                axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.12, lw=0)
                axis.set(xlabel="sampled tokens", ylabel=name)
                axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=110)

def main():
    """`python -m data.ladder`: measure, print tables, draw."""
    from matplotlib.figure import Figure  # what is missing is said at once
    parser = argparse.ArgumentParser("data.ladder", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8_000, help="sampled by each run (8,000)")
    parser.add_argument("--processes", type=int, default=2, help="that work at once (2)")
    given = show.parse(parser, rlhf.Config)
    seeds, tokens, processes = (given.pop(name) for name in ("seeds", "tokens", "processes"))
    out = given.get("out_dir", "out")
    ends, curves, rates, variances = study(out, tuple(given.items()), seeds, tokens, processes)
    show_tables(ends, rates, variances)
    draw(Figure, curves, tokens, f"{out}/ladder.png")
    print(f"written: {out}/ladder.png")

if __name__ == "__main__":
    show.program("data.ladder", main)
