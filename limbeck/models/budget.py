"""What a served teacher may cost and has cost: the recipe's ceilings and rates, and the bill."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import Literal

from limbeck.config.server import Served
from limbeck.storage.store import Store
from limbeck.storage.tries import Tries
from limbeck.types import Finish, Request, UserError

CHARS_PER_TOKEN = 3
Billed = Literal["yes", "no", "maybe"]


@dataclass
class Spending:
    """What was asked of the server: tries sent, those that were repeated, those possibly billed without an answer with
    the tokens that they cost at most, the bill as far as the server reported it, and about how many tokens the answers
    took of which it did not report any."""

    sent: int = 0
    repeated: int = 0
    maybe_billed: int = 0
    maybe_tokens: int = 0
    read: int = 0
    written: int = 0
    money: float = 0.0
    estimated: int = 0


class Budget:
    """Holds requests back until the rates allow them, and refuses those that could pass a ceiling."""

    def __init__(
        self, settings: Served, sleep: Callable[[float], Awaitable[None]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.sleep = sleep
        self.clock = clock
        self.spending = Spending()
        self.tries: Tries | None = None
        self._under_way = dict[Hashable, tuple[int, int | None]]()  # (tokens at most, number among the tries)
        self._next_begin = 0.0
        self._last_minute = deque[tuple[float, int]]()  # (when, tokens)

    def count_earlier(self, read: int, written: int, tries: Tries) -> None:
        """Count what earlier processes got and tried, so that ceilings hold for a run and not for a process."""
        self.tries = tries
        count, tokens = tries.unanswered()
        spending = Spending(sent=tries.all(), maybe_billed=count, maybe_tokens=tokens)
        with Store(tries.path, read_only=True) as store:
            for request, text, finish, times in store.uncounted(tries.writer):
                spending.estimated += times * self.estimate(request, text, finish)
        self.spending = replace(spending, read=read, written=written, money=self.price(read, written))

    def estimate(self, request: Request, text: str, finish: Finish) -> int:
        """About how many tokens an answer took, the most where its text does not tell."""
        whole = finish == "ok" and self.settings.reasoning != "drop"
        return estimated_tokens(request, text if whole else None)

    def is_not_stored(self, key: str) -> None:
        """The answer to this request is there, and won't be stored with its bill."""
        if self.tries is not None:
            self.tries.answered(key)

    def price(self, read: int, written: int) -> float:
        """The cost of these tokens, in the currency of the recipe's price."""
        price = self.settings.price
        return (read * price.input + written * price.output) / 1e6 if price else 0.0

    async def wait_for_turn(self, tokens: int) -> None:
        """Wait until the rates per minute allow one more request."""
        per_minute = self.settings.requests_per_minute
        if per_minute is not None:
            begin = max(self.clock(), self._next_begin)
            self._next_begin = begin + 60 / per_minute
            await self._sleep(begin - self.clock())
        limit = self.settings.tokens_per_minute
        while limit is not None:
            while self._last_minute and self._last_minute[0][0] <= self.clock() - 60:
                self._last_minute.popleft()
            if not self._last_minute or sum(count for _, count in self._last_minute) + tokens <= limit:
                self._last_minute.append((self.clock(), tokens))
                return
            await self._sleep(self._last_minute[0][0] + 60 - self.clock())

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            await self.sleep(seconds)

    def begin(
        self, request: Hashable, tokens: int, *, repeated: bool = False, key: str = "", checked: bool = False
    ) -> None:
        """Count a try that may cost so many tokens; it is under way until `end`. It is written down where its request
        has a `key`.

        Args:
            checked: it was held against the ceilings before.

        Raises:
            UserError: a ceiling could be passed if everything under way costs as much as it may.
        """
        if not checked:
            self.check(tokens)
        number = self.tries.begin(key, tokens) if self.tries is not None and key else None
        self._under_way[request] = tokens, number
        self.spending.sent += 1
        self.spending.repeated += repeated

    def end(self, request: Hashable, billed: Billed) -> None:
        """The try is over; without effect where it is already."""
        tokens, number = self._under_way.pop(request, (None, None))
        if tokens is not None and billed == "maybe":
            self.spending.maybe_billed += 1
            self.spending.maybe_tokens += tokens
        elif number is not None and billed == "no":
            assert self.tries is not None
            self.tries.refused(number)

    def count(self, usage: tuple[int, int] | None, estimate: int) -> None:
        """Add an answer's tokens to the bill, (read, written). Where the server does not say them, `estimate` counts
        against the ceilings, and the bill stays as it is."""
        if usage is None or not any(usage):
            self.spending.estimated += estimate
            return
        read, written = usage
        self.spending.read += read
        self.spending.written += written
        self.spending.money += self.price(read, written)

    def check(self, tokens: int, requests: int = 1) -> None:
        """Refuse requests that may cost so many tokens together.

        Raises:
            UserError: a ceiling could be passed if everything under way costs as much as it may.
        """
        limits = self.settings.limits
        spending = self.spending
        unsaid = spending.maybe_tokens + spending.estimated
        under_way = sum(each for each, _ in self._under_way.values()) + unsaid + tokens
        highest_price = max(self.price(1, 0), self.price(0, 1))
        for ceiling, needed, unit in (
            (limits.requests, spending.sent + requests, "requests"),
            (limits.tokens, spending.read + spending.written + under_way, "tokens, counting what is under way,"),
            (limits.money, spending.money + under_way * highest_price, "(money), counting what is under way,"),
        ):
            if ceiling is not None and needed > ceiling:
                notes = ""
                if spending.maybe_tokens:
                    notes = f" ({spending.maybe_tokens:,} tokens of it at most may have been billed without an answer)"
                if spending.estimated:
                    notes += f" ({spending.estimated:,} tokens of it are estimated: the server did not count them)"
                raise UserError(
                    f"the ceiling of {ceiling} {unit} is reached{notes}; the answers so far are kept: raise"
                    " teacher.server.limits and run it again"
                )


def estimated_tokens(request: Request, answer: str | None = None) -> int:
    """About how many tokens a request may cost; with its whole `answer`, about how many it took."""
    characters = len(request.raw or "") + sum(len(message["content"]) for message in request.conversation)
    written = request.sampling.max_tokens
    if answer is not None:
        written = min(written, len(answer) // CHARS_PER_TOKEN + 1)
    return characters // CHARS_PER_TOKEN + written
