"""A tiny GPT with GPT-2's architecture, its KV cache, value and reward heads, and weight files.

This file holds the networks; `rlhf.py` trains them. Shapes: B rows, S tokens per row, T positions
read, K cached keys, C = n_embd, nh heads of size hs = C / nh, V = vocab_size.
"""
import copy
import io
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The sizes of a GPT, and the token that ends its texts."""
    vocab_size: int = 1024  # V, tokens in the vocabulary
    block_size: int = 256   # longest sequence, prompt and response together
    n_layer: int = 4        # transformer blocks
    n_head: int = 4         # attention heads, which split n_embd evenly
    n_embd: int = 128       # C, width of the residual stream
    eos_token: int = 1023   # begins every sequence and ends every response


class Attention(nn.Module):
    """Causal self-attention, softmax(q kᵀ / √hs) v: a query sees the keys up to its own position.

    For decoding, `cache` (B, K, 2C) holds earlier keys and values; those of x go to `positions`.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None):
        B, S, C = x.shape
        qkv, seen = self.c_attn(x), None                                   # qkv (B, S, 3C)
        if cache is None:
            # A CPU rounds a partial last block of 16 positions differently. In full blocks a row
            # gives the same bits in any batch, so PPO's ratio starts at exactly 1.
            qkv = F.pad(qkv, (0, 0, 0, -S % 16))                           # (B, S', 3C)
        q, k, v = qkv.split(C, dim=2)
        if cache is not None:
            # Each row writes at its own positions and sees no later keys, which are padding.
            rows = torch.arange(B, device=x.device)[:, None]
            cache[rows, positions] = qkv[..., C:].to(cache)
            k, v = cache.to(q).split(C, dim=2)                             # 2 × (B, K, C)
            keys = torch.arange(cache.shape[1], device=x.device)
            seen = (keys <= positions[..., None])[:, None]                 # (B, 1, S, K)
        q, k, v = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=cache is None)
        return self.c_proj(y.transpose(1, 2)[:, :S].flatten(2))            # (B, S, C)


