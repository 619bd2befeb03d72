"""A tiny GPT with GPT-2's architecture, its KV cache, value and reward heads, files of weights.

Everything in this file is a network or a file of weights; how they are trained is in `rlhf.py`.
Shapes: B rows, S tokens of a row, N tokens packed from (B, S), K keys, C = n_embd, nh heads of
size hs = C / nh, V = vocab_size.
"""
import contextlib
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
    n_head: int = 4         # attention heads; they split n_embd evenly
    n_embd: int = 128       # C, width of the residual stream
    eos_token: int = 1023   # begins every sequence, ends every response; >= V: none ends


def pack(x, valid):
    """(B, S, …) -> (N, …): row after row, of which the places `valid` (N,) are kept; None: all.

    Every layer but attention treats each token alone: packed, none of them works on padding.
    """
    x = x.flatten(0, 1)
    return x if valid is None else x.index_select(0, valid)


def unpack(x, valid, shape):
    """(N, …) -> (B, S, …), the inverse of `pack`, with 0 in padded places."""
    if valid is not None:
        x = x.new_zeros(math.prod(shape), *x.shape[1:]).index_copy(0, valid, x)
    return x.unflatten(0, shape)


class Attention(nn.Module):
    """Causal self-attention, softmax(q kᵀ / √hs) v, over the keys at positions <= the query's.

    x (N, C) holds the places `valid` (N,) of the shape (B, S). Results are wanted at `read`, which
    counts in x (None: everywhere). With `last` (B,), each row has one query, there. With a cache
    (B, K, 2C), `seen` (B, 1, S, K) says which of its keys a query sees. See GPT.hidden.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, shape, valid, read, last, cache, positions, seen):
        (B, S), C = shape, x.shape[-1]                                     # x (N, C), packed
        if last is None:
            q, k, v = unpack(self.c_attn(x), valid, shape).chunk(3, 2)     # 3 × (B, S, C)
        else:
            w, b = self.c_attn.weight, self.c_attn.bias
            q = F.linear(x.index_select(0, read), w[:C], b[:C])[:, None]   # (B, 1, C)
            k, v = unpack(F.linear(x, w[C:], b[C:]), valid, shape).chunk(2, 2)  # 2 × (B, S, C)
            seen = (torch.arange(S, device=x.device) <= last[:, None])[:, None, None]
            valid = read = None  # a query a row: none is padding, all are read
        if cache is not None:
            # Each row writes at its own positions, and sees no key after them: what an earlier,
            # padded write left there is garbage.
            rows = torch.arange(B, device=x.device)[:, None]
            cache[rows, positions] = torch.cat([k, v], 2).to(cache)
            k, v = cache.to(q).chunk(2, 2)                                 # 2 × (B, K, C)
        q, k, v = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        y = pack(y.transpose(1, 2).flatten(2), valid)  # (B, nh, S, hs) -> (N, C)
        return self.c_proj(y if read is None else y.index_select(0, read))


class MLP(nn.Module):
    """Two layers with GPT-2's GELU (the tanh approximation), four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block. No dropout: it would make the PPO ratio differ from 1 at the start."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, shape, valid, read, last, cache, positions, seen):
        y = self.attn(self.ln_1(x), shape, valid, read, last, cache, positions, seen)
        x = y + (x if read is None else x.index_select(0, read))           # (N, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """π_θ: maps tokens to the logits of the next one. Architecture and names of GPT-2."""

    def __init__(self, config, generator=None):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} does not divide into n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialisation, 0.02 at its width of 768; a narrow model needs more, as 1/√C:
        # with 0.02 at width 128, the same training takes two to three times as long.
        std = 0.02 * math.sqrt(768 / config.n_embd)
        for name, p in self.named_parameters():  # the norms keep torch's
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # layers that write to the residual stream: smaller with depth
                depth = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(p, std=std / depth, generator=generator)

    def hidden(self, tokens, cache=None, positions=None, steps=None, last=None):
        """Final hidden states (B, S, C) of tokens (B, S), or (N, C) where `steps` (B, S) is True.

        Without a cache, row b's token s stands at position s, and rows are right-padded; with
        `steps`, what lies behind a row's last True is skipped, and the last layer works at `steps`
        alone, but for its keys and values. `last` (B,) asks for the state of one place a row,
        (B, C), for which the last layer needs one query a row. With a cache (see `new_cache`),
        token s of row b stands at positions[b, s], its key and value are written there, and it
        attends to the cached keys at positions <= its own.
        """
        (B, S), valid, read = tokens.shape, None, None
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens do not fit the context of {self.config.block_size}")
        at = torch.arange(S, device=tokens.device)
        if last is not None:
            steps = at == last[:, None]
        if steps is not None:
            lengths = (steps * (at + 1)).amax(1)                           # (B,) read up to there
            S = int(lengths.max())
            tokens, steps, at = tokens[:, :S], steps[:, :S], at[:S]
            valid = (at < lengths[:, None]).flatten().nonzero().squeeze(1)
            read = pack(steps, valid).nonzero().squeeze(1)                 # of the packed ones
            valid = None if len(valid) == B * S else valid
        positions = at.expand(B, S) if positions is None else positions[:, :S]
        seen = cache and (torch.arange(cache[0].shape[1], device=tokens.device)
                          <= positions[:, None, :, None])                  # (B, 1, S, K)
        x = self.wte(pack(tokens, valid)) + self.wpe(pack(positions, valid))  # (N, C)
        for i, block in enumerate(self.h):
            # Of the last layer's states none but those asked for is read, by a layer or the caller.
            needed = (read, last) if i == len(self.h) - 1 else (None, None)
            x = block(x, (B, S), valid, *needed, cache and cache[i], positions, seen)
        x = self.ln_f(x)
        return x.unflatten(0, (B, S)) if steps is None else x

    def logits(self, hidden, temperature=1.0):
        """(…, C) -> (…, V), with the output embedding tied to the input embedding.

        There is no bias: a temperature that divides the C states divides the V logits, for less.
        """
        return F.linear(hidden / temperature, self.wte.weight)

    def forward(self, tokens, steps=None, temperature=1.0):
        """Logits (B, S, V) of right-padded tokens (B, S): logits[b, s] predict token s + 1.

        With `steps` (B, S) of bool, only where it is True: (N, V), row by row.
        """
        return self.logits(self.hidden(tokens, steps=steps), temperature)

    def new_cache(self, batch, length):
        """Room for `length` keys and values of `batch` rows: a (B, K, 2C) a layer."""
        return [self.wte.weight.new_zeros(batch, length, 2 * self.config.n_embd) for _ in self.h]

    @classmethod
    def from_pretrained(cls, name_or_path):
        """A GPT from a directory in Hugging Face's GPT-2 layout, or gpt2, gpt2-medium, -large, -xl.

        A directory holds `config.json` and `pytorch_model.bin` or `model.safetensors`. A name is
        downloaded to torch's cache. Raises ValueError in one line that names what is wrong.
        """
        return load_gpt2(cls, name_or_path)

    def save_pretrained(self, directory):
        """Write the two files that GPT2LMHeadModel.from_pretrained reads."""
        save_gpt2(self, directory)


