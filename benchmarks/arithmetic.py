"""GRPO with a verifier on a small exact task, beside RFT with as many answers of the student's, three seeds; writes
docs/evidence/arithmetic.json.

    make evidence-arithmetic        # an hour or more on two cores; killed, it goes on

The task: sums of two numbers up to MOST, answered by the number alone, character by character. The pairs are split once
into those to learn from and HELD_OUT to measure on; no pair is in both, in either order. Both start from
SmolLM2-135M-Instruct. GRPO: STEPS steps of PROMPTS questions with GROUP answers each, reward 1 for a right answer. RFT:
as many answers are drawn from the start, and the right ones are trained on for as many updates.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import Metrics

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "arithmetic.json"
RUNS = Path("runs/arithmetic")
QUESTION = "What is {a} + {b}? Write the number alone."
MOST, HELD_OUT, SEEDS = 20, 100, (1, 2, 3)
STEPS, PROMPTS, GROUP, ANSWER = 60, 8, 8, 12
RATE = 1.0e-5


def write_task(folder: Path) -> int:
    """The questions to learn from and the task; how many questions there are to learn from."""
    pairs = [(a, b) for a in range(1, MOST + 1) for b in range(a, MOST + 1)]
    random.Random(7).shuffle(pairs)  # noqa: S311 (no secret)
    rows = [
        {
            "id": f"{a}-{b}",
            "prompt": QUESTION.format(a=a, b=b),
            "check": {"type": "exact", "answer": str(a + b), "normalise": False},
        }
        for a, b in pairs
    ]
    (folder / "task").mkdir(parents=True, exist_ok=True)
    held_out, training = rows[:HELD_OUT], rows[HELD_OUT:]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training))
    (folder / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (folder / "task" / "task.yaml").write_text(
        "name: arithmetic\nversion: 1.0\nkind: generation\ndescription: Sums of two numbers, by the number alone.\n"
        "licence: Apache-2.0\ntest: test.jsonl\nmetrics: [pass_rate, finished]\n"
    )
    return len(training)


def overrides(method: str, seed: int, questions: int) -> list[str]:
    """The settings of a method: its recipe, and what is the same for both."""
    both = {
        "prompts": {"from": str(RUNS / "train.jsonl")},
        "train.seed": seed,
        "evaluate": {
            "metrics": ["fidelity", str(RUNS / "task")],
            "limit": 8,
            "limits": {str(RUNS / "task"): HELD_OUT},
            "max_tokens": ANSWER,
            "own_prompts": 4,
            "controls": ["untouched"],
        },
    }
    drawn = STEPS * PROMPTS * GROUP
    own: dict[str, dict[str, Any]] = {
        "grpo": {
            "writer": [{"by": "student", "max_tokens": ANSWER}],
            "train.steps": STEPS,
            "train.lr": RATE,
        },
        "rft": {
            "elicit": [{"answer": {"n": round(drawn / questions), "max_tokens": ANSWER, "temperature": 1.0}}, "verify"],
            "train.epochs": None,
            "train.steps": STEPS,
            "train.lr": RATE,
        },
    }
    return [f"--set={key}={json.dumps(value)}" for key, value in (both | own[method]).items()]


def result(method: str, seed: int, questions: int) -> dict[str, Any]:
    """Run a method with a seed to its end; what it came to."""
    run = RUNS / f"{method}-{seed}"
    began = time.perf_counter()
    command = [sys.executable, "-m", "limbeck", "run", method, *overrides(method, seed, questions), "--out", str(run)]
    subprocess.run(command, check=True)  # noqa: S603 (our own command)
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    steps = Metrics(run / "metrics.jsonl").update()
    passed = {
        system: next(value for metric, value in metrics.items() if metric.endswith("pass_rate"))
        for system, metrics in summary["systems"].items()
        if system in ("untouched", "student")
    }
    return {
        "seconds": round(time.perf_counter() - began),
        "updates": len(steps),
        "trained_tokens": sum(step["response_tokens"] for step in steps),
        "right": passed,
        "reward": [round(step["rollout"]["reward"], 4) for step in steps if "reward" in step.get("rollout", {})],
    }


def main() -> None:
    questions = write_task(RUNS)
    found = {method: {str(seed): result(method, seed, questions) for seed in SEEDS} for method in ("grpo", "rft")}
    size = {"questions": questions, "steps": STEPS, "prompts": PROMPTS, "group": GROUP, "lr": RATE}
    write_json(OUT, {"task": QUESTION, "held_out": HELD_OUT, "size": size, "methods": found})


if __name__ == "__main__":
    main()
