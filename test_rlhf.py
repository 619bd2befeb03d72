"""The derivation of RLHF, proven step by step: each test is named as the claim that it proves.

The method is a world small enough to list. A GPT of a few hundred parameters in float64, four
tokens, three steps: every trajectory τ can be written down with its probability p_θ(τ), so that

    J(θ) = Σ_τ p_θ(τ) R(τ)

is a formula that autograd differentiates, and each estimator of the derivation has an expectation
and a variance that are computed, not sampled: "unbiased" means equal to 1e-10. The functions under
test are the project's own. What they are compared with is written here, in the plainest way.

    python -m pytest test_rlhf.py -s -k variance_falls   one claim, with the figures it prints
"""
import base64
import builtins
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlhf
from data import dataset, frontier, label, ladder, look, show
from data.reviews import annotator
from model import CONV1D, GPT, ActorCritic, GPTConfig, RewardModel
from rlhf import (Config, Rollout, adapt_kl_coef, collect, entropy, gae, gather_log_probs,
                  kl_estimates, kl_penalized_rewards, masked_mean, policy_gradient_loss,
                  ppo_policy_loss, ppo_update, ranking_loss, reward_model_loss, rewards_to_go,
                  rollout, train_language_model, train_ppo, train_reward_model, value_loss, whiten)

torch.set_num_threads(1)
REPO = Path(rlhf.__file__).resolve().parent
SEEDS = pytest.mark.parametrize("seed", range(3))
f64 = functools.partial(torch.tensor, dtype=torch.float64)

# ======== A world small enough to list ===========================================================
def close(actual, expected, atol=1e-10):
    """Equal up to rounding, in dtype and shape too where `expected` is a tensor."""
    if not torch.is_tensor(expected):
        expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=atol)

def same(a, b):
    """Whether two models, or two dictionaries of weights, are equal to the last bit."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def draws(seed=0):
    return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0):
    return torch.randn(shape, generator=draws(seed), dtype=torch.float64)

def moved_by(model, distance, generator):
    """Add normal noise to every parameter."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(distance * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model

def tiny_gpt(seed=0, vocab=4, layers=1, heads=2, width=4, context=12, std=0.3):
    """A GPT in float64 that is far from its initialisation; the last token ends a text."""
    generator = draws(seed)
    gpt = GPT(GPTConfig(vocab, context, layers, heads, width, vocab - 1), generator).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.div_(math.sqrt(768 / width) if p.dim() == 2 else 1)  # N(0, 0.02) at any width
    return moved_by(gpt, std, generator)

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

def parameters(model):
    """All parameters as one vector (D,)."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def flat_grad(y, model):
    """∂y/∂θ as one vector (D,)."""
    grads = torch.autograd.grad(y, list(model.parameters()), retain_graph=True,
                                allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])

class World:
    """All responses of at most T tokens to a few prompts, each prompt as likely as the others.
    Trajectory n is states[state_of[n, 0]], actions[n, 0], states[state_of[n, 1]], …; a state is
    the tuple of all tokens so far. It ends with the end token, or is cut after T tokens."""

    def __init__(self, prompts, vocab, T):
        self.prompts, eos = prompts, vocab - 1
        responses = [y for n in range(1, T + 1) for y in itertools.product(range(vocab), repeat=n)
                     if eos not in y[:-1] and (y[-1] == eos or n == T)]
        rows = [(x, y) for x in prompts for y in responses]
        self.states = list(dict.fromkeys(x + y[:t] for x, y in rows for t in range(len(y))))
        index = {state: i for i, state in enumerate(self.states)}
        self.state_of, _ = rlhf.pad([[index[x + y[:t]] for t in range(len(y))] for x, y in rows],
                                    "cpu")
        self.actions, self.mask = rlhf.pad([y for x, y in rows], "cpu")              # (N, T)
        self.lengths = self.mask.sum(1)                                              # (N,)
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

    def values(self, p, rewards):
        """V(s) = E[Σ_{t' >= t} r_{t'} | s_t = s] along each trajectory, by its definition."""
        to_go, values = rewards.flip(1).cumsum(1).flip(1), torch.zeros_like(rewards)
        for s in range(len(self.states)):
            through = (self.state_of == s) & self.mask                               # (N, T)
            weights = p[:, None] * through
            values[through] = (weights * to_go).sum() / weights.sum()
        return values

RAGGED = [(3, 1), (3, 2, 0, 1)]  # two prompts of different length; each begins with the end token
@functools.cache
def listed(seed):
    """A world with a policy and random rewards r(s, a), and all that is exact about the two."""
    world, gpt = World(RAGGED, 4, 3), tiny_gpt(seed)
    log_probs = world.read(world.table(gpt))
    rewards = world.read(normal(len(world.states), 4, seed=seed))
    p = world.probability(log_probs)
    J = (p * rewards.sum(1)).sum()                       # Σ_τ p(τ) R(τ): autograd does the rest
    slopes = torch.stack([torch.stack([flat_grad(x, gpt) for x in log_pi(gpt, state)])
                          for state in world.states])    # ∇log π(a|s), (states, V, D)
    slopes = slopes[world.state_of, world.actions] * world.mask[..., None]           # (N, T, D)
    return SimpleNamespace(
        world=world, gpt=gpt, mask=world.mask, lengths=world.lengths, rewards=rewards,
        log_probs=log_probs.detach(), p=p.detach(), J=J.detach(), grad_J=flat_grad(J, gpt),
        grad_log_pi=slopes, values=world.values(p.detach(), rewards))

def gradients(w, loss):
    """What each trajectory estimates ∇J to be, (N, D): −∂loss/∂θ of a batch of it alone, which
    by the chain rule is −Σ_t ∂loss/∂log π(a_t|s_t) · ∇log π(a_t|s_t).
    loss(log_probs (1, T), row): the project's loss of one trajectory; `row` is a slice."""
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

def sgd(model, lr):
    """Plain gradient descent: the step is −lr times the gradient, so it shows the gradient."""
    return torch.optim.SGD(model.parameters(), lr=lr)

def plain_gpt2(gpt, tokens):
    """Logits by the formulas of GPT-2, one head at a time, in operations that hide nothing."""
    w, c, S = gpt.state_dict(), gpt.config, tokens.shape[1]
    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / std * w[f"{name}.weight"] + w[f"{name}.bias"]
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    future = torch.full((S, S), -math.inf, dtype=torch.float64).triu(1)
    x = w["wte.weight"][tokens] + w["wpe.weight"][:S]
    for i in range(c.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        heads = []
        for q, k, v in zip(*(part.chunk(c.n_head, -1) for part in qkv)):
            scores = q @ k.transpose(1, 2) / math.sqrt(c.n_embd / c.n_head) + future
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def test_the_network_computes_what_gpt2_computes():
    """Pre-norm blocks, causal softmax(q kᵀ / √hs) v, tanh GELU, tied output embedding."""
    gpt = tiny_gpt(5, vocab=11, layers=2, heads=3, width=12, context=20)
    tokens = torch.randint(11, (3, 20), generator=draws())
    for S in (1, 7, 16, 20):
        close(gpt(tokens[:, :S]), plain_gpt2(gpt, tokens[:, :S]))
    with pytest.raises(ValueError, match="21 tokens do not fit the context of 20"):
        gpt(torch.zeros(1, 21, dtype=torch.long))

def test_weights_start_as_in_gpt2_and_the_reward_head_near_unit_variance():
    """N(0, σ), σ = 0.02 √(768 / C), and σ / √(2 n_layer) where a layer writes to the residual
    stream; biases are 0. The head: N(0, 1/(C+1)), so that scores start with std near 1."""
    gpt, again = [GPT(GPTConfig(300, 64, 3, 4, 64, 299), draws()) for _ in range(2)]
    assert same(gpt, again)
    for name, p in gpt.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 * math.sqrt(768 / 64) / (math.sqrt(6) if "c_proj" in name else 1)
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean()) < std / 10, name
    head = RewardModel(gpt, draws()).reward_head
    close(head.weight, torch.empty(1, 64).normal_(generator=draws()) / math.sqrt(65), 1e-6)
    assert head.bias == 0

def check_gradient_step(train, model, data, config, expected):
    """The loop's single step has this loss, and goes down its gradient by the learning rate 0.1."""
    gradient, before = flat_grad(expected, model), parameters(model)
    metrics, = train(model, data, config, sgd(model, 1.0))
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-10)
    close(before - parameters(model), 0.1 * gradient)

def test_language_model_loss_is_minus_the_mean_log_probability_of_the_next_token():
    """−E log π(x_{i+1} | x_1 … x_i) over all predicted tokens; training goes down its gradient."""
    gpt = tiny_gpt(0)
    documents = [[3, 1, 3], [3, 0, 0, 2, 1, 3], [3, 3], [3, 2, 2, 3], [3, 1, 1, 1, 3]]
    terms = [-log_pi(gpt, d[:i])[d[i]] for d in documents for i in range(1, len(d))]
    expected = sum(terms) / len(terms)
    for times in (1, 9):  # in batches of any size
        assert rlhf.corpus_loss(gpt, documents * times) == pytest.approx(expected.item(), abs=1e-10)
    config = Config(lm_epochs=1, lm_batch_size=5, lm_lr=0.1, max_grad_norm=1e9)
    check_gradient_step(train_language_model, gpt, documents, config, expected)

# ======== 2. Reward model: preferences become a number ===========================================
def test_reward_model_loss_is_minus_the_mean_log_sigmoid_of_the_margin():
    """L = −E log σ(r_w − r_l) = E log(1 + e^{r_l − r_w}): only differences are ever learned."""
    a, b = normal(2, 50)
    close(reward_model_loss(a, b), np.log1p(np.exp((b - a).numpy())).mean())
    close(reward_model_loss(a + 7, b + 7), reward_model_loss(a, b))
    zero, more = f64([0.0]), f64([math.log(3.0)])
    close(reward_model_loss(zero, zero), math.log(2))      # no opinion: log 2
    close(reward_model_loss(more, zero), math.log(4 / 3))  # σ(log 3) = 3/4
    close(reward_model_loss(zero, more), math.log(4))      # the wrong order
    low, high = torch.tensor([-1000.0], requires_grad=True), torch.tensor([1000.0])
    loss = reward_model_loss(low, high)  # log(sigmoid(·)) would be log 0, with a gradient of NaN
    loss.backward()
    assert loss == ranking_loss(torch.stack([low, high], 1)) == 2000 and low.grad == -1

def test_ranking_loss_is_equation_1_of_instructgpt():
    """L = −1/C(K,2) Σ_{i<j} log σ(r_i − r_j), best first, and its mean over prompts."""
    for K in (2, 3, 4, 9):
        scores = normal(6, K)
        terms = [np.log1p(np.exp(r[j] - r[i])) for r in scores.numpy()
                 for i, j in itertools.combinations(range(K), 2)]
        close(ranking_loss(scores), sum(terms) / math.comb(K, 2) / 6)

@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_minimiser_on_infinitely_many_labels_is_the_true_reward_up_to_a_constant(K):
    """argmin_r E L(r) = r* + c on Plackett–Luce rankings, and on their pairs: Bradley–Terry.
    P(y_1 ≻ … ≻ y_K) = Π_k e^{r*_k} / Σ_{l >= k} e^{r*_l}: the best, then the best of the rest."""
    true = f64([0.5, -1.2, 2.0, 0.0])
    def expected_loss(others):
        r, total = torch.cat([f64([0.0]), others]), 0  # c: the first is 0
        for ranking in map(list, itertools.permutations(range(4), K)):
            p = math.prod(F.softmax(true[ranking[k:]], 0)[0] for k in range(K))
            total = total + p * ranking_loss(r[ranking][None])
        return total
    found = torch.zeros(3, dtype=torch.float64)
    for _ in range(10):  # Newton: the loss is strictly convex once c is fixed
        slope = torch.autograd.functional.jacobian(expected_loss, found)
        curvature = torch.autograd.functional.hessian(expected_loss, found)
        found = found - torch.linalg.solve(curvature, slope)
    close(found, (true - true[0])[1:])
    assert torch.linalg.eigvalsh(curvature).min() > 0  # a minimum, not any stationary point

def tiny_reward_model(bias=0.7, **sizes):
    model = RewardModel(tiny_gpt(**sizes), draws())
    torch.nn.init.constant_(model.reward_head.bias, bias)
    return model

def score_alone(model, row):
    """r = w · h_last + b, (), by a pass over this row alone."""
    h = model.gpt.hidden(torch.tensor([row]))[0, -1]
    return h @ model.reward_head.weight[0] + model.reward_head.bias[0]

def test_every_response_is_read_at_its_end_and_every_prompt_weighs_the_same():
    """−(1/B) Σ_x 1/C(K_x,2) Σ_pairs log σ(r_w − r_l): one batch may hold rankings of different K.
    Scores of one padded pass are those of each row alone; training goes down this gradient, and
    accuracy is the share of pairs in the right order, a tie half, averaged in the same way."""
    model = tiny_reward_model()
    comparisons = [  # (prompt, responses, best first): K = 2, 3, 4 and 2, the last with a tie
        ([3, 1], [[2, 0, 3], [3]]), ([3], [[3], [1, 1, 1, 3], [0, 3]]),
        ([3, 0], [[2, 3], [1, 3], [0, 0, 3], [2, 2, 2, 2, 3]]), ([3, 2], [[1, 3], [1, 3]])]
    alone = [torch.stack([score_alone(model, x + y) for y in ys]) for x, ys in comparisons]
    groups = rlhf.score_comparisons(model, comparisons)  # K = 2, twice, then 3, then 4
    close(torch.cat([g.flatten() for g in groups]), torch.cat([*alone[::3], *alone[1:3]]))
    shares = [np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.combinations(r.tolist(), 2)])
              for r in alone]
    many = [0] * 40 + [1, 2, 3]  # more than one batch
    accuracy = rlhf.reward_model_accuracy(model, [comparisons[i] for i in many])
    assert accuracy == pytest.approx(np.mean([shares[i] for i in many]))
    config = Config(rm_epochs=1, rm_batch_size=4, rm_lr=0.1, max_grad_norm=1e9)
    expected = sum(ranking_loss(scores[None]) for scores in alone) / 4
    check_gradient_step(train_reward_model, model, comparisons, config, expected)

@pytest.mark.parametrize("bias, weight, only_rounding", [(5.0, 1.0, False), (1e5, 1e-2, True)])
def test_normalized_scores_have_mean_0_and_std_1_on_samples_of_the_reference(
        bias, weight, only_rounding, monkeypatch, capsys):
    """r ← (r − E r) / σ_r over samples of π_ref: PPO's constants assume that scale.
    Near 1e5 floats lie 0.008 apart. Where σ_r is only such rounding, nothing is divided by it."""
    reference, model, seen = tiny_gpt(1).float(), tiny_reward_model(bias).float(), []
    model.reward_head.weight.data *= weight
    before, sample = copy.deepcopy(model), rlhf.rollout
    monkeypatch.setattr(rlhf, "rollout", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])
    rlhf.normalize_rewards(model, reference, [[3, 1], [3, 2]], Config(max_new_tokens=5))
    assert ("not scaled" in capsys.readouterr().out) is only_rounding
    assert same(model.gpt, before.gpt)
    old, new = [torch.cat([rlhf.reward_scores(m, r) for r in seen]) for m in (before, model)]
    assert len(new) >= 256 and old.std() > 1e-4
    std = 1 if only_rounding else old.std(correction=0)
    close(new, (old - old.mean()) / std, 0.02 if only_rounding else 1e-5)
    assert torch.equal(model.reward_head.weight, before.reward_head.weight) is only_rounding

