"""You are the human: two continuations of a prompt, your answer, a line of preferences.jsonl.

    python data/label.py                                  asks; the answers go to labels/
    python rlhf.py --data labels --out_dir out_labels     trains on them

The model of the run in out/ (policy.pt, else lm.pt) continues the prompts that it was trained with.
Keys: l or ← the left one is better, r or → the right one, s skip, u undo, q quit. They may also
come through a pipe. An answer is on the disk before the next question is asked.
"""
import argparse
import contextlib
import json
import os
import select
import shutil
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlhf  # noqa: E402  (the line above makes this work as a script)
from data import dataset  # noqa: E402

KEYS = {b"l": "left", b"\x1b[D": "left", b"r": "right", b"\x1b[C": "right", b"s": "skip",
        b"u": "undo", b"q": "quit", b"\x04": "quit", b"": "quit"}  # Ctrl-D, and the pipe's end
HELP = "l left   r right   s skip   u undo   q quit"


@contextlib.contextmanager
def single_keys(fd):
    """A terminal hands over each key at once and unseen; its settings come back in any case."""
    if not os.isatty(fd):
        yield
        return
    import termios  # not on every system
    import tty
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def read_key(fd):
    """left, right, skip, undo or quit; whatever else comes, line ends too, is passed over."""
    while True:
        key = os.read(fd, 1)
        if key == b"\x1b" and select.select([fd], [], [], 0.05)[0]:  # an arrow is three bytes
            key += os.read(fd, 2)
        if key in KEYS:
            return KEYS[key]


def questions(model, config, data, seen, number):
    """Yield (prompt, two continuations, whether each was cut), never one whose key is in `seen`.

    `number` seeds the first draw: a later sitting, with more answers behind it, draws others.
    """
    prompts = data.train.prompts + data.held_out.prompts
    tries = 0
    while tries < 100:
        generator = rlhf.seeded(config.seed, "label", number)
        prompt = prompts[torch.randint(len(prompts), (), generator=generator)]
        r = rlhf.rollout(model, [prompt] * 2, config.max_new_tokens, data.eos_token,
                         config.temperature, generator)
        texts = [data.text(a[m].tolist()) for a, m in zip(r.actions, r.mask)]
        key = (data.text(prompt), frozenset(texts))
        number, tries = number + 1, tries + 1
        if len(set(texts)) == 2 and all(text.strip() for text in texts) and key not in seen:
            seen.add(key)
            tries = 0
            yield key[0], texts, (~rlhf.ends(r, data.eos_token)).tolist()
    print("\nthe model has nothing new to compare")


def printable(text):
    """What a terminal may get: no escape sequence."""
    return "".join(c if c.isprintable() else " " for c in text)


def show(prompt, texts, cut):
    """The prompt, and below it both continuations side by side."""
    width = shutil.get_terminal_size().columns - 1
    print("\n" + "\n".join(textwrap.fill(printable(line), width) for line in prompt.split("\n")))
    left, right = ("…" + printable(text) + " […]" * c for text, c in zip(texts, cut))
    print(f"\n{rlhf.side_by_side(left, right)}\n\n{HELP}", flush=True)


def append(file, line):
    """Write at the end of the file; returns where that was, when all is on the disk."""
    start = file.seek(0, os.SEEK_END)
    if file.write(line) < len(line):  # a full disk: half a line would spoil the file
        file.truncate(start)
        raise OSError(f"no room for another answer in {file.name}")
    os.fsync(file.fileno())
    return start


def sitting(file, pairs, fd):
    """Ask, write each answer at once, until quit; returns the number of answers that stand."""
    answers, again = [], []  # (offset before, offset after, pair); pairs to be asked again
    with single_keys(fd):
        while pair := again.pop() if again else next(pairs, None):
            show(*pair)
            key = read_key(fd)
            print(f"→ {key}")
            if key == "quit":
                break
            if key in ("left", "right"):
                prompt, (left, right), _ = pair
                chosen, rejected = (left, right) if key == "left" else (right, left)
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                start = append(file, line)
                answers.append((start, start + len(line), pair))
            elif key == "undo":
                again.append(pair)
                if not answers or file.seek(0, os.SEEK_END) != answers[-1][1]:
                    print("nothing of this sitting to undo at the end of the file")
                    continue
                start, _, undone = answers.pop()
                file.truncate(start)
                append(file, b"")
                again.append(undone)
    return len(answers)


def complete(directory, config, data):
    """Put beside the answers what a data directory needs to train a model like this one."""
    for name in ("corpus.txt", "prompts.txt", "tokenizer.tiktoken"):
        source, target = Path(config.data_dir) / name, directory / name
        if target.exists() or (config.init and name == "tokenizer.tiktoken"):
            continue
        if source.is_file():
            shutil.copyfile(source, target)
        elif name == "prompts.txt":  # one a line: those of several lines have to stay out
            texts = [data.text(prompt) for prompt in data.train.prompts + data.held_out.prompts]
            lines = [text for text in texts if text.strip() and len(text.splitlines()) == 1]
            if lines:
                target.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def label(out, directory, fd=0):
    """Ask about continuations by the run in `out`; keys come from `fd`, answers to `directory`."""
    out, directory = Path(out), Path(directory)
    policy, path = out / "policy.pt", directory / "preferences.jsonl"
    if directory.resolve() == dataset.SHIPPED:
        raise ValueError(f"{directory}: the shipped data, expected a directory of your own")
    model, config, encoding = rlhf.load_model(policy if policy.exists() else out / "lm.pt")
    data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens, encoding)
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot append to {path}: not a file")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise ValueError(f"cannot append to {path}: {error}") from None
    with file:
        rows = [row for row in dataset.read_pairs(path) if row]
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            append(file, b"\n")
        complete(directory, config, data)
        seen = {(prompt, frozenset((chosen, rejected))) for prompt, chosen, rejected in rows}
        count = sitting(file, questions(model, config, data, seen, len(rows)), fd)
    init = f" --init {config.init}" if config.init else ""
    print(f"\nanswers in {path}: {len(rows) + count}; to train on them: "
          f"python rlhf.py --data {directory} --out_dir out_labels{init}")


def main(argv=None):
    """Entry of the command line. What a user can get wrong is one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="label.py", description="Say which of two continuations is better.", epilog=HELP)
    parser.error = lambda message: parser.exit(2, f"label.py: {message}; see --help\n")
    parser.add_argument("--out_dir", "--out-dir", default="out", metavar="DIR",
                        help="the run whose model is asked about (%(default)s)")
    parser.add_argument("--data", default="labels", metavar="DIR",
                        help="where the answers go, for rlhf.py --data (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        label(arguments.out_dir, arguments.data)
    except KeyboardInterrupt:
        print("\nstopped; every answer is saved", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"label.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
