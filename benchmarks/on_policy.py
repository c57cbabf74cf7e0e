"""On-policy training beside TRL: the same teacher, student, prompts and lengths; writes docs/evidence/on-policy.json.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/on_policy.py            # every system, twice, in turn: about half an hour on two cores

Every system runs in a process of its own. The first step is left out. `trained` are response tokens that a loss was
taken on, `real` all tokens that are not padding; memory is the process's peak. Sampling at temperature 1 from the whole
vocabulary, reverse KL over the whole vocabulary, AdamW, fp32, no gradient checkpointing.
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
from limbeck.models.load import load_model, model_folder
from limbeck.models.prune import drop_layers
from limbeck.storage.files import read_jsonl, write_json
from limbeck.training.memory import peak_mib

OUT = Path(__file__).parent.parent / "docs" / "evidence" / "on-policy.json"
TEACHER = "smollm2-135m-instruct"
LAYERS = 24
ROWS = 8
LENGTH = 80
STEPS = 6
ROUNDS = 2
TOKENS_PER_STEP = 480  # about what ROWS answers of at most LENGTH tokens come to
OURS = {
    "limbeck": {},
    "limbeck, text for 4 steps at once": {"ahead": 4},
    "limbeck, for 4 steps at once in bfloat16": {"ahead": 4, "dtype": "bfloat16"},
    "limbeck, half of the text read again": {"replay": {"size": 8, "fresh": 0.5}},
    "limbeck, half read again, for 4 steps at once in bfloat16": {
        "ahead": 4,
        "dtype": "bfloat16",
        "replay": {"size": 32, "fresh": 0.5},
    },
}
THEIRS = ("trl GKDTrainer", "trl DistillationTrainer")


def measure(name: str, student: Path, work: Path) -> dict[str, float]:
    """One system's steps in this process: tokens a second and peak memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    steps = (ours if name in OURS else theirs)(name, student, work)[1:]
    seconds = sum(step["seconds"] for step in steps)
    found = {key: sum(step[key] for step in steps) / seconds for key in ("trained", "real")}
    peak = peak_mib() if name in OURS else None
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    writing = sum(step.get("writing", 0.0) for step in steps) / seconds
    return found | {"tokens": sum(step["trained"] for step in steps), "writing": writing, "peak_mib": round(peak)}


def ours(name: str, student: Path, work: Path) -> list[dict[str, float]]:
    settings = [
        f"student={{start: {{pretrained: {student}}}}}",
        f"train.steps={STEPS}",
        f"train.tokens_per_step={TOKENS_PER_STEP}",
        f"writer.0.max_tokens={LENGTH}",
        "loss=[reverse_kl]",
        f"rollout={json.dumps(OURS[name])}",
        "evaluate.controls=[]",
    ]
    folder = run(load_recipe("on-policy-distillation", settings), work / "run", stages=("train",)).folder
    return [
        {
            "seconds": r["seconds"],
            "trained": r["response_tokens"],
            "real": r["tokens"] - r["padding"],
            "writing": r["rollout"]["seconds"],
        }
        for r in read_jsonl(folder / "metrics.jsonl")
    ]


def counting(base: type, steps: list[dict[str, float]], gkd: bool) -> Any:
    """A trainer of theirs that writes down how many tokens each step had and trained."""

    class Counting(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:  # their signature
            if gkd:
                trained = (inputs["labels"] != -100).sum()
                real = inputs["attention_mask"].sum()
            else:
                trained = inputs["completion_mask"].sum()
                real = inputs["prompt_mask"].sum() + trained
            steps.append({"trained": int(trained), "real": int(real)})
            return super().compute_loss(model, inputs, *rest, **named)

    return Counting


def theirs(name: str, student: Path, work: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model = load_model(str(student))
    teacher = load_model(TEACHER)
    prompts = [prompt.text for prompt in load_prompts("builtin/everyday")[: ROWS * STEPS]]
    common: dict[str, Any] = {
        "output_dir": str(work / "trl"),
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": 5e-5,
        "beta": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": STEPS,
        "temperature": 1.0,
    }
    gkd = name == "trl GKDTrainer"
    steps: list[dict[str, float]] = []
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:  # their signature
            ends.append(time.perf_counter())

    if gkd:
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "."}]} for text in prompts
        ]
        settings = GKDConfig(**common, lmbda=1.0, max_new_tokens=LENGTH, max_length=512)
        made = counting(GKDTrainer, steps, gkd)
    else:
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompts]
        settings = DistillationConfig(**common, max_completion_length=LENGTH)
        made = counting(DistillationTrainer, steps, gkd)
    trainer = made(
        model.net, teacher.net, settings, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer
    )
    trainer.add_callback(Clock())
    began = time.perf_counter()
    trainer.train()
    for number, end in enumerate(ends):
        steps[number]["seconds"] = end - (ends[number - 1] if number else began)
    return steps


def main() -> None:
    if len(sys.argv) > 1:
        name, student, work = sys.argv[1:]
        print(json.dumps(measure(name, Path(student), Path(work))))
        return
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "student"
        student.mkdir()
        whole = load_model(TEACHER)
        keep = [round(number * (whole.net.config.num_hidden_layers - 1) / (LAYERS - 1)) for number in range(LAYERS)]
        save_model(drop_layers(whole.net, keep), whole.tokenizer, student)
        model_folder(TEACHER)
        found = in_turns(__file__, (*OURS, *THEIRS), student, Path(folder), rounds=ROUNDS)
        about = {
            "teacher": TEACHER,
            "layers": LAYERS,
            "rows": ROWS,
            "length": LENGTH,
            "steps": STEPS - 1,
            "threads": os.cpu_count(),
        }
        write_json(OUT, {"about": about | {"torch": torch.__version__}, "results": found})


if __name__ == "__main__":
    main()
