"""Mathematics as models write it, in the form that math-verify reads: one form of digits, LaTeX for roots, powers and
pi, spaces around numbers in scripts without them, nothing of markdown, and no numbers that are denied.
"""

from __future__ import annotations

import unicodedata
from fractions import Fraction

import regex

from limbeck.elicit.labels import UNSPACED
from limbeck.elicit.numbers import SUPERSCRIPTS, ascii_digits, denied, final_number, numbers_in
from limbeck.elicit.thinking import boxed

BESIDE = rf"[{UNSPACED}\p{{Hangul}}：:。、「」（）!?]"
TOUCHING = regex.compile(
    rf"(?<={BESIDE})(?=[-\d√π(.])|(?<=[\d%)π])(?=[{UNSPACED}\p{{Hangul}}。、「」（）])", regex.VERSION1
)
VULGAR = regex.compile(r"(?P<whole>\d++)?[ ]?(?P<part>[¼½¾⅐-⅞])")
RAISED = regex.compile(r"(?<=[\d\p{L})}])[⁰¹²³⁴-⁹⁻]++")
MIXED = regex.compile(r"(?<![\p{L}\d/^_.,}])(?P<whole>\d{1,9}) (?P<part>\d{1,6}/\d{1,6})(?![\d/])")
BARE_MINUS = regex.compile(r"(?<=[\p{L}\d)}])\^(-\d{1,3})(?![\d.])")
ROOT = regex.compile(r"√\s?(?:\{([^{}]{1,40})\}|\(([^()]{1,40})\)|(\d++|\p{L}))")
THOUSANDS = regex.compile(r"(?<=[1-9]\d{0,2})\{,\}(?=\d{3}(?!\d))|(?<=\d)(?:,?\\!|\\[,;:]|~|\u2009)(?=\d{3}(?!\d))")
POWER_OF_TEN = regex.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?![\p{L}\d])")
IS_LATEX = regex.compile(r"\$|\\[(\[]|\\(?:boxed|fbox|d?frac|sqrt)")
MARKS = regex.compile(r"</?\w{1,20}>|`+|\*\*")
PYTHONS_POWER = regex.compile(r"(?<=[\d)])\*\*(?=[-\d(])")
RUN = regex.compile(r"[-\d√π.(){}^xyz]++(?:[ ]?[-+*/][ ]?[\d√π.(){}^xyz]++)*+")
NEEDS_LATEX = regex.compile(r"[√π]|\^\{|\d[xyz](?!\p{L})")


def readable(text: str) -> str:
    """The text as math-verify reads it."""
    plain = ascii_digits(text)
    for number in numbers_in(plain):
        if denied(plain, number):
            plain = plain[: number.start] + " " * (number.end - number.start) + plain[number.end :]
    plain = POWER_OF_TEN.sub(r"*10^\1", THOUSANDS.sub("", plain).replace("{,}", ".").replace("\\$", " "))
    plain = RAISED.sub(lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", VULGAR.sub(_fraction, plain))
    plain = BARE_MINUS.sub(r"^{\1}", MIXED.sub(_improper, plain))
    plain = TOUCHING.sub(" ", plain)
    if not IS_LATEX.search(plain):
        plain = RUN.sub(_as_latex, MARKS.sub(" ", PYTHONS_POWER.sub("^", plain)))
    return str(ROOT.sub(_root, plain))


def readable_gold(right: str) -> str:
    """A right answer, LaTeX or plain, in the form that `readable` gives to an answer in a box."""
    if IS_LATEX.search(right):
        return readable(right if "$" in right or boxed(right) is not None else f"${right}$")
    return readable(f"${PYTHONS_POWER.sub('^', right)}$")


def undecided(right: str, answer: str) -> bool:
    """Whether one number is right, and the answer leaves a choice of two or denies what it names."""
    found = numbers_in(right)
    if len(found) != 1 or (found[0].end - found[0].start) < len(right.strip()) or boxed(answer) is not None:
        return False
    return bool(numbers_in(answer)) and final_number(answer, ranges=False) is None


def _fraction(match: regex.Match[str]) -> str:
    part = Fraction(unicodedata.numeric(match["part"])).limit_denominator(10)
    return str(int(match["whole"] or 0) + part)


def _improper(match: regex.Match[str]) -> str:
    top, bottom = map(int, match["part"].split("/"))
    return f"{int(match['whole']) * bottom + top}/{bottom}"


def _root(match: regex.Match[str]) -> str:
    return f"\\sqrt{{{match[1] or match[2] or match[3]}}}"


def _as_latex(match: regex.Match[str]) -> str:
    run = match[0].rstrip(".")
    if not NEEDS_LATEX.search(run) or any(run.count(one) != run.count(other) for one, other in ("()", "{}")):
        return str(match[0])
    return f" ${run}$ {match[0][len(run) :]}"
