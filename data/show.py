"""What a person sees of a run: progress, summary, curves, errors. Numbers in, lines out."""
import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import textwrap
from pathlib import Path

from data import dataset

PANELS = ((("reward", "true_reward"), "reward"),
          (("kl", "kl_k3"), "KL to the language model, nats per response"),
          (("entropy",), "entropy, nats per token"), (("clip_fraction",), "clip fraction"),
          (("explained_variance",), "explained variance of V"), (("length",), "tokens per response"))


def visible(text):
    """The text in one line; control characters and escape sequences are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in " ".join(str(text).split()))


def columns():
    """The terminal's width, at most 100."""
    return min(shutil.get_terminal_size().columns, 100)


def describe(data, device):
    """Print what will be trained on, and what was left out."""
    a, b = data.train, data.held_out
    print(f"data: {len(a.documents):,} documents, {len(a.comparisons):,} comparisons, "
          f"{len(a.prompts):,} prompts; held out {len(b.documents):,}, {len(b.comparisons):,}, "
          f"{len(b.prompts):,}; vocabulary {data.eos_token + 1:,}; device {device}")
    for reason, rows in sorted(data.skipped.items()):
        print(f"skipped: {rows:,} rows of {reason}")
    for note in data.notes:
        print(f"note: {note}")


def progress(stage, seconds, metrics):
    """One line that refreshes on a terminal; elsewhere a plain line for each tenth of the way."""
    step, steps = metrics["step"], metrics["steps"]
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if not terminal and step % max(1, steps // 10) and step != steps:
        return
    names = ("loss", "accuracy", "reward", "true_reward", "kl", "entropy", "length")
    figures = "  ".join(f"{name} {metrics[name]:.2f}" for name in names if name in metrics)
    line = f"{stage} {step}/{steps}  {figures}  {seconds / step * (steps - step):.0f} s left"
    if terminal:
        print(f"\r\033[K{line[:columns() - 1]}", end="\n" if step == steps else "", flush=True)
    else:
        print(line)


def summary(record, samples, out):
    """Print samples before and after on the same prompts, and the evaluation record."""
    judge = "true_reward" if "true_reward_lm" in record else "reward"
    print("\nHeld-out prompts, continued by the language model and by the PPO policy\n")
    for sample in samples[:5]:
        for side, name in (("lm", "before"), ("ppo", "after")):
            text = visible(f"{sample['prompt']}|{sample[side]}")
            line = f"{name:>6} {sample[f'{judge}_{side}']:+6.2f}  {text}"
            print(textwrap.fill(line, columns(), subsequent_indent=" " * 15))
        print()
    print(f"{'':34}{'language model':>16}{'PPO':>12}")
    for name in ("reward", "true_reward", "ended", "length"):
        if f"{name}_lm" in record:
            print(f"{name:34}{record[f'{name}_lm']:16.3f}{record[f'{name}_ppo']:12.3f}")
    pairs = {f"{name}_{side}" for name in ("reward", "true_reward", "ended", "length")
             for side in ("lm", "ppo")}
    for name, value in record.items():
        if name not in pairs:
            print(f"{name:34}{value:28.3f}")
    print(f"\nwritten to {out}/: log.jsonl, samples.jsonl, lm.pt, reward.pt, policy.pt"
          f"{curves(out)}")


def curves(out):
    """Write curves.png from log.jsonl if matplotlib can; returns what to say of it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:  # not installed, or its own settings are broken
        return f" (no curves.png: matplotlib: {visible(error)})"
    rows = [row for row in dataset.read_records(Path(out) / "log.jsonl") if row["stage"] == "ppo"]
    figure = Figure(figsize=(12, 6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # draws to a file, whatever backend the caller has chosen
    for axis, (names, title) in zip(figure.subplots(2, 3).flat, PANELS):
        for name in names:
            if rows and name in rows[0]:
                axis.plot([row["step"] for row in rows], [row.get(name) for row in rows],
                          label="learned reward" if name == "reward" else name.replace("_", " "))
        axis.set(title=title, xlabel="PPO iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1 and rows:
            axis.legend()
    figure.savefig(Path(out) / "curves.png", dpi=110)
    return ", curves.png"


def parse(parser, Config, argv=None):
    """Add a flag for each field of Config, and return those given: {name: value}.

    --kl-coef means --kl_coef; none means None; what is no number Config refuses by name.
    """
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    fields, sections = {f.name: f for f in dataclasses.fields(Config)}, {}
    for name, f in fields.items():
        stage = f.metadata["stage"]
        if stage not in sections:
            sections[stage] = parser.add_argument_group(stage)
        flags = ["--data_dir", "--data"] if name == "data_dir" else [f"--{name}"]
        sections[stage].add_argument(*flags, dest=name, metavar="X", default=argparse.SUPPRESS,
                                     help=f"{f.metadata['help']} ({f.default})".replace("%", "%%"))
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            words[i] = "--" + flag[2:].replace("-", "_") + equals + value
    given = vars(parser.parse_args(words))
    for name in given.keys() & fields.keys():
        kind = getattr(fields[name].type, "__args__", [fields[name].type])[0]
        with contextlib.suppress(ValueError):
            given[name] = None if given[name].lower() == "none" else kind(given[name])
    return given


def program(name, main):
    """Run a command's main(). What a user can get wrong is one line and exit status 2."""
    if sys.stdout is not None:  # a terminal that lacks a letter shows "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        status, problem = 0, None
    except KeyboardInterrupt:
        status, problem = 130, "stopped; the same command, without --fresh, goes on"
    except BrokenPipeError:  # whoever read the output has gone
        status, problem = 1, None
    except OSError as error:
        where = error.filename or "standard output"  # what writes files names them
        status, problem = 2, f"{where}: {error.strerror or error}"
    except (ValueError, FloatingPointError) as error:
        status, problem = 2, error
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        status, problem = 2, f"not enough memory for these sizes: {str(error)[:200]}"
    if problem is not None:
        print(f"{name}: {visible(problem)}", file=sys.stderr)
    if status:  # what is left in a broken output's buffer would fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(status)
