"""Ranking losses that compare with a frozen reference: DPO and its relatives.

A value per group, in nats unless the docstring says otherwise. See `rank.py` for what they share.

Shapes: G groups (prompts), K answers of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from limbeck.objectives.parameters import Range
from limbeck.objectives.rank import NOT_NEGATIVE, POSITIVE, Candidates, register_ranking
from limbeck.types import PROBABILITY

FLIPPED_SHARE = Range(0, 0.5, open_high=True)


@register_ranking(
    "-(1-e) log s(b h) - e log s(-b h), h = ratio_best - ratio_worst",
    "Rafailov et al., arXiv:2305.18290; e: Mitchell's cDPO note",
    "start",
    labels=(PROBABILITY,),
    beta=POSITIVE,
    label_smoothing=FLIPPED_SHARE,
)
def dpo(candidates: Candidates, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation; `label_smoothing` e > 0 is conservative DPO: a share e of the labels may be
    flipped.

    Limits: ln 2 where the student equals the reference. For e > 0 the minimum is at b h = log((1-e) / e), so the
    margin stops growing. Only the difference is pushed: the best answer's own log-probability may fall. For a pair with
    a probability p of its own, e is 1 - p.
    """
    scaled_G = beta * candidates.margin(candidates.log_ratio_GK)
    flipped_G = torch.full_like(scaled_G, label_smoothing)
    if candidates.probability_G is not None:
        probability_G = candidates.probability_G.to(scaled_G)
        flipped_G = torch.where(probability_G.isnan(), flipped_G, 1 - probability_G)
    return candidates.where_paired(-(1 - flipped_G) * logsigmoid(scaled_G) - flipped_G * logsigmoid(-scaled_G))


@register_ranking(
    "(-(1-e) log s(b h) + e log s(-b h)) / (1-2e)",
    "Chowdhury et al., arXiv:2403.00409",
    "start",
    beta=POSITIVE,
    noise=FLIPPED_SHARE,
)
def robust_dpo(candidates: Candidates, *, beta: float = 0.1, noise: float = 0.1) -> Tensor:
    """DPO whose expectation over labels flipped with probability `noise` e is DPO on the true labels.

    Limits: DPO at e = 0. Unlike cDPO it isn't bounded below: it falls as -e b h / (1-2e) for h to infinity.
    """
    scaled_G = beta * candidates.margin(candidates.log_ratio_GK)
    return candidates.where_paired(
        (noise * logsigmoid(-scaled_G) - (1 - noise) * logsigmoid(scaled_G)) / (1 - 2 * noise)
    )


@register_ranking(
    "(h - 1/(2b))^2, h = ratio_best/len_best - ratio_worst/len_worst",
    "Azar et al., arXiv:2310.12036 (per token)",
    "start",
    beta=POSITIVE,
)
def ipo(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation on per-token log ratios, in squared nats per token; b is the paper's tau.

    The paper writes sequence probabilities; its authors asked for the average over tokens (Hugging Face's
    `pref-tuning` note, TRL #1265), which keeps the target independent of the length. `ipo_sum` is the paper as printed.
    Limits: 0 at h = 1/(2b), and it pulls back beyond that.
    """
    return _squared_distance(candidates, candidates.per_token(candidates.log_ratio_GK), beta)


@register_ranking(
    "(h - 1/(2b))^2, h = ratio_best - ratio_worst", "Azar et al., arXiv:2310.12036 (as printed)", "start", beta=POSITIVE
)
def ipo_sum(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation on whole answers' log ratios, in squared nats: long answers weigh more."""
    return _squared_distance(candidates, candidates.log_ratio_GK, beta)


def _squared_distance(candidates: Candidates, ratio_GK: Tensor, beta: float) -> Tensor:
    return candidates.where_paired((candidates.margin(ratio_GK) - 1 / (2 * beta)).square())


@register_ranking(
    "max(0, 1 - b h), h = ratio_best - ratio_worst",
    "Zhao et al., arXiv:2305.10425; this form: Liu et al., arXiv:2309.06657",
    "start",
    beta=POSITIVE,
)
def hinge(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """The hinge on DPO's margin (RSO's hinge-norm). SLiC-HF's own has no reference and adds a cross-entropy: not this.

    Limits: 1 where the student equals the reference, 0 with no gradient from h = 1/b on.
    """
    return candidates.where_paired(relu(1 - beta * candidates.margin(candidates.log_ratio_GK)))


def kto_baseline(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """(sum, count) of the log ratios of the present answers, detached: add them over micro-batches and ranks.

    The paper takes answers to *other* prompts of the batch, scored under this one, so these are not the candidates
    that `kto` trains on. It is not clamped here: clamping each part before adding would bias the estimate upwards.
    """
    return candidates.log_ratio_GK.detach().sum(), candidates.present_GK.sum()


@register_ranking(
    "w_d (1 - s(b (ratio_best - z))) + sum_others w_u (1 - s(b (z - ratio)))",
    "Ethayarajh et al., arXiv:2402.01306",
    "start",
    measures=kto_baseline,
    beta=POSITIVE,
    desirable_weight=NOT_NEGATIVE,
    undesirable_weight=NOT_NEGATIVE,
    baseline=NOT_NEGATIVE,
)
def kto(
    candidates: Candidates,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline: float = 0.0,
) -> Tensor:
    """Kahneman-Tversky optimisation: the best answer of a group is desirable, all others undesirable; a sum over
    answers.

    Its formula needs no pair, and a lone answer counts as desirable (a recipe's text has a chosen answer and others to
    every prompt all the same). `baseline` z is the estimate of KL(student || reference)
    from `kto_baseline` and `clamped_baseline`; at 0 it is KTO without a reference point. Units: the weights', not nats.
    Limits: half the weights at ratio = z; each answer's part lies between 0 and its weight and saturates at both ends.
    """
    gain_GK = beta * (candidates.log_ratio_GK - baseline)
    best_GK = torch.zeros_like(candidates.present_GK).scatter(-1, candidates.best_index(), True)
    # 1 - s(x) = s(-x), without the cancellation.
    loss_GK = torch.where(
        best_GK, desirable_weight * torch.sigmoid(-gain_GK), undesirable_weight * torch.sigmoid(gain_GK)
    )
    return loss_GK.masked_fill(~candidates.present_GK, 0.0).sum(-1)


@register_ranking("-log s(b h), h = ratio_data - ratio_own", "Chen et al., arXiv:2401.01335", "start", beta=POSITIVE)
def spin(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Self-play fine-tuning with the logistic loss: DPO's formula, but nobody judged the answers.

    The best answer is the data's (or the teacher's), the worst was written by the previous round's student, and that
    same student is the reference; so both start anew each round. b is the paper's lambda.
    """
    return dpo(candidates, beta=beta)


@register_ranking(
    "-log s(b h), h = log(q/p)(teacher's)/len - log(q/p)(student's)/len",
    "Li et al., arXiv:2406.19774, eq. 9",
    "teacher",
    beta=POSITIVE,
)
def dpkd(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Direct preference distillation: the teacher's answer is the best, the student's the worst, the reference p is the
    teacher.

    The paper adds a language-modelling loss on pre-training text: name a second term for that.
    Limits: ln 2 where q = p on both answers.
    """
    return candidates.where_paired(-logsigmoid(beta * candidates.margin(candidates.per_token(candidates.log_ratio_GK))))
