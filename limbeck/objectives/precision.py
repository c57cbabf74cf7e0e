"""Losses are computed in fp32 or better, whatever type the models run in; long sums in fp64 where the device has it."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay as they are."""
    return values if values.dtype.itemsize >= 4 else values.float()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The type for sums over many values: fp64, but fp32 on Apple's GPUs, which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64
