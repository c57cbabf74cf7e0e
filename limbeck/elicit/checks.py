"""More verifiers: exact text, sets, patterns, tool calls, citations, and instructions that a program can check.

Each takes a check (plain data that comes with a prompt) and an answer. A pattern runs for half a second at most; after
that the answer has failed. Not covered: whether a cited passage supports the claim beside it, and languages.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import regex

from limbeck.types import UserError, nearest

Check = dict[str, Any]
PATTERN_SECONDS = 0.5
PATTERN_CHARS = 500
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
CITED = re.compile(r"\[(\d{1,4})\]")
QUOTED = re.compile(r"[\"“](.+?)[\"”]", re.DOTALL)
ABSTAINS = re.compile(
    r"can(?:no|')t (?:be )?answer|not (?:be )?answer(?:ed|able)|do(?:es)?(?: not|n't) (?:say|contain|mention|answer)|no"
    r" answer",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[^.!?…]+[.!?…]+[\"'”’)\]]*(?=\s|$)")


def normalised(text: str) -> str:
    """The text in lower case without punctuation, articles and repeated spaces, as SQuAD compares answers (Rajpurkar et
    al., arXiv:1606.05250)."""
    plain = re.sub(r"[^\w\s]", " ", text.casefold())
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact(check: Check, answer: str) -> bool:
    """Whether the answer is one of the right ones, word for word."""
    right = check["answer"] if isinstance(check["answer"], list) else [check["answer"]]
    if check.get("normalise", True):
        return normalised(answer) in {normalised(text) for text in right}
    return answer.strip() in {text.strip() for text in right}


def items(check: Check, answer: str) -> bool:
    """Whether the answer lists these items and no others, each once and in any order, separated by commas, semicolons,
    "and", or line breaks."""
    listed = Counter(
        plain
        for part in re.split(r"[,;\n]|\band\b", answer)
        if (plain := normalised(re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", part)))
    )
    return set(listed) == {normalised(item) for item in check["items"]} and max(listed.values(), default=1) == 1


def pattern(check: Check, answer: str) -> bool:
    """Whether the regular expression occurs in the answer (or, with `whole`, matches all of it)."""
    compiled = regex.compile(check["pattern"])
    match = compiled.fullmatch if check.get("whole") else compiled.search
    try:
        return match(answer.strip(), timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        return False


def check_pattern(check: Check, place: str) -> None:
    if len(check["pattern"]) > PATTERN_CHARS:
        raise UserError(f"{place}: a pattern of more than {PATTERN_CHARS} characters; make it shorter")
    try:
        regex.compile(check["pattern"])
    except regex.error as error:
        raise UserError(f"{place}: {check['pattern']!r} is not a regular expression: {error}") from error


# Tool calls


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in an answer: JSON in <tool_call> tags, or the answer's first JSON object or list. None if they can't
    be parsed, or there are none."""
    calls: list[Any] = []
    start = min((at for at in map(text.find, "{[") if at >= 0), default=len(text))
    for part in CALL.findall(text) or ([text[start:]] if text[start:] else []):
        try:
            read, _ = json.JSONDecoder().raw_decode(part.strip())
        except (ValueError, RecursionError):
            return None
        calls += read if isinstance(read, list) else [read]
    return calls if calls and all(_is_call(call) for call in calls) else None


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return False
    return isinstance(call.get("arguments", {}), dict)


def tool_call(check: Check, answer: str) -> bool:
    """Whether the answer makes these calls and no others: the name, and for every argument one of its values (null
    among them: it may be left out). With `any_order`, in any order."""
    calls = tool_calls(answer)
    expected = list(check["calls"])
    if calls is None or len(calls) != len(expected):
        return False
    if not check.get("any_order", False):
        return all(_matches(call, other) for call, other in zip(calls, expected, strict=True))
    for call in calls:  # the expected calls differ from each other, so the first that matches is right
        place = next((number for number, other in enumerate(expected) if _matches(call, other)), None)
        if place is None:
            return False
        expected.pop(place)
    return True


