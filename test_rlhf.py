"""The derivation of RLHF, proven step by step: each test is named after a claim.

The method is a world small enough to list. A GPT of a few hundred parameters in float64, four
tokens, three steps: every trajectory τ can be written down with its probability p_θ(τ), and a
gradient runs through it. So

    J(θ) = Σ_τ p_θ(τ) R(τ)

is a formula that autograd differentiates, and each estimator of the derivation has an expectation
and a variance that are computed, not sampled: "unbiased" means equal to 1e-10. The functions under
test are the ones that train; the lists they are held against are written here, in the plainest way.

    python -m pytest test_rlhf.py                     everything, in about a minute
    python -m pytest test_rlhf.py -s -k variance      one claim, with the figures it prints
"""
import copy
import dataclasses
import errno
import functools
import importlib.util
import itertools
import json
import math
import os
import random
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
from data import annotator, curves, dataset
from model import (GPT, ActorCritic, GPTConfig, RewardModel, load_checkpoint, read_safetensors,
                   save_checkpoint)
from rlhf import (Config, Experience, Rollout, adapt_kl_coef, collect, entropy, gae,
                  gather_log_probs, kl_estimates, kl_penalized_rewards, masked_mean,
                  policy_gradient_loss, ppo_policy_loss, ppo_update, reward_model_loss,
                  rewards_to_go, rollout, train_ppo, value_loss, whiten)

torch.set_num_threads(1)
REPO = Path(rlhf.__file__).resolve().parent
SHARED = REPO.parent / "shared" / "data"

# =================================================================================================
# A world small enough to list
# =================================================================================================


def close(actual, expected, atol=1e-10):
    """Equal in dtype, shape, and value up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def tiny_gpt(seed=0, vocab=4, layers=1, heads=2, width=4, context=12, std=0.3):
    """A GPT in float64 that is far from its initialisation; the last token ends a text."""
    generator = torch.Generator().manual_seed(seed)
    config = GPTConfig(vocab, context, layers, heads, width, vocab - 1)
    gpt = GPT(config, generator).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return gpt


def tiny_policy(seed=0, **sizes):
    """An ActorCritic on such a GPT whose values are not zero either."""
    policy = ActorCritic(tiny_gpt(seed, **sizes))
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.constant_(policy.value_head.bias, 0.3)
    return policy


def log_pi(policy, state, temperature=1.0):
    """log π(·|s), (V,), by a forward pass over this state alone."""
    gpt = getattr(policy, "gpt", policy)
    return F.log_softmax(gpt(torch.tensor([state]))[0, -1] / temperature, -1)


class World:
    """All responses of at most T tokens to a few prompts, each prompt as likely as the others.

    Trajectory n is states[state_of[n, 0]], actions[n, 0], states[state_of[n, 1]], …; a state is
    the tuple of all tokens so far. It ends with the end token, or is cut after T tokens.
    """

    def __init__(self, prompts, vocab, T):
        self.prompts, self.eos, self.T = prompts, vocab - 1, T
        responses = [y for n in range(1, T + 1) for y in itertools.product(range(vocab), repeat=n)
                     if self.eos not in y[:-1] and (y[-1] == self.eos or n == T)]
        rows = [(x, y) for x in prompts for y in responses]
        self.states = list(dict.fromkeys(x + y[:t] for x, y in rows for t in range(len(y))))
        index = {state: i for i, state in enumerate(self.states)}
        self.state_of = torch.tensor([[index.get(x + y[:t], 0) if t < len(y) else 0
                                       for t in range(T)] for x, y in rows])         # (N, T)
        self.actions = torch.tensor([y + (0,) * (T - len(y)) for x, y in rows])      # (N, T)
        self.mask = torch.tensor([[t < len(y) for t in range(T)] for x, y in rows])  # (N, T)
        self.lengths = self.mask.sum(1)                                              # (N,)
        P = max(len(x) for x in prompts)
        self.tokens = torch.tensor([x + y + (0,) * (P + T - len(x + y)) for x, y in rows])
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
        V = {}
        for i in sorted(range(len(self.states)), key=lambda i: -len(self.states[i])):
            s, pi = self.states[i], table[i].exp()
            V[s] = sum(pi[a] * (rewards[i, a] + V.get(s + (a,), 0)) for a in range(len(pi)))
        return torch.stack([V[s] for s in self.states])

    def as_rollout(self, log_probs=None):
        return Rollout(self.tokens, self.prompt_lengths, self.actions, self.mask, log_probs)


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
    generator = torch.Generator().manual_seed(seed)
    reward_table = torch.randn(len(world.states), 4, generator=generator, dtype=torch.float64)
    table = world.table(gpt)
    log_probs, rewards = world.read(table), world.read(reward_table)
    p = world.probability(log_probs)
    J = (p * rewards.sum(1)).sum()                       # Σ_τ p(τ) R(τ): autograd does the rest
    scores = torch.stack([torch.stack([flat_grad(x, gpt) for x in log_pi(gpt, state)])
                          for state in world.states])    # ∇log π(a|s), (states, V, D)
    scores = scores[world.state_of, world.actions] * world.mask[..., None]           # (N, T, D)
    values = world.values(table, reward_table).detach()
    return SimpleNamespace(
        world=world, gpt=gpt, mask=world.mask, lengths=world.lengths, rewards=rewards,
        log_probs=log_probs.detach(), p=p.detach(), J=J.detach(), grad_J=flat_grad(J, gpt),
        scores=scores, values=values[world.state_of].where(world.mask, 0))


def gradients(w, loss):
    """What each trajectory estimates ∇J to be: −∂loss/∂θ of a batch of it alone, (N, D).

    loss(log_probs (1, T), row): the project's loss of one trajectory, `row` is a slice.
    """
    leaf = w.log_probs.clone().requires_grad_()
    total = sum(loss(leaf[n:n + 1], slice(n, n + 1)) for n in range(len(leaf)))
    by_log_prob, = torch.autograd.grad(total, leaf)                                  # (N, T)
    return -torch.einsum("nt,ntd->nd", by_log_prob, w.scores)


def policy_gradients(w, weights):
    return gradients(w, lambda log_probs, row: policy_gradient_loss(
        log_probs, weights[row], w.mask[row]))


def moments(p, x):
    """Expectation (D,) and variance, the trace of the covariance, of x (N, D) under p (N,)."""
    mean = p @ x
    return mean, (p @ (x - mean)**2).sum()


SEEDS = pytest.mark.parametrize("seed", range(3))


# =================================================================================================
# 1. Reward model: preferences become a number
# =================================================================================================


def test_reward_model_loss_is_minus_log_sigmoid_of_the_margin():
    """L = −E log σ(r_w − r_l) = E log(1 + e^{r_l − r_w}), by NumPy and by hand."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    close(reward_model_loss(a, b), torch.tensor(np.log1p(np.exp((b - a).numpy())).mean()))
    zero, two = torch.tensor([0.0]), torch.tensor([math.log(3.0)])
    close(reward_model_loss(zero, zero), torch.tensor(math.log(2.0)), 1e-6)   # no opinion: log 2
    close(reward_model_loss(two, zero), torch.tensor(math.log(4 / 3)), 1e-6)  # σ(log 3) = 3/4
    close(reward_model_loss(zero, two), torch.tensor(math.log(4.0)), 1e-6)    # the wrong order


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
    a, b = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(reward_model_loss(a + 7, b + 7), reward_model_loss(a, b))


def test_minimiser_on_infinitely_many_labels_is_the_true_reward_up_to_a_constant():
    """argmin_r Σ_{i≠j} −P(i ≻ j) log σ(r_i − r_j) = r* + c, where P(i ≻ j) = σ(r*_i − r*_j).

    Infinitely many labels: each ordered pair (i, j) weighs as much as its probability.
    """
    true = torch.tensor([0.5, -1.2, 2.0, 0.0, 0.7], dtype=torch.float64)
    pairs = list(itertools.permutations(range(5), 2))

    def expected_loss(others):
        r = torch.cat([torch.zeros(1, dtype=torch.float64), others])  # c: the first is 0
        return sum(torch.sigmoid(true[i] - true[j]) * reward_model_loss(r[i:i + 1], r[j:j + 1])
                   for i, j in pairs)

    found = torch.zeros(4, dtype=torch.float64)
    for _ in range(12):  # Newton: the loss is strictly convex once c is fixed
        slope = torch.autograd.functional.jacobian(expected_loss, found)
        curvature = torch.autograd.functional.hessian(expected_loss, found)
        found = found - torch.linalg.solve(curvature, slope)
    close(found, (true - true[0])[1:])


def test_reward_model_reads_the_last_token_of_each_row_and_no_padding():
    """r(x, y) = w · h_last + b, from a row that stands alone or padded among longer ones."""
    model = RewardModel(tiny_gpt(), torch.Generator().manual_seed(0))
    torch.nn.init.constant_(model.reward_head.bias, 0.7)
    rows = [[3, 1, 3], [3, 2, 0, 1, 3], [3, 3]]
    tokens, lengths = torch.full((3, 7), 2), torch.tensor([len(row) for row in rows])
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    alone = [model.gpt.hidden(torch.tensor([row]))[0, -1] @ model.reward_head.weight[0] + 0.7
             for row in rows]
    close(model(tokens, lengths), torch.stack(alone))


def test_score_pairs_puts_the_chosen_side_first():
    """(r(x, y_w), r(x, y_l)), each side read at its own end, in one padded pass."""
    model = RewardModel(tiny_gpt(), torch.Generator().manual_seed(0))
    pairs = [([3, 1], [2, 0, 3], [3]), ([3], [3], [1, 1, 1, 3]), ([3, 0], [2, 3], [1, 3])]
    chosen, rejected = rlhf.score_pairs(model, pairs)
    for i, (x, w, l) in enumerate(pairs):
        for scores, y in ((chosen, w), (rejected, l)):
            close(scores[i], model(torch.tensor([x + y]), torch.tensor([len(x + y)]))[0])


def test_reward_head_starts_as_normal_with_std_one_over_root_d_plus_one():
    """w ~ N(0, 1/√(d+1)), b = 0 (Stiennon et al. 2020): scores start near 1, not near 0.02."""
    for d in (2, 64):
        head = RewardModel(GPT(GPTConfig(4, 8, 1, 1, d, 3)),
                           torch.Generator().manual_seed(0)).reward_head
        normal = torch.empty(1, d).normal_(generator=torch.Generator().manual_seed(0))
        close(head.weight.detach(), normal / math.sqrt(d + 1), 1e-6)
        assert head.bias == 0


