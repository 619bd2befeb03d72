"""Reinforcement learning from human feedback, from scratch, in the order of its derivation.

One index convention holds for all responses. A prompt has P tokens and a response T. With the state
s_t = prompt ⊕ y_0 … y_{t-1} and the action a_t = y_t, everything with index t is read from the
hidden state at position P-1+t, the last token of s_t: the logits that give log π(a_t|s_t), and the
value V(s_t). So `log_probs`, `values`, `rewards`, `advantages` and `mask` are all (B, T), column t
is time step t, and nothing is shifted by one. Sequences are right-padded: each row of the mask is
a prefix of ones, up to and including the end token, and nothing after it can change any result.
Shapes: B rows, S tokens per row, T steps, V tokens in the vocabulary (V(s) is the value), C width.

In sampling, PPO and the KL, π is the softmax of logits / temperature. A function copied with the
helpers that its docstring says it "Needs", and with what they need, works alone, with torch.
Papers, on arXiv: PPO 1707.06347; GAE 1506.02438; InstructGPT 2203.02155.
"""
import argparse
import hashlib
import math
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import dataset, show
from model import GPT, ActorCritic, GPTConfig, RewardModel, load_file, save_file

# ======== Settings, and what every stage needs ===================================================
# What the settings act on, in order: the reward model's scores are normalised on samples.
STAGES = ("run", "every stage", "language_model", "rollout", "reward_model", "ppo", "evaluation")
RANGES = {"at least 0": lambda x: x >= 0, "at least 1": lambda x: x >= 1,
          "more than 0": lambda x: x > 0, "from 0 to 1": lambda x: 0 <= x <= 1,
          "any number": lambda x: True}

def setting(stage, default, text, expected="at least 0"):
    """A field of Config: its stage, its default, its line of --help, the range of a number."""
    return field(default=default, metadata={"stage": stage, "help": text, "expected": expected})

RUN, EVERY, LM, ROLLOUT, RM, PPO, EVALUATION = (partial(setting, stage) for stage in STAGES)

@dataclass
class Config:
    """Every setting of a run. Each is a flag of the command line; `--help` lists them by stage."""
    device: str = RUN("auto", "cpu, cuda, mps, or auto: the best one there is")
    out_dir: str = RUN("out", "the run writes here and nowhere else")
    data_dir: str = RUN(str(dataset.SHIPPED), "folder with preferences.jsonl")
    init: str | None = RUN(None, "weights to start from: gpt2, or a directory")
    seed: int = EVERY(0, "seeds every random draw", "any number")
    max_grad_norm: float = EVERY(1.0, "gradients above this norm are scaled down", "more than 0")
    block_size: int = LM(128, "context, in tokens", "at least 1")
    n_layer: int = LM(2, "transformer blocks", "at least 1")
    n_head: int = LM(4, "attention heads", "at least 1")
    n_embd: int = LM(128, "width, a multiple of n_head", "at least 1")
    lm_epochs: int = LM(2, "passes over the corpus")
    lm_batch_size: int = LM(16, "documents per step", "at least 1")
    lm_lr: float = LM(4e-3, "peak learning rate")
    max_new_tokens: int = ROLLOUT(64, "T_max: a longer response is cut", "at least 1")
    temperature: float = ROLLOUT(0.6, "divides the logits, in sampling and in PPO", "more than 0")
    rm_epochs: int = RM(1, "passes over the comparisons")
    rm_batch_size: int = RM(16, "prompts per step", "at least 1")
    rm_lr: float = RM(1e-3, "peak learning rate")
    ppo_iterations: int = PPO(50, "how often to collect and update")
    ppo_batch_size: int = PPO(128, "trajectories per iteration", "at least 1")
    ppo_epochs: int = PPO(1, "passes over each batch of experience", "at least 1")
    minibatch_size: int = PPO(32, "trajectories per gradient step", "at least 1")
    micro_batch_size: int = PPO(16, "trajectories per forward pass", "at least 1")
    ppo_lr: float = PPO(5e-4, "peak learning rate")
    kl_coef: float = PPO(0.1, "β, the price of one nat of KL")
    kl_target: float | None = PPO(None, "KL per response that an adaptive β aims at", "more than 0")
    ptx_coef: float = PPO(0.0, "weight of the corpus loss in PPO-ptx")
    gamma: float = PPO(1.0, "γ, the discount", "from 0 to 1")
    lam: float = PPO(0.98, "λ of GAE; 0.95 is usual, but trusts V more", "from 0 to 1")
    clip: float = PPO(0.2, "ε of PPO's ratio", "more than 0")
    value_clip: float = PPO(0.2, "ε of the value's change", "more than 0")
    value_coef: float = PPO(0.1, "c1, weight of the value loss")
    entropy_coef: float = PPO(0.0, "c2, weight of the entropy bonus")
    early_stop_kl: float | None = PPO(0.1, "KL per token that ends an update", "more than 0")
    missing_eos_score: float | None = PPO(-3.0, "score of a cut response, or none", "any number")
    eval_prompts: int = EVALUATION(512, "held-out prompts, at most", "at least 1")

    def __post_init__(self):
        for f in fields(self):
            value, expected = getattr(self, f.name), f.metadata["expected"]
            off = value is None and f.type not in (int, float)
            number = type(value) is int or type(value) is float and f.type is not int
            sound = number and abs(value) < 1e30 and RANGES[expected](value)
            if f.type not in (str, str | None) and not off and not sound:
                kind = getattr(f.type, "__name__", f.type)  # int, or float | None
                raise ValueError(f"{f.name} is {value!r}, expected {kind}, {expected}")
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_coef is 0, expected more: kl_target multiplies it")

