"""The derivation of RLHF, proven step by step: each test is named after a claim.

The method is a world small enough to list. A GPT of a few hundred parameters in float64, four
tokens, three steps: every trajectory τ can be written down with its probability p_θ(τ), and a
gradient runs through it. So

    J(θ) = Σ_τ p_θ(τ) R(τ)

is a formula that autograd differentiates, and each estimator of the derivation has an expectation
and a variance that are computed, not sampled: "unbiased" means equal to 1e-10. The functions under
test are the project's own; the lists they are held against are written here, in the plainest way.

    python -m pytest test_rlhf.py                        everything, in about a minute
    python -m pytest test_rlhf.py -s -k variance_falls   one claim, with the figures it prints
"""
import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlhf
from data import annotator, curves, dataset, frontier, label
from model import (GPT, ActorCritic, GPTConfig, RewardModel, load_checkpoint, read_safetensors,
                   save_checkpoint)
from rlhf import (Config, Rollout, adapt_kl_coef, collect, entropy, gae, gather_log_probs,
                  kl_estimates, kl_penalized_rewards, masked_mean, policy_gradient_loss,
                  ppo_policy_loss, ppo_update, reward_model_loss, rewards_to_go, rollout,
                  train_ppo, value_loss, whiten)

torch.set_num_threads(1)
REPO = Path(rlhf.__file__).resolve().parent
SHARED = REPO.parent / "shared" / "data"
SEEDS = pytest.mark.parametrize("seed", range(3))
f64 = functools.partial(torch.tensor, dtype=torch.float64)

# =================================================================================================
# A world small enough to list
# =================================================================================================

def close(actual, expected, atol=1e-10):
    """Equal up to rounding; where `expected` is a tensor, in dtype and shape too.

    A number or a list takes the dtype of `actual`: to check a dtype, pass a tensor.
    """
    if not torch.is_tensor(expected):
        expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=atol)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=draws(seed), dtype=torch.float64)


def tiny_gpt(seed=0, vocab=4, layers=1, heads=2, width=4, context=12, std=0.3):
    """A GPT in float64 that is far from its initialisation; the last token ends a text."""
    generator = draws(seed)
    gpt = GPT(GPTConfig(vocab, context, layers, heads, width, vocab - 1), generator).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.div_(math.sqrt(768 / width) if p.dim() == 2 else 1)  # N(0, 0.02) at any width
            p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return gpt


def tiny_policy(seed=0, **sizes):
    """An ActorCritic on such a GPT whose values are not zero either."""
    policy = ActorCritic(tiny_gpt(seed, **sizes))
    torch.nn.init.normal_(policy.value_head.weight, generator=draws(seed))
    torch.nn.init.constant_(policy.value_head.bias, 0.3)
    return policy


def log_pi(policy, state, temperature=1.0):
    """log π(·|s), (V,), by a forward pass over this state alone."""
    gpt = getattr(policy, "gpt", policy)
    return F.log_softmax(gpt(torch.tensor([list(state)]))[0, -1] / temperature, -1)


def V(policy, state):
    """The critic's V(s), by a forward pass over this state alone."""
    return policy(torch.tensor([list(state)]))[1][0, -1]


class World:
    """All responses of at most T tokens to a few prompts, each prompt as likely as the others.

    Trajectory n is states[state_of[n, 0]], actions[n, 0], states[state_of[n, 1]], …; a state is
    the tuple of all tokens so far. It ends with the end token, or is cut after T tokens.
    """

    def __init__(self, prompts, vocab, T):
        self.prompts, eos = prompts, vocab - 1
        responses = [y for n in range(1, T + 1) for y in itertools.product(range(vocab), repeat=n)
                     if eos not in y[:-1] and (y[-1] == eos or n == T)]
        rows = [(x, y) for x in prompts for y in responses]
        self.states = list(dict.fromkeys(x + y[:t] for x, y in rows for t in range(len(y))))
        index = {state: i for i, state in enumerate(self.states)}

        def padded(sequences):
            longest = max(map(len, sequences))
            return torch.tensor([list(s) + [0] * (longest - len(s)) for s in sequences])

        self.state_of = padded([[index[x + y[:t]] for t in range(len(y))] for x, y in rows])
        self.actions = padded([y for x, y in rows])                                  # (N, T)
        self.mask = padded([[1] * len(y) for x, y in rows]).bool()                   # (N, T)
        self.lengths = self.mask.sum(1)                                              # (N,)
        self.tokens = padded([x + y for x, y in rows])                               # (N, P+T)
        self.prompt_lengths = torch.tensor([len(x) for x, y in rows])

    def table(self, policy, temperature=1.0):
        """log π(a|s) of every state, (states, V): a forward pass for each, nothing padded."""
        return torch.stack([log_pi(policy, state, temperature) for state in self.states])

    def read(self, table):
        """(states, V) -> its entries along each trajectory (N, T), 0 after the end."""
        return table[self.state_of, self.actions].where(self.mask, 0)

    def probability(self, log_probs):
        """p(τ) = p(x) Π_t π(a_t|s_t), (N,)."""
        return log_probs.sum(1).exp() / len(self.prompts)

    def values(self, table, rewards):
        """V(s) = Σ_a π(a|s) (r(s, a) + V(s ⊕ a)) of every state, (states,), from the last back."""
        values = {}
        for i in sorted(range(len(self.states)), key=lambda i: -len(self.states[i])):
            s, pi = self.states[i], table[i].exp()
            values[s] = sum(pi[a] * (rewards[i, a] + values.get(s + (a,), 0))
                            for a in range(len(pi)))
        return torch.stack([values[s] for s in self.states])


RAGGED = [(3, 1), (3, 2, 0, 1)]  # two prompts of different length; each begins with the end token


def flat_grad(y, policy):
    """∂y/∂θ as one vector (D,)."""
    grads = torch.autograd.grad(y, list(policy.parameters()), retain_graph=True,
                                allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@functools.cache
def listed(seed):
    """A world with a policy and random rewards r(s, a), and all that is exact about the two."""
    world, gpt = World(RAGGED, 4, 3), tiny_gpt(seed)
    reward_table, table = normal(len(world.states), 4, seed=seed), world.table(gpt)
    log_probs, rewards = world.read(table), world.read(reward_table)
    p = world.probability(log_probs)
    J = (p * rewards.sum(1)).sum()                       # Σ_τ p(τ) R(τ): autograd does the rest
    slopes = torch.stack([torch.stack([flat_grad(x, gpt) for x in log_pi(gpt, state)])
                          for state in world.states])    # ∇log π(a|s), (states, V, D)
    slopes = slopes[world.state_of, world.actions] * world.mask[..., None]           # (N, T, D)
    values = world.values(table, reward_table).detach()
    return SimpleNamespace(
        world=world, gpt=gpt, mask=world.mask, lengths=world.lengths, rewards=rewards,
        log_probs=log_probs.detach(), p=p.detach(), J=J.detach(), grad_J=flat_grad(J, gpt),
        grad_log_pi=slopes, values=values[world.state_of].where(world.mask, 0))


def gradients(w, loss):
    """What each trajectory estimates ∇J to be, (N, D): −∂loss/∂θ of a batch of it alone, which
    by the chain rule is −Σ_t ∂loss/∂log π(a_t|s_t) · ∇log π(a_t|s_t).

    loss(log_probs (1, T), row): the project's loss of one trajectory, `row` is a slice.
    """
    leaf = w.log_probs.clone().requires_grad_()
    total = sum(loss(leaf[n:n + 1], slice(n, n + 1)) for n in range(len(leaf)))
    by_log_prob, = torch.autograd.grad(total, leaf)                                  # (N, T)
    return -torch.einsum("nt,ntd->nd", by_log_prob, w.grad_log_pi)


def policy_gradients(w, weights):
    return gradients(w, lambda log_probs, row: policy_gradient_loss(
        log_probs, weights[row], w.mask[row]))


def moments(p, x):
    """Expectation (D,) and variance, the trace of the covariance, of x (N, D) under p (N,)."""
    mean = p @ x
    return mean, (p @ (x - mean)**2).sum()


# =================================================================================================
# 1. Reward model: preferences become a number
# =================================================================================================

def test_reward_model_loss_is_minus_log_sigmoid_of_the_margin():
    """L = −E log σ(r_w − r_l) = E log(1 + e^{r_l − r_w}), by NumPy and by hand."""
    a, b = normal(2, 50)
    close(reward_model_loss(a, b), np.log1p(np.exp((b - a).numpy())).mean())
    zero, more = f64([0.0]), f64([math.log(3.0)])
    close(reward_model_loss(zero, zero), math.log(2))      # no opinion: log 2
    close(reward_model_loss(more, zero), math.log(4 / 3))  # σ(log 3) = 3/4
    close(reward_model_loss(zero, more), math.log(4))      # the wrong order


def test_reward_model_loss_does_not_overflow():
    """−log σ(−1000) = 1000: log(sigmoid(·)) would be −log 0 = ∞, with a gradient that is NaN."""
    for dtype in (torch.float32, torch.float64):
        low = torch.tensor([-1000.0], dtype=dtype, requires_grad=True)
        high, zero = torch.tensor([1000.0], dtype=dtype), torch.zeros(1, dtype=dtype)
        assert reward_model_loss(low, zero) == 1000 and reward_model_loss(high, zero) == 0
        assert reward_model_loss(zero, high) == 1000 and reward_model_loss(zero, low) == 0
        reward_model_loss(low, zero).backward()
        assert low.grad == -1


def test_reward_model_loss_ignores_a_constant_added_to_both():
    """σ((r_w + c) − (r_l + c)) = σ(r_w − r_l): only differences are ever learned."""
    a, b = normal(2, 9)
    close(reward_model_loss(a + 7, b + 7), reward_model_loss(a, b))


def test_minimiser_on_infinitely_many_labels_is_the_true_reward_up_to_a_constant():
    """argmin_r Σ_{i≠j} −P(i ≻ j) log σ(r_i − r_j) = r* + c, where P(i ≻ j) = σ(r*_i − r*_j).

    Infinitely many labels: each ordered pair (i, j) weighs as much as its probability.
    """
    true = f64([0.5, -1.2, 2.0, 0.0, 0.7])

    def expected_loss(others):
        r = torch.cat([f64([0.0]), others])  # c: the first is 0
        return sum(torch.sigmoid(true[i] - true[j]) * reward_model_loss(r[i:i + 1], r[j:j + 1])
                   for i, j in itertools.permutations(range(5), 2))

    found = torch.zeros(4, dtype=torch.float64)
    for _ in range(12):  # Newton: the loss is strictly convex once c is fixed
        slope = torch.autograd.functional.jacobian(expected_loss, found)
        curvature = torch.autograd.functional.hessian(expected_loss, found)
        found = found - torch.linalg.solve(curvature, slope)
    close(found, (true - true[0])[1:])
    assert torch.linalg.eigvalsh(curvature).min() > 0  # a minimum, not any stationary point


def test_reward_model_reads_the_last_token_of_each_row_and_no_padding():
    """r(x, y) = w · h_last + b of each side of a pair, in one padded pass as alone."""
    model = RewardModel(tiny_gpt(), draws())
    torch.nn.init.constant_(model.reward_head.bias, 0.7)
    pairs = [([3, 1], [2, 0, 3], [3]), ([3], [3], [1, 1, 1, 3]), ([3, 0], [2, 3], [1, 3])]

    def alone(rows):
        return torch.stack([model.gpt.hidden(torch.tensor([row]))[0, -1]
                            @ model.reward_head.weight[0] + 0.7 for row in rows])

    chosen, rejected = rlhf.score_pairs(model, pairs)
    close(chosen, alone([x + w for x, w, l in pairs]))
    close(rejected, alone([x + l for x, w, l in pairs]))


def test_reward_head_starts_as_normal_with_std_one_over_root_d_plus_one():
    """w ~ N(0, 1/(d+1)), b = 0 (Stiennon et al. 2020): scores start with std near 1, not 0.02."""
    for d in (2, 64):
        head = RewardModel(GPT(GPTConfig(4, 8, 1, 1, d, 3)), draws()).reward_head
        close(head.weight, torch.empty(1, d).normal_(generator=draws()) / math.sqrt(d + 1), 1e-6)
        assert head.bias == 0


def test_normalised_reward_has_mean_0_and_std_1():
    """r ← (r − E r) / σ_r over samples of π_ref: PPO's constants assume that scale."""
    model = RewardModel(tiny_gpt(), draws())
    torch.nn.init.constant_(model.reward_head.bias, 5.0)
    tokens, lengths = torch.randint(4, (40, 6), generator=draws()), torch.full((40,), 6)
    before = model(tokens, lengths)
    model.normalize(before)
    close(model(tokens, lengths), (before - before.mean()) / before.std(correction=0))
    model.normalize(torch.full((5,), 2.0, dtype=torch.float64))  # all the same: no division by 0
    assert model(tokens, lengths).isfinite().all()


def test_a_cut_response_is_scored_at_an_end_token_behind_it():
    """r(x, y ⊕ end): the reward model was only ever read at end tokens; padding is not read."""
    model = RewardModel(tiny_gpt(), draws())
    cases = [([3, 1], [2, 0, 1], [3, 1, 2, 0, 1, 3]),  # cut: an end token is put behind it
             ([3, 0], [1, 3], [3, 0, 1, 3]),           # ended: read where it ended
             ([3, 3, 2, 1], [3], [3, 3, 2, 1, 3]),     # ended at once: one token
             ([3, 2], [1], [3, 2, 1, 3]),
             # cut at the end of the tensor; 3s in the prompt end nothing
             ([3, 3, 1, 2], [0, 1, 2], [3, 3, 1, 2, 0, 1, 2, 3])]
    tokens, actions, mask = torch.full((5, 7), 2), torch.zeros(5, 3).long(), torch.zeros(5, 3) > 0
    for b, (x, y, _) in enumerate(cases):
        tokens[b, :len(x + y)] = torch.tensor(x + y)
        actions[b, :len(y)], mask[b, :len(y)] = torch.tensor(y), True
    actions[3, 2] = 3  # an end token in the padding ends nothing either
    batch = Rollout(tokens.clone(), torch.tensor([len(x) for x, _, _ in cases]), actions, mask,
                    torch.zeros(5, 3))
    scores = rlhf.reward_scores(model, batch)
    close(scores, torch.cat([model(torch.tensor([read]), torch.tensor([len(read)]))
                             for _, _, read in cases]))
    assert not scores.requires_grad and torch.equal(batch.tokens, tokens)
    assert rlhf.ends(batch, 3).tolist() == [False, True, True, False, False]


# =================================================================================================
# 2. Trajectories
# =================================================================================================

@SEEDS
def test_probabilities_of_all_trajectories_sum_to_one(seed):
    """Σ_τ p_θ(τ) = 1, p_θ(τ) = p(x) Π_t π_θ(a_t|s_t): the list that proofs rest on is complete."""
    w = listed(seed)
    close(w.p.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert len(w.p) == 80 and w.p.min() > 0


def test_gather_log_probs_is_the_log_softmax_at_the_action():
    """log π(a_t|s_t) = logits[a_t] − log Σ_a exp logits[a], by NumPy; overflow-free."""
    logits, actions = normal(2, 3, 4), torch.randint(4, (2, 3), generator=draws())
    z, a = logits.numpy(), actions.numpy()
    close(gather_log_probs(logits, actions),
          np.take_along_axis(z, a[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1)))
    assert gather_log_probs(torch.tensor([[[1e4, 0.0]]]), torch.tensor([[0]])) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_samples_each_trajectory_with_its_probability(temperature):
    """P(τ is sampled) = p_θ(τ): chi-square over every trajectory of both prompts."""
    w, n = listed(1), 20_000
    r = rollout(w.gpt, [list(x) for x in RAGGED] * n, 3, 3, temperature, draws(4))
    log_probs = w.world.read(w.world.table(w.gpt, temperature)).detach()

    def names(x):  # (P, a_0, a_1, …) of each row: no two trajectories share it
        return [(P, *a[:T]) for P, a, T in zip(x.prompt_lengths.tolist(), x.actions.tolist(),
                                               x.mask.sum(1).tolist())]

    index = {name: i for i, name in enumerate(names(w.world))}
    which = torch.tensor([index[name] for name in names(r)])
    close(r.log_probs, log_probs[which])  # what it reports is what it sampled from
    expected = 2 * n * w.world.probability(log_probs)
    counts, common = torch.bincount(which, minlength=80), expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])  # the rare ones as one
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-9)])
    chi2, k = float(((observed - expected)**2 / expected).sum()), len(expected) - 2
    print(f"temperature {temperature}: chi-square {chi2:.1f} with {k} degrees of freedom")
    assert k > 40 and chi2 < k + 4 * math.sqrt(2 * k)


def test_inverse_transform_takes_the_first_token_whose_cumulative_probability_exceeds_u():
    """a = min{a : Σ_{a' <= a} π(a') > u}: u = 0 never gives a token of probability 0."""
    log_p = torch.tensor([0.0, 0.25, 0.5, 0.25], dtype=torch.float64).log().expand(6, 4)
    u = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 1e-12], dtype=torch.float64)
    assert rlhf.sample_tokens(log_p, u).tolist() == [1, 1, 2, 2, 3, 3]
    short = torch.tensor([[0.2, 0.2]], dtype=torch.float64).log()  # rounding: a sum other than 1
    for u, token in ((0.6, 1), (1.0, 1), (0.4, 0)):
        assert rlhf.sample_tokens(short, torch.tensor([u], dtype=torch.float64)) == token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cache_ragged_prompts_and_early_ends_change_nothing(temperature):
    """log π(a_t|s_t) reported while sampling = that of a fresh pass over each row alone."""
    gpt = tiny_gpt(2, vocab=7, layers=2, heads=2, width=8, context=24)
    prompts = [[6], [6, 1, 2, 3, 4, 5, 0, 1], [6, 6, 2], [6, 4]] * 12
    r = rollout(gpt, prompts, 12, 6, temperature, draws())
    lengths = r.mask.sum(1).tolist()
    assert len(set(lengths)) > 6 and max(lengths) == 12 and min(lengths) < 3  # a real test
    assert r.tokens.shape == (48, 8 + 12) and r.log_probs.dtype == torch.float64
    assert r.prompt_lengths.tolist() == [len(x) for x in prompts]
    for b, (prompt, n) in enumerate(zip(prompts, lengths)):
        actions = r.actions[b, :n].tolist()
        assert r.tokens[b].tolist() == prompt + actions + [0] * (20 - len(prompt) - n)
        assert r.mask[b].tolist() == [t < n for t in range(12)]
        assert 6 not in actions[:-1] and (actions[-1] == 6 or n == 12)  # ends at the end token only
        assert not r.actions[b, n:].any() and not r.log_probs[b, n:].any()
        alone = gpt(torch.tensor([prompt + actions]))[0, len(prompt) - 1:-1] / temperature
        close(r.log_probs[b, :n], F.log_softmax(alone, -1)[range(n), actions])


def test_rollout_is_a_function_of_its_generator_and_each_row_has_draws_of_its_own():
    """τ_b depends on the seed and its own draws: what a neighbour does changes nothing."""
    gpt, lengths = tiny_gpt(2, vocab=7, width=8, context=24), set()

    def responses(prompts, seed):
        r = rollout(gpt, prompts, 6, 6, generator=draws(seed))
        close(r.log_probs[0, 0], log_pi(gpt, prompts[0])[r.actions[0, 0]])  # temperature 1
        T = int(r.mask.sum(1).max())  # as long as the longest response, and no longer
        assert r.actions.shape == r.mask.shape == r.log_probs.shape == (len(prompts), T)
        assert r.tokens.shape[1] == max(map(len, prompts)) + T and not r.log_probs.requires_grad
        lengths.add(T)
        return [a[m].tolist() for a, m in zip(r.actions, r.mask)]

    eight = responses([[6, 1]] * 8, 0)
    assert eight == responses([[6, 1]] * 8, 0) != responses([[6, 1]] * 8, 1)
    assert eight[:7] == responses([[6, 1]] * 7 + [[6, 2, 3]], 0)[:7]
    assert len(set(map(tuple, eight))) > 3
    for seed in range(8):
        responses([[6, 1]], seed)
    assert len(lengths) > 1


def test_rollout_says_in_one_line_what_it_cannot_do():
    """P >= 1 and P + T_max <= context: a longer row would have no position embedding."""
    gpt = tiny_gpt(context=8)
    assert rollout(gpt, [[3] * 5], 3, 3).tokens.shape[1] <= 8  # 5 + 3 just fits
    with pytest.raises(ValueError, match="begin every prompt with the end token"):
        rollout(gpt, [[3], []], 2, 3)
    with pytest.raises(ValueError, match=r"prompt 6 \+ max_new_tokens 3 .* context of 8 tokens$"):
        rollout(gpt, [[3], [3] * 6], 3, 3)
    for temperature in (0.0, -1.0):  # a division by 0, or the order turned round
        with pytest.raises(ValueError, match="expected more than 0"):
            rollout(gpt, [[3]], 4, 3, temperature)


# =================================================================================================
# 3. REINFORCE
# =================================================================================================

@SEEDS
def test_reinforce_is_unbiased(seed):
    """∇J = E_τ[∇log p_θ(τ) R(τ)], with ∇log p_θ(τ) = Σ_t ∇log π_θ(a_t|s_t)."""
    w = listed(seed)
    total = w.rewards.sum(1, keepdim=True).expand_as(w.rewards)
    mean, _ = moments(w.p, policy_gradients(w, total))
    close(mean, w.grad_J)
    assert w.grad_J.norm() > 0.1


