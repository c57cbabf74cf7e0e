"""Ranking losses: several answers to one prompt, the best first, as a loss of a recipe.

A ranking loss is one function, registered by its decorator: those with a reference are in `preference.py`, those
without in `reference_free.py`. It sees an answer only through the sum of its tokens' log-probabilities and its length.
Everything is computed in fp32 (fp64 stays fp64); the sums must have been added up in fp32, since a bf16 sum has lost
its last nats already.

An absent answer changes nothing, whatever its numbers are. A group with one answer has no pair, so its preference loss
is 0; an SFT part stays. `kto` alone needs no pair. Answers are ranked strictly: leave one of two tied answers out.

Shapes: B rows, G groups (prompts), K answers of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.objectives.facts import TextFacts
from limbeck.objectives.forward import StudentForward, TermSum
from limbeck.objectives.loss import STUDENT, Loss, LossAtStep, LossSettings
from limbeck.objectives.parameters import Range, check_numbers, defaults_of
from limbeck.objectives.precision import full_precision
from limbeck.objectives.registry import LossesOf, register
from limbeck.objectives.schedule import Schedule
from limbeck.types import PROBABILITY, RecipeError, UserError, nearest

RankingFn = Callable[..., Tensor]
Reference = Literal["none", "start", "teacher"]
Measure = Callable[["Candidates"], tuple[Tensor, Tensor]]
POSITIVE = Range(0, math.inf, open_low=True, open_high=True)
NOT_NEGATIVE = Range(0, math.inf, open_high=True)


@dataclass(frozen=True)
class Candidates:
    """G groups of up to K answers to the same prompt, the best first; `present_GK` is False where a group has fewer.

    `log_prob_GK` is the sum over the answer's `length_GK` tokens of log q(token), in nats, differentiable.
    `reference_GK` is the same sum under the frozen reference: the student before training, or the teacher for `dpkd`;
    no gradient flows into it. `probability_G` is that of the first answer being the better one, NaN where nobody says.
    """

    log_prob_GK: Tensor
    length_GK: Tensor
    present_GK: Tensor
    reference_GK: Tensor | None = None
    probability_G: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.log_prob_GK.shape
        others = [self.length_GK, self.present_GK] + ([] if self.reference_GK is None else [self.reference_GK])
        if len(shape) != 2 or any(other.shape != shape for other in others) or self.present_GK.dtype != torch.bool:
            shapes = [tuple(shape), *(tuple(other.shape) for other in others)]
            raise UserError(f"candidates must all be [groups, answers], and present must be boolean; got {shapes}")
        if self.probability_G is not None and self.probability_G.shape != shape[:1]:
            raise UserError(f"{shape[0]} groups need one probability each; got {tuple(self.probability_G.shape)}")
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
        """The best answer's value minus the worst one's, [G]."""
        return self.best(values_GK) - self.worst(values_GK)

    def where_paired(self, values_G: Tensor) -> Tensor:
        """The values, 0 for a group with fewer than two answers."""
        return values_G.masked_fill(self.present_GK.sum(-1) < 2, 0.0)


def candidates_of(data: StudentForward, reference: str) -> Candidates:
    """The groups of answers in a micro-batch, with their log-probabilities under the frozen model `reference`."""
    batch = data.batch
    device = data.hidden_ND.device
    most = max(len(group) for group in batch.groups)
    row_GK = torch.tensor([[*group, *[group[0]] * (most - len(group))] for group in batch.groups], device=device)
    present_GK = torch.tensor([[k < len(group) for k in range(most)] for group in batch.groups], device=device)
    length_B = batch.mask_BT.sum(1).to(device)
    reference_GK = None if reference == "none" else batch.references[reference].to(device)[row_GK]
    probability_B = batch.labels.get(PROBABILITY)
    probability_G = None if probability_B is None else probability_B.to(device)[row_GK[:, 0]]
    return Candidates(
        data.answer_log_prob_B[row_GK], length_B[row_GK], present_GK, reference_GK, probability_G=probability_G
    )


@dataclass(frozen=True, kw_only=True)
class Ranking(Loss):
    """A ranking loss `fn(candidates, **params) -> values_G`. `reference` says which frozen model is the reference.

    `measures` gives the (sum, count) of what the loss measures at each step: their ratio, at least 0, is its parameter
    `baseline` a step later. `labels` are those of a pair's labels that it reads.
    """

    fn: RankingFn
    reference: Reference
    measures: Measure | None = None
    labels: frozenset[str] = frozenset()

    ranks: ClassVar[bool] = True
    unlimited: ClassVar[str] = "compares the answers of all writers, so it can't be limited to one"

    @property
    def defaults(self) -> Mapping[str, float]:
        return defaults_of(self.fn)

    def parse(self, params: Mapping[str, Any], path: str) -> tuple[dict[str, Schedule], dict[str, Any]]:
        schedules, values = super().parse(params, path)
        if self.measures is not None and "baseline" not in params:
            schedules["baseline"] = Schedule(0.0, 0.0, "measured")
        return schedules, values

    def check_text(self, settings: LossSettings, facts: TextFacts) -> None:
        super().check_text(settings, facts)
        if self.reference != "none" and STUDENT in facts.writers:
            raise RecipeError(
                settings.path,
                f"{self.name} compares with a frozen model's opinion, which text written while training does not have",
            )
        if not facts.ranked_answers:
            raise RecipeError(
                settings.path,
                f"{self.name} compares answers to one prompt, and here every prompt has one: let all writers answer"
                " every prompt (leave their shares out, the preferred writer first), end `elicit` with pairs or lists,"
                " or give a corpus with `answers` or `chosen` and `rejected`",
            )
        if unread := sorted((facts.labels or frozenset()) - self.labels):
            readers = "bradley_terry, or for a probability dpo"
            raise RecipeError(
                settings.path,
                f"{self.name} does not read the {' and '.join(unread)} that lines give their pairs, so all would count"
                f" alike: leave the column unread (prompts.columns: {{{unread[0]}: null}}), or use a loss that reads it"
                f" ({readers})",
            )

    def values(self, candidates: Candidates, params: Mapping[str, float]) -> Tensor:
        """Values [G] in nats, unless the function's docstring says otherwise."""
        return self.fn(candidates, **params)

    def evaluate(self, at_step: LossAtStep, data: StudentForward) -> TermSum:
        candidates = candidates_of(data, self.reference)
        values_G = self.values(candidates, at_step.params)
        measured = None
        if self.measures is not None:
            total, count = self.measures(candidates)
            measured = (float(total), float(count))
        values_G = values_G * data.batch.group_weights().to(values_G)
        return TermSum(at_step.scale * values_G.sum(), float(values_G.detach().cpu().double().sum()), measured)

    def measurement(self, total: float, count: float) -> float:
        return clamped_baseline(total, count)


