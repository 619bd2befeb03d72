"""Reads and checks a data directory, and keeps the JSON-lines files of a run.

A broken line stops the program: DataError, one line `FILE:LINE: problem, expectation`. A row that
is unusable (identical answers, no room, …) is skipped and counted by its reason.
"""
import base64
import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

SHIPPED = Path(__file__).resolve().parent / "reviews"
# A word with its leading space, a number, signs, or white space: every text splits into these.
PATTERN = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
PIECE = re.compile(r" ?[^\W\d_]+(?:'[^\W\d_]+)?| ?\d+| ?(?:[^\w\s]|_)+|\s+")  # for Python's re
WORDS = 4000       # most common words kept whole by a tokenizer made here
LONGEST_TOKEN = 64  # bytes; a line of megabytes would otherwise take minutes to encode
HELD_OUT = 0.1     # share of documents, comparisons and prompts that nothing trains on
TURN = "\n\nAssistant:"
FORMS = ('expected {"prompt", "chosen", "rejected"}, {"prompt", "responses": [best, ..., worst]} '
         'or {"chosen", "rejected"}, each a text')


class DataError(ValueError):
    """Broken data; its text is one line for the user."""


@dataclass
class Split:
    """What trains, or what is held out, as lists of token ids."""
    documents: list = field(default_factory=list)    # [eos, …, eos]
    comparisons: list = field(default_factory=list)  # (prompt [eos, …], responses [… eos] by rank)
    prompts: list = field(default_factory=list)      # [eos, …]


@dataclass
class Dataset:
    """A data directory as tokens, with its tokenizer and an account of what was skipped."""
    encoding: tiktoken.Encoding
    eos_token: int     # ends every text; the last id
    train: Split
    held_out: Split
    skipped: Counter   # "preferences.jsonl: identical answers" -> rows
    notes: list        # lines: what else the reader of a run should know
    fingerprint: str   # sha256 of every byte that was read
    shipped: bool      # is this the data whose true reward is known?

    def text(self, tokens):
        """The text of a list of tokens, without end tokens; broken UTF-8 shows as U+FFFD."""
        return self.encoding.decode([t for t in tokens if t != self.eos_token], errors="replace")


def make_encoding(tokens, pattern=PATTERN):
    """tiktoken.Encoding of byte strings in the order of their ranks, and the end of text after."""
    return tiktoken.Encoding("rlhf", pat_str=pattern,
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": len(tokens)})


def encoding_state(encoding):
    """All that `make_encoding` needs to make the same tokenizer again: a checkpoint keeps it."""
    ranks = encoding._mergeable_ranks
    return {"tokens": sorted(ranks, key=ranks.get), "pattern": encoding._pat_str}


def train_encoding(texts):
    """A tokenizer of 256 bytes and the commonest words of `texts`, each whole with its space.

    tiktoken looks a whole word up before it merges bytes, so a model writes words and not letters.
    """
    counts = Counter(piece.encode() for text in texts for piece in PIECE.findall(text))
    words = [piece for piece in counts if 1 < len(piece) <= LONGEST_TOKEN]
    words = sorted(words, key=lambda piece: (-counts[piece], piece))[:WORDS]
    return make_encoding([bytes([byte]) for byte in range(256)] + words)


def read_encoding(path):
    """The tokenizer of a file of BPE ranks, checked first: tiktoken panics on some that are wrong.

    One line per token: its bytes in base64, a space, its rank; the ranks count up from 0.
    """
    tokens = {}
    for number, line in read_lines(path):
        word, _, rank = line.partition(" ")
        token = b""
        with contextlib.suppress(ValueError):
            token = base64.b64decode(word, validate=True)
        if not 1 <= len(token) <= 1024 or token in tokens or rank.strip() != str(len(tokens)):
            raise DataError(f"{path}:{number}: not a new token and its rank, expected base64 of at "
                            f"most 1,024 bytes, a space, and {len(tokens)}")
        tokens[token] = number
    if any(bytes([byte]) not in tokens for byte in range(256)):
        raise DataError(f"{path}:{len(tokens) + 1}: expected tokens for all 256 bytes, so that "
                        "every text encodes")
    return make_encoding(list(tokens))


def gpt2_encoding():
    """GPT-2's tokenizer, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise DataError(f"tiktoken cannot download GPT-2's tokenizer ({type(error).__name__}); "
                        "offline, set TIKTOKEN_CACHE_DIR as the README says") from None


def read_lines(path):
    """(number, text) of each line that is not blank; LF or CRLF ends it, a BOM is dropped."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}), expected text") from None
        if text.strip():
            yield number, text


def read_preferences(path):
    """(prompt, responses best first) of each line of a preferences file."""
    for number, line in read_lines(path):
        try:
            row = parse_preference(json.loads(line))
        except (ValueError, RecursionError) as error:
            problem = error if isinstance(error, DataError) else "not JSON"
            raise DataError(f"{path}:{number}: {problem}; {FORMS}") from None
        yield row


def parse_preference(row):
    """(prompt, responses best first) of the JSON value of one line, in any of the three forms.

    Without a prompt, it is the longest common prefix that ends at "\\n\\nAssistant:".
    """
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    for key in ("prompt", "responses") if "responses" in row else ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"no {key!r}")
    prompt = row.get("prompt", "")
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError("'responses' is no list of two or more")
    for text in (prompt, *responses):
        if not isinstance(text, str):
            raise DataError(f"a {type(text).__name__} in place of text (no messages are read)")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError("half a surrogate pair in a text")
    if "prompt" not in row:
        common = os.path.commonprefix(responses)
        prompt = common[:common.rfind(TURN) + len(TURN)] if TURN in common else ""
        responses = [text[len(prompt):] for text in responses]
    return prompt, responses


