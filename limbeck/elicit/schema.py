"""A verifier: JSON that conforms to a JSON Schema (draft 2020-12, or the draft that the schema names).

A schema is data: references are not fetched, and its patterns run for half a second at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from limbeck.elicit.checks import PATTERN_SECONDS
from limbeck.elicit.json_in import NotJSONError, fenced, read_json, values_in
from limbeck.types import UserError


def conforms(check: dict[str, Any], answer: str) -> bool:
    """Whether the answer, its first block of JSON, or the only JSON object or list in it conforms to `schema`."""
    try:
        return bool(_validator(check["schema"]).is_valid(_value(answer)))
    except (NotJSONError, RecursionError, TimeoutError):
        return False


def _value(answer: str) -> Any:
    """The JSON that an answer gives.

    Raises:
        NotJSONError: there is none, or there are several and no fence says which.
    """
    blocks = fenced(answer)
    labelled = [block for language, block in blocks if language == "json"]
    if labelled:
        return read_json(labelled[0])
    for text in (answer.lstrip("\ufeff"), *(block for _, block in blocks)):
        with suppress(NotJSONError):
            return read_json(text)
    found = values_in(answer)
    found = [value for value in found if isinstance(value, dict)] or found  # [1] beside an object may be a citation
    if len(found) != 1:
        raise NotJSONError(f"{len(found)} values")
    return found[0]


def check_schema(check: dict[str, Any], place: str) -> None:
    """Refuse what is no schema, and a schema with references to other documents."""
    schema = check["schema"]
    try:
        validator_for(schema, Draft202012Validator).check_schema(schema)
        list(_validator(schema).iter_errors({}))
    except SchemaError as error:
        raise UserError(f"{place}: this is not a JSON Schema: {error.message}") from error
    except (Unresolvable, RecursionError) as error:
        raise UserError(
            f"{place}: the schema refers to something outside of it, and nothing is fetched: {error}"
        ) from error


def _validator(schema: dict[str, Any]) -> Any:
    bounded = extend(
        validator_for(schema, Draft202012Validator),
        {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional},
    )
    return bounded(schema, registry=Registry())


def _matches(pattern: str, text: str) -> bool:
    return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], instance: Any, _: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, part in patterns.items():
            for name, value in instance.items():
                if _matches(pattern, name):
                    yield from validator.descend(value, part, path=name, schema_path=pattern)


def _additional(validator: Any, allowed: Any, instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """`additionalProperties`: those that neither a name nor a pattern covers."""
    if not isinstance(instance, dict):
        return
    named = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    for name, value in instance.items():
        if name in named or any(_matches(pattern, name) for pattern in patterns):
            continue
        if isinstance(allowed, dict):
            yield from validator.descend(value, allowed, path=name)
        elif allowed is False:
            yield ValidationError(f"{name!r} is not allowed")
