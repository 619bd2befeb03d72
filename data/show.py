"""What a person sees of a command: flags, progress, summary, curves, errors."""
import argparse
import contextlib
import dataclasses
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
    figures = "  ".join(f"{name} {metrics[name]:.2f}" for name in names if name in metrics)
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
            text = f"{sample[f'{judge}_{side}']:+.2f}  {sample['prompt']}|{sample[side]}"
            print(name, fold(text, indent=14))
        print()
    print(f"{'':34}{'language model':>16}{'PPO':>12}")
    both = [name[:-3] for name in record if name.endswith("_lm") and f"{name[:-3]}_ppo" in record]
    for name in both:
        print(f"{name:34}{record[f'{name}_lm']:16.3f}{record[f'{name}_ppo']:12.3f}")
    for name, value in record.items():
        if name.removesuffix("_lm").removesuffix("_ppo") not in both:
            print(f"{name:34}{value:28.3f}")
    print(f"\nwritten to {out}/: log.jsonl, samples.jsonl, lm.pt, reward.pt, policy.pt{curves(out)}")


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
            if len(names) > 1:
                axis.legend()
        figure.savefig(f"{out}/curves.png", dpi=110)
        return ", curves.png"
    except Exception as error:  # optional: not installed, its settings broken, the disk full
        return f" (no curves.png: {visible(error)})"


def parse(parser, Config, argv=None):
    """Add a flag for each field of Config, and return those given: {name: value}.

    "none" means None, and what is no number Config refuses by name.
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
    given = vars(parser.parse_args(argv))
    for name in given.keys() & fields.keys():
        kind = getattr(fields[name].type, "__args__", [fields[name].type])[0]
        with contextlib.suppress(ValueError):
            given[name] = None if given[name].lower() == "none" else kind(given[name])
    return given


def program(name, main):
    """Run a command's main(). What a user can get wrong is one line and exit status 2."""
    if sys.stdout is not None:  # a terminal that lacks a letter shows "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    status, problem = 2, None
    try:
        return main()
    except KeyboardInterrupt:
        status, problem = 130, "stopped; the same command, without --fresh, goes on"
    except BrokenPipeError:  # whoever read the output has gone
        status = 1
    except OSError as error:  # what writes files names them
        problem = f"{error.filename or 'standard output'}: {error.strerror or error}"
    except (ValueError, FloatingPointError) as error:
        problem = error
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        problem = f"not enough memory for these sizes: {str(error)[:200]}"
    if problem is not None:
        print(f"{name}: {visible(problem)}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or a broken output fails once more at exit
    sys.exit(status)
