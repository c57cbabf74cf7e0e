"""Which of some labels a text claims: found as whole words of any script, the longest first, without those that it
denies, asks about, or only uses as an article.

"Whole word" means what the label's script means by it: letters may follow Korean words, and stand beside Chinese,
Japanese and Thai ones, which are written without spaces. Not covered: irony, denials at a distance ("spam? far from
it"), and denials in languages other than those below.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

import regex

from limbeck.elicit.thinking import STATED, boxed

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}\p{{Hangul}}]]"  # of a script with spaces
FLAGS = regex.IGNORECASE | regex.FULLCASE | regex.VERSION1
JOINED = regex.compile(r"\s+|(?<=\w)[-_](?=\w)")
WINDOW = 48  # characters beside a label in which it may be denied
SENTENCE = 240  # characters after it in which its sentence may turn out to be a question
MOST = 500  # labels that are looked at in one text
STATEMENTS = 20  # times that it says "the answer is", from the last on

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
DETERMINES = regex.compile(  # "no" before a noun is no answer
    r"^\s+(?:idea|doubt|problem|way|reason|evidence|such|one|longer|more|need|sign|indication|question|matter"
    r"|mention)\b",
    FLAGS,
)
HAS = regex.compile(
    r"\b(?:have|has|had|there\s+(?:is|are|was|were)|there['’]s|with|sees?|finds?|found|contains?|makes?|shows?"
    r"|gives?)\s+$",
    FLAGS,
)
A_WORD = regex.compile(r"^\s+\p{L}")
WITHIN_NUMBER = regex.compile(r"(?:\d[.,]|(?<![\p{L}\p{N}])[-\u2212])$")
NUMBER_GOES_ON = regex.compile(r"^[.,]\d")
LONE = regex.compile(r"\W*(?:\\(?:text|mathrm|textbf|mathbf)\W*)?\p{L}\W*")
LEADS_TO_IT = regex.compile(
    r"\W*(?:(?:the|my|final|correct|right|best|answer|option|choice|label|letter|so|it|this|is|should\s+be"
    r"|must\s+be)\W+)*",
    FLAGS,
)
NONE_OF_THEM = regex.compile(r"^\W*(?:none|neither|unclear|unknown|uncertain)\b", FLAGS)
ASKS = regex.compile(r"[.!?。！？؟;\n]")


def claimed(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that the text claims, in the order in which it names them, as often as it does (of the
    first MOST mentions)."""
    plain = unicodedata.normalize("NFKC", text)
    return [label for match, label in _mentions(plain, labels) if _is_claim(plain, match)]


def decided(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that the text claims where it says its answer: in its last box, or else after its last "the answer is"
    that speaks of a label. Where it says none so, those that it claims anywhere; but only one that it begins with, if
    it states an answer that is no label or denies one. A box that holds another letter, and "none", decide on none."""
    box = boxed(text)
    if box and (_named(box, labels) or LONE.fullmatch(box)):
        return claimed(box, labels)
    stated = list(STATED.finditer(text))
    if not (box or stated):
        return claimed(text, labels)
    denied: set[str] = set()
    end = len(text)
    for statement in reversed(stated[-STATEMENTS:]):
        part = text[statement.end() : end]
        if found := [label for label in claimed(part, labels) if label not in denied]:
            return found
        if NONE_OF_THEM.search(part):
            return []
        denied |= _named(part, labels)
        end = statement.start()
    return [label for label in _at_the_beginning(text, labels) if label not in denied]


def _named(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that the text speaks of, be it to deny them."""
    return {label for _, label in _mentions(unicodedata.normalize("NFKC", text), labels)}


def _at_the_beginning(text: str, labels: Sequence[str]) -> list[str]:
    plain = unicodedata.normalize("NFKC", text)
    first = next(iter(_mentions(plain, labels)), None)
    if first is None or not LEADS_TO_IT.fullmatch(plain[: first[0].start()]) or not _is_claim(plain, first[0]):
        return []
    return [first[1]]


def _mentions(plain: str, labels: Sequence[str]) -> Iterator[tuple[regex.Match[str], str]]:
    """Where a normalised text has a label, whatever it says of it."""
    by_form = {_form(label): label for label in labels}
    exact = {unicodedata.normalize("NFKC", label): label for label in labels}
    for match in islice(_pattern(tuple(labels)).finditer(plain), MOST):
        label = exact.get(match[0]) or by_form.get(_form(match[0]))
        if label is not None and _is_label(plain, match, label):
            yield match, label


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


def _beside(text: str, match: regex.Match[str]) -> tuple[str, str]:
    return text[max(0, match.start() - WINDOW) : match.start()], text[match.end() : match.end() + WINDOW]


def _is_label(text: str, match: regex.Match[str], label: str) -> bool:
    """Whether what is written like a label is one: no part of a number, no article, no "no" before a noun."""
    before, after = _beside(text, match)
    if len(label) == 1 and label.isascii() and label.isalpha():
        return _is_letter_of_choice(match[0], label, before, after)
    if label.isdecimal():
        return WITHIN_NUMBER.search(before) is None and NUMBER_GOES_ON.search(after) is None
    if label.casefold() == "no":
        return not (DETERMINES.search(after) or (HAS.search(before) and A_WORD.search(after)))
    return True


def _is_claim(text: str, match: regex.Match[str]) -> bool:
    before, after = _beside(text, match)
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
    if written == "I":
        stands_first = not before.strip(" \t(\"'*[") and regex.match(r"[)\]\"'*]*[.,;:)\]]", after) is not None
        is_named = CUE.search(before.rstrip("(\"'*[ ") + " ") is not None and ARTICLE.search(after) is None
        return is_named or stands_first or regex.match(r"[)\]}\"'*.]*[ \t]*(?:\n|$)", after) is not None
    return written != "A" or CUE.search(before) is not None or not (ARTICLE.search(after) and OPENING.search(before))
