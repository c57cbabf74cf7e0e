"""What silently ruins a distillation, looked for before the training: one finding a line, with its cure.

The teacher is loaded and asked a few short texts; nothing is trained or written. Where the recipe's folder has text and
a cache already, those are looked at as they are. Not covered: whether the teacher is any good, and what only longer
texts would show.

Shapes: N response positions, K tokens named at a position, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row, make_batch
from limbeck.models.model import Model, head_of
from limbeck.models.score import ServerScorer
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.head import Block
from limbeck.progress import Silent, StoppedError
from limbeck.runs import build
from limbeck.runs.pipeline import Run
from limbeck.runs.preflight import check
from limbeck.signals.cache import SignalCache, text_key
from limbeck.signals.dense import DenseRows
from limbeck.signals.sparse import TopK
from limbeck.training.setup import common_vocab_size
from limbeck.types import Batch, Message, UserError

Verdict = Literal["fine", "fault", "not looked at"]
QUESTIONS = ("Why is the sky blue?", "Name three fruits.", "Schreibe einen Satz über Zürich. 🙂")
ANSWERS = (
    "Air scatters blue light more than red light.",
    "An apple, a pear and a plum.",
    "Zürich liegt am See – naïve 日本語.",
)
NAMED = 20  # tokens that a server is asked for at each position
MEAN_KL = 0.02
# nats between weights here and served ones; 4-bit weights in llama.cpp's own arithmetic stay within 0.01
LARGEST_KL = 0.2
KEPT_TEXTS = 4
KEPT_NATS = 0.05  # texts of a cache that are looked at, and how far a kept log-probability may be off on average
LEAST_ALIGNED = 0.5
ZERO = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, the verdict, what was seen, and where there is a fault its cure."""

    name: str
    verdict: Verdict
    seen: str


class NothingToSeeError(Exception):
    """There is nothing of this kind in the recipe, or not yet."""


@dataclass
class Patient:
    """A recipe with what it names, loaded when first looked at."""

    recipe: Recipe
    folder: Path

    @cached_property
    def run(self) -> Run:
        return Run(self.recipe, self.folder, Silent(), lambda: True)  # it stops before it asks anybody anything

    @cached_property
    def teacher(self) -> InProcessTeacher:
        if self.recipe.teacher.model is None:
            raise NothingToSeeError("the teacher's weights are not here")
        if self.run.other_tokens:
            raise NothingToSeeError("the teacher has tokens of its own")
        return self.run.teacher

    @cached_property
    def model(self) -> Model:
        """In whose tokens the text is."""
        return self.run.reader

    @cached_property
    def scorer(self) -> ServerScorer:
        api = build.served(self.recipe)
        if api is None:
            raise NothingToSeeError("the recipe names no server")
        if self.run.other_tokens:
            raise NothingToSeeError("the server writes text in tokens of its own")
        cache = self.recipe.teacher.cache
        read = cache.top_k.k if cache and cache.top_k else api.settings.names
        return ServerScorer(api, read if self.recipe.teacher.model is None and read else NAMED, self.model.tokenizer)

    @cached_property
    def texts(self) -> Batch:
        """A few short conversations that end as the training text does."""
        rows = []
        for number, (question, said) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
            asked: Message = {"role": "user", "content": question}
            ids = (*self.model.text_ids(said), self.model.tokenizer.eos_token_id)
            rows.append(Row(str(number), tuple(self.model.prompt_ids((asked,))), ids, frozenset()))
        return make_batch(rows, tuple(range(len(rows))))

    @cached_property
    def log_probs(self) -> Tensor:
        """The teacher's, at every response position of `texts`, [N, V]."""
        return _log_probs(self.teacher, self.texts)

    @cached_property
    def stored(self) -> list[Row]:
        """The training text, where the folder has all of it."""
        if not self.folder.joinpath("store.sqlite").exists() or not self.recipe.fixed_writers:
            raise NothingToSeeError(f"{self.folder} holds no text yet")
        try:
            return self.run.rows(self.run.text.training(), self.model)
        except StoppedError:
            raise NothingToSeeError(f"{self.folder} does not hold all text yet") from None


def examine(
    recipe: Recipe, out: str | Path | None = None, note: Callable[[str], None] = lambda text: None
) -> list[Finding]:
    """All that is found, fault or not.

    Args:
        out: the run's folder, whose text and cache are looked at where they are there; by default runs/NAME.
        note: told what is looked at next.
    """
    patient = Patient(recipe, build.run_folder(recipe, out))
    found = []
    for name, look in LOOKS.items():
        note(name)
        try:
            found.append(Finding(name, "fine", look(patient)))
        except NothingToSeeError as nothing:
            found.append(Finding(name, "not looked at", str(nothing)))
        except UserError as error:
            found.append(Finding(name, "fault", str(error)))
            if name in ("recipe", "weights"):
                break  # nothing else can be made of it
    return found