class ActorCritic(nn.Module):
    """The policy π_θ and its value function V on one trunk, which starts as a copy of `gpt`.

    A copy, so that `gpt` can stay as the frozen reference. The value head starts at zero: before
    training V(s) = 0 for every state, and the first advantages are not noise of the initialisation
    (Ziegler et al.'s code; Huang et al. 2023, "The N Implementation Details of RLHF with PPO").
    """

    def __init__(self, gpt):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_()  # gpt itself may be frozen
        self.value_head = nn.Linear(gpt.config.n_embd, 1).to(gpt.wte.weight)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens, steps=None, temperature=1.0):
        """Logits (B, S, V) and values (B, S) of tokens (B, S); (N, V), (N,) where `steps` is True.

        Both are read from the same hidden state: at position P-1+t, the last token of s_t, they
        are the logits of π(·|s_t), and V(s_t).
        """
        x = self.gpt.hidden(tokens, steps=steps)                           # (B, S, C) or (N, C)
        return self.gpt.logits(x, temperature), self.value_head(x).squeeze(-1)


class RewardModel(nn.Module):
    """r(x, y): a copy of the trunk with a scalar head, read at the last token of each row.

    The head's weights start as normal with std 1/√(C+1) (Stiennon et al. 2009.01325, appendix).
    """

    def __init__(self, gpt, generator=None):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_()  # gpt itself may be frozen
        self.reward_head = nn.Linear(gpt.config.n_embd, 1).to(gpt.wte.weight)
        std = 1 / math.sqrt(gpt.config.n_embd + 1)
        nn.init.normal_(self.reward_head.weight, std=std, generator=generator)
        nn.init.zeros_(self.reward_head.bias)

    def forward(self, tokens, lengths):
        """Scores (B,) of right-padded tokens (B, S) whose rows have `lengths` (B,) tokens."""
        r = self.reward_head(self.gpt.hidden(tokens, last=lengths - 1)).squeeze(-1)  # (B,)
        return r.to(self.reward_head.weight.dtype)  # the loss is not to be computed in bf16

    @torch.no_grad()
    def normalize(self, scores):
        """Fold the mean and std of `scores` (N,), which this model gave, into its head.

        PPO's constants assume scores of mean 0 and std 1 under the reference policy
        (Ziegler et al. 1909.08593, section 2).
        """
        std = scores.std(correction=0).clamp_min(1e-6)
        self.reward_head.weight.div_(std)
        self.reward_head.bias.sub_(scores.mean()).div_(std)


