"""Time of measuring fidelity against the forward passes it can't do without; writes docs/evidence/evaluation.json.

    .venv/bin/python benchmarks/evaluation.py      # a few minutes on two cores

Two systems, the teacher and itself with half of its layers, on 300 answers that the teacher writes. The floor is one
pass of each model over all answers, with logits of the response tokens in chunks, and nothing done with them; both are
timed in turn, twice.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from limbeck.data.batches import Row, make_batch
from limbeck.elicit.prompts import load_prompts
from limbeck.evaluate.fidelity import EvaluationText, fidelity
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.load import load_model
from limbeck.models.model import Model, head_of, hidden_states
from limbeck.models.prune import drop_layers
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.head import Buffer, chunk_elements, chunks
from limbeck.storage.files import write_json
from limbeck.training.memory import keep_freed_memory
from limbeck.types import Sampling

OUT = Path(__file__).parent.parent / "docs" / "evidence" / "evaluation.json"
TEACHER = "smollm2-135m-instruct"
ANSWERS = 300
LENGTH = 64
ROUNDS = 2
TOGETHER = 8


def write_answers(teacher: Model) -> list[Row]:
    """What the teacher answers to the first prompts, as rows."""
    prompts = load_prompts("builtin/everyday")[:ANSWERS]
    jobs = [
        GenerationJob(teacher.prompt_ids(prompt.messages), Sampling(0.7, 0.95, LENGTH), number)
        for number, prompt in enumerate(prompts)
    ]
    texts = dict(generate(teacher.net, jobs, teacher.eos_ids, vocab_size=teacher.vocab_size))
    return [
        Row(prompt.id, tuple(job.prompt_ids), tuple(texts[n]))
        for n, (prompt, job) in enumerate(zip(prompts, jobs, strict=True))
    ]


@torch.no_grad()
def passes(models: Sequence[Model], rows: Sequence[Row]) -> None:
    """One pass of each model over the rows, and the logits of the response tokens."""
    order = sorted(rows, key=len)
    buffer = Buffer()
    for start in range(0, len(order), TOGETHER):
        batch = make_batch(order[start : start + TOGETHER])
        for model in models:
            hidden_ND = hidden_states(model.net, batch.tokens_BT)[batch.response_positions()]
            head = head_of(model.net)
            for part in chunks(len(hidden_ND), head.vocab_size, chunk_elements(hidden_ND.device)):
                head.logits(hidden_ND[part], buffer)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    keep_freed_memory()
    teacher = load_model(TEACHER)
    layers = teacher.net.config.num_hidden_layers
    half = Model(drop_layers(teacher.net, list(range(0, layers, 2))), teacher.tokenizer, "half")
    rows = write_answers(teacher)
    passes([teacher, half], rows[:TOGETHER])

    def evaluate() -> None:
        text = EvaluationText(rows, InProcessTeacher(teacher))
        for system in (teacher, half):
            fidelity(system, text)

    runs = []
    for _ in range(ROUNDS):
        floor = seconds(lambda: passes([teacher, half], rows))
        spent = seconds(evaluate)
        runs.append(
            {"floor_seconds": round(floor, 2), "seconds": round(spent, 2), "times_the_floor": round(spent / floor, 3)}
        )
        print(runs[-1], flush=True)
    tokens = sum(len(row.response_ids) for row in rows)
    about = {
        "answers": len(rows),
        "response_tokens": tokens,
        "all_tokens": sum(map(len, rows)),
        "threads": os.cpu_count(),
    }
    median = statistics.median(run["times_the_floor"] for run in runs)
    write_json(
        OUT,
        {"about": about | {"torch": torch.__version__, "teacher": TEACHER}, "runs": runs, "times_the_floor": median},
    )


if __name__ == "__main__":
    main()
