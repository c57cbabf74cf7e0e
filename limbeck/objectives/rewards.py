"""Losses on rewards of whole answers, and how rewards become advantages (`training/rewards.py` gives the rewards).

Shapes: N response tokens, G prompts, K samples of a prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.objectives.parameters import Range
from limbeck.objectives.policy import K1_REMEDY, LOG_CAP, Columns, probability_ratio, register_policy
from limbeck.objectives.precision import full_precision
from limbeck.types import UserError

LENGTH_WEIGHT = "length_weight"  # the column with what makes answers, tokens or sums count alike (`length_weights`)


@register_policy("-A log q(y)", "Williams 1992, doi:10.1007/BF00992696", ("advantage",))
def reinforce(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: that of -E_q[A]. Samples of an older student make it biased: use `ppo_clip`
    there."""
    return -columns["advantage"].detach() * log_prob_N


@register_policy(
    "-min(r A, clip(r, 1 - low, 1 + high) A), r = q(y) / q_old(y)",
    "Schulman et al., arXiv:1707.06347",
    ("advantage", "old_log_prob"),
    clip_low=Range(0, 1, open_low=True),
    clip_high=Range(0, 1000, open_low=True),
)
def ppo_clip(log_prob_N: Tensor, columns: Columns, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """The gradient is reinforce's at r = 1, and 0 where A > 0 and r > 1 + high or A < 0 and r < 1 - low.

    No dual clip (A < 0, r large). With MiniLLM's mixture as the old student this is the clipped loss of its code.
    """
    advantage_N = columns["advantage"].detach()
    ratio_N = probability_ratio(log_prob_N, columns["old_log_prob"].detach())
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)


def _k1_k2_k3(log_prob_N: Tensor, reference_N: Tensor, estimator: str) -> Tensor:
    if estimator not in ("k1", "k2", "k3"):
        raise UserError(f"no KL estimator is named {estimator!r}; legal: k1, k2, k3")
    log_ratio_N = full_precision(log_prob_N) - full_precision(reference_N).detach()
    if estimator == "k1":
        return log_ratio_N
    if estimator == "k2":
        return 0.5 * log_ratio_N.square()
    back_N = (-log_ratio_N).clamp(max=LOG_CAP)
    return torch.expm1(back_N) - back_N


def kl_estimate(log_prob_N: Tensor, reference_log_prob_N: Tensor, estimator: str = "k1") -> Tensor:
    """KL(q || p) estimated from y ~ q, as values without gradient: to show, or to subtract from a reward.

    With d = log q - log p: k1 = d, unbiased, of either sign. k2 = d^2 / 2, biased, never negative. k3 = exp(-d) - 1 +
    d, unbiased, never negative (Schulman 2020, "Approximating KL divergence").
    """
    return _k1_k2_k3(log_prob_N, reference_log_prob_N, estimator).detach()


def kl_penalty(log_prob_N: Tensor, reference_log_prob_N: Tensor, estimator: str = "k2") -> Tensor:
    """The same as a loss. What its gradient is in expectation over y ~ q has little to do with how good the value is.

    k1: exactly 0, hence refused. k2: the gradient of KL(q || p), exactly. k3: that of KL(p || q), in logits q - p.
    Samples of an older student are not corrected for. UserError for k1 or an unknown estimator.
    """
    if estimator == "k1":
        raise UserError(f"kl_penalty: {K1_REMEDY}")
    return _k1_k2_k3(log_prob_N, reference_log_prob_N, estimator)


