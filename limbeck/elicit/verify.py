"""Verifiers: small programs that judge an answer. A verdict is True, False, or None if there is nothing to check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.elicit import checks, citing, equivalence, instructions, sandbox, schema
from limbeck.elicit.checks import Check
from limbeck.elicit.json_in import objects_in, same
from limbeck.elicit.labels import decided
from limbeck.elicit.numbers import denied, final_number, numbers_in
from limbeck.elicit.thinking import after_thinking, boxed, stated
from limbeck.types import UserError, nearest

VERSION = 4  # of the verdicts: records of another version are not mixed with ours
MAX_CHARS = 100_000


def verify(check: Check | None, text: str) -> bool | None:
    """Whether the answer in a text passes the check: what follows its thinking, unless the check says `thinking: true`.
    Thinking that never ends is no answer, and does not pass. None without a check."""
    if check is None:
        return None
    answer = text if check.get("thinking") else after_thinking(text)
    return answer is not None and VERIFIERS[check["type"]].passes(check, answer[:MAX_CHARS])


def parse_check(check: Any, place: str) -> Check:
    """The check, if it is well-formed.

    Raises:
        UserError: it is not; the message names the place and what is missing.
    """
    kind = check.get("type") if isinstance(check, dict) else check
    if not isinstance(check, dict) or not isinstance(kind, str) or kind not in VERIFIERS:
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
    """Whether the right number is in the answer's last box, or else the last number of the answer; with `strict`, the
    first one after the last "####" or "answer is". A number that is denied ("not 12"), or one of two ("12 or 13",
    "12-13"), does not count. `decimal` says what a lone point or comma is, see `numbers.py`."""
    decimal = check.get("decimal", ".")
    right = float(check["answer"])
    if check.get("strict"):
        said = stated(answer) or ""
        found = [number for number in numbers_in(said, decimal) if not denied(said, number)]
        return bool(found) and found[0].may_be(right)
    last = final_number(boxed(answer) or answer, decimal)
    return last is not None and last.may_be(right)


def _check_number(check: Check, place: str) -> None:
    if isinstance(check["answer"], bool):
        raise UserError(f"{place}: the answer of a number check must be a number")
    try:
        float(check["answer"])
    except OverflowError:
        raise UserError(f"{place}: the answer of a number check is too large: at most 1.8e308") from None
    if check.get("decimal", ".") not in (".", ","):
        raise UserError(f"{place}: decimal {check['decimal']!r} must be '.' or ','")


def _choice(check: Check, answer: str) -> bool:
    """Whether the answer claims the right label and no other: in its last box, or else after its last "the answer is",
    or else, where it says neither, anywhere."""
    return set(decided(answer, check["labels"])) == {check["answer"]}


def _check_choice(check: Check, place: str) -> None:
    if not all(isinstance(label, str) for label in check["labels"]):
        raise UserError(f"{place}: every entry of 'labels' must be text")
    if check["answer"] not in check["labels"]:
        raise UserError(f"{place}: the answer {check['answer']!r} is not among the labels")


def _json(check: Check, answer: str) -> bool:
    """Whether the JSON objects in the answer have these values, the first all of them, and no other says otherwise."""
    found = objects_in(answer)
    wanted = check["equals"]
    if not found or not all(name in found[0] and same(found[0][name], value) for name, value in wanted.items()):
        return False
    return all(same(other[name], value) for other in found for name, value in wanted.items() if name in other)


def _unit_tests(check: Check, answer: str) -> bool:
    """Whether the program in the answer passes the tests, in the sandbox."""
    return sandbox.run_tests(sandbox.program_in(answer), check["tests"]).passed


VERIFIERS = {
    "number": Verifier({"answer": int | float}, _number, _check_number),
    "choice": Verifier({"labels": list, "answer": str}, _choice, _check_choice),
    "json": Verifier({"equals": dict}, _json),
    "order": Verifier({"items": list}, checks.order),
    "contains": Verifier({"all": list}, checks.contains, texts="all"),
    "exact": Verifier({"answer": str | list}, checks.exact),
    "set": Verifier({"items": list}, checks.items, texts="items"),
    "pattern": Verifier({"pattern": str}, checks.pattern, checks.check_pattern),
    "tool_call": Verifier({"calls": list}, checks.tool_call, checks.check_calls),
    "citations": Verifier({"passages": list}, citing.citations, texts="passages"),
    "instructions": Verifier({"rules": dict}, instructions.instructions, instructions.check_rules),
    "math": Verifier({"answer": str}, equivalence.equivalent, equivalence.check_answer),
    "json_schema": Verifier({"schema": dict}, schema.conforms, schema.check_schema),
    "unit_tests": Verifier({"tests": str}, _unit_tests, lambda check, place: sandbox.require(place)),
}
