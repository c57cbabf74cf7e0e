"""Sizes that suit a machine. They are the process's; results do not depend on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Sizes:
    """What the user has set; None follows from the device.

    Args:
        head_bytes: memory of one chunk of logits in fp32.
        cache_bytes: memory of keys and values while a model writes.
    """

    head_bytes: int | None = None
    cache_bytes: int | None = None


SIZES = Sizes()
