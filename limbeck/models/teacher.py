"""The in-process teacher: text from `generate`, full distributions from its hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from limbeck.models.generate import Job, generate
from limbeck.models.load import Model, head_of
from limbeck.models.taps import features
from limbeck.objectives.total import NO_TAPS, Taps, TeacherView
from limbeck.signals.dense import DenseSignal
from limbeck.types import Batch, Finish, Generated, Request


class InProcessTeacher:
    """A `Model` that answers requests and stands beside the student's text with its distribution."""

    def __init__(self, model: Model) -> None:
        self.model = model
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
        net = self.model.net
        hidden_BTD, found = features(net, batch.tokens_BT.to(net.device), *taps)
        head = head_of(net)
        signal = DenseSignal(hidden_BTD[batch.response_positions()], head.cut(vocabulary or head.vocabulary))
        return TeacherView(signal, found)

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at the batch's response positions."""
        signal = self.view(batch).signal
        assert isinstance(signal, DenseSignal)
        return signal
