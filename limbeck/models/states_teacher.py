"""A teacher whose hidden states come from another machine (`limbeck serve --states`): the dense signal over a wire.

The head is fetched once. A micro-batch is one request; while the student works on it, the next one of its step is asked
for. Every body has the SHA-256 of its numbers and the model's fingerprint, and both must be right.

Shapes: N response positions, E width of the teacher, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.api import ApiTeacher
from limbeck.models.compatibility import frame_key, tokens_key
from limbeck.models.http import MAX_BYTES, Call, Connection, Reply, as_dict
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherView
from limbeck.objectives.head import Head
from limbeck.signals.cache import ids_of
from limbeck.signals.dense import DenseSignal
from limbeck.signals.wire import DIGEST, head_from, opened
from limbeck.types import Batch, UserError

STATES = "/v1/states"
HEAD = "/v1/states/head"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_MODEL = 412  # the request is for another model than the server's
ROOM = 2**16  # bytes of a body beside its numbers
GO_ON = "run it again to go on"


class StatesTeacher:
    """The dense signal of a model behind a states server.

    Args:
        api: the server, with its limits and retries.
        tokenizer: the student's; the text is in its ids.
        device: where the head is kept.
    """

    gives = frozenset({"text", "teacher_distribution"})
    model = None  # its weights are not here
    average = None
    told = "gives its hidden states"

    def __init__(self, api: ApiTeacher, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self.api = api
        self.tokenizer = tokenizer
        self.device = device
        self._ahead = _Ahead(self._states, len(api.endpoint.urls))

    @property
    def identity(self) -> str:
        """The model's, with the type of the wire where that is not the model's own."""
        wire = self.api.settings.wire
        return self.api.identity if wire is None else f"{self.api.identity}+{wire}"

    @property
    def vocab_size(self) -> int:
        return int(self._facts["vocabulary"])

    def room(self) -> int | None:
        """How many tokens a prompt with its answer may have."""
        return int(self._facts["context"])

    def probe(self) -> None:
        """Check that the server gives states, and reads the student's tokens and template.

        Raises:
            UserError: it is no such server, or its model reads other tokens or another template.
        """
        facts = self._facts
        if facts["tokens"] != tokens_key(self.tokenizer):
            raise UserError(
                f"{self.api.endpoint.url} serves {facts['identity']}, whose vocabulary is not the student's: serve a"
                " model of the student's family, or give the student its tokenizer"
            )
        if facts["frame"] != frame_key(self.tokenizer):
            raise UserError(
                f"{self.api.endpoint.url} serves {facts['identity']}, which frames a conversation otherwise than the"
                " student: give the student the teacher's chat template (student.template, or its tokenizer files)"
            )

    def expect(self, batches: Sequence[Batch]) -> None:
        """The micro-batches that will be asked for next, in this order; each is fetched while the one before it is
        worked on."""
        self._ahead.expect(batches)

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The teacher's distribution at the batch's response positions.

        Raises:
            UserError: no answer, another model's, or a damaged one.
        """
        assert taps == NO_TAPS and batch.mixed is None, "recipes that need layers or mixed text are refused"
        head = self.head
        hidden_NE = self._ahead.take(batch).to(self.device, head.weight_VD.dtype)
        return TeacherView(DenseSignal(hidden_NE, head.cut(vocab_size or head.vocab_size)))

    @cached_property
    def head(self) -> Head:
        """The served model's head, fetched when it is first needed."""
        facts = self._facts
        reply = self._ask(Call("GET", HEAD, at_root=True), 0, max_bytes=int(facts["head_bytes"]) + ROOM)
        tensors, said = self._opened(reply)
        if said[DIGEST] != facts["head"]:
            raise self._other_model(said[DIGEST])
        return head_from(tensors, said, self.device)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What the server says of its model."""
        facts = as_dict(self._ask(Call("GET", STATES, at_root=True), 0).json())
        numbers = ("vocabulary", "width", "context", "head_bytes")
        words = ("identity", "fingerprint", "tokens", "frame", "head", "dtype")
        if not all(type(facts.get(key)) is int and facts[key] > 0 for key in numbers) or not all(
            isinstance(facts.get(key), str) for key in words
        ):
            raise UserError(
                f"{self.api.endpoint.url} gives no hidden states: start it with `limbeck serve MODEL --states`, or"
                " correct teacher.server.kind"
            )
        return facts

    def _states(self, batch: Batch) -> Tensor:
        """The last hidden states [N, E] at the batch's response positions."""
        rows, begins = [], []
        for prompt, response in ids_of(batch):
            rows.append(prompt + response)
            begins.append(len(prompt) - 1)
        facts = self._facts
        dtype = self.api.settings.wire or facts["dtype"]
        body = {"fingerprint": facts["fingerprint"], "rows": rows, "from": begins, "dtype": dtype}
        count = sum(len(row) - 1 - begin for row, begin in zip(rows, begins, strict=True))
        size = count * int(facts["width"]) * 4
        reply = self._ask(Call("POST", STATES, body, at_root=True), sum(map(len, rows)), max_bytes=size + ROOM)
        tensors, said = self._opened(reply)
        hidden_NE = tensors.get("hidden")
        if said.get("fingerprint") != facts["fingerprint"]:
            raise self._other_model(said.get("fingerprint"))
        if hidden_NE is None or hidden_NE.shape != (count, facts["width"]) or hidden_NE.dtype != DTYPES.get(dtype):
            raise UserError(
                f"{self.api.endpoint.url} answers with other states than were asked for: {count} positions of"
                f" width {facts['width']} in {dtype}; serve the model with this version of Limbeck"
            )
        return hidden_NE

    def _ask(self, call: Call, tokens: int, max_bytes: int = MAX_BYTES) -> Reply:
        """The server's reply to one call, repeated as often as the settings allow.

        Raises:
            UserError: it refuses, or gave no answer to any try.
        """

        async def work(connection: Connection) -> Reply:
            return await self.api.send(connection, call, tokens, max_bytes)

        reply = self.api.endpoint.run(work)
        url = reply.url
        if reply.status == OTHER_MODEL:
            raise self._other_model(reply.error_text())
        if reply.status == 0:
            raise UserError(
                f"no whole answer from {url} in {self.api.settings.retries + 1} tries ({reply.outcome()}): start it"
                f" again (`limbeck serve MODEL --states`), then {GO_ON}"
            )
        if reply.status != 200 or reply.truncated:
            what = "more than was asked for" if reply.truncated else f"status {reply.status}"
            raise UserError(f"{url} gives no states ({what}). {'' if reply.truncated else reply.quote()}")
        return reply

    def _opened(self, reply: Reply) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return opened(reply.body)
        except ValueError as error:
            raise UserError(f"what {self.api.endpoint.url} sent was damaged on its way: {error}; {GO_ON}") from error

    def _other_model(self, found: object) -> UserError:
        return UserError(
            f"{self.api.endpoint.url} serves another model than {self._facts['identity']}, with which this began"
            f" ({found}): serve that one again and {GO_ON}, or give another --out"
        )


class _Ahead:
    """Fetches the next of the expected batches while one is worked on: as many ahead as there are addresses."""

    def __init__(self, fetch: Callable[[Batch], Tensor], most: int) -> None:
        self._fetch = fetch
        self._most = most
        self._expected: deque[Batch] = deque()
        self._under_way: deque[tuple[Batch, Future[Tensor]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, batches: Sequence[Batch]) -> None:
        self._expected = deque(batches)
        self._under_way.clear()

    def take(self, batch: Batch) -> Tensor:
        """The states of a batch: those that were fetched ahead, else fetched now."""
        if self._under_way and self._under_way[0][0] is batch:
            _, future = self._under_way.popleft()
        elif self._expected and self._expected[0] is batch:
            future = self._begin(self._expected.popleft())
        else:
            return self._fetch(batch)
        while self._expected and len(self._under_way) < self._most:
            following = self._expected.popleft()
            self._under_way.append((following, self._begin(following)))
        return future.result()

    def _begin(self, batch: Batch) -> Future[Tensor]:
        self._pool = self._pool or ThreadPoolExecutor(self._most + 1, "states")
        return self._pool.submit(self._fetch, batch)
