"""Decontamination: does an item of an evaluation occur in the training text?

Both sides are reduced to words: NFKC, lower case, letters and numbers only (`1,000` is 1000, `5km` is two words), one
word per character of Chinese and Japanese. Four kinds of leak, the strongest first:

- `exact`: the training text is the item.
- `contained`: a longer training text holds the whole item, word by word; for items of at least 4 words.
- `overlap`: both share a run of `n` words (13, as in GPT-3, Brown et al. 2020, and lm-evaluation-harness). Items of
  `small_n` to n - 1 words: a run of `small_n` (8, as in Tulu 3, Lambert et al. 2024), two thirds of the item or more.
  Shorter: none.
- `same_but_for_numbers`: the training text holds the whole item, but with other numbers. For items of at least 4 words
  besides numbers. It is weaker: a task made from a template shows it by design.

A run that more than 10 different items have is the wording of their task, and no overlap. So is a run of `small_n`
words that at least 5 different training prompts have, and more than 3 % of them: an instruction that they share. Its
words are taken out of an item, and each stretch that is left is looked for as an item of its length would be (of 4
words or more; it shows an `overlap`), so that a question copied from behind its instruction is found. By chance that
rule rarely hides a leak: a question with one copy among the training prompts on average has 5 or more with a
probability of 0.4 % (Poisson), and its whole is found all the same. Not covered: paraphrases, translations, numbers
written as words.

Items are indexed once by hashes of runs; the training text is read in blocks, and every hit is compared word by word.
Time is linear in the training text and in the number of leaks: about 1 second per million words.

Shapes: N words of a block or item, P positions of runs, H of them with a hit.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from limbeck.evaluate.wording import CJK
from limbeck.types import UserError

LeakKind = Literal["exact", "contained", "overlap", "same_but_for_numbers"]
Texts = Sequence[tuple[str, str]]

WORD_OR_NUMBER = re.compile(rf"\d+(?:\.\d+)?|[{CJK}]|[^\W\d_{CJK}]+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
LEAST_WORDS = 4
COMMON = 10
WORDING_LEAST = 5
WORDING_SHARE = 0.03
EXCERPT_WORDS = 40
BLOCK = 2000
OTHER = 0
NUMBER = 1  # ids of words that no item has, and of numbers that no item has; the items' own words follow
SIEVE_BITS = 22
BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Leak:
    """An item that occurs in a training text.

    `share` is the share of the item's words that the text repeats in runs, 0 to 1 (of `same_but_for_numbers`: of those
    that are no numbers). `excerpt` is the text's matching stretch as words, the first 40.
    """

    item: str
    training: str
    kind: LeakKind
    share: float
    excerpt: str


def find_leaks(training: Texts, items: Texts, n: int = 13, small_n: int = 8, prompts: Texts = ()) -> list[Leak]:
    """Every pair of item and training text with a leak, in the order of the items.

    An item has at most one leak of the last kind, with the first text that shows it, and none where it has an exact or
    contained one. An item without words has no leak.

    Args:
        training, items: (id, text).
        prompts: those of the training, whose common wording shows no leak.

    Raises:
        UserError: n-gram lengths other than 4 <= small_n <= n.
    """
    if not LEAST_WORDS <= small_n <= n:
        raise UserError(f"n={n}, small_n={small_n}: leaks need {LEAST_WORDS} <= small_n <= n")
    vocabulary = _Vocabulary()
    ids = [vocabulary.learn(_words(text)) for _, text in items]
    is_number, codes = vocabulary.tables()
    worded = _wording(ids, prompts, vocabulary, codes, width=small_n)
    own = {place: own_N for place, own_N in enumerate(ids) if len(own_N)}
    free = {place: own_N for place, own_N in own.items() if place not in worded}
    plain = [
        _Index(free, codes, n, small_n),
        _Index({place: own[place] for place in worded}, codes, n, small_n, anchors_only=True),
    ]
    owners, stretches = _stretches(own, worded)
    pieces = _Index(stretches, codes, n, small_n)
    skeletons = {place: np.where(is_number[own_N], NUMBER, own_N).astype(np.int32) for place, own_N in enumerate(ids)}
    masked = _Index(
        {p: own_N for p, own_N in skeletons.items() if _has_skeleton(own_N)}, codes, n, small_n, anchors_only=True
    )
    leaks: dict[tuple[int, int], Leak] = {}
    first_of: dict[int, tuple[str, str]] = {}
    for first in range(0, len(training), BLOCK):
        block = _Block(training[first : first + BLOCK], vocabulary)
        for index in plain:
            for match in index.search(block.ids_N, block):
                for place in index.places[match.entry]:
                    leaks[place, first + match.text] = _leak(block, match, items[place][0])
        for match in pieces.search(block.ids_N, block):
            for owner in (owners[stretch] for stretch in pieces.places[match.entry]):
                share = match.share * len(pieces.entries[match.entry]) / len(own[owner])
                part = replace(match, whole=False, share=share)
                leaks.setdefault((owner, first + match.text), _leak(block, part, items[owner][0]))
        for match in masked.search(np.where(is_number[block.ids_N], NUMBER, block.ids_N).astype(np.int32), block):
            first_of.setdefault(match.entry, (block.names[match.text], block.excerpt(match)))
    strong = {place for (place, _), leak in leaks.items() if leak.kind != "overlap"}
    for entry, (name, excerpt) in first_of.items():
        for place in set(masked.places[entry]) - strong:
            share = float((skeletons[place] != NUMBER).mean())
            leaks[place, len(training)] = Leak(
                item=items[place][0], training=name, kind="same_but_for_numbers", share=share, excerpt=excerpt
            )
    return [leaks[key] for key in sorted(leaks)]


def _wording(
    ids: Sequence[np.ndarray], prompts: Texts, vocabulary: _Vocabulary, codes: np.ndarray, *, width: int
) -> dict[int, np.ndarray]:
    """{place of an item: which of its words belong to wording that the prompts share}, for items that have any."""
    runs = [_hashes(codes[own_N], width) for own_N in ids]
    wanted = np.unique(np.concatenate([*runs, np.empty(0, np.uint64)]))
    texts = list({text: (name, text) for name, text in prompts}.values())
    count = np.zeros(len(wanted), np.int64)
    for first in range(0, len(texts) if len(wanted) else 0, BLOCK):
        block = _Block(texts[first : first + BLOCK], vocabulary)
        hash_P = _hashes(codes[block.ids_N], width)
        at_H = np.flatnonzero(np.isin(hash_P, wanted))
        text_H = np.searchsorted(block.starts, at_H, "right") - 1
        pairs = np.unique(np.stack([text_H, np.searchsorted(wanted, hash_P[at_H])], 1), axis=0)
        count += np.bincount(pairs[:, 1], minlength=len(wanted))
    common = wanted[(count >= WORDING_LEAST) & (count > WORDING_SHARE * len(texts))]
    worded = {}
    for place, (own_N, run_P) in enumerate(zip(ids, runs, strict=True)):
        is_worded = np.zeros(len(own_N), bool)
        for start in np.flatnonzero(np.isin(run_P, common)):
            is_worded[start : start + width] = True
        if is_worded.any():
            worded[place] = is_worded
    return worded


def _stretches(
    own: Mapping[int, np.ndarray], worded: Mapping[int, np.ndarray]
) -> tuple[list[int], dict[int, np.ndarray]]:
    """The stretches of items that are no wording: the place of the item of each, and {number: its words}."""
    owners = []
    stretches = []
    for place, is_worded in worded.items():
        edges = np.flatnonzero(np.diff(np.concatenate([[True], is_worded, [True]]).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            if end - start >= LEAST_WORDS:
                owners.append(place)
                stretches.append(own[place][start:end])
    return owners, dict(enumerate(stretches))


def _words(text: str) -> list[str]:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return WORD_OR_NUMBER.findall(THOUSANDS.sub("", plain).casefold())


def _has_skeleton(own_N: np.ndarray) -> bool:
    """Whether there are a number and enough words around it."""
    numbers = int((own_N == NUMBER).sum())
    return numbers > 0 and len(own_N) - numbers >= LEAST_WORDS


@dataclass(frozen=True)
class _Match:
    """An entry in a text of the block: all of it, or runs that repeat a share of its words. `start` counts in the
    block."""

    text: int
    entry: int
    start: int
    length: int
    whole: bool
    share: float = 1.0


def _leak(block: _Block, match: _Match, item: str) -> Leak:
    all_of_text = len(block.words[match.text]) == match.length
    kind: LeakKind = "overlap" if not match.whole else "exact" if all_of_text else "contained"
    return Leak(
        item=item,
        training=block.names[match.text],
        kind=kind,
        share=match.share,
        excerpt=block.excerpt(match),
    )


class _Vocabulary(dict[str, int]):
    """Ids of the items' words; any other word is OTHER or NUMBER."""

    def __missing__(self, word: str) -> int:
        return NUMBER if word[0].isdecimal() else OTHER

    def learn(self, words: Sequence[str]) -> np.ndarray:
        return np.array([self.setdefault(word, len(self) + 2) for word in words], np.int32)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """By id: whether it is a number, and its random 64 bits."""
        is_number = np.array([False, True, *(word[0].isdecimal() for word in self)])
        return is_number, np.random.default_rng(0).integers(0, 2**64, len(is_number), np.uint64)