@pytest.mark.parametrize("context", [16, 20])
def test_a_cut_response_is_scored_at_an_end_token_behind_it(context):
    """r(x, y ⊕ end): the reward model was only ever read at end tokens; padding is not read.
    In a row that fills the context, the end token takes the place of the last token."""
    model, long = tiny_reward_model(context=context), [3, 3] + [1] * 10
    cut = [0, 1, 0, 2] if context > 16 else [0, 1, 0]
    cases = [([3, 1], [2, 0, 1], [3, 1, 2, 0, 1, 3]),  # cut: an end token is put behind it
             ([3, 0], [1, 3], [3, 0, 1, 3]),           # ended: read where it ended
             ([3, 3, 2, 1], [3], [3, 3, 2, 1, 3]),     # ended at once: one token
             (long, [0, 1, 0, 2], long + cut + [3]),   # cut at the end of the tensor
             (long, [0, 1, 0, 3], long + [0, 1, 0, 3])]
    tokens, actions = torch.full((5, 16), 2), torch.full((5, 4), 3)  # with ends in the padding
    mask = torch.arange(4) < torch.tensor([len(y) for _, y, _ in cases])[:, None]
    for b, (x, y, _) in enumerate(cases):
        tokens[b, :len(x + y)], actions[b, :len(y)] = torch.tensor(x + y), torch.tensor(y)
    batch = Rollout(tokens=tokens.clone(), prompt_lengths=torch.tensor([len(x) for x, *_ in cases]),
                    actions=actions, mask=mask, log_probs=torch.zeros(5, 4))
    scores = rlhf.reward_scores(model, batch)
    close(scores, torch.stack([score_alone(model, read) for *_, read in cases]))
    assert not scores.requires_grad and torch.equal(batch.tokens, tokens)
    assert rlhf.ends(batch, 3).tolist() == [False, True, True, False, True]

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_samples_each_trajectory_with_its_probability(temperature):
    """P(τ is sampled) = p_θ(τ) = p(x) Π_t π_θ(a_t|s_t): chi-square over every trajectory."""
    w, n = listed(1), 20_000
    close(w.p.sum(), f64(1.0))  # Σ_τ p_θ(τ) = 1: the list that all proofs rest on is complete
    r = rollout(w.gpt, [list(x) for x in RAGGED] * n, 3, 3, temperature, draws(4))
    log_probs = w.world.read(w.world.table(w.gpt, temperature)).detach()
    def names(x):  # (P, a_0, a_1, …) of each row: no two trajectories share it
        return [(P, *a[:T]) for P, a, T in zip(x.prompt_lengths.tolist(), x.actions.tolist(),
                                               x.mask.sum(1).tolist())]
    index = {name: i for i, name in enumerate(names(w.world))}
    which = torch.tensor([index[name] for name in names(r)])
    close(r.log_probs, log_probs[which])  # what it reports is what it sampled from
    expected = 2 * n * w.world.probability(log_probs)
    difference = torch.bincount(which, minlength=80) - expected
    chi2, k = (difference**2 / expected)[expected >= 5].sum(), (expected >= 5).sum()
    assert k > 40 and chi2 < k + 4 * (2 * k)**0.5 and difference[expected < 5].sum().abs() < 20

def test_sampling_takes_the_first_token_whose_cumulative_probability_exceeds_u():
    """a = min{a : Σ_{a' <= a} π(a') > u}: u = 0 never gives a token of probability 0."""
    log_p = f64([0.0, 0.25, 0.5, 0.25]).log().expand(6, 4)
    u = f64([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 1e-12])
    assert rlhf.sample_tokens(log_p, u).tolist() == [1, 1, 2, 2, 3, 3]
    short = f64([0.2, 0.2]).log().expand(3, 2)  # rounding: a sum other than 1
    assert rlhf.sample_tokens(short, f64([0.6, 1.0, 0.4])).tolist() == [1, 1, 0]

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cache_ragged_prompts_and_early_ends_change_no_log_prob(temperature):
    """log π(a_t|s_t) reported while sampling = that of a fresh pass over each row alone."""
    gpt = tiny_gpt(2, vocab=7, layers=2, heads=2, width=8, context=24)
    prompts = [[6], [6, 1, 2, 3, 4, 5, 0, 1], [6, 6, 2], [6, 4]] * 12
    r = rollout(gpt, prompts, 12, 6, temperature, draws())
    lengths = r.mask.sum(1).tolist()
    assert len(set(lengths)) > 6 and max(lengths) == 12 and min(lengths) < 3  # a real test
    assert r.tokens.shape == (48, 8 + 12) and r.prompt_lengths.tolist() == [*map(len, prompts)]
    for b, (prompt, n) in enumerate(zip(prompts, lengths)):
        actions = r.actions[b, :n].tolist()
        assert r.tokens[b].tolist() == prompt + actions + [0] * (20 - len(prompt) - n)
        assert r.mask[b].tolist() == [t < n for t in range(12)]
        assert 6 not in actions[:-1] and (actions[-1] == 6 or n == 12)  # ends at the end token only
        assert not r.actions[b, n:].any() and not r.log_probs[b, n:].any()
        alone = gpt(torch.tensor([prompt + actions]))[0, len(prompt) - 1:-1] / temperature
        close(r.log_probs[b, :n], F.log_softmax(alone, -1)[range(n), actions])

def test_rollout_is_a_function_of_its_generator_and_rows_do_not_affect_each_other():
    """τ_b depends on the seed and its own draws: what a neighbour does changes nothing."""
    gpt = tiny_gpt(2, vocab=7, width=8, context=24)
    def responses(prompts, seed):
        r = rollout(gpt, prompts, 6, 6, generator=draws(seed))
        close(r.log_probs[0, 0], log_pi(gpt, prompts[0])[r.actions[0, 0]])  # temperature 1
        assert r.mask.shape[1] == r.mask.sum(1).max()  # as long as the longest response
        return r.lists()[1]
    eight = responses([[6, 1]] * 8, 0)
    assert eight == responses([[6, 1]] * 8, 0) != responses([[6, 1]] * 8, 1)
    assert eight[:7] == responses([[6, 1]] * 7 + [[6, 2, 3]], 0)[:7] and len({*map(len, eight)}) > 1

# ======== 5. Policy gradient, and what its variance falls by =====================================
WEIGHTS = {  # the weights w_t of ∇log π(a_t|s_t) in the order of the lecture
    "REINFORCE": lambda w: w.rewards.sum(1, keepdim=True).expand_as(w.rewards),
    "rewards-to-go": lambda w: rewards_to_go(w.rewards, w.mask),
    "baseline": lambda w: rewards_to_go(w.rewards, w.mask) - w.values,
    "advantage": lambda w: gae(w.rewards, w.values, w.mask, lam=0.0)}
@SEEDS
@pytest.mark.parametrize("name", WEIGHTS)
def test_reinforce_rewards_to_go_baseline_and_advantage_are_unbiased(seed, name):
    """∇J = E[Σ_t ∇log π(a_t|s_t) w_t] for w_t = R(τ), R_t, R_t − V(s_t), and A(s_t, a_t).
    What was earned before a_t, and whatever depends on s_t alone, has expectation 0 against
    ∇log π(a_t|s_t), because Σ_a π ∇log π = ∇Σ_a π = ∇1 = 0."""
    w = listed(seed)
    mean, _ = moments(w.p, policy_gradients(w, WEIGHTS[name](w)))
    close(mean, w.grad_J)

@SEEDS
def test_variance_falls_from_reinforce_to_rewards_to_go_to_baseline_to_advantage(seed):
    """tr Cov[Σ_t ∇log π(a_t|s_t) w_t], exact, falls at each step of the lecture."""
    w = listed(seed)
    falling = [float(moments(w.p, policy_gradients(w, f(w)))[1]) for f in WEIGHTS.values()]
    print(f"\nexact variance of the gradient (trace of its covariance), world {seed}")
    for name, variance in zip(WEIGHTS, falling):
        print(f"    {name:15}{variance:9.4f}{variance / falling[0]:8.1%}")
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

def test_policy_gradient_loss_is_a_sum_over_steps_and_a_mean_over_trajectories():
    """L = −(1/N) Σ_i Σ_t log π(a_t|s_t) w_t: dividing by tokens would favour short responses."""
    log_probs = f64([[-1.0, -2.0, -3.0], [-4.0, 9e9, 9e9]], requires_grad=True)
    weights, mask = f64([[1.0, 0.5, -1.0], [2.0, 9e9, -9e9]]), f64([[1, 1, 1], [1, 0, 0]])
    loss = policy_gradient_loss(log_probs, weights, mask)
    close(loss, -(-1 - 1 + 3 - 8) / 2)
    loss.backward()
    close(log_probs.grad, -weights * mask / 2)

def test_rewards_to_go_and_gae_worked_by_hand():
    """R_t = r_t + γ R_{t+1}: r = (1, 2, 8), γ = ½ gives R = (1 + ½ · 6, 2 + ½ · 8, 8).
    A_t = δ_t + γλ A_{t+1}: r = (0, 0, 1), V = (0.2, 0.4, 0.8), γ = 1, λ = ½ gives
    δ = (0.4 − 0.2, 0.8 − 0.4, 1 − 0.8), A = (0.2 + ½ · 0.5, 0.4 + ½ · 0.2, 0.2)."""
    one, r, values = torch.ones(1, 3), torch.tensor([[0, 0, 1]]), f64([[0.2, 0.4, 0.8]])
    close(rewards_to_go(f64([[1, 2, 8]]), one, 0.5), [[4.0, 6.0, 8.0]])
    close(rewards_to_go(f64([[1, 2, 8]]), one), [[11.0, 10.0, 8.0]])
    close(rewards_to_go(r, one, 0.5), torch.tensor([[0.25, 0.5, 1.0]]))  # nothing is cut to whole
    close(gae(r, values, one, 1.0, 0.5), f64([[0.45, 0.5, 0.2]]))
    close(gae(r, values, one), gae(r, values, one, 1, 0.95))

@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.6), (0.9, 0.0), (0.9, 1.0)])
def test_gae_is_the_weighted_sum_of_the_n_step_estimates(gamma, lam):
    """A_t = (1−λ) (Â¹ + λ Â² + λ² Â³ + …), Âⁿ_t = Σ_{k<n} γ^k r_{t+k} + γⁿ V_{t+n} − V_t.
    All Âⁿ that reach the end are equal, so the first that does, the m-th, has all the weight that
    is left: (1−λ)(λ^{m−1} + λ^m + …) = λ^{m−1}. With m = 2 that is (1−λ) Â¹ + λ Â²."""
    w = listed(0)
    values = normal(*w.mask.shape, seed=9).where(w.mask, 0)
    got = gae(w.rewards, values, w.mask, gamma, lam)
    for i, length in enumerate(w.lengths.tolist()):
        r, v = w.rewards[i, :length].tolist(), values[i, :length].tolist() + [0.0]
        for t in range(length):
            n_step = [sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] - v[t]
                      for n in range(1, length - t + 1)]  # Â¹, Â², …, Âᵐ
            expected = sum((1 - lam) * lam**k * A for k, A in enumerate(n_step[:-1]))
            close(got[i, t], expected + lam**(len(n_step) - 1) * n_step[-1])
    assert lam < 1 or torch.allclose(got, rewards_to_go(w.rewards, w.mask, gamma) - values)

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
    w, bias, variance = listed(seed), [], []
    for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
        A = gae(w.rewards, 0.5 * w.values, w.mask, lam=lam)
        mean, trace = moments(w.p, policy_gradients(w, A))
        bias.append(float((mean - w.grad_J).norm()))
        variance.append(float(trace))
    assert bias[0] > 0.02 and bias[-1] < 1e-10
    assert bias == sorted(bias, reverse=True) and variance == sorted(variance)

# ======== 7. Importance sampling =================================================================
@functools.cache
def moved(seed, distance):
    """θ moved away from θ_old = listed(seed)'s: (log π of its trajectories (N, T), policy)."""
    w = listed(seed)
    policy = moved_by(copy.deepcopy(w.gpt), distance, draws(77))
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
def test_ppos_gradient_is_the_policy_gradient_at_theta_old_and_departs_from_it(seed):
    """∇E_old Σ_t min(ρA, clip(ρ)A) = E Σ_t A_t ∇log π(a_t|s_t) = ∇J where ρ_t = 1.
    Further off, also without a clip, the states that π visits have changed: ρ_t reweighs a_t but
    not s_t, whose own weight is the product of the ratios before it."""
    w = listed(seed)
    A, errors = gae(w.rewards, w.values, w.mask), []
    for distance, clip in ((0.0, 0.2), (0.0, 1e9), (0.01, 1e9), (0.1, 1e9), (0.5, 1e9)):
        log_probs, policy = moved(seed, distance)
        J = (w.world.probability(log_probs) * w.rewards.sum(1)).sum()
        surrogate = -sum(  # the loss is a mean over tokens: times their number, it is a sum
            p * n * ppo_policy_loss(log_probs[i:i + 1], w.log_probs[i:i + 1], A[i:i + 1],
                                    w.mask[i:i + 1], clip)
            for i, (p, n) in enumerate(zip(w.p, w.lengths)))
        errors.append(float((flat_grad(surrogate, policy) - flat_grad(J, policy)).norm()))
    assert max(errors[:2]) < 1e-10 and 1e-3 < errors[2] < errors[3] < errors[4]

def test_ppos_gradient_is_zero_where_clipping_binds_and_whole_on_the_pessimistic_side():
    """∂/∂log π of min(ρA, clip(ρ, 0.8, 1.2)A) = ρA, or exactly 0 where the clipped side is less."""
    cases = [  # ρ, A, the value of the minimum, its slope
        (1.5, 2.0, 1.2 * 2.0, 0.0),           # good and already more likely: clipped
        (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),     # good and less likely: pulled back in full
        (0.5, -2.0, 0.8 * -2.0, 0.0),         # bad and already less likely: clipped
        (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),  # bad and more likely: pushed down in full
        (1.1, 2.0, 1.1 * 2.0, 1.1 * 2.0), (0.9, -2.0, 0.9 * -2.0, 0.9 * -2.0)]  # within the clip
    ratio, A, value, slope = f64(cases).T[:, None]                         # 4 × (1, 6)
    log_probs = (ratio.log() - 1.3).requires_grad_()
    loss = ppo_policy_loss(log_probs, torch.full_like(A, -1.3), A, torch.ones(1, 6))
    loss.backward()
    close(loss, -value.mean())
    close(log_probs.grad, -slope / 6)
    assert not log_probs.grad[slope == 0].any()

def test_the_value_loss_is_the_pessimistic_of_two_squares():
    """½ E max((V − R)², (clip(V, V_old ± ε) − R)²), an upper bound of the plain square.
    ∂/∂V of a term is V − R, or 0 where the clipped square is the larger."""
    V, R = f64([[1.5, 0.5, 1.5, 0.5, 1.1]], requires_grad=True), f64([[2, -1, -1, 2, 2]])
    loss = value_loss(V, torch.ones_like(R), R, torch.ones(1, 5))  # V_old is 1, ε is 0.2
    close(10 * loss, 0.8**2 + 1.8**2 + 2.5**2 + 1.5**2 + 0.9**2)
    loss.backward()
    close(5 * V.grad, [[0.0, 0.0, 2.5, -1.5, -0.9]])

