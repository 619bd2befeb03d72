"""Reinforcement learning from human feedback, from scratch, in the order of its derivation.

    language model (model.py) → reward model → trajectories → policy gradient → rewards-to-go,
    baseline, advantage → GAE → importance sampling → PPO → KL penalty

Each section holds the formulas; the loops that use them come after, in the same order.

One index convention holds everywhere. A prompt has P tokens, a response T. With state
s_t = prompt ⊕ y_0 … y_{t-1} and action a_t = y_t, everything with index t is read from the hidden
state at position P-1+t, the last token of s_t: the logits that give log π(a_t|s_t), and V(s_t).
So `log_probs`, `values`, `rewards`, `advantages` and `mask` are all (B, T), column t is time step
t, and nothing is shifted by one. Sequences are right-padded; mask[b, t] is 1 up to and including
the token that ends the response, 0 after it, and nothing behind a 0 can change any result.

Papers: PPO 1707.06347; GAE 1506.02438; InstructGPT 2203.02155; Stiennon et al. 2009.01325;
Ziegler et al. 1909.08593. Shapes: B rows, S tokens of a row, T steps, V tokens in the vocabulary
(V(s) is the value), N entries where a mask is True.
"""
import _thread
import argparse
import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch
import torch.nn.functional as F

from data import dataset
from model import GPT, ActorCritic, GPTConfig, RewardModel, load_checkpoint, save_checkpoint

# =================================================================================================
# Configuration, random numbers, precision, padding
# =================================================================================================


@dataclass
class Config:
    """Every setting of a run. Each is a flag of the command line, with its comment as the help."""
    # -- general
    seed: int = 0                      # every draw comes from a generator seeded by this
    device: str = "auto"               # cpu, cuda, mps, or auto: the best one there is
    out_dir: str = "out"               # the run writes here and nowhere else
    data_dir: str = str(dataset.SHIPPED)  # preferences.jsonl and more; see data/README.md
    max_grad_norm: float = 1.0         # longer gradients are scaled down to this, in every stage
    # -- language model
    init: str | None = None            # start from weights: gpt2 or a directory, with their sizes
    block_size: int = 256              # context: most tokens of prompt and response together
    n_layer: int = 2                   # transformer blocks
    n_head: int = 4                    # attention heads
    n_embd: int = 128                  # width
    lm_epochs: int = 2                 # passes over the corpus
    lm_batch_size: int = 16            # documents a step
    lm_lr: float = 4e-3                # peak learning rate
    # -- reward model
    rm_epochs: int = 1                 # passes over the pairs
    rm_batch_size: int = 16            # pairs a step
    rm_lr: float = 1e-3                # peak learning rate
    # -- rollout
    max_new_tokens: int = 64           # T_max: a response that is longer is cut
    temperature: float = 0.8           # of sampling, and of every log-prob in PPO
    # -- ppo
    ppo_iterations: int = 60           # times collect + update
    ppo_batch_size: int = 128          # trajectories an iteration
    ppo_epochs: int = 2                # passes over each batch of experience
    minibatch_size: int = 32           # trajectories a gradient step
    micro_batch_size: int = 32         # trajectories a forward pass; their gradients accumulate
    ppo_lr: float = 1e-3               # peak learning rate
    kl_coef: float = 0.05              # beta: the price of a nat of KL to the language model
    kl_target: float | None = None     # nats a response: adapts kl_coef to hold it; none: fixed
    gamma: float = 1.0                 # discount
    lam: float = 0.95                  # lambda of GAE
    clip: float = 0.2                  # epsilon of PPO's ratio
    value_clip: float = 0.2            # epsilon of the value's change
    value_coef: float = 0.1            # c1, weight of the value loss
    entropy_coef: float = 0.0          # c2, weight of the entropy bonus
    early_stop_kl: float | None = 0.1  # nats a token from the old policy that end an update
    missing_eos_score: float | None = -3.0  # score of a cut response; none: reward_fn's own
    # -- evaluation
    eval_prompts: int = 512            # held-out prompts, at most

    def __post_init__(self):
        check(self)


def seeded(seed, stage, step):
    """The generator of one step: what is random in it depends on (seed, stage, step) alone."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def autocast(module):
    """bf16 where it helps: big models on CUDA. Log-softmax and losses stay in float32."""
    weight = next(module.parameters())
    big = sum(p.numel() for p in module.parameters()) > 50e6  # small ones wait for launches
    return torch.autocast(weight.device.type, torch.bfloat16, weight.is_cuda and big)


def pad(rows, device):
    """Lists of ids -> right-padded tokens (B, S) and mask (B, S)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]             # (B, S)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens.to(device), mask.to(device)


# =================================================================================================
# Reward model: preferences become a number
# =================================================================================================


def reward_model_loss(chosen, rejected):
    """Bradley–Terry: −E log σ(r_w − r_l), the negative log-likelihood of the preferences.

    Of two responses to a prompt x, y_w was preferred to y_l; r_w = r(x, y_w), r_l = r(x, y_l).
    P(y_w ≻ y_l | x) = e^{r_w} / (e^{r_w} + e^{r_l}) = σ(r_w − r_l). The loss is positive, and large
    when the order is wrong. Differences of rewards are log-odds: only they count.

    chosen, rejected: (B,) scores r_w, r_l    returns: () mean over pairs
    Source: InstructGPT 2203.02155, eq. 1; Stiennon et al. 2009.01325, section 3.4.
    """
    return -F.logsigmoid(chosen - rejected).mean()  # sigmoid underflows to 0, its log is -inf


# =================================================================================================
# Trajectories: sampling from the policy
# =================================================================================================


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
        part = {k: v[rows] for k, v in vars(self).items() if torch.is_tensor(v)}
        lengths = part["mask"].sum(1)
        T, used = int(lengths.max()), int((part["prompt_lengths"] + lengths).max())
        part = {k: v[:, :used if k == "tokens" else T] if v.dim() == 2 else v
                for k, v in part.items()}
        return dataclasses.replace(self, **part)


def sample_tokens(log_probs, uniforms):
    """One token a row by inverse transform: the first whose cumulative probability exceeds u.

    log_probs: (B, V), uniforms: (B,) in [0, 1)    returns: (B,)
    (torch.multinomial draws V random numbers a row where this needs one.)
    """
    cdf = log_probs.exp().cumsum(-1)                                       # (B, V)
    u = uniforms[:, None] * cdf[:, -1:]  # rounding leaves the sum near 1, not at it
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_max(cdf.shape[1] - 1)