def _matches(call: dict[str, Any], expected: dict[str, Any]) -> bool:
    arguments = call.get("arguments", {})
    allowed = expected.get("arguments", {})
    if call["name"] != expected["name"] or not arguments.keys() <= allowed.keys():
        return False
    return all(any(_same(arguments.get(name), value) for value in values) for name, values in allowed.items())


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal and of equal type (1 is not true); text is compared without case and outer
    whitespace."""
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def check_calls(check: Check, place: str) -> None:
    for call in check["calls"]:
        if not _is_call(call) or not all(isinstance(allowed, list) for allowed in call.get("arguments", {}).values()):
            raise UserError(
                f'{place}: a call needs a name and, for each argument, a list of values: {{"name": "f", "arguments":'
                ' {"x": [1, 2]}}'
            )


# Citations


def citations(check: Check, answer: str) -> bool:
    """Whether every [n] names one of the `gold` passages (all passages by default), at least one is cited (with `all`,
    every gold one), and every quotation is in a cited passage. If no passage answers the question (`answerable:
    false`), the answer must say so and cite nothing."""
    passages = check["passages"]
    cited = {int(number) for number in CITED.findall(answer)}
    if not check.get("answerable", True):
        return not cited and ABSTAINS.search(answer) is not None
    gold = set(check.get("gold", range(1, len(passages) + 1)))
    if not cited or not cited <= gold or not all(1 <= number <= len(passages) for number in cited):
        return False
    if check.get("all") and cited != gold:
        return False
    cited_text = " ".join(normalised(passages[number - 1]) for number in sorted(cited))
    return all(normalised(quote) in cited_text for quote in QUOTED.findall(answer))


# Instructions that a program can check (after Zhou et al., arXiv:2311.07911; the definitions are our own)


def _within(count: int, rule: Any) -> bool:
    """Whether a count is what a rule demands: a number, or bounds."""
    if isinstance(rule, dict):
        return bool(rule.get("least", 0) <= count <= rule.get("most", count))
    return bool(count == rule)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


RULES: dict[str, Callable[[str, Any], bool]] = {
    "words": lambda text, rule: _within(len(text.split()), rule),
    "sentences": lambda text, rule: _within(len(SENTENCE.findall(text)), rule),
    "paragraphs": lambda text, rule: _within(
        len([part for part in re.split(r"\n\s*\n|\n\s*\*\*\*\s*\n", text) if part.strip()]), rule
    ),
    "bullets": lambda text, rule: _within(sum(bool(re.match(r"[-*•]\s+\S", line)) for line in _lines(text)), rule),
    "numbered": lambda text, rule: _within(sum(bool(re.match(r"\d+[.)]\s+\S", line)) for line in _lines(text)), rule),
    "with": lambda text, rule: all(_has_word(text, word) for word in rule),
    "without": lambda text, rule: not any(_has_word(text, word) for word in rule),
    "letter": lambda text, rule: _within(text.casefold().count(str(rule["letter"]).casefold()), rule),
    "word": lambda text, rule: _within(
        len(re.findall(rf"(?<!\w){re.escape(str(rule['word']))}(?!\w)", text, re.IGNORECASE)), rule
    ),
    "capitals": lambda text, rule: _within(len(re.findall(r"\b[A-Z]{2,}\b", text)), rule),
    "case": (
        lambda text, rule: text == (text.upper() if rule == "upper" else text.lower()) and any(map(str.isalpha, text))
    ),
    "commas": lambda text, rule: _within(text.count(","), rule),
    "begins": lambda text, rule: text.strip().casefold().startswith(str(rule).strip().casefold()),
    "ends": lambda text, rule: text.strip().strip('"').casefold().endswith(str(rule).strip().casefold()),
    "quoted": (
        lambda text, rule: (len(text.strip()) > 1 and text.strip()[0] in '"“' and text.strip()[-1] in '"”') == rule
    ),
    "json": lambda text, rule: _is_json(text) == rule,
    "title": lambda text, rule: (re.search(r"<<[^\n<>]+>>", text) is not None) == rule,
    "highlighted": lambda text, rule: _within(len(re.findall(r"\*[^*\n]+\*", text.replace("**", "*"))), rule),
    "placeholders": lambda text, rule: _within(len(re.findall(r"\[[^\[\]\n]+\]", text)), rule),
    "postscript": lambda text, rule: re.search(rf"(?m)^\s*{re.escape(str(rule))}", text) is not None,
    "sections": lambda text, rule: _within(
        len(re.findall(rf"(?m)^\W*{re.escape(str(rule['named']))}\s+\w+", text)), rule
    ),
    "parts": lambda text, rule: _within(len([part for part in text.split("******") if part.strip()]), rule),
    "repeats": lambda text, rule: text.strip().casefold().startswith(str(rule).strip().casefold()),
}


def instructions(check: Check, answer: str) -> bool:
    """Whether the answer follows every rule. With `loose`, a rule may also be followed by the answer without its first
    or last line, or both, or without asterisks."""
    readings = [answer]
    if check.get("loose"):
        lines = answer.strip().splitlines()
        shortened = [answer, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
        readings = [text for reading in shortened for text in (reading, reading.replace("*", ""))]
    return all(
        any(text.strip() and RULES[name](text, rule) for text in readings) for name, rule in check["rules"].items()
    )


def check_rules(check: Check, place: str) -> None:
    """Refuse unknown rules, and rules of the wrong type: each is tried once on a text."""
    for name, rule in check["rules"].items():
        if name not in RULES:
            raise UserError(f"{place}: there is no rule {name!r}{nearest(name, RULES)}")
        try:
            RULES[name]("A text.", rule)
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise UserError(f"{place}: the rule {name!r} can't be {rule!r} ({error})") from error
