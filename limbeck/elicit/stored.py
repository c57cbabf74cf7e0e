"""What the steps of elicitation would ask, found by running them on the stored answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Never

from limbeck.elicit.engine import FAILED, Engine
from limbeck.elicit.flow import Pool, ScoreRequest
from limbeck.elicit.run import Elicitation
from limbeck.storage.store import Store
from limbeck.types import NothingLeftError, Request


class UnansweredError(Exception):
    """A step needs answers or scores that are not stored."""


@dataclass
class StoredEngine(Engine):
    """Answers the questions of steps from the store, and asks no model.

    Args:
        recipe_tolerates: the share of a batch's answers that may have failed without being asked for again.
        asked: receives the requests of every batch, up to the first with one that has no answer.
        again: receives the keys of stored answers that would be asked for again.
        unscored: how many likelihoods were missing where it ended.
    """

    recipe_tolerates: float = 0.0
    asked: list[Request] = field(default_factory=list)
    again: set[str] = field(default_factory=set)
    unscored: int = 0

    def _answer(self, batch: Sequence[Request] | Sequence[ScoreRequest]) -> Sequence[Any]:
        requests = [question for question in batch if isinstance(question, Request)]
        self.asked += requests
        stored = {request.key: self.store.answered(request) for request in requests}
        failed = {key for key, sample in stored.items() if sample and sample.meta.get("finish") in FAILED}
        if len(failed) > int(self.recipe_tolerates * len(stored)):
            self.again |= failed
        scores = [question for question in batch if isinstance(question, ScoreRequest)]
        if scores:
            known = self.store.scores(self.scorer_identity(scores[0].model))
            self.unscored = len({score.key for score in scores} - known.keys())
        if self.unscored or self.again or None in stored.values():
            raise UnansweredError
        return super()._answer(batch)


@dataclass(frozen=True)
class StoredElicitation:
    """What the steps ask.

    Args:
        asked: all requests, up to the first batch with one that has no answer.
        again: the keys of those whose answer failed and would be asked for again.
        step: that batch's step; None if every request of every step has its answer.
        unscored: how many likelihoods that step would compute.
        pool: what the steps leave; empty unless all have their answers.
    """

    asked: list[Request]
    again: set[str]
    step: str | None
    unscored: int
    pool: Pool


def _no_model(*_: object) -> Never:
    raise AssertionError("no model is asked")


def what_is_asked(
    elicitation: Elicitation, store: Store, scorer_identity: Callable[[str], str], tolerates: float
) -> StoredElicitation:
    """Run the steps on stored answers. What later steps would ask follows from answers that are not there, and stays
    unknown.

    Args:
        scorer_identity: of the model that a `ScoreRequest` names.
        tolerates: the share of answers that may have failed.
    """
    steps: list[str] = []
    engine = StoredEngine(store, _no_model, _no_model, scorer_identity, tolerate=1.0, recipe_tolerates=tolerates)
    step: str | None = None
    pool: Pool = []
    with TemporaryDirectory() as folder, suppress(NothingLeftError):
        try:
            pool = list(replace(elicitation, folder=Path(folder)).run(engine, on_start=steps.append))
        except UnansweredError:
            step = steps[-1]
    return StoredElicitation(engine.asked, engine.again, step, unscored=engine.unscored, pool=pool)