def held_out(text):
    """Whether a text is held out, by its hash: adding rows moves none to the other side."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT


def load(data_dir, block_size, max_new_tokens, encoding=None):
    """Read a data directory for a context of `block_size`; DataError if it is broken.

    encoding: used instead of the directory's own (GPT-2's, for GPT-2's weights). A hash decides
    what is held out: a document's own, or, for prompts and comparisons, the prompt's (if empty, the
    responses'). A held-out comparison's text is held out as a document.
    """
    names = ("preferences.jsonl", "corpus.txt", "prompts.txt", "tokenizer.tiktoken")
    files = {name: Path(data_dir) / name for name in names if (Path(data_dir) / name).is_file()}
    if "preferences.jsonl" not in files:
        raise DataError(f"{data_dir}/preferences.jsonl: no such file, {FORMS}, one per line")
    notes = []
    # Read the texts, and put each on its side: training (False) or held out (True).
    rows = [(prompt, responses, held_out(prompt or "\n".join(sorted(responses))))
            for prompt, responses in read_preferences(files["preferences.jsonl"])]
    held_texts = {prompt + text for prompt, texts, out in rows if out for text in texts}
    documents = [(prompt + texts[0], out) for prompt, texts, out in rows]
    if "corpus.txt" in files:
        documents = [(line, held_out(line)) for _, line in read_lines(files["corpus.txt"])]
    else:
        notes.append("no corpus.txt: the language model learns from prompt + best response")
    documents = [(text, out or text in held_texts) for text, out in documents]
    prompts = [prompt for prompt, _, _ in rows]
    if "prompts.txt" in files:
        prompts = [line for _, line in read_lines(files["prompts.txt"])]

    # Find the tokenizer, or make one from the training text.
    if encoding is not None and "tokenizer.tiktoken" in files:
        notes.append("tokenizer.tiktoken is not used: the weights need GPT-2's tokenizer")
    elif encoding is None and "tokenizer.tiktoken" in files:
        encoding = read_encoding(files["tokenizer.tiktoken"])
    elif encoding is None:
        texts = [prompt + text for prompt, texts, out in rows if not out for text in texts]
        encoding = train_encoding(texts + [text for text, out in documents if not out])

    # Encode what fits the context, and count what does not.
    (train, held), skipped = encode_all(rows, documents, dict.fromkeys(prompts), encoding,
                                        block_size, max_new_tokens)
    for name in ("documents", "comparisons", "prompts"):
        sides = getattr(train, name), getattr(held, name)
        if not any(sides):
            raise DataError(f"{data_dir}: no usable {name}, expected at least one; skipped: "
                            f"{dict(skipped)}; a larger --block_size leaves more room")
        if not all(sides):
            setattr(train, name, sides[0] or sides[1])
            setattr(held, name, sides[1] or sides[0])
            notes.append(f"too few {name} to hold any out: measured on the ones that train")
    contents = repr([(name, path.read_bytes()) for name, path in files.items()])
    return Dataset(encoding, encoding.eot_token, train, held, skipped, notes,
                   fingerprint=hashlib.sha256(contents.encode()).hexdigest()[:16],
                   shipped=Path(data_dir).resolve() == SHIPPED)


def encode_all(rows, documents, prompts, encoding, block_size, max_new_tokens):
    """((training Split, held-out Split), Counter of what is unusable, by its reason)."""
    eos, skipped, sides = encoding.eot_token, Counter(), (Split(), Split())
    longest = max(map(len, encoding.token_byte_values()))

    def encode(text, room):
        """Tokens of plain text, or None if they are more than `room`."""
        if len(text) > room * longest:  # spares tiktoken a hopeless megabyte
            return None
        tokens = encoding.encode_ordinary(text)
        return tokens if len(tokens) <= room else None

    for prompt, texts, out in rows:
        texts = list(dict.fromkeys(texts))  # equal responses are a tie, which is dropped
        tokens = [encode(text, block_size) for text in (prompt, *texts)]
        if len(texts) < 2:
            skipped["comparison with identical answers"] += 1
        elif not all(text.strip() for text in texts):
            skipped["comparison with an empty answer"] += 1
        elif None in tokens or len(tokens[0]) + max(map(len, tokens[1:])) + 2 > block_size:
            skipped["comparison longer than the context"] += 1
        else:
            responses = [[*response, eos] for response in tokens[1:]]
            sides[out].comparisons.append(([eos, *tokens[0]], responses))
    for text, out in documents:
        tokens = encode(text, block_size - 2)
        if tokens is None:
            skipped["document longer than the context"] += 1
        else:
            sides[out].documents.append([eos, *tokens, eos])
    for text in prompts:
        tokens = encode(text, block_size - max_new_tokens - 1)
        if tokens is None:
            skipped["prompt that leaves no room for a response"] += 1
        else:
            sides[held_out(text)].prompts.append([eos, *tokens])
    return sides, skipped


def read_records(path):
    """The JSON objects of a file's lines, without a line that a kill or a full disk tore."""
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def write_records(path, records, mode="w"):
    """Write JSON objects, one per line; mode "a" appends. JSON has no NaN: it becomes null."""
    lines = []
    for record in records:
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in record.items()}
        lines.append(json.dumps(finite) + "\n")
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:  # a full disk comes without the file's name
        raise OSError(error.errno, error.strerror, str(path)) from None
