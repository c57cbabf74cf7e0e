"""Verifiers: small programs that judge an answer. A verdict is True, False or None (no verifier, or none applies)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from limbeck.elicit import checks, equivalence, sandbox, schema
from limbeck.types import UserError, nearest

Check = dict[str, Any]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STATED = re.compile(r"####|answer is", re.IGNORECASE)
MAX_CHARS = 100_000


def verify(check: Check | None, answer: str) -> bool | None:
    """Does the answer pass? None when there is nothing to check it by."""
    return None if check is None else _CHECKS[check["type"]][1](check, answer[:MAX_CHARS])


def parse_check(check: Any, place: str) -> Check:
    """A well-formed check, or a UserError that names the place and what is missing."""
    if not isinstance(check, dict) or check.get("type") not in _CHECKS:
        kind = check.get("type") if isinstance(check, dict) else check
        raise UserError(f"{place}: no verifier {kind!r}{nearest(str(kind), _CHECKS)}")
    needed = _CHECKS[check["type"]][0]
    for name, types in needed.items():
        if not isinstance(check.get(name), types):
            raise UserError(f"{place}: a check of type {check['type']!r} needs {name!r}")
    if check["type"] in _FURTHER:
        _FURTHER[check["type"]](check, place)
    texts = {"choice": "labels", "contains": "all", "set": "items", "citations": "passages"}.get(check["type"])
    if texts and not all(isinstance(entry, str) for entry in check[texts]):
        raise UserError(f"{place}: every entry of {texts!r} must be text")
    if check["type"] == "choice" and check["answer"] not in check["labels"]:
        raise UserError(f"{place}: the answer {check['answer']!r} is not among the labels")
    if check["type"] == "number" and isinstance(check["answer"], bool):
        raise UserError(f"{place}: the answer of a number check must be a number")
    return check


def _number(check: Check, answer: str) -> bool:
    """The last number in the answer is the right one; with `strict`, the first one after the last "####" or "answer
    is"."""
    if check.get("strict"):
        *_, answer = re.split(r"####|answer is", answer, flags=re.IGNORECASE) if STATED.search(answer) else ("",)
    found = NUMBER.findall(answer)[: 1 if check.get("strict") else None]
    return bool(found) and float(found[-1].replace(",", "")) == float(check["answer"])


def _choice(check: Check, answer: str) -> bool:
    """Of the labels, exactly the right one is named."""
    named = {label for label in check["labels"] if re.search(rf"\b{re.escape(label)}\b", answer, re.IGNORECASE)}
    return named == {check["answer"]}


def _json(check: Check, answer: str) -> bool:
    """The first JSON object in the answer has the given values; text is compared without case and outer spaces."""
    start = answer.find("{")
    if start < 0:
        return False
    try:
        found, _ = json.JSONDecoder().raw_decode(answer[start:])
    except (ValueError, RecursionError):
        return False

    def plain(value: Any) -> Any:
        return value.strip().casefold() if isinstance(value, str) else value

    return all(
        name in found and type(plain(found[name])) is type(plain(value)) and plain(found[name]) == plain(value)
        for name, value in check["equals"].items()
    )


def _order(check: Check, answer: str) -> bool:
    """The items appear in this order."""
    at = 0
    for item in check["items"]:
        found = re.compile(rf"(?<!\w){re.escape(str(item))}(?!\w)", re.IGNORECASE).search(answer, at)
        if not found:
            return False
        at = found.end()
    return True


def _unit_tests(check: Check, answer: str) -> bool:
    """The program in the answer passes the tests, in the sandbox."""
    return sandbox.passes(sandbox.program_in(answer), check["tests"]).passed


def _contains(check: Check, answer: str) -> bool:
    """All given texts appear, ignoring case."""
    return all(text.casefold() in answer.casefold() for text in check["all"])


_CHECKS: dict[str, tuple[dict[str, Any], Callable[[Check, str], bool]]] = {
    "number": ({"answer": int | float}, _number),
    "choice": ({"labels": list, "answer": str}, _choice),
    "json": ({"equals": dict}, _json),
    "order": ({"items": list}, _order),
    "contains": ({"all": list}, _contains),
    "exact": ({"answer": str | list}, checks.exact),
    "set": ({"items": list}, checks.items),
    "pattern": ({"pattern": str}, checks.pattern),
    "tool_call": ({"calls": list}, checks.called),
    "citations": ({"passages": list}, checks.citations),
    "instructions": ({"rules": dict}, checks.instructions),
    "math": ({"answer": str}, equivalence.equivalent),
    "json_schema": ({"schema": dict}, schema.conforms),
    "unit_tests": ({"tests": str}, _unit_tests),
}
_FURTHER: dict[str, Callable[[Check, str], None]] = {
    "pattern": checks.check_pattern,
    "tool_call": checks.check_calls,
    "instructions": checks.check_rules,
    "math": equivalence.check_answer,
    "json_schema": schema.check_schema,
    "unit_tests": lambda check, place: sandbox.require(place),
}