def test_policy_gradient_loss_is_a_sum_over_steps_and_a_mean_over_trajectories():
    """L = −(1/N) Σ_i Σ_t log π(a_t|s_t) w_t: dividing by tokens would favour short responses."""
    log_probs = f64([[-1.0, -2.0, -3.0], [-4.0, 9e9, 9e9]], requires_grad=True)
    weights = f64([[1.0, 0.5, -1.0], [2.0, 9e9, -9e9]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = policy_gradient_loss(log_probs, weights, mask)
    close(loss, -(-1 - 1 + 3 - 8) / 2)
    loss.backward()
    close(log_probs.grad, -weights * mask / 2)
    assert weights.grad is None  # weights are constants, also when they come from a critic


# =================================================================================================
# 4. Variance: rewards-to-go, a baseline, the advantage
# =================================================================================================

def weights_of_the_lecture(w):
    """The four weights w_t of ∇log π(a_t|s_t), each said to have less variance than the last."""
    to_go = rewards_to_go(w.rewards, w.mask)
    return {"REINFORCE": w.rewards.sum(1, keepdim=True).expand_as(to_go), "rewards-to-go": to_go,
            "baseline": to_go - w.values, "advantage": gae(w.rewards, w.values, w.mask, lam=0.0)}


def test_rewards_to_go_by_hand():
    """R_t = r_t + γ R_{t+1}: r = (1, 2, 8), γ = ½ gives R = (1 + ½ · 6, 2 + ½ · 8, 8)."""
    rewards, mask = f64([[1.0, 2.0, 8.0], [1.0, 2.0, 9e9]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    close(rewards_to_go(rewards, mask, gamma=0.5), [[4.0, 6.0, 8.0], [2.0, 2.0, 0.0]])
    close(rewards_to_go(rewards, mask), [[11.0, 10.0, 8.0], [3.0, 2.0, 0.0]])
    close(rewards_to_go(rewards[:, :1], mask[:, :1]), [[1.0], [1.0]])  # responses of one token
    whole = torch.tensor([[0, 0, 1]])  # no reward is cut to a whole number
    assert rewards_to_go(whole, torch.ones(1, 3), 0.5).tolist() == [[0.25, 0.5, 1.0]]


@SEEDS
def test_the_exact_value_is_the_expected_reward_to_go(seed):
    """V(s) = E[R_t | s_t = s]: the helper's recursion against the list."""
    w = listed(seed)
    to_go = rewards_to_go(w.rewards, w.mask)
    for s in range(len(w.world.states)):
        through = (w.world.state_of == s) & w.mask
        p = w.p[:, None].expand_as(w.mask)[through]
        close(w.values[through][0], (p * to_go[through]).sum() / p.sum())


@SEEDS
@pytest.mark.parametrize("name", ["rewards-to-go", "baseline", "advantage"])
def test_rewards_to_go_a_baseline_and_the_advantage_keep_the_expectation(seed, name):
    """∇J = E[Σ_t ∇log π(a_t|s_t) w_t] for w_t = R_t, then R_t − V(s_t), then A(s_t, a_t).

    What was earned before a_t, and whatever depends on s_t alone, has expectation 0 against
    ∇log π(a_t|s_t), because Σ_a π(a|s) ∇log π(a|s) = ∇Σ_a π(a|s) = ∇1 = 0.
    """
    w = listed(seed)
    close(moments(w.p, policy_gradients(w, weights_of_the_lecture(w)[name]))[0], w.grad_J)


@SEEDS
def test_variance_falls_from_reinforce_to_rewards_to_go_to_baseline_to_advantage(seed):
    """tr Cov[Σ_t ∇log π(a_t|s_t) w_t], exact, falls at each step of the lecture."""
    w = listed(seed)
    variances = {name: float(moments(w.p, policy_gradients(w, weights))[1])
                 for name, weights in weights_of_the_lecture(w).items()}
    print(f"\nexact variance of the gradient (trace of its covariance), world {seed}")
    for name, variance in variances.items():
        print(f"    {name:15}{variance:9.4f}{variance / variances['REINFORCE']:8.1%}")
    falling = list(variances.values())
    assert all(b < 0.95 * a for a, b in zip(falling, falling[1:]))
    table = (REPO / "README.md").read_text("utf-8").split("| w_t | world 0 ")[1].splitlines()[2:6]
    assert [float(row.split("|")[2 + seed]) for row in table] == [round(v, 1) for v in falling]


@SEEDS
def test_a_baseline_that_depends_on_the_action_is_biased(seed):
    """E[Σ_t ∇log π(a_t|s_t) b(s_t, a_t)] ≠ 0: taking off Q(s_t, a_t) takes off the gradient."""
    w = listed(seed)
    to_go = rewards_to_go(w.rewards, w.mask)
    Q = gae(w.rewards, w.values, w.mask, lam=0.0) + w.values
    mean, _ = moments(w.p, policy_gradients(w, to_go - Q))
    close(mean, torch.zeros_like(mean))
    mean, _ = moments(w.p, policy_gradients(w, to_go - 0.5 * w.world.actions))
    assert (mean - w.grad_J).norm() > 0.1


# =================================================================================================
# 5. Generalised advantage estimation
# =================================================================================================

def test_gae_worked_by_hand():
    """A_t = δ_t + γλ A_{t+1} with γ = 1, λ = ½, r = (0, 0, 1), V = (0.2, 0.4, 0.8):

    δ = (0 + 0.4 − 0.2, 0 + 0.8 − 0.4, 1 + 0 − 0.8) = (0.2, 0.4, 0.2)
    A = (0.2 + ½ · 0.5, 0.4 + ½ · 0.2, 0.2)         = (0.45, 0.5, 0.2)

    And with γ = λ = ½:  δ = (0.2 − 0.2, 0.4 − 0.4, 0.2) = (0, 0, 0.2),  A = (0.0125, 0.05, 0.2).
    """
    r, values, mask = f64([[0.0, 0.0, 1.0]]), f64([[0.2, 0.4, 0.8]]), torch.ones(1, 3)
    close(gae(r, values, mask, 1.0, 0.5), [[0.45, 0.5, 0.2]])
    close(gae(r, values, mask, 0.5, 0.5), [[0.0125, 0.05, 0.2]])
    close(gae(r, values, mask), gae(r, values, mask, 1, 0.95))
    close(gae(r[:, 2:], values[:, 2:], mask[:, 2:]), [[0.2]])  # a response of one token
    close(gae(r.long(), values, mask, 1.0, 0.5), f64([[0.45, 0.5, 0.2]]))  # nothing is cut to whole


def wrong_critic(w):
    """V, made wrong: a random error for each state."""
    error = 0.7 * normal(len(w.world.states), seed=9)
    return (w.values + error[w.world.state_of]).where(w.mask, 0)


@SEEDS
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_rewards_to_go_minus_V_and_lambda_0_the_td_error(seed, gamma):
    """λ = 1: A_t = R_t − V(s_t);  λ = 0: A_t = δ_t = r_t + γ V(s_{t+1}) − V(s_t)."""
    w = listed(seed)
    v = wrong_critic(w)
    close(gae(w.rewards, v, w.mask, gamma, 1.0), rewards_to_go(w.rewards, w.mask, gamma) - v)
    v_next = F.pad(v, (0, 1))[:, 1:]  # 0 after the last action: nothing more is earned
    close(gae(w.rewards, v, w.mask, gamma, 0.0), w.rewards + gamma * v_next - v)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.6), (1.0, 0.3)])
def test_gae_is_the_weighted_sum_of_the_n_step_estimates(gamma, lam):
    """A_t = (1−λ) (Â¹ + λ Â² + λ² Â³ + …), Âⁿ_t = Σ_{k<n} γ^k r_{t+k} + γⁿ V_{t+n} − V_t.

    All Âⁿ that reach the end are equal, so the first that does, the m-th, has all the weight that
    is left: (1−λ)(λ^{m−1} + λ^m + …) = λ^{m−1}. With m = 2 that is (1−λ) Â¹ + λ Â².
    """
    w = listed(0)
    values = wrong_critic(w)
    got = gae(w.rewards, values, w.mask, gamma, lam)
    for i, length in enumerate(w.lengths.tolist()):
        r, v = w.rewards[i, :length].tolist(), values[i, :length].tolist() + [0.0]
        for t in range(length):
            n_step = [sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] - v[t]
                      for n in range(1, length - t + 1)]  # Â¹, Â², …, Âᵐ
            expected = sum((1 - lam) * lam**k * A for k, A in enumerate(n_step[:-1]))
            close(got[i, t], expected + lam**(len(n_step) - 1) * n_step[-1])
    assert not got[~w.mask].any()


def test_gae_is_a_linear_recursion():
    """A = δ + γλ S A, S the shift by one step: solved at once, (I − γλ S) A = δ, by NumPy."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9))
    lengths = np.array([9, 1, 4, 8, 2, 6])
    mask = np.arange(9) < lengths[:, None]
    got = gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), 0.97, 0.9).numpy()
    for b, n in enumerate(lengths):
        S = np.eye(n, k=1)
        delta = rewards[b, :n] + 0.97 * S @ values[b, :n] - values[b, :n]
        expected = np.linalg.solve(np.eye(n) - 0.97 * 0.9 * S, delta)
        np.testing.assert_allclose(got[b, :n], expected, atol=1e-12)
        assert not got[b, n:].any()


@SEEDS
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_unbiased_for_every_lambda_when_V_is_exact(seed, lam):
    """E[Σ_t ∇log π(a_t|s_t) A_t^λ] = ∇J if V = V^π: later δ have expectation 0 given a_t."""
    w = listed(seed)
    A = gae(w.rewards, w.values, w.mask, lam=lam)
    close(moments(w.p, policy_gradients(w, A))[0], w.grad_J)


@SEEDS
def test_with_a_wrong_V_bias_falls_and_variance_rises_with_lambda(seed):
    """‖E ĝ_λ − ∇J‖ falls to 0 as λ → 1 while tr Cov ĝ_λ rises, here for a critic at half of V."""
    w = listed(seed)
    half, bias, variance = 0.5 * w.values, [], []  # a critic that has learned half of the value
    for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
        mean, trace = moments(w.p, policy_gradients(w, gae(w.rewards, half, w.mask, lam=lam)))
        bias.append(float((mean - w.grad_J).norm()))
        variance.append(float(trace))
    print(f"\nlambda 0, ¼, ½, ¾, 1 in world {seed}: bias {[f'{b:.3f}' for b in bias]}, "
          f"variance {[f'{v:.3f}' for v in variance]}")
    assert bias[0] > 0.02 and bias[-1] < 1e-10
    assert all(b < a for a, b in zip(bias, bias[1:]))
    assert all(b > a for a, b in zip(variance, variance[1:]))


# =================================================================================================
# 6. Importance sampling
# =================================================================================================

@functools.cache
def moved(seed, distance):
    """θ moved away from θ_old = listed(seed)'s: (log π of its trajectories (N, T), policy)."""
    w, generator = listed(seed), draws(77)
    policy = copy.deepcopy(w.gpt)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(distance * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return w.world.read(w.world.table(policy)), policy


@SEEDS
def test_the_product_of_ratios_turns_an_expectation_under_pi_old_into_one_under_pi(seed):
    """E_π[f] = E_{π_old}[Π_t π(a_t|s_t) / π_old(a_t|s_t) · f(τ)], exactly, however far apart."""
    w, one = listed(seed), torch.ones(1, 1)
    log_probs, R = moved(seed, 0.3)[0].detach(), w.rewards.sum(1)
    new, old = log_probs.sum(1), w.log_probs.sum(1)  # a response as one action: its ρ is Π_t ρ_t
    weighed = torch.stack([-ppo_policy_loss(*(x.view(1, 1) for x in row), one, clip=1e9)
                           for row in zip(new, old, R)])                   # (N,) ρ R(τ)
    J = w.world.probability(log_probs) @ R
    close(w.p @ weighed, J)
    assert abs(J - w.J) > 1e-3  # without the ratios it is another number


@SEEDS
def test_the_per_token_surrogate_has_the_right_gradient_at_theta_old_and_departs_from_it(seed):
    """∇E_old[Σ_t ρ_t A_t] = ∇J at θ = θ_old. Further off, the states that π visits have changed:

    ρ_t reweighs a_t but not s_t, whose own weight is the product of the ratios before it.
    """
    w = listed(seed)
    A = gae(w.rewards, w.values, w.mask, lam=0.0)
    errors = []
    for distance in (0.0, 0.01, 0.1, 0.5):
        log_probs, policy = moved(seed, distance)
        J = (w.world.probability(log_probs) * w.rewards.sum(1)).sum()
        surrogate = -sum(  # the loss is a mean over tokens: times their number, it is a sum
            p * n * ppo_policy_loss(log_probs[i:i + 1], w.log_probs[i:i + 1], A[i:i + 1],
                                    w.mask[i:i + 1], clip=1e9)
            for i, (p, n) in enumerate(zip(w.p, w.lengths)))
        errors.append(float((flat_grad(surrogate, policy) - flat_grad(J, policy)).norm()))
    print(f"\nworld {seed}: |∇surrogate − ∇J| {[f'{e:.1e}' for e in errors]}")
    assert errors[0] < 1e-10 and errors[1] > 1e-3 and errors == sorted(errors)


# =================================================================================================
# 7. PPO's loss
# =================================================================================================

@SEEDS
def test_the_gradient_of_ppos_loss_at_theta_old_is_the_policy_gradient(seed):
    """ρ_t = 1 there: ∇E Σ_t min(ρA, clip(ρ)A) = E Σ_t A_t ∇log π(a_t|s_t) = ∇J."""
    w = listed(seed)
    A = gae(w.rewards, w.values, w.mask)
    each = gradients(w, lambda log_probs, row: w.lengths[row.start] * ppo_policy_loss(
        log_probs, w.log_probs[row], A[row], w.mask[row]))
    close(moments(w.p, each)[0], w.grad_J)


SIGN_CASES = {  # ratio ρ, advantage A: the value of min(ρA, clip(ρ)A), its derivative by log π
    "good and already more likely: clipped": (1.5, 2.0, 1.2 * 2.0, 0.0),
    "good and less likely: pulled back in full": (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),
    "bad and already less likely: clipped": (0.5, -2.0, 0.8 * -2.0, 0.0),
    "bad and more likely: pushed down in full": (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),
    "good, within the clip": (1.1, 2.0, 1.1 * 2.0, 1.1 * 2.0),
    "bad, within the clip": (0.9, -2.0, 0.9 * -2.0, 0.9 * -2.0)}


@pytest.mark.parametrize("case", SIGN_CASES)
def test_the_gradient_is_zero_where_clipping_binds_and_whole_on_the_pessimistic_side(case):
    """∂/∂log π of min(ρA, clip(ρ, 0.8, 1.2)A) = ρA, or exactly 0 where the clipped side is less."""
    ratio, advantage, value, slope = SIGN_CASES[case]
    log_probs = f64([[math.log(ratio) - 1.3]], requires_grad=True)
    loss = ppo_policy_loss(log_probs, f64([[-1.3]]), f64([[advantage]]), torch.ones(1, 1))
    loss.backward()
    close(loss, -value)
    close(log_probs.grad, [[-slope]], 1e-10 if slope else 0)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_ppos_objective_is_a_lower_bound_of_the_unclipped_surrogate(clip):
    """min(ρA, clip(ρ)A) <= ρA for each token, equal where ρ is within 1 ± ε; then their mean."""
    old, noise, A = normal(3, 40, 5)
    new, mask = old + 0.4 * noise, torch.rand(40, 5, generator=draws()) < 0.7
    ratio = (new - old).exp()
    each = torch.stack([-ppo_policy_loss(*(x.view(1, 1) for x in token), torch.ones(1, 1), clip)
                        for token in zip(new.flatten(), old.flatten(), A.flatten())]).view(40, 5)
    assert (each <= ratio * A).all() and (each < ratio * A).float().mean() > 0.1
    inside = (ratio - 1).abs() < clip
    close(each[inside], (ratio * A)[inside])
    r, a = ratio.numpy(), A.numpy()
    close(each, np.minimum(r * a, np.clip(r, 1 - clip, 1 + clip) * a))
    close(ppo_policy_loss(new, old, A, mask, clip), -each[mask].mean())
    close(ppo_policy_loss(new, old, A, mask), ppo_policy_loss(new, old, A, mask, 0.2))


def test_the_value_loss_is_the_pessimistic_of_two_squares():
    """½ E max((V − R)², (clip(V, V_old ± ε) − R)²), an upper bound of the plain square."""
    values, old, R = normal(3, 40, 5)
    mask = torch.rand(40, 5, generator=draws()) < 0.7
    v, o, r = values.numpy(), old.numpy(), R.numpy()
    for clip in (0.2, 0.6):
        terms = np.maximum((v - r)**2, (np.clip(v, o - clip, o + clip) - r)**2)
        got = value_loss(values, old, R, mask, clip)
        close(got, 0.5 * terms[mask.numpy()].mean())
        assert got > 0.5 * ((values - R)**2)[mask].mean()
    close(value_loss(values, old, R, mask), value_loss(values, old, R, mask, 0.2))


@pytest.mark.parametrize("value, R, slope", [
    (1.5, 2.0, 0.0),    # it moved towards R, by more than ε: no gain from going further
    (0.5, -1.0, 0.0),
    (1.5, -1.0, 2.5),   # it moved away: pulled back in full
    (0.5, 2.0, -1.5),
    (1.1, 2.0, -0.9)])  # within ε
def test_the_gradient_of_the_value_loss_is_zero_where_clipping_binds(value, R, slope):
    """∂/∂V ½ max((V − R)², (clip(V, 1 ± 0.2) − R)²) = V − R, or 0 where the clipped is larger."""
    values = f64([[value]], requires_grad=True)
    value_loss(values, f64([[1.0]]), f64([[R]]), torch.ones(1, 1)).backward()
    close(values.grad, [[slope]], 1e-10 if slope else 0)


@SEEDS
def test_entropy_is_exact(seed):
    """H = −Σ_a π(a|s) log π(a|s), averaged over the valid steps of ragged rows."""
    w = listed(seed)
    log_p = w.world.table(w.gpt).detach()
    by_state = torch.tensor(-(np.exp(log_p.numpy()) * log_p.numpy()).sum(1))
    logits = log_p[w.world.state_of] + 5 * normal(80, 3, 1)  # a constant changes no softmax
    close(entropy(logits, w.mask), by_state[w.world.state_of[w.mask]].mean())


def test_entropy_is_largest_when_uniform():
    """H[π] <= log V, with equality for equal logits, where its gradient vanishes."""
    one = torch.ones(1, 1)
    for size in (2, 5):
        logits = torch.full((1, 1, size), 3.0, dtype=torch.float64, requires_grad=True)
        H = entropy(logits, one)
        close(H, math.log(size))
        H.backward()
        assert logits.grad.abs().max() < 1e-12
        assert 0 < entropy(normal(1, 1, size), one) < math.log(size)
    assert entropy(torch.tensor([[[0.0, 1e4]]]), one) == 0  # not NaN: 0 log 0 = 0


def test_masked_mean_and_whiten_are_those_of_the_valid_entries():
    """Σ m x / Σ m;  (x − mean) / std over the valid entries, 0 elsewhere."""
    x, mask = f64([[1.0, 3.0, 9e9], [8.0, -9e9, 9e9]]), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    close(masked_mean(x, mask), 4.0)
    valid = np.array([1.0, 3.0, 8.0])
    a, b, c = (valid - valid.mean()) / valid.std()
    close(whiten(x, mask), [[a, b, 0], [c, 0, 0]], 1e-8)
    assert masked_mean(x, torch.zeros(2, 3)) == 0  # nothing valid: no division by 0
    assert (whiten(torch.ones(2, 3).double(), mask) == 0).all()  # no spread: nor here
    coarse = torch.tensor([[100.0, 101.0, 102.0]]).bfloat16()  # steps of 0.5: a sum would lose them
    assert whiten(coarse, torch.ones(1, 3)).tolist()[0] == pytest.approx(
        [-1.5**0.5, 0, 1.5**0.5], rel=2**-9)


# =================================================================================================
# 8. The KL penalty
# =================================================================================================

def pair_of_policies(seed, distance):
    """(π = listed(seed), log π_ref (N, T), KL(π‖π_ref) = Σ_s P(s) KL(π(·|s)‖π_ref(·|s)))."""
    w = listed(seed)
    ref_log_probs, ref = moved(seed, distance)
    pi, log_ref = w.world.table(w.gpt).detach(), w.world.table(ref).detach()
    by_state = (pi.exp() * (pi - log_ref)).sum(1)
    visits = torch.zeros_like(by_state)  # P(s): how often π comes to s
    visits.index_add_(0, w.world.state_of[w.mask], w.p[:, None].expand_as(w.mask)[w.mask])
    return w, ref_log_probs.detach(), (visits * by_state).sum()


@SEEDS
def test_the_kl_penalties_of_a_trajectory_have_expectation_minus_beta_kl(seed):
    """E_π Σ_t −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) = −β KL(π‖π_ref).

    With the score on top, E_π Σ_t r_t = J(π) − β KL(π‖π_ref): the objective of RLHF.
    """
    w, ref, kl = pair_of_policies(seed, 0.2)
    zero = torch.zeros(len(w.p), dtype=torch.float64)
    penalties = kl_penalized_rewards(zero, w.log_probs, ref, w.mask, 0.3)
    close((w.p * penalties.sum(1)).sum(), -0.3 * kl)
    assert kl > 0.05
    rewards = kl_penalized_rewards(w.rewards.sum(1), w.log_probs, ref, w.mask, 0.3)
    close((w.p * rewards.sum(1)).sum(), w.J - 0.3 * kl)
    log_probs = w.world.read(w.world.table(w.gpt))  # here ∇ does run through the log π in r_t
    objective = w.world.probability(log_probs) * (
        w.rewards.sum(1) - 0.3 * (log_probs - ref).sum(1))
    estimates = policy_gradients(w, rewards_to_go(rewards, w.mask))  # and here it need not
    close(moments(w.p, estimates)[0], flat_grad(objective.sum(), w.gpt))


@SEEDS
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(seed):
    """E_π Σ −Δ = E_π Σ (e^Δ − 1 − Δ) = KL(π‖π_ref), Δ = log π_ref − log π; e^x >= 1 + x."""
    for distance in (0.05, 0.4):
        w, ref, kl = pair_of_policies(seed, distance)
        k1, k3 = kl_estimates(w.log_probs, ref, w.mask)
        assert k1.shape == k3.shape == (80,)
        close((w.p * k1).sum(), kl)
        close((w.p * k3).sum(), kl)
        assert k3.min() >= 0 > k1.min()


@SEEDS
def test_k3_has_the_lower_variance_near_the_reference(seed):
    """Near π_ref (Var k1 ~ KL, Var k3 ~ KL²) Var k3 is less than a fifth of Var k1."""
    w, ref, kl = pair_of_policies(seed, 0.05)
    k1, k3 = [float(w.p @ (k - kl)**2) for k in kl_estimates(w.log_probs, ref, w.mask)]
    print(f"\nworld {seed}: KL {float(kl):.5f}, variance of k1 {k1:.2e}, of k3 {k3:.2e}")
    assert k3 < k1 / 5


@SEEDS
def test_reversed_k3_is_wrong(seed):
    """E_π Σ (e^{−Δ} − 1 + Δ) ≠ KL(π‖π_ref): with Δ turned round it reads many times too high."""
    w, ref, kl = pair_of_policies(seed, 0.8)
    _, reversed_k3 = kl_estimates(ref, w.log_probs, w.mask)
    reads = float((w.p * reversed_k3).sum() / kl)
    print(f"\nworld {seed}: reversed k3 reads {reads:.1f} times the KL")
    assert reads > 2


def test_the_adaptive_coefficient_rises_above_the_target_and_falls_below_it():
    """β ← β (1 + 0.1 · clip(KL / target − 1, ±0.2))  (Ziegler et al. 2019, section 2.2)."""
    for kl, expected in ((6.0, 0.1), (6.6, 0.101), (5.4, 0.099),
                         (600.0, 0.102), (0.0, 0.098)):  # the last two are clipped
        assert adapt_kl_coef(0.1, kl, 6.0) == pytest.approx(expected, abs=1e-15)


# =================================================================================================
# 9. The optimum
# =================================================================================================

def structured_score(response):
    """A reward with structure: tokens and pairs of tokens that are liked or not, and length."""
    score = sum((0.5, -0.5, 0.2, 0.0, 0.3)[a] for a in response) - 0.1 * len(response)
    for pair in zip(response, response[1:]):
        score += {(2, 3): 1.0, (0, 0): -1.2}.get(pair, 0.0)
    return score


def score_rollout(r):
    return torch.tensor([structured_score(a[m].tolist()) for a, m in zip(r.actions, r.mask)])


# Config as shipped, but for sizes and a learning rate that suit a few thousand parameters.
OPTIMUM_CONFIG = dict(max_new_tokens=4, block_size=16, temperature=1.0, missing_eos_score=None,
                      ppo_iterations=100, ppo_batch_size=512, minibatch_size=128, ppo_epochs=2,
                      ppo_lr=2e-3)
OPTIMUM_PROMPTS = [(4, 1), (4, 2, 0, 3)]


@functools.cache
def optimum_world():
    """(world, r(x, y) (N,), π_ref, log π_ref(y|x) (N,)): the log-probs of whole responses."""
    world = World(OPTIMUM_PROMPTS, 5, 4)
    reference = tiny_gpt(0, vocab=5, width=16, context=16, std=0.1).float()
    return world, score_rollout(world).double(), reference, response_log_probs(world, reference)


@torch.no_grad()
def response_log_probs(world, policy):
    return world.read(world.table(policy)).double().sum(1)


def objective(log_p, beta):
    """J = E_π[r] − β KL(π‖π_ref), exact, of any distribution log_p (N,) over responses."""
    world, scores, _, log_ref = optimum_world()
    return float((log_p.exp() * (scores - beta * (log_p - log_ref))).sum() / len(world.prompts))


def optimum(beta):
    """(β log Z(x) averaged over prompts, log π*): Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β)."""
    world, scores, _, log_ref = optimum_world()
    tilted = (log_ref + scores / beta).view(len(world.prompts), -1)
    return float(beta * tilted.logsumexp(1).mean()), tilted.log_softmax(1).flatten()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_is_the_reference_tilted_by_the_reward(beta):
    """max_π E[r] − β KL(π‖π_ref) = β log Z at π* ∝ π_ref exp(r/β); any π loses β KL(π‖π*)."""
    best, log_best = optimum(beta)
    assert abs(objective(log_best, beta) - best) < 1e-10
    for step in (-0.5, 0.01, 1.0):
        log_p = (log_best + step * normal(len(log_best))).view(2, -1).log_softmax(1).flatten()
        kl = float((log_p.exp() * (log_p - log_best)).sum() / 2)
        assert kl > 0 and abs(objective(log_p, beta) - (best - beta * kl)) < 1e-10


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_train_ppo_reaches_99_hundredths_of_the_way_to_the_optimum(beta):
    """(J(π) − J(π_ref)) / (β log Z − J(π_ref)) >= 0.99: what is missing is sampling noise."""
    world, _, reference, log_ref = optimum_world()
    policy = ActorCritic(reference)
    train_ppo(policy, reference, score_rollout, [list(x) for x in OPTIMUM_PROMPTS],
              Config(kl_coef=beta, **OPTIMUM_CONFIG))
    start, end = objective(log_ref, beta), objective(response_log_probs(world, policy), beta)
    best, _ = optimum(beta)
    share = (end - start) / (best - start)
    print(f"\nβ = {beta}: J from {start:.4f} to {end:.4f} of at most {best:.4f}, {share:.4f}")
    assert 0.99 <= share <= 1 + 1e-6


# =================================================================================================
# 10. The plumbing: what users of other libraries stumble over
# =================================================================================================

def experience_of(policy, reference, seed=0, **settings):
    """A batch of experience on ragged prompts, with a score that depends on the response."""
    config = Config(**dict(max_new_tokens=5, block_size=12, ppo_batch_size=12, minibatch_size=12,
                           ppo_epochs=1, kl_coef=0.3, missing_eos_score=None) | settings)
    return collect(policy, reference, score_rollout, [list(x) for x in RAGGED] * 6, config,
                   draws(seed)), config


def sgd(model, lr):
    """Plain gradient descent: the step is −lr times the gradient, so it shows the gradient."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def updated(policy, experience, config, lr=0.1, seed=0):
    """(a copy of the policy after ppo_update, its metrics)."""
    learner = copy.deepcopy(policy)
    return learner, ppo_update(learner, sgd(learner, lr), experience, config, draws(seed))


def same(a, b):
    """Whether two models, or two dictionaries of weights, are equal to the last bit."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_no_ratio_other_than_1_before_the_first_update(monkeypatch):
    """ρ_t = π/π_old = 1 exactly at first: a dropout, or a re-tokenised text, would show here."""
    policy, seen = tiny_policy(0).float(), []
    experience, config = experience_of(policy, tiny_gpt(1).float())
    monkeypatch.setattr(rlhf, "ppo_policy_loss", lambda new, old, A, mask, *rest: seen.append(
        torch.equal(new[mask], old[mask])) or ppo_policy_loss(new, old, A, mask, *rest))
    _, metrics = updated(policy, experience, config)
    assert metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0 and metrics["grad_norm"] > 0
    assert seen and all(seen)


def test_no_log_prob_changes_at_a_learning_rate_of_0():
    """θ ← θ − 0 · ∇L: after epochs of minibatches each ratio is still 1, nothing was clipped."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, config = experience_of(policy, reference, ppo_epochs=3, minibatch_size=5)
    learner = copy.deepcopy(policy)
    metrics = ppo_update(learner, rlhf.make_optimizer(learner, 0.0), experience, config)
    assert same(learner, policy)
    assert abs(metrics["approx_kl"]) < 1e-12 and metrics["clip_fraction"] == 0
    assert metrics["updates"] == 9 and metrics["early_stop"] is False  # 3 epochs of 5 + 5 + 2 rows


def test_no_row_reads_differently_when_it_is_padded_by_0_3_or_7():
    """Right-padding and causal attention: what stands behind a row cannot reach it."""
    policy = tiny_policy(0, context=16)
    torch.nn.init.ones_(policy.value_head.weight)
    rows = torch.tensor([[3, 2, 1, 0], [3, 0, 2, 0]])
    steps = torch.tensor([[False, True, True, True], [True, False, True, False]])
    logits, values = (torch.cat([x[:1, 1:].flatten(0, 1), x[1:, 0], x[1:, 2]])
                      for x in policy(rows))
    for padding, token in itertools.product((0, 3, 7), range(4)):
        padded = F.pad(rows, (0, padding), value=token), F.pad(steps, (0, padding))
        more_logits, more_values = policy(*padded)
        close(more_logits, logits, 1e-12)
        close(more_values, values, 1e-12)


@pytest.mark.parametrize("f", [
    reward_model_loss, rlhf.sample_tokens, rollout, gather_log_probs, kl_penalized_rewards,
    rewards_to_go, policy_gradient_loss, gae, masked_mean, whiten, ppo_policy_loss, value_loss,
    entropy, kl_estimates, adapt_kl_coef], ids=lambda f: f.__name__)
def test_a_copied_function_needs_torch_and_what_its_docstring_names(f):
    """What people copy works elsewhere: no global but torch, F and the helpers it says it needs."""
    named = set(re.findall(r"`(\w+)`", f.__doc__.partition("Needs ")[2]))
    assert inspect.getclosurevars(inspect.unwrap(f)).globals.keys() <= named | {"torch", "F"}


def arguments(dtype=torch.float32):
    """Random arguments for every function of (B, T) tensors."""
    names = ("log_probs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages")
    x = {name: normal(6, 5, seed=i).to(dtype) for i, name in enumerate(names)}
    return x | {"logits": normal(6, 5, 3, seed=8).to(dtype), "scores": normal(6).to(dtype),
                "actions": torch.randint(3, (6, 5), generator=draws()),
                "mask": torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]}


def soiled(x, garbage):
    """The same with garbage in the padding, of either sign, so that differences are garbage too."""
    mask, signs = x["mask"], torch.tensor([1.0, -1.0, 0.0])
    dirty = {name: v.where(mask, -garbage if name in ("old", "ref", "returns") else garbage)
             for name, v in x.items() if v.shape == mask.shape and v.is_floating_point()}
    return x | dirty | {"logits": x["logits"].where(mask[..., None], garbage * signs),
                        "actions": x["actions"].where(mask, 2)}


def everything(x):
    """Each function of (B, T) tensors, and its gradients."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("log_probs", "values", "logits")}
    t, mask = SimpleNamespace(**x | leaves), x["mask"]
    k1, k3 = kl_estimates(t.log_probs, t.ref, mask)
    results = {
        "rewards": kl_penalized_rewards(x["scores"], t.log_probs, t.ref, mask, 0.3),
        "to_go": rewards_to_go(t.rewards, mask, 0.9), "whiten": whiten(t.advantages, mask),
        "gae": gae(t.rewards, t.values, mask, 0.9, 0.8), "mean": masked_mean(t.rewards, mask),
        "policy_gradient": policy_gradient_loss(t.log_probs, t.advantages, mask),
        "ppo": ppo_policy_loss(t.log_probs, t.old, t.advantages, mask), "k1": k1, "k3": k3,
        "value": value_loss(t.values, t.old_values, t.returns, mask),
        "entropy": entropy(t.logits, mask),
        "gathered": gather_log_probs(t.logits, t.actions).where(mask, 0)}
    gradients = {
        (name, leaf): grad for name, y in results.items() if y.requires_grad
        for leaf, grad in zip(leaves, torch.autograd.grad(
            y.sum(), [*leaves.values()], retain_graph=True, allow_unused=True,
            materialize_grads=True))}
    return {name: value.detach() for name, value in (results | gradients).items()}


@pytest.mark.parametrize("garbage", [7.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan])
def test_no_garbage_in_the_padding_changes_an_output_bit(garbage):
    """m_t = 0 ⇒ no influence. Multiplying by the mask would not do: exp(1e4) · 0 = NaN."""
    x = arguments()
    clean, dirty = everything(x), everything(soiled(x, garbage))
    for name, value in clean.items():
        if "gathered" in name and not math.isfinite(garbage):
            continue  # it has no mask of its own, so no gradient behind a logit that is not finite
        assert torch.equal(value, dirty[name]), name
        assert torch.equal(value.signbit(), dirty[name].signbit()), name  # -0.0 is another bit
        if value.shape[:2] == x["mask"].shape:
            assert not dirty[name][~x["mask"]].any(), name  # 0 after the end


def test_no_garbage_token_behind_a_row_changes_an_output_bit():
    """Ids in the padding are read by no valid position, whatever they are."""
    policy = tiny_policy(0)
    e, config = experience_of(policy, tiny_gpt(1))
    behind = torch.arange(e.tokens.shape[1]) >= (e.prompt_lengths + e.mask.sum(1))[:, None]
    assert behind.any()
    dirty = dataclasses.replace(
        e, tokens=e.tokens.where(~behind, 2), actions=e.actions.where(e.mask, 1),
        **{name: getattr(e, name).where(e.mask, 1e30) for name in (
            "log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")})
    (a, metrics), (b, dirty_metrics) = (updated(policy, batch, config) for batch in (e, dirty))
    assert metrics == dirty_metrics and same(a, b)


def test_no_score_lands_on_padding_of_short_cut_and_one_token_responses():
    """r_t = −β (log π − log π_ref)_t + [t is the last valid step] r(x, y)."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    log_p = -torch.arange(1.0, 5.0, dtype=torch.float64).expand(3, 4)
    close(kl_penalized_rewards(f64([5.0, -7.0, 11.0]), log_p, 2 * log_p, mask, 0.1),
          [[-0.1, 4.8, 0, 0], [-0.1, -0.2, -0.3, -7.4], [10.9, 0, 0, 0]])


def test_no_end_token_is_without_a_gradient():
    """a_T = end is an action like any other: when it is the pad token too, others mask it away."""
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3)
    at_end, log_probs = (e.actions == 3) & e.mask, e.log_probs.clone().requires_grad_()
    assert 0 < at_end.sum() < 12 and torch.equal(at_end.any(1), rlhf.ends(e, 3))
    ppo_policy_loss(log_probs, e.log_probs, e.advantages, e.mask).backward()
    assert (log_probs.grad[at_end] != 0).all() and not log_probs.grad[~e.mask].any()


def test_no_difference_between_accumulated_gradients_and_one_big_batch():
    """∇ of a mean over all tokens = Σ of the parts' means, each weighed by its share of tokens."""
    w = listed(0)
    A, rows = gae(w.rewards, w.values, w.mask), torch.arange(80)
    new, old = w.log_probs + 0.1 * w.rewards, w.log_probs

    def gradient(part):
        leaf = new.clone().requires_grad_()
        ppo_policy_loss(leaf[part], old[part], A[part], w.mask[part]).backward()
        return leaf.grad * w.mask[part].sum()

    close(sum(map(gradient, rows.split(17))), gradient(rows))
    equal = [policy_gradient_loss(new[part], A[part], w.mask[part]) for part in rows.split(20)]
    close(sum(equal) / 4, policy_gradient_loss(new, A, w.mask))  # a mean over trajectories


def test_no_gradient_is_left_behind_by_an_early_stop():
    """k3 of KL(π_old‖π) > limit: the optimizer takes no step, and no gradient is left behind."""
    policy = tiny_policy(0)
    experience, config = experience_of(policy, tiny_gpt(1), ppo_epochs=4, minibatch_size=4,
                                       early_stop_kl=1e-9)
    optimizer = sgd(policy, 0.1)
    metrics = ppo_update(policy, optimizer, experience, config, draws())
    assert metrics["early_stop"] is True and metrics["updates"] == 1
    assert metrics["tokens"] < experience.mask.sum()  # two minibatches of three, of four epochs
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    assert ppo_update(policy, optimizer, experience, config, draws())["updates"] == 0
    config = dataclasses.replace(config, early_stop_kl=None)
    other, expected = updated(policy, experience, config)  # by an optimizer that saw nothing else
    assert ppo_update(policy, optimizer, experience, config, draws()) == expected
    assert same(policy, other)


def test_no_training_starts_without_a_prompt():
    """An empty list, from a filter that kept nothing, is said by name."""
    policy, train = ppo_stage()
    with pytest.raises(ValueError, match="there is no prompt"):
        train(policy, prompts=[])


def test_a_copy_of_a_frozen_language_model_is_trained_whole():
    """The reference is frozen, the policy and the reward model that start from it are not."""
    lm = tiny_gpt(0).requires_grad_(False)
    for model in (ActorCritic(lm), RewardModel(lm)):
        assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in lm.parameters())


