"""Divergences between teacher p and student q over the vocabulary, one value per position, in nats.

Everything is computed in fp32 (fp64 inputs stay fp64) and in log space; mixtures go through logaddexp, so a
probability that underflows costs no infinity. A divergence is one function here, registered by its decorator.

Shapes: N positions, V vocabulary. Sources and limits stand in each docstring.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from limbeck.objectives.precision import full_precision
from limbeck.types import RecipeError, nearest

DivergenceFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Range:
    """The legal values of a parameter: `low` <= value <= `high`, an end left out where it is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def check(self, path: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecipeError(path, f"{value!r} is not a number; give one in {self}")
        too_low = value <= self.low if self.open_low else value < self.low
        too_high = value >= self.high if self.open_high else value > self.high
        if too_low or too_high:
            raise RecipeError(path, f"{value} is outside {self}")
        return float(value)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class Divergence:
    """A registered divergence: `fn(teacher_logits_NV, student_logits_NV, **params) -> values_N`."""

    name: str
    fn: DivergenceFn
    formula: str
    paper: str
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, float]:
        """The parameters and their defaults, read from the function's own signature."""
        parameters = inspect.signature(self.fn).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


DIVERGENCES: dict[str, Divergence] = {}


def _register(formula: str, paper: str, **ranges: Range) -> Callable[[DivergenceFn], DivergenceFn]:
    def add(fn: DivergenceFn) -> DivergenceFn:
        DIVERGENCES[fn.__name__] = Divergence(fn.__name__, fn, formula, paper, ranges)
        return fn

    return add


def _log_probs(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    logits_NV = full_precision(logits_NV)
    return log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a || b) per position, from finite log-probabilities."""
    return torch.nn.functional.kl_div(log_b_NV, log_a_NV, reduction="none", log_target=True).sum(-1)


TEMPERATURE = Range(0, 1000, open_low=True)


@_register("T^2 sum_v p_T log(p_T / q_T)", "Hinton et al., arXiv:1503.02531", temperature=TEMPERATURE)
def forward_kl(teacher_logits_NV: Tensor, student_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q), scaled by T squared so that the gradient T (q_T - p_T) keeps its size.

    Limits: 0 iff q = p; T to infinity gives half the variance over the vocabulary of the logit difference.
    """
    log_p_NV, log_q_NV = _log_probs(teacher_logits_NV, temperature), _log_probs(student_logits_NV, temperature)
    return temperature**2 * _kl(log_p_NV, log_q_NV)


@_register("T^2 sum_v q_T log(q_T / p_T)", "Gu et al., arXiv:2306.08543 (its per-token form)", temperature=TEMPERATURE)
def reverse_kl(teacher_logits_NV: Tensor, student_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(q || p): mode-seeking. The gradient with respect to the student's logits is q (log(q / p) - KL) at T = 1.

    Not MiniLLM: that is the sequence-level divergence on the student's own text; this is one position's.
    """
    log_p_NV, log_q_NV = _log_probs(teacher_logits_NV, temperature), _log_probs(student_logits_NV, temperature)
    return temperature**2 * _kl(log_q_NV, log_p_NV)


@_register("b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q", "Agarwal et al., arXiv:2306.13649",
           teacher_share=Range(0, 1, open_low=True, open_high=True))  # fmt: skip
def jsd(teacher_logits_NV: Tensor, student_logits_NV: Tensor, *, teacher_share: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence; b is the teacher's share of the mixture m and of the sum.

    Limits: at most ln 2 for b = 0.5; it vanishes like b FKL for b to 0 and like (1-b) RKL for b to 1, so the ends
    themselves are refused: name `forward_kl` or `reverse_kl` instead.
    """
    log_p_NV, log_q_NV = _log_probs(teacher_logits_NV), _log_probs(student_logits_NV)
    b = teacher_share
    log_m_NV = torch.logaddexp(log_p_NV + math.log(b), log_q_NV + math.log1p(-b))
    return b * _kl(log_p_NV, log_m_NV) + (1 - b) * _kl(log_q_NV, log_m_NV)


def checked_params(name: str, params: dict[str, object], path: str = "") -> dict[str, float]:
    """The divergence's parameters with defaults filled in.

    Raises:
        RecipeError: an unknown divergence or parameter, or a value outside its range; `path` says where it stood.
    """
    if name not in DIVERGENCES:
        raise RecipeError(path, f"no divergence is named {name!r}{nearest(name, DIVERGENCES)}")
    known = DIVERGENCES[name]
    values = dict(known.defaults)
    for key, value in params.items():
        if key not in values:
            raise RecipeError(f"{path}.{key}".lstrip("."), f"{name} has no such parameter{nearest(key, values)}")
        values[key] = known.ranges[key].check(f"{path}.{key}".lstrip("."), value)
    return values


def divergence(name: str, teacher_logits_NV: Tensor, student_logits_NV: Tensor, **params: float) -> Tensor:
    """The divergence `name` at every position: values [N] in nats, fp32, differentiable in the student.

    Args:
        name: a key of `limbeck.methods()["divergences"]`.
        teacher_logits_NV: unnormalised log-probabilities of the teacher, [N, V]; no gradient flows into them.
        student_logits_NV: those of the student, same shape and vocabulary.
        params: the divergence's own parameters, such as `teacher_share` of `jsd`.

    Raises:
        ValueError: an unknown name or parameter, a value outside its range, shapes that differ, or logits that are not finite.
    """
    values = checked_params(name, dict(params), name)
    if teacher_logits_NV.shape != student_logits_NV.shape or teacher_logits_NV.ndim != 2:
        raise ValueError(
            f"{name}: teacher and student logits must both be [positions, vocabulary]; got "
            f"{tuple(teacher_logits_NV.shape)} and {tuple(student_logits_NV.shape)}"
        )
    if not (torch.isfinite(teacher_logits_NV).all() and torch.isfinite(student_logits_NV).all()):
        raise ValueError(f"{name}: logits must be finite; give a masked token a large negative logit, such as -1e4, in both models")
    return DIVERGENCES[name].fn(teacher_logits_NV.detach(), student_logits_NV, **values)
