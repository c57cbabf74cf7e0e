"""Numbers in text as people and models write them: digits of every script, signs, separators of several locales,
fractions, powers, percent.

A number can be read in more than one way ("1,2" is two numbers or a decimal, "50 %" is 50 or 0.5); all readings are
kept, the likeliest first. A comma before exactly three digits separates thousands, and a lone point is decimal, unless
`decimal` is ",". Digits that belong to a name or unit (m2, m^2, CO2, x_1) are no numbers, and neither are numbers in
words ("twelve").
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Literal

import regex

Decimal = Literal[".", ","]
SAME = {
    "\u2212": "-", "\uff0d": "-", "\ufe63": "-", "\u2013": "-", "\u2011": "-", "\u066b": ".", "\uff0e": ".",
    "\u066c": ",",    "\u00a0": "\u2009", "\u202f": "\u2009",
    "\u2019": "'", "\uff0c": "\u3001", "\uff05": "%", "\u066a": "%",
    "\ufe6a": "%", "\uff0f": "/", "\u2044": "/", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\uff04": "$",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
GROUPS = r"\\[,;:!]"  # LaTeX's narrow spaces, between thousands too
COMMAND = regex.compile(
    rf"\\(?:[dt]?frac|times|cdot)(?![A-Za-z])(*SKIP)(*FAIL)|(?<=\d,?){GROUPS}(?=\d{{3}}(?!\d))(*SKIP)(*FAIL)"
    r"|\\[A-Za-z]+|\\[,;:! ]"
)
CODES = "USD|EUR|GBP|CHF|CAD|AUD|JPY|CNY|INR|SEK|NOK|DKK|US|Rs|RM|R"
PLAIN = (
    r"\d{1,3}(?:(?:,\d{3})++|(?:\.\d{3}){2,}+|(?:'\d{3})++|(?:\u2009\d{3})++)(?:[.,]\d++)?(?!\d)"
    rf"|[1-9]\d{{0,2}}(?:(?:(?:\{{,\}}|,\\!)\d{{3}})++|(?:{GROUPS}\d{{3}})++)(?:[.,]\d++)?(?!\d)"
    r"|\d{1,2}(?:,\d{2}(?=,)){1,8}+,\d{3}(?:\.\d++)?(?!\d)|\d{1,3}(?:\.\d{3})++,\d++"
    r"|\d{1,3}(?:[ ]\d{3})++(?:[.,]\d++)?(?![ ]?\d)|\d++(?:[.,]\d++)?|\.\d++"
)
NUMBER = regex.compile(
    rf"""
    (?<![\p{{Latin}}\p{{Greek}}\p{{Cyrillic}}_^\d]|\d[.,'/]|[\^_]\{{|\^-|\^\{{-)  # of no name, unit or exponent
    (?:(?:{CODES})(?=[\d.$-]))?
    (?P<sign>(?<==[ ])-[ ]|(?<![\p{{L}}\p{{N}})\]}}%])-|\+)?
    (?P<money>[$€£¥₹])?(?P<inner>-)?
    (?:
      \\[dt]?frac[ ]?(?:\{{[ ]?(?P<top>-?\d{{1,15}})[ ]?\}}[ ]?\{{[ ]?(?P<bottom>\d{{1,15}})[ ]?\}}
        |(?P<top>\d)(?P<bottom>\d))
      |(?P<whole>\d{{1,9}})[ ](?P<over>\d{{1,6}})/(?P<under>\d{{1,6}})(?![\d/])
      |(?P<numerator>\d{{1,15}})[ ]?/[ ]?(?P<denominator>\d{{1,15}})(?![\d/.])
      |(?P<digits>{PLAIN})?(?P<vulgar>[¼½¾⅐-⅞])
      |(?P<mantissa>\d++(?:\.\d++)?)(?:[eE]|[ ]?(?:\*|[x]|\\times|\\cdot)[ ]?10(?:\^\{{?|\*\*)?(?=[-+\d⁰¹²³⁴-⁹⁻]))
       (?P<exponent>[+-]?\d{{1,3}}|[⁻]?[⁰¹²³⁴-⁹]{{1,3}})\}}?(?![A-Za-z\d])
      |(?P<base>\d{{1,15}})(?:(?:\^\{{?|\*\*)(?P<power>-?\d{{1,3}})\}}?(?!\d)|(?P<raised>⁻?[⁰¹²³⁴-⁹]{{1,3}}))
      |(?P<plain>{PLAIN})
    )
    (?:[ ]?(?:\\?(?P<percent>%|percent\b|per[ ]cent\b|Prozent\b|pour[ ]cent\b|por[ ]ciento\b|procent\b|процент)
      |(?P<scale>thousand|million|billion|trillion|Millionen|Milliarden
        |millions|millones|milliards|lakh|crore|万|萬|億|亿|만|억)
      (?!\p{{Latin}}))
     |(?:[ ](?=bn))?(?P<short>k|K|M|bn)(?![\p{{Latin}}\d_^]))?
    """,
    regex.VERBOSE,
)  # fmt: skip
SCALES = {
    "thousand": 1e3, "million": 1e6, "millionen": 1e6, "millions": 1e6, "millones": 1e6, "billion": 1e9,
    "milliarden": 1e9, "milliards": 1e9, "trillion": 1e12, "lakh": 1e5, "crore": 1e7, "万": 1e4, "萬": 1e4, "만": 1e4,
    "億": 1e8, "亿": 1e8, "억": 1e8,
}  # fmt: skip
SHORT_SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "bn": 1e9}
UNITS = ("K", "M")  # may also be kelvin and mol per litre, of what is no money
# before a number, by its own text up to it: it is negative, or denied
MINUS = regex.compile(
    r"(?<![\d]\s?)(?:\b(?:minus|negative|moins|menos|meno|минус)\s|负|負|マイナス)\s?$", regex.IGNORECASE
)
DENIED = regex.compile(
    r"(?:\b(?:not|isn['’]t|never|nicht|pas|не|non è|não é|no es|n['’]est pas|niet|inte|ikke|nie)\s"
    r"(?:[$€£¥]|\*\*|equal to )?"
    r"|不是|并非|不等于|ليس )$",
    regex.IGNORECASE,
)  # fmt: skip
EITHER = regex.compile(
    r"[^\d\n]{0,16}?(?:\b(?:or|oder|ou|или|o bien|eller|of|lub|maybe|perhaps)\b|或者?|または|또는|أو|या)[^\d\n]{0,16}",
    regex.IGNORECASE,
)
SPAN = regex.compile(r"[ ]?[-–~～〜][ ]?")


@dataclass(frozen=True)
class WrittenNumber:
    """A number at text[start:end]. `readings` are its possible values, the likeliest first."""

    start: int
    end: int
    readings: tuple[float, ...]

    @property
    def value(self) -> float:
        return self.readings[0]

    @property
    def plain(self) -> str:
        """The likeliest value, the same text for the same value: no separators, no trailing zeros, 15 digits."""
        return f"{self.value:.15g}"

    def may_be(self, value: float) -> bool:
        """Whether a reading equals the value, but for the last bits."""
        return any(math.isclose(reading, value, rel_tol=1e-9) for reading in self.readings)


def numbers_in(text: str, decimal: Decimal = ".") -> list[WrittenNumber]:
    """The numbers in a text, in their order."""
    plain = _simplified(text)
    found = []
    for match in NUMBER.finditer(plain):
        readings = _readings(match, decimal)
        before = plain[max(0, match.start() - 24) : match.start()]
        if (match["sign"] or "").startswith("-") or match["inner"] or MINUS.search(before):
            readings = tuple(-reading for reading in readings)
        found.append(WrittenNumber(match.start(), match.end(), readings))
    return found


def final_number(text: str, decimal: Decimal = ".", ranges: bool = True) -> WrittenNumber | None:
    """The last number that the text does not deny ("not 12"); None without one, or where it offers two: "12 or 13",
    and "12-13" if that can be a range."""
    found = [number for number in numbers_in(text, decimal) if not denied(text, number)]
    if len(found) > 1 and not any(map(found[-2].may_be, found[-1].readings)):
        between = text[found[-2].end : found[-1].start]
        if EITHER.fullmatch(between) or (ranges and SPAN.fullmatch(between)):
            return None
    return found[-1] if found else None


def denied(text: str, number: WrittenNumber) -> bool:
    """Whether the words before a number say that it is not the one."""
    return DENIED.search(text[max(0, number.start - 24) : number.start]) is not None


def ascii_digits(text: str) -> str:
    """The text with one form of every digit, sign and separator; as long as before."""
    if text.isascii():
        return text
    return "".join(
        SAME.get(character) or (str(unicodedata.decimal(character)) if character.isdecimal() else character)
        for character in text
    )


def _simplified(text: str) -> str:
    """The same with blanks for LaTeX's commands."""
    plain = ascii_digits(text)
    return str(COMMAND.sub(lambda match: " " * len(match[0]), plain)) if "\\" in plain else plain


