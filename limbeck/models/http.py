"""HTTP to model servers: addresses, keys, connections, bounded answers, JSON that is not trusted, and retries.

A connection knows no proxy and follows no redirect, so the key goes to the named host alone. The key is read from the
environment for each connection, stored nowhere, and taken out of what is shown or stored of the server's words; what
is parsed is what the server sent.

Retries are ours, not tenacity's: the budget must be checked and counted before each try and the pause depends on the
reply, so only the six lines of `send_with_retries` would go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2

from limbeck.config.keys import check_origin
from limbeck.models.addresses import Addresses
from limbeck.models.loops import run_async
from limbeck.types import UserError, printable

MAX_BYTES = 16 * 2**20  # of one answer, beside the log-probabilities of its tokens
NAMED_BYTES = 256  # of one token with its log-probability at the most, also where JSON is indented
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0
MOST_SHOWN = 1200  # characters of a server's words, before they are made printable
LONGEST_SPELLING = 9  # characters of a key's character, where JSON within JSON escapes it
LEAST_SECRET = 8  # characters; a shorter key could be a piece of any word, and keeps no secret
KEY_CHARACTERS = re.compile(r"[!#-\[\]-~]*")  # a header can carry them, and JSON does not escape them
Failure = Literal["", "no connection", "timeout", "broken connection"]
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
T = TypeVar("T")

certificates = cache(ssl.create_default_context)  # reading them takes longer than a request


def check_address(url: str, setting: str, example: str, key_variable: str) -> str:
    """The address of a server, without a slash at its end.

    Args:
        setting: where the user wrote it, for the message.
        key_variable: the environment variable that holds the server's key.

    Raises:
        UserError: not an http address, or one with a password, a query or a fragment.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme in ("http", "https") and parts.hostname and is_plain and parts.port != 0:
            return url.rstrip("/")
    raise UserError(
        f"{setting} must look like {example}, without a password: the key comes from the environment variable"
        f" {key_variable}"
    )


@dataclass(frozen=True)
class Upload:
    """A file to send as a form, with the form's other fields."""

    name: str
    content: bytes
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """One HTTP request. `path` is below the endpoint's address, or at the server's root (beside `/v1`)."""

    method: Literal["GET", "POST"]
    path: str
    body: Any = None
    at_root: bool = False
    upload: Upload | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The outcome of one request: an answer, or (with `status` 0) why there is none.

    `body` and `json` are what the server sent, `text`, `error_text` and `quote` are without the `key`. Where there is
    no answer, `error` is the exception's name, with the reason of a failed connection; `truncated` means that the body
    is longer than was read; `retry_after` is in seconds. `url` is the address that was asked.
    """

    status: int = 0
    body: bytes = field(default=b"", repr=False)
    truncated: bool = False
    retry_after: float | None = None
    failure: Failure = ""
    error: str = ""
    key: str = field(default="", repr=False)
    url: str = ""

    def json(self) -> Any:
        """The body as JSON, None where it is not (see `read_json`) or not whole."""
        return None if self.truncated else read_json(self.body)

    def text(self, limit: int | None = None) -> str:
        """The body as text without the key, at most `limit` bytes of it."""
        end = None if limit is None else limit + LONGEST_SPELLING * len(self.key)  # so that a key which is cut is found
        return without_key(self.body[:end].decode("utf-8", "replace"), self.key)[:limit]

    def outcome(self) -> str:
        """The status or the failure, for a message."""
        return str(self.status) if self.status else self.failure

    def error_text(self) -> str:
        """What the server says went wrong, fit for a message; empty where it says nothing."""
        data = as_dict(self.json())
        error = data.get("error") or data.get("message") or data.get("detail")
        message = (error.get("message") or error) if isinstance(error, dict) else error
        return printable(without_key(str(message), self.key) if message else self.text(MOST_SHOWN))

    def quote(self) -> str:
        """A sentence with what the server says went wrong, empty where it says nothing."""
        text = self.error_text()
        return f"It says: {text!r}" if text else ""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and which environment variable holds its key. One exchange may take `timeout` seconds.

    `key_header` is the header of the key and what stands before it there; `headers` go along with every request. With
    `addresses`, of which `url` is the first, each request goes to one of them.
    """

    url: str
    key_variable: str
    timeout: float
    connect_timeout: float = CONNECT_SECONDS
    key_header: tuple[str, str] = ("Authorization", "Bearer ")
    headers: Mapping[str, str] = field(default_factory=dict)
    addresses: Addresses | None = None

    @property
    def urls(self) -> list[str]:
        """All of its addresses."""
        return [self.url] if self.addresses is None else [address.url for address in self.addresses.all]

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """A pool of connections, as many as there are requests under way.

        A `UserError` that is raised within loses the key, if it has it from the server.

        Raises:
            UserError: the key has characters that a header can't carry, or is for another address.
        """
        key = read_key(self.key_variable)
        if key:
            for url in self.urls:
                check_origin(self.key_variable, url)
        header, prefix = self.key_header
        headers = {"Accept-Encoding": "identity", **self.headers} | ({header: f"{prefix}{key}"} if key else {})
        verify: Any = certificates() if any(url.startswith("https") for url in self.urls) else False
        async with httpx2.AsyncClient(
            headers=headers,
            verify=verify,
            timeout=httpx2.Timeout(None, connect=min(self.connect_timeout, self.timeout)),
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
            trust_env=False,
        ) as client:
            try:
                yield Connection(self, client, key)
            except UserError as error:
                error.args = tuple(without_key(str(part), key) for part in error.args)
                raise

    def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """The result of `work` with a connection of its own."""

        async def connected() -> T:
            async with self.connect() as connection:
                return await work(connection)

        return run_async(connected)