@torch.no_grad()
def rollout(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None):
    """Sample a response to each prompt: a_t ~ π_θ(·|s_t) until the end token or T_max.

    p(τ) = Π_t π_θ(a_t|s_t): the prompt is given and the "environment" merely appends a_t to s_t.
    Rows of different length write each next token at their own position; rows that have ended
    leave the batch, a fifth of it at a time. Row b's draws are its own: the others see no change.

    policy: GPT or ActorCritic    prompts: B lists of ids, P >= 1 each    max_new_tokens: T_max
    temperature: divides the logits    generator: a seeded one, or None for torch's own
    returns: Rollout; T is the longest response's length. Raises ValueError for a prompt without a
    token, a temperature <= 0, or where prompt and response exceed the context.
    Needs `Rollout`, `pad`, `sample_tokens`, `autocast`.
    """
    gpt = getattr(policy, "gpt", policy)
    device = gpt.wte.weight.device
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token; begin every prompt with the end token")
    tokens, given = pad(prompts, device)                                   # (B, longest P)
    (B, P), prompt_lengths = tokens.shape, given.sum(1)
    if P + max_new_tokens > gpt.config.block_size:
        raise ValueError(f"prompt {P} + max_new_tokens {max_new_tokens} exceed the context of "
                         f"{gpt.config.block_size} tokens")
    tokens = F.pad(tokens, (0, max_new_tokens))                            # (B, P+T)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)  # (B, T)
    wide = torch.promote_types(gpt.wte.weight.dtype, torch.float32)
    log_probs = torch.zeros_like(mask, dtype=wide)
    uniforms = torch.rand(max_new_tokens, B, generator=generator,
                          device=generator.device if generator else "cpu").to(device)
    rows = torch.arange(B, device=device)  # (B',) which trajectory each row still sampled is
    alive = rows >= 0                                                      # (B',)
    with autocast(gpt):
        cache = gpt.new_cache(B, P + max_new_tokens)
        positions = torch.arange(P, device=device).expand(B, P)
        x = gpt.hidden(tokens[:, :P], [c[:, :P] for c in cache], positions)
        x = x[rows, prompt_lengths - 1]                                    # (B, C) the last of s_0
        for t in range(max_new_tokens):
            log_p = F.log_softmax(gpt.logits(x, temperature).to(wide), -1)  # (B', V)
            action = sample_tokens(log_p, uniforms[t, rows])               # (B',)
            log_probs[rows, t] = log_p.gather(1, action[:, None]).squeeze(1)
            tokens[rows, prompt_lengths[rows] + t] = action
            mask[rows, t] = alive
            alive = alive & (action != eos_token)
            left = int(alive.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= 0.8 * len(rows):  # moving the cache costs time: not for every row that ends
                cache = [c[alive] for c in cache]
                rows, action, alive = rows[alive], action[alive], alive[alive]
            positions = (prompt_lengths[rows] + t)[:, None]                # (B', 1)
            x = gpt.hidden(action[:, None], [c[:, :P + t + 1] for c in cache], positions)[:, 0]

    T = int(mask.sum(1).max())
    at = prompt_lengths[:, None] + torch.arange(T, device=device)          # (B, T)
    mask, log_probs = mask[:, :T], log_probs[:, :T]
    actions = tokens.gather(1, at).where(mask, 0)
    tokens.scatter_(1, at, actions)
    return Rollout(tokens[:, :P + T], prompt_lengths, actions, mask, log_probs.where(mask, 0))


# =================================================================================================
# Log-probabilities and rewards
# =================================================================================================


def gather_log_probs(logits, actions):
    """log π(a_t|s_t) = logits[a_t] − log Σ_a exp(logits[a]), in float32 or better.

    logits: (…, V), actions: (…) of ids, in padding too; … is (B, T), or (N,) in `forward_responses`
    returns: (…) in nats, each <= 0
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits, dim=-1).gather(-1, actions[..., None]).squeeze(-1)


def kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, kl_coef):
    """r_t = −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) + [t is the last step] · score.

    π_ref is the frozen language model that PPO starts from, β the price of a nat away from it.
    The score of the whole response is earned by its last action, also when it was cut at T_max;
    the KL penalty is paid where it arises. Σ_t r_t = score − β Σ_t (log π − log π_ref).

    scores: (B,), log_probs, ref_log_probs, mask: (B, T), kl_coef: β
    returns: (B, T), 0 after the end
    Source: InstructGPT 2203.02155, eq. 2 without its pretraining term; Ziegler 1909.08593, eq. 2.
    """
    mask = mask.bool()
    rewards = -kl_coef * (log_probs - ref_log_probs).where(mask, 0)
    last = mask.sum(1, keepdim=True) - 1                                   # (B, 1)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last      # (B, T)
    return rewards + scores[:, None].where(is_last, 0)


# =================================================================================================
# Policy gradient, and its variance: rewards-to-go, baseline, advantage
# =================================================================================================


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

    rewards, mask: (B, T)    returns: (B, T), 0 after the end
    """
    rewards = rewards.where(mask.bool(), 0)
    result, to_go = [], torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        to_go = rewards[:, t] + gamma * to_go                              # (B,)
        result.append(to_go)
    return torch.stack(result[::-1], dim=1)


# =================================================================================================
# Generalised advantage estimation
# =================================================================================================


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

    rewards, values, mask: (B, T)    returns: (B, T), 0 after the end; A + V is the value target
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

    Advantages then have one scale whatever the reward's: an implementation detail of PPO's
    reference code (baselines). x, mask: (B, T)    returns: (B, T). Needs `masked_mean`.
    """
    centred = (x - masked_mean(x, mask)).where(mask.bool(), 0)
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


# =================================================================================================
# Importance sampling, and PPO's loss
# =================================================================================================


def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """−E min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t) with ρ_t = π(a_t|s_t) / π_old(a_t|s_t).

    Importance sampling: E_{a~π}[f(a)] = E_{a~π_old}[ρ f(a)], so samples of π_old serve a few steps
    of π. At π = π_old ∇ρ = ∇log π: the policy gradient, as a mean over tokens. ρ_t, the paper's
    r_t(θ), is exp(log π − log π_old), not a ratio of logs. The minimum makes −loss a lower
    bound of E[ρ A]: no gain from moving ρ beyond 1 ± ε in the good direction, full cost in the bad.
    ρ_t corrects which action was taken, not how often s_t is reached: exact weights would be
    products of ratios along the trajectory.

    log_probs, and without gradient old_log_probs, advantages, mask: (B, T)    clip: ε
    returns: () mean over valid tokens    Source: PPO 1707.06347, eq. 7. Needs `masked_mean`.
    """
    mask = mask.bool()
    ratio = (log_probs - old_log_probs).where(mask, 0).exp()               # (B, T)
    advantages = advantages.where(mask, 0)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ E max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), pessimistic like the policy's.

    values, and without gradient old_values, returns, mask: (B, T)    clip: ε
    returns: () mean over valid tokens
    R is the unwhitened advantage plus V_old. Source: PPO's reference code (baselines, ppo2); PPO
    1707.06347, eq. 9 has (V − R)², without ½ and clip. Needs `masked_mean`.
    """
    mask = mask.bool()
    values, old_values, returns = (x.where(mask, 0) for x in (values, old_values, returns))
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.max((values - returns)**2, (clipped - returns)**2), mask)


def entropy(logits, mask):
    """E H[π(·|s_t)] = −E Σ_a π(a|s_t) log π(a|s_t), in nats.

    logits: (…, V), mask: (…), where … is (B, T), or (N,) as in `ppo_loss`
    returns: () mean over valid steps; the log of the vocabulary's size if uniform
    Source: PPO 1707.06347, eq. 9. Needs `masked_mean`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = F.log_softmax(logits.where(mask.bool()[..., None], 0), dim=-1)
    return masked_mean(-(log_p.exp() * log_p).sum(-1), mask)


# =================================================================================================
# Reward hacking and the KL penalty
# =================================================================================================
#
# r(x, y) is only a fit. Far from the texts that it was trained on there are some that score high
# and are bad, and an optimiser finds them: reward hacking. Maximising E[r] − β KL(π‖π_ref) keeps π
# near; the penalty is paid in `kl_penalized_rewards`.


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

    kl_coef: β    kl, kl_target: nats a response    all floats    returns: the next β
    Source: Ziegler et al. 1909.08593, section 2.2 (their code has K = batch size / 10,000).
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + K * error)


# =================================================================================================
# The loops: language model, reward model, PPO
# =================================================================================================


def batches_of_similar_length(lengths, batch_size, generator):
    """Indices of one epoch in random batches whose rows are about as long: little is padding."""
    order = torch.randperm(len(lengths), generator=generator)
    order = order[torch.tensor(lengths)[order].sort(stable=True).indices]
    batches = order.split(batch_size)
    return [batches[i].tolist() for i in torch.randperm(len(batches), generator=generator)]


def make_optimizer(model, lr, betas=(0.9, 0.99), eps=1e-8):
    """Adam, fused: one kernel for all weights."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=betas, eps=eps, fused=True)


