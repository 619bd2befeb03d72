"""Reinforcement learning from human feedback, from scratch, in the order of its derivation.

One index convention holds everywhere. A prompt has P tokens and a response T. With the state
s_t = prompt ⊕ y_0 … y_{t-1} and the action a_t = y_t, everything with index t is read from the
hidden state at position P-1+t, the last token of s_t: the logits that give log π(a_t|s_t), and the
value V(s_t). So `log_probs`, `values`, `rewards`, `advantages` and `mask` are all (B, T), column t
is time step t, and nothing is shifted by one. Sequences are right-padded: each row of the mask is
a prefix of ones, up to and including the token that ends the response, and nothing behind it can
change any result. Shapes: B rows, S tokens per row, T steps, V tokens in the vocabulary.

Papers: PPO 1707.06347; GAE 1506.02438; InstructGPT 2203.02155; Stiennon et al. 2009.01325;
Ziegler et al. 1909.08593.
"""
import argparse
import dataclasses
import hashlib
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import dataset, show
from model import GPT, ActorCritic, GPTConfig, RewardModel, load_file, save_file

# ======== Settings, and what every stage needs ===================================================

LIMITS = {"any": lambda x: True, "at least 1": lambda x: x >= 1, "at least 0": lambda x: x >= 0,
          "more than 0": lambda x: x > 0, "from 0 to 1": lambda x: 0 <= x <= 1}


def setting(default, stage, limit, text):
    """A field of Config with its stage, its limit (a key of LIMITS) and its line of --help."""
    return field(default=default, metadata={"stage": stage, "limit": limit, "help": text})


@dataclass
class Config:
    """Every setting of a run. Each is a flag of the command line; `--help` lists them by stage."""
    device: str = setting("auto", "run", "any", "cpu, cuda, mps, or auto: the best one there is")
    out_dir: str = setting("out", "run", "any", "the run writes here and nowhere else")
    data_dir: str = setting(str(dataset.SHIPPED), "run", "any", "folder with preferences.jsonl")
    init: str | None = setting(None, "run", "any", "weights to start from: gpt2, or a directory")

    seed: int = setting(0, "every stage", "any", "seeds every random draw")
    max_grad_norm: float = setting(1.0, "every stage", "more than 0", "longer gradients are cut")

    block_size: int = setting(256, "language model", "at least 1", "context, in tokens")
    n_layer: int = setting(2, "language model", "at least 1", "transformer blocks")
    n_head: int = setting(4, "language model", "at least 1", "attention heads")
    n_embd: int = setting(128, "language model", "at least 1", "width, a multiple of n_head")
    lm_epochs: int = setting(2, "language model", "at least 0", "passes over the corpus")
    lm_batch_size: int = setting(16, "language model", "at least 1", "documents per step")
    lm_lr: float = setting(4e-3, "language model", "at least 0", "peak learning rate")

    rm_epochs: int = setting(1, "reward model", "at least 0", "passes over the comparisons")
    rm_batch_size: int = setting(16, "reward model", "at least 1", "prompts per step")
    rm_lr: float = setting(1e-3, "reward model", "at least 0", "peak learning rate")

    max_new_tokens: int = setting(64, "rollout", "at least 1", "T_max: a longer response is cut")
    temperature: float = setting(0.8, "rollout", "more than 0", "of sampling, and of PPO's log π")

    ppo_iterations: int = setting(60, "ppo", "at least 0", "times collect + update")
    ppo_batch_size: int = setting(128, "ppo", "at least 1", "trajectories per iteration")
    ppo_epochs: int = setting(2, "ppo", "at least 1", "passes over each batch of experience")
    minibatch_size: int = setting(32, "ppo", "at least 1", "trajectories per gradient step")
    micro_batch_size: int = setting(16, "ppo", "at least 1", "trajectories per forward pass")
    ppo_lr: float = setting(1e-3, "ppo", "at least 0", "peak learning rate")
    kl_coef: float = setting(0.05, "ppo", "at least 0", "β, the price of one nat of KL")
    kl_target: float | None = setting(None, "ppo", "more than 0", "nats that an adaptive β holds")
    ptx_coef: float = setting(0.0, "ppo", "at least 0", "weight of the corpus loss in PPO-ptx")
    gamma: float = setting(1.0, "ppo", "from 0 to 1", "γ, the discount")
    lam: float = setting(0.95, "ppo", "from 0 to 1", "λ of GAE")
    clip: float = setting(0.2, "ppo", "more than 0", "ε of PPO's ratio")
    value_clip: float = setting(0.2, "ppo", "more than 0", "ε of the value's change")
    value_coef: float = setting(0.1, "ppo", "at least 0", "c1, weight of the value loss")
    entropy_coef: float = setting(0.0, "ppo", "at least 0", "c2, weight of the entropy bonus")
    early_stop_kl: float | None = setting(0.1, "ppo", "more than 0", "nats per token from π_old")
    missing_eos_score: float | None = setting(-3.0, "ppo", "any", "of a response that was cut")

    eval_prompts: int = setting(512, "evaluation", "at least 1", "held-out prompts, at most")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, limit = getattr(self, f.name), f.metadata["limit"]
            kind = f.type | int if f.type in (float, float | None) else f.type
            sound = isinstance(value, kind) and not isinstance(value, bool)
            if sound and isinstance(value, (int, float)):
                sound = abs(value) < 1e30 and LIMITS[limit](value)
            if not sound:
                kind = getattr(f.type, "__name__", f.type)
                raise ValueError(f"{f.name} is {value!r}, expected {kind}, {limit}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, expected a multiple of n_head")


def seeded(seed, stage, step):
    """The generator of one step: its draws depend on (seed, stage, step) alone."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def permutation(n, generator):
    """A random order of 0 … n-1, on the CPU; the generator may live on any device."""
    device = generator.device if generator else "cpu"
    return torch.randperm(n, generator=generator, device=device).cpu()


def draw(items, n, generator):
    """n items of a list in random order; each is used once before one is used twice."""
    if not items:
        raise ValueError("there is nothing to draw from: no prompt, or no document")
    rounds = math.ceil(n / len(items))
    order = torch.cat([permutation(len(items), generator) for _ in range(rounds)])
    return [items[i] for i in order[:n]]


def autocast(model):
    """bf16 for big models on hardware that has it. Log-softmax and losses stay in float32."""
    weight = next(model.parameters())
    big = sum(p.numel() for p in model.parameters()) > 50e6  # small ones wait for launches
    enabled = big and weight.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(weight.device.type, torch.bfloat16, enabled)


def pad(rows, device):
    """Lists of ids -> right-padded tokens (B, S) and mask (B, S)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]             # (B, S)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens.to(device), mask.to(device)


