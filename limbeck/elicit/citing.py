"""A verifier: citations of numbered passages, the quotations beside them, and answers that say that nothing answers.

Citations are in brackets of any script: [1], [1, 2], [1-3], [^1], [Source 1], 【1】. A quotation may leave out parts (…
or [...]). Saying that there is no answer is understood in twelve languages. Not covered: whether a cited passage
supports the claim beside it, which of several cited passages a quotation belongs to, and quotations in single quotes.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from limbeck.elicit.checks import normalised
from limbeck.elicit.labels import whole

BRACKETS = str.maketrans("【】〔〕’‘", "[][]''")
ONE = r"(?:(?:passage|source|doc(?:ument)?|text|ref(?:erence)?|quelle|fuente|источник|段落|文献)s?\s?[:#]?\s?)?\d{1,9}"
CITED = re.compile(
    rf"\[\s?\^?({ONE}(?:\s?(?:,\s?and|[,;、&–-]|and|to|und|et|y|и|和)\s?{ONE})*)\s?(?:†[^\[\]\n]{{0,80}})?\\?\]",
    re.IGNORECASE,
)
SPAN = re.compile(r"(\d+)\s?(?:[–-]|\bto\b)\s?(\d+)|(\d+)")
LONGEST = 1000  # passages in one span
QUOTED = re.compile(  # after a digit, " is an inch
    r"(?<!\d)\"([^\"]+)\"|“([^“”\"]+)[”“\"]|„([^„“”\"]+)[“”\"]|«([^«»]+)»|「([^「」]+)」|『([^『』]+)』"
)
CAPITAL = re.compile(r"\[(\w)\](?=\w)")  # "[T]he"
LEFT_OUT = re.compile(r"\.{3,}|\[[^\[\]]{0,80}\]")
VOWELS = re.compile("[\u064b-\u0652]")  # that Arabic may write or leave out
ABSTAINS = re.compile(
    r"(?:\bcannot|can't|could(?:n't| not)|unable to|not able to|impossible to) (?:be )?(?:answer|say|tell|determin"
    r"|know)|(?:\bnot|n't) (?:be |been |explicitly |directly |actually )?(?:answer|say|state|contain|mention|include"
    r"|provide|specif|give|indicate|discuss|tell|address|know)"
    r"|\bno (?:answer|information|mention|indication|evidence|relevant)|\bnone of the"
    r"|\b(?:not enough|insufficient) (?:info|context|evid)|\bunanswerable|^\W*(?:unknown|n/a)\W*$"
    r"|\bnicht (?:erwähnt|genannt|angegeben|beantwort|bekannt|enthalten|hervor)|\bkeine (?:Information|Angabe|Antwort)"
    r"|\b(?:sag|nenn|erwähn|enth[aä]lt)\w*[^.!?\n]{0,30} (?:nicht|keine)\b"
    r"|(?:\bne |\bn')[^.!?\n]{0,20}(?:di[ts]|mentionn|précis|contien|indiqu|permet|répond)\w*[^.!?\n]{0,12} pas\b"
    r"|\bpas (?:mentionn|précis|indiqu|possible d)|\baucune (?:info|réponse|mention)|\bimpossible de (?:répondre|dire)"
    r"|\b(?:no|não|non) (?:(?:se|lo|la|o|si|é|è|es|está|viene|hay|há|ha|c'è|puedo|posso|puede|pode|può) ){0,3}"
    r"(?:menci|menzi|dice|dicen|diz|indica|especific|contien|contém|informa|respond|rispond)"
    r"|\bне (?:указ|упом|содерж|говор|сказ|могу|известн)|\bнет (?:информ|ответ|данн|сведен)|невозможно (?:отве|опред)"
    r"|(?:没有?|沒有?|未)(?:明[确確])?(?:提[到及供]|[说說]明|[给給]出|相[关關]|指出|包含|答案|信息|資訊|回答)|不知道"
    r"|(?:[无無]法|不能)[^。！？\n]{0,20}(?:回答|[确確]定|判[断斷]|得知|知道)"
    r"|(?:記載|言及|記述|情報|説明|述べ|書か|答え|触れ|わか|分か|判断|回答)[^。！？\n]{0,10}(?:ない|ません|なし)"
    r"|(?:언급|정보|나와|답|알|명시|제공)[^.!?\n]{0,12}[않없]"
    r"|(?:لا|لم) [يتأن](?:ذكر|وجد|مكن|حتوي|جيب|عرف|حدد|قول|تضمن|ستطيع)|غير (?:مذكور|محدد|معروف)"
    r"|(?:उल्लेख|जानकारी|उत्तर|जवाब|बताया|कहा|पता)[^।.!?\n]{0,16}नहीं",
    re.IGNORECASE,
)


def citations(check: dict[str, Any], answer: str) -> bool:
    """Whether every [n] names one of the `gold` passages (all passages by default), at least one is cited (with `all`,
    every gold one), and every quotation is in a cited passage. If no passage answers the question (`answerable:
    false`), the answer must say so and cite nothing."""
    passages = check["passages"]
    plain = unicodedata.normalize("NFKC", answer).translate(BRACKETS)
    cited = {number for match in CITED.finditer(plain.replace("\\[", "[")) for number in _named(match[1])}
    if not check.get("answerable", True):
        return not cited and ABSTAINS.search(VOWELS.sub("", plain)) is not None
    gold = set(check.get("gold", range(1, len(passages) + 1)))
    if not cited or not cited <= gold or not all(1 <= number <= len(passages) for number in cited):
        return False
    if check.get("all") and cited != gold:
        return False
    texts = [normalised(passages[number - 1]) for number in sorted(cited)]
    quotes = ["".join(filter(None, match.groups())) for match in QUOTED.finditer(plain)]
    return all(any(_quotes(quote, text) for text in texts) for quote in quotes)


def _named(inside: str) -> set[int]:
    """The numbers that the inside of a citation names; 0, which is no passage, for a span that goes backwards."""
    numbers: set[int] = set()
    for first, last, single in SPAN.findall(inside):
        low, high = int(single or first), int(single or last)
        numbers |= set(range(low, min(high, low + LONGEST) + 1)) if low <= high else {0}
    return numbers


def _quotes(quote: str, passage: str) -> bool:
    """Whether the parts of a quotation are in a passage, as whole words and in their order."""
    at = 0
    for part in LEFT_OUT.split(CAPITAL.sub(r"\1", CITED.sub(" ", quote))):
        found = whole(normalised(part)).search(passage, at)
        if found is None:
            return False
        at = found.end()
    return True
