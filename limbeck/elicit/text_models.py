"""The models of a run, as its text asks them."""

from __future__ import annotations

from typing import Protocol

from limbeck.elicit.engine import Answerer, LikelihoodScorer
from limbeck.elicit.flow import Reader
from limbeck.types import AnswerForm


class TextModels(Protocol):
    """The models of a run, by their names in writers and steps; each is loaded when first needed."""

    def writer(self, name: str, /) -> Answerer:
        """The model that writes as `teacher`, `untouched` or `previous`, or by a name under `models`."""

    def writer_identity(self, name: str, /) -> str:
        """The writer's name in request keys."""

    def as_reader(self, name: str, /) -> Reader:
        """What is known of a model as a reader of others' texts."""

    def scorer(self, by: str, /) -> LikelihoodScorer:
        """Scores how likely a text is under the teacher (""), `untouched`, or a model by its name or source."""

    def scorer_identity(self, by: str, /) -> str:
        """The scorer's name in the store."""

    def header(self) -> str | None:
        """The text before a user's message in the teacher's own format."""

    def unheld(self, form: AnswerForm, /) -> str:
        """Why the teacher can't be held to a form of answers; nothing if it can."""
