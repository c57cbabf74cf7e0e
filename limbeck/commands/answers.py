"""`limbeck answers`: the teachers' answers that runs share: how many there are of whom, added, and removed."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.commands import console, printing
from limbeck.types import UserError, nearest

SERVED = re.compile(r"served:(.+)-[0-9a-f]{12}")


def answers(
    forget: Annotated[
        str | None, typer.Option("--forget", help="Remove the answers of this teacher.", metavar="TEACHER")
    ] = None,
    prune: Annotated[
        int | None, typer.Option("--prune", help="Remove answers that are older than so many days.", min=0)
    ] = None,
    add: Annotated[Path | None, typer.Option("--add", help="Add the answers of a run folder.", metavar="RUN")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the teachers' answers that runs share, so that none is paid for twice; or add or remove some."""
    from limbeck.storage.answers import FILE, answers_folder

    folder = answers_folder()
    if folder is None:
        raise UserError("no answers are shared: LIMBECK_STORE is none; unset it, or name a folder")
    result: dict[str, Any] = {}
    if add is not None:
        result["added"] = _add(add, folder)
    if not (folder / FILE).exists():
        printing.print_result(result | {"file": f"{folder / FILE} (not there yet)"}, json_)
        return
    with contextlib.closing(_open(folder / FILE)) as db:
        if forget is not None:
            result["removed"] = _forget(db, forget)
        if prune is not None:
            result["removed"] = result.get("removed", 0) + _removed(
                db, "day <= date('now', 'localtime', ?)", f"-{prune} days"
            )
        if result.get("removed"):
            with contextlib.suppress(sqlite3.OperationalError):  # a run is writing: the space is used again later
                db.execute("vacuum")
        teachers = _teachers(db)
    result |= {"file": str(folder / FILE), "bytes": (folder / FILE).stat().st_size}
    if json_:
        printing.print_result(result | {"teachers": teachers}, json_)
        return
    printing.print_result(result, json_)
    for teacher in teachers:
        console.out.print(_told(teacher), markup=False, soft_wrap=True)


def _open(file: Path) -> sqlite3.Connection:
    from limbeck.storage.answers import open_answers

    try:
        return open_answers(file)
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{file} can't be opened to read and write ({error}): see who owns it, and wait for runs"
        ) from error


def _add(run: Path, folder: Path) -> int:
    """Add a run's answers. Returns how many were new."""
    from limbeck.config.recipe import load_recipe
    from limbeck.runs.answers import add_run
    from limbeck.storage.rounds import rounds_in

    if not (run / "recipe.yaml").exists() or not (run / "store.sqlite").exists():
        raise UserError(f"{run} holds no run with answers (recipe.yaml and store.sqlite): name a run folder")
    homes = rounds_in(run).values() or [run]
    return sum(add_run(home, load_recipe(home / "recipe.yaml"), folder, run)[0] for home in homes)


def _forget(db: sqlite3.Connection, name: str) -> int:
    """Remove a teacher's answers, by its identity or the part of it that people read."""
    identities = [str(row[0]) for row in db.execute("select distinct teacher from answers")]
    found = [identity for identity in identities if name in (identity, label(identity))]
    if not found:
        raise UserError(f"no answers of {name!r} are kept{nearest(name, map(label, identities))}")
    return sum(_removed(db, "teacher = ?", identity) for identity in found)


def _removed(db: sqlite3.Connection, condition: str, value: str) -> int:
    return db.execute(f"delete from answers where {condition}", (value,)).rowcount  # noqa: S608 (our own words)


def label(identity: str) -> str:
    """The part of a teacher's identity that people read."""
    served = SERVED.fullmatch(identity)
    return served[1] if served else identity.partition("@")[0]


def _teachers(db: sqlite3.Connection) -> list[dict[str, Any]]:
    from limbeck.models.named import NAMED

    rows = db.execute(
        "select teacher, origin, count(*), coalesce(sum(read), 0), coalesce(sum(written), 0), min(day), max(day)"
        " from answers group by teacher, origin order by teacher, origin"
    )
    facts = ("teacher", "origin", "answers", "tokens_read", "tokens_written", "first", "last")
    teachers = [dict(zip(facts, row, strict=True)) for row in rows]
    for teacher in teachers:
        model = NAMED.get(label(teacher["teacher"]))
        teacher["terms"] = "see the terms of its provider" if SERVED.fullmatch(teacher["teacher"]) else "not known here"
        if model is not None:
            teacher["terms"] = f"licence {model.licence}; {model.terms}"
    return teachers


def _told(teacher: dict[str, Any]) -> str:
    days = teacher["first"] if teacher["first"] == teacher["last"] else f"{teacher['first']} to {teacher['last']}"
    tokens = f", {teacher['tokens_read']:,} tokens read, {teacher['tokens_written']:,} written"
    billed = tokens if teacher["tokens_read"] or teacher["tokens_written"] else ""
    return (
        f"{label(teacher['teacher'])} ({teacher['teacher']})\n  {teacher['answers']:,} answers{billed}, {days}\n"
        f"  from {teacher['origin']}; on using its text: {teacher['terms']}"
    )
