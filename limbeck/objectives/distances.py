"""Divergences that are no Kullback-Leibler divergences: distances of probabilities, powers or logits.

Every one but `logit_mse` also takes `temperature` T: T squared times the divergence of p_T and q_T.

Shapes: R positions, V outcomes, W outcomes of a teacher with another vocabulary, J tokens of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence import through_softmax
from limbeck.objectives.divergence_loss import register_divergence
from limbeck.objectives.parameters import Range
from limbeck.objectives.precision import accumulation_dtype

SMALL_EXPONENT = 0.05


@register_divergence("1/2 sum |p - q|", "Wen et al., arXiv:2307.15190")
def tvd(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Total variation distance: at most 1; its square is at most half the forward KL (Pinsker). Not smooth at q = p."""
    difference_RV = q.prob - p.prob
    return 0.5 * difference_RV.abs().sum(-1), through_softmax(0.5 * difference_RV.sign() * q.prob, q)


@register_divergence(
    "1/2 sum (sqrt p - sqrt q)^2", "Hellinger; the alpha = beta = 1/2 case of arXiv:2505.04560 up to a factor 4"
)
def hellinger(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Squared Hellinger distance, between 0 and 1; at most the total variation distance."""
    root_p_RV = p.prob.sqrt()
    root_q_RV = q.prob.sqrt()
    return 0.5 * (root_p_RV - root_q_RV).square().sum(-1), through_softmax(-0.5 * root_p_RV * root_q_RV, q)


@register_divergence(
    "-1/(ab) sum p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b), a = alpha, b = beta",
    "Wang et al. (ABKD), arXiv:2505.04560",
    one_hot=False,
    alpha=Range(0, 4),
    beta=Range(0, 4),
)
def alpha_beta(p: Distribution, q: Distribution, *, alpha: float = 0.2, beta: float = 0.7) -> ValueAndGradient:
    """Alpha-beta divergence. Limits: (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times `hellinger`."""
    a = alpha
    b = beta
    small = 0 < min(a or 1, b or 1) < SMALL_EXPONENT  # near a limit, half of fp32's digits cancel
    finer = accumulation_dtype(p.log.device)
    log_p_RV, log_q_RV = (p.log.to(finer), q.log.to(finer)) if small else (p.log, q.log)
    q_ab_RV = ((a + b) * log_q_RV).exp_()
    p_ab_RV = ((a + b) * log_p_RV).exp_()
    mixed_RV = (a * log_p_RV).add_(log_q_RV, alpha=b).exp_()
    if a > 0 and b > 0:
        qg_RV = (q_ab_RV - mixed_RV).div_(a)
        values_R = p_ab_RV.mul_(a / (a + b)).add_(q_ab_RV, alpha=b / (a + b)).sub_(mixed_RV).sum(-1) / (a * b)
    else:
        ratio_RV = log_q_RV - log_p_RV
        qg_RV = q_ab_RV * ratio_RV if a == 0 else (q_ab_RV - mixed_RV) / a
        if a == 0 and b == 0:
            values_R = 0.5 * ratio_RV.square().sum(-1)
        elif b == 0:
            values_R = (-a * p_ab_RV * ratio_RV - p_ab_RV + q_ab_RV).sum(-1) / a**2
        else:
            values_R = (b * q_ab_RV * ratio_RV - q_ab_RV + p_ab_RV).sum(-1) / b**2
    return values_R.to(q.log.dtype), through_softmax(qg_RV.to(q.log.dtype), q)


@register_divergence(
    "1/2 Var_v(z_q - z_p), over the vocabulary",
    "the temperature limit in Hinton et al., arXiv:1503.02531",
    buckets=False,
    one_hot=False,
    softens=False,
)
def logit_mse(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Mean squared error of logits, each centred over the vocabulary (a shift of logits means nothing): `forward_kl` at
    infinite temperature. The same, up to a factor, as matching all pairwise differences of logits (arXiv:2509.25837).

    Columns that are masked in both models should be cut off, not masked: their difference counts as 0 here.
    """
    size = q.logits_RV.shape[-1]
    difference_RV = q.logits_RV - p.logits_RV
    centred_RV = difference_RV - difference_RV.sum(-1, keepdim=True) / size
    return 0.5 * centred_RV.square().sum(-1) / size, centred_RV / size


@register_divergence(
    "sum_i |p_(i) - q_(i)|, probabilities in falling order",
    "Boizard et al. (ULD), arXiv:2402.12030",
    buckets=False,
    sorts=True,
)
def uld(p: Distribution, q: Distribution) -> ValueAndGradient:
    """Sorted probabilities compared rank by rank, the shorter list filled with zeros: the two vocabularies may differ.

    At most 2. It is 0 for every permutation of p, too, so it does not say which token is meant: add cross-entropy to
    it.
    """
    return sorted_distance(p.prob, None, q)


def sorted_distance(p_RW: Tensor, ours_J: Tensor | None, q: Distribution) -> ValueAndGradient:
    """`uld` of non-negative numbers p [R, W] and the student's probabilities, of all tokens or of those with the ids
    `ours_J`."""
    own_RJ = q.prob if ours_J is None else q.prob[:, ours_J]
    ranked_RJ, order_RJ = own_RJ.sort(-1, descending=True)
    shared = min(p_RW.shape[-1], own_RJ.shape[-1])
    teacher_RJ = torch.zeros_like(ranked_RJ)
    teacher_RJ[:, :shared] = p_RW.topk(shared, -1).values
    beyond_R = (p_RW.sum(-1) - teacher_RJ.sum(-1)).clamp_min(0)  # the teacher's smaller ones are compared with zeros
    difference_RJ = ranked_RJ - teacher_RJ
    slope_RJ = torch.zeros_like(own_RJ).scatter_(-1, order_RJ, difference_RJ.sign())
    slope_RV = slope_RJ if ours_J is None else torch.zeros_like(q.prob).index_copy_(-1, ours_J, slope_RJ)
    return difference_RJ.abs().sum(-1) + beyond_R, through_softmax(slope_RV * q.prob, q)
