"""Verifiers: small programs that judge an answer. A verdict is True, False, or None if there is nothing to check."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.elicit import checks, equivalence, sandbox, schema
from limbeck.elicit.checks import Check
from limbeck.types import UserError, nearest

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STATED = re.compile(r"####|answer is", re.IGNORECASE)
MAX_CHARS = 100_000


def verify(check: Check | None, answer: str) -> bool | None:
    """Whether the answer passes the check; None without a check."""
    return None if check is None else VERIFIERS[check["type"]].passes(check, answer[:MAX_CHARS])


def parse_check(check: Any, place: str) -> Check:
    """The check, if it is well-formed.

    Raises:
        UserError: it is not; the message names the place and what is missing.
    """
    if not isinstance(check, dict) or check.get("type") not in VERIFIERS:
        kind = check.get("type") if isinstance(check, dict) else check
        raise UserError(f"{place}: no verifier {kind!r}{nearest(str(kind), VERIFIERS)}")
    verifier = VERIFIERS[check["type"]]
    for name, types in verifier.needs.items():
        if not isinstance(check.get(name), types):
            raise UserError(f"{place}: a check of type {check['type']!r} needs {name!r}")
    if verifier.validate is not None:
        verifier.validate(check, place)
    if verifier.texts and not all(isinstance(entry, str) for entry in check[verifier.texts]):
        raise UserError(f"{place}: every entry of {verifier.texts!r} must be text")
    return check


@dataclass(frozen=True)
class Verifier:
    """One type of check.

    Args:
        needs: the fields of the check, and their types.
        passes: (check, answer) -> whether the answer is right.
        validate: (check, place) -> None; raises UserError for a check that makes no sense.
        texts: the field that must be a list of texts.
    """

    needs: dict[str, Any]
    passes: Callable[[Check, str], bool]
    validate: Callable[[Check, str], None] | None = None
    texts: str = ""


def _number(check: Check, answer: str) -> bool:
    """Whether the last number in the answer is right; with `strict`, the first one after the last "####" or "answer
    is"."""
    if check.get("strict"):
        *_, answer = re.split(r"####|answer is", answer, flags=re.IGNORECASE) if STATED.search(answer) else ("",)
    numbers = NUMBER.findall(answer)[: 1 if check.get("strict") else None]
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(check["answer"])


def _check_number(check: Check, place: str) -> None:
    if isinstance(check["answer"], bool):
        raise UserError(f"{place}: the answer of a number check must be a number")


def _choice(check: Check, answer: str) -> bool:
    """Whether the answer names the right label and no other."""
    labels = {label for label in check["labels"] if re.search(rf"\b{re.escape(label)}\b", answer, re.IGNORECASE)}
    return labels == {check["answer"]}


def _check_choice(check: Check, place: str) -> None:
    if not all(isinstance(label, str) for label in check["labels"]):
        raise UserError(f"{place}: every entry of 'labels' must be text")
    if check["answer"] not in check["labels"]:
        raise UserError(f"{place}: the answer {check['answer']!r} is not among the labels")


def _json(check: Check, answer: str) -> bool:
    """Whether the first JSON object in the answer has these values; text is compared without case and outer
    whitespace."""
    start = answer.find("{")
    if start < 0:
        return False
    try:
        values, _ = json.JSONDecoder().raw_decode(answer[start:])
    except (ValueError, RecursionError):
        return False

    def plain(value: Any) -> Any:
        return value.strip().casefold() if isinstance(value, str) else value

    return all(
        name in values and type(plain(values[name])) is type(plain(value)) and plain(values[name]) == plain(value)
        for name, value in check["equals"].items()
    )


def _order(check: Check, answer: str) -> bool:
    """Whether the items occur in this order."""
    at = 0
    for item in check["items"]:
        match = re.compile(rf"(?<!\w){re.escape(str(item))}(?!\w)", re.IGNORECASE).search(answer, at)
        if not match:
            return False
        at = match.end()
    return True


def _unit_tests(check: Check, answer: str) -> bool:
    """Whether the program in the answer passes the tests, in the sandbox."""
    return sandbox.run_tests(sandbox.program_in(answer), check["tests"]).passed


def _contains(check: Check, answer: str) -> bool:
    """Whether all texts occur, ignoring case."""
    return all(text.casefold() in answer.casefold() for text in check["all"])


VERIFIERS = {
    "number": Verifier({"answer": int | float}, _number, _check_number),
    "choice": Verifier({"labels": list, "answer": str}, _choice, _check_choice),
    "json": Verifier({"equals": dict}, _json),
    "order": Verifier({"items": list}, _order),
    "contains": Verifier({"all": list}, _contains, texts="all"),
    "exact": Verifier({"answer": str | list}, checks.exact),
    "set": Verifier({"items": list}, checks.items, texts="items"),
    "pattern": Verifier({"pattern": str}, checks.pattern, checks.check_pattern),
    "tool_call": Verifier({"calls": list}, checks.tool_call, checks.check_calls),
    "citations": Verifier({"passages": list}, checks.citations, texts="passages"),
    "instructions": Verifier({"rules": dict}, checks.instructions, checks.check_rules),
    "math": Verifier({"answer": str}, equivalence.equivalent, equivalence.check_answer),
    "json_schema": Verifier({"schema": dict}, schema.conforms, schema.check_schema),
    "unit_tests": Verifier({"tests": str}, _unit_tests, lambda check, place: sandbox.require(place)),
}