def test_normalised_reward_has_mean_0_and_std_1():
    """r ← (r − E r) / σ_r over samples of π_ref: PPO's constants assume that scale."""
    model = RewardModel(tiny_gpt(), torch.Generator().manual_seed(0))
    torch.nn.init.constant_(model.reward_head.bias, 5.0)
    tokens = torch.randint(4, (40, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((40,), 6)
    before = model(tokens, lengths)
    model.normalize(before)
    close(model(tokens, lengths), (before - before.mean()) / before.std(correction=0))
    model.normalize(torch.full((5,), 2.0, dtype=torch.float64))  # all the same: no division by 0
    assert model(tokens, lengths).isfinite().all()


def reward_model_world():
    """A language model, a reward model, and pairs in which the chosen side has two 1s more."""
    gpt = tiny_gpt(std=0.1, width=16).float()
    draw = random.Random(0)
    pairs = []
    for _ in range(48):
        low, high = [[draw.choice([0, 2]) for _ in range(4)] for _ in "ab"]
        for i in draw.sample(range(4), 2):
            high[i] = 1
        pairs.append(([3] + [draw.randrange(3)] * draw.randrange(3), high + [3],
                      low[:draw.randrange(2, 5)] + [3]))
    return gpt, RewardModel(gpt, torch.Generator().manual_seed(0)), pairs


def warmed_up(peak, steps, warmup):
    """Linear from 0 to the peak in `warmup` steps, then linear to 0 at `steps`."""
    return [peak * min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
            for step in range(steps)]


REWARD_CONFIG = dict(rm_epochs=5, rm_batch_size=8, rm_lr=1e-2, max_new_tokens=5, block_size=12,
                     ppo_batch_size=32, minibatch_size=8)


def test_train_reward_model_learns_the_order_and_normalises_on_the_references_samples():
    """min −E log σ(r_w − r_l), then mean 0 and std 1 on π_ref's own responses."""
    gpt, model, pairs = reward_model_world()
    start = copy.deepcopy(gpt.state_dict())
    config, log = Config(**REWARD_CONFIG), []
    prompts = [x for x, _, _ in pairs]
    rlhf.train_reward_model(model, pairs, gpt, prompts, config, on_step=lambda *a: log.append(
        copy.deepcopy(a)))
    assert [state["step"] for _, state in log] == list(range(1, 31))  # 5 epochs of 48 / 8 steps
    assert all(metrics["steps"] == 30 for metrics, _ in log)
    rates = [state["optimizer"]["param_groups"][0]["lr"] for _, state in log]
    assert rates == pytest.approx(warmed_up(1e-2, 30, 3))
    assert log[0][0]["loss"] > 0.2 and log[-1][0]["loss"] < 0.05
    assert log[-1][0]["accuracy"] == 1 and rlhf.reward_model_accuracy(model, pairs) == 1
    assert rlhf.reward_model_accuracy(model, [(x, l, w) for x, w, l in pairs]) == 0
    assert rlhf.reward_model_accuracy(model, [(x, w, w) for x, w, l in pairs]) == 0.5  # ties half
    mixed = pairs[:1] * 3 + [(pairs[1][0], pairs[1][2], pairs[1][1])]
    assert rlhf.reward_model_accuracy(model, mixed, batch_size=2) == 0.75
    fresh = rollout(gpt, prompts * 20, 5, 3, generator=torch.Generator().manual_seed(5))
    scores = rlhf.reward_scores(model, fresh)
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.1
    assert all(torch.equal(start[k], v) for k, v in gpt.state_dict().items())  # π_ref is frozen


def test_a_cut_response_is_scored_at_an_end_token_behind_it():
    """r(x, y ⊕ end): the reward model was only ever read at end tokens; padding is not read."""
    model = RewardModel(tiny_gpt(), torch.Generator().manual_seed(0))
    cases = [([3, 1], [2, 0, 1], [3, 1, 2, 0, 1, 3]),  # cut: an end token is put behind it
             ([3, 0], [1, 3], [3, 0, 1, 3]),           # ended: read where it ended
             ([3, 3, 2, 1], [3], [3, 3, 2, 1, 3]),     # an end token in the prompt ends nothing
             ([3, 2], [1], [3, 2, 1, 3]),
             ([3, 3, 1, 2], [0, 1, 2], [3, 3, 1, 2, 0, 1, 2, 3])]  # cut at the end of the tensor
    tokens = torch.zeros(5, 7, dtype=torch.long)
    actions, mask = torch.zeros(5, 3, dtype=torch.long), torch.zeros(5, 3, dtype=torch.bool)
    for b, (x, y, _) in enumerate(cases):
        tokens[b, :len(x + y)] = torch.tensor(x + y)
        actions[b, :len(y)], mask[b, :len(y)] = torch.tensor(y), True
    before = tokens.clone()
    batch = Rollout(tokens, torch.tensor([len(x) for x, _, _ in cases]), actions, mask,
                    torch.zeros(5, 3))
    alone = [model(torch.tensor([read]), torch.tensor([len(read)]))[0] for _, _, read in cases]
    scores = rlhf.reward_scores(model, batch)
    close(scores, torch.stack(alone).detach())
    assert not scores.requires_grad and torch.equal(batch.tokens, before)
    assert rlhf.ends(batch, 3).tolist() == [False, True, True, False, False]
    actions[0, 2], mask[0, 2] = 3, False  # an end token in the padding ends nothing
    assert not rlhf.ends(batch, 3)[0]


# =================================================================================================
# 2. Trajectories
# =================================================================================================


@SEEDS
def test_probabilities_of_all_trajectories_sum_to_one(seed):
    """Σ_τ p_θ(τ) = 1 with p_θ(τ) = p(x) Π_t π_θ(a_t|s_t): nothing is missing from the list."""
    w = listed(seed)
    close(w.p.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert len(w.p) == 80 and w.p.min() > 0


def test_gather_log_probs_is_the_log_softmax_at_the_action():
    """log π(a_t|s_t) = logits[a_t] − log Σ_a exp logits[a], by NumPy; overflow-free."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    actions = torch.randint(4, (2, 3), generator=generator)
    expected = [[x[a] - np.log(np.exp(x).sum()) for x, a in zip(rows, acts)]
                for rows, acts in zip(logits.numpy(), actions.numpy())]
    close(gather_log_probs(logits, actions), torch.tensor(np.array(expected)))
    assert gather_log_probs(torch.tensor([[[1e4, 0.0]]]), torch.tensor([[0]])) == 0


@SEEDS
def test_each_time_step_is_read_at_position_P_minus_1_plus_t(seed):
    """log π(a_t|s_t) comes from the last token of s_t: equal to a pass over s_t alone."""
    w = listed(seed)
    for temperature in (1.0, 0.7):
        logits, values = rlhf.forward_responses(w.gpt, w.world.as_rollout(), temperature)
        assert values is None and logits.shape == (80, 3, 4)
        got = gather_log_probs(logits, w.world.actions).where(w.mask, 0)
        close(got, w.world.read(w.world.table(w.gpt, temperature)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_samples_each_trajectory_with_its_probability(temperature):
    """P(τ is sampled) = p_θ(τ): chi-square over every trajectory of both prompts."""
    w, n = listed(1), 20_000
    r = rollout(w.gpt, [list(x) for x in RAGGED] * n, 3, 3, temperature,
                torch.Generator().manual_seed(4))
    log_probs = w.world.read(w.world.table(w.gpt, temperature)).detach()
    index = {(P, tuple(a[:n])): i for i, (P, a, n) in enumerate(zip(
        w.world.prompt_lengths.tolist(), w.world.actions.tolist(), w.lengths.tolist()))}
    which = torch.tensor([index[P, tuple(a[:k])] for P, a, k in zip(
        r.prompt_lengths.tolist(), r.actions.tolist(), r.mask.sum(1).tolist())])
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


def count_passes(monkeypatch):
    """The list that will hold the number of rows of each pass through a GPT."""
    sizes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, tokens, *rest: sizes.append(len(tokens))
                        or hidden(self, tokens, *rest))
    return sizes


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cache_ragged_prompts_and_early_ends_change_nothing(temperature, monkeypatch):
    """log π(a_t|s_t) reported while sampling = that of a fresh pass over each row alone."""
    gpt = tiny_gpt(2, vocab=7, layers=2, heads=2, width=8, context=24, std=0.3)
    prompts = [[6], [6, 1, 2, 3, 4, 5, 0, 1], [6, 6, 2], [6, 4]] * 12
    sizes = count_passes(monkeypatch)
    r = rollout(gpt, prompts, 12, 6, temperature, torch.Generator().manual_seed(0))
    passes = list(sizes)
    lengths = r.mask.sum(1).tolist()
    assert len(set(lengths)) > 6 and max(lengths) == 12 and min(lengths) < 3  # a real test
    assert r.tokens.shape == (48, 8 + 12) and r.log_probs.dtype == torch.float64
    for b, (prompt, n) in enumerate(zip(prompts, lengths)):
        actions = r.actions[b, :n].tolist()
        assert r.tokens[b].tolist() == prompt + actions + [0] * (20 - len(prompt) - n)
        assert r.mask[b].tolist() == [t < n for t in range(12)]
        assert 6 not in actions[:-1] and (actions[-1] == 6 or n == 12)  # ends at the end token only
        assert not r.actions[b, n:].any() and not r.log_probs[b, n:].any()
        alone = gpt(torch.tensor([prompt + actions]))[0, len(prompt) - 1:-1] / temperature
        close(r.log_probs[b, :n], F.log_softmax(alone, -1)[range(n), actions].detach())
    assert r.prompt_lengths.tolist() == [len(x) for x in prompts]
    assert len(passes) == 12  # a pass a step, of rows that are not done (and few that are)
    for t, size in enumerate(passes):
        alive = sum(n > t for n in lengths)
        assert size == alive or alive < size < alive / 0.8


def always_ends():
    """A policy that ends at once: only the end token has a large logit."""
    gpt = tiny_gpt(std=0.0)
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.fill_(1.0)
        gpt.wte.weight.copy_(torch.tensor([-9.0, -9, -9, 9])[:, None].expand(4, 4))
    return gpt


def test_rollout_is_as_long_as_its_longest_response_and_no_longer(monkeypatch):
    """T = max_b |y_b|: when all rows have ended, sampling stops."""
    sizes = count_passes(monkeypatch)
    r = rollout(always_ends(), [[3], [3, 1]], 6, 3)
    assert sizes == [2]
    assert r.mask.tolist() == [[True], [True]] and r.tokens.tolist() == [[3, 3, 0], [3, 1, 3]]
    assert r.prompt_lengths.tolist() == [1, 2] and not r.log_probs.requires_grad


def test_rollout_is_a_function_of_its_generator_and_each_row_has_draws_of_its_own():
    """τ_b depends on the seed and its own draws: what a neighbour does changes nothing."""
    gpt = tiny_gpt(2, vocab=7, width=8, context=24, std=0.3)

    def responses(prompts, seed):
        r = rollout(gpt, prompts, 6, 6, generator=torch.Generator().manual_seed(seed))
        a, b = log_pi(gpt, prompts[0]), r.log_probs[0, 0]
        close(b, a[r.actions[0, 0]].detach())  # at temperature 1 unless it is told otherwise
        return [a[m].tolist() for a, m in zip(r.actions, r.mask)]

    same = [[6, 1]] * 8
    assert responses(same, 0) == responses(same, 0) != responses(same, 1)
    assert responses([[6, 1]] * 7 + [[6, 2, 3]], 0)[:7] == responses(same, 0)[:7]
    assert len({tuple(y) for y in responses(same, 0)}) > 3


def test_rollout_says_in_one_line_what_it_cannot_do():
    """P >= 1 and P + T_max <= context: a longer row would have no position embedding."""
    gpt = tiny_gpt(context=8)
    assert rollout(gpt, [[3] * 5], 3, 3).tokens.shape[1] <= 8  # 5 + 3 just fits
    with pytest.raises(ValueError, match="begin every prompt with the end token"):
        rollout(gpt, [[3], []], 2, 3)
    with pytest.raises(ValueError, match=r"prompt 6 \+ max_new_tokens 3 .* context of 8 tokens$"):
        rollout(gpt, [[3], [3] * 6], 3, 3)


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
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 9e9, 9e9]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5, -1.0], [2.0, 9e9, -9e9]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    log_probs.requires_grad_(), weights.requires_grad_()
    loss = policy_gradient_loss(log_probs, weights, mask)
    close(loss.detach(), torch.tensor(-(-1 - 1 + 3 - 8) / 2, dtype=torch.float64))
    loss.backward()
    close(log_probs.grad, -weights.detach() * mask / 2)
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
    """R_t = r_t + γ R_{t+1}: r = (1, 2, 4), γ = ½ gives R = (1 + ½ · 4, 2 + ½ · 4, 4)."""
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 9e9]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = torch.tensor([[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    close(rewards_to_go(rewards, mask, gamma=0.5), expected)
    undiscounted = torch.tensor([[7.0, 6.0, 4.0], [3.0, 2.0, 0.0]], dtype=torch.float64)
    close(rewards_to_go(rewards, mask), undiscounted)


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
    rewards = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.4, 0.8]], dtype=torch.float64)
    for gamma, expected in ((1.0, [0.45, 0.5, 0.2]), (0.5, [0.0125, 0.05, 0.2])):
        close(gae(rewards, values, torch.ones(1, 3), gamma, 0.5),
              torch.tensor([expected], dtype=torch.float64))
    close(gae(rewards, values, torch.ones(1, 3)), gae(rewards, values, torch.ones(1, 3), 1, 0.95))


def wrong_critic(w):
    """V, made wrong: a random error for each state."""
    generator = torch.Generator().manual_seed(9)
    error = 0.7 * torch.randn(len(w.world.states), generator=generator, dtype=torch.float64)
    return (w.values + error[w.world.state_of]).where(w.mask, 0)


@SEEDS
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_rewards_to_go_minus_V_and_lambda_0_the_td_error(seed, gamma):
    """λ = 1: A_t = R_t − V(s_t);  λ = 0: A_t = δ_t = r_t + γ V(s_{t+1}) − V(s_t)."""
    w = listed(seed)
    V = wrong_critic(w)
    close(gae(w.rewards, V, w.mask, gamma, 1.0), rewards_to_go(w.rewards, w.mask, gamma) - V)
    V_next = F.pad(V, (0, 1))[:, 1:]  # 0 after the last action: nothing more is earned
    close(gae(w.rewards, V, w.mask, gamma, 0.0), w.rewards + gamma * V_next - V)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.6), (1.0, 0.3)])
def test_gae_is_the_weighted_sum_of_the_n_step_estimates(gamma, lam):
    """A_t = (1−λ) (Â¹ + λ Â² + λ² Â³ + …), Âⁿ_t = Σ_{k<n} γ^k r_{t+k} + γⁿ V_{t+n} − V_t.

    All Âⁿ that reach the end are equal, so the first that does, the m-th, has all the weight that
    is left: (1−λ)(λ^{m−1} + λ^m + …) = λ^{m−1}. With m = 2 that is (1−λ) Â¹ + λ Â².
    """
    w = listed(0)
    V = wrong_critic(w)
    got = gae(w.rewards, V, w.mask, gamma, lam)
    for i, length in enumerate(w.lengths.tolist()):
        r, v = w.rewards[i, :length].tolist(), V[i, :length].tolist() + [0.0]
        for t in range(length):
            def n_step(n):
                return sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * v[t + n] - v[t]

            m = length - t
            expected = ((1 - lam) * sum(lam**(n - 1) * n_step(n) for n in range(1, m))
                        + lam**(m - 1) * n_step(m))
            assert abs(float(got[i, t]) - expected) < 1e-10
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
    """‖E ĝ_λ − ∇J‖ falls to 0 as λ → 1 while tr Cov ĝ_λ rises: the trade that λ makes."""
    w = listed(seed)
    V, bias, variance = 0.5 * w.values, [], []  # a critic that has learned half of the value
    for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
        mean, trace = moments(w.p, policy_gradients(w, gae(w.rewards, V, w.mask, lam=lam)))
        bias.append(float((mean - w.grad_J).norm()))
        variance.append(float(trace))
    print(f"\nlambda 0, ¼, ½, ¾, 1 in world {seed}: bias {[f'{b:.3f}' for b in bias]}, "
          f"variance {[f'{v:.3f}' for v in variance]}")
    assert bias[0] > 0.02 and bias[-1] < 1e-10 and bias == sorted(bias, reverse=True)
    assert variance == sorted(variance)


# =================================================================================================
# 6. Importance sampling
# =================================================================================================


@functools.cache
def moved(seed, distance):
    """θ moved away from θ_old = listed(seed)'s: (log π of its trajectories (N, T), policy)."""
    w = listed(seed)
    policy = copy.deepcopy(w.gpt)
    generator = torch.Generator().manual_seed(77)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(distance * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return w.world.read(w.world.table(policy)), policy


@SEEDS
def test_the_product_of_ratios_turns_an_expectation_under_pi_old_into_one_under_pi(seed):
    """E_π[f] = E_{π_old}[Π_t π(a_t|s_t) / π_old(a_t|s_t) · f(τ)], exactly, however far apart."""
    w = listed(seed)
    log_probs = moved(seed, 0.3)[0].detach()
    weights = (log_probs - w.log_probs).sum(1).exp()
    close((w.p * weights * w.rewards.sum(1)).sum(),
          (w.world.probability(log_probs) * w.rewards.sum(1)).sum())
    assert weights.max() > 1.5 and weights.min() < 0.7


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
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    log_probs = (old + math.log(ratio)).requires_grad_()
    loss = ppo_policy_loss(log_probs, old, torch.full_like(old, advantage), torch.ones(1, 1))
    loss.backward()
    close(loss.detach(), torch.tensor(-value, dtype=torch.float64))
    close(log_probs.grad, torch.tensor([[-slope]], dtype=torch.float64), 1e-10 if slope else 0)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_ppos_objective_is_a_lower_bound_of_the_unclipped_surrogate(clip):
    """min(ρA, clip(ρ)A) <= ρA for each token, equal where ρ is within 1 ± ε; then their mean."""
    generator = torch.Generator().manual_seed(0)
    old, noise, A = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    new, mask = old + 0.4 * noise, torch.rand(40, 5, generator=generator) < 0.7
    ratio = (new - old).exp()
    each = torch.stack([-ppo_policy_loss(*(x.view(1, 1) for x in token), torch.ones(1, 1), clip)
                        for token in zip(new.flatten(), old.flatten(), A.flatten())]).view(40, 5)
    assert (each <= ratio * A).all() and (each < ratio * A).float().mean() > 0.1
    inside = (ratio - 1).abs() < clip
    close(each[inside], (ratio * A)[inside])
    r, a = ratio.numpy(), A.numpy()
    close(each, torch.tensor(np.minimum(r * a, np.clip(r, 1 - clip, 1 + clip) * a)))
    close(ppo_policy_loss(new, old, A, mask, clip), -each[mask].mean())


def test_the_value_loss_is_the_pessimistic_of_two_squares():
    """½ E max((V − R)², (clip(V, V_old ± ε) − R)²), an upper bound of the plain square."""
    generator = torch.Generator().manual_seed(0)
    V, old, R = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, 5, generator=generator) < 0.7
    v, o, r = V.numpy(), old.numpy(), R.numpy()
    for clip in (0.2, 0.6):
        terms = np.maximum((v - r)**2, (np.clip(v, o - clip, o + clip) - r)**2)
        got = value_loss(V, old, R, mask, clip)
        close(got, torch.tensor(0.5 * terms[mask.numpy()].mean()))
        assert got > 0.5 * ((V - R)**2)[mask].mean()
    close(value_loss(V, old, R, mask), value_loss(V, old, R, mask, 0.2))


@pytest.mark.parametrize("V, R, slope", [
    (1.5, 2.0, 0.0),    # it moved towards R, by more than ε: no gain from going further
    (0.5, -1.0, 0.0),
    (1.5, -1.0, 2.5),   # it moved away: pulled back in full
    (0.5, 2.0, -1.5),
    (1.1, 2.0, -0.9)])  # within ε
def test_the_gradient_of_the_value_loss_is_zero_where_clipping_binds(V, R, slope):
    """∂/∂V ½ max((V − R)², (clip(V, 1 ± 0.2) − R)²) = V − R, or exactly 0 beyond the clip."""
    V = torch.tensor([[V]], dtype=torch.float64, requires_grad=True)
    value_loss(V, torch.ones_like(V), torch.full_like(V, R), torch.ones(1, 1)).backward()
    close(V.grad, torch.full_like(V, slope).detach(), 1e-10 if slope else 0)


@SEEDS
def test_entropy_is_exact(seed):
    """H = −Σ_a π(a|s) log π(a|s), averaged over the valid steps of ragged rows."""
    w = listed(seed)
    logits, _ = rlhf.forward_responses(w.gpt, w.world.as_rollout(), 1.0)
    pi = w.world.table(w.gpt).detach().exp().numpy()
    by_state = torch.tensor(-(pi * np.log(pi)).sum(1))
    close(entropy(logits, w.mask).detach(), by_state[w.world.state_of[w.mask]].mean())


def test_entropy_is_largest_when_uniform():
    """H[π] <= log V, with equality for equal logits, where its gradient vanishes."""
    for V in (2, 5):
        logits = torch.full((1, 1, V), 3.0, dtype=torch.float64, requires_grad=True)
        H = entropy(logits, torch.ones(1, 1))
        close(H.detach(), torch.tensor(math.log(V), dtype=torch.float64))
        H.backward()
        assert logits.grad.abs().max() < 1e-12
        other = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(V))
        assert 0 < entropy(other, torch.ones(1, 1)) < math.log(V)
    assert entropy(torch.tensor([[[0.0, 1e4]]]), torch.ones(1, 1)) == 0  # not NaN: 0 log 0 = 0


def test_masked_mean_and_whiten_are_those_of_the_valid_entries():
    """Σ m x / Σ m;  (x − mean) / std over the valid entries, 0 elsewhere."""
    x = torch.tensor([[1.0, 3.0, 9e9], [8.0, -9e9, 9e9]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    close(masked_mean(x, mask), torch.tensor(4.0, dtype=torch.float64))
    valid = np.array([1.0, 3.0, 8.0])
    white = (valid - valid.mean()) / valid.std()
    close(whiten(x, mask), torch.tensor([[white[0], white[1], 0], [white[2], 0, 0]]), 1e-8)
    assert masked_mean(x, torch.zeros(2, 3)) == 0  # nothing valid: no division by 0
    same = whiten(torch.ones(2, 3, dtype=torch.float64), mask)
    assert (same == 0).all()  # no spread: no division by 0 either


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
    close((w.p * (w.log_probs.sum(1) - ref.sum(1))).sum(), kl)  # the KL of whole trajectories
    assert kl > 0.05
    rewards = kl_penalized_rewards(w.rewards.sum(1), w.log_probs, ref, w.mask, 0.3)
    close((w.p * rewards.sum(1)).sum(), w.J - 0.3 * kl)


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
    """Var k1 is of the order of the KL, Var k3 of its square."""
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


def test_kl_estimates_by_hand_and_over_valid_tokens_only():
    """Δ = (log ½, log 2): k1 = log 2 − log 2 = 0, k3 = (½ − 1 + log 2) + (2 − 1 − log 2) = ½."""
    log_probs = torch.tensor([[-1.0, -2.0, 5e5], [-1.0, 0.0, 5e5]], dtype=torch.float64)
    delta = torch.tensor([[-math.log(2), math.log(2), 9e9], [0.0, -9e9, 9e9]], dtype=torch.float64)
    k1, k3 = kl_estimates(log_probs, log_probs + delta, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    close(k1, torch.tensor([0.0, 0.0], dtype=torch.float64))
    close(k3, torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_the_adaptive_coefficient_rises_above_the_target_and_falls_below_it():
    """β ← β (1 + n/10,000 · clip(KL / target − 1, ±0.2))  (Ziegler et al. 2019)."""
    for kl, n, expected in ((6.0, 64, 0.1), (6.6, 1000, 0.101), (5.4, 1000, 0.099),
                            (600.0, 500, 0.101), (0.0, 500, 0.099)):  # the last two are clipped
        assert adapt_kl_coef(0.1, kl, 6.0, n) == pytest.approx(expected, abs=1e-15)


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
OPTIMUM_CONFIG = dict(max_new_tokens=4, block_size=16, missing_eos_score=None, ppo_iterations=100,
                      ppo_batch_size=512, minibatch_size=128, ppo_epochs=2, ppo_lr=2e-3)
OPTIMUM_PROMPTS = [(4, 1), (4, 2, 0, 3)]


@functools.cache
def optimum_world():
    world = World(OPTIMUM_PROMPTS, 5, 4)
    scores = score_rollout(world.as_rollout()).double()
    reference = tiny_gpt(0, vocab=5, width=16, context=16, std=0.1).float()
    return world, scores, reference


def objective(world, scores, policy, reference, beta):
    """J = E_π[r] − β KL(π‖π_ref), exact: over every response to every prompt."""
    with torch.no_grad():
        log_p, log_ref = [world.read(world.table(m)).double().sum(1) for m in (policy, reference)]
    p = log_p.exp() / len(world.prompts)
    return float((p * (scores - beta * (log_p - log_ref))).sum())


def best_objective(world, scores, reference, beta):
    """β log Z(x), averaged over prompts, Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β)."""
    with torch.no_grad():
        log_ref = world.read(world.table(reference)).double().sum(1)
    tilted = (log_ref + scores / beta).view(len(world.prompts), -1)
    return float(beta * tilted.logsumexp(1).mean()), tilted.log_softmax(1).flatten()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_is_the_reference_tilted_by_the_reward(beta):
    """max_π E[r] − β KL(π‖π_ref) = β log Z at π* ∝ π_ref exp(r/β); any π loses β KL(π‖π*)."""
    world, scores, reference = optimum_world()
    best, log_best = best_objective(world, scores, reference, beta)
    with torch.no_grad():
        log_ref = world.read(world.table(reference)).double().sum(1)

    def J(log_p):  # of any distribution over responses, (N,)
        return float((log_p.exp() * (scores - beta * (log_p - log_ref))).sum() / 2)

    assert abs(J(log_best) - best) < 1e-10
    noise = torch.randn(len(scores), generator=torch.Generator().manual_seed(0)).double()
    for step in (-0.5, 0.01, 1.0):
        log_p = (log_best + step * noise).view(2, -1).log_softmax(1).flatten()
        kl = float((log_p.exp() * (log_p - log_best)).sum() / 2)
        assert kl > 0 and abs(J(log_p) - (best - beta * kl)) < 1e-10


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_train_ppo_reaches_99_hundredths_of_the_way_to_the_optimum(beta):
    """(J(π) − J(π_ref)) / (β log Z − J(π_ref)) >= 0.99: what is missing is sampling noise."""
    world, scores, reference = optimum_world()
    policy = ActorCritic(reference)
    prompts = [list(x) for x in OPTIMUM_PROMPTS]
    train_ppo(policy, reference, score_rollout, prompts, Config(kl_coef=beta, **OPTIMUM_CONFIG))
    start = objective(world, scores, reference, reference, beta)
    end = objective(world, scores, policy, reference, beta)
    best, _ = best_objective(world, scores, reference, beta)
    share = (end - start) / (best - start)
    print(f"\nβ = {beta}: J from {start:.4f} to {end:.4f} of at most {best:.4f}, {share:.4f}")
    assert 0.99 <= share <= 1 + 1e-6


# =================================================================================================
# 10. The plumbing: what users of other libraries stumble over
# =================================================================================================


def experience_of(policy, reference, prompts=None, seed=0, **settings):
    """A batch of experience on ragged prompts, with a score that depends on the response."""
    config = Config(**dict(max_new_tokens=5, block_size=12, ppo_batch_size=12, minibatch_size=12,
                           ppo_epochs=1, kl_coef=0.3, missing_eos_score=None) | settings)
    prompts = prompts or [list(x) for x in RAGGED] * 6
    return collect(policy, reference, score_rollout, prompts, config,
                   torch.Generator().manual_seed(seed)), config


def sgd(policy, lr):
    """Plain gradient descent: the step is −lr times the gradient, so it shows the gradient."""
    return torch.optim.SGD(policy.parameters(), lr=lr)


def test_no_ratio_other_than_1_before_the_first_update():
    """ρ_t = π/π_old = 1 exactly at first: a dropout, or a re-tokenised text, would show here."""
    policy = tiny_policy(0).float()
    experience, config = experience_of(policy, tiny_gpt(1).float())
    logits, values = rlhf.forward_responses(policy, experience, config.temperature)
    mask = experience.mask
    assert torch.equal(gather_log_probs(logits, experience.actions)[mask],
                       experience.log_probs[mask])
    assert torch.equal(values[mask], experience.values[mask])
    metrics = ppo_update(policy, sgd(policy, 1.0), experience, config)
    assert metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0 and metrics["grad_norm"] > 0


def test_no_log_prob_changes_at_a_learning_rate_of_0():
    """θ ← θ − 0 · ∇L: after epochs of minibatches each ratio is still 1, nothing was clipped."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, config = experience_of(policy, reference, ppo_epochs=3, minibatch_size=5)
    before = copy.deepcopy(policy.state_dict())
    metrics = ppo_update(policy, rlhf.make_optimizer(policy, 0.0), experience, config)
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert abs(metrics["approx_kl"]) < 1e-12 and metrics["clip_fraction"] == 0
    assert metrics["updates"] == 9 and metrics["early_stop"] is False  # 3 epochs of 5 + 5 + 2 rows


def test_no_row_reads_differently_when_it_is_padded_by_0_3_or_7():
    """Right-padding and causal attention: what stands behind a row cannot reach it."""
    policy = tiny_policy(0, context=16)
    w = World([(3, 2, 1)], 4, 2).as_rollout()
    T = w.actions.shape[1]
    logits, values = rlhf.forward_responses(policy, w, 1.0)
    for padding in (0, 3, 7):
        wider = dataclasses.replace(w, tokens=F.pad(w.tokens, (0, padding), value=1),
                                    actions=F.pad(w.actions, (0, padding)),
                                    mask=F.pad(w.mask, (0, padding)))
        more_logits, more_values = rlhf.forward_responses(policy, wider, 1.0)
        close(more_logits[:, :T][w.mask], logits[w.mask], 1e-12)
        close(more_values[:, :T][w.mask], values[w.mask], 1e-12)


def everything(x, garbage=None):
    """Each function of (B, T) tensors and its gradient, with `garbage` in the padding."""
    names = ("log_probs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages")
    signs = dict(zip(names, (1, -1, -1, 1, 1, 1, -1, 1)))  # so that differences are garbage too
    tensors = {name: x[name].clone() if garbage is None else
               x[name].where(x["mask"], signs[name] * garbage) for name in names}
    logits = (x["logits"].clone() if garbage is None else
              x["logits"].where(x["mask"][..., None], garbage * torch.tensor([1.0, -1.0, 0.0])))
    actions = x["actions"] if garbage is None else x["actions"].where(x["mask"], 2)
    for name in ("log_probs", "values"):
        tensors[name].requires_grad_()
    logits.requires_grad_()
    t, mask = SimpleNamespace(**tensors), x["mask"]
    results = {
        "rewards": kl_penalized_rewards(x["scores"], t.log_probs, t.ref, mask, 0.3),
        "to_go": rewards_to_go(t.rewards, mask, 0.9),
        "gae": gae(t.rewards, t.values, mask, 0.9, 0.8), "whiten": whiten(t.advantages, mask),
        "policy_gradient": policy_gradient_loss(t.log_probs, t.advantages, mask),
        "ppo": ppo_policy_loss(t.log_probs, t.old, t.advantages, mask),
        "value": value_loss(t.values, t.old_values, t.returns, mask),
        "entropy": entropy(logits, mask), "mean": masked_mean(t.rewards, mask),
        "k1": kl_estimates(t.log_probs, t.ref, mask)[0],
        "k3": kl_estimates(t.log_probs, t.ref, mask)[1],
        "gathered": gather_log_probs(logits, actions).where(mask, 0)}
    for name in list(results):
        leaves = [leaf for leaf in (t.log_probs, t.values, logits)]
        if results[name].requires_grad:
            grads = torch.autograd.grad(results[name].sum(), leaves, retain_graph=True,
                                        allow_unused=True, materialize_grads=True)
            results |= {f"{name} gradient {i}": g for i, g in enumerate(grads)}
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize("garbage", [7.0, 1e4, -1e4, 3e38, -3e38])
def test_no_finite_garbage_in_the_padding_changes_an_output_bit(garbage):
    """m_t = 0 ⇒ no influence. Multiplying by the mask would not do: exp(1e4) · 0 = NaN."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(6, 5, generator=generator) for name in (
        "log_probs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages")}
    x |= {"logits": torch.randn(6, 5, 3, generator=generator),
          "mask": torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None],
          "actions": torch.randint(3, (6, 5), generator=generator),
          "scores": torch.randn(6, generator=generator)}
    clean, dirty = everything(x), everything(x, torch.tensor(garbage))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
        if value.shape == x["mask"].shape:
            assert not dirty[name][~x["mask"]].any(), name  # 0 after the end
        elif value.shape == x["logits"].shape:
            assert not dirty[name][~x["mask"]].any(), name


def test_no_garbage_token_behind_a_row_changes_an_output_bit():
    """Ids in the padding are read by no valid position, whatever they are."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, config = experience_of(policy, reference)
    used = experience.prompt_lengths + experience.mask.sum(1)
    behind = torch.arange(experience.tokens.shape[1]) >= used[:, None]
    assert behind.any()
    dirty = dataclasses.replace(
        experience, tokens=experience.tokens.where(~behind, 2),
        actions=experience.actions.where(experience.mask, 1),
        **{name: getattr(experience, name).where(experience.mask, 1e30) for name in (
            "log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")})
    after = []
    for batch in (experience, dirty):
        learner = copy.deepcopy(policy)
        metrics = ppo_update(learner, sgd(learner, 0.1), batch, config,
                             torch.Generator().manual_seed(0))
        after.append((metrics, learner.state_dict()))
    assert after[0][0] == after[1][0]
    assert all(torch.equal(v, after[1][1][k]) for k, v in after[0][1].items())


def test_no_score_lands_on_padding_of_short_cut_and_one_token_responses():
    """r_t = −β (log π − log π_ref)_t + [t is the last valid step] r(x, y)."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    scores = torch.tensor([5.0, -7.0, 11.0], dtype=torch.float64)
    ones = torch.ones(3, 4, dtype=torch.float64)
    rewards = kl_penalized_rewards(scores, -ones, -2 * ones, mask, 0.1)
    close(rewards, torch.tensor([[-0.1, 4.9, 0, 0], [-0.1, -0.1, -0.1, -7.1], [10.9, 0, 0, 0]],
                                dtype=torch.float64))


def test_no_end_token_is_without_a_gradient():
    """a_T = end is an action like any other: when it is the pad token too, others mask it away."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, _ = experience_of(policy, reference, seed=3, max_new_tokens=3)
    ended = rlhf.ends(experience, 3)
    assert ended.any() and not ended.all()
    log_probs = experience.log_probs.clone().requires_grad_()
    ppo_policy_loss(log_probs, experience.log_probs, experience.advantages,
                    experience.mask).backward()
    at_end = (experience.actions == 3) & experience.mask
    assert torch.equal(at_end.sum(1) == 1, ended) and (log_probs.grad[at_end] != 0).all()
    assert not log_probs.grad[~experience.mask].any()


def test_no_difference_between_accumulated_gradients_and_one_big_batch():
    """∇ of a mean over all tokens = Σ of the parts' means, each weighed by its share of tokens."""
    w = listed(0)
    A, rows = gae(w.rewards, w.values, w.mask), torch.arange(80)
    new, old = w.log_probs + 0.1 * w.rewards, w.log_probs

    def gradient(part):
        leaf = new.clone().requires_grad_()
        ppo_policy_loss(leaf[part], old[part], A[part], w.mask[part]).backward()
        return leaf.grad

    parts = rows.split(17)
    share = [w.mask[part].sum().double() / w.mask.sum() for part in parts]
    close(sum(s * gradient(part) for s, part in zip(share, parts)), gradient(rows))
    equal = [policy_gradient_loss(new[part], A[part], w.mask[part]) for part in rows.split(20)]
    close(sum(equal) / 4, policy_gradient_loss(new, A, w.mask))  # a mean over trajectories


def test_no_experience_depends_on_the_size_of_the_passes_that_collect_it():
    """π_old, π_ref and V are per row: read 12 rows at once, or 5, they are the same."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    whole, _ = experience_of(policy, reference)
    parts, _ = experience_of(policy, reference, minibatch_size=5)
    for field in dataclasses.fields(whole):
        if field.name != "rollout_seconds":
            close(getattr(parts, field.name), getattr(whole, field.name), 1e-12)


def test_no_gradient_is_left_behind_by_an_early_stop(monkeypatch):
    """k3(π_old, π) > limit ends the update before backward; a left-over gradient would be added
    to the next update's."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, config = experience_of(policy, reference, ppo_epochs=4, minibatch_size=4,
                                       early_stop_kl=1e-9)
    optimizer, seen, take = sgd(policy, 0.1), [], Experience.take
    monkeypatch.setattr(Experience, "take", lambda *a: seen.append(1) or take(*a))
    metrics = ppo_update(policy, optimizer, experience, config)
    assert metrics["early_stop"] is True and metrics["updates"] == 1 and len(seen) == 2
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    left = copy.deepcopy(policy)
    following = ppo_update(policy, optimizer, experience, config, torch.Generator().manual_seed(1))
    again = ppo_update(left, sgd(left, 0.1), experience, config, torch.Generator().manual_seed(1))
    assert following == again and following["updates"] == 0 and following["early_stop"] is True


def test_no_early_stop_below_its_limit():
    """k3 <= limit goes on; None never stops."""
    for limit in (1e3, None):
        policy = tiny_policy(0)
        experience, config = experience_of(policy, tiny_gpt(1), ppo_epochs=4, minibatch_size=4,
                                           early_stop_kl=limit)
        metrics = ppo_update(policy, sgd(policy, 0.05), experience, config)
        assert metrics["updates"] == 12 and not metrics["early_stop"] and metrics["approx_kl"] > 0


def test_no_value_of_s0_is_read_behind_the_last_prompt_token():
    """V(s_0) is the value of the prompt alone, at position P−1: it cannot know a_0."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    experience, _ = experience_of(policy, reference)
    for b, prompt in enumerate(RAGGED * 6):
        _, values = policy(torch.tensor([prompt]))
        close(experience.values[b, 0], values[0, -1].detach())
        for t in range(int(experience.mask[b].sum())):
            state = torch.tensor([list(prompt) + experience.actions[b, :t].tolist()])
            close(experience.values[b, t], policy(state)[1][0, -1].detach())
    assert experience.values[:, 0].unique().numel() <= 4  # two prompts, two values (up to rounding)


def test_no_value_but_0_before_training():
    """V_θ(s) = 0 before training, and the trunk is a copy: training leaves the reference alone."""
    gpt = tiny_gpt(0)
    policy = ActorCritic(gpt)
    tokens = torch.tensor([[3, 1, 2]])
    logits, values = policy(tokens)
    assert not values.any() and values.shape == (1, 3) and values.dtype == torch.float64
    assert torch.equal(logits, gpt(tokens))
    assert not {id(p) for p in gpt.parameters()} & {id(p) for p in policy.parameters()}


def test_no_float64_falls_back_to_float32():
    """Every function returns the dtype it was given, and half precision only widens."""
    x = {name: torch.randn(2, 3, dtype=torch.float64) for name in (
        "log_probs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages")}
    x |= {"logits": torch.randn(2, 3, 3, dtype=torch.float64), "mask": torch.ones(2, 3).bool(),
          "actions": torch.zeros(2, 3).long(), "scores": torch.randn(2, dtype=torch.float64)}
    assert {value.dtype for value in everything(x).values()} == {torch.float64}
    assert reward_model_loss(x["scores"], x["scores"]).dtype == torch.float64
    experience, config = experience_of(tiny_policy(0), tiny_gpt(1))
    assert {v.dtype for v in vars(experience).values() if torch.is_tensor(v)} == {
        torch.float64, torch.int64, torch.bool}
    assert experience.scores.dtype == experience.returns.dtype == torch.float64


def test_no_loss_is_computed_in_bf16_under_autocast():
    """log-softmax and losses are float32 even where logits are bf16: 8 bits lose small ratios."""
    policy = tiny_policy(0, width=16, std=0.1).float()
    experience, config = experience_of(policy, tiny_gpt(1).float())
    exact, _ = rlhf.forward_responses(policy, experience, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = policy(experience.tokens)[0]
        assert hidden.dtype == torch.bfloat16
        log_probs = gather_log_probs(hidden, experience.tokens)
        H = entropy(hidden, torch.ones_like(experience.tokens))
        logits, values = rlhf.forward_responses(policy, experience, 1.0)
        new = gather_log_probs(logits, experience.actions)
        losses = [ppo_policy_loss(new, experience.log_probs, experience.advantages,
                                  experience.mask),
                  value_loss(values, experience.values, experience.returns, experience.mask),
                  entropy(logits, experience.mask), log_probs, H, logits, values, new]
        r = rollout(policy, [[3]], 3, 3)
    assert {x.dtype for x in losses} == {torch.float32} and r.log_probs.dtype == torch.float32
    wide = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()[None]
    assert torch.equal(gather_log_probs(wide, torch.ones(1, 5).long()),
                       gather_log_probs(wide.float(), torch.ones(1, 5).long()))
    assert torch.equal(entropy(wide, torch.ones(1, 5)), entropy(wide.float(), torch.ones(1, 5)))


def test_no_step_of_the_derivation_is_missing_in_collect():
    """log π, log π_ref and V along τ ~ π; r_t; A_t by GAE; R_t = A_t + V(s_t), not whitened."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    e, config = experience_of(policy, reference, temperature=0.8, gamma=0.9, lam=0.7)
    for b, prompt in enumerate(RAGGED * 6):
        for t in range(int(e.mask[b].sum())):
            state, a = list(prompt) + e.actions[b, :t].tolist(), e.actions[b, t]
            close(e.log_probs[b, t], log_pi(policy, state, 0.8)[a].detach())
            close(e.ref_log_probs[b, t], log_pi(reference, state, 0.8)[a].detach())
    close(e.scores, score_rollout(e).double())
    close(e.rewards, kl_penalized_rewards(e.scores, e.log_probs, e.ref_log_probs, e.mask, 0.3))
    close(e.advantages, gae(e.rewards, e.values, e.mask, 0.9, 0.7))
    close(e.returns, e.advantages + e.values)
    for x in (e.log_probs, e.ref_log_probs, e.values, e.rewards, e.advantages, e.returns):
        assert not x[~e.mask].any() and not x.requires_grad
    assert e.rollout_seconds > 0


def test_no_cut_response_gets_the_score_of_one_that_ended():
    """r(x, y) of a response without an end token: missing_eos_score, or reward_fn's if None."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    own, _ = experience_of(policy, reference, seed=3, max_new_tokens=3)
    fixed, _ = experience_of(policy, reference, seed=3, max_new_tokens=3,
                             missing_eos_score=-3.0)
    ended = rlhf.ends(own, 3)
    assert ended.any() and not ended.all()
    close(fixed.scores, own.scores.where(ended, -3.0))
    assert (own.scores[~ended] != -3).all()


def written_out_loss(policy, e, c):
    """L = −L_clip + c1 L_VF − c2 H, token by token, and the metrics, in the plainest way."""
    valid = [(b, t) for b in range(len(e.mask)) for t in range(int(e.mask[b].sum()))]
    A = torch.stack([e.advantages[b, t] for b, t in valid])
    A = (A - A.mean()) / A.std(correction=0)  # whitened over all valid tokens of the batch
    parts = []
    for a, (b, t) in zip(A, valid):
        state = e.tokens[b, :e.prompt_lengths[b] + t][None]
        logits, values = policy(state)
        log_p = F.log_softmax(logits[0, -1] / c.temperature, -1)
        ratio = (log_p[e.actions[b, t]] - e.log_probs[b, t]).exp()
        clipped = ratio.detach().clamp(1 - c.clip, 1 + c.clip)
        inside = bool(clipped == ratio)
        policy_loss = -torch.minimum(ratio * a, (ratio if inside else clipped) * a)
        V, old, R = values[0, -1], e.values[b, t], e.returns[b, t]
        value = 0.5 * torch.maximum((V - R)**2, (V.clamp(old - c.value_clip, old + c.value_clip)
                                                 - R)**2)
        parts.append(torch.stack([policy_loss, value, -(log_p.exp() * log_p).sum(),
                                  ratio - 1 - ratio.log(), torch.tensor(float(not inside))]))
    policy_loss, value, H, k3, clip_fraction = torch.stack(parts).mean(0)
    return (policy_loss + c.value_coef * value - c.entropy_coef * H,
            {"policy_loss": policy_loss, "value_loss": value, "entropy": H, "approx_kl": k3,
             "clip_fraction": clip_fraction})


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_no_sign_or_coefficient_of_the_whole_loss_is_wrong(entropy_coef):
    """L = −L_clip + c1 L_VF − c2 H (PPO eq. 9, turned to a loss): one step of gradient descent."""
    policy, reference = tiny_policy(0), tiny_gpt(1)
    e, config = experience_of(policy, reference, temperature=0.8, value_coef=0.7, clip=0.1,
                              entropy_coef=entropy_coef, max_grad_norm=1e9, early_stop_kl=None,
                              value_clip=0.3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # away from π_old, so that ratios differ from 1 and clipping acts
        for p in policy.parameters():
            p.add_(0.06 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    loss, expected = written_out_loss(policy, e, config)
    gradient, before = flat_grad(loss, policy), copy.deepcopy(policy)
    metrics = ppo_update(policy, sgd(policy, 0.5), e, config)
    step = torch.cat([(b - a).flatten() for a, b in zip(before.parameters(), policy.parameters())])
    close(step.detach(), -0.5 * gradient, 1e-6)  # whitening's 1e-8 under the root shows
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-6), name
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert 0.05 < metrics["clip_fraction"] < 0.95 and metrics["updates"] == 1


def test_no_epoch_skips_a_trajectory_or_keeps_the_order(monkeypatch):
    """K epochs, each over every trajectory once, in a random order from the generator."""
    policy = tiny_policy(0)
    e, config = experience_of(policy, tiny_gpt(1), ppo_epochs=3, minibatch_size=5,
                              early_stop_kl=None)
    e, taken = dataclasses.replace(e, scores=torch.arange(12.0)), []
    take = Experience.take
    monkeypatch.setattr(Experience, "take", lambda self, rows: taken.append(rows.tolist())
                        or take(self, rows))
    losses, loss = [], rlhf.value_loss
    monkeypatch.setattr(rlhf, "value_loss", lambda *a: losses.append(loss(*a)) or losses[-1])
    metrics = ppo_update(policy, sgd(policy, 0.0), e, config, torch.Generator().manual_seed(0))
    assert metrics["value_loss"] == pytest.approx(sum(x.item() for x in losses) / 9)
    epochs = [sum(taken[i:i + 3], []) for i in (0, 3, 6)]
    assert [len(rows) for rows in taken] == [5, 5, 2] * 3
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(12))}) == 4


def test_no_minibatch_loses_a_token_when_it_is_trimmed():
    """take(rows): those rows of every tensor, and of the columns only what they use."""
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3)
    lengths = e.mask.sum(1)
    short = (lengths < lengths.max()).nonzero().flatten()[[1, 0, 2]]
    part, T = e.take(short), int(lengths[short].max())
    used = int((e.prompt_lengths + lengths)[short].max())
    assert T < e.mask.shape[1] and part.tokens.shape == (3, used)
    assert torch.equal(part.tokens, e.tokens[short][:, :used])
    for name in ("prompt_lengths", "scores"):
        assert torch.equal(getattr(part, name), getattr(e, name)[short])
    for name in ("actions", "mask", "log_probs", "ref_log_probs", "values", "rewards",
                 "advantages", "returns"):
        assert torch.equal(getattr(part, name), getattr(e, name)[short][:, :T]), name


def test_no_position_runs_past_the_end_of_a_row():
    """P−1+t, held at the last column where a short row's padding would go beyond it."""
    tokens = torch.zeros(2, 6, dtype=torch.long)
    got = rlhf.response_positions(torch.tensor([2, 5]), tokens, 4)
    assert got.tolist() == [[1, 2, 3, 4], [4, 5, 5, 5]]


def test_no_metric_of_a_batch_reads_padding():
    """Reward, Σ k1, Σ k3, length, share ended, 1 − Var(R − V) / Var(R), by NumPy."""
    e, _ = experience_of(tiny_policy(0), tiny_gpt(1), seed=3, max_new_tokens=3)
    m = e.mask.numpy()
    returns, values = e.returns.numpy()[m], e.values.numpy()[m]
    delta = (e.ref_log_probs - e.log_probs).numpy() * m
    assert rlhf.experience_metrics(e, 3) == pytest.approx({
        "reward": e.scores.numpy().mean(), "kl": -delta.sum(1).mean(),
        "kl_k3": ((np.exp(delta) - 1 - delta) * m).sum(1).mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "length": m.sum(1).mean(), "ended": ((e.actions.numpy() == 3) & m).any(1).mean()},
        abs=1e-6)
    same = dataclasses.replace(e, returns=torch.ones_like(e.returns))
    assert math.isfinite(rlhf.experience_metrics(same, 3)["explained_variance"])


def test_no_other_schedule_than_a_line_to_0():
    """The learning rate falls linearly to 0, after a linear warm-up if there is one."""
    policy = tiny_policy(0)
    optimizer = rlhf.make_optimizer(policy, 0.25)
    group, = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam) and group["lr"] == 0.25

    def schedule(steps, warmup):
        rates = []
        for step in range(steps):
            rlhf.set_learning_rate(optimizer, 8.0, step, steps, warmup)
            rates.append(group["lr"])
        return rates

    assert schedule(4, 0) == [8, 6, 4, 2]
    assert schedule(6, 3) == pytest.approx([2, 4, 6, 8, 16 / 3, 8 / 3])
    assert schedule(1, 1) == pytest.approx([4]) and schedule(2, 0) == [8, 4]
    rlhf.set_learning_rate(optimizer, 8.0, 1, 4)
    assert group["lr"] == 6  # no warm-up unless it is asked for


def test_no_gradient_is_longer_than_its_limit():
    """g ← g · min(1, c / ‖g‖), the norm over all parameters together; short ones stay."""
    for limit, factor in ((0.5, 0.1), (100.0, 1.0)):
        model = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        loss = 3 * model.weight[0, 0] + 4 * model.bias[0]  # a gradient of length 5
        norm = rlhf.optimizer_step(loss, model, sgd(model, 1.0), limit, "here")
        assert norm == pytest.approx(5.0)
        assert model.weight[0, 0].item() == pytest.approx(-3 * factor, rel=1e-4)
        assert model.bias.item() == pytest.approx(-4 * factor, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_loss_that_is_not_finite_reaches_the_weights(bad):
    """L = NaN or ∞ stops by name, before the optimizer: the last good weights stay."""
    model = torch.nn.Linear(2, 1)
    before = copy.deepcopy(model.state_dict())
    for loss in (model.weight.sum() * bad, model.weight.sum() + bad):
        with pytest.raises(FloatingPointError, match="^here: loss (nan|inf|-inf), gradient norm"):
            rlhf.optimizer_step(loss, model, sgd(model, 1.0), 1.0, "here")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_no_stale_gradient_is_added_to_the_next_step():
    """∇ is of this loss alone, whatever was in p.grad."""
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    model.weight.grad = torch.full((1, 1), 1e3)
    rlhf.optimizer_step(2 * model.weight.sum(), model, sgd(model, 1.0), 1e9, "here")
    assert model.weight.item() == -2


PPO_SETTINGS = dict(max_new_tokens=4, block_size=12, ppo_iterations=4, ppo_batch_size=8,
                    minibatch_size=4, ppo_epochs=2, ppo_lr=1e-2, missing_eos_score=None)


def test_no_resumed_training_ends_elsewhere():
    """What is random in step k comes from (seed, stage, k): weights, optimizer, k are a state."""
    reference, prompts = tiny_gpt(1).float(), [list(x) for x in RAGGED]
    config, saved = Config(**PPO_SETTINGS, kl_target=0.01), {}

    def save(metrics, state):
        saved[state["step"]] = copy.deepcopy((state, policy.state_dict()))

    policy = ActorCritic(reference)
    history = train_ppo(policy, reference, score_rollout, prompts, config, on_step=save)
    assert list(saved) == [1, 2, 3, 4] and len(history) == 4
    for step in (1, 3):
        other = ActorCritic(reference)
        other.load_state_dict(saved[step][1])
        rest = train_ppo(other, reference, score_rollout, prompts, config, saved[step][0])
        assert all(torch.equal(v, policy.state_dict()[k]) for k, v in other.state_dict().items())
        for a, b in zip(rest, history[step:], strict=True):
            assert {k: v for k, v in a.items() if "per_s" not in k} == {
                k: v for k, v in b.items() if "per_s" not in k}
    other = ActorCritic(reference)
    train_ppo(other, reference, score_rollout, prompts, dataclasses.replace(config, seed=1))
    assert not torch.equal(other.gpt.wte.weight, policy.gpt.wte.weight)


def test_no_iteration_goes_unlogged_or_keeps_its_learning_rate(monkeypatch):
    """Logged: reward, KL (k1, k3), entropy, approximate KL, clip fraction, explained variance, …"""
    rates, coefs, update = [], [], rlhf.ppo_update

    def spy(policy, optimizer, experience, config, *rest):
        group, = optimizer.param_groups
        assert (group["eps"], group["betas"]) == (1e-5, (0.9, 0.999))  # as PPO's reference code
        rates.append(group["lr"])
        coefs.append(config.kl_coef)
        return update(policy, optimizer, experience, config, *rest)

    monkeypatch.setattr(rlhf, "ppo_update", spy)
    clock = SimpleNamespace(perf_counter=itertools.count(100).__next__)  # a second a look
    monkeypatch.setattr(rlhf, "time", clock)
    reference, log = tiny_gpt(1).float(), []
    config = Config(**PPO_SETTINGS, kl_coef=0.2, kl_target=1e-6)
    history = train_ppo(ActorCritic(reference), reference, score_rollout, [[3], [3, 1]], config,
                        on_step=lambda metrics, state: log.append((dict(metrics), state)))
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    for name in ("reward kl kl_k3 entropy approx_kl clip_fraction explained_variance value_loss "
                 "policy_loss grad_norm length ended kl_coef rollout_tokens_per_s "
                 "update_tokens_per_s").split():
        assert all(math.isfinite(metrics[name]) for metrics in history), name
    beta = 0.2  # the first KL is 0 up to rounding, the later ones far above the target
    for i, metrics in enumerate(history):
        assert metrics["kl_coef"] == coefs[i] == beta and metrics["steps"] == 4
        assert metrics["rollout_tokens_per_s"] == pytest.approx(8 * metrics["length"])
        assert metrics["update_tokens_per_s"] == pytest.approx(2 * 8 * metrics["length"])
        assert metrics["updates"] == 4
        beta = adapt_kl_coef(beta, metrics["kl"], 1e-6, 8)
        assert log[i][1]["kl_coef"] == beta and log[i][1]["step"] == i + 1
    assert beta != 0.2
    fixed = train_ppo(ActorCritic(reference), reference, score_rollout, [[3]],
                      Config(**PPO_SETTINGS, kl_coef=0.2))
    assert {metrics["kl_coef"] for metrics in fixed} == {0.2}


def test_no_ppo_step_follows_a_score_that_is_not_finite():
    """r = NaN: stopped with the stage and the step in the message."""
    reference, calls = tiny_gpt(1).float(), []

    def reward_fn(r):
        calls.append(1)
        return score_rollout(r) * (math.nan if len(calls) == 2 else 1)

    with pytest.raises(FloatingPointError, match="^ppo step 2: loss nan"):
        train_ppo(ActorCritic(reference), reference, reward_fn, [[3]], Config(**PPO_SETTINGS))


def test_no_prompt_is_used_twice_before_another_is_used_once():
    """Batches of prompts go round the list in random order; the last may be shorter."""
    prompts = [[i] for i in range(5)]
    got = rlhf.batches_of_prompts(prompts, 12, 5, torch.Generator().manual_seed(0))
    flat = [x for batch in got for x, in batch]
    assert [len(batch) for batch in got] == [5, 5, 2]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == list(range(5)) and flat[:5] != flat[5:10]
    assert len(set(flat[10:])) == 2 and sum(rlhf.batches_of_prompts(
        prompts, 10, 10, torch.Generator().manual_seed(0)), [])[:5] != prompts


def test_no_batch_of_similar_length_drops_a_row_or_comes_in_order():
    """Each index once; rows of a batch are about as long; the batches in random order."""
    draw = random.Random(0)
    lengths = [draw.randrange(1, 40) for _ in range(50)]
    batches = rlhf.batches_of_similar_length(lengths, 8, torch.Generator().manual_seed(0))
    again = rlhf.batches_of_similar_length(lengths, 8, torch.Generator().manual_seed(1))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert sorted(map(len, batches)) == [2] + [8] * 6 and batches != again
    ranges = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:]))
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    ties = rlhf.batches_of_similar_length([3] * 20, 20, torch.Generator().manual_seed(0))
    assert ties[0] != list(range(20))


