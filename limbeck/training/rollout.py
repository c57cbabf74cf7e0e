"""On-policy text in the training loop: decides who writes a step's text, how much of it, and what is replayed.

The sampled ids are the ids that are trained. Every draw is a function of the seed and of counters in the checkpoint,
which also holds the waiting and the replayed answers: a killed run goes on with the same text.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from limbeck.config.sections import Rollout, Writer
from limbeck.data.batches import CHOSEN, REJECTED, FixedText, Row, StepBatch, cut
from limbeck.models.generate import Completion, GenerationJob
from limbeck.objectives.loss import STUDENT
from limbeck.objectives.schedule import Schedule, State
from limbeck.training import distributed
from limbeck.training.asking import Answer, Asking, answer_from
from limbeck.training.rollout_stats import Advice, facts_of

SHARE = "student.share"  # the key of an adaptive share's state
FIRST_GUESS = 0.65  # expected length of an answer before any was written, as a part of max_tokens
LENGTH_MOMENTUM = 0.5  # weight of the old expected length when a batch of new answers arrives


@dataclass
class Memory:
    """The writer's state in the checkpoint.

    Args:
        asked: answers requested so far.
        spoken: how many of them were not empty.
        owed: tokens that the student has still to write.
        expected: expected length of an answer, in tokens.
        waiting: answers written ahead of their step.
        buffer: answers that may be replayed, the oldest first.
    """

    asked: int = 0
    spoken: int = 0
    owed: float = 0.0
    expected: float = 0.0
    waiting: list[Answer] = field(default_factory=list)
    buffer: list[Answer] = field(default_factory=list)


@dataclass
class Rollouts:
    """A `Source` in which the student writes.

    If there is fixed text, the student replaces its share of each step's rows and writes about as many tokens as those
    had; otherwise it writes `tokens_per_step`. Later steps make up for answers that are too long or too short, so the
    number of trained tokens stays the same. With share 0 every step is the fixed text. With `order`, every prompt of a
    step keeps its text and gets the student's too.

    Args:
        slots: the training prompts, as rows without a response.
        fixed: text written before the training.
        write: has the student answer, in the order of the jobs.
        share: the part of the text that the student writes.
        fresh: the part of the student's text that is not replayed.
        columns: adds the columns that terms compute from whole responses; called with (rows, progress).
        watched: the validation loss that an adaptive share follows, at this progress.
        ends: the ids that end an answer.
        order: the writers' names, the preferred first, if every prompt is answered by all of them.
    """

    slots: Sequence[Row]
    fixed: FixedText | None
    write: Callable[[Sequence[GenerationJob]], list[Completion]]
    writer: Writer
    settings: Rollout
    share: Schedule
    fresh: Schedule
    seed: int
    tokens_per_step: int
    ends: frozenset[int]
    order: Sequence[str] = ()
    columns: Callable[[list[Row], float], list[Row]] = lambda rows, _: rows
    watched: Callable[[float], float] | None = None
    memory: Memory = field(default_factory=Memory)
    advice: Advice = field(default_factory=Advice)

    def __post_init__(self) -> None:
        self.beside = bool(self.order)
        lengths = [len(row.response_ids) for row in self.fixed.rows] if self.fixed else []
        self.memory.expected = (
            sum(lengths) / len(lengths) if lengths else max(1.0, FIRST_GUESS * self.writer.max_tokens)
        )
        self._slot_of = {slot.group: number for number, slot in enumerate(self.slots)}
        self._asking = Asking(
            self.slots,
            self.write,
            self.writer,
            seed=self.seed,
            ends=self.ends,
            joint=self.settings.joint is not None,
        )

    # A step's text

    def step_batch(self, step: int, progress: float, states: dict[str, State]) -> StepBatch:
        """The text of step number `step`. A step that is stopped while the student writes leaves no trace."""
        facts = self._watch(step, progress, states)
        base = self.fixed.step(step) if self.fixed else []
        rows = [row for micro_batch in base for row in micro_batch]
        replaced = self._replaced(rows, step, self.share.value(progress, states.get(SHARE)))
        if not replaced and self.fixed is not None:
            return StepBatch(base, facts)
        began = time.perf_counter()
        answers_before = self.memory.asked
        if self.beside:
            prompts = list(dict.fromkeys(self._slot_of[row.group] for row in rows))
            answers = self._ask(prompts, step)
            fixed_rows = rows
        else:
            tokens = sum(len(rows[index].response_ids) for index in replaced) if self.fixed else self.tokens_per_step
            fixed_rows = [row for index, row in enumerate(rows) if index not in replaced]
            answers = self._answers(step, progress, tokens, bool(fixed_rows))
        facts |= {"seconds": round(time.perf_counter() - began, 4), "written": self.memory.asked - answers_before}
        own_rows = self.columns([self._row(answer) for answer in answers], progress)
        if answers:
            facts |= facts_of([(answer.ids, answer.own, step - answer.born) for answer in answers], self.ends)
            facts |= self.advice.on(facts)
        all_rows = [*fixed_rows, *own_rows]
        if self.beside:
            all_rows.sort(key=self._rank)
        return StepBatch(cut(all_rows, f"{self.seed}/{step}/rows", self.beside), facts)

    def _rank(self, row: Row) -> int:
        """The place of a row's writer in the order of preference."""
        return min(place for place, name in enumerate(self.order) if name in row.tags)

    def _watch(self, step: int, progress: float, states: dict[str, State]) -> dict[str, float]:
        """Update an adaptive share from the validation loss."""
        if self.watched is None or step == 0 or step % self.settings.validation.every:
            return {}
        watched = self.watched
        loss = distributed.from_first(lambda: watched(progress))  # one value for all ranks, equal to the last bit
        states[SHARE] = self.share.after(states.get(SHARE), progress, loss)
        return {"validation_loss": loss, "share": self.share.value(progress, states[SHARE])}

    def _replaced(self, rows: Sequence[Row], step: int, share: float) -> set[int]:
        """The rows that the student writes instead; with `per: batch`, all of them or none."""
        draw = random.Random(f"{self.seed}/{step}/who")  # noqa: S311 (a draw, not a secret)
        if self.beside or self.fixed is None:
            return set(range(len(rows)))
        if self.settings.per == "batch":
            return set(range(len(rows))) if draw.random() < share else set()
        return {index for index in range(len(rows)) if draw.random() < share}

    def _answers(self, step: int, progress: float, tokens: int, has_fixed_rows: bool) -> list[Answer]:
        """Answers of about as many tokens as the student owes now; none if it is ahead of its share and the step has
        fixed rows."""
        replay = self.settings.replay
        memory = self.memory
        owed = self.memory.owed + tokens
        if owed <= 0 and has_fixed_rows:
            memory.owed = owed
            return []
        draw = random.Random(f"{self.seed}/{step}/again")  # noqa: S311 (a draw, not a secret)
        if replay and len(memory.buffer) >= replay.size and draw.random() >= self.fresh.value(progress):
            answers = self._replayed(draw, owed)
        else:
            answers = self._new(step, owed, tokens)
            memory.buffer = [*memory.buffer, *answers][-replay.size :] if replay else []
        # capped, so that what a small buffer leaves owed makes no giant step
        memory.owed = min(owed - sum(len(answer.ids) for answer in answers), float(tokens))
        return answers

    def _replayed(self, draw: random.Random, owed: float) -> list[Answer]:
        """Answers from the replay buffer, each at most once in a step."""
        order = draw.sample(range(len(self.memory.buffer)), len(self.memory.buffer))
        return _up_to([self.memory.buffer[index] for index in order], owed)

    def _new(self, step: int, owed: float, tokens: int) -> list[Answer]:
        """Answers that no step has used yet, in the order they were written: now, or ahead at an earlier step."""
        memory = self.memory
        ahead = self.settings.ahead
        missing = owed - sum(len(answer.ids) for answer in memory.waiting)
        if missing > 0 or not memory.waiting:
            count = max(1, round((max(missing, 1.0) + (ahead - 1) * tokens) / memory.expected))
            memory.waiting = memory.waiting + self._ask(
                [self._asking.slot(memory.asked + n) for n in range(count)], step
            )
        answers = memory.waiting if ahead == 1 else _up_to(memory.waiting, owed)
        memory.waiting = memory.waiting[len(answers) :]
        return answers

    # Asking

    def _ask(self, slots: Sequence[int], step: int) -> list[Answer]:
        memory = self.memory
        answers = self._asking.answers(slots, memory.asked, step)
        spoken = self._asking.not_empty(answers, memory.asked + len(answers), memory.spoken)
        memory.asked += len(answers)
        memory.spoken = spoken
        mean = sum(len(answer.ids) for answer in answers) / len(answers)
        memory.expected = LENGTH_MOMENTUM * memory.expected + (1 - LENGTH_MOMENTUM) * mean
        return answers

    def _row(self, answer: Answer) -> Row:
        """The answer as a row."""
        place = CHOSEN if self.order and self.order[0] == STUDENT else REJECTED
        return self._asking.row(answer, frozenset({place}) if self.beside else frozenset())

    # Checkpoints

    def state(self) -> dict[str, Any]:
        return asdict(self.memory) | {"advice": self.advice.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        waiting, buffer = ([answer_from(record) for record in state[key]] for key in ("waiting", "buffer"))
        self.memory = Memory(
            asked=state["asked"],
            spoken=state["spoken"],
            owed=state["owed"],
            expected=state["expected"],
            waiting=waiting,
            buffer=buffer,
        )
        self.advice.restore(state["advice"])


def _up_to(answers: Sequence[Answer], tokens: float) -> list[Answer]:
    """The first answers, as many as come nearest to `tokens` tokens; at least one."""
    count = 1
    total = float(len(answers[0].ids))
    for answer in answers[1:]:
        if total + len(answer.ids) / 2 > tokens:
            break
        count += 1
        total += len(answer.ids)
    return list(answers[:count])