@pytest.mark.parametrize("shape", [(), (1,), (12, 1), (12, 5)])
def test_scores_that_are_not_one_a_trajectory_are_refused(shape):
    """Broadcast, they would become rewards (B, B, T), or one score for all."""
    policy, (_, config) = tiny_policy(0), experience_of(tiny_policy(0), tiny_gpt(1))
    prompts = [list(x) for x in RAGGED] * 6
    with pytest.raises(ValueError, match=rf"shape {re.escape(str(shape))}, expected \(12,\)"):
        collect(policy, tiny_gpt(1), lambda r: torch.zeros(shape), prompts, config, draws())
    assert collect(policy, tiny_gpt(1), lambda r: [1.0] * 12, prompts, config).scores.sum() == 12


def test_no_epoch_follows_an_early_stop_and_no_stop_comes_below_the_limit():
    """The first minibatch with k3 > limit ends all epochs; k3 <= limit goes on, None always."""
    policy = tiny_policy(0)
    experience, config = experience_of(policy, tiny_gpt(1), minibatch_size=1, early_stop_kl=1e-5)
    stopped = 0
    for seed in range(8):
        one, metrics = updated(policy, experience, config, 0.05, seed)
        if metrics["early_stop"]:
            four, same_metrics = updated(policy, experience, dataclasses.replace(
                config, ppo_epochs=4), 0.05, seed)
            assert same(one, four) and metrics == same_metrics
            stopped += 1
    assert stopped >= 4
    for limit in (1e3, None):
        config = dataclasses.replace(config, ppo_epochs=4, early_stop_kl=limit, minibatch_size=4)
        _, metrics = updated(policy, experience, config, 0.05)
        assert metrics["updates"] == 12 and not metrics["early_stop"] and metrics["approx_kl"] > 0
    config = dataclasses.replace(config, ppo_epochs=2, minibatch_size=12, early_stop_kl=None)
    k3 = 2 * updated(policy, experience, config, 0.05)[1]["approx_kl"]  # it is the mean of 0 and k3
    for limit, updates in ((0.99 * k3, 1), (1.01 * k3, 2)):
        near = dataclasses.replace(config, early_stop_kl=limit)
        assert updated(policy, experience, near, 0.05)[1]["updates"] == updates


def test_no_value_of_s0_is_read_behind_the_last_prompt_token():
    """V(s_0) is the value of the prompt alone, at position P−1: it cannot know a_0."""
    policy = tiny_policy(0)
    e, _ = experience_of(policy, tiny_gpt(1))
    close(e.values[:, 0], torch.stack([V(policy, prompt) for prompt in RAGGED * 6]))
    assert len(set(e.actions[::2, 0].tolist())) > 1  # other first tokens, the same value


def test_no_value_but_0_before_training():
    """V_θ(s) = 0 before training, and the trunk is a copy: training leaves the reference alone."""
    gpt = tiny_gpt(0)
    policy, tokens = ActorCritic(gpt), torch.tensor([[3, 1, 2]])
    logits, values = policy(tokens)
    assert not values.any() and values.shape == (1, 3) and values.dtype == torch.float64
    assert torch.equal(logits, gpt(tokens))
    assert not {id(p) for p in gpt.parameters()} & {id(p) for p in policy.parameters()}


def test_no_float64_falls_back_to_float32():
    """Every function returns float64 where it was given float64, and so does `collect`."""
    x = arguments(torch.float64)
    assert {value.dtype for value in everything(x).values()} == {torch.float64}
    assert reward_model_loss(x["scores"], x["scores"]).dtype == torch.float64
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1))
    for name in "log_probs ref_log_probs values scores rewards advantages returns".split():
        assert getattr(e, name).dtype == torch.float64, name