def _readings(match: regex.Match[str], decimal: Decimal) -> tuple[float, ...]:
    """The values that what was matched may have, without its sign."""
    part = match.groupdict()
    if part["bottom"] or part["denominator"]:
        values = _ratio(part["top"] or part["numerator"], part["bottom"] or part["denominator"])
    elif part["under"]:
        values = tuple(float(part["whole"]) + each for each in _ratio(part["over"], part["under"]))
    elif part["vulgar"]:
        whole = _plain(part["digits"], decimal) if part["digits"] else (0.0,)
        values = (whole[0] + unicodedata.numeric(part["vulgar"]),)
    elif part["mantissa"]:
        values = (float(f"{part['mantissa']}e{part['exponent'].translate(SUPERSCRIPTS)}"),)
    elif part["base"]:
        values = _power(float(part["base"]), int((part["power"] or part["raised"]).translate(SUPERSCRIPTS)))
    else:
        values = _plain(part["plain"], decimal)
    if part["percent"]:
        return (*values, *(value / 100 for value in values))
    if part["scale"]:
        factor = SCALES[part["scale"].lower()]
        return (*(value * factor for value in values), *values)
    if part["short"]:
        scaled = tuple(value * SHORT_SCALES[part["short"]] for value in values)
        return (*scaled, *values) if part["short"] in UNITS and not part["money"] else scaled
    return values


