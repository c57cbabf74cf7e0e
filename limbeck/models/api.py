"""A teacher behind an OpenAI-compatible server.

A request that the server certainly did not process (429, 503, no connection) is repeated; one that it may have
processed (timeout, broken connection, another 5xx) is repeated, too, and counted as possibly billed. A slot is freed
only when its answer has been consumed, so no more than `concurrency` answers are ever under way.

Not covered: streaming, several answers to one request, providers that speak another protocol.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.config.teacher import Served
from limbeck.models.budget import Budget, Spending
from limbeck.models.chat import for_server
from limbeck.models.http import (
    Backoff,
    Call,
    Connection,
    Endpoint,
    Reply,
    as_dict,
    as_dicts,
    check_address,
    send_with_retries,
)
from limbeck.types import Finish, Generated, Request, UserError, content_hash

STORED_BYTES = 64 * 2**10  # of an answer that is not whole
POLL_SECONDS = 0.2
NOT_PROCESSED = frozenset({429, 503})
REPEATABLE = frozenset({408, 409})  # the request's own fault otherwise
# every request would get these; where to look
FATAL = {401: "the key", 403: "the key's rights", 404: "the address and the model's name"}
CONTROL_TOKEN = re.compile(r"<\|[a-z_]{2,32}\|>|</?s>|<(?:start|end)_of_turn>")
CHARS_PER_TOKEN = 3
FAILURES_IN_A_ROW = 10  # and two for each request under way, before the server is given up


@dataclass
class ApiTeacher:
    """Answers requests, several at once. `sleep` and `clock` measure all waiting."""

    settings: Served
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic

    can = frozenset({"text", "raw"})

    def __post_init__(self) -> None:
        settings = self.settings
        url = check_address(settings.url, "teacher.server.url", "http://127.0.0.1:8080/v1", settings.key)
        self.endpoint = Endpoint(url, settings.key, settings.timeout)
        self.budget = Budget(settings, self.sleep, self.clock)
        self._failures = 0
        self._identity: str | None = None

    @property
    def spending(self) -> Spending:
        return self.budget.spending

    def begin_with(self, answers: int, read: int, written: int) -> None:
        """Count what earlier processes got, so that ceilings hold for a run and not for a process."""
        self.budget.count_earlier(answers, read, written)

    @property
    def identity(self) -> str:
        """The model's name with a hash of what the server says of it; the same on another port.

        Raises:
            UserError: no such server, or no such model.
        """
        if self._identity is None:
            self._identity = self.endpoint.run(self._request_identity)
        return self._identity

    async def _request_identity(self, connection: Connection) -> str:
        reply = await connection.send(Call("GET", "/models"))
        if reply.failure:
            raise UserError(f"no answer from {self.endpoint.url}: {reply.error}; is the server running?")
        if reply.status != 200:
            where = FATAL.get(reply.status, "the server")
            raise UserError(f"{self.endpoint.url}/models answers {reply.status}: check {where}")
        models = {str(model.get("id")): model for model in as_dicts(as_dict(reply.json()).get("data"))}
        name = self.settings.name
        if name not in models:
            raise UserError(
                f"{self.endpoint.url} serves {', '.join(sorted(models)) or 'no model'}, not {name!r}: set"
                " teacher.server.name"
            )
        meta = as_dict(models[name].get("meta"))
        sizes = {key: meta[key] for key in ("n_params", "size", "n_vocab") if isinstance(meta.get(key), int)}
        return f"served:{name}-{content_hash([name, str(models[name].get('root', '')), sizes])[:12]}"

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes.

        Raises:
            UserError: the server refuses every request (key, name), fails again and again, or a ceiling is reached;
                the answers received before are yielded first.
        """
        loop = asyncio.new_event_loop()
        stream = self._stream(requests, stop)
        try:
            while (answer := loop.run_until_complete(_next(stream))) is not None:
                yield answer
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    async def _stream(
        self, requests: Sequence[Request], stop: Callable[[], bool]
    ) -> AsyncGenerator[tuple[Request, Generated]]:
        waiting = deque(requests)
        tasks = dict[asyncio.Task[Generated], Request]()
        error = None
        async with self.endpoint.connect() as connection:
            try:
                while (waiting or tasks) and not stop():
                    while waiting and not error and len(tasks) < self.settings.concurrency:
                        request = waiting.popleft()
                        tasks[asyncio.ensure_future(self._answer(connection, request))] = request
                    if not tasks:
                        break
                    done, _ = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
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

    # One request

    async def _answer(self, connection: Connection, request: Request) -> Generated:
        path = "/completions" if request.raw is not None else "/chat/completions"
        call = Call("POST", path, self._body(request), headers={"Idempotency-Key": request.key})
        return self._generated(request, await self.send(connection, call, estimated_tokens(request)))

    async def send(self, connection: Connection, call: Call, tokens: int) -> Reply:
        """The reply to one call, repeated as often as the settings allow and within the budget. The reply has an
        answer, or is the request's own fault (4xx), or is that of the last try.

        Args:
            tokens: what a try may cost.

        Raises:
            UserError: the server refuses every request, fails again and again, or a ceiling is reached.
        """
        handle = object()

        async def send_once(attempt: int) -> Reply:
            await self.budget.wait_for_turn(tokens)
            self.budget.begin(handle, tokens, repeated=attempt > 0)
            try:
                return await connection.send(call)
            finally:
                self.budget.end(handle)

        return await send_with_retries(send_once, self._is_final, Backoff(self.settings.retries + 1), self.sleep)

    def _is_final(self, reply: Reply) -> bool:
        """Whether to keep this reply, rather than try again; counts failures."""
        if _is_answer(reply.status):
            self._failures = 0
            return True
        url = self.endpoint.url
        if reply.status in FATAL or 300 <= reply.status < 400:
            where = FATAL.get(reply.status, "the address, which redirects elsewhere")
            raise UserError(f"{url} answers {reply.status}: check {where}. {reply.quote()}")
        if reply.status not in NOT_PROCESSED and reply.failure != "no connection":
            self.budget.spending.maybe_billed += 1
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW + 2 * self.settings.concurrency:
            raise UserError(
                f"{url} failed {self._failures} times in a row (last: {reply.outcome()}): check the server, then run it"
                f" again to go on. {reply.quote()}"
            )
        return False

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        prompt = for_server(request.messages) if request.raw is None else {"prompt": request.raw}
        body = prompt | {
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

    def _generated(self, request: Request, reply: Reply, count: bool = True) -> Generated:
        """The answer in a reply; `count` adds its tokens to the bill, where the server says how many they are."""
        if reply.status != 200:
            return Generated(None, "", "error", reply.text(STORED_BYTES))
        data = reply.json()
        usage = read_usage(data)
        if usage is not None and count:
            self.budget.count_tokens(*usage)
        text, finish = read_answer(
            data, self.settings.name, raw=request.raw is not None, max_tokens=request.sampling.max_tokens, usage=usage
        )
        raw = None if finish == "ok" else reply.text(STORED_BYTES)
        return Generated(None, text, finish, raw=raw, usage=usage or (0, 0))


def _is_answer(status: int) -> bool:
    """A whole answer, or the fault of this request alone, such as a prompt that is too long."""
    return status == 200 or (400 <= status < 500 and status not in (*NOT_PROCESSED, *FATAL, *REPEATABLE))


async def _next(stream: AsyncGenerator[tuple[Request, Generated]]) -> tuple[Request, Generated] | None:
    return await anext(stream, None)


def read_answer(
    data: Any, model: str, *, raw: bool, max_tokens: int, usage: tuple[int, int] | None
) -> tuple[str, Finish]:
    """(text, how it finished) of a reply's one choice.

    A reply of the wrong shape is `malformed`, whatever it says; an answer of `max_tokens` tokens is `length`, even if
    it says "stop".

    Args:
        raw: the reply is a completion's, not a chat's.
        usage: tokens read and written, where the server says them.
    """
    choices = as_dict(data).get("choices")
    answered_by = as_dict(data).get("model")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return "", "malformed"
    if isinstance(answered_by, str) and answered_by and not _is_same_model(answered_by, model):
        return "", "malformed"
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
    if not isinstance(text, str) or reason not in ("stop", "length") or CONTROL_TOKEN.search(text):
        return text if isinstance(text, str) else "", "malformed"
    if reason == "length" or (usage is not None and usage[1] >= max_tokens):
        return text, "length"
    return text, "ok" if text.strip() else "empty"


def _is_same_model(answered_by: str, model: str) -> bool:
    """Whether one name is the other with a date, or with an owner before it."""
    return answered_by.startswith(model) or model.startswith(answered_by) or answered_by.endswith(f"/{model}")


def estimated_tokens(request: Request) -> int:
    """About how many tokens a request may cost."""
    characters = len(request.raw or "") + sum(len(message["content"]) for message in request.messages)
    return characters // CHARS_PER_TOKEN + request.sampling.max_tokens


def read_usage(data: Any) -> tuple[int, int] | None:
    """(tokens read, tokens written) of a reply, None where it does not say both."""
    usage = as_dict(as_dict(data).get("usage"))
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(read) is int and type(written) is int and 0 <= read < 2**40 and 0 <= written < 2**40:
        return read, written
    return None
