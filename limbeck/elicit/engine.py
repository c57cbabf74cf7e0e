"""The only part of elicitation that does I/O: requests in, stored samples out, each asked for at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from limbeck.durable import crash_point
from limbeck.store import Store
from limbeck.types import Generated, Request, Sample

Progress = Callable[[int, int, int], None]


class Answerer(Protocol):
    """Whoever can answer: a model in process, later a server."""

    identity: str

    def answers(self, requests: Sequence[Request], stop: Callable[[], bool] = ...) -> Iterator[tuple[Request, Generated]]: ...


def elicit(
    requests: Sequence[Request],
    store: Store,
    answerer: Callable[[], Answerer],
    progress: Progress = lambda done, total, tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Answer all requests, in their order; what the store holds is not asked again.

    Args:
        answerer: called only if something is left to ask, so that a finished stage loads no model.
        progress: told (answers there, answers wanted, tokens of this call) after each answer.
        stop: when true, returns what there is (shorter than `requests`).
    """
    known = {request.key: sample for request in requests if (sample := store.answered(request))}
    waiting = list({request.key: request for request in requests if request.key not in known}.values())
    total, tokens = len({request.key for request in requests}), 0
    if waiting:
        progress(len(known), total, 0)
        for request, answer in answerer().answers(waiting, stop):
            message = {"role": "assistant", "content": answer.text}
            sample = Sample((*request.messages, message), request.model, answer.ids, meta=dict(request.meta))
            crash_point("elicit.before_record")
            store.record(request, sample, answer.finish)
            known[request.key] = Sample(sample.messages, sample.writer, sample.response_ids, (), sample.meta | {"finish": answer.finish})
            tokens += len(answer.ids)
            progress(len(known), total, tokens)
            crash_point("elicit.after_record")
    return [known[request.key] for request in requests if request.key in known]
