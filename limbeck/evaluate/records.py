"""What is kept of every item that a system was measured on. Summaries are made from these records alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from limbeck.evaluate.calibration import Reliability

Progress = Callable[[int, int], None]  # called with (done, total)
DetailedProgress = Callable[[int, int, str], None]  # called with (done, total, what)
Choices = list[tuple[int, float]]  # (token, probability)


@dataclass
class ItemFidelity:
    """Sums over one answer's tokens.

    `sums` holds every `TokenSum` by name, `lengths` holds (nats of forward KL, tokens) of the tokens before each
    position of LENGTHS (and after the one before), `classes` the same by class of token, `lens` per token (id, forward
    KL, the teacher's choices, the system's choices) for the answers that are shown.
    """

    sample_id: str
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    lengths: dict[str, tuple[float, int]] = field(default_factory=dict)
    classes: dict[str, tuple[float, int]] = field(default_factory=dict)
    reliability: Reliability | None = None
    lens: list[tuple[int, float, Choices, Choices]] = field(default_factory=list)


@dataclass(frozen=True)
class CheckedAnswer:
    """One system's answer to one prompt; `passed` is None where no verifier applies. `tokens` counts the
    end-of-sequence token. `text` is all that was written, with the mark of thinking that the prompt began; `answered`
    is False where thinking never ends."""

    prompt_id: str
    kind: str
    text: str
    tokens: int
    finished: bool
    passed: bool | None
    answered: bool = True


@dataclass(frozen=True)
class ItemResult:
    """One system's result on one item of a task.

    `scores` holds the item's value of every metric that applies to it, `weights` its weight where that is not 1: a
    metric is the sum of scores divided by the sum of weights. `text` is what the system wrote or chose, `facts` the
    rest of the evidence as plain data.
    """

    item: str
    scores: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SystemRecords:
    """Every item of one system.

    `fidelity` compares it with the teacher on held-out teacher text, `own` on text that the system wrote itself, with
    the text and whether it ended in `own_text`; `free` on what the teacher wrote to the same prompts in the same way
    (temperature 1).
    """

    name: str
    fidelity: list[ItemFidelity]
    own: list[ItemFidelity]
    own_text: list[dict[str, Any]]
    free: list[ItemFidelity]
    answers: list[CheckedAnswer]
    tasks: dict[str, list[ItemResult]]
    efficiency: dict[str, Any]