def _ratio(top: str, bottom: str) -> tuple[float, ...]:
    return (float(top) / float(bottom),) if float(bottom) else (math.nan,)


def _power(base: float, exponent: int) -> tuple[float, ...]:
    try:
        return (base**exponent,)
    except (OverflowError, ZeroDivisionError):
        return (math.nan,)


def _plain(digits: str, decimal: Decimal) -> tuple[float, ...]:
    """The values of digits with separators."""
    spaced = digits.split(" ")
    if len(spaced) > 1:  # 12 345: thousands, or two numbers
        return (*_plain("".join(spaced), decimal), *_plain(spaced[-1], decimal))
    digits = regex.sub(GROUPS, "", digits).replace("{,}", ",").replace("\u2009", "").replace("'", "")
    points, commas = digits.count("."), digits.count(",")
    if points and commas:  # the last separator is the decimal one
        last = max(digits.rfind("."), digits.rfind(","))
        return (float(f"{digits[:last].replace(',', '').replace('.', '') or '0'}.{digits[last + 1 :]}"),)
    if points > 1 or commas > 1:
        return (float(digits.replace(".", "").replace(",", "")),)
    if not commas:
        after = digits.partition(".")[2]
        grouped = decimal == "," and points and len(after) == 3 and not digits.startswith("0")
        return (float(digits.replace(".", "") if grouped else digits),)
    before, _, after = digits.partition(",")
    as_decimal = float(f"{before}.{after}")
    if decimal == "," or (before.startswith("0") and before == "0"):
        return (as_decimal,)
    if len(after) == 3:
        return (float(before + after),)
    return (as_decimal, float(after))  # one decimal, or two numbers
