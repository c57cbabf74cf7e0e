"""The model card of an exported student: what it is, where it comes from, how to load it."""

from __future__ import annotations

import json
from typing import Any

from limbeck.config.recipe import Recipe


def model_card(recipe: Recipe, name: str, teacher_identity: str) -> str:
    """Markdown with the settings that made the model. It claims no quality: the run's report does, with intervals."""
    resolved = recipe.resolved()
    settings: dict[str, Any] = {
        key: resolved[key] for key in ("title", "paper", "writer", "rollout", "loss", "train") if key in resolved
    }
    # weights that are the student's own, and what it was shown; its model may be a path
    if isinstance(resolved["teacher"], dict):
        settings["teacher"] = {key: value for key, value in resolved["teacher"].items() if key != "model"}
    what = "the fine-tuning control of" if name == "sft_control" else "the student of"
    return f"""---
library_name: transformers
tags: [distillation, limbeck]
---
# {recipe.name}: {what} a Limbeck distillation

Teacher: `{teacher_identity}`. The licence and the terms of the teacher apply to this model and to its text.

Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`; use its own chat template.
What was kept of the teacher stands, with confidence intervals, in the run's `evaluation/summary.json`.

How it was made (recipe hash `{recipe.hash[:16]}`; paths of files are left out):

```json
{json.dumps(settings, indent=1, ensure_ascii=False)}
```
"""