def test_no_two_stages_or_steps_draw_the_same_numbers():
    """The generator of (seed, stage, step): the same again, another for any other of the three."""
    draws = [torch.rand(3, generator=rlhf.seeded(*key)).tolist() for key in (
        (0, "ppo", 1), (0, "ppo", 1), (1, "ppo", 1), (0, "ppo", 2), (0, "reward_model", 1))]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) == 4


def test_no_padding_counts_as_valid():
    """Right-padded with 0; the mask says which tokens are real."""
    tokens, mask = rlhf.pad([[3, 1], [2], [1, 2, 3]], "cpu")
    assert tokens.tolist() == [[3, 1, 0], [2, 0, 0], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_no_cached_pass_differs_from_the_whole_one():
    """Attention over cached keys at positions <= the query's = causal attention over the row."""
    gpt = tiny_gpt(3, vocab=6, layers=2, heads=2, width=8, context=9)
    tokens = torch.randint(6, (3, 9), generator=torch.Generator().manual_seed(0))
    cache, out = gpt.new_cache(3, 9), []
    for a, b in ((0, 4), (4, 5), (5, 8), (8, 9)):  # one token at a time, or several
        positions = torch.arange(a, b).expand(3, b - a)
        out.append(gpt.logits(gpt.hidden(tokens[:, a:b], cache, positions)))
    close(torch.cat(out, 1), gpt(tokens))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 6
    assert torch.equal(gpt(changed)[:, :5], gpt(tokens)[:, :5])  # causal, to the last bit
    positions = torch.tensor([[0, 3], [8, 8], [2, 1]])
    close(gpt(tokens, positions), torch.stack([gpt(tokens)[b, p] for b, p in enumerate(positions)]))
    with pytest.raises(ValueError, match="10 tokens do not fit the context of 9"):
        gpt(torch.zeros(1, 10, dtype=torch.long))


def test_no_weight_starts_otherwise_than_gpt2s():
    """N(0, 0.02), but 0.02 / √(2 n_layer) where a layer writes to the residual stream; biases 0."""
    gpt = GPT(GPTConfig(300, 64, 3, 4, 64, 299), torch.Generator().manual_seed(0))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean()) < std / 10, name
    again = GPT(gpt.config, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="n_embd 10 does not divide into n_head 4"):
        GPT(GPTConfig(4, 8, 1, 4, 10, 3))