def as_data(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"findings": [asdict(one) for one in findings], "faults": sum(one.verdict == "fault" for one in findings)}


def _recipe(patient: Patient) -> str:
    check(patient.recipe)
    if patient.run.other_tokens:
        return "its parts fit together; teacher and student have other tokens, with a bridge between them"
    return "its parts fit together; teacher and student have one vocabulary, one template and one end of an answer"


def _weights(patient: Patient) -> str:
    model = patient.model  # loading it looks for NaN, and for a head that makes logits in an unknown way
    dtype = str(head_of(model.net).weight_VD.dtype).removeprefix("torch.")
    if patient.recipe.teacher.model is None or patient.run.other_tokens:
        where = "are not here" if patient.recipe.teacher.model is None else "are over other tokens"
        return f"the student's are sound, in {dtype}; the teacher's {where}"
    nats = float(-patient.log_probs.gather(-1, _targets(patient.texts)[:, None]).mean())
    guessing = math.log(head_of(model.net).vocab_size)
    return (
        f"sound, in {dtype}; plain text costs the teacher {nats:.2f} nats a token, and guessing would cost"
        f" {guessing:.2f}"
    )


def _tokens(patient: Patient) -> str:
    model = patient.model
    for text in (*QUESTIONS, *ANSWERS):
        ids = model.text_ids(text)
        back = str(model.tokenizer.decode(ids))
        if back.strip() != text.strip():
            raise UserError(
                f"the tokenizer turns {text!r} into {back!r}: its files are damaged or of another model; give the model"
                " its own"
            )
    rows = head_of(model.net).vocab_size
    if len(model.tokenizer) > rows:
        raise UserError(
            f"the tokenizer knows {len(model.tokenizer)} tokens and the model {rows}: one of the two is another"
            " model's; put the right tokenizer beside the weights"
        )
    return f"texts come back as they were; {len(model.tokenizer):,} tokens, {rows:,} rows in the model"


def _bridge(patient: Patient) -> str:
    """That the two tokenizers have enough in common for a loss to say something."""
    if not patient.run.other_tokens:
        raise NothingToSeeError("teacher and student have the same tokens")
    bridged = build.bridged(patient.recipe, patient.run.teacher, patient.model)
    try:
        rows = [row.response_ids for row in patient.stored]
    except NothingToSeeError:
        rows = [
            tuple(row[mask].tolist()) for row, mask in zip(patient.texts.tokens_BT, patient.texts.mask_BT, strict=True)
        ]
    facts = bridged.facts(rows)
    told = (
        f"{facts['common_tokens']:,} of the student's {facts['student_tokens']:,} tokens are the teacher's, too; of"
        f" {len(rows)} answers' tokens {facts['aligned_share']:.0%} begin with one of the teacher's,"
        f" {facts['single_share']:.0%} are one in both"
    )
    if facts["aligned_share"] < LEAST_ALIGNED:
        raise UserError(
            f"{told}: most of the text would teach nothing; choose another teacher, or teach its text with others:"
            " written"
        )
    return told


