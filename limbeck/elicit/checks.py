"""More verifiers: exact text, sets, orders, patterns and tool calls.

Each takes a check (plain data that comes with a prompt) and an answer. A pattern runs for half a second at most; after
that the answer has failed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import islice
from typing import Any

import regex

from limbeck.elicit.calls import is_call, same_argument, tool_calls
from limbeck.elicit.labels import FLAGS, LETTER, mention
from limbeck.types import UserError

Check = dict[str, Any]
PATTERN_SECONDS = 0.5
PATTERN_CHARS = 500
ARTICLES = re.compile(r"\b(?:a|an|the) (?=\S)")  # before another word: "vitamin A" keeps its last one
MEANT = regex.compile(  # signs that change what is said: C++ and C#, -5, -$5, -x, x+1, 5%, 1.5, 1/2, x < 3, pictures
    r"(?<=\p{L})[+#]+(?![\p{L}\p{N}])|(?<![\p{L}\p{N}])-(?=[$€£¥₹]?\.?\p{N}|\p{L}(?![\p{L}\p{M}\p{N}]))"
    r"|(?<=[\p{L}\p{N})])\+(?=[\p{L}\p{N}(])|(?<=\p{N})(?:%|[.,/:](?=\p{N}))|[<>=]"
    r"|[[\p{S}]--[$€£¥₹^`~|+\p{Sk}]]",
    regex.VERSION1,
)
SPACED = regex.compile(r"(?<=[\p{L}\p{N})])\s+\+\s+(?=[\p{L}\p{N}(])|(?<=\p{N})\s+%")
DROPPED = regex.compile(r"[^\p{L}\p{M}\p{N}\s\ue000]", regex.VERSION1)
# digits that are no end of a number (a date has two points, a decimal one), and no beginning of one
NO_NUMBER = r"(?<!\d)(?<!(?<![\d.])\d{1,15}\.)(?<!(?<![\p{L}\p{N}])[-\u2212][$€£¥₹]?)"
NUMBER_ENDS = r"(?!\d)(?!\.\d++(?!\.\d)|,\d{3}(?!\d))"
LISTED = re.compile(r"[,;\n、，；،؛・]|\b(?:and|und|et|y|e|и|og|och|en|ve)\b|(?<=[\u4e00-\u9fff])[和与及]|と(?=\S)")


def normalised(text: str) -> str:
    """The text in lower case and one Unicode form, without punctuation, articles and repeated spaces, as SQuAD compares
    answers (Rajpurkar et al., arXiv:1606.05250). Unlike there, signs that change what is said stay ("C++", "-5", "1.5",
    "5%", "x + 1", "x < 3"), and so do vowel signs of scripts that have them, and an article that is all there is."""
    folded = unicodedata.normalize(
        "NFKC", unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-").replace("\u2044", "/")
    )
    folded = re.sub("[\ufe0e\ufe0f\u200b-\u200f\u2060\ufeff]", "", folded)
    kept: list[str] = []

    def keep(match: regex.Match[str]) -> str:
        kept.append(match[0])
        return "\ue000" * len(match[0])

    folded = SPACED.sub(lambda match: match[0].strip(), folded.replace("\ue000", " "))
    marked = MEANT.sub(keep, folded)
    signs = iter("".join(kept))
    plain = re.sub("\ue000", lambda _: next(signs), DROPPED.sub(" ", marked))
    return ARTICLES.sub("", " ".join(plain.split()))


def exact(check: Check, answer: str) -> bool:
    """Whether the answer is one of the right ones, word for word."""
    right = check["answer"] if isinstance(check["answer"], list) else [check["answer"]]
    if check.get("normalise", True) and (plain := normalised(answer)):
        return plain in {normalised(text) for text in right}
    return _composed(answer) in {_composed(text) for text in right}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def items(check: Check, answer: str) -> bool:
    """Whether the answer lists these items and no others, each once and in any order, separated by commas, semicolons,
    "and" (or the same in some other languages), or line breaks."""
    wanted = {normalised(item) for item in check["items"]}
    for place, item in enumerate(check["items"]):  # an item may itself hold a comma or an "and"
        if LISTED.search(item):
            answer = re.sub(re.escape(item), f"\ue001{place}\ue001", answer, flags=re.IGNORECASE)
    listed: Counter[str] = Counter()
    for part in LISTED.split(answer):
        whole = re.sub("\ue001(\\d+)\ue001", lambda match: check["items"][int(match[1])], part)
        if plain := normalised(re.sub(r"^\s*(?:[-*](?=\s)|•|\d+[.)](?!\d))\s*", "", whole)):
            listed[plain] += 1
    return set(listed) == wanted and max(listed.values(), default=1) == 1


def contains(check: Check, answer: str) -> bool:
    """Whether all texts occur, ignoring case. One that begins with a letter has to begin a word ("paris" is not in
    "comparison"), and digits are the whole of a number: "12" is not in "12.5" or "12,000", nor "5" in "-5"."""
    plain = unicodedata.normalize("NFC", answer).casefold()
    return all(_begins_a_word(unicodedata.normalize("NFC", text).casefold()).search(plain) for text in check["all"])


def _begins_a_word(text: str) -> regex.Pattern[str]:
    left = NO_NUMBER if text[:1].isdecimal() else rf"(?<!{LETTER})" if regex.match(LETTER, text, FLAGS) else ""
    right = "" if not text[-1:].isdecimal() else r"(?!\d)" if "." in text else NUMBER_ENDS
    return regex.compile(left + regex.escape(text) + right, FLAGS)


def order(check: Check, answer: str) -> bool:
    """Whether the items occur in this order: the last that are named, or the first if no whole list follows. An answer
    that lists them in more than three orders has not decided."""
    wanted = [normalised(str(item)) for item in check["items"]]
    named = "|".join(mention(str(item)) for item in sorted(map(str, check["items"]), key=len, reverse=True))
    plain = unicodedata.normalize("NFKC", answer)
    found = [normalised(match[0]) for match in islice(regex.finditer(named, plain, FLAGS), 4 * len(wanted) + 1)]
    count = len(wanted)
    if not count or len(found) > 3 * count:
        return not count
    return found[-count:] == wanted or (found[:count] == wanted and len(found) < 2 * count)


def pattern(check: Check, answer: str) -> bool:
    """Whether the regular expression occurs in the answer (or, with `whole`, matches all of it), as they are written or
    with composed accents. Lines end in \\n."""
    written = answer.strip().replace("\r\n", "\n")
    pattern, composed = (unicodedata.normalize("NFC", text) for text in (check["pattern"], written))
    try:
        return _occurs(check, check["pattern"], written) or _occurs(check, pattern, composed)
    except TimeoutError:
        return False


def _occurs(check: Check, pattern: str, text: str) -> bool:
    compiled = regex.compile(pattern)
    match = compiled.fullmatch if check.get("whole") else compiled.search
    return match(text, timeout=PATTERN_SECONDS) is not None


def check_pattern(check: Check, place: str) -> None:
    if len(check["pattern"]) > PATTERN_CHARS:
        raise UserError(f"{place}: a pattern of more than {PATTERN_CHARS} characters; make it shorter")
    try:
        regex.compile(check["pattern"])
    except regex.error as error:
        raise UserError(f"{place}: {check['pattern']!r} is not a regular expression: {error}") from error


# Tool calls


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
    return all(any(same_argument(arguments.get(name), value) for value in values) for name, values in allowed.items())


def check_calls(check: Check, place: str) -> None:
    for call in check["calls"]:
        if not is_call(call) or not all(isinstance(allowed, list) for allowed in call.get("arguments", {}).values()):
            raise UserError(
                f'{place}: a call needs a name and, for each argument, a list of values: {{"name": "f", "arguments":'
                ' {"x": [1, 2]}}'
            )