# =================================================================================================
# The program: data
# =================================================================================================


@pytest.fixture(scope="module")
def shipped():
    return dataset.load(dataset.SHIPPED, 256, 64)


def write_data(directory, preferences, **texts):
    """A data directory: preferences are rows or raw lines; corpus="…" writes corpus.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row).encode() if isinstance(row, (dict, list)) else row
             for row in preferences]
    (directory / "preferences.jsonl").write_bytes(b"\n".join(
        line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    for name, text in texts.items():
        raw = text if isinstance(text, bytes) else text.encode()
        (directory / f"{name}.txt").write_bytes(raw)
    return directory


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def python(*arguments, **options):
    """Run python on a file of the repository, in a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def test_make_data_regenerates_every_file_byte_for_byte(tmp_path):
    """The shipped files are what their generator writes, on any machine."""
    done = python(REPO / "data" / "make_data.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("corpus.txt", "preferences.jsonl", "tokenizer.tiktoken"):
        assert (tmp_path / name).read_bytes() == (dataset.SHIPPED / name).read_bytes(), name


ODD_TEXTS = ["", " ", "\n\n\t ", "naïve café — “quotes” …", "🎬👩‍👩‍👧 家族 кино",
             "\x00\x7f\u200d\ufeff", "<|endoftext|>", "a" * 300, " lots   of\r\n\r\nspace  ",
             "x1y22z333", "'s 't don't",
             "".join(map(chr, range(32, 300)))]


def test_the_tokenizer_returns_any_text_and_never_an_end_token(shipped):
    """decode(encode(text)) = text, byte for byte; the end token is no text."""
    encoding, eos = shipped.encoding, shipped.eos_token
    assert eos == encoding.n_vocab - 1 == encoding.eot_token
    for text in ODD_TEXTS:
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode(tokens) == text and eos not in tokens
    some = encoding.encode_ordinary("The acting is superb.")
    assert shipped.text([eos, *some, eos]) == "The acting is superb."
    half = encoding.encode_ordinary("🎬")[:-1]
    assert "\ufffd" in shipped.text(half)  # half a character shows as such


def test_the_shipped_data_holds_out_a_tenth_and_mixes_nothing(shipped):
    """A held-out prompt is in no training pair, a held-out pair's text in no training document."""
    train, held = shipped.train, shipped.held_out
    assert not shipped.skipped and not shipped.notes and shipped.shipped
    for name in ("documents", "pairs", "prompts"):
        a, b = len(getattr(train, name)), len(getattr(held, name))
        assert 0.08 < b / (a + b) < 0.12, name
    held_prompts = {tuple(x) for x in held.prompts} | {tuple(x) for x, _, _ in held.pairs}
    assert not held_prompts & {tuple(x) for x, _, _ in train.pairs}
    assert not held_prompts & {tuple(x) for x in train.prompts}
    for x, w, l in train.pairs[:200] + held.pairs[:200]:
        assert x[0] == w[-1] == l[-1] == shipped.eos_token
        assert shipped.eos_token not in x[1:] + w[:-1] + l[:-1] and w != l
    for document in train.documents[:200]:
        assert document[0] == document[-1] == shipped.eos_token != document[1]


def all_rows(data):
    """(train, held out) as sets of texts, each with its kind."""
    return [{("document", data.text(d)) for d in part.documents}
            | {("pair", *map(data.text, p)) for p in part.pairs}
            | {("prompt", data.text(p)) for p in part.prompts}
            for part in (data.train, data.held_out)]


def test_adding_rows_moves_none_between_training_and_held_out(tmp_path):
    """held out = a hash of the text, not of its place in the file or of a seed."""
    rows = [pair(f"Film {i % 150} is", f" good {i}.", f" bad {i}.") for i in range(300)]
    lines = [f"Document number {i}." for i in range(300)]
    few = dataset.load(write_data(tmp_path / "few", rows[100:200], corpus="\n".join(lines[:90])),
                       64, 8)
    many = dataset.load(write_data(tmp_path / "many", rows[::-1], corpus="\n".join(lines)), 64, 8)
    for a, b in zip(all_rows(few), all_rows(many)):
        assert a < b
    assert not all_rows(many)[0] & all_rows(many)[1]
    held_prompts = {many.text(p) for p in many.held_out.prompts}
    assert {many.text(x) for x, _, _ in many.held_out.pairs} == held_prompts
    assert not held_prompts & {many.text(x) for x, _, _ in many.train.pairs}
    assert len(many.train.pairs) + len(many.held_out.pairs) == 300
    again = dataset.load(tmp_path / "many", 64, 8)
    assert again.fingerprint == many.fingerprint != few.fingerprint


def test_a_held_out_pairs_text_is_in_no_training_document(tmp_path):
    """Nor is prompt + rejected: a language model that has seen it would know the answer."""
    rows = [pair(f"Film {i} is", f" good {i}.", f" bad {i}.") for i in range(200)]
    corpus = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    for name, texts in (("with", {"corpus": "\n".join(corpus)}), ("without", {})):
        data = dataset.load(write_data(tmp_path / name, rows, **texts), 64, 8)
        seen = {data.text(d) for d in data.train.documents}
        held = {data.text(x) + data.text(y) for x, *both in data.held_out.pairs for y in both}
        assert len(held) > 20 and seen and not seen & held
        assert len(data.train.documents) + len(data.held_out.documents) == (400 if texts else 200)
        assert bool(data.notes) == (not texts)  # said: it learns from prompt + chosen
        assert texts or {data.text(x) + data.text(w) for x, w, _ in data.train.pairs} == seen


def test_pairs_without_a_prompt_are_held_out_by_their_answers(tmp_path):
    """An empty prompt is one prompt: by its hash all such pairs would be on one side."""
    rows = [pair("", f"Good film {i}.", f"Bad film {i}.") for i in range(200)]
    swapped = [pair("", row["rejected"], row["chosen"]) for row in rows]
    data = dataset.load(write_data(tmp_path / "a", rows), 64, 8)
    other = dataset.load(write_data(tmp_path / "b", swapped), 64, 8)
    assert 5 < len(data.held_out.pairs) < 50
    assert {w[0] for x, w, l in data.held_out.pairs} and all(
        x == [data.eos_token] for x, _, _ in data.train.pairs)
    assert ({frozenset((tuple(w), tuple(l))) for _, w, l in data.held_out.pairs}
            == {frozenset((tuple(w), tuple(l))) for _, w, l in other.held_out.pairs})


@pytest.mark.parametrize("chosen, rejected, expected", [
    ("\n\nHuman: Hi\n\nAssistant: Yes.", "\n\nHuman: Hi\n\nAssistant: No.",
     ("\n\nHuman: Hi\n\nAssistant:", " Yes.", " No.")),
    ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C", "\n\nHuman: Hi\n\nAssistant: A"
     "\n\nHuman: B\n\nAssistant: D", ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant:",
                                     " C", " D")),
    ("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C", "\n\nHuman: Hi\n\nAssistant: X",
     ("\n\nHuman: Hi\n\nAssistant:", " A\n\nHuman: B\n\nAssistant: C", " X")),
    ("Yes.", "Yet.", ("", "Yes.", "Yet."))])
