"""The parameters of a loss: their names and defaults from its signature, their legal ranges, errors that name the
remedy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.types import RecipeError, nearest


@dataclass(frozen=True)
class Range:
    """The legal values of a parameter: `low` <= value <= `high`, an end left out where it is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def check(self, path: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecipeError(path, f"{value!r} is not a number; give one in {self}")
        too_low = value <= self.low if self.open_low else value < self.low
        too_high = value >= self.high if self.open_high else value > self.high
        if too_low or too_high:
            raise RecipeError(path, f"{value} is outside {self}")
        return float(value)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def defaults_of(fn: Callable[..., Any]) -> dict[str, float]:
    """The keyword-only numbers of a loss with their defaults, read from its own signature."""
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not None}


def checked(
    name: str, defaults: Mapping[str, float], ranges: Mapping[str, Range], params: Mapping[str, object], path: str
) -> dict[str, float]:
    """`params` over the defaults, each in its range.

    Raises:
        RecipeError: a parameter that `name` does not have, or a value outside its range; `path` says where it stood.
    """
    values = dict(defaults)
    for key, value in params.items():
        at = f"{path}.{key}".lstrip(".")
        if key not in values:
            raise RecipeError(
                at,
                f"{name} has no such"
                f" parameter{nearest(key, values) if values else ': it has none but weight and only'}",
            )
        values[key] = ranges[key].check(at, value)
    return values
