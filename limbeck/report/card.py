"""The cards of what leaves a run: of its student, how it was made and is loaded; of its text, who wrote it and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from limbeck.config.recipe import Recipe

WRITES = """Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`, and use its own chat template.
How close it is to the teacher, with confidence intervals, is in the run's `evaluation/summary.json`."""


def model_card(recipe: Recipe, name: str, teacher_identity: str, use: str = "") -> str:
    """Markdown with the settings that made the model. It makes no claims of quality; the run's report does. `use` says
    how to load it, if it is no model that writes."""
    resolved = recipe.resolved()
    settings: dict[str, Any] = {
        key: resolved[key] for key in ("title", "paper", "writer", "rollout", "loss", "train") if key in resolved
    }
    # whose weights the teacher had and what it was shown, but not its model, which may be a path
    if isinstance(resolved["teacher"], dict):
        settings["teacher"] = {key: value for key, value in resolved["teacher"].items() if key != "model"}
    role = "the fine-tuning control of" if name == "sft_control" else "the student of"
    return f"""---
library_name: transformers
tags: [distillation, limbeck]
---
# {recipe.name}: {role} a Limbeck distillation

Teacher: `{teacher_identity}`. The licence and terms of the teacher apply to this model and to the text it writes.

{use or WRITES}

How it was made (recipe hash `{recipe.hash[:16]}`; file paths are left out):

```json
{json.dumps(settings, indent=1, ensure_ascii=False)}
```
"""


def data_card(recipe: Recipe, writers: Mapping[str, int]) -> str:
    """Markdown for the text that a student was trained on. `writers`: how many conversations each writer wrote."""
    resolved = recipe.resolved()
    steps = ", ".join(step.name for step in recipe.elicit or ()) or "none"
    count = sum(writers.values())
    by = "\n".join(f"- `{writer}`: {number:,}" for writer, number in sorted(writers.items()))
    return f"""---
configs: [{{config_name: default, data_files: train.jsonl}}]
tags: [distillation, limbeck]
---
# {recipe.name}: text that a Limbeck distillation trained on

{count:,} conversations, one a line of `train.jsonl`: `messages` as chat templates take them, and the `writer` of the
last. The licences of the prompts, and the licence and terms of the writers, apply to it.

Writers of the answers:

{by}

Steps of elicitation: {steps}. Settings of the writing (recipe hash `{recipe.hash[:16]}`; file paths are left out):

```json
{json.dumps(resolved.get("writer", []), indent=1, ensure_ascii=False)}
```
"""
