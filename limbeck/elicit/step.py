"""The base classes of the steps of elicitation, and the decorator that gives a step its name.

A step is declared in one place:

    @register("shout")
    class Shout(LocalStep):
        '''Rewrites every answer in capitals, `times` times.'''

        kind = "transform"
        times: int = 1

        def apply(self, pool, context, tally):
            ...

Its fields are its settings in a recipe; its docstring is what `limbeck methods` and the documentation say of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.config.section import Section
from limbeck.elicit.flow import Pool, Questions, StepContext, Tally
from limbeck.elicit.step_prompt import StepPrompt
from limbeck.types import AnswerForm

StepKind = Literal["expand", "curate", "label", "feedback", "verify", "select", "transform"]
By = Annotated[str, Field(min_length=1)]  # the name of a model: `teacher`, `untouched`, or one under `models`
Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]
TokenCount = Annotated[int, Field(ge=1)]
AMOUNTS = ("count", "requests", "n", "each")  # settings that say how much a step asks for
ANSWER_SHARE = 0.65  # how long answers are expected to be, as a share of max_tokens


@dataclass(frozen=True)
class Estimate:
    """About what a step will ask for (requests, tokens to be generated, texts to be scored) and how many samples it
    gives."""

    requests: int = 0
    tokens: int = 0
    scores: int = 0
    samples: int = 0

    @classmethod
    def of_answers(cls, requests: int, max_tokens: int) -> Estimate:
        """Every request is answered in at most `max_tokens` tokens and gives one sample."""
        return cls(requests, int(requests * max_tokens * ANSWER_SHARE), samples=requests)


class AskingStep(Section):
    """A step that asks a model: implement `run`, a generator of questions.

    `needs` lists what the model must be able to do: "text", "raw" (continue a text outside the chat template),
    "contrast" (sample against another prompt), "log_probs".
    """

    kind: ClassVar[StepKind] = "label"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    ranks: ClassVar[bool] = False  # the answers that it gives to a prompt are in order of preference, the best first
    scores: ClassVar[frozenset[str]] = frozenset()  # the names of the scores that it gives, whatever its settings

    @abstractmethod
    def run(self, pool: Pool, context: StepContext, tally: Tally, /) -> Questions[Pool]:
        """Yield questions with `ask` and `score`, return the new pool, and count what is dropped in `tally`."""

    def estimate(self, samples: int) -> Estimate:
        """What `run` will ask for when it gets so many samples; by default one answer to each."""
        return Estimate.of_answers(samples, getattr(self, "max_tokens", 0))

    def estimate_of(self, samples: int, _: int, /) -> Estimate:
        """`estimate`, where it also depends on how many prompts the samples answer."""
        return self.estimate(samples)

    def answer_tokens(self) -> float | None:
        """About how many tokens the answers of its samples have; None where it leaves the answers as they are."""
        longest = getattr(self, "max_tokens", None)
        return None if longest is None else max(1.0, ANSWER_SHARE * longest)

    def demands(self) -> frozenset[str]:
        """What the models that it asks must be able to do, with these settings."""
        return self.needs

    def demands_of(self, _: str, /) -> frozenset[str]:
        """What one of them must be able to do, by its name; by default what all must."""
        return self.demands()

    def more(self, times: int) -> dict[str, int]:
        """The settings with which it asks for `times` times as much text; empty where it asks once of every sample, or
        for no text."""
        if self.kind in ("feedback", "select"):
            return {}
        return {name: times * getattr(self, name) for name in AMOUNTS if name in type(self).model_fields}

    def asks(self) -> tuple[str, ...]:
        """The names of the models that it asks; by default what its setting `by` says, else the teacher."""
        by: str | list[str] = getattr(self, "by", TEACHER)
        return (by,) if isinstance(by, str) else tuple(by)

    def must_hold(self) -> AnswerForm | None:
        """The form that the model must be able to be held to; None without one."""
        return None

    def reads(self, _: str, /) -> frozenset[str]:
        """Given its place in the recipe, the names that its templates read beside those that every sample has: fields,
        or columns of the prompt's row (as NAME or `row.NAME`; `row` for all of them)."""
        return frozenset()

    def shows(self) -> StepPrompt | None:
        """What it shows the model that writes the answers and the student is not shown; None if it writes no answer to
        a prompt that is there."""
        return None

    def gives_scores(self) -> frozenset[str]:
        """The names of the scores that it gives; steps that select by a score need it given before."""
        return self.scores

    def writes(self) -> frozenset[str]:
        """The names of what it adds to the samples' meta, which the templates of later steps may read (see `ask`)."""
        return frozenset()

    def refuse(self, place: str, known: frozenset[str], pool: Pool | None, /) -> None:
        """Refuse settings that can't work, before anything is asked. `known` are the names that earlier steps write,
        and the columns of the prompts' file (as NAME and `row.NAME`); `pool` is what the step will get, None where
        earlier steps make it."""

    def refuse_prompts(self, place: str, prompts: Pool, /) -> None:
        """Refuse prompts of the recipe that it can't work with, wherever it stands."""