def test_an_implicit_prompt_is_the_longest_common_prefix_that_ends_at_an_assistants_turn(
        tmp_path, chosen, rejected, expected):
    """{"chosen", "rejected"}: two dialogues; what they share up to a turn is the prompt."""
    row = {"chosen": chosen, "rejected": rejected}
    data = dataset.load(write_data(tmp_path, [row]), 256, 8)
    x, w, l = data.train.pairs[0]
    assert (data.text(x), data.text(w), data.text(l)) == expected
    assert [data.text(p) for p in data.train.prompts] == [expected[0]]


GOOD_LINE = json.dumps(pair("A", " b.", " c."))
BROKEN_LINES = {
    "not JSON": ("{not json", "not JSON"),
    "cut short": (GOOD_LINE[:-3], "not JSON"),
    "nested too deeply": ("[" * 100_000, "not JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "missing key": ('{"prompt": "A", "chosen": "b"}', "no 'rejected'"),
    "no chosen": ('{"prompt": "A", "rejected": "b"}', "no 'chosen'"),
    "a number": ('{"prompt": "A", "chosen": "b", "rejected": 3}', "'rejected' is not text"),
    "null": ('{"prompt": null, "chosen": "b", "rejected": "c"}', "'prompt' is not text"),
    "messages": ('{"chosen": [{"role": "user", "content": "x"}], "rejected": []}',
                 "'chosen' is a list of messages"),
    "half a surrogate": ('{"prompt": "A", "chosen": "\\ud800", "rejected": "c"}', "surrogate"),
    "not UTF-8": (b'{"prompt": "A", "chosen": "caf\xe9", "rejected": "c"}', "byte 0xe9 at column")}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, case):
    """FILE:LINE: what is wrong, and what was expected; one line."""
    line, problem = BROKEN_LINES[case]
    directory = write_data(tmp_path, [GOOD_LINE, "", line, GOOD_LINE])
    with pytest.raises(dataset.DataError) as caught:
        dataset.load(directory, 64, 8)
    message = str(caught.value)
    assert message.startswith(f"{directory / 'preferences.jsonl'}:3: ") and "\n" not in message
    assert problem in message and "expected" in message and len(message) < 400


def test_a_corpus_or_prompts_that_are_not_utf8_are_named_too(tmp_path):
    """corpus.txt:2 and prompts.txt:1."""
    for name, raw, number in (("corpus", b"one\ntw\xffo\n", 2), ("prompts", b"\xfe", 1)):
        directory = write_data(tmp_path / name, [GOOD_LINE], **{name: raw})
        with pytest.raises(dataset.DataError, match=rf"{name}.txt:{number}: byte 0xf. at column"):
            dataset.load(directory, 64, 8)


SHIPPED_RANKS = (dataset.SHIPPED / "tokenizer.tiktoken").read_bytes()


@pytest.mark.parametrize("edit, number, problem", [
    (lambda lines: lines[:5] + [b"AA==x 5"] + lines[6:], 6, "not a token and its rank"),
    (lambda lines: lines[:5] + [lines[5].split()[0]] + lines[6:], 6, "not a token and its rank"),
    (lambda lines: lines[:5] + [lines[5].split()[0] + b" 7"] + lines[6:], 6, "rank '7'"),
    (lambda lines: lines[:5] + [lines[5].split()[0] + b" five"] + lines[6:], 6, "rank 'five'"),
    (lambda lines: lines[:5] + [lines[0].split()[0] + b" 5"] + lines[6:], 6, "repeated token"),
    (lambda lines: lines[:5] + [b" 5"] + lines[6:], 6, "empty or repeated token"),
    (lambda lines: lines[:256] + [b"QUFB" * 400 + b" 256"], 257, "a token of 1,200 bytes"),
    (lambda lines: lines[:255], 256, "no token for the byte 0x")])
def test_a_broken_tokenizer_is_named_by_file_and_line(tmp_path, edit, number, problem):
    """Ranks 0, 1, 2, … and every byte a token: the library that reads them panics otherwise."""
    directory = write_data(tmp_path, [GOOD_LINE])
    (directory / "tokenizer.tiktoken").write_bytes(b"\n".join(edit(SHIPPED_RANKS.split(b"\n"))))
    with pytest.raises(dataset.DataError, match=rf"r.tiktoken:{number}: .*{problem}.*expected"):
        dataset.load(directory, 64, 8)


def test_a_readers_own_tokenizer_is_used(tmp_path):
    """256 bytes are enough: the vocabulary is theirs, one more token ends a text."""
    directory = write_data(tmp_path, [GOOD_LINE])
    (directory / "tokenizer.tiktoken").write_bytes(b"\n".join(SHIPPED_RANKS.split(b"\n")[:256]))
    data = dataset.load(directory, 64, 8)
    assert data.eos_token == 256 and data.train.pairs == [([256, 65], [32, 98, 46, 256],
                                                           [32, 99, 46, 256])]
    assert dataset.tokenizer_of(directory).n_vocab == 257
    assert dataset.tokenizer_of(tmp_path / "none").n_vocab == 1024


def test_missing_files_are_named(tmp_path):
    """A directory with preferences.jsonl is all that is asked for."""
    with pytest.raises(dataset.DataError, match="nowhere: no such directory"):
        dataset.load(tmp_path / "nowhere", 64, 8)
    with pytest.raises(dataset.DataError, match="preferences.jsonl: no such file"):
        dataset.load(tmp_path, 64, 8)
    with pytest.raises(dataset.DataError, match="no usable"):
        dataset.load(write_data(tmp_path, [pair("a", "b", "b")], corpus="x"), 64, 8)


def test_unusable_rows_are_skipped_and_counted(tmp_path):
    """Identical answers, an empty answer, no room, blank lines: a count of each reason."""
    words = "b " * 80  # more than 40 tokens
    rows = [pair("A", " b.", " c."), pair("A", " b.", " b."), pair("A", " ", " c."),
            pair("A", " b.", "\n"), pair("A", words, " c."), pair("A", " b.", words),
            pair(words, " b.", " c."), "   ", pair("A", " d.", " e.")]
    data = dataset.load(write_data(tmp_path, rows, corpus=f"one\n{words}\n  \n\ntwo\n",
                                   prompts=f"x\n\ny\n{words}\n x\nx\n"), 40, 8)
    assert dict(data.skipped) == {
        "preferences.jsonl: identical answers": 1, "preferences.jsonl: empty answer": 2,
        "preferences.jsonl: no room within the context": 3, "preferences.jsonl: blank line": 1,
        "corpus.txt: document longer than the context": 1, "corpus.txt: blank line": 1,
        "prompts.txt: prompt leaves no room for a response": 1}
    assert [data.text(d) for d in data.train.documents] == ["one", "two"]
    assert len(data.train.pairs) == 2 and not data.shipped
    assert sorted(map(data.text, data.train.prompts)) == [" x", "x", "y"]  # each once
    assert len(data.notes) == 3 and data.held_out.pairs == data.train.pairs  # too few to hold out


