"""Ranking losses: several answers to one prompt, the best first; one value per group, in nats unless the docstring says
otherwise.

They see an answer only through the sum of its tokens' log-probabilities and its length, so whoever walks the tokens
is not their concern. Everything is computed in fp32 (fp64 inputs stay fp64); hand in sums that were added up in fp32,
since a bf16 sum has lost its last nats already. A loss is one function here, registered by its decorator.

Shapes: G groups (prompts), K answers of a group. An answer that is absent changes nothing, whatever stands in its
place. A group with one answer has no pair, so its preference loss is 0; an SFT part stays. `kto` alone needs no pair.
Answers are ranked strictly: a tie can't be said, so leave one of the two out. Sources and limits stand in each
docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from limbeck.objectives.parameters import Range, checked, defaults_of
from limbeck.objectives.precision import full_precision
from limbeck.types import RecipeError, UserError, nearest

RankingFn = Callable[..., Tensor]
Reference = Literal["none", "start", "teacher"]


@dataclass(frozen=True)
class Candidates:
    """G groups of up to K answers to the same prompt, the best first; `present_GK` is False where a group has fewer.

    `log_prob_GK` is the sum over the answer's `length_GK` tokens of log q(token), in nats, differentiable.
    `reference_GK` is the same sum under the frozen reference: the student before training, or the teacher for `dpkd`;
    no gradient flows into it.
    """

    log_prob_GK: Tensor
    length_GK: Tensor
    present_GK: Tensor
    reference_GK: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.log_prob_GK.shape
        others = [self.length_GK, self.present_GK] + ([] if self.reference_GK is None else [self.reference_GK])
        if len(shape) != 2 or any(other.shape != shape for other in others) or self.present_GK.dtype != torch.bool:
            shapes = [tuple(shape), *(tuple(other.shape) for other in others)]
            raise UserError(f"candidates must all be [groups, answers], and present must be boolean; got {shapes}")
        if (self.present_GK & (self.length_GK < 1)).any():
            raise UserError(
                "an answer without tokens can't be ranked; count its end-of-sequence token or mark it absent"
            )

    def where_present(self, values_GK: Tensor) -> Tensor:
        """The values in fp32 or better, 0 where absent."""
        return full_precision(values_GK).masked_fill(~self.present_GK, 0.0)

    @property
    def log_ratio_GK(self) -> Tensor:  # noqa: N802 (shape)
        """log q(answer) - log reference(answer), 0 where absent. UserError where there is no reference."""
        if self.reference_GK is None:
            raise UserError(
                "this ranking loss compares with a reference; score the answers with it first and give `reference_GK`"
            )
        return self.where_present(full_precision(self.log_prob_GK) - full_precision(self.reference_GK.detach()))

    def per_token(self, values_GK: Tensor) -> Tensor:
        """The values divided by the answers' lengths."""
        return values_GK / self.length_GK.masked_fill(~self.present_GK, 1).to(values_GK.dtype)

    @property
    def mean_log_prob_GK(self) -> Tensor:  # noqa: N802 (shape)
        """log q(answer) / its length, 0 where absent."""
        return self.per_token(self.where_present(self.log_prob_GK))

    def best_index(self) -> Tensor:
        """The first present answer of each group, [G, 1]."""
        return self.present_GK.int().argmax(-1, keepdim=True)

    def best(self, values_GK: Tensor) -> Tensor:
        """The first present answer's value, [G]."""
        return values_GK.gather(-1, self.best_index()).squeeze(-1)

    def worst(self, values_GK: Tensor) -> Tensor:
        """The last present answer's value, [G]."""
        index_G1 = self.present_GK.shape[1] - 1 - self.present_GK.flip(-1).int().argmax(-1, keepdim=True)
        return values_GK.gather(-1, index_G1).squeeze(-1)

    def margin(self, values_GK: Tensor) -> Tensor:
        """How far the best answer's value stands above the worst one's, [G]."""
        return self.best(values_GK) - self.worst(values_GK)

    def where_paired(self, values_G: Tensor) -> Tensor:
        """The values, 0 for a group with fewer than two answers."""
        return values_G.masked_fill(self.present_GK.sum(-1) < 2, 0.0)


@dataclass(frozen=True)
class Ranking:
    """A registered ranking loss: `fn(candidates, **params) -> values_G`. `reference` says who the frozen reference is.

    `measures` gives the (sum, count) of what the loss wants to know of each step: `baseline` is their ratio a step
    later.
    """

    name: str
    fn: RankingFn
    formula: str
    paper: str
    reference: Reference
    ranges: dict[str, Range] = field(default_factory=dict)
    measures: Callable[[Candidates], tuple[Tensor, Tensor]] | None = None

    @property
    def defaults(self) -> dict[str, float]:
        return defaults_of(self.fn)


RANKINGS: dict[str, Ranking] = {}
POSITIVE = Range(0, math.inf, open_low=True, open_high=True)
NOT_NEGATIVE = Range(0, math.inf, open_high=True)
FLIPPED_SHARE = Range(0, 0.5, open_high=True)


def _register(formula: str, paper: str, reference: Reference, **ranges: Range) -> Callable[[RankingFn], RankingFn]:
    def add(fn: RankingFn) -> RankingFn:
        RANKINGS[fn.__name__] = Ranking(fn.__name__, fn, formula, paper, reference, ranges)
        return fn

    return add


