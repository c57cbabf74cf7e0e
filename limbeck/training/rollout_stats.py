"""Statistics of the student's own text at every step, and advice when it degenerates.

Shapes: N response positions of a micro-batch, P of them that are sampled, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from limbeck.objectives.distribution import Distribution
from limbeck.objectives.forward import StudentForward
from limbeck.objectives.head import Buffer
from limbeck.objectives.loss import STUDENT

POSITIONS = 16  # sampled per micro-batch: projecting all of them again would cost a pass of the head
TOP = 16  # likeliest tokens whose overlap is counted (arXiv:2604.13016)
GRAM = 4
Facts = dict[str, float]


def facts_of(answers: Sequence[tuple[Sequence[int], int, int]], ends: Collection[int]) -> Facts:
    """Statistics of a step's answers.

    Number of answers and tokens, mean length in tokens, share that ended before max_tokens, share of repeated 4-grams,
    share of distinct 2-grams, mean age in steps, and share of tokens that the student itself proposed.

    Args:
        answers: (ids, tokens that the student itself proposed, steps since it was written).
        ends: the ids that end an answer.
    """
    tokens = sum(len(ids) for ids, _, _ in answers)
    pairs = [pair for ids, _, _ in answers for pair in pairwise(ids)]
    return {
        "answers": len(answers),
        "tokens": tokens,
        "length": round(tokens / len(answers), 2),
        "finished": round(sum(ids[-1] in ends for ids, _, _ in answers) / len(answers), 4),
        "repetition": round(repeated([ids for ids, _, _ in answers]), 4),
        "distinct_2": round(len(set(pairs)) / len(pairs), 4) if pairs else 1.0,
        "age": round(sum(age for _, _, age in answers) / len(answers), 3),
        "own": round(sum(own for _, own, _ in answers) / tokens, 4),
    }


def repeated(answers: Sequence[Sequence[int]], gram: int = GRAM) -> float:
    """The share of n-grams that have occurred before in their answer."""
    grams = [[tuple(ids[at : at + gram]) for at in range(len(ids) - gram + 1)] for ids in answers]
    count = sum(map(len, grams))
    return 1 - sum(len(set(of_answer)) for of_answer in grams) / count if count else 0.0


@torch.no_grad()
def teachers_view(data: StudentForward) -> dict[str, tuple[float, float]]:
    """Compare teacher and student at a few positions of the student's text: (sum, count) by metric.

    Log p and log q of the token in nats, overlap of the likeliest tokens, both entropies. Empty if the teacher has no
    whole distribution, or the student wrote nothing in this micro-batch.
    """
    row_N, position_N = data.batch.response_positions()
    at_P = data.batch.rows_on(STUDENT)[row_N].nonzero()[:, 0]
    signal = data.teacher.signal
    device = data.hidden_ND.device
    if signal is None or not signal.whole or not len(at_P):
        return {}
    at_P = at_P[torch.linspace(0, len(at_P) - 1, min(POSITIONS, len(at_P))).round().long()]
    target_P1 = data.batch.tokens_BT[row_N[at_P], position_N[at_P] + 1][:, None].to(device)
    logits_PV = data.head.logits(data.hidden_ND[at_P.to(device)].detach(), Buffer())
    q = Distribution(logits_PV)
    p = signal.select(at_P.to(device)).chunk(slice(0, len(at_P))).rows(slice(0, len(at_P))).p
    k = min(TOP, logits_PV.shape[1])
    ours_PK = q.log.topk(k).indices
    theirs_PK = p.log.topk(k).indices
    values = {
        "teacher_log_prob": p.log.gather(1, target_P1),
        "student_log_prob": q.log.gather(1, target_P1),
        "overlap": (ours_PK[:, :, None] == theirs_PK[:, None, :]).any(-1).float().mean(-1),
        "entropy": -(q.prob * q.log).sum(-1),
        "teacher_entropy": -(p.prob * p.log).sum(-1),
    }
    return {name: (float(value.cpu().double().sum()), float(len(at_P))) for name, value in values.items()}


@dataclass(frozen=True)
class Rule:
    """Advice for when `key` is beyond `limit` (below or above it) and has changed by `factor` since the first steps."""

    key: str
    below: bool
    limit: float
    factor: float
    text: str


COLD_START = "give the student a cold start, lower its share, or raise max_tokens"
RULES = (
    Rule(
        "finished", below=True, limit=0.5, factor=0.7, text=f"more and more answers run into max_tokens: {COLD_START}"
    ),
    Rule(
        "repetition",
        below=False,
        limit=0.3,
        factor=1.5,
        text="the student repeats itself: lower its share, or let the teacher join in (rollout.joint)",
    ),
    Rule(
        "length",
        below=True,
        limit=1e9,
        factor=0.5,
        text="answers have become half as long: add text of the teacher, or lower train.lr",
    ),
    Rule(
        "length",
        below=False,
        limit=0.0,
        factor=2.0,
        text="answers have become twice as long: add text of the teacher, or lower train.lr",
    ),
    Rule(
        "distinct_2",
        below=True,
        limit=0.3,
        factor=0.7,
        text="answers are becoming alike: add text of the teacher, or a divergence that covers (forward_kl)",
    ),
)
FIRST_STEPS = 3
MOMENTUM = 0.7  # weight of earlier steps in the running mean that rules are checked on


@dataclass
class Advice:
    """Checks the rules at every step; each gives its advice once. `said` lists the numbers of those that did."""

    first: Facts = field(default_factory=dict)
    recent: Facts = field(default_factory=dict)
    steps: int = 0
    said: list[int] = field(default_factory=list)

    def on(self, facts: Mapping[str, float]) -> dict[str, Any]:
        """The advice after this step: {"advice": [...]}, or an empty dictionary."""
        self.steps += 1
        for key in {rule.key for rule in RULES}:
            value = float(facts[key])
            if self.steps <= FIRST_STEPS:
                self.first[key] = self.first.get(key, 0.0) + value / FIRST_STEPS
            self.recent[key] = MOMENTUM * self.recent.get(key, value) + (1 - MOMENTUM) * value
        if self.steps <= FIRST_STEPS:
            return {}
        new = [number for number, rule in enumerate(RULES) if number not in self.said and self._broken(rule)]
        self.said += new
        return {"advice": [RULES[number].text for number in new]} if new else {}

    def _broken(self, rule: Rule) -> bool:
        now = self.recent[rule.key]
        then = self.first[rule.key]
        return now < min(rule.limit, rule.factor * then) if rule.below else now > max(rule.limit, rule.factor * then)

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "recent": self.recent, "steps": self.steps, "said": self.said}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.first = dict(state["first"])
        self.recent = dict(state["recent"])
        self.steps = state["steps"]
        self.said = list(state["said"])