def seeded(seed, stage, step):
    """The generator of one step, on the CPU: its draws depend on (seed, stage, step) alone."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

def need(items, what):
    """Raise a ValueError that names `what` if `items` is empty or None."""
    if not items:
        raise ValueError(f"there is no {what}")

def draw(items, n, generator, what):
    """n items of a list in random order; each is used once before any is used twice."""
    need(items, what)
    order = []
    while len(order) < n:
        order += torch.randperm(len(items), generator=generator).tolist()
    return [items[i] for i in order[:n]]

def pad(rows, device):
    """Lists of ids -> right-padded tokens (B, S) and mask (B, S)."""
    rows = [torch.tensor(row) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)       # (B, S)
    lengths = torch.tensor([len(row) for row in rows])                     # (B,)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]                # (B, S)
    return tokens.to(device), mask.to(device)

def valid(x, mask):
    """x where the mask is not 0, 0 elsewhere, in float32 or better. ValueError if shapes differ."""
    if x.shape != mask.shape:  # they would broadcast
        raise ValueError(f"shape {tuple(x.shape)}, expected the mask's {tuple(mask.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.where(mask.bool(), 0)

def masked_mean(x, mask):
    """Σ mask · x / Σ mask, (B, T) -> (): the mean over valid entries, or 0. Needs `valid`."""
    return valid(x, mask).sum() / mask.bool().sum().clamp_min(1)

def batches(items, lengths, batch_size, epochs, seed, stage):
    """All batches of all epochs, in random order: a list of lists of items.

    The items of a batch have similar lengths, so that little of it is padding.
    """
    result = []
    for epoch in range(epochs):
        # Shuffle the items, cut them by length into batches, and shuffle the batches.
        generator = seeded(seed, stage, epoch)
        order = torch.randperm(len(items), generator=generator).tolist()
        order.sort(key=lambda i: lengths[i])
        starts = torch.arange(0, len(items), batch_size)
        for start in starts[torch.randperm(len(starts), generator=generator)]:
            result.append([items[i] for i in order[start:start + batch_size]])
    return result

def make_optimizer(model):
    """Adam, fused: one kernel for all weights. Every step sets its own learning rate."""
    # PPO's ε is 1e-5 as in baselines' ppo2: it shortens steps on tiny gradients.
    eps = 1e-5 if isinstance(model, ActorCritic) else 1e-8
    return torch.optim.Adam(model.parameters(), eps=eps, fused=True)

def begin(model, optimizer, last):
    """(optimizer, index of the first step) of a loop that starts anew, or goes on after `last`."""
    if last is not None and optimizer is None:
        raise ValueError("to go on after `last`, its optimizer is needed too")
    return optimizer or make_optimizer(model), last["step"] if last else 0

def set_learning_rate(optimizer, peak, step, steps, warmup):
    """Up to the peak in warmup + 1 equal steps, then linearly down, to reach 0 after `steps`."""
    up = (step + 1) / (warmup + 1)
    down = (steps - step) / max(steps - warmup, 1)
    for group in optimizer.param_groups:
        group["lr"] = peak * min(up, down)

def gradient_step(model, optimizer, max_grad_norm):
    """Clip the gradient, step, clear it; returns its norm. FloatingPointError if not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not math.isfinite(norm):
        optimizer.zero_grad()
        raise FloatingPointError(f"not finite: gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm

# ======== Language model: text becomes probabilities =============================================
def language_model_loss(model, documents):
    """−E log π(x_{i+1} | x_1 … x_i), the cross-entropy of the next token, in nats.

    model: GPT    documents: lists of ids, each with an end token before and after
    returns: () mean over all tokens but each document's first. Needs `pad`,
    `gather_log_probs`, `masked_mean`. Source: InstructGPT 2203.02155, eq. 2, its last term.
    """
    tokens, mask = pad(documents, model.wte.weight.device)                 # (B, S)
    logits = model(tokens[:, :-1])                                         # (B, S-1, V)
    log_probs = gather_log_probs(logits, tokens[:, 1:])                    # (B, S-1)
    return -masked_mean(log_probs, mask[:, 1:])

def train_language_model(model, documents, config, optimizer=None, last=None):
    """Stage 1: minimise −E log π(x_{i+1} | x_1 … x_i) over the corpus.

    A generator: nothing happens, not even an error, until it is iterated. It trains `model`, a GPT,
    and yields each step's metrics; to resume, pass the optimizer and, as `last`, a step's metrics.
    documents: lists of ids, each with an end token before and after; ValueError without any
    """
    need(documents, "document")
    optimizer, first = begin(model, optimizer, last)
    lengths = [len(document) for document in documents]
    todo = batches(documents, lengths, config.lm_batch_size, config.lm_epochs, config.seed,
                   "language_model")
    steps = len(todo)
    for step in range(first, steps):
        set_learning_rate(optimizer, config.lm_lr, step, steps, warmup=min(50, steps // 10))
        # The loss on one batch of documents, and its gradient.
        optimizer.zero_grad()
        loss = language_model_loss(model, todo[step])
        loss.backward()
        norm = gradient_step(model, optimizer, config.max_grad_norm)
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), "grad_norm": norm}

@torch.no_grad()
def corpus_loss(model, documents):
    """`language_model_loss` as a number, over any number of documents."""
    need(documents, "document")
    documents = sorted(documents, key=len)  # so that little of a batch is padding
    total = tokens = 0
    for i in range(0, len(documents), 16):
        batch = documents[i:i + 16]
        n = sum(map(len, batch)) - len(batch)  # all but each document's first
        total += n * float(language_model_loss(model, batch))
        tokens += n
    return total / tokens

# ======== Reward model: preferences become a number ==============================================
def reward_model_loss(chosen, rejected):
    """Bradley–Terry: −E log σ(r_w − r_l), the negative log-likelihood of the preferences.

    Of two responses to a prompt x, y_w was preferred to y_l; r_w = r(x, y_w), r_l = r(x, y_l).
    P(y_w ≻ y_l | x) = e^{r_w} / (e^{r_w} + e^{r_l}) = σ(r_w − r_l). The loss is positive, and large
    when the order is wrong. Only differences of rewards count: they are log-odds.
    chosen, rejected: (B,) scores r_w, r_l    returns: () mean over pairs
    Source: InstructGPT 2203.02155, eq. 1 with K = 2; Stiennon et al. 2009.01325, section 3.4.
    """
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    return -F.logsigmoid(chosen - rejected).mean()  # not log(sigmoid): that underflows to log 0

def ranking_loss(scores):
    """−1/C(K,2) E Σ_{i<j} log σ(r_i − r_j): a ranking of K responses as all of its C(K,2) pairs.

    Each response passes through the network once per epoch. As separate pairs, each would drive
    K−1 updates, and InstructGPT's model then overfitted.
    scores: (B, K) of the responses to B prompts, best first, K >= 2    returns: () mean over pairs
    Source: InstructGPT 2203.02155, eq. 1. Needs `reward_model_loss`.
    """
    K = scores.shape[1]
    better, worse = torch.triu_indices(K, K, offset=1, device=scores.device)  # 2 × (C(K,2),)
    return reward_model_loss(scores[:, better], scores[:, worse])

def score_rows(reward_model, rows):
    """r(x, y) (N,) of N texts, lists of ids, each read at its last token."""
    # Sixteen rows at a time, sorted by length, so that little is padding; then back in order.
    scores, device = [], reward_model.gpt.wte.weight.device
    order = torch.tensor([len(row) for row in rows]).argsort(stable=True)
    for part in order.split(16):
        tokens, mask = pad([rows[i] for i in part], device)                # (16, S)
        scores.append(reward_model(tokens, mask.sum(1)))
    return torch.cat(scores)[order.argsort()]                              # (N,)

def score_comparisons(reward_model, comparisons):
    """r(x, y) of all responses: for each K that occurs, (n, K) of its n comparisons."""
    groups = {}
    for prompt, responses in comparisons:
        rows = groups.setdefault(len(responses), [])
        rows += [prompt + response for response in responses]
    return [score_rows(reward_model, rows).view(-1, K) for K, rows in groups.items()]

def train_reward_model(reward_model, comparisons, config, optimizer=None, last=None):
    """Stage 2: minimise `ranking_loss`, averaged over prompts, whose K may differ.

    A generator, like `train_language_model`: it trains as it is iterated, and goes on after `last`.
    comparisons: (prompt, two or more responses, best first), lists of ids; each response ends with
    the end token, where it is scored. ValueError without comparisons.
    """
    need(comparisons, "comparison")
    optimizer, first = begin(reward_model, optimizer, last)
    lengths = [len(prompt) + max(map(len, responses)) for prompt, responses in comparisons]
    todo = batches(comparisons, lengths, config.rm_batch_size, config.rm_epochs, config.seed,
                   "reward_model")
    steps = len(todo)
    for step in range(first, steps):
        set_learning_rate(optimizer, config.rm_lr, step, steps, warmup=min(20, steps // 10))
        # One forward pass per response, and eq. 1: the mean over prompts, whatever their K.
        optimizer.zero_grad()
        groups = score_comparisons(reward_model, todo[step])
        loss = sum(len(scores) * ranking_loss(scores) for scores in groups) / len(todo[step])
        loss.backward()
        norm = gradient_step(reward_model, optimizer, config.max_grad_norm)
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), "grad_norm": norm,
               "accuracy": ranking_accuracy(groups)}

@torch.no_grad()
def ranking_accuracy(groups):
    """The share of pairs that the scores put in the right order, averaged over rankings.

    groups: a list of scores (n, K), each row best first. A tie counts half.
    """
    shares = []
    for scores in groups:
        K = scores.shape[1]
        better, worse = torch.triu_indices(K, K, offset=1)
        signs = torch.sign(scores[:, better] - scores[:, worse])           # (n, C(K,2))
        shares.append(signs.mean(1))
    return float(torch.cat(shares).mean()) / 2 + 0.5

@torch.no_grad()
def reward_model_accuracy(reward_model, comparisons):
    """`ranking_accuracy` of the reward model's scores of comparisons."""
    need(comparisons, "comparison")
    return ranking_accuracy(score_comparisons(reward_model, comparisons))

@torch.no_grad()
def reward_scores(reward_model, sampled):
    """r(x, y) (B,) of the responses of a Rollout, read at their end tokens.

    The reward model has only ever been read at end tokens, so a cut response gets one too: after
    it, or in place of its last token where the context has no more room.
    """
    eos, room = reward_model.gpt.config.eos_token, reward_model.gpt.config.block_size
    texts = []
    for prompt, response in zip(*sampled.lists()):
        text = prompt + response
        if text[-1] != eos:
            text = text[:room - 1] + [eos]
        texts.append(text)
    return score_rows(reward_model, texts)

@torch.no_grad()
def normalize_rewards(reward_model, reference, prompts, config):
    """Shift and scale the head: mean 0, std 1 on the reference's own responses to `prompts`.

    PPO's constants (β, value_clip) assume rewards of this scale. Where all samples score the same,
    but for rounding, there is no scale to take, and the head is only shifted.
    Source: Ziegler et al. 1909.08593, section 2.
    """
    generator, scores = seeded(config.seed, "normalize", 0), []
    prompts, eos = draw(prompts, 512, generator, "prompt"), reference.config.eos_token
    for i in range(0, 512, 128):
        sampled = rollout(reference, prompts[i:i + 128], config.max_new_tokens, eos,
                          config.temperature, generator)
        scores.append(reward_scores(reward_model, sampled))
    std, mean = torch.std_mean(torch.cat(scores), correction=0)
    # The head is linear, so it can hold both: r ← (r − mean) / std.
    head = reward_model.reward_head
    head.bias.sub_(mean)
    if std > 1e-4 * (1 + mean.abs()):
        head.weight.div_(std)
        head.bias.div_(std)
    else:
        print("note: all samples score the same, so rewards are shifted and not scaled")

# ======== Trajectories: sampling from the policy =================================================
@dataclass
class Rollout:
    """Trajectories τ ~ π_θ. The sampled ids are trained on: text is never encoded again."""
    tokens: torch.Tensor          # (B, S) prompt, response, padding; S >= P + T of each row
    prompt_lengths: torch.Tensor  # (B,) P of each row
    actions: torch.Tensor         # (B, T) a_t, 0 after the end
    mask: torch.Tensor            # (B, T) True up to and including the end
    log_probs: torch.Tensor       # (B, T) log π(a_t|s_t) under the distribution sampled from

    def take(self, rows):
        """The trajectories `rows`, trimmed to the longest of them."""
        lengths = self.mask[rows].sum(1)                                   # (B',)
        T = int(lengths.max())
        width = int((self.prompt_lengths[rows] + lengths).max())
        part = {}
        for name, x in vars(self).items():
            if torch.is_tensor(x):
                columns = width if name == "tokens" else T
                part[name] = x[rows, :columns] if x.dim() == 2 else x[rows]
        return replace(self, **part)

    def lists(self):
        """(prompts, responses) as lists of ids, without padding."""
        prompts = [row[:P].tolist() for row, P in zip(self.tokens, self.prompt_lengths)]
        return prompts, [row[m].tolist() for row, m in zip(self.actions, self.mask)]

def micro_batches(batch, size):
    """(rows, their trajectories), `size` at a time; sorted by length, so that little is padding."""
    for rows in batch.mask.sum(1).argsort(stable=True).split(size):
        yield rows, batch.take(rows)

def ends(sampled, eos_token):
    """(B,) whether the response ends by itself: the end token is among its valid actions."""
    return ((sampled.actions == eos_token) & sampled.mask.bool()).any(1)

def sample_tokens(log_probs, uniforms):
    """One token per row by inverse transform: the first whose cumulative probability exceeds u.

    log_probs: (B, V), uniforms: (B,) in [0, 1)    returns: (B,)
    """
    cdf = log_probs.exp().cumsum(-1)                                       # (B, V)
    u = uniforms[:, None] * cdf[:, -1:]  # rounding leaves the sum near 1, not at it
    first = torch.searchsorted(cdf, u, right=True).squeeze(1)              # (B,)
    return first.clamp_max(cdf.shape[1] - 1)

def check_rollout(gpt, prompts, max_new_tokens, temperature):
    """ValueError, before anything is sampled, for what `rollout` cannot do."""
    if not prompts or not all(map(len, prompts)):
        raise ValueError("there is no prompt, or an empty one: begin each with the end token")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    P, room = max(map(len, prompts)), gpt.config.block_size
    if max_new_tokens < 1 or P + max_new_tokens > room:
        raise ValueError(f"prompt {P} + max_new_tokens {max_new_tokens} do not fit {room} tokens")

@torch.no_grad()
def rollout(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None):
    """Sample a response to each prompt: a_t ~ π_θ(·|s_t) until the end token or T_max.

    p(τ) = Π_t π_θ(a_t|s_t): the prompt is given, and the "environment" merely appends a_t to s_t.
    policy: a GPT or ActorCritic, of which `hidden`, `new_cache`, `logits` (linear in the hidden
    state), `wte.weight` and `config.block_size` are used    generator: on the CPU
    prompts: B lists of ids, P >= 1 each    temperature: divides the logits
    returns: Rollout, T is the longest response's length. ValueError for what `check_rollout`
    refuses. Needs `Rollout`, `pad`, `sample_tokens`, `check_rollout`.
    """
    gpt = getattr(policy, "gpt", policy)
    check_rollout(gpt, prompts, max_new_tokens, temperature)
    device = gpt.wte.weight.device
    tokens, given = pad(prompts, device)                                   # (B, P), the longest
    (B, P), lengths = tokens.shape, given.sum(1)
    tokens = F.pad(tokens, (0, max_new_tokens))                            # (B, P+T_max)
    mask = given.new_zeros(B, max_new_tokens)                              # (B, T_max)
    wide = torch.promote_types(gpt.wte.weight.dtype, torch.float32)
    log_probs = torch.zeros_like(mask, dtype=wide)                         # (B, T_max)
    # Drawn up front: a row's draws do not depend on when others end.
    uniforms = torch.rand(max_new_tokens, B, generator=generator).to(device)
    rows = torch.arange(B, device=device)  # (B',) the trajectory of each remaining row
    alive = torch.ones_like(rows, dtype=torch.bool)  # (B',) whether it goes on
    # Read the prompts: the hidden state of each row's last token, that of s_0.
    cache = gpt.new_cache(B, P + max_new_tokens)
    positions = torch.arange(P, device=device).expand(B, P)
    x = gpt.hidden(tokens[:, :P], [c[:, :P] for c in cache], positions,
                   at=lengths[:, None] - 1)                                # (B, 1, C)
    for t in range(max_new_tokens):
        # Draw a_t. Each row writes it at its own position, token 0 after its end.
        logits = gpt.logits(x[:, 0] / temperature)                         # (B', V)
        log_p = F.log_softmax(logits, dim=-1, dtype=wide)                  # (B', V)
        action = sample_tokens(log_p, uniforms[t, rows]).where(alive, 0)  # (B',)
        log_probs[rows, t] = log_p.gather(1, action[:, None]).squeeze(1)
        tokens[rows, lengths[rows] + t] = action
        mask[rows, t] = alive
        # Ended rows leave once a fifth of them have ended: moving the cache costs time.
        alive = alive & (action != eos_token)
        left, T = int(alive.sum()), t + 1
        if left == 0 or T == max_new_tokens:
            break
        if left <= 0.8 * len(rows):
            cache = [c[alive] for c in cache]
            rows, action, alive = rows[alive], action[alive], alive[alive]
        # Append a_t to s_t, and read on.
        positions = (lengths[rows] + t)[:, None]                           # (B', 1)
        x = gpt.hidden(action[:, None], [c[:, :P + T] for c in cache], positions)
    actions = tokens.gather(1, lengths[:, None] + torch.arange(T, device=device))  # (B, T)
    return Rollout(tokens=tokens[:, :P + T], prompt_lengths=lengths, actions=actions,
                   mask=mask[:, :T], log_probs=log_probs.where(mask, 0)[:, :T])

# ======== Log-probabilities and rewards ==========================================================
def gather_log_probs(logits, actions):
    """log π(a_t|s_t) = logits[a_t] − log Σ_a exp(logits[a]), in float32 or better.

    logits: (B, T, V), actions: (B, T) of ids, in padding too    returns: (B, T) in nats, each <= 0
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = F.log_softmax(logits, dim=-1)                                  # (B, T, V)
    return log_p.gather(-1, actions[..., None]).squeeze(-1)

def forward_responses(model, batch, temperature):
    """One pass over prompts and responses, read at position P-1+t for each step t.

    model: GPT, whose values are 0, or ActorCritic    batch: Rollout    returns: log_probs (B, T) of
    the actions and values (B, T), 0 after the end; logits (B, T, V), divided by the temperature
    """
    gpt = getattr(model, "gpt", model)
    T = batch.mask.shape[1]
    at = batch.prompt_lengths[:, None] - 1 + torch.arange(T, device=batch.mask.device)  # (B, T)
    # After a row's end `at` may point beyond the tokens: what is read there is never used.
    at = at.clamp_max(batch.tokens.shape[1] - 1)
    x = gpt.hidden(batch.tokens, at=at)                                    # (B, T, C)
    logits = gpt.logits(x / temperature)                                   # (B, T, V)
    log_probs = gather_log_probs(logits, batch.actions).where(batch.mask, 0)  # (B, T)
    values = torch.zeros_like(log_probs)                                   # (B, T)
    if model is not gpt:
        values = model.value_head(x).squeeze(-1).to(log_probs)
    return log_probs, values.where(batch.mask, 0), logits

@torch.no_grad()
def read_responses(model, batch, config):
    """log_probs and values, 2 × (B, T), by micro-batches: all logits would fill the memory."""
    log_probs, values = batch.log_probs.new_zeros(2, *batch.mask.shape)    # 2 × (B, T)
    for rows, part in micro_batches(batch, config.micro_batch_size):
        T = part.mask.shape[1]
        log_probs[rows, :T], values[rows, :T], _ = forward_responses(
            model, part, config.temperature)
    return log_probs, values

def kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, kl_coef):
    """r_t = −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) + [t is the last step] · score.

    π_ref is the frozen language model that PPO starts from, β the price of one nat away from it.
    The score of the whole response is earned by its last action, even if it was cut at T_max;
    the KL penalty is paid where it arises. Σ_t r_t = score − β Σ_t (log π − log π_ref).
    scores: (B,)    log_probs, ref_log_probs, mask: (B, T)    returns: (B, T), 0 after the end
    log_probs are those of the policy that sampled. Assumes a mask whose rows are prefixes of ones
    (right padding): else the score is misplaced or lost. Gradients pass: call it under no_grad.
    ValueError for scores that are not (B,): they would broadcast. Needs `valid`.
    Source: InstructGPT 2203.02155, eq. 2 without its last term; Ziegler et al. 1909.08593, eq. 2.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)}, expected {tuple(mask.shape[:1])}")
    last = mask.bool().sum(1, keepdim=True) - 1                            # (B, 1)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last      # (B, T)
    rewards = valid(scores[:, None].expand_as(mask), is_last)              # (B, T)
    if kl_coef:  # 0 times an infinite log-ratio would not be 0
        rewards = rewards - kl_coef * (valid(log_probs, mask) - valid(ref_log_probs, mask))
    return rewards

