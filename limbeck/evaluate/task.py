"""A task, and what a kind of task has to be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.elicit.prompts import Prompt
from limbeck.evaluate.items import Item, TaskSettings
from limbeck.evaluate.metrics import Better, TaskMetric
from limbeck.evaluate.records import CheckedAnswer, ItemResult, Progress
from limbeck.models.model import Model
from limbeck.types import Sampling

PromptDraw = tuple[Prompt, int]  # a prompt and the seed of one answer to it
WriteAnswers = Callable[[Sequence[PromptDraw], Sampling], Sequence[CheckedAnswer]]


@dataclass(frozen=True)
class GreedyAnswers:
    """Answers of at most `max_tokens` tokens that a system has given already, by prompt id."""

    by_prompt: Mapping[str, CheckedAnswer]
    max_tokens: int


@dataclass(frozen=True)
class HarnessForm:
    """A task as lm-evaluation-harness takes it: its items, whether they go through the chat template, and the rest of
    its configuration."""

    docs: list[dict[str, Any]]
    chat: bool
    config: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task, read and checked. The first of `metrics` is the headline; `protocol` says how it is asked; `available`
    is how many items its file holds, of which `items` are asked; `plain` is the task that this one asks in another way.
    """

    name: str
    version: str
    description: str
    kind: TaskKind
    metrics: tuple[str, ...]
    protocol: Any
    items: tuple[Any, ...]
    available: int = 0
    plain: Task | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The protocol as plain data, to be printed with every number."""
        return dict(self.protocol.model_dump(mode="json", exclude_none=True))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What a system has to answer in writing; nothing for tasks that are scored by probability."""
        return tuple(item for item in self.items if isinstance(item, Prompt))

    @property
    def shares_answers(self) -> bool:
        """True where `run_task` takes answers that are there already: plain greedy ones, of the length the run
        allows."""
        return self.kind.shares_answers(self.protocol)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(id, text) of every item without its solution, to be looked for in training text: as the plain task asks."""
        if self.plain is not None:
            return self.plain.texts
        return [(item.id, text) for item in self.items for text in self.kind.texts(item)]

    def plain_id(self, item: Item) -> str:
        """The item's id in `texts`."""
        how = self.name.partition("@")[2] if self.plain is not None else ""
        return item.id.removesuffix(f"@{how}") if how else item.id

    def better(self, metric: str) -> Better:
        declared = self.kind.metrics.get(metric.partition("@")[0])
        return declared.better if declared else "none"

    def is_share(self, metric: str) -> bool:
        """Whether it is taken to lie between 0 and 1, as every built-in metric does of which more is better."""
        return self.better(metric) == "high"

    def title(self, metric: str) -> str:
        name, at, k = metric.partition("@")
        declared = self.kind.metrics.get(name)
        return (declared.title if declared else name.replace("_", " ").capitalize()) + at + k


class TaskKind(ABC):
    """How tasks of one kind are read, asked, scored, put in another way and given to lm-evaluation-harness.

    To add a kind, write a subclass and put an instance into `tasks.KINDS`. `metrics` holds every metric that it can
    give, by the part of its name before any `@k`.
    """

    name: str
    settings: type[TaskSettings]
    metrics: Mapping[str, TaskMetric]
    takes_references: bool = False

    @abstractmethod
    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> Item:
        """One line of the items file.

        Args:
            ident: the item's id. place: file and line, for errors.

        Raises:
            UserError: something is missing, unknown or of the wrong type.
        """

    @abstractmethod
    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        """The system's result on every item, in the order of the items.

        Args:
            answers: used where `shares_answers`.
        """

    def score_by_text(self, task: Task, write: WriteAnswers, answers: GreedyAnswers) -> list[ItemResult]:
        """The results of a system that gives text alone, written by `write`; empty where text does not do."""
        return []

    def possible_metrics(self, settings: Any, items: Sequence[Any]) -> list[str]:
        """The metrics that a task with these settings and items can give, the headline first."""
        return list(self.metrics)

    def shares_answers(self, settings: Any) -> bool:
        """Whether the answers are the plain greedy ones that any held-out prompt gets."""
        return False

    def texts(self, item: Any) -> Sequence[str]:
        """The item's texts without its solution."""
        return (item.text,)

    def change_question(self, item: Any, change: Callable[[str], str]) -> Item | None:
        """The item with its question changed and nothing else; None where it asks none."""
        return None

    def harness_form(self, task: Task, max_tokens: int) -> HarnessForm | None:
        """The task for lm-evaluation-harness; None where that has no such tasks.

        Args:
            max_tokens: of an answer, where the task itself sets no limit.

        Raises:
            UserError: settings that can't be kept there.
        """
        return None
