"""The command line of `limbeck report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.commands import console, printing


def report(
    run_folder: Annotated[Path, typer.Argument(help="A run or comparison folder, as runs/quickstart.", metavar="RUN")],
    json_: Annotated[bool, typer.Option("--json", help="Print systems, metrics, verdict, worth and paths.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV: one row per system and metric.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Print the results as a Markdown table instead.")] = False,
    price_teacher_in: Annotated[
        float | None, typer.Option("--price-teacher-in", help="Price of a million tokens the teacher reads.", min=0)
    ] = None,
    price_teacher_out: Annotated[
        float | None, typer.Option("--price-teacher-out", help="Price of a million tokens it writes.", min=0)
    ] = None,
    price_hour: Annotated[
        float | None, typer.Option("--price-hour", help="Price of an hour of the machine. Prices are kept.", min=0)
    ] = None,
) -> None:
    """Write report.html again from a run or comparison folder; print its results for people or programs."""
    from limbeck.report.data import as_csv, as_data, read_results
    from limbeck.report.page import is_comparison, verdict_of, write_report
    from limbeck.report.prices import Prices, state_prices
    from limbeck.report.table import compare_markdown, markdown
    from limbeck.storage.files import read_from
    from limbeck.types import UserError

    if json_ + csv + table > 1:
        raise UserError("give one of --json, --csv and --table")
    results = read_results(run_folder)
    state_prices(run_folder, Prices(price_teacher_in, price_teacher_out, price_hour))
    with read_from(run_folder):
        if csv:
            typer.echo(as_csv(run_folder).encode(errors="replace"), nl=False)
        elif table:
            text = compare_markdown(results) if is_comparison(run_folder) else markdown(results)
            console.out.print(text, markup=False, end="")
        else:
            file = write_report(run_folder)
            found: dict[str, Any] = {"report": str(file), **as_data(run_folder)} if json_ else {}
            printing.print_result(found or {"verdict": verdict_of(run_folder, results), "report": str(file)}, json_)