def _end(patient: Patient) -> str:
    """That an answer ends in a token that ends it, in the template and in the text."""
    model = patient.model
    eos = model.tokenizer.eos_token_id
    mark = "ANSWER"
    turns = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": mark}]
    shown = str(model.tokenizer.apply_chat_template(turns, tokenize=False))
    after = model.tokenizer(shown.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    if not after or after[0] not in model.eos_ids:
        told = repr(model.tokenizer.decode(after[:3])) if after else "nothing"
        raise UserError(
            f"the chat template puts {told} after an answer, and text ends in {model.tokenizer.eos_token!r}: the"
            " student would not stop in a conversation; set eos_token (or generation_config.json's eos_token_id) to"
            " what the template ends an answer with"
        )
    try:
        rows = patient.stored
    except NothingToSeeError:
        return f"the template and the text end an answer in {model.tokenizer.decode([eos])!r}"
    open_ = [row for row in rows if row.response_ids[-1] not in model.eos_ids]
    if len(open_) == len(rows):
        raise UserError(
            f"none of {len(rows)} training answers ends in an end token, so the student would never learn to stop:"
            " raise max_tokens, so that answers are finished"
        )
    return f"{len(rows) - len(open_)} of {len(rows)} training answers end in an end token; the others were cut off"


def _repeatable(patient: Patient) -> str:
    apart = float((patient.log_probs - _log_probs(patient.teacher, patient.texts)).abs().max())
    if apart > ZERO:
        raise UserError(
            f"the teacher says something else when it is asked again (up to {apart:.2g} nats): dropout is on, or its"
            " kernels are not deterministic; put it in evaluation mode"
        )
    return (
        "asked twice, the teacher says the same to the bit"
        if apart == 0
        else f"asked twice, it differs by {apart:.1g} nats at most"
    )


def _server(patient: Patient) -> str:
    scorer = patient.scorer
    scorer.probe()
    longest = max(
        len(patient.model.prompt_ids(prompt.messages)) for part in patient.run.text.given_prompts for prompt in part
    )
    needed = longest + max(writer.max_tokens for writer in patient.recipe.writer)
    if (room := scorer.room()) is not None and room < needed:
        raise UserError(
            f"the server takes {room} tokens, and a prompt with its answer may take {needed}: start it with a larger"
            " context"
        )
    return f"{scorer.identity} has the same tokens and template and names {scorer.k} tokens at every position"


def _served(patient: Patient) -> str:
    """That the served model is the one here: its likeliest tokens, position by position."""
    scorer = patient.scorer
    log_NV = patient.log_probs
    signal = scorer.view(patient.texts).signal
    assert isinstance(signal, TopK)
    own_NK = log_NV.gather(-1, signal.ids_NK)
    kl_N = _bucketed_kl(own_NK, signal.log_prob_NK)
    shared = [
        len(set(a) & set(b))
        for a, b in zip(log_NV.topk(scorer.k).indices.tolist(), signal.ids_NK.tolist(), strict=True)
    ]
    told = (
        f"{float(kl_N.mean()):.4f} nats apart on average over {len(kl_N)} positions, {sum(shared) / len(shared):.1f} of"
        f" {scorer.k} shared"
    )
    if float(kl_N.mean()) > MEAN_KL or float(kl_N.max()) > LARGEST_KL:
        where = "; ".join(_position(patient, number, kl_N) for number in kl_N.topk(min(3, len(kl_N))).indices.tolist())
        raise UserError(
            f"the served model is not the one here: {told}. Where they differ most:"
            f" {where}.{_temperature(own_NK, signal.log_prob_NK)} Serve the same weights and their plain"
            " log-probabilities, or set teacher.model"
        )
    return told


def _temperature(own_NK: Tensor, served_NK: Tensor) -> str:
    """Whether the served numbers are the own ones at another temperature: differences from the likeliest token are then
    in one ratio."""
    own = own_NK - own_NK[:, :1]
    served = served_NK - served_NK[:, :1]
    ratio = float((own * served).sum() / served.square().sum().clamp_min(1e-9))
    off = float((own - ratio * served).abs().mean() / own.abs().mean().clamp_min(1e-9))
    return f" They are those here at temperature {ratio:.2f}." if off < 0.1 and abs(ratio - 1) > 0.05 else ""


def _position(patient: Patient, number: int, kl_N: Tensor) -> str:
    row_N, position_N = patient.texts.response_positions()
    ids = patient.texts.tokens_BT[row_N[number], : position_N[number] + 1].tolist()
    return f"after {patient.model.tokenizer.decode(ids[-8:])!r}, {float(kl_N[number]):.2f} nats"


def _kept(patient: Patient) -> str:
    """That a cache holds what the live teacher says, at its place."""
    form = patient.recipe.teacher.cache
    if form is None:
        raise NothingToSeeError("the recipe keeps nothing of its teacher")
    home = patient.folder / "signals" if form.folder is None else Path(form.folder).expanduser()
    if not (home / "about.json").exists():
        raise NothingToSeeError(f"{home} is empty yet")
    teacher: InProcessTeacher | ServerScorer = (
        patient.scorer if patient.recipe.teacher.model is None else patient.teacher
    )
    cache = SignalCache(home, teacher.identity, common_vocab_size(patient.run.untouched(), teacher), form)
    rows = [
        row for row in patient.stored if text_key(row.teacher_prompt_ids or row.prompt_ids, row.response_ids) in cache
    ]
    if not rows:
        raise NothingToSeeError(f"{home} holds {len(cache)} texts, none of this run's text")
    for row in rows[:: max(1, len(rows) // KEPT_TEXTS)][:KEPT_TEXTS]:
        _compare_kept(cache, teacher, row, home)
    return (
        f"{len(cache)} texts, {len(rows)} of this run's; {min(KEPT_TEXTS, len(rows))} of them are what the teacher says"
        " today"
    )


def _compare_kept(cache: SignalCache, teacher: InProcessTeacher | ServerScorer, row: Row, home: Path) -> None:
    batch = make_batch([row], (0,))
    kept_N = cache.text(text_key(row.teacher_prompt_ids or row.prompt_ids, row.response_ids))["target"].float()
    cure = f"; remove {home}, and it is computed again"
    if len(kept_N) != len(row.response_ids):
        raise UserError(f"{home} keeps {len(kept_N)} rows for a text of {len(row.response_ids)} tokens{cure}")
    live_N = _written_log_probs(teacher, batch)
    far = _distance(kept_N, live_N)
    if far <= KEPT_NATS:
        return
    shifts = {shift: _distance(kept_N.roll(shift)[1:-1], live_N[1:-1]) for shift in (-1, 1) if len(live_N) > 2}
    moved = next((shift for shift, apart in shifts.items() if apart <= KEPT_NATS), None)
    what = f"rows that are {abs(moved)} position{'s' if abs(moved) > 1 else ''} off" if moved else "other numbers"
    raise UserError(
        f"{home} keeps {what}: log p of the written tokens differs by {far:.2f} nats on average from the"
        f" teacher's{cure}"
    )


def _distance(kept_N: Tensor, live_N: Tensor) -> float:
    """Mean difference where both are known."""
    both_N = kept_N.isfinite() & live_N.isfinite()
    return float((kept_N - live_N)[both_N].abs().mean()) if bool(both_N.any()) else 0.0


def _zero(patient: Patient) -> str:
    """That the recipe's losses are zero for a student that is the teacher."""
    log_NV = patient.log_probs
    targets_N = _targets(patient.texts)
    seen = []
    for term in build.terms(patient.recipe):
        if term.name not in DIVERGENCES:
            continue
        p = Distribution(log_NV.clone())
        q = Distribution(log_NV.clone())
        values_N, gradient_NV = replace(term, by=None).at_step(0.0, {}).values(Block(q, targets_N, DenseRows(p)))
        if float(values_N.abs().max()) > ZERO or float(gradient_NV.abs().max()) > ZERO:
            raise UserError(
                f"{term.label} is {float(values_N.abs().max()):.2g} nats for a student that is its teacher, not 0:"
                " report this"
            )
        seen.append(term.label)
    if not seen:
        raise NothingToSeeError("no loss compares distributions")
    return f"for a student that is the teacher {', '.join(seen)} and its gradient are 0"


def _targets(batch: Batch) -> Tensor:
    row_N, position_N = batch.response_positions()
    return batch.tokens_BT[row_N, position_N + 1]


@torch.no_grad()
def _log_probs(teacher: InProcessTeacher, batch: Batch) -> Tensor:
    """[N, V] in fp32, for a few short texts."""
    signal = teacher.signal(batch)
    return signal.head.logits(signal.hidden_NE).log_softmax(-1).cpu()


def _written_log_probs(teacher: InProcessTeacher | ServerScorer, batch: Batch) -> Tensor:
    """log p of the written tokens [N]; NaN where a server does not name them."""
    targets_N = _targets(batch.seen_by_teacher())
    if isinstance(teacher, InProcessTeacher):
        return _log_probs(teacher, batch).gather(-1, targets_N[:, None])[:, 0]
    signal = teacher.view(batch).signal
    assert isinstance(signal, TopK)
    here_NK = signal.ids_NK == targets_N[:, None]
    return torch.where(here_NK.any(-1), signal.log_prob_NK.masked_fill(~here_NK, 0).sum(-1), torch.nan)


def _bucketed_kl(own_NK: Tensor, served_NK: Tensor) -> Tensor:
    """KL(own || served) over the named tokens and what is left of 1 [N], in nats."""
    p, q = (torch.cat([x.exp(), (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-6)], -1) for x in (own_NK, served_NK))
    return (p * (p / q).log()).sum(-1)


LOOKS: dict[str, Callable[[Patient], str]] = {
    "recipe": _recipe,
    "weights": _weights,
    "tokens": _tokens,
    "bridge": _bridge,
    "end of an answer": _end,
    "repeatable": _repeatable,
    "server": _server,
    "served weights": _served,
    "cache": _kept,
    "zero at the teacher": _zero,
}