def batches(lengths, batch_size, epochs, first, seed, stage):
    """(step, rows) for each step from `first` on, over epochs of random batches.

    The rows of a batch have similar lengths, so that little of it is padding.
    """
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in range(first // per_epoch, epochs):
        generator = seeded(seed, stage, epoch)
        order = permutation(len(lengths), generator)
        order = order[torch.tensor(lengths)[order].argsort(stable=True)]
        parts = order.split(batch_size)
        for i, part in enumerate(permutation(per_epoch, generator).tolist()):
            if epoch * per_epoch + i >= first:
                yield epoch * per_epoch + i, parts[part].tolist()


def make_optimizer(model, eps=1e-8):
    """Adam, fused: one kernel for all weights. Every step sets its own learning rate."""
    return torch.optim.Adam(model.parameters(), eps=eps, fused=True)


def begin(model, optimizer, last, eps=1e-8):
    """(optimizer, index of the first step): a loop starts anew, or goes on after `last`."""
    if last is not None and optimizer is None:
        raise ValueError("to go on after `last`, its optimizer is needed too")
    return optimizer or make_optimizer(model, eps), last["step"] if last else 0


def set_learning_rate(optimizer, peak, step, steps, warmup):
    """Up to the peak in warmup + 1 equal steps, then linearly down, to reach 0 after `steps`."""
    lr = peak * min((step + 1) / (warmup + 1), (steps - step) / max(steps - warmup, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_step(loss, model, optimizer, max_grad_norm, where):
    """Clip the gradient, step and clear it; returns its norm before clipping.

    A loss or gradient that is not finite never reaches the weights: FloatingPointError.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad()  # whoever stops early leaves no stale gradient behind
    if not finite:
        raise FloatingPointError(f"{where}: loss {loss}, gradient norm {norm}")
    return norm


# ======== Language model: text becomes probabilities =============================================


def language_model_loss(model, documents):
    """−E log π(x_{i+1} | x_1 … x_i), the cross-entropy of the next token, in nats.

    model: GPT    documents: lists of ids, each with an end token before and after
    returns: () mean over all tokens but each document's first
    """
    tokens, mask = pad(documents, model.wte.weight.device)                 # (B, S)
    with autocast(model):
        logits = model(tokens[:, :-1])                                     # (B, S-1, V)
    return -masked_mean(gather_log_probs(logits, tokens[:, 1:]), mask[:, 1:])


def train_language_model(model, documents, config, optimizer=None, last=None):
    """Stage 1: minimise −E log π(x_{i+1} | x_1 … x_i) over the corpus.

    A generator: it trains `model`, a GPT, as it is iterated, and yields each step's metrics.
    documents: lists of ids, each with an end token before and after. To go on after a step, pass
    the optimizer and that step's metrics as `last`. ValueError without documents.
    """
    if not documents:
        raise ValueError("there is no document to train on")
    optimizer, first = begin(model, optimizer, last)
    lengths = [len(document) for document in documents]
    steps = config.lm_epochs * math.ceil(len(documents) / config.lm_batch_size)
    for step, rows in batches(lengths, config.lm_batch_size, config.lm_epochs, first,
                              config.seed, "language_model"):
        set_learning_rate(optimizer, config.lm_lr, step, steps, warmup=min(50, steps // 10))
        # The loss on one batch of documents, and its gradient.
        optimizer.zero_grad()
        loss = language_model_loss(model, [documents[i] for i in rows])
        loss.backward()
        # One step of Adam.
        norm = gradient_step(loss.item(), model, optimizer, config.max_grad_norm,
                             f"language_model step {step + 1}")
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), "grad_norm": norm}


@torch.no_grad()
def corpus_loss(model, documents):
    """`language_model_loss` as a number, over any number of documents."""
    total, count = 0.0, 0
    documents = sorted(documents, key=len)  # so that little of a batch is padding
    for i in range(0, len(documents), 16):
        batch = documents[i:i + 16]
        tokens = sum(map(len, batch)) - len(batch)
        total += tokens * float(language_model_loss(model, batch))
        count += tokens
    return total / count


# ======== Reward model: preferences become a number ==============================================


def reward_model_loss(chosen, rejected):
    """Bradley–Terry: −E log σ(r_w − r_l), the negative log-likelihood of the preferences.

    Of two responses to a prompt x, y_w was preferred to y_l; r_w = r(x, y_w), r_l = r(x, y_l).
    P(y_w ≻ y_l | x) = e^{r_w} / (e^{r_w} + e^{r_l}) = σ(r_w − r_l). The loss is positive, and large
    when the order is wrong. Only differences of rewards count: they are log-odds.

    chosen, rejected: (B,) scores r_w, r_l    returns: () mean over pairs
    Source: InstructGPT 2203.02155, eq. 1 with K = 2; Stiennon et al. 2009.01325, section 3.4.
    """
    return -F.logsigmoid(chosen - rejected).mean()  # sigmoid underflows to 0, and its log is -inf


def ranking_loss(scores):
    """−1/C(K,2) E Σ_{i<j} log σ(r_i − r_j): a ranking of K responses as all of its C(K,2) pairs.

    Each response passes through the network once, and meets the K−1 others in the same step. As
    separate pairs each would be trained on K−1 times per epoch, and the model would overfit.

    scores: (B, K) of the responses to B prompts, best first, K >= 2    returns: () mean over pairs
    Source: InstructGPT 2203.02155, eq. 1; K = 2 is `reward_model_loss`.
    """
    K = scores.shape[1]
    better, worse = torch.triu_indices(K, K, offset=1, device=scores.device)  # 2 × (C(K,2),)
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def score_comparisons(reward_model, comparisons):
    """A tuple with one (K,) per comparison: r(x, y) of its responses, each passed through once."""
    rows = [prompt + y for prompt, responses in comparisons for y in responses]
    tokens, mask = pad(rows, reward_model.gpt.wte.weight.device)           # (Σ K, S)
    with autocast(reward_model):
        scores = reward_model(tokens, mask.sum(1))                         # (Σ K,)
    return scores.split([len(responses) for _, responses in comparisons])


def train_reward_model(reward_model, comparisons, config, optimizer=None, last=None):
    """Stage 2: minimise `ranking_loss`, averaged over prompts, whose K may differ.

    A generator, like `train_language_model`: it trains as it is iterated, yields each step's
    metrics, and goes on after `last`. comparisons: (prompt, responses best first), lists of ids;
    each response ends with the end token, where it is scored. ValueError without comparisons.
    """
    if not comparisons:
        raise ValueError("there is no comparison to train on")
    optimizer, first = begin(reward_model, optimizer, last)
    lengths = [len(prompt) + max(map(len, responses)) for prompt, responses in comparisons]
    steps = config.rm_epochs * math.ceil(len(comparisons) / config.rm_batch_size)
    for step, rows in batches(lengths, config.rm_batch_size, config.rm_epochs, first,
                              config.seed, "reward_model"):
        set_learning_rate(optimizer, config.rm_lr, step, steps, warmup=min(20, steps // 10))
        # One forward pass per response, one loss per prompt.
        optimizer.zero_grad()
        scores = score_comparisons(reward_model, [comparisons[i] for i in rows])
        loss = torch.stack([ranking_loss(s[None]) for s in scores]).mean()
        loss.backward()
        # One step of Adam.
        norm = gradient_step(loss.item(), reward_model, optimizer, config.max_grad_norm,
                             f"reward_model step {step + 1}")
        accuracy = ranking_accuracy([s.detach() for s in scores])
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), "accuracy": accuracy,
               "grad_norm": norm}


def ranking_accuracy(rankings):
    """Share of the pairs of a ranking that its scores (K,), best first, order; a tie is half.

    returns: the mean over rankings, a list of (K,)
    """
    shares = []
    for scores in rankings:
        better, worse = torch.triu_indices(len(scores), len(scores), offset=1)
        signs = torch.sign(scores[better] - scores[worse])                 # (C(K,2),)
        shares.append(float(signs.mean()) / 2 + 0.5)
    return sum(shares) / len(shares)


@torch.no_grad()
def reward_model_accuracy(reward_model, comparisons):
    """`ranking_accuracy` of the reward model's scores of comparisons."""
    rankings = []
    for i in range(0, len(comparisons), 32):
        rankings += score_comparisons(reward_model, comparisons[i:i + 32])
    return ranking_accuracy(rankings)


@torch.no_grad()
def reward_scores(reward_model, sampled):
    """r(x, y) (B,) of the responses of a Rollout, read at their end tokens.

    The reward model has only ever been read at end tokens, so a cut response gets one too: behind
    it, or in place of its last token where the context has no more room.
    """
    eos, block_size = reward_model.gpt.config.eos_token, reward_model.gpt.config.block_size
    lengths = sampled.prompt_lengths + sampled.mask.sum(1) + ~ends(sampled, eos)  # (B,)
    lengths = lengths.clamp_max(block_size)
    tokens = F.pad(sampled.tokens, (0, 1)).scatter(1, lengths[:, None] - 1, eos)  # (B, P+T+1)
    with autocast(reward_model):
        return reward_model(tokens[:, :block_size], lengths)


@torch.no_grad()
def normalize_rewards(reward_model, reference, prompts, config):
    """Shift and scale the head: mean 0, std 1 on the reference's own responses to `prompts`.

    PPO's constants (β, the clips) assume rewards of this scale. Where all samples score the same,
    but for rounding, there is no scale to take, and the head is only shifted.

    returns: whether there was a scale    Source: Ziegler et al. 1909.08593, section 2.
    """
    generator, scores = seeded(config.seed, "normalize", 0), []
    prompts, eos = draw(prompts, 512, generator), reference.config.eos_token
    for i in range(0, 512, 128):
        sampled = rollout(reference, prompts[i:i + 128], config.max_new_tokens, eos,
                          config.temperature, generator)
        scores.append(reward_scores(reward_model, sampled))
    std, mean = torch.std_mean(torch.cat(scores), correction=0)
    head, scaled = reward_model.reward_head, bool(std > 1e-4 * (1 + mean.abs()))
    head.bias.sub_(mean)
    if scaled:
        head.weight.div_(std)
        head.bias.div_(std)
    return scaled


# ======== Trajectories: sampling from the policy =================================================


@dataclass
class Rollout:
    """Trajectories τ ~ π_θ. The sampled ids are trained on: text is never encoded again."""
    tokens: torch.Tensor          # (B, longest P + T) prompt, response, padding
    prompt_lengths: torch.Tensor  # (B,) P of each row
    actions: torch.Tensor         # (B, T) a_t, 0 after the end
    mask: torch.Tensor            # (B, T) True up to and including the end
    log_probs: torch.Tensor       # (B, T) log π(a_t|s_t) of the distribution sampled from

    def take(self, rows):
        """The trajectories `rows`, trimmed to the longest of them."""
        part = {name: x[rows] for name, x in vars(self).items() if torch.is_tensor(x)}
        T = int(part["mask"].sum(1).max())
        width = int(part["prompt_lengths"].max()) + T
        for name, x in part.items():
            if x.dim() == 2:
                part[name] = x[:, :width if name == "tokens" else T]
        return replace(self, **part)

    def lists(self):
        """(prompts, responses) as lists of ids, without padding."""
        prompts = [row[:P].tolist() for row, P in zip(self.tokens, self.prompt_lengths)]
        return prompts, [row[m].tolist() for row, m in zip(self.actions, self.mask)]


def ends(sampled, eos_token):
    """(B,) whether the response ends by itself: its last valid action is the end token."""
    return ((sampled.actions == eos_token) & sampled.mask.bool()).any(1)


def sample_tokens(log_probs, uniforms):
    """One token per row by inverse transform: the first whose cumulative probability exceeds u.

    log_probs: (B, V), uniforms: (B,) in [0, 1)    returns: (B,)
    (torch.multinomial draws V random numbers per row where this needs one.)
    """
    cdf = log_probs.exp().cumsum(-1)                                       # (B, V)
    u = uniforms[:, None] * cdf[:, -1:]  # rounding leaves the sum near 1, not at it
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_max(cdf.shape[1] - 1)


def check_rollout(gpt, prompts, max_new_tokens, temperature):
    """ValueError, before anything is sampled, for what `rollout` cannot do."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("no prompt, or one without a token: begin each with the end token")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    P, room = max(map(len, prompts)), gpt.config.block_size
    if max_new_tokens < 1 or P + max_new_tokens > room:
        raise ValueError(f"prompt {P} + max_new_tokens {max_new_tokens} do not fit {room} tokens")


@torch.no_grad()
def rollout(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None):
    """Sample a response to each prompt: a_t ~ π_θ(·|s_t) until the end token or T_max.

    p(τ) = Π_t π_θ(a_t|s_t): the prompt is given, and the "environment" merely appends a_t to s_t.
    policy: a GPT or ActorCritic; `hidden`, `logits` and `new_cache` are used
    prompts: B lists of ids, P >= 1 each    temperature: divides the logits
    returns: Rollout, T is the longest response's length. Needs `Rollout`, `pad`, `sample_tokens`,
    `autocast` and `check_rollout`, which says what is refused (ValueError).
    """
    gpt = getattr(policy, "gpt", policy)
    check_rollout(gpt, prompts, max_new_tokens, temperature)
    device = gpt.wte.weight.device
    tokens, given = pad(prompts, device)                                   # (B, P), the longest
    (B, P), lengths = tokens.shape, given.sum(1)
    tokens = F.pad(tokens, (0, max_new_tokens))                            # (B, P+T)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)  # (B, T)
    wide = torch.promote_types(gpt.wte.weight.dtype, torch.float32)
    log_probs = torch.zeros_like(mask, dtype=wide)                         # (B, T)
    uniforms = torch.rand(max_new_tokens, B, generator=generator,  # each row has its own
                          device=generator.device if generator else "cpu").to(device)
    rows = torch.arange(B, device=device)  # (B',) which trajectory each row still sampled is
    alive = rows >= 0                      # (B',) whether it goes on
    with autocast(gpt):
        # Read the prompts: the hidden state of each row's last token, that of s_0.
        cache = gpt.new_cache(B, P + max_new_tokens)
        positions = torch.arange(P, device=device).expand(B, P)
        x = gpt.hidden(tokens[:, :P], [c[:, :P] for c in cache], positions, lengths[:, None] - 1)
        for t in range(max_new_tokens):
            # Draw a_t. Each row writes it at its own position; behind an end stands token 0.
            log_p = F.log_softmax(gpt.logits(x[:, 0] / temperature).to(wide), -1)  # (B', V)
            action = sample_tokens(log_p, uniforms[t, rows]).where(alive, 0)  # (B',)
            log_probs[rows, t] = log_p.gather(1, action[:, None]).squeeze(1).where(alive, 0)
            tokens[rows, lengths[rows] + t] = action
            mask[rows, t] = alive
            # Rows that have ended leave the batch, a fifth at a time: moving the cache costs time.
            alive = alive & (action != eos_token)
            left = int(alive.sum())
            if left == 0:
                break
            if left <= 0.8 * len(rows):
                cache = [c[alive] for c in cache]
                rows, action, alive = rows[alive], action[alive], alive[alive]
            # Append a_t to s_t, and read on.
            if t + 1 < max_new_tokens:
                positions = (lengths[rows] + t)[:, None]                   # (B', 1)
                x = gpt.hidden(action[:, None], [c[:, :P + t + 1] for c in cache], positions)
    actions = tokens.gather(1, lengths[:, None] + torch.arange(t + 1, device=device))  # (B, T)
    return Rollout(tokens=tokens[:, :P + t + 1], prompt_lengths=lengths, actions=actions,
                   mask=mask[:, :t + 1], log_probs=log_probs[:, :t + 1])


# ======== Log-probabilities and rewards ==========================================================


def gather_log_probs(logits, actions):
    """log π(a_t|s_t) = logits[a_t] − log Σ_a exp(logits[a]), in float32 or better.

    logits: (B, T, V), actions: (B, T) of ids, in padding too    returns: (B, T) in nats, each <= 0
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits, dim=-1).gather(-1, actions[..., None]).squeeze(-1)


def forward_responses(model, batch, temperature):
    """One pass over prompts and responses, read at position P-1+t for each step t.

    model: GPT or ActorCritic    batch: Rollout    returns: log_probs (B, T) of the actions,
    0 after the end; values (B, T), or None for a GPT; logits (B, T, V) of the tempered policy
    """
    gpt, values, T = getattr(model, "gpt", model), None, batch.mask.shape[1]
    at = batch.prompt_lengths[:, None] - 1 + torch.arange(T, device=batch.mask.device)  # (B, T)
    with autocast(model):
        x = gpt.hidden(batch.tokens, at=at)                                # (B, T, C)
        logits = gpt.logits(x / temperature)                               # (B, T, V)
        if model is not gpt:
            values = model.value_head(x).squeeze(-1).to(batch.log_probs)   # (B, T)
    log_probs = gather_log_probs(logits, batch.actions)
    return log_probs.where(batch.mask, 0), values, logits


@torch.no_grad()
def read_responses(model, batch, config):
    """(log_probs (B, T), values (B, T)) by `forward_responses`, one micro-batch at a time.

    The logits of all rows at once would fill the memory. The values of a GPT are 0.
    """
    log_probs, values = batch.log_probs.new_zeros(2, *batch.mask.shape)
    order = batch.mask.sum(1).argsort(stable=True)  # by length, so that little is padding
    for rows in order.split(config.micro_batch_size):
        part = batch.take(rows)
        T = part.mask.shape[1]
        log_probs[rows, :T], v, _ = forward_responses(model, part, config.temperature)
        if v is not None:
            values[rows, :T] = v.where(part.mask, 0)
    return log_probs, values


def kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, kl_coef):
    """r_t = −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) + [t is the last step] · score.

    π_ref is the frozen language model that PPO starts from, β the price of one nat away from it.
    The score of the whole response is earned by its last action, also when it was cut at T_max;
    the KL penalty is paid where it arises. Σ_t r_t = score − β Σ_t (log π − log π_ref).

    scores: (B,)    log_probs, ref_log_probs, mask: (B, T)    returns: (B, T), 0 after the end
    Assumes a mask whose rows are prefixes of ones (right padding): else the score lands elsewhere.
    ValueError for scores that are not (B,): they would broadcast.
    Source: InstructGPT 2203.02155, eq. 2 without its pretraining term; Ziegler 1909.08593, eq. 2.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)}, expected {tuple(mask.shape[:1])}")
    mask = mask.bool()
    rewards = torch.zeros_like(log_probs)
    if kl_coef:  # 0 times an infinite log-ratio would not be 0
        rewards = -kl_coef * (log_probs - ref_log_probs).where(mask, 0)
    last = mask.sum(1, keepdim=True) - 1                                   # (B, 1)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last      # (B, T)
    return rewards + scores[:, None].where(is_last, 0)


# ======== Policy gradient, and its variance: rewards-to-go, baseline, advantage ==================


def policy_gradient_loss(log_probs, weights, mask):
    """A loss whose gradient estimates −∇J: −(1/B) Σ_b Σ_t log π(a_t|s_t) w_t over B trajectories.

    J(θ) = E_{τ~π_θ}[R(τ)], R(τ) = Σ_t γ^t r_t. Since ∇p = p ∇log p and log p(τ) is Σ_t log π_θ
    plus what does not depend on θ, ∇J = E_τ[Σ_t ∇log π_θ(a_t|s_t) w_t] with w_t = R(τ): REINFORCE.
    And since E_a[∇log π(a|s)] = ∇Σ_a π(a|s) = 0, what a_t cannot change may leave w_t: rewards
    before t (`rewards_to_go`), any baseline b(s_t). With γ = 1 the expectation stays; the variance
    falls with a good b, such as V(s_t). What is left estimates the advantage A(s_t, a_t) (`gae`:
    unbiased if λ = 1 or V is exact). For the same reason the log π in r_t needs no gradient.

    log_probs, weights, mask: (B, T)    returns: (); weights are constants, without gradient
    Source: the policy gradient theorem; REINFORCE, Williams 1992; GAE 1506.02438, eq. 1.
    """
    mask = mask.bool()
    terms = log_probs.where(mask, 0) * weights.detach().where(mask, 0)
    return -terms.sum() / mask.shape[0]


def rewards_to_go(rewards, mask, gamma=1.0):
    """R_t = Σ_{t' >= t} γ^{t'−t} r_{t'}: an action cannot change what was earned before it.

    rewards, mask: (B, T)    returns: (B, T), 0 after the end. Assumes that each row of the mask is
    a prefix of ones (right padding).
    """
    rewards = rewards.where(mask.bool(), 0)
    result, to_go = [], torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        to_go = rewards[:, t] + gamma * to_go                              # (B,)
        result.append(to_go)
    return torch.stack(result[::-1], dim=1)


# ======== Generalised advantage estimation =======================================================


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t, an estimate of Q(s_t, a_t) − V(s_t): how much better a_t is than what π does there.

    V(s_t) = E[Σ_{t' >= t} γ^{t'−t} r_{t'}], the value, is learnt by `value_loss`. The TD errors
    δ_t = r_t + γ V(s_{t+1}) − V(s_t) telescope: Σ_{l<k} γ^l δ_{t+l} is what k steps earned, plus
    γ^k V(s_{t+k}), minus V(s_t). Averaged over k with weights (1−λ) λ^{k−1} that is
        A_t = Σ_l (γλ)^l δ_{t+l},    backwards from the end:    A_t = δ_t + γλ A_{t+1}
    V after the last action is 0, also of a response that was cut: its score is paid there. λ = 1
    gives rewards-to-go minus V (no bias in ∇J, most variance), λ = 0 δ_t (trusts V the most).
    By hand, γ = 1, λ = 1/2, r = (0, 0, 1), V = (0.2, 0.4, 0.8):
        δ = (0 + 0.4 − 0.2, 0 + 0.8 − 0.4, 1 − 0.8) = (0.2, 0.4, 0.2)
        A = (0.2 + 0.25, 0.4 + 0.1, 0.2) = (0.45, 0.5, 0.2)

    rewards, values, mask: (B, T)    returns: (B, T), 0 after the end; A + V is the value target.
    Assumes that each row of the mask is a prefix of ones (right padding).
    Source: GAE 1506.02438, eq. 16; PPO 1707.06347, eq. 11 and 12.
    """
    mask = mask.bool()
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages, next_value, next_advantage = [], 0, 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]          # (B,)
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages.append(next_advantage)
    return torch.stack(advantages[::-1], dim=1)


def masked_mean(x, mask):
    """Σ mask · x / Σ mask: the mean over valid entries, 0 if there are none.

    x, mask: (B, T)    returns: () in float32 or better
    """
    mask = mask.bool()
    total = x.where(mask, 0).sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return total / mask.sum().clamp_min(1)


def whiten(x, mask):
    """(x − mean) / √(variance + 1e-8) over valid entries, 0 elsewhere.

    Advantages then have one scale, whatever the reward's. A constant whitens to exactly 0.
    x, mask: (B, T)    returns: (B, T). Needs `masked_mean`.
    Source: baselines, ppo2, which does it per minibatch; here it is done over the whole batch.
    """
    mask = mask.bool()
    x = x - x.where(mask, -math.inf).amax()  # else rounding of a large mean looks like variance
    centred = (x - masked_mean(x, mask)).where(mask, 0)
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


# ======== Importance sampling, and PPO's losses ==================================================


def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """−E min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t) with ρ_t = π(a_t|s_t) / π_old(a_t|s_t).

    Importance sampling: E_{a~π}[f(a)] = E_{a~π_old}[ρ f(a)], so samples of π_old serve a few steps
    of π. At π = π_old ∇ρ = ∇log π: the policy gradient, as a mean over tokens. ρ_t, the paper's
    r_t(θ), is exp(log π − log π_old), not a ratio of logs. The minimum makes −loss a lower
    bound of E[ρ A]: no gain from moving ρ beyond 1 ± ε in the good direction, full cost in the bad.
    ρ_t corrects which action was taken, not how often s_t is reached: exact weights would be
    products of ratios along the trajectory.

    log_probs, old_log_probs, advantages, mask: (B, T)    clip: ε    returns: () mean over valid
    tokens; old_log_probs and advantages are constants, without gradient
    Source: PPO 1707.06347, eq. 7. Needs `masked_mean`.
    """
    mask = mask.bool()
    ratio = (log_probs - old_log_probs.detach()).where(mask, 0).exp()      # (B, T)
    advantages = advantages.detach().where(mask, 0)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ E max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), pessimistic like the policy's.

    values, old_values, returns, mask: (B, T)    clip: ε    returns: () mean over valid tokens;
    old_values and returns are constants, without gradient
    R is the unwhitened advantage plus V_old. Source: baselines, ppo2, which clips V with the
    policy's ε; PPO 1707.06347, eq. 9 has (V − R)², without ½ and clip. Needs `masked_mean`.
    """
    mask = mask.bool()
    values = values.where(mask, 0)
    old_values, returns = (x.detach().where(mask, 0) for x in (old_values, returns))
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.max((values - returns)**2, (clipped - returns)**2), mask)


def entropy(logits, mask):
    """E H[π(·|s_t)] = −E Σ_a π(a|s_t) log π(a|s_t), in nats.

    logits: (B, T, V), mask: (B, T)    returns: () mean over valid steps, log V if π is uniform
    Source: PPO 1707.06347, eq. 9. Needs `masked_mean`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = F.log_softmax(logits.where(mask.bool()[..., None], 0), dim=-1)
    return masked_mean(-(log_p.exp() * log_p).sum(-1), mask)


