"""Text that rewards judge: at every step the student answers some prompts, each several times.

The rewards of a step's answers become advantages (`rewards.py`), which stand beside the tokens as a column. Every draw
is a function of the seed and of counters in the checkpoint, which also holds the answers that later updates use again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from limbeck.config.sections import Rollout
from limbeck.data.batches import Row, StepBatch, cut
from limbeck.elicit.prompt import Prompt
from limbeck.objectives.loss import ADVANTAGE
from limbeck.objectives.rewards import LENGTH_WEIGHT
from limbeck.objectives.schedule import State
from limbeck.storage.files import crash_point
from limbeck.training import distributed
from limbeck.training.asking import Answer, Asking, answer_from
from limbeck.training.rewards import Judged, Rewards
from limbeck.training.rollout_stats import Advice, facts_of
from limbeck.training.scored import Scored
from limbeck.types import UserError

PATIENCE = 10  # writings at the start in which all groups may be equal before the training is stopped


@dataclass
class GroupMemory:
    """The writer's state in the checkpoint.

    Args:
        asked: answers requested so far.
        drawn: prompts drawn so far.
        spoken: how many answers were not empty.
        varied: whether some group has had different rewards.
        answers: those of the last writing, group by group.
        advantages: one for each of them.
        facts: what the metrics say of them.
    """

    asked: int = 0
    drawn: int = 0
    spoken: int = 0
    varied: bool = False
    answers: list[Answer] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class GroupRollouts:
    """A `Source` in which the student writes all text and rewards judge it.

    Args:
        asking: asks the student.
        prompts: the prompt of each slot.
        text: the text of an answer to a slot, with the thinking that its prompt opened.
        columns: adds the columns that losses compute from frozen models; called with (rows, progress).
    """

    asking: Asking
    prompts: Sequence[Prompt]
    text: Callable[[Row, Sequence[int]], str]
    rewards: Rewards
    settings: Rollout
    columns: Callable[[list[Row], float], list[Row]] = lambda rows, _: rows
    memory: GroupMemory = field(default_factory=GroupMemory)
    advice: Advice = field(default_factory=Advice)

    def __post_init__(self) -> None:
        self._rows: tuple[int, list[Row]] | None = None  # (the step they were written at, the rows)

    def step_batch(self, step: int, progress: float, _: dict[str, State]) -> StepBatch:
        """The text of step number `step`: new at every `passes`-th. A step that is stopped while the student writes
        leaves no trace."""
        memory = self.memory
        began = time.perf_counter()
        use = step % (self.settings.passes or 1)
        if use == 0 or not memory.answers:
            self.memory = memory = self._new(step)
        written = memory.answers[0].born
        if self._rows is None or self._rows[0] != written:
            rows = self._advantage_rows()
            self._rows = written, self.columns(rows, progress * written / step if step else progress)
        facts: dict[str, Any] = memory.facts | {"age": float(step - written)}
        if use == 0:
            facts |= {"seconds": round(time.perf_counter() - began, 4)}
            facts |= self.advice.on(facts)
        return StepBatch(cut(self._rows[1], f"{self.asking.seed}/{step}/rows"), facts)

    def _advantage_rows(self) -> list[Row]:
        """The answers as rows, with their advantages and weights by length at every token."""
        memory = self.memory
        lengths = [[len(answer.ids) for answer in memory.answers]]
        (weights,) = self.rewards.length_weights(lengths, self.asking.writer.max_tokens)
        return [
            self._row(answer, {ADVANTAGE: advantage, LENGTH_WEIGHT: weight})
            for answer, advantage, weight in zip(memory.answers, memory.advantages, weights, strict=True)
        ]

    def _row(self, answer: Answer, values: Mapping[str, float]) -> Row:
        row = self.asking.row(answer)
        columns = {name: (value,) * len(answer.ids) for name, value in values.items()}
        return replace(row, columns={**row.columns, **columns})

    def _new(self, step: int) -> GroupMemory:
        """The memory after new groups have been written and judged.

        Raises:
            UserError: rewards that never differ, so that nothing can be learnt from them.
        """
        count, size = self.settings.prompts or 1, self.settings.group or 1
        memory = replace(self.memory)
        kept: list[list[Answer]] = []
        spare: list[list[Answer]] = []  # groups that teach nothing, which fill the step up if there are too few others
        first = memory.asked
        tries = 0
        while len(kept) < count and tries <= (self.settings.resample or 0):
            groups = self._write(memory, count - len(kept), step)
            useless = self._score(groups).teaches_nothing if self.settings.resample else [False] * len(groups)
            for group, is_useless in zip(groups, useless, strict=True):
                (spare if is_useless else kept).append(group)
            tries += 1
        groups = [*kept, *spare[: count - len(kept)]]
        scored = self._score(groups)
        lengths = [[len(answer.ids) for answer in group] for group in groups]
        advantages = self.rewards.advantages(scored, lengths, self.asking.writer.max_tokens)
        memory.answers = [answer for group in groups for answer in group]
        memory.advantages = [value for row in advantages for value in row]
        memory.varied = memory.varied or any(memory.advantages)
        if not memory.varied and step // (self.settings.passes or 1) + 1 >= PATIENCE:
            raise UserError(_nothing_learnt(scored, size))
        ends = self.asking.ends
        memory.facts = {"written": memory.asked - first, **scored.facts}
        memory.facts |= facts_of([(answer.ids, answer.own, 0) for answer in memory.answers], ends)
        return memory

    def _write(self, memory: GroupMemory, count: int, step: int) -> list[list[Answer]]:
        """Groups of answers to the next `count` prompts; moves the counters of `memory` on."""
        size = self.settings.group or 1
        slots = [self.asking.slot(memory.drawn + number) for number in range(count) for _ in range(size)]
        answers = self.asking.answers(slots, memory.asked, step)
        crash_point("rollout.after_write")
        memory.spoken = self.asking.not_empty(answers, memory.asked + len(answers), memory.spoken)
        memory.asked += len(answers)
        memory.drawn += count
        return [answers[at : at + size] for at in range(0, len(answers), size)]

    def _score(self, groups: Sequence[Sequence[Answer]]) -> Scored:
        judged = [[self._judged(answer) for answer in group] for group in groups]
        return distributed.from_first(lambda: self.rewards.score(judged))  # a program's time limit is a verdict, too

    def _judged(self, answer: Answer) -> Judged:
        return Judged(
            prompt=self.prompts[answer.slot],
            text=self.text(self.asking.slots[answer.slot], answer.ids),
            ids=answer.ids,
            finished=answer.ids[-1] in self.asking.ends,
            max_tokens=self.asking.writer.max_tokens,
        )

    # Checkpoints

    def state(self) -> dict[str, Any]:
        return asdict(self.memory) | {"advice": self.advice.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        known = {key: state[key] for key in ("asked", "drawn", "spoken", "varied", "advantages", "facts")}
        self.memory = GroupMemory(answers=[answer_from(record) for record in state["answers"]], **known)
        self.advice.restore(state["advice"])
        self._rows = None


def _nothing_learnt(scored: Scored, size: int) -> str:
    """That the rewards of the first writings teach nothing, and what to do; `scored` are those of the last of them."""
    if scored.unread == sum(map(len, scored.total)):
        why = "".join(f"; {kind.replace('_', ' ')}: {count:,} of the last" for kind, count in scored.why.items())
        return (
            f"in {PATIENCE} writings nothing could be learnt, and no answer of the last has a reward that can be"
            f" told{why}: name another judge, or give its replies more room (max_tokens)"
        )
    which = "all answers to a prompt" if size > 1 else "all answers of a step"
    return (
        f"in {PATIENCE} writings the rewards of {which} were equal ({scored.facts['reward']:g} on"
        " average), so nothing can be learnt from them: give prompts that the student gets right now and then,"
        " raise its temperature, or start from a student that has seen such answers"
    )
