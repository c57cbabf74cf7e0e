"""A loss term of a recipe: which evidence it reads, what it is normalised by, and its function at a given step.

Terms return sums or values, never means: the loop divides each term's sum once, by the global weight of its unit.

Shapes: R positions of a block, V vocabulary, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.objectives import consistency, dual
from limbeck.objectives.consistency import CONSISTENCY
from limbeck.objectives.divergence import DIVERGENCES, Divergence, ValueAndGradient
from limbeck.objectives.dual import DUAL_SPACE
from limbeck.objectives.head import Block
from limbeck.objectives.match import MATCHES, MatchSettings, match_settings
from limbeck.objectives.parameters import Range, checked, defaults_of
from limbeck.objectives.policy import POLICIES, Policy
from limbeck.objectives.rank import RANKINGS, Candidates, Ranking
from limbeck.objectives.schedule import Schedule, State, make_schedule
from limbeck.objectives.supervised import cross_entropy
from limbeck.types import RecipeError, nearest

Family = Literal["vocabulary", "ranking", "match", "consistency", "dual"]
Unit = Literal["token", "row", "group"]
WEIGHT = Range(0, float("inf"), open_high=True)
CROSS_ENTROPY = "cross_entropy"
STUDENT = "student"  # the tag of text that the student writes while it trains: what a policy gradient speaks of
BY = ("importance_weight", "position_weight")
SMOOTHING = {"label_smoothing": Range(0, 1, open_high=True)}


@dataclass(frozen=True)
class Term:
    """A loss with its schedules. `only` limits it to the text of one writer or task; `reads` names its evidence.

    `by` names a column whose numbers multiply its values, such as an importance weight; its divisor stays what it is.
    """

    name: str
    family: Family
    reads: frozenset[str]
    weight: Schedule
    params: Mapping[str, Schedule] = field(default_factory=dict)
    only: str | None = None
    by: str | None = None
    unit: Unit = "token"
    match: MatchSettings | None = None
    # of a loss in two spaces, and how many times as fast as the student its projections are trained
    divergence: str = ""
    projection_rate: float = 1.0

    @property
    def label(self) -> str:
        """Its name in metrics: two terms of one name differ in the text they are limited to."""
        return self.name if self.only is None else f"{self.name}@{self.only}"

    @property
    def softened(self) -> bool:
        """Whether it compares distributions at another temperature than 1, at some step."""
        return any(getattr(self.params.get("temperature"), end, 1) != 1 for end in ("start", "end"))

    def at_step(self, progress: float, states: Mapping[str, State]) -> TermAtStep:
        """The term with this step's weight and parameters."""
        params = {
            key: schedule.value(progress, states.get(f"{self.label}.{key}")) for key, schedule in self.params.items()
        }
        return TermAtStep(self, self.weight.value(progress, states.get(f"{self.label}.weight")), params)

    def after(self, states: dict[str, State], progress: float, loss: float, measured: float | None) -> None:
        """Let the adaptive schedules see the step's loss (or the term's measurement); `states` is updated."""
        for key, schedule in {"weight": self.weight, **self.params}.items():
            seen = measured if schedule.shape == "measured" else loss
            if schedule.remembers and seen is not None:
                name = f"{self.label}.{key}"
                states[name] = schedule.after(states.get(name), progress, seen)


@dataclass(frozen=True)
class TermAtStep:
    """A term at one step: numbers where the term has schedules."""

    term: Term
    weight: float
    params: Mapping[str, float]

    @property
    def label(self) -> str:
        return self.term.label

    def values(self, block: Block) -> ValueAndGradient:
        """Of a term over the vocabulary: values [R] in nats and their gradient for the logits [R, V]."""
        values_R, gradient_RV = self._values(block)
        if self.term.by is None:
            return values_R, gradient_RV
        by_R = block.columns[self.term.by].to(values_R.dtype)
        return values_R * by_R, gradient_RV.mul_(by_R[:, None])

    def _values(self, block: Block) -> ValueAndGradient:
        name = self.term.name
        if name == CROSS_ENTROPY:
            return cross_entropy(block.q, block.targets_R, **self.params)
        if name in DIVERGENCES:
            assert block.teacher is not None, f"{name} needs the teacher's distribution"
            return block.teacher.compare(DIVERGENCES[name], self.params, block.q, block.targets_R)
        return _policy_values(POLICIES[name], block, self.params)

    def group_values(self, candidates: Candidates) -> Tensor:
        """Of a ranking term: values [G]."""
        return RANKINGS[self.term.name].fn(candidates, **self.params)


def _policy_values(policy: Policy, block: Block, params: Mapping[str, float]) -> ValueAndGradient:
    """A loss on the written token's log-probability; its slope is taken by autograd, the rest is the softmax."""
    index_R1 = block.targets_R[:, None]
    columns = dict(block.columns)
    if "teacher_log_prob" in policy.reads and "teacher_log_prob" not in columns and block.teacher is not None:
        columns["teacher_log_prob"] = block.teacher.log_prob(block.targets_R)
    with torch.enable_grad():
        log_prob_R = block.q.log.gather(-1, index_R1)[:, 0].detach().requires_grad_()
        values_R = policy(log_prob_R, columns, params)
        (slope_R,) = torch.autograd.grad(values_R.sum(), log_prob_R)
    gradient_RV = block.q.prob * -slope_R[:, None]
    return values_R.detach(), gradient_RV.scatter_add_(-1, index_R1, slope_R[:, None])


