"""Policy gradients from rewards on a policy small enough to enumerate: every group of answers, with its probability.

An answer is one of S texts of one or two tokens; J is the expected reward. Nothing is sampled: the expectation over
groups of K answers is the sum over all S^K of them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from limbeck.config.sections import Advantage
from limbeck.objectives.policy import policy_loss
from limbeck.objectives.rewards import advantages, equal_groups, grpo, length_weights, rloo
from limbeck.training.rewards import Rewards
from limbeck.training.scored import Scored
from limbeck.types import UserError

K = 3
MOST = 4  # tokens that an answer may have
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


@pytest.mark.parametrize(
    "settings", [{}, {"scale": "none"}, {"scale": "step"}, {"baseline": "others", "scale": "none"}]
)
def test_ppos_first_step_is_reinforce_for_every_group_and_any_clip(logits, settings):
    """Clip-higher (DAPO) changes nothing there."""
    values = token_log_probs(logits)
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        advantage_K = by(**settings)(torch.tensor(group))
        tokens = torch.cat([values[index] for index in group])
        given = {
            "advantage": torch.cat([a.expand(len(values[i])) for i, a in zip(group, advantage_K, strict=True)]),
            "old_log_prob": tokens.detach(),
        }
        wanted, *others = (
            torch.autograd.grad(policy_loss(name, tokens, given, **clip).sum(), logits, retain_graph=True)[0]
            for name, clip in (("reinforce", {}), ("ppo_clip", {}), ("ppo_clip", {"clip_low": 0.1, "clip_high": 0.28}))
        )
        assert all(torch.equal(other, wanted) for other in others)


def old_student(logits, step):
    """One that is so far away from the student."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return logits.detach() + step * noise


def test_later_passes_are_the_clipped_surrogate_under_the_old_student(logits):
    """Written out: the gradient of E_old of min(r A, clip(r) A) over tokens, by autograd of the whole expectation."""
    old = old_student(logits, 0.3)
    got = expected(logits, by(scale="none"), "ppo_clip", old)
    ratios = [(now - then).exp() for now, then in zip(token_log_probs(logits), token_log_probs(old), strict=True)]
    surrogate = 0.0
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        reward = REWARD_S[list(group)]
        probability = sum(token_log_probs(old)[index].sum() for index in group).exp()
        for index, a in zip(group, reward - reward.mean(), strict=True):
            clipped = ratios[index].clamp(0.8, 1.2)
            surrogate = (
                surrogate
                - probability
                * torch.where(a > 0, torch.minimum(ratios[index], clipped), torch.maximum(ratios[index], clipped))
                .mul(a)
                .sum()
                / K
            )
    torch.testing.assert_close(got, torch.autograd.grad(surrogate, logits)[0], rtol=1e-9, atol=1e-12)
    clipped = sum(int(((ratio < 0.8) | (ratio > 1.2)).sum()) for ratio in ratios)
    assert 0 < clipped < int(LENGTH_S.sum()), "some tokens are clipped, and some are not"


def test_ratios_of_tokens_are_exact_for_answers_of_one_token_and_biased_for_longer_ones(logits):
    """A token's own ratio leaves the prefix, and what follows, at the old student's rate; nothing is clipped here."""
    old = old_student(logits, 0.02)
    wide = {"clip_low": 1.0, "clip_high": 1000.0}

    def under_old(keep):
        """The expected gradient where only these texts are ever rewarded."""
        total = torch.zeros_like(logits)
        for values, then, text, reward in zip(
            token_log_probs(logits), token_log_probs(old), TEXTS, REWARD_S, strict=True
        ):
            if keep(text):
                given = {"advantage": reward.expand(len(values)), "old_log_prob": then.detach()}
                loss = policy_loss("ppo_clip", values, given, **wide).sum()
                total += then.detach().sum().exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        return total

    def wanted(keep):
        kept = [
            (values, r) for values, text, r in zip(token_log_probs(logits), TEXTS, REWARD_S, strict=True) if keep(text)
        ]
        return torch.autograd.grad(-sum(values.sum().exp() * r for values, r in kept), logits)[0]

    short, long = (lambda text: len(text) == 1), (lambda text: len(text) == 2)
    torch.testing.assert_close(under_old(short), wanted(short), rtol=1e-10, atol=1e-12)
    assert (under_old(long) - wanted(long)).abs().max() > 1e-4
    assert (under_old(long) - wanted(long)).norm() < 0.05 * wanted(long).norm(), "by little, while the two are near"


def test_the_steps_mean_over_several_prompts_expects_the_gradient_times_1_minus_1_over_all_answers(logits):
    """REINFORCE with a baseline: two prompts of one answer each, whose rewards are other ones; N = 2."""
    values = token_log_probs(logits)
    other_S = torch.tensor([0.0, 3.0, -1.0, 0.5, 1.0], dtype=torch.float64)  # of the second prompt
    total = torch.zeros_like(logits)
    for first, second in itertools.product(range(len(TEXTS)), repeat=2):
        reward_GK = torch.stack([REWARD_S[first], other_S[second]])[:, None]
        a, b = advantages(reward_GK, baseline="step", scale="none")[:, 0]
        loss = policy_loss("reinforce", values[first], {"advantage": a.expand(len(values[first]))}).sum()
        loss = loss + policy_loss("reinforce", values[second], {"advantage": b.expand(len(values[second]))}).sum()
        chance = (values[first].sum() + values[second].sum()).exp().detach()
        total += chance * torch.autograd.grad(loss / 2, logits, retain_graph=True)[0]
    probability_S = torch.stack([tokens.sum() for tokens in values]).exp()
    wanted = torch.autograd.grad(-(probability_S * (REWARD_S + other_S)).sum() / 2, logits)[0]
    torch.testing.assert_close(total, (1 - 1 / 2) * wanted, rtol=1e-10, atol=1e-12)