class Connection:
    """An open pool of connections to one endpoint, at all of its addresses."""

    def __init__(self, endpoint: Endpoint, client: httpx2.AsyncClient, key: str) -> None:
        self.endpoint = endpoint
        self._client = client
        self.key = key

    def at(self, url: str) -> Connection:
        """The same connections, to one of the endpoint's addresses alone."""
        return Connection(replace(self.endpoint, url=url, addresses=None), self._client, self.key)

    async def send(
        self,
        call: Call,
        max_bytes: int = MAX_BYTES,
        seconds: float | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> Reply:
        """One try, in `seconds` (the endpoint's timeout if left out). A failed exchange is a reply, too.

        Args:
            max_bytes: no more of the answer is read.
            begin: called once an address is free, just before it is sent.
        """
        addresses = self.endpoint.addresses
        if addresses is None:
            begin()
            reply = await self._exchange(self.endpoint.url, call, max_bytes, seconds)
            return replace(reply, url=self.endpoint.url)
        async with addresses.turn() as address:
            begin()
            began = addresses.clock()
            reply = await self._exchange(address.url, call, max_bytes, seconds)
        addresses.learn(address, reply.status, reply.outcome(), reply.retry_after, began=began)
        return replace(reply, url=address.url)

    async def _exchange(self, address: str, call: Call, max_bytes: int, seconds: float | None) -> Reply:
        url = address.removesuffix("/v1") if call.at_root else address
        upload = call.upload
        try:
            async with (
                asyncio.timeout(self.endpoint.timeout if seconds is None else seconds),
                self._client.stream(
                    call.method,
                    url + call.path,
                    json=call.body,
                    headers=dict(call.headers),
                    data=dict(upload.fields) if upload else None,
                    files={"file": (upload.name, upload.content)} if upload else None,
                ) as response,
            ):
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > max_bytes:
                        break
                retry_after = parse_retry_after(response.headers.get("retry-after"))
                truncated = len(body) > max_bytes
                return Reply(response.status_code, bytes(body), truncated, retry_after, key=self.key)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            reason = re.sub(r"^\[.*?\] ", "", str(error).partition("\n")[0])  # without the number of the error
            return Reply(failure="no connection", error=f"{type(error).__name__}: {reason}".removesuffix(": "))
        except TimeoutError as error:
            return Reply(failure="timeout", error=type(error).__name__)
        except httpx2.HTTPError as error:
            return Reply(failure="broken connection", error=type(error).__name__)


@dataclass(frozen=True)
class Backoff:
    """How often a request is tried and how long the pauses are: they double from `first` to `longest`, each up to half
    shorter or longer, and are at least what the server asks for (up to `longest_asked`)."""

    tries: int
    first: float = 0.5
    longest: float = LONGEST_PAUSE
    longest_asked: float = LONGEST_PAUSE

    def pause(self, attempt: int, reply: Reply) -> float:
        """Seconds to wait after try `attempt` (from 0)."""
        pause = min(self.longest, self.first * 2.0**attempt) * random.uniform(0.5, 1.5)  # noqa: S311 (no secret)
        return max(pause, min(self.longest_asked, reply.retry_after or 0.0))


async def send_with_retries(
    send: Callable[[int], Awaitable[Reply]],
    is_final: Callable[[Reply], bool],
    backoff: Backoff,
    sleep: Callable[[float], Awaitable[None]],
) -> Reply:
    """Call `send` with 0, 1, ... until its reply is final or the tries are used up; returns the last reply."""
    for attempt in range(backoff.tries):
        reply = await send(attempt)
        if is_final(reply) or attempt == backoff.tries - 1:
            return reply
        await sleep(backoff.pause(attempt, reply))
    raise ValueError("a request needs at least one try")


def read_key(variable: str) -> str:
    """The key in this environment variable, empty where there is none.

    Raises:
        UserError: it has characters that a header can't carry.
    """
    key = os.environ.get(variable, "")
    if not KEY_CHARACTERS.fullmatch(key):
        raise UserError(
            f"{variable} holds characters that a header can't carry: set it again, without spaces, quotes or line"
            " breaks"
        )
    return key


def without_key(text: str, key: str) -> str:
    """The text with `[key]` in place of the key, also where JSON or an address spells its characters otherwise. A key
    of fewer than 8 characters is left where it is."""
    return _spellings(key).sub("[key]", text) if len(key) >= LEAST_SECRET else text


@lru_cache(maxsize=8)
def _spellings(key: str) -> re.Pattern[str]:
    """The key, each character as it is, as \\u0073 (JSON, also within JSON) or as %73."""
    characters = []
    for character in key:
        plain = re.escape(character) if character != "/" else r"\\{0,4}/"
        code = f"{ord(character):02x}"
        characters.append(rf"(?:{plain}|(?i:\\{{1,4}}u00{code}|%{code}))")
    return re.compile("".join(characters))


def read_json(body: bytes, allow_nan: bool = False) -> Any:
    """The body as JSON; None where it is not, has a key twice, or holds NaN or infinities (unless they are allowed).
    Halves of characters, which JSON can hold and UTF-8 can't, become U+FFFD."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    try:
        text = body.decode("utf-8")
        data = json.loads(text, parse_constant=None if allow_nan else refuse, object_pairs_hook=unique)
        return _whole(data) if SURROGATE.search(body) else data
    except (ValueError, RecursionError):
        return None


def _whole(value: Any) -> Any:
    """The value without halves of characters."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {_whole(key): _whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The JSON objects in the value, if it is a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def parse_retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header asks to wait, given as a number or a date; None where it says neither."""
    if value is None:
        return None
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
