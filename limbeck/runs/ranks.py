"""One run on several ranks: rank 0 runs the recipe, and calls the others to its trainings.

Only rank 0 elicits, writes files, evaluates and reports. The others wait for a call, read the run folder (the recipe,
the text, the start, the checkpoints), and share each step's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.config import ranks
from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.config.teacher import LocalTeacher, ServedTeacher
from limbeck.models.teacher_interface import TEACHER_EVIDENCE
from limbeck.progress import Reporter, Silent
from limbeck.runs import pipeline, rounds
from limbeck.runs.fit import fitted
from limbeck.runs.opening import take_sizes
from limbeck.runs.resolve import resolve
from limbeck.training import distributed, loop, sharded
from limbeck.training.company import Company
from limbeck.types import RecipeError


def run(
    recipe: Recipe, out: Path | None, reporter: Reporter, stop: Callable[[], bool], stages: Sequence[str]
) -> Path | None:
    """Run a recipe on all ranks that torch's launcher started, or on this process alone. Returns the run folder; None
    on ranks that don't lead.

    Raises:
        RecipeError: the recipe can't run on several ranks.
        LostRankError: another rank has died, failed, or not answered for `machine.timeout`.
        UserError: what `rounds.run` raises.
    """
    if ranks.world_size() == 1:
        if recipe.machine.shard != "none":
            reporter.note("machine.shard: there is one rank, which holds all weights; --ranks N starts more")
        return rounds.run(recipe, out, reporter, stop, stages=stages)
    check(recipe)
    with distributed.joined(recipe.machine) as company:
        if company.rank > 0:
            follow(company, recipe.machine, stop)
            return None
        folder = rounds.run(recipe, out, reporter, stop, stages=stages)
        company.tell({})
        return folder


def follow(company: Company, machine: Machine, stop: Callable[[], bool]) -> None:
    """Take part in every training that rank 0 calls to, until it says that there are no more."""
    while turn := company.hear():
        take_part(turn, machine, stop)


def take_part(turn: dict[str, Any], machine: Machine, stop: Callable[[], bool]) -> None:
    """Share a training of a folder whose run rank 0 runs. Its recipe there says all but where it runs."""
    folder = Path(turn["folder"])
    recipe = load_recipe(folder / "recipe.yaml").model_copy(update={"machine": machine})
    take_sizes(machine)
    store = None if turn["store"] is None else Path(turn["store"])
    run = pipeline.Run(fitted(resolve(recipe)), folder, Silent(), store=store)
    job = run.job(turn["train"], run.models.student_to_train())
    distributed.wait()
    if loop.train(job, stop=stop):
        sharded.plain(job.net, lambda: job.net)


def check(recipe: Recipe) -> None:
    """Refuse what several ranks can't do, before anything is spent.

    Raises:
        RecipeError: with the place in the recipe and what to write instead.
    """
    served = isinstance(recipe.teacher, ServedTeacher) and recipe.teacher.cache is None
    if served and any(term.loss.spans_responses and term.reads & TEACHER_EVIDENCE for term in resolve(recipe).terms):
        raise RecipeError(
            "teacher.server",
            "with several ranks each would ask the server about every answer: run it on one, or choose a loss that is"
            " no policy gradient on the teacher",
        )
    if recipe.machine.shard == "full":
        for path, what in _undivided(recipe):
            raise RecipeError(
                path, f"{what} under machine.shard: full; leave that out: each rank holds all weights then"
            )


def _undivided(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What needs whole weights: (place, words)."""
    if recipe.student_writer is not None:
        yield "writer", "the student can't write while it trains"
    if recipe.student.scores:
        yield "student.head", "reward models are not trained"
    if recipe.student.lora is not None and recipe.student.lora.base in ("int8", "int4"):
        yield "student.lora.base", f"{recipe.student.lora.base} weights can't be divided"
    terms = resolve(recipe).terms
    for term in terms:
        if term.loss.binds:
            yield f"loss.{term.label}", "losses with parameters of their own or on inner layers can't be trained"
    reads = {evidence for term in terms for evidence in term.reads} & TEACHER_EVIDENCE
    teacher = recipe.teacher
    if not reads or teacher.cache is not None or (isinstance(teacher, ServedTeacher) and teacher.gives_states):
        return
    if not isinstance(teacher, LocalTeacher):
        yield "teacher", "only one teacher with weights of its own in process, hidden states or a cache can be asked"
    elif teacher.quantise is not None:
        yield "teacher.quantise", f"{teacher.quantise} weights can't be divided"
