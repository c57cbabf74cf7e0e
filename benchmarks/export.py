"""What the types of a GGUF file cost: their size, and their distance from the student under llama.cpp; writes
docs/evidence/export.json.

    .venv/bin/python benchmarks/export.py      # some five minutes on two cores

SmolLM2-135M stands for a student. llama.cpp answers a dozen of the quickstart's held-out prompts greedily with each
file; the figures are those of `limbeck export`: KL(student || file) in nats a token over the file's 64 likeliest tokens
and a bucket, and the share of tokens at which both have the same first choice. `seconds` is the writing alone.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from limbeck.commands.export.check import compare_file
from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import load_recipe
from limbeck.models.load import load_model, model_folder
from limbeck.models.to_gguf.types import TYPES
from limbeck.models.to_gguf.write import write_gguf
from limbeck.runs.resolve import resolve
from limbeck.storage.files import write_json

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "export.json"
MODEL = "smollm2-135m-instruct"
PROMPTS = 12


def main() -> None:
    folder = model_folder(MODEL)
    held_out = resolve(load_recipe(recipe_files()["quickstart"])).held_out_prompts[:PROMPTS]
    prompts = [prompt.messages[-1]["content"] for prompt in held_out]
    model = load_model(MODEL)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in TYPES.values():
            file = Path(scratch) / f"{MODEL}-{kind.name}.gguf"
            began = time.perf_counter()
            write_gguf(folder, file, kind, MODEL)
            seconds = time.perf_counter() - began
            found = compare_file(model, file, prompts, math.inf)
            del found["most_kl_nats_per_token"]  # no measurement
            rows[kind.name] = found | {"bytes": file.stat().st_size, "seconds": round(seconds, 1)}
            print(kind.name, rows[kind.name])
            file.unlink()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, shared with other work"
    write_json(
        EVIDENCE, {"model": MODEL, "engine": f"xllamacpp {version('xllamacpp')}", "machine": machine, "types": rows}
    )


if __name__ == "__main__":
    main()
