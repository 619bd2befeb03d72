"""You are the annotator: pick one of two continuations, and preferences.jsonl gains a line.

    python -m data.label                                  asks; the answers go to labels/
    python rlhf.py --data labels --out_dir out_labels     trains on them

The model of the run in out/ (policy.pt, else lm.pt) continues the prompts that it was trained on.
An answer is on the disk before the next question is asked.
"""
import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch

import rlhf
from data import dataset, show

HELP = "1 or 2: the better one   s: skip   u: undo the last answer   q: quit"


def questions(model, config, data, seen, first):
    """Yield (prompt, two continuations) that differ and are not in `seen`, until none comes up.

    first: seeds the first draw, so that a later sitting draws other questions.
    """
    prompts, failures = data.train.prompts, 0
    for number in itertools.count(first):
        generator = rlhf.seeded(config.seed, "label", number)
        prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
        r = rlhf.rollout(model, [prompt] * 2, config.max_new_tokens, data.eos_token,
                         config.temperature, generator)
        pair = data.text(prompt), *(data.text(response) for response in r.lists()[1])
        failures += 1
        if pair[1] != pair[2] and pair[1].strip() and pair[2].strip() and pair not in seen:
            failures = 0
            yield pair
        if failures == 100:
            print("the model has nothing new to compare")
            return


def ask(prompt, one, two):
    """Show a question, and return the answer: 1, 2, s, u or q; the end of the input is q."""
    print("\n" + show.fold(prompt + " …"))
    for name, text in (("1", one), ("2", two)):
        print(show.fold(f"{name}: {text}", indent=3))
    while True:
        try:
            answer = input("> ").strip().lower()
        except (EOFError, RuntimeError):  # the input ended, or there is none
            return "q"
        if answer in ("1", "2", "s", "u", "q"):
            return answer
        print(HELP)


def undo(path, answers):
    """Take the last answer of this sitting off the file."""
    if not answers:
        print("nothing to undo")
        return
    row = answers.pop()
    lines = path.read_bytes().split(b"\n")
    last = max(i for i, line in enumerate(lines) if line and json.loads(line) == row)
    path.write_bytes(b"\n".join(lines[:last] + lines[last + 1:]))
    print(f"undone: {show.visible(row['chosen'])}")


def label(model, config, data, path):
    """Ask until the annotator quits; each answer is appended to `path`."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):  # an editor left the last line without an end
        path.write_bytes(text + b"\n")
    old = list(dataset.read_preferences(path)) if text else []
    seen = {(prompt, *order) for prompt, texts in old for order in (texts, texts[::-1])}
    answers = []
    print(HELP)
    for prompt, one, two in questions(model, config, data, seen, first=len(old)):
        answer = ask(prompt, one, two)
        while answer == "u":
            undo(path, answers)
            answer = ask(prompt, one, two)
        if answer == "q":
            break
        if answer in "12":
            chosen, rejected = (one, two) if answer == "1" else (two, one)
            answers.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            dataset.write_records(path, answers[-1:], "a")
            seen |= {(prompt, one, two), (prompt, two, one)}
    print(f"{len(answers)} new answers, {len(old) + len(answers)} in {path}")


def main():
    """Load the run's model and the prompts of its data, and ask."""
    parser = argparse.ArgumentParser(prog="data.label", allow_abbrev=False,
                                     usage="python -m data.label [--to FOLDER] [--SETTING VALUE]",
                                     description="Asks which of two continuations is better.")
    parser.add_argument("--to", default="labels", help="folder of the answers (labels)")
    given = show.parse(parser, rlhf.Config)
    folder, asked = Path(given.pop("to")), rlhf.Config(**given)
    path = Path(asked.out_dir) / "policy.pt"
    model, config, encoding = rlhf.load(path if path.exists() else path.with_name("lm.pt"),
                                        rlhf.pick_device(asked.device))
    config = replace(config, **given)
    data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens, encoding)
    folder.mkdir(parents=True, exist_ok=True)
    label(model, config, data, folder / "preferences.jsonl")


if __name__ == "__main__":
    show.program("data.label", main)