class MLP(nn.Module):
    """Two layers, four times as wide inside, with GPT-2's GELU (the tanh approximation)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block. No dropout: it would make PPO's ratio differ from 1 at the start."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, at=None):
        x = x + self.attn(self.ln_1(x), cache, positions)
        if at is not None:  # only these positions will be read: the MLP can leave out the others
            x = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))      # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """π_θ: maps tokens to the logits of the next one, with GPT-2's architecture and names."""

    def __init__(self, config, generator=None):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} does not divide into n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's std is 0.02 at width 768. A narrow model needs more, as 1/√C: with 0.02 at width
        # 128, the same training takes two to three times as long.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():  # the norms keep torch's initialisation
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # layers that write to the residual stream: smaller with depth
                depth = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(p, std=std / depth, generator=generator)

    def hidden(self, tokens, cache=None, positions=None, at=None):
        """Final hidden states (B, S, C) of right-padded tokens (B, S).

        at: (B, T) asks for those positions only and gives (B, T, C); the last block then skips
        the rest. With a cache (see `new_cache`), token s of row b stands at positions[b, s].
        """
        S = tokens.shape[1]
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens do not fit the context of {self.config.block_size}")
        if cache is None:
            positions = torch.arange(S, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)                         # (B, S, C)
        for i, block in enumerate(self.h):
            last = i == len(self.h) - 1
            x = block(x, cache and cache[i], positions, at if last else None)
        return self.ln_f(x)

    def logits(self, hidden):
        """(…, C) -> (…, V), with the output embedding tied to the input embedding."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, tokens):
        """Logits (B, S, V) of right-padded tokens (B, S): logits[b, s] predict token s + 1."""
        return self.logits(self.hidden(tokens))

    def new_cache(self, batch, length):
        """Room for `length` keys and values of `batch` rows: one (B, K, 2C) per block."""
        return [self.wte.weight.new_zeros(batch, length, 2 * self.config.n_embd) for _ in self.h]

    @classmethod
    def from_pretrained(cls, name_or_path):
        """A GPT from a directory in Hugging Face's GPT-2 layout, or gpt2, gpt2-medium, -large, -xl.

        A directory holds `config.json` and `model.safetensors` or `pytorch_model.bin`. A name is
        downloaded to torch's cache. Raises ValueError, one line that names the file.
        """
        directory = find_gpt2(name_or_path)
        config = read_gpt2_config(directory / "config.json")
        path = directory / "model.safetensors"
        if not path.is_file():
            path = directory / "pytorch_model.bin"
        state = load_file(path)
        try:
            # Undo what Hugging Face's files do differently: a prefix, buffers of the causal mask,
            # transposed weights, and an output embedding of its own.
            state = {name.removeprefix("transformer."): weight for name, weight in state.items()
                     if not name.endswith((".attn.bias", ".attn.masked_bias"))}
            head = state.pop("lm_head.weight", None)
            if head is not None and not torch.equal(head, state["wte.weight"]):
                raise ValueError("lm_head.weight differs from wte.weight, which this GPT ties")
            gpt = cls(config)
            gpt.load_state_dict(turn_conv1d(state))
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            problem = " ".join(str(error).split())[:400]
            raise ValueError(f"{path}: weights do not fit: {problem}") from None
        return gpt

    def save_pretrained(self, directory):
        """Write the two files that transformers' GPT2LMHeadModel.from_pretrained reads."""
        directory, c = Path(directory), self.config
        if (directory / "model.safetensors").exists():
            raise ValueError(f"{directory}: holds a model.safetensors, which readers would prefer")
        directory.mkdir(parents=True, exist_ok=True)
        config = GPT2_FIXED | {
            "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size, "n_layer": c.n_layer,
            "n_positions": c.block_size, "n_ctx": c.block_size, "n_head": c.n_head,
            "n_embd": c.n_embd, "bos_token_id": c.eos_token, "eos_token_id": c.eos_token}
        state = {f"transformer.{name}": weight.detach().cpu().contiguous()
                 for name, weight in turn_conv1d(self.state_dict()).items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        save_file(directory / "pytorch_model.bin", state)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class ActorCritic(nn.Module):
    """The policy π_θ and its value function V on one trunk, which starts as a copy of `gpt`.

    `gpt` itself can stay as the frozen reference. The value head starts at zero, so that V adds no
    noise to the first advantages (Ziegler et al.'s code, language/model.py).
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_()  # gpt itself may be frozen
        self.value_head = nn.Linear(gpt.config.n_embd, 1).to(gpt.wte.weight)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens):
        """Logits (B, S, V) and values (B, S), read from the same hidden states."""
        x = self.gpt.hidden(tokens)                                        # (B, S, C)
        return self.gpt.logits(x), self.value_head(x).squeeze(-1)


class RewardModel(nn.Module):
    """r(x, y): a copy of the trunk with a scalar head, read at the last token of each row.

    The head starts at mean 0, variance 1/(C+1) (Stiennon et al. 2009.01325, appendix B.1).
    """

    def __init__(self, gpt, generator=None):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_()  # gpt itself may be frozen
        self.reward_head = nn.Linear(gpt.config.n_embd, 1)  # on the CPU, like the generator
        std = 1 / math.sqrt(gpt.config.n_embd + 1)
        nn.init.normal_(self.reward_head.weight, std=std, generator=generator)
        nn.init.zeros_(self.reward_head.bias)
        self.reward_head.to(gpt.wte.weight)

    def forward(self, tokens, lengths):
        """Scores (B,) of right-padded tokens (B, S) whose rows have `lengths` (B,) tokens."""
        x = self.gpt.hidden(tokens, at=lengths[:, None] - 1)               # (B, 1, C)
        scores = self.reward_head(x).flatten()                             # (B,)
        return scores.to(self.reward_head.weight.dtype)  # losses are not computed in bf16


# ---------------------------------------------------------------------------------- weight files

def save_file(path, content):
    """torch.save under a temporary name, then rename: a reader sees the old file or the new one."""
    path, raw = Path(path), io.BytesIO()
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, raw)  # to memory first: torch hides a full disk in a RuntimeError
    try:
        with open(temporary, "wb") as file:
            file.write(raw.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # else it names no file


def load_file(path):
    """What a file of weights holds, on the CPU; no code in it runs. ValueError if unreadable."""
    try:
        raw = Path(path).read_bytes()
        if Path(path).suffix == ".safetensors":
            return parse_safetensors(raw)
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # half a dozen kinds for missing, cut and foreign files
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def parse_safetensors(raw):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, a JSON header, raw bytes."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
    start, tensors = 8 + struct.unpack("<Q", raw[:8])[0], {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            data = bytearray(raw[start + first:start + end])
            tensor = torch.frombuffer(data, dtype=kinds[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
    return tensors


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "reorder_and_upcast_attn": False, "tie_word_embeddings": True}


def turn_conv1d(state):
    """The weights; Hugging Face's Conv1D ones are transposed, in either direction."""
    return {name: weight.mT if name.endswith(CONV1D) else weight for name, weight in state.items()}


def find_gpt2(name_or_path):
    """The directory of the weights; one of GPT2_NAMES is downloaded to torch's cache."""
    directory = Path(name_or_path)
    if str(name_or_path) in GPT2_NAMES and not directory.exists():
        directory = Path(torch.hub.get_dir()) / "checkpoints" / str(name_or_path)
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "pytorch_model.bin"):
            url = f"https://huggingface.co/{name_or_path}/resolve/main/{name}"
            try:
                if not (directory / name).exists():
                    torch.hub.download_url_to_file(url, str(directory / name))
            except OSError as error:
                raise ValueError(f"{name_or_path}: cannot download {url} ({error}); offline, put "
                                 f"config.json and pytorch_model.bin into {directory}") from None
    return directory


def read_gpt2_config(path):
    """The GPTConfig of a config.json; ValueError where it describes anything but GPT-2."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw = {"n_positions": raw.get("n_ctx"), **raw}  # an older name
    except (OSError, ValueError, RecursionError, AttributeError):
        raise ValueError(f"{path}: no JSON object there; expected a directory in Hugging Face's "
                         f"GPT-2 layout, or one of {', '.join(GPT2_NAMES)}") from None
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    for name in names:
        if type(raw.get(name)) is not int or not 1 <= raw[name] <= 1_000_000:
            raise ValueError(f"{path}: {name} is {raw.get(name)!r}, expected a whole number from 1")
    for name, value in (GPT2_FIXED | {"n_inner": 4 * raw["n_embd"]}).items():
        if raw.get(name) not in (value, None):
            raise ValueError(f"{path}: {name} is {raw[name]!r}, this GPT has {value!r}")
    last = raw["vocab_size"] - 1  # Hugging Face's default end token may exceed a small vocabulary
    eos = raw.get("eos_token_id")
    return GPTConfig(*(raw[name] for name in names), min(eos, last) if type(eos) is int else last)
