"""Text by many copies of a model, on the workers of a Ray cluster: the same requests, keys and answers as in process.

This process alone stores answers. A worker that dies costs its answers in flight: others write them, and a new worker
takes its place. Ray moves Python objects (pickles) between the processes of the cluster, so that whoever reaches its
ports runs code there: a cluster is for machines that trust each other.
Not covered: servers, which answer many requests at once for one process (`teacher.server.urls`).
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from limbeck.models.context import PromptContext
from limbeck.models.load import load_model
from limbeck.models.placement import CPU, Placement, Precision, find_device
from limbeck.models.teacher import InProcessTeacher
from limbeck.storage.files import user_path
from limbeck.types import Generated, Request, UserError

MOST_AT_ONCE, FEWEST_AT_ONCE = 256, 8  # requests that a worker is given
DEATHS = 3  # of the workers that were asked one thing, or of those that begin: then it is to blame
POLL_SECONDS, TELL_SECONDS = 0.5, 60.0
Answer = tuple[int, Generated]  # the number of the request among those that were given together


class LostWorkerError(Exception):
    """A worker died."""


class WorkerCall(Protocol):
    """Requests that a worker was given."""

    def next(self) -> Answer | None:
        """The next answer; None after the last.

        Raises:
            LostWorkerError: the worker died.
            UserError: what the worker raised.
        """


class Pool(Protocol):
    """Workers that are started and asked."""

    def start(self) -> Any: ...

    def ask(self, worker: Any, requests: Sequence[Request]) -> WorkerCall: ...

    def ready(self, calls: Sequence[WorkerCall], seconds: float) -> list[WorkerCall]:
        """Those of the calls whose next answer is there, waiting so long for the first of them."""

    def stop(self, worker: Any) -> None: ...

    def settle(self) -> None:
        """All workers are stopped: free what was made for them."""


@dataclass(frozen=True)
class ModelOnWorker:
    """What a worker loads: a model by its name, which must be the same there as here."""

    source: str
    precision: Precision
    template: str | None
    context: PromptContext | None
    identity: str
    attention: str | None = None

    def load(self, gpus: int) -> InProcessTeacher:
        """Load the model.

        Raises:
            UserError: it is not there, or is another than here.
        """
        device = find_device("auto", "machine.workers.gpus") if gpus else CPU
        if gpus and device.type == "cpu":
            raise UserError("machine.workers.gpus: torch sees no device on a worker: install its CUDA build there")
        model = load_model(self.source, self.precision, Placement(device, self.attention), self.template)
        teacher = InProcessTeacher(model.with_context(self.context))
        if teacher.identity != self.identity:
            raise UserError(
                f"machine.workers: {self.source} is {teacher.identity} on a worker and {self.identity} here: put the"
                " same files at that place on all machines"
            )
        return teacher


@dataclass
class _Share:
    """Requests that one worker has: those that it has not answered yet, by their number. It gets none at first, and has
    answered those once it has loaded its model."""

    worker: Any
    waiting: dict[int, Request]


@dataclass
class WorkerTeacher:
    """Answers requests by the workers of a pool.

    Args:
        identity: of the model that the workers have.
        count: how many workers. They are started when they are needed, and stay until they are released.
        tell: called with what a user should know.
    """

    pool: Pool
    identity: str
    count: int
    tell: Callable[[str], None] = lambda words: None
    _idle: list[Any] = field(default_factory=list)
    _failed_starts: int = 0
    _deaths: Counter[str] = field(default_factory=Counter)

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes. Once `stop` is true, what the workers have begun is dropped.

        Raises:
            UserError: a worker can't load the model or answer a request, or workers die of one.
        """
        left = deque(requests)
        shares: dict[WorkerCall, _Share] = {}
        began: float | None = time.monotonic()  # of waiting for the first worker
        try:
            for _ in range(min(self.count, math.ceil(len(left) / FEWEST_AT_ONCE)) - len(self._idle)):
                self._start(shares)
            while (left or any(share.waiting for share in shares.values())) and not stop():
                while self._idle and left:
                    self._give(self._idle.pop(), left, shares)
                found = self.pool.ready(list(shares), POLL_SECONDS)
                if found:
                    began = None
                elif began is not None and time.monotonic() - began > TELL_SECONDS:
                    self.tell(f"waiting for the cluster to have room for {self.count} workers, or for them to load")
                    began = None
                for call in found:
                    try:
                        answer = call.next()
                    except LostWorkerError as error:
                        self._lost(call, shares, left, error)
                        continue
                    share = shares[call]
                    assert answer is not None or not share.waiting, "a worker answers all that it is asked"
                    request = None if answer is None else share.waiting.pop(answer[0])
                    if not share.waiting:
                        self._idle.append(shares.pop(call).worker)
                    if request is not None and answer is not None:
                        yield request, answer[1]
        finally:
            for share in shares.values():  # they were stopped in the middle, or have not begun
                self.pool.stop(share.worker)

    def release(self) -> None:
        """Stop the workers, and free what they hold."""
        some = bool(self._idle)
        while self._idle:
            self.pool.stop(self._idle.pop())
        if some:
            self.pool.settle()

    def _start(self, shares: dict[WorkerCall, _Share]) -> None:
        worker = self.pool.start()
        shares[self.pool.ask(worker, [])] = _Share(worker, {})

    def _give(self, worker: Any, left: deque[Request], shares: dict[WorkerCall, _Share]) -> None:
        """Ask a worker the next requests: fewer towards the end, so that all finish at about the same time."""
        size = min(MOST_AT_ONCE, max(FEWEST_AT_ONCE, math.ceil(len(left) / (2 * self.count))), len(left))
        requests = [left.popleft() for _ in range(size)]
        shares[self.pool.ask(worker, requests)] = _Share(worker, dict(enumerate(requests)))

    def _lost(
        self, call: WorkerCall, shares: dict[WorkerCall, _Share], left: deque[Request], error: LostWorkerError
    ) -> None:
        """Take back what a worker that died was asked, and start another one for it."""
        lost = shares.pop(call)
        self.pool.stop(lost.worker)
        left.extendleft(reversed(lost.waiting.values()))
        self._deaths.update(request.key for request in lost.waiting.values())
        self._failed_starts += not lost.waiting
        over = any(self._deaths[request.key] >= DEATHS for request in lost.waiting.values())
        if over or self._failed_starts >= DEATHS:
            what = "over the same requests" if over else "before they answered"
            raise UserError(
                f"machine.workers: {DEATHS} workers died {what}, the last with: {error}; where memory ran out, start"
                " fewer workers"
            )
        self.tell(f"a worker died ({error}): its {len(lost.waiting):,} requests go to others")
        if left:
            self._start(shares)


def place_of(source: str) -> str:
    """A model's name as a worker finds it, which runs in another folder."""
    path = user_path(source)
    return str(path.resolve()) if path.exists() else source
