"""One training on several processes: each computes its share of a step's micro-batches, and gradients are summed.

The commands start the processes by torch's launcher, and join them by `joined`; a caller from Python may start a
process group of its own and call `loop.train` in every rank. With one process all functions here do nothing. Sums are
exact sums over ranks, so the global division stays the loop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from limbeck.config import ranks
from limbeck.config.machine import Machine
from limbeck.models.placement import find_device
from limbeck.training.company import Company, lost_rank
from limbeck.types import Batch

T = TypeVar("T")
_COMPANIES: list[Company] = []  # the one of this process, once it has joined


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world_size() > 1 else 0


@contextlib.contextmanager
def joined(machine: Machine) -> Iterator[Company]:
    """Join the ranks that torch's launcher started, while the block runs.

    Raises:
        LostRankError: in the block, for a collective that failed since another rank is gone.
    """
    timeout = timedelta(seconds=machine.timeout)
    device = find_device(machine.device, "machine.device")
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    store, number, size = next(rendezvous("env://", timeout=timeout))
    company = Company(PrefixStore("company", store), number, size, machine.timeout)
    _COMPANIES[:] = [company]
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=PrefixStore("collectives", store),
            rank=number,
            world_size=size,
            timeout=timeout,
        )
        yield company
    except RuntimeError as error:
        if (lost := lost_rank(error, machine.timeout)) is None:
            raise
        raise lost from error
    company.meet()  # nobody closes a connection that another still reads
    company.leave()
    distributed.destroy_process_group()


def fail(error: BaseException) -> bool:
    """Tell the other ranks that this one ends with an error. Returns whether it should tell the user."""
    return _COMPANIES[0].fail(error) if _COMPANIES else ranks.rank() == 0


def call(turn: dict[str, Any]) -> None:
    """On rank 0: call the other ranks to a turn, and wait until they are ready for it."""
    if _COMPANIES:
        _COMPANIES[0].tell(turn)
        _COMPANIES[0].meet()


def shares(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Every rank's share of a step's micro-batches; it may be empty.

    The largest goes first, each to the rank with the fewest tokens so far, so that all have about the same work.
    """
    size = world_size()
    tokens = [0] * size
    dealt: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(batches)), key=lambda index: -batches[index].tokens_BT.numel()):
        least = min(range(size), key=lambda number: (tokens[number], number))
        tokens[least] += batches[index].tokens_BT.numel()
        dealt[least].append(index)
    return [[batches[index] for index in sorted(share)] for share in dealt]


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every parameter's gradient over the ranks, in place; a rank without one adds zeros. A parameter that no rank
    has a gradient of keeps none: with zeros the optimiser would move it, as on one rank it does not."""
    parameters = list(parameters)
    if world_size() == 1 or not parameters:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    distributed.all_reduce(reached, op=distributed.ReduceOp.MAX)
    pending = []
    for parameter, is_reached in zip(parameters, reached.tolist(), strict=True):
        if not is_reached:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pending.append(distributed.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        assert work is not None
        work.wait()


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0, in place."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def in_turns(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of some items: item i is that of rank i modulo their number."""
    return items[rank() :: world_size()]


def gather_in_turns(part: Sequence[T]) -> list[T]:
    """Results for all items from every rank's for its part, as `in_turns` dealt them. Waits for the slowest rank."""
    wait()
    parts = gather(list(part))
    return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]


def least(value: int | None) -> int | None:
    """The least of the ranks' values, without those that are None."""
    return min((other for other in gather(value) if other is not None), default=None)


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it; the others wait for as long as it is alive."""
    value = work() if rank() == 0 else None
    wait()
    result: Any = gather(value)[0]
    return cast(T, result)


def wait() -> None:
    """Wait until every rank is here; in a command, for as long as they are alive."""
    if _COMPANIES:
        _COMPANIES[0].meet()
    elif world_size() > 1:
        distributed.barrier()
