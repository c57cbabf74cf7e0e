"""Every recipe that elicits, from end to end at small size against a served model; writes
docs/evidence/elicitation.json.

    .venv/bin/python benchmarks/elicitation.py               # all of them, some 45 minutes on two cores
    .venv/bin/python benchmarks/elicitation.py alpaca orca   # these alone; what is known of the others stays

The packaged llama.cpp server serves SmolLM2-135M-Instruct, and for questions that want reasons
Qwen2.5-Coder-1.5B-Instruct (1.1 GB once). The student takes two steps and is measured on a few prompts: what counts
here is what every step of elicitation takes, gives and leaves out. Runs live in runs/elicitation and go on where they
were.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from limbeck import load_recipe, run
from limbeck.commands.console import Terminal
from limbeck.commands.serve import serve
from limbeck.config.builtin import recipe_files
from limbeck.storage.files import write_json
from limbeck.types import UserError

HERE = Path(__file__).parent.parent
OUT = HERE / "docs" / "evidence" / "elicitation.json"
RUNS = HERE / "runs" / "elicitation"
SMALL = "smollm2-135m-instruct"
LARGE = "qwen2.5-coder-1.5b-instruct"
# the address is part of the recipe, so that a run that was killed goes on only at the same one
PORTS = {SMALL: 18391, LARGE: 18393}
IN_PROCESS = ("scott", "mixkd")  # contrast and mixing need the weights
TINY = (
    "train.steps=2",
    "train.epochs=null",
    "train.tokens_per_step=256",
    "evaluate.metrics=[fidelity]",
    "evaluate.limit=4",
    "evaluate.max_tokens=16",
    "evaluate.own_prompts=2",
    "evaluate.controls=[untouched]",
)
SIZES: dict[str, tuple[str, ...]] = {
    "alpaca": ("elicit.0.params.count=20", "elicit.0.params.requests=10"),
    "self-instruct": ("elicit.0.params.count=8", "elicit.0.params.requests=6"),
    "evol-instruct": ("prompts.limit=12",),
    "magpie": ("elicit.0.params.count=30",),
    "orca": ("prompts.limit=24",),
    "scott": ("prompts.limit=12",),
    "tinystories": ("elicit.0.params.count=12", "elicit.0.params.max_tokens=400"),
    "ultrachat": ("prompts.limit=8",),
    "mixkd": ("prompts.limit=24",),
    "superfiltering": ("prompts.limit=60",),
    "deita": ("prompts.limit=30", "elicit.1.params.count=15"),
    "few-shot-mcqa": ("elicit.0.params.count=20",),
    "bonito": ("elicit.0.params.each=3",),
    "oss-instruct": ("elicit.0.params.each=1", "elicit.0.params.max_tokens=384"),
    "distilling-step-by-step": ("prompts.limit=16", "elicit.0.params.n=2", "elicit.0.params.max_tokens=320"),
    "fine-tune-cot": ("prompts.limit=12", "elicit.0.params.n=2"),
    "mcc-kd": ("prompts.limit=8", "elicit.0.params.n=4", "elicit.0.params.max_tokens=320"),
    "metamath": ("prompts.limit=8", "elicit.1.params.n=1"),
    "equation-reasoner": ("prompts.limit=16", "elicit.0.params.n=2", "elicit.0.params.max_tokens=320"),
    "label-only": ("prompts.limit=16", "elicit.0.params.n=2", "elicit.0.params.max_tokens=320"),
}
REASONING = ("distilling-step-by-step", "fine-tune-cot", "mcc-kd", "metamath", "equation-reasoner", "label-only")


def measured(name: str, served: dict[str, Any] | None, model: str) -> dict[str, Any]:
    """One recipe's run: what each of its steps did."""
    teacher = {"model": SMALL} if served is None else {"model": SMALL, "server": served}
    if model == LARGE:
        teacher = {"server": served}  # text alone, from a model that speaks other tokens
    began = time.perf_counter()
    recipe = load_recipe(name, [*TINY, *SIZES.get(name, ()), f"teacher={json.dumps(teacher)}"])
    folder = RUNS / name
    try:
        run(recipe, folder, Terminal())
    except UserError:  # where nothing is left to train on, that is the result
        if not (folder / "elicitation.json").exists():
            raise
    facts: dict[str, Any] = {
        "teacher": model,
        "served": served is not None,
        "seconds": round(time.perf_counter() - began),
    }
    if (file := folder / "elicitation.json").exists():
        told = json.loads(file.read_text())["steps"]
        facts["steps"] = [{key: value for key, value in step.items() if key != "examples"} for step in told]
    if not (folder / "report.html").exists():
        return facts
    facts["trained_tokens"] = sum(
        json.loads(line)["response_tokens"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    )
    facts["page"] = (folder / "report.html").stat().st_size
    return facts


def main() -> None:
    wanted = sys.argv[1:] or [name for name in recipe_files() if load_recipe(name).elicit or name in IN_PROCESS]
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    for model in (SMALL, LARGE):
        names = [name for name in wanted if (name in REASONING) == (model == LARGE)]
        if not names:
            continue
        serving = serve(model, PORTS[model], context=2048, slots=8)
        os.environ["LIMBECK_API_KEY"] = serving.key
        served = {"url": serving.url, "name": serving.name, "concurrency": 8}
        for name in names:
            known[name] = measured(name, None if name in IN_PROCESS else served, model)
            write_json(OUT, dict(sorted(known.items())))
            print(name, known[name], flush=True)


if __name__ == "__main__":
    main()
