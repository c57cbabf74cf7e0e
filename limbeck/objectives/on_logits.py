"""`limbeck.divergence`: a divergence of two tensors of logits, checked and differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient, finite
from limbeck.objectives.divergence_loss import DIVERGENCES, checked_params
from limbeck.types import UserError

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "jsd_rescaled",
    "skew_kl",
    "skew_reverse_kl",
    "skew_reverse_kl_fixed",
    "taid",
    "adaptive_kl",
    "todi",
    "entropy_aware_kl",
    "dkd",
    "tvd",
    "hellinger",
    "alpha_beta",
    "logit_mse",
    "uld",
]


class DivergenceParams(TypedDict, total=False):
    """The parameters of the divergences; each has those that are named here for it, with defaults of its own.

    `limbeck.methods()["divergences"][NAME]` has a divergence's parameters, defaults and legal values.
    """

    temperature: float  # all but logit_mse: of both distributions, above 0; values are multiplied by its square
    teacher_share: float  # jsd, jsd_rescaled: the teacher's share of the mixture, 0 to 1
    forward_share: float  # symmetric_kl: the share of the forward KL, 0 to 1
    alpha: float  # skew_*: the share that is mixed in, 0 to 1; alpha_beta: 0 to 4; dkd: the target's weight
    beta: float  # alpha_beta: 0 to 4; dkd: the weight of all other tokens
    t: float  # taid: how far the target is on its way from student to teacher, 0 to 1
    mu: float  # adaptive_kl: the mass of the head of the distribution, between 0 and 1
    threshold: float  # entropy_aware_kl: the teacher's entropy in nats above which the forward KL is added
    forward_weight: float  # entropy_aware_kl: its weight


class _Differentiable(torch.autograd.Function):
    """Passes the closed-form gradient on; there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, compare: Callable[[Distribution], ValueAndGradient]) -> Tensor:
        values_N, gradient_NV = compare(Distribution(student_NV))
        ctx.save_for_backward(gradient_NV.to(student_NV.dtype))
        return values_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient_NV,) = ctx.saved_tensors
        return grads[0].to(gradient_NV.dtype)[:, None] * gradient_NV, None


def divergence(
    name: DivergenceName | str,
    teacher_logits_NV: Tensor,
    student_logits_NV: Tensor,
    *,
    targets_N: Tensor | None = None,
    **params: Unpack[DivergenceParams],
) -> Tensor:
    """The divergence `name` at every position: values [N] in nats, fp32, differentiable in the student.

    Args:
        name: one of `DivergenceName`, or of a divergence that was registered since: a key of
            `limbeck.methods()["divergences"]`.
        teacher_logits_NV: unnormalised log-probabilities of the teacher, [N, V]; no gradient flows into them.
        student_logits_NV: those of the student, same shape and vocabulary. A column masked with -inf in both counts for
            nothing (but for `logit_mse`, which still counts it in the size of the vocabulary).
        targets_N: the target tokens; only `dkd` reads them.
        params: the divergence's own parameters, such as `teacher_share` of `jsd`: see `DivergenceParams`.

    Raises:
        ValueError: an unknown name or parameter, a value outside its range, shapes that differ, NaN or +inf logits, a
            column that is masked in one model only, a position where all are masked, or targets that are no tokens.
    """
    values = checked_params(name, dict(params), name)
    if not (isinstance(teacher_logits_NV, Tensor) and isinstance(student_logits_NV, Tensor)):
        raise UserError(
            f"{name}: logits must be torch tensors [positions, vocabulary]; convert them with torch.as_tensor"
        )
    if teacher_logits_NV.shape != student_logits_NV.shape or teacher_logits_NV.ndim != 2:
        raise UserError(
            f"{name}: teacher and student logits must both be [positions, vocabulary]; got"
            f" {tuple(teacher_logits_NV.shape)} and {tuple(student_logits_NV.shape)}: cut both to the tokens they share"
        )
    teacher_NV = finite(teacher_logits_NV.detach())
    student_NV = finite(student_logits_NV)
    if not (torch.isfinite(teacher_NV).all() and torch.isfinite(student_NV).all()):
        raise UserError(
            f"{name}: logits must be finite, or -inf where a token is masked; found NaN or +inf: look for an overflow"
            " in fp16"
        )
    if not torch.equal(teacher_logits_NV == -torch.inf, student_logits_NV == -torch.inf):
        raise UserError(f"{name}: a token is masked (-inf) in one model and not in the other; mask it in both")
    if len(teacher_NV) and (teacher_logits_NV == -torch.inf).all(-1).any():
        raise UserError(f"{name}: at some position every token is masked (-inf); leave that position out")
    if targets_N is not None:
        _check_targets(name, targets_N, teacher_logits_NV)

    def compare(q: Distribution) -> ValueAndGradient:
        return DIVERGENCES[name](Distribution(teacher_NV), q, values, targets_N)

    result: Tensor = _Differentiable.apply(student_NV, compare)
    return result


def _check_targets(name: str, targets_N: Tensor, logits_NV: Tensor) -> None:
    positions, vocab_size = logits_NV.shape
    is_column = isinstance(targets_N, Tensor) and targets_N.shape == (positions,) and targets_N.dtype == torch.long
    if not is_column or not ((targets_N >= 0) & (targets_N < vocab_size)).all():
        raise UserError(
            f"{name}: targets_N must be a long tensor of {positions} token ids from 0 to {vocab_size - 1}; leave"
            " positions without a target (such as -100) out"
        )