def test_what_just_fits_the_context_is_kept(tmp_path):
    """end + document + end, end + prompt + answer + end, end + prompt + T_max + end <= context."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def text(n):  # of n tokens, with the byte tokenizer below
        return letters[:n]

    def load(n, m):
        directory = write_data(tmp_path, [pair("p", "q", "r"), pair(text(n), text(m), "z")],
                               corpus="q\n" + text(n + m))
        (directory / "tokenizer.tiktoken").write_bytes(b"\n".join(SHIPPED_RANKS.split(b"\n")[:256]))
        data = dataset.load(directory, 12, 4)
        return [len({str(row) for part in (data.train, data.held_out)
                     for row in getattr(part, name)}) for name in ("pairs", "documents", "prompts")]

    assert load(5, 5) == [2, 2, 2] and load(6, 4) == [2, 2, 2]  # 10 + 2 ends; 6 + 4 + 2 ends
    assert load(5, 6) == [1, 1, 2]
    assert load(7, 3) == [2, 2, 1]


def test_special_token_text_in_data_is_plain_text(tmp_path):
    """"<|endoftext|>" in a file cannot end a response."""
    row = pair("Say <|endoftext|>", " <|endoftext|> yes", " no")
    data = dataset.load(write_data(tmp_path, [row], corpus="a <|endoftext|> b"), 64, 8)
    x, w, _ = data.train.pairs[0]
    assert data.eos_token not in x[1:] + w[:-1] + data.train.documents[0][1:-1]
    assert (data.text(x), data.text(w)) == (row["prompt"], row["chosen"])


def test_a_byte_order_mark_and_crlf_are_no_part_of_the_text(tmp_path):
    """Files from other systems read the same."""
    plain = write_data(tmp_path / "plain", [GOOD_LINE, GOOD_LINE], corpus="one\ntwo\n")
    other = write_data(tmp_path / "other", [], corpus=b"\xef\xbb\xbfone\r\ntwo\r\n")
    (other / "preferences.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (GOOD_LINE + "\r\n" + GOOD_LINE + "\r\n").encode())
    a, b = dataset.load(plain, 64, 8), dataset.load(other, 64, 8)
    assert all_rows(a) == all_rows(b) and a.skipped == b.skipped
    assert a.fingerprint != b.fingerprint  # of every byte


def test_no_mutant_of_a_data_file_escapes_as_anything_but_a_data_error(tmp_path, shipped):
    """Cut, doubled, flipped and foreign bytes: it loads, or says FILE:LINE in one line."""
    draw, escaped, broken = random.Random(0), [], 0
    files = {"preferences.jsonl": "\n".join([GOOD_LINE, json.dumps({"chosen": "é\n\nAssistant: a",
                                             "rejected": "é\n\nAssistant: b"})] * 2).encode(),
             "corpus.txt": "One review.\nÜber-film 🎬.\n".encode(), "prompts.txt": b"The\nA\n",
             "tokenizer.tiktoken": b"\n".join(SHIPPED_RANKS.split(b"\n")[:280])}
    pieces = [b"\x00", b"\xff", b"\n", b"\r", b'"', b"\\ud800", b"{", b"}", b"[]", b"null", b" ",
              b"\xef\xbb\xbf", b"1e999", b"NaN", b"<|endoftext|>", "é".encode()[:1], b"9" * 5000]
    for trial in range(400):
        directory = tmp_path / str(trial % 2)
        directory.mkdir(exist_ok=True)
        name = draw.choice(list(files))
        for each, raw in files.items():
            (directory / each).write_bytes(raw)
        raw = bytearray(files[name])
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(raw) + 1)
            kind = draw.randrange(4)
            if kind == 0:
                raw[at:at] = draw.choice(pieces)
            elif kind == 1:
                del raw[at:at + draw.randrange(1, 30)]
            elif kind == 2 and at < len(raw):
                raw[at] ^= 1 << draw.randrange(8)
            else:
                raw[at:at] = raw[max(0, at - draw.randrange(40)):at]
        (directory / name).write_bytes(raw)
        try:
            dataset.load(directory, 64, 8, None if name.startswith("tok") else shipped.encoding)
        except dataset.DataError as error:
            broken += 1
            if "\n" in str(error) or not str(error).startswith(str(directory)):
                escaped.append((name, bytes(raw), str(error)))
        except BaseException as error:  # a panic of the tokenizer's library is no Exception
            escaped.append((name, bytes(raw), repr(error)))
    assert not escaped, escaped[:3]
    assert 50 < broken < 390


def test_records_of_a_run_are_appended_cut_and_written_whole(tmp_path):
    """log.jsonl: one object a line; a resumed run cuts what came after its checkpoint."""
    log, rows = tmp_path / "log.jsonl", [
        {"stage": stage, "step": step, "text": "ü\n"} for stage in "ab" for step in (1, 2, 3)]
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
    directory = SHARED / name
    if not directory.is_dir():
        pytest.skip(f"optional data {name} is not there")
    data = dataset.load(directory, 256, 64)
    used = len(data.train.pairs) + len(data.held_out.pairs)
    rows = sum(1 for line in open(directory / "preferences.jsonl", "rb") if line.strip())
    skipped = {reason: n for reason, n in data.skipped.items()
               if reason.startswith("preferences.jsonl") and "prompt leaves" not in reason}
    assert used + sum(skipped.values()) == rows and len(data.train.pairs) > 400
    for x, w, l in data.train.pairs:
        assert len(x) + max(len(w), len(l)) <= 256
    assert all(len(x) + 64 + 1 <= 256 for x in data.train.prompts + data.held_out.prompts)
    if name == "hh_helpful":
        assert all(data.text(x).endswith("\n\nAssistant:") for x, _, _ in data.train.pairs)


# =================================================================================================
# The program: the simulated annotator
# =================================================================================================


def degenerate_texts(reviews):
    words = " ".join(reviews[:30]).split()
    shuffled = words[:40]
    random.Random(0).shuffle(shuffled)
    praise, things = sorted(annotator.GOOD), sorted(annotator.DETAILS)
    first = reviews[0].split(". ")[0] + ". "
    return {"empty": "", "white space": " \n ", "one word": "Good.", "one word again": "the " * 20,
            "praise again": "superb " * 30, "praise in sentences": "Superb. " * 20,
            "a list of praise": ", ".join(praise[:40]) + ".",
            "a list of praise without commas": " ".join(praise[30:70]) + ".",
            "a list of details": " ".join(things[:60]) + ".", "a sentence six times": first * 6,
            "a review three times": " ".join([reviews[1]] * 3),
            "shuffled words": " ".join(shuffled),
            "letters": "asdf qwer zxcv uiop " * 8, "full stops": "." * 40,
            "cut short": " ".join(reviews[0].split()[:5]), "a ramble": " ".join(words[:300]),
            "pictures": "🎬" * 30, "digits": "1 2 3 4 5 6 7 8 9 10 11 12"}


def test_degenerate_texts_score_far_below_reviews():
    """true_reward(degenerate) <= mean of reviews − 2, and the empty text is the lowest of all."""
    reviews = (dataset.SHIPPED / "corpus.txt").read_text("utf-8").splitlines()[:200]
    scores = [annotator.true_reward("", review) for review in reviews]
    mean = sum(scores) / len(scores)
    bad = {name: annotator.true_reward("", text)
           for name, text in degenerate_texts(reviews).items()}
    print({name: round(score - mean, 2) for name, score in bad.items()})
    assert all(score <= mean - 2 for score in bad.values()), bad
    assert bad["empty"] == bad["white space"] < min(
        score for name, score in bad.items() if name not in ("empty", "white space"))
    assert min(scores) > bad["empty"]


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
# The program: files of weights
# =================================================================================================


def gpt2_forward(tensors, n_layer, n_head, tokens):
    """GPT-2 from its file's tensors, in plain operations: Conv1D keeps x W, not x Wᵀ."""
    def get(name):
        return tensors[f"transformer.{name}"].double()

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * get(f"{name}.weight") + get(f"{name}.bias")

    def conv1d(x, name):
        return x @ get(f"{name}.weight") + get(f"{name}.bias")

    S = tokens.shape[1]
    x = get("wte.weight")[tokens] + get("wpe.weight")[:S]
    C = x.shape[-1]
    future = torch.ones(S, S).triu(1).bool()
    for i in range(n_layer):
        q, k, v = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, -1)
        heads = []
        for h in range(n_head):
            part = slice(h * C // n_head, (h + 1) * C // n_head)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(C // n_head)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + conv1d(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv1d(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ get("wte.weight").T


def gpt_for_files():
    return tiny_gpt(5, vocab=11, layers=2, heads=3, width=12, context=10, std=0.3).float()


def test_an_independent_gpt2_reads_the_saved_file_to_the_same_logits(tmp_path):
    """save_pretrained writes GPT-2's layout: config.json, transposed Conv1D, tied lm_head."""
    gpt = gpt_for_files()
    assert all(p.std() > 0 for p in gpt.parameters())  # no bias or norm is trivial
    gpt.save_pretrained(tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    tokens = torch.randint(11, (4, 10), generator=torch.Generator().manual_seed(0))
    close(gpt(tokens).double().detach(), gpt2_forward(tensors, 2, 3, tokens), 1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in dict(model_type="gpt2", vocab_size=11, n_positions=10, n_ctx=10, n_layer=2,
                           n_head=3, n_embd=12, eos_token_id=10, bos_token_id=10,
                           activation_function="gelu_new", layer_norm_epsilon=1e-5).items():
        assert config[key] == value, key
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert torch.equal(tensors["lm_head.weight"], gpt.wte.weight)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)


def test_save_pretrained_and_from_pretrained_return_the_same_gpt(tmp_path):
    """Every weight, bias and norm; the sizes; the end token."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path / "new" / "directory")
    again = GPT.from_pretrained(tmp_path / "new" / "directory")
    assert again.config == gpt.config
    assert again.state_dict().keys() == gpt.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in gpt.state_dict().items())
    assert torch.equal(again(torch.tensor([[1, 2, 3]])), gpt(torch.tensor([[1, 2, 3]])))


def write_safetensors(path, tensors):
    """By hand: 8 bytes of header length, a JSON header, the raw bytes."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.bool: "BOOL", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else \
            tensor.view(1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def as_published(gpt):
    """As files of GPT-2 come: no prefix, no lm_head, the causal mask as a buffer."""
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    tensors = {k: v.t().contiguous() if k.endswith(names) else v
               for k, v in gpt.state_dict().items()}
    for i in range(gpt.config.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 10, 10).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def test_a_safetensors_file_is_read(tmp_path):
    """model.safetensors beside config.json, in float32 and, as bfloat16, to its precision."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write_safetensors(tmp_path / "model.safetensors", as_published(gpt))
    again = GPT.from_pretrained(str(tmp_path))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in gpt.state_dict().items())
    half = {k: v.bfloat16() for k, v in as_published(gpt).items()}
    write_safetensors(tmp_path / "model.safetensors", half)
    again = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v.bfloat16().float())
               for k, v in gpt.state_dict().items())
    odd = {"flag": torch.tensor([True, False]), "n": torch.tensor([[1, -2]])}
    write_safetensors(tmp_path / "odd", odd)
    read = read_safetensors(tmp_path / "odd")
    assert all(torch.equal(read[name], value) for name, value in odd.items())


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


def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


LN_F = "transformer.ln_f.bias"
UNREADABLE = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config not JSON": (cut_file("config.json", 0.5), "not JSON"),
    "config no object": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "config of another model": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "another activation": (edit_config(activation_function="relu"), "activation_function = 'relu'"),
    "untied": (edit_config(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "another MLP": (edit_config(n_inner=7), "n_inner = 7"),
    "config without a size": (edit_config(n_layer="absent"), "n_layer"),
    "a size of another kind": (edit_config(n_embd="12"), "config.json"),
    "sizes that do not divide": (edit_config(n_head=5), "n_head 5"),
    "no weights": (lambda d: (d / "pytorch_model.bin").unlink(), "no pytorch_model.bin"),
    "sharded": (lambda d: (d / "pytorch_model.bin").rename(d / "pytorch_model.bin.index.json"),
                "sharded"),
    "cut": (cut_file("pytorch_model.bin", 0.6), "not a readable checkpoint"),
    "empty": (cut_file("pytorch_model.bin", 0), "not a readable checkpoint"),
    "foreign": (lambda d: (d / "pytorch_model.bin").write_text("hello"), "not a readable"),
    "a list": (edit_weights(lambda t: list(t.values())), "does not hold a state dictionary"),
    "missing": (edit_weights(lambda t: without(t, LN_F)), "missing ln_f.bias"),
    "extra": (edit_weights(lambda t: t | {"transformer.more": t[LN_F]}), "unexpected more"),
    "another shape": (edit_weights(lambda t: t | {LN_F: torch.zeros(3)}),
                      r"ln_f.bias is \(3,\), expected \(12,\)"),
    "many missing": (edit_weights(lambda t: {k: t[k] for k in list(t)[:2]}), r"and \d+ more"),
    "another head": (edit_weights(lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1}),
                     "lm_head.weight differs"),
    "cut safetensors": (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 99)),
                        "not a safetensors file, or cut short"),
    "foreign safetensors": (lambda d: (d / "model.safetensors").write_text("hi"),
                            "not a safetensors file, or cut short")}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_of_weights_that_does_not_fit_is_named_in_one_line(tmp_path, case):
    """ValueError: which file, and what is missing, extra, cut or foreign."""
    edit, problem = UNREADABLE[case]
    gpt_for_files().save_pretrained(tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=problem) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert case == "sizes that do not divide" or str(tmp_path) in str(caught.value)


def test_a_config_may_leave_out_or_spell_out_what_is_usual(tmp_path):
    """n_ctx for n_positions, n_inner = 4 n_embd, no eos_token_id, no model_type."""
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path)
    edit_config(n_positions="absent", n_inner=48, eos_token_id="absent",
                model_type="absent")(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == gpt.config
    edit_config(eos_token_id=4)(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.eos_token == 4
    edit_weights(lambda t: without(t, "lm_head.weight"))(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, gpt.wte.weight)


class Explosive:
    """A pickle that would make a directory while it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_execute_code_is_refused(tmp_path):
    """weights_only: a file of weights is data."""
    gpt_for_files().save_pretrained(tmp_path)
    torch.save({"x": Explosive(tmp_path / "boom")}, tmp_path / "pytorch_model.bin")
    for read in (lambda: GPT.from_pretrained(tmp_path),
                 lambda: load_checkpoint(tmp_path / "pytorch_model.bin")):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read()
    assert not (tmp_path / "boom").exists()


def test_transformers_computes_the_same_logits(tmp_path):
    """The original GPT-2, where it is installed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    gpt = gpt_for_files()
    gpt.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(11, (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(gpt(tokens), theirs(tokens).logits, 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")  # safetensors, with their config
    again = GPT.from_pretrained(tmp_path / "theirs")
    assert again.config == gpt.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in gpt.state_dict().items())


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Written under a temporary name, then renamed: killed in between, the old one stays."""
    path = tmp_path / "lm.pt"
    save_checkpoint(path, {"step": 1, "w": torch.ones(2)})
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["lm.pt"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    with pytest.raises(OSError):
        load_checkpoint(tmp_path / "none.pt")


# =================================================================================================
# The program: the other loops
# =================================================================================================


def test_train_language_model_learns_a_corpus_and_resumes_to_the_same_weights():
    """min −E log π(x_{i+1} | x_1 … x_i), padding left out; a state goes on bit for bit."""
    draw = random.Random(0)
    documents = [[5] + [draw.randrange(5)] * draw.randrange(1, 6) + [5] for _ in range(30)]
    config = Config(lm_epochs=20, lm_batch_size=8, lm_lr=3e-2, max_new_tokens=4, block_size=12)
    gpt, log, saved = tiny_gpt(0, vocab=6, width=8, std=0.1).float(), [], {}
    start, first = copy.deepcopy(gpt), rlhf.language_model_loss(gpt, documents)

    def on_step(metrics, state):
        log.append((state["optimizer"]["param_groups"][0]["lr"], metrics["steps"], state["step"]))
        if state["step"] in (37, 40):
            saved[state["step"]] = copy.deepcopy((state, gpt.state_dict()))

    rlhf.train_language_model(gpt, documents, config, on_step=on_step)
    assert [(steps, step) for _, steps, step in log] == [(80, i + 1) for i in range(80)]
    assert [rate for rate, _, _ in log] == pytest.approx(warmed_up(3e-2, 80, 8))
    assert rlhf.language_model_loss(gpt, documents) < 1.1 < 1.5 < first
    for state, weights in saved.values():
        other = copy.deepcopy(start)
        other.load_state_dict(weights)
        rlhf.train_language_model(other, documents, config, state)
        assert all(torch.equal(v, gpt.state_dict()[k]) for k, v in other.state_dict().items())
    silent = copy.deepcopy(start)
    rlhf.train_language_model(silent, documents, config)
    assert torch.equal(silent.wte.weight, gpt.wte.weight)
    with torch.no_grad():
        start.wte.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="^language_model step 1: loss nan"):
        rlhf.train_language_model(start, documents, config)


def test_the_language_model_loss_is_the_mean_over_tokens_that_were_predicted():
    """−Σ log π(x_{i+1}|…) / Σ 1 over all documents, whatever the batches."""
    gpt = tiny_gpt(0)
    documents = [[3, 1, 3], [3, 0, 0, 2, 1, 3], [3, 3], [3, 2, 2, 3], [3, 1, 1, 1, 3]]
    terms = [-log_pi(gpt, d[:i])[d[i]] for d in documents for i in range(1, len(d))]
    for batch_size in (2, 64):
        assert rlhf.language_model_loss(gpt, documents, batch_size) == pytest.approx(
            (sum(terms) / len(terms)).item(), abs=1e-10)
    log = []
    config = Config(lm_epochs=1, lm_batch_size=5, max_new_tokens=4, block_size=12)
    rlhf.train_language_model(gpt, documents, config, on_step=lambda m, s: log.append(m["loss"]))
    assert log == [pytest.approx((sum(terms) / len(terms)).item(), abs=1e-10)]


def test_a_resumed_reward_model_ends_with_the_same_weights():
    """Its optimizer, its step, and the normalisation at the end."""
    gpt, model, pairs = reward_model_world()
    start, saved = copy.deepcopy(model), {}
    config, prompts = Config(**REWARD_CONFIG | {"rm_epochs": 2}), [x for x, _, _ in pairs]

    def on_step(metrics, state):
        if state["step"] in (4, 6):
            saved[state["step"]] = copy.deepcopy((state, model.state_dict()))

    rlhf.train_reward_model(model, pairs, gpt, prompts, config, on_step=on_step)
    for state, weights in saved.values():
        other = copy.deepcopy(start)
        other.load_state_dict(weights)
        rlhf.train_reward_model(other, pairs, gpt, prompts, config, state)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    with torch.no_grad():
        start.reward_head.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="^reward_model step 1: loss nan"):
        rlhf.train_reward_model(start, pairs, gpt, prompts, config)


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

    def learned(r):
        return torch.tensor([float(len(a[m].tolist()) % 2) for a, m in zip(r.actions, r.mask)])

    record, samples = rlhf.evaluate(policy, reference, learned, prompts, config,
                                    score_rollout if judged_by_truth else None)
    again, _ = rlhf.evaluate(policy, reference, learned, prompts, config,
                             score_rollout if judged_by_truth else None)
    assert record == again
    assert [sample["prompt"] for sample in samples] == prompts[:16]
    wins, kls = 0.0, []
    for sample in samples:
        score = {}
        for side in ("lm", "ppo"):
            y = sample[side]
            assert 1 <= len(y) <= 3 and 3 not in y[:-1]
            assert sample[f"reward_{side}"] == len(y) % 2 and sample[f"length_{side}"] == len(y)
            assert sample[f"ended_{side}"] == (y[-1] == 3)
            score[side] = structured_score(y) if judged_by_truth else len(y) % 2
            if judged_by_truth:
                assert sample[f"true_reward_{side}"] == pytest.approx(score[side], abs=1e-5)
        gap = score["ppo"] - score["lm"]
        wins += (gap > 1e-6) + 0.5 * (abs(gap) < 1e-6)
        states = [sample["prompt"] + sample["ppo"][:t] for t in range(len(sample["ppo"]))]
        kls.append(sum((log_pi(policy, s, 0.9)[a] - log_pi(reference, s, 0.9)[a]).item()
                       for s, a in zip(states, sample["ppo"])))
        assert sample["kl"] == pytest.approx(kls[-1], abs=1e-8)
    for name in ["reward_lm", "reward_ppo", "length_lm", "length_ppo", "ended_lm", "ended_ppo",
                 "kl"] + ["true_reward_lm", "true_reward_ppo"] * judged_by_truth:
        assert record[name] == pytest.approx(np.mean([s[name] for s in samples]), abs=1e-8), name
    assert record["win_rate"] == wins / 16
    assert (record["win_rate_low"], record["win_rate_high"]) == rlhf.wilson(wins, 16)
    assert record["distinct_ppo"] == len({tuple(s["ppo"]) for s in samples}) / 16
    if judged_by_truth:
        true, reward = [[s[f"{name}_lm"] for s in samples] for name in ("true_reward", "reward")]
        assert record["true_reward_std_lm"] == pytest.approx(np.std(true, ddof=1), abs=1e-8)
        assert record["reward_correlation_lm"] == pytest.approx(np.corrcoef(true, reward)[0, 1])
    else:
        assert "true_reward_lm" not in record
    same, _ = rlhf.evaluate(reference, reference, lambda r: torch.zeros(len(r.mask)), prompts,
                            config)
    assert same["win_rate"] == 0.5 and same["kl"] == pytest.approx(0, abs=1e-10)


# =================================================================================================
# The program: the command line
# =================================================================================================


@pytest.fixture(autouse=True)
def keep_the_signal_handler():
    """main() takes Ctrl-C over; the tests after it want theirs back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def refused(capsys, *arguments):
    """main() ends with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as caught:
        rlhf.main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert caught.value.code == 2, (caught.value.code, output.err)
    assert output.err.count("\n") == 1 and output.err.startswith("rlhf.py: "), output.err
    return output.err


# A field, values that are refused, values at the edge that are not.
EDGES = {"block_size": ([0, -1], []), "n_layer": ([0], [1]), "n_head": ([0, 3], [1]),
         "n_embd": ([0, 130], []), "lm_batch_size": ([0, -4], [1]), "rm_batch_size": ([0], [1]),
         "max_new_tokens": ([0, -1, 254], [1, 253]), "ppo_batch_size": ([0, -64], []),
         "ppo_epochs": ([0], [1]), "minibatch_size": ([0, 65], [1, 64]), "eval_prompts": ([0], [1]),
         "lm_epochs": ([-1], [0]), "rm_epochs": ([-1], [0]), "ppo_iterations": ([-1], [0]),
         "kl_coef": ([-0.1, "nan", "inf"], [0]), "value_coef": ([-1], [0]),
         "entropy_coef": ([-1], [0]), "lm_lr": ([-1e-3], [0]), "rm_lr": ([-1], [0]),
         "ppo_lr": ([-1, "nan"], [0]), "temperature": ([0, -1], [0.1]), "clip": ([0, -0.2], [0.1]),
         "value_clip": ([0], [0.1]), "max_grad_norm": ([0], [0.1]), "gamma": ([2, -0.1], [0, 1]),
         "lam": ([2, -0.1], [0, 1]), "kl_target": ([0, -1], [0.1, "none"]),
         "early_stop_kl": ([0, -1], [0.1, "none"]), "missing_eos_score": (["inf"], [-9, "none"])}


@pytest.mark.parametrize("field", EDGES)
def test_a_setting_out_of_range_is_refused_in_one_line_that_names_it(capsys, field):
    """Exit status 2 before anything is read or trained; values at the edge are accepted."""
    bad, good = EDGES[field]
    for value in bad:
        assert field in refused(capsys, f"--{field}={value}"), value
    for value in good:
        _, _, config, _ = rlhf.parse([f"--{field}={value}"])
        assert getattr(config, field) == (None if value == "none" else value)


def test_settings_of_the_wrong_kind_are_refused(capsys):
    """In code as on the command line: ValueError, or one line."""
    for field, value in (("n_layer", 2.0), ("n_layer", None), ("n_layer", True), ("lam", "high"),
                         ("kl_target", "low"), ("out_dir", 3), ("lam", None)):
        with pytest.raises(ValueError, match=f"^{field} is "):
            Config(**{field: value})
    assert Config(kl_coef=0, kl_target=None).kl_coef == 0
    for arguments in (["--n_layer", "two"], ["--lam", "x"], ["--kl_target", "x"], ["--nope"],
                      ["--seed"], ["train"], ["--n_lay", "1"]):
        refused(capsys, *arguments)
    assert "sample needs a prompt" in refused(capsys, "sample")
    assert "'prompt'" in refused(capsys, "run", "prompt")


def test_every_field_is_a_flag_with_a_line_of_help(capsys):
    """--help lists the fields by stage, each with its comment and default."""
    with pytest.raises(SystemExit) as caught:
        rlhf.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    groups = rlhf.field_groups()
    assert list(groups) == ["general", "language model", "reward model", "rollout", "ppo",
                            "evaluation"]
    assert [f for fields in groups.values() for f in fields] == [
        f.name for f in dataclasses.fields(Config)]
    flat = " ".join(text.split())
    for name, comment in (item for fields in groups.values() for item in fields.items()):
        assert f"--{name}" in text and " ".join(comment.split()[:3]) in flat, name
    command, prompt, config, fresh = rlhf.parse(
        "--lam 0.5 --data d --seed 3 --out_dir o --fresh --kl_target none".split())
    assert (command, prompt, fresh) == ("run", None, "language_model")
    assert config == Config(lam=0.5, data_dir="d", seed=3, out_dir="o", kl_target=None)
    assert rlhf.parse(["sample", "The acting in"])[:2] == ("sample", "The acting in")
    assert rlhf.parse([]) == ("run", None, Config(), None)
    assert rlhf.parse(["--fresh", "ppo"])[3] == "ppo"


SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=128, max_new_tokens=8, lm_epochs=1,
             lm_batch_size=4, rm_epochs=1, rm_batch_size=8, ppo_iterations=3, ppo_batch_size=16,
             minibatch_size=8, ppo_epochs=2, eval_prompts=6, device="cpu")
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]


