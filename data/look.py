"""Looks into a finished run: continuations side by side, or one trajectory as a table.

    python -m data.look sample "The acting in"     by the language model and by the PPO policy
    python -m data.look explain ["The acting in"]  every column of the derivation, and its sums
"""
import argparse
import itertools
import shutil
import textwrap
from dataclasses import replace

import rlhf
from data import dataset, show


def load_run(out_dir, given):
    """(lm, reward_model, policy, config, encoding) of a finished run; `given` settings override."""
    rlhf.Config(**given)  # refuses what is out of range
    device = rlhf.pick_device(given.get("device", "auto"))
    (lm, *_), (reward_model, *_), (policy, config, encoding) = (
        rlhf.load(f"{out_dir}/{name}", device) for name in rlhf.FILES.values())
    config = replace(config, **given | {"out_dir": str(out_dir)})
    return lm, reward_model, policy, config, encoding


def sample(models, prompt, n):
    """Print n continuations of a prompt by the language model and the policy, side by side."""
    lm, reward_model, policy, config, encoding = models
    eos, columns = lm.config.eos_token, []
    for model, name in ((lm, "language model"), (policy, "PPO policy")):
        r = rlhf.rollout(model, [[eos, *encoding.encode_ordinary(prompt)]] * n,
                         config.max_new_tokens, eos, config.temperature,
                         rlhf.seeded(config.seed, "sample", 0))
        ref_log_probs, _ = rlhf.read_responses(lm, r, config)
        kl, _ = rlhf.kl_estimates(r.log_probs, ref_log_probs, r.mask)
        scores, texts = rlhf.reward_scores(reward_model, r), [name]
        for score, nats, response in zip(scores.tolist(), kl.tolist(), r.lists()[1]):
            texts.append(f"[score {score:+.2f}, KL {nats:z.1f}]{decode(encoding, response)}")
        columns.append(texts)
    print(show.visible(prompt))
    width = max((shutil.get_terminal_size().columns - 3) // 2, 8)
    for texts in zip(*columns):
        sides = [textwrap.wrap(show.visible(text), width) for text in texts]
        for left, right in itertools.zip_longest(*sides, fillvalue=""):
            print(f"{left:{width}} | {right}")
        print()


def decode(encoding, tokens):
    """The text of tokens, without end tokens."""
    return encoding.decode([t for t in tokens if t != encoding.eot_token], errors="replace")


def explain(models, prompt):
    """Print one trajectory of the policy: a row per time step, and the sums that tie the columns.

    The ratio is clip(π_new / π, 1 ± ε) after one update on this trajectory alone.
    """
    lm, reward_model, policy, config, encoding = models
    eos = lm.config.eos_token
    e = rlhf.collect(policy, lm, lambda r: rlhf.reward_scores(reward_model, r),
                     [[eos, *encoding.encode_ordinary(prompt)]], config,
                     rlhf.seeded(config.seed, "explain", 0))
    optimizer = rlhf.make_optimizer(policy)
    rlhf.ppo_update(policy, optimizer, e, replace(config, ptx_coef=0.0))
    log_probs, _ = rlhf.read_responses(policy, e, config)

    columns = {"log π": e.log_probs, "log ref": e.ref_log_probs,
               "KL": e.log_probs - e.ref_log_probs, "r": e.rewards,
               "to-go": rlhf.rewards_to_go(e.rewards, e.mask, config.gamma), "V": e.values,
               "δ": rlhf.gae(e.rewards, e.values, e.mask, config.gamma, lam=0.0),
               "A": e.advantages, "ratio": (log_probs - e.log_probs).exp()}
    columns = {name: values[0].tolist() for name, values in columns.items()}
    prompts, responses = e.lists()
    print(show.fold(f"{prompt}|{decode(encoding, responses[0])}"))
    print(f"\nP = {len(prompts[0])} tokens of prompt, so row t is read at position "
          f"{len(prompts[0]) - 1} + t\n")
    print(f" t {'token':11}" + "".join(f"{name:>8}" for name in columns))
    for t, (token, *row) in enumerate(zip(responses[0], *columns.values())):
        text = "<end>" if token == eos else decode(encoding, [token]).replace(" ", "·")
        low, high = 1 - config.clip, 1 + config.clip
        clipped = "*" if not low <= row[-1] <= high else ""
        row[-1] = min(max(row[-1], low), high)
        print(f"{t:2} {show.visible(text)[:11]:11}" + "".join(f"{x:z8.3f}" for x in row) + clipped)
    print(f"\nratio: clip(π_new / π, 1 ± {config.clip:g}) after one update on this trajectory "
          "alone, which\npushes it up where A is above its mean; * where it was clipped\n")
    if not bool(rlhf.ends(e, eos)) and config.missing_eos_score is not None:
        print("the response was cut: its score is missing_eos_score")
    print("\n".join(sums(columns, float(e.scores), config)))


def sums(columns, score, config):
    """Lines that tie the columns together; what would stand after the last step is 0."""
    beta, gamma, lam = config.kl_coef, config.gamma, config.lam
    r, to_go, V, delta, A = (columns[name] + [0.0] for name in ("r", "to-go", "V", "δ", "A"))
    kl, telescoped = sum(columns["KL"]), sum(gamma**t * d for t, d in enumerate(delta))
    lines = (
        ("Σ r = score - β Σ KL", f"{sum(r):.3f} = {score:.3f} - {beta:g} · {kl:.3f}"),
        ("to-go_0 = r_0 + γ to-go_1", f"{to_go[0]:.3f} = {r[0]:.3f} + {gamma:g} · {to_go[1]:.3f}"),
        ("δ_0 = r_0 + γ V_1 - V_0",
         f"{delta[0]:.3f} = {r[0]:.3f} + {gamma:g} · {V[1]:.3f} - {V[0]:.3f}"),
        ("A_0 = δ_0 + γλ A_1", f"{A[0]:.3f} = {delta[0]:.3f} + {gamma * lam:g} · {A[1]:.3f}"),
        ("Σ γ^t δ_t = to-go_0 - V_0", f"{telescoped:.3f} = {to_go[0]:.3f} - {V[0]:.3f}"),
        ("A_0 + V_0 = r_0 + γ (V_1 + λ A_1)",
         f"{A[0] + V[0]:.3f} = {r[0]:.3f} + {gamma:g} · ({V[1]:.3f} + {lam:g} · {A[1]:.3f})"))
    return [f"{formula:34} {numbers}" for formula, numbers in lines] + [
        "A_0 + V_0 is the return, which V(s_0) is trained towards"]


def main():
    """The command, a prompt, and flags that override the run's own settings."""
    parser = argparse.ArgumentParser(prog="data.look", allow_abbrev=False,
                                     usage="python -m data.look {sample,explain} [PROMPT] [--X V]",
                                     description="Looks into the finished run in out_dir.")
    parser.add_argument("command", choices=("sample", "explain"))
    parser.add_argument("prompt", nargs="?", help="a text; without it, a held-out prompt")
    parser.add_argument("--n", type=int, default=3, help="continuations by each model (3)")
    given = show.parse(parser, rlhf.Config)
    command, prompt, n = given.pop("command"), given.pop("prompt"), given.pop("n")
    models = load_run(given.get("out_dir", "out"), given)
    config = models[3]
    if prompt is None:
        samples = dataset.read_records(f"{config.out_dir}/samples.jsonl")
        prompt = samples[config.seed % len(samples)]["prompt"]
    sample(models, prompt, n) if command == "sample" else explain(models, prompt)


if __name__ == "__main__":
    show.program("data.look", main)
