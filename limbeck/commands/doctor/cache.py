"""The doctor's check of a cache: does it hold what the teacher says today?

Shapes: N response positions, K tokens named at a position.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from limbeck.commands.doctor.patient import NothingToCheckError, Patient, response_targets, teacher_log_probs
from limbeck.data.batches import Row, make_batch
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.teacher_interface import Teacher
from limbeck.signals.cache import SignalCache, text_key
from limbeck.storage.files import user_path
from limbeck.training.setup import common_vocab_size
from limbeck.types import Batch, UserError

SAMPLE_TEXTS = 4
LARGEST_ERROR = 0.05  # nats, mean over a text


def check_cache(patient: Patient) -> str:
    """Check that cached log-probabilities equal the live teacher's, at the right positions."""
    form = patient.recipe.teacher.cache
    if form is None:
        raise NothingToCheckError("the recipe has no cache")
    home = patient.folder / "signals" if form.folder is None else user_path(form.folder)
    if not (home / "about.json").exists():
        raise NothingToCheckError(f"{home} is still empty")
    teacher: Teacher = patient.scorer if patient.recipe.teacher.model is None else patient.teacher
    cache = SignalCache(home, teacher.identity, common_vocab_size(patient.run.models.initial_student(), teacher), form)
    rows = [row for row in patient.training_rows if _key(row) in cache]
    if not rows:
        raise NothingToCheckError(f"{home} holds {len(cache)} texts, none of this run's text")
    sample = rows[:: max(1, len(rows) // SAMPLE_TEXTS)][:SAMPLE_TEXTS]
    for row in sample:
        _compare(cache, teacher, row, home)
    return f"{len(cache)} texts, {len(rows)} of this run's; {len(sample)} of them were compared with the teacher"


def _key(row: Row) -> str:
    return text_key(row.teacher_prompt_ids or row.prompt_ids, row.response_ids)


def _compare(cache: SignalCache, teacher: Teacher, row: Row, home: Path) -> None:
    """Refuse a cached text that is not what the teacher says, and name a shift by one position."""
    remedy = f"; remove {home}, and it is computed again"
    cached_N = cache.text(_key(row))["target"].float()
    if len(cached_N) != len(row.response_ids):
        raise UserError(f"{home} has {len(cached_N)} rows for a text of {len(row.response_ids)} tokens{remedy}")
    live_N = _target_log_probs(teacher, make_batch([row], (0,)))
    error = _distance(cached_N, live_N)
    if error <= LARGEST_ERROR:
        return
    shifted = len(live_N) > 2 and any(
        _distance(cached_N.roll(shift)[1:-1], live_N[1:-1]) <= LARGEST_ERROR for shift in (-1, 1)
    )
    what = "rows that are 1 position off" if shifted else "other numbers"
    raise UserError(
        f"{home} has {what}: the log-probabilities of the text's tokens differ from the teacher's by {error:.2f} nats"
        f" on average{remedy}"
    )


def _distance(cached_N: Tensor, live_N: Tensor) -> float:
    """The mean absolute difference over the positions where both are finite."""
    both_N = cached_N.isfinite() & live_N.isfinite()
    return float((cached_N - live_N)[both_N].abs().mean()) if bool(both_N.any()) else 0.0


def _target_log_probs(teacher: Teacher, batch: Batch) -> Tensor:
    """The log-probabilities of the text's tokens [N]; NaN if a server does not name them."""
    targets_N = response_targets(batch.seen_by_teacher())
    if isinstance(teacher, InProcessTeacher):
        return teacher_log_probs(teacher, batch).gather(-1, targets_N[:, None])[:, 0]
    signal = teacher.view(batch).signal
    assert signal is not None
    return signal.log_prob(targets_N) if signal.whole else signal.top_tokens().log_prob(targets_N)
