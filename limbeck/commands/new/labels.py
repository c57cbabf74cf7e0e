"""Labels as a user's file gives them: cleaned of spaces, counted, and refused where they can't be labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import regex

from limbeck.commands.new.data import Example, Seen, shown
from limbeck.elicit.json_in import plain
from limbeck.types import UserError

MOST_LABELS = 200
LONGEST = 100  # characters of a label
RARE = 5  # texts of a label, below which it can hardly be learnt
MOST_LISTED = 12
CURE = "name the column with --columns label=COLUMN, or take --task answer, which writes any text"


def with_labels(seen: Seen) -> Seen:
    """The examples that have a label, without spaces around or repeated in it; a line says what was left out."""
    labelled = [example for example in seen.examples if example.answer.strip()]
    notes = list(seen.notes)
    if talks := next((example for example in labelled if example.is_conversation), None):
        raise UserError(f"{talks.place} is a conversation; --task classify takes a text and its label")
    if not labelled:
        raise UserError(
            f"{seen.file} has no labels: give a second column, such as text,label (name it with --columns label=COLUMN)"
        )
    if lacking := len(seen.examples) - len(labelled):
        notes.append(f"{lacking:,} without a label left out")
    cleaned = [replace(example, answer=" ".join(example.answer.split())) for example in labelled]
    if changed := sum(one.answer != other.answer for one, other in zip(labelled, cleaned, strict=True)):
        notes.append(f"{changed:,} labels had spaces or line breaks too many, which were taken out")
    return Seen(seen.file, cleaned, notes)


def labels_of(examples: Sequence[Example], file: str) -> list[str]:
    """The labels, the most frequent first.

    Raises:
        UserError: fewer than two, too many, too long, or two that only case or hyphens tell apart.
    """
    counts = Counter(example.answer for example in examples)
    labels = [label for label, _ in counts.most_common()]
    if len(labels) == 1:
        raise UserError(f"{file} has one label only, {shown(labels[0])!r}: a classifier needs two or more; {CURE}")
    if len(labels) > max(2, len(examples) // 2):
        raise UserError(
            f"{file}: {len(labels):,} different labels for {len(examples):,} texts, such as {shown(labels[0])!r}: these"
            f" are no labels; {CURE}"
        )
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"{file}: {len(labels):,} labels are more than the {MOST_LABELS} that a teacher can be shown; merge rare"
            " ones, or take --task answer, which writes any text"
        )
    if long := next((label for label in labels if len(label) > LONGEST), None):
        raise UserError(f"{file}: the label {shown(long)!r} has more than {LONGEST} characters; {CURE}")
    if odd := next((label for label in labels if not label.isprintable()), None):
        raise UserError(f"{file}: the label {odd!a} holds a control character; remove it")
    forms: dict[str, str] = {}
    for label in labels:
        other = forms.setdefault(" ".join(regex.split(r"[\s_\-]+", plain(label))), label)
        if other != label:
            raise UserError(
                f"{file}: {shown(other)!r} ({counts[other]:,}) and {shown(label)!r} ({counts[label]:,}) differ in case,"
                " hyphens or spaces alone; write both alike"
            )
    return labels


def label_notes(examples: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """Lines that say which labels there are, and which will be hard."""
    counts = Counter(example.answer for example in examples)
    listed = ", ".join(f"{shown(label, 30)} {counts[label]:,}" for label in labels[:MOST_LISTED])
    more = f", and {len(labels) - MOST_LISTED} more" if len(labels) > MOST_LISTED else ""
    notes = [f"{len(labels)} labels: {listed}{more}"]
    if rare := [label for label in labels if counts[label] < RARE]:
        notes.append(
            f"fewer than {RARE} texts: {', '.join(shown(label, 30) for label in rare[:MOST_LISTED])}"
            f"{f' and {len(rare) - MOST_LISTED} more' if len(rare) > MOST_LISTED else ''}; give more, or merge them"
        )
    if (share := counts[labels[0]] / len(examples)) > 0.8:
        notes.append(f"{share:.0%} of the texts are {shown(labels[0], 30)}: who always says so is right as often")
    if all(re.fullmatch(r"[-+]?[0-9.]+", label) for label in labels):
        notes.append("the labels are numbers: say in the question of recipe.yaml what each means, or write words")
    if nested(labels):
        notes.append("one label begins another: the task has the label written and compares it, instead of ranking")
    return notes


def nested(labels: Sequence[str]) -> bool:
    """Whether one label begins another, which makes it likelier than that by construction."""
    ordered = sorted(labels)
    return any(other.startswith(one) for one, other in pairwise(ordered))