def test_only_the_current_policy_and_value_get_a_gradient():
    """Weights, π_old, A, V_old and R are constants, also where a caller computed them with one."""
    x, mask = normal(8, 6, 5).requires_grad_().unbind(), torch.ones(6, 5)
    losses = {policy_gradient_loss: x[:2], ppo_policy_loss: x[2:5], value_loss: x[5:]}
    for loss, (learned, *constants) in losses.items():
        by_learned, *rest = torch.autograd.grad(loss(learned, *constants, mask),
                                                [learned, *constants], allow_unused=True)
        assert by_learned.any() and all(g is None or not g.any() for g in rest), loss.__name__

def test_entropy_is_exact_and_largest_when_uniform():
    """H = −Σ_a π(a|s) log π(a|s) <= log V, over the valid steps."""
    w = listed(0)
    log_p = w.world.table(w.gpt).detach()[w.world.state_of]
    expected = -(log_p.exp() * log_p).sum(-1)[w.mask].mean()
    close(entropy(log_p + 5 * normal(80, 3, 1), w.mask), expected)
    close(entropy(torch.full((1, 1, 5), 3.0), torch.ones(1, 1)), math.log(5), 1e-6)
    assert entropy(torch.tensor([[[0.0, 1e4]]]), torch.ones(1, 1)) == 0  # not NaN: 0 log 0 = 0

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_constant_whitens_to_exactly_0(dtype):
    """Without spread there is no signal: 1000.1 everywhere must not become 0.95 by rounding."""
    for value, n in itertools.product((0.0, 1000.1, -0.1, 3e5), (1, 3, 7, 100, 4096)):
        x = torch.full((2, n), value, dtype=dtype)
        for mask in (torch.ones(2, n), torch.arange(n) < torch.tensor([[n], [1]])):
            assert not whiten(x, mask).any(), (value, n)
    x = 1000.1 + 0.01 * normal(2, 100)  # where there is some, its scale is still 1
    assert whiten(x.float(), torch.ones(2, 100)).std() == pytest.approx(1, abs=0.05)
    assert masked_mean(x, torch.zeros(2, 100)) == 0  # nothing valid: no division by 0

# ======== 9. The KL penalty ======================================================================
def pair_of_policies(seed, distance):
    """(π = listed(seed), log π_ref (N, T), KL(π‖π_ref) = Σ_s P(s) KL(π(·|s)‖π_ref(·|s)))."""
    w = listed(seed)
    ref_log_probs, ref = moved(seed, distance)
    pi, log_ref = w.world.table(w.gpt).detach(), w.world.table(ref).detach()
    by_state = (pi.exp() * (pi - log_ref)).sum(1)
    visits = torch.zeros_like(by_state).index_add(  # P(s): how often π comes to s
        0, w.world.state_of[w.mask], w.p[:, None].expand_as(w.mask)[w.mask])
    return w, ref_log_probs.detach(), (visits * by_state).sum()

@SEEDS
def test_the_kl_penalties_of_a_trajectory_have_expectation_minus_beta_kl(seed):
    """E_π Σ_t −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) = −β KL(π‖π_ref).
    With the score, E_π Σ_t r_t = J(π) − β KL(π‖π_ref), the objective of RLHF; so its gradient."""
    w, ref, kl = pair_of_policies(seed, 0.2)
    rewards = kl_penalized_rewards(w.rewards.sum(1), w.log_probs, ref, w.mask, 0.3)
    close((w.p * rewards.sum(1)).sum(), w.J - 0.3 * kl)
    assert kl > 0.05
    log_probs = w.world.read(w.world.table(w.gpt))  # here ∇ does run through the log π in r_t
    objective = w.world.probability(log_probs) * (
        w.rewards.sum(1) - 0.3 * (log_probs - ref).sum(1))
    estimates = policy_gradients(w, rewards_to_go(rewards, w.mask))  # and here it need not
    close(moments(w.p, estimates)[0], flat_grad(objective.sum(), w.gpt))

@SEEDS
def test_k1_and_k3_are_unbiased_and_k3_varies_less_and_exchanged_is_wrong(seed):
    """E_π Σ −Δ = E_π Σ (e^Δ − 1 − Δ) = KL(π‖π_ref), Δ = log π_ref − log π; e^x >= 1 + x.
    Near π_ref k3 varies less. With π and π_ref exchanged it reads several times the KL far off."""
    for distance in (0.05, 0.4, 0.8):
        w, ref, kl = pair_of_policies(seed, distance)
        k1, k3 = kl_estimates(w.log_probs, ref, w.mask)
        close(w.p @ k1, kl)
        close(w.p @ k3, kl)
        assert k3.min() >= 0 > k1.min()
        assert distance > 0.05 or w.p @ (k3 - kl)**2 < w.p @ (k1 - kl)**2 / 5
        _, exchanged = kl_estimates(ref, w.log_probs, w.mask)
        assert distance < 0.8 or w.p @ exchanged > 2 * kl

def test_the_adaptive_coefficient_rises_above_the_target_and_falls_below_it():
    """β ← β (1 + 0.1 · clip(KL / target − 1, ±0.2))  (Ziegler et al. 2019, section 2.2)."""
    for kl, expected in ((6.0, 0.1), (6.6, 0.101), (5.4, 0.099),
                         (600.0, 0.102), (0.0, 0.098)):  # the last two are clipped
        assert adapt_kl_coef(0.1, kl, 6.0) == pytest.approx(expected, abs=1e-15)

def structured_score(response):
    """A reward with structure: tokens and pairs of tokens that are liked or not, and length."""
    score = sum((0.5, -0.5, 0.2, 0.0, 0.3)[a] - 0.1 for a in response)
    pairs = [*zip(response, response[1:])]
    return score + pairs.count((2, 3)) - 1.2 * pairs.count((0, 0))

def score_rollout(r):
    return torch.tensor([structured_score(a[m].tolist()) for a, m in zip(r.actions, r.mask)])

# Config as shipped, but for sizes and a learning rate that suit a few thousand parameters.
OPTIMUM_CONFIG = dict(max_new_tokens=4, block_size=16, temperature=1.0, missing_eos_score=None,
                      ppo_iterations=100, ppo_batch_size=512, minibatch_size=128, ppo_epochs=2,
                      micro_batch_size=128, ppo_lr=2e-3)
OPTIMUM_PROMPTS = [(4, 1), (4, 2, 0, 3)]

def response_log_probs(world, policy):
    """log π(y|x) of whole responses, (N,)."""
    return world.read(world.table(policy)).detach().double().sum(1)

@functools.cache
def optimum_world():
    """(world, r(x, y) (N,), π_ref, log π_ref(y|x) (N,))."""
    world = World(OPTIMUM_PROMPTS, 5, 4)
    reference = tiny_gpt(0, vocab=5, width=16, context=16, std=0.1).float()
    return world, score_rollout(world).double(), reference, response_log_probs(world, reference)

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
def test_train_ppo_comes_99_hundredths_of_the_way_to_the_optimum(beta):
    """(J(π) − J(π_ref)) / (β log Z − J(π_ref)) >= 0.99: what is missing is sampling noise."""
    world, _, reference, log_ref = optimum_world()
    policy, config = ActorCritic(reference), Config(kl_coef=beta, **OPTIMUM_CONFIG)
    list(train_ppo(policy, reference, score_rollout, [*map(list, OPTIMUM_PROMPTS)], config))
    start, end = objective(log_ref, beta), objective(response_log_probs(world, policy), beta)
    best, _ = optimum(beta)
    assert 0.99 <= (end - start) / (best - start) <= 1 + 1e-6

# ======== 11. The plumbing: what users of other libraries stumble over ===========================
# Recorded from TRL 0.7.10 (torch 2.13.0 on a CPU, float32) with an `object.__new__(PPOTrainer)` of
# PPOConfig(gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.2, vf_coef=1) and
# FixedKLController(0.2): its compute_rewards, compute_advantages and loss, one after the other,
# with scores (1.3, -0.7, 0.4) for responses of 3, 1 and 2 tokens. The valid tokens, row after row.
TRL_INPUT = dict(
    actions=[2, 0, 1, 1, 0, 2], old=[-0.5, -0.8, -0.4, -0.9, -0.4, -2.2],
    ref=[-0.8, -0.2, -0.8, -1.4, -0.1, -1.3], values=[0.2, -0.1, 0.5, 0.3, -0.6, 0.1],
    new_values=[0.3, 0.4, 0.1, 0.2, -0.2, -0.7],
    logits=[[0.3, -1.2, 0.8], [1.1, 0.4, -0.9], [-0.7, 0.9, 0.2],
            [-0.4, -0.6, 1.3], [1.4, 0.3, -0.6], [0.2, 1.6, -0.5]])
TRL_OUTPUT = dict(
    rewards=[-0.06, 0.12, 1.22, -0.8, 0.06, 0.58],
    returns=[1.007198, 1.23356, 1.22, -0.8, 0.57604, 0.58],
    advantages=[0.2717663, 0.8734846, 0.1720846, -1.908474, 0.6934134, -0.1022746],
    log_probs=[-0.5549569, -0.4897576, -0.5297348, -2.186871, -0.3840415, -2.414119],
    policy_loss=-0.09196494, value_loss=0.5525451, entropy=0.8304774,
    by_value=[-0.1178663, 0.0, -0.1866667, 0.1666667, 0.0, -0.2133333],
    by_logits=[[0.01492846, 0.003330989, -0.01825944], [0.0, 0.0, 0.0],
               [0.00299444, -0.01035957, 0.007365135], [0.0, 0.0, 0.0],
               [-0.03744742, 0.02662322, 0.01082419], [-0.002478524, -0.01005091, 0.01252943]])
def test_rewards_advantages_losses_and_gradients_are_those_of_trl():
    """What the library of the lecture computes from the same numbers, to 1e-6. TRL whitens by the
    unbiased standard deviation: its advantages are smaller by √((n−1)/n)."""
    mask = torch.arange(3) < torch.tensor([3, 1, 2])[:, None]
    def ragged(rows):
        x = torch.tensor(rows)
        return x.new_zeros(3, 3, *x.shape[1:]).index_put((mask,), x)
    x = SimpleNamespace(**{name: ragged(rows) for name, rows in TRL_INPUT.items()})
    x.logits.requires_grad_(), x.new_values.requires_grad_()
    rewards = kl_penalized_rewards(torch.tensor([1.3, -0.7, 0.4]), x.old, x.ref, mask, 0.2)
    A = gae(rewards, x.values, mask, 0.97, 0.9)
    advantages, returns = whiten(A, mask) * math.sqrt(5 / 6), A + x.values
    log_probs = gather_log_probs(x.logits, x.actions)
    policy_loss = ppo_policy_loss(log_probs, x.old, advantages, mask, 0.2)
    value = value_loss(x.new_values, x.values, returns, mask, 0.2)
    (policy_loss + value).backward()
    got = dict(rewards=rewards, returns=returns, advantages=advantages, log_probs=log_probs,
               by_value=x.new_values.grad, by_logits=x.logits.grad, policy_loss=policy_loss,
               value_loss=value, entropy=entropy(x.logits, mask))
    for name, y in got.items():
        close(y[mask] if y.dim() else y, torch.tensor(TRL_OUTPUT[name]), 1e-6)

def arguments(dtype=torch.float32):
    """Random arguments for every function of tensors."""
    names = ("log_probs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages")
    x = {name: normal(6, 5, seed=i).to(dtype) for i, name in enumerate(names)}
    return x | {"logits": normal(6, 5, 3, seed=8).to(dtype), "scores": normal(6).to(dtype),
                "actions": torch.randint(3, (6, 5), generator=draws()),
                "mask": torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]}

def soiled(x, garbage):
    """The same with garbage in the padding, of either sign, so that differences are garbage too."""
    mask, signs = x["mask"], torch.tensor([1.0, -1.0, 0.0])
    dirty = {name: v.where(mask, -garbage if name in ("old", "ref", "returns") else garbage)
             for name, v in x.items() if torch.is_tensor(v) and v.shape == mask.shape}
    if "logits" in x:
        dirty["logits"] = x["logits"].where(mask[..., None], garbage * signs)
    return x | dirty | {"mask": mask, "actions": x["actions"].where(mask, 2)}

