"""What the ranks of one run say to each other outside of collectives: whose turn it is, who is alive, who has failed.

All of it stands in the store of the process group, and every wait asks whether the others are still there: a rank that
works for hours alone (rank 0 elicits) keeps nobody's timeout, and one that hangs or dies ends the wait of all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]  # comes with accelerate
from torch.distributed import DistError

from limbeck.config import ranks
from limbeck.types import UserError

FIRST_PAUSE = 0.001  # seconds between two looks; they grow
LONGEST_PAUSE = 0.1
BEATS_IN_TIMEOUT = 5
LONGEST_BEAT = 5.0  # seconds
CONFIRM_SECONDS = 3.0  # in which it shows that a rank is gone whose connection is closed


class LostRankError(UserError):
    """Another rank has died, failed or does not answer. `is_silent`: it was awaited for the whole timeout."""

    def __init__(self, message: str, is_silent: bool) -> None:
        self.is_silent = is_silent
        super().__init__(message)


class KeyValueStore(Protocol):
    """The part of torch's stores that is used here."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


class Company:
    """One rank's side of it.

    Args:
        store: of all ranks.
        timeout: seconds without a sign of life after which a rank is given up.
    """

    def __init__(self, store: KeyValueStore, rank: int, size: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._turns = itertools.count()
        self._meetings = itertools.count()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        store.set(f"process/{rank}", str(os.getpid()))
        store.set(f"beat/{rank}", "begun")
        self._beats.start()

    # Rank 0 leads

    def tell(self, turn: dict[str, Any]) -> None:
        """Tell the others what is done next. An empty turn is the last."""
        self.store.set(f"turn/{next(self._turns)}", json.dumps(turn))

    def hear(self) -> dict[str, Any]:
        """Wait for rank 0's next turn.

        Raises:
            LostRankError: rank 0 is gone.
        """
        turn: dict[str, Any] = json.loads(self._wait(f"turn/{next(self._turns)}", 0))
        return turn

    def meet(self) -> None:
        """Wait until every rank is here, however long it works before.

        Raises:
            LostRankError: one of them is gone.
        """
        meeting = next(self._meetings)
        self.store.set(f"meeting/{meeting}/{self.rank}", "here")
        for rank in range(self.size):
            self._wait(f"meeting/{meeting}/{rank}", rank)

    # Faults

    def fail(self, error: BaseException) -> bool:
        """Say that this rank ends with an error. Returns whether it is the one that should tell the user: not if
        another has failed before it, or has died, of which the launcher tells."""
        try:
            blamed = isinstance(error, LostRankError) and not error.is_silent
            if self._another_ended(CONFIRM_SECONDS if blamed else 0.0):
                return False
            tells = self.store.add("told", 1) == 1
            self.store.set("fault", str(self.rank))
            return tells
        except RuntimeError:  # the store is gone with the rank, or launcher, that kept it
            return True

    def _another_ended(self, patience: float) -> bool:
        """Whether another rank has said that it fails, or has died; looked for during so many seconds."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        ends = time.monotonic() + patience
        while not (self.store.check(["fault"]) or any(map(self._has_died, others))):
            if time.monotonic() >= ends:
                return False
            time.sleep(LONGEST_PAUSE)
        return True

    def leave(self) -> None:
        """Stop giving signs of life: the work is done."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "done")

    def _has_died(self, rank: int) -> bool:
        """Whether that rank's process has ended before its work. Only ranks that `--ranks` started are on this machine:
        for others it is False."""
        if ranks.BY_COMMAND not in os.environ or not self.store.check([f"process/{rank}"]):
            return False
        try:
            ended = psutil.Process(int(self.store.get(f"process/{rank}"))).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            ended = True
        return ended and not self.store.check([f"left/{rank}"])

    def _beat(self) -> None:
        for number in itertools.count():
            try:
                self.store.set(f"beat/{self.rank}", str(number))
            except RuntimeError:
                return
            if self._ended.wait(min(LONGEST_BEAT, self.timeout / BEATS_IN_TIMEOUT)):
                return

    def _wait(self, key: str, awaited: int) -> bytes:
        """The value of a key that another rank sets."""
        pause = FIRST_PAUSE
        alive = _SignsOfLife(lambda: self.store.get(f"beat/{awaited}"), self.timeout)
        try:
            while not self.store.check([key]):
                if self.store.check(["fault"]):
                    raise LostRankError(lost("another rank has failed"), is_silent=False)
                if self._has_died(awaited) and not self.store.check([key]):
                    raise LostRankError(lost(f"rank {awaited} has died"), is_silent=False)
                if not alive():
                    raise LostRankError(lost(f"rank {awaited} has not answered for {self.timeout:g} s"), is_silent=True)
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 1.5)
            return self.store.get(key)
        except RuntimeError as error:
            raise lost_rank(error, self.timeout) or error from error


class _SignsOfLife:
    """Whether a value has changed within a timeout."""

    def __init__(self, read: Callable[[], bytes], timeout: float) -> None:
        self.read = read
        self.timeout = timeout
        self.last = b""
        self.changed_at = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if (value := self.read()) != self.last:
            self.last = value
            self.changed_at = now
        return now - self.changed_at < self.timeout


def lost(what: str) -> str:
    """The one message about a rank that is gone."""
    return (
        f"{what}, so all ranks ended; finished work is kept: run it again to go on from the last checkpoint"
        " (machine.timeout is how long a rank is waited for)"
    )


CLOSED = (
    *("closed by peer", "connection reset", "broken pipe", "connection was closed", "failed to recv"),
    *("socket closed", "remote process exited"),
)
SILENT = ("timed out", "timeout")
OF_COLLECTIVES: Sequence[str] = ("gloo", "nccl", "store", "process group", "processgroup")


def lost_rank(error: RuntimeError, timeout: float) -> LostRankError | None:
    """The error for a collective or a store that failed since another rank is gone; None for any other error."""
    text = str(error).lower()
    if not isinstance(error, DistError) and not any(word in text for word in (*OF_COLLECTIVES, *CLOSED)):
        return None
    if any(word in text for word in SILENT):
        return LostRankError(lost(f"a rank has not answered for {timeout:g} s"), is_silent=True)
    if any(word in text for word in CLOSED):
        return LostRankError(lost(f"a rank has died ({str(error).splitlines()[0][:200]})"), is_silent=False)
    return None
