"""The only part of elicitation that does I/O: requests in, stored samples out, each asked for at most once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from limbeck.elicit.flow import Asking, Score
from limbeck.storage.files import crash_point
from limbeck.storage.store import Store
from limbeck.types import Generated, LogProb, Request, Sample

Progress = Callable[[int, int, int], None]
T = TypeVar("T")
SCORES_TOGETHER = 64  # answers whose likelihood is computed, and kept, in one go


class Answerer(Protocol):
    """Whoever can answer: a model in process, or a server."""

    @property
    def identity(self) -> str: ...

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = ...
    ) -> Iterator[tuple[Request, Generated]]: ...


class Scorer(Protocol):
    """Whoever can say how likely it finds a given answer."""

    identity: str

    def log_probs(self, questions: Sequence[Score]) -> list[LogProb]: ...


class StoppedEarlyError(Exception):
    """Asked to stop before every question had its answer; what was answered is stored."""

    def __init__(self, there: int, wanted: int) -> None:
        super().__init__(f"{there} of {wanted}")
        self.there = there
        self.wanted = wanted


def elicit(
    requests: Sequence[Request],
    store: Store,
    answerer: Callable[[], Answerer],
    progress: Progress = lambda done, total, tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Answer all requests, in their order; what the store holds is not asked again.

    An answer that failed for good (finish "error") is handed on and not kept, so that the next call asks for it once
    more.

    Args:
        answerer: called only if something is left to ask, so that a finished stage loads no model.
        progress: told (answers there, answers wanted, tokens of this call) after each answer.
        stop: when true, returns what there is (shorter than `requests`).
    """
    known = {request.key: sample for request in requests if (sample := store.answered(request))}
    waiting = list({request.key: request for request in requests if request.key not in known}.values())
    total = len({request.key for request in requests})
    tokens = 0
    if waiting:
        progress(len(known), total, 0)
        for request, answer in answerer().answers(waiting, stop):
            message = {"role": "assistant", "content": answer.text}
            sample = Sample((*request.messages, message), request.model, answer.ids, meta=dict(request.meta))
            crash_point("elicit.before_record")
            if answer.finish != "error":
                store.record(request, sample, answer.finish, answer.raw, answer.usage)
            known[request.key] = replace(sample, meta=sample.meta | {"finish": answer.finish})
            tokens += answer.usage[1] if answer.usage else len(answer.ids or ())
            progress(len(known), total, tokens)
            crash_point("elicit.after_record")
    return [known[request.key] for request in requests if request.key in known]


def score(
    questions: Sequence[Score],
    store: Store,
    scorer: Callable[[], Scorer],
    judge: str,
    progress: Progress,
    stop: Callable[[], bool],
) -> list[LogProb]:
    """How likely `judge` finds the answers, in the order of the questions; what the store holds is not computed
    again."""
    known = store.scores(judge)
    waiting = list({question.name: question for question in questions if question.name not in known}.values())
    for begin in range(0, len(waiting), SCORES_TOGETHER):
        if stop():
            raise StoppedEarlyError(len(known), len(questions))
        part = waiting[begin : begin + SCORES_TOGETHER]
        found = dict(zip((question.name for question in part), scorer().log_probs(part), strict=True))
        store.write_scores(judge, found)
        known |= found
        progress(begin + len(part), len(waiting), 0)
    return [known[question.name] for question in questions]


@dataclass
class Desk:
    """Where a plan's questions are answered: one writer, one store, and by `Score.by` a `scorer` of how likely a text
    is, whose identity is `judge`. `finishes` counts what became of every answer, known ones too."""

    store: Store
    answerer: Callable[[], Answerer]
    scorer: Callable[[str], Scorer]
    judge: Callable[[str], str]
    progress: Progress = lambda done, total, tokens: None
    stop: Callable[[], bool] = lambda: False
    finishes: Counter[str] = field(default_factory=Counter)

    def drive(self, plan: Asking[T]) -> T:
        """Run a plan to its end, batch by batch.

        Raises:
            StoppedEarlyError: `stop` said so; the same plan goes on from the store.
        """
        answers: Sequence[Any] | None = None
        while True:
            try:
                questions = plan.send(answers)  # type: ignore[arg-type]  # a generator is begun with None
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answers = self._answer(questions)

    def _answer(self, questions: Sequence[Request] | Sequence[Score]) -> Sequence[Any]:
        requests = [question for question in questions if isinstance(question, Request)]
        if not requests:
            scores = [question for question in questions if isinstance(question, Score)]
            by = scores[0].by if scores else ""
            assert all(question.by == by for question in scores), (
                "questions that are asked together are all to one model"
            )
            return score(scores, self.store, lambda: self.scorer(by), self.judge(by), self.progress, self.stop)
        assert len(requests) == len(questions), "a batch of questions is all requests or all scores"
        samples = elicit(requests, self.store, self.answerer, self.progress, self.stop)
        if len(samples) < len(requests):
            raise StoppedEarlyError(len(samples), len(requests))
        self.finishes.update(str(sample.meta["finish"]) for sample in samples)
        return samples
