"""A step of GRPO beside what it can't do without: writing its answers, and one training pass over the same tokens.

    .venv/bin/python benchmarks/rewards.py            # some minutes on two cores; writes docs/evidence/rewards.json

One process, in turn, round after round, so that other work on the machine slows all alike: a step of the recipe grpo
(8 prompts, 8 answers of at most 64 tokens, SmolLM2 with 24 layers), as the training makes it; the writing of as many
answers alone; and forward and backward of cross-entropy over the very rows of that step, with the optimiser's update.
The penalty's frozen reference is left out, as a pass of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck import load_recipe
from limbeck.data.batches import StepBatch, cut
from limbeck.models.folder import save_model
from limbeck.models.generate import Decoding, GenerationJob, write
from limbeck.models.load import load_model, model_folder
from limbeck.models.prune import drop_layers
from limbeck.objectives.term import make_term
from limbeck.progress import Silent
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.storage.files import write_json
from limbeck.training import loop
from limbeck.training.job import Objective, TrainingJob
from limbeck.types import Sampling

OUT = Path(__file__).parent.parent / "docs" / "evidence" / "rewards.json"
MODEL = "smollm2-135m-instruct"
LAYERS, TOKENS, ROUNDS = 24, 64, 5


class Parts:
    """A training of grpo whose steps, writings and passes are timed one by one."""

    def __init__(self, student: Path, folder: Path) -> None:
        settings = [f"teacher={student}", f"student={{start: {{pretrained: {student}}}}}", "loss=[ppo_clip]"]
        settings += [f"writer.0.max_tokens={TOKENS}", f"train.steps={ROUNDS + 1}"]
        run = Run(resolve(load_recipe("grpo", settings)), folder, Silent())
        self.model = run.models.student_to_train()
        self.job = run.job("student", self.model)
        self.plain = replace(self.job, objective=Objective(self.job.net, (make_term("cross_entropy", {}),)))
        self.made = 0

    def step(self) -> float:
        """Seconds of the next step, as the training makes it."""
        return self._timed(self.job)

    def writing(self) -> float:
        """Seconds of the answers of the last step, written again."""
        sampling = Sampling(1.0, 1.0, TOKENS)
        slots = self.job.text.asking.slots  # type: ignore[attr-defined]
        answers = self.job.text.memory.answers  # type: ignore[attr-defined]
        jobs = [GenerationJob(slots[a.slot].prompt_ids, sampling, int(a.name[:15], 16)) for a in answers]
        decoding = Decoding(batch_rows=len(jobs), record=True)
        net = self.job.net.eval()
        began = time.perf_counter()
        assert len(list(write(net, jobs, self.model.eos_ids, self.model.vocab_size, decoding=decoding))) == len(jobs)
        return time.perf_counter() - began

    def training(self) -> float:
        """Seconds of one update by cross-entropy on the rows of the last step."""
        rows = self.job.text._rows[1]  # type: ignore[attr-defined]
        source = Again(cut(rows, "benchmark"))
        return self._timed(replace(self.plain, source=source))

    def _timed(self, job: TrainingJob) -> float:
        room = loop.Room.begin(job.folder, job.net, job.machine.micro_tokens)
        parameters = job.objective.parameters()
        optimizer = loop._optimizer(job, parameters)
        job.net.train()
        began = time.perf_counter()
        loop._step(job, self.made, job.steps, room, parameters=parameters, optimizer=optimizer)
        self.made += job.source is self.job.source
        return time.perf_counter() - began


class Again:
    """The same rows at every step."""

    def __init__(self, micro_batches: list[list[Any]]) -> None:
        self.micro_batches = micro_batches

    def step_batch(self, *_: Any) -> StepBatch:
        return StepBatch(self.micro_batches)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, _: Any) -> None:
        pass


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as work:
        student = Path(work) / "student"
        student.mkdir()
        whole = load_model(str(model_folder(MODEL)))
        save_model(drop_layers(whole.net, tuple(range(LAYERS))), whole.tokenizer, student)
        parts = Parts(student, Path(work) / "run")
        parts.step()  # the first is left out
        times: dict[str, list[float]] = {"step": [], "writing": [], "training": []}
        for _ in range(ROUNDS):
            for name, seconds in times.items():
                seconds.append(getattr(parts, name)())
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    record = {
        "prompts": 8,
        "group": 8,
        "tokens": TOKENS,
        "layers": LAYERS,
        "threads": torch.get_num_threads(),
        "seconds": {name: [round(value, 3) for value in seconds] for name, seconds in times.items()},
        "over_its_parts": round(median["step"] / (median["writing"] + median["training"]), 3),
    }
    write_json(OUT, record)
    print(record)


if __name__ == "__main__":
    main()
