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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.config.sections import Train
from limbeck.data.batches import FixedText, Row, Source, StepBatch, make_batch, steps_of_epoch
from limbeck.data.mixup import MixupSource
from limbeck.models.load import head_of
from limbeck.models.self_teacher import Average
from limbeck.models.taps import features
from limbeck.objectives.rank import clamped_baseline
from limbeck.objectives.schedule import State
from limbeck.objectives.term import Term, TermAtStep
from limbeck.objectives.total import NO_TAPS, Learned, StudentForward, Sums, Taps, TeacherView, total_loss
from limbeck.progress import StoppedError
from limbeck.storage import checkpoint
from limbeck.storage.files import append_json, crash_point, read_jsonl, write_text
from limbeck.training import distributed
from limbeck.training.memory import forget_peak, keep_freed_memory, peak_mib
from limbeck.types import Batch, UserError, canonical_json, content_hash

Progress = Callable[[int, int, dict[str, Any]], None]
SAVING_SHARE = 0.05  # checkpoints take at most about this share of the time


def no_teacher(_: Batch) -> TeacherView:
    """The view of a teacher that no term reads."""
    return TeacherView()


@dataclass
class TrainingJob:
    """All that one training needs. `folder` receives `checkpoints/` and `metrics.jsonl`; `key` names the job.

    `matches` are what terms learn beside the student, by term label, and `taps` what they read of the student;
    `bank_rows` give each sample's place in their banks; `vocab_size` cuts a head that is padded more than the
    teacher's; `prepare` is called before the first step of all (again, where a run is killed before its first
    checkpoint). `states` of adaptive schedules live in the checkpoint. `source` gives the steps' text, where that is
    not just `rows`; `average` is the student's moving average where it teaches; `monitor` looks at a micro-batch that
    the student wrote.
    """

    net: PreTrainedModel
    rows: Sequence[Row]
    terms: Sequence[Term]
    teacher: Callable[[Batch], TeacherView]
    settings: Train
    folder: Path
    key: str
    matches: Mapping[str, Learned] = field(default_factory=dict)
    taps: Taps = NO_TAPS
    bank_rows: Mapping[str, int] = field(default_factory=dict)
    vocab_size: int | None = None
    prepare: Callable[[], None] = lambda: None
    states: dict[str, State] = field(default_factory=dict)
    source: Source | None = None
    average: Average | None = None
    monitor: Callable[[StudentForward], dict[str, tuple[float, float]]] | None = None

    @property
    def text(self) -> Source:
        """Where the steps' text comes from."""
        if self.source is None:
            text = FixedText(self.rows, self.settings.seed, self.settings.tokens_per_step, self.together)
            self.source = (
                text if self.settings.mixup is None else MixupSource(text, self.settings.seed, self.settings.mixup)
            )
        return self.source

    @property
    def together(self) -> bool:
        """Whether the answers to one prompt must share a micro-batch."""
        return any(term.unit == "group" for term in self.terms)

    def parameters(self) -> dict[str, Tensor]:
        """All that is trained: the student's weights and what the feature terms learn."""
        found: dict[str, Tensor] = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        for label, match in self.matches.items():
            found |= {f"match.{label}.{name}": p for name, p in match.named_parameters() if p.requires_grad}
        return found

    def times(self, name: str) -> float:
        """How many times as fast as the student this parameter is trained."""
        return next(
            (learned.times for label, learned in self.matches.items() if name.startswith(f"match.{label}.")), 1.0
        )

    def frozen(self) -> dict[str, Tensor]:
        """What the feature terms hold without training it: filters of the teacher, banks."""
        held = {
            f"{label}.{name}": value
            for label, match in self.matches.items()
            for name, value in match.state_dict().items()
        }
        return {
            name: value for name, value in held.items() if f"match.{name}" not in self.parameters() and value.numel()
        }


