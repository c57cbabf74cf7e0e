"""The in-process teacher: text from `generate`, full distributions from its hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from limbeck.models.generate import Decoding, GenerationJob, SecondModel, generate
from limbeck.models.joint import ContrastDecoding
from limbeck.models.model import Model, head_of
from limbeck.models.taps import features
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, WRITES, MovingAverage
from limbeck.objectives.forward import NO_TAPS, Taps, TeacherStates, TeacherView
from limbeck.signals.dense import DenseSignal
from limbeck.types import Batch, Finish, Generated, Request, Sampling

Weights = Callable[[], AbstractContextManager[None]]


class InProcessTeacher:
    """A `Model` that answers requests and stands beside the student's text with its distribution.

    `weights` is entered around every pass: a student that teaches itself has other weights, or no adapters, inside.
    """

    gives = WRITES | TEACHER_EVIDENCE | {REFERENCE}

    def __init__(self, model: Model, weights: Weights = nullcontext, average: MovingAverage | None = None) -> None:
        self.model = model
        self.weights = weights
        self.average = average
        self.identity = model.identity

    @property
    def vocab_size(self) -> int:
        """How many tokens its distributions are over."""
        return head_of(self.model.net).vocab_size

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes. A request's own key seeds its random numbers."""
        kinds: dict[float | None, list[Request]] = {}  # those of one strength of contrast decode together
        for request in requests:
            kinds.setdefault(None if request.against is None else request.contrast, []).append(request)
        for strength, alike in kinds.items():
            second = None if strength is None else SecondModel(self.model.net, ContrastDecoding(strength))
            decoding = Decoding(second=second, is_finished=self._ended)
            jobs = [self._job(request) for request in alike]
            net = self.model.net
            eos = self.model.eos_ids
            for index, ids in generate(net, jobs, eos, self.model.vocab_size, decoding=decoding, stop=stop):
                yield alike[index], self._generated(alike[index], ids)

    def _job(self, request: Request) -> GenerationJob:
        model = self.model
        beside = None if request.against is None else model.prompt_ids(request.against)
        ids = model.prompt_ids(request.messages) if request.raw is None else model.raw_ids(request.raw)
        return GenerationJob(ids, request.sampling, int(request.key[:15], 16), beside)

    def _ended(self, sampling: Sampling, ids: Sequence[int]) -> bool:
        """Whether a text that ends the answer stands at its end. Only its last tokens are looked at: each of them is a
        byte or more."""
        if not sampling.stop:
            return False
        last = self.model.decode(ids[-max(map(len, sampling.stop)) * 4 :])
        return any(stop in last for stop in sampling.stop)

    def _generated(self, request: Request, ids: Sequence[int]) -> Generated:
        """The answer, cut before the first text that ends it. Ids that say more than the text are left out."""
        text = self.model.decode(ids)
        found = [text.find(stop) for stop in request.sampling.stop if stop in text]
        kept, whole = (text[: min(found)], True) if found else (text, ids[-1] in self.model.eos_ids)
        finish: Finish = "length" if not whole else "ok" if kept.strip() else "empty"
        return Generated(None if found else tuple(ids), kept, finish)

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The teacher's distribution at the batch's response positions, and the features asked for.

        Args:
            vocab_size: how many tokens it is cut to, where the student's head is padded less.
        """
        net = self.model.net
        seen = batch.seen_by_teacher()
        with self.weights():
            hidden_BTD, found = features(net, seen.tokens_BT.to(net.device), *taps, mixed=seen.mixed)
            head = head_of(net).detached()
        signal = DenseSignal(hidden_BTD[seen.response_positions()], head.cut(vocab_size or head.vocab_size))
        return TeacherView(
            signal, found, TeacherStates(signal.hidden_NE, signal.head, seen.response_positions()[0].to(net.device))
        )

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at the batch's response positions."""
        return dense_signal(self.view(batch))


def dense_signal(view: TeacherView) -> DenseSignal:
    """The view's signal as hidden states with their head.

    Raises:
        UserError: it has no hidden states.
    """
    assert view.signal is not None, "every teacher has a signal"
    return DenseSignal(*view.signal.hidden_states())
