"""Prices that a user states for a run, kept in its `prices.json`; they change what is shown, not what is measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.storage.files import write_json
from limbeck.types import UserError

FILE = "prices.json"
HINT = "`limbeck report RUN --price-teacher-in 2.50 --price-teacher-out 10 --price-hour 0.50`"


@dataclass(frozen=True)
class Prices:
    """In any one currency.

    Args:
        teacher_in, teacher_out: of a million tokens that the teacher's server reads and writes.
        hour: of an hour of the machine that trains and runs models.
    """

    teacher_in: float | None = None
    teacher_out: float | None = None
    hour: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"the price {name} must be a number of 0 or more; got {value!r}")

    @property
    def of_tokens(self) -> tuple[float, float] | None:
        """(read, written), where the teacher's tokens have a price; one that is not stated is 0."""
        if self.teacher_in is None and self.teacher_out is None:
            return None
        return self.teacher_in or 0.0, self.teacher_out or 0.0


def stated_prices(folder: Path) -> Prices:
    """The prices of `prices.json`; none are stated without the file.

    Raises:
        UserError: a damaged file.
    """
    file = folder / FILE
    if not file.exists():
        return Prices()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Prices(**data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: remove it and state the prices again with {HINT}") from error


def prices_of(folder: Path, recipe: dict[str, Any]) -> Prices:
    """The stated prices; where none is stated for the teacher's tokens, that of the recipe (`teacher.server.price`)."""
    stated = stated_prices(folder)
    teacher = recipe.get("teacher")
    server = (teacher.get("server") or {}) if isinstance(teacher, dict) else {}
    price = server.get("price") if isinstance(server, dict) else None
    if stated.of_tokens is not None or not isinstance(price, dict):
        return stated
    return replace(stated, teacher_in=float(price.get("input", 0.0)), teacher_out=float(price.get("output", 0.0)))


def state_prices(folder: Path, given: Prices) -> None:
    """Keep the given prices; those that are left out stay as they were stated before.

    Raises:
        UserError: a price that is none, or a folder that holds no run.
    """
    changes = {name: value for name, value in asdict(given).items() if value is not None}
    if not changes:
        return
    if (folder / "comparison.json").exists() or not (folder / "evaluation" / "summary.json").exists():
        raise UserError(f"{folder} is no measured run, and prices are stated for one: name the folder of a run")
    write_json(folder / FILE, asdict(replace(stated_prices(folder), **changes)))
