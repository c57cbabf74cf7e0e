"""The one training loop, blind to methods: terms return sums, the loop divides once and steps.

loss = sum_k weight_k * (sum over response tokens of w * l_k) / (sum of w), the sums taken over the whole step,
whatever its split into micro-batches. Killed at any moment, a run goes on from its last checkpoint with the same
losses to the bit (same machine, same thread count): the order of the text is a function of the seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import checkpoint
from limbeck.data import Row, Step, make_batch, steps_from, steps_of_epoch
from limbeck.durable import append_json, crash_point, read_jsonl, write_text
from limbeck.models.load import head_of, hidden_states
from limbeck.objectives.head import TeacherSignal, fused_loss
from limbeck.objectives.term import Term
from limbeck.recipe import Train
from limbeck.types import Batch, UserError, canonical_json, content_hash

SignalSource = Callable[[Batch], TeacherSignal | None]
Progress = Callable[[int, int, dict[str, Any]], None]
SAVING_SHARE = 0.05  # checkpoints take at most about this share of the time


@dataclass(frozen=True)
class Job:
    """All that one training needs. `folder` receives `checkpoints/` and `metrics.jsonl`; `key` names the job."""

    net: PreTrainedModel
    rows: Sequence[Row]
    terms: Sequence[Term]
    signal: SignalSource
    settings: Train
    folder: Path
    key: str


def total_steps(rows: Sequence[Row], settings: Train) -> int:
    """How many updates the settings ask for."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    per_epoch = len(steps_of_epoch(rows, settings.seed, 0, settings.tokens_per_step))
    return max(1, round(settings.epochs * per_epoch))


def learning_rate(settings: Train, step: int, steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine down to `final_lr` of the peak."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(job: Job, progress: Progress = lambda step, steps, record: None, stop: Callable[[], bool] = lambda: False) -> bool:
    """Train to the end, or until `stop` says so. Returns whether the end was reached; the state is saved either way.

    Raises:
        UserError: the loss or the gradient is not finite; no update was made from it.
    """
    settings, steps = job.settings, total_steps(job.rows, job.settings)
    parameters: dict[str, Tensor] = {name: p for name, p in job.net.named_parameters() if p.requires_grad}
    optimizer = _optimizer(parameters, settings)
    start = _resume(job, parameters, optimizer)
    job.net.train()
    saved_at, pause = time.monotonic(), settings.save_seconds
    for step, content in enumerate(steps_from(job.rows, settings.seed, settings.tokens_per_step, start, steps), start):
        record = _step(job, content, step, steps, parameters, optimizer)
        append_json(job.folder / "metrics.jsonl", record)
        progress(step + 1, steps, record)
        crash_point("train.after_step")
        last, stopping = step + 1 == steps, stop()
        if last or stopping or time.monotonic() - saved_at >= pause:
            began = time.monotonic()
            _save(job, step + 1, parameters, optimizer)
            saved_at = time.monotonic()
            pause = max(settings.save_seconds, (saved_at - began) / SAVING_SHARE)
        if stopping and not last:
            return False
    job.net.eval()
    return True


def _step(
    job: Job, content: Step, step: int, steps: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """One update from the micro-batches of `content`."""
    began = time.perf_counter()
    torch.manual_seed(job.settings.seed * 2**24 + step)  # dropout, where the model has any: a step is replayed to the bit
    batches = [make_batch(job.rows, micro_batch) for micro_batch in content]
    weight = float(sum(float(batch.weight_BT.sum()) for batch in batches))
    scales = [term.weight / weight for term in job.terms]
    sums = dict.fromkeys((term.name for term in job.terms), 0.0)
    for batch in batches:
        for name, value in backward(job, batch, scales).items():
            sums[name] += value
    loss = sum(term.weight * sums[term.name] for term in job.terms) / weight
    norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), job.settings.clip))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        samples = [sample_id[:12] for batch in batches for sample_id in batch.sample_ids]
        raise UserError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {norm}, so no update was made; samples "
            f"{', '.join(samples[:4])}...: lower train.lr, or look at those samples' logits"
        )
    rate = learning_rate(job.settings, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "loss": loss,
        "terms": {name: value / weight for name, value in sums.items()},
        "grad_norm": norm,
        "lr": rate,
        "response_tokens": int(weight),
        "tokens": int(sum(batch.tokens_BT.numel() for batch in batches)),
        "seconds": round(time.perf_counter() - began, 4),
    }


def backward(job: Job, batch: Batch, scales: Sequence[float]) -> dict[str, float]:
    """Forward and backward of one micro-batch; returns each term's sum over its response tokens."""
    device = job.net.device
    rows_N, positions_N = batch.response_positions()
    signal = job.signal(batch)
    hidden_BTD = hidden_states(job.net, batch.tokens_BT.to(device))
    projection = fused_loss(
        hidden_BTD[rows_N, positions_N],
        head_of(job.net),
        job.terms,
        scales,
        batch.tokens_BT[rows_N, positions_N + 1].to(device),
        batch.weight_BT[rows_N, positions_N + 1].to(device),
        signal,
    )
    projection.total.backward()
    return projection.sums


def _optimizer(parameters: dict[str, Tensor], settings: Train) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True)


def _save(job: Job, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"weight/{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = value
    checkpoint.save(job.folder / "checkpoints", step, tensors, {"job": job.key, "rows": _rows_key(job.rows)})


def _resume(job: Job, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint back, cut the metrics to it, and return the step to go on with."""
    metrics = job.folder / "metrics.jsonl"
    found = checkpoint.load_newest(job.folder / "checkpoints")
    step = 0 if found is None else found.step
    if found is not None:
        if (found.state["job"], found.state["rows"]) != (job.key, _rows_key(job.rows)):
            raise UserError(f"{job.folder / 'checkpoints'} belongs to other settings or other text; remove it or choose another --out")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(found.tensors[f"weight/{name}"])
                optimizer.state[p] = {
                    key: found.tensors[f"{key}/{name}"].to(p.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    kept = [record for record in read_jsonl(metrics) if record["step"] <= step]
    write_text(metrics, "".join(canonical_json(record) + "\n" for record in kept))
    return step


def _rows_key(rows: Sequence[Row]) -> str:
    """A short name of the text in its order, so that a checkpoint never goes on with another."""
    return content_hash([row.sample_id for row in rows])[:16]