def everything(x, f=rlhf):
    """What each function of the module `f` makes of the arguments x, and its gradients."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("log_probs", "values", "logits")}
    t, mask = SimpleNamespace(**x | leaves), x["mask"]
    k1, k3 = f.kl_estimates(t.log_probs, t.ref, mask)
    results = {
        "rewards": f.kl_penalized_rewards(t.scores, t.log_probs, t.ref, mask, 0.3),
        "to_go": f.rewards_to_go(t.rewards, mask, 0.9), "whiten": f.whiten(t.advantages, mask),
        "gae": f.gae(t.rewards, t.values, mask, 0.9, 0.8), "mean": f.masked_mean(t.rewards, mask),
        "policy_gradient": f.policy_gradient_loss(t.log_probs, t.advantages, mask),
        "ppo": f.ppo_policy_loss(t.log_probs, t.old, t.advantages, mask), "k1": k1, "k3": k3,
        "value": f.value_loss(t.values, t.old_values, t.returns, mask),
        "entropy": f.entropy(t.logits, mask), "ranking": f.ranking_loss(t.scores.view(2, 3)),
        "gathered": f.gather_log_probs(t.logits, t.actions).where(mask, 0),
        "pairs": f.reward_model_loss(t.scores, -t.scores)}
    for name, y in list(results.items()):
        if y.requires_grad:
            grads = torch.autograd.grad(y.sum(), [*leaves.values()], retain_graph=True,
                                        allow_unused=True, materialize_grads=True)
            results |= {(name, leaf): grad for leaf, grad in zip(leaves, grads)}
    return {name: value.detach() for name, value in results.items()}

@pytest.mark.parametrize("garbage", [7.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan])
def test_garbage_in_the_padding_changes_no_output_bit(garbage):
    """m_t = 0 ⇒ no influence. Multiplying by the mask would not do: exp(1e4) · 0 = NaN."""
    x = arguments()
    clean, dirty = everything(x), everything(soiled(x, garbage))
    for name, value in clean.items():
        if "gathered" in name and not math.isfinite(garbage):
            continue  # it has no mask of its own, so no gradient behind a logit that is not finite
        assert torch.equal(value, dirty[name]), name
        assert torch.equal(value.signbit(), dirty[name].signbit()), name  # -0.0 is another bit
        assert value.shape[:2] != (6, 5) or not dirty[name][~x["mask"]].any(), name

def test_float64_stays_float64_and_bf16_is_raised_to_float32():
    """Results are those of the same numbers in float32, not rounded to 8 bits in between."""
    assert {y.dtype for y in everything(arguments(torch.float64)).values()} == {torch.float64}
    narrow = arguments(torch.bfloat16)
    exact = everything({k: v.float() if v.is_floating_point() else v for k, v in narrow.items()})
    for name, y in everything(narrow).items():
        assert torch.equal(y, exact[name].to(y.dtype)), name
        assert y.dtype == torch.float32 or isinstance(name, tuple)  # a gradient: as its leaf

def copied(f):
    """The function as it works in other code, with torch, F and the helpers its docstring names."""
    world = {"torch": torch, "F": F}
    for name in re.findall(r"`(\w+)`", f.__doc__.partition("Needs ")[2]):
        helper = getattr(rlhf, name)
        world[name] = copied(helper) if inspect.isfunction(helper) else helper
    exec(inspect.getsource(f), world)
    return world[f.__name__]

def test_each_function_works_when_it_is_copied_alone():
    """No global but torch, F and the helpers that the docstring names; the same results."""
    functions = SimpleNamespace(**{f.__name__: copied(f) for f in (
        reward_model_loss, ranking_loss, gather_log_probs, kl_penalized_rewards, rewards_to_go,
        policy_gradient_loss, gae, masked_mean, whiten, ppo_policy_loss, value_loss, entropy,
        kl_estimates)})
    expected, got = everything(arguments()), everything(arguments(), functions)
    assert all(torch.equal(y, expected[name]) for name, y in got.items())
    assert copied(adapt_kl_coef)(0.1, 6.6, 6.0) == adapt_kl_coef(0.1, 6.6, 6.0)
    ours, theirs = [vars(f(tiny_gpt(), [[3], [3, 1]] * 4, 5, 3, 0.9, draws())).values()
                    for f in (rollout, copied(rollout))]
    assert all(map(torch.equal, ours, theirs))

def experience_of(policy, reference, seed=0, reward_fn=score_rollout, **settings):
    """A batch of experience on ragged prompts, with a score that depends on the response."""
    config = Config(**dict(max_new_tokens=5, block_size=12, ppo_batch_size=12, minibatch_size=12,
                           ppo_epochs=1, kl_coef=0.3, missing_eos_score=None) | settings)
    prompts = [list(x) for x in RAGGED] * (config.ppo_batch_size // 2)
    return collect(policy, reference, reward_fn, prompts, config, draws(seed)), config

def updated(policy, experience, config, lr=0.1, documents=None):
    """(a copy of the policy after ppo_update, its metrics)."""
    learner = copy.deepcopy(policy)
    metrics = ppo_update(learner, sgd(learner, lr), experience, config, draws(), documents)
    return learner, metrics

WIDE = dict(vocab=40, layers=2, heads=4, width=64, context=64, std=0.2)
@pytest.mark.parametrize("micro_batch_size", [4, 8, 16, 32])
def test_the_ratio_of_every_token_is_1_before_the_first_update(micro_batch_size, monkeypatch):
    """ρ_t = π/π_old = 1 exactly: a dropout, or a text that was encoded anew, would show here."""
    policy, seen, loss = tiny_policy(0, **WIDE).float(), [], rlhf.ppo_policy_loss
    e, config = experience_of(
        policy, tiny_gpt(1, **WIDE).float(), reward_fn=lambda r: r.mask.sum(1), ppo_batch_size=64,
        minibatch_size=32, micro_batch_size=micro_batch_size, max_new_tokens=40, block_size=64)
    assert len(set(e.mask.sum(1).tolist())) > 10  # responses of many lengths
    monkeypatch.setattr(rlhf, "ppo_policy_loss", lambda new, old, A, mask, *rest: (
        seen.append(torch.equal(new[mask], old[mask])) or loss(new, old, A, mask, *rest)))
    learner, metrics = updated(policy, e, config, lr=0.0)
    assert len(seen) == 64 // micro_batch_size and all(seen) and same(learner, policy)
    assert metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0 and metrics["grad_norm"] > 0

def test_collect_computes_each_step_of_the_derivation():
    """log π, log π_ref and V along τ ~ π; r_t; A_t by GAE; R_t = A_t + V(s_t), not whitened.
    V(s_0) is the value of the prompt alone, read at position P−1: it cannot know a_0."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    settings = dict(temperature=0.8, gamma=0.9, lam=0.7)
    e, _ = experience_of(policy, reference, **settings)
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
    parts, _ = experience_of(policy, reference, micro_batch_size=5, **settings)  # smaller passes
    for name in "log_probs ref_log_probs values scores rewards advantages returns".split():
        x = getattr(e, name)
        assert not x.requires_grad and (x.dim() == 1 or not x[~e.mask].any()), name
        close(getattr(parts, name), x, 1e-12)

def test_a_cut_response_scores_missing_eos_score_and_an_end_token_has_a_gradient():
    """A response without an end token scores missing_eos_score, or reward_fn's if that is None.
    a_T = end is an action like any other; where padding is the same token, some mask it away."""
    (own, _), (fixed, _) = [experience_of(
        tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3, missing_eos_score=score)
        for score in (None, -3.0)]
    ended = rlhf.ends(own, 3)
    assert ended.any() and not ended.all() and (own.scores[~ended] != -3).all()
    close(fixed.scores, own.scores.where(ended, -3.0))
    at_end, log_probs = (own.actions == 3) & own.mask, own.log_probs.clone().requires_grad_()
    ppo_policy_loss(log_probs, own.log_probs, own.advantages, own.mask).backward()
    assert torch.equal(at_end.any(1), ended) and (log_probs.grad[at_end] != 0).all()

def test_scores_that_would_become_wrong_rewards_are_refused():
    """Those that are not (B,) would broadcast, like a head's (B, T, 1); masks that are no prefix
    move the score."""
    policy, reference, x = tiny_policy(0), tiny_gpt(1), torch.zeros(12, 5)
    for shape in ((), (1,), (12, 1), (1, 12), (12, 5)):
        message = rf"{re.escape(str(shape))}.*\(12,\)"
        with pytest.raises(ValueError, match=message):
            experience_of(policy, reference, reward_fn=lambda r: torch.zeros(shape))
        with pytest.raises(ValueError, match=message):
            kl_penalized_rewards(torch.zeros(shape), x, x, torch.ones(12, 5), 0.1)
    with pytest.raises(ValueError, match=r"\(1, 5, 1\).*\(1, 5\)"):
        gae(x[:1], x[:1, :, None], torch.ones(1, 5))
    e, _ = experience_of(policy, reference, reward_fn=lambda r: [1.0] * 12)
    assert e.scores.sum() == 12 and e.scores.dtype == torch.float64
    for f in (kl_penalized_rewards, rewards_to_go, gae):  # a copied function can only say so
        assert re.search(r"prefix(es)?\s+of\s+ones", f.__doc__)

def test_what_cannot_be_done_is_refused_by_name():
    """An empty list, from a filter that kept nothing, is one ValueError, not an IndexError; so is
    a row longer than the context, which would have no position embedding."""
    gpt, config = tiny_gpt(context=8), Config(max_new_tokens=4)
    assert rollout(gpt, [[3] * 5], 3, 3).tokens.shape[1] <= 8  # just fits
    for prompts, T, temperature, problem in (
            ([[3], []], 2, 1.0, "begin e.* with the end token"), ([[3]], 4, 0.0, "more than 0"),
            ([[3], [3] * 6], 3, 1.0, "prompt 6 .* max_new_tokens 3 .* 8 tokens"),
            ([[3]], 0, 1.0, "max_new_tokens 0"), ([], 2, 1.0, "no prompt")):
        with pytest.raises(ValueError, match=problem):
            rollout(gpt, prompts, T, 3, temperature)
    policy, model = ActorCritic(gpt), RewardModel(gpt)
    for call in (lambda: [*train_language_model(gpt, [], config)],
                 lambda: [*train_reward_model(model, [], config)],
                 lambda: [*train_ppo(policy, gpt, score_rollout, [], config)],
                 lambda: rlhf.normalize_rewards(model, gpt, [], config),
                 lambda: rlhf.corpus_loss(gpt, []), lambda: rlhf.reward_model_accuracy(model, []),
                 lambda: rlhf.evaluate(policy, gpt, score_rollout, [], config)):
        with pytest.raises(ValueError, match="no (prompt|document|comparison)"):
            call()

def test_a_policy_starts_as_a_whole_trainable_copy_whose_value_is_0():
    """V_θ(s) = 0 before training. The reference is frozen; what starts from it is not."""
    gpt = tiny_gpt(0).requires_grad_(False)
    policy = ActorCritic(gpt)
    close(policy(torch.tensor([[3, 1, 2]]))[1], torch.zeros(1, 3, dtype=torch.float64), 0)
    for model in (policy, RewardModel(gpt)):
        assert all(p.requires_grad for p in model.parameters()) and same(model.gpt, gpt)
        assert not {id(p) for p in gpt.parameters()} & {id(p) for p in model.parameters()}

def test_losses_are_computed_in_float32_under_autocast(monkeypatch):
    """log-softmax and losses are float32 even where logits are bf16: 8 bits lose small ratios."""
    policy, seen = tiny_policy(0, width=16, std=0.1).float(), []
    for name in ("ppo_policy_loss", "value_loss", "entropy"):
        monkeypatch.setattr(rlhf, name, lambda *a, loss=getattr(rlhf, name): seen.append(
            loss(*a)) or seen[-1])
    with torch.autocast("cpu", torch.bfloat16):
        assert policy(torch.tensor([[3, 1]]))[0].dtype == torch.bfloat16
        e, config = experience_of(policy, tiny_gpt(1).float(), entropy_coef=0.1)
        updated(policy, e, config)
    seen += [e.log_probs, e.ref_log_probs, e.values, e.rewards, e.returns]
    assert len(seen) >= 8 and {x.dtype for x in seen} == {torch.float32}

def dirty(e):
    """The same experience with garbage in all padding: other tokens, and numbers like 1e30."""
    behind = torch.arange(e.tokens.shape[1]) >= (e.prompt_lengths + e.mask.sum(1))[:, None]
    return rlhf.Experience(**soiled(vars(e), 1e30) | {"tokens": e.tokens.where(~behind, 2)})

def written_out(policy, e, c):
    """L = −L_clip + c1 L_VF − c2 H and its metrics for each token, (tokens, 5), and their rows."""
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
        policy_loss = -torch.minimum(ratio * a, clipped * a)
        squares = 0.5 * torch.maximum((value - R)**2, (near - R)**2)
        loss = policy_loss + c.value_coef * squares + c.entropy_coef * (log_p.exp() * log_p).sum()
        parts.append(torch.stack([loss, policy_loss, squares, ratio - 1 - ratio.log(),
                                  (abs(ratio - 1) > c.clip).double()]))
    return torch.stack(parts), torch.tensor([b for b, t in valid])

def gradients_of_update(policy, experience, config, documents=None):
    """(the gradient before each step, (steps, D), and the metrics), at a step size of 0."""
    optimizer, steps = sgd(policy, 0.0), []
    for p in policy.parameters():
        p.grad = torch.full_like(p, 1e3)  # a caller's old gradient is no part of the sum
    optimizer.register_step_pre_hook(lambda *_: steps.append(
        torch.cat([p.grad.flatten() for p in policy.parameters()])))
    metrics = ppo_update(policy, optimizer, experience, config, draws(), documents)
    return torch.stack(steps), metrics

@pytest.mark.parametrize("entropy_coef, minibatch_size, micro_batch_size, epochs", [
    (0.0, 12, 12, 1), (0.2, 12, 5, 2), (0.2, 1, 1, 3)])
def test_an_update_goes_down_the_gradient_of_the_whole_loss(
        entropy_coef, minibatch_size, micro_batch_size, epochs):
    """∇L of L = −L_clip + c1 L_VF − c2 H (PPO eq. 9, turned to a loss), at a step size of 0.
    In minibatches of one trajectory, each epoch's gradients are those of all the trajectories; in
    micro-batches, they add up to the minibatch's. Garbage in the padding changes no bit."""
    e, config = experience_of(tiny_policy(0), tiny_gpt(1), temperature=0.8, value_coef=0.7,
                              clip=0.1, entropy_coef=entropy_coef, max_grad_norm=1e9,
                              early_stop_kl=None, value_clip=0.3, minibatch_size=minibatch_size,
                              ppo_epochs=epochs, micro_batch_size=micro_batch_size)
    policy = moved_by(tiny_policy(0), 0.06, draws(7))  # so that ratios differ from 1, or are cut
    parts, row = written_out(policy, e, config)
    batches = [row == b for b in range(12)] if minibatch_size == 1 else [row >= 0]
    means = torch.stack([parts[batch].mean(0) for batch in batches])
    expected = torch.stack([flat_grad(mean[0], policy) for mean in means])
    steps, metrics = gradients_of_update(policy, e, config)
    dirty_steps, dirty_metrics = gradients_of_update(policy, dirty(e), config)
    assert torch.equal(steps, dirty_steps) and metrics == dirty_metrics
    assert epochs < 3 or not torch.equal(steps[0], steps[12])  # each in an order of its own
    for epoch in steps.view(epochs, len(batches), -1):
        close(epoch.sum(0), expected.sum(0), 2e-6)
    for name, value in zip("loss policy_loss value_loss approx_kl clip_fraction".split(),
                           means.mean(0).tolist()):
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    norm = metrics["grad_norm"]
    assert norm == pytest.approx(float(expected.norm(dim=1).mean()), rel=1e-6)
    assert 0.05 < metrics["clip_fraction"] < 0.95 and metrics["updates"] == epochs * len(batches)
    # A gradient longer than max_grad_norm is scaled down to it, all parameters alike.
    cut, metrics = gradients_of_update(policy, e, dataclasses.replace(config, max_grad_norm=1e-3))
    close(cut, 1e-3 * steps / steps.norm(dim=1, keepdim=True), 1e-8)
    assert metrics["grad_norm"] == norm

def test_with_ptx_coef_the_gradient_is_the_sum_of_ppos_and_the_language_models():
    """InstructGPT eq. 2: … + γ E log π(x) on documents, at temperature 1, in each gradient step."""
    e, config = experience_of(tiny_policy(0), tiny_gpt(1), temperature=0.8, max_grad_norm=1e9,
                              early_stop_kl=None, minibatch_size=6, micro_batch_size=4)
    policy, x = moved_by(tiny_policy(0), 0.06, draws(7)), [3, 2, 1, 1, 3]
    by_document = flat_grad(-sum(log_pi(policy, x[:i])[x[i]] for i in range(1, 5)) / 4, policy)
    ppo_alone, _ = gradients_of_update(policy, e, config, [x])
    config = dataclasses.replace(config, ptx_coef=1.7)
    both, _ = gradients_of_update(policy, e, config, [x])
    assert len(both) == 2 and by_document.norm() > 0.1
    close(both, ppo_alone + 1.7 * by_document, 1e-9)
    with pytest.raises(ValueError, match="document"):
        gradients_of_update(policy, e, config, None)

def test_a_coefficient_of_0_multiplies_nothing(monkeypatch):
    """0 · ∞ = NaN: what is switched off may be infinite."""
    x = torch.zeros(1, 2)
    rewards = kl_penalized_rewards(torch.ones(1), x, x - math.inf, torch.ones(1, 2), 0.0)
    assert rewards.tolist() == [[0.0, 1.0]]
    policy = tiny_policy(0)
    e, config = experience_of(policy, tiny_gpt(1), value_coef=0.0, entropy_coef=0.0, ptx_coef=0.0)
    expected, _ = updated(policy, e, config)
    for name in ("value_loss", "entropy", "language_model_loss"):
        monkeypatch.setattr(rlhf, name, lambda *_: policy.value_head.bias.sum() * math.inf)
    assert same(updated(policy, e, config, documents=[[3, 1, 3]])[0], expected)

