"""The Python face of runs: run a recipe, compare recipes, load what they left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.config import ranks
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.models import load
from limbeck.progress import Reporter
from limbeck.report.page import is_comparison
from limbeck.runs import compare as comparing
from limbeck.runs import rounds
from limbeck.runs.pipeline import STAGES
from limbeck.runs.result import ComparisonResult, RunResult
from limbeck.types import UserError


def run(
    recipe: str | Path | Recipe,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    stages: Sequence[str] = STAGES,
) -> RunResult:
    """Run the stages of a recipe that are not done yet, and return its results, which also stand for its folder.

    Args:
        recipe: a recipe, a file, or the name of a built-in one.
        out: the run folder; by default runs/NAME.
        reporter: is told of stages and progress, such as `PrintingReporter()`; by default nothing is printed.
        stop: called between two steps; if it returns true, the state is saved and `StoppedError` raised.
        stages: which of elicit, train, evaluate, report; a stage also does what it needs of earlier ones.

    Raises:
        UserError: the recipe or the folder can't be used; finished work is kept.
    """
    if ranks.world_size() > 1:
        raise UserError("limbeck.run works on one process: start ranks with `torchrun -m limbeck run RECIPE`")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = None if out is None else Path(out)
    return RunResult(rounds.run(loaded, folder, reporter, stop, stages=stages))


def compare(
    recipes: Sequence[str | Path | Recipe],
    out: str | os.PathLike[str] | None = None,
    *,
    like: str | Path | Recipe | None = None,
    seeds: int | Sequence[int] = comparing.SEEDS,
    base: str | None = None,
    keep: bool = False,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ComparisonResult:
    """Train and measure recipes under the same conditions, and return the results, which also stand for the folder.

    Args:
        recipes: files, names of built-in recipes, or recipes. Only their writers and losses are their own.
        out: the folder; by default runs/compare- and a hash of the recipes.
        like: whose teacher, student, prompts, training and evaluation all take; by default the first recipe.
        seeds: how many (counted from the common recipe's own), or which. They vary the training, not the text.
        base: the method that the others are held against; by default the first recipe.
        keep: keep every trained student, not only each method's first.
        reporter: is told of stages and progress, such as `PrintingReporter()`; by default nothing is printed.
        stop: called between two steps; if it returns true, the state is saved and `StoppedError` raised.

    Raises:
        UserError: recipes that can't be compared, or a folder that holds something else.
    """
    folder = None if out is None else Path(out)
    return ComparisonResult(
        comparing.compare(recipes, folder, like=like, seeds=seeds, base=base, keep=keep, reporter=reporter, stop=stop)
    )


def load_run(folder: str | os.PathLike[str]) -> RunResult:
    """The results of a run folder; a `ComparisonResult` for the folder of a comparison.

    Raises:
        UserError: the folder holds neither.
    """
    path = Path(folder)
    if is_comparison(path):
        return ComparisonResult(path)
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder: it has no recipe.yaml; name a folder that `limbeck run` wrote")
    return RunResult(path)


def load_model(source: str | os.PathLike[str]) -> tuple[PreTrainedModel, Tokenizer]:
    """A model and its tokenizer, as `transformers` has them, on the CPU and in evaluation mode.

    Args:
        source: a run (its folder or its `RunResult`: the trained student), a folder in Hugging Face form, a `.gguf`
            file, a hub id, or a name of `limbeck models`.

    Raises:
        UserError: nothing there, a run without a trained student, or something that is no causal language model.
    """
    path = Path(source)
    name = os.fspath(source)
    if is_comparison(path):
        raise UserError(f"{path} holds several students: name one of its runs/METHOD-sSEED")
    if (path / "recipe.yaml").is_file():
        if not (path / "student").is_dir():
            raise UserError(f"{path} has no trained student yet: run `limbeck train` (or `limbeck run`) first")
        name = str(path / "student")
    model = load.load_model(name)
    return model.net, model.tokenizer
