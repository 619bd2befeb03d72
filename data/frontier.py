"""Over-optimisation in one picture: how far may a policy follow the learned reward?

    python -m data.frontier --runs out out/seed1 out/seed2

takes finished runs that differ in their seeds, and draws frontier.png into the first one's folder,
in about 15 minutes on two cores. Results are kept in studies.jsonl: the same command goes on.

Both rewards are drawn against √KL(π‖π_ref), as in Gao et al. (2210.10760): PPO with several prices
of KL (kl_coef), and best of n, which trains nothing and keeps the best-scored of n responses (its
KL is at most log n − (n−1)/n: Beirami et al. 2401.01879). The held-out prompts are the same.
"""
import argparse
import functools
import math
import multiprocessing
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import rlhf
from data import dataset, look, show
from model import ActorCritic

FIGURES = ("kl", "reward", "true_reward")
COLOURS = ("#c1121f", "#e08e0b", "#2a9d5c", "#2563a8", "#7b2d8b", "#111111")  # of each kl_coef
PROMPTS, SAMPLES = 192, 64  # held-out prompts; responses to each, for best of n


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


def row_of(measure, job):
    """The row of measure(run, *arguments) in the run's studies.jsonl, where a new one is added.

    job: (folder, given, *arguments), the first two for `open_run`
    """
    torch.set_num_threads(1)  # two processes with a thread each are faster than one with two
    folder, given, *arguments = job
    run, path = open_run(folder, given), Path(folder) / "studies.jsonl"
    key = {"job": [measure.__name__, *arguments],
           **rlhf.stage_settings("ppo", run.config, run.data)}
    for row in dataset.read_records(path) if path.exists() else []:
        if row["key"] == key:
            return row
    start = time.perf_counter()
    row = {"key": key, **measure(run, *arguments)}
    row["seconds"] = time.perf_counter() - start
    dataset.write_records(path, [row], "a")
    print(folder, *key["job"], f"{row['seconds']:.0f} s", sep="  ", flush=True)
    return row


def rows_of(measure, jobs, processes):
    """The rows of the jobs, several at once."""
    if processes == 1:
        return [row_of(measure, job) for job in jobs]
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with spawn.Pool(processes, signal.signal, ignore) as pool:  # Ctrl-C: this process ends them
        return pool.map(functools.partial(row_of, measure), jobs, chunksize=1)


def figures(run, e):
    """{KL, learned reward, true reward: mean} of a batch of experience."""
    kl, _ = rlhf.kl_estimates(e.log_probs, e.ref_log_probs, e.mask)
    means = [float(x.mean()) for x in (kl, e.scores, run.true_reward(e))]
    return dict(zip(FIGURES, means))


def held_out(run, policy, config):
    """`figures` of a policy on held-out prompts, the same prompts and draws for every policy."""
    config = replace(config, missing_eos_score=None)
    generator = rlhf.seeded(config.seed, "held out", 0)
    prompts = run.data.held_out.prompts[:PROMPTS]
    return figures(run, rlhf.collect(policy, run.lm, run.score, prompts, config, generator))


def ppo(run, kl_coef):
    """Train a policy by PPO at this price of KL: its figures, and its path in training."""
    config = replace(run.config, kl_coef=kl_coef, kl_target=None)
    policy, truth, path, train = ActorCritic(run.lm), [], [], run.data.train

    def reward_fn(sampled):
        truth.append(float(run.true_reward(sampled).mean()))
        return run.score(sampled)

    for step in rlhf.train_ppo(policy, run.lm, reward_fn, train.prompts, config,
                               documents=train.documents):
        path.append((step["kl"], step["reward"], truth[-1]))
    return held_out(run, policy, config) | {"path": path}