def test_an_early_stop_ends_all_epochs_and_leaves_no_gradient_behind():
    """The first minibatch with k3 of KL(π_old‖π) > limit takes no step; None never stops."""
    policy = tiny_policy(0)
    e, config = experience_of(policy, tiny_gpt(1), ppo_epochs=2, early_stop_kl=None)
    k3 = 2 * updated(policy, e, config)[1]["approx_kl"]  # it is the mean of 0 and k3
    for limit, updates in ((0.99 * k3, 1), (1.01 * k3, 2), (None, 2)):
        metrics = updated(policy, e, dataclasses.replace(config, early_stop_kl=limit))[1]
        assert metrics["updates"] == updates and metrics["early_stop"] is (updates == 1)
    one, four = (dataclasses.replace(config, early_stop_kl=1e-9, minibatch_size=4, ppo_epochs=n)
                 for n in (1, 4))
    learner, _ = updated(policy, e, one)
    assert same(learner, updated(policy, e, four)[0])
    assert ppo_update(learner, sgd(learner, 0.1), e, four, draws())["updates"] == 0  # at once
    assert all(p.grad is None or not p.grad.any() for p in learner.parameters())

def test_metrics_of_a_batch_do_not_read_padding():
    """Reward, Σ k1, Σ k3, −E log π, length, share ended, 1 − Var(R − V) / Var(R), by NumPy."""
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3)
    e, m = dataclasses.replace(dirty(e), rollout_seconds=2.0), e.mask.numpy()
    returns, values = e.returns.numpy()[m], e.values.numpy()[m]
    delta = np.where(m, (e.ref_log_probs - e.log_probs).numpy(), 0)
    assert rlhf.experience_metrics(e, 3) == pytest.approx({
        "reward": e.scores.numpy().mean(), "kl": -delta.sum(1).mean(), "length": m.sum(1).mean(),
        "kl_k3": (np.exp(delta) - 1 - delta).sum(1).mean(),
        "entropy": -e.log_probs.numpy()[m].mean(), "rollout_tokens_per_s": m.sum() / 2,
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "ended": ((e.actions.numpy() == 3) & m).any(1).mean()}, abs=1e-6)
    level = dataclasses.replace(e, returns=torch.ones_like(e.returns))
    assert math.isfinite(rlhf.experience_metrics(level, 3)["explained_variance"])

# ======== 12. The loops as a whole ===============================================================
def language_model_stage(**settings):
    """(a GPT, train(model, …)): documents that repeat one token."""
    config = Config(**dict(lm_epochs=5, lm_batch_size=8, lm_lr=3e-2) | settings)
    documents = [[5] + [n % 5] * (1 + n % 6) + [5] for n in range(30)]
    return tiny_gpt(0, vocab=6, width=8, std=0.1).float(), functools.partial(
        train_language_model, documents=documents, config=config)

def reward_model_stage(**settings):
    """(a reward model, train(model, …)): the better response has more 1s; K is 2 or 3."""
    config = Config(**dict(rm_epochs=5, rm_batch_size=8, rm_lr=1e-2) | settings)
    comparisons = [([3] + [n % 3] * (n % 4), [[1, 1, 1, 3], [n % 3, 1, 3], [0, 2, 2, 3]][n % 2:])
                   for n in range(24)]
    return RewardModel(tiny_gpt(std=0.1, width=16).float(), draws()), functools.partial(
        train_reward_model, comparisons=comparisons, config=config)

def ppo_stage(**settings):
    """(a policy, train(model, …)): ragged prompts, the structured reward, and documents."""
    config = Config(**dict(max_new_tokens=4, block_size=12, ppo_iterations=8, ppo_batch_size=8,
                           minibatch_size=4, ppo_epochs=2, ppo_lr=1e-2, kl_coef=0.2,
                           kl_target=1e-6, ptx_coef=0.5, missing_eos_score=None) | settings)
    reference = tiny_gpt(1).float()
    return ActorCritic(reference), functools.partial(
        train_ppo, reference=reference, reward_fn=score_rollout, config=config,
        prompts=[list(x) for x in RAGGED], documents=[[3, n, n, 3] for n in range(3)])

STAGES = {"language_model": language_model_stage, "reward_model": reward_model_stage,
          "ppo": ppo_stage}

def timeless(metrics):
    """Without what a clock measured."""
    return {k: v for k, v in metrics.items() if "per_s" not in k and "seconds" not in k}

@pytest.mark.parametrize("stage", STAGES)
def test_training_stopped_after_any_step_and_continued_ends_with_the_same_bits(stage):
    """What is random in step k comes from (seed, stage, k): weights, optimizer, `last` are all."""
    model, train = STAGES[stage]()
    start, log, saved = copy.deepcopy(model), [], []
    optimizer = torch.optim.Adam(model.parameters())
    for metrics in train(model, optimizer=optimizer):
        log.append(timeless(metrics))
        last = json.loads(json.dumps(metrics))  # they are plain numbers, as a file keeps them
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), last)))
    for k, (weights, state, last) in enumerate(saved, start=1):
        other = copy.deepcopy(start)
        other.load_state_dict(weights)
        optimizer = torch.optim.Adam(other.parameters())
        optimizer.load_state_dict(state)
        rest = [timeless(m) for m in train(other, optimizer=optimizer, last=last)]
        assert rest == log[k:] and same(other, model)
    with pytest.raises(ValueError, match="optimizer"):
        next(train(copy.deepcopy(start), last=saved[0][2]))
    other, train = STAGES[stage](seed=1)
    list(train(other, optimizer=torch.optim.Adam(other.parameters())))
    assert not same(other, model)

@pytest.mark.parametrize("stage, peak, warmup", [
    ("language_model", 3e-2, 2), ("reward_model", 1e-2, 1), ("ppo", 1e-2, 1)])
def test_training_learns_at_a_rate_that_rises_and_then_falls_to_0(stage, peak, warmup):
    """Linear to the peak during a tenth (PPO: a seventh) of the steps, then linear to 0."""
    model, train = STAGES[stage]()
    optimizer = torch.optim.Adam(model.parameters())
    log = [m | {"lr": optimizer.param_groups[0]["lr"]} for m in train(model, optimizer=optimizer)]
    n = len(log)
    assert [(m["step"], m["steps"]) for m in log] == [(i, n) for i in range(1, n + 1)]
    assert [m["lr"] for m in log] == pytest.approx(
        [peak * min((i + 1) / (warmup + 1), (n - i) / (n - warmup)) for i in range(n)])
    gained = [m["reward"] if stage == "ppo" else -m["loss"] for m in log]
    assert gained[-1] > gained[0] + 0.2

@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_training_before_it_reaches_the_weights(stage):
    """L = NaN stops the loop; the last good weights stay."""
    model, train = STAGES[stage]()
    if stage == "ppo":
        train = functools.partial(train, reward_fn=lambda r: score_rollout(r) * math.nan)
    else:
        torch.nn.init.constant_(list(model.parameters())[-1], math.nan)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match="not finite: gradient norm nan"):
        list(train(model))
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0, equal_nan=True)

def test_each_ppo_iteration_follows_the_kl_of_the_one_before(monkeypatch):
    """β adapts to the KL that was measured, or stays; Adam has ε = 1e-5, as in baselines."""
    seen, update = [], rlhf.ppo_update
    monkeypatch.setattr(rlhf, "ppo_update", lambda policy, optimizer, e, config, *rest: (
        seen.append((optimizer.defaults["eps"], config.kl_coef))
        or update(policy, optimizer, e, config, *rest)))
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a look takes a second
    monkeypatch.setattr(rlhf, "time", clock)
    policy, train = ppo_stage()
    beta, log = 0.2, list(train(policy))
    for metrics in log:
        assert metrics["kl_coef"] == beta and metrics["updates"] == 4
        assert metrics["update_tokens_per_s"] == pytest.approx(2 * 8 * metrics["length"])
        beta = adapt_kl_coef(beta, metrics["kl"], 1e-6)
    assert seen == [(1e-5, metrics["kl_coef"]) for metrics in log] and beta != 0.2
    assert {metrics["kl_coef"] for metrics in ppo_stage(kl_target=None)[1](policy)} == {0.2}

# ======== 13. The program: what its tests share ==================================================
BYTES = "\n".join(f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256))
GOOD_LINE = '{"prompt": "A", "chosen": " b.", "rejected": " c."}'
SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=96, max_new_tokens=8, lm_epochs=1,
             lm_batch_size=8, rm_batch_size=8, ppo_iterations=3, ppo_batch_size=8, ppo_epochs=2,
             minibatch_size=4, micro_batch_size=4, eval_prompts=6, device="cpu")
FILES = ("lm.pt", "reward.pt", "policy.pt")
CURVES = show.curves  # the fixture `no_picture` takes it away

def write_data(directory, preferences, **files):
    """A data directory: preferences are rows or raw lines; corpus="…" writes corpus.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in preferences]
    (directory / "preferences.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    for name, text in files.items():
        ending = "tiktoken" if name == "tokenizer" else "txt"
        (directory / f"{name}.{ending}").write_bytes(text.encode())
    return directory

def loaded(directory, rows, context=64, **files):
    """What is read of a directory with these preferences and files, for responses of 8 tokens."""
    return dataset.load(write_data(directory, rows, **files), context, 8)

def texts(data, side):
    """(documents, comparisons, prompts) of one side of the data as text, in three sets."""
    part = getattr(data, side)
    return ({data.text(d) for d in part.documents},
            {(data.text(x), *map(data.text, ys)) for x, ys in part.comparisons},
            {data.text(x) for x in part.prompts})

@pytest.fixture(scope="module", autouse=True)
def no_picture():
    """The plotting library takes a second to import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "curves", lambda out: "")
        yield

@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A whole run at reduced size: its config, folders and flags."""
    base = tmp_path_factory.mktemp("run")
    preferences, corpus = ["\n".join((dataset.SHIPPED / name).read_text("utf-8").split("\n")[:60])
                           for name in ("preferences.jsonl", "corpus.txt")]
    data = write_data(base / "data", [preferences], corpus=corpus)
    config = Config(**SIZES, data_dir=str(data), out_dir=str(base / "out"))
    rlhf.run(config)
    flags = [f"--{name}={value}" for name, value in SIZES.items()] + [f"--data={data}"]
    return SimpleNamespace(config=config, data=data, out=base / "out", flags=flags)

@pytest.fixture
def again(first_run, tmp_path):
    """A copy of the first run's folder, to go on from."""
    return Path(shutil.copytree(first_run.out, tmp_path / "copy"))

@pytest.fixture
def world_run(first_run, again, monkeypatch):
    """The Config of a copy of the first run, whose data count as shipped: with a true reward."""
    monkeypatch.setattr(dataset, "SHIPPED", first_run.data.resolve())
    config = dataclasses.replace(first_run.config, out_dir=str(again))
    rlhf.run(config, fresh="ppo")
    return config

