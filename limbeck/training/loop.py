"""The one training loop, blind to methods: terms return sums, the loop divides once and steps.

loss = sum_k weight_k * (sum of w * l_k) / (sum of w), the sums taken over the step's response tokens (or rows, or
groups of answers), whatever its split into micro-batches and ranks. Killed at any moment, a run goes on from its last
checkpoint with the same losses to the bit (same machine, same thread count): the order of the text is a function of the
seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.config.sections import Train
from limbeck.data.batches import MICRO_TOKENS, Row, make_batch, resized
from limbeck.models.placement import describe, is_out_of_memory
from limbeck.models.sharding import is_divided, is_part, like
from limbeck.objectives.forward import Sums
from limbeck.objectives.term import TermAtStep
from limbeck.objectives.total import total_loss
from limbeck.progress import StoppedError
from limbeck.storage import checkpoint
from limbeck.storage.files import append_json, crash_point, read_from, read_jsonl, write_text
from limbeck.training import distributed, guilty, sharded
from limbeck.training.job import Objective, TrainingJob
from limbeck.training.memory import forget_peak, keep_freed_memory, peaks
from limbeck.training.room import Room
from limbeck.types import TAUGHT, Batch, UserError, canonical_json, content_hash

Progress = Callable[[int, int, dict[str, Any]], None]
RANK_STRIDE = 2**56  # between the seeds of ranks
SAVING_SHARE = 0.05  # checkpoints take at most about this share of the time


def learning_rate(settings: Train, step: int, steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then a cosine down to `final_lr` of the peak."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    job: TrainingJob, progress: Progress = lambda step, steps, record: None, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Train to the end, or until `stop` returns true. Returns whether the end was reached; the state is always saved.

    Raises:
        UserError: the loss or the gradient is not finite; no update was made from it.
    """
    keep_freed_memory()
    sharded.begin(job)
    forget_peak(job.net.device)
    settings = job.settings
    room = Room.begin(job.folder, job.net, job.machine.micro_tokens)
    room.tokens = distributed.least(room.tokens)  # all ranks split the text alike
    steps = job.steps
    parameters = job.objective.parameters()
    optimizer = _optimizer(job, parameters)
    start = _resume(job, parameters, optimizer)
    distributed.same_everywhere(p for p in parameters.values() if not is_part(p))
    job.net.train()
    saved_at = time.monotonic()
    pause = settings.save_seconds
    for step in range(start, steps):
        try:
            record = _step(job, step, steps, room, parameters=parameters, optimizer=optimizer)
        except StoppedError:  # while the student wrote: the step has not begun
            _save(job, step, parameters, optimizer)
            return False
        if distributed.rank() == 0:
            append_json(job.folder / "metrics.jsonl", record)
        progress(step + 1, steps, record)
        crash_point("train.after_step")
        last = step + 1 == steps
        stops, waited = zip(*distributed.gather((stop(), time.monotonic() - saved_at)), strict=True)
        stopping = any(stops)
        if last or stopping or max(waited) >= pause:
            began = time.monotonic()
            _save(job, step + 1, parameters, optimizer)
            saved_at = time.monotonic()
            pause = max(distributed.gather(max(settings.save_seconds, (saved_at - began) / SAVING_SHARE)))
        if stopping and not last:
            return False
    job.net.eval()
    return True


