"""Time training steps against their floor: the operations they can't avoid, at this machine's measured rate."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.config.recipe import Recipe
from limbeck.config.rounds import without_rounds
from limbeck.data.batches import make_batch, steps_of_epoch
from limbeck.models.teacher_interface import TEACHER_EVIDENCE
from limbeck.progress import Reporter
from limbeck.runs.claim import run_folder
from limbeck.runs.fit import prepared
from limbeck.runs.hardware import matrix_rate, synchronize
from limbeck.runs.memory import compute_dtype
from limbeck.runs.run import Run
from limbeck.runs.shapes import Shape, step_flops
from limbeck.storage.files import exclusive
from limbeck.training import loop as train
from limbeck.training.memory import keep_freed_memory

STEPS = 3


def profile(recipe: Recipe, out: str | Path | None, reporter: Reporter) -> dict[str, Any]:
    """Time STEPS steps (forward and backward, no update) and compare them with the floor. Elicits any missing text.

    The floor counts 2 operations per weight and token forward and 4 backward, over every token of the rows without
    padding, and over the head for response tokens only. Its rate is that of a matrix product of the student's own MLP
    shape in the recipe's precision, measured just before and just after each step, since a shared machine's speed
    drifts.
    """
    without_rounds(recipe.rounds, recipe.name, "time the recipe.yaml of one of its rounds")
    keep_freed_memory()
    folder = run_folder(recipe, out)
    with exclusive(folder / ".lock"):
        run = Run(prepared(recipe), folder, reporter)
        run.claim()
        student = run.models.student_to_train()
        job = run.job("student", student)
    device = student.net.device
    config = student.net.config.get_text_config()
    shape = (512, config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    if device.type == "cuda":  # smaller products don't fill it
        shape = (8192, *shape[1:])
    rate = partial(matrix_rate, device, compute_dtype(recipe), shape=shape)
    steps = steps_of_epoch(
        job.rows,
        recipe.train.seed,
        epoch=0,
        tokens_per_step=recipe.train.tokens_per_step,
        together=job.objective.keeps_groups,
    )
    terms = [term.at_step(0.0, {}) for term in job.terms]
    needs_teacher = any(term.reads & TEACHER_EVIDENCE for term in job.terms) and recipe.teacher.model is not None
    job.prepare()
    teacher = Shape.of(run.models.teacher.model.net.config) if needs_teacher else None
    job.net.train()
    rates = []
    seconds = []
    floors = []
    tokens = 0
    for step in steps[: STEPS + 1]:
        rate_before = rate()
        step_tokens = sum(len(job.rows[index]) for micro_batch in step for index in micro_batch)
        response_tokens = sum(len(job.rows[index].response_ids) for micro_batch in step for index in micro_batch)
        floors.append(step_flops(Shape.of(student.net.config), teacher, step_tokens, response_tokens))
        began = time.perf_counter()
        for micro_batch in step:
            train.backward(job, make_batch(job.rows, micro_batch), terms, {term.label: 1.0 for term in job.terms})
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        rates.append((rate_before + rate()) / 2)
        tokens += step_tokens
        job.net.zero_grad(set_to_none=True)
    ratios = [elapsed / (floor / rate) for elapsed, floor, rate in zip(seconds, floors, rates, strict=True)]
    return {
        "matrix_product_gflop_per_second": round(statistics.median(rates) / 1e9, 1),
        "floor_gflop_per_step": round(statistics.mean(floors) / 1e9, 1),
        "seconds_per_step": round(statistics.median(seconds), 2),
        "tokens_per_second": round(tokens / sum(seconds), 1),
        "times_the_floor": round(statistics.median(ratios[1:] or ratios), 2),
    }
