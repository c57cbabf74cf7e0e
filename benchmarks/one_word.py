"""GRPO with a verifier on an exact format, beside RFT at equal tokens, three seeds; writes docs/evidence/one-word.json.

    make evidence-one-word        # about half an hour on two cores; killed, it goes on

The task: "Name a fruit. Answer with one word.", for things of many kinds; an answer passes that is one word and nothing
else (a full stop is allowed), and not the kind itself. The kinds are split once into those to learn from and those to
measure on, with greedy answers. Both methods start from SmolLM2-135M-Instruct. GRPO takes STEPS steps of PROMPTS
questions with GROUP answers each. RFT draws as many answers from the start and trains on those that pass, for as many
updates with as many tokens in each. The check reads no meaning, so `distinct` counts the held-out answers that differ.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from limbeck.storage.files import read_jsonl, write_json
from limbeck.storage.metrics_log import Metrics

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "one-word.json"
RUNS = Path("runs/one-word")
KINDS = """animal bird fish insect reptile mammal flower tree fruit vegetable herb spice nut grain cheese drink wine
soup sauce dessert bread pasta cake meat mineral metal gemstone rock gas liquid planet star colour shape number letter
language country city river lake mountain ocean island desert continent state street bridge building castle church
museum school hospital hotel restaurant shop market factory farm garden park forest beach cave valley volcano storm
season month day holiday festival sport game toy dance song instrument composer singer band film book poem play
painter sculptor writer poet scientist inventor philosopher king queen president general saint god goddess hero
profession tool machine vehicle car ship boat aircraft train weapon knife clock lamp chair table bed carpet curtain
window door roof wall floor tile brick fabric garment hat shoe coat dress shirt glove scarf ring necklace perfume
soap brush cup plate bowl spoon pan oven fridge phone computer keyboard screen camera printer battery cable website
programming-language font currency bank tax crime law disease medicine vitamin bone muscle organ nerve emotion virtue
vice habit hobby smell taste sound texture""".split()
MEASURED, SEEDS = 80, (1, 2, 3)
STEPS, PROMPTS, GROUP, ANSWER = 40, 8, 8, 16
RATE = 1.0e-5


def question(kind: str) -> str:
    kind = kind.replace("-", " ")
    return f"Name {'an' if kind[0] in 'aeio' else 'a'} {kind}. Answer with one word."


def write_task(folder: Path) -> int:
    """The questions to learn from and the task; how many questions there are to learn from."""
    kinds = list(KINDS)
    random.Random(7).shuffle(kinds)  # noqa: S311 (no secret)
    rows = [
        {
            "id": kind,
            "prompt": question(kind),
            "check": {
                "type": "pattern",
                "pattern": rf"(?!(?i:{re.escape(kind)})\b)\p{{L}}[\p{{L}}\p{{M}}'’-]*\.?",
                "whole": True,
            },
        }
        for kind in kinds
    ]
    (folder / "task").mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[MEASURED:]))
    (folder / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:MEASURED]))
    (folder / "task" / "task.yaml").write_text(
        "name: one-word\nversion: 1.0\nkind: generation\ndescription: Things of a kind, named in one word.\n"
        "licence: Apache-2.0\ntest: test.jsonl\nmetrics: [pass_rate, finished]\n"
    )
    return len(rows) - MEASURED


def overrides(method: str, seed: int, questions: int, tokens: int) -> list[str]:
    """The settings of a method: its recipe, and what is the same for both. `tokens`: a step's, of RFT."""
    both = {
        "prompts": {"from": str(RUNS / "train.jsonl")},
        "train.seed": seed,
        "train.steps": STEPS,
        "train.lr": RATE,
        "train.precision": "bfloat16",
        "machine.threads": 1,
        "evaluate": {
            "metrics": ["fidelity", str(RUNS / "task")],
            "limit": 8,
            "max_tokens": ANSWER,
            "own_prompts": 4,
            "controls": ["untouched"],
            "speeds": False,
        },
    }
    draws = round(STEPS * PROMPTS * GROUP / questions)
    own: dict[str, dict[str, Any]] = {
        "grpo": {
            "writer": [{"by": "student", "max_tokens": ANSWER}],
            "rollout.prompts": PROMPTS,
            "rollout.group": GROUP,
        },
        "rft": {
            "elicit": [{"answer": {"n": draws, "max_tokens": ANSWER, "temperature": 1.0}}, "verify"],
            "train.epochs": None,
            "train.tokens_per_step": tokens,
        },
    }
    return [f"--set={key}={json.dumps(value)}" for key, value in (both | own[method]).items()]


def result(method: str, seed: int, questions: int, tokens: int = 0) -> dict[str, Any]:
    """Run a method with a seed to its end; what it came to."""
    folder = RUNS / f"{method}-{seed}"
    began = time.perf_counter()
    command = [sys.executable, "-m", "limbeck", "run", method, *overrides(method, seed, questions, tokens)]
    subprocess.run([*command, "--out", str(folder)], check=True)  # noqa: S603 (our own command)
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    steps = Metrics(folder / "metrics.jsonl").update()
    passed = {
        system: next(value for metric, value in metrics.items() if metric.endswith("pass_rate"))
        for system, metrics in summary["systems"].items()
        if system in ("untouched", "student")
    }
    return {
        "seconds": round(time.perf_counter() - began),
        "updates": len(steps),
        "trained_tokens": sum(step["response_tokens"] for step in steps),
        "passed": passed,
        "distinct": distinct(folder),
        "reward": [round(step["rollout"]["reward"], 4) for step in steps if "reward" in step.get("rollout", {})],
    }


def distinct(folder: Path) -> dict[str, int]:
    """How many answers of the start and of the student to the held-out questions differ."""
    homes = {system: folder / "evaluation" / f"task-one-word+{system}.jsonl" for system in ("untouched", "student")}
    return {
        system: len({item["text"].strip(" .\n").casefold() for item in read_jsonl(file)})
        for system, file in homes.items()
    }


def main() -> None:
    questions = write_task(RUNS)
    found: dict[str, dict[int, dict[str, Any]]] = {"grpo": {}, "rft": {}}
    size = {"questions": questions, "steps": STEPS, "prompts": PROMPTS, "group": GROUP, "lr": RATE}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(result, "grpo", seed, questions): ("grpo", seed) for seed in SEEDS}
        while running:
            done = next(as_completed(running))
            method, seed = running.pop(done)
            found[method][seed] = done.result()
            print(f"{method}, seed {seed}: {json.dumps(found[method][seed])}", flush=True)
            if method == "grpo":  # RFT has as many tokens in each update
                tokens = max(1, round(found["grpo"][seed]["trained_tokens"] / STEPS))
                running[pool.submit(result, "rft", seed, questions, tokens=tokens)] = ("rft", seed)
    write_json(OUT, {"task": question("fruit"), "held_out": MEASURED, "size": size, "methods": found})


if __name__ == "__main__":
    main()
