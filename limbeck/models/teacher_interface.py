"""What every kind of teacher is to the rest: a `Teacher` beside the student's text, and a `TeacherKind` that says what
it can give, what it refuses, and how it is loaded.

A kind is added with its settings in `config/teacher.py`, a file here with both classes, and a line in `teachers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from limbeck.config.recipe import Recipe
from limbeck.elicit.prompts import Prompt
from limbeck.models.context import PromptContext
from limbeck.models.model import Model
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.objectives.term import Term
from limbeck.types import Batch

# what a loss may read of a teacher: asked at every step, or once before the training
TEACHER_EVIDENCE = frozenset({"teacher_distribution", "teacher_features", "teacher_states"})
REFERENCE = "reference_teacher"
# what a step of elicitation may need of the model that it asks
WRITES = frozenset({"text", "raw", "contrast", "log_probs"})


class MovingAverage(Protocol):
    """The student's parameters averaged over the steps; `tensors` are saved in checkpoints."""

    tensors: dict[str, Tensor]

    def start(self, net: nn.Module, /) -> None:
        """Begins with what is trained of `net`, as it is."""

    def update(self) -> None:
        """Takes in the parameters after a step."""

    def restore(self, tensors: Mapping[str, Tensor], /) -> None: ...


class Teacher(Protocol):
    """A teacher beside the student's text. `gives` is the evidence that it has, `model` holds its weights where they
    are here, `average` is the moving average of the student that it is, where it is one: the loop updates it."""

    @property
    def gives(self) -> frozenset[str]: ...

    @property
    def model(self) -> Model | None: ...

    @property
    def average(self) -> MovingAverage | None: ...

    @property
    def identity(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """Its distribution at the batch's response positions, cut to `vocab_size` tokens, and the layers asked for."""


@dataclass(frozen=True)
class TeacherUse:
    """What a recipe asks of its teacher: what `TeacherKind.refuse` looks at."""

    recipe: Recipe
    terms: Sequence[Term]
    training_prompts: Sequence[Prompt]

    def loss_path(self, term: Term) -> str:
        """The place of a term in the recipe, such as `loss[0].jsd`."""
        return f"loss[{list(self.terms).index(term)}].{term.name}"

    @property
    def read(self) -> frozenset[str]:
        """All evidence that some loss reads."""
        return frozenset(evidence for term in self.terms for evidence in term.reads)


@dataclass(frozen=True)
class TeacherParts:
    """What a teacher is made of when a training begins.

    Args:
        student: the student that is about to be trained.
        student_is_adapted_teacher: whether it is the teacher's own weights with adapters to be trained.
        prompt_context: what the teacher is shown beside the prompt.
        load: a model by its source as a teacher in process, shown `prompt_context`; loaded once.
        release: forgets the models that `load` holds, where no other run needs them.
        scorer: the recipe's server as one that scores given text.
        responses: the responses of the training text in the student's tokens.
        report_facts: takes a file's name in the run folder, facts about the teacher to be kept there, and the facts in
            words for the reporter.
    """

    student: Model
    student_is_adapted_teacher: bool
    prompt_context: PromptContext | None
    load: Callable[[str], Teacher]
    release: Callable[[], None]
    scorer: Callable[[], Teacher]
    responses: Callable[[], Sequence[Sequence[int]]]
    report_facts: Callable[[str, dict[str, Any], str], None]


class TeacherKind(Protocol):
    """One kind of teacher. `settings` is its section of the recipe, of the class that `config/teacher.py` names."""

    def gives(self, settings: Any, /) -> frozenset[str]:
        """Which of TEACHER_EVIDENCE, REFERENCE and WRITES it can give."""

    def lacks(self, settings: Any, evidence: str, /) -> str:
        """Why it can't give some evidence, and the cure."""

    def refuse(self, settings: Any, use: TeacherUse, /) -> None:
        """Raise RecipeError for a recipe that asks what this kind can't do, with the place and the cure."""

    def prepare(self, settings: Any, parts: TeacherParts, /) -> Teacher:
        """The teacher beside a student that is about to be trained."""

    def caveats(self, settings: Any, student: str | None, /) -> list[str]:
        """What a reader of the evaluation should know of it, beside a student that starts from that model."""
