"""Real servers as teacher, scorer and writer: their speed, and how near their numbers are to the model in this process;
writes docs/evidence/engines.json.

    .venv/bin/python benchmarks/engines.py vllm      # after `make vllm`; some five minutes on two cores

A server of each engine serves SmolLM2-135M; the same texts go through it and through the model here. Speed is in tokens
a second, the first request left out; agreement in nats a token: KL(here || server) over the likeliest tokens and a
bucket, and the mean distance of the log-probabilities of what the server wrote. The figures of other engines stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from questions import MODEL, QUESTIONS
from vllm_server import KEY, VllmServer

from limbeck.config.teacher import Served
from limbeck.data.batches import Row, make_batch
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.models.generate import Decoding, GenerationJob, write
from limbeck.models.load import load_model
from limbeck.models.model import Model, head_of
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.vllm import VllmWriter, save
from limbeck.models.vllm_protocol import StudentTokens
from limbeck.types import Batch, Sampling

TOKENS = 32
TOGETHER = 4
NAMED = 20
MOVED = 2e-3  # standard deviation of what is added to the weights before they are sent
EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "engines.json"


@dataclass(frozen=True)
class Running:
    """A server of an engine: its address, the name it serves the model by, what it calls its own version, and a folder
    that it sees."""

    url: str
    name: str
    version: str
    folder: Path


@dataclass(frozen=True)
class Engine:
    """How an engine is started with the model, in an empty folder, and what is measured of it."""

    start: Callable[[Model, Path], contextlib.AbstractContextManager[Running]]
    measures: Sequence[Callable[[Running, Model], dict[str, float]]]


def jobs_of(model: Model, sampling: Sampling) -> list[GenerationJob]:
    return [
        GenerationJob(tuple(model.prompt_ids((user(text),))), sampling, seed) for seed, text in enumerate(QUESTIONS)
    ]


def api_of(running: Running) -> ApiTeacher:
    return ApiTeacher(Served(url=running.url, name=running.name, concurrency=TOGETHER))


def teacher(running: Running, model: Model) -> dict[str, float]:
    """Tokens a second that the server writes, and that the model here writes, to the same questions."""
    scene = StepContext(running.name, 7, "0/engines")
    requests = [scene.request((user(text),), Sampling(1.0, 1.0, TOKENS)) for text in QUESTIONS]
    api = api_of(running)
    list(api.answers(requests[:1]))
    began = time.monotonic()
    written = sum(answer.usage[1] for _, answer in api.answers(requests[1:]) if answer.usage)
    seconds = time.monotonic() - began
    jobs = jobs_of(model, Sampling(1.0, 1.0, TOKENS))[1:]
    began = time.monotonic()
    own = sum(len(text.ids) for text in write(model.net, jobs, model.eos_ids, decoding=Decoding(batch_rows=TOGETHER)))
    return {
        "written_per_second": written / seconds,
        "written_here_per_second": own / (time.monotonic() - began),
        "written": written,
    }


def texts_of(model: Model) -> Batch:
    """The questions with greedy answers of the model here."""
    jobs = jobs_of(model, Sampling(0.0, 1.0, TOKENS))
    texts = write(model.net, jobs, model.eos_ids, decoding=Decoding(batch_rows=TOGETHER))
    rows = [Row(str(text.index), jobs[text.index].prompt_ids, tuple(text.ids), frozenset()) for text in texts]
    return make_batch(rows, tuple(range(len(rows))))


def scorer(running: Running, model: Model) -> dict[str, float]:
    """Tokens a second that the server scores, and how far its distributions are from the model's."""
    batch = texts_of(model)
    scoring = ServerScorer(api_of(running), NAMED, model.tokenizer)
    scoring.probe()
    began = time.monotonic()
    signal = scoring.view(batch).signal
    seconds = time.monotonic() - began
    log_NV = InProcessTeacher(model).signal(batch).chunk(slice(None)).logits_CV.log_softmax(-1)
    own_NK = log_NV.gather(-1, signal.ids_NK)
    p, q = (
        torch.cat([x.exp(), (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-6)], -1)
        for x in (own_NK, signal.log_prob_NK)
    )
    kl_N = (p * (p / q).log()).sum(-1)
    best = log_NV.topk(NAMED).indices.tolist()
    shared = [len(set(a) & set(b)) for a, b in zip(best, signal.ids_NK.tolist(), strict=True)]
    return {
        "scored_per_second": len(kl_N) / seconds,
        "scored": len(kl_N),
        "kl": float(kl_N.mean()),
        "largest_kl": float(kl_N.max()),
        "shared": sum(shared) / len(shared),
        "named": NAMED,
    }


