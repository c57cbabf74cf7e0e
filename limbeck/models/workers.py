"""Text by many copies of a model, on the workers of a Ray cluster: the same requests, keys and answers as in process.

This process alone stores answers. A worker that dies costs its answers in flight: others write them, and a new worker
takes its place. Ray moves Python objects (pickles) between the processes of the cluster, so that whoever reaches its
ports runs code there: a cluster is for machines that trust each other.
Not covered: servers, which answer many requests at once for one process (`teacher.server.urls`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from limbeck.models.context import PromptContext
from limbeck.models.load import load_model
from limbeck.models.placement import CPU, Placement, Precision, find_device
from limbeck.models.teacher import InProcessTeacher
from limbeck.types import Generated, Request, UserError

MOST_AT_ONCE, FEWEST_AT_ONCE = 256, 8  # requests that a worker is given
DEATHS = 3  # of the workers that were asked one thing: then it is to blame
POLL_SECONDS = 0.5
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
    """Requests that one worker has: those that it has not answered yet, by their number."""

    worker: Any
    requests: Sequence[Request]
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
        try:
            while len(self._idle) < min(self.count, math.ceil(len(left) / FEWEST_AT_ONCE)):
                self._idle.append(self.pool.start())
            while (left or shares) and not stop():
                while self._idle and left:
                    share = self._share(self._idle.pop(), left)
                    shares[self.pool.ask(share.worker, share.requests)] = share
                for call in self.pool.ready(list(shares), POLL_SECONDS):
                    try:
                        answer = call.next()
                    except LostWorkerError as error:
                        lost = shares.pop(call)
                        left.extendleft(reversed(lost.waiting.values()))
                        self._idle.append(self._instead(lost, error))
                        continue
                    if answer is None:
                        self._idle.append(shares.pop(call).worker)
                    else:
                        number, generated = answer
                        yield shares[call].waiting.pop(number), generated
        finally:
            for share in shares.values():  # they were stopped in the middle
                self.pool.stop(share.worker)

    def release(self) -> None:
        """Stop the workers, and free what they hold."""
        while self._idle:
            self.pool.stop(self._idle.pop())

    def _share(self, worker: Any, left: deque[Request]) -> _Share:
        """The next requests for a worker: fewer towards the end, so that all finish at about the same time."""
        size = min(MOST_AT_ONCE, max(FEWEST_AT_ONCE, math.ceil(len(left) / (2 * self.count))), len(left))
        requests = [left.popleft() for _ in range(size)]
        return _Share(worker, requests, dict(enumerate(requests)))

    def _instead(self, lost: _Share, error: LostWorkerError) -> Any:
        """A worker in the place of one that died."""
        self.pool.stop(lost.worker)
        self._deaths.update(request.key for request in lost.waiting.values())
        if any(self._deaths[request.key] >= DEATHS for request in lost.waiting.values()):
            raise UserError(
                f"machine.workers: {DEATHS} workers died over the same requests, the last with: {error}; where memory"
                " ran out, start fewer workers"
            )
        self.tell(f"a worker died ({error}): its {len(lost.waiting):,} requests go to others")
        return self.pool.start()
