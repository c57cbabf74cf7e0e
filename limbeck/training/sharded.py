"""A training whose weights, gradients and moments are divided among the ranks (`machine.shard: full`).

What the loop does differently then: as many passes on every rank, norms over all parts, checkpoints in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from limbeck.models.sharding import divide, is_divided, is_part, let_go, whole
from limbeck.objectives.forward import Sums
from limbeck.objectives.term import TermAtStep
from limbeck.training.job import TrainingJob
from limbeck.types import Batch


def begin(job: TrainingJob) -> None:
    """Divide the student and the models that its losses read, if the machine asks for it."""
    if job.machine.shard == "full" and distributed.is_initialized() and not is_divided(job.net):
        passes_unrounded = any(net is job.net for net in job.frozen)  # as the teacher, without its adapters
        for net in (job.net, *job.frozen):
            if not is_divided(net):
                divide(net, job.objective.rounded if net is job.net and not passes_unrounded else None)


def passes(job: TrainingJob, share: Sequence[Batch], batches: Sequence[Batch], most: int) -> list[tuple[Batch, bool]]:
    """This rank's micro-batches, each with whether it counts. Divided models pass as often on every rank: `most` is the
    largest number of any, and the smallest micro-batch of the step fills up, without counting."""
    own = [(batch, True) for batch in share]
    if is_divided(job.net):
        smallest = min(batches, key=lambda batch: batch.tokens_BT.numel())
        own += [(smallest, False)] * (most - len(own))
    return own


def empty_pass(job: TrainingJob, batch: Batch, step: int) -> Sums:
    """A forward and backward pass that changes nothing, beside those of other ranks."""
    forward = job.objective.forward(batch, step)
    loss = (forward.hidden_ND * 0).sum()
    head_VD = forward.head.weight_VD
    if head_VD.requires_grad:
        loss = loss + head_VD[:1].sum() * 0
    loss.backward()
    settle(job)
    return Sums()


def is_empty(batch: Batch, terms: Sequence[TermAtStep]) -> bool:
    """Whether no term reads anything of a micro-batch, so that the head would get no gradient."""
    return not any(batch.amount(t.term.unit, t.term.only, t.term.column) for t in terms)


def settle(job: TrainingJob) -> None:
    """Free what the frozen models gathered for a pass."""
    for net in job.frozen:
        let_go(net)


@torch.no_grad()
def clip(parameters: Iterable[Tensor], most: float) -> float:
    """Scale the gradients so that their norm, over all parts on all ranks, is at most `most`; returns the norm."""
    parameters = list(parameters)
    if not any(is_part(parameter) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [_local(grad) for grad in grads if is_part(grad)]
    others = [grad for grad in grads if not is_part(grad)]
    square = _square(parts, grads[0].device)
    distributed.all_reduce(square)
    norm = float((square + _square(others, grads[0].device)).sqrt())
    factor = min(1.0, most / (norm + 1e-6))
    for grad in (*parts, *others):
        grad.mul_(factor)
    return norm


def _local(tensor: Tensor) -> Tensor:
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    return part


def _square(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
    return total


def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors that every rank holds whole, this rank's rows of the others)"""
    divided = {name: _local(tensor) for name, tensor in tensors.items() if is_part(tensor)}
    return {name: tensor for name, tensor in tensors.items() if name not in divided}, divided


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors, one after another, on the host where they were divided; only a rank that `keep`s holds more
    than one. A collective."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.cpu() if is_part(tensor) else full
    return kept


@torch.no_grad()
def plain(net: PreTrainedModel, fresh: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The trained model whole, on rank 0; on the others the divided one. A collective where it is divided.

    Args:
        fresh: makes a model of the same parameters, on rank 0.
    """
    if not is_divided(net):
        return net
    parameters = gathered(dict(net.named_parameters()), keep=distributed.get_rank() == 0)
    if distributed.get_rank() > 0:
        return net
    made = fresh()
    for name, parameter in made.named_parameters():
        parameter.copy_(parameters[name])
    return made