def test_no_loss_is_computed_in_bf16_under_autocast(monkeypatch):
    """log-softmax and losses are float32 even where logits are bf16: 8 bits lose small ratios."""
    narrow, one = normal(1, 5, 4).bfloat16(), torch.ones(1, 5).long()
    for got, exact in ((gather_log_probs(narrow, one), gather_log_probs(narrow.float(), one)),
                       (entropy(narrow, one), entropy(narrow.float(), one))):
        assert got.dtype == torch.float32 and torch.equal(got, exact)
    policy, seen = tiny_policy(0, width=16, std=0.1).float(), []
    for name in ("ppo_policy_loss", "value_loss", "entropy"):
        monkeypatch.setattr(rlhf, name, lambda *a, loss=getattr(rlhf, name): seen.append(
            loss(*a)) or seen[-1])
    # rlhf's own autocast is off on a CPU, and would switch this one off inside of it
    monkeypatch.setattr(rlhf, "autocast", lambda module: contextlib.nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        assert policy(torch.tensor([[3, 1]]))[0].dtype == torch.bfloat16
        e, config = experience_of(policy, tiny_gpt(1).float())
        _, metrics = updated(policy, e, config)
        r = rollout(policy, [[3]], 3, 3)
    assert len(seen) >= 3 and {x.dtype for x in seen} == {torch.float32}
    assert {x.dtype for x in (e.log_probs, e.ref_log_probs, e.values, e.rewards, e.returns,
                              r.log_probs)} == {torch.float32}


def test_no_step_of_the_derivation_is_missing_in_collect():
    """log π, log π_ref and V along τ ~ π; r_t; A_t by GAE; R_t = A_t + V(s_t), not whitened."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    settings = dict(temperature=0.8, gamma=0.9, lam=0.7)
    e, config = experience_of(policy, reference, **settings)
    for b, prompt in enumerate(RAGGED * 6):
        for t in range(int(e.mask[b].sum())):
            state, a = list(prompt) + e.actions[b, :t].tolist(), e.actions[b, t]
            close(e.log_probs[b, t], log_pi(policy, state, 0.8)[a])
            close(e.ref_log_probs[b, t], log_pi(reference, state, 0.8)[a])
            close(e.values[b, t], V(policy, state))
    close(e.scores, score_rollout(e).double())
    close(e.rewards, kl_penalized_rewards(e.scores, e.log_probs, e.ref_log_probs, e.mask, 0.3))
    close(e.advantages, gae(e.rewards, e.values, e.mask, 0.9, 0.7))
    close(e.returns, e.advantages + e.values)
    parts, _ = experience_of(policy, reference, micro_batch_size=5, **settings)  # in smaller passes
    for name in "log_probs ref_log_probs values scores rewards advantages returns".split():
        x = getattr(e, name)
        assert not x.requires_grad and (x.dim() == 1 or not x[~e.mask].any()), name
        close(getattr(parts, name), x, 1e-12)


def test_no_cut_response_gets_the_score_of_one_that_ended():
    """r(x, y) of a response without an end token: missing_eos_score, or reward_fn's if None."""
    (own, _), (fixed, _) = [experience_of(
        tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3, missing_eos_score=score)
        for score in (None, -3.0)]
    ended = rlhf.ends(own, 3)
    assert ended.any() and not ended.all() and (own.scores[~ended] != -3).all()
    close(fixed.scores, own.scores.where(ended, -3.0))
    assert Config().missing_eos_score <= -2  # scores have std 1: lower than nearly all that ended


def written_out(policy, e, c):
    """L = −L_clip + c1 L_VF − c2 H and its metrics for each token, (tokens, 6), and their rows."""
    valid = [(b, t) for b in range(len(e.mask)) for t in range(int(e.mask[b].sum()))]
    A, parts = torch.stack([e.advantages[b, t] for b, t in valid]), []
    A = (A - A.mean()) / A.std(correction=0)  # whitened over all valid tokens of the batch
    for a, (b, t) in zip(A, valid):
        state = e.tokens[b, :e.prompt_lengths[b] + t].tolist()
        log_p, value = log_pi(policy, state, c.temperature), V(policy, state)
        ratio = (log_p[e.actions[b, t]] - e.log_probs[b, t]).exp()
        clipped = ratio if abs(ratio - 1) <= c.clip else 1 + c.clip * torch.sign(ratio - 1).detach()
        old, R = e.values[b, t], e.returns[b, t]
        near = old + (value - old).clamp(-c.value_clip, c.value_clip)
        parts.append(torch.stack([-torch.minimum(ratio * a, clipped * a),
                                  0.5 * torch.maximum((value - R)**2, (near - R)**2),
                                  -(log_p.exp() * log_p).sum(), ratio - 1 - ratio.log(),
                                  (abs(ratio - 1) > c.clip).double()]))
    parts = torch.stack(parts)
    loss = parts[:, 0] + c.value_coef * parts[:, 1] - c.entropy_coef * parts[:, 2]
    return torch.cat([loss[:, None], parts], 1), torch.tensor([b for b, t in valid])


@pytest.mark.parametrize("entropy_coef, minibatch_size, micro_batch_size, epochs", [
    (0.0, 12, 12, 1), (0.2, 12, 12, 1), (0.2, 12, 5, 2), (0.2, 1, 1, 3)])
def test_no_sign_coefficient_or_trajectory_of_the_whole_loss_is_wrong(
        entropy_coef, minibatch_size, micro_batch_size, epochs):
    """∇L of L = −L_clip + c1 L_VF − c2 H (PPO eq. 9, turned to a loss), at a step size of 0.

    In minibatches of one trajectory, each epoch's gradients are those of all the trajectories; in
    micro-batches, they add up to the minibatch's.
    """
    policy, generator, steps = tiny_policy(0), draws(7), []
    e, config = experience_of(policy, tiny_gpt(1), temperature=0.8, value_coef=0.7, clip=0.1,
                              entropy_coef=entropy_coef, max_grad_norm=1e9, early_stop_kl=None,
                              value_clip=0.3, minibatch_size=minibatch_size, ppo_epochs=epochs,
                              micro_batch_size=micro_batch_size)
    with torch.no_grad():  # away from π_old, so that ratios differ from 1 and clipping acts
        for p in policy.parameters():
            p.add_(0.06 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    parts, row = written_out(policy, e, config)
    batches = [row == b for b in range(12)] if minibatch_size == 1 else [row >= 0]
    means = torch.stack([parts[batch].mean(0) for batch in batches])
    gradients = torch.stack([flat_grad(mean[0], policy) for mean in means])
    optimizer = sgd(policy, 0.0)
    optimizer.register_step_pre_hook(lambda *_: steps.append(
        torch.cat([p.grad.flatten() for p in policy.parameters()])))
    metrics = ppo_update(policy, optimizer, e, config, draws())
    assert epochs < 3 or not torch.equal(steps[0], steps[12])  # each in an order of its own
    for epoch in torch.stack(steps).view(epochs, len(batches), -1):
        close(epoch.sum(0), gradients.sum(0), 2e-6)  # whitening's 1e-8 under the root shows
    for name, value in zip("policy_loss value_loss entropy approx_kl clip_fraction".split(),
                           means.mean(0)[1:].tolist()):
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert metrics["grad_norm"] == pytest.approx(float(gradients.norm(dim=1).mean()), rel=1e-6)
    assert 0.05 < metrics["clip_fraction"] < 0.95 and metrics["updates"] == epochs * len(batches)


def test_no_metric_of_a_batch_reads_padding():
    """Reward, Σ k1, Σ k3, length, share ended, 1 − Var(R − V) / Var(R), by NumPy."""
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3)
    e = dataclasses.replace(e, actions=e.actions.where(e.mask, 3), **{
        name: getattr(e, name).where(e.mask, 9.0) for name in ("log_probs", "values", "returns")})
    m = e.mask.numpy()
    assert not m.all()
    returns, values = e.returns.numpy()[m], e.values.numpy()[m]
    delta = (e.ref_log_probs - e.log_probs).numpy() * m
    assert rlhf.experience_metrics(e, 3) == pytest.approx({
        "reward": e.scores.numpy().mean(), "kl": -delta.sum(1).mean(),
        "kl_k3": ((np.exp(delta) - 1 - delta) * m).sum(1).mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "length": m.sum(1).mean(), "ended": ((e.actions.numpy() == 3) & m).any(1).mean()},
        abs=1e-6)
    level = dataclasses.replace(e, returns=torch.ones_like(e.returns))
    assert math.isfinite(rlhf.experience_metrics(level, 3)["explained_variance"])


# =================================================================================================
# The program: what its tests share
# =================================================================================================

def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


GOOD_LINE = json.dumps(pair("A", " b.", " c."))
RANKS = (dataset.SHIPPED / "tokenizer.tiktoken").read_bytes().split(b"\n")


def write_data(directory, preferences, ranks=None, **texts):
    """A data directory: preferences are rows or raw lines; corpus="…" writes corpus.txt; ranks=n
    a tokenizer of the first n tokens, of which the first 256 are the bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in preferences]
    (directory / "preferences.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    for name, text in texts.items():
        (directory / f"{name}.txt").write_bytes(text.encode())
    if ranks:
        (directory / "tokenizer.tiktoken").write_bytes(b"\n".join(RANKS[:ranks]))
    return directory


@pytest.fixture(scope="module")
def shipped():
    return dataset.load(dataset.SHIPPED, 256, 64)


def python(*arguments, input=None, cwd=REPO):
    """Run python on a file of the repository, in a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, input=input, text=True,
                          capture_output=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch):
    """main() takes Ctrl-C over: given back. No picture: importing the plotter outlasts a run."""
    monkeypatch.setattr(curves, "draw", lambda out: "")
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def printed(capsys, *arguments):
    """What rlhf.py prints, called in this process."""
    rlhf.main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments, entry=rlhf.main, program="rlhf.py"):
    """It ends with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as caught:
        entry([str(a) for a in arguments])
    output = capsys.readouterr()
    assert caught.value.code == 2, (caught.value.code, output.err)
    assert output.err.count("\n") == 1 and output.err.startswith(f"{program}: "), output.err
    return output.err


SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=128, max_new_tokens=8, lm_epochs=1,
             lm_batch_size=4, rm_epochs=1, rm_batch_size=8, ppo_iterations=3, ppo_batch_size=16,
             minibatch_size=8, ppo_epochs=2, eval_prompts=6, device="cpu")
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]


def small_data(directory, ranks=None):
    """60 documents and 80 pairs of the shipped data."""
    def head(name, n):
        return (dataset.SHIPPED / name).read_text("utf-8").splitlines()[:n]
    return write_data(directory, head("preferences.jsonl", 80), ranks,
                      corpus="\n".join(head("corpus.txt", 60)))


def run_of(config):
    """A run: its Config, its folders, and the flags that give it on the command line."""
    data, out = Path(config.data_dir), Path(config.out_dir)
    return SimpleNamespace(config=config, data=data, out=out,
                           flags=[*FLAGS, "--data", data, "--out_dir", out])


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A whole run at reduced size, and the record that it returned."""
    base = tmp_path_factory.mktemp("run")
    first = run_of(Config(**SIZES, data_dir=str(small_data(base / "data")),
                          out_dir=str(base / "out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda out: "")
        first.record = rlhf.run(first.config)
    return first


@pytest.fixture
def second_run(first_run, tmp_path):
    """A copy of the first run, to go on from."""
    out = shutil.copytree(first_run.out, tmp_path / "out")
    return run_of(dataclasses.replace(first_run.config, out_dir=str(out)))


def failing_at(n, error, function=lambda *_: None):
    """The function, which raises in call number n."""
    calls = itertools.count(1)

    def failing(*arguments):
        if next(calls) == n:
            raise error
        return function(*arguments)
    return failing


def weights(out, name="policy.pt"):
    return load_checkpoint(Path(out) / name)["weights"]


def figures(record):
    """What does not depend on the clock."""
    return {k: v for k, v in record.items() if "seconds" not in k and "per_s" not in k}


def timeless(out):
    """log.jsonl without what is measured by the clock."""
    return list(map(figures, dataset.read_records(Path(out) / "log.jsonl")))


def ends_as(first_run, out):
    """The same files, weights, log and samples: bit for bit."""
    out = Path(out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(first_run.out))
    assert timeless(out) == timeless(first_run.out)
    assert (out / "samples.jsonl").read_bytes() == (first_run.out / "samples.jsonl").read_bytes()
    for name in rlhf.FILES.values():
        ours, theirs = (load_checkpoint(folder / name) for folder in (out, first_run.out))
        assert same(ours["weights"], theirs["weights"]), name
        assert str(ours["state"]) == str(theirs["state"]) and ours["done"], name


# =================================================================================================
# The program: the loops
# =================================================================================================

def warmed_up(peak, steps, warmup):
    """Linear from 0 to the peak in `warmup` steps, then linear to 0 at `steps`."""
    return [peak * min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
            for step in range(steps)]


def language_model_stage(**settings):
    """(a GPT, train(model, state=…, on_step=…)): documents that repeat a token."""
    draw = random.Random(0)
    documents = [[5] + [draw.randrange(5)] * draw.randrange(1, 6) + [5] for _ in range(30)]
    config = Config(**dict(lm_epochs=18, lm_batch_size=8, lm_lr=3e-2, max_new_tokens=4,
                           block_size=12) | settings)
    return tiny_gpt(0, vocab=6, width=8, std=0.1).float(), functools.partial(
        rlhf.train_language_model, documents=documents, config=config)


def reward_model_stage(**settings):
    """(a reward model, train): pairs in which the chosen side has two 1s more."""
    gpt, draw, pairs = tiny_gpt(std=0.1, width=16).float(), random.Random(0), []
    for _ in range(48):
        low, high = [[draw.choice([0, 2]) for _ in range(4)] for _ in "ab"]
        for i in draw.sample(range(4), 2):
            high[i] = 1
        pairs.append(([3] + [draw.randrange(3)] * draw.randrange(3), high + [3],
                      low[:draw.randrange(2, 5)] + [3]))
    config = Config(**dict(rm_epochs=2, rm_batch_size=8, rm_lr=1e-2, max_new_tokens=5,
                           block_size=12, ppo_batch_size=32, minibatch_size=8) | settings)
    return RewardModel(gpt, draws()), functools.partial(
        rlhf.train_reward_model, pairs=pairs, reference=gpt, prompts=[x for x, _, _ in pairs],
        config=config)


def ppo_stage(**settings):
    """(a policy, train): on ragged prompts, with the structured reward."""
    reference = tiny_gpt(1).float()
    config = Config(**dict(max_new_tokens=4, block_size=12, ppo_iterations=4, ppo_batch_size=8,
                           minibatch_size=4, ppo_epochs=2, ppo_lr=1e-2, kl_target=0.01,
                           missing_eos_score=None) | settings)
    return ActorCritic(reference), functools.partial(
        train_ppo, reference=reference, reward_fn=score_rollout, config=config,
        prompts=[list(x) for x in RAGGED])


STAGES = {"language_model": language_model_stage, "reward_model": reward_model_stage,
          "ppo": ppo_stage}


@pytest.mark.parametrize("stage", STAGES)
def test_no_resumed_training_ends_elsewhere(stage):
    """What is random in step k comes from (seed, stage, k): weights, optimizer, k are a state."""
    start, train = STAGES[stage]()
    model, saved = copy.deepcopy(start), {}
    history = train(model, on_step=lambda metrics, state: saved.update(
        {state["step"]: copy.deepcopy((state, model.state_dict()))}))
    steps = len(saved)
    assert list(saved) == list(range(1, steps + 1))
    for step in (1, steps // 2, steps // 2 + 1, steps):  # within an epoch, between two, at the end
        other = copy.deepcopy(start)
        other.load_state_dict(saved[step][1])
        rest = train(other, state=saved[step][0])
        assert same(other, model)
        for a, b in zip(rest or (), history[step:] if history else (), strict=True):
            assert all(b[k] == v for k, v in a.items() if "per_s" not in k)
    silent, other_seed = copy.deepcopy(start), copy.deepcopy(start)
    train(silent)
    STAGES[stage](seed=1)[1](other_seed)
    assert same(silent, model) and not same(other_seed, model)


@pytest.mark.parametrize("stage", STAGES)
def test_no_loss_that_is_not_finite_trains_on(stage):
    """L = NaN stops with the stage and the step in the message."""
    model, train = STAGES[stage]()
    if stage == "ppo":
        calls = itertools.count()
        train = functools.partial(train, reward_fn=lambda r: score_rollout(r) * (
            math.nan if next(calls) else 1))
    else:
        torch.nn.init.constant_(list(model.parameters())[-1], math.nan)
    with pytest.raises(FloatingPointError, match=f"^{stage} step {1 + (stage == 'ppo')}: loss nan"):
        train(model)


def test_train_language_model_learns_a_corpus():
    """min −E log π(x_{i+1} | x_1 … x_i): a step a batch, at its learning rate."""
    gpt, train = language_model_stage()
    log, first = [], rlhf.language_model_loss(gpt, train.keywords["documents"])
    train(gpt, on_step=lambda metrics, state: log.append(
        (state["optimizer"]["param_groups"][0]["lr"], metrics["steps"])))
    assert [rate for rate, _ in log] == pytest.approx(warmed_up(3e-2, 72, 7))
    assert {steps for _, steps in log} == {72}  # 18 epochs of 30 / 8 steps, a tenth to warm up
    assert rlhf.language_model_loss(gpt, train.keywords["documents"]) < 1.1 < 1.5 < first


def test_the_language_model_loss_is_the_mean_over_tokens_that_were_predicted():
    """−Σ log π(x_{i+1}|…) / Σ 1 over all documents, whatever the batches."""
    gpt, log = tiny_gpt(0), []
    documents = [[3, 1, 3], [3, 0, 0, 2, 1, 3], [3, 3], [3, 2, 2, 3], [3, 1, 1, 1, 3]]
    terms = [log_pi(gpt, d[:i])[d[i]].item() for d in documents for i in range(1, len(d))]
    expected = pytest.approx(-sum(terms) / len(terms), abs=1e-10)
    assert [rlhf.language_model_loss(gpt, documents, size) for size in (2, 64)] == [expected] * 2
    config = Config(lm_epochs=1, lm_batch_size=5, max_new_tokens=4, block_size=12)
    rlhf.train_language_model(gpt, documents, config, on_step=lambda m, s: log.append(m["loss"]))
    assert log == [expected]


def test_train_reward_model_learns_the_order_and_normalises_on_the_references_samples():
    """min −E log σ(r_w − r_l), then mean 0 and std 1 on π_ref's own responses."""
    model, train = reward_model_stage(rm_epochs=9)
    pairs, gpt, prompts = (train.keywords[k] for k in ("pairs", "reference", "prompts"))
    frozen, log = copy.deepcopy(gpt), []
    train(model, on_step=lambda metrics, state: log.append(
        metrics | {"lr": state["optimizer"]["param_groups"][0]["lr"]}))
    assert [m["lr"] for m in log] == pytest.approx(warmed_up(1e-2, 54, 5))
    assert {m["steps"] for m in log} == {54} and same(gpt, frozen)  # 9 epochs of 48 / 8 steps
    assert log[0]["loss"] > 0.2 and log[-1]["loss"] < 0.05 and log[-1]["accuracy"] == 1
    turned, ties = [(x, l, w) for x, w, l in pairs], [(x, w, w) for x, w, _ in pairs]
    for given, accuracy in ((pairs, 1), (turned, 0), (ties, 0.5), (pairs[:3] + turned[:1], 0.75)):
        assert rlhf.reward_model_accuracy(model, given, batch_size=2) == accuracy
    scores = rlhf.reward_scores(model, rollout(gpt, prompts * 20, 5, 3, generator=draws(5)))
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.1


PPO_KEYS = ("reward kl kl_k3 entropy approx_kl clip_fraction explained_variance value_loss "
            "policy_loss grad_norm length ended kl_coef rollout_tokens_per_s "
            "update_tokens_per_s").split()


def test_no_iteration_goes_unlogged_or_keeps_its_learning_rate(monkeypatch):
    """Logged: reward, KL (k1, k3), entropy, approximate KL, clip fraction, explained variance, …"""
    rates, coefs, log, update = [], [], [], rlhf.ppo_update

    def spy(policy, optimizer, experience, config, *rest):
        group, = optimizer.param_groups
        assert (group["eps"], group["betas"]) == (1e-5, (0.9, 0.999))  # as PPO's reference code
        assert isinstance(optimizer, torch.optim.Adam)
        rates.append(group["lr"])
        coefs.append(config.kl_coef)
        return update(policy, optimizer, experience, config, *rest)

    monkeypatch.setattr(rlhf, "ppo_update", spy)
    clock = SimpleNamespace(perf_counter=itertools.count(100).__next__)  # a second a look
    monkeypatch.setattr(rlhf, "time", clock)
    policy, train = ppo_stage(kl_coef=0.2, kl_target=1e-6)
    history = train(policy, on_step=lambda metrics, state: log.append(dict(state)))
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    beta = 0.2  # the first KL is 0 up to rounding, the later ones far above the target
    for i, metrics in enumerate(history):
        assert all(math.isfinite(metrics[name]) for name in PPO_KEYS)
        assert metrics["kl_coef"] == coefs[i] == beta and metrics["steps"] == 4
        assert metrics["rollout_tokens_per_s"] == pytest.approx(8 * metrics["length"])
        assert metrics["update_tokens_per_s"] == pytest.approx(2 * 8 * metrics["length"])
        assert metrics["updates"] == 4
        beta = adapt_kl_coef(beta, metrics["kl"], 1e-6)
        assert log[i]["kl_coef"] == beta and log[i]["step"] == i + 1
    assert beta != 0.2
    policy, train = ppo_stage(kl_coef=0.2, kl_target=None)
    assert {metrics["kl_coef"] for metrics in train(policy)} == {0.2}


@pytest.mark.parametrize("limit, factor", [(0.5, 0.1), (100.0, 1.0)])
def test_no_gradient_is_longer_than_its_limit_or_older_than_its_loss(limit, factor):
    """g ← g · min(1, c / ‖g‖), the norm over all parameters, whatever was in p.grad before."""
    model = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    model.bias.grad = torch.full((1,), 1e3)
    loss = 3 * model.weight[0, 0] + 4 * model.bias[0]  # a gradient of length 5
    assert rlhf.optimizer_step(loss, model, sgd(model, 1.0), limit, "here") == pytest.approx(5.0)
    close(torch.cat([model.weight[0], model.bias]), [-3 * factor, 0, -4 * factor], 1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_loss_that_is_not_finite_reaches_the_weights(bad):
    """L = NaN or ∞ stops by name, before the optimizer: the last good weights stay."""
    model = torch.nn.Linear(2, 1)
    before = copy.deepcopy(model)
    for loss in (model.weight.sum() * bad, model.weight.sum() + bad):
        with pytest.raises(FloatingPointError, match="^here: loss (nan|inf|-inf), gradient norm"):
            rlhf.optimizer_step(loss, model, sgd(model, 1.0), 1.0, "here")
        assert same(model, before) and all(p.grad is None for p in model.parameters())


def test_no_prompt_is_used_twice_before_another_is_used_once():
    """Batches of prompts go round the list in random order; the last may be shorter."""
    got = rlhf.batches_of_prompts([[i] for i in range(5)], 12, 5, draws())
    flat = [x for batch in got for x, in batch]
    assert [len(batch) for batch in got] == [5, 5, 2] and len(set(flat[10:])) == 2
    assert sorted(flat[:5]) == sorted(flat[5:10]) == list(range(5))
    assert flat[:5] != flat[5:10] and flat[:5] != list(range(5))


def test_no_batch_of_similar_length_drops_a_row_or_comes_in_order():
    """Each index once; rows of a batch are about as long; the batches in random order."""
    draw = random.Random(0)
    lengths = [draw.randrange(1, 40) for _ in range(50)]
    batches = rlhf.batches_of_similar_length(lengths, 8, draws())
    assert sorted(sum(batches, [])) == list(range(50))
    assert sorted(map(len, batches)) == [2] + [8] * 6
    assert batches != rlhf.batches_of_similar_length(lengths, 8, draws(1))
    ends = [(min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches]
    assert all(a[1] <= b[0] for a, b in zip(sorted(ends), sorted(ends)[1:]))
    assert ends != sorted(ends) and ends != sorted(ends, reverse=True)
    assert rlhf.batches_of_similar_length([3] * 20, 20, draws())[0] != list(range(20))  # ties


def test_no_two_stages_or_steps_draw_the_same_numbers():
    """The generator of (seed, stage, step): the same again, another for any other of the three."""
    draws = [torch.rand(3, generator=rlhf.seeded(*key)).tolist() for key in (
        (0, "ppo", 1), (0, "ppo", 1), (1, "ppo", 1), (0, "ppo", 2), (0, "reward_model", 1))]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) == 4


def test_wilsons_interval():
    """(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), against published values."""
    assert rlhf.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert rlhf.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert rlhf.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998


@pytest.mark.parametrize("judged_by_truth", [False, True])
def test_evaluate_compares_both_policies_on_the_same_prompts(judged_by_truth):
    """Means, the win rate with ties half, KL(π‖π_ref) by k1: recomputed from the samples."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    prompts = [list(x) for x in RAGGED] * 9
    config = Config(max_new_tokens=3, block_size=12, ppo_batch_size=7, minibatch_size=7,
                    eval_prompts=16, temperature=0.9)
    arguments = (policy, reference, lambda r: (r.mask.sum(1) % 2).float(), prompts, config,
                 score_rollout if judged_by_truth else None)
    record, samples = rlhf.evaluate(*arguments)
    assert (record, samples) == rlhf.evaluate(*arguments)
    assert [sample["prompt"] for sample in samples] == prompts[:16]
    columns = {name: [s[name] for s in samples] for name in samples[0]}
    for s in samples:
        for side in ("lm", "ppo"):
            y = s[side]
            assert 1 <= len(y) <= 3 and 3 not in y[:-1] and s[f"ended_{side}"] == (y[-1] == 3)
            assert s[f"reward_{side}"] == len(y) % 2 and s[f"length_{side}"] == len(y)
            if judged_by_truth:
                assert s[f"true_reward_{side}"] == pytest.approx(structured_score(y), abs=1e-5)
        states = [s["prompt"] + s["ppo"][:t] for t in range(len(s["ppo"]))]
        assert s["kl"] == pytest.approx(sum(
            (log_pi(policy, state, 0.9)[a] - log_pi(reference, state, 0.9)[a]).item()
            for state, a in zip(states, s["ppo"])), abs=1e-8)
    names = columns.keys() - {"prompt", "lm", "ppo"}
    assert len(names) == 7 + 2 * judged_by_truth  # reward, length, ended, true_reward: twice; kl
    for name in names:
        assert record[name] == pytest.approx(np.mean(columns[name]), abs=1e-8), name
    judge = "true_reward" if judged_by_truth else "reward"
    gaps = np.subtract(columns[f"{judge}_ppo"], columns[f"{judge}_lm"])
    wins = (gaps > 1e-6).sum() + 0.5 * (abs(gaps) < 1e-6).sum()
    assert record["win_rate"] == wins / 16
    assert (record["win_rate_low"], record["win_rate_high"]) == rlhf.wilson(wins, 16)
    assert record["distinct_ppo"] == len(set(map(tuple, columns["ppo"]))) / 16
    if judged_by_truth:
        true, reward = columns["true_reward_lm"], columns["reward_lm"]
        assert record["true_reward_std_lm"] == pytest.approx(np.std(true, ddof=1), abs=1e-8)
        assert record["reward_correlation_lm"] == pytest.approx(np.corrcoef(true, reward)[0, 1])
    level, _ = rlhf.evaluate(reference, reference, lambda r: torch.zeros(len(r.mask)), prompts,
                             config)
    assert level["win_rate"] == 0.5 and level["kl"] == pytest.approx(0, abs=1e-10)


# =================================================================================================
# The program: data
# =================================================================================================

@pytest.fixture(scope="session")
def remade(tmp_path_factory):
    """make_data.py at work in a process of its own, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("data")
    process = subprocess.Popen([sys.executable, REPO / "data" / "make_data.py", "--out", folder],
                               stdout=subprocess.DEVNULL)
    yield process, folder
    process.kill()


@pytest.fixture(scope="session", autouse=True)
def the_slowest_first(request):
    """It takes as long as half of the tests: so it runs beside them, on a second core."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and any("remade" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("remade")


def test_make_data_regenerates_every_file_byte_for_byte(remade):
    process, folder = remade
    assert process.wait() == 0
    for name in ("corpus.txt", "preferences.jsonl", "tokenizer.tiktoken"):
        assert (folder / name).read_bytes() == (dataset.SHIPPED / name).read_bytes(), name


ODD_TEXTS = ["", " ", "\n\n\t ", "naïve café — “quotes” …", "🎬👩‍👩‍👧 家族 кино",
             "\x00\x7f\u200d\ufeff", "<|endoftext|>", "a" * 300, " lots   of\r\n\r\nspace  ",
             "x1y22z333", "'s 't don't", "".join(map(chr, range(32, 300)))]


def test_the_tokenizer_returns_any_text_and_never_an_end_token(shipped):
    """decode(encode(text)) = text, byte for byte; the end token is no text."""
    encoding, eos = shipped.encoding, shipped.eos_token
    assert eos == encoding.n_vocab - 1 == encoding.eot_token
    for text in ODD_TEXTS:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text and eos not in tokens
        assert shipped.text([eos, *tokens, eos]) == text
    assert "\ufffd" in shipped.text(encoding.encode_ordinary("🎬")[:-1])  # half a character


def loaded(directory, rows, context=64, **files):
    """What is read of a directory with these preferences and files, for responses of 8 tokens."""
    return dataset.load(write_data(directory, rows, **files), context, 8)


def all_rows(data):
    """(train, held out) as sets of texts, each with its kind."""
    return [{("document", data.text(d)) for d in part.documents}
            | {("pair", *map(data.text, p)) for p in part.pairs}
            | {("prompt", data.text(p)) for p in part.prompts}
            for part in (data.train, data.held_out)]


def test_the_shipped_data_holds_out_a_tenth_and_mixes_nothing(shipped):
    """A held-out prompt is in no training pair, a held-out pair's text in no training document."""
    train, held, eos = shipped.train, shipped.held_out, shipped.eos_token
    assert not shipped.skipped and not shipped.notes and shipped.shipped
    for name in ("documents", "pairs", "prompts"):
        a, b = len(getattr(train, name)), len(getattr(held, name))
        assert 0.08 < b / (a + b) < 0.12, name
    held_prompts = {tuple(x) for x in held.prompts} | {tuple(x) for x, _, _ in held.pairs}
    assert not held_prompts & {tuple(x) for x in train.prompts + [x for x, _, _ in train.pairs]}
    for x, w, l in train.pairs[:200] + held.pairs[:200]:
        assert x[0] == w[-1] == l[-1] == eos and eos not in x[1:] + w[:-1] + l[:-1] and w != l
    assert all(d[0] == d[-1] == eos != d[1] for d in train.documents[:200])


def test_adding_rows_moves_none_between_training_and_held_out(tmp_path):
    """held out = a hash of the text, not of its place in the file or of a seed."""
    rows = [pair(f"Film {i % 150} is", f" good {i}.", f" bad {i}.") for i in range(300)]
    lines = [f"Document number {i}." for i in range(300)]
    write_data(tmp_path / "few", rows[100:200], corpus="\n".join(lines[:90]))
    write_data(tmp_path / "many", rows[::-1], corpus="\n".join(lines))
    few, many, again = (dataset.load(tmp_path / name, 64, 8) for name in ("few", "many", "many"))
    assert all(a < b for a, b in zip(all_rows(few), all_rows(many)))
    assert not set.intersection(*all_rows(many))
    held_prompts = {many.text(p) for p in many.held_out.prompts}
    assert {many.text(x) for x, _, _ in many.held_out.pairs} == held_prompts
    assert not held_prompts & {many.text(x) for x, _, _ in many.train.pairs}
    assert len(many.train.pairs) + len(many.held_out.pairs) == 300
    assert again.fingerprint == many.fingerprint != few.fingerprint


@pytest.mark.parametrize("corpus", [True, False])
def test_a_held_out_pairs_text_is_in_no_training_document(tmp_path, corpus):
    """Nor is prompt + rejected: a language model that has seen it would know the answer."""
    rows = [pair(f"Film {i} is", f" good {i}.", f" bad {i}.") for i in range(200)]
    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    files = {"corpus": "\n".join(texts)} if corpus else {}
    data = loaded(tmp_path, rows, **files)
    seen = {data.text(d) for d in data.train.documents}
    held = {data.text(x) + data.text(y) for x, *both in data.held_out.pairs for y in both}
    assert len(held) > 20 and seen and not seen & held
    assert len(data.train.documents) + len(data.held_out.documents) == (400 if corpus else 200)
    assert bool(data.notes) == (not corpus)  # said: it learns from prompt + chosen
    assert corpus or {data.text(x) + data.text(w) for x, w, _ in data.train.pairs} == seen


def test_pairs_without_a_prompt_are_held_out_by_their_answers(tmp_path):
    """An empty prompt is one prompt: by its hash all such pairs would be on one side."""
    rows = [pair("", f"Good film {i}.", f"Bad film {i}.") for i in range(200)]
    turned = [pair("", row["rejected"], row["chosen"]) for row in rows]
    a, b = ({frozenset((data.text(w), data.text(l))) for _, w, l in data.held_out.pairs}
            for data in (loaded(tmp_path, rows), loaded(tmp_path, turned)))
    assert 5 < len(a) < 50 and a == b


HI, A_B = "\n\nHuman: Hi\n\nAssistant:", " A\n\nHuman: B\n\nAssistant:"


@pytest.mark.parametrize("expected", [(HI, " Yes.", " No."), (HI + A_B, " C", " D"),
                                      (HI, A_B + " C", " X"), ("", "Yes.", "Yet.")])
def test_an_implicit_prompt_is_the_longest_common_prefix_that_ends_at_an_assistants_turn(
        tmp_path, expected):
    """It reads as if it were spelled out; columns that a trainer added are passed over."""
    x, w, l = expected
    for row in (pair(x, w, l) | {"score_chosen": 1.5},
                {"chosen": x + w, "rejected": x + l, "margin": None}):
        data = loaded(tmp_path, [row], 256)
        assert tuple(map(data.text, data.train.pairs[0])) == expected
        assert [data.text(p) for p in data.train.prompts] == [x]


MESSAGES = ('is a list of messages, a conversational form that is not read; '
            'expected {"prompt", "chosen", "rejected"}')
BROKEN_LINES = {"preferences.jsonl": [  # the third line of a file, and what is said about it
    (b"{not json", "not JSON"), (GOOD_LINE[:-3].encode(), "not JSON"), (b"[" * 100_000, "not JSON"),
    (b"[1, 2]", "not a JSON object"), (b'{"prompt": "A", "chosen": "b"}', "no 'rejected'"),
    (b'{"prompt": "A", "rejected": "b"}', "no 'chosen'"),
    (b'{"prompt": "A", "chosen": "b", "rejected": 3}', "'rejected' is not text"),
    (b'{"prompt": null, "chosen": "b", "rejected": "c"}', "'prompt' is not text"),
    (b'{"chosen": [{"role": "user"}], "rejected": []}', f"'chosen' {MESSAGES}"),
    (b'{"prompt": [], "chosen": [], "rejected": []}', f"'prompt' {MESSAGES}"),
    (b'{"prompt": "A", "chosen": [], "rejected": []}', f"'chosen' {MESSAGES}"),
    (b'{"prompt": "A", "chosen": "\\ud800", "rejected": "c"}', "surrogate"),
    (b'{"prompt": "A", "chosen": "caf\xe9", "rejected": "c"}', "byte 0xe9 at column")],
    "corpus.txt": [(b"tw\xffo", "byte 0xff at column 3")],
    "prompts.txt": [(b"\xfe", "byte 0xfe at column 1")],
    "tokenizer.tiktoken": [
        (b"AA==x 2", "not a token and its rank"), (RANKS[2].split()[0], "not a token and its rank"),
        (RANKS[2].split()[0] + b" 7", "rank '7'"), (RANKS[2].split()[0] + b" two", "rank 'two'"),
        (RANKS[0].split()[0] + b" 2", "repeated token"), (b" 2", "empty or repeated token"),
        (b"QUFB" * 400 + b" 2", "a token of 1,200 bytes")]}


@pytest.mark.parametrize("name, line, problem", [
    pytest.param(name, *row, id=f"{name} {n} {row[1][:25]}")
    for name, rows in BROKEN_LINES.items() for n, row in enumerate(rows)])
def test_a_broken_line_is_named_by_file_and_line(tmp_path, name, line, problem):
    """FILE:LINE: what is wrong, and what was expected; one line."""
    write_data(tmp_path, [GOOD_LINE])
    good = RANKS if name.startswith("tokenizer") else [GOOD_LINE.encode(), b"", b"", b"more"]
    (tmp_path / name).write_bytes(b"\n".join([*good[:2], line, *good[3:]]))
    with pytest.raises(dataset.DataError) as caught:
        dataset.load(tmp_path, 64, 8)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}:3: ") and "\n" not in message
    assert problem in message and "expected" in message and len(message) < 400


def test_a_readers_own_tokenizer_is_used_and_must_have_every_byte(tmp_path):
    """256 bytes are enough: the vocabulary is theirs, one more token ends a text."""
    data = loaded(tmp_path, [GOOD_LINE], ranks=256)
    assert data.eos_token == 256
    assert data.train.pairs == [([256, 65], [32, 98, 46, 256], [32, 99, 46, 256])]
    assert dataset.tokenizer_of(tmp_path).n_vocab == 257
    assert dataset.tokenizer_of(tmp_path / "none").n_vocab == 1024
    with pytest.raises(dataset.DataError, match=r"tokenizer.tiktoken:256: no token for the byte"):
        loaded(tmp_path, [GOOD_LINE], ranks=255)


def test_missing_files_are_named(tmp_path):
    """A directory with preferences.jsonl is all that is asked for."""
    for directory, problem in ((tmp_path / "nowhere", "nowhere: no such directory"),
                               (tmp_path, "preferences.jsonl: no such file"),
                               (write_data(tmp_path / "a", [pair("a", "b", "b")]), "no usable")):
        with pytest.raises(dataset.DataError, match=problem):
            dataset.load(directory, 64, 8)


def test_unusable_rows_are_skipped_and_counted(tmp_path, capsys):
    """Identical answers, an empty answer, no room, blank lines: a count of each, and it is said."""
    words = "b " * 80  # more than 40 tokens
    rows = [pair("A", " b.", " c."), pair("A", " b.", " b."), pair("A", " ", " c."),
            pair("A", " b.", "\n"), pair("A", words, " c."), pair("A", " b.", words),
            pair(words, " b.", " c."), "   ", pair("A", " d.", " e.")]
    data = loaded(tmp_path, rows, 40, corpus=f"one\n{words}\n  \n\ntwo\n",
                  prompts=f"x\n\ny\n{words}\n x\nx\n")
    assert dict(data.skipped) == {
        "preferences.jsonl: identical answers": 1, "preferences.jsonl: empty answer": 2,
        "preferences.jsonl: no room within the context": 3, "preferences.jsonl: blank line": 1,
        "corpus.txt: document longer than the context": 1, "corpus.txt: blank line": 1,
        "prompts.txt: prompt leaves no room for a response": 1}
    assert [data.text(d) for d in data.train.documents] == ["one", "two"]
    assert len(data.train.pairs) == 2 and not data.shipped
    assert sorted(map(data.text, data.train.prompts)) == [" x", "x", "y"]  # each once
    assert len(data.notes) == 3 and data.held_out.pairs == data.train.pairs  # too few to hold out
    rlhf.describe(data, torch.device("cpu"))
    text = capsys.readouterr().out
    for part in ("vocabulary 1,024", "2 documents, 2 pairs, 3 prompts", *data.notes,
                 *[f"skipped: {n} rows of {reason}" for reason, n in data.skipped.items()]):
        assert part in text


@pytest.mark.parametrize("n, m, kept", [(5, 5, [2, 2, 2]), (6, 4, [2, 2, 2]), (5, 6, [1, 1, 2]),
                                        (7, 3, [2, 2, 1])])
def test_what_just_fits_the_context_is_kept(tmp_path, n, m, kept):
    """end + document + end, end + prompt + answer + end, end + prompt + T_max + end <= context."""
    text = "abcdefghijklmnopqrstuvwxyz"  # a token a letter
    data = dataset.load(write_data(tmp_path, [
        pair("p", "q", "r"), pair(text[:n], text[:m], "z")], ranks=256,
        corpus="q\n" + text[:n + m]), 12, 4)
    assert [len({str(row) for part in (data.train, data.held_out) for row in getattr(part, name)})
            for name in ("pairs", "documents", "prompts")] == kept


def test_special_token_text_in_data_is_plain_text(tmp_path):
    row = pair("Say <|endoftext|>", " <|endoftext|> yes", " no")
    data = loaded(tmp_path, [row], corpus="a <|endoftext|> b")
    x, w, _ = data.train.pairs[0]
    assert data.eos_token not in x[1:] + w[:-1] + data.train.documents[0][1:-1]
    assert (data.text(x), data.text(w)) == (row["prompt"], row["chosen"])


def test_a_byte_order_mark_and_crlf_are_no_part_of_the_text(tmp_path):
    a = loaded(tmp_path, [GOOD_LINE] * 2, corpus="one\ntwo\n")
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    b = dataset.load(tmp_path, 64, 8)
    assert all_rows(a) == all_rows(b) and a.skipped == b.skipped
    assert a.fingerprint != b.fingerprint  # of every byte


def test_no_mutant_of_a_data_file_escapes_as_anything_but_a_data_error(tmp_path, shipped):
    """Cut, doubled, flipped and foreign bytes: it loads, or says FILE:LINE in one line."""
    draw, broken = random.Random(0), 0
    row = {"chosen": "é\n\nAssistant: a", "rejected": "é\n\nAssistant: b"}
    files = {"preferences.jsonl": "\n".join([GOOD_LINE, json.dumps(row)] * 2).encode(),
             "corpus.txt": "One review.\nÜber-film 🎬.\n".encode(), "prompts.txt": b"The\nA\n",
             "tokenizer.tiktoken": b"\n".join(RANKS[:280])}
    pieces = [b"\x00", b"\xff", b"\n", b"\r", b'"', b"\\ud800", b"{", b"}", b"[]", b"null", b" ",
              b"\xef\xbb\xbf", b"1e999", b"NaN", b"<|endoftext|>", "é".encode()[:1], b"9" * 5000]
    edits = [lambda raw, at: raw[:at] + draw.choice(pieces) + raw[at:],
             lambda raw, at: raw[:at] + raw[at + draw.randrange(1, 30):],
             lambda raw, at: raw[:at] + bytes(b ^ 1 << draw.randrange(8) for b in raw[at:at + 1])
             + raw[at + 1:],
             lambda raw, at: raw[:at] + raw[max(0, at - draw.randrange(40)):]]
    for _ in range(200):
        for name, raw in files.items():
            (tmp_path / name).write_bytes(raw)
        name = draw.choice(list(files))
        raw = files[name]
        for _ in range(draw.randrange(1, 4)):
            raw = draw.choice(edits)(raw, draw.randrange(len(raw) + 1))
        (tmp_path / name).write_bytes(raw)
        try:
            dataset.load(tmp_path, 64, 8, None if name.startswith("tok") else shipped.encoding)
        except dataset.DataError as error:
            broken += 1
            assert "\n" not in str(error) and str(error).startswith(str(tmp_path)), (name, raw)
        except BaseException as error:  # a panic of the tokenizer's library is no Exception
            pytest.fail(f"{name} {raw}: {error!r}")
    assert 30 < broken < 190


def test_no_two_data_sets_have_one_fingerprint(tmp_path):
    """The same bytes, but a line moved from one file to the next."""
    a = write_data(tmp_path / "a", [GOOD_LINE], corpus=GOOD_LINE + "\nx\ny\n")
    b = write_data(tmp_path / "b", [GOOD_LINE, GOOD_LINE], corpus="x\ny\n")
    c = write_data(tmp_path / "c", [GOOD_LINE], corpus="x\ny\n", prompts="absent")
    d = write_data(tmp_path / "d", [GOOD_LINE], corpus="x\ny\nabsent", prompts="p")
    assert len({dataset.load(x, 128, 8).fingerprint for x in (a, b, c, d)}) == 4


def test_no_line_of_megabytes_takes_long(tmp_path, shipped):
    """10 MB of one sign, of brackets, of digits: skipped, or named by file and line."""
    size = 10 * 2**20
    long = {"preferences.jsonl": [b"[" * size, b"7" * size, b'{"chosen": "' + b"\\" * size],
            "corpus.txt": [b"x\n" + b"a" * size, b"x\n" + b" " * size, b"x\n" + b"\xff" * size]}
    for name, raws in long.items():
        for raw in raws:
            directory = write_data(tmp_path / "data", [GOOD_LINE], corpus="x\n")
            (directory / name).write_bytes(raw)
            try:
                data = dataset.load(directory, 64, 8, shipped.encoding)
                assert sum(data.skipped.values()) == 1
            except dataset.DataError as error:
                assert str(error).startswith(f"{directory / name}:")


def test_records_of_a_run_are_appended_cut_and_written_whole(tmp_path):
    """log.jsonl: one object a line; a resumed run cuts what came after its checkpoint."""
    log, rows = tmp_path / "log.jsonl", [
        {"stage": stage, "step": step, "text": "ü\n"} for stage in "ab" for step in (1, 2, 3)]
    dataset.append_record(log, {"a": math.nan, "b": -math.inf, "c": 1.5})  # JSON has no NaN
    assert log.read_text("utf-8") == '{"a": null, "b": null, "c": 1.5}\n'
    log.unlink()
    for row in rows:
        dataset.append_record(log, row)
    assert dataset.read_records(log) == rows
    with open(log, "ab") as file:
        file.write(b'{"stage": "b", "step": 4, "te')  # killed while writing
    dataset.keep_records(log, {"a": math.inf, "b": 2})
    assert dataset.read_records(log) == rows[:5] and log.read_bytes().endswith(b"}\n")
    with open(log, "ab") as file:  # lines of something else, and one torn by a full disk
        file.write(b'\n\xff\n[]\n3\n{"step": 1}\n{"stage": [], "step": 1}\n{"stage": "a"')
    dataset.keep_records(log, {"a": 2, "b": 1})
    assert dataset.read_records(log) == rows[:2] + rows[3:4]
    dataset.keep_records(log, {"a": 0})
    assert log.read_bytes() == b""
    dataset.keep_records(tmp_path / "new.jsonl", {"a": 3})
    assert dataset.read_records(tmp_path / "new.jsonl") == []
    dataset.write_records(log, [{"a": "é"}, {"b": 1}])
    assert dataset.read_records(log) == [{"a": "é"}, {"b": 1}] and "é" in log.read_text("utf-8")


@pytest.mark.parametrize("name", ["hh_helpful", "movie_sentences"])
def test_real_preferences_load_and_their_skipped_rows_are_counted(name):
    """Real data is messy: what cannot be used is counted by its reason, the rest trains."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"optional data {name} is not there")
    data = dataset.load(SHARED / name, 256, 64)
    rows = [line for line in open(SHARED / name / "preferences.jsonl", "rb") if line.strip()]
    skipped = sum(n for reason, n in data.skipped.items()
                  if reason.startswith("preferences.jsonl") and "prompt leaves" not in reason)
    assert len(data.train.pairs) + len(data.held_out.pairs) + skipped == len(rows)
    assert len(data.train.pairs) > 400
    assert all(len(x) + max(len(w), len(l)) <= 256 for x, w, l in data.train.pairs)
    assert all(len(x) + 64 + 1 <= 256 for x in data.train.prompts + data.held_out.prompts)
    if name == "hh_helpful":
        assert all(data.text(x).endswith("\n\nAssistant:") for x, _, _ in data.train.pairs)


# =================================================================================================
# The program: the simulated annotator
# =================================================================================================

def degenerate_texts(reviews):
    words, praise = " ".join(reviews[:30]).split(), sorted(annotator.GOOD)
    shuffled = words[:40]
    random.Random(0).shuffle(shuffled)
    return {"empty": "", "white space": " \n ", "one word": "Good.", "one word again": "the " * 20,
            "praise again": "superb " * 30, "praise in sentences": "Superb. " * 20,
            "a list of praise": ", ".join(praise[:40]) + ".",
            "a list of praise without commas": " ".join(praise[30:70]) + ".",
            "a list of details": " ".join(sorted(annotator.DETAILS)[:60]) + ".",
            "a sentence six times": (reviews[0].split(". ")[0] + ". ") * 6,
            "a review three times": " ".join([reviews[1]] * 3),
            "shuffled words": " ".join(shuffled),
            "letters": "asdf qwer zxcv uiop " * 8, "full stops": "." * 40,
            "cut short": " ".join(reviews[0].split()[:5]), "a ramble": " ".join(words[:300]),
            "pictures": "🎬" * 30, "digits": "1 2 3 4 5 6 7 8 9 10 11 12"}


def test_degenerate_texts_score_far_below_reviews():
    """true_reward(degenerate) <= mean of reviews − 2, and the empty text is the lowest of all."""
    reviews = (dataset.SHIPPED / "corpus.txt").read_text("utf-8").splitlines()[:200]
    scores = [annotator.true_reward("", review) for review in reviews]
    bad = {name: annotator.true_reward("", text)
           for name, text in degenerate_texts(reviews).items()}
    mean, empty = sum(scores) / len(scores), bad.pop("empty")
    print({name: round(score - mean, 2) for name, score in bad.items()})
    assert all(score <= mean - 2 for score in bad.values()), bad
    assert empty == bad.pop("white space") < min([*bad.values(), *scores])


def test_the_annotators_worked_example_is_right():
    """The doctest of annotator.py."""
    import doctest
    assert doctest.testmod(annotator).failed == 0 < doctest.testmod(annotator).attempted


def test_labels_are_bradley_terry_samples_of_the_true_reward():
    """P(chosen ≻ rejected) = σ(r* − r*'): the best accuracy there is, E max(p, 1−p), is 0.8-0.9."""
    lines = (dataset.SHIPPED / "preferences.jsonl").read_text("utf-8").splitlines()
    assert len(lines) >= 5000
    p = np.array([annotator.preference_probability(row["prompt"], row["chosen"], row["rejected"])
                  for row in map(json.loads, lines)])
    best = np.maximum(p, 1 - p)
    spread = np.sqrt((p * (1 - p)).sum())
    print(f"best possible {best.mean():.4f}, of these labels {(p > 0.5).mean():.4f}")
    assert 0.80 <= best.mean() <= 0.90
    assert abs((p > 0.5).sum() - best.sum()) < 4 * spread
    # Calibration: among pairs of like probability, the better side is chosen that often.
    for low, high in ((0.5, 0.65), (0.65, 0.8), (0.8, 0.95), (0.95, 1.0)):
        part = (best >= low) & (best < high)
        gap = (p[part] > 0.5).sum() - best[part].sum()
        assert abs(gap) < 4 * np.sqrt((best[part] * (1 - best[part])).sum()) + 1, (low, high)


# =================================================================================================
# The program: the network and its files
# =================================================================================================

def test_no_cached_pass_differs_from_the_whole_one():
    """Attention over cached keys at positions <= the query's = causal attention over the row."""
    gpt = tiny_gpt(3, vocab=6, layers=2, heads=2, width=8, context=9)
    tokens = torch.randint(6, (3, 9), generator=draws())
    whole, cache, out = gpt(tokens), gpt.new_cache(3, 9), []
    for a, b in ((0, 4), (4, 5), (5, 8), (8, 9)):  # one token at a time, or several
        positions = torch.arange(a, b).expand(3, b - a)
        out.append(gpt.logits(gpt.hidden(tokens[:, a:b], cache, positions)))
    close(torch.cat(out, 1), whole)
    changed = torch.cat([tokens[:, :5], (tokens[:, 5:] + 1) % 6], 1)
    assert torch.equal(gpt(changed)[:, :5], whole[:, :5])  # causal, to the last bit
    some = torch.rand(3, 9, generator=draws()) < 0.5
    for steps in (some, some & (torch.arange(3) != 1)[:, None], (torch.arange(9) < 1).expand(3, 9),
                  torch.ones_like(some)):  # a row that is not read, rows read at their start alone
        close(gpt(tokens, steps), whole[steps])
        positions = torch.arange(9).expand(3, 9)
        x = gpt.hidden(tokens, gpt.new_cache(3, 9), positions, steps)
        close(gpt.logits(x), whole[steps])
    with pytest.raises(ValueError, match="10 tokens do not fit the context of 9"):
        gpt(torch.zeros(1, 10, dtype=torch.long))


def test_no_weight_starts_otherwise_than_gpt2s():
    """N(0, σ), σ = 0.02 √(768 / C), but σ / √(2 n_layer) where a layer writes to the residual
    stream; biases 0. GPT-2's width is 768."""
    gpt, again = [GPT(GPTConfig(300, 64, 3, 4, 64, 299), draws()) for _ in range(2)]
    assert same(gpt, again)
    for name, p in gpt.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 * math.sqrt(768 / 64) / (math.sqrt(6) if "c_proj" in name else 1)
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean()) < std / 10, name
    with pytest.raises(ValueError, match="n_embd 10 does not divide into n_head 4"):
        GPT(GPTConfig(4, 8, 1, 4, 10, 3))


def gpt2_forward(tensors, n_layer, n_head, tokens):
    """GPT-2 from its file's tensors, in plain operations: Conv1D keeps x W, not x Wᵀ."""
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
                * w[f"{name}.weight"] + w[f"{name}.bias"])

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    S = tokens.shape[1]
    future = torch.full((S, S), -math.inf).triu(1)
    x = w["wte.weight"][tokens] + w["wpe.weight"][:S]
    for i in range(n_layer):
        q, k, v = (part.chunk(n_head, -1) for part in conv1d(
            norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1))
        heads = []
        for q, k, v in zip(q, k, v):
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + future
            heads.append(scores.softmax(-1) @ v)
        x = x + conv1d(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv1d(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def gpt_for_files():
    return tiny_gpt(5, vocab=11, layers=2, heads=3, width=12, context=10, std=0.3).float()


def test_an_independent_gpt2_reads_the_saved_file_to_the_same_logits(tmp_path):
    """save_pretrained writes GPT-2's layout: config.json, transposed Conv1D, tied lm_head."""
    gpt = gpt_for_files()
    assert all(p.std() > 0 for p in gpt.parameters())  # no bias or norm is trivial
    gpt.save_pretrained(tmp_path / "new" / "directory")
    tensors = torch.load(tmp_path / "new" / "directory" / "pytorch_model.bin", weights_only=True)
    tokens = torch.randint(11, (4, 10), generator=draws())
    close(gpt(tokens).double(), gpt2_forward(tensors, 2, 3, tokens), 1e-5)
    config = json.loads((tmp_path / "new" / "directory" / "config.json").read_text())
    assert config.items() >= dict(
        model_type="gpt2", vocab_size=11, n_positions=10, n_ctx=10, n_layer=2, n_head=3, n_embd=12,
        eos_token_id=10, bos_token_id=10, activation_function="gelu_new",
        layer_norm_epsilon=1e-5, architectures=["GPT2LMHeadModel"]).items()
    assert torch.equal(tensors["lm_head.weight"], gpt.wte.weight)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)
    again = GPT.from_pretrained(tmp_path / "new" / "directory")
    assert again.config == gpt.config and same(again, gpt)


def write_safetensors(path, tensors):
    """By hand: 8 bytes of header length, a JSON header, the raw bytes."""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_safetensors_file_is_read_as_gpt2s_come(tmp_path):
    """No prefix, no lm_head, the causal mask as a buffer; float32, or bfloat16 to its precision."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    for kind in (torch.float32, torch.bfloat16):
        tensors = {k: (v.t() if k.endswith(conv1d) else v).to(kind)
                   for k, v in gpt.state_dict().items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 10, 10).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        write_safetensors(tmp_path / "model.safetensors", tensors)
        again = GPT.from_pretrained(str(tmp_path))
        assert same(again, {k: v.to(kind).float() for k, v in gpt.state_dict().items()})
    odd = {"flag": torch.tensor([True, False]), "n": torch.tensor([[1, -2]]),
           "nothing": torch.zeros(0), "of a row": torch.zeros(3, 0)}
    write_safetensors(tmp_path / "odd", odd)
    assert same(read_safetensors(tmp_path / "odd"), odd)


def edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return edit


def edit_weights(change):
    def edit(directory):
        path = directory / "pytorch_model.bin"
        tensors = torch.load(path, weights_only=True)
        torch.save(change(tensors), path)
    return edit


def cut_file(name, keep):
    def edit(directory):
        raw = (directory / name).read_bytes()
        (directory / name).write_bytes(raw[:int(len(raw) * keep)])
    return edit


def file_of(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def safetensors_of(**entry):
    """An edit that leaves model.safetensors with a header of this one entry, and eight bytes."""
    header = json.dumps({"a": entry or 3}).encode()
    return file_of("model.safetensors", struct.pack("<Q", len(header)) + header + bytes(8))


LN_F, C_ATTN = "transformer.ln_f.bias", "transformer.h.0.attn.c_attn.weight"
NO_SAFETENSORS, NO_CHECKPOINT = "not a safetensors file, or cut short", "not a readable checkpoint"
NO_SIZES = [("n_layer", "2"), ("n_layer", 2.0), ("n_layer", 0), ("n_layer", "absent"),
            ("n_head", True), ("n_head", None), ("n_embd", [12]), ("n_embd", -12), ("n_embd", "12"),
            ("vocab_size", 10**30), ("n_positions", "10")]
UNREADABLE = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config not JSON": (cut_file("config.json", 0.5), "not JSON"),
    "config too deep": (file_of("config.json", b"[" * 99999), "not JSON"),
    "config no object": (file_of("config.json", b"[]"), "expected a JSON object"),
    "config of another model": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "another activation": (edit_config(activation_function="relu"), "activation_function = 'relu'"),
    "untied": (edit_config(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "another MLP": (edit_config(n_inner=7), "n_inner = 7"),
    "sizes that do not divide": (edit_config(n_head=5), "n_head 5"),
    **{f"{key} {value!r}": (edit_config(**{key: value}), f"{key} = .*expected a whole number")
       for key, value in NO_SIZES},
    **{f"eos_token_id {value!r}": (edit_config(eos_token_id=value), "eos_token_id.*one token")
       for value in ([10], "x", -1, True)},
    "no weights": (lambda d: (d / "pytorch_model.bin").unlink(), "no pytorch_model.bin"),
    "sharded": (lambda d: (d / "pytorch_model.bin").rename(d / "pytorch_model.bin.index.json"),
                "sharded"),
    "cut": (cut_file("pytorch_model.bin", 0.6), NO_CHECKPOINT),
    "empty": (cut_file("pytorch_model.bin", 0), NO_CHECKPOINT),
    "foreign": (file_of("pytorch_model.bin", b"hello"), NO_CHECKPOINT),
    "a number among them": (edit_weights(lambda t: t | {"x": 1}), "does not hold a state dict"),
    "a key that is no name": (edit_weights(lambda t: t | {1: torch.zeros(1)}), "state dictionary"),
    "a list": (edit_weights(lambda t: list(t.values())), "does not hold a state dictionary"),
    "missing": (edit_weights(lambda t: {k: t[k] for k in t if k != LN_F}),
                "missing ln_f.bias"),
    "extra": (edit_weights(lambda t: t | {"transformer.more": t[LN_F]}), "unexpected more"),
    "both names": (edit_weights(lambda t: t | {"ln_f.bias": t[LN_F]}), "with and without"),
    "another shape": (edit_weights(lambda t: t | {LN_F: torch.zeros(3)}),
                      r"ln_f.bias is \(3,\), expected \(12,\)"),
    "one dimension": (edit_weights(lambda t: t | {C_ATTN: torch.zeros(3)}),
                      r"c_attn.weight is \(3,\), expected \(36, 12\)"),
    "whole numbers": (edit_weights(lambda t: t | {C_ATTN: t[C_ATTN].long()}), "of torch.int64"),
    "sparse": (edit_weights(lambda t: t | {C_ATTN: t[C_ATTN].to_sparse()}), "not plain, dense"),
    "many missing": (edit_weights(lambda t: {k: t[k] for k in list(t)[:2]}), r"and \d+ more"),
    "another head": (edit_weights(lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1}),
                     "lm_head.weight differs"),
    "cut safetensors": (file_of("model.safetensors", struct.pack("<Q", 99)), NO_SAFETENSORS),
    "foreign safetensors": (file_of("model.safetensors", b"hi"), NO_SAFETENSORS),
    "safetensors without a header": (safetensors_of(), NO_SAFETENSORS),
    **{f"safetensors of {kind} {shape}": (
        safetensors_of(dtype=kind, shape=shape, data_offsets=[0, 8]), f"{NO_SAFETENSORS}.*{said}")
       for kind, shape, said in (("F32", [3], "a has 8 bytes"), ("F32", [-1], ""),
                                 ("F32", [2.0], ""), ("F4", [2], "F4"))}}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_of_weights_that_does_not_fit_is_named_in_one_line(tmp_path, case):
    """ValueError: which file, and what is missing, extra, cut or foreign."""
    edit, problem = UNREADABLE[case]
    gpt_for_files().save_pretrained(tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=problem) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert str(tmp_path) in str(caught.value)


def test_what_is_usual_may_be_left_out_or_spelled_out(tmp_path):
    """n_ctx for n_positions, n_inner = 4 n_embd, no model_type; no prefix, no lm_head, a mask."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path)
    edit_config(n_positions="absent", n_inner=48, eos_token_id="absent",
                model_type="absent")(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == gpt.config  # the last token ends a text
    for given, taken in ((4, 4), (50256, 10)):  # 50256 is Hugging Face's default
        edit_config(eos_token_id=given)(tmp_path)
        assert GPT.from_pretrained(tmp_path).config.eos_token == taken
    tensors = load_checkpoint(tmp_path / "pytorch_model.bin")
    del tensors["lm_head.weight"]
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 10, 10, dtype=torch.uint8)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(GPT.from_pretrained(tmp_path), gpt)


def test_what_is_saved_is_not_hidden_behind_another_file(tmp_path):
    """Beside a model.safetensors nobody would read pytorch_model.bin: refused."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors"):
        gpt_for_files().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_name_is_downloaded_once_to_torchs_cache(tmp_path, monkeypatch):
    """Its two files; without a network, one line that says where to put them."""
    gpt, fetched = gpt_for_files(), []
    gpt.save_pretrained(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: fetched.append(
        url) or shutil.copy(tmp_path / "hub" / url.split("/")[-1], path))
    assert same(GPT.from_pretrained("gpt2-medium"), gpt)
    assert same(GPT.from_pretrained("gpt2-medium"), gpt)
    assert fetched == [f"https://huggingface.co/gpt2-medium/resolve/main/{name}"
                       for name in ("config.json", "pytorch_model.bin")]
    (tmp_path / "hub" / "config.json").unlink()  # an OSError, as without a network
    with pytest.raises(ValueError, match="gpt2: cannot download .*config.json.*No such file.*"
                                         "offline, put .*cache/checkpoints/gpt2$"):
        GPT.from_pretrained("gpt2")


def test_transformers_computes_the_same_logits(tmp_path):
    """The original GPT-2, where it is installed, of a policy; we read its file and its trunk."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    policy, tokens = ActorCritic(gpt_for_files()), torch.randint(11, (4, 10), generator=draws())
    policy.gpt.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    close(policy(tokens)[0], theirs(tokens).logits, 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")  # safetensors, with their config
    theirs.transformer.save_pretrained(tmp_path / "trunk")  # without a prefix
    for name in ("theirs", "trunk"):
        again = GPT.from_pretrained(tmp_path / name)
        assert again.config == policy.gpt.config and same(again, policy.gpt)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Written under a temporary name, then renamed: killed in between, the old one stays."""
    path = tmp_path / "lm.pt"
    save_checkpoint(path, {"step": 1, "w": torch.ones(2)})
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["lm.pt"]
    monkeypatch.setattr(os, "replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    with pytest.raises(OSError):
        load_checkpoint(tmp_path / "none.pt")


# =================================================================================================
# The program: explain, and the frontier
# =================================================================================================

def explained(capsys, first_run, *arguments):
    """What `explain` prints: text, {column: (T,)}, tokens, which are clipped, {formula: sum}."""
    text = printed(capsys, "explain", "--out_dir", first_run.out, *arguments)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(" t token"))
    names = re.split(" +", lines[at][13:].replace("log ", "log-").strip())
    rows = [line.split() for line in lines[at + 1:lines.index("", at)]]
    assert all(len(row) == 2 + len(names) and row[0] == str(t) for t, row in enumerate(rows))
    columns = {name: np.array([float(row[2 + i].rstrip("*")) for row in rows])
               for i, name in enumerate(names)}
    sums = dict(re.match(r"(.+?)  +(-?[\d.]+ = .+)", line).groups() for line in lines
                if re.search(r"  -?[\d.]+ = ", line))
    return text, columns, [row[1] for row in rows], [row[-1][-1] == "*" for row in rows], sums


def test_the_columns_of_explain_are_tied_by_the_equations_of_the_derivation(first_run, capsys):
    """KL, r_t, Σ γ^k r_{t+k}, δ_t, Σ (γλ)^k δ_{t+k}: the printed table, recomputed as sums."""
    beta, gamma, lam = 0.3, 0.9, 0.7
    text, c, tokens, _, sums = explained(capsys, first_run, "The acting in", "--kl_coef", beta,
                                         "--gamma", gamma, "--lam", lam, "--missing_eos_score=-2")
    assert list(c) == ["log-π", "log-ref", "KL", "r", "to-go", "V", "δ", "A", "ratio"]
    T, score = len(tokens), float(re.search(r"Σ r .* = (-?[\d.]+) - 0.3 · ", text)[1])
    V = np.append(c["V"], 0)
    for t in range(T):
        k = np.arange(T - t)
        for name, expected in (
                ("KL", c["log-π"][t] - c["log-ref"][t]),
                ("r", -beta * c["KL"][t] + (score if t == T - 1 else 0)),
                ("to-go", (gamma**k * c["r"][t:]).sum()),
                ("δ", c["r"][t] + gamma * V[t + 1] - V[t]),
                ("A", ((gamma * lam)**k * c["δ"][t:]).sum())):
            assert c[name][t] == pytest.approx(expected, abs=0.004), (t, name)
    assert T > 2 and all(np.abs(c[name]).max() > 0.005 for name in c)
    assert ("was cut" in text) == (tokens[-1] != "<end>") == (score == -2)
    assert len(sums) == 6
    for formula, numbers in sums.items():  # a pocket calculator
        left, right = numbers.split(" = ")
        assert eval(right.replace("·", "*")) == pytest.approx(float(left), abs=0.004), formula
    assert text.startswith("The acting in|") and max(map(len, text.splitlines())) <= 80


def test_explain_reads_the_policy_of_the_run_or_the_untrained_one(first_run, capsys):
    """log π, log π_ref and V by a pass over each state; step 0: π = π_ref and V = 0."""
    *models, _, encoding = rlhf.load_models(first_run.config)
    heat = first_run.config.temperature
    prompt = dataset.read_records(first_run.out / "samples.jsonl")[1]["prompt"]
    x = [1023, *encoding.encode_ordinary(prompt)]
    for flags, policy in ([], models[2]), (["--step", 0], ActorCritic(models[0])):
        text, c, tokens, _, _ = explained(capsys, first_run, *flags, "--seed", 1)
        assert " ".join(text.split()).startswith(" ".join(prompt.split()) + "|")
        assert f"P = {len(x)} tokens" in text and f"position {len(x) - 1} + t" in text
        y = rollout(policy, [x], 8, 1023, heat, rlhf.seeded(1, "explain", 0)).actions[0].tolist()
        assert len(y) == len(tokens)
        for t, a in enumerate(y):
            _, values = policy(torch.tensor([x + y[:t]]))
            for name, value in (("log-π", log_pi(policy, x + y[:t], heat)[a]), ("V", values[0, -1]),
                                ("log-ref", log_pi(models[0], x + y[:t], heat)[a])):
                assert c[name][t] == pytest.approx(value.item(), abs=0.001), (t, name)
        assert ("untrained" in text) == (not c["KL"].any()) == (not c["V"].any()) == bool(flags)


def test_the_ratios_of_explain_are_those_after_one_update(first_run, capsys):
    """clip(ρ_t): 1 at a learning rate of 0; else up where A is above its mean; * beyond 1 ± ε."""
    _, c, _, clipped, _ = explained(capsys, first_run, "The acting in", "--ppo_lr", 1e-12)
    assert (c["ratio"] == 1).all() and not any(clipped)
    _, c, _, clipped, _ = explained(capsys, first_run, "The acting in", "--clip", 0.003)
    edge = np.isin(c["ratio"], (0.997, 1.003))
    assert (c["ratio"][clipped] != 1).all() and edge[clipped].all() and any(clipped)
    assert (np.abs(c["ratio"] - 1) < 0.0031).all()
    _, c, _, _, _ = explained(capsys, first_run, "The acting in", "--clip", 0.5)
    assert ((c["A"] - c["A"].mean()) * (c["ratio"] - 1)).sum() > 0


def test_explain_is_in_colour_on_a_terminal_only_and_not_where_no_color_is_set(
        first_run, capsys, monkeypatch):
    """A in green above 0, else in red; without the colours the text is the same."""
    plain, c, *_ = explained(capsys, first_run, "The")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert explained(capsys, first_run, "The")[0] == plain and "\033" not in plain
    monkeypatch.delenv("NO_COLOR")
    coloured = printed(capsys, "explain", "--out_dir", first_run.out, "The")
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    assert [code == "32" for code in re.findall(r"\033\[(3\d)m", coloured)] == (c["A"] > 0).tolist()


def test_what_explain_cannot_do_is_one_line(second_run, tmp_path, capsys):
    """No run, a step that was not kept, files of another version."""
    out = second_run.out
    assert "lm.pt: no such file" in refused(capsys, "explain", "--out_dir", tmp_path / "none")
    checkpoint = load_checkpoint(out / "policy.pt")
    for key, value in (("config", {"no_such_field": 1}), ("weights", {})):
        save_checkpoint(out / "policy.pt", checkpoint | {key: value})
        for arguments in (["explain"], ["sample", "The"]):
            line = refused(capsys, *arguments, "--out_dir", out)
            assert "policy.pt: not a checkpoint of this version's" in line


def test_best_of_n_is_averaged_over_all_subsets_of_n_samples():
    """E[value of the best-scored of n]: by weights, and by listing every subset."""
    scores, values = normal(2, 3, 6)
    for n in (1, 2, 5, 6):
        listed = [values[row, max(subset, key=lambda i: scores[row, i])]
                  for row in range(3) for subset in itertools.combinations(range(6), n)]
        assert frontier.expected_best(scores, values, n) == pytest.approx(float(np.mean(listed)))


def test_the_frontier_measures_ppo_and_best_of_n_and_goes_on_where_it_was(
        tmp_path, monkeypatch, capsys):
    """KL of best-of-n is log n − (n−1)/n; gains are in std of the language model; done is done."""
    data = small_data(tmp_path / "data", len(RANKS))
    monkeypatch.setattr(dataset, "SHIPPED", data.resolve())
    configs = [Config(**SIZES | {"ppo_iterations": 2, "kl_coef": kl_coef}, data_dir=str(data),
                      out_dir=str(tmp_path / "frontier" / "seed0")) for kl_coef in (0.0, 0.5)]
    real = frontier.best_of_n
    monkeypatch.setattr(frontier, "best_of_n", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # stopped in the last of three jobs
        frontier.study(configs, tmp_path, samples=4, prompts=2)
    monkeypatch.setattr(frontier, "best_of_n", real)
    monkeypatch.setattr(frontier, "ppo", lambda *a: 1 / 0)  # and goes on there
    records = frontier.study(configs, tmp_path, samples=4, prompts=2)
    assert records == frontier.study(configs, tmp_path, samples=4, prompts=2)
    assert records == dataset.read_records(tmp_path / "frontier.jsonl")
    assert [(r["method"], r.get("kl_coef")) for r in records] == [
        ("ppo", 0.0), ("ppo", 0.5), ("best_of_n", None)]
    ppo, best = records[1], records[2]
    samples = dataset.read_records(tmp_path / "frontier" / "seed0" / "samples.jsonl")
    for name in ("reward", "true_reward"):
        lm = [sample[f"{name}_lm"] for sample in samples]
        assert ppo[name] == pytest.approx(np.mean([sample[f"{name}_ppo"] for sample in samples]))
        assert frontier.gain(ppo, name, max(lm)) == pytest.approx(
            (max(lm) - np.mean(lm)) / np.std(lm, ddof=1))
        assert best[name][0] == pytest.approx(best[f"{name}_lm"])  # the best of 1 is any
    assert best["n"] == [1, 2, 4] and best["reward"] == sorted(best["reward"])
    assert best["kl"] == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    assert len(ppo["path"]) == 2 and ppo["kl"] == pytest.approx(np.mean([s["kl"] for s in samples]))
    if importlib.util.find_spec("matplotlib"):
        frontier.main(["--draw", "--out_dir", str(tmp_path)])
        assert (tmp_path / "frontier.png").read_bytes()[1:4] == b"PNG"
    assert "frontier.py: [Errno 2]" in refused(capsys, "--draw", "--out_dir", tmp_path / "no",
                                               entry=frontier.main, program="frontier.py")


# =================================================================================================
# The program: the command line
# =================================================================================================

# A field, values that are refused, values at the edge that are not.
EDGES = {"block_size": ([0, -1], []), "n_layer": ([0], [1]), "n_head": ([0, 3], [1]),
         "n_embd": ([0, 130], []), "lm_batch_size": ([0, -4], [1]), "rm_batch_size": ([0], [1]),
         "max_new_tokens": ([0, -1, 10**6], [1]), "ppo_batch_size": ([0, -64], []),
         "ppo_epochs": ([0], [1]), "minibatch_size": ([0, 10**6], [1]), "eval_prompts": ([0], [1]),
         "lm_epochs": ([-1], [0]), "rm_epochs": ([-1], [0]), "ppo_iterations": ([-1], [0]),
         "kl_coef": ([-0.1, "nan", "inf"], [0]), "value_coef": ([-1], [0]),
         "entropy_coef": ([-1], [0]), "lm_lr": ([-1e-3], [0]), "rm_lr": ([-1], [0]),
         "ppo_lr": ([-1, "nan"], [0]), "temperature": ([0, -1], [0.1]), "clip": ([0, -0.2], [0.1]),
         "value_clip": ([0], [0.1]), "max_grad_norm": ([0], [0.1]), "gamma": ([2, -0.1], [0, 1]),
         "lam": ([2, -0.1], [0, 1]), "kl_target": ([0, -1], [0.1, "none"]),
         "early_stop_kl": ([0, -1], [0.1, "none"]), "missing_eos_score": (["inf"], [-9, "none"]),
         "micro_batch_size": ([0, -1], [1])}


@pytest.mark.parametrize("field", EDGES)
def test_a_setting_out_of_range_is_refused_in_one_line_that_names_it(capsys, field):
    """Exit status 2 before anything is read or trained; values at the edge are accepted."""
    bad, good = EDGES[field]
    for value in bad:
        assert field in refused(capsys, f"--{field}={value}", entry=rlhf.parse), value
    for value in good:
        _, _, config, _, _ = rlhf.parse([f"--{field}={value}"])
        assert getattr(config, field) == (None if value == "none" else value)


@pytest.mark.parametrize("settings, problem", [
    *[({field: value}, f"^{field} is ") for field, value in (
        ("n_layer", 2.0), ("n_layer", None), ("n_layer", True), ("lam", "high"), ("lam", None),
        ("kl_target", "low"), ("out_dir", 3))],
    *[({field: 2**31}, f"^{field} is .*less than 2")
      for field in ("n_embd", "block_size", "ppo_iterations", "kl_coef")],
    *[({field: 1e300}, f"^{field} is .*float32")
      for field in ("clip", "missing_eos_score", "kl_target")],
    (dict(block_size=20, max_new_tokens=18), "^max_new_tokens is "),
    (dict(ppo_batch_size=8, minibatch_size=9), "^minibatch_size is "),
    (dict(n_head=3, n_embd=13), "^n_embd is ")])
def test_a_setting_of_the_wrong_kind_size_or_company_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Config(**settings)


def test_settings_at_the_edge_and_a_field_that_was_assigned_to(first_run):
    """What just fits is accepted; a run checks again."""
    for fits in (dict(block_size=20, max_new_tokens=17), dict(ppo_batch_size=8, minibatch_size=8),
                 dict(n_head=3, n_embd=12), dict(seed=-2**70), dict(kl_coef=0, kl_target=None)):
        assert dataclasses.asdict(Config(**fits)).items() >= fits.items()
    config = dataclasses.replace(first_run.config)
    config.clip = 0.0
    with pytest.raises(ValueError, match="^clip is 0.0"):
        rlhf.run(config)


@pytest.mark.parametrize("words, problem", [
    ("--n_layer two", "n_layer"), ("--lam x", "lam"), ("--kl_target x", "x"), ("--nope", "--nope"),
    ("--seed", "--seed"), ("train", "train"), ("--n_lay=1", "--n_lay"), ("run prompt", "'prompt'"),
    ("sample", "sample needs a prompt"), ("explain --step 3", "--step"), ("--fresh ../lm", "lm"),
    ("--step 0", "--step is for explain")])
def test_a_command_line_that_cannot_be_read_is_refused(capsys, words, problem):
    assert problem in refused(capsys, *words.split(), entry=rlhf.parse)


def test_every_field_is_a_flag_with_a_line_of_help(capsys):
    """--help lists the fields by stage, each with its comment and default."""
    with pytest.raises(SystemExit) as caught:
        rlhf.main(["--help"])
    text, groups = " ".join(capsys.readouterr().out.split()), rlhf.field_groups()
    assert caught.value.code == 0
    assert list(groups) == ["general", "language model", "reward model", "rollout", "ppo",
                            "evaluation"]
    comments = dict(item for fields in groups.values() for item in fields.items())
    assert list(comments) == [f.name for f in dataclasses.fields(Config)]
    for name, comment in comments.items():
        assert f"--{name}" in text and " ".join(comment.split()[:3]) in text, name
    flags = "--lam 0.5 --data d --seed 3 --out_dir o --fresh --kl_target none".split()
    config = Config(lam=0.5, data_dir="d", seed=3, out_dir="o", kl_target=None)
    assert rlhf.parse(flags) == ("run", None, config, "language_model", None)
    assert rlhf.parse(["sample", "The acting in"])[:2] == ("sample", "The acting in")
    assert rlhf.parse([]) == ("run", None, Config(), None, None)
    assert rlhf.parse(["--fresh", "ppo"])[3] == "ppo"


def test_broken_input_ends_before_training_with_status_2_and_one_line(tmp_path, capsys):
    """An unknown flag, a missing directory, a broken line: no traceback, nothing is written."""
    out = tmp_path / "out"
    broken = write_data(tmp_path / "broken", [GOOD_LINE, "{oops"])
    fine = write_data(tmp_path / "fine", [GOOD_LINE])
    for arguments, problem in ((["--data", tmp_path / "none"], "no such directory"),
                               (["--data", broken], "preferences.jsonl:2: "),
                               (["--data", fine, "--device", "abacus"], "device is 'abacus'"),
                               (["--data", fine, "--n_embd", 2 * 10**9], "not enough memory"),
                               (["sample", "The"], "lm.pt")):
        assert problem in refused(capsys, *arguments, "--out_dir", out)
    done = python(REPO / "rlhf.py", "--data", broken, "--out_dir", out)  # as from a shell
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("rlhf.py: ") and not out.exists()


def test_importing_defines_and_does_nothing_else(monkeypatch, tmp_path):
    """No line printed, no file opened to write, no generator touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *a, **k: 1 / 0)
    monkeypatch.setattr("builtins.open", lambda *a, **k: 1 / 0)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    for name in ("rlhf.py", "model.py", "data/dataset.py", "data/annotator.py"):
        assert runpy.run_path(str(REPO / name), run_name="imported")
    assert torch.equal(torch.get_rng_state(), before[0]) and not os.listdir(tmp_path)
    assert (random.getstate(), torch.get_num_threads()) == before[1:]


EVALUATION_KEYS = (
    "reward_lm reward_ppo win_rate win_rate_low win_rate_high kl ended_lm ended_ppo length_lm "
    "length_ppo reward_model_accuracy language_model_loss seconds seconds_language_model "
    "seconds_reward_model seconds_ppo seconds_evaluation").split()


def test_a_run_leaves_what_the_command_line_promises(first_run):
    """lm.pt, reward.pt, policy.pt, log.jsonl, samples.jsonl; the last record is the evaluation."""
    out, record, config = first_run.out, first_run.record, first_run.config
    log = dataset.read_records(out / "log.jsonl")
    assert sorted(os.listdir(out)) == ["lm.pt", "log.jsonl", "policy.pt", "reward.pt",
                                       "samples.jsonl"]
    data, steps = dataset.load(first_run.data, 128, 8), {"ppo": [1, 2, 3], "evaluation": [1]}
    for stage, n in (
            ("language_model", math.ceil(len(data.train.documents) / config.lm_batch_size)),
            ("reward_model", math.ceil(len(data.train.pairs) / config.rm_batch_size))):
        steps[stage] = sorted({*range(10, n, 10), n})  # every tenth step, and the last
    assert [(row["stage"], row["step"]) for row in log] == [
        (stage, step) for stage in ("language_model", "reward_model", "ppo", "evaluation")
        for step in steps[stage]]
    assert log[-1] == {"stage": "evaluation", "step": 1, **record}
    keys = {"ppo": PPO_KEYS, "evaluation": EVALUATION_KEYS}
    for row in log:
        for key in ["seconds", *keys.get(row["stage"], ["loss", "grad_norm"])]:
            assert math.isfinite(row[key]), (row["stage"], key)
    assert record["seconds"] == pytest.approx(sum(
        v for k, v in record.items() if k.startswith("seconds_")))
    assert not any(key.startswith("true") for key in record)  # not the shipped data
    samples = dataset.read_records(out / "samples.jsonl")
    assert [s["prompt"] for s in samples] == [data.text(p) for p in data.held_out.prompts[:6]]
    for sample in samples:
        assert {"prompt", "lm", "ppo", "reward_lm", "reward_ppo", "kl"} <= sample.keys()
        assert isinstance(sample["lm"], str) and isinstance(sample["ppo"], str)
    assert record["reward_ppo"] == pytest.approx(np.mean([s["reward_ppo"] for s in samples]))


def test_the_figures_of_a_run_are_those_of_its_checkpoints(first_run):
    """Loaded again: the language model's loss, the reward model's accuracy, the held-out rows."""
    record, held = first_run.record, dataset.load(first_run.data, 128, 8).held_out
    lm, reward, policy = [load_checkpoint(first_run.out / name) for name in rlhf.FILES.values()]
    gpt = GPT(GPTConfig(**lm["model"]))
    gpt.load_state_dict(lm["weights"])
    model = RewardModel(gpt)
    model.load_state_dict(reward["weights"])
    assert gpt.config == GPTConfig(1024, 128, 1, 2, 16, 1023)
    loss, accuracy = rlhf.language_model_loss(gpt, held.documents), record["reward_model_accuracy"]
    assert record["language_model_loss"] == pytest.approx(loss)
    assert rlhf.reward_model_accuracy(model, held.pairs) == accuracy
    for checkpoint in (lm, reward, policy):
        assert checkpoint["done"] and Config(**checkpoint["config"]) == first_run.config
        assert checkpoint["state"]["step"] > 0 and "optimizer" in checkpoint["state"]
    assert not torch.equal(policy["weights"]["gpt.wte.weight"], gpt.wte.weight)


def test_a_second_identical_run_loads_every_stage_and_gives_the_same_figures(first_run, second_run):
    """In a process of its own, from the command line, with the picture."""
    done = python(REPO / "rlhf.py", *second_run.flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for text in ("language_model: is loaded", "reward_model: is loaded", "ppo: is loaded",
                 "reward_model_accuracy", "language_model_loss", "ended", "before", "after",
                 f"{first_run.record['win_rate']:.3f}"):
        assert text in done.stdout
    picture = second_run.out / "curves.png"
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes()[1:4] == b"PNG"
        picture.unlink()
    else:
        assert "matplotlib is not installed" in done.stdout
    ends_as(first_run, second_run.out)


def test_sample_prints_both_columns_with_score_and_kl(first_run, capsys):
    """`sample PROMPT`: continuations by the language model and by the policy, side by side."""
    given = ["sample", "The acting in", "--out_dir", first_run.out]
    text = printed(capsys, *given)
    lines = [line for line in text.splitlines() if "|" in line]
    assert text.startswith("The acting in")
    assert [side.strip() for side in lines[0].split(" | ")] == ["language model", "PPO policy"]
    heads = [line for line in lines if "[score" in line]
    assert len(heads) == 3 and all(line.count("[score") == line.count("KL") == 2 for line in heads)
    assert all("KL 0.0]" in line.replace("-0.0]", "0.0]").split(" | ")[0] for line in heads)
    assert printed(capsys, *given, "--data", first_run.data) == text
    assert printed(capsys, *given, "--seed", "1") != text


@pytest.mark.parametrize("name, value, loaded", [
    ("kl_coef", 0.2, 2), ("lam", 0.9, 2), ("max_new_tokens", 7, 1), ("rm_lr", 2e-3, 1),
    ("lm_lr", 1e-3, 0), ("seed", 1, 0), ("data", "other", 0), ("FORMAT", 0, 0),
    ("eval_prompts", 5, 3), ("device", "auto", 3)])
def test_a_changed_setting_refuses_the_stages_that_depend_on_it(first_run, monkeypatch, name, value,
                                                                loaded):
    """--kl_coef changed: the language model and the reward model are loaded, PPO's is not."""
    config, data = first_run.config, dataset.load(first_run.data, 128, 8)
    if name == "data":
        data, said = dataclasses.replace(data, fingerprint=value), "other data"
    elif name == "FORMAT":
        monkeypatch.setattr(rlhf, "FORMAT", value)
        said = "another version of this program"
    else:
        said = f"{name} {getattr(config, name)}, now {value}"
        config = dataclasses.replace(config, **{name: value})
    for i, stage in enumerate(rlhf.FILES):
        if i < loaded:
            assert rlhf.find_checkpoint(stage, config, data)["done"]
            continue
        with pytest.raises(ValueError) as caught:
            rlhf.find_checkpoint(stage, config, data)
        assert f".pt was made with {said}: --fresh {stage} starts over" in str(caught.value)


def test_a_changed_kl_coefficient_asks_before_it_trains_ppo_anew(first_run, second_run, capsys):
    """From the command line; and --fresh starts over, to the same weights as the first time."""
    out, flags = second_run.out, second_run.flags
    line = refused(capsys, *flags, "--kl_coef", "0.7")
    was = first_run.config.kl_coef
    assert f"policy.pt was made with kl_coef {was}, now 0.7" in line and "--fresh ppo" in line
    ends_as(first_run, out)
    text = printed(capsys, *flags, "--kl_coef", "0.7", "--fresh", "ppo")
    assert "language_model: is loaded" in text and "reward_model: is loaded" in text
    assert "ppo: is loaded" not in text
    assert not same(weights(out), weights(first_run.out))
    assert [row["stage"] for row in timeless(out)] == [row["stage"] for row in timeless(
        first_run.out)]
    assert "is loaded" not in printed(capsys, *flags, "--fresh")
    ends_as(first_run, out)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:1000]),
                                   lambda path: path.write_bytes(b""), lambda path: path.unlink()],
                         ids=["cut", "empty", "gone"])
def test_a_checkpoint_that_is_cut_short_starts_its_stage_anew_unless_others_build_on_it(
        first_run, second_run, capsys, spoil):
    """The reason is said; where later stages would be lost with it, --fresh is asked for."""
    out = second_run.out
    spoil(out / "lm.pt")
    line = refused(capsys, *second_run.flags)
    assert "lm.pt: no" in line and "reward.pt builds on it: --fresh language_model" in line
    shutil.copy(first_run.out / "lm.pt", out)
    spoil(out / "policy.pt")
    gone = not (out / "policy.pt").exists()
    text = printed(capsys, *second_run.flags)
    assert gone != ("ppo: starts anew, " in text and "not a readable checkpoint" in text)
    assert "reward_model: is loaded" in text and "ppo: is loaded" not in text
    ends_as(first_run, out)


def test_a_run_that_was_interrupted_ends_bit_identical(first_run, tmp_path, capsys):
    """Stopped again and again, in every stage: the same weights, the same log, the same figures."""
    config = dataclasses.replace(first_run.config, out_dir=str(tmp_path / "out"))
    stopped = set()
    for limit in (5, 1, 9, 4, 1, 99):  # it is asked once a step: 14 of them, 9, and 3
        calls = itertools.count()
        try:
            rlhf.run(config, interrupted=lambda: next(calls) >= limit)
        except KeyboardInterrupt:
            stopped.add(len(list((tmp_path / "out").glob("*.pt"))))
    assert stopped == {1, 2, 3}  # it was stopped in each stage
    assert "ppo: goes on at" in capsys.readouterr().out
    ends_as(first_run, tmp_path / "out")


def test_a_run_that_was_killed_before_a_checkpoint_ends_bit_identical(first_run, second_run,
                                                                      monkeypatch):
    """None is saved within SAVE_EVERY seconds; what was logged without one is logged again."""
    monkeypatch.setattr(rlhf, "SAVE_EVERY", time.perf_counter())
    (second_run.out / "policy.pt").unlink()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rlhf, "collect", failing_at(3, MemoryError(), rlhf.collect))
        rlhf.run(second_run.config)
    assert not (second_run.out / "policy.pt").exists()
    dataset.append_record(second_run.out / "log.jsonl", {"stage": "ppo", "step": 9})
    rlhf.run(second_run.config)
    ends_as(first_run, second_run.out)


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, capsys):
    """A first Ctrl-C ends the step and saves; main says that the same command goes on."""
    def pressed(config, fresh, interrupted):
        assert config == Config(seed=3) and fresh == "ppo" and not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "run", pressed)
    with pytest.raises(SystemExit, match="130"):
        rlhf.main(["--seed", "3", "--fresh", "ppo"])
    assert capsys.readouterr().err == (
        "\nstopped; the same command without --fresh goes on from the last checkpoint\n")
    for presses in (1, 2):  # what ends no step leaves after a second, or at the second press
        def busy(config, fresh, interrupted):
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3000):
                time.sleep(0.01)

        monkeypatch.setattr(rlhf, "run", busy)
        with pytest.raises(SystemExit) as caught:
            rlhf.main([])
        assert caught.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_the_shipped_data_are_judged_by_the_true_reward(first_run, tmp_path, monkeypatch):
    """true_reward of both sides, the ceiling of noisy labels, the true reward logged in PPO."""
    copy = small_data(tmp_path / "shipped", len(RANKS))
    monkeypatch.setattr(dataset, "SHIPPED", copy.resolve())
    record = rlhf.run(dataclasses.replace(first_run.config, data_dir=str(copy), ppo_iterations=1,
                                          out_dir=str(tmp_path / "out")))
    samples = dataset.read_records(tmp_path / "out" / "samples.jsonl")
    for side in ("lm", "ppo"):
        true = [annotator.true_reward(sample["prompt"], sample[side]) for sample in samples]
        assert [s[f"true_reward_{side}"] for s in samples] == pytest.approx(true, abs=1e-4)
        assert record[f"true_reward_{side}"] == pytest.approx(np.mean(true), abs=1e-4)
    assert record["true_reward_std_lm"] > 0
    data = dataset.load(copy, 128, 8)
    right = [annotator.true_reward(x, w) > annotator.true_reward(x, l)
             for x, w, l in (map(data.text, pair) for pair in data.held_out.pairs)]
    assert record["reward_model_ceiling"] == pytest.approx(np.mean(right))
    ppo = [r for r in dataset.read_records(tmp_path / "out" / "log.jsonl") if r["stage"] == "ppo"]
    assert len(ppo) == 1 and math.isfinite(ppo[0]["true_reward"])


