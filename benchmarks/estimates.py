"""What `limbeck check` promises against what a run takes: steps, requests, and seconds of every stage; writes
docs/evidence/estimates.json.

    OMP_NUM_THREADS=1 nice .venv/bin/python benchmarks/estimates.py            # about ten minutes on one idle core
    .venv/bin/python benchmarks/estimates.py seq-kd                            # these alone

Real weights (SmolLM2-135M-Instruct), small sizes: the teacher's sampled text, given answers, and the student's own
text. The rate of the machine is measured when the promise is made; work that others begin or end meanwhile is not
foreseen, so the load is written beside the figures. Runs live in runs/estimates and are made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from limbeck import check, load_recipe, run
from limbeck.commands.console import Terminal
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import steps_made

HERE = Path(__file__).parent.parent
OUT = HERE / "docs" / "evidence" / "estimates.json"
RUNS = HERE / "runs" / "estimates"
TINY = ("prompts.limit=24", "evaluate.limit=6", "evaluate.metrics=[fidelity]", "evaluate.own_prompts=6")
RECIPES: dict[str, tuple[str, ...]] = {
    "quickstart": ("train.tokens_per_step=128", "evaluate.controls=[untouched]"),
    "seq-kd": ("writer=[{by: corpus}]", "prompts.from=builtin/sums", "prompts.limit=48", "train.tokens_per_step=128",
               "train.steps=null", "train.epochs=2", "evaluate.controls=[untouched]"),
    "on-policy-distillation": ("train.steps=6", "train.epochs=null", "train.tokens_per_step=128",
                               "writer.0.max_tokens=32", "evaluate.controls=[untouched]"),
}  # fmt: skip


class Stages(Terminal):
    """Notes when every stage begins."""

    def __init__(self) -> None:
        super().__init__()
        self.begins: list[tuple[str, float]] = []

    def stage(self, title: str) -> None:
        self.begins.append((title, time.perf_counter()))
        super().stage(title)


def taken(stages: Stages, end: float) -> dict[str, float]:
    """Seconds of what `check` calls elicit, train and evaluate."""
    names = {"Teacher's text": "elicit", "Evaluation": "evaluate", "Report": "evaluate"}
    seconds: dict[str, float] = {}
    ends = [began for _, began in stages.begins[1:]] + [end]
    for (title, began), until in zip(stages.begins, ends, strict=True):
        name = names.get(title, "train")
        seconds[name] = round(seconds.get(name, 0.0) + until - began, 1)
    return seconds


def held_against(name: str) -> dict[str, Any]:
    """One recipe's promises and its run."""
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    recipe = load_recipe(name, [*TINY, *RECIPES[name]])
    plan = check(recipe)
    stages = Stages()
    before = os.getloadavg()[0]
    run(recipe, folder, stages)
    stages.close()
    seconds = taken(stages, time.perf_counter())
    promised = {"steps": plan.steps, "seconds": {key: round(value, 1) for key, value in plan.seconds.items()}}
    made = {"steps": steps_made(folder), "seconds": seconds}
    ratio = sum(plan.seconds.values()) / sum(seconds.values())
    load = [round(before, 1), round(os.getloadavg()[0], 1)]
    return {
        "promised": promised,
        "made": made,
        "promised_by_taken_seconds": round(ratio, 2),
        "answers": plan.answers,
        "load": load,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def main() -> None:
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in sys.argv[1:] or RECIPES:
        known[name] = held_against(name)
        print(name, json.dumps(known[name]), flush=True)
        write_json(OUT, known)


if __name__ == "__main__":
    main()
