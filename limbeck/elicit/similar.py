"""How similar texts are: ROUGE-L with all accepted ones, near-duplicates by MinHash, the most different by k-center.

ROUGE-L is the F1 of the longest common subsequence of words (Lin 2004), without stemming. `Novelty` gives exactly the
result of a comparison with every accepted text, but compares with few of them: two texts with F1 > t share at least t
(m + n) / 2 words, so their lengths m and n can't differ much, and several of the rarest words of each are among the
rarest of the other (prefix filtering, Chaudhuri et al. 2006; several matches, Wang et al. 2012).

Shapes: N texts, P permutations, D dimensions of a text's vector.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

TOKEN = re.compile(r"[a-z0-9]+|[^\W\d_]", re.UNICODE)
PERMUTATIONS = 128
SHINGLE = 5
SHORT = 20
MATCHES = 6
DIMENSIONS = 2**12
Floats = NDArray[np.float32]


def tokens(text: str) -> list[str]:
    """Words in lower case: runs of Latin letters and digits; every letter of another script counts as a word."""
    return TOKEN.findall(text.lower())


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004): one step per word of
    `other`."""
    return _subsequence(_places(one), len(one), other)


def _subsequence(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    row = full = (1 << length) - 1
    for token in other:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return length - row.bit_count()


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words; 0 if one is empty."""
    common = common_subsequence(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


class Novelty:
    """Accepts a text unless its ROUGE-L with an accepted one is above `threshold`.

    Args:
        expected: texts like those to come, which show what words are rare. They change the speed, not the result.
    """

    def __init__(self, threshold: float, expected: Iterable[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a threshold of ROUGE-L must be above 0 and at most 1; got {threshold}")
        self.threshold = threshold
        self.nearest = 0.0
        self._frequency = Counter(word for text in expected for word in set(tokens(text)))
        self._accepted: list[list[str]] = []
        # by range of lengths: (word, n-th occurrence) -> the texts of such a length that have it among their rarest
        self._index: dict[tuple[int, int], dict[tuple[str, int], list[int]]] = {}
        self._accepted_exactly: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return len(self._accepted)

    def add(self, text: str) -> bool:
        """Accept the text and return True, or return False if it is too similar to an accepted one; `nearest` is then
        the F1 with that one."""
        words = tokens(text)
        self.nearest = self._too_similar(words)
        if self.nearest:
            return False
        self._remember(words)
        return True

    def remember(self, text: str) -> None:
        """Accept the text, however similar it is to others."""
        self._remember(tokens(text))

    def _too_similar(self, words: list[str]) -> float:
        """The F1 with an accepted text, if one is above the threshold, else 0."""
        if not words or self.threshold == 1:
            return 0.0
        if tuple(words) in self._accepted_exactly:
            return 1.0
        places = _places(words)
        entries = self._ordered(words)
        for (low, high), index in self._index.items():
            if 2 * min(len(words), high) <= self.threshold * (len(words) + min(max(low, len(words)), high)):
                continue  # even the closest length in the range is too different
            least = self._least(len(words) + low)
            enough = min(MATCHES, least)
            matches = Counter(
                chain.from_iterable(index.get(entry, ()) for entry in entries[: len(words) - least + MATCHES])
            )
            for number in [number for number, count in matches.items() if count >= enough]:
                other = self._accepted[number]
                f1 = 2 * _subsequence(places, len(words), other) / (len(words) + len(other))
                if f1 > self.threshold:
                    return f1
        return 0.0

    def _least(self, length: int) -> int:
        """The fewest common words of two texts with `length` words together whose F1 is above the threshold."""
        return math.floor(self.threshold * length / 2 * (1 - 1e-12)) + 1

    def _ordered(self, words: list[str]) -> list[tuple[str, int]]:
        """The words as (word, n-th occurrence), the rarest first.

        If two texts of m and n words share at least c, then the first m - c + MATCHES entries of one and the first n -
        c + MATCHES of the other share at least MATCHES, or c if that is less.
        """
        occurrences: Counter[str] = Counter()
        entries = []
        for word in words:
            occurrences[word] += 1
            entries.append((word, occurrences[word]))
        return sorted(
            entries,
            key=lambda entry: (-entry[1], self._frequency[entry[0]], entry[0] in COMMON, -len(entry[0]), entry[0]),
        )

    def _remember(self, words: list[str]) -> None:
        number = len(self._accepted)
        self._accepted.append(words)
        self._accepted_exactly.add(tuple(words))
        # the other text must have all common words, so it has more than m t / (2 - t)
        least = self._least(len(words) + math.floor(len(words) * self.threshold / (2 - self.threshold) * (1 - 1e-12)))
        index = self._index.setdefault(_range(len(words)), {})
        for entry in self._ordered(words)[: len(words) - least + MATCHES]:
            index.setdefault(entry, []).append(number)


def _range(length: int) -> tuple[int, int]:
    """(shortest, longest) length in the range of this length; ranges span some 15 %."""
    low = 0
    high = 1
    while high < length:
        low, high = high + 1, max(high + 1, high * 115 // 100)
    return low, high


def _places(words: Sequence[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    return places


COMMON = frozenset(
    "a about after all also an and any are as at be because been but by can could do does each few find first for from"
    " get give given had has have he her his how i if in into is it its just like list make many may me more most my"
    " new no not of on one only or other our out over people please should sentence so some such text than that the"
    " their them then there these they this three time to two up use used user using was we well were what when where"
    " which who why will with word words would write you your".split()
)


def minhash(texts: Sequence[str]) -> NDArray[np.uint64]:
    """[N, P] signatures of the texts' sets of word shingles (5 words; 3 for texts of less than 20). Two signatures
    agree at a place with a probability equal to the Jaccard similarity of the sets."""
    rng = np.random.Generator(np.random.PCG64(20))
    top = np.iinfo(np.uint64).max
    multiply, shift = rng.integers(0, top, (2, PERMUTATIONS), dtype=np.uint64)
    multiply |= np.uint64(1)  # odd, so that the product mod 2**64 is a permutation
    signatures_NP = np.full((len(texts), PERMUTATIONS), top, dtype=np.uint64)
    for number, text in enumerate(texts):
        hashes = np.array([_hash(shingle) for shingle in sorted(shingles(text))], dtype=np.uint64)
        if len(hashes):
            signatures_NP[number] = (hashes[:, None] * multiply + shift).min(0)
    return signatures_NP


def _hash(shingle: tuple[str, ...]) -> int:
    return crc32(" ".join(shingle).encode())


def shingles(text: str) -> set[tuple[str, ...]]:
    words = tokens(text)
    size = SHINGLE if len(words) >= SHORT else 3
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))} if words else set()


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For every text the place of an earlier kept one whose shingles have a Jaccard similarity of at least `threshold`;
    None if there is none, and the text is kept.

    Candidates agree in one band of the signature and are then compared exactly, so no text is wrongly called a
    duplicate. The bands are so narrow that a pair at the threshold is found with a probability of at least 0.9.
    """
    rows = max(r for r in range(1, 33) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= 0.9) if threshold < 1 else 32
    signatures_NP = minhash(texts)
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(PERMUTATIONS // rows)]
    kept_shingles: dict[int, set[tuple[str, ...]]] = {}
    twins: list[int | None] = []
    for number, text in enumerate(texts):
        own = shingles(text)
        keys = [signatures_NP[number, band * rows : (band + 1) * rows].tobytes() for band in range(len(tables))]
        candidates = sorted({other for table, key in zip(tables, keys, strict=True) for other in table.get(key, ())})
        twin = next((other for other in candidates if own and jaccard(own, kept_shingles[other]) >= threshold), None)
        twins.append(twin)
        if twin is None and own:
            kept_shingles[number] = own
            for table, key in zip(tables, keys, strict=True):
                table.setdefault(key, []).append(number)
    return twins


def resembling(texts: Sequence[str], places: Sequence[int], among: Iterable[int], threshold: float) -> set[int]:
    """Those of `places` whose text has shingles with a Jaccard similarity of at least `threshold` to the text at
    another place of `among`. Exact, and fast for many texts in `among` and few in `places`.

    Two sets that similar share at least `threshold` of either's members, so the other set has one of any of its
    members but that share (prefix filtering, Chaudhuri et al. 2006): the rarest of them are looked up.
    """
    own = {place: shingles(texts[place]) for place in places}
    frequency = Counter(shingle for found in own.values() for shingle in found)
    index: dict[tuple[str, ...], set[int]] = {}
    for place, found in own.items():
        looked_up = len(found) - math.ceil(threshold * len(found) * (1 - 1e-12)) + 1
        for shingle in sorted(found, key=lambda one: (frequency[one], one))[:looked_up]:
            index.setdefault(shingle, set()).add(place)
    alike: set[int] = set()
    for other in among:
        found = shingles(texts[other])
        candidates = set().union(*(index[shingle] for shingle in found if shingle in index)) - alike - {other}
        alike |= {place for place in candidates if jaccard(own[place], found) >= threshold}
    return alike


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def vectors(texts: Sequence[str]) -> Floats:
    """[N, D] TF-IDF vectors of unit length, with words hashed into DIMENSIONS places, of which D are used. Empty texts
    are all zeros."""
    rows = [Counter(crc32(word.encode()) % DIMENSIONS for word in tokens(text)) for text in texts]
    frequency = Counter(place for row in rows for place in row)
    columns = {place: column for column, place in enumerate(sorted(frequency))}
    vectors_ND = np.zeros((len(texts), max(1, len(columns))), dtype=np.float32)
    for number, row in enumerate(rows):
        for place, count in row.items():
            rarity = math.log((1 + len(texts)) / (1 + frequency[place]))
            vectors_ND[number, columns[place]] = (1 + math.log(count)) * rarity + 1e-12
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    np.divide(vectors_ND, norms_N1, out=vectors_ND, where=norms_N1 > 0)
    return vectors_ND


def k_center(points_ND: Floats, count: int) -> list[int]:
    """Places of `count` points far from each other (greedy k-center, Gonzalez 1985): the first point, then always the
    one farthest by cosine from those already chosen; of equally far ones, the first."""
    if not len(points_ND):
        return []
    chosen = [0]
    nearest_N = points_ND @ points_ND[0]
    while len(chosen) < min(count, len(points_ND)):
        nearest_N[chosen] = np.inf
        chosen.append(int(nearest_N.argmin()))
        nearest_N = np.maximum(nearest_N, points_ND @ points_ND[chosen[-1]])
    return chosen