def test_progress_is_one_line_on_a_terminal_and_plain_lines_in_a_file(capsys, monkeypatch):
    """With rate and time left: step 30 of 40 after 6 s is 5 a second and 2 s to go."""
    for step in range(1, 41):
        rlhf.show_progress("language_model", step, 40, step / 5, {"loss": 1.25})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and not any("\r" in line for line in lines)
    assert lines[-1].startswith("language_model 40/40") and "loss 1.25" in lines[0]
    rlhf.show_progress("ppo", 30, 40, 6.0, {"kl": 0.5, "rollout_tokens_per_s": 1234.5})
    line = capsys.readouterr().out
    assert line.startswith("ppo 30/40") and line.endswith("\n")
    assert "5.0/s" in line and "2 s left" in line and "1,234" in line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    for step in (1, 2, 40):
        rlhf.show_progress("reward_model", step, 40, step / 5, {"loss": 1.25})
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and text.endswith("\n")
    assert [len(line.strip("\n")) for line in text.split("\r\033[K")] == [0, 29, 29, 29]


def test_the_summary_shows_samples_by_the_reward_that_judges(tmp_path, capsys, monkeypatch):
    """Five samples before and after, at most 100 columns wide, then the figures of both sides."""
    samples = [{"prompt": f"Film {i}", "lm": " word" * 60, "ppo": " good.", "reward_lm": 1.5,
                "reward_ppo": 2.5, "true_reward_lm": -3.25, "true_reward_ppo": 4.75}
               for i in range(7)]
    record = {"reward_lm": 1.5, "reward_ppo": 2.5, "true_reward_lm": -3.25, "kl": 6.125,
              "true_reward_ppo": 4.75, "true_reward_std_lm": 0.875, "win_rate": 1.0}
    monkeypatch.setenv("COLUMNS", "300")
    rlhf.summarize(record, samples, tmp_path)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert 90 < max(map(len, lines[:-1])) <= 100 and "Film 4| good." in text
    assert text.count("before  -3.25  Film") == text.count("after  +4.75  Film") == 5
    rows = [" ".join(line.split()) for line in lines]
    for row in ("reward 1.500 2.500", "true_reward -3.250 4.750", "kl 6.125",
                "true_reward_std_lm 0.875", "win_rate 1.000"):
        assert rows.count(row) == 1, row
    assert "reward_ppo" not in text and str(tmp_path) in lines[-1]
    rlhf.summarize({"reward_lm": 1.5, "reward_ppo": 2.5}, samples, tmp_path)
    assert "before  +1.50  Film" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_named():
    """auto takes the best there is; another name is checked before training."""
    assert rlhf.pick_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else (
        "mps" if torch.backends.mps.is_available() else "cpu")
    assert rlhf.pick_device("auto").type == best
    with pytest.raises(ValueError, match="^device is 'abacus': "):
        rlhf.pick_device("abacus")


