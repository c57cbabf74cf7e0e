"""A server of a model's last hidden states on plain transformers: a teacher's whole distribution, on another machine.

`GET /v1/states` says who the model is, `GET /v1/states/head` gives its head once, and `POST /v1/states` takes rows of
token ids and gives the states that predict the tokens from a place on, in one pass and in the padding of a training
here, so that they are the local teacher's to the bit on the same machine. It also writes text (`/v1/chat/completions`,
`/v1/completions`), one answer after the other.

Every request needs the key. Requests, rows and answers are bounded; one pass runs at a time, `slots` requests wait, and
more are told to come again (503). Not covered: TLS (put a proxy or an SSH tunnel before it), and writing at speed
(serve the same weights with vLLM).

Shapes: B rows, T positions, N positions whose states are asked for, E width.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import gethostname, socket
from typing import Any

import torch

from limbeck.commands import console
from limbeck.commands.serve import KEY
from limbeck.models.compatibility import frame_key, tokens_key
from limbeck.models.http import read_key
from limbeck.models.load import load_model, model_contents
from limbeck.models.model import Model, head_of
from limbeck.models.placement import Placement, Precision, find_device, is_out_of_memory
from limbeck.models.scores import scorer_source
from limbeck.models.states_teacher import DTYPES, HEAD, OTHER_MODEL, STATES
from limbeck.models.taps import features
from limbeck.models.teacher import InProcessTeacher
from limbeck.signals.wire import digest_of, plain_head, sealed
from limbeck.storage.files import user_path
from limbeck.types import Message, Request, Sampling, UserError, content_hash

MAX_REQUEST_BYTES = 8 * 2**20
MAX_ROWS = 4096
READ_SECONDS = 60.0  # for one request's body
LOOPBACK = ("127.0.0.1", "localhost")
EVERYWHERE = "0.0.0.0"  # noqa: S104 (what the user asks for)
OCTETS = "application/octet-stream"
WRITING = frozenset(
    {"model", "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "stream"}
)


class RefusedError(Exception):
    """A request that is not answered: the status and what is wrong with it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StatesServer(ThreadingHTTPServer):
    """Serves one model until it is shut down.

    Args:
        name: what the model is called here.
        contents: a hash of its weights, part of the fingerprint.
        key: what every request must carry.
        address: host and port; port 0 is a free one.
        context: the most tokens of a row; no more than the model's own.
        slots: how many requests wait or run; each may hold `context` tokens, and one request `slots` times that.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, model: Model, name: str, contents: str, key: str, *, address: tuple[str, int], context: int, slots: int
    ) -> None:
        self.teacher = InProcessTeacher(model)
        self.model = model
        self.name = name
        self.key = key
        self.context = min(context, model.max_length)
        self.most_tokens = self.context * slots
        self.turn = threading.Lock()  # one pass at a time
        self.slots = threading.BoundedSemaphore(slots)
        self._connections = threading.BoundedSemaphore(4 * slots + 8)
        head = head_of(model.net).detached()
        tensors, numbers = plain_head(head)
        self.head_tensors, self.head_numbers = {key: tensor.cpu() for key, tensor in tensors.items()}, numbers
        head_digest = digest_of(self.head_tensors)
        self.facts: dict[str, Any] = {
            "name": name,
            "identity": model.identity,
            "fingerprint": content_hash([model.identity, contents, head_digest])[:32],
            "width": head.weight_VD.shape[1],
            "vocabulary": head.vocab_size,
            "dtype": str(model.net.dtype).removeprefix("torch."),
            "context": self.context,
            "most_tokens": self.most_tokens,
            "tokens": tokens_key(model.tokenizer),
            "frame": frame_key(model.tokenizer),
            "head": head_digest,
            "head_bytes": sum(tensor.nbytes for tensor in self.head_tensors.values()),
        }
        super().__init__(address, _Handler)
        host = gethostname() if address[0] == EVERYWHERE else address[0]
        self.url = f"http://{host}:{self.server_port}/v1"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # a client that hangs up is no error
            super().handle_error(request, client_address)

    @contextlib.contextmanager
    def pass_of_the_model(self) -> Iterator[None]:
        """Wait for the model.

        Raises:
            RefusedError: as many wait already as may, or the pass does not fit into memory.
        """
        if not self.slots.acquire(blocking=False):
            raise RefusedError(503, "as many requests wait as may: come again, or start the server with more --slots")
        try:
            with self.turn, torch.no_grad():
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RefusedError(413, "no memory for so many tokens: lower the client's machine.micro_tokens") from error
        finally:
            self.slots.release()

    def states(self, body: Mapping[str, Any]) -> bytes:
        """The states [N, E] of all rows' asked positions, row after row, sealed."""
        if body.get("fingerprint") != self.facts["fingerprint"]:
            raise RefusedError(OTHER_MODEL, f"this is {self.facts['identity']}, {self.facts['fingerprint']}")
        dtype = body.get("dtype") or self.facts["dtype"]
        if dtype not in DTYPES:
            raise RefusedError(400, f"dtype must be one of {', '.join(DTYPES)}")
        rows, begins = self._rows(body.get("rows"), body.get("from"))
        tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row)] = torch.tensor(row)
        with self.pass_of_the_model():
            hidden_BTD, _ = features(self.model.net, tokens_BT)
            parts = [hidden_BTD[n, begin : len(rows[n]) - 1] for n, begin in enumerate(begins)]
            hidden_NE = torch.cat(parts).to("cpu", DTYPES[dtype])
        return sealed({"hidden": hidden_NE}, {"fingerprint": self.facts["fingerprint"]})

    def _rows(self, rows: Any, begins: Any) -> tuple[list[list[int]], list[int]]:
        """Rows of ids and where each one's asked states begin, checked."""
        if not isinstance(rows, list) or not isinstance(begins, list) or len(rows) != len(begins) or not rows:
            raise RefusedError(400, "rows must be lists of token ids, and from a place in each")
        if len(rows) > MAX_ROWS:
            raise RefusedError(413, f"more than {MAX_ROWS} rows")
        most = self.facts["vocabulary"]
        for row, begin in zip(rows, begins, strict=True):
            if not isinstance(row, list) or not all(type(token) is int and 0 <= token < most for token in row):
                raise RefusedError(400, f"a row must be token ids from 0 to {most - 1}")
            if len(row) > self.context:
                raise RefusedError(413, f"a row of {len(row)} tokens, and {self.context} are read: raise --context")
            if type(begin) is not int or not 0 <= begin < len(row) - 1:
                raise RefusedError(400, "from must be a place before the row's last token")
        if (tokens := len(rows) * max(map(len, rows))) > self.most_tokens:
            raise RefusedError(
                413,
                f"{tokens} tokens with padding, and {self.most_tokens} are read at once: raise --slots or --context",
            )
        return rows, begins

    def written(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        """One answer in OpenAI's shape."""
        request = self._request(body, chat)
        model = self.model
        prompt = model.prompt_ids(request.messages) if request.raw is None else model.raw_ids(request.raw)
        if len(prompt) + request.sampling.max_tokens > self.context:
            raise RefusedError(400, f"prompt and max_tokens take more than {self.context} tokens")
        with self.pass_of_the_model():
            ((_, answer),) = self.teacher.answers([request])
        ids = model.text_ids(answer.text) if answer.ids is None else answer.ids
        choice = {
            "index": 0,
            "finish_reason": "length" if answer.finish == "length" else "stop",
            **({"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}),
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"id": request.key[:16], "model": self.name, "choices": [choice], "usage": usage}

    def _request(self, body: Mapping[str, Any], chat: bool) -> Request:
        """What is asked for, checked: nothing that this server does not do is let pass."""
        for key in body.keys() - WRITING:
            raise RefusedError(400, f"{key[:40]} is not known here; leave it out")
        if body.get("model") != self.name:
            raise RefusedError(404, f"the model here is {self.name}")
        try:
            sampling = Sampling(
                _number(body, "temperature", 1.0, most=100.0),
                _number(body, "top_p", 1.0, most=1.0),
                _whole(body, "max_tokens", 128, least=1, most=self.context),
                stop=_stops(body.get("stop")),
                presence_penalty=_number(body, "presence_penalty", 0.0, least=-2.0, most=2.0),
            )
            seed = _whole(body, "seed", 0, most=2**63)
            if body.get("stream"):
                raise ValueError("stream must be false")
            messages = tuple(_message(entry) for entry in body["messages"]) if chat else ()
            raw = None if chat else body["prompt"]
            if not chat and not isinstance(raw, str):
                raise ValueError("prompt must be a text; token ids are not taken")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RefusedError(400, str(error)[:200]) from error
        return Request(self.name, messages, sampling, seed, raw=raw)


class _Handler(BaseHTTPRequestHandler):
    server: StatesServer
    connection: socket
    timeout = READ_SECONDS

    def log_message(self, *_: object) -> None:
        """Requests are not logged: they hold texts."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Any) -> None:
        try:
            if not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {self.server.key}".encode()
            ):
                raise RefusedError(401, "the key is wrong or missing")
            content = work()
        except RefusedError as error:
            self._send(error.status, {"error": {"message": str(error)}})
        except UserError as error:
            self._send(400, {"error": {"message": str(error)}})
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:  # the server goes on
            self._send(500, {"error": {"message": f"the server failed ({type(error).__name__})"}})
        else:
            self._send(200, content)

    def _send(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", OCTETS if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.wfile.write(body)

    def _get(self) -> Any:
        server = self.server
        if self.path == STATES:
            return server.facts
        if self.path == HEAD:
            return sealed(server.head_tensors, server.head_numbers)
        if self.path == "/v1/models":
            return {
                "object": "list",
                "data": [{"id": server.name, "object": "model", "root": server.facts["fingerprint"]}],
            }
        raise RefusedError(404, "there is nothing here")

    def _post(self) -> Any:
        body = self._body()
        if self.path == STATES:
            return self.server.states(body)
        if self.path in ("/v1/chat/completions", "/v1/completions"):
            return self.server.written(body, chat=self.path == "/v1/chat/completions")
        raise RefusedError(404, "there is nothing here")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "a request needs its Content-Length")
        if int(length) > MAX_REQUEST_BYTES:
            raise RefusedError(413, f"a request may have {MAX_REQUEST_BYTES} bytes")
        content = bytearray()
        deadline = time.monotonic() + READ_SECONDS
        while len(content) < int(length):
            part = self.rfile.read1(min(2**16, int(length) - len(content)))
            if not part or time.monotonic() > deadline:
                raise ConnectionError("the request ended early, or took too long")
            content += part
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "no JSON") from error
        if not isinstance(body, dict):
            raise RefusedError(400, "no JSON object")
        return body


def serve_states(
    source: str, address: tuple[str, int], *, context: int = 4096, slots: int = 4, dtype: str | None = None
) -> StatesServer:
    """Load a model and make its server, which listens but does not answer yet.

    Args:
        source: a model as `limbeck.load_model` takes it, or a run folder, whose student is served.
        dtype: of the weights; float32 by default.

    Raises:
        UserError: no such model, or the address can't be listened on.
    """
    source = scorer_source(source)
    device = find_device("auto")
    model = load_model(source, Precision.named(dtype), Placement(device))
    key = read_key(KEY) or secrets.token_urlsafe(24)
    name = user_path(source).name
    try:
        return StatesServer(model, name, model_contents(source), key, address=address, context=context, slots=slots)
    except OSError as error:
        raise UserError(f"can't listen on {address[0]}:{address[1]} ({error.strerror}): give another --port") from error


def serve_until_stopped(
    source: str, address: tuple[str, int], *, context: int, slots: int, threads: int | None, dtype: str | None
) -> None:
    """`limbeck serve --states`: print where the server is, and answer until it is interrupted."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))
    server = serve_states(source, address, context=context, slots=slots, dtype=dtype)
    if not os.environ.get(KEY):
        console.err.print(f"export {KEY}={server.key}", markup=False)
    if address[0] not in LOOPBACK:
        console.err.print("keys and states go over this network unencrypted: an SSH tunnel or a proxy hides them")
    line = f"teacher.server: {{kind: states, url: {server.url}, name: {server.name}}}"
    console.out.print(line, markup=False, soft_wrap=True)
    server.serve_forever()


def _number(body: Mapping[str, Any], key: str, default: float, *, most: float, least: float = 0) -> float:
    value = body.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"{key} must be a number from {least} to {most}")
    return value


def _whole(body: Mapping[str, Any], key: str, default: int, *, most: int, least: int = 0) -> int:
    value = _number(body, key, default, most=most, least=least)
    if int(value) != value:
        raise ValueError(f"{key} must be a whole number from {least} to {most}")
    return int(value)


def _stops(stop: Any) -> tuple[str, ...]:
    words = [] if stop in (None, "") else [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError("stop must be a text or a list of texts, none of them empty")
    return tuple(words)


def _message(entry: Any) -> Message:
    if set(entry) != {"role", "content"} or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("a message must have a role and a content, both texts")
    return {"role": entry["role"], "content": entry["content"]}
