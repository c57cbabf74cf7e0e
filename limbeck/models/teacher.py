"""The in-process teacher: text from `generate`, full distributions from its hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from limbeck.models.generate import Job, generate
from limbeck.models.load import Model, head_of
from limbeck.models.taps import features
from limbeck.objectives.total import NO_TAPS, Taps, TeacherView
from limbeck.signals.dense import DenseSignal
from limbeck.types import Batch, Finish, Generated, Request

Weights = Callable[[], AbstractContextManager[None]]


class InProcessTeacher:
    """A `Model` that answers requests and stands beside the student's text with its distribution.

    `weights` is entered around every pass: a student that teaches itself has other weights, or no adapters, inside. `can` is
    what it can give; a teacher behind an interface that returns text alone could do less.
    """

    can = frozenset({"text", "teacher_distribution", "teacher_features", "log_probs"})

    def __init__(self, model: Model, weights: Weights = nullcontext) -> None:
        self.model, self.weights = model, weights
        self.identity = model.identity

    def answers(self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Request, Generated]]:
        """Answer every request, each as it finishes. A request's own key seeds its random numbers."""
        eos = self.model.eos_ids
        jobs = [Job(self.model.prompt_ids(r.messages), r.sampling, int(r.key[:15], 16)) for r in requests]
        for index, ids in generate(self.model.net, jobs, eos, stop=stop, tokens=self.model.tokens):
            text = self.model.decode(ids)
            finish: Finish = "length" if ids[-1] not in eos else "ok" if text.strip() else "empty"
            yield requests[index], Generated(tuple(ids), text, finish)

    @torch.no_grad()
    def view(self, batch: Batch, taps: Taps = NO_TAPS, vocabulary: int | None = None) -> TeacherView:
        """The teacher's distribution at the batch's response positions, and the features asked for.

        Args:
            vocabulary: how many tokens it is cut to, where the student's head is padded less.
        """
        net, seen = self.model.net, batch.seen_by_teacher()
        with self.weights():
            hidden_BTD, found = features(net, seen.tokens_BT.to(net.device), *taps)
            head = head_of(net).detached()
        signal = DenseSignal(hidden_BTD[seen.response_positions()], head.cut(vocabulary or head.vocabulary))
        return TeacherView(signal, found)

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at the batch's response positions."""
        signal = self.view(batch).signal
        assert isinstance(signal, DenseSignal)
        return signal
