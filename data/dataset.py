"""Reads and checks a data directory, and keeps the JSON-lines files of a run.

A line that is broken stops the program: DataError, one line `FILE:LINE: problem, expectation`.
A row that is unusable (identical answers, no room, …) is skipped and counted by its reason.
Data is data: nothing in a data directory is imported, executed, or used as a path.
"""
import base64
import binascii
import contextlib
import errno
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

SHIPPED = Path(__file__).resolve().parent
# A word with its leading space, a number, a run of signs, or white space: every text matches.
PATTERN = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
HELD_OUT = 0.1     # share of documents, pairs and prompts that nothing trains on
LONGEST_TOKEN = 1024  # bytes; with longer ones a line of some megabytes takes minutes to encode
TURN = "\n\nAssistant:"
FORMS = ('expected {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}, '
         "each a text")


class DataError(ValueError):
    """Broken data; its text is one line for the user."""


@dataclass
class Split:
    """What trains, or what is held out. Tokens throughout; every list may be empty."""
    documents: list = field(default_factory=list)  # [eos, …, eos]
    pairs: list = field(default_factory=list)      # (prompt [eos, …], chosen [… eos], rejected)
    prompts: list = field(default_factory=list)    # [eos, …]


@dataclass
class Dataset:
    """A data directory as tokens, with its tokenizer and an account of what was skipped."""
    encoding: tiktoken.Encoding
    eos_token: int
    train: Split
    held_out: Split
    skipped: Counter   # "preferences.jsonl: identical answers" -> rows
    notes: list        # one line each: what else a reader of the run should know
    fingerprint: str   # sha256 of every byte that was read
    shipped: bool      # is this the data whose true reward is known?
    init: str | None = None  # sha256 of the weights that training starts from, if there are any

    def text(self, tokens):
        """The text of a list of tokens, without end tokens; broken UTF-8 shows as U+FFFD."""
        return self.encoding.decode([t for t in tokens if t != self.eos_token], errors="replace")


# --------------------------------------------------------------------------- reading lines


def read_lines(path):
    """(number, text) of each line. Lines end with LF or CRLF; a byte-order mark is dropped."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte 0x{line[error.start]:02x} at column "
                            f"{error.start + 1} is not UTF-8, expected UTF-8 text") from None


def read_pairs(path):
    """(prompt, chosen, rejected) of each line of a preferences file; None for a blank line."""
    for number, line in read_lines(path):
        if not line.strip():
            if line:
                yield None
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deeply or too large a number")
            raise DataError(f"{where}: not JSON ({problem}), {FORMS}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object, {FORMS}")
        for key in ("chosen", "rejected"):
            if key not in row:
                raise DataError(f"{where}: no {key!r}, {FORMS}")
        for key in ("prompt", "chosen", "rejected"):
            value = row.get(key, "")
            if isinstance(value, list):
                raise DataError(f"{where}: {key!r} is a list of messages, a conversational form "
                                f"that is not read; {FORMS}")
            if not isinstance(value, str):
                raise DataError(f"{where}: {key!r} is not text, {FORMS}")
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise DataError(f"{where}: {key!r} has half a surrogate pair, {FORMS}")
        yield split_prompt(row)


def split_prompt(row):
    """(prompt, chosen, rejected) of a row; an implicit prompt is made explicit.

    It is the longest common prefix that ends at an assistant's turn: \"\\n\\nAssistant:\".
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    common = os.path.commonprefix([chosen, rejected])
    at = common.rfind(TURN)
    prompt = common[:at + len(TURN)] if at >= 0 else ""
    return prompt, chosen[len(prompt):], rejected[len(prompt):]


