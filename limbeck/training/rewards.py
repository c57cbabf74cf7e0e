"""Rewards: what the student's answers are worth, and the advantages that follow from the rewards of a step.

A reward is declared in one place: its fields are its parameters in a recipe, its docstring is what the documentation
says of it. A reward that can't be told is None, or the word that says why, never a number; an answer with such a reward
teaches nothing.

Shapes: G prompts of a step, K answers to each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field, ValidationError, model_validator

from limbeck.config.recipe import explain
from limbeck.config.section import Section
from limbeck.config.sections import Advantage, RewardEntry
from limbeck.elicit.compare import Compare
from limbeck.elicit.flow import Pool
from limbeck.elicit.prompt import Prompt
from limbeck.elicit.rate import Rate
from limbeck.elicit.rubric import Rubric
from limbeck.elicit.soft_preference import SoftPreference
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.verify import parse_check, verify
from limbeck.models.scores import Conversation, load_scorer
from limbeck.objectives.rewards import advantages, length_weights
from limbeck.training.judges import SILENT, Feedback, JudgeBy, judged_by
from limbeck.training.rollout_stats import repeated
from limbeck.training.scored import Scored
from limbeck.types import RecipeError, UserError, nearest


@dataclass(frozen=True)
class Judged:
    """An answer of the student as rewards see it.

    Args:
        text: with the thinking that its prompt opened, if it did.
        ids: as sampled.
        finished: whether it ended by itself.
        max_tokens: how many tokens it may have had.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    finished: bool
    max_tokens: int


class Scores(Protocol):
    """A reward model."""

    def score(self, conversations: Sequence[Conversation], /) -> list[float | None]:
        """The score of each conversation; None for one that it can't read."""


LoadScores = Callable[[str], Scores]  # a reward model by its name in the recipe
Value = float | str | None  # a reward; one that can't be told is None, or says why


def nobody(_: Feedback, __: Pool) -> Pool:
    """Stands for the models of a run where there is none."""
    raise UserError("a judge is one of a run's models, and there is no run here")


@dataclass(frozen=True)
class Readers:
    """Who reads answers for rewards: reward models by their names, and judges through a step of feedback."""

    load: LoadScores = load_scorer
    judge: JudgeBy = nobody