# ======== Policy gradient, and its variance: rewards-to-go, baseline, advantage ==================
def policy_gradient_loss(log_probs, weights, mask):
    """A loss whose gradient estimates −∇J: −(1/B) Σ_b Σ_t log π(a_t|s_t) w_t over B trajectories.

    J(θ) = E_{τ~π_θ}[R(τ)], R(τ) = Σ_t γ^t r_t. Since ∇p = p ∇log p and log p(τ) is Σ_t log π_θ
    plus what does not depend on θ, ∇J = E_τ[Σ_t ∇log π_θ(a_t|s_t) w_t] with w_t = R(τ): REINFORCE.
    And since E_a[∇log π(a|s)] = ∇Σ_a π(a|s) = 0, we may subtract from w_t what a_t cannot change:
    rewards before t (`rewards_to_go`), any baseline b(s_t). With γ = 1 the mean gradient is
    the same; its variance falls with a good b, such as V(s_t). What is left estimates the advantage
    A(s_t, a_t): `gae`, unbiased for ∇J if λ = 1 or V is exact. The log π_θ inside r_t needs no
    gradient of its own: that would be E[∇log π] = 0 again. data/ladder.py trains with this loss.
    log_probs, weights, mask: (B, T)    returns: (); weights are constants, detached here
    Source: REINFORCE, Williams 1992; GAE 1506.02438, eq. 1. Needs `valid`.
    """
    terms = valid(log_probs, mask) * valid(weights.detach(), mask)         # (B, T)
    return -terms.sum() / mask.shape[0]

