"""Has a student collapsed? Told by the text that it writes, held against the text of the student before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REPETITION = 0.5  # the share of an answer's 4-grams that occurred in it before
ALIKE = 0.95  # Self-BLEU of its texts: the same words whatever was asked
SHORTEST = 1.5  # tokens an answer, the one that ends it included: nothing is said
# a start that was as near to the bound as this share of it has not collapsed by the training
BEFORE = 0.5
BEFORE_ALIKE = 0.75  # texts of one language share words


def collapse(summary: Mapping[str, Any]) -> str:
    """In words how the student's own text shows that it has collapsed; empty where it has not, or wrote none.

    Args:
        summary: of its run's evaluation, with `untouched` among the controls for the comparison.
    """
    student, before = (_facts(summary, system) for system in ("student", "untouched"))
    repetition, alike, length = (student.get(name) for name in ("repetition", "alike", "length"))
    if repetition is not None and repetition >= REPETITION and before.get("repetition", 0.0) <= REPETITION * BEFORE:
        return f"{repetition:.0%} of its 4-grams repeat the answer so far"
    if alike is not None and alike >= ALIKE and before.get("alike", 0.0) <= ALIKE * BEFORE_ALIKE:
        return f"its answers are alike whatever is asked (Self-BLEU {alike:.2f})"
    if length is not None and length <= SHORTEST and before.get("length", SHORTEST / BEFORE) >= SHORTEST / BEFORE:
        return f"its answers have {length:.1f} tokens, and the last of those only ends them"
    return ""


def _facts(summary: Mapping[str, Any], system: str) -> dict[str, float]:
    """The repetition, likeness and length of a system's own text, as far as they were measured."""
    values = summary.get("systems", {}).get(system, {})
    found = {
        "repetition": (values.get("own_repetition") or {}).get("value"),
        "length": (values.get("own_tokens") or {}).get("value"),
        "alike": (summary.get("wording", {}).get(system) or {}).get("self_bleu"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}
