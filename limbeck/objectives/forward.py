"""What losses read of one micro-batch after the forward passes, and what they return.

Shapes: B rows, T positions, N response positions, M those of a teacher with other tokens, D width of the student, E of
the teacher, H query heads, G key-value heads or groups of answers, A head width, K answers of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objectives.head import Head, TeacherSignal
from limbeck.objectives.log_probs import token_log_probs
from limbeck.types import Batch

Attention = tuple[Tensor, Tensor, Tensor]


class Taps(NamedTuple):
    """Which layers' hidden states and attention a forward pass should record."""

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()


NO_TAPS = Taps()


@dataclass(frozen=True)
class Features:
    """What one forward pass of one model records for feature losses: only the layers in its `Taps`.

    `hidden[0]` are the embeddings, `hidden[i]` the output of layer i (from 1), the last one after the final norm: [B,
    T, D]. `attention[i]` is layer i's (query [B, H, T, A], key [B, G, T, A], value [B, G, T, A]) as its attention sees
    them.
    """

    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Attention] = field(default_factory=dict)

    def to(self, device: torch.device) -> Features:
        hidden = {layer: states.to(device) for layer, states in self.hidden.items()}
        attention = {layer: (q.to(device), k.to(device), v.to(device)) for layer, (q, k, v) in self.attention.items()}
        return Features(hidden, attention)


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's last hidden states at its own response positions, its head, and the row of each position.

    For a teacher with another tokenizer, `embedded` are the embeddings of the previous and of the target token, divided
    by the standard deviation of its embedding table.
    """

    hidden_ME: Tensor
    head: Head
    row_M: Tensor
    embedded: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> TeacherStates:
        embedded = None if self.embedded is None else (self.embedded[0].to(device), self.embedded[1].to(device))
        return TeacherStates(self.hidden_ME.to(device), self.head.to(device), self.row_M.to(device), embedded)


@dataclass(frozen=True)
class TeacherView:
    """The teacher's evidence about one micro-batch."""

    signal: TeacherSignal | None = None
    features: Features = field(default_factory=Features)
    states: TeacherStates | None = None

    def to(self, device: torch.device) -> TeacherView:
        """The same evidence on another device."""
        if self.signal is None or self.signal.device == device:
            return self
        states = None if self.states is None else self.states.to(device)
        return TeacherView(self.signal.to(device), self.features.to(device), states)


@dataclass(frozen=True)
class Positions:
    """Where states are compared: (row, position) of N response positions in B rows.

    `bank_row_B` is each row's place in the banks of teacher states, and `seed` that of this step's random draws.
    """

    row_N: Tensor
    position_N: Tensor
    rows: int
    bank_row_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    seed: int = 0


@dataclass(frozen=True)
class StudentForward:
    """One micro-batch after the student's forward pass: `hidden_ND` predicts its response tokens.

    `ended_BD` are the states at each row's last token, where the head gives scores. `bank_rows` gives a sample's place
    in the banks of teacher states.
    """

    batch: Batch
    hidden_ND: Tensor
    head: Head
    features: Features
    teacher: TeacherView
    step: int = 0
    bank_rows: Mapping[str, int] = field(default_factory=dict)
    ended_BD: Tensor | None = None

    @cached_property
    def score_B(self) -> Tensor:  # noqa: N802 (shape)
        """What a scalar head says of every row, differentiable."""
        assert self.ended_BD is not None, "the head gives a distribution, and no score"
        return self.head.logits(self.ended_BD)[:, 0]

    @cached_property
    def positions(self) -> Positions:
        """The response positions, on the student's device."""
        row_N, position_N = (index.to(self.hidden_ND.device) for index in self.batch.response_positions())
        bank_row_B = torch.tensor([self.bank_rows.get(sample_id, 0) for sample_id in self.batch.sample_ids])
        return Positions(row_N, position_N, len(self.batch.sample_ids), bank_row_B, seed=self.step)

    @cached_property
    def answer_log_prob_B(self) -> Tensor:  # noqa: N802 (shape)
        """log q(response) of every row in nats, differentiable; computed once for all losses that compare answers."""
        row_N, position_N = self.batch.response_positions()
        device = self.hidden_ND.device
        targets_N = self.batch.tokens_BT[row_N, position_N + 1].to(device)
        log_prob_N = token_log_probs(self.hidden_ND, self.head, targets_N)
        return log_prob_N.new_zeros(len(self.batch.sample_ids)).index_add(0, row_N.to(device), log_prob_N)

    def token_weights(self, tag: str | None, column: str | None = None) -> Tensor:
        """[N] weights of the response tokens in rows with this tag (of all rows if None), 0 for the others, on CPU.
        They are multiplied by the named column, if the batch has it."""
        row_N, position_N = self.batch.response_positions()
        return self.batch.token_weights(column)[row_N, position_N + 1] * self.batch.rows_on(tag)[row_N]


@dataclass(frozen=True)
class TermSum:
    """One loss summed over one micro-batch.

    Args:
        loss: the scaled sum, ready for `backward`.
        total: the plain weighted sum.
        measured: (sum, count) of what the loss measures for its own parameters.
    """

    loss: Tensor
    total: float
    measured: tuple[float, float] | None = None


@dataclass
class Sums:
    """Sums over a step by term label: weighted losses, and (sum, count) of what terms measured for their parameters.

    `monitored` are (sum, count) of what a monitor measured of the text, by metric.
    """

    terms: dict[str, float] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)
    monitored: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        for label, value in other.terms.items():
            self.terms[label] = self.terms.get(label, 0.0) + value
        for mine, theirs in ((self.measured, other.measured), (self.monitored, other.monitored)):
            for label, (total, count) in theirs.items():
                before = mine.get(label, (0.0, 0.0))
                mine[label] = (before[0] + total, before[1] + count)