def as_trained(logits, **settings):
    """The expected gradient of a step as the loop has it: advantages times weights, summed, divided by the tokens."""
    values = token_log_probs(logits)
    rewards = Rewards([], Advantage(**settings))
    total = torch.zeros_like(logits)
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        lengths = [len(values[index]) for index in group]
        scored = Scored([[float(REWARD_S[index]) for index in group]], {}, 0)
        (advantage_K,) = rewards.advantages(scored, [lengths], MOST)
        loss = sum(
            policy_loss("reinforce", values[i], {"advantage": torch.full((n,), a, dtype=torch.float64)}).sum()
            for i, n, a in zip(group, lengths, advantage_K, strict=True)
        )
        chance = sum(values[index].sum() for index in group).exp().detach()
        total += chance * torch.autograd.grad(loss / sum(lengths), logits, retain_graph=True)[0]
    return total


def test_what_counts_alike_in_the_loop_gives_the_papers_sums(logits):
    """Dr. GRPO's constant is the exact gradient but for a factor; GRPO's 1 / |o| and DAPO's 1 / sum |o| are others."""
    unscaled = {"baseline": "group", "scale": "none"}
    torch.testing.assert_close(
        as_trained(logits, **unscaled, count="constant"), (1 - 1 / K) * exact(logits) / MOST, rtol=1e-5, atol=1e-7
    )
    rloo_constant = as_trained(logits, baseline="others", scale="none", count="constant")
    torch.testing.assert_close(rloo_constant, exact(logits) / MOST, rtol=1e-5, atol=1e-7)
    log_prob_S = torch.stack([tokens.sum() for tokens in token_log_probs(logits)])
    wanted = {"answers": 0.0, "tokens": 0.0}
    for group in itertools.product(range(len(TEXTS)), repeat=K):
        index = list(group)
        a, length = REWARD_S[index] - REWARD_S[index].mean(), LENGTH_S[index]
        chance = log_prob_S[index].sum().exp().detach()
        wanted["answers"] = wanted["answers"] - chance * (a * log_prob_S[index] / length).mean()
        wanted["tokens"] = wanted["tokens"] - chance * (a * log_prob_S[index]).sum() / length.sum()
    for count, total in wanted.items():
        gradient = torch.autograd.grad(total, logits, retain_graph=True)[0]
        torch.testing.assert_close(as_trained(logits, **unscaled, count=count), gradient, rtol=1e-5, atol=1e-7)
        cosine = torch.cosine_similarity(gradient.flatten(), exact(logits).flatten(), dim=0)
        assert cosine < 0.9999, f"{count}: another direction than the expected reward's"


def test_an_advantage_of_0_is_no_update_to_the_bit(logits):
    got = expected(logits, lambda group: torch.zeros(K, dtype=torch.float64), "ppo_clip")
    assert not got.any()


@pytest.mark.parametrize("loss", ["reinforce", "ppo_clip"])
@pytest.mark.parametrize("step", [0.0, 0.3])
def test_answers_of_advantage_0_leave_the_others_gradient_as_it_is_to_the_bit(logits, loss, step):
    old = token_log_probs(old_student(logits, step))
    values = token_log_probs(logits)

    def gradient(group, advantage_K):
        total = sum(
            policy_loss(loss, values[i], {"advantage": a.expand(len(values[i])), "old_log_prob": old[i]}).sum()
            for i, a in zip(group, advantage_K, strict=True)
        )
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    some = torch.tensor([1.5, 0.0, -0.5, 0.0], dtype=torch.float64)
    assert torch.equal(gradient((0, 3, 2, 4), some), gradient((0, 2), some[some != 0]))
    weights = logits.detach().clone().requires_grad_()
    optimiser = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.0)
    weights.grad = gradient((0, 3, 2, 4), torch.zeros(4, dtype=torch.float64))
    optimiser.step()
    assert torch.equal(weights, logits), "the optimiser moves nothing, either"


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


@pytest.mark.parametrize(("baseline", "scale"), [("step", "group"), ("none", "group"), ("none", "step")])
def test_a_scale_that_is_0_where_the_numerator_is_not_is_refused(baseline, scale):
    """Else groups whose rewards are equal would have advantages of thousands."""
    with pytest.raises(UserError, match="divides by 0"):
        advantages(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), baseline=baseline, scale=scale)


def test_equal_rewards_give_exactly_0_whatever_the_rounding():
    for count in range(2, 40):
        assert not rloo(torch.full((2, count), 0.1, dtype=torch.float64)).any()