class LocalStep(Section):
    """A step that asks no model: implement `apply`, a pure function of the pool."""

    kind: ClassVar[StepKind] = "select"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    ranks: ClassVar[bool] = False  # the answers that it gives to a prompt are in order of preference, the best first
    scores: ClassVar[frozenset[str]] = frozenset()  # the names of the scores that it gives, whatever its settings

    @abstractmethod
    def apply(self, pool: Pool, context: StepContext, tally: Tally, /) -> Pool:
        """The new pool. Count what is dropped in `tally`."""

    def run(self, pool: Pool, context: StepContext, tally: Tally, /) -> Questions[Pool]:
        yield from ()  # the engine runs generators; this one has no question
        return self.apply(pool, context, tally)

    def estimate(self, samples: int) -> Estimate:
        """How many samples `apply` gives when it gets so many; by default as many."""
        return Estimate(samples=samples)

    def estimate_of(self, samples: int, _: int, /) -> Estimate:
        """`estimate`, where it also depends on how many prompts the samples answer."""
        return self.estimate(samples)

    def answer_tokens(self) -> float | None:
        """About how many tokens the answers of its samples have; None where it leaves the answers as they are."""
        return None

    def asks(self) -> tuple[str, ...]:
        """The names of the models that it asks: none."""
        return ()

    def must_hold(self) -> AnswerForm | None:
        """The form that a model must be able to be held to; None, since none is asked."""
        return None

    def reads(self, _: str, /) -> frozenset[str]:
        """Given its place in the recipe, the names that its templates read beside those that every sample has: fields,
        or columns of the prompt's row (as NAME or `row.NAME`; `row` for all of them)."""
        return frozenset()

    def gives_scores(self) -> frozenset[str]:
        """The names of the scores that it gives; steps that select by a score need it given before."""
        return self.scores

    def writes(self) -> frozenset[str]:
        """The names of what it adds to the samples' meta, which the templates of later steps may read (see `ask`)."""
        return frozenset()

    def refuse(self, place: str, known: frozenset[str], pool: Pool | None, /) -> None:
        """Refuse settings that can't work, before anything is asked. `known` are the names that earlier steps write,
        and the columns of the prompts' file (as NAME and `row.NAME`); `pool` is what the step will get, None where
        earlier steps make it."""

    def refuse_prompts(self, place: str, prompts: Pool, /) -> None:
        """Refuse prompts of the recipe that it can't work with, wherever it stands."""


ElicitStep = AskingStep | LocalStep
StepClass = TypeVar("StepClass", bound=type[AskingStep] | type[LocalStep])
REGISTRY: dict[str, type[AskingStep] | type[LocalStep]] = {}


def register(name: str) -> Callable[[StepClass], StepClass]:
    """Make the decorated class the step `name` of a recipe's `elicit`.

    Raises:
        ValueError: another class has this name, or the class has no docstring.
    """

    def add(step: StepClass) -> StepClass:
        if name in REGISTRY:
            raise ValueError(f"there are two steps {name!r}: {REGISTRY[name].__qualname__} and {step.__qualname__}")
        if not step.__doc__:
            raise ValueError(f"the step {name!r} needs a docstring: `limbeck methods` shows it")
        REGISTRY[name] = step
        return step

    return add
