"""Ask the teacher and the student of a run the same questions, side by side."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import ValidationError
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from limbeck.commands import console
from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.models.context import PromptContext
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.load import load_model
from limbeck.models.model import Model
from limbeck.models.placement import Devices
from limbeck.runs.memory import teacher_precision
from limbeck.runs.resolve import context_of, resolve
from limbeck.storage.metrics_log import read_json
from limbeck.storage.rounds import kept_round
from limbeck.types import Sampling, UserError


def converse(folder: Path, max_tokens: int, temperature: float, device: str = "auto") -> None:
    """Answer lines from standard input until an empty one. Each line is a conversation of its own. The teacher has the
    precision and the context of its run, and both the devices of its machine, unless `device` names another.

    Raises:
        UserError: the folder has no finished student.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    if not (folder / "student").is_dir() or not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} has no finished student: run `limbeck run RECIPE --out {folder}` first")
    home = kept_round(folder)
    recipe = load_recipe(home / "recipe.yaml")
    devices = _devices(home, device)
    speakers = {}
    if recipe.teacher.model is None:
        console.err.print("the teacher is behind a server and is not asked")
    else:
        template = getattr(recipe.teacher, "template", None)
        teacher = load_model(recipe.teacher.model, teacher_precision(recipe), devices.teacher, template)
        speakers["teacher"] = teacher.with_context(_shown(recipe))
    speakers["student"] = load_model(str(folder / "student"), placement=devices.student)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    while True:
        line = _ask()
        if not line:
            return
        boxes = [
            Panel(Text(answer(model, line, sampling)), title=name, width=max(30, console.out.width // 2 - 1))
            for name, model in speakers.items()
        ]
        console.out.print(Columns(boxes))


def answer(model: Model, question: str, sampling: Sampling, seed: int = 0) -> str:
    """The model's answer to one question, as text."""
    ids = model.prompt_ids(({"role": "user", "content": question},))
    ((_, sampled),) = generate(
        model.net, [GenerationJob(ids, sampling, seed)], model.eos_ids, vocab_size=model.vocab_size
    )
    return model.decode(sampled).strip()


def _shown(recipe: Recipe) -> PromptContext | None:
    """What the teacher is shown beside a question, as in the evaluation: what it was shown when it taught."""
    try:
        method = resolve(recipe)
    except UserError as error:
        console.err.print(f"the teacher is asked without what a step under elicit shows it: {error}", markup=False)
        return context_of(recipe, ())
    if method.step_prompt is not None and method.step_prompt.varies:
        console.err.print(
            "the teacher is asked without what its step under elicit showed it, which was another thing for every"
            " prompt"
        )
    return method.measured_context


def _devices(home: Path, device: str) -> Devices:
    """Those of the run's machine, where this is such a machine; else what is here, or what is asked for."""
    if device != "auto":
        return Devices(Machine(device=device))
    settings = (read_json(home / "machine.json") or {}).get("settings", {})
    try:
        return Devices(Machine.model_validate(settings))
    except (ValidationError, UserError):
        console.err.print("this is not the machine of the run: models are where there is room here")
        return Devices(Machine())


def _ask() -> str:
    if sys.stdin.isatty():
        console.out.print("[bold]you[/bold] ", end="")
    return sys.stdin.readline().strip()