# ======== Reward hacking and the KL penalty ======================================================
#
# r(x, y) is only a fit. Far from the texts that it was trained on, some texts score high and are
# bad, and an optimiser finds them: reward hacking. Maximising E[r] − β KL(π‖π_ref) keeps π near;
# the penalty is paid in `kl_penalized_rewards`.


def kl_estimates(log_probs, ref_log_probs, mask):
    """Two estimates of KL(π‖π_ref) for each sequence, from samples of π, in nats.

    With Δ_t = log π_ref(a_t|s_t) − log π(a_t|s_t):  k1 = Σ −Δ_t,  k3 = Σ (exp(Δ_t) − 1 − Δ_t).
    Both are unbiased; k3 is never negative and varies less near π = π_ref. (With Δ reversed, a
    step estimates its χ² − KL, χ² = Σ_a π²/π_ref − 1: much the same near π_ref, too high far off.)

    log_probs, ref_log_probs, mask: (B, T)    returns: (k1 (B,), k3 (B,))
    Source: Schulman 2020, "Approximating KL divergence".
    """
    delta = (ref_log_probs - log_probs).where(mask.bool(), 0)
    return -delta.sum(1), (delta.expm1() - delta).sum(1)


def adapt_kl_coef(kl_coef, kl, kl_target, K=0.1):
    """β ← β (1 + K e), e = clip(KL / target − 1, ±0.2): holds the KL near a target.

    kl_coef: β    kl, kl_target: nats per response    all floats    returns: the next β
    Source: Ziegler et al. 1909.08593, section 2.2 (their code has K = batch size / 10,000).
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + K * error)


# ======== The loop of PPO: collect, update, repeat ===============================================


@dataclass
class Experience(Rollout):
    """A batch of trajectories with all that PPO needs.

    log_probs are π_old's, computed anew as the update does it: the ratio then starts at exactly 1.
    """
    ref_log_probs: torch.Tensor  # (B, T) log π_ref(a_t|s_t)
    values: torch.Tensor         # (B, T) V_old(s_t)
    scores: torch.Tensor         # (B,) of the whole responses
    rewards: torch.Tensor        # (B, T) r_t
    advantages: torch.Tensor     # (B, T) A_t, not whitened
    returns: torch.Tensor        # (B, T) A_t + V_old(s_t), the value's target
    rollout_seconds: float       # time that sampling took


@torch.no_grad()
def collect(policy, reference, reward_fn, prompts, config, generator=None):
    """One batch of experience from π_θ, which from now on is π_old.

    policy: ActorCritic    reference: a frozen GPT    prompts: B lists of ids    returns: Experience
    reward_fn(Rollout) -> scores (B,): a reward model or any callable, else ValueError. A response
    without an end token scores config.missing_eos_score instead (None: reward_fn's own).
    """
    # Sample trajectories.
    start, eos = time.perf_counter(), policy.gpt.config.eos_token
    sampled = rollout(policy, prompts, config.max_new_tokens, eos, config.temperature, generator)
    seconds, mask = time.perf_counter() - start, sampled.mask
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("a row of the mask is no prefix of ones: pad on the right")
    # Score the whole responses.
    scores = reward_fn(sampled)
    scores = torch.as_tensor(math.nan if scores is None else scores).to(sampled.log_probs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"reward_fn returned scores of shape {tuple(scores.shape)}, expected "
                         f"{tuple(mask.shape[:1])}: one per trajectory")
    if config.missing_eos_score is not None:  # Huang et al. 2403.17031, detail 23
        scores = scores.where(ends(sampled, eos), config.missing_eos_score)
    # Turn them into rewards per token, and those into the advantages of the actions.
    log_probs, values = read_responses(policy, sampled, config)            # 2 × (B, T)
    ref_log_probs, _ = read_responses(reference, sampled, config)          # (B, T)
    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_coef)
    advantages = gae(rewards, values, mask, config.gamma, config.lam)      # (B, T)
    trajectories = vars(sampled) | {"log_probs": log_probs}
    return Experience(**trajectories, ref_log_probs=ref_log_probs, values=values, scores=scores,
                      rewards=rewards, advantages=advantages, returns=advantages + values,
                      rollout_seconds=seconds)


def ppo_loss(policy, batch, config):
    """L = −L_clip + c1 L_VF − c2 H on a micro-batch (PPO 1707.06347, eq. 9 with its sign turned).

    returns: (loss (), {metric: () without gradient})
    """
    log_probs, values, logits = forward_responses(policy, batch, config.temperature)
    policy_part = ppo_policy_loss(log_probs, batch.log_probs, batch.advantages, batch.mask,
                                  config.clip)
    value_part = value_loss(values, batch.values, batch.returns, batch.mask, config.value_clip)
    with torch.set_grad_enabled(config.entropy_coef > 0):
        bonus = entropy(logits, batch.mask)
    # A part whose coefficient is 0 stays out: 0 times an infinite loss would not be 0.
    loss = policy_part
    if config.value_coef:
        loss = loss + config.value_coef * value_part
    if config.entropy_coef:
        loss = loss - config.entropy_coef * bonus
    # What to watch: how far the policy has moved since the batch was collected.
    log_ratio = (log_probs.detach() - batch.log_probs).where(batch.mask, 0)
    change = log_ratio.expm1()                                             # (B, T) ρ − 1
    clipped = (change.abs() > config.clip).float()
    return loss, {"loss": loss.detach(), "policy_loss": policy_part.detach(),
                  "value_loss": value_part.detach(), "entropy": bonus.detach(),
                  "approx_kl": masked_mean(change - log_ratio, batch.mask),  # k3 of KL(π_old‖π)
                  "clip_fraction": masked_mean(clipped, batch.mask)}


def minibatch_gradient(policy, minibatch, config):
    """Add the gradient of `ppo_loss` on a minibatch to .grad; returns its metrics as numbers.

    It goes through the network in micro-batches. Each counts by its share of the tokens, so that
    their gradients add up to that of the minibatch's mean.
    """
    total = {}
    order = minibatch.mask.sum(1).argsort(stable=True)  # by length, so that little is padding
    for rows in order.split(config.micro_batch_size):
        batch = minibatch.take(rows)
        share = batch.mask.sum() / minibatch.mask.sum()
        loss, watched = ppo_loss(policy, batch, config)
        (share * loss).backward()
        for name, value in watched.items():
            total[name] = total.get(name, 0) + share * value
    return {name: float(value) for name, value in total.items()}


def ppo_update(policy, optimizer, experience, config, generator=None, documents=None):
    """K epochs of minibatch steps on one batch of experience; returns the metrics of the update.

    PPO-ptx: with ptx_coef, each step adds ptx_coef times the gradient of −E log π(x) on as many
    `documents` (lists of ids) as it has trajectories, at temperature 1. InstructGPT, eq. 2, §C.4.
    """
    # Advantages are whitened over the whole batch; the returns keep their own scale.
    whitened = whiten(experience.advantages, experience.mask)
    experience = replace(experience, advantages=whitened)
    history, tokens, stop = [], 0, False
    for epoch in range(config.ppo_epochs):
        for rows in permutation(len(whitened), generator).split(config.minibatch_size):
            minibatch = experience.take(rows.to(whitened.device))
            tokens += int(minibatch.mask.sum())
            # The gradient of PPO's loss, a mean over the minibatch's tokens.
            optimizer.zero_grad()
            metrics = minibatch_gradient(policy, minibatch, config)
            # Too far from π_old? Then the update ends, and leaves no gradient behind.
            stop = bool(config.early_stop_kl and metrics["approx_kl"] > config.early_stop_kl)
            if stop:
                optimizer.zero_grad()
                break
            # PPO-ptx: the gradient of the language model's loss is added to it.
            if config.ptx_coef:
                sample = draw(documents, len(rows), generator)
                ptx_loss = config.ptx_coef * language_model_loss(policy.gpt, sample)
                ptx_loss.backward()
                metrics["loss"] += ptx_loss.item()
            # One step of Adam.
            metrics["grad_norm"] = gradient_step(metrics["loss"], policy, optimizer,
                                                 config.max_grad_norm, "ppo")
            history.append(metrics)
        if stop:
            break
    means = {name: sum(m[name] for m in history) / len(history) for name in history[0]}
    return means | {"updates": len(history), "early_stop": stop, "tokens": tokens}


def train_ppo(policy, reference, reward_fn, prompts, config, optimizer=None, last=None,
              documents=None):
    """Stage 3: maximise E[r(x, y)] − β KL(π‖π_ref) by PPO: collect, update, repeat.

    A generator, like `train_language_model`: it trains `policy`, an ActorCritic, as it is
    iterated, yields each iteration's metrics, and goes on after `last`.
    reference: the policy's frozen start, a GPT    prompts, documents (for PPO-ptx): lists of ids
    reward_fn(Rollout) -> scores (B,), but see `collect` for responses that were cut
    """
    # ε = 1e-5, as in baselines: no long step on a tiny gradient.
    optimizer, first = begin(policy, optimizer, last, eps=1e-5)
    for step in range(first, config.ppo_iterations):
        generator = seeded(config.seed, "ppo", step)
        # A warm-up: Adam's first steps are long, and what they break in the language costs KL.
        set_learning_rate(optimizer, config.ppo_lr, step, config.ppo_iterations,
                          warmup=config.ppo_iterations // 7)
        # β is fixed, or follows from the KL of the step before.
        kl_coef = config.kl_coef
        if last and config.kl_target is not None:
            kl_coef = adapt_kl_coef(last["kl_coef"], last["kl"], config.kl_target)
        now = replace(config, kl_coef=kl_coef)
        # Collect experience with the policy, then update the policy on it.
        batch = draw(prompts, config.ppo_batch_size, generator)
        experience = collect(policy, reference, reward_fn, batch, now, generator)
        start = time.perf_counter()
        update = ppo_update(policy, optimizer, experience, now, generator, documents)
        update["update_tokens_per_s"] = update.pop("tokens") / (time.perf_counter() - start)
        last = {"step": step + 1, "steps": config.ppo_iterations, "kl_coef": kl_coef,
                **experience_metrics(experience, policy.gpt.config.eos_token), **update}
        yield last


def experience_metrics(e, eos_token):
    """What to watch: reward, KL to the reference (k1, k3), length, end, explained variance."""
    k1, k3 = kl_estimates(e.log_probs, e.ref_log_probs, e.mask)            # 2 × (B,)
    returns, errors = e.returns[e.mask], (e.returns - e.values)[e.mask]
    variance, explained = returns.var(correction=0), 0.0
    if variance > 1e-10 * (1 + returns.square().mean()):  # below, it is only rounding
        explained = 1 - float(errors.var(correction=0) / variance)
    return {"reward": float(e.scores.mean()), "kl": float(k1.mean()), "kl_k3": float(k3.mean()),
            "explained_variance": explained, "length": float(e.mask.sum(1).float().mean()),
            "ended": float(ends(e, eos_token).float().mean()),
            "rollout_tokens_per_s": int(e.mask.sum()) / e.rollout_seconds}


# ======== Evaluation =============================================================================


def wilson(wins, n, z=1.96):
    """Wilson's 95% interval (low, high) of a share wins / n."""
    p, d = wins / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / d, (middle + half) / d


@torch.no_grad()
def evaluate(policy, reference, reward_fn, prompts, config, true_reward_fn=None):
    """The trained policy against the reference on the same held-out prompts.

    reward_fn, true_reward_fn: Rollout -> (B,); the true one judges where it is known.
    returns: (record of figures, list of samples, one per prompt, with token lists and scores)
    """
    samples, prompts = [], prompts[:config.eval_prompts]
    for i in range(0, len(prompts), 128):
        batch = prompts[i:i + 128]
        rows = [{"prompt": prompt} for prompt in batch]
        for side, model in (("lm", reference), ("ppo", policy)):
            # A response by each model to the same prompts, with its scores and its length.
            eos, generator = reference.config.eos_token, seeded(config.seed, f"evaluate {side}", i)
            r = rollout(model, batch, config.max_new_tokens, eos, config.temperature, generator)
            columns = {f"reward_{side}": reward_fn(r), f"length_{side}": r.mask.sum(1),
                       f"ended_{side}": ends(r, eos)}
            if true_reward_fn:
                columns[f"true_reward_{side}"] = true_reward_fn(r)
            if side == "ppo":
                ref_log_probs, _ = read_responses(reference, r, config)
                columns["kl"], _ = kl_estimates(r.log_probs, ref_log_probs, r.mask)
            for b, (row, response) in enumerate(zip(rows, r.lists()[1])):
                row[side] = response
                row |= {name: float(values[b]) for name, values in columns.items()}
        samples += rows
    if not samples:
        raise ValueError("there is no prompt to evaluate on")
    return evaluation_record(samples, "true_reward" if true_reward_fn else "reward"), samples


def evaluation_record(samples, judge):
    """Means over the samples, the win rate by `judge`, and how the two rewards correlate."""
    n = len(samples)
    columns = {name: torch.tensor([sample[name] for sample in samples], dtype=torch.float64)
               for name in samples[0] if name not in ("prompt", "lm", "ppo")}
    record = {name: float(values.mean()) for name, values in columns.items()}
    better = columns[f"{judge}_ppo"] - columns[f"{judge}_lm"]
    record["win_rate"] = float(torch.sign(better).mean()) / 2 + 0.5  # a tie is half a win
    record["win_rate_low"], record["win_rate_high"] = wilson(record["win_rate"] * n, n)
    record["distinct_ppo"] = len({tuple(sample["ppo"]) for sample in samples}) / n
    if judge == "true_reward":
        both = torch.stack([columns["true_reward_lm"], columns["reward_lm"]])
        std = both.std(1, correction=0)
        record["true_reward_std_lm"] = float(std[0])
        if std.min() > 1e-6:  # equal numbers have no correlation
            record["reward_correlation_lm"] = float(torch.corrcoef(both)[0, 1])
    return record


# ======== The program: language model, reward model, PPO, evaluation =============================

FILES = {"language_model": "lm.pt", "reward_model": "reward.pt", "ppo": "policy.pt"}
SAVE_EVERY = 10.0  # seconds of work that a kill can cost


def stage_settings(stage, config, data):
    """All that a stage's weights depend on: its settings, those of earlier stages, and the data."""
    stages = ["every stage", "language model", "reward model", "rollout", "ppo"]
    stages = stages[:{"language_model": 2, "reward_model": 4, "ppo": 5}[stage]]
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
                if f.metadata["stage"] in stages}
    return settings | {"data": data.fingerprint, "format of checkpoints": 2}


