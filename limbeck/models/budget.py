"""What a served teacher may cost and has cost: the recipe's ceilings and rates, and the bill."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import Literal

from limbeck.config.server import Served
from limbeck.storage.tries import Tries
from limbeck.types import Request, UserError

CHARS_PER_TOKEN = 3
Billed = Literal["yes", "no", "maybe"]


@dataclass
class Spending:
    """What was asked of the server: tries sent, those that were repeated, those possibly billed without an answer with
    the tokens that they cost at most, and the bill as far as the server reported it."""

    sent: int = 0
    repeated: int = 0
    maybe_billed: int = 0
    maybe_tokens: int = 0
    read: int = 0
    written: int = 0
    money: float = 0.0


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
        self.spending = replace(spending, read=read, written=written, money=self.price(read, written))

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

    def begin(self, request: Hashable, tokens: int, *, repeated: bool = False, key: str = "") -> None:
        """Count a try that may cost so many tokens; it is under way until `end`. It is written down where its request
        has a `key`.

        Raises:
            UserError: a ceiling could be passed if everything under way costs as much as it may.
        """
        self._check_ceilings(tokens)
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

    def count_tokens(self, read: int, written: int) -> None:
        """Add an answer's tokens to the bill."""
        self.spending.read += read
        self.spending.written += written
        self.spending.money += self.price(read, written)

    def _check_ceilings(self, tokens: int) -> None:
        limits = self.settings.limits
        spending = self.spending
        under_way = sum(each for each, _ in self._under_way.values()) + spending.maybe_tokens + tokens
        highest_price = max(self.price(1, 0), self.price(0, 1))
        for ceiling, needed, unit in (
            (limits.requests, spending.sent + 1, "requests"),
            (limits.tokens, spending.read + spending.written + under_way, "tokens, counting what is under way,"),
            (limits.money, spending.money + under_way * highest_price, "(money), counting what is under way,"),
        ):
            if ceiling is not None and needed > ceiling:
                maybe = f" ({spending.maybe_tokens:,} tokens of it at most may have been billed without an answer)"
                maybe = maybe if spending.maybe_tokens else ""
                raise UserError(
                    f"the ceiling of {ceiling} {unit} is reached{maybe}; the answers so far are kept: raise"
                    " teacher.server.limits and run it again"
                )


def estimated_tokens(request: Request) -> int:
    """About how many tokens a request may cost."""
    characters = len(request.raw or "") + sum(len(message["content"]) for message in request.conversation)
    return characters // CHARS_PER_TOKEN + request.sampling.max_tokens