def _step(
    job: TrainingJob,
    step: int,
    steps: int,
    room: Room,
    *,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Make the update of step number `step`; returns its line of the metrics."""
    began = time.perf_counter()
    states = job.objective.states
    text = job.text.step_batch(step, step / steps, states)
    terms = [term.at_step(step / steps, states) for term in job.terms]
    amounts, batches, sums = _gradients(job, text.micro_batches, terms, room, step=step)
    distributed.add_gradients(p for p in parameters.values() if not is_part(p))
    means = {t.label: sums.terms.get(t.label, 0.0) / amounts[t.label] if amounts[t.label] else 0.0 for t in terms}
    loss = sum(t.weight * means[t.label] for t in terms)
    norm = sharded.clip(parameters.values(), job.settings.clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        facts = {"step": step + 1, "loss": loss, "grad_norm": norm, "terms": means, "seed": _seed(job, step)}
        alone = None if is_divided(job.net) else partial(_alone, job, terms, step, parameters=parameters)
        groups, keep = job.objective.keeps_groups, distributed.rank() == 0
        guilty.refuse_step(job.folder, facts, text.micro_batches, alone, groups=groups, keep=keep)
    rate = learning_rate(job.settings, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if job.average is not None:
        job.average.update()
    for term in job.terms:
        if amounts[term.label]:  # a step without text for this term leaves its schedules alone
            term.after(states, (step + 1) / steps, means[term.label], sums.measured.get(term.label))
    scheduled = _scheduled(terms)
    rollout = text.facts | {name: total / count for name, (total, count) in sums.monitored.items() if count}
    tokens = int(sum(batch.tokens_BT.numel() for batch in batches))
    return {
        "step": step + 1,
        "steps": steps,
        "loss": loss,
        "terms": {label: mean for label, mean in means.items() if amounts[label]},  # a term without text has no value
        **({"scheduled": scheduled} if scheduled else {}),
        **({"rollout": rollout} if rollout else {}),
        "grad_norm": norm,
        "lr": rate,
        "response_tokens": int(sum(int(batch.mask_BT.sum()) for batch in batches)),
        **_taught(batches),
        "tokens": tokens,
        "padding": tokens - sum(len(row) for micro_batch in text.micro_batches for row in micro_batch),
        "seconds": round(time.perf_counter() - began, 4),
        **peaks(job.net.device),
    }


def _gradients(
    job: TrainingJob, micro_batches: Sequence[Sequence[Row]], terms: Sequence[TermAtStep], room: Room, *, step: int
) -> tuple[dict[str, float], list[Batch], Sums]:
    """Every micro-batch forward and backward; returns (the terms' amounts, the batches, the terms' sums over ranks).

    Where memory runs out, the step is replayed in smaller micro-batches; the sums are the same up to rounding. With
    divided weights it ends the run.
    """
    while True:
        # dropout, where the model has any: a step is replayed to the bit, and no two ranks draw the same
        torch.manual_seed(_seed(job, step) + RANK_STRIDE * distributed.rank())
        together = job.objective.keeps_groups
        if (most := _micro_tokens(room, micro_batches, together)) is not None:
            micro_batches = resized(micro_batches, most, together)
        batches = [make_batch(micro_batch) for micro_batch in micro_batches]
        amounts = _amounts(terms, batches)
        sums = Sums()
        shortage: str | None = None
        try:
            shares = distributed.shares(batches)
            job.objective.expect(shares[distributed.rank()])
            for batch, counts in sharded.passes(job, shares[distributed.rank()], batches, max(map(len, shares))):
                if counts:
                    sums.add(backward(job, batch, terms, amounts, step=step))
                else:
                    sharded.empty_pass(job, batch, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or is_divided(job.net):  # the others are in the midst of their passes
                raise
            shortage = str(error).splitlines()[0]
        told = None if shortage is None else f"{describe(job.net.device)}: {shortage}"
        parts, shortages = zip(*distributed.gather((sums, told)), strict=True)
        if not any(shortages):
            return amounts, batches, _added(parts)
        job.net.zero_grad(set_to_none=True)
        for learned in job.objective.learned.values():
            learned.zero_grad(set_to_none=True)
        room.shrink(batches, next(filter(None, shortages)), job.objective.keeps_groups)


def _micro_tokens(room: Room, micro_batches: Sequence[Sequence[Row]], together: bool) -> int | None:
    """The most tokens of a micro-batch: what fits; of several ranks no more than lets each have one, so that none is
    idle and none has two where one would do."""
    ranks = distributed.world_size()
    if ranks == 1:
        return room.tokens
    most = MICRO_TOKENS if room.tokens is None else room.tokens
    limit = math.ceil(sum(len(row) for rows in micro_batches for row in rows) / ranks)
    while limit < most and len(resized(micro_batches, limit, together)) > ranks:  # rows are padded, and don't fill it
        limit = math.ceil(limit * 1.05)
    return min(limit, most)


def _added(parts: Sequence[Sums]) -> Sums:
    """The sums of all ranks together."""
    whole = Sums()
    for part in parts:
        whole.add(part)
    return whole


def _scheduled(terms: Sequence[TermAtStep]) -> dict[str, float]:
    """The scheduled numbers of this step, for the metrics."""
    values = {f"{t.label}.weight": t.weight for t in terms if t.term.weight.shape != "constant"}
    for t in terms:
        values |= {
            f"{t.label}.{key}": t.params[key] for key, schedule in t.term.params.items() if schedule.shape != "constant"
        }
    return values


def _taught(batches: Sequence[Batch]) -> dict[str, int]:
    """How many of the step's tokens have the teacher's distribution, where it has gaps."""
    columns = [batch.columns[TAUGHT] for batch in batches if TAUGHT in batch.columns]
    return {"taught_tokens": int(sum(float(column_BT.sum()) for column_BT in columns))} if columns else {}


def _seed(job: TrainingJob, step: int) -> int:
    """Of what a step draws, such as dropout."""
    return job.settings.seed * 2**24 + step


def _alone(
    job: TrainingJob, terms: Sequence[TermAtStep], step: int, rows: Sequence[Row], *, parameters: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(loss, gradient norm) of some rows of a step by themselves; no update follows."""
    for p in parameters.values():
        p.grad = None
    torch.manual_seed(_seed(job, step))
    batch = make_batch(rows)
    amounts = _amounts(terms, [batch])
    sums = backward(job, batch, terms, amounts, step=step)
    loss = sum(t.weight * sums.terms.get(t.label, 0.0) / amounts[t.label] for t in terms if amounts[t.label])
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None))
    return loss, norm


@torch.no_grad()
def loss_on(objective: Objective, batches: Sequence[Batch], progress: float) -> float:
    """The weighted loss of all terms on these batches, without an update."""
    terms = [term.at_step(progress, objective.states) for term in objective.terms]
    training = objective.net.training
    amounts = _amounts(terms, batches)
    objective.net.eval()
    losses = [float(total_loss(terms, amounts, objective.learned, objective.forward(batch, 0))[0]) for batch in batches]
    objective.net.train(training)
    return sum(losses)