class _Block:
    """Some training texts as one row of word ids, with OTHER after each, so that no run crosses from one to the
    next."""

    def __init__(self, texts: Texts, vocabulary: _Vocabulary) -> None:
        self.names = [name for name, _ in texts]
        self.words = [_words(text) for _, text in texts]
        ids = [vocabulary[word] for words in self.words for word in (*words, "_")]
        self.ids_N = np.array(ids, np.int32)
        self.starts = np.cumsum([0, *(len(words) + 1 for words in self.words)])

    def excerpt(self, match: _Match) -> str:
        start = match.start - int(self.starts[match.text])
        return " ".join(self.words[match.text][start : start + min(match.length, EXCERPT_WORDS)])


class _Index:
    """Different items (entries) by the hashes of their runs.

    An entry's runs are n words long, or small_n, or the whole of it, whatever fits first. Runs that at most COMMON
    entries share find overlaps. An entry without such a run is found by its rarest run, but only as a whole.
    """

    def __init__(
        self, ids: dict[int, np.ndarray], codes: np.ndarray, n: int, small_n: int, anchors_only: bool = False
    ) -> None:
        self.codes = codes
        self.small_n = small_n
        by_content: dict[bytes, list[int]] = {}
        for place, own_N in ids.items():
            by_content.setdefault(own_N.tobytes(), []).append(place)
        self.places = list(by_content.values())
        self.entries = [ids[places[0]] for places in self.places]
        self.short: dict[bytes, int] = {}
        self.tables: dict[int, dict[int, list[tuple[int, int, bool]]]] = {}
        hashes: dict[int, list[int]] = {}
        for entry, own_N in enumerate(self.entries):
            if len(own_N) < LEAST_WORDS:
                self.short[own_N.tobytes()] = entry
            else:
                hashes[entry] = _hashes(codes[own_N], self._width(entry, n)).tolist()
        shared = Counter(key for own in hashes.values() for key in set(own))
        for entry, own in hashes.items():
            table = self.tables.setdefault(self._width(entry, n), {})
            rare = [] if anchors_only else [start for start, key in enumerate(own) if shared[key] <= COMMON]
            for start in rare or [min(range(len(own)), key=lambda start: shared[own[start]])]:
                table.setdefault(own[start], []).append((entry, start, bool(rare)))
        self.sieves = {width: _sieve(table) for width, table in self.tables.items()}

    def _width(self, entry: int, n: int) -> int:
        size = len(self.entries[entry])
        return n if size >= n else self.small_n if size >= self.small_n else size

    def search(self, ids_N: np.ndarray, block: _Block) -> Iterator[_Match]:
        """At most one match per text and entry: the whole of it before runs."""
        if self.short:
            for text, words in enumerate(block.words):
                start = int(block.starts[text])
                entry = (
                    self.short.get(ids_N[start : start + len(words)].tobytes()) if len(words) < LEAST_WORDS else None
                )
                if entry is not None:
                    yield _Match(text, entry, start, len(words), whole=True)
        for width in self.tables:
            whole: set[tuple[int, int]] = set()
            runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for text, position, entry, start, counts in self._hits(ids_N, block, width):
                if (text, entry) in whole:
                    continue
                own_N = self.entries[entry]
                begin = position - start
                if begin >= 0 and ids_N[begin : begin + len(own_N)].tobytes() == own_N.tobytes():
                    whole.add((text, entry))
                    yield _Match(text, entry, begin, len(own_N), whole=True)
                elif counts and ids_N[position : position + width].tobytes() == own_N[start : start + width].tobytes():
                    runs.setdefault((text, entry), []).append((position, start))
            yield from (
                self._overlap(text, entry, width, own)
                for (text, entry), own in runs.items()
                if (text, entry) not in whole
            )

    def _hits(self, ids_N: np.ndarray, block: _Block, width: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """(text, position in the block, entry, position in the entry, whether it counts as overlap) of all runs with
        equal hashes."""
        hash_P = _hashes(self.codes[ids_N], width)
        at_H = np.flatnonzero(self.sieves[width][hash_P >> np.uint64(64 - SIEVE_BITS)])
        text_H = np.searchsorted(block.starts, at_H, "right") - 1
        for text, position, key in zip(text_H.tolist(), at_H.tolist(), hash_P[at_H].tolist(), strict=True):
            for entry, start, counts in self.tables[width].get(key, ()):
                yield text, position, entry, start, counts

    def _overlap(self, text: int, entry: int, width: int, runs: list[tuple[int, int]]) -> _Match:
        """The excerpt goes from the first to the last of the runs that have the same places in text and item."""
        covered = {place for _, start in runs for place in range(start, start + width)}
        (shift, _), *_ = Counter(position - start for position, start in runs).most_common(1)
        stretch = [position for position, start in runs if position - start == shift]
        share = len(covered) / len(self.entries[entry])
        return _Match(text, entry, min(stretch), max(stretch) - min(stretch) + width, whole=False, share=share)


def _hashes(codes_N: np.ndarray, width: int) -> np.ndarray:
    """[N - width + 1], a polynomial hash (mod 2^64) of every run of that many words; empty where there are fewer."""
    count = max(0, len(codes_N) - width + 1)
    hash_P = np.zeros(count, np.uint64)
    for place in range(width):
        hash_P = hash_P * BASE + codes_N[place : place + count]
    return hash_P


def _sieve(table: dict[int, list[tuple[int, int, bool]]]) -> np.ndarray:
    """Which leading bits any hash of the table has: one look-up that drops nearly all runs of the training text."""
    sieve = np.zeros(2**SIEVE_BITS, bool)
    sieve[np.array(list(table), np.uint64) >> np.uint64(64 - SIEVE_BITS)] = True
    return sieve
