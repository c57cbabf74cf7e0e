"""Which of some labels a text claims: found as whole words of any script, the longest first, without those that it
denies, asks about, or only uses as an article.

"Whole word" means what the label's script means by it: letters may follow Korean words, and stand beside Chinese,
Japanese and Thai ones, which are written without spaces. Not covered: irony, denials at a distance ("spam? far from
it"), and denials in languages other than those below.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}\p{{Hangul}}]]"  # of a script with spaces
FLAGS = regex.IGNORECASE | regex.FULLCASE | regex.VERSION1
JOINED = regex.compile(r"\s+|(?<=\w)[-_](?=\w)")
WINDOW = 48  # characters beside a label in which it may be denied
SENTENCE = 240  # characters after it in which its sentence may turn out to be a question
MOST = 500  # labels that are looked at in one text

BEFORE = regex.compile(
    r"(?:\b(?:not|never|nor|neither|no|non|hardly|barely|nicht|keine?[mnrs]?|pas|ni|не|ни|нет|nie|niet|geen"
    r"|inte|ikke|ei|não"
    r"|without|except|excluding|instead\s+of|rather\s+than|other\s+than|far\s+from|anything\s+but"
    r"|everything\s+but|opposite\s+of"
    r"|contrary\s+of|unlike|excludes?|rule[sd]?\s+out|eliminate[sd]?|ليس|ليست)"
    r"|n['’]t|(?<=\w)[-_]not|\bnon-|\bun-|\bnot_)"
    r"(?:\s+(?:be|a|an|the|really|actually|necessarily|at\s+all|either|option|choice|label|answer|category|class|ein"
    r"|eine|un|une|una|es|est|è|é|como|clearly|quite|considered|classified\s+as))*[\s\"'“‘*_`(\[]*$",
    FLAGS,
)
THOUGHT = regex.compile(
    r"(?:n['’]t|\bnot|\bnever)\s+(?:think|believe|say|consider|call|mean|agree)\b[^.!?;,\n]{0,24}$", FLAGS
)
UNSPACED_BEFORE = regex.compile(r"(?:不是|并非|並非|不属于|不屬於|不算|没有|沒有|不|非|无|無|未|否)[“”\"'「『*\s]*$")
SPACED = r"[\s\"'”’*_`)\].:]{0,4}"
AFTER = regex.compile(
    rf"^{SPACED}(?:\s(?:is|was|are|were|would\s+be|seems?|looks?|can|could|must|does|do|should)"
    r"(?:\s+not\b|n['’]t\b|not\b)"
    rf"|\s*(?:\s(?:is|was|are|would\s+be|seems?|looks?)\s+)?(?:definitely\s+|clearly\s+|also\s+)?"
    rf"(?:wrong|incorrect|false|ruled\s+out"
    rf"|excluded|impossible|untrue|out\s+of\s+the\s+question|falsch|faux|falso|incorrecto|неверно)\b"
    rf"|\s+(?:nicht|değil|नहीं|no\s+es|n['’]est\s+pas|ist\s+(?:es\s+)?(?:nicht|falsch)))",
    FLAGS,
)
UNSPACED_AFTER = regex.compile(
    r"^[”\"'」』*\s]*(?:では(?:ない|ありません|なく)|じゃ(?:ない|ありません|なく)|でない|とは言えない|是错|是錯|不对|不對|不正确|不正確"
    r"|[은는이가]?\s*(?:아니|아닙|틀렸))"
)
ARTICLE = regex.compile(
    r"^\s+(?!(?:is|because|since|was|as|and|or|seems|would|must|has|wins|fits|looks|can|should)\b)\p{Ll}",
    regex.VERSION1,
)
OPENING = regex.compile(r"(?:^|[.!?:;,\n]\s*|\b(?:is|was|as|of|not|with|like|such)\s+)$")
CUE = regex.compile(
    r"(?:answer|option|choice|label|letter|Antwort|réponse|respuesta)\s*(?:is|:|=|ist|est|es)?\s*$", FLAGS
)
ASKS = regex.compile(r"[.!?。！？؟;\n]")


def claimed(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that the text claims, in the order in which it names them, as often as it does (of the
    first MOST mentions)."""
    plain = unicodedata.normalize("NFKC", text)
    by_form = {_form(label): label for label in labels}
    exact = {unicodedata.normalize("NFKC", label): label for label in labels}
    found = []
    for match in islice(_pattern(tuple(labels)).finditer(plain), MOST):
        label = exact.get(match[0]) or by_form.get(_form(match[0]))
        if label is not None and _is_claim(plain, match, label):
            found.append(label)
    return found