@pytest.fixture
def shell(monkeypatch, capsys):
    """shell(module, *flags) -> (status, stdout, stderr) of a command, in this process."""
    def call(module, *arguments, typed=""):
        capsys.readouterr()
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup2", lambda *_: None)  # stdout belongs to the tests
            patch.setattr(sys, "argv", ["command", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.StringIO(typed))
            try:
                show.program("command", module.main)
            except SystemExit as caught:
                status = caught.code
        return status, *capsys.readouterr()
    return call

@pytest.fixture
def refused(shell):
    """refused(module, *flags): it ends with status 2 and one line on stderr, which is returned."""
    def call(module, *arguments):
        status, _, problem = shell(module, *arguments)
        assert status == 2 and problem.count("\n") == 1 and len(problem) < 1000, problem
        return problem
    return call

def contents(folder):
    """{name: bytes} of the files of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

def weights(out, name):
    return torch.load(Path(out) / name, weights_only=True)["weights"]

def ends_alike(a, b):
    """Two runs left the same weights, log (but for the clock) and samples, and nothing else."""
    assert contents(a).keys() == contents(b).keys() == {*FILES, "log.jsonl", "samples.jsonl"}
    for name in FILES:
        assert same(weights(a, name), weights(b, name)), name
    logs = [list(map(timeless, dataset.read_records(f"{x}/log.jsonl"))) for x in (a, b)]
    assert logs[0] == logs[1]
    assert contents(a)["samples.jsonl"] == contents(b)["samples.jsonl"]

# ======== 14. Data ===============================================================================
HI = "\n\nHuman: Hi\n\nAssistant:"
MORE = HI + " A\n\nHuman: B\n\nAssistant:"
@pytest.mark.parametrize("row, expected", [
    ({"prompt": "A", "chosen": " b", "rejected": " c", "margin": None}, ("A", " b", " c")),
    ({"prompt": "A", "responses": [" b", " c", " b", " d"]}, ("A", " b", " c", " d")),  # a tie
    ({"chosen": MORE + " C", "rejected": MORE + " D"}, (MORE, " C", " D")),
    ({"chosen": MORE + " C", "rejected": HI + " X"}, (HI, MORE[len(HI):] + " C", " X")),
    ({"chosen": "Yes.", "rejected": "Yet."}, ("", "Yes.", "Yet."))])
def test_three_forms_of_preferences_are_read(tmp_path, row, expected):
    """A pair, a ranking, or two dialogues whose prompt ends at the last turn that they share."""
    data = loaded(tmp_path, [row, {"prompt": "P", "responses": [" q", " r"]}], 256)
    assert texts(data, "train")[1] | texts(data, "held_out")[1] == {expected, ("P", " q", " r")}
    x, ys = data.train.comparisons[0]
    assert x[0] == data.eos_token and all(y[-1] == data.eos_token for y in ys)

def test_nothing_that_is_held_out_trains_and_adding_rows_moves_none(tmp_path):
    """held out = a hash of the text, not of its place in the file or of a seed."""
    rows = [{"prompt": f"Film {i % 150} is", "responses": [f" good {i}.", f" bad {i}."]}
            for i in range(300)]
    lines = [f"Document number {i + 1000}." for i in range(300)]
    lines += [row["prompt"] + y for row in rows for y in row["responses"]]
    few = loaded(tmp_path / "few", rows[100:200], corpus="\n".join(lines[:90]))
    many = loaded(tmp_path / "many", rows[::-1], corpus="\n".join(lines))
    bare = loaded(tmp_path / "bare", rows)
    for side in ("train", "held_out"):
        assert all(a < b for a, b in zip(texts(few, side), texts(many, side)))
        # Without a corpus, the documents are the prompts with their best responses.
        assert texts(bare, side)[0] == {x + best for x, best, _ in texts(bare, side)[1]}
    trained, held = texts(many, "train"), texts(many, "held_out")
    assert not any(a & b for a, b in zip(trained, held))
    assert [len(a) + len(b) for a, b in zip(trained, held)] == [900, 300, 150]
    assert 10 < len(held[0]) and 10 < len(held[1]) < 60 and 5 < len(held[2]) < 30
    # Held-out comparisons are those of the held-out prompts, and none of their texts is read.
    assert {x for x, *_ in held[1]} == held[2]
    assert not {x + y for x, *ys in held[1] for y in ys} & trained[0]
    # The tokenizer has seen training text alone.
    tokens = {token.decode(errors="replace") for token in many.encoding.token_byte_values()}
    unseen = {re.search(r" \d{4}", document)[0] for document in held[0] if "number" in document}
    assert unseen and not unseen & tokens and "Document" in tokens

BROKEN = [("preferences.jsonl", line, problem) for line, problem in (
    (b"{not json", "not JSON"), (b"[" * 5 * 2**20, "not JSON"), (b"null", "not a JSON object"),
    (b'{"prompt": "A", "chosen": "b"}', "'rejected'"), (b'{"responses": ["a", "b"]}', "'prompt'"),
    (b'{"prompt": null, "chosen": "b", "rejected": "c"}', "NoneType"),
    (b'{"prompt": "A", "responses": ["b"]}', "'responses'"),
    (b'{"prompt": "A", "chosen": "\\ud800", "rejected": "c"}', "surrogate"),
    (b'{"prompt": "A", "chosen": "caf\xe9", "rejected": "c"}', "UTF-8"))]
BROKEN += [("corpus.txt", b"tw\xffo", "UTF-8"), ("prompts.txt", b"\xfe", "UTF-8")]
BROKEN += [("tokenizer.tiktoken", line, "expected base64") for line in (
    b"Ag==x 2", b"Ag==", b"Ag== 7", b"AA== 2", b" 2", b"QUFB" * 400 + b" 2")]
@pytest.mark.parametrize("n", range(len(BROKEN)))
def test_a_broken_line_is_named_by_file_and_line(tmp_path, refused, n):
    """FILE:LINE: what is wrong, what was expected; status 2 before anything is written."""
    name, line, problem = BROKEN[n]
    write_data(tmp_path, [GOOD_LINE])
    good = BYTES if name.startswith("tokenizer") else f"{GOOD_LINE}\n\n\nmore"
    lines = good.encode().split(b"\n")
    (tmp_path / name).write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    message = refused(rlhf, "--data", tmp_path, "--out_dir", tmp_path / "out")
    assert message.startswith(f"command: {tmp_path / name}:3: ") and len(message) < 400
    assert problem in message and ("expected" in message or problem == "UTF-8")
    assert not (tmp_path / "out").exists()

LONG = "b " * 80
UNUSABLE = {"comparison with identical answers": [["A", " b.", " b."]],
            "comparison with an empty answer": [["A", " ", " c."], ["A", " b.", "\n", " d"]],
            "comparison longer than the context": [["A", " b.", LONG], [LONG, " b.", " c."]]}
def test_unusable_rows_are_skipped_and_each_reason_is_counted_and_told(tmp_path, capsys, refused):
    """Also where nothing usable is left, then with what would help; a line of megabytes too."""
    rows = [{"prompt": x, "responses": ys} for bad in UNUSABLE.values() for x, *ys in bad]
    good = [json.loads(GOOD_LINE), {"prompt": "A", "responses": [" d.", " e."]}]
    files = dict(corpus=f"one\n{LONG}\n  \n\ntwo\n{'a' * 5 * 2**20}", prompts=f"x\n\ny\n{LONG}\nx")
    data = loaded(tmp_path / "some", rows + ["  "] + good, 40, **files)
    assert data.skipped == {reason: len(bad) for reason, bad in UNUSABLE.items()} | {
        "document longer than the context": 2, "prompt that leaves no room for a response": 1}
    assert texts(data, "train") == texts(data, "held_out") == (
        {"one", "two"}, {("A", " b.", " c."), ("A", " d.", " e.")}, {"x", "y"})
    show.describe(data, "cpu")
    printed = capsys.readouterr().out
    assert all(f"skipped: {n} rows: {reason}" in printed for reason, n in data.skipped.items())
    assert len(data.notes) == 3 and all(note in printed for note in data.notes)  # none held out
    write_data(tmp_path, rows)
    problem = refused(rlhf, "--data", tmp_path, "--block_size=40", "--max_new_tokens=8")
    assert "no usable comparisons" in problem and "--block_size" in problem
    assert all(f"'{reason}': {len(bad)}" in problem for reason, bad in UNUSABLE.items())
    write_data(tmp_path, rows, tokenizer=BYTES.rsplit("\n", 1)[0])
    assert ":256: expected tokens for all 256 bytes" in refused(rlhf, "--data", tmp_path)

ODD_TEXTS = ["", " ", "\n\n\t ", "naïve café — “quotes” …", "🎬👩‍👩‍👧 家族 кино", "e\u0301 ½ ² ٣",
             "\x00\x1c\x7f\x85\u2028\u200d\ufeff", "<|endoftext|>", "a" * 300, "x1y22z333_4__",
             " lots   of\r\n\r\nspace  ", "'s 't don't", "".join(map(chr, range(32, 1300)))]
@pytest.mark.parametrize("seen", [ODD_TEXTS, ["It don't rain."]])
def test_any_text_goes_through_a_tokenizer_unchanged_and_is_never_an_end_token(seen):
    """decode(encode(text)) = text, byte for byte; what it was made from is whole words."""
    encoding = dataset.train_encoding(seen)
    again = dataset.make_encoding(**dataset.encoding_state(encoding))
    for text in ODD_TEXTS:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text == "".join(dataset.PIECE.findall(text))
        assert encoding.eot_token not in tokens == again.encode_ordinary(text)
    words = encoding.decode_tokens_bytes(encoding.encode_ordinary(seen[-1]))
    assert seen is ODD_TEXTS or words == [b"It", b" don't", b" rain", b"."]

def test_byte_order_marks_line_ends_and_torn_lines_split_and_lose_no_text(tmp_path):
    """U+0085, U+2028 and U+2029 stay within a line, and the text of a special token is text."""
    odd = "a\x85b\u2028c\u2029d\x0be<|endoftext|>"
    row = json.dumps({"prompt": odd, "chosen": " x", "rejected": " y" + odd}, ensure_ascii=False)
    a = loaded(tmp_path, [row] * 2, corpus=f"{odd}\ntwo\n")
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    b = dataset.load(tmp_path, 64, 8)
    assert texts(a, "train") == texts(b, "train") == (
        {odd, "two"}, {(odd, " x", " y" + odd)}, {odd}) and a.fingerprint != b.fingerprint
    # Records are read back; JSON has no NaN, and a line that a kill tore is no record.
    dataset.write_records(tmp_path / "log", [{"text": odd, "x": 1.5}, {"b": math.nan}])
    with open(tmp_path / "log", "ab") as file:
        file.write(b'\n[]\n3\n\xff\n{"text": "torn')
    assert dataset.read_records(tmp_path / "log") == [{"text": odd, "x": 1.5}, {"b": None}]

# ======== 15. Checkpoints ========================================================================
class Killed(BaseException):
    """As kill -9: nothing in the program catches it."""

def killing(at, function=None, error=Killed):
    """The function, whose call number `at` never happens."""
    calls = itertools.count(1)
    def mortal(*arguments, **more):
        if next(calls) == at:
            raise error
        return function(*arguments, **more)
    return mortal

MOMENTS = [(show, "progress", (1, 9, 13)), (os, "fsync", (1, 3, 6)), (os, "replace", (2, 4)),
           (builtins, "open", (2, 5, 8, 13)), (rlhf, "evaluate", (1,))]
@pytest.mark.parametrize("owner, name, at", [(*m[:2], at) for m in MOMENTS for at in m[2]])
def test_a_killed_run_ends_bit_identical(first_run, tmp_path, monkeypatch, owner, name, at):
    """In a step, before or after a file is written: the same command goes on to the same end."""
    config = dataclasses.replace(first_run.config, out_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killing(at, getattr(owner, name)))
        rlhf.run(config)
    rlhf.run(config)
    for file in (tmp_path / "out").glob("*.tmp"):
        file.unlink()  # of a write that was killed
    ends_alike(first_run.out, tmp_path / "out")

def test_a_run_leaves_what_the_design_promises(world_run):
    """A log of every stage, the evaluation last, and the samples, judged by the true reward."""
    log, samples = (dataset.read_records(f"{world_run.out_dir}/{name}.jsonl")
                    for name in ("log", "samples"))
    assert list(dict.fromkeys(row["stage"] for row in log)) == [*rlhf.FILES, "evaluation"]
    ppo, record = [row for row in log if row["stage"] == "ppo"], log[-1]
    for row, names in (
            (ppo[0], "reward kl kl_k3 entropy approx_kl clip_fraction explained_variance ended "
             "value_loss length rollout_tokens_per_s update_tokens_per_s seconds true_reward"),
            (record, "reward_lm reward_ppo ended_lm length_lm reward_model_accuracy seconds "
             "language_model_loss seconds_ppo")):
        assert set(names.split()) <= row.keys()
    lm, ppo = (np.array([annotator.true_reward(s["prompt"], s[side]) for s in samples])
               for side in ("lm", "ppo"))
    for side, true in (("lm", lm), ("ppo", ppo)):
        assert [s[f"true_reward_{side}"] for s in samples] == pytest.approx(true, abs=1e-4)
    n, wins = len(samples), np.mean((ppo > lm) + 0.5 * (ppo == lm))
    # Wilson: win rates p from which the one seen is 1.96 deviations, √(p (1 − p) / n), away.
    low, high = sorted(np.roots([1 + 1.96**2 / n, -2 * wins - 1.96**2 / n, wins**2]))
    expected = {"true_reward_lm": lm.mean(), "true_reward_ppo": ppo.mean(), "win_rate": wins,
                "win_rate_low": low, "win_rate_high": high, "true_reward_std_lm": lm.std(),
                "kl": np.mean([s["kl"] for s in samples]),
                "distinct_ppo": len({s["ppo"] for s in samples}) / n,
                "reward_correlation_lm": np.corrcoef(lm, [s["reward_lm"] for s in samples])[0, 1]}
    assert {name: record[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    data = dataset.load(world_run.data_dir, 96, 8)  # the ceiling: how well r* predicts the labels
    rankings = [torch.tensor([[annotator.true_reward(data.text(x), data.text(y)) for y in ys]])
                for x, ys in data.held_out.comparisons]
    assert record["reward_model_ceiling"] == rlhf.ranking_accuracy(rankings)

# Another value for each setting, by the stage whose weights depend on it first.
OTHER = {"language_model": dict(
             seed=1, max_grad_norm=0.01, block_size=95, n_layer=2, n_head=4, n_embd=24, lm_epochs=2,
             lm_batch_size=7, lm_lr=1e-3),
         "reward_model": dict(rm_epochs=2, rm_batch_size=7, rm_lr=1e-2, max_new_tokens=7,
                              temperature=0.9),
         "ppo": dict(ppo_iterations=2, ppo_batch_size=9, ppo_epochs=1, minibatch_size=3, clip=0.01,
                     micro_batch_size=3, ppo_lr=1e-2, kl_coef=0.5, kl_target=1e-4, ptx_coef=0.5,
                     gamma=0.9, lam=0.5, value_clip=0.01, value_coef=0.5, entropy_coef=0.5,
                     early_stop_kl=1e-6, missing_eos_score=None),
         None: dict(eval_prompts=5, device="auto")}
@pytest.mark.parametrize("stage", OTHER)
def test_another_setting_is_refused_or_changes_no_weight(first_run, again, tmp_path, stage):
    """Every stage that is not refused ends with the same weights in a run from the beginning."""
    names = {name for group in OTHER.values() for name in group}
    assert names | {"out_dir", "data_dir", "init"} == {f.name for f in dataclasses.fields(Config)}
    before = contents(again)
    for name, value in OTHER[stage].items() if stage else ():
        config = dataclasses.replace(first_run.config, out_dir=str(again), **{name: value})
        with pytest.raises(ValueError, match=f"{name} .*, now {value}: --fresh {stage} starts"):
            rlhf.run(config)
        assert contents(again) == before
    rlhf.run(dataclasses.replace(first_run.config, out_dir=str(tmp_path / "anew"), **OTHER[stage]))
    kept = list(rlhf.FILES).index(stage) if stage else 3
    for name in FILES[:kept]:
        assert same(weights(tmp_path / "anew", name), weights(again, name)), name

def test_only_other_data_are_refused(first_run, again, tmp_path, monkeypatch, shell, refused):
    """What counts is every byte that is read; a checkpoint holds its tokenizer and settings."""
    shown = shell(look, "sample", "It is a", "--out_dir", first_run.out)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first_run.data, "my")
    flags = [*first_run.flags, "--data", "my", "--out_dir", "copy"]
    assert shell(rlhf, *flags)[1].count(": done (") == 3
    ends_alike(first_run.out, "copy")
    before, (_, _, encoding) = contents("copy"), rlhf.load("copy/lm.pt")
    ranks = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(
        dataset.encoding_state(encoding)["tokens"])]
    for name, more in (("corpus.txt", "One more.\n"), ("tokenizer.tiktoken", "\n".join(ranks)),
                       ("prompts.txt", "The\n")):
        with open(f"my/{name}", "a") as file:
            file.write(more)
        assert "lm.pt was made with data " in refused(rlhf, *flags) and contents("copy") == before
    monkeypatch.chdir("copy")
    assert shell(look, "sample", "It is a", "--out_dir", ".") == shown and "PPO policy" in shown[1]

class Explosive(str):
    """A pickle that would make a directory of this name while it is read."""

    def __reduce__(self):
        return os.mkdir, (str(self),)

def torch_bytes(content):
    raw = io.BytesIO()
    torch.save(content, raw)
    return raw.getvalue()

def test_a_refusal_leaves_every_file_as_it_was(first_run, again, tmp_path, monkeypatch, refused):
    """--fresh with other data, another seed, a cut, foreign or missing file, on a full disk."""
    def answer(*more):
        before = contents(again)
        line = refused(rlhf, *first_run.flags, "--out_dir", again, *more)
        assert contents(again) == before
        return line
    other = write_data(tmp_path / "other", [GOOD_LINE])
    assert "data" in answer("--fresh", "ppo", "--data", other)
    assert "seed 0, now 9" in answer("--fresh", "reward_model", "--seed", "9")
    assert "abacus" in answer("--fresh", "ppo", "--device", "abacus")
    whole = (again / "lm.pt").read_bytes()
    for foreign in (whole[:len(whole) // 2], b"", torch_bytes([1, 2]), torch_bytes({"weights": {}}),
                    torch_bytes({"x": Explosive(tmp_path / "boom")})):
        (again / "lm.pt").write_bytes(foreign)
        assert f"{again}/lm.pt" in answer() and f"{again}/lm.pt" in answer("--fresh", "ppo")
        assert f"{again}/lm.pt" in refused(look, "explain", "--out_dir", again)
    assert not (tmp_path / "boom").exists()
    (again / "lm.pt").unlink()
    assert "reward.pt was made with an earlier file, which is missing" in answer("--fresh", "ppo")
    (again / "lm.pt").write_bytes(whole)
    monkeypatch.setattr(os, "fsync", killing(1, error=OSError(28, "No space left on device")))
    line = refused(rlhf, *first_run.flags, "--out_dir", again, "--fresh", "ppo")
    assert f"{again}/policy.pt: No space" in line and not list(again.glob("*.tmp"))

def test_fresh_starts_over_from_a_stage_on(first_run, again, monkeypatch, shell):
    """At the first save of a fresh stage the later files go; the earlier ones stay."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(show, "progress", killing(2, show.progress))
        rlhf.run(dataclasses.replace(first_run.config, out_dir=str(again)), fresh="reward_model")
    assert not (again / "policy.pt").exists()
    for fresh, done in (([], 1), (["--fresh", "ppo"], 2), (["--fresh"], 0)):
        status, printed, _ = shell(rlhf, *first_run.flags, "--out_dir", again, *fresh)
        assert status == 0 and printed.count(": done (") == done
        ends_alike(first_run.out, again)
    monkeypatch.setattr(rlhf, "run", killing(1, error=KeyboardInterrupt))
    status, _, problem = shell(rlhf)  # Ctrl-C
    assert status == 130 and "the same command, without --fresh, goes on" in problem

@pytest.mark.filterwarnings("error")
def test_the_smallest_data_give_only_finite_figures(first_run, tmp_path, monkeypatch, shell):
    """One pair of one-letter answers, sizes of 1: no warning; statistics of one are left out."""
    data = write_data(tmp_path / "data", [{"prompt": "", "chosen": "a", "rejected": "b"}],
                      tokenizer=BYTES, corpus="x\ny\nz", prompts="p")
    monkeypatch.setattr(dataset, "SHIPPED", data.resolve())  # with a true reward
    ones = [f"--{name}=1" for name in SIZES if name not in ("device", "block_size")]
    status, printed, problem = shell(rlhf, *first_run.flags, *ones, "--block_size=4", "--data",
                                     data, "--out_dir", tmp_path / "out")
    assert (status, problem) == (0, "")
    assert not re.search(r"\bnan\b|\binf\b|-0\.0+\b", printed), printed
    for row in dataset.read_records(tmp_path / "out" / "log.jsonl"):
        assert all(x is not None and math.isfinite(x) for x in row.values() if x != row["stage"])
    assert "reward_correlation_lm" not in row

# ======== 16. Weights in and out =================================================================
def gpt_for_files():
    return tiny_gpt(5, vocab=11, layers=2, heads=3, width=12, context=10, std=0.3).float()

def test_the_saved_files_are_gpt2s_and_are_read_back(tmp_path):
    """config.json, transposed Conv1D weights, the tied head; an independent GPT-2 computes it."""
    gpt, folder = gpt_for_files(), tmp_path / "new" / "directory"
    gpt.save_pretrained(folder)
    tensors = torch.load(folder / BIN, weights_only=True)
    assert torch.equal(tensors.pop("lm_head.weight"), gpt.wte.weight)
    state = {name.removeprefix("transformer."): (w.T if name.endswith(CONV1D) else w).double()
             for name, w in tensors.items()}
    theirs = SimpleNamespace(config=gpt.config, state_dict=lambda: state)
    tokens = torch.randint(11, (4, 10), generator=draws())
    close(gpt(tokens).double(), plain_gpt2(theirs, tokens), 1e-5)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    again = GPT.from_pretrained(folder)
    assert again.config == gpt.config and same(again, gpt)
    (folder / "model.safetensors").write_bytes(b"")  # readers would prefer it
    with pytest.raises(ValueError, match="model.safetensors"):
        gpt.save_pretrained(folder)

def edit_config(folder, **changes):
    """Change config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))

def safetensors(tensors):
    """Eight bytes of header length, a JSON header, the raw bytes."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        raw = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": "BF16" if x.dtype == torch.bfloat16 else "F32",
                        "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body

@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_safetensors_file_is_read_as_gpt2s_come(tmp_path, kind):
    """No prefix, no lm_head, causal masks as buffers; the config may leave out what is usual."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path)
    (tmp_path / BIN).unlink()
    edit_config(tmp_path, n_positions=None, n_inner=48, eos_token_id=50256, model_type=None)
    weights = {k: v.to(kind) for k, v in gpt.state_dict().items()}
    tensors = {k: v.T if k.endswith(CONV1D) else v for k, v in weights.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 10, 10), "h.1.attn.masked_bias": torch.zeros(1)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(tensors))
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == gpt.config  # the default end token exceeds a small vocabulary
    assert same(again, {k: v.float() for k, v in weights.items()})

BIN, BIAS = "pytorch_model.bin", "transformer.ln_f.bias"
ONE = safetensors({"a": torch.zeros(2)})
# What becomes of a file, and what is said then: its bytes, changes of the config or of the weights.
FOREIGN = [("config.json", raw, "config.json: no") for raw in (b"[" * 99999, b"[]", b"\xff")]
FOREIGN += [(BIN, raw, f"{BIN}: not a readable") for raw in (b"", torch_bytes([])[:-9])]
FOREIGN += [("model.safetensors", raw, "model.safetensors: not") for raw in (
    b"hi", struct.pack("<Q", 99), ONE[:-1], ONE.replace(b"[2]", b"[3]"), ONE.replace(b"32", b"4 "))]
FOREIGN += [("config.json", {key: value}, f"config.json: {key} is ") for key, value in (
    ("n_layer", "2"), ("n_layer", 0), ("n_head", True), ("vocab_size", 10**30), ("n_inner", 7),
    ("model_type", "llama"), ("tie_word_embeddings", False))]
FOREIGN += [("config.json", {"n_head": 5}, "n_head")]
FOREIGN += [(BIN, change, f"{BIN}: .*{problem}") for change, problem in (
    (lambda t: list(t.values()), ""), (lambda t: t | {1: torch.zeros(1)}, ""),
    (lambda t: Explosive("boom"), ""), (lambda t: {k: t[k] for k in t if k != BIAS}, "ln_f.bias"),
    (lambda t: t | {"transformer.more": t[BIAS]}, "more"),
    (lambda t: t | {BIAS: t[BIAS].reshape(3, 4)}, "ln_f.bias"),
    (lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1}, "lm_head"))]
@pytest.mark.parametrize("name, change, problem", FOREIGN, ids=range(len(FOREIGN)))
def test_a_file_of_weights_that_does_not_fit_is_named_in_one_line(tmp_path, name, change, problem):
    """ValueError: which file, and what is missing, extra, cut or foreign; no code in it runs."""
    gpt_for_files().save_pretrained(tmp_path)
    if isinstance(change, bytes):
        (tmp_path / name).write_bytes(change)
    elif isinstance(change, dict):
        edit_config(tmp_path, **change)
    else:
        torch.save(change(torch.load(tmp_path / BIN, weights_only=True)), tmp_path / BIN)
    with pytest.raises(ValueError, match=problem) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not Path("boom").exists()

def test_a_run_starts_from_weights(first_run, tmp_path, monkeypatch, shell, refused):
    """--init DIR; other weights are not taken for these, and a wrong vocabulary is one line."""
    theirs = dataset.train_encoding(["good bad the"])  # in place of GPT-2's, a download
    monkeypatch.setattr(dataset.tiktoken, "get_encoding", lambda name: theirs)
    for name, vocab, seed in (("a", theirs.n_vocab, 0), ("b", theirs.n_vocab, 1), ("small", 99, 0)):
        GPT(GPTConfig(vocab, 64, 1, 2, 4, 3), draws(seed)).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data", [GOOD_LINE], tokenizer=BYTES)
    flags = [*first_run.flags, "--data", data, "--out_dir", "out", "--lm_epochs=0", "--init"]
    assert "tokenizer.tiktoken is not used" in shell(rlhf, *flags, "a")[1]
    lm, config, encoding = rlhf.load("out/lm.pt")
    assert same(lm, GPT.from_pretrained("a"))  # no epoch: as they were
    assert (config.block_size, config.n_embd, encoding.n_vocab) == (64, 4, theirs.n_vocab)
    for init, problem in (("b", "lm.pt was made with data"), ("small", "99"), ("gone", "no JSON")):
        assert problem in refused(rlhf, *flags, init)
    monkeypatch.setattr(dataset.tiktoken, "get_encoding", killing(1, error=ConnectionError))
    assert "TIKTOKEN_CACHE_DIR" in refused(rlhf, *flags, "a")

# ======== 17. The shipped world ==================================================================
def test_the_shipped_labels_follow_the_true_reward_and_degenerate_texts_score_far_below_reviews():
    """The best of each ranking has the highest r* as often as Plackett–Luce says: exp(r*) / Σ
    exp(r*). Degenerate texts score more than a standard deviation below honest reviews."""
    data, firsts = dataset.load(dataset.SHIPPED, 256, 64), []
    assert not data.skipped and not data.notes and data.shipped
    for x, ys in data.train.comparisons[:2000]:
        p = np.exp([annotator.true_reward(data.text(x), data.text(y)) for y in ys])
        firsts.append((p[p == p.max()].sum() / p.sum(), p[0] == p.max()))  # some are equal
    expected, seen = np.sum(firsts, 0)
    assert abs(seen - expected) < 4 * sum(p * (1 - p) for p, _ in firsts)**0.5
    reviews = [data.text(x) for x in data.train.documents[:300]]
    scores, words = [annotator.true_reward("", x) for x in reviews], " ".join(reviews[:20]).split()
    for text in ("", " \n ", "Good.", "the " * 20, "superb " * 30, "It is great. " * 12, "." * 40,
                 "asdf qwer zxcv " * 8, (reviews[0].split(". ")[0] + ". ") * 6, reviews[1] * 3,
                 " ".join(words[:300]), " ".join(words[:5]), " ".join(sorted(words[:30]))):
        assert annotator.true_reward("", text) < np.mean(scores) - np.std(scores), text

# ======== 18. Commands, and what can fail around them ============================================
def test_the_columns_of_explain_are_tied_by_the_equations_of_the_derivation(first_run, shell):
    """log π and V by a pass over each state; KL, r_t, Σ γ^k r_{t+k}, δ_t, Σ (γλ)^k δ_{t+k}."""
    beta, gamma, lam = 0.3, 0.9, 0.7
    flags = ["--kl_coef=0.3", "--gamma=0.9", "--lam=0.7", "--missing_eos_score=-2", "--clip=0.003"]
    _, text, _ = shell(look, "explain", "It is a", "--out_dir", first_run.out, "--seed=2", *flags)
    lines = text.splitlines()
    assert lines[0].startswith("It is a|") and max(map(len, lines)) <= 100
    at = next(i for i, line in enumerate(lines) if line.startswith(" t token"))
    rows = [line.split()[2:] for line in lines[at + 1:lines.index("", at)]]
    columns = [np.array([float(x.rstrip("*")) for x in column]) for column in zip(*rows)]
    c = dict(zip(lines[at].replace("log ", "log-").split()[2:], columns, strict=True))
    (lm, config, encoding), (policy, *_) = (
        rlhf.load(first_run.out / name) for name in ("lm.pt", "policy.pt"))
    eos, heat = encoding.eot_token, config.temperature
    x = [eos, *encoding.encode_ordinary("It is a")]
    y = rlhf.rollout(policy, [x], 8, eos, heat, rlhf.seeded(2, "explain", 0)).lists()[1][0]
    T, score = len(y), float(re.search(r"Σ r .* = (-?[\d.]+) - 0.3 · ", text)[1])
    assert T == len(rows) > 2 and ("was cut" in text) == (y[-1] != eos) == (score == -2)
    values = np.append(c["V"], 0)
    for t in range(T):
        k, state = np.arange(T - t), x + y[:t]
        for name, expected in {
                "log-π": log_pi(policy, state, heat)[y[t]].item(),
                "log-ref": log_pi(lm, state, heat)[y[t]].item(), "V": V(policy, state).item(),
                "KL": c["log-π"][t] - c["log-ref"][t],
                "r": -beta * c["KL"][t] + (score if t == T - 1 else 0),
                "to-go": (gamma**k * c["r"][t:]).sum(),
                "δ": c["r"][t] + gamma * values[t + 1] - values[t],
                "A": ((gamma * lam)**k * c["δ"][t:]).sum()}.items():
            assert c[name][t] == pytest.approx(expected, abs=0.004), (t, name)
    # The ratio is that after one update; a star is a ratio at the edge of the clip.
    clipped = np.array([row[-1][-1] == "*" for row in rows])
    assert clipped.any() and np.isin(c["ratio"][clipped], (0.997, 1.003)).all()
    sums = re.findall(r"^.+?  +(-?[\d.]+) = (.+)$", text, re.MULTILINE)
    assert len(sums) == 6
    for left, right in sums:  # a pocket calculator
        assert eval(right.replace("·", "*")) == pytest.approx(float(left), abs=0.004), right

def test_sample_prints_both_columns_with_score_and_kl(first_run, shell, refused):
    """Side by side; a prompt that leaves no room is one line, before sampling."""
    flags = "--out_dir", first_run.out, "--n", "2"
    _, text, _ = shell(look, "sample", "It is a", *flags)
    assert re.search(r"^language model +\| PPO policy$", text, re.MULTILINE)
    assert all(text.count(part) == n for part, n in (("[score", 4), ("KL 0.0]", 2), ("KL", 4)))
    room = SIZES["block_size"] - 8 - 1  # what just fits, and one token more
    assert shell(look, "sample", "\x01" * room, *flags)[0] == 0
    assert f"prompt {room + 2}" in refused(look, "sample", "\x01" * (room + 1), *flags)

def test_a_flag_given_with_its_default_overrides_the_runs_setting(first_run, monkeypatch, shell):
    """data.look: each setting that is given counts, whatever Config's default is."""
    seen = []
    monkeypatch.setattr(look, "sample", lambda models, *_: seen.append(models[3]))
    given = {f.name: f.default for f in dataclasses.fields(Config)} | {"out_dir": first_run.out}
    shell(look, "sample", "A", *[f"--{name}={value}" for name, value in given.items()])
    assert seen == [Config(out_dir=str(first_run.out))]

def test_label_appends_each_answer_skips_and_undoes_the_last(first_run, tmp_path, shell):
    """1, 2, s, u, q, or the end of the input; what it writes is a data directory."""
    def sit(folder, typed):
        out = ["--out_dir", first_run.out, "--to", tmp_path / folder]
        printed = shell(label, *out, typed=typed)[1]
        return printed, list(dataset.read_preferences(tmp_path / folder / "preferences.jsonl"))
    printed, rows = sit("a", "1\n2\nhm\ns\n1\nq\n1\n")
    assert len(rows) == 3 and "3 new answers, 3 in " in printed and printed.count(label.HELP) == 2
    assert sit("b", "2\n1\ns\n2")[1] == [(x, ys[::-1]) for x, ys in rows]  # the end of the input
    printed, others = sit("c", "u\n1\nu\nu\n1\nq\n")
    assert printed.count("nothing to undo") == 2 and printed.count("undone") == len(others) == 1
    # A second sitting asks nothing twice, and completes a last line without its end.
    path = tmp_path / "a" / "preferences.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    printed, both = sit("a", "1\n2\n")
    assert "2 new answers, 5 in " in printed and len({(x, *sorted(ys)) for x, ys in both}) == 5

NASTY = "a\x1b[31mred\x07\r\x9b2J\u202egnp.\x85\u2028"
def test_control_characters_of_data_and_models_are_shown_and_not_obeyed(first_run, tmp_path, shell):
    """In the summary, sample, explain, label, and in messages about a file or a flag."""
    rows = [{"prompt": NASTY, "responses": [f" {NASTY} {i}", " b"]} for i in range(9)]
    out = ["--out_dir", tmp_path / "out"]
    for module, *arguments in (
            (rlhf, *first_run.flags, "--data", write_data(tmp_path / "nasty", rows), *out),
            (look, "sample", NASTY, "--n=1", *out), (look, "explain", *out),
            (label, "--to", tmp_path / "labels", *out), (look, "sample", "--out_dir", NASTY),
            (rlhf, "--data", tmp_path / NASTY), (rlhf, f"--{NASTY}"), (rlhf, "--seed", NASTY)):
        status, printed, problem = shell(module, *arguments, typed="1\nu\nq\n")
        odd = {c for c in printed + problem if not c.isprintable() and c != "\n"}
        assert not odd and "\\x1b[31mred" in printed + problem, (module, arguments)
        assert status in (0, 2)

@pytest.mark.parametrize("words, problem", [
    ("--lr 1e-4", "--lr"), ("--kl-coef 0.1", "--kl-coef"), ("--n_lay=1", "--n_lay"),
    ("train", "train"), ("--seed", "--seed"), ("--seed 1.5", "seed"), ("--clip x", "clip"),
    ("--fresh ../lm", "../lm"), ("--n_head 3", "n_head"), ("--n_embd 2000000000", "not enough"),
    ("--max_new_tokens 300", "block_size"), ("--out_dir file", "file: ")])
def test_a_wrong_command_line_names_the_flag(tmp_path, monkeypatch, refused, words, problem):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a directory")
    write_data(tmp_path / "data", [GOOD_LINE])
    assert problem in refused(rlhf, "--data", "data", "--out_dir", "out", *words.split())
    assert not Path("out").exists()

def test_a_setting_out_of_its_range_or_of_another_kind_is_refused_by_name(shell):
    """The least value is accepted, less is not; nor is NaN, infinity, a text or a truth value."""
    leasts = {"at least 1": 1, "at least 0": 0, "more than 0": 1e-9, "from 0 to 1": 0}
    kinds = {f.name: f.metadata["expected"] for f in dataclasses.fields(Config)
             if f.type not in (str, str | None)}
    above_0 = {"max_grad_norm", "temperature", "kl_target", "clip", "value_clip", "early_stop_kl"}
    assert {name for name, kind in kinds.items() if kind == "more than 0"} == above_0
    assert {name for name, kind in kinds.items() if kind == "from 0 to 1"} == {"gamma", "lam"}
    for name, least in [(name, leasts[kind]) for name, kind in kinds.items() if kind in leasts]:
        assert getattr(Config(**{"n_head": 1, name: least}), name) == least
        bad = [least - 1, True, "1", math.nan, math.inf, -math.inf, [1]]
        for value in bad + [2] * (name in ("gamma", "lam")) + [1.5] * (least == 1):
            with pytest.raises(ValueError, match=f"^{name} is "):
                Config(**{name: value})
    # --help lists every setting, by stage.
    words, fields = " ".join(shell(rlhf, "--help")[1].split()), dataclasses.fields(Config)
    at = [words.index(f"--{f.name} X") for f in fields]
    assert at == sorted(at) and all(f.metadata["help"] in words for f in fields)

def python(*arguments, cwd=REPO, end="", **environment):
    """Run python in a process of its own; `end` is what follows the command in a shell."""
    command = ["bash", "-c", f'"$@" {end}', "bash", sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO),
                                "MPLBACKEND": "nonsense"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8",
                          errors="backslashreplace")