# --------------------------------------------------------------------------- files of weights


def save_checkpoint(path, checkpoint):
    """torch.save under a temporary name, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    raw = io.BytesIO()
    torch.save(checkpoint, raw)  # not to the file: torch hides a full disk in a RuntimeError
    try:
        with open(temporary, "wb") as file:
            file.write(raw.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_checkpoint(path):
    """What `save_checkpoint` wrote, on the CPU. Never unpickles code; ValueError if unreadable."""
    raw = io.BytesIO(Path(path).read_bytes())
    try:
        return torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for cut or foreign files
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw bytes."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
    raw, tensors = Path(path).read_bytes(), {}
    try:
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape, kind, (a, b) = entry["shape"], kinds[entry["dtype"]], entry["data_offsets"]
            part = bytearray(raw[start + a:start + b])
            if len(part) != math.prod(shape) * kind.itemsize:
                raise ValueError(f"{name} has {len(part)} bytes")
            tensors[name] = (torch.frombuffer(part, dtype=kind) if part else
                             torch.empty(0, dtype=kind)).reshape(shape)
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path}: not a safetensors file, or cut short ({problem})") from None


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")  # in GPTConfig's order
# Hugging Face keeps these four weights of a block as Conv1D: transposed against nn.Linear.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "reorder_and_upcast_attn": False, "tie_word_embeddings": True}


def read_gpt2_files(name_or_path):
    """(config dictionary, state dictionary) of a local directory, or of one of GPT2_NAMES."""
    directory = Path(name_or_path)
    if str(name_or_path) in GPT2_NAMES and not directory.exists():
        url = f"https://huggingface.co/{name_or_path}/resolve/main/"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / str(name_or_path)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "pytorch_model.bin"):
                if not (cache / name).exists():
                    torch.hub.download_url_to_file(url + name, str(cache / name))
        except OSError as error:
            raise ValueError(f"{name_or_path}: cannot download {url}{name} ({error}); offline, put "
                             f"config.json and pytorch_model.bin into {cache}") from None
        directory = cache
    if not (directory / "config.json").is_file():
        raise ValueError(f"{name_or_path}: no config.json there; expected a directory in Hugging "
                         f"Face's GPT-2 layout, or one of {', '.join(GPT2_NAMES)}")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / 'config.json'}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{directory / 'config.json'}: expected a JSON object")
    if (directory / "model.safetensors").is_file():
        return config, read_safetensors(directory / "model.safetensors")
    if (directory / "pytorch_model.bin").is_file():
        return config, load_checkpoint(directory / "pytorch_model.bin")
    if any(directory.glob("*.index.json")):
        raise ValueError(f"{directory}: the weights are sharded; expected one file")
    raise ValueError(f"{directory}: no pytorch_model.bin and no model.safetensors there")


def read_gpt2_config(raw, where):
    """GPTConfig of a config.json's dictionary; ValueError where this GPT is not of its kind."""
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{where}: model_type is {raw['model_type']!r}, expected 'gpt2'")
    if raw.get("n_positions") is None:  # an older name
        raw = raw | {"n_positions": raw.get("n_ctx")}
    sizes = [raw.get(key) for key in SIZES]
    for key, size in zip(SIZES, sizes):
        if type(size) is not int or not 1 <= size <= 1_000_000:
            raise ValueError(f"{where}: config.json has {key} = {size!r}, "
                             "expected a whole number from 1 to 1,000,000")
    for key, value in GPT2_FIXED.items():
        spelled_out = key == "n_inner" and raw.get(key) == 4 * raw["n_embd"]
        if raw.get(key, value) != value and not spelled_out:
            raise ValueError(f"{where}: config.json has {key} = {raw[key]!r}; "
                             f"this GPT has {value!r}")
    if raw["n_embd"] % raw["n_head"]:
        raise ValueError(f"{where}: config.json has n_embd {raw['n_embd']}, expected a multiple of "
                         f"n_head {raw['n_head']}")
    eos = raw.get("eos_token_id")
    if eos is not None and (type(eos) is not int or eos < 0):
        raise ValueError(f"{where}: config.json has eos_token_id = {eos!r}, expected one token")
    last = raw["vocab_size"] - 1  # for a small vocabulary Hugging Face's default is out of range
    return GPTConfig(*sizes, last if eos is None else min(eos, last))


