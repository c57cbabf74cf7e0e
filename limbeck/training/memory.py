"""Keep freed memory for the next block instead of handing it back to the system.

glibc gives the top of its heap back as soon as a few megabytes are free, and maps larger tensors anew each time. Blocks
of logits come and go a hundred times a second, and faulting their pages in again costs several times their arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
from pathlib import Path

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT = 512 * 2**20  # bytes that stay with the process once freed
LARGEST = 32 * 2**20  # larger blocks still go to the system and back; glibc takes no more than this


@functools.cache
def keep_freed_memory() -> bool:
    """Ask for it once per process. False where the C library has no such setting (not glibc)."""
    try:
        mallopt = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))


def forget_peak() -> None:
    """Begin to count the process's peak memory anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int | None:
    """The most memory the process held since `forget_peak`, in MiB; None where the system can't say."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) // 1024
