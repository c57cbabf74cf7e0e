"""One training on several processes (`torchrun`): each computes its share of a step's micro-batches, and gradients are
summed.

The caller starts the process group and calls `loop.train` in every rank (from Python; the commands run one process).
With one process all functions here do nothing. Sums are exact sums over ranks, so the global division stays the loop's.
Not covered: sharded weights (every rank holds the whole model).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world_size() > 1 else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of a step's micro-batches; it may be empty."""
    return items[rank() :: world_size()]


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every parameter's gradient over the ranks, in place; a rank that saw no micro-batch adds zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def wait() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        distributed.barrier()
