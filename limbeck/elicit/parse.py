"""What a model's answer is read as: its text, one of some labels, JSON that conforms to a schema, or the groups of a
pattern."""

from __future__ import annotations

import json
from typing import Annotated, Any

import regex
from pydantic import BeforeValidator, Field, field_validator, model_validator

from limbeck.config.section import Section
from limbeck.elicit.checks import PATTERN_SECONDS, check_pattern
from limbeck.elicit.json_in import NotJSONError, plain, read_json
from limbeck.elicit.labels import decided
from limbeck.elicit.schema import check_schema, in_order, is_valid, value_in
from limbeck.elicit.verify import MAX_CHARS
from limbeck.types import AnswerForm

FORMS = "text, {label: [A, B]}, {json: SCHEMA} or {pattern: 'Grade: (\\d)'}"


class UnparsedError(ValueError):
    """An answer that can't be read as what it should be; says why in a few words."""


def _as_texts(labels: Any) -> Any:
    if not isinstance(labels, list | tuple):
        return labels
    for label in labels:
        if isinstance(label, bool):
            raise ValueError(f"YAML reads an unquoted {'yes or true' if label else 'no or false'} as {label}; quote it")
    return tuple(str(label) if isinstance(label, int | float) else label for label in labels)


class Parsing(Section):
    """How an answer is read: exactly one of the forms below."""

    text: bool = False
    label: Annotated[tuple[str, ...], BeforeValidator(_as_texts), Field(min_length=2)] | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    pattern: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        if isinstance(data, str) and data != "text":
            raise ValueError(f"{data!r} is no way to read an answer; give {FORMS}")
        return {"text": True} if data == "text" else data

    @field_validator("label")
    @classmethod
    def _tell_apart(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        folded = [" ".join(regex.split(r"[\s_\-]+", plain(label))) for label in labels or ()]
        for place, label in enumerate(folded):
            if not label or label in folded[:place]:
                raise ValueError(
                    f"the label {label!r} is empty, or stands twice (case, '-' and '_' make no difference)"
                )
        return labels

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            check_schema({"schema": schema}, "in it")
        return schema

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            check_pattern({"pattern": pattern}, "in it")
            if not regex.compile(pattern).groups:
                raise ValueError(f"{pattern!r} has no group; put what is wanted in parentheses, such as 'Grade: (\\d)'")
        return pattern

    @model_validator(mode="after")
    def _one_form(self) -> Parsing:
        if self.text + sum(form is not None for form in (self.label, self.json_schema, self.pattern)) != 1:
            raise ValueError(f"give exactly one of {FORMS}")
        return self

    @property
    def form(self) -> AnswerForm | None:
        """The form of an answer that is nothing else than what is read; None for text."""
        if self.json_schema is not None:
            return AnswerForm(schema=json.dumps(self.json_schema, ensure_ascii=False))
        return None if self.text else AnswerForm(labels=self.label, pattern=self.pattern)

    def keeps_to_form(self, said: str) -> bool:
        """Whether an answer without its thinking is of that form."""
        if self.json_schema is not None:
            try:
                return len(said) <= MAX_CHARS and is_valid(self.json_schema, read_json(said))
            except NotJSONError:
                return False
        if self.label is not None:
            return said.strip() in self.label
        try:
            return regex.fullmatch(str(self.pattern), said.strip(), timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            return False

    def read(self, said: str) -> Any:
        """What an answer without its thinking says: a text, the values of a pattern's named groups, or any JSON.

        Raises:
            UnparsedError: it can't be read so.
        """
        if self.text:
            return said.strip()
        if len(said) > MAX_CHARS:
            raise UnparsedError("too long to be read")
        if self.label is not None:
            return _label(said, self.label)
        return _json(said, self.json_schema) if self.json_schema is not None else _groups(said, str(self.pattern))

    def written(self, value: Any) -> str:
        """What was read, as the text that a student is taught."""
        if isinstance(value, str) and self.json_schema is None:
            return value
        return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _label(said: str, labels: tuple[str, ...]) -> str:
    """The one label that the answer claims: in its last box, or else after its last "the answer is", or else,
    where it says neither, anywhere."""
    alone = [label for label in labels if plain(label) == plain(said.strip().rstrip("."))]
    if alone:
        return alone[0]
    found = set(decided(said, labels))
    if len(found) != 1:
        raise UnparsedError("several labels" if found else "no label")
    return found.pop()


def _json(said: str, schema: dict[str, Any]) -> Any:
    try:
        value = value_in(said)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (NotJSONError, ValueError, RecursionError) as error:  # ValueError: half of a character, or 1e999
        raise UnparsedError("no JSON") from error
    if not is_valid(schema, value):
        raise UnparsedError("JSON that the schema refuses")
    return in_order(schema, value)


def _groups(said: str, pattern: str) -> Any:
    """The named groups of the first match, or else its first group."""
    try:
        match = regex.search(pattern, said, timeout=PATTERN_SECONDS)
    except TimeoutError as error:
        raise UnparsedError("the pattern takes too long") from error
    if match is None:
        raise UnparsedError("the pattern is not in it")
    named = {name: (text or "").strip() for name, text in match.groupdict().items()}
    first = (match[1] or "").strip()
    if not (any(named.values()) if named else first):
        raise UnparsedError("the pattern's group is empty")
    return named or first
