"""What a person sees of a command: flags, progress, summary, curves, errors."""
import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import textwrap

from data import dataset

PANELS = {"reward": ("reward", "true_reward"), "KL, nats per response": ("kl", "kl_k3"),
          "entropy, nats per token": ("entropy",), "clip fraction": ("clip_fraction",),
          "explained variance of V": ("explained_variance",), "tokens per response": ("length",)}

def visible(text):
    """The text in one line; control characters and escape sequences are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in " ".join(str(text).split()))

def fold(text, indent=0):
    """The text in lines of the terminal's width, at most 100, the later ones indented."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(visible(text), max(width, 40), subsequent_indent=" " * indent)

def describe(data, device):
    """Print what will be trained on, and what was left out."""
    a, b = data.train, data.held_out
    print(f"data: {len(a.documents):,} documents, {len(a.comparisons):,} comparisons, "
          f"{len(a.prompts):,} prompts; held out {len(b.documents):,}, {len(b.comparisons):,}, "
          f"{len(b.prompts):,}; vocabulary {data.eos_token + 1:,}; device {device}")
    for reason, rows in sorted(data.skipped.items()):
        print(f"skipped: {rows:,} rows: {reason}")
    for note in data.notes:
        print(f"note: {note}")

def progress(stage, seconds, metrics):
    """One line that refreshes on a terminal; elsewhere a plain line for each tenth of the way."""
    step, steps = metrics["step"], metrics["steps"]
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if not terminal and step % max(1, steps // 10) and step != steps:
        return
    names = ("loss", "accuracy", "reward", "true_reward", "kl", "entropy", "length")
    figures = "  ".join(f"{name} {metrics[name]:z.2f}" for name in names if name in metrics)
    line = f"{stage} {step}/{steps}  {figures}  {seconds / step * (steps - step):.0f} s left"
    if terminal:
        line = f"\r\033[K{line[:shutil.get_terminal_size().columns - 1]}"
    print(line, end="" if terminal and step < steps else "\n", flush=True)

def summary(record, samples, out):
    """Print samples before and after on the same prompts, and the evaluation record."""
    judge = "true_reward" if "true_reward_lm" in record else "reward"
    print("\nHeld-out prompts, continued by the language model and by the PPO policy\n")
    for sample in samples[:5]:
        for side, name in (("lm", "before"), ("ppo", " after")):
            text = f"{sample[f'{judge}_{side}']:+z.2f}  {sample['prompt']}|{sample[side]}"
            print(name, fold(text, indent=14))
        print()
    print(f"{'':34}{'language model':>16}{'PPO':>12}")
    both = [name[:-3] for name in record if name.endswith("_lm") and f"{name[:-3]}_ppo" in record]
    for name in both:
        print(f"{name:34}{record[f'{name}_lm']:z16.3f}{record[f'{name}_ppo']:z12.3f}")
    for name, value in record.items():
        if name.removesuffix("_lm").removesuffix("_ppo") not in both:
            print(f"{name:34}{value:z28.3f}")
    print(f"\nwritten to {out}: log.jsonl, samples.jsonl, lm.pt, reward.pt, policy.pt{curves(out)}")

def curves(out):
    """Write curves.png from log.jsonl if matplotlib can; returns what to say of it."""
    try:
        from matplotlib.figure import Figure
        rows = [row for row in dataset.read_records(f"{out}/log.jsonl") if row["stage"] == "ppo"]
        figure = Figure(figsize=(12, 6), layout="constrained", facecolor="white")
        for axis, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items()):
            for name in names:
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot([x for x, _ in points], [y for _, y in points], label=name)
            axis.set(title=title, xlabel="PPO iteration")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(f"{out}/curves.png", dpi=110)
        return ", curves.png"
    except Exception as error:  # optional: not installed, its settings broken, the disk full
        return f" (no curves.png: {visible(error)})"

def parse(parser, Config, argv=None):
    """Add a flag for each field of Config, and return those given: {name: value}.

    "none" means None; Config names and refuses any non-number.
    """
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: {visible(text)}; see --help\n")
    fields = dataclasses.fields(Config)
    for stage, group in itertools.groupby(fields, key=lambda f: f.metadata["stage"]):
        section = parser.add_argument_group(stage)
        for f in group:
            flags = ["--data_dir", "--data"] if f.name == "data_dir" else [f"--{f.name}"]
            text = f"{f.metadata['help']} ({f.default})".replace("%", "%%")
            section.add_argument(*flags, metavar="X", default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    for f in fields:
        kind = getattr(f.type, "__args__", [f.type])[0]
        with contextlib.suppress(KeyError, ValueError):  # not given, or no number
            given[f.name] = None if given[f.name].lower() == "none" else kind(given[f.name])
    return given

def program(name, main):
    """Run a command's main(). What a user can get wrong is one line and exit status 2."""
    if sys.stdout is not None:  # a terminal that lacks a letter shows "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        return main()
    except BrokenPipeError:  # whoever read the output has gone
        status, problem = 1, ""
    except KeyboardInterrupt:
        status, problem = 130, "stopped; for rlhf.py, the same command, without --fresh, goes on"
    except OSError as error:  # file writers add the name
        status, problem = 2, f"{error.filename or 'standard output'}: {error.strerror or error}"
    except (ValueError, FloatingPointError, ImportError) as error:  # no matplotlib, say
        status, problem = 2, error
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        status, problem = 2, f"not enough memory for these sizes: {str(error)[:200]}"
    if problem:
        print(f"{name}: {visible(problem)}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or a broken output fails once more at exit
    sys.exit(status)
