"""A real pair with two tokenizers: Gemma 3 270M teaches SmolLM2-135M-Instruct over each bridge.

For every bridge, the same answers of the teacher to built-in prompts are trained on for the same few steps from the same start; measured
before and after on held-out answers: the bridge's own loss, how likely the student finds the text (nats a byte, so that tokens don't
matter), and how near it is to the teacher (forward KL over common tokens and a bucket, at aligned positions). Fine-tuning on the text
alone is the row to compare with. Writes docs/evidence/bridges.json; killed, it goes on at the next bridge.

    python benchmarks/bridges.py docs/evidence/bridges.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from limbeck import build
from limbeck.console import JsonLines
from limbeck.data import Row, make_batch
from limbeck.durable import write_json
from limbeck.jobs import make_job
from limbeck.models.bridge import BridgedTeacher
from limbeck.models.load import Model, load_model
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.term import make_term
from limbeck.pipeline import Run
from limbeck.prepare import even_batches, response_log_probs
from limbeck.settings import Train
from limbeck.teacher_settings import Bridge
from limbeck.train import loss_on, train

TEACHER, STUDENT = "gemma-3-270m", "smollm2-135m-instruct"
STEPS, TOKENS, HELD_OUT, LR = 30, 512, 40, 5e-5
COMMON = ("forward_kl", Bridge())
WAYS: dict[str, tuple[list[tuple[str, float]], Bridge]] = {
    "text alone": ([("cross_entropy", 1.0)], Bridge()),
    "bucket": ([("cross_entropy", 0.5), ("forward_kl", 0.5)], Bridge()),
    "gold": ([("cross_entropy", 0.5), ("jsd", 0.5)], Bridge(rest="sorted")),
    "mined": ([("cross_entropy", 0.5), ("forward_kl", 0.5)], Bridge(match="edits", spans="equal", others="written")),
    "uld": ([("cross_entropy", 1.0), ("uld", 1.5)], Bridge()),
    "dskd": ([("cross_entropy", 0.5), ("dual_space", 0.5)], Bridge()),
}


def text(folder: Path) -> tuple[Run, list[Row], list[Row], int]:
    """(the run that holds it, training rows, held-out rows, bytes of the held-out answers): what the teacher answers to prompts."""
    changes = [f"teacher.model={TEACHER}", "writer.0.max_tokens=64", f"evaluate.limit={HELD_OUT}"]
    holder = Run(build.load_recipe("uld", changes), folder, JsonLines())
    folder.mkdir(parents=True, exist_ok=True)
    training = holder.rows(holder.text.training(), holder.untouched())
    said = [sample for sample in holder.text.held_out() if sample.messages[-1]["content"].strip()]
    held = holder.rows(said, holder.untouched())
    return holder, training, held, sum(len(sample.messages[-1]["content"].encode()) for sample in said)


def measured(job: Any, student: Model, teacher: BridgedTeacher, held: list[Row], size: int) -> dict[str, float]:
    """The job's loss, nats a byte of the text, and forward KL over common tokens, on the held-out rows."""
    batches = [make_batch(held, part) for part in even_batches(held)]
    vocabulary = job.vocabulary
    term = make_term(COMMON[0], {})
    common = make_job([term], student, held, lambda: teacher, None, job.settings, job.folder, "common", job.folder / "store.sqlite")
    aligned = teacher.facts([row.response_ids for row in held])["aligned_share"]
    return {
        "loss": loss_on(job, batches, 1.0),
        "nats_per_byte": -sum(response_log_probs(student.net, held, vocabulary).values()) / size,
        "common_kl": loss_on(common, batches, 1.0) / aligned,
    }


def one(name: str, teacher: InProcessTeacher, rows: tuple[list[Row], list[Row], int], folder: Path) -> dict[str, Any]:
    losses, settings = WAYS[name]
    student, (training, held, size) = load_model(STUDENT), rows
    bridged, common = BridgedTeacher(teacher, student, settings), BridgedTeacher(teacher, student, COMMON[1])
    terms = [make_term(loss, {}, weight) for loss, weight in losses]
    how = Train(steps=STEPS, tokens_per_step=TOKENS, lr=LR, seed=7, save_seconds=10_000)
    job = make_job(terms, student, training, lambda: bridged, None, how, folder / name.replace(" ", "-"), name, folder / "store.sqlite")
    before, began = measured(job, student, common, held, size), time.monotonic()
    train(job, lambda step, steps, record: print(name, step, steps, round(record["loss"], 4), record["seconds"], flush=True))
    seconds = time.monotonic() - began
    facts = bridged.facts([row.response_ids for row in training])
    after = measured(job, student, common, held, size)
    return {"before": before, "after": after, "seconds_per_step": seconds / STEPS, "shared": facts, "losses": losses, "rows": len(training)}


def main(out: Path) -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"ways": {}}
    holder, *rows = text(Path("runs/bridges"))
    teacher = holder.teacher
    for name in WAYS:
        if name in found["ways"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found["ways"][name] = one(name, teacher, (rows[0], rows[1], rows[2]), Path(folder))
        found |= {"teacher": TEACHER, "student": STUDENT, "steps": STEPS, "tokens_per_step": TOKENS, "held_out": HELD_OUT, "lr": LR}
        write_json(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
