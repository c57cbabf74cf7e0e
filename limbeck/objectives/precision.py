"""Losses are computed in fp32 or better, whatever type the models run in; long sums in fp64 where the device has it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay as they are."""
    return values if values.dtype.itemsize >= 4 else values.float()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The type of long sums: float64, but float32 on devices without it (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


COPIED = 2**22  # numbers of a matrix that are in fp32 at once, to be multiplied: 16 MiB


# Products of matrices in a shorter type with sums in fp32. CUDA has them; elsewhere the rounded numbers are multiplied
# in fp32, which gives the same products.


def passes_in(rounded: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """A block in which a model's passes compute in this type, by autocast; with None, in the type of its weights."""
    return nullcontext() if rounded is None else torch.autocast(device.type, dtype=rounded)


def to_multiply(values: Tensor, rounded: torch.dtype | None) -> Tensor:
    """The values rounded to `rounded`, in the type that this device multiplies such numbers in."""
    if rounded is None or values.dtype == rounded:
        return values
    short = values.to(rounded)
    return short if values.device.type == "cuda" else short.to(values.dtype)


def product_dtype(matrix: Tensor) -> torch.dtype:
    """The type of `multiply`'s result."""
    return torch.promote_types(matrix.dtype, torch.float32)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, written into `out`, which is of `product_dtype`. CUDA sums products of shorter numbers so; elsewhere they
    are multiplied in fp32, some columns of b at a time."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if out.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    longer = a.to(out.dtype)
    width = max(1, COPIED // len(b))
    for start in range(0, b.shape[1], width):
        columns = slice(start, start + width)
        out[:, columns] = longer @ b[:, columns].to(out.dtype)
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total` in place, in the type of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