def small_data(directory):
    """60 documents and 80 pairs of the shipped data."""
    def head(name, n):
        return (dataset.SHIPPED / name).read_text("utf-8").splitlines()[:n]
    return write_data(directory, head("preferences.jsonl", 80),
                      corpus="\n".join(head("corpus.txt", 60)))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A whole run at reduced size, its folder, and what it returned."""
    base = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw", lambda out: "")  # importing the plotter takes longer
        config = Config(**SIZES, data_dir=str(small_data(base / "data")), out_dir=str(base / "out"))
        record = rlhf.run(config)
    return SimpleNamespace(config=config, record=record, out=base / "out", data=base / "data")


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(curves, "draw", lambda out: "")


def weights(out, name="policy.pt"):
    return load_checkpoint(Path(out) / name)["weights"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_broken_input_ends_before_training_with_status_2_and_one_line(tmp_path, capsys):
    """An unknown flag, a missing directory, a broken line: no traceback, nothing is written."""
    broken = write_data(tmp_path / "broken", [GOOD_LINE, "{oops"])
    out = tmp_path / "out"
    assert "no such directory" in refused(capsys, "--data", tmp_path / "none", "--out_dir", out)
    assert "preferences.jsonl:2: " in refused(capsys, "--data", broken, "--out_dir", out)
    fine = write_data(tmp_path / "fine", [GOOD_LINE])
    assert "device is 'abacus'" in refused(capsys, "--device", "abacus", "--data", fine,
                                           "--out_dir", out)
    assert "lm.pt" in refused(capsys, "sample", "The", "--out_dir", out)
    assert not out.exists()
    for arguments in (["--nope"], ["--data", broken, "--out_dir", out]):
        done = python(REPO / "rlhf.py", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("rlhf.py: ") and done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
    assert not out.exists()


EVALUATION_KEYS = (
    "reward_lm reward_ppo win_rate win_rate_low win_rate_high kl ended_lm ended_ppo length_lm "
    "length_ppo reward_model_accuracy language_model_loss seconds seconds_language_model "
    "seconds_reward_model seconds_ppo seconds_evaluation").split()
PPO_KEYS = ("reward kl kl_k3 entropy approx_kl clip_fraction explained_variance value_loss length "
            "ended rollout_tokens_per_s update_tokens_per_s").split()


def test_a_run_leaves_what_the_command_line_promises(first_run):
    """lm.pt, reward.pt, policy.pt, log.jsonl, samples.jsonl; the last record is the evaluation."""
    out, record = first_run.out, first_run.record
    assert sorted(os.listdir(out)) == ["lm.pt", "log.jsonl", "policy.pt", "reward.pt",
                                       "samples.jsonl"]
    log = dataset.read_records(out / "log.jsonl")
    assert {"stage", "step", "seconds"} <= set.intersection(*map(set, log))
    stages = [row["stage"] for row in log]
    assert list(dict.fromkeys(stages)) == ["language_model", "reward_model", "ppo", "evaluation"]
    assert stages[-1] == "evaluation" and stages.count("evaluation") == 1
    assert {"stage": "evaluation", "step": 1, **record} == log[-1]
    assert [row["step"] for row in log if row["stage"] == "ppo"] == [1, 2, 3]
    for row in log:
        for key in PPO_KEYS if row["stage"] == "ppo" else ["seconds"]:
            assert math.isfinite(row[key])
    config, train = first_run.config, dataset.load(first_run.data, 128, 8).train
    for stage, steps in (
            ("language_model",
             config.lm_epochs * math.ceil(len(train.documents) / config.lm_batch_size)),
            ("reward_model", config.rm_epochs * math.ceil(len(train.pairs) / config.rm_batch_size))):
        rows = [row for row in log if row["stage"] == stage]
        expected = sorted({*range(10, steps, 10), steps})  # every tenth step, and the last
        assert [row["step"] for row in rows] == expected
        assert all({"loss", "grad_norm"} <= row.keys() for row in rows)
    for key in EVALUATION_KEYS:
        assert math.isfinite(record[key]), key
    assert record["seconds"] == pytest.approx(sum(
        v for k, v in record.items() if k.startswith("seconds_")))
    assert not any(key.startswith("true") for key in record)  # not the shipped data
    samples = dataset.read_records(out / "samples.jsonl")
    held = dataset.load(first_run.data, 128, 8)
    assert [s["prompt"] for s in samples] == [held.text(p) for p in held.held_out.prompts[:6]]
    for sample in samples:
        assert {"prompt", "lm", "ppo", "reward_lm", "reward_ppo", "kl"} <= sample.keys()
        assert isinstance(sample["lm"], str) and isinstance(sample["ppo"], str)
    assert record["reward_ppo"] == pytest.approx(np.mean([s["reward_ppo"] for s in samples]))


def test_the_figures_of_a_run_are_those_of_its_checkpoints(first_run):
    """Loaded again: the language model's loss, the reward model's accuracy, the held-out rows."""
    data = dataset.load(first_run.data, 128, 8)
    checkpoints = {name: load_checkpoint(first_run.out / name)
                   for name in ("lm.pt", "reward.pt", "policy.pt")}
    lm = GPT(GPTConfig(**checkpoints["lm.pt"]["model"]))
    assert lm.config == GPTConfig(1024, 128, 1, 2, 16, 1023)
    lm.load_state_dict(checkpoints["lm.pt"]["weights"])
    model = RewardModel(lm)
    model.load_state_dict(checkpoints["reward.pt"]["weights"])
    assert first_run.record["language_model_loss"] == pytest.approx(
        rlhf.language_model_loss(lm, data.held_out.documents))
    assert first_run.record["reward_model_accuracy"] == rlhf.reward_model_accuracy(
        model, data.held_out.pairs)
    for checkpoint in checkpoints.values():
        assert checkpoint["done"] and Config(**checkpoint["config"]) == first_run.config
        assert checkpoint["state"]["step"] > 0 and "optimizer" in checkpoint["state"]
    policy = ActorCritic(lm)
    policy.load_state_dict(checkpoints["policy.pt"]["weights"])
    assert not torch.equal(policy.gpt.wte.weight, lm.wte.weight)


def copied(first_run, tmp_path):
    """The first run's folder again, for a test that goes on from it."""
    out = tmp_path / "out"
    out.mkdir()
    for name in os.listdir(first_run.out):
        (out / name).write_bytes((first_run.out / name).read_bytes())
    return out


def figures(record):
    return {k: v for k, v in record.items() if not k.startswith("seconds")}


def test_a_second_identical_run_loads_every_stage_and_gives_the_same_figures(first_run, tmp_path):
    """In a process of its own, from the command line; then `sample` prints both columns."""
    out = copied(first_run, tmp_path)
    done = python(REPO / "rlhf.py", *FLAGS, "--data", first_run.data, "--out_dir", out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for stage in ("language_model", "reward_model", "ppo"):
        assert f"{stage}: is loaded" in done.stdout
    log = dataset.read_records(out / "log.jsonl")
    assert figures({k: v for k, v in log[-1].items() if k not in ("stage", "step")}) == figures(
        first_run.record)
    assert len(log) == len(dataset.read_records(first_run.out / "log.jsonl"))
    assert (out / "samples.jsonl").read_bytes() == (first_run.out / "samples.jsonl").read_bytes()
    assert same_weights(weights(out), weights(first_run.out))
    for name in ("reward_model_accuracy", "win_rate", "language_model_loss", "ended"):
        assert name in done.stdout
    assert f"{first_run.record['win_rate']:.3f}" in done.stdout
    assert "before" in done.stdout and "after" in done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert (out / "curves.png").read_bytes()[1:4] == b"PNG"
    else:
        assert "matplotlib is not installed" in done.stdout


def test_sample_prints_both_columns_with_score_and_kl(first_run, capsys):
    """`sample PROMPT`: continuations by the language model and by the policy, side by side."""
    arguments = ["sample", "The acting in", "--out_dir", str(first_run.out), "--data",
                 str(first_run.data)]
    rlhf.main(arguments)
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "|" in line]
    assert text.startswith("The acting in")
    assert [side.strip() for side in lines[0].split(" | ")] == ["language model", "PPO policy"]
    heads = [line for line in lines if "[score" in line]
    assert len(heads) == 3 and all(line.count("[score") == line.count("KL") == 2 for line in heads)
    assert all("KL 0.0]" in line.replace("-0.0]", "0.0]").split(" | ")[0] for line in heads)
    rlhf.main(arguments)
    assert capsys.readouterr().out == text
    rlhf.main(arguments + ["--seed", "1"])
    assert capsys.readouterr().out != text


@pytest.mark.parametrize("change, redone", [
    ({"kl_coef": 0.2}, ["ppo"]), ({"max_new_tokens": 7}, ["reward_model", "ppo"]),
    ({"rm_lr": 2e-3}, ["reward_model", "ppo"]), ({"lam": 0.9}, ["ppo"]),
    ({"lm_lr": 1e-3}, ["language_model", "reward_model", "ppo"]),
    ({"seed": 1}, ["language_model", "reward_model", "ppo"]), ({"eval_prompts": 5}, [])])
def test_a_changed_setting_refuses_the_stages_that_depend_on_it(first_run, tmp_path, change, redone,
                                                               monkeypatch):
    """--kl_coef changed: the language model and the reward model are loaded, PPO's is not."""
    data = dataset.load(first_run.data, 128, 8)
    config = dataclasses.replace(first_run.config, **change, device="auto")

    def refused_stages(config, data):
        found = {}
        for stage in rlhf.FILES:
            try:
                found[stage] = rlhf.find_checkpoint(stage, config, data)["done"]
            except ValueError as error:
                found[stage] = str(error)
        for stage, message in found.items():
            assert message is True or f"--fresh {stage} starts over" in message
        return {stage: message for stage, message in found.items() if message is not True}

    refused_by = refused_stages(config, data)
    assert list(refused_by) == redone
    (name, value), = change.items()
    for message in refused_by.values():
        assert f"{name} {getattr(first_run.config, name)}, now {value}" in message
    other = refused_stages(first_run.config, dataclasses.replace(data, fingerprint="of other data"))
    assert list(other) == list(rlhf.FILES)
    assert all("was made with other data" in message for message in other.values())
    monkeypatch.setattr(rlhf, "FORMAT", 0)
    other = refused_stages(first_run.config, data)
    assert all("another version of this program" in other[stage] for stage in rlhf.FILES)


