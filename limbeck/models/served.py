"""The kind of teacher that is reached only through a server."""

from __future__ import annotations

from limbeck.config.teacher import ServedTeacher
from limbeck.models.teacher_interface import Teacher, TeacherParts, TeacherUse
from limbeck.types import RecipeError

REMEDY = "or name the same model's weights in teacher.model"


class ServedKind:
    """Gives text, and its likeliest tokens as a distribution if the recipe has them cached or named by the server."""

    def gives(self, settings: ServedTeacher) -> frozenset[str]:
        return frozenset({"text"} | ({"teacher_distribution"} if settings.named_tokens is not None else set()))

    def lacks(self, _: ServedTeacher, evidence: str) -> str:
        what = evidence.replace("_", " ")
        if evidence in ("raw", "contrast", "log_probs"):
            return f"it needs {what}, and a server gives text: leave it out, {REMEDY}"
        keep = ""
        if evidence == "teacher_distribution":
            keep = (
                "keep what it says of the text (teacher.cache: {top_k: {k: 20}}), or ask it at every step"
                " (teacher.server.names: 20), "
            )
        return f"it reads the {what}, and a server gives text: use cross_entropy, {keep}{REMEDY}"

    def refuse(self, _: ServedTeacher, use: TeacherUse) -> None:
        recipe = use.recipe
        if recipe.student.start.pretrained is None:
            raise RecipeError(
                "student.start",
                f"nothing can be made of a teacher whose weights are not here: give pretrained, {REMEDY}",
            )
        if recipe.rollout is not None and recipe.rollout.joint is not None:
            raise RecipeError("rollout.joint", f"two models write one text in process only: leave it out, {REMEDY}")

    def prepare(self, _: ServedTeacher, parts: TeacherParts) -> Teacher:
        return parts.scorer()

    def caveats(self, settings: ServedTeacher, _: str | None) -> list[str]:
        return [
            f"The teacher, {settings.server.name}, is behind a server and gives text alone: how near a student's"
            " distribution is to its own is not known; perplexity is how likely the student finds the teacher's"
            " held-out text."
        ]
