"""How fast workers on a Ray cluster write, beside one process; writes docs/evidence/workers.json.

    .venv/bin/python benchmarks/workers.py       # some minutes

SmolLM2-135M-Instruct answers REQUESTS prompts with TOKENS tokens each at most: in this process, and on 1, 2 and 3
workers of one processor each that have been started and have the model. With more workers than processors they share.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from limbeck.config.machine import Workers
from limbeck.elicit.prompts import load_prompts
from limbeck.models.load import load_model
from limbeck.models.placement import FULL
from limbeck.models.ray_pool import RayPool
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.workers import FEWEST_AT_ONCE, ModelOnWorker, WorkerTeacher
from limbeck.storage.files import write_json
from limbeck.types import Request, Sampling

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "workers.json"
MODEL = "smollm2-135m-instruct"
REQUESTS, TOKENS, COUNTS = 192, 32, (1, 2, 3)


def rate(answerer: Any, requests: list[Request]) -> tuple[float, set[tuple[str, tuple[int, ...] | None]]]:
    """Tokens a second, and the answers by key."""
    began = time.perf_counter()
    answers = {(request.key, answer.ids) for request, answer in answerer.answers(requests)}
    return sum(len(ids or ()) for _, ids in answers) / (time.perf_counter() - began), answers


def main() -> None:
    torch.set_num_threads(1)
    prompts = load_prompts("builtin/everyday")
    teacher = InProcessTeacher(load_model(MODEL))
    identity = teacher.identity
    requests = [
        Request(identity, prompts[n % len(prompts)].messages, Sampling(max_tokens=TOKENS), seed=n)
        for n in range(REQUESTS)
    ]
    alone, text = rate(teacher, requests)
    del teacher
    found: dict[int, dict[str, float]] = {}
    for count in COUNTS:
        pool = RayPool(ModelOnWorker(MODEL, FULL, template=None, context=None, identity=identity), Workers(count=count))
        workers = WorkerTeacher(pool, identity, count)
        rate(workers, requests[: count * FEWEST_AT_ONCE])  # they are started and load the model
        tokens_a_second, answers = rate(workers, requests)
        workers.release()
        found[count] = {"tokens_a_second": round(tokens_a_second, 1), "equal": len(answers & text) / len(text)}
        print(count, found[count], flush=True)
    write_json(
        OUT,
        {
            "model": MODEL,
            "requests": REQUESTS,
            "max_tokens": TOKENS,
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, a thread for each process",
            "one_process": round(alone, 1),
            "workers": found,
        },
    )


if __name__ == "__main__":
    main()
