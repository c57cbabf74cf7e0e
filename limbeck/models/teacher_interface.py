"""The interfaces of a teacher: `Teacher` gives evidence over a batch, `TeacherKind` checks its settings and loads it.

To add a kind: its settings in `config/teacher.py`, a file here with both classes, and a line in `teachers.py`.
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

# what a loss may read of a teacher, at every step or once before the training
TEACHER_EVIDENCE = frozenset({"teacher_distribution", "teacher_features", "teacher_states"})
REFERENCE = "reference_teacher"
# what a step of elicitation may need of its model
WRITES = frozenset({"text", "raw", "contrast", "log_probs"})


class MovingAverage(Protocol):
    """The student's parameters averaged over the steps; `tensors` are saved in checkpoints."""

    tensors: dict[str, Tensor]

    def start(self, net: nn.Module, /) -> None:
        """Begin with the trained parameters of `net`."""

    def update(self) -> None:
        """Add the parameters after a step to the average."""

    def restore(self, tensors: Mapping[str, Tensor], /) -> None: ...


class Teacher(Protocol):
    """A teacher of a student in training.

    `gives` is the evidence it can give, `model` its weights if it is in process, `average` the student's moving average
    if that is the teacher; the loop updates it.
    """

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
        """The distribution at the batch's response positions, cut to `vocab_size` tokens, and the layers in `taps`."""


@dataclass(frozen=True)
class TeacherUse:
    """What a recipe uses its teacher for; `TeacherKind.refuse` checks it."""

    recipe: Recipe
    terms: Sequence[Term]
    training_prompts: Sequence[Prompt]

    def loss_path(self, term: Term) -> str:
        """The place of a term in the recipe, such as `loss[0].jsd`."""
        return f"loss[{list(self.terms).index(term)}].{term.name}"

    @property
    def read(self) -> frozenset[str]:
        """All evidence that the losses read."""
        return frozenset(evidence for term in self.terms for evidence in term.reads)

    @property
    def needs_common_tokens(self) -> bool:
        """Whether the training needs more of the teacher than its text."""
        joint = self.recipe.rollout is not None and self.recipe.rollout.joint is not None
        return joint or bool(self.read & (TEACHER_EVIDENCE | {REFERENCE}))


@dataclass(frozen=True)
class TeacherParts:
    """What a `TeacherKind` makes a teacher from when a training begins.

    Args:
        student: the student that is about to be trained.
        student_is_adapted_teacher: whether the student is the teacher's own weights with adapters.
        prompt_context: what the teacher is shown beside the prompt.
        load: loads a model by its source as a teacher in process with `prompt_context`; each once.
        release: drops the loaded models, unless another run needs them.
        scorer: returns the recipe's server as a scorer of text.
        own_text: the recipe's server as a teacher of its own text, if the recipe asks for its log-probabilities.
        responses: returns the responses of the training text in the student's tokens.
        report_facts: called with a file's name in the run folder, facts about the teacher to write there, and the same
            in words for the reporter.
    """

    student: Model
    student_is_adapted_teacher: bool
    prompt_context: PromptContext | None
    load: Callable[[str], Teacher]
    release: Callable[[], None]
    scorer: Callable[[], Teacher]
    own_text: Teacher | None
    responses: Callable[[], Sequence[Sequence[int]]]
    report_facts: Callable[[str, dict[str, Any], str], None]


class TeacherKind(Protocol):
    """One kind of teacher. `settings` is its section of the recipe, of the class that `config/teacher.py` names."""

    def gives(self, settings: Any, /) -> frozenset[str]:
        """Which of TEACHER_EVIDENCE, REFERENCE and WRITES it can give."""

    def lacks(self, settings: Any, evidence: str, /) -> str:
        """The error text for evidence that it can't give: why, and the remedy."""

    def refuse(self, settings: Any, use: TeacherUse, /) -> None:
        """Raise RecipeError, with place and remedy, for a recipe that needs what this kind can't do."""

    def prepare(self, settings: Any, parts: TeacherParts, /) -> Teacher:
        """Load the teacher of a student that is about to be trained."""

    def caveats(self, settings: Any, student: str | None, /) -> list[str]:
        """Caveats for a reader of the evaluation; `student` is the model that the student starts from."""
