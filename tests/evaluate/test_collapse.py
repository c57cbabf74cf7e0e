"""A student that has collapsed is told from one that writes as its start did."""

from __future__ import annotations

import pytest

from limbeck.evaluate.collapse import collapse


def summary(**systems):
    """{system: (repetition, tokens an answer, Self-BLEU)}."""
    return {
        "systems": {
            name: {"own_repetition": {"value": repetition}, "own_tokens": {"value": tokens}}
            for name, (repetition, tokens, _) in systems.items()
        },
        "wording": {name: {"self_bleu": alike} for name, (_, _, alike) in systems.items()},
    }


FINE = (0.05, 60.0, 0.4)


@pytest.mark.parametrize(
    ("student", "untouched", "words"),
    [
        (FINE, FINE, ""),
        ((0.7, 60.0, 0.4), FINE, "70% of its 4-grams repeat"),
        ((0.7, 60.0, 0.4), (0.4, 60.0, 0.4), ""),  # the start was like that
        ((0.05, 60.0, 0.97), FINE, "alike whatever is asked"),
        ((0.05, 60.0, 0.97), (0.05, 60.0, 0.9), ""),
        ((0.0, 1.0, 0.0), FINE, "1.0 tokens"),
        ((0.0, 1.0, 0.0), (0.0, 2.0, 0.0), ""),  # a task of one word
        ((0.7, 60.0, 0.4), None, "70 %".replace(" ", "")),
    ],
)
def test_a_collapse_is_a_change(student, untouched, words):
    systems = {"student": student} | ({} if untouched is None else {"untouched": untouched})
    said = collapse(summary(**systems))
    assert words in said and bool(said) == bool(words)


def test_without_text_of_its_own_nothing_is_said():
    assert collapse({}) == collapse({"systems": {"student": {"own_repetition": None}}}) == ""
