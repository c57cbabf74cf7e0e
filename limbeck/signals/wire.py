"""Hidden states and a head as bytes that check themselves: what a states server sends, and a head's form in a cache.

A body is a safetensors file whose header says the SHA-256 of its tensors, beside what its sender adds.

Shapes: N positions, E width of the teacher, V vocabulary, R rank of an adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from limbeck.objectives.head import Head

DIGEST = "sha256"
NUMBERS = "head"  # the key of a head's scale and cap


def sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Tensors with facts about them, as one body."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {**facts, DIGEST: digest_of(plain)})


def opened(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a body and its facts.

    Raises:
        ValueError: it is cut short, changed, or no such body.
    """
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"no whole safetensors file ({str(error)[:80]})") from error
    facts = header.get("__metadata__", {})
    if facts.get(DIGEST) != digest_of(tensors):
        raise ValueError("its numbers are not those that its SHA-256 is of")
    return tensors, facts


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_head(head: Head) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The head's tensors, with adapters folded in, and its numbers."""
    weight_VE = head.weight_VD
    if head.low_rank is not None:
        a_RE, b_VR, scaling = head.low_rank
        weight_VE = weight_VE + (b_VR @ a_RE * scaling).to(weight_VE.dtype)
    tensors = {"weight": weight_VE.contiguous()} | ({} if head.bias_V is None else {"bias": head.bias_V.contiguous()})
    return tensors, {NUMBERS: json.dumps({"scale": head.scale, "softcap": head.softcap})}


def head_from(tensors: Mapping[str, Tensor], facts: Mapping[str, str], device: torch.device | str = "cpu") -> Head:
    """The head that `plain_head` took apart, on a device.

    Raises:
        ValueError: a tensor or a number is missing.
    """
    try:
        numbers = json.loads(facts[NUMBERS])
        bias_V = tensors["bias"].to(device) if "bias" in tensors else None
        return Head(tensors["weight"].to(device), bias_V, scale=numbers["scale"], softcap=numbers["softcap"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a head without {error}") from error