def test_a_changed_kl_coefficient_asks_before_it_trains_ppo_anew(first_run, tmp_path, capsys,
                                                                 no_picture):
    """From the command line; and --fresh starts over, to the same weights as the first time."""
    out = copied(first_run, tmp_path)
    flags = [*FLAGS, "--data", str(first_run.data), "--out_dir", str(out)]
    line = refused(capsys, *flags, "--kl_coef", "0.7")
    assert "policy.pt was made with kl_coef 0.05, now 0.7" in line and "--fresh ppo" in line
    assert same_weights(weights(out), weights(first_run.out))
    rlhf.main(flags + ["--kl_coef", "0.7", "--fresh", "ppo"])
    text = capsys.readouterr().out
    assert "language_model: is loaded" in text and "reward_model: is loaded" in text
    assert "ppo: is loaded" not in text
    assert not same_weights(weights(out), weights(first_run.out))
    stages = [row["stage"] for row in dataset.read_records(out / "log.jsonl")]
    assert stages == [row["stage"] for row in dataset.read_records(first_run.out / "log.jsonl")]
    rlhf.main(flags + ["--fresh"])
    text = capsys.readouterr().out
    assert "is loaded" not in text
    assert same_weights(weights(out), weights(first_run.out))


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:1000]),
                                   lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_checkpoint_that_is_cut_short_starts_its_stage_anew_unless_others_build_on_it(
        first_run, tmp_path, capsys, no_picture, spoil):
    """The reason is said; where later stages would be lost with it, --fresh is asked for."""
    out = copied(first_run, tmp_path)
    flags = [*FLAGS, "--data", str(first_run.data), "--out_dir", str(out)]
    spoil(out / "lm.pt")
    line = refused(capsys, *flags)
    assert "lm.pt: no" in line and "reward.pt builds on it: --fresh language_model" in line
    (out / "lm.pt").write_bytes((first_run.out / "lm.pt").read_bytes())
    spoil(out / "policy.pt")
    gone = not (out / "policy.pt").exists()
    rlhf.main(flags)
    text = capsys.readouterr().out
    assert gone != ("ppo: starts anew, " in text and "not a readable checkpoint" in text)
    assert "reward_model: is loaded" in text and "ppo: is loaded" not in text
    assert same_weights(weights(out), weights(first_run.out))


def test_a_run_that_was_interrupted_ends_bit_identical(first_run, tmp_path, no_picture):
    """Stopped again and again, in every stage: the same weights, the same log, the same figures."""
    config = dataclasses.replace(first_run.config, out_dir=str(tmp_path / "out"))
    stops, record = [], None
    while record is None:
        calls = itertools.count()
        limit = (3, 2, 5, 1, 4)[len(stops) % 5]  # it is asked once a step
        try:
            record = rlhf.run(config, interrupted=lambda: next(calls) >= limit)
        except KeyboardInterrupt:
            stops.append([load_checkpoint(path)["state"]["step"] for path in (
                Path(config.out_dir) / name for name in ("lm.pt", "reward.pt", "policy.pt"))
                if path.exists()])
        assert len(stops) < 30
    assert {len(steps) for steps in stops} == {1, 2, 3}  # it was stopped in each stage
    for name in ("lm.pt", "reward.pt", "policy.pt"):
        assert same_weights(weights(config.out_dir, name), weights(first_run.out, name)), name
    assert figures(record) == figures(first_run.record)

    def steps(out):
        return [{k: v for k, v in row.items() if "seconds" not in k and "per_s" not in k}
                for row in dataset.read_records(Path(out) / "log.jsonl")]
    assert steps(config.out_dir) == steps(first_run.out)


@pytest.mark.parametrize("save_every", [0, 1e9])
def test_a_run_that_was_killed_in_ppo_ends_bit_identical(first_run, tmp_path, monkeypatch, capsys,
                                                         no_picture, save_every):
    """Nothing is saved on the way out: the last checkpoint and (seed, stage, k) are enough."""
    monkeypatch.setattr(rlhf, "SAVE_EVERY", save_every)
    out = copied(first_run, tmp_path)
    (out / "policy.pt").unlink()
    config = dataclasses.replace(first_run.config, out_dir=str(out))
    real, calls = rlhf.collect, []

    def killed_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(rlhf, "collect", killed_at_the_third)
    with pytest.raises(MemoryError):
        rlhf.run(config)
    assert (out / "policy.pt").exists() == (save_every == 0)
    if save_every == 0:
        checkpoint = load_checkpoint(out / "policy.pt")
        assert not checkpoint["done"] and 1 <= checkpoint["state"]["step"] <= 2
    dataset.append_record(out / "log.jsonl", {"stage": "ppo", "step": 9})  # never to be seen again
    capsys.readouterr()
    record = rlhf.run(config)
    assert ("ppo: goes on at" in capsys.readouterr().out) == (save_every == 0)
    assert same_weights(weights(out), weights(first_run.out))
    assert figures(record) == figures(first_run.record)
    assert [(row["stage"], row["step"]) for row in dataset.read_records(out / "log.jsonl")] == [
        (row["stage"], row["step"]) for row in dataset.read_records(first_run.out / "log.jsonl")]


def test_ctrl_c_saves_and_says_how_to_go_on(first_run, tmp_path, monkeypatch, capsys):
    """A first Ctrl-C ends the step and saves; main says that the same command goes on."""
    def pressed(config, fresh, interrupted):
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "run", pressed)
    with pytest.raises(SystemExit) as caught:
        rlhf.main([])
    assert caught.value.code == 130 and capsys.readouterr().err == (
        "\nstopped; the same command goes on from the last checkpoint\n")
    for presses in (1, 2):  # what ends no step leaves after a second, or at the second press
        def busy(config, fresh, interrupted):
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)

        monkeypatch.setattr(rlhf, "run", busy)
        with pytest.raises(SystemExit) as caught:
            rlhf.main(["--fresh"])
        assert caught.value.code == 130 and "without --fresh goes on" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_its_stage_and_step(first_run, tmp_path, capsys,
                                                               monkeypatch):
    """Status 2 and one line; the last good checkpoints stay."""
    out = copied(first_run, tmp_path)
    real, calls = rlhf.reward_scores, itertools.count(1)
    monkeypatch.setattr(rlhf, "reward_scores", lambda model, r: real(model, r) * (
        math.nan if next(calls) == 3 else 1))
    monkeypatch.setattr(rlhf, "SAVE_EVERY", 0)
    line = refused(capsys, *FLAGS, "--data", first_run.data, "--out_dir", out,
                   "--missing_eos_score=none", "--fresh", "ppo")
    assert "ppo step 3" in line and "nan" in line
    assert load_checkpoint(out / "policy.pt")["state"]["step"] in (1, 2)
    assert all(w.isfinite().all() for w in weights(out).values())
    for name in ("lm.pt", "reward.pt"):
        assert (out / name).read_bytes() == (first_run.out / name).read_bytes()


def test_the_shipped_data_are_judged_by_the_true_reward(first_run, tmp_path, monkeypatch,
                                                        no_picture):
    """true_reward of both sides, the ceiling of noisy labels, the true reward logged in PPO."""
    for name in ("preferences.jsonl", "corpus.txt"):
        assert (first_run.data / name).exists()
    shipped_copy = small_data(tmp_path / "shipped")
    (shipped_copy / "tokenizer.tiktoken").write_bytes(SHIPPED_RANKS)
    monkeypatch.setattr(dataset, "SHIPPED", shipped_copy.resolve())
    config = dataclasses.replace(first_run.config, data_dir=str(shipped_copy),
                                 out_dir=str(tmp_path / "out"), ppo_iterations=1)
    record = rlhf.run(config)
    samples = dataset.read_records(tmp_path / "out" / "samples.jsonl")
    for sample in samples:
        for side in ("lm", "ppo"):
            assert sample[f"true_reward_{side}"] == pytest.approx(
                annotator.true_reward(sample["prompt"], sample[side]), abs=1e-4)
    for side in ("lm", "ppo"):
        assert record[f"true_reward_{side}"] == pytest.approx(
            np.mean([s[f"true_reward_{side}"] for s in samples]), abs=1e-4)
    assert record["true_reward_std_lm"] > 0
    data = dataset.load(shipped_copy, 128, 8)
    right = [annotator.true_reward(data.text(x), data.text(w))
             > annotator.true_reward(data.text(x), data.text(l)) for x, w, l in data.held_out.pairs]
    assert record["reward_model_ceiling"] == pytest.approx(np.mean(right))
    ppo = [r for r in dataset.read_records(tmp_path / "out" / "log.jsonl") if r["stage"] == "ppo"]
    assert len(ppo) == 1 and math.isfinite(ppo[0]["true_reward"])


def test_what_was_skipped_is_printed_before_training(tmp_path, capsys):
    """The count of each reason, and every note."""
    data = dataset.load(write_data(tmp_path, [GOOD_LINE, pair("a", "b", "b"), pair("a", "c", "c")]),
                        64, 8)
    rlhf.describe(data, torch.device("cpu"))
    text = capsys.readouterr().out
    assert "skipped: 2 rows of preferences.jsonl: identical answers" in text
    assert all(note in text for note in data.notes) and len(data.notes) > 2
    assert "vocabulary 1,024" in text and "1 pairs" in text


def test_progress_is_one_line_on_a_terminal_and_plain_lines_in_a_file(capsys, monkeypatch):
    """With rate and time left: step 30 of 40 after 6 s is 5 a second and 2 s to go."""
    for step in range(1, 41):
        rlhf.show_progress("language_model", step, 40, step / 5, {"loss": 1.25})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all("\r" not in line for line in lines)
    assert lines[-1].startswith("language_model 40/40") and "loss 1.25" in lines[0]
    rlhf.show_progress("ppo", 30, 40, 6.0, {"kl": 0.5, "rollout_tokens_per_s": 1234.5})
    line = capsys.readouterr().out
    assert line.startswith("ppo 30/40") and "5.0/s" in line and "2 s left" in line
    assert "1,234" in line and line.endswith("\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for step in (1, 2, 40):
        rlhf.show_progress("reward_model", step, 40, step / 5, {"loss": 1.25})
    text = capsys.readouterr().out
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")


def test_the_summary_shows_samples_by_the_reward_that_judges(tmp_path, capsys, monkeypatch,
                                                             no_picture):
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
    assert 90 < max(map(len, lines[:-1])) <= 100
    assert sum("before  -3.25  Film" in line for line in lines) == 5
    assert sum("after  +4.75  Film" in line for line in lines) == 5 and "Film 4| good." in text
    rows = [line.split() for line in lines]
    for row in (["reward", "1.500", "2.500"], ["true_reward", "-3.250", "4.750"],
                ["kl", "6.125"], ["true_reward_std_lm", "0.875"], ["win_rate", "1.000"]):
        assert rows.count(row) == 1, row
    assert not any("reward_ppo" in line for line in lines) and str(tmp_path) in lines[-1]
    untrue = [{k: v for k, v in sample.items() if "true" not in k} for sample in samples]
    rlhf.summarize({"reward_lm": 1.5, "reward_ppo": 2.5}, untrue, tmp_path)
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
    for death in deaths():
        assert run_and_die(config, *death) == signal.SIGKILL
        count += 1
        for path in Path(out).glob("*.pt"):
            load_checkpoint(path)
    assert run_and_die(config, rlhf, "run", lambda *_: False) == 0
    print(f"deaths: {count}")


def timeless(path):
    """The records of a JSON-lines file without what is measured by the clock."""
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_s" not in k}
            for row in dataset.read_records(path)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_kill_at_any_moment_changes_what_a_run_leaves(first_run, tmp_path):
    """Killed 16 times in one folder: weights, log and samples are those of an undisturbed run."""
    code = "import sys, test_rlhf; test_rlhf.die_again_and_again(*sys.argv[1:])"
    done = python("-c", code, tmp_path / "out", first_run.data)  # forks before any thread starts
    assert done.returncode == 0 and "deaths: 16\n" in done.stdout, done.stderr
    for name in rlhf.FILES.values():
        ours, theirs = (load_checkpoint(out / name) for out in (tmp_path / "out", first_run.out))
        assert same_weights(ours["weights"], theirs["weights"]), name
        assert str(ours["state"]) == str(theirs["state"]) and ours["done"], name
    assert timeless(tmp_path / "out" / "log.jsonl") == timeless(first_run.out / "log.jsonl")
    assert ((tmp_path / "out" / "samples.jsonl").read_bytes()
            == (first_run.out / "samples.jsonl").read_bytes())
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(first_run.out))


def test_no_run_that_started_over_and_was_killed_goes_on_from_older_stages(first_run, tmp_path,
                                                                           no_picture):
    """--fresh removes what it will replace: the log has every stage once, in order."""
    config = dataclasses.replace(first_run.config, out_dir=str(copied(first_run, tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        rlhf.run(config, "language_model", lambda: True)
    assert not any((tmp_path / "out" / name).exists() for name in ("reward.pt", "policy.pt"))
    rlhf.run(config)
    assert timeless(tmp_path / "out" / "log.jsonl") == timeless(first_run.out / "log.jsonl")


def test_no_two_runs_write_to_one_folder(first_run, tmp_path, capsys, no_picture):
    """The second is refused in one line; the lock ends with its holder."""
    pytest.importorskip("fcntl")
    out = copied(first_run, tmp_path)
    flags = [*FLAGS, "--data", first_run.data, "--out_dir", out]
    with dataset.locked(out):
        assert f"{out}: another run is writing there" in refused(capsys, *flags, "--fresh")
        assert (out / "policy.pt").exists()
    rlhf.main([str(flag) for flag in flags])
    with pytest.raises(MemoryError), dataset.locked(out):
        raise MemoryError
    with dataset.locked(out):
        pass


def test_no_full_disk_or_unwritable_folder_costs_more_than_a_line(first_run, tmp_path, capsys,
                                                                  monkeypatch):
    """One line names the place; the last good checkpoint is readable, nothing half is left."""
    out = copied(first_run, tmp_path)
    flags = [*FLAGS, "--data", first_run.data]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(rlhf, "SAVE_EVERY", 0)
    monkeypatch.setattr(os, "fsync", mock_raising(full, at=2))
    line = refused(capsys, *flags, "--out_dir", out, "--fresh", "ppo")
    assert str(out) in line and full.strerror in line
    assert load_checkpoint(out / "policy.pt")["state"]["step"] == 1
    assert not list(out.glob("*.tmp"))
    monkeypatch.setattr(Path, "write_bytes", mock_raising(full, at=1))
    assert full.strerror in refused(capsys, *flags, "--out_dir", out)
    monkeypatch.undo()
    (tmp_path / "file").write_text("not a directory")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"rlhf.py: {place}: " in refused(capsys, *flags, "--out_dir", place)


def mock_raising(error, at):
    """A function that does nothing, but for its call number `at`: that raises."""
    calls = itertools.count(1)

    def function(*_):
        if next(calls) == at:
            raise error
    return function


def test_no_code_in_a_checkpoint_runs(first_run, tmp_path, capsys):
    """lm.pt may be a pickle that would make a directory: it is refused, and its stage starts."""
    torch.save({"settings": Explosive(tmp_path / "boom")}, tmp_path / "lm.pt")
    config = dataclasses.replace(first_run.config, out_dir=str(tmp_path))
    data = dataset.load(first_run.data, 128, 8)
    assert rlhf.find_checkpoint("language_model", config, data) is None
    assert "starts anew" in capsys.readouterr().out and not (tmp_path / "boom").exists()
    for foreign in ([1, 2], {"weights": {}}):  # readable, and not ours: not to be overwritten
        torch.save(foreign, tmp_path / "lm.pt")
        with pytest.raises(ValueError, match="another version of this program.*--fresh"):
            rlhf.find_checkpoint("language_model", config, data)
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):  # a stage is a choice, not a path
        rlhf.parse(["--fresh", "../lm"])


def test_no_setting_escapes_the_check(first_run, capsys):
    """Sizes beyond every machine, and a field that was assigned to."""
    for field in ("n_embd", "block_size", "ppo_iterations", "kl_coef"):
        with pytest.raises(ValueError, match=f"^{field} is .*less than 2"):
            Config(**{field: 2**31})
    assert Config(seed=-2**70).seed == -2**70
    config = dataclasses.replace(first_run.config)
    config.clip = 0.0
    with pytest.raises(ValueError, match="^clip is 0.0"):
        rlhf.run(config)
    assert "not enough memory" in refused(capsys, "--data", first_run.data, "--out_dir",
                                          first_run.out.parent / "big", "--n_embd", 2 * 10**9)


def test_no_weight_that_is_not_finite_is_saved(first_run, tmp_path, capsys, no_picture):
    """A last step that overflows is followed by no loss that would tell; the stage says so."""
    line = refused(capsys, *FLAGS, "--data", first_run.data, "--out_dir",
                   copied(first_run, tmp_path), "--rm_lr", "1e38", "--rm_batch_size", "1000",
                   "--fresh", "reward_model")
    assert "reward_model: a weight is not finite" in line
    assert not (tmp_path / "out" / "policy.pt").exists()


def test_no_number_that_is_not_finite_makes_the_log_unreadable(tmp_path):
    """JSON has no NaN: a figure that cannot be computed is null."""
    dataset.append_record(tmp_path / "log.jsonl", {"a": math.nan, "b": -math.inf, "c": 1.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"a": null, "b": null, "c": 1.5}\n'


def test_no_data_are_too_small(tmp_path, no_picture):
    """One pair of one-token answers, a rank a byte, batches of one, the shortest context."""
    directory = write_data(tmp_path / "data", [pair("", "a", "b")], corpus="x\ny\nz", prompts="p")
    (directory / "tokenizer.tiktoken").write_bytes(b"\n".join(SHIPPED_RANKS.split(b"\n")[:256]))
    ones = dict.fromkeys(("lm_batch_size", "rm_batch_size", "ppo_batch_size", "minibatch_size",
                          "ppo_epochs", "eval_prompts", "max_new_tokens", "n_head", "n_embd"), 1)
    record = rlhf.run(Config(**SIZES | ones | {"block_size": 4}, data_dir=str(directory),
                             out_dir=str(tmp_path / "out")))
    assert all(math.isfinite(value) for value in record.values())


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
