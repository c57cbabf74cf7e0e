"""The parameters of a loss: names and defaults, legal values, and errors that name the remedy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.objectives.schedule import Schedule, make_schedule
from limbeck.types import RecipeError, nearest


@dataclass(frozen=True)
class Range:
    """The legal values of a parameter: `low` <= value <= `high`; an open end is not legal itself."""

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


def check_numbers(
    name: str, defaults: Mapping[str, float], ranges: Mapping[str, Range], *, params: Mapping[str, object], path: str
) -> dict[str, float]:
    """`params` over the defaults, each in its range.

    Raises:
        RecipeError: a parameter that `name` does not have, or a value outside its range; `path` is its place.
    """
    values = dict(defaults)
    for key, value in params.items():
        at = f"{path}.{key}".lstrip(".")
        if key not in values:
            hint = nearest(key, values) if values else ": it has none but weight and only"
            raise RecipeError(at, f"{name} has no such parameter{hint}")
        values[key] = ranges[key].check(at, value)
    return values


def make_schedules(
    name: str, defaults: Mapping[str, float], ranges: Mapping[str, Range], *, params: Mapping[str, Any], path: str
) -> dict[str, Schedule]:
    """Every parameter as a schedule: constant where it is a number or left out. Raises as `check_numbers` does."""
    constant = {key: value for key, value in params.items() if key not in defaults or not isinstance(value, Mapping)}
    values = check_numbers(name, defaults, ranges, params=constant, path=path)
    schedules = {key: Schedule(value, value) for key, value in values.items()}
    for key in params.keys() - constant.keys():
        schedules[key] = make_schedule(params[key], f"{path}.{key}".lstrip("."), ranges[key].check)
    return schedules


class Setting(Protocol):
    """A parameter that stays as it is during the training."""

    @property
    def default(self) -> Any: ...

    @property
    def legal(self) -> str:
        """Its legal values in words, or nothing."""

    def check(self, path: str, value: object, /) -> Any:
        """The value, or a RecipeError that says at `path` what is legal."""


@dataclass(frozen=True)
class Number:
    """A number in a range; a whole one where its default is."""

    default: float
    range: Range

    @property
    def legal(self) -> str:
        return str(self.range)

    def check(self, path: str, value: object) -> float:
        whole = isinstance(self.default, int)
        if whole and type(value) is not int:
            raise RecipeError(path, f"{value!r} is not a whole number")
        number = self.range.check(path, value)
        return int(number) if whole else number


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    default: str
    words: tuple[str, ...]

    @property
    def legal(self) -> str:
        return " or ".join(self.words)

    def check(self, path: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise RecipeError(path, f"{value!r} is not possible here{nearest(str(value), self.words)}")
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    default: bool
    legal: str = ""

    def check(self, path: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise RecipeError(path, f"{value!r} is not true or false")
        return value


@dataclass(frozen=True)
class Words:
    """Some of a few words, all of them by default."""

    words: tuple[str, ...]
    legal: str = ""

    @property
    def default(self) -> list[str]:
        return list(self.words)

    def check(self, path: str, value: object) -> list[str]:
        if not isinstance(value, list) or not value or any(word not in self.words for word in value):
            raise RecipeError(path, f"{value!r} is not a list of {', '.join(self.words)}")
        return value


@dataclass(frozen=True)
class Anything:
    """A value that is checked elsewhere."""

    default: Any
    legal: str = ""

    def check(self, path: str, value: object) -> Any:  # noqa: ARG002 (the signature of all settings)
        return value


def check_settings(
    name: str, settings: Mapping[str, Setting], *, params: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """`params` over the defaults, each checked. RecipeError for an unknown one or an illegal value."""
    values = {key: setting.default for key, setting in settings.items()}
    for key, value in params.items():
        at = f"{path}.{key}".lstrip(".")
        if key not in settings:
            raise RecipeError(at, f"{name} has no such parameter{nearest(key, settings)}")
        values[key] = settings[key].check(at, value)
    return values
