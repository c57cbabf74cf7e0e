"""One run on several ranks: rank 0 runs the recipe, and calls the others to its trainings and its evaluation.

Only rank 0 elicits, writes files and reports. The others wait for a call, read the run folder (the recipe, the text,
the start, the checkpoints), and share each step's work, or the items that are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.config import ranks
from limbeck.config.machine import Machine
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.progress import Reporter, Silent
from limbeck.runs import measuring, rounds
from limbeck.runs.fit import fitted
from limbeck.runs.opening import take_sizes
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.runs.sharing import check
from limbeck.training import distributed, loop, sharded
from limbeck.training.company import Company


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
    if "train" in stages:
        check(recipe)
    with distributed.joined(recipe.machine) as company:
        if company.rank > 0:
            follow(company, recipe.machine, stop)
            return None
        folder = rounds.run(recipe, out, reporter, stop, stages=stages)
        company.tell({})
        return folder


def follow(company: Company, machine: Machine, stop: Callable[[], bool]) -> None:
    """Take part in all that rank 0 calls to, until it says that there is no more."""
    while turn := company.hear():
        take_part(turn, machine, stop)


def take_part(turn: dict[str, Any], machine: Machine, stop: Callable[[], bool]) -> None:
    """Share a training or the evaluation of a folder whose run rank 0 runs. Its recipe there says all but where it
    runs."""
    folder = Path(turn["folder"])
    recipe = load_recipe(folder / "recipe.yaml").model_copy(update={"machine": machine})
    take_sizes(machine)
    store = None if turn["store"] is None else Path(turn["store"])
    run = Run(fitted(resolve(recipe)), folder, Silent(), store=store)
    try:
        if "evaluate" in turn:
            measuring.take_part(run)
            return
        job = run.job(turn["train"], run.models.student_to_train())
        distributed.wait()
        if loop.train(job, stop=stop):
            sharded.plain(job.net, lambda: job.net)
    finally:
        run.models.release()  # the next turn loads what it needs
