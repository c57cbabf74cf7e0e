"""Losses are computed in fp32 or better, whatever type the models run in."""

from __future__ import annotations

from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay as they are."""
    return values if values.dtype.itemsize >= 4 else values.float()