def _amounts(terms: Sequence[TermAtStep], batches: Sequence[Batch]) -> dict[str, float]:
    """By term label, the weight of its unit over all micro-batches: what its sum is divided by."""
    return {t.label: sum(batch.amount(t.term.unit, t.term.only, t.term.column) for batch in batches) for t in terms}


def backward(
    job: TrainingJob, batch: Batch, terms: Sequence[TermAtStep], amounts: Mapping[str, float], *, step: int = 0
) -> Sums:
    """Forward and backward of one micro-batch; returns each term's sum."""
    if is_divided(job.net) and sharded.is_empty(batch, terms):
        return sharded.empty_pass(job, batch, step)
    forward = job.objective.forward(batch, step)
    loss, sums = total_loss(terms, amounts, job.objective.learned, forward)
    loss.backward()
    sharded.settle(job)
    if job.monitor is not None:
        sums.monitored = job.monitor(forward)
    return sums


def _optimizer(job: TrainingJob, parameters: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only. A loss's own parameters may have `times` the learning rate."""
    settings = job.settings
    groups = dict[tuple[float, bool], dict[str, Any]]()
    for matrices in (True, False):
        for name, p in parameters.items():
            if (p.ndim >= 2) == matrices:
                times = job.objective.rate_multiplier(name)
                decay = settings.weight_decay if matrices else 0.0
                group = groups.setdefault((times, matrices), {"params": [], "weight_decay": decay, "times": times})
                group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=settings.betas, fused=True)


def _save(job: TrainingJob, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"weight/{name}": p for name, p in parameters.items()} | {
        f"frozen/{name}": t for name, t in job.objective.frozen().items()
    }
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = value
    if job.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in job.average.tensors.items()}
    whole, divided = sharded.apart(tensors)
    if distributed.rank() == 0:
        state = {
            "job": job.key,
            "rows": _rows_key(job.rows),
            "schedules": job.objective.states,
            "text": job.text.state(),
        }
        folder = job.folder / "checkpoints"
        checkpoint.save(folder, step, whole, state, parts=lambda new: _save_parts(new, divided))
    else:
        _save_parts(None, divided)
    distributed.wait()


def _save_parts(new: Path | None, divided: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Write every rank's rows of divided tensors; the hash of each file. A collective where there are any.

    Args:
        new: the folder of the new checkpoint, which rank 0 has begun.
    """
    if not divided:
        return {}
    folder = distributed.gather(new)[0]
    assert folder is not None
    own = checkpoint.save_part(folder, divided, distributed.rank(), of=distributed.world_size())
    return dict(distributed.gather(own))


def _resume(job: TrainingJob, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint, cut the metrics to it, and return the next step."""
    metrics = job.folder / "metrics.jsonl"
    newest = checkpoint.load_newest(job.folder / "checkpoints")
    step = 0 if newest is None else newest.step
    if newest is None:
        job.prepare()
    else:
        if (newest.state["job"], newest.state["rows"]) != (job.key, _rows_key(job.rows)):
            raise UserError(
                f"{job.folder / 'checkpoints'} belongs to other settings or other text; remove it or choose another"
                " --out"
            )
        job.objective.states.update(newest.state.get("schedules", {}))
        job.text.restore(newest.state.get("text", {}))
        _restore(job, newest.tensors, parameters, optimizer)
    if distributed.rank() == 0:
        with read_from(metrics):
            records = [record for record in read_jsonl(metrics) if record["step"] <= step]
        write_text(metrics, "".join(canonical_json(record) + "\n" for record in records))
    distributed.wait()
    if len(set(distributed.gather((step, job.steps, _rows_key(job.rows))))) > 1:
        raise UserError(
            f"the ranks do not find the same checkpoints and text in {job.folder}: give --out on a file system that all"
            " machines see, and run it again"
        )
    return step


@torch.no_grad()
def _restore(
    job: TrainingJob, tensors: Mapping[str, Tensor], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    for name, p in parameters.items():
        p.copy_(like(tensors[f"weight/{name}"], p))
        if f"step/{name}" in tensors:  # a parameter that no loss has reached yet has no state
            keys = ("step", "exp_avg", "exp_avg_sq")
            step, *moments = (tensors[f"{key}/{name}"].to(p.device) for key in keys)
            optimizer.state[p] = dict(zip(keys, (step, *(like(moment, p) for moment in moments)), strict=True))
    if job.average is not None:
        job.average.restore({name: tensors[f"average/{name}"] for name in job.average.tensors})
    for label, learned in job.objective.learned.items():
        prefix = f"frozen/{label}."
        frozen = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        learned.load_state_dict(frozen, strict=False)


def _rows_key(rows: Sequence[Row]) -> str:
    """A hash of the rows in their order, so that a checkpoint is never continued on other text."""
    return content_hash([row.sample_id for row in rows])[:16]
