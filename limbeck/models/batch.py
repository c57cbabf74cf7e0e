"""A teacher behind a provider's batch interface: all requests in one file, answered within a day at half the price.

The protocol is OpenAI's (files, batches), which others speak, too; tested against a server that plays it, not against a
provider. A batch is known again by what stands in its input file. So a run that was killed at any moment finds the
batches that it made, waits for them and pays for nothing twice; requests that a batch did not answer go into a new one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from limbeck.models.api import AGAIN, STOPS, ApiTeacher, most_tokens, read_json
from limbeck.types import Generated, Request, UserError, canonical_json

MOST_REQUESTS = 20_000
MOST_INPUT = 150 * 2**20
MOST_OUTPUT = 2**30  # of one batch; the provider takes 50,000 and 200 MB
PAGES = 20
PAGE = 100  # of the provider's list of batches, the newest first
WAITING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
FIRST_WAIT = 5.0
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class ProviderBatch:
    """A batch at the provider, with those of our requests that stand in it."""

    id: str
    keys: frozenset[str]


class BatchTeacher(ApiTeacher):
    """Answers requests through batches; the wait between two looks grows from 5 s to a minute."""

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, batch by batch. Where `stop` becomes true, the batches go on at the provider, and the
        next call finds them.

        Raises:
            UserError: the provider refuses the batch, the key or the model; a ceiling would be passed; requests remain
                unanswered.
        """
        waiting = {request.key: request for request in requests}
        for attempt in range(self.settings.retries + 1):
            if not waiting or stop():
                return
            made = asyncio.run(self._made(list(waiting.values()), adopt=attempt == 0))
            for batch in made:
                record = self._ended(batch, stop)
                if record is None:
                    return
                for key, answer in asyncio.run(self._harvest(batch, record, waiting)):
                    yield waiting.pop(key), answer
        if waiting and not stop():
            raise UserError(
                f"{len(waiting)} requests were left unanswered by {self.settings.retries + 1} batches at {self._url}:"
                " run it again later"
            )

    @property
    def _mark(self) -> dict[str, str]:
        """What our batches are told from others' by."""
        return {"made_by": "limbeck", "model": self.settings.name}

    async def _made(self, requests: Sequence[Request], adopt: bool) -> list[ProviderBatch]:
        """Batches that hold all these requests: those that are there already, and new ones for the rest."""
        wanted = {request.key: request for request in requests}
        found: list[ProviderBatch] = []
        async with self.client() as client:
            if adopt:
                found = [batch async for batch in self._known(client, wanted)]
            there = {key for batch in found for key in batch.keys}
            left = [request for request in requests if request.key not in there]
            for raw in (False, True):
                for part in self._parts([request for request in left if (request.raw is not None) == raw]):
                    found.append(await self._new(client, part, raw))
        return found

    async def _known(self, client: httpx2.AsyncClient, wanted: dict[str, Request]) -> Any:
        """Our batches at the provider that hold any of these requests and were not given up."""
        after = ""
        seen = set[str]()
        for _ in range(PAGES):
            page = await self._get(client, f"/batches?limit={PAGE}{after}")
            data = page.get("data")
            listed = [record for record in data if isinstance(record, dict)] if isinstance(data, list) else []
            for record in listed:
                if (
                    record.get("metadata") != self._mark
                    or record.get("status") == "failed"
                    or not _name(record.get("input_file_id"))
                ):
                    continue
                lines = _lines(await self._file(client, record["input_file_id"]))
                keys = {str(line.get("custom_id")) for line in lines} & wanted.keys() - seen
                if record.get("status") not in WAITING:  # what it left unanswered is asked anew
                    keys = {key for key, _ in await self._harvest_in(client, record, wanted)} - seen
                if keys:
                    seen |= keys
                    yield ProviderBatch(str(record["id"]), frozenset(keys))
            if not page.get("has_more") or not listed or not _name(listed[-1].get("id")):
                return
            after = f"&after={listed[-1]['id']}"

    def _parts(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, bytes]]]:
        """Requests with their lines, as many as one batch may hold."""
        part = list[tuple[Request, bytes]]()
        size = 0
        for request in requests:
            path = "/v1/completions" if request.raw is not None else "/v1/chat/completions"
            line = {
                "custom_id": request.key,
                "method": "POST",
                "url": path,
                "body": self._body(request) | {"stream": False},
            }
            text = canonical_json(line).encode() + b"\n"
            if part and (len(part) >= MOST_REQUESTS or size + len(text) > MOST_INPUT):
                yield part
                part = []
                size = 0
            part.append((request, text))
            size += len(text)
        if part:
            yield part

    async def _new(self, client: httpx2.AsyncClient, part: Sequence[tuple[Request, bytes]], raw: bool) -> ProviderBatch:
        """Upload the requests and have them answered. A file without a batch costs nothing, so a kill between the two
        is harmless."""
        for request, _ in part:
            self._check_ceilings(most_tokens(request))
            self._flying[id(request)] = most_tokens(request)
            self.spent.sent += 1
        content = b"".join(line for _, line in part)
        uploaded = await self._post(
            client, "/files", data={"purpose": "batch"}, files={"file": ("requests.jsonl", content)}
        )
        path = "/v1/completions" if raw else "/v1/chat/completions"
        asked = {
            "input_file_id": uploaded.get("id"),
            "endpoint": path,
            "completion_window": "24h",
            "metadata": self._mark,
        }
        made = await self._post(client, "/batches", json=asked)
        if not _name(made.get("id")):
            raise UserError(f"{self._url} made no batch of the requests: {str(made)[:200]}")
        return ProviderBatch(str(made["id"]), frozenset(request.key for request, _ in part))

    def _ended(self, batch: ProviderBatch, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The batch's record when it has ended; None where we are to stop before."""
        wait = FIRST_WAIT
        while not stop():
            record = asyncio.run(self._look(batch))
            if record.get("status") == "failed":
                raise UserError(f"{self._url} refused the batch {batch.id}: {str(record.get('errors'))[:300]}")
            if record.get("status") not in WAITING:
                return record
            began = self.clock()
            while self.clock() - began < wait and not stop():
                asyncio.run(self._wait(min(1.0, wait)))
            wait = min(LONGEST_WAIT, wait * 1.5)
        return None

    async def _wait(self, seconds: float) -> None:
        await self.sleep(seconds)

    async def _look(self, batch: ProviderBatch) -> dict[str, Any]:
        async with self.client() as client:
            return await self._get(client, f"/batches/{batch.id}")

    async def _harvest(
        self, batch: ProviderBatch, record: dict[str, Any], wanted: dict[str, Request]
    ) -> list[tuple[str, Generated]]:
        async with self.client() as client:
            found = await self._harvest_in(client, record, wanted, count=True)
        for key in batch.keys & wanted.keys():
            self._flying.pop(id(wanted[key]), None)
        return found

    async def _harvest_in(
        self, client: httpx2.AsyncClient, record: dict[str, Any], wanted: dict[str, Request], count: bool = False
    ) -> list[tuple[str, Generated]]:
        """(key, answer) of each of our requests that an ended batch answered for good: the first line of each
        counts."""
        found: dict[str, Generated] = {}
        for file in ("output_file_id", "error_file_id"):
            if not _name(record.get(file)):
                continue
            for line in _lines(await self._file(client, record[file])):
                key = str(line.get("custom_id"))
                reply = line.get("response")
                if key not in wanted or key in found or not isinstance(reply, dict):
                    continue  # an error without a response (such as batch_expired) was not answered
                status = reply.get("status_code")
                if not isinstance(status, int) or status >= 500 or status in (*AGAIN, *STOPS, 408, 409):
                    continue
                spent = self.spent
                if not count:
                    self.spent = type(spent)()
                found[key] = self._generated(wanted[key], status, json.dumps(reply.get("body")).encode())
                self.spent = spent
        return list(found.items())

    # The wire

    async def _get(self, client: httpx2.AsyncClient, path: str) -> dict[str, Any]:
        status, body = await self._asked(client, "GET", path)
        return self._record(path, status, body)

    async def _post(self, client: httpx2.AsyncClient, path: str, **content: Any) -> dict[str, Any]:
        status, body = await self._asked(client, "POST", path, **content)
        return self._record(path, status, body)

    async def _file(self, client: httpx2.AsyncClient, name: str) -> bytes:
        status, body = await self._asked(client, "GET", f"/files/{name}/content")
        if status != 200:
            raise UserError(f"{self._url} answers {status} when a batch's file is asked for: run it again to go on")
        return body

    def _record(self, path: str, status: int, body: bytes) -> dict[str, Any]:
        found = read_json(body)
        if status != 200 or not isinstance(found, dict):
            where = (
                STOPS[401]
                if status == 401
                else "whether it has a batch interface; without, leave teacher.server.batch out"
            )
            raise UserError(
                f"{self._url}{path.partition('?')[0]} answers {status}: look at {where}."
                f" {body[:200].decode('utf-8', 'replace')}"
            )
        return found

    async def _asked(self, client: httpx2.AsyncClient, method: str, path: str, **content: Any) -> tuple[int, bytes]:
        """(status, body without the key), asked again where the provider is busy; making a batch is asked for once."""
        for attempt in range(self.settings.retries + 1):
            try:
                status, body = await self._once(client, method, path, **content)
            except (httpx2.HTTPError, TimeoutError) as error:
                if method == "POST" or attempt == self.settings.retries:
                    raise UserError(
                        f"no answer from {self._url}{path}: {type(error).__name__}; run it again to go on"
                    ) from None
            else:
                if status not in AGAIN and (status < 500 or method == "POST"):
                    return status, body
            await self.sleep(min(LONGEST_WAIT, 2.0**attempt))
        raise UserError(f"{self._url}{path} is busy: run it again later to go on")

    async def _once(self, client: httpx2.AsyncClient, method: str, path: str, **content: Any) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = self._url + path
        async with (
            asyncio.timeout(self.settings.timeout),
            client.stream(method, url, headers=headers, **content) as reply,
        ):
            found = bytearray()
            async for chunk in reply.aiter_bytes():
                found += chunk
                if len(found) > MOST_OUTPUT:
                    raise UserError(f"{url} answers with more than {MOST_OUTPUT:,} bytes, which is no batch of ours")
            plain = bytes(found)
            return reply.status_code, plain.replace(self._key.encode(), b"[key]") if self._key else plain


def _name(value: Any) -> bool:
    """Whether this can be the name of a file or a batch, and so a part of a path."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= 200
        and value.replace("-", "").replace("_", "").isalnum()
        and value.isascii()
    )


def _lines(body: bytes) -> list[dict[str, Any]]:
    """The records of a JSONL file; a line that is none is left out."""
    return [record for line in body.split(b"\n") if line.strip() and isinstance(record := read_json(line), dict)]