def rewards_to_go(rewards, mask, gamma=1.0):
    """R_t = Σ_{t' >= t} γ^{t'−t} r_{t'}: an action cannot change what was earned before it.

    rewards, mask: (B, T)    returns: (B, T), 0 after the end. Assumes that each row of the mask is
    a prefix of ones (right padding). Needs `valid`.
    """
    result, to_go = [], 0
    for r in reversed(valid(rewards, mask).unbind(1)):                     # T × (B,)
        to_go = r + gamma * to_go
        result.append(to_go)
    return torch.stack(result[::-1], dim=1)

# ======== Generalised advantage estimation =======================================================
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t, an estimate of Q(s_t, a_t) − V(s_t): how much better a_t is than π's average.

    V(s_t) = E[Σ_{t' >= t} γ^{t'−t} r_{t'}], the value, is fitted by `value_loss`. The TD errors
    δ_t = r_t + γ V(s_{t+1}) − V(s_t) telescope: Σ_{l<k} γ^l δ_{t+l} is what k steps earned, plus
    γ^k V(s_{t+k}), minus V(s_t). Averaged over k = 1, 2, … with weights (1−λ) λ^{k−1} (all k beyond
    the end give the same), this is
        A_t = Σ_l (γλ)^l δ_{t+l},    backwards from the end:    A_t = δ_t + γλ A_{t+1}
    the rewards-to-go of δ with discount γλ.
    V after the last action is 0, even if the response was cut: its score is paid there. λ = 1
    gives rewards-to-go minus V (no bias in ∇J, most variance), λ = 0 is δ_t (trusts V most).
    By hand, γ = 1, λ = 1/2, r = (0, 0, 1), V = (0.2, 0.4, 0.8):
        δ = (0 + 0.4 − 0.2, 0 + 0.8 − 0.4, 1 − 0.8) = (0.2, 0.4, 0.2)
        A = (0.2 + 0.25, 0.4 + 0.1, 0.2) = (0.45, 0.5, 0.2)
    rewards, values, mask: (B, T)    returns: (B, T), 0 after the end; A + V is the value target.
    Assumes that each row of the mask is a prefix of ones (right padding). Gradients pass: call it
    under no_grad. Needs `valid`, `rewards_to_go`.
    Source: GAE 1506.02438, eq. 16; PPO 1707.06347, eqs. 11 (its exponent should be T−t−1) and 12.
    """
    rewards, values = valid(rewards, mask), valid(values, mask)            # 2 × (B, T)
    next_values = F.pad(values[:, 1:], (0, 1))                             # (B, T) V(s_{t+1})
    deltas = rewards + gamma * next_values - values                        # (B, T)
    return rewards_to_go(deltas, mask, gamma * lam)

def whiten(x, mask):
    """(x − mean) / √(variance + 1e-8) over valid entries, 0 elsewhere.

    Advantages then have one scale, whatever the reward's. A constant whitens to exactly 0.
    x, mask: (B, T)    returns: (B, T). Needs `valid`, `masked_mean`.
    Source: lm-human-preferences, utils/core.py, per minibatch; here over the whole batch.
    """
    x = valid(x, mask)
    x = x - x.where(mask.bool(), -torch.inf).amax()  # a constant is now exactly 0
    centred = valid(x - masked_mean(x, mask), mask)
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)

# ======== Importance sampling, and PPO's losses ==================================================
def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """−E min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t) with ρ_t = π(a_t|s_t) / π_old(a_t|s_t).

    Importance sampling: E_{a~π}[f(a)] = E_{a~π_old}[ρ f(a)], so samples of π_old serve a few steps
    of π. At π = π_old, ∇ρ = ∇log π: the policy gradient, as a mean over tokens. ρ_t, the paper's
    r_t(θ), is exp(log π − log π_old), not a ratio of logs. The minimum makes −loss a lower
    bound of E[ρ A]: no gain from moving ρ beyond 1 ± ε in the good direction, full cost in the bad.
    ρ_t corrects which action was taken, not how often s_t is reached: exact weights would be
    products of ratios along the trajectory.
    log_probs, old_log_probs, advantages, mask: (B, T)    clip: ε    returns: () mean over valid
    tokens; old_log_probs and advantages are constants, detached here
    Source: PPO 1707.06347, eq. 7. Needs `valid`, `masked_mean`.
    """
    log_probs, old_log_probs = valid(log_probs, mask), valid(old_log_probs.detach(), mask)
    ratio = (log_probs - old_log_probs).exp()                              # (B, T)
    advantages = valid(advantages.detach(), mask)                          # (B, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)                              # (B, T)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)

def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ E max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), pessimistic like the policy's.

    values, old_values, returns, mask: (B, T)    clip: ε    returns: () mean over valid tokens;
    old_values and returns, R = unwhitened A + V_old, are constants, detached here
    Source: baselines, ppo2, which clips V with the policy's ε; PPO 1707.06347, eq. 9 has (V − R)²,
    without ½ and clip. Needs `valid`, `masked_mean`.
    """
    values, returns = valid(values, mask), valid(returns.detach(), mask)   # 2 × (B, T)
    old_values = valid(old_values.detach(), mask)                          # (B, T)
    clipped = values.clamp(old_values - clip, old_values + clip)           # (B, T)
    worse = torch.max((values - returns)**2, (clipped - returns)**2)       # (B, T)
    return 0.5 * masked_mean(worse, mask)

def entropy(logits, mask):
    """E H[π(·|s_t)] = −E Σ_a π(a|s_t) log π(a|s_t), in nats.

    logits: (B, T, V), mask: (B, T)    returns: () mean over valid steps, log V if π is uniform
    Source: PPO 1707.06347, eq. 9. Needs `valid`, `masked_mean`.
    """
    mask_of_logits = mask[..., None].expand_as(logits)                     # (B, T, V)
    log_p = F.log_softmax(valid(logits, mask_of_logits), dim=-1)           # (B, T, V)
    return masked_mean(-(log_p.exp() * log_p).sum(-1), mask)

# ======== Reward hacking and the KL penalty ======================================================
# r(x, y) is only a fit. Far from the texts that it was trained on, some bad texts score high,
# and an optimiser finds them: reward hacking. Maximising E[r] − β KL(π‖π_ref) keeps π near π_ref;
# the penalty is paid in `kl_penalized_rewards`.
def kl_estimates(log_probs, ref_log_probs, mask):
    """Two estimates of KL(π‖π_ref) for each sequence, from samples of π, in nats.

    With Δ_t = log π_ref(a_t|s_t) − log π(a_t|s_t):  k1 = Σ −Δ_t,  k3 = Σ (exp(Δ_t) − 1 − Δ_t).
    Both are unbiased; k3 is never negative and varies less near π = π_ref. A common mistake is Δ
    reversed: that estimates χ² − KL per step, χ² = Σ_a π²/π_ref − 1, far too high away from π_ref.
    log_probs, ref_log_probs, mask: (B, T)    returns: (k1 (B,), k3 (B,))
    Source: Schulman 2020, "Approximating KL divergence". Needs `valid`.
    """
    delta = valid(ref_log_probs, mask) - valid(log_probs, mask)            # (B, T)
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

    log_probs are π_old's, recomputed the way the update does: the ratio then starts at exactly 1.
    """
    ref_log_probs: torch.Tensor  # (B, T) log π_ref(a_t|s_t)
    values: torch.Tensor         # (B, T) V_old(s_t)
    scores: torch.Tensor         # (B,) of the whole responses; missing_eos_score for a cut one
    rewards: torch.Tensor        # (B, T) r_t
    advantages: torch.Tensor     # (B, T) A_t, not whitened
    returns: torch.Tensor        # (B, T) A_t + V_old(s_t), the value's target
    rollout_seconds: float       # time that sampling took

@torch.no_grad()
def collect(policy, reference, reward_fn, prompts, config, generator=None):
    """One batch of experience from π_θ, which from now on is π_old.

    policy: ActorCritic    reference: a frozen GPT    prompts: B lists of ids    returns: Experience
    reward_fn: a callable Rollout -> scores (B,), such as partial(reward_scores, reward_model);
    ValueError for another shape. A response without an end token scores config.missing_eos_score
    instead (None: reward_fn's own).
    """
    # Sample trajectories.
    start, eos = time.perf_counter(), policy.gpt.config.eos_token
    sampled = rollout(policy, prompts, config.max_new_tokens, eos, config.temperature, generator)
    seconds, mask = time.perf_counter() - start, sampled.mask
    # Score the whole responses.
    scores = torch.as_tensor(reward_fn(sampled)).to(sampled.log_probs)     # (B,)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"reward_fn gave {tuple(scores.shape)}, expected ({len(mask)},)")
    if config.missing_eos_score is not None:  # Huang et al. 2403.17031, detail 23
        scores = scores.where(ends(sampled, eos), config.missing_eos_score)
    # Turn them into rewards per token, and those into the advantages of the actions.
    log_probs, values = read_responses(policy, sampled, config)            # 2 × (B, T)
    ref_log_probs, _ = read_responses(reference, sampled, config)          # (B, T)
    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_coef)
    advantages = gae(rewards, values, mask, config.gamma, config.lam)      # (B, T)
    sampled = replace(sampled, log_probs=log_probs)
    return Experience(**vars(sampled), ref_log_probs=ref_log_probs, values=values, scores=scores,
                      rewards=rewards, advantages=advantages, returns=advantages + values,
                      rollout_seconds=seconds)

def ppo_loss(policy, batch, config):
    """L = −L_clip + c1 L_VF − c2 H on a micro-batch (PPO 1707.06347, eq. 9 with its sign turned).

    returns: (loss (), {metric: ()})
    """
    log_probs, values, logits = forward_responses(policy, batch, config.temperature)
    mask, old_log_probs = batch.mask, batch.log_probs
    policy_part = ppo_policy_loss(log_probs, old_log_probs, batch.advantages, mask, config.clip)
    value_part = value_loss(values, batch.values, batch.returns, mask, config.value_clip)
    loss = policy_part + config.value_coef * value_part
    if config.entropy_coef:  # it costs a pass over all logits
        loss = loss - config.entropy_coef * entropy(logits, mask)
    # How far the policy has moved since the batch was collected.
    log_ratio = log_probs.detach() - old_log_probs                         # (B, T) log ρ
    change = log_ratio.expm1()                                             # (B, T) ρ − 1
    metrics = {"loss": loss, "policy_loss": policy_part, "value_loss": value_part,
               "clip_fraction": masked_mean(change.abs() > config.clip, mask),
               "approx_kl": masked_mean(change - log_ratio, mask)}  # k3 of KL(π_old‖π)
    return loss, metrics

def minibatch_gradient(policy, minibatch, config):
    """Add the gradient of `ppo_loss` on a minibatch to .grad; returns its metrics as numbers.

    It goes through the network in micro-batches. Each counts by its share of the tokens, so that
    their gradients add up to that of the minibatch's mean.
    """
    total = {}
    for _, batch in micro_batches(minibatch, config.micro_batch_size):
        share = batch.mask.sum() / minibatch.mask.sum()
        loss, watched = ppo_loss(policy, batch, config)
        (share * loss).backward()
        for name, value in watched.items():
            total[name] = total.get(name, 0) + share * value.detach()
    return {name: float(value) for name, value in total.items()}

def ppo_update(policy, optimizer, experience, config, generator=None, documents=None):
    """ppo_epochs passes of minibatch steps on a batch of experience; returns the update's metrics.

    PPO-ptx: with ptx_coef, each step adds ptx_coef times the gradient of −E log π(x), a mean per
    token, on as many `documents` as it has trajectories, at temperature 1 (InstructGPT, eq. 2;
    its §C.4 has eight times as many, and the coefficient 27.8).
    FloatingPointError for a gradient that is not finite.
    """
    # Advantages are whitened over the whole batch; the returns keep their own scale.
    whitened = whiten(experience.advantages, experience.mask)              # (B, T)
    experience = replace(experience, advantages=whitened)
    history, tokens, stop = [], 0, False
    for epoch in range(config.ppo_epochs):
        order = torch.randperm(len(whitened), generator=generator)
        for rows in order.split(config.minibatch_size):
            minibatch = experience.take(rows.to(whitened.device))
            tokens += int(minibatch.mask.sum())
            # The gradient of PPO's loss, a mean over the minibatch's tokens.
            optimizer.zero_grad()
            metrics = minibatch_gradient(policy, minibatch, config)
            # Too far from π_old? Then the update ends, and leaves no gradient behind.
            stop = metrics["approx_kl"] > (config.early_stop_kl or math.inf)
            if stop:
                optimizer.zero_grad()
                break
            # PPO-ptx: the gradient of the language model's loss is added to it.
            if config.ptx_coef:
                sample = draw(documents, len(rows), generator, "document, which PPO-ptx needs")
                ptx_loss = language_model_loss(policy.gpt, sample)
                (config.ptx_coef * ptx_loss).backward()
                metrics["ptx_loss"] = ptx_loss.item()
            # One step of Adam.
            metrics["grad_norm"] = gradient_step(policy, optimizer, config.max_grad_norm)
            history.append(metrics)
        if stop:
            break
    # The mean of each metric over the steps.
    update = {"updates": len(history), "early_stop": stop, "tokens": tokens}
    for name in history[0] if history else ():
        update[name] = sum(m[name] for m in history) / len(history)
    return update

def train_ppo(policy, reference, reward_fn, prompts, config, optimizer=None, last=None,
              documents=None):
    """Stage 3: maximise E[r(x, y)] − β KL(π‖π_ref) by PPO: collect, update, repeat.

    A generator, like `train_language_model`: it trains `policy`, an ActorCritic, as it is
    iterated, yields each iteration's metrics, and goes on after `last`.
    reference: the policy's frozen start, a GPT    prompts, documents (for PPO-ptx): lists of ids
    reward_fn(Rollout) -> scores (B,), but see `collect` for responses that were cut
    """
    optimizer, first = begin(policy, optimizer, last)
    steps = config.ppo_iterations
    for step in range(first, steps):
        generator = seeded(config.seed, "ppo", step)
        # A warm-up: Adam's first steps are large, and could damage the language.
        set_learning_rate(optimizer, config.ppo_lr, step, steps, warmup=steps // 7)
        # β is fixed, or follows from the KL of the step before.
        if last and config.kl_target is not None:
            kl_coef = adapt_kl_coef(last["kl_coef"], last["kl"], config.kl_target)
            config = replace(config, kl_coef=kl_coef)
        # Collect experience with the policy.
        batch = draw(prompts, config.ppo_batch_size, generator, "prompt")
        experience = collect(policy, reference, reward_fn, batch, config, generator)
        # Update the policy on it.
        start = time.perf_counter()
        update = ppo_update(policy, optimizer, experience, config, generator, documents)
        update["update_tokens_per_s"] = update.pop("tokens") / (time.perf_counter() - start)
        last = {"step": step + 1, "steps": steps, "kl_coef": config.kl_coef,
                **experience_metrics(experience, policy.gpt.config.eos_token), **update}
        yield last

def experience_metrics(e, eos_token):
    """What to watch: reward, KL (k1, k3), length, share ended, entropy, explained variance."""
    kl, kl_k3 = kl_estimates(e.log_probs, e.ref_log_probs, e.mask)         # 2 × (B,)
    length = e.mask.sum(1)                                                 # (B,)
    # 1 − Var(R − V) / Var(R): 1 if V predicts every return, 0 if it is as good as a constant.
    total = e.returns[e.mask].var(correction=0)
    error = (e.returns - e.values)[e.mask].var(correction=0)
    metrics = {"reward": e.scores.mean(),
               "kl": kl.mean(),
               "kl_k3": kl_k3.mean(),
               "length": length.float().mean(),
               "ended": ends(e, eos_token).float().mean(),
               "entropy": -masked_mean(e.log_probs, e.mask),  # H = −E log π, from the samples
               "explained_variance": 1 - error / total.clamp_min(1e-8),
               "rollout_tokens_per_s": length.sum() / e.rollout_seconds}
    return {name: float(x) for name, x in metrics.items()}

# ======== Evaluation =============================================================================
def wilson(share, n, z=1.96):
    """Wilson's 95% interval (low, high) of a share of n."""
    d = 1 + z * z / n
    middle = share + z * z / (2 * n)
    variance = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance)
    return (middle - half) / d, (middle + half) / d

@torch.no_grad()
def evaluate(policy, reference, reward_fn, prompts, config, true_reward_fn=None):
    """The trained policy against the reference on the same held-out prompts.

    reward_fn, true_reward_fn: Rollout -> (B,); the true one judges where it is known. A cut
    response keeps its score here.
    returns: (record of figures, list of samples, one per prompt, with token lists and scores)
    """
    need(prompts, "prompt")
    prompts, eos = prompts[:config.eval_prompts], reference.config.eos_token
    texts, figures = {"prompt": prompts, "lm": [], "ppo": []}, {"kl": []}
    for side, model in (("lm", reference), ("ppo", policy)):
        for i in range(0, len(prompts), 128):
            part = prompts[i:i + 128]
            generator = seeded(config.seed, f"evaluate {side}", i)
            r = rollout(model, part, config.max_new_tokens, eos, config.temperature, generator)
            texts[side] += r.lists()[1]
            # Score the responses.
            columns = {"reward": reward_fn(r), "length": r.mask.sum(1), "ended": ends(r, eos)}
            if true_reward_fn:
                columns["true_reward"] = true_reward_fn(r)
            for name, values in columns.items():
                figures.setdefault(f"{name}_{side}", []).extend(map(float, values))
            # Measure how far the policy's responses are from the reference.
            if side == "ppo":
                ref_log_probs, _ = read_responses(reference, r, config)
                kl, _ = kl_estimates(r.log_probs, ref_log_probs, r.mask)
                figures["kl"] += kl.tolist()
    record = evaluation_record(figures, "true_reward" if true_reward_fn else "reward")
    record["distinct_ppo"] = len(set(map(tuple, texts["ppo"]))) / len(prompts)
    # One sample per prompt, from the columns.
    columns = texts | figures
    samples = [dict(zip(columns, row)) for row in zip(*columns.values())]
    return record, samples

def evaluation_record(figures, by):
    """Means of the figures, the win rate by the reward `by`, and how the two rewards correlate."""
    columns = {name: torch.tensor(x, dtype=torch.float64) for name, x in figures.items()}
    record = {name: float(x.mean()) for name, x in columns.items()}
    # How often the policy's response is the better one: a tie is half a win.
    margin = columns[f"{by}_ppo"] - columns[f"{by}_lm"]                    # (prompts,)
    wins = float(torch.sign(margin).mean()) / 2 + 0.5
    record["win_rate"] = wins
    record["win_rate_low"], record["win_rate_high"] = wilson(wins, len(margin))
    # Where the true reward is known: how well the learned one follows it.
    if by == "true_reward":
        both = torch.stack([columns["true_reward_lm"], columns["reward_lm"]])
        std = both.std(1, correction=0)                                    # (2,)
        record["true_reward_std_lm"] = float(std[0])
        if std.min() > 1e-6:  # equal numbers have no correlation
            record["reward_correlation_lm"] = float(torch.corrcoef(both)[0, 1])
    return record

# ======== The program: language model, reward model, PPO, evaluation =============================
FILES = {"language_model": "lm.pt", "reward_model": "reward.pt", "ppo": "policy.pt"}
SAVE_EVERY = 10.0  # seconds; a kill costs at most these and one step

def stage_settings(stage, config, data):
    """All that a stage's weights depend on: its settings, those of earlier stages, and the data."""
    stages = STAGES[1:STAGES.index(stage) + 1]  # not "run": where to read and write
    settings = {f.name: getattr(config, f.name) for f in fields(config)
                if f.metadata["stage"] in stages}
    return settings | {"data": data.fingerprint, "stage": stage, "format of checkpoints": 2}

def read_checkpoint(path):
    """The dictionary that `save_stage` wrote; ValueError for another file."""
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or not {"settings", "weights"} <= checkpoint.keys():
        raise ValueError(f"{path}: not a checkpoint of this program")
    return checkpoint

def find_checkpoints(config, data, fresh):
    """{stage: its checkpoint} of the stages before `fresh` that have one.

    ValueError for one that was made with other settings or data: nothing is overwritten unasked.
    """
    found = {}
    for i, (stage, name) in enumerate(FILES.items()):
        path = Path(config.out_dir) / name
        if stage == fresh:
            break
        if path.exists():
            found[stage] = read_checkpoint(path)
            ours, theirs = stage_settings(stage, config, data), found[stage]["settings"]
            changed = [f"{key} {theirs.get(key)}, now {ours[key]}" for key in ours
                       if theirs.get(key) != ours[key]]
            if len(found) <= i:
                changed = ["an earlier file, which is missing now"]
            if changed:
                raise ValueError(f"{path} was made with {'; '.join(changed)}: --fresh {stage} "
                                 "starts over from there, another --out_dir keeps what there is")
    return found

def save_stage(stage, state, model, optimizer, config, data):
    """Write the checkpoint of a stage: `state`, and all that is needed to use it alone."""
    # Delete later stages' files first: a kill at any moment leaves a consistent set.
    out, stages = Path(config.out_dir), list(FILES)
    for later in reversed(stages[stages.index(stage) + 1:]):
        (out / FILES[later]).unlink(missing_ok=True)
    save_file(out / FILES[stage], state | {
        "stage": stage,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": vars(config) | {"data_dir": str(Path(config.data_dir).resolve())},
        "sizes": vars(getattr(model, "gpt", model).config),
        "settings": stage_settings(stage, config, data),
        "tokenizer": dataset.encoding_state(data.encoding)})

def run_stage(stage, model, train, checkpoint, log, config, data):
    """Load a stage that is done, or train it from its checkpoint on; returns the seconds it took.

    train(optimizer, last) is the stage's generator. `log` gathers the rows of log.jsonl.
    """
    out, optimizer = Path(config.out_dir), make_optimizer(model)
    # Start from the checkpoint, if there is one.
    state = checkpoint or {"last": None, "done": False, "seconds": 0.0, "rows": []}
    if checkpoint:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{stage}: {'done' if state['done'] else 'goes on'} ({out / FILES[stage]})")
    # The checkpoints hold the log: steps logged after the last save are redone.
    dataset.write_records(out / "log.jsonl", log + state["rows"])
    start, saved = time.perf_counter() - state["seconds"], -math.inf
    if not state["done"]:
        for metrics in train(optimizer, state["last"]):
            # Log the step.
            state["last"], state["seconds"] = metrics, time.perf_counter() - start
            step, steps = metrics["step"], metrics["steps"]
            if stage == "ppo" or step % 10 == 0 or step == steps:
                state["rows"].append({"stage": stage, "seconds": state["seconds"], **metrics})
                dataset.write_records(out / "log.jsonl", state["rows"][-1:], "a")
            show.progress(stage, state["seconds"], metrics)
            # Save after the first step, and every ten seconds.
            if time.perf_counter() - saved > SAVE_EVERY:
                save_stage(stage, state, model, optimizer, config, data)
                saved = time.perf_counter()
        # The seconds include work after the last step.
        state["done"], state["seconds"] = True, time.perf_counter() - start
        save_stage(stage, state, model, optimizer, config, data)
    log += state["rows"]
    return state["seconds"]

def load(path, device="cpu"):
    """(model, Config of its run, tokenizer) of lm.pt, reward.pt or policy.pt, in any folder."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; run python rlhf.py first")
    checkpoint = read_checkpoint(path)
    heads = {"language_model": lambda gpt: gpt, "reward_model": RewardModel, "ppo": ActorCritic}
    model = heads[checkpoint["stage"]](GPT(GPTConfig(**checkpoint["sizes"])))
    model.load_state_dict(checkpoint["weights"])
    encoding = dataset.make_encoding(**checkpoint["tokenizer"])
    return model.to(device), Config(**checkpoint["config"]), encoding

def pick_device(name):
    """torch.device of a name; auto takes the accelerator that there is, or else the CPU."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: {error}") from None

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
    if lm:  # other weights to start from are like other data
        weights = torch.cat([weight.flatten() for weight in lm.state_dict().values()])
        digest = hashlib.sha256(weights.numpy()).hexdigest()
        data.fingerprint += digest[:16]
    else:
        lm = GPT(GPTConfig(data.eos_token + 1, config.block_size, config.n_layer, config.n_head,
                           config.n_embd), seeded(config.seed, "language_model init", 0))
    lm.config.eos_token = data.eos_token
    return lm, data, config