@register_policy(
    "w (log q(y) - log p(y))^2 / 2",
    "Schulman 2020, Approximating KL divergence",
    ("reference_log_prob",),
    optional=(LENGTH_WEIGHT,),
)
def kl_penalty_k2(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: at every prefix that of KL(q || reference). See `kl_penalty`.

    w is the weight by length that multiplies the advantages, too (`rollout.advantage.count`), so that both are sums
    over the same thing; 1 without rewards.
    """
    return _weighted(kl_penalty(log_prob_N, columns["reference_log_prob"], "k2"), columns)


@register_policy(
    "w (p(y) / q(y) - 1 - log(p(y) / q(y)))",
    "Shao et al., arXiv:2402.03300 (GRPO's penalty)",
    ("reference_log_prob",),
    optional=(LENGTH_WEIGHT,),
)
def kl_penalty_k3(log_prob_N: Tensor, columns: Columns) -> Tensor:
    """Expected gradient over y ~ q: that of KL(reference || q), not of the KL(q || reference) it estimates. w as in
    `kl_penalty_k2`: with `count: answers` each answer's mean, as in the paper."""
    return _weighted(kl_penalty(log_prob_N, columns["reference_log_prob"], "k3"), columns)


def _weighted(value_N: Tensor, columns: Columns) -> Tensor:
    return value_N * columns[LENGTH_WEIGHT].detach() if LENGTH_WEIGHT in columns else value_N


def _groups(reward_GK: Tensor, present_GK: Tensor | None, least: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards with 0 where absent, who is present, and how many of each group, [G, 1]."""
    reward_GK = full_precision(reward_GK.detach() if reward_GK.is_floating_point() else reward_GK.float())
    present_GK = torch.ones_like(reward_GK, dtype=torch.bool) if present_GK is None else present_GK.bool()
    if reward_GK.ndim != 2 or reward_GK.shape[1] < least or present_GK.shape != reward_GK.shape:
        raise UserError(
            f"rewards must be [prompts, samples] with at least {least} samples of each prompt; got"
            f" {tuple(reward_GK.shape)}"
        )
    if not torch.isfinite(reward_GK[present_GK]).all():
        raise UserError("a reward is not finite; mark a sample without a verdict as absent in `present`")
    return torch.where(present_GK, reward_GK, 0.0), present_GK, present_GK.sum(1, keepdim=True)


def rloo(reward_GK: Tensor, present_GK: Tensor | None = None) -> Tensor:
    """r_i minus the mean of the other samples of its prompt: unbiased, and each group sums to 0 (arXiv:2402.14740).

    An absent sample gets 0, and so does one left alone in its group, since nothing can be compared with it. UserError
    for fewer than 2 samples of a prompt, or a reward that is not finite.
    """
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK)
    others_GK = (reward_GK.sum(1, keepdim=True) - reward_GK) / (count_G1 - 1).clamp(min=1)
    differ_G1 = ~_equal(reward_GK, present_GK)  # where all are equal, rounding must not make a difference
    return torch.where(present_GK & differ_G1 & (count_G1 > 1), reward_GK - others_GK, 0.0)


def grpo(
    reward_GK: Tensor, present_GK: Tensor | None = None, *, scale_std: bool = True, eps: float = 1e-4
) -> tuple[Tensor, int]:
    """(r - group mean) / (group std + eps), or r - group mean when `scale_std` is False (Dr. GRPO, arXiv:2503.20783).

    Returns the advantages, and the number of groups whose rewards are all equal: they give exactly 0 and teach nothing.
    arXiv:2402.03300 writes std(r) and no more. This is the sample deviation (K - 1), which PyTorch's default made the
    usual one, so that learning rates carry over; the population's would give advantages sqrt(K / (K - 1)) larger.
    UserError as for `rloo`.
    """
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK)
    equal_G1 = _equal(reward_GK, present_GK)
    centred_GK = torch.where(
        present_GK & ~equal_G1, reward_GK - reward_GK.sum(1, keepdim=True) / count_G1.clamp(min=1), 0.0
    )
    if scale_std:
        variance_G1 = centred_GK.square().sum(1, keepdim=True) / (count_G1 - 1).clamp(min=1)
        centred_GK = centred_GK / (variance_G1.sqrt() + eps)
    return centred_GK, int((equal_G1 & (count_G1 > 0)).sum())


def equal_groups(reward_GK: Tensor, present_GK: Tensor | None = None) -> Tensor:
    """Whether all present rewards of a group are equal, [G]; a group without any is not."""
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK, least=1)
    return (_equal(reward_GK, present_GK) & (count_G1 > 0))[:, 0]


def _equal(reward_GK: Tensor, present_GK: Tensor) -> Tensor:
    """Whether the present rewards of a group are all equal, [G, 1]; True for a group without any."""
    low_G1 = reward_GK.masked_fill(~present_GK, math.inf).amin(1, keepdim=True)
    high_G1 = reward_GK.masked_fill(~present_GK, -math.inf).amax(1, keepdim=True)
    return low_G1 >= high_G1


SCALES = {  # by the baseline: those that are 0 only where reward - baseline is
    "group": ("group", "step", "none"),
    "others": ("group", "step", "none"),
    "step": ("step", "none"),
    "none": ("none",),
}


def advantages(
    reward_GK: Tensor,
    present_GK: Tensor | None = None,
    *,
    baseline: str = "group",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """(reward - baseline) / (deviation + eps), [G, K]; 0 for absent samples.

    `baseline`: `group` and `scale` `group` are `grpo`, `group` with `none` is Dr. GRPO, `others` with `none` is `rloo`;
    `step` subtracts the mean of all present samples, `none` nothing (Williams 1992). `scale` `step` divides by the
    sample deviation of all present samples. UserError as for `rloo`, but `step` and `none` take one sample a prompt;
    and for a scale that can be 0 where reward - baseline is not (`SCALES`).
    """
    if baseline not in ("group", "others", "step", "none") or scale not in ("group", "step", "none"):
        raise UserError(f"no advantage has the baseline {baseline!r} and the scale {scale!r}")
    if scale not in SCALES[baseline]:
        raise UserError(
            f"the baseline {baseline!r} with the scale {scale!r} divides by 0 where all rewards are equal, so that such"
            f" groups would outweigh all others; take the scale {' or '.join(SCALES[baseline])}"
        )
    compares = baseline in ("group", "others") or scale == "group"
    reward_GK, present_GK, count_G1 = _groups(reward_GK, present_GK, least=2 if compares else 1)
    if baseline == "group":
        centred_GK = grpo(reward_GK, present_GK, scale_std=False)[0]
    elif baseline == "others":
        centred_GK = rloo(reward_GK, present_GK)
    else:
        mean = reward_GK.sum() / present_GK.sum().clamp(min=1) if baseline == "step" else 0.0
        centred_GK = torch.where(present_GK, reward_GK - mean, 0.0)
        if baseline == "step" and bool(_equal(reward_GK.flatten()[None], present_GK.flatten()[None])):
            centred_GK = torch.zeros_like(centred_GK)  # rounding must not make a difference
    if scale == "none":
        return centred_GK
    if scale == "step":
        present_N = reward_GK[present_GK]
        return centred_GK / ((present_N.std() if len(present_N) > 1 else present_N.new_zeros(())) + eps)
    mean_G1 = reward_GK.sum(1, keepdim=True) / count_G1.clamp(min=1)
    squares_G1 = torch.where(present_GK, reward_GK - mean_G1, 0.0).square().sum(1, keepdim=True)
    return centred_GK / ((squares_G1 / (count_G1 - 1).clamp(min=1)).sqrt() + eps)


def length_weights(length_GK: Tensor, mode: str, *, constant: float | None = None) -> Tensor:
    """What multiplies each sample's advantage, where the loop sums over tokens and divides by their number n = sum |o|.

    With b samples of length > 0:
        token     1               every token counts the same (the loop as it is; DAPO, arXiv:2503.14476)
        sequence  n / (b |o_i|)   every sample counts the same: GRPO's 1 / |o_i|; long wrong answers are punished less
        per token constant  n / (b C)       the sum over tokens of each sample over a constant C, such as the longest
        allowed (Dr. GRPO)

    `length_GK` holds all samples of the step. The first two could weigh tokens in the loop as well (they sum to n); the
    third could not: dividing by the weights undoes a common factor. UserError for an unknown mode, no token, no
    `constant`.
    """
    if mode not in ("token", "sequence", "constant"):
        raise UserError(f"no length mode is named {mode!r}; legal: token, sequence, constant")
    if mode == "constant" and (constant is None or constant <= 0):
        raise UserError("mode 'constant' needs a constant above 0, such as the largest number of tokens of a response")
    there_GK, length_GK = length_GK > 0, length_GK.double()
    if not there_GK.any():
        raise UserError("no sample has a token: there is nothing to weigh")
    average = length_GK.sum() / there_GK.sum()
    over = {"token": average, "sequence": length_GK.clamp(min=1), "constant": average.new_tensor(constant or 1.0)}[mode]
    return torch.where(there_GK, average / over, 0.0).float()