def best_of_n(run):
    """{"n": [1, 2, 4, …], and for each n both rewards of the best-scored of n responses, and KL}."""
    samples = []
    for i, prompt in enumerate(run.data.held_out.prompts[:PROMPTS]):
        r = rlhf.rollout(run.lm, [prompt] * SAMPLES, run.config.max_new_tokens, run.data.eos_token,
                         run.config.temperature, rlhf.seeded(run.config.seed, "best of n", i))
        samples.append(torch.stack([run.score(r).cpu(), run.true_reward(r)], dim=1))
    samples, row = torch.cat(samples), {"n": [], **{name: [] for name in FIGURES}}
    for n in (2**k for k in range(SAMPLES.bit_length())):
        # The best-scored of each n neighbours, all of them responses to one prompt.
        groups = samples.view(-1, n, 2)                                    # (groups, n, 2)
        best = groups[torch.arange(len(groups)), groups[:, :, 0].argmax(1)].mean(0).tolist()
        for name, value in zip(row, (n, math.log(n) - (n - 1) / n, *best)):
            row[name].append(value)
    return row


def study(runs, given, kl_coefs, processes):
    """{name: figures (runs, 3)} of best of n and PPO, {kl_coef: rows of PPO}."""
    best = rows_of(best_of_n, [(run, given) for run in runs], processes)
    rows = rows_of(ppo, [(run, given, k) for k in kl_coefs for run in runs], processes)
    rows = {k: rows[i * len(runs):][:len(runs)] for i, k in enumerate(kl_coefs)}
    lines = {f"best of {n}": [[row[x][i] for x in FIGURES] for row in best]
             for i, n in enumerate(best[0]["n"])}
    for k, group in rows.items():
        lines[f"PPO, β = {k:g}"] = [[row[x] for x in FIGURES] for row in group]
    return {name: torch.tensor(line) for name, line in lines.items()}, rows


def show_table(lines):
    """Print mean ± standard error over the runs."""
    print(f"\n{'':16}{'KL':>14}{'learned':>14}{'true':>14}   mean ± standard error over the runs")
    for name, x in lines.items():
        error = x.std(0) / len(x)**0.5  # nan for a single run
        print(f"{name:16}", *(f"{m:7.2f} ±{s:4.2f}" for m, s in zip(x.mean(0), error)))


def canvas(rows, columns, size):
    """(figure, axes) of matplotlib; one clear line if it is missing."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # not installed, or its own settings are broken
        raise ValueError(f"no picture: matplotlib: {error}") from None
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw(lines, rows, path):
    """A panel per reward. Squares: best of n. Dots: PPO at its end; thin lines: on its way."""
    figure, (axes,) = canvas(1, 2, (10, 4.8))
    best = torch.stack([x.mean(0) for name, x in lines.items() if name.startswith("best")])
    for i, (axis, title) in enumerate(zip(axes, ("learned reward", "true reward")), 1):
        axis.plot(best[:, 0].sqrt(), best[:, i], "s--", color="0.4", label="best of n")
        for colour, (kl_coef, group) in zip(COLOURS, rows.items()):
            for row in group:
                way = torch.tensor(row["path"]).T                          # (3, iterations)
                way = way.unfold(1, min(5, way.shape[1]), 1).mean(2)  # smoothed
                axis.plot(way[0].clamp_min(0).sqrt(), way[i], color=colour, lw=1, alpha=0.5)
                axis.plot(max(row["kl"], 0)**0.5, row[FIGURES[i]], "o", color=colour, ms=8,
                          label=f"PPO, β = {kl_coef:g}" if row is group[0] else None)
        axis.set(title=title, xlabel="√KL to the language model, KL in nats per response")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    """`python -m data.frontier`: measure what is missing, print a table, draw."""
    parser = argparse.ArgumentParser("python -m data.frontier", allow_abbrev=False,
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", help="folders of finished runs (out_dir alone)")
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=[0.0, 0.05, 0.15, 0.5])
    parser.add_argument("--processes", type=int, default=2, help="that work at once (2)")
    given = show.parse(parser, rlhf.Config)
    runs, kl_coefs, processes = (given.pop(name) for name in ("runs", "kl_coefs", "processes"))
    runs = runs or [given.get("out_dir", "out")]
    lines, rows = study(runs, tuple(given.items()), kl_coefs, processes)
    show_table(lines)
    draw(lines, rows, f"{runs[0]}/frontier.png")
    print(f"written: {runs[0]}/frontier.png, and studies.jsonl in the folder of each run")


if __name__ == "__main__":
    show.program("data.frontier", main)
