"""The command line of `limbeck why`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.commands import console, printing
from limbeck.commands.options import ScaleOption, SetOption
from limbeck.storage.files import read_from, user_path
from limbeck.types import UserError, printable


def why(
    what: Annotated[
        str, typer.Argument(help="A run folder, or (the beginning of) a request's key.", metavar="KEY|RUN")
    ],
    set_: SetOption,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run that has the key. Default: all in runs/.", metavar="RUN")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="What to hold the run against. Default: its own recipe.", metavar="RECIPE"),
    ] = None,
    scale: ScaleOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say why an answer is not found or a run folder refused: which field differs from what is stored. Asks for no
    text."""
    from limbeck.config.recipe import load_recipe
    from limbeck.runs.why import KEY, why_key, why_run

    folder = user_path(what)
    if folder.is_dir():
        source = recipe or (str(folder / "recipe.yaml") if set_ or scale is not None else None)
        now = None if source is None else load_recipe(source, set_, scale=scale)
        with read_from(folder):
            result = why_run(folder, now)
    elif KEY.fullmatch(what):
        result = why_key(what, [run] if run is not None else sorted(Path("runs").glob("*")))
    else:
        raise UserError(f"{what!r} is neither a run folder nor the key of a request (six or more of its hex digits)")
    if json_:
        printing.print_result(result, json_)
        return
    for part in (result, *result.get("parts", ())):
        if part is not result:
            console.out.print(f"{part['run']}:", markup=False, soft_wrap=True)
        for line in _lines(part):
            console.out.print(line, markup=False, soft_wrap=True)


def _lines(result: dict[str, Any]) -> list[str]:
    """What was found, in words."""
    if "key" in result:
        nearest = result.get("nearest")
        lines = [f"request {result['key']} in {result['run']}: {result['finish']}"]
        lines += [f"  {name}: {printable(str(value))}" for name, value in result["asked"].items()]
        return (
            lines
            + ([f"the most similar request, {nearest['key'][:16]}, differs in:"] if nearest else [])
            + ([_change(field) for field in nearest["differs"]] if nearest else [])
        )
    lines = [f"{_change(field)}: {field['effect']}" for field in result["recipe"]]
    for field in result.get("inputs", ()):
        lines.append(f"{_change(field)}: {'the folder is refused' if field['refused'] else 'measured anew'}")
    if not lines:
        lines.append("recipe and inputs are those of the folder")
    requests = result.get("requests")
    if requests is not None:
        lines.append(_answers(requests))
        for name, reason in requests["because_of"].items():
            lines.append(f"  {reason['requests']:,} by {name}, such as {reason['example'][:16]}")
            lines += [f"  {_change(field)}" for field in reason["differs"]]
    for file, record in result.get("not_finite", {}).items():
        guilty = ", ".join(record["guilty"]) or "none alone"
        lines.append(f"{file}: step {record['step']} was not finite (seed {record['seed']}); guilty samples: {guilty}")
    if "not_looked_at" in result:
        lines.append(f"not looked at further: {printable(result['not_looked_at'])}")
    return lines


def _answers(requests: dict[str, Any]) -> str:
    """How many answers are there, and in which step the first is missing."""
    step, missing = requests.get("step"), requests["would_be_asked"]
    if missing is None:
        return f"answers: none are stored; the first step, {step}, would ask for its own"
    line = f"answers: {requests['answered']:,} are stored, {missing:,} would be asked for"
    if step is None:
        return line
    line += f" by step {step}"
    line += f", which would compute {requests['unscored']:,} likelihoods" if requests["unscored"] else ""
    return f"{line}; what the steps after it ask follows from these"


def _change(field: dict[str, Any]) -> str:
    return f"  {field['field']}: {printable(str(field['then']))} -> {printable(str(field['now']))}"