def find_checkpoints(config, data, fresh):
    """{stage: its checkpoint or None} before the stage `fresh`, from which on all starts anew.

    ValueError for one that was made with other settings or data: nothing is overwritten unasked.
    """
    found = {}
    for stage, name in FILES.items():
        path = Path(config.out_dir) / name
        if stage == fresh:
            break
        found[stage] = load_file(path) if path.exists() else None
        if found[stage] is None:
            continue
        theirs, ours = found[stage]["settings"], stage_settings(stage, config, data)
        changed = [f"{key} {theirs.get(key)}, now {ours[key]}" for key in ours
                   if theirs.get(key) != ours[key]]
        if None in found.values():
            changed = ["an earlier file, which is missing now"]
        if changed:
            raise ValueError(f"{path} was made with {'; '.join(changed)}: --fresh {stage} starts "
                             "over from there, another --out_dir keeps what there is")
    return found


def run_stage(stage, model, train, checkpoint, log, config, data, eps=1e-8):
    """Load a stage that is done, or train it, from its checkpoint on; returns the seconds it took.

    train(optimizer, last) is the stage's generator; `log` gathers the rows of log.jsonl.
    """
    path, optimizer = Path(config.out_dir) / FILES[stage], make_optimizer(model, eps)
    state = checkpoint or {"last": None, "done": False, "seconds": 0.0, "rows": []}
    last, rows, start = state["last"], state["rows"], time.perf_counter() - state["seconds"]
    if checkpoint:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{stage}: {'done' if state['done'] else 'goes on'} ({path})")
    # The checkpoints hold the log: what was logged after the last one is done again.
    log += rows
    dataset.write_records(path.with_name("log.jsonl"), log)
    if state["done"]:
        return state["seconds"]

    def save(done):
        # Later stages' files go first: a kill at any moment leaves files that belong together.
        for name in list(FILES.values())[:list(FILES).index(stage):-1]:
            path.with_name(name).unlink(missing_ok=True)
        save_file(path, {
            "stage": stage, "done": done, "last": last, "rows": rows,
            "seconds": time.perf_counter() - start, "weights": model.state_dict(),
            "optimizer": optimizer.state_dict(), "config": vars(config),
            "sizes": vars(getattr(model, "gpt", model).config),
            "settings": stage_settings(stage, config, data),
            "tokenizer": dataset.encoding_state(data.encoding)})

    # Train and log; save after the first step, every ten seconds, and at the end.
    saved = -math.inf
    for last in train(optimizer, last):
        seconds = time.perf_counter() - start
        if stage == "ppo" or last["step"] % 10 == 0 or last["step"] == last["steps"]:
            rows.append({"stage": stage, "seconds": seconds, **last})
            dataset.write_records(path.with_name("log.jsonl"), rows[-1:], "a")
        show.progress(stage, seconds, last)
        if time.perf_counter() - saved > SAVE_EVERY:
            save(done=False)
            saved = time.perf_counter()
    save(done=True)
    log += rows[len(state["rows"]):]
    return time.perf_counter() - start


