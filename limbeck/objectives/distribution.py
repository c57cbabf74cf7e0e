"""A model's next-token distributions at some positions; what several losses read is computed once.

Shapes: R positions, V outcomes (the vocabulary, or a teacher's top tokens and a bucket for the rest), H bins of a
histogram, S outcomes that are sorted.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from limbeck.objectives.precision import accumulation_dtype, full_precision

IMPOSSIBLE = -1e30  # the logit of an outcome of probability 0: finite, so that 0 log 0 is 0 and not NaN
ValueAndGradient = tuple[Tensor, Tensor]  # values [R] and their gradient for the student's logits [R, V]


class Distribution:
    """`log` and `prob` [R, V] of the softmax of `logits_RV`, in fp32 or better; -inf logits have probability 0."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV = full_precision(logits_RV)
        # never holds itself: a reference cycle would keep its tensors until the next garbage collection
        self._by_temperature: dict[float, Distribution] = {}

    @cached_property
    def _log_and_prob(self) -> tuple[Tensor, Tensor]:
        """Both from one exponential: every loss needs both, and exponentials take most of its time."""
        log_RV = self.logits_RV - self.logits_RV.amax(-1, keepdim=True)
        prob_RV = log_RV.exp()
        total_R1 = prob_RV.sum(-1, keepdim=True)
        return log_RV.sub_(total_R1.log()), prob_RV.div_(total_R1)

    @property
    def log(self) -> Tensor:
        return self._log_and_prob[0]

    @property
    def prob(self) -> Tensor:
        return self._log_and_prob[1]

    def at(self, temperature: float) -> Distribution:
        """The distribution of the logits divided by `temperature`."""
        if temperature == 1:
            return self
        if temperature not in self._by_temperature:
            self._by_temperature[temperature] = Distribution(self.logits_RV / temperature)
        return self._by_temperature[temperature]


def finite(logits: Tensor) -> Tensor:
    """Replace -inf by IMPOSSIBLE. NaN and +inf stay, so that a later check finds them."""
    return torch.where(logits == -torch.inf, IMPOSSIBLE, full_precision(logits))


BIN_SHIFT = 20  # keeps 3 bits of a float's mantissa: eight bins from one power of two to the next
BINS = (0x3F800000 >> BIN_SHIFT) + 1  # up to the bin of 1.0, which also takes what rounding puts above 1


def least_of_mass(prob_RV: Tensor, mass: float) -> Tensor:
    """The least probability [R] in the smallest set of outcomes whose probabilities add up to `mass`.

    Exact, without sorting the vocabulary: the bits of a positive float rise with its value, so the first few serve as
    the bin of a histogram, and only the bin in which the mass is reached is sorted.
    """
    bins_RV = prob_RV.float().view(torch.int32) >> BIN_SHIFT
    mass_RH = prob_RV.new_zeros(len(prob_RV), BINS).scatter_add_(-1, bins_RV.long(), prob_RV)
    upward_RH = mass_RH.flip(-1).cumsum(-1).flip(-1)  # mass of a bin and of all above it
    goal_R1 = upward_RH[:, :1].clamp_max(mass)  # rounding may leave `mass` out of reach
    bin_R1 = (upward_RH >= goal_R1).sum(-1, keepdim=True) - 1
    missing_R = (goal_R1 - (upward_RH - mass_RH).gather(-1, bin_R1))[:, 0]
    row_S, column_S = (bins_RV == bin_R1.int()).nonzero(as_tuple=True)
    prob_S, order = prob_RV[row_S, column_S].sort(descending=True)
    row_S, by_row = row_S[order].sort(stable=True)
    prob_S = prob_S[by_row]
    count_R = row_S.bincount(minlength=len(prob_RV))
    start_R = count_R.cumsum(0) - count_R
    sum_S = prob_S.to(accumulation_dtype(prob_S.device)).cumsum(0)
    before_R = (sum_S - prob_S)[start_R]
    short_S = sum_S - before_R[row_S] < missing_R[row_S]
    short_R = torch.zeros_like(count_R).index_add_(0, row_S, short_S.long())
    return prob_S[start_R + torch.minimum(short_R, count_R - 1)]