def make_term(name: str, params: Mapping[str, Any], weight: object = 1.0, path: str = "") -> Term:
    """The term `name` with its parameters checked. Any number may be a schedule, `{from: 1, to: 0, shape: linear}`.

    Raises:
        RecipeError: unknown term or parameter, or a value out of range; `path` is the term's place in the recipe.
    """
    rest = dict(params)
    only = rest.pop("only", None)
    if only is not None and not isinstance(only, str):
        raise RecipeError(
            f"{path}.only".lstrip("."), f"{only!r} is not the name of a writer, such as teacher, or of a task"
        )
    weighed = make_schedule(weight, f"{path}.weight".lstrip("."), WEIGHT.check)
    by = rest.pop("by", None)
    if by is not None and (by not in BY or name in MATCHES or name in RANKINGS or name in (CONSISTENCY, DUAL_SPACE)):
        raise RecipeError(
            f"{path}.by".lstrip("."), f"{by!r} is no number beside every token for {name}; legal: {', '.join(BY)}"
        )
    known: Divergence | Policy | Ranking
    if name in MATCHES:
        settings, unit = match_settings(name, rest, path)
        return Term(name, "match", frozenset({"teacher_features"}), weighed, {}, only, None, unit, settings)
    if name == CROSS_ENTROPY:
        schedules = _schedules(name, defaults_of(cross_entropy), SMOOTHING, rest, path)
        return Term(name, "vocabulary", frozenset({"tokens"}), weighed, schedules, only, by)
    if name == DUAL_SPACE:
        divergence, times = _two_spaces(rest, path)
        reads = frozenset({"teacher_states"})
        return Term(name, "dual", reads, weighed, only=only, divergence=divergence, projection_rate=times)
    if name in DIVERGENCES:
        known = DIVERGENCES[name]
        schedules = _schedules(name, known.defaults, known.ranges, rest, path)
        return Term(name, "vocabulary", frozenset({"teacher_distribution"}), weighed, schedules, only, by)
    if name in POLICIES:
        known = POLICIES[name]
        if only not in (None, STUDENT):
            raise RecipeError(
                f"{path}.only".lstrip("."),
                f"{name} speaks of text that the student writes while it trains; leave `only` out",
            )
        made = {"teacher_log_prob", *(known.reads if known.prepare else ())}
        reads = frozenset(known.reads) - made | ({"teacher_distribution"} if made & set(known.reads) else frozenset())
        schedules = _schedules(name, known.defaults, known.ranges, rest, path)
        return Term(name, "vocabulary", reads | {STUDENT}, weighed, schedules, only or STUDENT, by)
    if name == CONSISTENCY:
        if only is not None:
            raise RecipeError(
                f"{path}.only".lstrip("."),
                f"{name} compares all answers to a prompt, so it can't be limited to one kind",
            )
        schedules = _schedules(name, consistency.DEFAULTS, consistency.RANGES, rest, path)
        return Term(name, "consistency", frozenset({"answers"}), weighed, schedules, None, None, "group")
    if name in RANKINGS:
        known = RANKINGS[name]
        if only is not None:
            raise RecipeError(
                f"{path}.only".lstrip("."), f"{name} compares the answers of all writers, so it can't be limited to one"
            )
        schedules = _schedules(name, known.defaults, known.ranges, rest, path)
        if known.measures is not None and "baseline" not in rest:
            schedules["baseline"] = Schedule(0.0, 0.0, "measured")
        reads = frozenset({"answers", *({f"reference_{known.reference}"} if known.reference != "none" else ())})
        return Term(name, "ranking", reads, weighed, schedules, None, None, "group")
    raise RecipeError(
        path,
        f"no loss is named {name!r}"
        + nearest(name, [*DIVERGENCES, *RANKINGS, *MATCHES, *POLICIES, CONSISTENCY, DUAL_SPACE, CROSS_ENTROPY]),
    )


def _two_spaces(params: Mapping[str, Any], path: str) -> tuple[str, float]:
    """The settings of a loss in two spaces: (which divergence, how fast its projections are trained)."""
    values = dual.DEFAULTS | dict(params)
    if unknown := sorted(values.keys() - dual.DEFAULTS.keys()):
        raise RecipeError(
            f"{path}.{unknown[0]}".lstrip("."),
            f"{DUAL_SPACE} has no such parameter{nearest(unknown[0], dual.DEFAULTS)}",
        )
    name = values["divergence"]
    if name not in DIVERGENCES:
        raise RecipeError(
            f"{path}.divergence".lstrip("."), f"no divergence is named {name!r}{nearest(str(name), DIVERGENCES)}"
        )
    Range(0, 1000, open_low=True).check(f"{path}.projection_rate".lstrip("."), values["projection_rate"])
    return str(name), float(values["projection_rate"])


def _schedules(
    name: str, defaults: Mapping[str, float], ranges: Mapping[str, Range], params: Mapping[str, Any], path: str
) -> dict[str, Schedule]:
    """Every parameter as a schedule: constant defaults, and what the recipe says."""
    constant = {key: value for key, value in params.items() if key not in defaults or not isinstance(value, Mapping)}
    values = checked(name, defaults, ranges, constant, path)
    schedules = {key: Schedule(value, value) for key, value in values.items()}
    for key in params.keys() - constant.keys():
        schedules[key] = make_schedule(params[key], f"{path}.{key}".lstrip("."), ranges[key].check)
    return schedules
