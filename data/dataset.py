"""Reads and checks a data directory, and keeps the JSON-lines files of a run.

A broken line stops the program: DataError, one line `FILE:LINE: problem, expectation`.
A row that is unusable (identical answers, no room, …) is skipped and counted by its reason.
Nothing in a data directory is imported, executed, or used as a path.
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
WORDS = 4000       # whole words of a tokenizer that is made, the commonest
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
    train: Split
    held_out: Split
    skipped: Counter   # "preferences.jsonl: identical answers" -> rows
    notes: list        # lines: what else the reader of a run should know
    fingerprint: str   # sha256 of every byte that was read
    shipped: bool      # is this the data whose true reward is known?

    @property
    def eos_token(self):
        """The end-of-text token; its id is the last one."""
        return self.encoding.eot_token

    def text(self, tokens):
        """The text of a list of tokens, without end tokens; broken UTF-8 shows as U+FFFD."""
        return self.encoding.decode([t for t in tokens if t != self.eos_token], errors="replace")


# ------------------------------------------------------------------------------------- tokenizers


def make_encoding(tokens, pattern=PATTERN, name="rlhf"):
    """tiktoken.Encoding of byte strings in the order of their ranks, and the end of text after."""
    return tiktoken.Encoding(name, pat_str=pattern,
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": len(tokens)})


def encoding_state(encoding):
    """All that `make_encoding` needs to make the same tokenizer again: a checkpoint keeps it."""
    ranks = encoding._mergeable_ranks
    return {"tokens": sorted(ranks, key=ranks.get), "pattern": encoding._pat_str,
            "name": encoding.name}


def train_encoding(texts):
    """A tokenizer of 256 bytes and the commonest words of `texts`, each whole with its space.

    tiktoken looks a whole word up before it merges bytes, so a model writes words and not letters.
    """
    counts = Counter(piece for text in texts for piece in PIECE.findall(text))
    counts = {piece.encode(): n for piece, n in counts.items()}
    common = sorted(counts, key=lambda piece: (-counts[piece], piece))
    words = [piece for piece in common if 1 < len(piece) <= LONGEST_TOKEN]
    return make_encoding([bytes([byte]) for byte in range(256)] + words[:WORDS])


def read_encoding(path):
    """The tokenizer of a file of BPE ranks, checked first: tiktoken panics on some that are wrong.

    One line per token: its bytes in base64, a space, its rank; the ranks count up from 0.
    """
    tokens = {}
    for number, line in read_lines(path):
        if line.strip():
            word, _, rank = line.partition(" ")
            try:
                token = base64.b64decode(word, validate=True)
            except ValueError:
                token = b""
            if not 1 <= len(token) <= 1024 or token in tokens or rank.strip() != str(len(tokens)):
                raise DataError(f"{path}:{number}: not a new token and its rank, expected base64 "
                                f"of at most 1,024 bytes, a space, and {len(tokens)}")
            tokens[token] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise DataError(f"{path}:{len(tokens) + 1}: no token for the byte 0x{missing[0]:02x}, "
                        "expected all 256, so that every text encodes")
    return make_encoding(list(tokens))


def gpt2_encoding():
    """GPT-2's tokenizer, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # its files are named by the hash of their address
        raise DataError(
            f"tiktoken cannot download its gpt2 encoding ({type(error).__name__}); offline, "
            "set TIKTOKEN_CACHE_DIR to a directory with GPT-2's vocab.bpe as "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json as "
            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") from None


# ------------------------------------------------------------------------------------------ lines


def read_lines(path):
    """(number, text) of each line. Lines end with LF or CRLF; a byte-order mark is dropped."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte 0x{line[error.start]:02x} at column "
                            f"{error.start + 1} is not UTF-8, expected UTF-8 text") from None


def read_preferences(path):
    """(prompt, responses best first) of each line of a preferences file; None for a blank line."""
    for number, line in read_lines(path):
        if not line.strip():
            if line:
                yield None
            continue
        try:
            yield parse_preference(json.loads(line))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}; {FORMS}") from None
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deeply, or too large a number")
            raise DataError(f"{path}:{number}: not JSON ({problem}); {FORMS}") from None


def parse_preference(row):
    """(prompt, responses best first) of the JSON value of one line, in any of the three forms.

    Without a prompt, it is the longest common prefix that ends at "\\n\\nAssistant:".
    """
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    keys = ("prompt", "responses") if "responses" in row else ("chosen", "rejected")
    for key in keys:
        if key not in row:
            raise DataError(f"no {key!r}")
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError("'responses' is not a list of at least two")
    prompt = row.get("prompt", "")
    for text in (prompt, *responses):
        if isinstance(text, list):
            raise DataError("a list of messages, a conversational form that is not read")
        if not isinstance(text, str):
            raise DataError(f"a value is not text but {type(text).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError("a text has half a surrogate pair")
    if "prompt" not in row:
        common = os.path.commonprefix(responses)
        if TURN in common:
            prompt = common[:common.rfind(TURN) + len(TURN)]
        responses = [text[len(prompt):] for text in responses]
    return prompt, responses


# ------------------------------------------------------------------------------- a data directory


def held_out(text):
    """Whether a text is held out, by its hash: adding rows moves none to the other side."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT


def load(data_dir, block_size, max_new_tokens, encoding=None):
    """Read a data directory for a context of `block_size`; DataError if it is broken.

    encoding: used instead of the directory's own (GPT-2's, for GPT-2's weights). Held out are
    documents by their own hash, prompts and comparisons by the prompt's hash (without a prompt, by
    the responses'), and every document that is a held-out comparison's text.
    """
    data_dir = Path(data_dir)
    names = ("preferences.jsonl", "corpus.txt", "prompts.txt", "tokenizer.tiktoken")
    files = {name: data_dir / name for name in names if (data_dir / name).is_file()}
    if "preferences.jsonl" not in files:
        raise DataError(f"{data_dir / 'preferences.jsonl'}: no such file, {FORMS}, one per line")

    # Read the texts, and put each on its side: training (False) or held out (True).
    rows = list(read_preferences(files["preferences.jsonl"]))
    comparisons = [row and (*row, held_out(row[0] or "\n".join(sorted(row[1])))) for row in rows]
    rows = [row for row in comparisons if row]
    held_texts = {prompt + text for prompt, texts, out in rows if out for text in texts}
    if "corpus.txt" in files:
        documents = [line for _, line in read_lines(files["corpus.txt"]) if line]
        documents = [(text, held_out(text) or text in held_texts) for text in documents]
    else:
        documents = [(row[0] + row[1][0], row[2] or row[0] + row[1][0] in held_texts)
                     for row in rows]
    prompts = [row[0] for row in rows]
    if "prompts.txt" in files:
        prompts = [line for _, line in read_lines(files["prompts.txt"]) if line.strip()]

    # Find the tokenizer, or make one from the training text.
    notes = []
    if encoding is not None and "tokenizer.tiktoken" in files:
        notes.append("tokenizer.tiktoken is not used: the weights need GPT-2's tokenizer")
    elif encoding is None and "tokenizer.tiktoken" in files:
        encoding = read_encoding(files["tokenizer.tiktoken"])
    elif encoding is None:
        texts = [text for row in rows if not row[2] for text in (row[0], *row[1])]
        encoding = train_encoding(texts + [text for text, out in documents if not out])
    if "corpus.txt" not in files:
        notes.append("no corpus.txt: the language model learns from prompt + best response")

    # Encode what fits the context, and count what does not.
    splits, skipped = encode_all(comparisons, documents, dict.fromkeys(prompts), encoding,
                                 block_size, max_new_tokens, set(files))
    share_what_is_too_little(*splits, notes, skipped, data_dir)
    return Dataset(encoding, *splits, skipped, notes, fingerprint(files),
                   data_dir.resolve() == SHIPPED)


def encode_all(comparisons, documents, prompts, encoding, block_size, max_new_tokens, files):
    """((training Split, held-out Split), Counter of what is unusable, by file and reason)."""
    eos, skipped, sides = encoding.eot_token, Counter(), (Split(), Split())
    longest = max(map(len, encoding.token_byte_values()))

    def encode(text, room):
        """Tokens of plain text, or None if they are more than `room`."""
        if len(text) > room * longest:  # spares tiktoken a hopeless megabyte
            return None
        tokens = encoding.encode_ordinary(text)
        return tokens if len(tokens) <= room else None

    for row in comparisons:
        reason, tokens = comparison_tokens(row, encode, block_size, eos)
        if reason:
            skipped[f"preferences.jsonl: {reason}"] += 1
        else:
            sides[row[2]].comparisons.append(tokens)

    source = "corpus.txt" if "corpus.txt" in files else "preferences.jsonl"
    for text, out in documents:
        tokens = encode(text, block_size - 2) if text.strip() else []
        if tokens:
            sides[out].documents.append([eos, *tokens, eos])
        else:
            reason = "blank line" if tokens == [] else "document longer than the context"
            skipped[f"{source}: {reason}"] += 1

    source = "prompts.txt" if "prompts.txt" in files else "preferences.jsonl"
    for text in prompts:
        tokens = encode(text, block_size - max_new_tokens - 1)
        if tokens is None:
            skipped[f"{source}: prompt leaves no room for a response"] += 1
        else:
            sides[held_out(text)].prompts.append([eos, *tokens])
    return sides, skipped


def comparison_tokens(row, encode, block_size, eos):
    """(None, (prompt, responses) in tokens), or (why the row is unusable, None)."""
    if row is None:
        return "blank line", None
    prompt, responses = row[0], list(dict.fromkeys(row[1]))  # a tie says nothing: dropped
    if len(responses) < 2:
        return "identical answers", None
    if not all(text.strip() for text in responses):
        return "empty answer", None
    prompt, *responses = (encode(text, block_size) for text in (prompt, *responses))
    if prompt is None or None in responses:
        return "no room within the context", None
    if len(prompt) + max(map(len, responses)) + 2 > block_size:
        return "no room within the context", None
    return None, ([eos, *prompt], [[*tokens, eos] for tokens in responses])


def fingerprint(files):
    """sha256 of the files' names and contents: another byte is other data."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}: {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def share_what_is_too_little(train, held, notes, skipped, data_dir):
    """Where hashing left one side empty, both sides use what there is, and a note says so."""
    for name in ("documents", "comparisons", "prompts"):
        a, b = getattr(train, name), getattr(held, name)
        if not a and not b:
            why = "; ".join(f"{n:,} rows of {reason}" for reason, n in sorted(skipped.items()))
            raise DataError(f"{data_dir}: no usable {name}, expected at least one ({why or 'no rows'}"
                            "); a larger --block_size makes room for longer texts")
        if not a or not b:
            setattr(train, name, a or b)
            setattr(held, name, a or b)
            notes.append(f"too few {name} to hold any out: measured on the ones that train")


# ------------------------------------------------------------------------------ a run's JSON lines


@contextlib.contextmanager
def naming(path):
    """A full disk comes without a file name: errors within say `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def append_record(path, record):
    """Append one JSON object as a line, in a single write."""
    record = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in record.items()}  # JSON has no NaN
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path):
    """The JSON objects of a file's lines, without a line that a kill or a full disk tore."""
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def write_records(path, records):
    """Replace a file by these JSON objects, one per line: a reader sees the old file or the new."""
    temporary = Path(f"{path}.tmp")
    with naming(path):
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, path)
