"""A teacher behind a provider's batch interface: all requests in one file, answered within a day at half the price.

The protocol is OpenAI's (files, batches), which other providers speak, too; tested against a server that imitates it,
not against a provider. A batch is recognised by the content of its input file. So a run that was killed at any moment
finds the batches that it made, waits for them and pays for nothing twice; requests that a batch left unanswered go
into a new one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from limbeck.models.api import ApiTeacher
from limbeck.models.budget import estimated_tokens
from limbeck.models.http import (
    Backoff,
    Call,
    Connection,
    Reply,
    Upload,
    as_dicts,
    read_json,
    send_with_retries,
)
from limbeck.models.identity import FATAL
from limbeck.models.loops import run_async
from limbeck.models.replies import NOT_PROCESSED, REPEATABLE
from limbeck.types import Generated, Request, UserError

MAX_REQUESTS = 20_000  # of one batch; the provider takes 50,000 and 200 MB
MAX_INPUT_BYTES = 150 * 2**20
MAX_OUTPUT_BYTES = 2**30
MAX_PAGES = 20
PAGE_SIZE = 100  # of the provider's list of batches, the newest first
NOT_ENDED = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
FIRST_WAIT = 5.0
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class ProviderBatch:
    """A batch at the provider, with the keys of our requests in it."""

    id: str
    keys: frozenset[str]


class BatchTeacher(ApiTeacher):
    """Answers requests through batches. The pause between two looks at a batch grows from 5 s to a minute."""

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, batch by batch. When `stop` becomes true, the batches go on at the provider, and the
        next call finds them.

        Raises:
            UserError: the provider refuses the batch, the key or the model; a ceiling could be passed; somebody
                cancelled a batch; requests remain unanswered. The answers that there are come first.
        """
        waiting = {request.key: request for request in requests}
        adopt, attempts, cancelled = True, 0, ""
        while waiting and attempts <= self.settings.retries and not stop():
            missing = list(waiting.values())
            batches, is_all = self.endpoint.run(partial(self._submit, requests=missing, adopt=adopt))
            for batch in batches:
                record = self._wait_until_ended(batch, stop)
                if record is None:
                    return
                for key, answer in self.endpoint.run(
                    partial(self._harvest, batch=batch, record=record, by_key=waiting)
                ):
                    yield waiting.pop(key), answer
                left = batch.keys & waiting.keys()
                if record.get("status") == "cancelled" and left:
                    cancelled = f"{batch.id} at {self.endpoint.url} was cancelled with {len(left)} requests unanswered"
            if cancelled:
                raise UserError(f"the batch {cancelled}; the other answers are kept: run it again to ask for the rest")
            adopt = False
            attempts += is_all
        if waiting and not stop():
            raise UserError(
                f"{len(waiting)} requests were left unanswered by {self.settings.retries + 1} batches at"
                f" {self.endpoint.url}: run it again later"
            )

    @property
    def _metadata(self) -> dict[str, str]:
        """What distinguishes our batches from others'."""
        return {"made_by": "limbeck", "model": self.settings.name}

    async def _submit(
        self, connection: Connection, requests: Sequence[Request], adopt: bool
    ) -> tuple[list[ProviderBatch], bool]:
        """Batches that hold these requests, new ones and with `adopt` those that are there already; and whether they
        hold all. While what is there could cost so much that new ones could pass a ceiling, none are made.

        Raises:
            UserError: a ceiling could be passed, whatever becomes of those that are there.
        """
        batches: list[ProviderBatch] = []
        by_key = {request.key: request for request in requests}
        if adopt:
            batches = [batch async for batch in self._earlier_batches(connection, by_key)]
        submitted = {key for batch in batches for key in batch.keys}
        for key in submitted:  # an earlier process has spent this
            self.budget.begin(key, estimated_tokens(by_key[key]), checked=True)
        missing = [request for request in requests if request.key not in submitted]
        try:
            if missing:
                self.budget.check(sum(map(estimated_tokens, missing)), len(missing))
        except UserError:
            if not batches:
                raise
            return batches, False
        for request in missing:
            self.budget.begin(request.key, estimated_tokens(request), checked=True)
        for raw in (False, True):
            for part in self._split([request for request in missing if (request.raw is not None) == raw]):
                batches.append(await self._new_batch(connection, part, raw))
        return batches, True

    async def _earlier_batches(
        self, connection: Connection, by_key: dict[str, Request]
    ) -> AsyncIterator[ProviderBatch]:
        """Our batches at the provider that hold any of these requests and did not fail."""
        after = ""
        assigned = set[str]()
        for _ in range(MAX_PAGES):
            page = await self._get(connection, f"/batches?limit={PAGE_SIZE}{after}")
            records = as_dicts(page.get("data"))
            for record in records:
                if (
                    record.get("metadata") != self._metadata
                    or record.get("status") == "failed"
                    or not _is_id(record.get("input_file_id"))
                ):
                    continue
                lines = _lines(await self._download(connection, record["input_file_id"]))
                keys = {str(line.get("custom_id")) for line in lines} & by_key.keys() - assigned
                if record.get("status") not in NOT_ENDED:  # what it left unanswered is submitted again
                    keys = {key for key, _ in await self._read_answers(connection, record, by_key)} - assigned
                if keys:
                    assigned |= keys
                    yield ProviderBatch(str(record["id"]), frozenset(keys))
            if not page.get("has_more") or not records or not _is_id(records[-1].get("id")):
                return
            after = f"&after={records[-1]['id']}"

    def _split(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, bytes]]]:
        """Requests with their lines, as many as one batch may hold."""
        part = list[tuple[Request, bytes]]()
        size = named = 0
        for request in requests:
            path = "/v1/completions" if request.raw is not None else "/v1/chat/completions"
            record = {"custom_id": request.key, "method": "POST", "url": path, "body": self._body(request)}
            line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"  # a schema has an order
            size += len(line)
            named += self._named_bytes(request)
            if part and (len(part) >= MAX_REQUESTS or size > MAX_INPUT_BYTES or named > MAX_OUTPUT_BYTES):
                yield part
                part = []
                size, named = len(line), self._named_bytes(request)
            part.append((request, line))
        if part:
            yield part

    async def _new_batch(
        self, connection: Connection, part: Sequence[tuple[Request, bytes]], raw: bool
    ) -> ProviderBatch:
        """Upload the requests and have them answered. A file without a batch costs nothing, so a kill between the two
        is harmless."""
        upload = Upload("requests.jsonl", b"".join(line for _, line in part), {"purpose": "batch"})
        file = await self._post(connection, Call("POST", "/files", upload=upload))
        order = {
            "input_file_id": file.get("id"),
            "endpoint": "/v1/completions" if raw else "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": self._metadata,
        }
        record = await self._post(connection, Call("POST", "/batches", order))
        if not _is_id(record.get("id")):
            raise UserError(f"{self.endpoint.url} made no batch of the requests: {str(record)[:200]}")
        return ProviderBatch(str(record["id"]), frozenset(request.key for request, _ in part))

    def _wait_until_ended(self, batch: ProviderBatch, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The batch's record when it has ended; None if `stop` became true before."""
        wait = FIRST_WAIT
        while not stop():
            record = self.endpoint.run(lambda connection: self._get(connection, f"/batches/{batch.id}"))
            if record.get("status") == "failed":
                raise UserError(f"{self.endpoint.url} refused the batch {batch.id}: {str(record.get('errors'))[:300]}")
            if record.get("status") not in NOT_ENDED:
                return record
            began = self.clock()
            while self.clock() - began < wait and not stop():
                run_async(partial(self._sleep, min(1.0, wait)))
            wait = min(LONGEST_WAIT, wait * 1.5)
        return None

    async def _sleep(self, seconds: float) -> None:
        await self.sleep(seconds)

    async def _harvest(
        self, connection: Connection, batch: ProviderBatch, record: dict[str, Any], by_key: dict[str, Request]
    ) -> list[tuple[str, Generated]]:
        """The answers of an ended batch, added to the bill."""
        answers = await self._read_answers(connection, record, by_key, count=True)
        for key in batch.keys:
            self.budget.end(key, "yes")
        return answers

    async def _read_answers(
        self, connection: Connection, record: dict[str, Any], by_key: dict[str, Request], count: bool = False
    ) -> list[tuple[str, Generated]]:
        """(key, answer) of each of our requests that an ended batch answered; of several lines the first counts."""
        answers: dict[str, Generated] = {}
        for file in ("output_file_id", "error_file_id"):
            if not _is_id(record.get(file)):
                continue
            for line in _lines(await self._download(connection, record[file])):
                key = str(line.get("custom_id"))
                response = line.get("response")
                if key not in by_key or key in answers or not isinstance(response, dict):
                    continue  # an error without a response (such as batch_expired) was not answered
                status = response.get("status_code")
                if not isinstance(status, int) or status >= 500 or status in (*NOT_PROCESSED, *FATAL, *REPEATABLE):
                    continue
                reply = Reply(status, json.dumps(response.get("body")).encode(), key=connection.key)
                answers[key] = self._generated(by_key[key], reply, count)
        return list(answers.items())

    # Requests to the provider

    async def _get(self, connection: Connection, path: str) -> dict[str, Any]:
        return self._record(path, await self._send_while_busy(connection, Call("GET", path)))

    async def _post(self, connection: Connection, call: Call) -> dict[str, Any]:
        return self._record(call.path, await self._send_while_busy(connection, call))

    async def _download(self, connection: Connection, file_id: str) -> bytes:
        reply = await self._send_while_busy(connection, Call("GET", f"/files/{file_id}/content"))
        if reply.status != 200:
            raise UserError(
                f"{self.endpoint.url} answers {reply.status} when a batch's file is requested: run it again to go on"
            )
        return reply.body

    def _record(self, path: str, reply: Reply) -> dict[str, Any]:
        record = reply.json()
        if reply.status != 200 or not isinstance(record, dict):
            where = (
                FATAL[401]
                if reply.status == 401
                else "whether it has a batch interface; if not, leave teacher.server.batch out"
            )
            raise UserError(
                f"{self.endpoint.url}{path.partition('?')[0]} answers {reply.status}: check {where}. {reply.quote()}"
            )
        return record

    async def _send_while_busy(self, connection: Connection, call: Call) -> Reply:
        """The reply, repeated while the provider is busy. What was perhaps done already (a batch) is not repeated."""
        url = f"{self.endpoint.url}{call.path}"

        def is_final(reply: Reply) -> bool:
            if reply.failure and call.method == "POST":
                raise UserError(f"no answer from {url}: {reply.error}; run it again to go on")
            server_error = reply.status >= 500 and call.method == "GET"
            return not reply.failure and reply.status not in NOT_PROCESSED and not server_error

        reply = await send_with_retries(
            lambda attempt: connection.send(call, MAX_OUTPUT_BYTES),
            is_final,
            Backoff(self.settings.retries + 1, first=1.0),
            self.sleep,
        )
        if reply.failure:
            raise UserError(f"no answer from {url}: {reply.error}; run it again to go on")
        if not is_final(reply):
            raise UserError(f"{url} is busy: run it again later to go on")
        if reply.truncated:
            raise UserError(f"{url} answers with more than {MAX_OUTPUT_BYTES:,} bytes, which is no batch of ours")
        return reply


def _is_id(value: Any) -> bool:
    """Whether this can be the id of a file or a batch, and so a part of a path."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= 200
        and value.replace("-", "").replace("_", "").isalnum()
        and value.isascii()
    )


def _lines(body: bytes) -> list[dict[str, Any]]:
    """The objects of a JSONL file; other lines are left out."""
    return [record for line in body.split(b"\n") if isinstance(record := read_json(line), dict)]
