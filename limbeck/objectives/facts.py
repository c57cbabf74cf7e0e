"""Facts about a recipe, by which a loss refuses what it can't be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Together = Literal["mean", "least_cross_entropy", "uncertainty"]


@dataclass(frozen=True)
class TextFacts:
    """The text that a recipe trains on.

    Args:
        writers: who writes it: corpus, teacher, untouched, student.
        tags: what `only` may name; None if that is unknown until the text is written.
        others_tags: the tags of text that is certainly not the student's own.
        fixed: some text is there before the training.
        all_preferred: every text is a preferred answer of somebody other than the student.
        several_answers: prompts have, or may get, more than one answer.
        ranked_answers: the answers to a prompt have an order, the preferred one first.
        columns: columns that the recipe's losses write for each token, such as importance_weight.
        temperature, top_p: those of the student's own text, if it writes.
        writes_jointly: another model writes the student's text with it.
        reuses_rollouts: the student's text may be older than the step that trains on it.
        repeats_rollouts: it is older only by the updates that its own step makes with it.
        copy_writes: the student's text is written by a copy of it in another precision.
        teacher_prompts: the teacher is shown other prompts than the student.
        self_taught: the teacher has the student's own weights.
        rewarded: rewards judge the student's answers.
        mixed_tag: the tag of rows whose embeddings are mixed with those of other rows, if there are such rows.
        scores: the student's head gives a score, and no distribution.
        labels: what lines say of their pairs of answers; None if that is unknown until the text is written.
    """

    writers: frozenset[str] = frozenset({"teacher"})
    tags: frozenset[str] | None = None
    others_tags: frozenset[str] = frozenset({"teacher"})
    fixed: bool = True
    all_preferred: bool = True
    several_answers: bool = False
    ranked_answers: bool = False
    columns: frozenset[str] = frozenset()
    temperature: float | None = None
    top_p: float = 1.0
    writes_jointly: bool = False
    reuses_rollouts: bool = False
    repeats_rollouts: bool = False
    copy_writes: bool = False
    teacher_prompts: bool = False
    self_taught: bool = False
    rewarded: bool = False
    mixed_tag: str | None = None
    scores: bool = False
    labels: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class TeacherFacts:
    """How a recipe's teacher is read.

    Args:
        bridged: it has another tokenizer than the student.
        written_elsewhere: where the two tokenizers do not meet, the written token alone is taught.
        cached: its distributions are stored before the training.
        together: how several teachers are combined, if there are several.
    """

    bridged: bool = False
    written_elsewhere: bool = False
    cached: bool = False
    together: Together | None = None