def load(path, device="cpu"):
    """(model, Config of its run, tokenizer) of lm.pt, reward.pt or policy.pt, wherever it lies."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; run python rlhf.py first")
    checkpoint = load_file(path)
    heads = {"language_model": lambda gpt: gpt, "reward_model": RewardModel, "ppo": ActorCritic}
    model = heads[checkpoint["stage"]](GPT(GPTConfig(**checkpoint["sizes"])))
    model.load_state_dict(checkpoint["weights"])
    encoding = dataset.make_encoding(**checkpoint["tokenizer"])
    return model.to(device), Config(**checkpoint["config"]), encoding


def pick_device(name):
    """torch.device of a name; auto takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: {str(error).splitlines()[0]}") from None


def starting_point(config):
    """(language model, data, config) before stage 1; the weights of `init` bring their sizes."""
    lm = encoding = None
    if config.init:
        lm, encoding = GPT.from_pretrained(config.init), dataset.gpt2_encoding()
        if lm.config.vocab_size != encoding.n_vocab:
            raise ValueError(f"{config.init}: its vocabulary of {lm.config.vocab_size:,} tokens is "
                             f"not GPT-2's of {encoding.n_vocab:,}")
        sizes = ("block_size", "n_layer", "n_head", "n_embd")
        config = replace(config, **{name: getattr(lm.config, name) for name in sizes})
    data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens, encoding)
    if config.init:  # other weights to start from are like other data
        weights = torch.cat([weight.flatten() for weight in lm.state_dict().values()])
        data.fingerprint += hashlib.sha256(weights.numpy()).hexdigest()[:16]
    else:
        lm = GPT(GPTConfig(data.eos_token + 1, config.block_size, config.n_layer, config.n_head,
                           config.n_embd), seeded(config.seed, "language_model init", 0))
    lm.config.eos_token = data.eos_token
    return lm, data, config


