"""How alike texts are: against the plain definitions, and exactly what comparing with everything would find."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.elicit.similar import (
    Novelty,
    common_subsequence,
    jaccard,
    k_center,
    minhash,
    near_duplicates,
    resembling,
    rouge_l,
    shingles,
    tokens,
    vectors,
)

TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=0, max_size=12).map(" ".join), max_size=25)


def plain_subsequence(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcde"), max_size=70))
def test_the_longest_common_subsequence_is_the_plain_one(one, other):
    assert common_subsequence(one, other) == plain_subsequence(one, other) == common_subsequence(other, one)


def test_rouge_l_is_that_of_the_field():
    from rouge_score.rouge_scorer import RougeScorer

    scorer, noise = RougeScorer(["rougeL"], use_stemmer=False), random.Random(0)
    for _ in range(100):
        one, other = (
            " ".join(noise.choices("the cat sat on a mat, 12 dogs ran".split(), k=noise.randint(1, 15)))
            for _ in range(2)
        )
        assert rouge_l(tokens(one), tokens(other)) == pytest.approx(
            scorer.score(one, other)["rougeL"].fmeasure, abs=1e-12
        )


@settings(max_examples=300)
@given(TEXTS, st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0]), st.booleans())
def test_novelty_finds_what_comparing_with_everything_finds(texts, threshold, told):
    index, kept = Novelty(threshold, texts if told else ()), []
    for text in texts:
        near = [score for other in kept if (score := rouge_l(tokens(text), tokens(other))) > threshold]
        assert index.add(text) == (not near)
        assert index.nearest in (near or [0.0])
        if not near:
            kept.append(text)
    assert len(index) == len(kept)


def test_novelty_at_the_threshold_itself():
    index = Novelty(0.5)
    assert index.add("a b c d") and index.add("a b x y")  # 2 of 4 and 4: exactly 0.5, not above it
    assert not index.add("a b c y") and index.nearest == 0.75
    index.remember("q r s t")
    assert not index.add("q r s t") and index.nearest == 1.0
    with pytest.raises(ValueError, match="above 0"):
        Novelty(0)


def sentences(count, seed=0):
    noise = random.Random(seed)
    known = [f"w{n}" for n in range(500)]
    return [" ".join(noise.choices(known, k=40)) for _ in range(count)]


def test_signatures_agree_as_often_as_texts_are_alike():
    noise, pairs = random.Random(1), []
    for text in sentences(240):
        words = text.split()
        for place in noise.sample(range(40), noise.randint(0, 6)):
            words[place] = "other"
        pairs.append((text, " ".join(words)))
    signatures = minhash([text for pair in pairs for text in pair])
    errors = [
        float((signatures[2 * n] == signatures[2 * n + 1]).mean()) - jaccard(shingles(one), shingles(other))
        for n, (one, other) in enumerate(pairs)
    ]
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.08  # sqrt(J (1 - J) / 128) is at most 0.044


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_exact_where_found_and_mostly_found(threshold):
    noise, texts = random.Random(2), sentences(150)
    for text in sentences(150):
        words = text.split()
        for place in noise.sample(range(40), noise.randint(0, 4)):
            words[place] = "changed"
        texts.append(" ".join(words))
    found = near_duplicates(texts, threshold)
    assert all(
        twin is None or jaccard(shingles(texts[n]), shingles(texts[twin])) >= threshold for n, twin in enumerate(found)
    )
    above = [n for n in range(150, 300) if jaccard(shingles(texts[n]), shingles(texts[n - 150])) >= threshold]
    assert len(above) > 30 and sum(found[n] is not None for n in above) >= 0.85 * len(above)
    assert found[:150] == [None] * 150 and found == near_duplicates(texts, threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_texts_that_resemble_others_are_all_found(threshold):
    noise, texts = random.Random(3), ["", "a b", *sentences(60)]
    for text in texts[:60]:
        words = text.split()
        texts.append(" ".join("changed" if noise.random() < 0.06 else word for word in words))
    places, among = range(0, len(texts), 2), range(0, len(texts), 3)
    found = {
        place
        for place in places
        if any(
            jaccard(shingles(texts[place]), shingles(texts[other])) >= threshold for other in among if other != place
        )
    }
    assert resembling(texts, places, among, threshold) == found and (threshold == 1.0 or 5 < len(found) < 55)


def test_equal_and_empty_texts():
    assert near_duplicates(["a b c d e f", "x", "a b c d e f", "", ""], 1.0) == [None, None, 0, None, None]
    assert rouge_l([], ["a"]) == 0.0 and minhash([]).shape == (0, 128)


def test_k_center_takes_the_farthest_each_time():
    points = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 3]]
    assert k_center(points, 4) == [0, 2, 4, 5] and sorted(k_center(points, 9)) == list(range(6))
    assert k_center(vectors([]), 3) == []
    texts = ["the cat sat", "the cat sat", "a dog ran", "the cat sat down"]
    assert k_center(vectors(texts), 2) == [0, 2]
    norms = np.linalg.norm(vectors([*texts, ""]), axis=1)
    assert np.allclose(norms, [1, 1, 1, 1, 0])
