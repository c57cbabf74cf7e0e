"""A real pair with two tokenizers: Gemma 3 270M teaches SmolLM2-135M-Instruct over each bridge.

For every bridge, the same worked answers (grade-school problems, one JSON object a line with `question` and `answer`)
are trained on for the same few steps from the same start; measured before and after on held-out answers: the bridge's
own loss, how likely the student finds the text (nats a byte, so that tokens don't matter), and how near it is to the
teacher (forward KL over common tokens and a bucket, at aligned positions). Fine-tuning on the text alone is the row to
compare with. Writes docs/evidence/bridges.json; killed, it goes on at the next bridge.

    python benchmarks/bridges.py docs/evidence/bridges.json gsm8k/train.jsonl
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from limbeck.config.sections import Train
from limbeck.config.teacher import BridgeSettings
from limbeck.data.batches import Row, make_batch
from limbeck.models.bridge import TeacherOverBridge
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.term import make_term
from limbeck.storage.files import write_json
from limbeck.training.loop import loss_on, train
from limbeck.training.prepare import even_batches, response_log_probs
from limbeck.training.setup import TrainingPlan, make_job

TEACHER = "gemma-3-270m"
STUDENT = "smollm2-135m-instruct"
STEPS = 16
TOKENS = 512
TRAINED = 120
HELD_OUT = 40
LR = 5e-5
COMMON = ("forward_kl", BridgeSettings())
PARAMS = {"dual_space": {"projection_rate": 20}}
WAYS: dict[str, tuple[list[tuple[str, float]], BridgeSettings]] = {
    "text alone": ([("cross_entropy", 1.0)], BridgeSettings()),
    "bucket": ([("cross_entropy", 0.5), ("forward_kl", 0.5)], BridgeSettings()),
    "gold": ([("cross_entropy", 0.5), ("jsd", 0.5)], BridgeSettings(rest="sorted")),
    "mined": (
        [("cross_entropy", 0.5), ("forward_kl", 0.5)],
        BridgeSettings(match="edits", spans="equal", others="written"),
    ),
    "uld": ([("cross_entropy", 1.0), ("uld", 1.5)], BridgeSettings()),
    "dskd": ([("cross_entropy", 0.5), ("dual_space", 0.5)], BridgeSettings()),
}


def rows_of(file: Path, student: Model, teacher: Model) -> tuple[list[Row], list[Row], int]:
    """(training rows, held-out rows, bytes of the held-out answers) of the first problems of a file, in both models'
    tokens."""
    found = []
    size = 0
    for number, line in enumerate(file.read_text().splitlines()[: TRAINED + HELD_OUT]):
        problem = json.loads(line)
        asked = ({"role": "user", "content": str(problem["question"])},)
        said = re.sub(r"<<[^>]*>>", "", str(problem["answer"]))
        ids = (*student.text_ids(said), student.tokenizer.eos_token_id)
        shown = tuple(teacher.prompt_ids(asked))
        found.append(
            Row(str(number), tuple(student.prompt_ids(asked)), ids, group=str(number), teacher_prompt_ids=shown)
        )
        size += len(said.encode()) if number >= TRAINED else 0
    return found[:TRAINED], found[TRAINED:], size


def measured(job: Any, student: Model, teacher: TeacherOverBridge, held: list[Row], size: int) -> dict[str, float]:
    """The job's loss, nats a byte of the text, and forward KL over common tokens, on the held-out rows."""
    batches = [make_batch(held, part) for part in even_batches(held)]
    vocab_size = job.objective.vocab_size
    term = make_term(COMMON[0], {})
    plan = TrainingPlan([term], held, job.settings, job.folder, key="common", store=job.folder / "store.sqlite")
    common = make_job(plan, student, lambda: teacher)
    aligned = teacher.facts([row.response_ids for row in held])["aligned_share"]
    return {
        "loss": loss_on(job.objective, batches, 1.0),
        "nats_per_byte": -sum(response_log_probs(student.net, held, vocab_size).values()) / size,
        "common_kl": loss_on(common.objective, batches, 1.0) / aligned,
    }


def one(name: str, teacher: InProcessTeacher, rows: tuple[list[Row], list[Row], int], folder: Path) -> dict[str, Any]:
    losses, settings = WAYS[name]
    student = load_model(STUDENT)
    training, held, size = rows
    bridged = TeacherOverBridge(teacher, student, settings)
    common = TeacherOverBridge(teacher, student, COMMON[1])
    terms = [make_term(loss, PARAMS.get(loss, {}), weight) for loss, weight in losses]
    how = Train(steps=STEPS, tokens_per_step=TOKENS, lr=LR, seed=7, save_seconds=10_000)
    home = folder / name.replace(" ", "-")
    plan = TrainingPlan(terms, training, how, home, key=name, store=folder / "store.sqlite")
    job = make_job(plan, student, lambda: bridged)
    before = measured(job, student, common, held, size=size)
    began = time.monotonic()
    train(
        job,
        lambda step, steps, record: print(
            f"{name} {step} {steps} {record['loss']:.4f} {record['seconds']}", flush=True
        ),
    )
    seconds = time.monotonic() - began
    facts = bridged.facts([row.response_ids for row in training])
    after = measured(job, student, common, held, size=size)
    return {
        "before": before,
        "after": after,
        "seconds_per_step": seconds / STEPS,
        "shared": facts,
        "losses": losses,
        "rows": len(training),
    }


def main(out: Path, problems: Path) -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"ways": {}}
    teacher = InProcessTeacher(load_model(TEACHER))
    rows = rows_of(problems, load_model(STUDENT), teacher.model)
    for name in WAYS:
        if name in found["ways"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found["ways"][name] = one(name, teacher, rows, Path(folder))
        facts = {"steps": STEPS, "tokens_per_step": TOKENS, "held_out": HELD_OUT, "problems": problems.name, "lr": LR}
        found |= {"teacher": TEACHER, "student": STUDENT, **facts}
        write_json(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