def true_reward_of(data):
    """(prompts, responses), lists of ids -> true rewards (B,); None but for the shipped data."""
    if not data.shipped:
        return None
    from data.reviews.annotator import true_reward
    return lambda prompts, responses: torch.tensor(
        [true_reward(data.text(x), data.text(y)) for x, y in zip(prompts, responses)])


def run(config, fresh=None):
    """All stages, from the stage `fresh` on anew. Returns the record of the evaluation."""
    # Whatever can be refused is refused here, before anything is written.
    device, out = pick_device(config.device), Path(config.out_dir)
    lm, data, config = starting_point(config)
    found, log, seconds = find_checkpoints(config, data, fresh), [], {}
    out.mkdir(parents=True, exist_ok=True)
    show.describe(data, device)

    def stage(name, model, train, eps=1e-8):
        seconds[name] = run_stage(name, model, train, found.get(name), log, config, data, eps)

    # 1. The language model learns the corpus; from here on it is the frozen reference.
    stage("language_model", lm.to(device), lambda *state: train_language_model(
        lm, data.train.documents, config, *state))
    lm.requires_grad_(False)

    # 2. The reward model learns the preferences; then its scores are normalised.
    reward_model = RewardModel(lm, seeded(config.seed, "reward_model init", 0)).to(device)

    def reward_stage(*state):
        yield from train_reward_model(reward_model, data.train.comparisons, config, *state)
        if not normalize_rewards(reward_model, lm, data.train.prompts, config):
            print("note: all samples score the same, so rewards are shifted and not scaled")

    stage("reward_model", reward_model, reward_stage)

    # 3. PPO: the policy starts as the language model and learns from the reward model.
    policy, true_reward, watched = ActorCritic(lm), true_reward_of(data), {}
    judge = true_reward and (lambda sampled: true_reward(*sampled.lists()))

    def reward_fn(sampled):
        if judge:  # for the log alone: training never sees it
            watched["true_reward"] = float(judge(sampled).mean())
        return reward_scores(reward_model, sampled)

    def ppo_stage(*state):
        for metrics in train_ppo(policy, lm, reward_fn, data.train.prompts, config, *state,
                                 data.train.documents):
            yield metrics | watched

    stage("ppo", policy, ppo_stage, eps=1e-5)

    # 4. Evaluation on held-out prompts, comparisons and documents.
    start, held = time.perf_counter(), data.held_out
    record, samples = evaluate(policy, lm, reward_fn, held.prompts, config, judge)
    record["language_model_loss"] = corpus_loss(lm, held.documents)
    record["reward_model_accuracy"] = reward_model_accuracy(reward_model, held.comparisons)
    if judge:  # labels are noisy: the true reward itself does not predict all of them
        record["reward_model_ceiling"] = ranking_accuracy(
            [true_reward([x] * len(ys), ys) for x, ys in held.comparisons])
    seconds["evaluation"] = time.perf_counter() - start
    record |= {f"seconds_{name}": s for name, s in seconds.items()}
    record["seconds"] = sum(seconds.values())
    dataset.write_records(out / "log.jsonl", [{"stage": "evaluation", "step": 1, **record}], "a")
    for sample in samples:
        sample |= {key: data.text(sample[key]) for key in ("prompt", "lm", "ppo")}
    dataset.write_records(out / "samples.jsonl", samples)
    show.summary(record, samples, out)
    return record


def main():
    """`python rlhf.py`: read the flags, then run."""
    parser = argparse.ArgumentParser(
        prog="rlhf.py", usage="%(prog)s [--SETTING VALUE ...]", allow_abbrev=False,
        description="RLHF with PPO: language model, reward model, PPO, evaluation.")
    parser.add_argument("--fresh", nargs="?", const="language_model", choices=tuple(FILES),
                        metavar="STAGE", help="start over from STAGE on: language_model (the "
                        "default), reward_model or ppo. Otherwise checkpoints in out_dir made with "
                        "the same settings and data are used, and any others are refused")
    settings = show.parse(parser, Config)
    fresh = settings.pop("fresh")
    run(Config(**settings), fresh)


if __name__ == "__main__":
    show.program("rlhf.py", main)