@_register(
    "-(1-e) log s(b h) - e log s(-b h), h = ratio_best - ratio_worst",
    "Rafailov et al., arXiv:2305.18290; e: Mitchell's cDPO note",
    "start",
    beta=POSITIVE,
    label_smoothing=FLIPPED_SHARE,
)
def dpo(candidates: Candidates, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation; `label_smoothing` e > 0 is conservative DPO: a share e of the labels may be
    flipped.

    Limits: ln 2 where the student equals the reference. For e > 0 the minimum is at b h = log((1-e) / e), so the
    margin stops growing. Only the difference is pushed: the best answer's own log-probability may fall.
    """
    scaled_G = beta * candidates.margin(candidates.log_ratio_GK)
    return candidates.where_paired(
        -(1 - label_smoothing) * logsigmoid(scaled_G) - label_smoothing * logsigmoid(-scaled_G)
    )


@_register(
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


@_register(
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


@_register(
    "(h - 1/(2b))^2, h = ratio_best - ratio_worst", "Azar et al., arXiv:2310.12036 (as printed)", "start", beta=POSITIVE
)
def ipo_sum(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation on whole answers' log ratios, in squared nats: long answers weigh more."""
    return _squared_distance(candidates, candidates.log_ratio_GK, beta)


def _squared_distance(candidates: Candidates, ratio_GK: Tensor, beta: float) -> Tensor:
    return candidates.where_paired((candidates.margin(ratio_GK) - 1 / (2 * beta)).square())


@_register(
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


@_register(
    "w_d (1 - s(b (ratio_best - z))) + sum_others w_u (1 - s(b (z - ratio)))",
    "Ethayarajh et al., arXiv:2402.01306",
    "start",
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

    It needs no pair, so a lone answer counts as desirable. `baseline` z is the estimate of KL(student || reference)
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


def kto_baseline(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """(sum, count) of the log ratios of the present answers, detached: add them over micro-batches and ranks.

    The paper takes answers to *other* prompts of the batch, scored under this one, so these are not the candidates
    that `kto` trains on. It is not clamped here: clamping each part before adding would bias the estimate upwards.
    """
    return candidates.log_ratio_GK.detach().sum(), candidates.present_GK.sum()


RANKINGS["kto"] = replace(RANKINGS["kto"], measures=kto_baseline)


def clamped_baseline(total: float, count: float) -> float:
    """max(0, total / count), the estimate of KL(student || reference) that `kto` takes; 0 without answers."""
    return max(0.0, total / count) if count else 0.0


@_register(
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


@_register(
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


@_register(
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


@_register(
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
    return _plackett_luce(candidates.mean_log_prob_GK, candidates.present_GK) - sft_weight * pairs_G * best_G


def _plackett_luce(score_GK: Tensor, present_GK: Tensor) -> Tensor:
    """-log of the probability that drawing without replacement in proportion to exp(score) gives the order, [G]."""
    itself_KK = torch.eye(score_GK.shape[1], dtype=torch.bool, device=score_GK.device)
    # Row k holds the answers that stand at k or behind it. An absent answer keeps its own row finite; it is struck
    # below.
    left_GKK = present_GK.unsqueeze(-2).expand(-1, score_GK.shape[1], -1).triu(1) | itself_KK
    tail_GK = score_GK.unsqueeze(-2).masked_fill(~left_GKK, -math.inf).logsumexp(-1)
    return (tail_GK - score_GK).masked_fill(~present_GK, 0.0).sum(-1)


@_register("-log s(b h), h = ratio_data - ratio_own", "Chen et al., arXiv:2401.01335", "start", beta=POSITIVE)
def spin(candidates: Candidates, *, beta: float = 0.1) -> Tensor:
    """Self-play fine-tuning with the logistic loss: DPO's formula, but nobody judged the answers.

    The best answer is the data's (or the teacher's), the worst was written by the previous round's student, and that
    same student is the reference; so both start anew each round. b is the paper's lambda.
    """
    return dpo(candidates, beta=beta)


@_register(
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


def bradley_terry(reward_GK: Tensor, present_GK: Tensor, preference_G: Tensor | None = None) -> Tensor:
    """The log loss of a reward model on ranked answers, the best first: [G] in nats.

    Without `preference_G` the order is certain: Plackett-Luce over the present answers, Bradley-Terry for two. With it,
    K = 2 and -(c log s(r1 - r2) + (1-c) log s(r2 - r1)), c in [0, 1] the probability that the first is better.
    Shifting a group's rewards changes nothing. A group with fewer than two answers gives 0. UserError for soft labels
    at K > 2.
    """
    reward_GK = full_precision(reward_GK).masked_fill(~present_GK, 0.0)
    if preference_G is None:
        return _plackett_luce(reward_GK, present_GK)
    if reward_GK.shape[1] != 2 or preference_G.shape != reward_GK.shape[:1]:
        raise UserError(
            f"soft preferences need two answers a group and one number each; got {tuple(reward_GK.shape)} and"
            f" {tuple(preference_G.shape)}"
        )
    gap_G = reward_GK[:, 0] - reward_GK[:, 1]
    first_G = preference_G.to(reward_GK.dtype)
    return (-first_G * logsigmoid(gap_G) - (1 - first_G) * logsigmoid(-gap_G)).masked_fill(~present_GK.all(-1), 0.0)


def checked_ranking_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The ranking loss's parameters with defaults filled in.

    Raises:
        RecipeError: an unknown loss or parameter, or a value outside its range; `path` says where it stood.
    """
    if name not in RANKINGS:
        raise RecipeError(path, f"no ranking loss is named {name!r}{nearest(name, RANKINGS)}")
    return checked(name, RANKINGS[name].defaults, RANKINGS[name].ranges, params, path)
