"""A run's text in tokens: rows of training and held-out text, and the prompts that the student will answer itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from limbeck.config.named_models import TEACHER
from limbeck.data.batches import Row, make_batch, make_rows
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.training_text import TrainingText
from limbeck.models.model import Model
from limbeck.models.prune import Calibration
from limbeck.runs.models import RunModels
from limbeck.runs.resolve import Method
from limbeck.types import Message, Sample

PromptIds = Callable[[tuple[Message, ...]], list[int]]


@dataclass(frozen=True)
class Encoding:
    """Turns the text of a run into token ids, as student and teacher read it."""

    method: Method
    models: RunModels
    text: TrainingText

    def rows(self, samples: Sequence[Sample], student: Model) -> list[Row]:
        """Samples as rows of token ids, each with the prompt as the teacher reads it where that is another."""
        return self._rows(samples, student, self._teacher_prompt_ids(student))

    def held_out(self) -> list[Row]:
        """The teacher's answers to the held-out prompts; each row has its prompt's id."""
        samples = self.text.held_out()
        reader = self.models.reader
        context = self.method.measured_context
        is_read = self.models.reference is not None or self.method.is_prompted
        shown = reader.with_context(context).prompt_ids if context is not None and is_read else None
        rows = {row.sample_id: row for row in self._rows(samples, reader, shown)}
        pairs = zip(samples, self.text.prompts[1], strict=True)
        return [replace(rows[sample.id], sample_id=prompt.id) for sample, prompt in pairs if sample.id in rows]

    def _rows(self, samples: Sequence[Sample], student: Model, teacher_prompt_ids: PromptIds | None) -> list[Row]:
        """Ids that the teacher or the student sampled are used as they are; other text is encoded, without what the
        prompt opens already, and gets the end token of the template unless it was cut off."""
        models = self.models
        named = {models.named.identity(name) for _, step in self.method.steps for name in step.asks()
                 if name in models.named} - {models.writer_identity(TEACHER)}  # fmt: skip

        def response_ids(sample: Sample) -> Sequence[int]:
            if self.method.recipe.student.scores:
                return scored_ids(sample)
            same_tokens = not models.other_tokens and sample.writer not in named
            if sample.response_ids is not None and (same_tokens or sample.writer == models.initial_identity):
                return sample.response_ids
            return alone.answer_ids(sample.messages[-1]["content"], sample.meta.get("finish") == "length")

        def scored_ids(sample: Sample) -> Sequence[int]:
            """As the template ends a conversation, whoever wrote the answer: a score is of the text that follows the
            thinking, as where the student's answers are rewarded by it."""
            is_cut = sample.meta.get("finish") == "length"
            text = sample.messages[-1]["content"]
            ids = alone.answer_ids(after_thinking(text) or text, is_cut)
            return ids if is_cut else [*ids, *alone.closing_ids]

        alone = student.with_context(None)
        return make_rows(
            samples, alone.prompt_ids, response_ids, student.max_length, teacher_prompt_ids=teacher_prompt_ids
        )

    def _teacher_prompt_ids(self, student: Model) -> PromptIds | None:
        """Encodes the prompt as the teacher sees it, in its tokens; None if it sees the same as the student, or reads
        no rows."""
        if not self.method.teacher_reads_rows and (self.models.other_tokens or self.models.teacher_is_away):
            return None
        if self.models.other_tokens:
            return self.models.teacher.model.prompt_ids
        context = self.method.prompt_context
        return None if context is None else student.with_context(context).prompt_ids

    def slots(self, student: Model) -> list[Row]:
        """The training prompts as rows without a response."""
        teacher_prompt_ids = self._teacher_prompt_ids(student)
        return [
            Row(
                prompt.id,
                tuple(student.prompt_ids(prompt.messages)),
                (),
                tags=frozenset({prompt.task} - {""}),
                group=prompt.id,
                weight=prompt.weight,
                teacher_prompt_ids=None if teacher_prompt_ids is None else tuple(teacher_prompt_ids(prompt.messages)),
            )
            for prompt in self.text.prompts[0]
        ]

    def calibration(self, texts: int) -> Calibration:
        """So many texts not by the student, by which the layers of a pruned student are chosen."""
        rows = self.rows(self.text.by_others(texts), self.models.teacher.model)
        batch = make_batch(rows)
        positions_BT = batch.mask_BT.roll(-1, 1)
        positions_BT[:, -1] = False
        return Calibration(batch.tokens_BT, positions_BT)