RANKINGS = LossesOf(Ranking)


def register_ranking(
    formula: str,
    paper: str,
    reference: Reference,
    *,
    measures: Measure | None = None,
    labels: tuple[str, ...] = (),
    **ranges: Range,
) -> Callable[[RankingFn], RankingFn]:
    """Register the function below as a ranking loss under its own name.

    `ranges` are the legal values of its parameters, whose defaults are those of its signature; `labels` what it reads
    of what lines say of their pairs.
    """

    def add(fn: RankingFn) -> RankingFn:
        evidence = {"answers"} if reference == "none" else {"answers", f"reference_{reference}"}
        register(
            Ranking(
                name=fn.__name__,
                formula=formula,
                paper=paper,
                reads=frozenset(evidence),
                unit="group",
                ranges=ranges,
                fn=fn,
                reference=reference,
                measures=measures,
                labels=frozenset(labels),
            )
        )
        return fn

    return add


def clamped_baseline(total: float, count: float) -> float:
    """max(0, total / count), the estimate of KL(student || reference) that `kto` takes; 0 without answers."""
    return max(0.0, total / count) if count else 0.0


def checked_ranking_params(name: str, params: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The ranking loss's parameters with defaults filled in.

    Raises:
        RecipeError: an unknown loss or parameter, or a value outside its range; `path` is its place.
    """
    if name not in RANKINGS:
        raise RecipeError(path, f"no ranking loss is named {name!r}{nearest(name, RANKINGS)}")
    return check_numbers(name, RANKINGS[name].defaults, RANKINGS[name].ranges, params=params, path=path)