def true_reward_of(data):
    """A function (prompts, responses) -> true rewards (B,), or None if the data are not shipped."""
    if not data.shipped:
        return None
    from data.reviews.annotator import true_reward

    def judge(prompts, responses):
        scores = [true_reward(data.text(x), data.text(y)) for x, y in zip(prompts, responses)]
        return torch.tensor(scores)
    return judge

def run(config, fresh=None):
    """Run every stage; `fresh` and those after it start over. Returns the evaluation record."""
    # Whatever can be refused is refused here, before anything is written.
    device, out = pick_device(config.device), Path(config.out_dir)
    lm, data, config = starting_point(config)
    found, log, seconds = find_checkpoints(config, data, fresh), [], {}
    out.mkdir(parents=True, exist_ok=True)
    show.describe(data, device)

    def stage(name, model, train):
        seconds[name] = run_stage(name, model, train, found.get(name), log, config, data)

    # 1. The language model learns the corpus; from here on it is the frozen reference.
    train, held = data.train, data.held_out
    stage("language_model", lm.to(device),
          partial(train_language_model, lm, train.documents, config))
    lm.requires_grad_(False)

    # 2. The reward model learns the preferences; then its scores are normalised.
    reward_model = RewardModel(lm, seeded(config.seed, "reward_model init", 0)).to(device)

    def reward_stage(*state):
        yield from train_reward_model(reward_model, train.comparisons, config, *state)
        normalize_rewards(reward_model, lm, train.prompts, config)
    stage("reward_model", reward_model, reward_stage)

    # 3. PPO: the policy starts as the language model and learns from the reward model.
    policy, score, watched = ActorCritic(lm), partial(reward_scores, reward_model), {}
    true_reward = true_reward_of(data)
    judge = true_reward and (lambda sampled: true_reward(*sampled.lists()))

    def reward_fn(sampled):
        if judge:  # for the log alone: training never sees it
            watched["true_reward"] = float(judge(sampled).mean())
        return score(sampled)

    def ppo_stage(*state):
        for metrics in train_ppo(policy, lm, reward_fn, train.prompts, config, *state,
                                 train.documents):
            yield metrics | watched
    stage("ppo", policy, ppo_stage)

    # 4. Evaluation on held-out prompts, comparisons and documents.
    start = time.perf_counter()
    record, samples = evaluate(policy, lm, score, held.prompts, config, judge)
    record["language_model_loss"] = corpus_loss(lm, held.documents)
    record["reward_model_accuracy"] = reward_model_accuracy(reward_model, held.comparisons)
    if judge:  # labels are noisy: the true reward itself does not predict all of them
        rankings = [true_reward([x] * len(ys), ys)[None] for x, ys in held.comparisons]
        record["reward_model_ceiling"] = ranking_accuracy(rankings)  # each (1, K)
    seconds["evaluation"] = time.perf_counter() - start
    record |= {f"seconds_{name}": s for name, s in seconds.items()}
    record["seconds"] = sum(seconds.values())
    dataset.write_records(out / "log.jsonl", [{"stage": "evaluation", "step": 1, **record}], "a")
    samples = [sample | {key: data.text(sample[key]) for key in ("prompt", "lm", "ppo")}
               for sample in samples]
    dataset.write_records(out / "samples.jsonl", samples)
    show.summary(record, samples, out)
    return record

def main():
    """`python rlhf.py`: read the flags, then run."""
    parser = argparse.ArgumentParser(
        "rlhf.py", "rlhf.py [--SETTING VALUE ...]", "RLHF with PPO, stage by stage.",
        allow_abbrev=False)
    parser.add_argument("--fresh", nargs="?", const="language_model", choices=tuple(FILES),
                        metavar="STAGE", help="start over from STAGE on: language_model (the "
                        "default), reward_model or ppo; without it, checkpoints are used")
    settings = show.parse(parser, Config)
    fresh = settings.pop("fresh")
    run(Config(**settings), fresh)

if __name__ == "__main__":
    show.program("rlhf.py", main)
