"""A teacher behind a server: OpenAI's protocol, or that of the kind of server that the recipe names (`engines.py`).

A request that the server certainly did not process (429, 503, no connection) is repeated; one that it may have
processed (timeout, broken connection, another 5xx) is repeated, too, and counted as possibly billed. A slot is freed
only when its answer has been consumed, so no more than `concurrency` answers are ever under way at an address. A server
may have several addresses: a request that failed at one is repeated at another (`addresses.py`).

A setting that this model does not take is named by the server in a reply of status 400. Where nothing is lost by it
(the other name of the longest answer, no seed), the request is sent again without; else the run ends and says so.

Not covered: streaming, several answers to one request.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from limbeck.config.server import Served
from limbeck.models import replies
from limbeck.models.addresses import Addresses
from limbeck.models.budget import Billed, Budget, Spending, estimated_tokens
from limbeck.models.dialects import OPENAI, merged, put
from limbeck.models.engines import ALL, ENGINES, form_words
from limbeck.models.http import (
    MAX_BYTES,
    NAMED_BYTES,
    Backoff,
    Call,
    Connection,
    Endpoint,
    Reply,
    check_address,
    send_with_retries,
)
from limbeck.models.identity import Identity, identify, identify_all, is_answer, is_bad_key, what_to_check
from limbeck.models.loops import iterated
from limbeck.storage.tries import Tries
from limbeck.types import Generated, Request, UserError

POLL_SECONDS = 0.2
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the longest answer in OpenAI's protocol
FAILURES_IN_A_ROW = 10  # and two for each request under way, before the server is given up
MOST_WORDINGS = 4  # of one request, the first included
USELESS_AT_FIRST = 5  # replies, and one for each request under way, where it has not answered any


@dataclass
class ApiTeacher:
    """Answers requests, several at once. `sleep` and `clock` measure all waiting."""

    settings: Served
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic

    can = frozenset({"text", "raw"})

    def __post_init__(self) -> None:
        settings = self.settings
        self.engine = ENGINES[settings.kind]
        self.dialect = self.engine.dialect
        example = self.engine.url
        urls = [check_address(url, "teacher.server.url", example, settings.key) for url in settings.urls]
        self.endpoint = Endpoint(
            urls[0],
            settings.key,
            settings.timeout,
            key_header=self.engine.key_header,
            headers=self.engine.headers,
            addresses=Addresses(urls, settings.concurrency) if len(urls) > 1 else None,
        )
        self.at_once = settings.concurrency * len(urls)  # requests under way
        self.budget = Budget(settings, self.sleep, self.clock)
        self._limit = self.engine.limit or self.dialect.places["max_tokens"]
        self._seeded = "seed" in self.engine.takes
        self._failures = 0  # in a row
        self._useless = 0  # replies in a row that are no answers
        self._answered = False
        self._stopping = False
        self._sending = set[asyncio.Task[Any] | None]()
        self._away = set[str]()  # addresses that were not there when they were last asked
        self._identity: Identity | None = None

    @property
    def spending(self) -> Spending:
        return self.budget.spending

    def begin_with(self, read: int, written: int, tries: Tries) -> None:
        """Count what earlier processes got and tried, so that ceilings hold for a run and not for a process."""
        self.budget.count_earlier(read, written, tries)

    @property
    def identity(self) -> str:
        """The model's name with a hash of what the server says of it and of what is asked of it; the same on another
        port.

        Raises:
            UserError: no such server, another kind of server, or no such model.
        """
        if self._identity is None:
            self._identity, lost = self.endpoint.run(partial(identify_all, self.settings, self.engine))
            self._away |= lost.keys()
            if self.endpoint.addresses is not None:
                self.endpoint.addresses.begin_without(lost)
        return self._identity.name

    @property
    def lost(self) -> list[str]:
        """Those of several addresses that do not answer."""
        return [] if self.endpoint.addresses is None else self.endpoint.addresses.lost()

    def tell(self, note: Callable[[str], None]) -> None:
        """Say by `note` when one of several addresses fails, and when it answers again."""
        if self.endpoint.addresses is not None:
            self.endpoint.addresses.note = note

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes. Once `stop` is true nothing more is sent, and what is under way is
        waited for, since it is paid for.

        Raises:
            UserError: the server refuses every request (key, name), fails again and again, or a ceiling is reached;
                the answers received before are yielded first.
        """
        yield from iterated(self._stream(requests, stop))

    async def _stream(
        self, requests: Sequence[Request], stop: Callable[[], bool]
    ) -> AsyncGenerator[tuple[Request, Generated]]:
        waiting = deque(requests)
        self._stopping = False
        tasks = dict[asyncio.Task[Generated], Request]()
        error = None
        async with self.endpoint.connect() as connection:
            try:
                while waiting or tasks:
                    if stop():
                        self._stopping = True
                        waiting.clear()
                        for task in tasks.keys() - self._sending:
                            task.cancel()
                    while waiting and not error and len(tasks) < self.at_once:
                        request = waiting.popleft()
                        tasks[asyncio.ensure_future(self._answer(connection, request))] = request
                    if not tasks:
                        break
                    done, _ = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda task: task.cancelled() or task.exception() is not None):
                        request = tasks.pop(task)
                        if task.cancelled():
                            continue
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

    # One request

    async def _answer(self, connection: Connection, request: Request) -> Generated:
        tokens, most = estimated_tokens(request), MAX_BYTES + self._named_bytes(request)
        call = self._call(request)
        wordings = list[Any]()
        while len(wordings) < MOST_WORDINGS and call.body not in wordings:
            wordings.append(call.body)
            reply = await self.send(connection, call, tokens, max_bytes=most, key=request.key)
            refused = replies.refused_setting(reply)
            if refused is None or not self._can_do_without(refused, reply, request):
                break
            call = self._call(request, suffix=f"-{len(wordings) + 1}")
        generated = self._generated(request, reply)
        if reply.status == 200 and reply.truncated:
            raise UserError(
                f"{reply.url} answers with more than {most:,} bytes, of which no more are read: lower the writer's"
                " max_tokens, or teacher.server.logprobs where it is set, or check the server"
            )
        self._count_useless(generated, reply)
        return generated

    def _count_useless(self, generated: Generated, reply: Reply) -> None:
        """Give the server up where it calls one request after the other wrong, or each of its answers is malformed.

        Raises:
            UserError: with its own words.
        """
        if generated.finish == "malformed" or (generated.finish == "error" and 400 <= reply.status < 500):
            self._useless += 1
        elif generated.finish != "error":
            self._useless = 0
            self._answered = True
        most = FAILURES_IN_A_ROW + 2 * self.at_once
        if not self._answered:
            most = USELESS_AT_FIRST + self.at_once
        if self._useless >= most:
            what = "malformed answer" if generated.finish == "malformed" else f"refusal, {reply.status}"
            raise UserError(
                f"{self.endpoint.url} gave {self._useless} replies in a row that are no answers (last: {what}): change"
                f" what is wrong, and run it again to go on. {reply.quote()}"
            )

    def _call(self, request: Request, suffix: str = "") -> Call:
        """The HTTP request. `suffix` distinguishes one with another body from the first."""
        path = self.dialect.path.format(model=quote(self.settings.name, safe=""))
        if request.raw is not None:
            if self.dialect.raw_path is None:
                raise UserError(
                    f"{self.engine.title} answers conversations only: leave out the step that continues plain text, or"
                    " use another server"
                )
            path = self.dialect.raw_path
        return Call("POST", path, self._body(request), headers={"Idempotency-Key": request.key + suffix})

    def _can_do_without(self, refused: str, reply: Reply, request: Request) -> bool:
        """Whether the request can be worded otherwise, now that the server has refused this key of it. The new wording
        holds for all that follow.

        Raises:
            UserError: the recipe asks for what this model does not take.
        """
        if refused in LIMITS and self.dialect is OPENAI:
            self._limit = next(name for name in LIMITS if name != refused)
            return True
        if refused == "seed":
            self._seeded = False
            return True
        option = re.split(r"[.\[]", refused)[0]
        where = f"teacher.server.options.{option}: leave it out" if option in self.settings.options else ""
        if refused in ("temperature", "top_p", "topP"):
            where = "the writer's temperature and top_p: set them to 1, or only one of them to another value"
        if refused in ("logprobs", "top_logprobs"):
            where = "teacher.server.logprobs: leave it out, or lower it"
        if option in self._form_words(request):
            where = "the step that asks: constrain: false"
        if where:
            raise UserError(f"{self.endpoint.url} refuses {refused}: change {where}. {reply.quote()}")
        return False

    async def send(
        self, connection: Connection, call: Call, tokens: int, max_bytes: int = MAX_BYTES, key: str = ""
    ) -> Reply:
        """The reply to one call, repeated as often as the settings allow and within the budget. The reply has an
        answer, or is the request's own fault (4xx), or is that of the last try.

        Args:
            tokens: what a try may cost.
            max_bytes: no more of an answer is read.
            key: of the request whose bill is stored with its answer.

        Raises:
            UserError: the server refuses every request, fails again and again, or a ceiling is reached.
        """
        handle = object()

        async def send_once(attempt: int) -> Reply:
            outcome: Billed = "maybe"
            task = asyncio.current_task()

            def begin() -> None:
                if key and self._stopping:
                    raise asyncio.CancelledError
                self.budget.begin(handle, tokens, repeated=attempt > 0, key=key)
                self._sending.add(task)

            await self.budget.wait_for_turn(tokens)
            try:
                reply = await connection.send(call, max_bytes, begin=begin)
                outcome = replies.was_billed(reply)
                await self._notice(connection, reply)
                return reply
            finally:
                self._sending.discard(task)
                self.budget.end(handle, outcome)

        return await send_with_retries(send_once, self._is_final, Backoff(self.settings.retries + 1), self.sleep)

    async def _notice(self, connection: Connection, reply: Reply) -> None:
        """Refuse another model where the server was gone for a while: what it says is not the text that is asked
        for."""
        if reply.failure == "no connection":
            self._away.add(reply.url)
        elif reply.url in self._away and reply.status == 200 and self._identity is not None:
            now = await identify(self.settings, self.engine, connection.at(reply.url))
            if now != self._identity:
                raise UserError(
                    f"{reply.url} was away and came back with another model: {now.name}, not {self.identity}; serve"
                    " that one again and run it again to go on, or give another --out"
                )
            self._away.discard(reply.url)

    def _is_final(self, reply: Reply) -> bool:
        """Whether to keep this reply, rather than try again; counts failures."""
        url = reply.url
        if is_answer(reply.status) or replies.is_filtered(reply):
            self._failures = 0
            if not is_bad_key(reply, self.dialect):
                return True
        if replies.is_refused(reply.status) or replies.lacks_money(reply):
            where = what_to_check(reply, self.settings, self.dialect)
            raise UserError(f"{url} answers {reply.status}: check {where}. {reply.quote()}")
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW + 2 * self.at_once:
            raise UserError(
                f"{url} failed {self._failures} times in a row (last: {reply.outcome()}): check the server, then run it"
                f" again to go on. {reply.quote()}"
            )
        return False

    def _names_tokens_of(self, request: Request) -> bool:
        """Whether log-probabilities are asked for with this text: the recipe wants them, and they are of the plain
        softmax, since either the server gives no others or the text is drawn plainly."""
        sampling = request.sampling
        plain = (sampling.temperature, sampling.top_p, sampling.presence_penalty) == (1.0, 1.0, 0.0)
        wanted = self.settings.logprobs is not None and request.raw is None
        return wanted and (plain or self.engine.plain_logprobs)

    def _named_bytes(self, request: Request) -> int:
        """The most bytes that the log-probabilities may take in the reply to this request."""
        named = 1 + (self.settings.logprobs or 0) if self._names_tokens_of(request) else 0
        return NAMED_BYTES * named * request.sampling.max_tokens

    def _body(self, request: Request) -> dict[str, Any]:
        """The body of a request: the conversation, the settings that the server takes, the recipe's options, and what
        keeps the server's own defaults out of the text."""
        dialect = self.dialect
        sampling = request.sampling
        settings: dict[str, Any] = {
            "model": self.settings.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": int(request.key[:7], 16) if self._seeded else None,
            "stop": list(sampling.stop) or None,
            "presence_penalty": sampling.presence_penalty or None,
        }
        if self._names_tokens_of(request):
            settings |= {"logprobs": True, "top_logprobs": self.settings.logprobs}
        body: dict[str, Any] = dialect.frame(request.conversation) if request.raw is None else {"prompt": request.raw}
        for name, value in settings.items():
            if value is None or self.engine.defaults.get(name) == value:
                continue
            if name in ALL and name not in self.engine.takes:
                raise UserError(
                    f"{self.engine.title} takes no {name}, and this recipe's text needs it: use another server"
                )
            place = self._limit if name == "max_tokens" else dialect.places.get(name)
            if place is not None:
                put(body, place, value)
        options = merged(merged(self._neutral, self.settings.options), self._form_words(request))
        return merged(options, body | dict(dialect.always))

    @property
    def _neutral(self) -> Mapping[str, Any]:
        return self.engine.neutral if self._identity is None else self._identity.neutral

    def _form_words(self, request: Request) -> dict[str, Any]:
        """The keys of the body that say the form of the answer.

        Raises:
            UserError: this server can't be told.
        """
        words = {} if request.form is None else form_words(self.settings, request.form)
        if isinstance(words, str):
            raise UserError(f"{words}: set constrain: false at the step that asks")
        return words

    def _generated(self, request: Request, reply: Reply, count: bool = True) -> Generated:
        """The answer in a reply; `count` counts its tokens, or about how many they are where the server says none."""
        named = self.settings.logprobs if self._names_tokens_of(request) else None
        generated = replies.read_generated(reply, request, self.settings, self.dialect, named=named)
        if reply.status == 200 and count:
            self.budget.count(generated.usage, self.budget.estimate(request, generated.text, generated.finish))
        return generated