def total_steps(rows: Sequence[Row], settings: Train, together: bool = False) -> int:
    """How many updates the settings ask for."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    per_epoch = len(steps_of_epoch(rows, settings.seed, 0, settings.tokens_per_step, together))
    return max(1, round(settings.epochs * per_epoch))


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
    """Train to the end, or until `stop` says so. Returns whether the end was reached; the state is saved either way.

    Raises:
        UserError: the loss or the gradient is not finite; no update was made from it.
    """
    keep_freed_memory()
    forget_peak()
    settings = job.settings
    steps = total_steps(job.rows, job.settings, job.together)
    parameters = job.parameters()
    optimizer = _optimizer(job, parameters)
    start = _resume(job, parameters, optimizer)
    job.net.train()
    saved_at = time.monotonic()
    pause = settings.save_seconds
    for step in range(start, steps):
        try:
            record = _step(job, step, steps, parameters, optimizer)
        except StoppedError:  # while the student wrote: the step has not begun
            _save(job, step, parameters, optimizer)
            return False
        if distributed.rank() == 0:
            append_json(job.folder / "metrics.jsonl", record)
        progress(step + 1, steps, record)
        crash_point("train.after_step")
        last = step + 1 == steps
        stopping = any(distributed.gather(stop()))
        if last or stopping or max(distributed.gather(time.monotonic() - saved_at)) >= pause:
            began = time.monotonic()
            _save(job, step + 1, parameters, optimizer)
            saved_at = time.monotonic()
            pause = max(distributed.gather(max(settings.save_seconds, (saved_at - began) / SAVING_SHARE)))
        if stopping and not last:
            return False
    job.net.eval()
    return True


def _step(
    job: TrainingJob, step: int, steps: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """One update from the text of step number `step`."""
    began = time.perf_counter()
    turn = job.text.step_batch(step, step / steps, job.states)
    # dropout, where the model has any: a step is replayed to the bit
    torch.manual_seed(job.settings.seed * 2**24 + step)
    terms = [term.at_step(step / steps, job.states) for term in job.terms]
    batches = [make_batch(micro_batch) for micro_batch in turn.micro_batches]
    amounts = {t.label: sum(batch.amount(t.term.unit, t.term.only) for batch in batches) for t in terms}
    sums = Sums()
    for batch in distributed.share(batches):
        sums.add(backward(job, batch, terms, amounts, step))
    distributed.add_gradients(parameters.values())
    whole = Sums()
    for part in distributed.gather(sums):
        whole.add(part)
    means = {t.label: whole.terms.get(t.label, 0.0) / amounts[t.label] if amounts[t.label] else 0.0 for t in terms}
    loss = sum(t.weight * means[t.label] for t in terms)
    norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), job.settings.clip))
    _check_finite(step, loss, norm, means, batches)
    rate = learning_rate(job.settings, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if job.average is not None:
        job.average.update()
    for term in job.terms:
        if not amounts[term.label]:
            continue  # a step without text for this term says nothing to its schedules
        total, count = whole.measured.get(term.label, (0.0, 0.0))
        term.after(job.states, (step + 1) / steps, means[term.label], clamped_baseline(total, count) if count else None)
    return {
        "step": step + 1,
        "steps": steps,
        "loss": loss,
        "terms": {label: mean for label, mean in means.items() if amounts[label]},  # a term without text has no value
        **({"scheduled": moving} if (moving := _moving(terms)) else {}),
        **({"rollout": told} if (told := _told(turn, whole)) else {}),
        "grad_norm": norm,
        "lr": rate,
        "response_tokens": int(sum(int(batch.mask_BT.sum()) for batch in batches)),
        "tokens": (tokens := int(sum(batch.tokens_BT.numel() for batch in batches))),
        "padding": tokens - sum(len(row) for micro_batch in turn.micro_batches for row in micro_batch),
        "seconds": round(time.perf_counter() - began, 4),
        "memory_mib": peak_mib(),
    }


def _told(turn: StepBatch, whole: Sums) -> dict[str, float]:
    """What the source and the monitor say of the text that the student wrote."""
    return turn.facts | {name: total / count for name, (total, count) in whole.seen.items() if count}


def _moving(terms: Sequence[TermAtStep]) -> dict[str, float]:
    """The scheduled numbers of this step, for the metrics."""
    found = {f"{t.label}.weight": t.weight for t in terms if t.term.weight.shape != "constant"}
    for t in terms:
        found |= {
            f"{t.label}.{key}": t.params[key] for key, schedule in t.term.params.items() if schedule.shape != "constant"
        }
    return found


def _check_finite(step: int, loss: float, norm: float, means: Mapping[str, float], batches: Sequence[Batch]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [label for label, value in means.items() if not math.isfinite(value)] or list(means)
    samples = [sample_id[:12] for batch in batches for sample_id in batch.sample_ids]
    raise UserError(
        f"step {step + 1}: the loss is {loss} and the gradient norm {norm} (from {', '.join(bad)}), so no update was"
        f" made; samples {', '.join(samples[:4])}...: lower train.lr, or look at those samples' logits"
    )


@torch.no_grad()
def loss_on(job: TrainingJob, batches: Sequence[Batch], progress: float) -> float:
    """The weighted loss of all terms on this text, without a step: what is watched, not trained."""
    terms = [term.at_step(progress, job.states) for term in job.terms]
    training = job.net.training
    amounts = {t.label: sum(batch.amount(t.term.unit, t.term.only) for batch in batches) for t in terms}
    job.net.eval()
    losses = [float(total_loss(terms, amounts, job.matches, _pass(job, batch, 0))[0]) for batch in batches]
    job.net.train(training)
    return sum(losses)


def _pass(job: TrainingJob, batch: Batch, step: int) -> StudentForward:
    """The teacher's view of a micro-batch, and the student's forward pass."""
    view = job.teacher(batch)
    hidden_BTD, found = features(job.net, batch.tokens_BT.to(job.net.device), *job.taps, mixed=batch.mixed)
    head = head_of(job.net)
    head = head.cut(job.vocab_size or head.vocab_size)
    return StudentForward(batch, hidden_BTD[batch.response_positions()], head, found, view, step, job.bank_rows)


def backward(
    job: TrainingJob, batch: Batch, terms: Sequence[TermAtStep], amounts: Mapping[str, float], step: int = 0
) -> Sums:
    """Forward and backward of one micro-batch; returns each term's sum."""
    data = _pass(job, batch, step)
    loss, sums = total_loss(terms, amounts, job.matches, data)
    loss.backward()
    if job.monitor is not None:
        sums.seen = job.monitor(data)
    return sums


