"""The kind of teacher that is reached only through a server."""

from __future__ import annotations

from limbeck.config.server import Served
from limbeck.config.teacher import ServedTeacher
from limbeck.models.engines import ENGINES
from limbeck.models.teacher_interface import Teacher, TeacherParts, TeacherUse
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.types import RecipeError

REMEDY = "or name the same model's weights in teacher.model"


class ServedKind:
    """Gives text, and its likeliest tokens as a distribution if the recipe has them cached or named by the server; or
    the whole distribution, if the server gives hidden states."""

    def gives(self, settings: ServedTeacher) -> frozenset[str]:
        says = settings.reads_given_text or settings.server.logprobs is not None
        return frozenset({"text"} | ({"teacher_distribution"} if says else set()))

    def lacks(self, _: ServedTeacher, evidence: str) -> str:
        what = evidence.replace("_", " ")
        if evidence in ("raw", "contrast", "log_probs"):
            return f"it needs {what}, and a server gives text: leave it out, {REMEDY}"
        keep = ""
        if evidence == "teacher_distribution":
            keep = (
                "keep what it says of the text (teacher.cache: {top_k: {k: 20}}), ask it at every step"
                " (teacher.server.names: 20), or with its own text (teacher.server.logprobs: 20), serve it with"
                " `limbeck serve --states` (teacher.server.kind: states), "
            )
        return f"it reads the {what}, and a server gives text: use cross_entropy, {keep}{REMEDY}"

    def refuse(self, settings: ServedTeacher, use: TeacherUse) -> None:
        recipe = use.recipe
        if settings.server.logprobs is not None:
            _refuse_own_text(settings.server, use)
        if settings.reads_given_text and recipe.train.mixup is not None and "teacher_distribution" in use.read:
            raise RecipeError("train.mixup", f"a server reads no mixed text: leave it out, {REMEDY}")
        if recipe.student.start.pretrained is None:
            raise RecipeError(
                "student.start",
                f"nothing can be made of a teacher whose weights are not here: give pretrained, {REMEDY}",
            )
        if recipe.rollout is not None and recipe.rollout.joint is not None:
            raise RecipeError("rollout.joint", f"two models write one text in process only: leave it out, {REMEDY}")

    def prepare(self, settings: ServedTeacher, parts: TeacherParts) -> Teacher:
        if settings.server.logprobs is None:
            return parts.scorer()
        assert parts.own_text is not None, "whoever makes the parts gives it where the recipe asks for it"
        return parts.own_text

    def caveats(self, settings: ServedTeacher, _: str | None) -> list[str]:
        return [
            f"The teacher, {settings.server.name}, is behind a server and gives text alone: how near a student's"
            " distribution is to its own is not known; perplexity is how likely the student finds the teacher's"
            " held-out text."
        ]


def _refuse_own_text(server: Served, use: TeacherUse) -> None:
    """Refuse a recipe that needs more than log-probabilities of the server's own text."""
    recipe = use.recipe
    path = "teacher.server.logprobs"
    engine = ENGINES[server.kind]
    assert server.logprobs is not None
    if server.logprobs > engine.most_logprobs:
        most = f"names {engine.most_logprobs} at most" if engine.most_logprobs else "gives none; leave it out"
        raise RecipeError(path, f"{engine.title} {most}")
    if recipe.student_writer is not None or recipe.train.mixup is not None:
        raise RecipeError(
            path,
            "a server says nothing of text that the student writes, or that is mixed: leave that out, or ask it about"
            " given text (teacher.server.names)",
        )
    if "teacher_distribution" not in use.read:
        raise RecipeError(path, "no loss reads the teacher's distribution, so nothing would be taught; leave it out")
    for term in use.terms:
        if "teacher_distribution" not in term.reads:
            continue
        divergence = DIVERGENCES.get(term.name)
        if divergence is None or not divergence.buckets or term.settings.softened():
            raise RecipeError(
                use.loss_path(term),
                f"{term.name} (or its temperature) needs more than the likeliest tokens: use forward_kl, jsd or another"
                " divergence with a bucket",
            )
    for number, writer in enumerate(recipe.writer):
        plain = (writer.temperature, writer.top_p) == (1.0, 1.0)
        if writer.by == "teacher" and not plain and not engine.plain_logprobs:
            raise RecipeError(
                f"writer[{number}].temperature",
                f"{engine.title} may give log-probabilities of what it draws from, not the model's own: set"
                " temperature and top_p to 1, or name a server with plain ones (teacher.server.kind: llama.cpp, vllm)",
            )
