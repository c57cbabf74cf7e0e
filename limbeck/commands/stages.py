"""Run some stages of a recipe, with progress, a stop on Ctrl-C, and an optional tracker."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.commands import console
from limbeck.commands.printing import print_result
from limbeck.commands.ranks import start as start_ranks
from limbeck.commands.ranks import told_once
from limbeck.config import ranks
from limbeck.config.recipe import Recipe
from limbeck.progress import Reporter


def run_stages(
    recipe: Recipe,
    stages: tuple[str, ...],
    *,
    out: Path | None,
    as_json: bool,
    tracker: str | None = None,
    count: int | None = None,
) -> None:
    """Do what these stages still have to do, on `count` ranks if that is given, then print where the results are."""
    if count is not None and count > 1:
        start_ranks(sys.argv[1:], count)
    from limbeck.runs.ranks import run  # after the recipe: a mistake in it shows before torch is loaded

    tracker = tracker if ranks.rank() == 0 else None
    with (
        told_once(),
        console.long_work(as_json) as (reporter, stop),
        _with_tracker(reporter, recipe, out, tracker) as tracked,
    ):
        folder = run(recipe, out, tracked, stop, stages=stages)
    if folder is None:
        return
    result: dict[str, Any] = {"run": str(folder)}
    if "report" in stages:
        from limbeck.report.page import read_summary, verdict_of

        summary = read_summary(folder)
        result |= {"verdict": verdict_of(folder, summary), "report": str(folder / "report.html")}
    print_result(result, as_json)


@contextlib.contextmanager
def _with_tracker(reporter: Reporter, recipe: Recipe, out: Path | None, tracker: str | None) -> Iterator[Reporter]:
    """Yield the reporter, wrapped so that a tracker is kept up to date if one is named."""
    if tracker is None:
        yield reporter
        return
    from limbeck.commands.track import TrackingReporter
    from limbeck.runs.claim import run_folder

    tracking = TrackingReporter(reporter, run_folder(recipe, out), tracker)
    try:
        yield tracking
    finally:
        tracking.close()
