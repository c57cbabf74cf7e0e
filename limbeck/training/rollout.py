"""The student as a writer inside the loop: who writes a step's text, how much of it, and what is read again.

The ids that were drawn are the ids that are trained. Every draw is a function of the seed and of counters that stand in
the checkpoint beside the text that waits or may be read again: a run that was killed goes on with the same text.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from limbeck.config.sections import Rollout, Writer
from limbeck.data.batches import CHOSEN, REJECTED, FixedText, Row, StepBatch, cut
from limbeck.models.generate import Completion, GenerationJob
from limbeck.objectives.loss import STUDENT
from limbeck.objectives.schedule import Schedule, State
from limbeck.training import distributed
from limbeck.training.rollout_stats import Advice, facts_of
from limbeck.types import Sampling, UserError, content_hash

SHARE = "student.share"  # what the state of an adaptive share is called
FIRST_GUESS = 0.65  # of max_tokens: how long an answer is expected to be before any was written
ENOUGH = 8  # answers that are nothing but their end, before the student is given up
MEMORY = 0.5  # of what answers were expected to be, after each batch of new ones
ALONE = (
    "the student answers with nothing but the end token, so there is nothing to learn from: give it a cold start"
    " (fine-tune it on the teacher's text first, and name that student in student.start.pretrained), or lower its share"
)


@dataclass(frozen=True)
class Answer:
    """A text of the student: the slot it answers, its ids as drawn with their log-probabilities, the step it was
    written at."""

    slot: int
    ids: tuple[int, ...]
    log_prob: tuple[float, ...]
    sampler_log_prob: tuple[float, ...]
    born: int
    own: int
    name: str


@dataclass
class Memory:
    """What the writer must know to go on: how many answers it asked for, how many were more than their end, tokens it
    still owes, how long answers are expected to be, answers that wait for their step, and those that may be read again,
    the oldest first."""

    asked: int = 0
    spoken: int = 0
    owed: float = 0.0
    expected: float = 0.0
    waiting: list[Answer] = field(default_factory=list)
    buffer: list[Answer] = field(default_factory=list)


@dataclass
class Rollouts:
    """A `Source` in which the student writes.

    Where other text is there, the student takes over its share of each step's rows, and writes about as many tokens as
    those had; otherwise it writes `tokens_per_step`. What comes out too long or too short is made up for by the steps
    that follow, so that trained tokens stay what they would be without it. With share 0 the text is the other text,
    step by step. With `beside`, every prompt of a step keeps its text and gets the student's, too.

    Args:
        slots: the training prompts, as rows without a response.
        fixed: the other text.
        write: asks the student, in the order of the jobs.
        share, fresh: part of the text that is the student's, and part of that which is written anew.
        columns: adds what terms read of whole responses, at this part of the training.
        watched: the loss that an adaptive share looks at.
        ends: the ids that end an answer.
        order: the writers' names, the preferred first, where every prompt has the text of all.
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
        self._order: tuple[int, list[int]] | None = None

    # A step's text

    def step_batch(self, step: int, progress: float, states: dict[str, State]) -> StepBatch:
        """The text of step number `step`. Nothing is remembered of a turn that is stopped while the student writes."""
        facts = self._watch(step, progress, states)
        base = self.fixed.step(step) if self.fixed else []
        rows = [row for micro_batch in base for row in micro_batch]
        taken = self._taken_over(rows, step, self.share.value(progress, states.get(SHARE)))
        if not taken and self.fixed is not None:
            return StepBatch(base, facts)
        began = time.perf_counter()
        before = self.memory.asked
        if self.beside:
            prompts = list(dict.fromkeys(self._slot_of[row.group] for row in rows))
            answers = self._ask(prompts, step)
            kept = rows
        else:
            tokens = sum(len(rows[index].response_ids) for index in taken) if self.fixed else self.tokens_per_step
            kept = [row for index, row in enumerate(rows) if index not in taken]
            answers = self._answers(step, progress, tokens, bool(kept))
        facts |= {"seconds": round(time.perf_counter() - began, 4), "written": self.memory.asked - before}
        own = self.columns([self._row(answer) for answer in answers], progress)
        if answers:
            facts |= facts_of([(answer.ids, answer.own, step - answer.born) for answer in answers], self.ends)
            facts |= self.advice.on(facts)
        every = sorted([*kept, *own], key=self._rank) if self.beside else [*kept, *own]
        return StepBatch(cut(every, f"{self.seed}/{step}/rows", self.tokens_per_step, self.beside), facts)

    def _rank(self, row: Row) -> int:
        """The place of a row's writer in the order of preference; answers of one writer stay in theirs."""
        return min(place for place, name in enumerate(self.order) if name in row.tags)

    def _watch(self, step: int, progress: float, states: dict[str, State]) -> dict[str, float]:
        """Let an adaptive share see the loss it watches."""
        if self.watched is None or step == 0 or step % self.settings.validation.every:
            return {}
        seen = distributed.gather(self.watched(progress))[0]  # a last bit's difference must not part the ranks
        states[SHARE] = self.share.after(states.get(SHARE), progress, seen)
        return {"validation_loss": seen, "share": self.share.value(progress, states[SHARE])}

    def _taken_over(self, rows: Sequence[Row], step: int, share: float) -> set[int]:
        """Which rows the student takes over; all of them, or none, where who writes is drawn per batch."""
        draw = random.Random(f"{self.seed}/{step}/who")  # noqa: S311 (a draw, not a secret)
        if self.beside or self.fixed is None:
            return set(range(len(rows)))
        if self.settings.per == "batch":
            return set(range(len(rows))) if draw.random() < share else set()
        return {index for index in range(len(rows)) if draw.random() < share}

    def _answers(self, step: int, progress: float, tokens: int, others: bool) -> list[Answer]:
        """Answers of about as many tokens as the student owes now; none, where it has written ahead of its share and
        `others` wrote."""
        replay = self.settings.replay
        memory = self.memory
        owed = self.memory.owed + tokens
        if owed <= 0 and others:
            memory.owed = owed
            return []
        draw = random.Random(f"{self.seed}/{step}/again")  # noqa: S311 (a draw, not a secret)
        if replay and len(memory.buffer) >= replay.size and draw.random() >= self.fresh.value(progress):
            found = self._again(draw, owed)
        else:
            found = self._new(step, owed, tokens)
            memory.buffer = [*memory.buffer, *found][-replay.size :] if replay else []
        # a small buffer's debt makes no giant step
        memory.owed = min(owed - sum(len(answer.ids) for answer in found), float(tokens))
        return found

    def _again(self, draw: random.Random, owed: float) -> list[Answer]:
        """Answers that were read before, each at most once in a step."""
        order = draw.sample(range(len(self.memory.buffer)), len(self.memory.buffer))
        return _up_to([self.memory.buffer[index] for index in order], owed)

    def _new(self, step: int, owed: float, tokens: int) -> list[Answer]:
        """Answers written now, or ahead at an earlier step; written for several steps at once, they go out in their
        order."""
        memory = self.memory
        ahead = self.settings.ahead
        short = owed - sum(len(answer.ids) for answer in memory.waiting)
        if short > 0 or not memory.waiting:
            count = max(1, round((max(short, 1.0) + (ahead - 1) * tokens) / memory.expected))
            memory.waiting = memory.waiting + self._ask([self._next(memory.asked + n) for n in range(count)], step)
        found = memory.waiting if ahead == 1 else _up_to(memory.waiting, owed)
        memory.waiting = memory.waiting[len(found) :]
        return found

    # Asking

    def _next(self, number: int) -> int:
        """The slot of answer number `number`: all prompts in one order, then all in another."""
        epoch, place = divmod(number, len(self.slots))
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.slots)))
            random.Random(f"{self.seed}/{epoch}/prompts").shuffle(order)  # noqa: S311 (an order, not a secret)
            self._order = epoch, order
        return self._order[1][place]

    def _ask(self, slots: Sequence[int], step: int) -> list[Answer]:
        sampling = Sampling(self.writer.temperature, self.writer.top_p, self.writer.max_tokens)
        asked = self.memory.asked
        together = self.settings.joint is not None
        names = [content_hash([self.seed, STUDENT, asked + n, self.slots[slot].group]) for n, slot in enumerate(slots)]
        jobs = [
            GenerationJob(
                self.slots[slot].prompt_ids,
                sampling,
                int(name[:15], 16),
                self.slots[slot].teacher_prompt_ids if together else None,
            )
            for slot, name in zip(slots, names, strict=True)
        ]
        written = self.write(jobs)
        found = [
            Answer(
                slot, tuple(text.ids), tuple(text.log_prob), tuple(text.sampler_log_prob), step, text.own_tokens, name
            )
            for slot, name, text in zip(slots, names, written, strict=True)
        ]
        spoken = self.memory.spoken + sum(len(answer.ids) > 1 or answer.ids[0] not in self.ends for answer in found)
        if not spoken and asked + len(found) >= ENOUGH:
            raise UserError(ALONE)
        self.memory.asked = asked + len(found)
        self.memory.spoken = spoken
        mean = sum(len(answer.ids) for answer in found) / len(found)
        self.memory.expected = MEMORY * self.memory.expected + (1 - MEMORY) * mean
        return found

    def _row(self, answer: Answer) -> Row:
        """The answer as a row: the slot's prompt, the very ids that were drawn, their log-probabilities beside them."""
        slot = self.slots[answer.slot]
        columns = {"log_prob": answer.log_prob, "old_log_prob": answer.sampler_log_prob}
        place = {CHOSEN if self.order[0] == STUDENT else REJECTED} if self.beside else set()
        tags = slot.tags | {STUDENT} | place
        return replace(slot, sample_id=answer.name, response_ids=answer.ids, tags=frozenset(tags), columns=columns)

    # Going on

    def state(self) -> dict[str, Any]:
        return asdict(self.memory) | {"advice": self.advice.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        waiting, buffer = ([_answer(record) for record in state[key]] for key in ("waiting", "buffer"))
        self.memory = Memory(state["asked"], state["spoken"], state["owed"], state["expected"], waiting, buffer)
        self.advice.restore(state["advice"])


def _answer(record: Mapping[str, Any]) -> Answer:
    lists = {key: tuple(record[key]) for key in ("ids", "log_prob", "sampler_log_prob")}
    return Answer(**{**record, **lists})


def _up_to(answers: Sequence[Answer], tokens: float) -> list[Answer]:
    """The first answers that come nearest to so many tokens, at least one."""
    found = [answers[0]]
    done = float(len(answers[0].ids))
    for answer in answers[1:]:
        if done + len(answer.ids) / 2 > tokens:
            break
        found.append(answer)
        done += len(answer.ids)
    return found