def _optimizer(job: TrainingJob, parameters: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only. What a term learns may go `times` as fast as the student."""
    settings = job.settings
    groups = dict[tuple[float, bool], dict[str, Any]]()
    for matrices in (True, False):
        for name, p in parameters.items():
            if (p.ndim >= 2) == matrices:
                times = job.times(name)
                decay = settings.weight_decay if matrices else 0.0
                group = groups.setdefault((times, matrices), {"params": [], "weight_decay": decay, "times": times})
                group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=settings.betas, fused=True)


def _save(job: TrainingJob, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    if distributed.rank() == 0:
        tensors = {f"weight/{name}": p for name, p in parameters.items()} | {
            f"frozen/{name}": t for name, t in job.frozen().items()
        }
        for name, p in parameters.items():
            for key, value in optimizer.state[p].items():
                tensors[f"{key}/{name}"] = value
        if job.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in job.average.tensors.items()}
        state = {"job": job.key, "rows": _rows_key(job.rows), "schedules": job.states, "text": job.text.state()}
        checkpoint.save(job.folder / "checkpoints", step, tensors, state)
    distributed.wait()


def _resume(job: TrainingJob, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint back, cut the metrics to it, and return the step to go on with."""
    metrics = job.folder / "metrics.jsonl"
    found = checkpoint.load_newest(job.folder / "checkpoints")
    step = 0 if found is None else found.step
    if found is None:
        job.prepare()
    else:
        if (found.state["job"], found.state["rows"]) != (job.key, _rows_key(job.rows)):
            raise UserError(
                f"{job.folder / 'checkpoints'} belongs to other settings or other text; remove it or choose another"
                " --out"
            )
        job.states.update(found.state.get("schedules", {}))
        job.text.restore(found.state.get("text", {}))
        _restore(job, found.tensors, parameters, optimizer)
    if distributed.rank() == 0:
        kept = [record for record in read_jsonl(metrics) if record["step"] <= step]
        write_text(metrics, "".join(canonical_json(record) + "\n" for record in kept))
    distributed.wait()
    return step


@torch.no_grad()
def _restore(
    job: TrainingJob, tensors: Mapping[str, Tensor], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    for name, p in parameters.items():
        p.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:  # a parameter that no loss has reached yet has no state
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[p] = {
                key: tensors[f"{key}/{name}"].to(p.device if key != "step" else "cpu") for key in keys
            }
    if job.average is not None:
        job.average.restore({name: tensors[f"average/{name}"] for name in job.average.tensors})
    for label, match in job.matches.items():
        prefix = f"frozen/{label}."
        held = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if "bank_ME" in held:
            match.register_buffer("bank_ME", held["bank_ME"].to(job.net.device))
        match.load_state_dict(held, strict=False)


def _rows_key(rows: Sequence[Row]) -> str:
    """A short name of the text in its order, so that a checkpoint never goes on with another."""
    return content_hash([row.sample_id for row in rows])[:16]