@pytest.mark.parametrize("command, end, status, shown, problem", [
    ("rlhf.py", "", (0,), "(no curves.png: ", ""),  # a plotting library that fails
    ("-m data.look explain Café", "", (0,), "Caf?|", ""),  # `?` for what cannot be shown
    ("-m data.label --to labels", "<<< 1", (0,), "1 new answers", ""),
    ("-m data.label --to labels", "<&- >&-", (0, 2), "", ""),
    ("rlhf.py", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}", (0, 1), "", ""),
    ("rlhf.py", "> /dev/full", (2,), "", "standard output: No space left on device")])
def test_in_a_shell_an_odd_output_costs_a_finished_run_nothing(
        first_run, again, tmp_path, command, end, status, shown, problem):
    """In ASCII, without a picture, closed, full, read no more: no traceback, no file is blamed."""
    command = command.replace("rlhf.py", str(REPO / "rlhf.py")).split()
    flags = first_run.flags if "-m" not in command else []
    done = python(*command, *flags, "--out_dir", again, cwd=tmp_path, end=end,
                  PYTHONIOENCODING="ascii")
    assert done.returncode in status and shown in done.stdout, done.stderr
    assert problem in done.stderr and done.stderr.count("\n") <= bool(status[-1])
    assert str(again) not in done.stderr
    assert all(same(weights(again, name), weights(first_run.out, name)) for name in FILES)

