"""What the doctor examines: a recipe, with its models, server and text loaded when a check first needs them.

Shapes: N response positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from limbeck.config.recipe import Recipe
from limbeck.config.teacher import ServedTeacher
from limbeck.data.batches import Row, make_batch
from limbeck.models.api import ApiTeacher
from limbeck.models.model import Model
from limbeck.models.score import ServerScorer
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.progress import Silent, StoppedError
from limbeck.runs.fit import prepared
from limbeck.runs.run import Run
from limbeck.runs.served import served
from limbeck.signals.forms import form_of
from limbeck.types import Batch, Message

QUESTIONS = ("Why is the sky blue?", "Name three fruits.", "Schreibe einen Satz über Zürich. 🙂")
ANSWERS = (
    "Air scatters blue light more than red light.",
    "An apple, a pear and a plum.",
    "Zürich liegt am See – naïve 日本語.",
)
TOKENS_PER_POSITION = 20  # that a server is asked to name


class DoubtfulError(Exception):
    """What a check found is no fault, but should be known."""


class NothingToCheckError(Exception):
    """The recipe has nothing of this kind, or not yet."""


@dataclass
class Patient:
    """A recipe with its run folder, which is read if it is there; what the checks leave goes to `scratch` otherwise.
    Properties raise `NothingToCheckError` for parts that the recipe doesn't have."""

    recipe: Recipe
    folder: Path
    scratch: Path

    @cached_property
    def run(self) -> Run:
        folder = self.folder if self.folder.joinpath("recipe.yaml").exists() else self.scratch
        return Run(prepared(self.recipe), folder, Silent(), lambda: True)  # stops before it sends any request

    @cached_property
    def teacher(self) -> InProcessTeacher:
        if self.recipe.teacher.model is None:
            raise NothingToCheckError("the teacher's weights are not here")
        if self.run.models.other_tokens:
            raise NothingToCheckError("the teacher has its own tokenizer")
        return self.run.models.teacher

    @cached_property
    def model(self) -> Model:
        """The model whose tokenizer the text is in."""
        return self.run.models.reader

    @cached_property
    def server(self) -> ApiTeacher:
        api = served(self.run.method)
        if api is None:
            raise NothingToCheckError("the recipe names no server")
        return api

    @property
    def reads_given_text(self) -> bool:
        """Whether the recipe's server has to score text, or stands for weights that are here."""
        teacher = self.recipe.teacher
        return not isinstance(teacher, ServedTeacher) or teacher.reads_given_text

    @cached_property
    def scorer(self) -> ServerScorer | StatesTeacher:
        api = self.server
        if self.run.models.other_tokens:
            raise NothingToCheckError("the server has its own tokenizer")
        if api.settings.kind == "states":
            return StatesTeacher(api, self.model.tokenizer)
        cache = self.recipe.teacher.cache
        k = (form_of(cache).server_tokens if cache else None) or api.settings.names
        if self.recipe.teacher.model is not None or not k:
            k = TOKENS_PER_POSITION
        return ServerScorer(api, k, self.model.tokenizer)

    @cached_property
    def texts(self) -> Batch:
        """A few short conversations that end like training text."""
        rows = []
        for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
            message: Message = {"role": "user", "content": question}
            response_ids = tuple(self.model.answer_ids(answer))
            rows.append(Row(str(number), tuple(self.model.prompt_ids((message,))), response_ids, frozenset()))
        return make_batch(rows, tuple(range(len(rows))))

    @cached_property
    def log_probs(self) -> Tensor:
        """The teacher's log-probabilities at every response position of `texts`, [N, V]."""
        return teacher_log_probs(self.teacher, self.texts)

    @cached_property
    def training_rows(self) -> list[Row]:
        """The training text, if the folder has all of it."""
        if not self.folder.joinpath("store.sqlite").exists() or not self.recipe.fixed_writers:
            raise NothingToCheckError(f"{self.folder} has no text yet")
        try:
            return self.run.rows(self.run.text.training(), self.model)
        except StoppedError:
            raise NothingToCheckError(f"{self.folder} does not have all its text yet") from None


def response_targets(batch: Batch) -> Tensor:
    """The response tokens of a batch, [N]."""
    row_N, position_N = batch.response_positions()
    return batch.tokens_BT[row_N, position_N + 1]


@torch.no_grad()
def teacher_log_probs(teacher: InProcessTeacher, batch: Batch) -> Tensor:
    """[N, V] in fp32. For a few short texts only: it keeps the whole vocabulary."""
    signal = teacher.signal(batch)
    return signal.head.logits(signal.hidden_NE).log_softmax(-1).cpu()
