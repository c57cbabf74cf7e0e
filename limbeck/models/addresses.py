"""Several addresses of one model: which is asked next, and which is left alone for a while.

The next request goes to the address with the fewest under way; no address has more than `most`. One that fails rests,
longer each time, and the others do its work; when all rest, the one whose rest ends first is asked. An outage is told
once. Which address answers changes no key and no identity.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from dataclasses import dataclass

LONGEST_REST = 60.0  # seconds
BUSY_REST = 1.0
BUSY = frozenset({429, 503, 529})
POLL_SECONDS = 0.01


@dataclass
class Address:
    """One address and how it is doing. `failures` are in a row; times are on the clock of `Addresses`."""

    url: str
    under_way: int = 0
    failures: int = 0
    failed_at: float = 0.0
    rests_until: float = 0.0
    told: bool = False


class Addresses:
    """The addresses of one server, shared by all connections to it, in whatever thread they are.

    Args:
        most: requests under way at one address.
    """

    def __init__(self, urls: Sequence[str], most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.all = [Address(url) for url in urls]
        self.most = most
        self.clock = clock
        self.note: Callable[[str], None] = lambda text: None
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Address]:
        """The address for one request, which counts as under way there until the end; waits while all are full."""
        while (address := self._take()) is None:
            await asyncio.sleep(POLL_SECONDS)
        try:
            yield address
        finally:
            with self._lock:
                address.under_way -= 1

    def _take(self) -> Address | None:
        with self._lock:
            now = self.clock()
            awake = [address for address in self.all if address.rests_until <= now]
            if not awake:
                awake = [min(self.all, key=lambda address: address.rests_until)]
            free = [address for address in awake if address.under_way < self.most]
            if not free:
                return None
            address = min(free, key=lambda address: address.under_way)
            address.under_way += 1
            return address

    def learn(
        self, address: Address, status: int, outcome: str, retry_after: float | None = None, began: float | None = None
    ) -> None:
        """What came of a request there: status 0 stands for no answer, and `outcome` says it in words.

        Args:
            began: when it was sent. One that was sent before the last failure says nothing new of the address.
        """
        with self._lock:
            note = ""
            if status in BUSY:
                address.rests_until = self.clock() + min(LONGEST_REST, retry_after or BUSY_REST)
            elif began is None or began >= address.failed_at:
                note = self._answered(address) if 0 < status < 500 else self._failed(address, outcome)
        if note:
            self.note(note)

    def _answered(self, address: Address) -> str:
        """Let it rest no longer; returns what to say of it."""
        address.failures, address.rests_until = 0, 0.0
        was_told, address.told = address.told, False
        return f"{address.url} answers again" if was_told else ""

    def _failed(self, address: Address, outcome: str) -> str:
        """Let it rest, longer each time; returns what to say of it."""
        address.failures += 1
        address.failed_at = self.clock()
        address.rests_until = address.failed_at + min(LONGEST_REST, 2.0**address.failures)
        was_told, address.told = address.told, True
        others = len(self.all) - 1
        return (
            ""
            if was_told
            else f"{address.url} fails ({outcome}): its work is done at the other {others}, if they answer"
        )

    def begin_without(self, urls: Container[str]) -> None:
        """Leave these alone at first: they did not answer when they were asked who they are."""
        for address in self.all:
            if address.url in urls:
                self.learn(address, 0, "no answer")

    def lost(self) -> list[str]:
        """Those that failed last."""
        return [address.url for address in self.all if address.failures]
