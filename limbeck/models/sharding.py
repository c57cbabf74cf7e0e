"""A model's weights divided among the ranks by torch's `fully_shard` (FSDP2), layer by layer.

Every matrix of the model is divided: each rank keeps 1/N of it, and a layer is gathered whole while it computes.
Embeddings, head and whatever else stands outside the layers stay gathered from the forward pass to the end of the
backward pass, since the losses read the head's weight itself. Vectors (norms, biases) and adapters are small: every
rank holds them, and their gradients are summed by the caller.

A pass of the decoder is a collective: every rank must make as many as the others.

Shapes: B rows, T positions, D hidden width.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from limbeck.models.weights import layer_list
from limbeck.types import UserError

FORWARD = "limbeck_decoder"  # the method of a divided model that runs its decoder
NEEDED = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms")


def divide(net: PreTrainedModel, rounded: torch.dtype | None = None) -> None:
    """Divide a model's weights among all ranks, in place.

    Args:
        rounded: the type in which its layers compute, and in which they are gathered; what is kept is as it was.

    Raises:
        UserError: this torch is too old.
    """
    # a second of imports that only divided models need
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not all(hasattr(FSDPModule, name) for name in NEEDED):
        raise UserError(f"machine.shard: torch {torch.__version__} can't; install a newer one, or leave it out")
    mesh = init_device_mesh(net.device.type, (distributed.get_world_size(),))
    whole = {p for name, p in net.named_parameters() if p.ndim < 2 or "lora_" in name}
    layers = list(layer_list(net.get_decoder())[1])
    policy = MixedPrecisionPolicy()
    if rounded is not None:  # gathered in what autocast would round them to
        policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(net, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    for module in (*layers, net):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # gradients are sums over the step, as in one process
        module.set_force_sum_reduction_for_comms(True)
    setattr(net, FORWARD, types.MethodType(_run_decoder, net))
    register_fsdp_forward_method(net, FORWARD)


def _run_decoder(net: PreTrainedModel, /, **inputs: Any) -> Any:
    return net.get_decoder()(**inputs)


def is_divided(net: nn.Module) -> bool:
    """Whether `divide` has divided it."""
    return FORWARD in vars(net)


def run_decoder(net: PreTrainedModel, **inputs: Any) -> Any:
    """A pass of the decoder, through the hooks that gather the weights of a divided model."""
    return getattr(net, FORWARD)(**inputs) if is_divided(net) else net.get_decoder()(**inputs)


def let_go(net: PreTrainedModel) -> None:
    """Free the gathered weights outside the layers, after a pass without gradient; what was read of them is gone."""
    if is_divided(net):
        divided: Any = net
        divided.reshard()


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks; a collective where it is divided."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A whole tensor that every rank has, divided as `part` is; no communication."""
    if not isinstance(part, DTensor):
        return tensor
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


def held(parameters: Iterable[Tensor]) -> int:
    """How many numbers of these parameters this rank holds."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
