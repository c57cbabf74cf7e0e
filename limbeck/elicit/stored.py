"""What the steps of elicitation would ask, found by running them on the stored answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Never

from limbeck.elicit.engine import Engine
from limbeck.elicit.flow import ScoreRequest
from limbeck.elicit.run import Elicitation
from limbeck.storage.store import Store
from limbeck.types import NothingLeftError, Request


class UnansweredError(Exception):
    """A step needs answers or scores that are not stored."""


@dataclass
class StoredEngine(Engine):
    """Answers the questions of steps from the store, and asks no model.

    Args:
        asked: receives the requests of every batch, up to the first with one that has no answer.
        unscored: how many likelihoods were missing where it ended.
    """

    asked: list[Request] = field(default_factory=list)
    unscored: int = 0

    def _answer(self, batch: Sequence[Request] | Sequence[ScoreRequest]) -> Sequence[Any]:
        requests = [question for question in batch if isinstance(question, Request)]
        self.asked += requests
        scores = [question for question in batch if isinstance(question, ScoreRequest)]
        if scores:
            known = self.store.scores(self.scorer_identity(scores[0].model))
            self.unscored = len({score.key for score in scores} - known.keys())
        if self.unscored or any(self.store.answered(request) is None for request in requests):
            raise UnansweredError
        return super()._answer(batch)


@dataclass(frozen=True)
class StoredElicitation:
    """What the steps ask.

    Args:
        asked: all requests, up to the first batch with one that has no answer.
        step: that batch's step; None if every request of every step has its answer.
        unscored: how many likelihoods that step would compute.
    """

    asked: list[Request]
    step: str | None
    unscored: int = 0


def _no_model(*_: object) -> Never:
    raise AssertionError("no model is asked")


def what_is_asked(elicitation: Elicitation, store: Store, scorer_identity: Callable[[str], str]) -> StoredElicitation:
    """Run the steps on stored answers. Writes nothing into the run folder; what later steps would ask follows from
    answers that are not there, and stays unknown.

    Args:
        scorer_identity: of the model that a `ScoreRequest` names.
    """
    step: list[str] = []
    engine = StoredEngine(store, _no_model, _no_model, scorer_identity, tolerate=1.0)  # bad answers are answers, too
    with TemporaryDirectory() as folder, suppress(NothingLeftError):
        try:
            replace(elicitation, folder=Path(folder)).run(engine, on_start=step.append)
        except UnansweredError:
            return StoredElicitation(engine.asked, step[-1], engine.unscored)
    return StoredElicitation(engine.asked, None)
