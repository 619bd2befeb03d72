"""Over-optimisation in one picture: how far may a policy follow the learned reward?

    python -m data.frontier --runs out out/seed1 out/seed2

takes finished runs that differ in their seeds, prints a table and draws frontier.png into the
first one's folder, in about 7 minutes on two cores. Both rewards are drawn against √KL(π‖π_ref),
as in Gao et al. (2210.10760): PPO with several prices of KL (kl_coef), and best of n, which trains
nothing and keeps the best-scored of n responses (its KL is at most log n − (n−1)/n: Beirami et al.
2401.01879). The held-out prompts are the same for all.
"""
import argparse
import functools
import math
import multiprocessing
import signal
from dataclasses import replace
from types import SimpleNamespace

import torch

import rlhf
from data import dataset, look, show
from model import ActorCritic

COLOURS = ("#c1121f", "#e08e0b", "#2a9d5c", "#2563a8", "#7b2d8b", "#111111")  # of each kl_coef
PROMPTS = 192  # held-out prompts
COUNTS = [1, 2, 4, 8, 16, 32, 64]  # n of best of n; the last is a multiple of each

@functools.cache
def open_run(folder, given):
    """A finished run's models, data and settings; given: (name, value) pairs override those."""
    lm, reward_model, policy, config, encoding = look.load_run(folder, dict(given))
    data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens, encoding)
    true_reward = rlhf.true_reward_of(data)
    if not true_reward:
        raise ValueError(f"{config.data_dir}: the true reward is known for the shipped data alone")
    return SimpleNamespace(config=config, data=data, lm=lm.requires_grad_(False), policy=policy,
                           score=lambda sampled: rlhf.reward_scores(reward_model, sampled),
                           true_reward=lambda sampled: true_reward(*sampled.lists()))

def work(measure, job):
    """measure(run, *arguments); job: (folder, given, *arguments), the first two for `open_run`."""
    torch.set_num_threads(1)  # two processes with a thread each are faster than one with two
    folder, given, *arguments = job
    print(measure.__name__, folder, *arguments, flush=True)
    return measure(open_run(folder, given), *arguments)

def results(measure, jobs, processes):
    """`work` on each of the jobs, several at once; a list."""
    if processes == 1:
        return [work(measure, job) for job in jobs]
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with spawn.Pool(processes, signal.signal, ignore) as pool:  # Ctrl-C: this process ends them
        return pool.map(functools.partial(work, measure), jobs, chunksize=1)

def figures(run, e):
    """[KL, learned reward, true reward], the means of a batch of experience."""
    kl, _ = rlhf.kl_estimates(e.log_probs, e.ref_log_probs, e.mask)
    return [float(x.mean()) for x in (kl, e.scores, run.true_reward(e))]

def held_out(run, policy, config):
    """`figures` on held-out prompts, the same for every policy; the seed fixes the draws."""
    config, prompts = replace(config, missing_eos_score=None), run.data.held_out.prompts[:PROMPTS]
    generator = rlhf.seeded(config.seed, "held out", 0)
    return figures(run, rlhf.collect(policy, run.lm, run.score, prompts, config, generator))

def ppo(run, kl_coef):
    """Train by PPO at this price of KL: `figures` at the end, and along the training path."""
    config = replace(run.config, kl_coef=kl_coef, kl_target=None)
    policy, truth, path, train = ActorCritic(run.lm), [], [], run.data.train

    def reward_fn(sampled):
        truth.append(float(run.true_reward(sampled).mean()))
        return run.score(sampled)

    for step in rlhf.train_ppo(policy, run.lm, reward_fn, train.prompts, config,
                               documents=train.documents):
        path.append([step["kl"], step["reward"], truth[-1]])
    return {"end": held_out(run, policy, config), "path": path}

