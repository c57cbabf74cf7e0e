"""The frame of a GGUF file, checked before a library reads it: no length leads out of the file, and no tensor is cut.

The readers of GGUF (Python's and llama.cpp's) believe the lengths that a file gives: one of 2^60 keeps them busy for
ever, or ends the process. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from limbeck.types import UserError, printable

MAGIC, VERSIONS = b"GGUF", (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type's code
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"
MOST_DIMENSIONS = 4


class BrokenError(Exception):
    """What is wrong with a file."""


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF file, or not whole.

    Raises:
        UserError: says what is wrong, and at which byte.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Frame(content).check()
    except (BrokenError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"{path} can't be read as a GGUF model: {error}; copy or download it again") from error


class _Frame:
    """A file that is read from its beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = 0

    def check(self) -> None:
        if self.content[:4] != MAGIC:
            raise BrokenError("it doesn't begin with GGUF")
        self.at = 4
        version, tensors, settings = self.u32(), self.u64(), self.u64()
        if version not in VERSIONS:
            raise BrokenError(f"its version is {version}; 2 and 3 are known, little endian")
        alignment = 32
        for _ in range(settings):  # each takes bytes of the file, so that it ends
            name = self.string()
            code = self.u32()
            if name == ALIGNMENT and code == 4:
                alignment = self.u32()
            else:
                self.value(code)
        if alignment <= 0 or alignment & (alignment - 1):
            raise BrokenError(f"its {ALIGNMENT} is {alignment}, which is no power of two")
        ends = [self.tensor() for _ in range(tensors)]
        begin = -(-self.at // alignment) * alignment
        for name, end in ends:
            if begin + end > len(self.content):
                missing = begin + end - len(self.content)
                raise BrokenError(f"it ends {missing:,} bytes before the end of the tensor {printable(name)}")

    def skip(self, count: int) -> int:
        """Go on by so many bytes; returns where they begin."""
        begin = self.at
        if begin + count > len(self.content):
            raise BrokenError(f"it ends in the middle: at byte {begin:,}, {count:,} bytes are announced")
        self.at += count
        return begin

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.content, self.skip(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.content, self.skip(8))[0])

    def string(self) -> str:
        count = self.u64()
        begin = self.skip(count)
        return self.content[begin : begin + count].decode(errors="replace")

    def value(self, code: int) -> None:
        """Read over a value of this type."""
        if code in SIZES:
            self.skip(SIZES[code])
        elif code == STRING:
            self.skip(self.u64())
        elif code == ARRAY:
            item, count = self.u32(), self.u64()
            if item in SIZES:
                self.skip(SIZES[item] * count)
            elif item == STRING:
                for _ in range(count):
                    self.skip(self.u64())
            else:
                raise BrokenError(f"at byte {self.at:,} there are arrays in an array, or a type {item}")
        else:
            raise BrokenError(f"at byte {self.at:,} there is a value of type {code}, which is unknown")

    def tensor(self) -> tuple[str, int]:
        """(a tensor's name, where it ends, from the beginning of all tensors)."""
        name = self.string()
        count = self.u32()
        if not 1 <= count <= MOST_DIMENSIONS:
            raise BrokenError(f"the tensor {printable(name)} has {count:,} dimensions")
        shape = [self.u64() for _ in range(count)]
        code, offset = self.u32(), self.u64()
        try:
            numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
        except (ValueError, KeyError) as error:
            raise BrokenError(f"the tensor {printable(name)} is of type {code}, which is unknown") from error
        if shape[0] % numbers:
            raise BrokenError(f"the tensor {printable(name)} has rows of {shape[0]:,} numbers, in blocks of {numbers}")
        return name, offset + math.prod(shape) // numbers * size
