"""Train two steps of a tiny model on the pretend GPU, and print where the host waited in the second one."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from limbeck.config.recipe import parse
from limbeck.progress import Silent
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.training import loop
from tests.conftest import make_net, make_tokenizer
from tests.devices.pretend_gpu import COUNTS, device, pretend_gpu
from tests.long.recipes_on_a_device import TEACHER, keep_what_wrappers_lack, recipe_data


def main() -> None:
    torch.set_num_threads(1)
    device()
    keep_what_wrappers_lack()
    losses = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as home:
        tiny = str(Path(home) / "tiny")
        tokenizer = make_tokenizer()
        make_net(vocab_size=len(tokenizer)).save_pretrained(tiny)
        tokenizer.save_pretrained(tiny)
        train = {"steps": 3, "tokens_per_step": 48, "lr": 1e-3}
        sections = {"loss": losses, "train": train, "writer": [TEACHER], "machine": {"micro_tokens": 64}}
        recipe = parse(recipe_data(sections, tiny, Path(home) / "run", "gpu") | {"train": train})
        with pretend_gpu():
            run = Run(resolve(recipe), Path(home) / "run", Silent())
            (Path(home) / "run" / "recipe").mkdir()
            run.folder = Path(home) / "run" / "recipe"
            run.claim()
            job = run.job("student", run.models.initial_student())
            job.prepare()
            terms = [term.at_step(0.0, {}) for term in job.terms]
            parameters = job.objective.parameters()
            optimizer = loop._optimizer(job, parameters)
            room = loop.Room.begin(job.folder, job.net, 64)
            loop._step(job, 0, 3, room, parameters=parameters, optimizer=optimizer)
            COUNTS.clear()
            loop._step(job, 1, 3, room, parameters=parameters, optimizer=optimizer)
        micro_batches = len(loop.resized(job.text.step_batch(1, 0.0, {}).micro_batches, 64))
        print(json.dumps({"terms": len(terms), "micro_batches": micro_batches, "waits": dict(COUNTS.waits)}))


if __name__ == "__main__":
    main()
