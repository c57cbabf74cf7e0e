"""Which texts are held out for the evaluation: by a fixed seed, in proportion to the labels, and none that is also
trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.commands.new.data import Example
from limbeck.elicit.similar import resembling

SEED = 7
NEAR = 0.7  # Jaccard similarity of their runs of words, from which texts are called near-duplicates
COMPARED = 5  # of texts that may be held out, for each that will be, to find some that resemble no other
LEAST_HELD_OUT = 10  # fewer say nothing; 30 are the least for a difference to be called clear
MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Split:
    """The two parts; `near` held-out texts resemble a trained one, `untested` labels have no held-out text."""

    training: list[Example]
    held_out: list[Example]
    near: int
    untested: list[str]


def split(examples: Sequence[Example], labels: Sequence[str] = (), most: int = MOST_HELD_OUT) -> Split:
    """Hold out the texts of a file of tests (at most `most`, by the seed), and train all others. Without one, hold out
    about a fifth (of many texts a tenth), at least LEAST_HELD_OUT of 40 and more, at most `most`.

    Of every label with two texts or more one at least is held out and one trained, whatever its share. Texts that
    resemble no other are held out first. A text that stands after several system messages is in one part.

    Args:
        labels: those by which to divide; without any, all texts are one group.
    """
    texts = [example.text for example in examples]
    order = list(range(len(examples)))
    random.Random(f"{SEED}/held out").shuffle(order)  # noqa: S311 (an order, not a secret)
    groups: dict[str, list[int]] = {label: [] for label in labels or [""]}
    for place in order:
        groups[examples[place].answer if labels else ""].append(place)
    tests = [place for place in order if examples[place].is_test][:most]
    if tests:
        chosen = set(tests)
        counts = Counter(examples[place].answer if labels else "" for place in chosen)
        order = [place for place in order if place in chosen or not examples[place].is_test]
    else:
        counts = Counter(_counts({label: len(places) for label, places in groups.items()}, most))
        compared = [place for label, places in groups.items() for place in places[: COMPARED * counts[label]]]
        alike = resembling(texts, compared, order, NEAR)
        for places in groups.values():
            places.sort(key=lambda place: place in alike)  # stable: those without a twin come first
        chosen = {place for label, places in groups.items() for place in places[: counts[label]]}
        chosen = _whole(examples, order, chosen)
    held = [place for place in order if place in chosen]
    random.Random(f"{SEED}/order").shuffle(held)  # noqa: S311
    training = [place for place in sorted(order) if place not in chosen]
    return Split(
        training=[examples[place] for place in training],
        held_out=[examples[place] for place in held],
        near=len(resembling(texts, held, training, NEAR)),
        untested=[label for label in groups if counts[label] == 0],
    )


def _whole(examples: Sequence[Example], order: Sequence[int], chosen: set[int]) -> set[int]:
    """Of the chosen places those, and at most as many, with all others of the same text: it may stand after several
    system messages, and is either trained or measured."""
    alike: dict[str, list[int]] = {}
    for place in order:
        alike.setdefault(examples[place].said, []).append(place)
    whole: set[int] = set()
    for places in alike.values():
        if not chosen.isdisjoint(places) and len(whole) + len(places) <= len(chosen):
            whole.update(places)
    return whole


def _counts(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """How many of each group are held out: in proportion, one at least of two or more, never all."""
    total = sum(sizes.values())
    share = 0.2 if total < 2000 else 0.1
    wanted = min(most, max(min(LEAST_HELD_OUT, total // 4), round(share * total)))
    counts = {}
    for label, size in sizes.items():
        part = wanted * size / total
        counts[label] = min(size - 1, max(1, round(part))) if size > 1 else 0
    return counts