# =================================================================================================
# The program: starting from GPT-2, and the reader as the human
# =================================================================================================

def tiny_bpe(name="gpt2"):
    """The shipped tokenizer, where GPT-2's would need a download and a hundred times the logits."""
    shipped = dataset.read_tokenizer(dataset.SHIPPED / "tokenizer.tiktoken")
    shipped.name = name
    return shipped


def save_tiny_gpt2(directory, seed=0, vocab=1024, context=96):
    config = GPTConfig(vocab, context, 1, 2, 16, 3)
    GPT(config, draws(seed)).save_pretrained(directory)
    return str(directory)


def test_init_starts_from_weights_with_their_sizes_and_tokenizer(tmp_path, monkeypatch, capsys):
    """A run from a random checkpoint; `sample` on it; other weights are not taken for these."""
    monkeypatch.setattr(dataset.tiktoken, "get_encoding", tiny_bpe)
    data = write_data(tmp_path / "data", [pair(f"p{i} the", " good", f" bad {i}")
                                          for i in range(12)], ranks=1)  # of no use: it is not read
    settings = SIZES | dict(init=save_tiny_gpt2(tmp_path / "a"), data_dir=str(data), lm_epochs=0,
                            block_size=8, out_dir=str(tmp_path / "out"), ppo_iterations=1)
    config = Config(**settings)  # its block_size would leave no room; it is not used
    lm, data, used = rlhf.starting_point(config)
    assert lm.config == GPTConfig(1024, 96, 1, 2, 16, 1023)  # the tokenizer's end token
    assert same(lm, GPT.from_pretrained(config.init))
    assert (used.block_size, used.n_layer, used.n_head, used.n_embd) == (96, 1, 2, 16)
    assert any("tokenizer.tiktoken is not used" in note for note in data.notes)
    rlhf.run(config)
    saved = load_checkpoint(tmp_path / "out" / "lm.pt")
    assert same(saved["weights"], lm)  # no epoch: as they were
    assert Config(**saved["config"]) == used
    assert "PPO policy" in printed(capsys, "sample", "the", "--out_dir", config.out_dir)
    moved = dataclasses.replace(used, init=save_tiny_gpt2(tmp_path / "same"), n_embd=4)
    _, data, moved = rlhf.starting_point(moved)
    settings = rlhf.stage_settings(used, data, "language_model")
    assert saved["settings"] == settings == rlhf.stage_settings(moved, data, "language_model")
    _, data, _ = rlhf.starting_point(
        dataclasses.replace(used, init=save_tiny_gpt2(tmp_path / "same", seed=1)))
    settings = rlhf.stage_settings(used, data, "language_model")
    assert [k for k in settings if settings[k] != saved["settings"][k]] == ["init"]


