"""Token ids in as few bits as the vocabulary needs.

Shapes: M ids.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def id_bits(vocab_size: int) -> int:
    """How many bits a token id takes."""
    return max(1, math.ceil(math.log2(vocab_size)))


def pack_bits(ids_M: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, `bits` bits each, as bytes [ceil(M bits / 8)]."""
    octets_M4 = ids_M.numpy().astype(">u4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.packbits(np.unpackbits(octets_M4, axis=1)[:, 32 - bits :].reshape(-1)))


def unpack_bits(octets: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers that `pack_bits` packed [count]."""
    all_bits = np.unpackbits(octets.numpy(), count=count * bits).reshape(count, bits)
    padded = np.concatenate([np.zeros((count, 32 - bits), np.uint8), all_bits], axis=1)
    return torch.from_numpy(np.packbits(padded, axis=1).view(">u4")[:, 0].astype(np.int64))