def best_of_n(run):
    """`figures` of the best-scored of n responses, for each n of COUNTS; KL is its bound."""
    rewards, n = [], COUNTS[-1]
    for i, prompt in enumerate(run.data.held_out.prompts[:PROMPTS]):
        r = rlhf.rollout(run.lm, [prompt] * n, run.config.max_new_tokens, run.data.eos_token,
                         run.config.temperature, rlhf.seeded(run.config.seed, "best of n", i))
        rewards.append(torch.stack([run.score(r).cpu(), run.true_reward(r)], dim=1))
    rows, rewards = [], torch.cat(rewards)                                 # (prompts · 64, 2)
    for n in COUNTS:
        # The best-scored of each n neighbours, all of them responses to one prompt.
        groups = rewards.view(-1, n, 2)                                    # (groups, n, 2)
        best = groups[torch.arange(len(groups)), groups[:, :, 0].argmax(1)]  # (groups, 2)
        rows.append([math.log(n) - (n - 1) / n, *best.mean(0).tolist()])
    return rows

def study(runs, given, kl_coefs, processes):
    """(best of n (runs, COUNTS, 3), {kl_coef: a result of `ppo` for each run})."""
    best = results(best_of_n, [(run, given) for run in runs], processes)
    rows = results(ppo, [(run, given, k) for k in kl_coefs for run in runs], processes)
    rows = {k: rows[i * len(runs):][:len(runs)] for i, k in enumerate(kl_coefs)}
    return torch.tensor(best), rows

def show_table(best, rows):
    """Print mean ± standard error over the runs."""
    lines = {f"best of {n}": x for n, x in zip(COUNTS, best.unbind(1))}
    for kl_coef, group in rows.items():
        lines[f"PPO, β = {kl_coef:g}"] = torch.tensor([row["end"] for row in group])
    print(f"\n{'':16}{'KL':>14}{'learned':>14}{'true':>14}   mean ± standard error over the runs")
    for name, x in lines.items():
        error = (x.var(0, correction=0) / (len(x) - 1)).sqrt()  # nan for a single run
        print(f"{name:16}", *(f"{mean:7.2f} ±{e:4.2f}" for mean, e in zip(x.mean(0), error)))

def draw(Figure, best, rows, path):
    """A panel per reward. Squares: best of n. Dots: PPO at its end; thin lines: on its way."""
    figure = Figure(figsize=(10, 4.8), layout="constrained", facecolor="white")
    axes, titles = figure.subplots(1, 2), ("learned reward", "true reward")
    best = best.mean(0)                                                    # (COUNTS, 3)
    for i, (axis, title) in enumerate(zip(axes, titles), 1):
        axis.plot(best[:, 0].sqrt(), best[:, i], "s--", color="0.4", label="best of n")
        for colour, (kl_coef, group) in zip(COLOURS, rows.items()):
            for row in group:
                way = torch.tensor(row["path"]).T                          # (3, iterations)
                way = way.unfold(1, min(5, way.shape[1]), 1).mean(2)  # smoothed
                axis.plot(way[0].clamp_min(0).sqrt(), way[i], color=colour, lw=1, alpha=0.5)
            ends = torch.tensor([row["end"] for row in group]).T           # (3, runs)
            axis.plot(ends[0].clamp_min(0).sqrt(), ends[i], "o", color=colour, ms=8,
                      label=f"PPO, β = {kl_coef:g}")
        axis.set(title=title, xlabel="√KL to the language model, KL in nats per response")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)

def main():
    """`python -m data.frontier`: measure, print a table, draw."""
    from matplotlib.figure import Figure  # what is missing is said at once
    parser = argparse.ArgumentParser("data.frontier", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", nargs="+", help="folders of finished runs (out_dir)")
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=[0.0, 0.03, 0.1, 0.5])
    parser.add_argument("--processes", type=int, default=2, help="that work at once (2)")
    given = show.parse(parser, rlhf.Config)
    runs, kl_coefs, processes = (given.pop(name) for name in ("runs", "kl_coefs", "processes"))
    runs = runs or [given.get("out_dir", "out")]
    best, rows = study(runs, tuple(given.items()), kl_coefs, processes)
    show_table(best, rows)
    draw(Figure, best, rows, f"{runs[0]}/frontier.png")
    print(f"written: {runs[0]}/frontier.png")

if __name__ == "__main__":
    show.program("data.frontier", main)