def test_what_cannot_start_from_weights_is_one_line(tmp_path, monkeypatch, capsys):
    """Another vocabulary, too short a context, no such directory, a tokenizer out of reach."""
    data = write_data(tmp_path / "data", [GOOD_LINE])
    monkeypatch.setattr(dataset.tiktoken, "get_encoding", tiny_bpe)

    def answer(init, *more):
        return refused(capsys, "--init", init, "--data", data, "--out_dir", tmp_path / "o", *more)

    assert "no config.json" in answer(tmp_path / "none")
    assert "vocabulary of 999 tokens, expected the 1,024" in answer(
        save_tiny_gpt2(tmp_path / "v", vocab=999))
    tiny = save_tiny_gpt2(tmp_path / "a", context=20)
    assert "at most 17" in answer(tiny, "--max_new_tokens", "18")

    monkeypatch.setattr(dataset.tiktoken, "get_encoding", failing_at(1, ConnectionError()))
    line = answer(tiny, "--max_new_tokens", "9")
    for name in ("vocab.bpe", "encoder.json"):  # tiktoken's name of a cached file
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        assert f"{name} as {hashlib.sha1(url.encode()).hexdigest()}" in line
    assert "TIKTOKEN_CACHE_DIR" in line and not (tmp_path / "o").exists()


def test_gpt2s_own_tokenizer_is_read_from_a_cache(monkeypatch):
    """The names in that line are the right ones: the files lie in an optional directory."""
    if not (SHARED / "tiktoken_gpt2").is_dir():
        pytest.skip("optional data tiktoken_gpt2 is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_gpt2"))
    encoding = dataset.tokenizer_of(None, init="gpt2")
    assert encoding.eot_token == 50256 and encoding.n_vocab == 50257
    assert encoding.encode_ordinary("Hello world") == [15496, 995]


@contextlib.contextmanager
def piped(keys):
    """The end of a pipe from which these keys are read."""
    read, write = os.pipe()
    os.write(write, keys)
    os.close(write)
    try:
        yield read
    finally:
        os.close(read)


