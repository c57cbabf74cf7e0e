"""What every section of a recipe has in common."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
            if kinds & {int, float} and not kinds & {bool, Any, str}:
                raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a value of the annotation may have; a literal stands for its values' types."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        yield from map(type, parts)
    elif get_origin(annotation) is Annotated:
        yield from _kinds(parts[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in parts:
            yield from _kinds(part)
    else:
        yield annotation
