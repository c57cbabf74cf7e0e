"""A teacher behind an OpenAI-compatible server: every answer typed, every try counted, every wait ended.

One retry layer. What the server surely did not do (429, 503, no connection) is asked again; what it may have done (no
answer in time, a broken connection, another 5xx) too, but counted as possibly billed. An answer's place is freed when
its reader has taken it, so that at any moment no more than `concurrency` answers are on their way. The key is read from
the environment, sent to this address alone, and taken out of whatever the server says.

Not covered: streaming, several answers to one request, providers that speak another protocol.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from limbeck.config.teacher import Served
from limbeck.types import Finish, Generated, Request, UserError, content_hash

MOST_BYTES = 16 * 2**20
KEPT_BYTES = 64 * 2**10  # of an answer that are read, and of one that is not whole that are kept
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0
POLL = 0.2
AGAIN = frozenset({429, 503})  # the server did nothing
STOPS = {401: "the key", 403: "the key's rights", 404: "the address and the model's name"}
CONTROL = re.compile(r"<\|[a-z_]{2,32}\|>|</?s>|<(?:start|end)_of_turn>")
CHARS_PER_TOKEN = 3
IN_A_ROW = 10  # failures, and two for each request under way, before the server is given up
certificates = cache(ssl.create_default_context)
Found = TypeVar("Found")


@dataclass
class Spent:
    """What was asked of the server: tries sent, those asked again, those possibly billed without an answer, and the
    bill as far as the server told it. Of earlier processes their kept answers alone are counted."""

    sent: int = 0
    again: int = 0
    maybe_billed: int = 0
    read: int = 0
    written: int = 0
    money: float = 0.0


@dataclass
class ApiTeacher:
    """Answers requests, several at once. `sleep` and `clock` are what waits are made of."""

    settings: Served
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic
    spent: Spent = field(default_factory=Spent)

    can = frozenset({"text", "raw"})

    def begin_with(self, answers: int, read: int, written: int) -> None:
        """Count what earlier processes got, so that ceilings are a run's and not a process's."""
        self.spent = Spent(sent=answers, read=read, written=written, money=self.price(read, written))

    def __post_init__(self) -> None:
        parts = urlsplit(self.settings.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise UserError(
                "teacher.server.url must look like http://127.0.0.1:8080/v1, without a password: the key comes from the"
                " environment"
            )
        self._url = self.settings.url.rstrip("/")
        self._key = os.environ.get(self.settings.key, "")
        self._noise = random.Random(0)  # noqa: S311 (jitter, not a secret)
        self._next = 0.0
        self._window = deque[tuple[float, int]]()
        self._failures = 0
        self._flying = dict[int, int]()
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """The model's name with a hash of what the server says of it; the same on another port.

        Raises:
            UserError: no such server, or no such model.
        """
        if self._identity is None:
            self._identity = asyncio.run(self._ask_identity())
        return self._identity

    async def _ask_identity(self) -> str:
        async with self.client() as client:
            try:
                status, _, body = await self._sent(client, "GET", "/models", None, "")
            except (httpx2.HTTPError, TimeoutError) as error:
                raise UserError(f"no answer from {self._url}: {type(error).__name__}; is the server running?") from None
        if status != 200:
            raise UserError(f"{self._url}/models answers {status}: look at {STOPS.get(status, 'the server')}")
        read = read_json(body)
        listed = read.get("data") if isinstance(read, dict) else None
        known = {str(one.get("id")): one for one in listed if isinstance(one, dict)} if isinstance(listed, list) else {}
        if self.settings.name not in known:
            raise UserError(
                f"{self._url} serves {', '.join(sorted(known)) or 'no model'}, not {self.settings.name!r}: set"
                " teacher.server.name"
            )
        facts = known[self.settings.name]
        meta: dict[str, Any] = facts["meta"] if isinstance(facts.get("meta"), dict) else {}
        sizes = {key: meta[key] for key in ("n_params", "size", "n_vocab") if isinstance(meta.get(key), int)}
        return (
            f"served:{self.settings.name}-{content_hash([self.settings.name, str(facts.get('root', '')), sizes])[:12]}"
        )

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes.

        Raises:
            UserError: the server refuses all alike (key, name), fails again and again, or a ceiling is reached; what
                was answered before is handed out first.
        """
        loop = asyncio.new_event_loop()
        stream = self._stream(requests, stop)
        try:
            while (found := loop.run_until_complete(_next(stream))) is not None:
                yield found
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    async def _stream(
        self, requests: Sequence[Request], stop: Callable[[], bool]
    ) -> AsyncGenerator[tuple[Request, Generated]]:
        waiting = deque(requests)
        tasks = dict[asyncio.Task[Generated], Request]()
        error = None
        async with self.client() as client:
            try:
                while (waiting or tasks) and not stop():
                    while waiting and not error and len(tasks) < self.settings.concurrency:
                        request = waiting.popleft()
                        tasks[asyncio.ensure_future(self._answer(client, request))] = request
                    if not tasks:
                        break
                    done, _ = await asyncio.wait(tasks, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        request = tasks.pop(task)
                        failure = task.exception()
                        if failure is None:
                            yield request, task.result()
                        elif not isinstance(failure, UserError):
                            raise failure
                        else:
                            error = error or failure
                            waiting.clear()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if error is not None:
            raise error

    # Limits

    def _check_ceilings(self, tokens: int) -> None:
        """Refuse a try of so many tokens that might pass a ceiling if all that are under way write as much as they
        may."""
        limits = self.settings.limits
        flying = sum(self._flying.values()) + tokens
        dearest = max(self.price(1, 0), self.price(0, 1))
        for ceiling, there, what in (
            (limits.requests, self.spent.sent + 1, "requests"),
            (limits.tokens, self.spent.read + self.spent.written + flying, "tokens, counting what is under way,"),
            (limits.money, self.spent.money + flying * dearest, "(money), counting what is under way,"),
        ):
            if ceiling is not None and there > ceiling:
                raise UserError(
                    f"the ceiling of {ceiling} {what} is reached; what was answered is kept: raise"
                    " teacher.server.limits and run it again"
                )

    def price(self, read: int, written: int) -> float:
        """What so many tokens cost, in the currency of the recipe's price."""
        price = self.settings.price
        return (read * price.input + written * price.output) / 1e6 if price else 0.0

    async def _turn(self, tokens: int) -> None:
        """Wait until the rate limits let one more request out."""
        per_minute = self.settings.requests_per_minute
        most = self.settings.tokens_per_minute
        if per_minute is not None:
            begin = max(self.clock(), self._next)
            self._next = begin + 60 / per_minute
            await self._pause(begin - self.clock())
        while most is not None:
            while self._window and self._window[0][0] <= self.clock() - 60:
                self._window.popleft()
            if not self._window or sum(count for _, count in self._window) + tokens <= most:
                self._window.append((self.clock(), tokens))
                return
            await self._pause(self._window[0][0] + 60 - self.clock())

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await self.sleep(seconds)

    # Other things than answers

    def wait(self, ask: Callable[[httpx2.AsyncClient], Awaitable[Found]]) -> Found:
        """What `ask` finds out with a connection of its own."""

        async def asked() -> Found:
            async with self.client() as client:
                return await ask(client)

        return asyncio.run(asked())

    async def peek(self, client: httpx2.AsyncClient, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, what the server says as JSON or None) of one request that costs nothing; status 0 where there is no
        answer."""
        try:
            status, _, content = await self._sent(client, method, path, body, "")
        except (httpx2.HTTPError, TimeoutError):
            return 0, None
        return status, read_json(content)

    # One request

    async def _answer(self, client: httpx2.AsyncClient, request: Request) -> Generated:
        """The answer, asked for as often as it takes and may."""
        path = "/completions" if request.raw is not None else "/chat/completions"
        status, body = await self.tried(client, path, self._body(request), request.key, most_tokens(request))
        return self._generated(request, status, body) if status else Generated(None, "", "error", _kept(body))

    async def tried(self, client: httpx2.AsyncClient, path: str, body: Any, key: str, tokens: int) -> tuple[int, bytes]:
        """(status, what the server says) of one request, asked as often as it takes and may; status 0 where every try
        failed.

        Args:
            tokens: what it may cost.

        Raises:
            UserError: the server refuses all alike, fails again and again, or a ceiling is reached.
        """
        last = b""
        flying = object()
        for attempt in range(self.settings.retries + 1):
            await self._turn(tokens)
            self._check_ceilings(tokens)
            self._flying[id(flying)] = tokens
            self.spent.sent += 1
            self.spent.again += attempt > 0
            wait: float | None = None
            try:
                status, headers, last = await self._sent(client, "POST", path, body, key)
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout):
                status = 0
            except (httpx2.HTTPError, TimeoutError):
                status = -1
            finally:
                self._flying.pop(id(flying), None)
            if status == 200 or (400 <= status < 500 and status not in (*AGAIN, *STOPS, 408, 409)):
                self._failures = 0
                return status, last
            if status in STOPS or 300 <= status < 400:
                raise UserError(
                    f"{self._url} answers {status}: look at {STOPS.get(status, 'the address, which leads elsewhere')}."
                    f" {said(last)}"
                )
            if status in AGAIN:
                wait = _retry_after(headers.get("retry-after"))
            elif status != 0:
                self.spent.maybe_billed += 1
            self._failures += 1
            if self._failures >= IN_A_ROW + 2 * self.settings.concurrency:
                told = status if status > 0 else "no answer" if status else "no connection"
                raise UserError(
                    f"{self._url} failed {self._failures} times in a row (last: {told}): look at the server, then run"
                    " it again to go on. " + said(last)
                )
            if attempt < self.settings.retries:
                await self._pause(
                    wait if wait is not None else min(LONGEST_PAUSE, 0.5 * 2**attempt) * self._noise.uniform(0.5, 1.5)
                )
        return 0, last

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        asked = {"messages": list(request.messages)} if request.raw is None else {"prompt": request.raw}
        body = asked | {
            "model": self.settings.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": int(request.key[:7], 16),
            "stream": False,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.presence_penalty:
            body["presence_penalty"] = sampling.presence_penalty
        return body

    async def _sent(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any, key: str
    ) -> tuple[int, httpx2.Headers, bytes]:
        """(status, headers, the first bytes of the answer without the key); everything within the time that one answer
        may take. A path that begins with two slashes is the server's own, beside `/v1`."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        if key:
            headers["Idempotency-Key"] = key
        address = self._url.removesuffix("/v1") + path[1:] if path.startswith("//") else self._url + path
        async with (
            asyncio.timeout(self.settings.timeout),
            client.stream(method, address, json=body, headers=headers) as reply,
        ):
            found = bytearray()
            async for part in reply.aiter_bytes():
                found += part
                if len(found) > MOST_BYTES:
                    break
            plain = bytes(found)
            return reply.status_code, reply.headers, plain.replace(self._key.encode(), b"[key]") if self._key else plain

    def client(self) -> httpx2.AsyncClient:
        """A connection pool that knows neither proxies nor redirects."""
        verify: Any = certificates() if self._url.startswith("https") else False
        limit = httpx2.Timeout(self.settings.timeout, connect=min(CONNECT_SECONDS, self.settings.timeout))
        return httpx2.AsyncClient(timeout=limit, follow_redirects=False, verify=verify, trust_env=False)

    def _generated(self, request: Request, status: int, body: bytes) -> Generated:
        if status != 200:
            # this request's own fault, such as a prompt that is too long
            return Generated(None, "", "error", _kept(body))
        data = read_json(body) if len(body) <= MOST_BYTES else None
        usage = _usage(data)
        if usage is not None:
            self.spent.read += usage[0]
            self.spent.written += usage[1]
            self.spent.money += self.price(*usage)
        text, finish = read_answer(
            data, self.settings.name, request.raw is not None, request.sampling.max_tokens, usage
        )
        # a bill that was not told
        return Generated(None, text, finish, None if finish == "ok" else _kept(body), usage or (0, 0))


def read_answer(data: Any, model: str, raw: bool, max_tokens: int, usage: tuple[int, int] | None) -> tuple[str, Finish]:
    """(text, what became of it) of a reply's one choice. What isn't of the right shape is `malformed`, whatever it
    says; what took as many tokens as there might be is `length`, though it says "stop"."""
    choices = data.get("choices") if isinstance(data, dict) else None
    named = data.get("model") if isinstance(data, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return "", "malformed"
    if (
        isinstance(named, str)
        and named
        and not (named.startswith(model) or model.startswith(named) or named.endswith(f"/{model}"))
    ):
        return "", "malformed"  # another model's answer
    message = choices[0] if raw else choices[0].get("message")
    if not isinstance(message, dict):
        return "", "malformed"
    text = message.get("text" if raw else "content")
    reason = choices[0].get("finish_reason")
    if isinstance(message.get("refusal"), str) and message["refusal"].strip():
        return message["refusal"], "refused"
    if reason == "content_filter":
        return text if isinstance(text, str) else "", "filtered"
    if text is None and reason in ("stop", "length"):
        text = ""
    if not isinstance(text, str) or reason not in ("stop", "length") or CONTROL.search(text):
        return text if isinstance(text, str) else "", "malformed"
    if reason == "length" or (usage is not None and usage[1] >= max_tokens):
        return text, "length"
    return text, "ok" if text.strip() else "empty"


async def _next(stream: AsyncGenerator[tuple[Request, Generated]]) -> tuple[Request, Generated] | None:
    return await anext(stream, None)


def most_tokens(request: Request) -> int:
    """What a request may cost in tokens, about."""
    asked = len(request.raw or "") + sum(len(message["content"]) for message in request.messages)
    return asked // CHARS_PER_TOKEN + request.sampling.max_tokens


def _usage(data: Any) -> tuple[int, int] | None:
    usage = data.get("usage") if isinstance(data, dict) else None
    found = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    counts = [count for count in found if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40]
    return (counts[0], counts[1]) if len(counts) == 2 else None


def read_json(body: bytes) -> Any:
    """The body as JSON; None where it is none, holds no number where one stands (NaN), or a key twice."""

    def refuse(text: str) -> Any:
        raise ValueError(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None


def _retry_after(value: str | None) -> float | None:
    """Seconds that the server asks to wait, given as a number or a date; at most a minute."""
    if value is None:
        return None
    try:
        seconds = (
            float(value)
            if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value)
            else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (TypeError, ValueError):
        return None
    return min(LONGEST_PAUSE, max(0.0, seconds))


def said(body: bytes) -> str:
    return f"It says: {body[:200].decode('utf-8', 'replace')!r}" if body else ""


def _kept(body: bytes) -> str:
    return body[:KEPT_BYTES].decode("utf-8", "replace")