def load_gpt2(cls, name_or_path):
    """See GPT.from_pretrained."""
    raw, state = read_gpt2_files(name_or_path)
    config = read_gpt2_config(raw, name_or_path)
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError(f"{name_or_path}: the weight file does not hold a state dictionary")
    count = len(state)
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    if len(state) < count:
        raise ValueError(f"{name_or_path}: a weight is there with and without 'transformer.'")
    head = state.pop("lm_head.weight", None)  # GPT-2 ties it to wte
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        raise ValueError(f"{name_or_path}: lm_head.weight differs from wte.weight; "
                         "this GPT ties the two")
    state = {k: v for k, v in state.items()  # buffers: the causal mask and its fill value
             if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    state = {k: v.mT if k.endswith(CONV1D) and v.dim() == 2 else v for k, v in state.items()}
    try:
        gpt = cls(config)
    except RuntimeError:
        raise ValueError(f"{name_or_path}: no memory for the sizes in config.json") from None
    own = gpt.state_dict()
    wrong = ([f"missing {k}" for k in own if k not in state]
             + [f"unexpected {k}" for k in state if k not in own]
             + [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
                for k in own if k in state and own[k].shape != state[k].shape]
             + [f"{k} is of {v.dtype}" for k, v in state.items() if not v.is_floating_point()])
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{name_or_path}: weights do not fit: {'; '.join(wrong[:3])}{more}")
    try:
        gpt.load_state_dict(state)
    except RuntimeError:  # tensors without ordinary memory
        raise ValueError(f"{name_or_path}: the weights are not plain, dense tensors") from None
    return gpt


def save_gpt2(gpt, directory):
    """See GPT.save_pretrained."""
    directory, c = Path(directory), gpt.config
    if (directory / "model.safetensors").exists():
        raise ValueError(f"{directory}: there is a model.safetensors, which readers would prefer "
                         "to what is saved here; expected another directory")
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
              "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
              "bos_token_id": c.eos_token, "eos_token_id": c.eos_token, **GPT2_FIXED}
    state = {f"transformer.{k}": (v.t() if k.endswith(CONV1D) else v).detach().cpu().contiguous()
             for k, v in gpt.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    save_checkpoint(directory / "pytorch_model.bin", state)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
