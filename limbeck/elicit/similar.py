"""How alike texts are: ROUGE-L against all that was accepted before, near-duplicates by MinHash, the most different
ones by k-center.

ROUGE-L is F1 of the longest common subsequence of words (Lin 2004), without stemming. `Novelty` finds exactly what
comparing with every accepted text would find, but compares with few: two texts with F1 > t have at least t (m + n) / 2
words in common, so that their lengths m and n can't differ much, and several of the rarest words of either are among
those of the other (prefix filtering, Chaudhuri et al. 2006; several matches, Wang et al. 2012).

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
    """Words in lower case: runs of Latin letters and digits; of other scripts every letter by itself."""
    return TOKEN.findall(text.lower())


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004): a step per word of
    `other`."""
    return _subsequence(_places(one), len(one), other)


def _subsequence(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    row = full = (1 << length) - 1
    for token in other:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return length - row.bit_count()


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words; 0 where one is empty."""
    found = common_subsequence(one, other)
    return 2 * found / (len(one) + len(other)) if found else 0.0


class Novelty:
    """Accepts a text unless its ROUGE-L with one that was accepted before is above `threshold`.

    Args:
        expected: texts like those to come, by which rare words are told from common ones. It changes the time and not
            the result.
    """

    def __init__(self, threshold: float, expected: Iterable[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a threshold of ROUGE-L lies above 0 and is at most 1; got {threshold}")
        self.threshold = threshold
        self.nearest = 0.0
        self._frequency = Counter(word for text in expected for word in set(tokens(text)))
        self._known: list[list[str]] = []
        # by length in words, in steps of a few: the n-th occurrence of a word -> texts of that length that have it
        # among their rarest
        self._having: dict[tuple[int, int], dict[tuple[str, int], list[int]]] = {}
        self._exact: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, text: str) -> bool:
        """True, and remembered, if no remembered text is above the threshold; else False, and `nearest` is the F1 that
        barred it."""
        words = tokens(text)
        self.nearest = self._barred(words)
        if self.nearest:
            return False
        self._remember(words)
        return True

    def remember(self, text: str) -> None:
        """Take the text in, whatever it is like."""
        self._remember(tokens(text))

    def _barred(self, words: list[str]) -> float:
        """The F1 of a remembered text above the threshold, 0 where there is none."""
        if not words or self.threshold == 1:
            return 0.0
        if tuple(words) in self._exact:
            return 1.0
        places = _places(words)
        entries = self._ordered(words)
        for (low, high), having in self._having.items():
            if 2 * min(len(words), high) <= self.threshold * (len(words) + min(max(low, len(words)), high)):
                continue  # even the length in it that is nearest to this one is too far from it
            least = self._least(len(words) + low)
            enough = min(MATCHES, least)
            met = Counter(
                chain.from_iterable(having.get(entry, ()) for entry in entries[: len(words) - least + MATCHES])
            )
            for number in [number for number, matches in met.items() if matches >= enough]:
                known = self._known[number]
                found = 2 * _subsequence(places, len(words), known) / (len(words) + len(known))
                if found > self.threshold:
                    return found
        return 0.0

    def _least(self, length: int) -> int:
        """How many words two texts of so many words together have in common, at least, if F1 is above the threshold."""
        return math.floor(self.threshold * length / 2 * (1 - 1e-12)) + 1

    def _ordered(self, words: list[str]) -> list[tuple[str, int]]:
        """Its words, the rarest first, a repeated one counted as (word, n-th). Of texts that must have c words in
        common, the first m - c + MATCHES of m words in one and the first n - c + MATCHES of n in the other have MATCHES
        of them, or c, where that is less."""
        seen: Counter[str] = Counter()
        entries = []
        for word in words:
            seen[word] += 1
            entries.append((word, seen[word]))
        return sorted(
            entries,
            key=lambda entry: (-entry[1], self._frequency[entry[0]], entry[0] in COMMON, -len(entry[0]), entry[0]),
        )

    def _remember(self, words: list[str]) -> None:
        number = len(self._known)
        self._known.append(words)
        self._exact.add(tuple(words))
        # as no more words can be common than the other text has, that one has more than m t / (2 - t)
        least = self._least(len(words) + math.floor(len(words) * self.threshold / (2 - self.threshold) * (1 - 1e-12)))
        having = self._having.setdefault(_range(len(words)), {})
        for entry in self._ordered(words)[: len(words) - least + MATCHES]:
            having.setdefault(entry, []).append(number)


def _range(length: int) -> tuple[int, int]:
    """(first, last) of the lengths that are kept together: some 15 % apart."""
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
    """[N, P] signatures of the texts' sets of word shingles (5 words; 3 for texts under 20): two agree at a place with
    the probability of their Jaccard similarity."""
    noise = np.random.Generator(np.random.PCG64(20))
    top = np.iinfo(np.uint64).max
    multiply, shift = noise.integers(0, top, (2, PERMUTATIONS), dtype=np.uint64)
    multiply |= np.uint64(1)  # odd, so that the product mod 2**64 is a permutation
    found = np.full((len(texts), PERMUTATIONS), top, dtype=np.uint64)
    for number, text in enumerate(texts):
        hashes = np.array([_hash(shingle) for shingle in sorted(shingles(text))], dtype=np.uint64)
        if len(hashes):
            found[number] = (hashes[:, None] * multiply + shift).min(0)
    return found


def _hash(shingle: tuple[str, ...]) -> int:
    return crc32(" ".join(shingle).encode())


def shingles(text: str) -> set[tuple[str, ...]]:
    words = tokens(text)
    size = SHINGLE if len(words) >= SHORT else 3
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))} if words else set()


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For every text an earlier kept one whose Jaccard similarity of shingles is at least `threshold`, or None: it is
    kept.

    Candidates agree in one of the signature's bands; each is then compared exactly, so that nothing is wrongly taken
    for a duplicate. The bands are so narrow that a pair at the threshold is found with probability 0.9 or more.
    """
    rows = max(r for r in range(1, 33) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= 0.9) if threshold < 1 else 32
    signatures = minhash(texts)
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(PERMUTATIONS // rows)]
    kept_shingles: dict[int, set[tuple[str, ...]]] = {}
    found: list[int | None] = []
    for number, text in enumerate(texts):
        own = shingles(text)
        keys = [signatures[number, band * rows : (band + 1) * rows].tobytes() for band in range(len(tables))]
        candidates = sorted({other for table, key in zip(tables, keys, strict=True) for other in table.get(key, ())})
        twin = next((other for other in candidates if own and jaccard(own, kept_shingles[other]) >= threshold), None)
        found.append(twin)
        if twin is None and own:
            kept_shingles[number] = own
            for table, key in zip(tables, keys, strict=True):
                table.setdefault(key, []).append(number)
    return found


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def vectors(texts: Sequence[str]) -> Floats:
    """[N, D] TF-IDF vectors of unit length, words hashed into D places; an empty text has zeros."""
    rows = [Counter(crc32(word.encode()) % DIMENSIONS for word in tokens(text)) for text in texts]
    frequency = Counter(place for row in rows for place in row)
    used = {place: column for column, place in enumerate(sorted(frequency))}
    found = np.zeros((len(texts), max(1, len(used))), dtype=np.float32)
    for number, row in enumerate(rows):
        for place, count in row.items():
            found[number, used[place]] = (1 + math.log(count)) * math.log(
                (1 + len(texts)) / (1 + frequency[place])
            ) + 1e-12
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    np.divide(found, norms, out=found, where=norms > 0)
    return found


def k_center(points_ND: Floats, count: int) -> list[int]:
    """`count` places that lie far from each other (greedy k-center, Gonzalez 1985): the first text, then always the one
    farthest from those that were taken, by cosine; of equally far ones the first."""
    if not len(points_ND):
        return []
    taken = [0]
    nearest_N = points_ND @ points_ND[0]
    while len(taken) < min(count, len(points_ND)):
        nearest_N[taken] = np.inf
        taken.append(int(nearest_N.argmin()))
        nearest_N = np.maximum(nearest_N, points_ND @ points_ND[taken[-1]])
    return taken
