"""Properties of texts as strings of words: variety, repetition, likeness to each other and to references.

A word is a run of letters and digits, lower case, with apostrophes inside it; in Chinese and Japanese script every
character is one. Scripts without spaces other than these (Thai, say) are not covered: a whole phrase is one word there.
What is undefined, such as the variety of no words, is None and never 0.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from limbeck.types import UserError

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['\u2019][^\W_{CJK}]+)*")
ORDERS = 4
POOL = 1000

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The text's words, lower case, without punctuation."""
    return WORD.findall(text.casefold())


def distinct_n(texts: Sequence[str], n: int = 2) -> float | None:
    """Different n-grams / all n-grams, over all texts together (Li et al. 2016). None where no text has n words.

    It falls as text grows: compare systems on the same prompts.
    """
    grams = Counter(gram for text in texts for gram in _grams(words(text), n))
    return len(grams) / grams.total() if grams else None


def repetition(text: str, n: int = 4) -> float | None:
    """The share of a text's n-grams that occurred in it before. None where the text has fewer than n words."""
    grams = Counter(_grams(words(text), n))
    return 1 - len(grams) / grams.total() if grams else None


def self_bleu(texts: Sequence[str], pool: int = POOL, seed: int = 0) -> float | None:
    """The mean over texts of BLEU-4 against all the others, 0 to 1: high where they are alike (Zhu et al. 2018).

    Sentence BLEU as sacrebleu computes it: up to the longest n-gram that a text has; an order without a match counts as
    1/2, 1/4, ... of one match (NIST smoothing); no common word at all gives 0; the nearest length of a reference, the
    shorter of two, enters the brevity penalty. Of more than `pool` texts, that many are drawn as references of them
    all. More references mean higher values: compare systems by equally many texts. Texts without a word are left out.

    Time and memory grow with the number of words, not with the number of pairs: for every n-gram the pool's two largest
    counts are kept, the second for the text that holds the largest itself.

    Returns:
        None where fewer than two texts have a word.
    """
    word_lists = [each for each in map(words, texts) if each]
    if pool < 2:
        raise UserError("self-BLEU needs a pool of two references at least")
    if len(word_lists) < 2:
        return None
    picks = range(len(word_lists))
    references = set(
        picks if len(word_lists) <= pool else np.random.default_rng(seed).permutation(len(word_lists))[:pool].tolist()
    )
    largest: dict[Gram, tuple[int, int, int]] = {}  # the largest count, its text, the second largest
    for index in sorted(references):
        for gram, count in _counts(word_lists[index]).items():
            best, owner, second = largest.get(gram, (0, -1, 0))
            if count > best:
                largest[gram] = (count, index, best)
            elif count > second:
                largest[gram] = (best, owner, count)
    lengths = Counter(len(word_lists[index]) for index in references)
    scores = (_bleu(word_lists[index], index, largest, lengths, in_pool=index in references) for index in picks)
    return math.fsum(scores) / len(word_lists)


def rouge_l(prediction: str, references: Sequence[str], stemmer: bool = True) -> float | None:
    """The largest F1 of the longest common subsequence with a reference (ROUGE-L, Lin 2004), by Google's rouge-score.

    That package knows Latin letters without accents and digits only. References without any are left out; None where
    none is left. A prediction without any scores 0.

    Raises:
        UserError: no reference, or rouge-score is not installed.
    """
    if isinstance(references, str) or not references:
        raise UserError("ROUGE-L needs a list of at least one reference text")
    latin = [reference for reference in references if re.search(r"[a-z0-9]", reference.lower())]
    scorer = _rouge(stemmer)
    return max((float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in latin), default=None)


def _grams(tokens: Sequence[str], n: int) -> zip[Gram]:
    if n < 1:
        raise UserError(f"n-grams have one word at least, not {n}")
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _counts(tokens: Sequence[str]) -> Counter[Gram]:
    """How often every n-gram of one to four words occurs."""
    return Counter(gram for order in range(1, ORDERS + 1) for gram in _grams(tokens, order))


def _bleu(
    tokens: Sequence[str], index: int, largest: dict[Gram, tuple[int, int, int]], lengths: Counter[int], in_pool: bool
) -> float:
    """BLEU of text `index` against the pool without itself; `in_pool` says whether it is one of it."""
    matched = [0] * ORDERS
    for gram, count in _counts(tokens).items():
        best, owner, second = largest.get(gram, (0, -1, 0))
        matched[len(gram) - 1] += min(count, second if owner == index else best)
    if not matched[0]:
        return 0.0
    orders = min(ORDERS, len(tokens))
    share = 1.0
    log_precision = 0.0
    for order in range(orders):
        share = share if matched[order] else share / 2
        log_precision += math.log((matched[order] or share) / (len(tokens) - order))
    others = (other for other, texts in lengths.items() if texts > (in_pool and other == len(tokens)))
    _, nearest = min((abs(other - len(tokens)), other) for other in others)
    return math.exp(log_precision / orders + min(0.0, 1 - nearest / len(tokens)))


@lru_cache(maxsize=2)
def _rouge(stemmer: bool) -> Any:
    try:
        scorer = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise UserError("ROUGE-L needs the package rouge-score: pip install limbeck[eval]") from error
    return scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
