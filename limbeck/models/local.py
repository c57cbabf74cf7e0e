"""The plain kind of teacher: one model in process."""

from __future__ import annotations

from functools import partial

from limbeck.config.teacher import LocalTeacher
from limbeck.models.self_teacher import adapters_off, self_teacher
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, WRITES, Teacher, TeacherParts, TeacherUse


class LocalKind:
    """One model in process. If the student is this model with adapters, no second copy is loaded: the teacher is the
    student with its adapters off."""

    def gives(self, settings: LocalTeacher) -> frozenset[str]:
        evidence = WRITES | TEACHER_EVIDENCE | {REFERENCE}
        if settings.server is not None:
            evidence -= {"contrast"}
        if settings.context is not None:
            evidence -= {"teacher_features"}
        return evidence if settings.cache is None else evidence - {"teacher_features", "teacher_states"}

    def lacks(self, settings: LocalTeacher, evidence: str) -> str:
        if evidence == "contrast":
            return "it writes against another prompt, which a server can't; leave teacher.server out"
        if settings.cache is not None:
            return "it reads the teacher's layers, and the cache keeps its last distribution; leave teacher.cache out"
        return "it compares position by position, and this teacher is shown other prompts; use a divergence"

    def refuse(self, settings: LocalTeacher, use: TeacherUse) -> None:
        """Nothing: what it can't give, it lacks."""

    def prepare(self, settings: LocalTeacher, parts: TeacherParts) -> Teacher:
        if not parts.student_is_adapted_teacher:
            return parts.load(settings.model)
        parts.release()
        return self_teacher(parts.student, parts.prompt_context, partial(adapters_off, parts.student.net))

    def caveats(self, settings: LocalTeacher, _: str | None) -> list[str]:
        return [] if settings.server is None else [served_text_caveat(settings.server.name, settings.model)]


def served_text_caveat(server: str, model: str) -> str:
    """The caveat of a teacher whose text comes from a server while its distribution is computed in process."""
    return (
        f"The teacher's text was written by {server} behind a server; what is measured as the teacher here, its"
        f" distribution and its answers, is {model} in process."
    )
