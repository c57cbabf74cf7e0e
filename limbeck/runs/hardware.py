"""How fast and how large a device is: measured where it is here, from a data sheet or as stated where not."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from limbeck.config.cluster import Cluster
from limbeck.models.placement import CPU, describe, multiplies_in_bfloat16
from limbeck.types import UserError, nearest

GIB = 2**30
CPU_OVERHEAD = 1.7  # a training step takes so many times the operations' time at the rate of plain matrix products
GPU_OVERHEAD = 2.5  # 40 % of the data sheet's rate, about what dense training reaches; not measured by us


@dataclass(frozen=True)
class Hardware:
    """A device for estimates.

    Args:
        rates: floating-point operations a second of dense matrix products, by type.
        memory: bytes; None where the process's memory is what counts.
        overhead: how many times longer than its operations a step takes.
        measured: whether the rates are this machine's own.
        cluster: the machines that it is a device of, where their numbers were stated.
    """

    name: str
    rates: dict[torch.dtype, float]
    memory: int | None = None
    overhead: float = CPU_OVERHEAD
    measured: bool = True
    cluster: Cluster | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second that a training reaches in this type."""
        return self.rates.get(dtype, self.rates[torch.float32]) / self.overhead

    @property
    def auto(self) -> str:
        """What `auto` stands for in a recipe that runs there: cuda or cpu."""
        if self.cluster is not None:
            return "cpu" if self.cluster.kind == "cpu" else "cuda"
        return "cuda" if not self.measured or torch.cuda.is_available() else "cpu"


def _listed(name: str, gib: int, *, fp32: float, bf16: float) -> Hardware:
    rates = {torch.float32: fp32 * 1e12, torch.bfloat16: bf16 * 1e12, torch.float16: bf16 * 1e12}
    return Hardware(name, rates, memory=gib * GIB, overhead=GPU_OVERHEAD, measured=False)


# From the makers' data sheets: GiB, and dense TFLOP/s in fp32 and in bf16 with fp32 sums.
LISTED = {
    hardware.name: hardware
    for hardware in (
        _listed("b200-180gb", 180, fp32=80, bf16=2250),
        _listed("h200-141gb", 141, fp32=67, bf16=989),
        _listed("h100-80gb", 80, fp32=67, bf16=989),
        _listed("a100-80gb", 80, fp32=19.5, bf16=312),
        _listed("a100-40gb", 40, fp32=19.5, bf16=312),
        _listed("l40s-48gb", 48, fp32=91.6, bf16=362),
        _listed("a10g-24gb", 24, fp32=31.2, bf16=70),
        _listed("l4-24gb", 24, fp32=30.3, bf16=121),
        _listed("rtx-5090-32gb", 32, fp32=105, bf16=209),
        _listed("rtx-4090-24gb", 24, fp32=82.6, bf16=165),
        _listed("rtx-3090-24gb", 24, fp32=35.6, bf16=71),
    )
}


def listed(name: str) -> Hardware:
    """The hardware of this name.

    Raises:
        UserError: not in the list.
    """
    if name.lower() not in LISTED:
        raise UserError(f"--device-like: no data of {name!r}{nearest(name.lower(), LISTED)}")
    return LISTED[name.lower()]


def stated(cluster: Cluster) -> Hardware:
    """A device of machines by the numbers that are stated for them."""
    rates = {torch.float32: cluster.tflops.float32 * 1e12}
    if cluster.tflops.bfloat16 is not None:
        rates[torch.bfloat16] = cluster.tflops.bfloat16 * 1e12
    return Hardware(
        cluster.name,
        rates,
        memory=cluster.memory_bytes,
        overhead=1 / cluster.utilisation,
        measured=False,
        cluster=cluster,
    )


def measured(device: torch.device, dtype: torch.dtype = torch.float32) -> Hardware:
    """This machine's device, with the rate of its matrix products in this type."""
    if device.type != "cuda":
        is_fast = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_in_bfloat16()
        types = {torch.float32, dtype} if is_fast else {torch.float32}
        return Hardware(describe(device), {kind: matrix_rate(device, kind) for kind in types})
    rates = {kind: matrix_rate(device, kind, shape=(4096, 4096, 4096)) for kind in {torch.float32, dtype}}
    memory = torch.cuda.get_device_properties(device).total_memory
    return Hardware(describe(device), rates, memory, overhead=GPU_OVERHEAD)


def matrix_rate(
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 0.4,
    shape: tuple[int, int, int] = (512, 576, 1536),
) -> float:
    """Operations a second of matrix products of this shape (rows, inner, outer), measured now, with torch's threads."""
    rows, inner, outer = shape
    a = torch.randn(rows, inner, dtype=dtype, device=device)
    b = torch.randn(outer, inner, dtype=dtype, device=device)
    a @ b.T
    synchronize(device)
    began = time.perf_counter()
    products = 0
    while time.perf_counter() - began < seconds:
        a @ b.T
        synchronize(device)
        products += 1
    return 2.0 * rows * inner * outer * products / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
