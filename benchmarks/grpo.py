"""A training of GRPO beside TRL's: the same student, prompts, groups and lengths; writes docs/evidence/grpo.json.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/grpo.py            # both, twice, in turn: about half an hour on two cores

Each system runs in a process of its own, and its first step is left out. `trained` are tokens of answers that a loss
was taken on; memory is the process's peak. PROMPTS prompts a step, GROUP answers each of at most TOKENS tokens at
temperature 1, one update a step, AdamW, fp32, no penalty, so no reference. The reward is
how little an answer repeats itself, which hardly costs time and differs in every group.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from in_turns import in_turns

from limbeck import load_recipe, run
from limbeck.elicit.prompts import load_prompts
from limbeck.models.folder import save_model
from limbeck.models.load import load_model
from limbeck.models.prune import drop_layers
from limbeck.storage.files import read_jsonl, write_json
from limbeck.training.memory import peak_mib

OUT = Path(__file__).parent.parent / "docs" / "evidence" / "grpo.json"
MODEL = "smollm2-135m-instruct"
LAYERS, PROMPTS, GROUP, TOKENS, STEPS, ROUNDS = 24, 8, 8, 64, 4, 2
SYSTEMS = ("limbeck", "trl GRPOTrainer")


def measure(name: str, student: Path, work: Path) -> dict[str, float]:
    """A system's steps in this process: answer tokens a second and peak memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    steps = (ours if name == "limbeck" else theirs)(student, work)[1:]
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["trained"] for step in steps)
    peak = peak_mib() if name == "limbeck" else None
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"trained": tokens / seconds, "tokens": tokens, "seconds": seconds, "peak_mib": round(peak)}


def ours(student: Path, work: Path) -> list[dict[str, float]]:
    settings = [
        f"teacher={student}",
        f"student={{start: {{pretrained: {student}}}}}",
        "prompts={from: builtin/everyday}",
        f"writer=[{{by: student, max_tokens: {TOKENS}}}]",
        f"rollout={{prompts: {PROMPTS}, group: {GROUP}, rewards: [{{repetition: {{gram: 1}}}}]}}",
        "loss=[ppo_clip]",
        f"train.steps={STEPS}",
        "evaluate.controls=[]",
    ]
    folder = run(load_recipe("grpo", settings), work / "run", stages=("train",)).folder
    return [{"seconds": r["seconds"], "trained": r["response_tokens"]} for r in read_jsonl(folder / "metrics.jsonl")]


def theirs(student: Path, work: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = load_model(str(student))
    steps: list[dict[str, float]] = [{"trained": 0.0}]
    ends: list[float] = []

    class Counting(GRPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:  # their signature
            steps[-1]["trained"] += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *rest, **named)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:  # their signature
            ends.append(time.perf_counter())
            steps.append({"trained": 0.0})

    def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [len(set(ids)) / max(1, len(ids)) for ids in completion_ids]

    settings = GRPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=PROMPTS,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        max_steps=STEPS,
        learning_rate=5e-6,
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=STEPS,
    )
    prompts = [prompt.text for prompt in load_prompts("builtin/everyday")[: PROMPTS * STEPS]]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompts]
    trainer = Counting(
        model.net, variety, settings, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer
    )
    trainer.add_callback(Clock())
    began = time.perf_counter()
    trainer.train()
    for number, end in enumerate(ends):
        steps[number]["seconds"] = end - (ends[number - 1] if number else began)
    return steps[: len(ends)]


def main() -> None:
    if len(sys.argv) > 1:
        name, student, work = sys.argv[1:]
        print(json.dumps(measure(name, Path(student), Path(work))))
        return
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "student"
        student.mkdir()
        whole = load_model(MODEL)
        save_model(drop_layers(whole.net, tuple(range(LAYERS))), whole.tokenizer, student)
        found = in_turns(__file__, SYSTEMS, student, Path(folder), rounds=ROUNDS)
    about = {"layers": LAYERS, "prompts": PROMPTS, "group": GROUP, "tokens": TOKENS, "steps": STEPS - 1}
    write_json(OUT, {"about": about | {"threads": os.cpu_count(), "torch": torch.__version__}, "results": found})


if __name__ == "__main__":
    main()