def read_tokenizer(path):
    """tiktoken.Encoding of a file of BPE ranks, with one more token, the end of text.

    The file is checked first: tiktoken panics on some that are wrong.
    """
    ranks = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        expected = f"expected base64 of a token, a space, and its rank {len(ranks)}"
        try:
            token, rank = line.split(" ")
            token = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not a token and its rank, {expected}") from None
        if not token or token in ranks:
            raise DataError(f"{path}:{number}: empty or repeated token, {expected}")
        if len(token) > LONGEST_TOKEN:
            raise DataError(f"{path}:{number}: a token of {len(token):,} bytes, expected at most "
                            f"{LONGEST_TOKEN:,}")
        if rank.strip() != str(len(ranks)):
            raise DataError(f"{path}:{number}: rank {rank.strip()[:20]!r}, {expected}")
        ranks[token] = len(ranks)
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise DataError(f"{path}:{len(ranks) + 1}: no token for the byte 0x{byte:02x}, "
                            "expected all 256, so that every text encodes")
    return tiktoken.Encoding("rlhf", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def tokenizer_of(data_dir, init=None):
    """The tokenizer of a data directory, else the shipped one; with GPT-2's weights, GPT-2's."""
    if init:
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # its files are named by the hash of their address
            raise DataError(
                f"tiktoken cannot download its gpt2 encoding ({type(error).__name__}); offline, "
                "set TIKTOKEN_CACHE_DIR to a directory with GPT-2's vocab.bpe as "
                "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json as "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6") from None
    own = Path(data_dir) / "tokenizer.tiktoken"
    return read_tokenizer(own if own.is_file() else SHIPPED / "tokenizer.tiktoken")


# --------------------------------------------------------------------------- a data directory


def held_out(text):
    """Whether a text is held out, by its hash: adding rows moves none to the other side."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT


def find_files(data_dir):
    """{name: path} of a data directory; DataError if what it must hold is not there."""
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such directory, expected one with preferences.jsonl")
    files = {name: data_dir / name for name in
             ("preferences.jsonl", "corpus.txt", "prompts.txt", "tokenizer.tiktoken")}
    if not files["preferences.jsonl"].is_file():
        raise DataError(f"{files['preferences.jsonl']}: no such file, {FORMS} a line")
    if not files["tokenizer.tiktoken"].is_file():
        files["tokenizer.tiktoken"] = SHIPPED / "tokenizer.tiktoken"
    return files


def load(data_dir, block_size, max_new_tokens, encoding=None):
    """Read a data directory for a context of `block_size`; DataError if it is broken.

    An `encoding` that is given is used instead of the directory's own.
    Held out are: documents by their own hash; pairs and prompts by the prompt's hash, so that a
    held-out prompt is in no training pair (pairs without a prompt, by their answers' hash); and
    every document that is a held-out pair's text.
    """
    data_dir = Path(data_dir)
    files = find_files(data_dir)
    encoding = encoding or read_tokenizer(files["tokenizer.tiktoken"])
    eos, skipped, notes = encoding.eot_token, Counter(), []
    if encoding.name == "gpt2" and (data_dir / "tokenizer.tiktoken").is_file():
        notes.append("tokenizer.tiktoken is not used: the weights need GPT-2's tokenizer")
    train, held, longest = Split(), Split(), max(map(len, encoding.token_byte_values()))

    def encode(text, room):
        """Tokens of plain text, or None if they are more than `room`."""
        if len(text.encode()) > room * longest:  # spares tiktoken a hopeless megabyte
            return None
        tokens = encoding.encode_ordinary(text)
        return tokens if len(tokens) <= room else None

    prompts, held_texts, documents = {}, set(), []
    for pair in read_pairs(files["preferences.jsonl"]):
        reason, row = "blank line", None
        if pair:
            prompts[pair[0]] = None
            reason, row = encode_pair(pair, encode, block_size, eos)
        if reason:
            skipped[f"preferences.jsonl: {reason}"] += 1
            continue
        prompt, chosen, rejected = pair
        out = held_out(prompt or "\n".join(sorted((chosen, rejected))))
        (held if out else train).pairs.append(row)
        if out:
            held_texts.update((prompt + chosen, prompt + rejected))
        documents.append((prompt + chosen, out))

    source = "corpus.txt"
    if files[source].is_file():
        documents = [(line, held_out(line)) for _, line in read_lines(files[source]) if line]
    else:
        source = "preferences.jsonl"
        notes.append("no corpus.txt: the language model learns from prompt + chosen")
    documents = [(text, out or text in held_texts) for text, out in documents]
    keep_documents(documents, source, encode, block_size, eos, train, held, skipped)

    source = "preferences.jsonl"
    if files["prompts.txt"].is_file():
        source = "prompts.txt"
        lines = [line for _, line in read_lines(files[source])]
        prompts = dict.fromkeys(line for line in lines if line.strip())
    # One token of room stays for the end token that a cut response is judged with.
    room = block_size - max_new_tokens - 2
    keep_prompts(prompts, source, encode, room, eos, train, held, skipped)

    share_what_is_too_little(train, held, notes, data_dir)
    return Dataset(encoding, eos, train, held, skipped, notes, fingerprint(files),
                   data_dir.resolve() == SHIPPED)


def keep_prompts(prompts, source, encode, room, eos, train, held, skipped):
    """Put each prompt as [eos, …] on its side, or count it where it is longer than `room`."""
    for prompt in prompts:
        tokens = encode(prompt, room)
        if tokens is None:
            skipped[f"{source}: prompt leaves no room for a response"] += 1
        else:
            (held if held_out(prompt) else train).prompts.append([eos, *tokens])


def fingerprint(files):
    """sha256 of the files' contents: another byte is other data."""
    digest = hashlib.sha256()
    for path in files.values():
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"absent")
    return digest.hexdigest()


def keep_documents(documents, source, encode, block_size, eos, train, held, skipped):
    """Put each (text, held out?) as [eos, …, eos] on its side, or count why it is unusable."""
    for text, out in documents:
        tokens = encode(text, block_size - 2) if text.strip() else []
        if tokens:
            (held if out else train).documents.append([eos, *tokens, eos])
        else:
            reason = "blank line" if tokens == [] else "document longer than the context"
            skipped[f"{source}: {reason}"] += 1


def encode_pair(pair, encode, block_size, eos):
    """(None, row of tokens), or (why the pair is unusable, None)."""
    prompt, chosen, rejected = pair
    if chosen == rejected:
        return "identical answers", None
    if not chosen.strip() or not rejected.strip():
        return "empty answer", None
    rows = [encode(text, block_size) for text in pair]
    if None in rows or len(rows[0]) + max(len(rows[1]), len(rows[2])) + 2 > block_size:
        return "no room within the context", None
    return None, ([eos, *rows[0]], [*rows[1], eos], [*rows[2], eos])


def share_what_is_too_little(train, held, notes, data_dir):
    """Where hashing left one side empty, both sides use what there is, and a note says so."""
    for name in ("documents", "pairs", "prompts"):
        a, b = getattr(train, name), getattr(held, name)
        if not a and not b:
            raise DataError(f"{data_dir}: no usable {name}, expected at least one")
        if not a or not b:
            setattr(train, name, a or b)
            setattr(held, name, a or b)
            notes.append(f"too few {name} to hold any out: measured on the ones that train")


# --------------------------------------------------------------------------- a run's JSON lines


@contextlib.contextmanager
def locked(directory):
    """Hold a run's directory for this process alone; BlockingIOError if another one holds it.

    The lock is the kernel's, on the directory itself: it ends with the process, however that ends.
    Where there is none (Windows, some network file systems) nothing is refused.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise BlockingIOError(errno.EWOULDBLOCK, "another run is writing there; wait for its end, "
                              "or take another --out_dir", str(directory)) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(held)


def append_record(path, record):
    """Append one JSON object as a line, in a single write."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v
              for k, v in record.items()}  # JSON has no NaN
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def keep_records(path, steps):
    """Cut log.jsonl back to a checkpoint, what came after it is done again: keep the lines of
    each stage up to step steps[stage], and no line that was torn by a kill or a full disk."""
    path, kept = Path(path), []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["step"] <= steps.get(row["stage"], 0):
                kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def write_records(path, records):
    """Write JSON objects, one a line, all or none of them."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(Path(path), lines.encode())


def write_atomically(path, raw):
    """Write bytes under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_records(path):
    """The JSON objects of a file that this module wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
