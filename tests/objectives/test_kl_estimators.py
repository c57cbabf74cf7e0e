"""The estimators of the KL term on whole sequences of a policy that is enumerated: what each one's value and gradient are.

Writing answers y ~ q and summing an estimator over the tokens, the values of k1 and k3 are the KL of whole sequences in
expectation, and k2's is not. As losses, k2 and k3 give the sum of the single steps' gradients, without the part that a
token has in all that follows it; k1 in the reward gives the whole.
"""

from __future__ import annotations

import pytest
import torch

import limbeck
from limbeck.objectives.policy import policy_loss
from limbeck.objectives.rewards import kl_estimate
from tests.objectives.test_tabular import PREFIX_ST, World, expected, off


@pytest.fixture(params=[1, 2, 3])
def world(request) -> World:
    return World.of(request.param)


def sequence_kl(world: World) -> torch.Tensor:
    log_q_S, log_p_S = world.q_ST.sum(1), world.p_ST.sum(1)
    return (log_q_S.exp() * (log_q_S - log_p_S)).sum()


def penalty_gradient(world: World, name: str) -> torch.Tensor:
    values_ST = policy_loss(name, world.q_ST.flatten(), {"reference_log_prob": world.p_ST.flatten()}).view_as(
        world.q_ST
    )
    return expected(world.q_ST, world.each_gradient(values_ST))


def test_k1_and_k3_are_the_kl_of_whole_sequences_in_value_and_k2_is_not(world):
    exact = sequence_kl(world).detach()
    value = {
        name: world.q_ST.detach().sum(1).exp() @ kl_estimate(world.q_ST, world.p_ST, name).sum(1)
        for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(value["k1"], exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(value["k3"], exact, rtol=1e-12, atol=0)
    assert off(value["k2"], exact) > 0.01


def test_as_a_loss_k2_gives_the_single_steps_of_the_reverse_kl_and_k3_those_of_the_forward(world):
    steps = {
        "kl_penalty_k2": world.single_step(),
        "kl_penalty_k3": limbeck.divergence("forward_kl", world.teacher_HV, world.student_HV)[PREFIX_ST],
    }
    for name, steps_ST in steps.items():
        wanted = expected(world.q_ST, world.each_gradient(steps_ST))
        torch.testing.assert_close(penalty_gradient(world, name), wanted, rtol=0, atol=1e-10)
        assert off(wanted, world.exact_reverse_kl_gradient()) > 0.01, "not the gradient of the sequences' divergence"


def test_k1_in_the_reward_gives_the_gradient_of_the_sequences_kl(world):
    """As PPO and RLOO have it: the penalty is a part of the whole answer's reward, and carries no gradient itself."""
    reward_S = -kl_estimate(world.q_ST, world.p_ST, "k1").sum(1)
    values_ST = policy_loss("reinforce", world.q_ST, {"advantage": reward_S[:, None].expand_as(world.q_ST)})
    got = expected(world.q_ST, world.each_gradient(values_ST))
    torch.testing.assert_close(got, world.exact_reverse_kl_gradient(), rtol=0, atol=1e-10)


def test_without_a_difference_there_is_no_penalty_to_the_bit(world):
    own = {"reference_log_prob": world.q_ST.detach().flatten()}
    for name in ("kl_penalty_k2", "kl_penalty_k3"):
        values = policy_loss(name, world.q_ST.flatten(), own)
        assert not values.any() and not world.gradient(values.sum()).any(), name
