"""What shorter weights cost a teacher: its distance from itself in float32, and its size; writes
docs/evidence/precision.json.

    .venv/bin/python benchmarks/precision.py      # some three minutes on two cores

SmolLM2-135M reads the held-out questions in its own template. KL(float32 || shorter) in nats and the share of equal
likeliest tokens are means over all positions but the template's first line.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import load_recipe
from limbeck.evaluate.efficiency import sizes
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.placement import Precision
from limbeck.runs.resolve import resolve
from limbeck.storage.files import write_json

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "precision.json"
MODEL = "smollm2-135m-instruct"
QUESTIONS = 12
KINDS = {
    "float16": Precision(torch.float16),
    "bfloat16": Precision(torch.bfloat16),
    "int8": Precision(quantise="int8"),
    "bfloat16, int8": Precision(torch.bfloat16, "int8"),
    "int4": Precision(quantise="int4"),
    "bfloat16, int4": Precision(torch.bfloat16, "int4"),
}


def texts(model: Model) -> list[torch.Tensor]:
    prompts = resolve(load_recipe(recipe_files()["quickstart"])).held_out_prompts
    return [torch.tensor([model.prompt_ids(prompt.messages)]) for prompt in prompts[:QUESTIONS]]


@torch.inference_mode()
def log_probs(model: Model, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    first = min(len(text[0]) for text in ids) // 2
    return [model.net(text).logits[0, first:].float().log_softmax(-1) for text in ids]


def main() -> None:
    whole = load_model(MODEL)
    ids = texts(whole)
    p = log_probs(whole, ids)
    rows = {"float32": sizes(whole) | {"mean_kl": 0.0, "largest_kl": 0.0, "same_likeliest": 1.0}}
    for name, precision in KINDS.items():
        model = load_model(MODEL, precision)
        q = log_probs(model, ids)
        kl_N = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
        same_N = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(p, q, strict=True)])
        rows[name] = sizes(model) | {
            "mean_kl": float(kl_N.mean()),
            "largest_kl": float(kl_N.max()),
            "same_likeliest": float(same_N.mean()),
        }
    write_json(
        EVIDENCE,
        {
            "model": MODEL,
            "positions": sum(len(log_NV) for log_NV in p),
            "kept": rows,
            "machine": {"torch": torch.__version__, "processor": platform.machine()},
        },
    )


if __name__ == "__main__":
    main()
