"""Checks from the data's own answers: what a program can judge an answer by."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from limbeck.commands.new.data import Example
from limbeck.elicit.calls import tool_calls
from limbeck.elicit.json_in import NotJSONError
from limbeck.elicit.labels import whole
from limbeck.elicit.rationale import final_of
from limbeck.elicit.schema import value_in

NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
MARKED = "####"  # before the result, as in GSM8K
MOST_CHOICES = 10
SHORT = 60  # characters of an answer that another text can hold word by word

Check = dict[str, Any]


def result_of(answer: str) -> str:
    """What a worked solution comes to: what follows the last ####, or "the answer is"; else the whole answer."""
    if MARKED in answer:
        return answer.rpartition(MARKED)[2].strip()
    return (final_of(answer) or answer).strip()


def number_of(text: str) -> float | int | None:
    """The number that a text is, but for a currency or a percent sign."""
    plain = text.strip().lstrip("$€£ ").rstrip("$€£%. ")
    if not NUMBER.fullmatch(plain):
        return None
    value = float(plain.replace(",", ""))
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def checks_of_results(examples: Sequence[Example]) -> list[Check | None]:
    """Of every problem: its number, its choice (where few results return again and again), or its formula."""
    results = [result_of(example.answer) if example.answer else "" for example in examples]
    return _checks(results, _formula)


def checks_of_answers(examples: Sequence[Example]) -> list[Check | None]:
    """Of every question: its number, its choice (where few answers return again and again), or a short text that has to
    occur in whole words; None for a longer one."""
    return _checks([example.answer.strip().rstrip(".").strip() for example in examples], _short)


def _checks(results: Sequence[str], other: Callable[[str], Check | None]) -> list[Check | None]:
    """The check of every result; `other` makes that of one that is neither a number nor a choice."""
    numbers = [number_of(result) for result in results]
    labels = {} if any(number is not None for number in numbers) else _labels(results)
    listed = sorted(set(labels.values()))
    checks: list[Check | None] = []
    for result, number in zip(results, numbers, strict=True):
        if not result:
            checks.append(None)
        elif number is not None:
            checks.append({"type": "number", "answer": number})
        elif labels:
            checks.append({"type": "choice", "labels": listed, "answer": labels[result.casefold()]})
        else:
            checks.append(other(result))
    return checks


def _labels(results: Sequence[str]) -> dict[str, str]:
    """The results by how they read without case, where they are few and return again and again; else none."""
    counts = Counter(result.casefold() for result in results if result)
    if not 2 <= len(counts) <= MOST_CHOICES or sum(counts.values()) < 3 * len(counts):
        return {}
    return {result.casefold(): result for result in reversed(results) if result}


def _formula(result: str) -> Check:
    if importlib.util.find_spec("math_verify") is not None and re.search(r"[\d\\^=]", result):
        return {"type": "math", "answer": result}
    return {"type": "contains", "all": [result]}


def _short(answer: str) -> Check | None:
    return {"type": "pattern", "pattern": f"(?V1if){whole(answer).pattern}"} if len(answer) <= SHORT else None


def object_of(answer: str) -> dict[str, Any] | None:
    """The JSON object that an answer is."""
    try:
        value = value_in(answer)
    except NotJSONError:
        return None
    return value if isinstance(value, dict) else None


def calls_of(answer: str) -> Check | None:
    """The calls of tools that an answer makes, each argument with its one value."""
    calls = tool_calls(answer) if answer else None
    if calls is None:
        return None
    plain = [
        {"name": call["name"], "arguments": {name: [value] for name, value in call.get("arguments", {}).items()}}
        for call in json.loads(json.dumps(calls))
    ]
    return {"type": "tool_call", "calls": plain}