def test_make_reviews_regenerates_every_file_byte_for_byte(tmp_path):
    assert python("-m", "data.reviews.make_reviews", "--out", tmp_path).returncode == 0
    for name in ("corpus.txt", "preferences.jsonl"):
        assert (tmp_path / name).read_bytes() == (dataset.SHIPPED / name).read_bytes(), name

# ======== 19. The studies: the ladder and the frontier ===========================================
def listed_experience(w, rows):
    """The listed world's trajectories `rows` as a batch, with its exact values."""
    prompts = [list(w.world.states[i]) for i in w.world.state_of[rows, 0]]
    tokens, _ = rlhf.pad([x + y for x, y in zip(prompts, w.world.actions[rows].tolist())], "cpu")
    return rlhf.Experience(
        tokens=tokens, prompt_lengths=w.world.prompt_lengths[rows], actions=w.world.actions[rows],
        mask=w.mask[rows], log_probs=w.log_probs[rows], ref_log_probs=w.log_probs[rows],
        values=w.values[rows], rewards=w.rewards[rows], scores=w.rewards[rows].sum(1),
        advantages=None, returns=None, rollout_seconds=0.0)

@pytest.mark.parametrize("rung", ["REINFORCE", "rewards-to-go", "baseline", "GAE", "RLOO", "GRPO"])
def test_a_batch_of_a_rung_is_the_mean_of_its_trajectories_in_any_micro_batches(rung):
    """(1/N) Σ_i Σ_t w_t ∇log π(a_t|s_t), w_t as in section 5; the critic's from ½ Σ_t (V − R)²."""
    w, rows = listed(0), torch.tensor([0, 5, 9, 30, 41, 50, 66, 79])
    e, policy = listed_experience(w, rows), ActorCritic(w.gpt)
    weights = ladder.step_weights(rung, e)
    expected = torch.einsum("nt,ntd->d", weights, w.grad_log_pi[rows]) / 8
    _, values, _ = rlhf.forward_responses(policy, e, 1.0)
    errors = 0.5 * (values - weights - e.values)**2 * e.mask
    by_value, = torch.autograd.grad(errors.sum() / 8, policy.value_head.weight)
    for size in (1, 3, 8):
        policy.zero_grad()
        config = Config(temperature=1.0, value_coef=0.5, micro_batch_size=size, lam=0.95)
        ladder.add_gradient(rung, policy, e, config)
        close(-torch.cat([p.grad.flatten() for p in policy.gpt.parameters()]), expected)
        if rung in ladder.CRITICS:
            close(policy.value_head.weight.grad, 0.5 * by_value)
    known = WEIGHTS | {"GAE": lambda w: gae(w.rewards, w.values, w.mask)}
    assert rung not in known or torch.allclose(weights, known[rung](w)[rows])

def group_expectation(w, divide):
    """E of the gradient estimate from two independent responses to each prompt, by listing all."""
    total, prompt = w.rewards.sum(1), w.world.state_of[:, 0]
    i, j = (prompt[:, None] == prompt).nonzero().T                         # 2 × (pairs,)
    pairs = torch.stack([total[i], total[j]], dim=1).flatten()
    weights = ladder.group_weights(pairs, 2, divide).view(-1, 2)           # (pairs, 2)
    p = w.p[i] * w.p[j] * len(w.world.prompts)  # p(x) p(y|x) p(y'|x)
    slopes = w.grad_log_pi.sum(1)                                          # (N, D) ∇log p(τ)
    return p @ (weights[:, :1] * slopes[i] + weights[:, 1:] * slopes[j]) / 2

@SEEDS
def test_the_mean_of_the_other_responses_is_a_baseline_without_bias(seed):
    """RLOO: over all pairs of responses to a prompt, the expectation is ∇J, exactly."""
    close(group_expectation(listed(seed), divide=False), listed(seed).grad_J)

@SEEDS
def test_division_by_the_std_of_the_group_turns_the_gradient(seed):
    """GRPO is biased, and not by a factor: its expectation has another direction than ∇J."""
    biased = group_expectation(listed(seed), divide=True)
    assert torch.cosine_similarity(biased, listed(seed).grad_J, dim=0) < 0.995

def test_group_weights_by_hand():
    """Returns 6, 7, 11 to one prompt: the others' means are 9, 8.5, 6.5. A tie weighs nothing."""
    returns, std = f64([6.0, 7.0, 11.0, 5.0, 5.0, 5.0]), (14 / 3)**0.5
    close(ladder.group_weights(returns, 3), [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    close(ladder.group_weights(returns, 3, True), [-2 / std, -1 / std, 3 / std, 0, 0, 0], 1e-3)

def test_the_measured_variance_of_reinforce_comes_near_the_exact_one(monkeypatch):
    w, config = listed(0), Config(temperature=1.0)
    rows = torch.multinomial(w.p, 3200, replacement=True, generator=draws()).view(-1, 8)
    sampled = ((0, 0, listed_experience(w, batch), config) for batch in rows)
    monkeypatch.setattr(ladder, "batches", lambda *_: sampled)
    run = SimpleNamespace(lm=w.gpt, policy=ActorCritic(w.gpt))
    _, exact = moments(w.p, policy_gradients(w, WEIGHTS["REINFORCE"](w)))
    assert abs(ladder.variance(run, "REINFORCE", 0.0, None) / exact - 1) < 0.1

def test_the_studies_hold_out_the_same_prompts_and_train_at_the_best_rate(
        world_run, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "SETTINGS", ((8, 0.0), (32, 5.0)))
    monkeypatch.setattr(frontier, "PROMPTS", 2)
    out, asked = world_run.out_dir, []
    monkeypatch.setattr(rlhf, "collect", lambda *args: asked.append(args[3]) or collect(*args))
    def climb(run, rung, batch, shift, seed, rate, budget, climb=ladder.climb):
        _, _, curve = climb(run, rung, batch, shift, seed, rate, budget)
        end = float(ladder.RUNGS.index(rung)**2 + batch + shift + seed)
        return rate if rung == "PPO" else -rate, [end] * 4, curve
    monkeypatch.setattr(ladder, "climb", climb)
    ends, curves, *others = ladder.study(out, (), [0, 1], 250, processes=1)
    best, ppo = frontier.study([out], (), [0.0, 0.5], processes=1)
    held_out = frontier.open_run(out, ()).data.held_out.prompts[:2]
    assert [x for x in asked if len(x) == 2] == [held_out] * (42 + 28 + 2)
    assert others[0] == {pair: 1e-3 if "PPO" in pair else 1e-4 for pair in others[1]}
    assert ends[:, 1, :, 3].tolist() == [[9, 10], [38, 39]]  # rewards-to-go
    assert best[0, 1, 0] == f64(math.log(2) - 1 / 2).float() and best[0, :, 1].diff().min() >= 0
    ladder.show_tables(ends, *others)
    marks = re.findall(r"±0.50 (..)", capsys.readouterr().out)
    assert marks[:28:4] == marks[3:28:4] == [" p", " p", "ap", "ap", "a ", "ap", "ap"]
    Figure = pytest.importorskip("matplotlib.figure").Figure
    ladder.draw(Figure, curves, 250, f"{out}/ladder.png")
    frontier.draw(Figure, best, ppo, f"{out}/frontier.png")
    assert CURVES(out) == ", curves.png"

# ======== 20. The README =========================================================================
README = REPO / "README.md"
LINK = re.compile(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)")  # [`gae`](rlhf.py#L300)
FILE = re.compile(r"[\w/]*\w\.(?:py|md|jsonl|txt|tiktoken|png|pt|bin|safetensors)\b")
def refreshed(text):
    """The text with the line number of each link set to that of the definition it names."""
    def link(m):
        lines = enumerate((REPO / m[2]).read_text("utf-8").splitlines(), 1)
        found = [i for i, line in lines if re.match(rf" *(?:def|class) {m[1]}\b", line)]
        assert found, f"{m[2]} has no {m[1]}"
        return f"[`{m[1]}`]({m[2]}#L{found[0]})"
    return LINK.sub(link, text)

def unknown(text):
    """What the text names and is not there: files, flags, tests, and `names` of the code."""
    files = [REPO / "rlhf.py", REPO / "model.py", *(REPO / "data").rglob("*.py")]
    words = {*re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in files))}
    words |= {*re.findall(r"def (\w+)", Path(__file__).read_text("utf-8")), "test_rlhf",
              "encoder", "vocab", "bpe"}
    words |= {part for path in files for part in path.stem.split("_")}
    text = re.sub(r"https?://[^\s)]+", "", text)
    names = FILE.findall(text) + re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    names += re.findall(r"(?<![\w-])--[a-z]\w*|\btest_\w+|(?<=python -m )data[\w.]+", text)
    names += re.findall(r"`([A-Za-z_][\w.-]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [name for name in names if not (REPO / name).exists()
            and not words.issuperset(re.findall(r"\w+", name))]

def test_what_the_readme_names_is_there_and_its_links_lead_to_it():
    text = README.read_text("utf-8")
    assert not unknown(text)
    assert refreshed(text) == text, "`python test_rlhf.py` sets the lines of the links"
    assert len(text.splitlines()) <= 450 and len(text.split()) <= 4500 and "@@" not in text

def test_the_readme_follows_the_lecture():
    """25 sections in the order of its times, each with an equation, a function and a proof."""
    chapter = README.read_text("utf-8").split("\n## The derivation")[1].split("\n## ")[0]
    times = [(functools.reduce(lambda s, x: 60 * s + int(x), time.split(":"), 0), int(seconds))
             for time, seconds in re.findall(r"### .* \(\[([\d:]+)\]\(\S+&t=(\d+)\)\)", chapter)]
    assert len(times) == 25 and all(a == b for a, b in times) and times == sorted(times)
    for section in chapter.split("\n### ")[1:]:
        assert section.count("```math\n") == 1 and len(LINK.findall(section)) >= 2, section[:40]
        assert "[`test_" in section and section.count("{") == section.count("}"), section[:40]

def test_the_lines_of_the_readme_train_what_a_run_trains(first_run, tmp_path, monkeypatch):
    """The very lines, in their order, under a Config of reduced size, beside a finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(first_run.out)
    monkeypatch.setattr(rlhf, "Config", functools.partial(dataclasses.replace, first_run.config))
    first, *others = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    exec(first, names := {})
    for name, file in (("lm", "lm.pt"), ("reward_model", "reward.pt"), ("policy", "policy.pt")):
        assert same(names[name].state_dict(), weights(first_run.out, file)), name
    for block in others:
        exec(block, {})
    assert rlhf.GPT.from_pretrained("hf").config.n_embd == first_run.config.n_embd

if __name__ == "__main__":
    README.write_text(refreshed(README.read_text("utf-8")), "utf-8")
