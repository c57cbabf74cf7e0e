"""Does a student learn more from verified reasons than from the answers alone? Writes docs/evidence/reasoning.json and
.html.

    .venv/bin/python benchmarks/reasoning.py        # some 40 minutes on two cores; killed, it goes on

Qwen2.5-Coder-1.5B-Instruct behind the packaged llama.cpp server solves word problems with reasons (1.1 GB are fetched
once); what has the right number at its end is kept. SmolLM2-135M-Instruct is trained on it as Distilling Step-by-Step
does (question to answer, and question to reasons), and on the answers alone, over the same steps of the same number of
tokens, three seeds each. It speaks other tokens than its teacher, which gives text and nothing else. Measured: the
share of held-out problems with the right number.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from limbeck import compare, load_recipe
from limbeck.commands.console import Terminal
from limbeck.commands.serve import serve

HERE = Path(__file__).parent.parent
OUT = HERE / "docs" / "evidence"
RUN = HERE / "runs" / "reasoning"
TEACHER = "qwen2.5-coder-1.5b-instruct"
METHODS = ("label-only", "distilling-step-by-step")
PORT = 18392  # the address is part of the recipe, so that a comparison that was killed goes on only at the same one
ELICITED = ("elicit.0.params.n=2", "elicit.0.params.max_tokens=320")
SETTINGS = (
    *ELICITED,
    "train.epochs=null",
    "train.steps=40",
    "train.tokens_per_step=256",
    "evaluate.limit=24",
    "evaluate.max_tokens=256",
    "evaluate.own_prompts=8",
)


def main() -> None:
    serving = serve(TEACHER, PORT, context=1024, slots=8)
    os.environ["LIMBECK_API_KEY"] = serving.key
    teacher = {"server": {"url": serving.url, "name": serving.name, "concurrency": 8}}
    settings = [*SETTINGS, f"teacher={json.dumps(teacher)}"]
    recipes = [load_recipe(name, [*ELICITED]) for name in METHODS]
    common = load_recipe("distilling-step-by-step", settings)
    folder = compare(recipes, RUN, like=common, seeds=3, reporter=Terminal()).folder
    shutil.copy(folder / "comparison.json", OUT / "reasoning.json")
    shutil.copy(folder / "report.html", OUT / "reasoning.html")


if __name__ == "__main__":
    main()