class Reward(Section):
    """A reward: implement `of`, or where answers are best judged together `of_all`."""

    name: ClassVar[str] = ""
    bounds: ClassVar[tuple[float, ...]] = ()  # the least and the largest, where they are known

    def of(self, answer: Judged) -> float | None:
        """The reward of an answer; None if it can't be told."""
        raise NotImplementedError

    def of_all(self, answers: Sequence[Judged], readers: Readers) -> Sequence[Value]:  # noqa: ARG002 (a model's)
        """The reward of each answer of a step."""
        return [self.of(answer) for answer in answers]

    def refuse(self, path: str, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Refuse prompts whose answers it can't judge, or a reward that is the same for all answers of at most
        `max_tokens`. RecipeError with the remedy."""


class CheckReward(Reward):
    """1 if the answer ended by itself and passes its prompt's check, else 0: a cut-off one is not right, whatever it
    says. `by` is one check for all prompts in the place of theirs, such as {type: pattern, pattern: "yes|no"} (the
    checks of docs/evaluation.md). What follows the thinking is judged, and thinking without an end does not pass."""

    name = "check"
    by: dict[str, Any] | None = None

    def of(self, answer: Judged) -> float | None:
        verdict = verify(self.by or answer.prompt.check, answer.text)
        return None if verdict is None else float(verdict and answer.finished)

    def refuse(self, path: str, prompts: Sequence[Prompt], max_tokens: int) -> None:  # noqa: ARG002 (any length)
        if self.by is not None:
            try:
                parse_check(self.by, f"{path}.by")
            except UserError as error:
                raise RecipeError("", str(error)) from None
        elif unchecked := [prompt for prompt in prompts if prompt.check is None]:
            raise RecipeError(
                path,
                f"{len(unchecked)} of {len(prompts)} prompts have no check, such as that at {unchecked[0].place}; give"
                " each one, or one for all under `by`",
            )


class FinishedReward(Reward):
    """1 if the answer ended by itself, 0 if it ran into max_tokens."""

    name = "finished"

    def of(self, answer: Judged) -> float:
        return float(answer.finished)


class LengthReward(Reward):
    """0 up to `free` tokens, from there linearly down to -1 at `most` (by default the writer's max_tokens) and beyond:
    DAPO's soft punishment of overlong answers (Yu et al., arXiv:2503.14476)."""

    name = "length"
    free: Annotated[int, Field(ge=0)]
    most: Annotated[int, Field(ge=1)] | None = None

    def of(self, answer: Judged) -> float:
        most = self.most or answer.max_tokens
        if len(answer.ids) <= self.free:
            return 0.0
        return -1.0 if len(answer.ids) >= most else -(len(answer.ids) - self.free) / (most - self.free)

    def refuse(self, path: str, prompts: Sequence[Prompt], max_tokens: int) -> None:  # noqa: ARG002 (any prompt)
        if self.most is not None and self.most <= self.free:
            raise RecipeError(path, f"free is {self.free}, not below most, {self.most}")
        if self.free >= max_tokens:
            raise RecipeError(
                path,
                f"free is {self.free}, and no answer is longer than the writer's max_tokens, {max_tokens}: lower free",
            )


class RepetitionReward(Reward):
    """Minus the share of the answer's `gram`-grams of tokens that have occurred before: 0 for text that never repeats
    itself."""

    name = "repetition"
    gram: Annotated[int, Field(ge=1, le=50)] = 4

    def of(self, answer: Judged) -> float:
        return -repeated([answer.ids], self.gram)


class ThinkingReward(Reward):
    """1 if the answer thinks first, ends its thinking and then says something, else 0."""

    name = "thinking"

    def of(self, answer: Judged) -> float:
        said = after_thinking(answer.text)
        return float(bool(said and said.strip()) and said != answer.text)


class ModelReward(Reward):
    """What a reward model says of the conversation with the answer: the score of a run with `student.head: scalar`, or
    of a folder that AutoModelForSequenceClassification loads with one label. What follows the thinking is scored;
    an answer that says nothing gets the worst score of the step, and text beyond its context has none."""

    name = "model"
    path: str

    def of_all(self, answers: Sequence[Judged], readers: Readers) -> Sequence[Value]:
        texts = [after_thinking(answer.text) or "" for answer in answers]
        said = [bool(text.strip()) for text in texts]
        conversations = [
            (answer.prompt.messages, text, not answer.finished)
            for answer, text, says in zip(answers, texts, said, strict=True)
            if says
        ]
        scores = iter(readers.load(self.path).score(conversations))
        return [next(scores) if says else SILENT for says in said]


class JudgeReward(Reward):
    """What a model under the recipe's `models` says of the answers of a step, through one step of feedback with its
    settings, as under `elicit`: {rate: {by: judge, expected: true}} (d-RLAIF, Lee et al., arXiv:2309.00267), {rubric:
    {by: judge, criteria: [...]}} (Gunjal et al., arXiv:2507.17746), or compare or soft_preference, which hold the
    answers to a prompt against each other. From 0 to 1: a rating's place on its scale, the share of criteria, wins or
    preference. A verdict that can't be read is no reward, and is counted by its kind. What follows the thinking is
    judged; an answer that says nothing gets the worst there is. `judge: NAME` is {rate: {by: NAME}}."""

    name = "judge"
    bounds: ClassVar[tuple[float, ...]] = (0.0, 1.0)
    rate: Rate | None = None
    rubric: Rubric | None = None
    compare: Compare | None = None
    soft_preference: SoftPreference | None = None

    @model_validator(mode="after")
    def _one(self) -> JudgeReward:
        if len(self._steps) != 1:
            raise ValueError("give exactly one of rate, rubric, compare, soft_preference, such as {rate: {by: judge}}")
        return self

    @property
    def _steps(self) -> list[Feedback]:
        steps = (self.rate, self.rubric, self.compare, self.soft_preference)
        return [step for step in steps if step is not None]

    @property
    def step(self) -> Feedback:
        """The step of feedback that it judges by."""
        return self._steps[0]

    def of_all(self, answers: Sequence[Judged], readers: Readers) -> Sequence[Value]:
        return judged_by(self.step, answers, readers.judge)


REWARDS: dict[str, type[Reward]] = {
    reward.name: reward
    for reward in (
        CheckReward,
        FinishedReward,
        JudgeReward,
        LengthReward,
        ModelReward,
        RepetitionReward,
        ThinkingReward,
    )
}


@dataclass(frozen=True)
class Rewards:
    """All rewards of a recipe with their weights; `load` gives the reward models among them, `judge` has a step's
    models judge."""

    weighted: Sequence[tuple[str, float, Reward]]  # (its name in the metrics, its weight, itself)
    settings: Advantage
    load: LoadScores = load_scorer
    judge: JudgeBy = nobody

    @property
    def models(self) -> list[str]:
        """The reward models that it names, each once."""
        return list(dict.fromkeys(reward.path for _, _, reward in self.weighted if isinstance(reward, ModelReward)))

    @property
    def judges(self) -> list[tuple[str, Feedback]]:
        """(its place in the recipe, the step that it judges by) of each judge."""
        return [
            (f"rollout.rewards[{index}].judge", reward.step)
            for index, (_, _, reward) in enumerate(self.weighted)
            if isinstance(reward, JudgeReward)
        ]

    def score(self, groups: Sequence[Sequence[Judged]]) -> Scored:
        """The rewards of the answers to each prompt."""
        answers = [answer for group in groups for answer in group]
        readers = Readers(self.load, self.judge)
        why: Counter[str] = Counter()
        values_of = {
            label: _silence_as_worst(
                reward.of_all(answers, readers), label=label, weight=weight, reward=reward, why=why
            )
            for label, weight, reward in self.weighted
        }
        weights = [weight for _, weight, _ in self.weighted]
        totals = (_weighted_sum(weights, parts) for parts in zip(*values_of.values(), strict=True))
        total = [[next(totals) for _ in group] for group in groups]
        numbers = {label: _numbers(values) for label, values in values_of.items()}
        means = {label: sum(values) / len(values) for label, values in numbers.items() if values}
        return Scored(total, means, sum(reward is None for group in total for reward in group), why)

    def advantages(self, scored: Scored, lengths: Sequence[Sequence[int]], max_tokens: int) -> list[list[float]]:
        """The advantage of each answer, times its weight by length.

        Args:
            lengths: tokens of each answer.
        """
        reward_GK, present_GK = scored.tensors()
        advantage_GK = advantages(reward_GK, present_GK, baseline=self.settings.baseline, scale=self.settings.scale)
        weighted_GK = advantage_GK * torch.tensor(self.length_weights(lengths, max_tokens), dtype=torch.float64)
        return [[float(value) for value in row] for row in weighted_GK]

    def length_weights(self, lengths: Sequence[Sequence[int]], max_tokens: int) -> list[list[float]]:
        """What makes answers, tokens or sums count alike, for each answer (see `objectives.rewards.length_weights`)."""
        mode = {"answers": "sequence", "tokens": "token", "constant": "constant"}[self.settings.count]
        weight_GK: list[list[float]] = length_weights(torch.tensor(lengths), mode, constant=max_tokens).tolist()
        return weight_GK


def _silence_as_worst(
    values: Sequence[Value], *, label: str, weight: float, reward: Reward, why: Counter[str]
) -> list[Value]:
    """The values of a reward, with the worst there is for answers that say nothing; `why` counts what is no number.

    Raises:
        UserError: a value is not finite.
    """
    numbers = _numbers(values)
    if not all(map(math.isfinite, numbers)):
        odd = next(value for value in numbers if not math.isfinite(value))
        raise UserError(
            f"the reward {label} of an answer is {odd}, which is no number to learn from: look at the model that gives"
            " it"
        )
    why.update(f"{label}_{value.replace(' ', '_')}" for value in values if isinstance(value, str))
    worst = (max if weight < 0 else min)([*reward.bounds, *numbers], default=None)
    return [worst if value == SILENT else value for value in values]


def _numbers(values: Sequence[Value]) -> list[float]:
    return [value for value in values if value is not None and not isinstance(value, str)]


def _weighted_sum(weights: Sequence[float], parts: Sequence[Value]) -> float | None:
    """The reward of an answer by its parts; None where one of them is no number."""
    numbers = _numbers(parts)
    if len(numbers) < len(parts):
        return None
    return sum(weight * number for weight, number in zip(weights, numbers, strict=True))


def rewards_of(
    entries: Sequence[RewardEntry], settings: Advantage | None, prompts: Sequence[Prompt], max_tokens: int
) -> Rewards:
    """The rewards that a recipe names, their parameters checked, for answers of so many tokens at most to these
    training prompts.

    Raises:
        RecipeError: an unknown reward, a wrong parameter, or prompts that it can't judge, with the place.
    """
    weighted: list[tuple[str, float, Reward]] = []
    for index, entry in enumerate(entries):
        path = f"rollout.rewards[{index}]"
        if entry.name not in REWARDS:
            raise RecipeError(path, f"there is no reward {entry.name!r}{nearest(entry.name, REWARDS)}")
        kind = REWARDS[entry.name]
        path = f"{path}.{entry.name}"
        try:
            reward = kind.model_validate(entry.params)
        except ValidationError as error:
            raise explain(error, kind, path) from None
        if entry.weight == 0:
            raise RecipeError(f"{path}.weight", "a reward of weight 0 says nothing; leave it out")
        reward.refuse(path, prompts, max_tokens)
        before = sum(other.name == entry.name for other in entries[:index])
        weighted.append((f"{entry.name}_{before + 1}" if before else entry.name, entry.weight, reward))
    return Rewards(weighted, settings or Advantage())
