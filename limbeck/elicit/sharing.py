"""Asks a teacher only for what no run has yet: takes answers from the store that runs share, and adds the new ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from limbeck.storage.answers import SharedAnswers
from limbeck.types import Generated, Request

POLL_SECONDS = 0.5
Answers = Iterator[tuple[Request, Generated]]


class Asks(Protocol):
    """What answers requests, each as it finishes."""

    def answers(self, requests: Sequence[Request], stop: Callable[[], bool] = ...) -> Answers: ...


@dataclass
class Reuse:
    """Answers that came from other runs: how many of those that were needed, and the tokens that they cost then."""

    answers: int = 0
    needed: int = 0
    read: int = 0
    written: int = 0

    def add(self, answer: Generated) -> None:
        read, written = answer.usage or (0, 0)
        self.answers += 1
        self.read += read
        self.written += written


@dataclass
class Sharing:
    """A run's part in the answers that runs share.

    Args:
        open: returns the shared answers, None where none are shared; called when an answer is missing.
        tell: called with what was taken from other runs, once it is known.
        wait: called with the number of answers that another run is asking for at this moment.
    """

    open: Callable[[], SharedAnswers | None]
    tell: Callable[[Reuse], None] = lambda reuse: None
    wait: Callable[[int], None] = lambda count: None
    sleep: Callable[[float], None] = field(default=time.sleep)


def ask_once(
    requests: Sequence[Request], answerer: Callable[[], Asks], stop: Callable[[], bool], sharing: Sharing | None
) -> Iterator[tuple[Request, Generated, bool]]:
    """(request, answer, whether another run asked for it), each as it is there. A new answer is shared when the next
    one is asked of this generator: whoever reads it stores it first."""
    shared = None if sharing is None or stop() else sharing.open()
    if sharing is None or shared is None:
        for request, answer in answerer().answers(requests, stop):
            yield request, answer, False
        return
    left = {request.key: request for request in requests}
    reuse = Reuse(needed=len(left))
    waits = False
    try:
        while left:
            for request, answer in shared.take(list(left.values())):
                reuse.add(answer)
                del left[request.key]
                yield request, answer, True
            ours = shared.reserve(list(left.values()))
            for request, answer in answerer().answers(ours, stop) if ours else ():
                del left[request.key]
                yield request, answer, False
                shared.put(request, answer)
            shared.release()
            if stop() or any(request.key in left for request in ours):
                break
            if left and not ours:
                if not waits:
                    sharing.wait(len(left))
                waits = True
                sharing.sleep(POLL_SECONDS)
    finally:
        shared.release()
        if reuse.answers:
            sharing.tell(reuse)
