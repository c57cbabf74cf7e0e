"""More verifiers: exact text, sets, patterns, tool calls, citations, and instructions that a program can check.

Each takes a check, which is plain data beside a prompt, and an answer. A pattern runs for half a second at most: what
takes longer has not passed. Not covered: whether a cited passage supports what is said beside it, and languages.
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
    """Lower case, without punctuation, articles and doubled spaces, as SQuAD compares answers (Rajpurkar et al.,
    arXiv:1606.05250)."""
    plain = re.sub(r"[^\w\s]", " ", text.casefold())
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact(check: Check, answer: str) -> bool:
    """The whole answer is one of the given ones."""
    given = check["answer"] if isinstance(check["answer"], list) else [check["answer"]]
    if check.get("normalise", True):
        return normalised(answer) in {normalised(text) for text in given}
    return answer.strip() in {text.strip() for text in given}


def items(check: Check, answer: str) -> bool:
    """The answer lists these items and no others, in any order, parted by commas, semicolons or lines."""
    said = Counter(
        plain
        for part in re.split(r"[,;\n]|\band\b", answer)
        if (plain := normalised(re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", part)))
    )
    return set(said) == {normalised(item) for item in check["items"]} and max(said.values(), default=1) == 1


def pattern(check: Check, answer: str) -> bool:
    """The regular expression is found in the answer (`whole`: is the answer)."""
    compiled = regex.compile(check["pattern"])
    find = compiled.fullmatch if check.get("whole") else compiled.search
    try:
        return find(answer.strip(), timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        return False


def check_pattern(check: Check, place: str) -> None:
    if len(check["pattern"]) > PATTERN_CHARS:
        raise UserError(f"{place}: a pattern of more than {PATTERN_CHARS} characters; make it shorter")
    try:
        regex.compile(check["pattern"])
    except regex.error as error:
        raise UserError(f"{place}: {check['pattern']!r} is no regular expression: {error}") from error


# Tool calls


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of an answer: JSON in <tool_call> tags, or an object or list that is the answer's first JSON. None
    where they can't be read."""
    found: list[Any] = []
    for part in CALL.findall(text) or [
        text[start:] for start in [min((at for at in map(text.find, "{[") if at >= 0), default=-1)] if start >= 0
    ]:
        try:
            read, _ = json.JSONDecoder().raw_decode(part.strip())
        except (ValueError, RecursionError):
            return None
        found += read if isinstance(read, list) else [read]
    good = all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments", {}), dict)
        for call in found
    )
    return found if good and found else None


def called(check: Check, answer: str) -> bool:
    """These calls were made and no others: the name, and for every argument one of its values (null among them: it may
    be left out). With `any_order`, in any order."""
    made = tool_calls(answer)
    wanted = list(check["calls"])
    if made is None or len(made) != len(wanted):
        return False
    if not check.get("any_order", False):
        return all(_is_call(call, want) for call, want in zip(made, wanted, strict=True))
    for call in made:  # each wanted call differs, so that the first that fits is right
        place = next((number for number, want in enumerate(wanted) if _is_call(call, want)), None)
        if place is None:
            return False
        wanted.pop(place)
    return True


def _is_call(call: dict[str, Any], want: dict[str, Any]) -> bool:
    given = call.get("arguments", {})
    allowed = want.get("arguments", {})
    if call["name"] != want["name"] or not given.keys() <= allowed.keys():
        return False
    return all(any(_same(given.get(name), value) for value in values) for name, values in allowed.items())


def _same(one: Any, other: Any) -> bool:
    """Equal values of equal kinds: 1 is not true, and text is compared without case and outer spaces."""
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def check_calls(check: Check, place: str) -> None:
    for call in check["calls"]:
        values = (
            call.get("arguments", {}).values()
            if isinstance(call, dict) and isinstance(call.get("arguments", {}), dict)
            else [None]
        )
        if (
            not isinstance(call, dict)
            or not isinstance(call.get("name"), str)
            or not all(isinstance(allowed, list) for allowed in values)
        ):
            raise UserError(
                f'{place}: a call needs a name and, for each argument, a list of values: {{"name": "f", "arguments":'
                ' {"x": [1, 2]}}'
            )


# Citations


def citations(check: Check, answer: str) -> bool:
    """Every [n] names one of the passages, some one is of the `gold` ones (all of them, with `all`), none is of others,
    and what stands in quotation marks stands in a cited passage. Where no passage answers (`answerable: false`), the
    answer says so and cites nothing."""
    passages = check["passages"]
    cited = {int(number) for number in CITED.findall(answer)}
    if not check.get("answerable", True):
        return not cited and ABSTAINS.search(answer) is not None
    gold = set(check.get("gold", range(1, len(passages) + 1)))
    if not cited or not cited <= gold or not all(1 <= number <= len(passages) for number in cited):
        return False
    if check.get("all") and cited != gold:
        return False
    read = " ".join(normalised(passages[number - 1]) for number in sorted(cited))
    return all(normalised(quote) in read for quote in QUOTED.findall(answer))


# Instructions that a program can check (after Zhou et al., arXiv:2311.07911; the definitions are our own)


def _within(count: int, rule: Any) -> bool:
    """Whether a count is what a rule asks for: a number, or bounds."""
    if isinstance(rule, dict):
        return bool(rule.get("least", 0) <= count <= rule.get("most", count))
    return bool(count == rule)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip())


def _holds(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _is_json(text: str) -> bool:
    inside = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        json.loads(inside[1] if inside else text)
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
    "with": lambda text, rule: all(_holds(text, word) for word in rule),
    "without": lambda text, rule: not any(_holds(text, word) for word in rule),
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
    """Every rule is followed. With `loose`, it is enough if one way of reading the answer follows it: without its first
    or last line, or both, or without asterisks."""
    readings = [answer]
    if check.get("loose"):
        lines = answer.strip().splitlines()
        cut = [answer, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
        readings = [text for reading in cut for text in (reading, reading.replace("*", ""))]
    return all(
        any(text.strip() and RULES[name](text, rule) for text in readings) for name, rule in check["rules"].items()
    )


def check_rules(check: Check, place: str) -> None:
    """Refuse rules that don't exist, or of the wrong kind: each is tried once on a text."""
    for name, rule in check["rules"].items():
        if name not in RULES:
            raise UserError(f"{place}: there is no rule {name!r}{nearest(name, RULES)}")
        try:
            RULES[name]("A text.", rule)
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise UserError(f"{place}: the rule {name!r} can't be {rule!r} ({error})") from error