def writer(running: Running, model: Model) -> dict[str, float]:
    """Seconds to send the student's weights, tokens a second it then writes, and how far its log-probabilities are."""
    tokens = StudentTokens(model.eos_ids, model.vocab_size, head_of(model.net).vocab_size)
    made = VllmWriter(running.url, running.folder / "weights", tokens, concurrency=TOGETHER)
    made.sync(model.net, model.tokenizer)
    made.probe(model.net, jobs_of(model, Sampling())[0].prompt_ids)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter += MOVED * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    began = time.monotonic()
    made.sync(model.net, model.tokenizer)
    synced = time.monotonic() - began
    jobs = [replace(job, sampling=Sampling(1.0, 1.0, TOKENS)) for job in jobs_of(model, Sampling())]
    began = time.monotonic()
    texts = made.write(jobs)
    seconds = time.monotonic() - began
    gaps: list[float] = []
    for job, text in zip(jobs, texts, strict=True):
        ids = torch.tensor([[*job.prompt_ids, *text.ids]])
        with torch.inference_mode():
            log_NV = model.net(ids[:, :-1], logits_to_keep=len(text.ids)).logits[0].float().log_softmax(-1)
        own_N = log_NV.gather(-1, torch.tensor(text.ids)[:, None])[:, 0]
        gaps += (own_N - torch.tensor(text.log_prob)).abs().tolist()
    return {
        "student_written_per_second": len(gaps) / seconds,
        "weights_seconds": synced,
        "log_prob_gap": sum(gaps) / len(gaps),
        "largest_log_prob_gap": max(gaps),
    }


@contextlib.contextmanager
def vllm(model: Model, folder: Path) -> Iterator[Running]:
    """vLLM in float32 on this machine's processor."""
    os.environ |= {"LIMBECK_API_KEY": KEY, "VLLM_API_KEY": KEY}
    save(model.net, model.tokenizer, folder / "model")
    with VllmServer(folder / "model", MODEL, folder / "log.txt", ("--max-model-len", "1024")) as server:
        yield Running(server.url, MODEL, f"vLLM {server.version()}, float32", folder)


ENGINES = {"vllm": Engine(vllm, (teacher, scorer, writer))}


def measure(engine: Engine) -> dict[str, Any]:
    """Everything of one engine, by name."""
    model = load_model(MODEL)
    with tempfile.TemporaryDirectory() as there, engine.start(model, Path(there)) as running:
        facts: dict[str, Any] = {"version": running.version}
        for part in engine.measures:
            facts |= {key: float(f"{value:.4g}") for key, value in part(running, model).items()}
            print(part.__name__, facts, flush=True)
    return facts


def main() -> None:
    names = sys.argv[1:] or list(ENGINES)
    if unknown := set(names) - ENGINES.keys():
        sys.exit(f"no engine {', '.join(sorted(unknown))}: there are {', '.join(ENGINES)}")
    for name in names:
        found = json.loads(EVIDENCE.read_text(encoding="utf-8")) if EVIDENCE.is_file() else {"engines": {}}
        found["about"] = {
            "model": MODEL,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),  # of other work beside the measurement
            "together": TOGETHER,
        }
        found["engines"][name] = measure(ENGINES[name])
        EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
