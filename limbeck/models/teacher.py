"""The in-process teacher: text from `generate`, full distributions from its hidden states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from limbeck.models.generate import Job, generate
from limbeck.models.load import Model, head_of, hidden_states
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
        for index, ids in generate(self.model.net, jobs, eos, stop=stop):
            text = self.model.decode(ids)
            finish: Finish = "length" if ids[-1] not in eos else "ok" if text.strip() else "empty"
            yield requests[index], Generated(tuple(ids), text, finish)

    @torch.inference_mode()
    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at the batch's response positions."""
        device = self.model.net.device
        hidden_BTD = hidden_states(self.model.net, batch.tokens_BT.to(device))
        return DenseSignal(hidden_BTD[batch.response_positions()], head_of(self.model.net))