def mention(text: str) -> str:
    """A regular expression (of `regex`, version 1) for the text as whole words."""
    words = unicodedata.normalize("NFKC", text).strip()
    body = r"[\s_\-]+".join(regex.escape(word) for word in JOINED.split(words) if word) or r"(?!)"
    return f"{_left(words)}{body}{_right(words)}"


def whole(text: str) -> regex.Pattern[str]:
    """A regular expression (of `regex`) for exactly this text, where it neither begins nor ends inside a word. Of words
    without spaces between them any part will do, and Korean ones may have an ending."""
    left = rf"(?<!{LETTER})" if regex.match(LETTER, text, FLAGS) else r"(?<!\p{Hangul})" * ("가" <= text[:1] <= "힣")
    right = rf"(?!{LETTER})" if regex.match(LETTER, text[-1:], FLAGS) else ""
    return regex.compile(left + regex.escape(text) + right, FLAGS)


def _left(words: str) -> str:
    first = words[:1]
    if regex.fullmatch(rf"[{UNSPACED}]", first):
        if len(words) == 1:
            return rf"(?<![{UNSPACED}])"
        return r"(?<!\p{Hiragana})" if regex.fullmatch(r"\p{Hiragana}+", words) else ""
    if regex.fullmatch(r"\p{Hangul}", first):
        return r"(?<![\p{Hangul}\p{L}])"
    return rf"(?<!{LETTER})(?<!{LETTER}-)" if first.isalnum() else ""


def _right(words: str) -> str:
    last = words[-1:]
    if regex.fullmatch(rf"[{UNSPACED}]", last):
        if len(words) == 1:
            return rf"(?![[{UNSPACED}]--[的だでとに]])"
        return r"(?![\p{Hiragana}--[だでとなにのは]])" if regex.fullmatch(r"\p{Hiragana}+", words) else ""
    if regex.fullmatch(r"\p{Hangul}", last):
        return ""
    if not (last.isalnum() or unicodedata.category(last or " ").startswith("M")):
        return rf"(?![{regex.escape(last)}])" if last in ("+", "#", "-", "*") else ""
    single = r"(?!['’]\p{L})" if len(words) == 1 else ""
    return rf"(?!{LETTER})(?!-{LETTER})(?![+#]){single}"


@lru_cache(maxsize=256)
def _pattern(labels: tuple[str, ...]) -> regex.Pattern[str]:
    longest_first = sorted({unicodedata.normalize("NFKC", label).strip() for label in labels}, key=len, reverse=True)
    return regex.compile("|".join(["是否", *map(mention, longest_first)]), FLAGS)


def _form(label: str) -> str:
    plain = unicodedata.normalize("NFKC", label).casefold()
    return " ".join(regex.split(r"[\s_\-]+", unicodedata.normalize("NFC", plain).strip()))


def _is_claim(text: str, match: regex.Match[str], label: str) -> bool:
    before = text[max(0, match.start() - WINDOW) : match.start()]
    after = text[match.end() : match.end() + WINDOW]
    if (
        len(label) == 1
        and label.isascii()
        and label.isalpha()
        and not _is_letter_of_choice(match[0], label, before, after)
    ):
        return False
    if BEFORE.search(before) or THOUGHT.search(before) or UNSPACED_BEFORE.search(before):
        return False
    if AFTER.search(after) or UNSPACED_AFTER.search(after):
        return False
    end = ASKS.search(text, match.end(), match.end() + SENTENCE)
    return end is None or end[0] not in "?？؟"


def _is_letter_of_choice(written: str, label: str, before: str, after: str) -> bool:
    """Whether a single letter names a choice, and is no article ("A whale"), pronoun ("I think"), or part of a text."""
    if written != label:  # in the other case it has to stand alone
        alone = not before.strip(" \t(\"'*[") or bool(CUE.search(before.rstrip("(\"'*[ ") + " "))
        return alone and regex.match(r"[)\]\"'*]*(?:[.):\]]|\s*$)", after) is not None
    if written not in "AI" or CUE.search(before):
        return True
    return ARTICLE.search(after) is None or (written == "A" and OPENING.search(before) is None)
