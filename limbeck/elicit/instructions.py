"""A verifier: instructions that a program can check (after Zhou et al., arXiv:2311.07911; the definitions are our own).

Texts are compared in one Unicode form, with straight quotes. Of scripts without spaces a word is a character, as word
processors count. Not covered: whether the answer is in a certain language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import regex

from limbeck.elicit.json_in import NotJSONError, fenced, read_json
from limbeck.elicit.labels import whole
from limbeck.types import UserError, nearest

STRAIGHT = str.maketrans("’‘ʼ‚“”„‟\u00a0", "''''\"\"\"\" ", "\u00ad\u200b\u2060\ufeff")
QUOTES = {'"': '"', "«": "»", "»": "«", "「": "」", "『": "』"}  # once they are straight
BOUNDS = {"least", "most", "letter", "word", "named"}
RULED = " \t\r\n-*_=~#+"  # a line of these is no paragraph and no item
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
WORD = regex.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
CAPITALS = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{Lu}{2,}+(?![\p{L}\p{M}\p{N}])")
BULLET = re.compile(r"[-*+–]\s+|[•●◦‣▪▫○■·・]\s*")
NUMBERED = regex.compile(
    rf"[*_#]*\s*(?:[(（]?\d{{1,4}}(?:\\?[.)）．][*_]*(?:\s|(?=[{UNSPACED}\p{{Hangul}}]))|、|[-–]\s)|[①-⑳])"
)
PARAGRAPHS = re.compile(r"\n\s*\n|\n\s*\*\*\*\s*\n")
PLACEHOLDER = re.compile(r"[\[［【]([^\[\]［］【】\n]+)[\]］】](?!\()")
ENDS = regex.compile(
    r"(?<![.!?…])(?P<mark>[.!?…]++)(?P<closed>[\"'”’»)\]*_`]*+)(?=\s|$)|[。！？｡।॥؟۔]++[\"'”’»」』》）)\]*_]*+"
)
GOES_ON = regex.compile(r"[^\S\n]+[\"'“‘«(\[*_]{0,4}(?P<next>.)")
# before a point that ends no sentence: a list's number, a single letter but "I", an abbreviation
SHORT = regex.compile(
    r"(?:(?:^|\n)[\s*_#>]{0,8}\d{1,3}|(?<![\p{L}\p{N}/])(?:[\p{L}--[I]]|(?i:mr|mrs|ms|dr|prof|st|sr|jr|vs|fig|figs"
    r"|vol|pp|approx|gen|capt|rev|bzw|ca|nr|abb|hr|fr|mme|mlle|sra|dra|рис|стр|ул|им)))$",
    regex.VERSION1,
)


def flat(text: str) -> str:
    """The text in one Unicode form, with straight quotes and without invisible characters."""
    return unicodedata.normalize("NFKC", text.translate(STRAIGHT)).translate(STRAIGHT)


def _folded(text: str) -> str:
    return " ".join(flat(text).casefold().split())


def _within(count: int, rule: Any) -> bool:
    """Whether a count is what a rule demands: a number, or bounds."""
    if isinstance(rule, dict):
        return bool(rule.get("least", 0) <= count <= rule.get("most", count))
    return bool(count == rule)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip())


def _words(text: str) -> int:
    return sum(any(map(str.isalnum, match[0])) for match in WORD.finditer(text))


def _sentences(text: str) -> int:
    """How many sentences come to an end."""
    cased = any(map(str.isupper, text))
    count = at = 0
    for end in ENDS.finditer(text):
        if not re.compile(r"\w").search(text, at, end.start()):
            at = end.end()
        elif end["mark"] is None or not _within_sentence(text, end, cased):
            count += 1
            at = end.end()
    return count


def _within_sentence(text: str, end: regex.Match[str], cased: bool) -> bool:
    """Whether a sentence goes on after a mark: in lower case, or since a point belongs to what is before it."""
    following = GOES_ON.match(text, end.end())
    if following is None:
        return False
    spoken = bool(end["closed"].strip("*_`)]"))
    if cased and following["next"].islower() and (spoken or end["mark"].strip("!?")):
        return True
    return end[0] == "." and SHORT.search(text[max(0, end.start() - 16) : end.start()]) is not None


def _items(text: str, mark: Any) -> int:
    """How many lines begin with a mark and say something."""
    found = ((line, mark.match(line)) for line in _lines(text))
    return sum(bool(match and line[match.end() :].strip(RULED)) for line, match in found)


def _mentions(text: str, word: str) -> int:
    return sum(1 for _ in whole(flat(word)).finditer(flat(text)))


def _listed(rule: Any) -> list[str]:
    if not isinstance(rule, list):
        raise TypeError("a list of words is needed")
    return rule


def _letters(text: str, letter: str) -> int:
    plain, wanted = (flat(part).lower().replace("ς", "σ") for part in (text, letter))
    return plain.count(wanted)


def _ends(text: str, rule: str) -> bool:
    plain = _folded(text)
    return plain.endswith(_folded(rule)) or plain.rstrip("\"»」』' ").endswith(_folded(rule))


def _quoted(text: str) -> bool:
    plain = flat(text).strip()
    return len(plain) > 1 and QUOTES.get(plain[0]) == plain[-1]


def _is_json(text: str) -> bool:
    blocks = fenced(text) if text.lstrip().startswith("```") and text.rstrip().endswith("```") else []
    try:
        read_json(blocks[0][1] if len(blocks) == 1 else text)
    except NotJSONError:
        return False
    return True


def _sections(text: str, named: str) -> int:
    """How many lines begin with this name and a number, in digits or letters, or one word that ends the heading."""
    name = re.escape(flat(named))
    number = r"[^\S\n]*(?:\d|[一二三四五六七八九十]|(?-i:[IVXLC]+)\b)|[^\S\n]+\w+[^\S\n]*[*_]*(?:[:.)—–-]|$)"
    return len(re.findall(rf"(?mi)^[^\w\n]*{name}(?:{number})", flat(text)))


def _postscript(text: str, mark: str) -> bool:
    return re.search(rf"(?mi)^[ \t>*_#]*{re.escape(flat(mark))}", flat(text)) is not None


RULES: dict[str, Callable[[str, Any], bool]] = {
    "words": lambda text, rule: _within(_words(text), rule),
    "sentences": lambda text, rule: _within(_sentences(text), rule),
    "paragraphs": lambda text, rule: _within(sum(bool(part.strip(RULED)) for part in PARAGRAPHS.split(text)), rule),
    "bullets": lambda text, rule: _within(_items(text, BULLET), rule),
    "numbered": lambda text, rule: _within(_items(text, NUMBERED), rule),
    "with": lambda text, rule: all(_mentions(text, word) for word in _listed(rule)),
    "without": lambda text, rule: not any(_mentions(text, word) for word in _listed(rule)),
    "letter": lambda text, rule: _within(_letters(text, str(rule["letter"])), rule),
    "word": lambda text, rule: _within(_mentions(text, str(rule["word"])), rule),
    "capitals": lambda text, rule: _within(len(CAPITALS.findall(flat(text))), rule),
    "case": lambda text, rule: {"upper": str.isupper, "lower": str.islower}[rule](text),
    "commas": lambda text, rule: _within(sum(text.count(comma) for comma in ",，、،"), rule),
    "begins": lambda text, rule: _folded(text).startswith(_folded(str(rule))),
    "ends": lambda text, rule: _ends(text, str(rule)),
    "quoted": lambda text, rule: _quoted(text) == rule,
    "json": lambda text, rule: _is_json(text) == rule,
    "title": lambda text, rule: (re.search(r"<<[^\n<>]+>>", text) is not None) == rule,
    "highlighted": lambda text, rule: _within(
        len(re.findall(r"\*(?=\S)[^*\n]+(?<=\S)\*", text.replace("**", "*"))), rule
    ),
    "placeholders": lambda text, rule: _within(
        sum(any(map(str.isalnum, inside)) for inside in PLACEHOLDER.findall(text)), rule
    ),
    "postscript": lambda text, rule: _postscript(text, str(rule)),
    "sections": lambda text, rule: _within(_sections(text, str(rule["named"])), rule),
    "parts": lambda text, rule: _within(len([part for part in text.split("******") if part.strip()]), rule),
    "repeats": lambda text, rule: _folded(text).startswith(_folded(str(rule))),
}


def instructions(check: dict[str, Any], answer: str) -> bool:
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


def check_rules(check: dict[str, Any], place: str) -> None:
    """Refuse unknown rules, and rules of the wrong type: each is tried once on a text."""
    for name, rule in check["rules"].items():
        if name not in RULES:
            raise UserError(f"{place}: there is no rule {name!r}{nearest(name, RULES)}")
        if isinstance(rule, dict) and (odd := rule.keys() - BOUNDS):
            raise UserError(f"{place}: the rule {name!r} knows no {min(map(str, odd))!r}, only 'least' and 'most'")
        try:
            RULES[name]("A text.", rule)
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise UserError(f"{place}: the rule {name!r} can't be {rule!r} ({error})") from error
