"""Frozen weights in 8 or 4 bits: the linear layers of a decoder; its embeddings, norms and head stay as they are.

Only weights are rounded, never what they are multiplied with. So a quantised model is the same model on every device,
and for every composition of a batch, up to the rounding of its sums, and gradients pass through it exactly.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.types import RecipeError, UserError

BLOCKS = (64, 32)  # neighbouring weights of a row that share a scale in int4; the first that divides the row is taken
EXTRA = "quantise"


class QuantisedLinear(nn.Linear, ABC):
    """A linear layer whose frozen `weight` holds codes, which `scale` turns into numbers."""

    scale: Tensor

    def __init__(self, layer: nn.Linear, codes: Tensor, scale: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().to(codes.device), requires_grad=False)

    @property
    def weights(self) -> int:
        """How many weights the codes stand for."""
        return self.in_features * self.out_features

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return self._with_bias(input)
        with torch.autocast(kind, enabled=False):
            return self._with_bias(input.to(torch.get_autocast_dtype(kind)))

    def _with_bias(self, x: Tensor) -> Tensor:
        output = self.product(x)
        return output if self.bias is None else output + self.bias.to(x.dtype)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T in the type of `x`; W gets no gradient, and is not kept in full for the backward pass."""

    @abstractmethod
    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers [outputs, inputs]."""


class Int8Linear(QuantisedLinear):
    """Whole numbers from -127 to 127, with one scale a row.

    Plain torch: bitsandbytes' 8-bit layer rounds its inputs too, in float16, and differently on each device.
    """

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device) -> Int8Linear:
        weight_OI = layer.weight.detach().to(device, torch.float32)
        scale_O1 = weight_OI.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        return cls(layer, (weight_OI / scale_O1).round_().to(torch.int8), scale_O1)

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = _Int8Product.apply(x, self.weight, self.scale)
        return y

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scale).to(dtype)


class _Int8Product(torch.autograd.Function):
    """x (c W)^T with codes W and their rows' scales c; only the codes are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
        ctx.save_for_backward(codes_OI, scale_O1)
        return nn.functional.linear(x, (codes_OI * scale_O1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes_OI, scale_O1 = ctx.saved_tensors
        (grad,) = grads
        return grad @ (codes_OI * scale_O1).to(grad.dtype), None, None


class Int4Linear(QuantisedLinear):
    """4-bit NormalFloat (QLoRA, arXiv:2305.14314) by bitsandbytes: two codes a byte, with one scale a block of a
    row."""

    block: int

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device) -> Int4Linear:
        block = next(block for block in BLOCKS if layer.in_features % block == 0)
        weight_OI = layer.weight.detach().to(device).contiguous()
        codes, state = _bitsandbytes().functional.quantize_4bit(weight_OI, blocksize=block, quant_type="nf4")
        quantised = cls(layer, codes, state.absmax.float())
        quantised.block = block
        return quantised

    def _state(self, dtype: torch.dtype) -> Any:
        shape = torch.Size((self.out_features, self.in_features))
        return _bitsandbytes().functional.QuantState(
            self.scale.float(), shape=shape, blocksize=self.block, quant_type="nf4", dtype=dtype
        )

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = _bitsandbytes().matmul_4bit(x, self.weight, self._state(x.dtype))
        return y

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        weight_OI: Tensor = _bitsandbytes().functional.dequantize_4bit(self.weight, self._state(dtype))
        return weight_OI


LAYERS: dict[str, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


@torch.no_grad()
def quantise(net: PreTrainedModel, kind: str, device: torch.device, source: str) -> None:
    """Quantise the linear layers of a model in place, moving them to `device` one by one. `source` is the user's name
    for it.

    Raises:
        UserError: layers that can't be quantised, or bitsandbytes is not installed.
    """
    layers = _linear_layers(net, source)
    if kind == "int4":
        _bitsandbytes()
        if odd := [name for name, layer in layers.items() if layer.in_features % BLOCKS[-1]]:
            raise UserError(
                f"{source}: int4 takes rows of a multiple of {BLOCKS[-1]} weights, and {odd[0]} has"
                f" {layers[odd[0]].in_features}: write int8, or bfloat16"
            )
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, LAYERS[kind].of(layer, device))


def refuse(kind: str | None, config: Any, path: str) -> None:
    """Refuse what can't be quantised, as far as a model's configuration tells. `path` is where the recipe asks for it.

    Raises:
        RecipeError: rows without blocks of their own, or bitsandbytes is not installed.
    """
    if kind != "int4":
        return
    if find_spec("bitsandbytes") is None:
        raise RecipeError(path, f"int4 needs bitsandbytes: pip install 'limbeck[{EXTRA}]', or write int8")
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % BLOCKS[-1]:
            raise RecipeError(
                path,
                f"int4 takes rows of a multiple of {BLOCKS[-1]} weights, and the model's {name} is {size}: write int8",
            )


def _linear_layers(net: PreTrainedModel, source: str) -> dict[str, nn.Linear]:
    """The linear layers but the head, by name. Refused where they are the smaller part of the weights: quantising them
    would not do what the user asked for."""
    head = net.get_output_embeddings()
    kept = {id(head.weight), id(net.get_input_embeddings().weight)}
    layers = {name: module for name, module in net.named_modules() if type(module) is nn.Linear and module is not head}
    inside = sum(layer.weight.numel() for layer in layers.values())
    whole = sum(parameter.numel() for parameter in net.parameters() if id(parameter) not in kept)
    if 2 * inside < whole:
        raise UserError(
            f"{source}: only {inside:,} of the {whole:,} weights in its layers are in linear ones, which is what can be"
            f" quantised of a {net.config.model_type}: give dtype: bfloat16 instead"
        )
    return layers


def _bitsandbytes() -> Any:
    """The library, imported when it is first needed.

    Raises:
        UserError: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"int4 needs bitsandbytes ({str(error).splitlines()[0]}): pip install 'limbeck[{EXTRA}]', or write int8"
        ) from error
    return bitsandbytes
