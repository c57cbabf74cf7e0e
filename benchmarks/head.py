"""Time and memory of the chunked head against its floor, for every divergence; writes docs/evidence/head.json.

    .venv/bin/python benchmarks/head.py            # all divergences, about a quarter of an hour on two cores
    .venv/bin/python benchmarks/head.py forward_kl jsd

The floor is the four matrix products that no exact loss can do without (student's and teacher's logits, gradient of the
hidden states, gradient of the head), timed right before each measurement in the same process; the ratio is the median
of that many pairs. `naive` is the same loss written with autograd over all logits at once. Memory is the peak of the
process over what it held before, gradients that are handed back included.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.head import Head, PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.signals.dense import DenseSignal
from limbeck.training.memory import forget_peak, keep_freed_memory, peak_mib

VOCABULARY = 49_152
WIDTH = 576
ROUNDS = {2048: 2, 8192: 1}  # by number of positions
LARGE = ("forward_kl", "adaptive_kl")  # what is measured at 8,192 positions too
FLOOR_ROWS = 2048
SHARPNESS = 0.12  # makes the most likely token of a random head about as likely as a language model's


def tensors(positions: int, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, device=device)
    teacher = torch.randn(positions, WIDTH, device=device)
    teacher = 0.7 * teacher + 0.7 * hidden  # related, as a student and its teacher are
    head = SHARPNESS * torch.randn(VOCABULARY, WIDTH, device=device)
    other = head + 0.2 * SHARPNESS * torch.randn_like(head)
    targets = torch.randint(0, VOCABULARY, (positions,), device=device)
    return {
        "hidden": hidden.requires_grad_(),
        "head": head.requires_grad_(),
        "teacher": teacher,
        "teacher_head": other,
        "targets": targets,
    }


def floor(data: dict[str, Tensor]) -> None:
    hidden = data["hidden"].detach()
    head = data["head"].detach()
    for start in range(0, len(hidden), FLOOR_ROWS):
        part = slice(start, start + FLOOR_ROWS)
        logits = hidden[part] @ head.T
        data["teacher"][part] @ data["teacher_head"].T
        logits @ head
        logits.T @ hidden[part]


def fused(data: dict[str, Tensor], name: str) -> None:
    positions = len(data["hidden"])
    evidence = PositionEvidence(data["targets"], DenseSignal(data["teacher"], Head(data["teacher_head"])))
    weights = torch.ones(1, positions, device=data["hidden"].device)
    total = fused_loss(
        data["hidden"],
        Head(data["head"]),
        [make_term(name, {}).at_step(0, {})],
        [1 / positions],
        weight_KN=weights,
        evidence=evidence,
    )
    torch.autograd.grad(total.loss, (data["hidden"], data["head"]))


def naive(data: dict[str, Tensor]) -> None:
    """Forward KL as it is usually written."""
    student = log_softmax(data["hidden"] @ data["head"].T, -1)
    with torch.no_grad():
        teacher = log_softmax(data["teacher"] @ data["teacher_head"].T, -1)
    loss = kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
    torch.autograd.grad(loss, (data["hidden"], data["head"]))


def seconds(run: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_extra(run: Callable[[], None], device: str) -> float | None:
    """MiB above what was held before, at the peak; None where the system can't say."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # else memory kept from the run before would hide this one's
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    except (OSError, AttributeError):
        return None
    forget_peak()
    before = peak_mib()
    run()
    after = peak_mib()
    return None if before is None or after is None else after - before


def measure(run: Callable[[], None], data: dict[str, Tensor], device: str, rounds: int) -> dict[str, Any]:
    memory = peak_extra(run, device)
    ratios = []
    for _ in range(rounds):
        base = seconds(lambda: floor(data), device)
        ratios.append(seconds(run, device) / base)
    facts: dict[str, Any] = {
        "times_the_floor": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
    }
    return facts | ({} if memory is None else {"peak_extra_mib": round(memory)})


def all_of(positions: int, names: list[str], device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(each loss's figures, the floor's) at this many positions."""
    data = tensors(positions, device)
    floor(data)
    base = statistics.median(seconds(lambda: floor(data), device) for _ in range(2))
    runs: dict[str, Callable[[], None]] = {name: partial(fused, data, name) for name in names}
    if positions == min(ROUNDS):
        runs["naive forward_kl"] = partial(naive, data)
    found = {}
    for name, run in runs.items():
        found[name] = measure(run, data, device, ROUNDS[positions])
        print(positions, name, found[name], flush=True)
    rate = 8 * positions * WIDTH * VOCABULARY / base / 1e9
    return found, {"seconds": round(base, 3), "gflop_per_second": round(rate, 1)}


def main(names: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {}
    keep_freed_memory()  # as training does
    fused(tensors(64, device), names[0])  # libraries allocate their own buffers at the first call
    for positions in ROUNDS:
        found, base = all_of(positions, [name for name in names if positions == min(ROUNDS) or name in LARGE], device)
        for name, facts in (found | {"floor": base}).items():
            results.setdefault(name, {})[str(positions)] = facts
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vocabulary": VOCABULARY,
        "width": WIDTH,
    }
    file = Path(__file__).parent.parent / "docs" / "evidence" / "head.json"
    file.write_text(
        json.dumps({"command": "python benchmarks/head.py", "machine": machine, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(DIVERGENCES))
