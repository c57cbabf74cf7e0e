"""Which samples made a step's loss or gradient not finite, kept so that the step can be replayed.

Each sample (or group of answers that a loss compares) is computed alone, with the random state of the step. Where the
weights are divided among ranks, or no sample is guilty alone, all of the step's samples are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.data.batches import Row, resized
from limbeck.storage.files import write_json
from limbeck.types import UserError

FILE = "nonfinite.json"
SHOWN = 4

Alone = Callable[[Sequence[Row]], tuple[float, float]]


def refuse_step(
    folder: Path,
    facts: Mapping[str, Any],
    micro_batches: Sequence[Sequence[Row]],
    alone: Alone | None,
    *,
    groups: bool,
    keep: bool,
) -> None:
    """Say whose loss or gradient is not finite.

    Args:
        folder: of the training; receives `nonfinite.json` with whole ids if `keep`.
        facts: of the step: `step`, `loss`, `grad_norm`, `terms` by label, and the `seed` of its random state.
        alone: returns (loss, gradient norm) of some rows, with the random state of the step; None if it can't be told.
        groups: whether answers to one prompt stay together.

    Raises:
        UserError: always.
    """
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    guilty: list[Row] = []
    if alone is not None:
        for part in resized(micro_batches, 1, groups):
            guilty += [] if all(map(math.isfinite, alone(part))) else part
    named = [str(row.sample_id) for row in guilty or rows]
    terms = facts["terms"]
    bad = [label for label, value in terms.items() if not math.isfinite(value)] or list(terms)
    words = f"step {facts['step']}: the loss is {facts['loss']} and the gradient norm {facts['grad_norm']}"
    if keep:
        record = {key: _told(value) for key, value in facts.items()}
        record |= {"terms": {label: _told(value) for label, value in terms.items()}, "from": bad}
        record |= {"guilty": [str(row.sample_id) for row in guilty], "samples": [str(row.sample_id) for row in rows]}
        write_json(folder / FILE, record)
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    shown = ", ".join(name[:12] for name in named[:SHOWN])
    raise UserError(
        f"{words} (from {', '.join(bad)}), so no update was made; samples {shown}{more}: {folder / FILE} has them"
        " whole, and the step's random state; lower train.lr, or look at those samples' logits"
    )


def _told(value: Any) -> Any:
    """A number that JSON can't hold as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
