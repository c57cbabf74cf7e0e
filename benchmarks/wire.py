"""What a teacher's signal takes over a wire, in bytes and in time; writes docs/evidence/wire.json.

    .venv/bin/python benchmarks/wire.py                        # SmolLM2-135M-Instruct, some minutes on two cores
    .venv/bin/python benchmarks/wire.py --model FOLDER         # another model, written nowhere

A micro-batch of the model's own kind of text is asked for as a training does: as hidden states from `limbeck serve
--states`, a process of its own, in float32 and bfloat16; and as the 20 likeliest tokens in vLLM's protocol from a
server in this process, which computes in one pass what vLLM would. Bytes are those of bodies, both ways, without
headers. What a cache's forms take for the same text stands beside them: no server sends those. Then the server is
killed by SIGKILL and started again while a micro-batch is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from limbeck.config.server import Served
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import Row, make_batch
from limbeck.evaluate.efficiency import system_load
from limbeck.models.api import ApiTeacher
from limbeck.models.http import Connection
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.score import ServerScorer
from limbeck.models.states_teacher import StatesTeacher
from limbeck.models.teacher import InProcessTeacher
from limbeck.signals.cache import SignalCache, texts_of
from limbeck.storage.files import write_json
from limbeck.types import Batch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from tests.scoring_server import ScoringServer  # noqa: E402

OUT = HERE / "docs" / "evidence" / "wire.json"
TEXTS = (
    ("Why is the sky blue?", "Air scatters short waves of light more than long ones, so blue comes from all sides."),
    ("Name three fruits that grow on trees.", "Apples, pears and cherries grow on trees; so do plums and oranges."),
    ("What does a compiler do?", "It reads a program in one language and writes it in another, which a machine runs."),
    ("How do bees find flowers?", "By colour and scent, and by the dances of others that have found some before them."),
)
FORMS: tuple[dict[str, Any], ...] = (
    {"hidden": {"dtype": "float32"}},
    {"hidden": {"dtype": "bfloat16"}},
    {"top_k": {"k": 20, "bits": 16}},
    {"top_k": {"k": 256}},
    {"sampled": {"draws": 50}},
)
REPEATS = 3
SECONDS_TO_START = 600


class Counted:
    """Counts the bytes of bodies, both ways, of all requests while it is entered."""

    def __enter__(self) -> Counted:
        self.sent = self.received = 0
        self._exchange = Connection._exchange
        counted = self

        async def exchange(connection: Connection, *request: Any) -> Any:
            reply = await counted._exchange(connection, *request)
            body = request[1].body
            counted.sent += 0 if body is None else len(json.dumps(body, separators=(",", ":")))
            counted.received += len(reply.body)
            return reply

        Connection._exchange = exchange  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Connection._exchange = self._exchange  # type: ignore[method-assign]


class Process:
    """`limbeck serve --states` as a process; its key is in the environment."""

    def __init__(self, model: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "limbeck", "serve", model, "--states", "--port", str(port), "--threads", "1"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)  # noqa: S603 (ours)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.url = line.split("url: ")[1].split(",")[0]
        self.name = line.split("name: ")[1].rstrip("}\n")
        self.port = int(self.url.rsplit(":", 1)[1].removesuffix("/v1"))

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def rows_of(model: Model) -> list[Row]:
    return [
        Row(
            str(number),
            tuple(model.prompt_ids(({"role": "user", "content": asked},))),
            (*model.text_ids(said), model.end_of_turn),
            frozenset(),
        )
        for number, (asked, said) in enumerate(TEXTS)
    ]


def timed(ask: Callable[[Batch], Any], batch: Batch) -> dict[str, float]:
    """Bytes and the median of seconds for one micro-batch; the first is not counted, which fetches the head."""
    ask(batch)
    seconds = []
    for _ in range(REPEATS):
        with Counted() as counted:
            began = time.perf_counter()
            ask(batch)
            seconds.append(time.perf_counter() - began)
    tokens = int(batch.mask_BT.sum())
    return {
        "sent": counted.sent / tokens,
        "received": counted.received / tokens,
        "seconds": statistics.median(seconds),
    }


def served(model: Model, source: str, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states server's figures, and what a SIGKILL does."""
    found: dict[str, Any] = {}
    process = Process(source)
    try:
        exact = StatesTeacher(api(process), model.tokenizer)
        local = InProcessTeacher(model).signal(batch)
        for wire in (None, "bfloat16"):
            teacher = StatesTeacher(api(process, wire=wire), model.tokenizer)
            found[f"states, {wire or 'float32'}"] = timed(teacher.view, batch)
        before = exact.view(batch).signal
        with Counted() as counted:
            _ = StatesTeacher(api(process), model.tokenizer).head
        process.kill()
        began = time.perf_counter()
        again: list[Process] = []
        thread = threading.Thread(target=lambda: again.append(Process(source, process.port)))
        thread.start()
        after = exact.view(batch).signal
        seconds = time.perf_counter() - began
        thread.join()
        process = again[0]
        assert before is not None and after is not None
        same = torch.equal(before.hidden_states()[0], after.hidden_states()[0])
        as_local = float((after.hidden_states()[0] - local.hidden_NE).abs().max())
        return found, {
            "head_bytes": counted.received,
            "killed": {"same_states_after": same, "seconds_until_answered": seconds},
            "largest_difference_from_local": as_local,
        }
    finally:
        process.kill()


def api(process: Process, **settings: Any) -> ApiTeacher:
    return ApiTeacher(Served(url=process.url, name=process.name, kind="states", retries=20, timeout=600, **settings))


def kept(model: Model, batch: Batch) -> list[dict[str, Any]]:
    """Bytes a token of each form of a cache, for this text."""
    signal_N = InProcessTeacher(model).signal(batch)
    row_N, position_N = batch.response_positions()
    keys, lengths = zip(*texts_of(batch), strict=True)
    found = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            cache = SignalCache(Path(folder), "x", signal_N.head.vocab_size, CacheSettings(**form))
            cache.add(keys, signal_N, batch.tokens_BT[row_N, position_N + 1], lengths)
            tensors = [tensor for key in keys for tensor in cache.text(key).values()]
        found.append({"form": form, "bytes": sum(tensor.nbytes for tensor in tensors) / int(batch.mask_BT.sum())})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    source = parser.parse_args().model
    os.environ.setdefault("LIMBECK_API_KEY", secrets.token_urlsafe(24))
    torch.set_num_threads(1)
    load = system_load()
    model = load_model(source)
    batch = make_batch(rows_of(model))
    signals, more = served(model, source, batch)
    signals["in process"] = timed(InProcessTeacher(model).view, batch)
    with ScoringServer(model, "vLLM") as server:
        settings = Served(url=server.url, name="toy", concurrency=4)
        signals["top 20, vLLM's protocol"] = timed(ServerScorer(ApiTeacher(settings), 20, model.tokenizer).view, batch)
    record = {
        "model": source,
        "response_tokens": int(batch.mask_BT.sum()),
        "tokens": batch.tokens_BT.numel(),
        "width": model.net.config.hidden_size,
        "signals": signals,
        **more,
        "forms": kept(model, batch),
        "machine": {"cores": os.cpu_count(), "load": load, "torch": torch.__version__, "threads": 1},
    }
    print(json.dumps(record, indent=1))
    if source == parser.get_default("model"):
        write_json(OUT, record)


if __name__ == "__main__":
    main()