def read_rows(directory):
    return list(dataset.read_pairs(directory / "preferences.jsonl"))


def ask(first_run, directory, keys):
    """A sitting of data/label.py whose keys come through a pipe; the rows that it leaves."""
    with piped(keys) as fd:
        label.label(first_run.out, directory, fd)
    return read_rows(directory)


def test_label_appends_each_answer_and_undoes_the_last(first_run, tmp_path, capsys, monkeypatch):
    """left, right, skip, undo, quit: as letters or arrows, with or without line ends."""
    monkeypatch.setenv("COLUMNS", "70")
    rows = ask(first_run, tmp_path / "a", b"l\nr\nq\nl")
    shown = capsys.readouterr().out
    assert len(rows) == 2 and f"answers in {tmp_path / 'a' / 'preferences.jsonl'}: 2;" in shown
    assert all(len(line) <= 70 for line in shown.splitlines()[:-1])
    assert all(x in shown and w != l for x, w, l in rows)
    other = ask(first_run, tmp_path / "b", b"\x1b[C?\x1b[D")  # the other way, ended by the pipe
    assert other == [(x, l, w) for x, w, l in rows]  # the same questions, other answers
    capsys.readouterr()
    # Undo asks the undone pair again, then the one that was on the screen.
    again = ask(first_run, tmp_path / "c", b"lsulu" + b"url" + b"q")
    shown = re.split(r"l left .*\n→ .*\n", capsys.readouterr().out)  # between the answers
    first, second, third, fourth, fifth, sixth, seventh, *_ = map(str.strip, shown)
    assert first == fourth == sixth and third == fifth and len({first, second, third}) == 3
    assert seventh.startswith("nothing of this sitting to undo") and seventh.endswith(first)
    assert again[0] == other[0] and len(again) == 2
    raw = (tmp_path / "c" / "preferences.jsonl").read_text("utf-8").splitlines()
    assert [list(json.loads(line)) for line in raw] == [["prompt", "chosen", "rejected"]] * 2


def test_the_side_that_was_chosen_is_the_chosen_one(tmp_path):
    """l takes the left text, r the right one; an answer is in the file before the next question."""
    def pairs():
        for i in range(2):
            assert len(path.read_text("utf-8").splitlines()) == i
            yield f"p{i}", ["on the left", "on the right"], [False, False]

    path = tmp_path / "preferences.jsonl"
    with piped(b"lr") as fd, open(path, "ab", buffering=0) as file:
        assert label.sitting(file, pairs(), fd) == 2
    assert read_rows(tmp_path) == [("p0", "on the left", "on the right"),
                                   ("p1", "on the right", "on the left")]


def test_label_asks_no_pair_twice_and_goes_on_after_a_torn_end(first_run, tmp_path, capsys,
                                                               monkeypatch):
    """Across sittings; a last line without its end is completed before the next."""
    rows = ask(first_run, tmp_path, b"llll")
    path = tmp_path / "preferences.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    seeded = rlhf.seeded  # the second sitting draws what the first one drew
    monkeypatch.setattr(rlhf, "seeded", lambda seed, stage, step: seeded(seed, stage, step - 4))
    assert len(rows) == 4 and ask(first_run, tmp_path, b"q") == rows
    both = ask(first_run, tmp_path, b"rrrr")
    assert f"answers in {path}: 8;" in capsys.readouterr().out
    assert both[:4] == rows and len({(x, *sorted((w, l))) for x, w, l in both}) == 8


def test_label_undoes_nothing_that_another_wrote(first_run, tmp_path, capsys, monkeypatch):
    """A line that came behind the last answer stays, and so does the answer."""
    path, read_key = tmp_path / "preferences.jsonl", label.read_key

    def key(fd):
        name = read_key(fd)
        if name == "undo":
            dataset.append_record(path, pair("x", "y", "z"))
        return name

    monkeypatch.setattr(label, "read_key", key)
    rows = ask(first_run, tmp_path, b"lu")
    assert len(rows) == 2 and rows[1] == ("x", "y", "z")
    assert "nothing of this sitting to undo" in capsys.readouterr().out


def test_a_directory_of_labels_is_a_data_directory(first_run, tmp_path):
    """The corpus, prompts and tokenizer of the run stand beside the answers: `--data` trains."""
    labels = tmp_path / "labels"
    rows = ask(first_run, labels, b"lrlrlrlr")
    mine, theirs = (dataset.load(path, 128, 8) for path in (labels, first_run.data))
    pairs = mine.train.pairs + mine.held_out.pairs  # so few may stand on both sides
    assert len(set(map(str, pairs))) == len(rows) == 8
    assert mine.train.prompts == theirs.train.prompts
    assert mine.train.documents + mine.held_out.documents
    corpus = labels / "corpus.txt"
    assert corpus.read_bytes() == (first_run.data / "corpus.txt").read_bytes()
    corpus.write_text("mine")
    ask(first_run, labels, b"q")
    assert corpus.read_text() == "mine"  # nothing is written over
    data = SimpleNamespace(train=SimpleNamespace(prompts=["a b", "two\nlines"]),
                           held_out=SimpleNamespace(prompts=[" "]), text=lambda prompt: prompt)
    source = write_data(tmp_path / "source", [GOOD_LINE], len(RANKS))
    for init in (None, "gpt2"):
        (tmp_path / str(init)).mkdir()
        label.complete(tmp_path / str(init), Config(data_dir=str(source), init=init), data)
        assert (tmp_path / str(init) / "prompts.txt").read_text("utf-8") == "a b\n"
        assert (tmp_path / str(init) / "tokenizer.tiktoken").exists() == (init is None)


def test_label_shows_no_control_character_and_marks_a_cut(capsys, monkeypatch):
    """Side by side to the terminal's width; a prompt of several lines keeps them."""
    monkeypatch.setenv("COLUMNS", "40")
    label.show("one\ntwo", ["left \x1b[31m" + "word " * 9, "right"], [False, True])
    text = capsys.readouterr().out
    assert "\x1b" not in text and "one\ntwo\n" in text and "…right […]" in text
    assert max(map(len, text.splitlines()[:-1])) <= 40 and text.count(" | ") == 4


def test_a_terminal_gives_single_keys_and_gets_its_settings_back(first_run, tmp_path):
    """On a pseudo-terminal: no line end is needed, nothing is echoed, also when stopped."""
    termios, pty = pytest.importorskip("termios"), pytest.importorskip("pty")
    master, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    for keys in (b"rlq", None):
        with contextlib.suppress(KeyboardInterrupt), label.single_keys(terminal):
            flags = termios.tcgetattr(terminal)[3]
            assert not flags & termios.ICANON and not flags & termios.ECHO
            assert flags & termios.ISIG  # Ctrl-C still interrupts
            if keys is None:
                raise KeyboardInterrupt
            os.write(master, keys)
            assert [label.read_key(terminal) for _ in keys] == ["right", "left", "quit"]
        assert termios.tcgetattr(terminal) == before
    os.close(master)
    os.close(terminal)


def test_what_label_cannot_do_is_one_line(first_run, tmp_path, capsys, monkeypatch):
    """A file that cannot be appended to, no model, a broken file, a full disk: status 2."""
    (tmp_path / "dir" / "preferences.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    broken = write_data(tmp_path / "broken", ["{oops"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lm.pt").write_bytes((first_run.out / "lm.pt").read_bytes()[:999])
    for arguments, problem in (
            (["--data", tmp_path / "dir"], "cannot append to .*not a file"),
            (["--data", tmp_path / "file"], "cannot append to .*File exists"),
            (["--data", broken], "preferences.jsonl:1: not JSON"),
            (["--data", dataset.SHIPPED], "the shipped data"),
            (["--out-dir", tmp_path / "none"], "lm.pt: no such file"),
            (["--out_dir", tmp_path / "out"], "not a readable checkpoint"), (["--nope"], "--nope")):
        line = refused(capsys, "--out_dir", first_run.out, "--data", tmp_path / "new", *arguments,
                       entry=label.main, program="label.py")
        assert re.search(problem, line), line
    assert not (tmp_path / "new").exists()
    with open(tmp_path / "full", "ab", buffering=0) as file:
        label.append(file, b"whole\n")
        full = SimpleNamespace(name=file.name, seek=file.seek, truncate=file.truncate,
                               write=lambda line: file.write(line[:3]))  # room for three bytes
        with pytest.raises(OSError, match="no room"):
            label.append(full, b"another\n")
    assert (tmp_path / "full").read_bytes() == b"whole\n"


def test_label_runs_as_a_script(first_run, tmp_path):
    done = python(REPO / "data" / "label.py", "--out-dir", first_run.out, "--data", tmp_path,
                  input="l\nr\n", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and len(read_rows(tmp_path)) == 2


# =================================================================================================
# The program: nothing is lost and nothing gets in
# =================================================================================================

def run_and_die(config, owner, name, when, spoil=lambda *_: None):
    """Run in a forked process, which kills itself, as kill -9 does, in a call of owner.name: at the
    first for which when(number of the call, *arguments). Returns the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        real, calls = getattr(owner, name), itertools.count(1)

        def mortal(*arguments):
            if when(next(calls), *arguments):
                spoil(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(owner, name, mortal)
        try:
            rlhf.run(config)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def deaths():
    """Of each stage the first, middle and last part, and a checkpoint's write; then what else is
    written: the log, cut back and added to, and the samples."""
    for stage in rlhf.FILES:
        for share in (0, 0.5, 1):
            yield rlhf, "show_progress", lambda n, at, step, steps, *_, stage=stage, share=share: (
                at == stage and step >= share * steps)
            if share == 0:  # its first checkpoint of this run, half written
                yield os, "fsync", lambda n, file: n == 1, lambda file: os.ftruncate(file, 1000)
    yield os, "replace", lambda n, *_: n == 1  # the log, cut back to the checkpoint
    yield rlhf, "evaluate", lambda n, *_: n == 1
    yield dataset, "append_record", lambda n, *_: n == 1, lambda path, row: path.write_bytes(
        path.read_bytes() + json.dumps(row).encode()[:40])
    yield dataset, "write_records", lambda n, *_: n == 1


def die_again_and_again(out, data):
    """Every death in turn in one folder, then a run to the end. Prints the number of deaths."""
    rlhf.SAVE_EVERY, curves.draw, count = 0, lambda out: "", 0
    config = Config(**SIZES, data_dir=data, out_dir=out)
    rlhf.make_optimizer(torch.nn.Linear(1, 1), 0.1)  # imports the rest of torch, once for all
    for death in deaths():
        assert run_and_die(config, *death) == signal.SIGKILL
        count += 1
        for path in Path(out).glob("*.pt"):
            load_checkpoint(path)
    assert run_and_die(config, rlhf, "run", lambda *_: False) == 0
    print(f"deaths: {count}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_kill_at_any_moment_changes_what_a_run_leaves(first_run, tmp_path):
    """Killed 16 times in one folder: weights, log and samples are those of an undisturbed run."""
    code = "import sys, test_rlhf; test_rlhf.die_again_and_again(*sys.argv[1:])"
    done = python("-c", code, tmp_path / "out", first_run.data)  # forks before any thread starts
    assert done.returncode == 0 and "deaths: 16\n" in done.stdout, done.stderr
    ends_as(first_run, tmp_path / "out")


def test_no_two_runs_write_to_one_folder(second_run, capsys):
    pytest.importorskip("fcntl")
    out, flags = second_run.out, second_run.flags
    with dataset.locked(out):
        assert f"{out}: another run is writing there" in refused(capsys, *flags, "--fresh")
        assert (out / "policy.pt").exists()
    printed(capsys, *flags)
    with pytest.raises(MemoryError), dataset.locked(out):
        raise MemoryError
    with dataset.locked(out):
        pass


def test_no_full_disk_or_unwritable_folder_costs_more_than_a_line(second_run, tmp_path, capsys,
                                                                  monkeypatch):
    """One line names the place; the last good checkpoint is readable, nothing half is left."""
    out, flags = second_run.out, second_run.flags
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(rlhf, "SAVE_EVERY", 0)
    monkeypatch.setattr(os, "fsync", failing_at(2, full))
    line = refused(capsys, *flags, "--fresh", "ppo")
    assert str(out) in line and full.strerror in line
    assert load_checkpoint(out / "policy.pt")["state"]["step"] == 1
    assert not list(out.glob("*.tmp"))
    monkeypatch.setattr(Path, "write_bytes", failing_at(1, full))
    assert full.strerror in refused(capsys, *flags)
    monkeypatch.undo()
    (tmp_path / "file").write_text("not a directory")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"rlhf.py: {place}: " in refused(capsys, *flags, "--out_dir", place)


class Explosive(str):
    """A pickle that would make a directory of this name while it is read."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_no_code_in_a_file_of_weights_runs(first_run, tmp_path, capsys):
    """A pickle that would make a directory is refused; where it is lm.pt, its stage starts."""
    gpt_for_files().save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "lm.pt"):
        torch.save({"settings": Explosive(tmp_path / "boom")}, tmp_path / name)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        GPT.from_pretrained(tmp_path)
    config = dataclasses.replace(first_run.config, out_dir=str(tmp_path))
    data = dataset.load(first_run.data, 128, 8)
    assert rlhf.find_checkpoint("language_model", config, data) is None
    assert "starts anew" in capsys.readouterr().out and not (tmp_path / "boom").exists()
    for foreign in ([1, 2], {"weights": {}}):  # readable, and not ours: not to be overwritten
        torch.save(foreign, tmp_path / "lm.pt")
        with pytest.raises(ValueError, match="another version of this program.*--fresh"):
            rlhf.find_checkpoint("language_model", config, data)


def test_no_weight_that_is_not_finite_is_saved(second_run, capsys):
    """A last step that overflows is followed by no loss that would tell; the stage says so."""
    line = refused(capsys, *second_run.flags, "--rm_lr", "9e37", "--rm_batch_size", "1000",
                   "--fresh", "reward_model")
    assert "reward_model: a weight is not finite" in line
    assert not (second_run.out / "policy.pt").exists()


def test_no_data_are_too_small(tmp_path):
    """One pair of one-token answers, a rank a byte, batches of one, the shortest context."""
    directory = write_data(tmp_path / "data", [pair("", "a", "b")], ranks=256, corpus="x\ny\nz",
                           prompts="p")
    ones = dict.fromkeys(("lm_batch_size", "rm_batch_size", "ppo_batch_size", "minibatch_size",
                          "ppo_epochs", "eval_prompts", "max_new_tokens", "n_head", "n_embd"), 1)
    record = rlhf.run(Config(**SIZES | ones | {"block_size": 4}, data_dir=str(directory),
                             out_dir=str(tmp_path / "out")))
    assert all(math.isfinite(value) for value in record.values())


# =================================================================================================
# The program: what the README says of it
# =================================================================================================

LINE_LINK = re.compile(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)")  # [`gae`](rlhf.py#L300)
FILE = re.compile(r"[\w/*-]*\w\.(?:py|md|jsonl?|txt|tiktoken|png|pt|bin|safetensors)\b")
REFRESH = "python -c 'import test_rlhf; test_rlhf.refresh_links()'"


@functools.cache
def definitions(path):
    """{name: its line} of the functions and classes of a file, the first where there are more."""
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    found = [(m[1], i) for i, line in lines if (m := re.match(r" *(?:def|class) (\w+)", line))]
    return dict(reversed(found))


@functools.cache
def known_names():
    """Every name in the program's code and every word of its strings; no comment or docstring."""
    names = set(definitions(REPO / "test_rlhf.py"))
    for path in [REPO / "rlhf.py", REPO / "model.py", *(REPO / "data").glob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            for field in ("name", "arg", "id", "attr", "module"):
                names.update(str(getattr(node, field, "")).split("."))
            if isinstance(getattr(node, "value", None), str) and id(node) not in docstrings:
                names.update(node.value.split())
        names.add(path.stem)
    return names


def faults(text, folder=REPO):
    """What a page of prose names and is not there: links, lines, tests, commands, flags, files,
    and in `code` any name."""
    text, tests, bad = re.sub(r"https?://[^\s)]+", "", text), definitions(REPO / "test_rlhf.py"), []

    def need(ok, fault):
        bad.extend([] if ok else [fault])

    for target in re.findall(r"\]\(([^)#]*)[^)]*\)", text):
        need((folder / target).exists(), f"no file {target}")
    for words, target in re.findall(r"\[([^][]*)\]\(([^)]*#L[^)]*)\)", text):
        need(LINE_LINK.match(f"[{words}]({target})"), f"{target} is not linked by a `name`")
    for name, path, line in LINE_LINK.findall(text):
        at = definitions(folder / path).get(name) if (folder / path).exists() else None
        need(at == int(line), f"{path}#L{line} is not {name}, which is at {at}; {REFRESH}")
    for name in re.findall(r"\btest_\w+", text):
        need(name in tests or name == "test_rlhf", f"no test {name}")
    for part in re.findall(r"pytest.* -k (\w+)", text):
        need(any(part in name for name in tests), f"no test with {part} in its name")
    for word in re.findall(r"python3? rlhf\.py ([a-z]\w*)", text):
        need(word in ("run", "sample", "explain"), f"no command {word}")
    for flag in re.findall(r"(?<![\w-])--[a-z]\w*", text):
        need(flag in known_names() or hasattr(Config, flag[2:]), f"no flag {flag}")
    for name in FILE.findall(text):
        there = (REPO / name).exists() or (folder / name).exists()
        need(there or Path(name).name in known_names(), f"no file {name}")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^()`]*\))?`", prose):
        for part in [] if FILE.fullmatch(name) else name.split("."):
            need(part in known_names(), f"no {part} in the code")
    return bad


def refresh_links():
    """Set the line numbers of the README's links to those of the definitions."""
    page = REPO / "README.md"
    page.write_text(LINE_LINK.sub(
        lambda m: f"[`{m[1]}`]({m[2]}#L{definitions(REPO / m[2]).get(m[1], m[3])})",
        page.read_text("utf-8")), "utf-8")


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
def test_what_the_prose_names_is_there(page):
    """Functions, flags, files, tests, and the line of each link."""
    path = REPO / page
    assert not faults(path.read_text("utf-8"), path.parent), "\n".join(
        faults(path.read_text("utf-8"), path.parent))


@pytest.mark.parametrize("text, fault", [
    ("`gae`, `gae(rewards, values)`, `Config.lam`, `lm.pt`, `--kl_coef`, `data/curves.py`", None),
    ("`gea`", "no gea "), ("`Config.lamb`", "no lamb "), ("`rollout_all(x)`", "no rollout_all "),
    ("python rlhf.py --kl_coeff 1", "no flag --kl_coeff"), ("`data/mak.py`", "no file data/mak"),
    ("`lmm.pt`", "no file lmm.pt"), ("as `test_gae_by_heart` shows", "no test test_gae_by_heart"),
    ("pytest -k no_such", "no test with no_such"), ("python rlhf.py trian", "no command trian"),
    ("[x](data/none.md)", "no file data/none.md"), ("![p](data/none.png)", "no file data/none.png"),
    ("[here](rlhf.py#L1)", "rlhf.py#L1 is not linked by"), ("[`gae`](rlhf.py#L1)", "is not gae"),
    ("[`gea`](rlhf.py#L1)", "is not gea, which is at None")])
def test_prose_that_names_what_is_not_there_is_caught(text, fault):
    """Each kind of fault, planted: else the test above could not fail."""
    assert (fault is None and not faults(text)) or any(fault in found for found in faults(text))


def test_the_readme_follows_the_lecture_and_its_equations_are_closed():
    """25 chapters in the order of their time stamps, each with an equation and a link to code."""
    page = (REPO / "README.md").read_text("utf-8")
    sections = page.split("\n## The derivation")[1].split("\n## ")[0].split("\n### ")[1:]
    times = [[int(x) for x in section.splitlines()[0].split(" · ")[1].split(":")]
             for section in sections]
    seconds = [functools.reduce(lambda total, x: 60 * total + x, time) for time in times]
    assert len(sections) == 25 and seconds == sorted(seconds)
    for section in sections:
        title = section.splitlines()[0]
        equation = re.findall(r"```math\n(.*?)\n```", section, re.DOTALL)
        assert len(equation) == 1 and LINE_LINK.search(section), title
        assert re.search(r"\[`test_\w+`\]\(test_rlhf.py#L", section), title
        assert equation[0].count("{") == equation[0].count("}"), title
        assert not re.search(r"\\operatorname|\\text\{[^}]*_", equation[0]), title  # GitHub refuses
        assert section.count("```") % 2 == 0, title


def readme(word):
    """The README's Python lines that have this word."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text("utf-8"), re.DOTALL)
    block, = (block for block in blocks if word in block)
    return block


def test_the_notebook_lines_of_the_readme_train_what_a_run_trains(first_run, monkeypatch, capsys):
    """The very lines, under a Config of reduced size: the weights are those of `rlhf.py`."""
    monkeypatch.setattr(rlhf, "Config", lambda **given: dataclasses.replace(
        first_run.config, out_dir="nowhere", **given))
    names = {}
    exec(readme("rlhf.evaluate"), names)
    for name, file in (("lm", "lm.pt"), ("reward_model", "reward.pt"), ("policy", "policy.pt")):
        assert same(names[name].state_dict(), weights(first_run.out, file)), name
    assert len(names["history"]) == 3 and not (REPO / "nowhere").exists()
    assert names["record"]["win_rate"] == first_run.record["win_rate"]
    assert capsys.readouterr().out.startswith(str(names["record"]["win_rate"]))


def test_the_readmes_reward_of_ones_own_is_learned():
    """The lines as they stand: PPO from a reward that is ten lines of Python, no preferences."""
    names = {}
    exec(readme("def vowels"), names)
    before, after = names["history"][0]["reward"], names["history"][-1]["reward"]
    print(f"{before:.2f} → {after:.2f}")
    assert 0 < before < 0.3 and after > before + 0.2


def test_the_readmes_lines_time_an_iteration(capsys):
    """One of the iterations: what it prints is a time and a rate."""
    exec(readme("perf_counter").replace("range(6)", "range(1)"), {})
    assert re.fullmatch(r"\d+\.\d\d s, [\d,]+ tokens/s\n", capsys.readouterr().out)


def test_the_readmes_lines_save_a_policy(first_run, tmp_path, monkeypatch):
    """out/policy.pt in Hugging Face's layout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(first_run.out)
    exec(readme("save_pretrained"), {})
    policy = weights(first_run.out)
    again = GPT.from_pretrained("hf").state_dict()
    assert all(torch.equal(policy[f"gpt.{name}"], value) for name, value in again.items())


def test_the_readmes_memory_of_gpt2_is_its_arithmetic():
    text = (REPO / "README.md").read_text("utf-8")

    def count(V, S, L, C):
        return V * C + S * C + L * (12 * C * C + 13 * C) + 2 * C

    assert count(11, 10, 2, 12) == sum(p.numel() for p in gpt_for_files().parameters())
    assert f"{count(50257, 1024, 12, 768):,} weights" in text
    sizes = []
    for layers in (2, 4):
        gpt, kept = GPT(GPTConfig(50, 160, layers, 4, 256, 49)), {}

        def keep(tensor):
            if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16):
            gpt.hidden(torch.zeros(2, 160, dtype=torch.long))
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    copies = 12 * 256**2 * 2
    assert round(((sizes[1] - sizes[0]) / 2 - copies) / (2 * 160 * 256)) == 36 and "36 C L" in text
