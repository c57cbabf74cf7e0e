"""Policy losses on the teacher's log-probabilities of the student's own text: on-policy distillation and MiniLLM.

Shapes: N response tokens, B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.loss import Responses
from limbeck.objectives.parameters import Range
from limbeck.objectives.policy import Columns, probability_ratio, register_policy
from limbeck.objectives.returns import ReturnForm, importance_weights, minillm_returns
from limbeck.objectives.rewards import reinforce

SWITCH = Range(0, 1)


@register_policy(
    "-r A, A = -c (log q(y) - log p(y)) held fixed, r = q(y) / q_old(y)",
    "Thinking Machines, On-Policy Distillation, October 2025",
    ("teacher_log_prob",),
    optional=("old_log_prob",),
    coefficient=Range(0, 1000),
)
def on_policy_distillation(log_prob_N: Tensor, columns: Columns, *, coefficient: float = 1.0) -> Tensor:
    """Expected gradient at a prefix: c times that of KL(q || p), exactly; over y ~ q, or y ~ q_old with `old_log_prob`.

    The effect of a token on later prefixes is not credited: that is `minillm_long`. The value at r = 1 is c (log q -
    log p), the k1 estimate of the divergence. A uses today's q, where the tinker cookbook uses q_old: alike until q has
    moved.
    """
    fixed_N = log_prob_N.detach()
    ratio_N = probability_ratio(log_prob_N, columns.get("old_log_prob", fixed_N).detach())
    return coefficient * (fixed_N - columns["teacher_log_prob"].detach()) * ratio_N


def _minillm_columns(
    responses: Responses,
    *,
    gamma: float = 1.0,
    own_token: float = 0.0,
    length_norm: float = 1.0,
    reward_scale: float = 1.0,
    clip: float = 1e6,
    whiten: float = 0.0,
) -> dict[str, Tensor]:
    form = ReturnForm(
        own_token=bool(own_token),
        gamma=gamma,
        length_norm=bool(length_norm),
        reward_scale=reward_scale,
        clip=clip,
        whiten=bool(whiten),
    )
    log_ratio_BT = responses.teacher_log_prob_BT - responses.log_prob_BT
    weight_BT = importance_weights(responses.log_prob_BT, responses.sampler_log_prob_BT, responses.mask_BT)
    return {"advantage": minillm_returns(log_ratio_BT, responses.mask_BT, form), "importance_weight": weight_BT}


@register_policy(
    "-w A log q(y)",
    "Gu et al., arXiv:2306.08543 (its long term)",
    ("advantage", "importance_weight"),
    prepare=_minillm_columns,
    weights=("importance_weight",),
    gamma=Range(0, 1),
    own_token=SWITCH,
    length_norm=SWITCH,
    reward_scale=Range(0, 1000, open_low=True),
    clip=Range(0, 1e6, open_low=True),
    whiten=SWITCH,
)
def minillm_long(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """MiniLLM's long term: reinforce on `minillm_returns` as advantage, weighted by `importance_weights`.

    With the "paper" form (the defaults) add `reverse_kl` per token, weighted by w as well: the single-step term. The
    other parameters are those of `ReturnForm`; switches are 0 or 1.
    """
    return columns["importance_weight"].detach() * reinforce(log_prob_N, columns)


def _position_weights(responses: Responses, *, boost: float = 0.5) -> dict[str, Tensor]:
    gap_BT = torch.where(responses.mask_BT.bool(), responses.log_prob_BT - responses.teacher_log_prob_BT, 0.0).abs()
    before_BT = gap_BT.cumsum(1) - gap_BT
    share_BT = before_BT / gap_BT.sum(1, keepdim=True).clamp(min=1e-12)
    return {"position_weight": torch.where(responses.mask_BT.bool(), 1 + boost * (1 - share_BT), 0.0)}


@register_policy(
    "-w r A, A as in on_policy_distillation, w = 1 + boost (1 - sum of |A| before the token / sum of |A|)",
    "Xie et al., arXiv:2606.22600 (IW-OPD)",
    ("teacher_log_prob", "position_weight"),
    optional=("old_log_prob",),
    prepare=_position_weights,
    weights=("position_weight",),
    coefficient=Range(0, 1000),
    boost=Range(0, 1000),
)
def iw_on_policy_distillation(log_prob_N: Tensor, columns: Columns, *, coefficient: float = 1.0) -> Tensor:
    """`on_policy_distillation` with more weight on early tokens: 1 + boost at the first, 1 where all of the gap lies
    behind.

    Limit: on_policy_distillation with boost 0. The weight's form was taken from a reading of its implementation in TRL,
    not confirmed in the paper.
    """
    return columns["position_weight"].detach() * on_policy_distillation(log_prob_N, columns, coefficient=coefficient)
