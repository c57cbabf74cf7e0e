"""A divergence between teacher p and student q over the vocabulary, per position, in nats; and what they all share.

A divergence returns its value and, in closed form, its gradient with respect to the student's logits, so that the head
needs no graph: of a loss D(q), that is q (g - sum q g) with g = dD/dq. The functions are in `kl.py` and `distances.py`,
and `divergence_loss.py` makes them losses of a recipe.

Shapes: N or R positions, V outcomes (the vocabulary, or a few tokens and a bucket for the rest).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.parameters import Range, defaults_of

DivergenceFn = Callable[..., ValueAndGradient]
TINY = 1e-37


@dataclass(frozen=True)
class Divergence:
    """A divergence `fn(p, q, **params) -> (values_R, gradient_RV)` of two `Distribution`s.

    Args:
        buckets: it is meaningful on a teacher's top tokens with a bucket for the rest.
        sampled: tokens drawn from the teacher carry it, since it is linear in p.
        one_hot: it is finite where the teacher gives a token no probability.
        targets: it reads the target token.
        softens: it takes a temperature.
        sorts: it compares probabilities by their rank, so p and q may be over different vocabularies.
    """

    name: str
    fn: DivergenceFn
    formula: str
    paper: str
    ranges: dict[str, Range] = field(default_factory=dict)
    buckets: bool = True
    sampled: bool = False
    one_hot: bool = True
    targets: bool = False
    softens: bool = True
    sorts: bool = False

    @property
    def defaults(self) -> dict[str, float]:
        """The parameters and their defaults, read from the function's own signature."""
        return defaults_of(self.fn) | ({"temperature": 1.0} if self.softens else {})

    def __call__(
        self, p: Distribution, q: Distribution, params: Mapping[str, float], targets_R: Tensor | None = None
    ) -> ValueAndGradient:
        """Values [R] and their gradient for the student's logits [R, V]."""
        rest = dict(params)
        t = rest.pop("temperature", 1.0)
        extra = {"targets_R": targets_R} if self.targets else {}
        if p.logits_RV.dtype != q.logits_RV.dtype:
            p = Distribution(p.logits_RV.to(q.logits_RV.dtype))
        values_R, gradient_RV = self.fn(p.at(t), q.at(t), **extra, **rest)
        return (values_R, gradient_RV) if t == 1 else (t**2 * values_R, gradient_RV.mul_(t))


def dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV * b_RV).sum(-1)


def through_softmax(qg_RV: Tensor, q: Distribution) -> Tensor:
    """q (g - sum q g) from the product q g, which it overwrites."""
    return qg_RV.addcmul_(q.prob, qg_RV.sum(-1, keepdim=True), value=-1)
