"""Keep freed memory in the process, and measure the peaks of the process and of the device.

glibc returns the top of its heap to the system as soon as a few megabytes are free, and maps larger tensors anew each
time. Blocks of logits are allocated a hundred times a second, and faulting their pages in again costs several times
their arithmetic.

The peak is read from /proc: psutil has none on Linux, and that of `resource` may be the parent process's.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
from pathlib import Path

import torch

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
RETAINED_BYTES = 512 * 2**20  # stay with the process once freed
LARGEST_BLOCK = 32 * 2**20  # larger blocks are still returned; glibc allows no more than this


@functools.cache
def keep_freed_memory() -> bool:
    """Set it once per process. False if the C library has no such setting (not glibc)."""
    try:
        mallopt = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, RETAINED_BYTES))


def forget_peak(device: torch.device | None = None) -> None:
    """Reset the process's peak memory, if the system can (Linux), and the device's."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int | None:
    """The process's peak memory since `forget_peak`, in MiB; None if the system can't say."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) // 1024


def peaks(device: torch.device) -> dict[str, int | None]:
    """The peaks of the process's memory and of the device's, for the metrics."""
    own: dict[str, int | None] = {"memory_mib": peak_mib()}
    if device.type == "cuda":
        own["device_memory_mib"] = torch.cuda.max_memory_allocated(device) // 2**20
    return own
