"""How the weights of a GGUF file are stored: as numbers of 32 or 16 bits, or as blocks of codes.

`gguf` writes numbers and q8_0. The smaller types are made by llama.cpp's own `ggml_quantize_chunk`, from the packaged
library (extra `serve`). Which matrices get more bits than the rest (`_k_m`) is llama.cpp's rule for its type of that
name. Not covered: importance matrices, and types of less than four bits, which need them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Codes
from gguf.quants import quantize

from limbeck.types import UserError, nearest

PYTHON_MAKES = {Codes.F32, Codes.F16, Codes.BF16, Codes.Q8_0}
# For rows whose length is no multiple of 256. llama.cpp has Q5_1 in place of Q5_K: larger, and on the weights of
# SmolLM2-135M further from them.
SHORT_ROWS = {Codes.Q4_K: Codes.Q5_0, Codes.Q5_K: Codes.Q5_0, Codes.Q6_K: Codes.Q8_0}
MORE_BITS = (".attn_v.", ".attn_qkv.", ".ffn_down.")


@dataclass(frozen=True)
class FileType:
    """A type of file, as `--type` names it.

    `most_kl` is the KL to the student (nats a token) beyond which a file is called wrong: several times what was
    measured on students of 110 to 135 million parameters, which lose more than large ones.
    """

    name: str
    number: LlamaFileType
    codes: Codes
    more: Codes
    most_kl: float

    def codes_of(self, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> Codes:
        """How the tensor `name` of this shape (rows first, as torch has it) is stored."""
        if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
            return Codes.F32
        wanted = self.codes
        is_head = name == "output.weight" or (tied and name == "token_embd.weight")
        if is_head or (any(part in name for part in MORE_BITS) and _has_more_bits(int(name.split(".")[1]), layers)):
            wanted = self.more
        if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            wanted = SHORT_ROWS.get(wanted, Codes.F16)
        return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else Codes.F16


TYPES = {
    kind.name: kind
    for kind in (
        FileType("f32", LlamaFileType.ALL_F32, Codes.F32, Codes.F32, most_kl=0.001),
        FileType("f16", LlamaFileType.MOSTLY_F16, Codes.F16, Codes.F16, most_kl=0.01),
        FileType("bf16", LlamaFileType.MOSTLY_BF16, Codes.BF16, Codes.BF16, most_kl=0.03),
        FileType("q8_0", LlamaFileType.MOSTLY_Q8_0, Codes.Q8_0, Codes.Q8_0, most_kl=0.05),
        FileType("q6_k", LlamaFileType.MOSTLY_Q6_K, Codes.Q6_K, Codes.Q6_K, most_kl=0.1),
        FileType("q5_k_m", LlamaFileType.MOSTLY_Q5_K_M, Codes.Q5_K, Codes.Q6_K, most_kl=0.5),
        FileType("q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, Codes.Q4_K, Codes.Q6_K, most_kl=0.5),
        FileType("q4_0", LlamaFileType.MOSTLY_Q4_0, Codes.Q4_0, Codes.Q6_K, most_kl=1.0),
    )
}


def file_type(name: str) -> FileType:
    """The type of this name.

    Raises:
        UserError: there is none, or it needs the packaged llama.cpp and that is not here.
    """
    kind = TYPES.get(name.lower())
    if kind is None:
        raise UserError(
            f"--type {name} is not made here{nearest(name.lower(), TYPES)} (there are {', '.join(TYPES)}); llama.cpp's"
            f" own program makes others from an exported file of type f16: llama-quantize STUDENT-f16.gguf"
            f" STUDENT-{name.lower()}.gguf {name.upper()}"
        )
    if kind.codes not in PYTHON_MAKES:
        _library(kind.name)
    return kind


def stored_bytes(shape: tuple[int, ...], codes: Codes) -> int:
    block, size = GGML_QUANT_SIZES[codes]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode(weights: np.ndarray[Any, Any], codes: Codes) -> np.ndarray[Any, Any]:
    """Weights (float32, rows last to first as torch has them) in the form in which they are stored."""
    if codes in PYTHON_MAKES:
        stored: np.ndarray[Any, Any] = quantize(weights, codes)
        return stored
    source = np.ascontiguousarray(weights, dtype=np.float32)
    rows, columns = source.size // source.shape[-1], source.shape[-1]
    target = np.empty(stored_bytes(source.shape, codes), dtype=np.uint8)
    arguments = (int(codes), source.ctypes.data, target.ctypes.data, 0, rows, columns, None)
    written = _library(codes.name)(*arguments)
    assert written == target.nbytes, f"{codes.name} took {written} bytes and not {target.nbytes}"
    return target.reshape(*source.shape[:-1], -1)


@cache
def _library(name: str) -> Any:
    """llama.cpp's `ggml_quantize_chunk(type, source, target, start, rows, columns, importances)`."""
    try:
        import xllamacpp.xllamacpp as packaged

        quantise = ctypes.CDLL(packaged.__file__).ggml_quantize_chunk
    except ImportError as error:
        raise UserError(
            f"weights of type {name} are made by llama.cpp: pip install 'limbeck[serve]', or take f16 or q8_0"
        ) from error
    except (OSError, AttributeError) as error:
        raise UserError(
            f"the packaged llama.cpp doesn't make weights of type {name} on this system: export as f16, and make them"
            f" with llama.cpp's own program (llama-quantize STUDENT-f16.gguf STUDENT-{name}.gguf {name.upper()})"
        ) from error
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return quantise


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer's most sensitive matrices are stored in more bits: the first and last eighth, and every third."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
