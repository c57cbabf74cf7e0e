"""A teacher in process: text from `generate`, full distributions from its hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial

import torch

from limbeck.models.constrain import Forms
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
    """A `Model` that answers requests and gives its distribution over the student's text.

    `weights` is entered around every `view`: a student that teaches itself switches weights, or adapters, there.
    """

    gives = WRITES | TEACHER_EVIDENCE | {REFERENCE}

    def __init__(self, model: Model, weights: Weights = nullcontext, average: MovingAverage | None = None) -> None:
        self.model = model
        self.weights = weights
        self.average = average
        self.identity = model.identity

    @property
    def vocab_size(self) -> int:
        """The number of tokens in its distributions."""
        return head_of(self.model.net).vocab_size

    def answers(
        self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes. A request's own key seeds its random numbers."""
        kinds: dict[float | None, list[Request]] = {}  # requests with the same contrast are decoded together
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

    @cached_property
    def _forms(self) -> Forms:
        return Forms(self.model)

    def _job(self, request: Request) -> GenerationJob:
        model = self.model
        against_ids = None if request.against is None else model.prompt_ids(request.against)
        ids = model.prompt_ids(request.conversation) if request.raw is None else model.raw_ids(request.raw)
        hold = None if request.form is None else partial(self._forms.begin, request.form, ids)
        return GenerationJob(ids, request.sampling, int(request.key[:15], 16), against_ids, hold=hold)

    def _ended(self, sampling: Sampling, ids: Sequence[int]) -> bool:
        """Whether a stop string stands at the text's end. Only the last tokens are decoded; each has a byte or more."""
        if not sampling.stop:
            return False
        last = self.model.decode(ids[-max(map(len, sampling.stop)) * 4 :])
        return any(stop in last for stop in sampling.stop)

    def _generated(self, request: Request, ids: Sequence[int]) -> Generated:
        """The answer, cut before the first stop string; then it has no ids, since they would say more than the text."""
        text = self.model.decode(ids)
        stops_at = [text.find(stop) for stop in request.sampling.stop if stop in text]
        whole = bool(stops_at) or ids[-1] in self.model.eos_ids
        if stops_at:
            text = text[: min(stops_at)]
        finish: Finish = "length" if not whole else "ok" if text.strip() else "empty"
        return Generated(None if stops_at else tuple(ids), text, finish)

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocab_size: int | None = None) -> TeacherView:
        """The teacher's distribution at the batch's response positions, and the features in `taps`.

        Args:
            vocab_size: how many tokens the distribution is cut to.
        """
        net = self.model.net
        batch = batch.seen_by_teacher()
        with self.weights():
            hidden_BTD, tapped = features(net, batch.tokens_BT, *taps, mixed=batch.mixed)
            head = head_of(net).detached()
        signal = DenseSignal(hidden_BTD[batch.response_positions()], head.cut(vocab_size or head.vocab_size))
        return TeacherView(
            signal, tapped, TeacherStates(signal.hidden_NE, signal.head, batch.response_positions()[0].to(net.device))
        )

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at the batch's response positions."""
        return dense_signal(self.view(batch))


def dense_signal(view: TeacherView) -> DenseSignal:
    """The view's signal as hidden states with their head.

    Raises:
        UserError: the signal has no hidden states.
    """
    assert view.signal is not None, "every teacher has a signal"
    return DenseSignal(*view.signal.hidden_states())
