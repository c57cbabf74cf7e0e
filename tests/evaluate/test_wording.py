"""Words are what a reader would count; scores agree with the packages that the field uses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import sacrebleu

from limbeck.evaluate import wording
from limbeck.evaluate.wording import distinct_n, repetition, rouge_l, self_bleu, words
from limbeck.types import UserError


def test_words():
    assert words("Don't stop, it\u2019s 5km -- NOW!") == ["don't", "stop", "it\u2019s", "5km", "now"]
    assert words("snake_case and 'quoted'") == ["snake", "case", "and", "quoted"]
    assert words("\u4eca\u65e5\u306f ok") == ["\u4eca", "\u65e5", "\u306f", "ok"]
    assert words("Stra\u00dfe") == ["strasse"] and words("?! ...") == []


def test_distinct_n_by_hand():
    texts = ["a b a b", "a b c"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5), "ab ba ab | ab bc: no pair spans two texts"
    assert distinct_n(texts, 4) == 1.0
    assert distinct_n(texts, 5) is None and distinct_n([], 1) is None and distinct_n(["?"], 1) is None
    with pytest.raises(UserError):
        distinct_n(texts, 0)


def test_repetition_by_hand():
    assert repetition("a b c d e f g") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("la " * 10) == pytest.approx(6 / 7)
    assert repetition("x y x y x", 2) == pytest.approx(2 / 4)
    assert repetition("too short") is None and repetition("") is None


def made_up(count: int, vocabulary: int, seed: int, longest: int = 25) -> list[str]:
    noise = np.random.default_rng(seed)
    return [
        " ".join(f"w{word}" for word in noise.integers(0, vocabulary, noise.integers(1, longest))) for _ in range(count)
    ]


def reference_bleu(text: str, others: list[str]) -> float:
    prepared = [" ".join(words(other)) for other in others]
    return (
        sacrebleu.sentence_bleu(
            " ".join(words(text)), prepared, tokenize="none", smooth_method="exp", use_effective_order=True
        ).score
        / 100
    )


@pytest.mark.parametrize(("vocabulary", "seed"), [(6, 0), (30, 1), (400, 2)])
def test_self_bleu_agrees_with_sacrebleu(vocabulary, seed):
    texts = made_up(40, vocabulary, seed)
    expected = np.mean([reference_bleu(text, texts[:place] + texts[place + 1 :]) for place, text in enumerate(texts)])
    assert self_bleu(texts) == pytest.approx(expected, abs=1e-9)


def test_self_bleu_with_a_drawn_pool_agrees_with_sacrebleu():
    texts = made_up(60, 20, 3)
    drawn = set(np.random.default_rng(5).permutation(60)[:10].tolist())
    expected = np.mean(
        [reference_bleu(text, [texts[other] for other in drawn if other != place]) for place, text in enumerate(texts)]
    )
    assert self_bleu(texts, pool=10, seed=5) == pytest.approx(expected, abs=1e-9)


def test_self_bleu_of_copies_of_strangers_and_of_nothing():
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d e", "f g h i j"]) == 0.0
    assert self_bleu(["alone here"]) is None and self_bleu(["alone here", "?"]) is None and self_bleu([]) is None
    assert self_bleu(["Same words!", "same, words", ""]) == pytest.approx(1.0)
    with pytest.raises(UserError):
        self_bleu(["a", "b"], pool=1)


def test_rouge_l_by_hand():
    """The common subsequence `the cat the mat` has 4 of 6 words on both sides."""
    assert rouge_l("the cat sat on the mat", ["the cat lay by the mat"]) == pytest.approx(4 / 6)
    assert rouge_l("the cat sat on the mat", ["nothing", "the mat"]) == pytest.approx(2 * (2 / 6) * 1 / (2 / 6 + 1))
    assert rouge_l("running", ["runs"]) == 1.0 and rouge_l("running", ["runs"], stemmer=False) == 0.0
    assert rouge_l("", ["some words"]) == 0.0


def test_rouge_l_where_it_is_undefined():
    assert rouge_l("anything", ["?!", "\u4eca\u65e5"]) is None
    assert rouge_l("yes", ["\u4eca\u65e5", "yes"]) == 1.0
    for references in ([], "a plain string"):
        with pytest.raises(UserError, match="list"):
            rouge_l("anything", references)


def test_a_missing_package_is_named(monkeypatch):
    wording._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install limbeck\[eval\]"):
        rouge_l("yes", ["yes"])
    wording._rouge.cache_clear()