def ppo_optimizer(policy, config):
    """Adam with ε = 1e-5, as in baselines, PPO's reference: no long step on a tiny gradient."""
    return make_optimizer(policy, config.ppo_lr, betas=(0.9, 0.999), eps=1e-5)


def apply_gradient(loss, model, optimizer, max_grad_norm, where):
    """Clip the gradient, step, clear it; returns the gradient's norm before clipping.

    A loss or gradient that is not finite stops the run by name, before the optimizer sees it
    (FloatingPointError).
    """
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad()  # whoever stops early leaves no stale gradient behind
    if not finite:
        raise FloatingPointError(f"{where}: loss {loss}, gradient norm {norm}")
    return norm


def optimizer_step(loss, model, optimizer, max_grad_norm, where):
    """Backward, from no gradient on, then `apply_gradient`."""
    optimizer.zero_grad()
    loss.backward()
    return apply_gradient(float(loss.detach()), model, optimizer, max_grad_norm, where)


def set_learning_rate(optimizer, peak, step, steps, warmup=0):
    """Up to the peak in warmup + 1 equal steps, then linearly down, to reach 0 after `steps`."""
    lr = peak * min((step + 1) / (warmup + 1), (steps - step) / max(steps - warmup, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_language_model(model, documents, config, state=None, on_step=None):
    """Stage 1: minimise −E log π(x_{i+1} | x_1 … x_i) over the corpus.

    model: GPT    documents: lists of ids, each with an end token before and after
    on_step(metrics, state) is called after each step; a run given that state goes on from there.
    """
    device, state = model.wte.weight.device, state or {"step": 0}
    optimizer = make_optimizer(model, config.lm_lr)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    per_epoch = math.ceil(len(documents) / config.lm_batch_size)
    steps, lengths = config.lm_epochs * per_epoch, [len(d) for d in documents]
    for step in range(state["step"], steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == state["step"]:
            batches = batches_of_similar_length(
                lengths, config.lm_batch_size, seeded(config.seed, "language_model", epoch))
        set_learning_rate(optimizer, config.lm_lr, step, steps, warmup=min(50, steps // 10))
        tokens, mask = pad([documents[j] for j in batches[i]], device)     # (B, S)
        with autocast(model):
            logits = model(tokens[:, :-1])                                 # (B, S-1, V)
        loss = -masked_mean(gather_log_probs(logits, tokens[:, 1:]), mask[:, 1:])
        norm = optimizer_step(loss, model, optimizer, config.max_grad_norm,
                              f"language_model step {step + 1}")
        if on_step:
            on_step({"loss": loss.item(), "grad_norm": norm, "steps": steps},
                    {"step": step + 1, "optimizer": optimizer.state_dict()})


@torch.no_grad()
def language_model_loss(model, documents, batch_size=8):
    """Mean −log π of a token of the documents, in nats."""
    total, count = 0.0, 0
    documents = sorted(documents, key=len)  # so that little of a batch is padding
    for i in range(0, len(documents), batch_size):
        tokens, mask = pad(documents[i:i + batch_size], model.wte.weight.device)
        with autocast(model):
            logits = model(tokens[:, :-1])                                 # (B, S-1, V)
        log_probs = gather_log_probs(logits, tokens[:, 1:])
        total -= float(log_probs.where(mask[:, 1:], 0).sum())
        count += int(mask[:, 1:].sum())
    return total / count


def score_pairs(reward_model, pairs):
    """(chosen (B,), rejected (B,)): r(x, y) read at the end token of each side, in one pass."""
    rows = [prompt + y for prompt, y, _ in pairs] + [prompt + y for prompt, _, y in pairs]
    tokens, mask = pad(rows, reward_model.gpt.wte.weight.device)           # (2B, S)
    with autocast(reward_model):
        scores = reward_model(tokens, mask.sum(1))
    return scores.chunk(2)


def train_reward_model(reward_model, pairs, reference, prompts, config, state=None, on_step=None):
    """Stage 2: minimise −E log σ(r(x, y_w) − r(x, y_l)); then normalise the scores.

    pairs: (prompt, chosen, rejected) lists of ids, both sides with their end token
    reference: the language model, whose own
    samples of responses to `prompts` get mean 0 and std 1 (Ziegler et al. 1909.08593)
    on_step and state: as in train_language_model
    """
    state = state or {"step": 0}
    optimizer = make_optimizer(reward_model, config.rm_lr)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    per_epoch = math.ceil(len(pairs) / config.rm_batch_size)
    steps = config.rm_epochs * per_epoch
    lengths = [len(p) + max(len(w), len(l)) for p, w, l in pairs]
    for step in range(state["step"], steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == state["step"]:
            batches = batches_of_similar_length(
                lengths, config.rm_batch_size, seeded(config.seed, "reward_model", epoch))
        set_learning_rate(optimizer, config.rm_lr, step, steps, warmup=min(20, steps // 10))
        chosen, rejected = score_pairs(reward_model, [pairs[j] for j in batches[i]])
        loss = reward_model_loss(chosen, rejected)
        norm = optimizer_step(loss, reward_model, optimizer, config.max_grad_norm,
                              f"reward_model step {step + 1}")
        if on_step:
            accuracy = float((chosen > rejected).float().mean())
            on_step({"loss": loss.item(), "accuracy": accuracy, "grad_norm": norm, "steps": steps},
                    {"step": step + 1, "optimizer": optimizer.state_dict()})
    generator = seeded(config.seed, "normalize", 0)
    samples = [rollout(reference, batch, config.max_new_tokens, reference.config.eos_token,
                       config.temperature, generator)
               for batch in batches_of_prompts(prompts, 512, config.ppo_batch_size, generator)]
    reward_model.normalize(torch.cat([reward_scores(reward_model, s) for s in samples]))


@torch.no_grad()
def reward_model_accuracy(reward_model, pairs, batch_size=64):
    """Share of pairs whose chosen side scores higher; a tie counts half."""
    right = 0.0
    pairs = sorted(pairs, key=lambda pair: sum(map(len, pair)))  # little of a batch is padding
    for i in range(0, len(pairs), batch_size):
        chosen, rejected = score_pairs(reward_model, pairs[i:i + batch_size])
        right += float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    return right / len(pairs)


@torch.no_grad()
def reward_scores(reward_model, sampled):
    """r(x, y) (B,) of the responses of a Rollout.

    One that was cut is read at an end token put behind it, because the reward model has only ever
    been read at end tokens; it has to fit the context.
    """
    eos = reward_model.gpt.config.eos_token
    lengths = sampled.prompt_lengths + sampled.mask.sum(1)                 # (B,)
    tokens = F.pad(sampled.tokens, (0, 1)).scatter(1, lengths[:, None], eos)  # (B, P+T+1)
    with autocast(reward_model):
        return reward_model(tokens, lengths + ~ends(sampled, eos))


def ends(sampled, eos_token):
    """(B,) whether the response ends by itself: its last valid action is the end token."""
    return ((sampled.actions == eos_token) & sampled.mask.bool()).any(1)


def batches_of_prompts(prompts, total, batch_size, generator):
    """`total` prompts in random order, in batches; each is used once before one is used twice."""
    if not prompts:
        raise ValueError("there is no prompt")
    order = torch.cat([torch.randperm(len(prompts), generator=generator)
                       for _ in range(math.ceil(total / len(prompts)))])[:total]
    return [[prompts[i] for i in batch] for batch in order.split(batch_size)]


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


def forward_responses(model, batch, temperature):
    """A full pass over prompts and responses, read at position P-1+t for each valid step t.

    returns: log_probs (B, T) of the actions; values (B, T), None of a GPT; both 0 after the end;
    logits (N, V) of the N valid steps alone, row by row
    """
    at = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)   # (P+T,)
    first = batch.prompt_lengths[:, None] - 1                              # (B, 1): of t = 0
    end = first + batch.mask.sum(1, keepdim=True)                          # (B, 1)
    with autocast(model):
        out = model(batch.tokens, (first <= at) & (at < end), temperature)
    logits, values = out if isinstance(out, tuple) else (out, None)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def as_steps(x):  # (N,) -> (B, T)
        return logits.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x.to(logits))

    log_probs = as_steps(gather_log_probs(logits, batch.actions[batch.mask]))
    return log_probs, values if values is None else as_steps(values), logits


@torch.no_grad()
def read_responses(model, batch, config):
    """(log_probs (B, T), values (B, T)) by `forward_responses`, a micro-batch at a time.

    The logits of all rows at once would fill the memory. Values of a GPT are 0.
    """
    log_probs, values = batch.log_probs.new_zeros(2, *batch.mask.shape)
    for rows in torch.arange(len(values), device=values.device).split(config.micro_batch_size):
        part = batch.take(rows)
        T = part.mask.shape[1]
        log_probs[rows, :T], v, _ = forward_responses(model, part, config.temperature)
        values[rows, :T] = 0 if v is None else v
    return log_probs, values


@torch.no_grad()
def collect(policy, reference, reward_fn, prompts, config, generator=None):
    """One batch of experience from π_θ, which from now on is π_old.

    policy: ActorCritic    reference: GPT (or ActorCritic), frozen    prompts: B lists of ids
    reward_fn(Rollout) -> scores (B,): a reward model or any callable    returns: Experience
    A response without an end token scores config.missing_eos_score instead (None: reward_fn's).
    """
    start, eos = time.perf_counter(), policy.gpt.config.eos_token
    sampled = rollout(policy, prompts, config.max_new_tokens, eos, config.temperature, generator)
    seconds = time.perf_counter() - start
    scores = torch.as_tensor(reward_fn(sampled)).to(sampled.log_probs)     # (B,)
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward_fn returned scores of shape {tuple(scores.shape)}, expected "
                         f"({len(prompts)},): one a trajectory")
    if config.missing_eos_score is not None:  # the EOS trick, Huang et al. 2403.17031
        scores = scores.where(ends(sampled, eos), config.missing_eos_score)

    mask = sampled.mask
    log_probs, values = read_responses(policy, sampled, config)            # 2 × (B, T)
    ref_log_probs, _ = read_responses(reference, sampled, config)
    rewards = kl_penalized_rewards(scores, log_probs, ref_log_probs, mask, config.kl_coef)
    advantages = gae(rewards, values, mask, config.gamma, config.lam)
    return Experience(sampled.tokens, sampled.prompt_lengths, sampled.actions, mask, log_probs,
                      ref_log_probs, values, scores, rewards, advantages, advantages + values,
                      seconds)


def ppo_loss(policy, batch, config, watch_entropy=True):
    """L = −L_clip + c1 L_VF − c2 H on a minibatch (PPO 1707.06347, eq. 9 with its sign turned).

    returns: (loss (), what to watch: a dictionary of floats)
    """
    log_probs, values, logits = forward_responses(policy, batch, config.temperature)
    policy_part = ppo_policy_loss(log_probs, batch.log_probs, batch.advantages, batch.mask,
                                  config.clip)
    value_part = value_loss(values, batch.values, batch.returns, batch.mask, config.value_clip)
    loss = policy_part + config.value_coef * value_part
    log_ratio = (log_probs.detach() - batch.log_probs).where(batch.mask, 0)
    change = log_ratio.expm1()                                             # (B, T) ρ − 1
    clipped = (change.abs() > config.clip).float()
    watched = {"policy_loss": policy_part, "value_loss": value_part,
               "approx_kl": masked_mean(change - log_ratio, batch.mask),  # k3 of KL(π_old‖π)
               "clip_fraction": masked_mean(clipped, batch.mask)}
    # Two more passes over the logits: if there is no bonus, only the first epoch's log needs them.
    if config.entropy_coef or watch_entropy:
        bonus = entropy(logits if config.entropy_coef else logits.detach(), batch.mask[batch.mask])
        loss, watched["entropy"] = loss - config.entropy_coef * bonus, bonus
    return loss, {name: float(value.detach()) for name, value in watched.items()}


def ppo_update(policy, optimizer, experience, config, generator=None, where="ppo"):
    """K epochs of minibatches on one batch of experience; returns metrics of the update.

    Advantages are whitened over the whole batch; the returns are not touched by that. A minibatch
    goes through the network in micro-batches whose gradients add up to its mean over tokens.
    """
    whitened = whiten(experience.advantages, experience.mask)
    experience = dataclasses.replace(experience, advantages=whitened)
    metrics, updates, seen, stop = {}, 0, 0, False
    for epoch in range(config.ppo_epochs):
        for rows in torch.randperm(len(whitened), generator=generator).split(config.minibatch_size):
            rows = rows.to(whitened.device)
            optimizer.zero_grad()  # a caller's old gradient is no part of the sum
            loss, watched, n_tokens = 0.0, {}, experience.mask[rows].sum()
            seen += int(n_tokens)
            for part in rows.split(config.micro_batch_size):
                batch = experience.take(part)
                share = batch.mask.sum() / n_tokens
                part_loss, part_watched = ppo_loss(policy, batch, config, epoch == 0)
                (share * part_loss).backward()
                loss += float(share * part_loss.detach())
                for name, value in part_watched.items():
                    watched[name] = watched.get(name, 0.0) + float(share) * value
            stop = config.early_stop_kl is not None and watched["approx_kl"] > config.early_stop_kl
            if stop:  # and leave no gradient behind
                optimizer.zero_grad()
                break
            watched["grad_norm"] = apply_gradient(loss, policy, optimizer, config.max_grad_norm,
                                                  where)
            updates += 1
            for name, value in watched.items():
                metrics.setdefault(name, []).append(value)
        if stop:
            break
    result = {name: sum(values) / len(values) for name, values in metrics.items()}
    return result | {"updates": updates, "early_stop": stop, "tokens": seen}


def train_ppo(policy, reference, reward_fn, prompts, config, state=None, on_step=None):
    """Stage 3: maximise E[r(x, y)] − β KL(π‖π_ref) by PPO: collect, update, repeat.

    policy: ActorCritic, trained in place    reference: its frozen start, a GPT
    reward_fn(Rollout) -> scores (B,), but see `collect` for responses that were cut
    prompts: lists of ids    returns: list of dictionaries of metrics, one an iteration
    on_step and state: as in train_language_model
    """
    state = state or {"step": 0, "kl_coef": config.kl_coef}
    optimizer = ppo_optimizer(policy, config)
    kl_coef, history = state["kl_coef"], []
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    for step in range(state["step"], config.ppo_iterations):
        generator = seeded(config.seed, "ppo", step)
        # A warm-up: Adam's first steps are long, and what they break in the language costs KL.
        set_learning_rate(optimizer, config.ppo_lr, step, config.ppo_iterations,
                          warmup=config.ppo_iterations // 7)
        now = dataclasses.replace(config, kl_coef=kl_coef)
        batch, = batches_of_prompts(prompts, config.ppo_batch_size, config.ppo_batch_size,
                                    generator)
        experience = collect(policy, reference, reward_fn, batch, now, generator)
        start = time.perf_counter()
        update = ppo_update(policy, optimizer, experience, now, generator, f"ppo step {step + 1}")
        update_seconds = time.perf_counter() - start

        metrics = experience_metrics(experience, policy.gpt.config.eos_token)
        metrics |= {"rollout_tokens_per_s":
                    int(experience.mask.sum()) / experience.rollout_seconds,
                    "update_tokens_per_s": update.pop("tokens") / update_seconds}
        metrics |= update | {"kl_coef": kl_coef, "steps": config.ppo_iterations}
        if config.kl_target is not None:
            kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], config.kl_target)
        history.append(metrics)
        if on_step:
            on_step(metrics, {"step": step + 1, "optimizer": optimizer.state_dict(),
                              "kl_coef": kl_coef})
    return history


def experience_metrics(e, eos_token):
    """What to watch: reward, KL to the reference (k1, k3), length, end, explained variance."""
    k1, k3 = kl_estimates(e.log_probs, e.ref_log_probs, e.mask)
    returns, values = e.returns[e.mask], e.values[e.mask]
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)
    return {"reward": float(e.scores.mean()), "kl": float(k1.mean()), "kl_k3": float(k3.mean()),
            "explained_variance": 1 - float(unexplained),
            "length": float(e.mask.sum(1).float().mean()),
            "ended": float(ends(e, eos_token).float().mean())}


# =================================================================================================
# Evaluation
# =================================================================================================


def wilson(wins, n, z=1.96):
    """Wilson's 95% interval (low, high) of a share wins / n."""
    p, d = wins / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / d, (middle + half) / d


@torch.no_grad()
def evaluate(policy, reference, reward_fn, prompts, config, true_reward_fn=None):
    """The trained policy against the reference on the same held-out prompts.

    reward_fn, true_reward_fn: Rollout -> (B,); the true one judges where it is known.
    returns: (record of figures, list of samples, one a prompt, with token lists and scores)
    """
    eos, samples = reference.config.eos_token, []
    prompts = prompts[:config.eval_prompts]
    for i in range(0, len(prompts), config.ppo_batch_size):
        batch = prompts[i:i + config.ppo_batch_size]
        rows = [{"prompt": prompt} for prompt in batch]
        for side, model in (("lm", reference), ("ppo", policy)):
            generator = seeded(config.seed, f"evaluation {side}", i)
            r = rollout(model, batch, config.max_new_tokens, eos, config.temperature, generator)
            columns = {"reward": reward_fn(r), "length": r.mask.sum(1), "ended": ends(r, eos)}
            if true_reward_fn:
                columns["true_reward"] = true_reward_fn(r)
            if side == "ppo":
                ref_log_probs, _ = read_responses(reference, r, config)
                columns["kl"], _ = kl_estimates(r.log_probs, ref_log_probs, r.mask)
            for b, row in enumerate(rows):
                row[side] = r.actions[b][r.mask[b]].tolist()
                for name, values in columns.items():
                    row[name if name == "kl" else f"{name}_{side}"] = float(values[b])
        samples += rows

    def column(name):
        return torch.tensor([sample[name] for sample in samples], dtype=torch.float64)

    judge = "true_reward" if true_reward_fn else "reward"
    better = column(f"{judge}_ppo") - column(f"{judge}_lm")
    wins, n = float((better > 0).sum() + 0.5 * (better == 0).sum()), len(samples)
    names = [name for name in samples[0] if name not in ("prompt", "lm", "ppo")]
    record = {name: float(column(name).mean()) for name in names}
    record |= {"win_rate": wins / n} | dict(zip(("win_rate_low", "win_rate_high"), wilson(wins, n)))
    record["distinct_ppo"] = len({tuple(sample["ppo"]) for sample in samples}) / n
    if true_reward_fn:
        both = torch.stack([column("reward_lm"), column("true_reward_lm")])
        record |= {"true_reward_std_lm": float(both[1].std()),
                   "reward_correlation_lm": float(torch.corrcoef(both)[0, 1])}
    return record, samples


# =================================================================================================
# The command line: run, sample, explain
# =================================================================================================

FILES = {"language_model": "lm.pt", "reward_model": "reward.pt", "ppo": "policy.pt"}
FORMAT = 1  # of checkpoints
SAVE_EVERY = 10  # seconds of work that a kill can cost


def check(c):
    """Raise ValueError, in one line, for a setting of Config `c` that makes no sense."""
    def need(ok, name, expected):
        if not ok:
            raise ValueError(f"{name} is {getattr(c, name)!r}, expected {expected}")

    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        kind = field.type | int if field.type in (float, float | None) else field.type
        need(isinstance(value, kind) and not isinstance(value, bool), field.name,
             getattr(field.type, "__name__", str(field.type)))
        need(not isinstance(value, float) or abs(value) < 1e38, field.name,
             "a finite number, of float32's range")
        need(field.name == "seed" or not isinstance(value, int) or abs(value) < 2**31, field.name,
             "less than 2**31")
    for name in ("block_size n_layer n_head n_embd lm_batch_size rm_batch_size max_new_tokens "
                 "ppo_batch_size ppo_epochs minibatch_size micro_batch_size eval_prompts").split():
        need(getattr(c, name) >= 1, name, "at least 1")
    for name in ("lm_epochs rm_epochs ppo_iterations kl_coef value_coef entropy_coef lm_lr rm_lr "
                 "ppo_lr").split():
        need(getattr(c, name) >= 0, name, "at least 0")
    for name in "temperature clip value_clip max_grad_norm".split():
        need(getattr(c, name) > 0, name, "more than 0")
    for name in "gamma lam".split():
        need(0 <= getattr(c, name) <= 1, name, "0 to 1")
    for name in "kl_target early_stop_kl".split():
        need(getattr(c, name) is None or getattr(c, name) > 0, name, "more than 0, or none")
    need(c.n_embd % c.n_head == 0, "n_embd", f"a multiple of n_head, {c.n_head}")
    need(c.minibatch_size <= c.ppo_batch_size, "minibatch_size",
         f"at most ppo_batch_size, {c.ppo_batch_size}")
    # An end token before, at least one token of prompt, and an end token for a cut response.
    # With `init`, `starting_point` asks for the same of the context that the weights have.
    need(c.init or c.max_new_tokens + 3 <= c.block_size, "max_new_tokens",
         f"at most block_size - 3, {c.block_size - 3}, to leave room for a prompt")


@functools.cache
def field_groups():
    """{group: {field: comment}} as they stand in Config's source: help and checkpoints read it."""
    groups = {}
    for line in inspect.getsource(Config).splitlines():
        if group := re.match(r" +# -- (.+)", line):
            fields = groups.setdefault(group[1], {})
        elif field := re.match(r" +(\w+): .*?# (.+)", line):
            fields[field[1]] = field[2]
    return groups


def stage_settings(config, data, stage):
    """All that the weights of a stage depend on: its own settings, earlier stages', the data."""
    groups = ["general", "language model", "reward model", "rollout", "ppo"]
    groups = groups[:{"language_model": 2, "reward_model": 4, "ppo": 5}[stage]]
    names = [name for group in groups for name in field_groups()[group]]
    settings = {name: getattr(config, name) for name in names
                if name not in ("device", "out_dir", "data_dir", "init")}
    return settings | {"data": data.fingerprint, "init": data.init, "format": FORMAT}


def find_checkpoint(stage, config, data):
    """The checkpoint of a stage that was made with these settings and data; None: start anew.

    ValueError, instead of starting anew, where that would throw work away that nobody asked to.
    """
    out, files = Path(config.out_dir), list(FILES.values())
    path, ask = out / FILES[stage], (f"--fresh {stage} starts over from there, "
                                     "another --out_dir keeps what there is")
    checkpoint, why = None, f"{path}: no such file"
    if path.exists():
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            why = str(error)
    if checkpoint is None:
        for later in files[files.index(FILES[stage]) + 1:]:
            if (out / later).exists():
                raise ValueError(f"{why}, but {out / later} builds on it: {ask}")
        if path.exists():
            print(f"{stage}: starts anew, {why}")
        return None
    old = checkpoint.get("settings", {}) if isinstance(checkpoint, dict) else {}
    changed = ["other data" if name == "data" else f"{name} {old.get(name)}, now {value}"
               for name, value in stage_settings(config, data, stage).items()
               if old.get(name) != value]
    if old.get("format") != FORMAT:
        changed = ["another version of this program"]
    if changed:
        raise ValueError(f"{path} was made with {'; '.join(changed)}: {ask}")
    return checkpoint


def run_stage(stage, model, train, config, data, interrupted):
    """Load a stage that is done, or train it from its last checkpoint on.

    train(state=…, on_step=…)    returns: seconds it took
    """
    path, log = Path(config.out_dir) / FILES[stage], Path(config.out_dir) / "log.jsonl"
    checkpoint = find_checkpoint(stage, config, data) or {
        "state": None, "seconds": 0.0, "done": False}
    if "weights" in checkpoint:
        model.load_state_dict(checkpoint["weights"])
        done = "is loaded" if checkpoint["done"] else f"goes on at {checkpoint['state']['step']}"
        print(f"{stage}: {done} ({path})")
    if checkpoint["done"]:
        return checkpoint["seconds"]
    earlier = itertools.takewhile(lambda name: name != stage, FILES)
    step = checkpoint["state"]["step"] if checkpoint["state"] else 0
    dataset.keep_records(log, dict.fromkeys(earlier, math.inf) | {stage: step})
    start = time.perf_counter() - checkpoint["seconds"]
    saved, began = time.perf_counter(), time.perf_counter()

    def save(state, done):
        gpt = getattr(model, "gpt", model)
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise FloatingPointError(f"{stage}: a weight is not finite; the last checkpoint stays")
        save_checkpoint(path, {
            "stage": stage, "settings": stage_settings(config, data, stage), "state": state,
            "model": dataclasses.asdict(gpt.config), "config": dataclasses.asdict(config),
            "weights": model.state_dict(), "done": done,
            "seconds": time.perf_counter() - start})

    def on_step(metrics, state):
        nonlocal saved, began
        step, steps = state["step"], metrics.pop("steps")
        seconds = time.perf_counter() - start
        if stage == "ppo" or step % 10 == 0 or step == steps:
            row = {"stage": stage, "step": step, "seconds": seconds, **metrics}
            dataset.append_record(log, row)
        show_progress(stage, step, steps, seconds, metrics)
        final.update(state)
        stop = interrupted()
        slow = 20 * (saved - began)  # where saving takes long, it is done less often
        if stop or step == steps or time.perf_counter() - saved > max(SAVE_EVERY, slow):
            began = time.perf_counter()
            save(state, False)
            saved = time.perf_counter()
        if stop:
            raise KeyboardInterrupt

    final = {}
    train(state=checkpoint["state"], on_step=on_step)
    save(final or checkpoint["state"], True)
    return time.perf_counter() - start


def show_progress(stage, step, steps, seconds, metrics):
    """One line that refreshes on a terminal; plain lines, a tenth of the way each, in a file."""
    terminal = sys.stdout.isatty()
    every = 1 if stage == "ppo" else max(1, steps // 10)
    if not terminal and step % every and step != steps:
        return
    left = seconds / step * (steps - step)
    names = ("loss accuracy reward true_reward kl entropy length ended rollout_tokens_per_s "
             "update_tokens_per_s").split()
    short = {"rollout_tokens_per_s": "rollout tok/s", "update_tokens_per_s": "update tok/s"}
    shown = "  ".join(f"{short.get(n, n)} {metrics[n]:{',.0f' if '_per_s' in n else '.2f'}}"
                      for n in names if n in metrics)
    line = f"{stage} {step}/{steps}  {shown}  {step / seconds:.1f}/s  {left:.0f} s left"
    if terminal:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{line[:width]}", end="\n" if step == steps else "", flush=True)
    else:
        print(line, flush=True)


def pick_device(name):
    """torch.device of a name; auto takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {name!r}: {str(error).splitlines()[0]}") from None


def true_reward_fn(data):
    """Rollout -> true rewards (B,), for the shipped data only; None for a reader's own."""
    if not data.shipped:
        return None
    from data import annotator

    def true_rewards(rollout):
        responses = [a[m].tolist() for a, m in zip(rollout.actions, rollout.mask)]
        prompts = [t[:n].tolist() for t, n in zip(rollout.tokens, rollout.prompt_lengths)]
        return torch.tensor([annotator.true_reward(data.text(x), data.text(y))
                             for x, y in zip(prompts, responses)])
    return true_rewards


def starting_point(config):
    """(language model before stage 1, data, config): new, or `init`'s weights with their sizes."""
    if config.init is None:
        data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens)
        sizes = GPTConfig(data.eos_token + 1, config.block_size, config.n_layer, config.n_head,
                          config.n_embd, data.eos_token)
        return GPT(sizes, seeded(config.seed, "language_model init", 0)), data, config
    lm, encoding = GPT.from_pretrained(config.init), dataset.tokenizer_of(None, config.init)
    sizes = lm.config
    if sizes.vocab_size != encoding.n_vocab:
        raise ValueError(f"{config.init}: a vocabulary of {sizes.vocab_size:,} tokens, expected "
                         f"the {encoding.n_vocab:,} of GPT-2's tokenizer")
    if config.max_new_tokens + 3 > sizes.block_size:
        raise ValueError(f"max_new_tokens is {config.max_new_tokens}, expected at most "
                         f"{sizes.block_size - 3}: {config.init} has a context of "
                         f"{sizes.block_size} tokens")
    sizes.eos_token = encoding.eot_token
    config = dataclasses.replace(config, block_size=sizes.block_size, n_layer=sizes.n_layer,
                                 n_head=sizes.n_head, n_embd=sizes.n_embd)
    data = dataset.load(config.data_dir, config.block_size, config.max_new_tokens, encoding)
    data.notes.append(f"starts from {config.init}: {config.n_layer} layers, {config.n_head} heads, "
                      f"width {config.n_embd}, context {config.block_size}")
    digest = hashlib.sha256()
    for weight in lm.state_dict().values():
        digest.update(weight.numpy())
    data.init = digest.hexdigest()
    return lm, data, config


def run(config, fresh=None, interrupted=lambda: False):
    """All stages: language model, reward model, PPO, evaluation. Returns the evaluation record.

    fresh: a stage, from which on to start over    interrupted() -> whether to save and stop
    """
    check(config)  # its fields can be assigned to
    lm, data, config = starting_point(config)
    device, out = pick_device(config.device), Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with dataset.locked(out):
        stages = list(FILES)[list(FILES).index(fresh):] if fresh else []
        for stage in reversed(stages):  # the last first: a kill leaves a beginning
            (out / FILES[stage]).unlink(missing_ok=True)
        return run_stages(lm, data, config, device, interrupted)


def run_stages(lm, data, config, device, interrupted):
    """See run; lm: before stage 1    `out_dir` is there, and this run's alone."""
    out = Path(config.out_dir)
    describe(data, device)
    lm.to(device)
    seconds = {}

    def stage(name, model, train):
        seconds[name] = run_stage(name, model, train, config, data, interrupted)

    stage("language_model", lm, lambda **resume: train_language_model(
        lm, data.train.documents, config, **resume))
    lm.requires_grad_(False)

    reward_model = RewardModel(lm, seeded(config.seed, "reward_model init", 0))
    stage("reward_model", reward_model, lambda **resume: train_reward_model(
        reward_model, data.train.pairs, lm, data.train.prompts, config, **resume))
    reward_model.requires_grad_(False)

    policy, true_reward = ActorCritic(lm), true_reward_fn(data)
    watched = {}

    def reward_fn(rollout):
        if true_reward:  # for the log alone: training never sees it
            watched["true_reward"] = float(true_reward(rollout).mean())
        return reward_scores(reward_model, rollout)

    def ppo(state, on_step):
        train_ppo(policy, lm, reward_fn, data.train.prompts, config, state,
                  lambda metrics, state: on_step(metrics | watched, state))

    stage("ppo", policy, ppo)

    start = time.perf_counter()
    dataset.keep_records(out / "log.jsonl", dict.fromkeys(FILES, math.inf))
    record, samples = evaluate(policy, lm, reward_fn, data.held_out.prompts, config, true_reward)
    if not math.isfinite(record["kl"] + record["reward_lm"] + record["reward_ppo"]):
        raise FloatingPointError("evaluation: a reward or the KL is not finite")
    record["language_model_loss"] = language_model_loss(lm, data.held_out.documents)
    record["reward_model_accuracy"] = reward_model_accuracy(reward_model, data.held_out.pairs)
    if true_reward:
        record["reward_model_ceiling"] = ceiling(data)
    seconds["evaluation"] = time.perf_counter() - start
    record |= {f"seconds_{name}": s for name, s in seconds.items()}
    record["seconds"] = sum(seconds.values())
    dataset.append_record(out / "log.jsonl", {"stage": "evaluation", "step": 1, **record})
    texts = [sample | {k: data.text(sample[k]) for k in ("prompt", "lm", "ppo")}
             for sample in samples]
    dataset.write_records(out / "samples.jsonl", texts)
    summarize(record, texts, out)
    return record


def ceiling(data):
    """What the true reward itself reads on the held-out pairs, whose labels are noisy."""
    from data import annotator
    right = 0.0
    for pair in data.held_out.pairs:
        prompt, chosen, rejected = (data.text(tokens) for tokens in pair)
        margin = annotator.true_reward(prompt, chosen) - annotator.true_reward(prompt, rejected)
        right += (margin > 0) + 0.5 * (margin == 0)
    return right / len(data.held_out.pairs)


def describe(data, device):
    """Print what will be trained on, and what was left out."""
    a, b = data.train, data.held_out
    print(f"data: {len(a.documents):,} documents, {len(a.pairs):,} pairs, {len(a.prompts):,} "
          f"prompts; held out {len(b.documents):,}, {len(b.pairs):,}, {len(b.prompts):,}; "
          f"vocabulary {data.eos_token + 1:,}; device {device}")
    for reason, rows in sorted(data.skipped.items()):
        print(f"skipped: {rows:,} rows of {reason}")
    for note in data.notes:
        print(f"note: {note}")


def summarize(record, samples, out):
    """Print samples before and after on the same prompts, and the evaluation record."""
    judge = "true_reward" if "true_reward_lm" in record else "reward"
    width = min(shutil.get_terminal_size().columns, 100)
    print("\nHeld-out prompts, continued by the language model and by the PPO policy\n")
    for sample in samples[:5]:
        for side, name in (("lm", "before"), ("ppo", "after")):
            text = sample["prompt"] + "|" + sample[side]
            text = f"{name:>6} {sample[f'{judge}_{side}']:+6.2f}  {' '.join(text.split())}"
            print(textwrap.fill(text, width, subsequent_indent=" " * 15))
        print()
    print(f"{'':34}{'language model':>16}{'PPO':>12}")
    for name in ("reward", "true_reward", "ended", "length"):
        if f"{name}_lm" in record:
            print(f"{name:34}{record[f'{name}_lm']:16.3f}{record[f'{name}_ppo']:12.3f}")
    for name, value in record.items():
        if name.startswith(("seconds", "distinct", "true_reward_std", "reward_correlation")) or \
                not name.endswith(("_lm", "_ppo")):
            print(f"{name:34}{value:28.3f}")
    from data import curves
    print(f"\nwritten to {out}/: log.jsonl, samples.jsonl, {', '.join(FILES.values())}"
          f"{curves.draw(out)}")


def load_model(path, device="cpu"):
    """(model, Config of its run, tokenizer) of lm.pt, reward.pt or policy.pt."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; run python rlhf.py first")
    checkpoint = load_checkpoint(path)
    try:
        gpt = GPT(GPTConfig(**checkpoint["model"]))
        model = {"language_model": lambda g: g, "reward_model": RewardModel,
                 "ppo": ActorCritic}[checkpoint["stage"]](gpt)
        model.load_state_dict(checkpoint["weights"])
        config = Config(**checkpoint["config"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this version's "
                         f"({type(error).__name__})") from None
    encoding = dataset.tokenizer_of(config.data_dir, config.init)
    if encoding.n_vocab != gpt.config.vocab_size:
        raise ValueError(f"{path}: a vocabulary of {gpt.config.vocab_size:,} tokens, but the "
                         f"tokenizer of {config.data_dir} now has {encoding.n_vocab:,}")
    return model.to(device), config, encoding


def load_models(config):
    """(language model, reward model, policy, Config, tokenizer) of a finished run in out_dir.

    The Config is the run's own, but for what `config` sets otherwise than by default, and its seed.
    """
    device = pick_device(config.device)
    (lm, *_), (reward_model, *_), (policy, trained, encoding) = (
        load_model(Path(config.out_dir) / name, device) for name in FILES.values())
    chosen = {name: value for name, value in dataclasses.asdict(config).items()
              if value != getattr(Config, name)}
    config = dataclasses.replace(trained, **chosen | {"seed": config.seed})
    return lm, reward_model, policy, config, encoding


def sample(config, prompt, n=3):
    """Continuations of a prompt by the language model and the PPO policy, side by side."""
    lm, reward_model, policy, config, encoding = load_models(config)
    eos, tokens = lm.config.eos_token, encoding.encode_ordinary(prompt)
    columns = []
    for model, name in ((lm, "language model"), (policy, "PPO policy")):
        r = rollout(model, [[eos, *tokens]] * n, config.max_new_tokens, eos, config.temperature,
                    seeded(config.seed, "sample", 0))
        ref_log_probs, _ = read_responses(lm, r, config)
        kl, _ = kl_estimates(r.log_probs, ref_log_probs, r.mask)
        scores = reward_scores(reward_model, r)
        texts = [encoding.decode([t for t in a[m].tolist() if t != eos], errors="replace")
                 for a, m in zip(r.actions, r.mask)]
        columns.append([name, *(f"[score {s:+.2f}, KL {k:z.1f}]{text}" for s, k, text in
                                zip(scores.tolist(), kl.tolist(), texts))])
    print(prompt)
    for left, right in zip(*columns):
        print(side_by_side(left, right) + "\n")


def side_by_side(left, right):
    """Two texts as two columns of the terminal's width."""
    width = max((shutil.get_terminal_size().columns - 3) // 2, 8)
    sides = [textwrap.wrap(" ".join(text.split()), width) for text in (left, right)]
    return "\n".join(f"{a:{width}} | {b}" for a, b in itertools.zip_longest(*sides, fillvalue=""))


def explain(config, prompt, step):
    """One trajectory as a table: every column of the derivation, and the sums that tie them.

    prompt: a text; None takes a held-out one    step: 0 for the policy as PPO found it, else None
    """
    lm, reward_model, policy, config, encoding = load_models(config)
    if step == 0:
        policy = ActorCritic(lm)
    if prompt is None:
        samples = dataset.read_records(Path(config.out_dir) / "samples.jsonl")
        prompt = samples[config.seed % len(samples)]["prompt"]
    eos = lm.config.eos_token
    e = collect(policy, lm, lambda r: reward_scores(reward_model, r),
                [[eos, *encoding.encode_ordinary(prompt)]], config,
                seeded(config.seed, "explain", 0))
    ppo_update(policy, ppo_optimizer(policy, config), e, config)
    log_probs, _ = read_responses(policy, e, config)
    ratio = (log_probs - e.log_probs).exp()                                # (1, T)
    columns = trajectory_columns(e, ratio, config)

    actions, P = e.actions[0].tolist(), int(e.prompt_lengths[0])
    tokens = ["<end>" if a == eos else encoding.decode([a], "replace") for a in actions]
    response = encoding.decode([a for a in actions if a != eos], "replace")
    print(textwrap.fill(" ".join(f"{prompt}|{response}".split()), 79))
    print(f"\n{'untrained' if step == 0 else 'trained'} policy; P = {P} tokens of prompt, so row t "
          f"is read at position {P - 1} + t\n")
    print("\n".join(trajectory_table(columns, tokens, config.clip)))
    print(f"\nratio: clip(π_new / π, 1 ± {config.clip:g}) after one update on this trajectory "
          "alone,\nwhich pushes it up where A is above its mean; * where it was clipped\n")
    if not ends(e, eos) and config.missing_eos_score is not None:
        print("the response was cut: its score is missing_eos_score")
    print("\n".join(trajectory_sums(columns, float(e.scores), config)))


def trajectory_columns(e, ratio, config):
    """{name: list of T numbers} of the one trajectory in `e`; log ref is log π_ref(a_t|s_t)."""
    columns = {"log π": e.log_probs, "log ref": e.ref_log_probs,
               "KL": e.log_probs - e.ref_log_probs, "r": e.rewards,
               "to-go": rewards_to_go(e.rewards, e.mask, config.gamma), "V": e.values,
               "δ": gae(e.rewards, e.values, e.mask, config.gamma, lam=0.0), "A": e.advantages,
               "ratio": ratio}
    return {name: values[0].tolist() for name, values in columns.items()}


def trajectory_table(columns, tokens, clip):
    """Lines of at most 80 columns: names, then one a time step. A space in a token shows as ·"""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    widths = [7 if name in ("log π", "log ref", "KL") else 6 for name in columns]
    lines = [f" t {'token':9} " + " ".join(f"{n:>{w}}" for n, w in zip(columns, widths))]
    for t, (token, *row) in enumerate(zip(tokens, *columns.values())):
        token, ratio = repr(token)[1:-1].replace(" ", "·")[:9], row[-1]
        row[-1] = min(max(ratio, 1 - clip), 1 + clip)
        cells = [f"{x:z{width}.3f}" for x, width in zip(row, widths)]
        if colour:  # the advantage: green where the action did better than V expected, else red
            cells[-2] = f"\033[{32 if row[-2] > 0 else 31}m{cells[-2]}\033[0m"
        lines.append(f"{t:2} {token:9} {' '.join(cells)}{'*' * (row[-1] != ratio)}")
    return lines


def trajectory_sums(columns, score, config):
    """Lines that tie the columns together; what would stand after the last step is 0."""
    beta, gamma, lam = config.kl_coef, config.gamma, config.lam
    r, to_go, V, delta, A = (columns[name] + [0.0] for name in ("r", "to-go", "V", "δ", "A"))
    kl, telescoped = sum(columns["KL"]), sum(gamma**t * d for t, d in enumerate(delta))
    lines = (
        ("Σ r = score - β Σ KL", f"{sum(r):.3f} = {score:.3f} - {beta:g} · {kl:.3f}"),
        ("to-go_0 = r_0 + γ to-go_1", f"{to_go[0]:.3f} = {r[0]:.3f} + {gamma:g} · {to_go[1]:.3f}"),
        ("δ_0 = r_0 + γ V_1 - V_0",
         f"{delta[0]:.3f} = {r[0]:.3f} + {gamma:g} · {V[1]:.3f} - {V[0]:.3f}"),
        ("A_0 = δ_0 + γλ A_1", f"{A[0]:.3f} = {delta[0]:.3f} + {gamma * lam:g} · {A[1]:.3f}"),
        ("Σ γ^t δ_t = to-go_0 - V_0", f"{telescoped:.3f} = {to_go[0]:.3f} - {V[0]:.3f}"),
        ("A_0+V_0 = r_0 + γ (V_1 + λA_1)",
         f"{A[0] + V[0]:.3f} = {r[0]:.3f} + {gamma:g} · ({V[1]:.3f} + {lam:g} · {A[1]:.3f})"))
    lines = [f"{formula:30}  {numbers}" for formula, numbers in lines]
    return [*lines, "A_0+V_0 is the return, which V(s_0) is trained towards"]


def parse(argv):
    """(command, prompt, Config, --fresh, --step) as given; if wrong, one line and exit 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"rlhf.py: {message}; see --help\n")

    def value(text):
        return None if text.lower() == "none" else float(text)

    parser = Parser(prog="rlhf.py", allow_abbrev=False,
                    description="RLHF: language model, reward model, PPO, evaluation.")
    parser.add_argument("command", nargs="?", default="run", choices=("run", "sample", "explain"),
                        help="run: all stages; sample PROMPT: continuations before and after; "
                        "explain [PROMPT]: one trajectory as a table")
    parser.add_argument("prompt", nargs="?", help="for sample and explain")
    parser.add_argument("--fresh", nargs="?", const="language_model", choices=tuple(FILES),
                        metavar="STAGE", help="replace the checkpoints in out_dir from STAGE on: "
                        "language_model (all of them; the default), reward_model or ppo. Without "
                        "it, one made with the same settings and data is loaded, and one made "
                        "with others stops the program")
    parser.add_argument("--step", type=int, choices=(0,), metavar="0",
                        help="for explain: the policy before PPO")
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    for group, fields in field_groups().items():
        section = parser.add_argument_group(group)
        for name, comment in fields.items():
            flags = [f"--{name}"] + ["--data"] * (name == "data_dir")
            kind = {float | None: value, str | None: str}.get(types[name], types[name])
            section.add_argument(*flags, dest=name, type=kind, metavar="X",
                                 default=getattr(Config, name),
                                 help=f"{comment.replace('%', '%%')} (%(default)s)")
    words = vars(parser.parse_intermixed_args(argv))
    command, prompt, fresh, step = (words.pop(n) for n in ("command", "prompt", "fresh", "step"))
    if command != "explain" and (command == "sample") != (prompt is not None):
        parser.error("sample needs a prompt" if prompt is None else f"what is {prompt!r}?")
    if command != "explain" and step is not None:
        parser.error("--step is for explain")
    try:
        return command, prompt, Config(**words), fresh, step
    except ValueError as error:
        parser.error(str(error))


def main(argv=None):
    """Entry of the command line. What a user can get wrong is one line and exit status 2."""
    command, prompt, config, fresh, step = parse(argv)
    pressed, late = [], threading.Timer(1, _thread.interrupt_main)
    late.daemon = True

    def interrupt(*_):
        """Ctrl-C: the step ends and is saved. After a second, or pressed again: leave at once."""
        pressed.append(1)
        if len(pressed) > 1:
            raise KeyboardInterrupt
        late.start()

    signal.signal(signal.SIGINT, interrupt)
    try:
        if command == "sample":
            sample(config, prompt)
        elif command == "explain":
            explain(config, prompt, step)
        else:
            run(config, fresh, lambda: bool(pressed))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        same = "the same command without --fresh" if fresh else "the same command"
        print(f"\nstopped; {same} goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = error.filename or config.out_dir  # a full disk comes without a name
        print(f"rlhf.py: {where}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FloatingPointError) as error:
        print(f"rlhf.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        print("rlhf.py: not enough memory for these sizes: "
              f"{(str(error).splitlines() or ['MemoryError'])[0]}", file=sys.stderr)
        sys.exit(2)
    finally:
        late.cancel()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
    main()
