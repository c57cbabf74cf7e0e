"""Policy gradients from rewards on a policy small enough to enumerate: every group of answers, with its probability.

An answer is one of S texts of one or two tokens; J is the expected reward. Nothing is sampled: the expectation over
groups of K answers is the sum over all S^K of them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from limbeck.objectives.policy import policy_loss
from limbeck.objectives.rewards import advantages, equal_groups, grpo, length_weights, rloo

K = 3
TEXTS = [(0,), (1,), (2, 0), (2, 1), (2, 2)]  # the first token and, after a 2, a second one
REWARD_S = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0], dtype=torch.float64)
LENGTH_S = torch.tensor([len(text) for text in TEXTS])


@pytest.fixture
def logits():
    """Two rows of logits: the first token's, and the second's."""
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def token_log_probs(logits):
    """The log-probabilities of the tokens of each text: S tensors."""
    log_q = logits.log_softmax(-1)
    return [torch.stack([log_q[place, token] for place, token in enumerate(text)]) for text in TEXTS]


def exact(logits):
    """The gradient of -E[reward]."""
    log_prob_S = torch.stack([values.sum() for values in token_log_probs(logits)])
    return torch.autograd.grad(-(log_prob_S.exp() * REWARD_S).sum(), logits)[0]


def expected(logits, weigh, loss="reinforce", old=None):
    """The expected gradient of the sum over a group's tokens, divided by K; `weigh(indices)` gives the advantages."""
    values = token_log_probs(logits)
    writer = values if old is None else token_log_probs(old)
    total = torch.zeros_like(logits)
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        probability = float(sum(writer[index].detach().sum() for index in group).exp())
        advantage_K = weigh(torch.tensor(group))
        loss_sum = sum(
            policy_loss(
                loss,
                values[index],
                {"advantage": advantage.expand(len(values[index])), "old_log_prob": writer[index].detach()},
            ).sum()
            for index, advantage in zip(group, advantage_K, strict=True)
        )
        total += probability * torch.autograd.grad(loss_sum / K, logits, retain_graph=True)[0]
    return total


def by(**settings):
    return lambda group_K: advantages(REWARD_S[group_K][None], **settings)[0]


def test_rloo_and_rewards_without_a_baseline_expect_the_exact_gradient(logits):
    for settings in ({"baseline": "others", "scale": "none"}, {"baseline": "none", "scale": "none"}):
        torch.testing.assert_close(expected(logits, by(**settings)), exact(logits), rtol=1e-10, atol=1e-12)


def test_dr_grpo_and_the_steps_mean_expect_it_times_1_minus_1_over_k(logits):
    """The answer itself is in the mean that is subtracted from it."""
    for baseline in ("group", "step"):
        got = expected(logits, by(baseline=baseline, scale="none"))
        torch.testing.assert_close(got, (1 - 1 / K) * exact(logits), rtol=1e-10, atol=1e-12)


def test_grpo_expects_the_gradient_with_every_group_divided_by_its_deviation(logits):
    """Written out without Limbeck's functions: sum over groups of P(group) (r - mean) / (std + eps) grad log q / K."""
    log_prob_S = torch.stack([values.sum() for values in token_log_probs(logits)])
    total = 0.0
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        reward = REWARD_S[list(group)]
        a = (reward - reward.mean()) / (reward.std() + 1e-4)
        total = total - log_prob_S[list(group)].sum().exp().detach() * (a * log_prob_S[list(group)]).sum() / K
    wanted = torch.autograd.grad(total, logits)[0]
    torch.testing.assert_close(expected(logits, by()), wanted, rtol=1e-9, atol=1e-12)
    assert (wanted - (1 - 1 / K) * exact(logits)).abs().max() > 0.01, "another objective than the expected reward"


def test_ppos_first_step_is_reinforce_and_later_ones_correct_for_the_old_student(logits):
    first = expected(logits, by(baseline="others", scale="none"), "ppo_clip")
    torch.testing.assert_close(first, exact(logits), rtol=1e-10, atol=1e-12)


def test_an_advantage_of_0_is_no_update_to_the_bit(logits):
    got = expected(logits, lambda group: torch.zeros(K, dtype=torch.float64), "ppo_clip")
    assert not got.any()


def test_the_answers_weights_are_grpos_sum_over_its_own_length(logits):
    """(1 / K) sum_i (1 / |o_i|) sum_t, where the loop divides by the number of tokens."""
    values = token_log_probs(logits)
    for group in [(0, 2, 3), (1, 1, 4)]:
        length_1K = LENGTH_S[list(group)][None]
        weight_K = length_weights(length_1K, "sequence")[0].double()
        tokens = length_1K.sum()
        ours = sum(weight * values[index].sum() for weight, index in zip(weight_K, group, strict=True)) / tokens
        papers = sum(values[index].mean() for index in group) / K
        torch.testing.assert_close(ours, papers, rtol=1e-6, atol=0)


def test_advantages_have_the_named_methods_as_special_cases():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, -1.0, 0.0, 2.0]])
    present = torch.tensor([[True] * 4, [True] * 4, [True, True, False, True]])
    for there in (None, present):
        assert torch.equal(advantages(reward, there), grpo(reward, there)[0])
        assert torch.equal(advantages(reward, there, scale="none"), grpo(reward, there, scale_std=False)[0])
        assert torch.equal(advantages(reward, there, baseline="others", scale="none"), rloo(reward, there))
    step = advantages(reward, present, baseline="step", scale="step")
    kept = reward[present]
    wanted = torch.where(present, (reward - kept.mean()) / (kept.std() + 1e-4), 0.0)
    torch.testing.assert_close(step, wanted)
    assert equal_groups(reward).tolist() == [False, True, False]
    assert equal_groups(reward, torch.tensor([[False] * 4, [True] * 4, [True, False, False, False]])).tolist() == [
        False,
        True,
        True,
    ]


def test_one_answer_a_prompt_has_the_steps_baseline():
    reward = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert advantages(reward, baseline="step", scale="none")[:, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
