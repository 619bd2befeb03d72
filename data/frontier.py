"""Over-optimisation in one picture: `python data/frontier.py` draws out/frontier.png.

How far may a policy follow a learned reward before the true one falls? Reward against √KL(π‖π_ref),
as Gao et al. 2022 (2210.10760) draw it, for two optimisers of the same reward model:

    PPO at several kl_coef: KL as measured on held-out prompts
    best-of-n: sample n responses, keep the one that scores best; KL = log n − (n−1)/n (an upper
        bound where one response can be drawn twice, Beirami et al. 2024, 2401.01879)

Both rewards are shown as gains over the language model's mean, in its standard deviations. Each
seed trains its own language model and reward model. Figures are appended to out/frontier.jsonl as
they come; what stands there is not made again, so a stopped study goes on with the same command.
"""
import argparse
import contextlib
import hashlib
import math
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402  (the line above makes this work as a script)

import rlhf  # noqa: E402
from data import dataset  # noqa: E402

SEEDS, KL_COEFS = (0, 1, 2), (0.0, 0.05, 0.2)
SAMPLES, PROMPTS = 128, 64  # for best-of-n: the largest n, and held-out prompts
COLOURS = {"reward": "#c2571a", "true_reward": "#2563a8"}


def ppo(config, data):
    """One run of PPO, measured on its held-out samples; its path is that of training's batches."""
    out = Path(config.out_dir)
    with open(out / "run.log", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        rlhf.run(config, next((s for s in rlhf.FILES if made_otherwise(s, config, data)), None))
    samples = dataset.read_records(out / "samples.jsonl")
    log = [row for row in dataset.read_records(out / "log.jsonl") if row["stage"] == "ppo"]

    def column(name):
        return torch.tensor([sample[name] for sample in samples], dtype=torch.float64)

    record = {"kl_coef": config.kl_coef, "kl": float(column("kl").mean())}
    for name in COLOURS:
        record |= {name: float(column(f"{name}_ppo").mean())} | moments(name, column(f"{name}_lm"))
    return record | {"path": [[round(row[k], 3) for k in ("kl", *COLOURS)] for row in log]}


def made_otherwise(stage, config, data):
    """Whether the folder has a stage of other settings; what matters of it is in frontier.jsonl."""
    try:
        rlhf.find_checkpoint(stage, config, data)
        return False
    except ValueError:
        return True


def moments(name, rewards):
    """The language model's mean and standard deviation, by which gains are measured."""
    return {f"{name}_lm": float(rewards.mean()), f"{name}_std_lm": float(rewards.std())}


def best_of_n(config, data, samples=SAMPLES, prompts=PROMPTS):
    """Both rewards of the response that the reward model likes best of n, n = 1, 2, 4, …"""
    lm, reward_model, _, config, _ = rlhf.load_models(config)
    true_reward, eos = rlhf.true_reward_fn(data), lm.config.eos_token
    scores = {name: [] for name in COLOURS}
    for i, prompt in enumerate(data.held_out.prompts[:prompts]):
        r = rlhf.rollout(lm, [prompt] * samples, config.max_new_tokens, eos, config.temperature,
                         rlhf.seeded(config.seed, "best of n", i))
        scores["reward"].append(rlhf.reward_scores(reward_model, r))
        scores["true_reward"].append(true_reward(r))
    scores = {name: torch.stack(x).double().cpu() for name, x in scores.items()}
    n = [2**k for k in range(samples.bit_length())]
    record = {"n": n, "kl": [math.log(k) - (k - 1) / k for k in n]}
    for name in COLOURS:
        record[name] = [expected_best(scores["reward"], scores[name], k) for k in n]
        record |= moments(name, scores[name])
    return record


def expected_best(scores, values, n):
    """E[value of the best-scored of n], averaged over rows; scores, values: (prompts, N), n <= N.

    Over all subsets of n of the N samples, not one: the i-th lowest score (from 0) is the highest
    of C(i, n−1) of the C(N, n) subsets. (Gao et al. 2022 estimate it in the same way.)
    """
    N = scores.shape[1]
    weights = values.new_tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    return float((values.gather(1, scores.argsort(1)) @ weights).mean())


def study(configs, out, **sizes):
    """The records of PPO under each config and of best-of-n for each seed; see the top."""
    path, first = Path(out) / "frontier.jsonl", configs[0]
    data = dataset.load(first.data_dir, first.block_size, first.max_new_tokens)
    done = {r["settings"]: r for r in (dataset.read_records(path) if path.exists() else [])}
    jobs = [("ppo", c) for c in configs]
    jobs += [("best_of_n", c) for c in {c.seed: c for c in configs}.values()]
    records = []
    for i, (method, config) in enumerate(jobs, 1):
        stage = {"ppo": "ppo", "best_of_n": "reward_model"}[method]
        settings = repr((method, rlhf.stage_settings(config, data, stage), sizes))
        settings = hashlib.sha256(settings.encode()).hexdigest()[:16]
        if settings not in done:
            at, start = f", kl_coef {config.kl_coef:g}" * (method == "ppo"), time.perf_counter()
            print(f"{i}/{len(jobs)} {method}, seed {config.seed}{at}", end=": ", flush=True)
            reuse_stages(Path(out), Path(config.out_dir))
            figures = ppo(config, data) if method == "ppo" else best_of_n(config, data, **sizes)
            done[settings] = {"method": method, "seed": config.seed, "settings": settings} | figures
            dataset.append_record(path, done[settings])
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
        records.append(done[settings])
    return records


def reuse_stages(source, target):
    """Start a seed's folder with the models of a run in `source`; those of other settings are
    noticed and made anew."""
    if not target.exists():
        target.mkdir(parents=True)
        for name in ("lm.pt", "reward.pt", "log.jsonl"):
            if (source / name).exists():
                shutil.copy(source / name, target / name)


def gain(record, name, value):
    """A reward, or a list of them, in standard deviations above the language model's mean."""
    return (torch.as_tensor(value) - record[f"{name}_lm"]) / record[f"{name}_std_lm"]


def draw(records, out):
    """Write frontier.png if matplotlib is installed; returns what to say of it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no frontier.png: matplotlib is not installed"
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    best = [r for r in records if r["method"] == "best_of_n"]
    coefs = sorted({r["kl_coef"] for r in records if r["method"] == "ppo"})
    for i, (name, colour) in enumerate(COLOURS.items()):
        kind = {"reward": "learned", "true_reward": "true"}[name]
        for j, kl_coef in enumerate(coefs):
            runs = [r for r in records if r.get("kl_coef") == kl_coef]
            points = torch.tensor([[max(r["kl"], 0)**0.5, gain(r, name, r[name])] for r in runs])
            x, y = points.mean(0).tolist()
            axis.scatter(*points.T, s=10, color=colour, alpha=0.4)
            axis.plot(x, y, "o", color=colour,
                      label=f"{kind} reward, PPO at the end, by kl_coef" if j == 0 else None)
            axis.annotate(f"{kl_coef:g}", (x, y), (0, -14 if i else 7), ha="center", fontsize=8,
                          textcoords="offset points", color=colour)
            for k, r in enumerate(runs if j == 0 else ()):  # how those without a penalty got there
                path = torch.tensor(r["path"]).unfold(0, min(5, len(r["path"])), 1).mean(2)
                axis.plot(path[:, 0].clamp_min(0).sqrt(), gain(r, name, path[:, i + 1]), lw=1,
                          color=colour, alpha=0.6, label=None if k else
                          f"{kind} reward, PPO's iterations at kl_coef {kl_coef:g}")
        curve = torch.stack([gain(r, name, r[name]) for r in best]).mean(0)
        axis.plot(torch.tensor(best[0]["kl"]).sqrt(), curve, "s--", ms=4, color=colour,
                  label=f"{kind} reward, best of n = 1, 2, 4 … {best[0]['n'][-1]}")
    axis.axhline(0, color="0.5", lw=0.8)
    axis.set_xlabel("√KL to the language model (KL in nats a response)")
    axis.set_ylabel("gain over the language model, standard deviations")
    axis.set_title(f"Learned and true reward against the distance moved ({len(best)} seeds)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(Path(out) / "frontier.png", dpi=110, facecolor="white")
    plt.close(figure)
    return f"written: {Path(out) / 'frontier.png'}"


def main(argv=None):
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=KL_COEFS)
    parser.add_argument("--out_dir", default="out", help="models of a run there are used")
    parser.add_argument("--draw", action="store_true", help="only draw what frontier.jsonl holds")
    words = parser.parse_args(argv)
    out = Path(words.out_dir)
    try:
        if words.draw:
            records = dataset.read_records(out / "frontier.jsonl")
        else:
            folder = str(out / "frontier" / "seed")
            records = study([rlhf.Config(seed=seed, kl_coef=kl_coef, out_dir=f"{folder}{seed}",
                                         eval_prompts=256)
                             for seed in words.seeds for kl_coef in words.kl_coefs], out)
        print(draw(records, out))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"frontier.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
