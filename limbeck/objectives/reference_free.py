"""Ranking losses without a reference: the student's own log-probabilities per token, or the odds of whole answers.

A value per group, in nats unless the docstring says otherwise. See `rank.py` for what they share.

Shapes: G groups (prompts), K answers of a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from limbeck.objectives.rank import NOT_NEGATIVE, POSITIVE, Candidates, register_ranking


@register_ranking(
    "-lp_best/len + w (-log s(log odds_best - log odds_worst)), odds = P/(1-P), P = exp(lp/len)",
    "Hong et al., arXiv:2403.07691",
    "none",
    odds_weight=NOT_NEGATIVE,
)
def orpo(candidates: Candidates, *, odds_weight: float = 0.1) -> Tensor:
    """Odds-ratio preference optimisation: per-token cross-entropy on the best answer, plus the odds ratio's logistic
    loss.

    Limits: the odds part is ln 2 where both answers are equally likely. P = 1 has infinite odds, so a mean
    log-probability counts as at least one rounding unit of its type below 0; the gradient passes as if it stood there.
    """
    mean_GK = candidates.mean_log_prob_GK
    below_GK = mean_GK - relu(mean_GK + torch.finfo(mean_GK.dtype).eps).detach()
    # log(1 - P) as log(-expm1): exact where P is near 1; where P is small its absolute error is one rounding unit.
    log_odds_GK = below_GK - torch.log(-torch.expm1(below_GK))
    return candidates.where_paired(-odds_weight * logsigmoid(candidates.margin(log_odds_GK))) - candidates.best(mean_GK)


@register_ranking(
    "-log s(b (lp_best/len_best - lp_worst/len_worst) - g)",
    "Meng et al., arXiv:2405.14734",
    "none",
    beta=POSITIVE,
    gamma=NOT_NEGATIVE,
)
def simpo(candidates: Candidates, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation: no reference, per-token log-probabilities, and a margin `gamma` to be won by.

    `gamma` is the paper's: subtracted after `beta` multiplied. Code that takes gamma / beta calls it the ratio.
    """
    return candidates.where_paired(-logsigmoid(beta * candidates.margin(candidates.mean_log_prob_GK) - gamma))


@register_ranking(
    "sum_{i better than j} max(0, m_j - m_i) - w lp_best, m = lp/len",
    "Yuan et al., arXiv:2304.05302",
    "none",
    sft_weight=NOT_NEGATIVE,
)
def rrhf(candidates: Candidates, *, sft_weight: float = 1.0) -> Tensor:
    """Rank responses: every pair in the wrong order pays its distance; no margin. Plus the best answer's log loss.

    As in the paper the log loss is the *sum* over the tokens and unweighted (w = 1), so it outweighs the ranking part
    by about the answer's length; the authors' code averages it over the padded row instead.
    Limits: the ranking part is 0, with no gradient, once the order is right.
    """
    mean_GK = candidates.mean_log_prob_GK
    present_GK = candidates.present_GK
    best_G = candidates.best(candidates.where_present(candidates.log_prob_GK))
    wrong_GKK = relu(mean_GK.unsqueeze(-2) - mean_GK.unsqueeze(-1))
    pairs_GKK = (present_GK.unsqueeze(-2) & present_GK.unsqueeze(-1)).triu(1)
    return wrong_GKK.masked_fill(~pairs_GKK, 0.0).sum((-2, -1)) - sft_weight * best_G


@register_ranking(
    "-sum_{k<n} log(exp m_k / sum_{i>=k} exp m_i) - w (n-1)^2 lp_best, m = lp/len",
    "Song et al., arXiv:2306.17492 (no temperature)",
    "none",
    sft_weight=NOT_NEGATIVE,
)
def pro(candidates: Candidates, *, sft_weight: float = 0.05) -> Tensor:
    """Preference ranking optimisation: the Plackett-Luce likelihood of the whole order under per-token
    log-probabilities.

    The best answer's log loss is the sum over its tokens, weighed by w (n-1)^2 for n answers (1 for a lone one), as the
    paper has it. Its temperatures from gaps between rewards are left out: a ranking has no rewards.
    Limits: two answers and w = 0 equal `simpo` with beta 1 and gamma 0; n equally likely answers give log n!.
    """
    pairs_G = (candidates.present_GK.sum(-1) - 1).clamp(min=1).square().to(candidates.mean_log_prob_GK.dtype)
    best_G = candidates.best(candidates.where_present(candidates.log_prob_GK))
    return plackett_luce(candidates.mean_log_prob_GK, candidates.present_GK) - sft_weight * pairs_G * best_G


def plackett_luce(score_GK: Tensor, present_GK: Tensor) -> Tensor:
    """-log of the probability that drawing without replacement in proportion to exp(score) gives the order, [G]."""
    itself_KK = torch.eye(score_GK.shape[1], dtype=torch.bool, device=score_GK.device)
    # Row k holds the answers from rank k on. An absent answer keeps its own row finite; it is masked below.
    remaining_GKK = present_GK.unsqueeze(-2).expand(-1, score_GK.shape[1], -1).triu(1) | itself_KK
    tail_GK = score_GK.unsqueeze(-2).masked_fill(~remaining_GKK, -math.inf).logsumexp(-1)
    return (tail_GK - score_GK).masked_fill(~present_GK, 0.0).sum(-1)
