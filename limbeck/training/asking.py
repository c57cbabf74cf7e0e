"""The student is asked while it trains: which prompt comes next, and its answers as rows.

Every draw follows from the seed and the number of the answer, so a killed run goes on with the same text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.config.sections import Writer
from limbeck.data.batches import Row
from limbeck.models.generate import Completion, GenerationJob
from limbeck.objectives.loss import STUDENT
from limbeck.types import Sampling, UserError, content_hash

MAX_EMPTY_ANSWERS = 8  # if the first answers are all empty, stop after this many
ONLY_EMPTY = (
    "the student answers with nothing but the end token, so there is nothing to learn from: give it a cold start"
    " (fine-tune it on the teacher's text first, and name that student in student.start.pretrained), or lower its share"
)


@dataclass(frozen=True)
class Answer:
    """An answer of the student.

    Args:
        slot: the number of the prompt.
        ids: as sampled.
        log_prob, sampler_log_prob: of each id, under the student and under the distribution it was drawn from.
        born: the step it was written at.
        own: how many of the ids the student itself proposed.
        name: becomes the sample's id.
    """

    slot: int
    ids: tuple[int, ...]
    log_prob: tuple[float, ...]
    sampler_log_prob: tuple[float, ...]
    born: int
    own: int
    name: str


def answer_from(record: Mapping[str, Any]) -> Answer:
    """An answer from a checkpoint."""
    lists = {key: tuple(record[key]) for key in ("ids", "log_prob", "sampler_log_prob")}
    return Answer(**{**record, **lists})


class Asking:
    """Asks the student.

    Args:
        slots: the training prompts, as rows without a response.
        write: has the student answer, in the order of the jobs.
        ends: the ids that end an answer.
        joint: whether the teacher writes beside it, and sees a prompt of its own.
    """

    def __init__(
        self,
        slots: Sequence[Row],
        write: Callable[[Sequence[GenerationJob]], list[Completion]],
        writer: Writer,
        *,
        seed: int,
        ends: frozenset[int],
        joint: bool = False,
    ) -> None:
        self.slots, self.write, self.writer, self.seed, self.ends, self.joint = slots, write, writer, seed, ends, joint
        self._order: tuple[int, list[int]] | None = None

    def slot(self, number: int) -> int:
        """The slot of draw number `number`: every epoch runs through all prompts in an order of its own."""
        epoch, place = divmod(number, len(self.slots))
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.slots)))
            random.Random(f"{self.seed}/{epoch}/prompts").shuffle(order)  # noqa: S311 (an order, not a secret)
            self._order = epoch, order
        return self._order[1][place]

    def answers(self, slots: Sequence[int], first: int, step: int) -> list[Answer]:
        """The student's answers to these slots; the first is answer number `first` of the training."""
        sampling = Sampling(self.writer.temperature, self.writer.top_p, self.writer.max_tokens)
        names = [content_hash([self.seed, STUDENT, first + n, self.slots[slot].group]) for n, slot in enumerate(slots)]
        jobs = [
            GenerationJob(
                self.slots[slot].prompt_ids,
                sampling,
                int(name[:15], 16),
                self.slots[slot].teacher_prompt_ids if self.joint else None,
            )
            for slot, name in zip(slots, names, strict=True)
        ]
        completions = self.write(jobs)
        return [
            Answer(
                slot=slot,
                ids=tuple(completion.ids),
                log_prob=tuple(completion.log_prob),
                sampler_log_prob=tuple(completion.sampler_log_prob),
                born=step,
                own=completion.own_tokens,
                name=name,
            )
            for slot, name, completion in zip(slots, names, completions, strict=True)
        ]

    def not_empty(self, answers: Sequence[Answer], asked: int, before: int) -> int:
        """How many answers of the training were not empty: `before`, and these.

        Raises:
            UserError: all of the first ones are, of which there are `asked`.
        """
        spoken = before + sum(len(answer.ids) > 1 or answer.ids[0] not in self.ends for answer in answers)
        if not spoken and asked >= MAX_EMPTY_ANSWERS:
            raise UserError(ONLY_EMPTY)
        return spoken

    def row(self, answer: Answer, tags: frozenset[str] = frozenset()) -> Row:
        """The answer as a row: the slot's prompt, the sampled ids, and their log-probabilities as columns."""
        slot = self.slots[answer.slot]
        columns = {"log_prob": answer.log_prob, "old_log_prob": answer.sampler_log_prob}
        return replace(
            slot,
            sample_id=answer.name,
            response_ids=answer.ids,
            tags=slot.tags | {STUDENT} | tags,
            columns=columns,
        )
