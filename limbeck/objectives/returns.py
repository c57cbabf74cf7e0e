"""What policy losses need of whole responses: importance weights, and MiniLLM's returns and sampling distribution.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from limbeck.objectives.parameters import Range
from limbeck.objectives.policy import LOG_CAP
from limbeck.objectives.precision import full_precision
from limbeck.types import UserError, nearest


def importance_weights(
    log_prob_BT: Tensor, sampler_log_prob_BT: Tensor, mask_BT: Tensor, mode: str = "token"
) -> Tensor:
    """q / sampler at each response token, 0 elsewhere, without gradient. Padding on either side.

    token   the current token alone: MiniLLM's approximation. Little variance, but biased: prefixes keep the sampler's
            rate, and on the single-step term it is no weight at all, since it averages to 1 over the token.
    prefix  the product over the response up to and including the token (the paper before it approximates). Unbiased for
            what depends on these tokens only, such as the single-step term; for the long term the future must be
            weighted
            too: give the token weights to `minillm_returns`. Its variance grows exponentially with the length.

    Log-weights above 20 are clamped to 20.
    """
    if mode not in ("token", "prefix"):
        raise UserError(f"no importance weight is named {mode!r}; legal: token, prefix")
    mask_BT = mask_BT.bool()
    log_ratio_BT = torch.where(
        mask_BT, full_precision(log_prob_BT.detach()) - full_precision(sampler_log_prob_BT.detach()), 0.0
    )
    log_weight_BT = log_ratio_BT.cumsum(1) if mode == "prefix" else log_ratio_BT
    return torch.where(mask_BT, log_weight_BT.clamp(max=LOG_CAP).exp(), 0.0)


@dataclass(frozen=True)
class ReturnForm:
    """How MiniLLM's returns are made: divide by `reward_scale`, clip, sum, divide by the count if `length_norm`,
    whiten."""

    own_token: bool = False
    gamma: float = 1.0
    length_norm: bool = True
    reward_scale: float = 1.0
    clip: float = math.inf
    whiten: bool = False


RETURN_FORMS = {
    "paper": ReturnForm(),
    "code": ReturnForm(own_token=True, gamma=0.95, reward_scale=0.5, clip=100.0, whiten=True),
}


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and (population) variance 1 over the response tokens only; 0 elsewhere."""
    mask_BT = mask_BT.bool()
    values_BT = torch.where(mask_BT, full_precision(values_BT.detach()), 0.0)
    count = mask_BT.sum().clamp(min=1)
    centred_BT = torch.where(mask_BT, values_BT - values_BT.sum() / count, 0.0)
    return centred_BT * torch.rsqrt(centred_BT.square().sum() / count + 1e-8)


def minillm_returns(
    log_ratio_BT: Tensor, mask_BT: Tensor, form: str | ReturnForm = "paper", *, token_weight_BT: Tensor | None = None
) -> Tensor:
    """R_t from rewards r_t = log p(y_t) - log q(y_t), without gradient, 0 where masked: the advantage of
    `minillm_long`.

        paper  R_t = sum_{t' > t} gamma^(t'-t) r_t' / (number of terms), gamma 1: the single-step term covers r_t
        code   R_t = sum_{t' >= t} gamma^(t'-t) r_t' / (number of terms), gamma 0.95, r / 0.5 clipped to +-100, whitened

    Change a part with `dataclasses.replace(RETURN_FORMS["paper"], length_norm=False)`: with that, y ~ q and the
    single-step term, the expected gradient is exactly the sequence-level reverse KL's. Length normalisation, gamma < 1,
    the clip and whitening each change it. The code form together with the single-step term counts r_t twice, as
    their code does. Masked positions are skipped: padding on either side or inside changes nothing. `token_weight_BT`
    (`importance_weights`, mode token) weights each later reward by the tokens up to it: with prefix weights the
    expectation is then exact under any sampler. The sum is a backward recursion.
    """
    if isinstance(form, str) and form not in RETURN_FORMS:
        raise UserError(f"no form of MiniLLM's returns is named {form!r}{nearest(form, RETURN_FORMS)}")
    how, mask_BT = RETURN_FORMS[form] if isinstance(form, str) else form, mask_BT.bool()
    reward_BT = torch.where(mask_BT, full_precision(log_ratio_BT.detach()) / how.reward_scale, 0.0).clamp(
        -how.clip, how.clip
    )
    weight_BT = torch.ones_like(reward_BT) if token_weight_BT is None else full_precision(token_weight_BT.detach())
    sum_BT = torch.zeros_like(reward_BT)
    total_B = torch.zeros_like(reward_BT[:, 0])
    for t in reversed(range(reward_BT.shape[1])):
        future_B = how.gamma * total_B
        sum_BT[:, t] = future_B + reward_BT[:, t] if how.own_token else future_B
        total_B = torch.where(mask_BT[:, t], weight_BT[:, t] * (reward_BT[:, t] + future_B), total_B)
    if how.length_norm:
        terms_BT = mask_BT.flip(1).cumsum(1).flip(1) - (0 if how.own_token else mask_BT.long())
        sum_BT = sum_BT / terms_BT.clamp(min=1)
    sum_BT = torch.where(mask_BT, sum_BT, 0.0)
    return whiten(sum_BT, mask_BT) if how.whiten else sum_BT


def teacher_mixed(teacher_logits: Tensor, student_logits: Tensor, alpha: float = 0.2) -> Tensor:
    """log(alpha p + (1 - alpha) q) over the last dimension, without gradient: MiniLLM samples its text from this.

    0.2 is the paper's alpha. Limits: log q at alpha 0, log p at 1. UserError for alpha outside [0, 1] or unlike shapes.
    """
    alpha = Range(0, 1).check("alpha", alpha)
    if teacher_logits.shape != student_logits.shape:
        raise UserError(
            f"teacher and student logits differ in shape: {tuple(teacher_logits.shape)} and"
            f" {tuple(student_logits.shape)}"
        )
    log_p, log_q = (log_softmax(full_precision(x.detach()), dim=-1) for x in (teacher_logits, student_logits))
    log_alpha = math.log(alpha) if alpha else -math.inf
    return torch.logaddexp(log_p + log_alpha, log_q + (math.log1p(-alpha) if alpha < 1 else -math.inf))
