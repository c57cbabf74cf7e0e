"""Combinations in a recipe that can't work, each refused with its place and the cure, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.config.recipe import Recipe
from limbeck.config.sections import Rollout, Validation
from limbeck.config.teacher import CacheSettings
from limbeck.data.batches import CHOSEN, MIXED, REJECTED
from limbeck.elicit.flow import Step
from limbeck.evaluate.tasks import Task
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, TeacherUse
from limbeck.models.teachers import kind
from limbeck.objectives.consistency import CONSISTENCY
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.schedule import Schedule
from limbeck.objectives.term import CROSS_ENTROPY, STUDENT, Term
from limbeck.signals.forms import form_of
from limbeck.types import RecipeError, nearest

JUDGED_ON_TEXT = ("importance", "block_influence")  # choices of layers that need text


def check_parts(
    use: TeacherUse, *, steps: Sequence[tuple[str, Step]], tasks: Sequence[Task], share: Schedule | None
) -> None:
    """Refuse parts of a recipe that can't work together.

    Raises:
        RecipeError: a loss that reads what no writer or teacher gives, a held-out item that is trained on, ...
    """
    recipe = use.recipe
    training = use.training_prompts
    _check_writers(recipe)
    _check_student_writer(recipe, use.terms, share)
    _check_teacher(use, steps)
    for term in use.terms:
        _check_evidence(use, term, use.loss_path(term))
    trained = {prompt.text for prompt in training}
    for task in tasks:
        if leak := [name for name, text in task.texts if text in trained]:
            raise RecipeError(
                "evaluate.metrics",
                f"{len(leak)} items of the task {task.name} are training prompts too, such as {leak[0]}",
            )
    if "gold_control" in recipe.evaluate.controls and not any(prompt.answers for prompt in training):
        raise RecipeError(
            "evaluate.controls",
            "gold_control needs an answer beside the training prompts, and none has one; leave it out",
        )
    if any(writer.by == "corpus" for writer in recipe.writer):
        for prompt in training:
            if not prompt.answers:
                raise RecipeError(
                    "writer", f"a corpus writer needs an answer beside every prompt; {prompt.id!r} has none"
                )


def _check_writers(recipe: Recipe) -> None:
    """Refuse text by the untouched student alone where something needs other text."""
    beside_untouched = [writer for writer in recipe.fixed_writers if writer.by != "untouched"]
    # for a student alone the teacher writes what these need
    others = beside_untouched if recipe.fixed_writers else recipe.writer
    prune = recipe.student.start.prune
    if not others and prune is not None and prune.keep in JUDGED_ON_TEXT:
        raise RecipeError(
            "writer", f"prune.keep: {prune.keep} is judged on others' text; add a writer, or set keep: uniform"
        )
    none_preferred = not others or (recipe.all_answer and recipe.writer[0].by in ("untouched", "student"))
    if {"sft_control", "shuffled_control"} & set(recipe.evaluate.controls) and none_preferred:
        raise RecipeError(
            "evaluate.controls", "fine-tuning needs preferred text of a teacher or corpus; set controls: [untouched]"
        )


def _check_evidence(use: TeacherUse, term: Term, path: str) -> None:
    """Refuse a term whose evidence no writer or prompt gives."""
    recipe = use.recipe
    training = use.training_prompts
    writers = {writer.by for writer in recipe.writer}
    several = recipe.all_answer or any(len(prompt.answers) > 1 for prompt in training)
    tags = writers | {prompt.task for prompt in training if prompt.task} | ({CHOSEN, REJECTED} if several else {CHOSEN})
    tags |= {MIXED} if recipe.train.mixup is not None else set()
    _check_written(use, term, path)
    if term.only is not None and term.only not in tags and recipe.elicit is None:  # steps give tags of their own
        raise RecipeError(f"{path}.only", f"no text is by or for {term.only!r}{nearest(term.only, tags)}")
    if term.name == CROSS_ENTROPY and STUDENT in writers:
        legal = writers - {STUDENT} | ({CHOSEN} if recipe.writer[0].by != STUDENT and recipe.fixed_writers else set())
        if term.only not in legal:
            how = (
                f"limit it, such as {{only: {min(writers - {STUDENT})}}}"
                if writers != {STUDENT}
                else "choose a divergence"
            )
            raise RecipeError(path, f"it would teach the student its own text, and so to stay as it is; {how}")
    if recipe.train.mixup is not None:
        _check_mixed(recipe, term, path)
    poor = "untouched" in writers or ("corpus" in writers and any(len(prompt.answers) > 1 for prompt in training))
    if term.name == CROSS_ENTROPY and term.only is None and poor:
        raise RecipeError(
            path,
            "it would also fit answers that are not preferred, or the student's own; limit it, such as {only: best}",
        )
    if "answers" not in term.reads:
        return
    if STUDENT in writers and any(read.startswith("reference_") for read in term.reads):
        raise RecipeError(
            path, f"{term.name} compares with a frozen model's opinion, which text written while training does not have"
        )
    if term.name == CONSISTENCY:
        if recipe.elicit is None and not several:
            raise RecipeError(
                path,
                f"{term.name} compares answers to one prompt, and here every prompt has one: elicit several of them",
            )
        return
    ranked = writers == {"corpus"} and all(len(prompt.answers) > 1 for prompt in training)
    if not (recipe.all_answer or ranked):
        raise RecipeError(
            path,
            f"{term.name} compares answers to one prompt, and here every prompt has one: let all writers answer every"
            " prompt (leave their shares out, the preferred writer first), or give a corpus with `answers` or `chosen`"
            " and `rejected`",
        )


def _check_mixed(recipe: Recipe, term: Term, path: str) -> None:
    """Refuse what a mixture of two texts can't teach."""
    if recipe.student_writer is not None or recipe.all_answer or recipe.teacher.context is not None:
        raise RecipeError(
            "train.mixup",
            "only text that is there before the training is mixed, and a teacher that sees the same prompts reads it",
        )
    if "answers" in term.reads:
        raise RecipeError(
            path, f"{term.name} compares answers to one prompt, and a mixed text answers none; leave train.mixup out"
        )
    if term.only in (None, MIXED) and "teacher_distribution" not in term.reads:
        raise RecipeError(
            path,
            f"a mixed text has no label but the teacher's distribution, which {term.name} doesn't read; limit it to a"
            " writer",
        )


def _check_written(use: TeacherUse, term: Term, path: str) -> None:
    """Refuse a term that speaks of the student's own text where there is none, or of numbers that nobody writes beside
    it."""
    recipe = use.recipe
    if STUDENT in term.reads and recipe.student_writer is None:
        raise RecipeError(
            path, f"{term.name} reads text that the student writes while it trains; add a writer {{by: student}}"
        )
    if missing := sorted(term.reads & {"advantage", "reference_log_prob", "importance_weight"}):
        raise RecipeError(
            path, f"{term.name} reads {missing[0]}, which comes from rewards, and nothing gives rewards yet"
        )
    policies = [POLICIES[other.name] for other in use.terms if other.name in POLICIES]
    made = {column for policy in policies if policy.prepare for column in policy.reads}
    if term.by is not None and term.only != STUDENT and recipe.fixed_writers:
        raise RecipeError(f"{path}.by", f"{term.by} stands beside the student's tokens alone; limit it: only: student")
    if (
        term.name in POLICIES
        and POLICIES[term.name].prepare
        and recipe.rollout
        and (recipe.rollout.ahead > 1 or recipe.rollout.replay)
    ):
        raise RecipeError(
            path,
            f"{term.name} reads what the student thought when it wrote, so its text must be new: leave ahead and"
            " replay out",
        )
    if term.name in POLICIES and POLICIES[term.name].prepare and recipe.rollout and recipe.rollout.dtype:
        raise RecipeError(
            path,
            f"{term.name} takes the student itself to be the one that wrote, and its copy is another: leave dtype out",
        )
    if term.name in POLICIES and recipe.student_writer is not None and recipe.student_writer.temperature == 0:
        raise RecipeError(
            path,
            f"{term.name} is right in expectation over drawn text, and this student draws none; give it a temperature",
        )
    if term.by is not None and term.by not in made:
        makers = [name for name, policy in POLICIES.items() if policy.prepare and term.by in policy.reads]
        raise RecipeError(
            f"{path}.by", f"nothing writes {term.by} beside the tokens; add the loss {' or '.join(makers)}"
        )
    if term.name == "contrast" and recipe.student_writer is not None:
        raise RecipeError(
            path, "its bank holds texts that are there before the training; leave the student out of the writers"
        )
    if term.name == "filtered_match" and not recipe.fixed_writers:
        raise RecipeError(path, "its filters are learned from text that is there before the training; add a writer")


def _check_student_writer(recipe: Recipe, terms: Sequence[Term], share: Schedule | None) -> None:
    """Refuse what the student can't write, or the loop can't train."""
    writer = recipe.student_writer
    settings = recipe.rollout or Rollout()
    if writer is None:
        return
    assert share is not None
    at = f"writer[{recipe.writer.index(writer)}]"
    fixed = recipe.fixed_writers
    if fixed and not recipe.all_answer and all(term.only == STUDENT for term in terms):
        raise RecipeError(
            "loss",
            f"no loss reads the text of the {fixed[0].by}, so its steps would teach nothing; add one, or leave it out",
        )
    if not fixed and recipe.train.steps is None:
        raise RecipeError(
            "train.epochs", "how long the student's answers will be is not known before; give train.steps"
        )
    if share.shape == "plateau" and not fixed:
        raise RecipeError(
            f"{at}.share", "an adaptive share moves between the student's text and other text; add a writer"
        )
    if share.shape != "plateau" and settings.validation != Validation():
        raise RecipeError(
            "rollout.validation", f"only an adaptive share looks at it; set {at}.share.shape: plateau, or leave it out"
        )
    if recipe.all_answer and fixed and (settings.ahead > 1 or settings.replay is not None):
        raise RecipeError(
            "rollout",
            "where every writer answers every prompt, the student writes at each step: leave ahead and replay out",
        )
    if settings.joint is not None and (writer.top_p < 1 or writer.temperature == 0):
        raise RecipeError(
            "rollout.joint",
            f"two models write one text from whole distributions; set {at}.top_p: 1.0 and a temperature",
        )
    if settings.through is not None and settings.dtype is not None:
        raise RecipeError(
            "rollout.dtype", "a server writes in the precision it was started with; leave dtype or through out"
        )
    if settings.through is not None and settings.joint is not None:
        raise RecipeError("rollout.through", "two models write one text in process only; leave joint or through out")
    if settings.through is not None and writer.temperature != 0 and (writer.temperature, writer.top_p) != (1.0, 1.0):
        raise RecipeError(
            "rollout.through",
            f"a server gives the log-probabilities of plain draws only; set {at}'s temperature and top_p to 1",
        )


def _check_teacher(use: TeacherUse, steps: Sequence[tuple[str, Step]]) -> None:
    """Refuse what this kind of teacher can't give, can't be shown, or can't do beside the rest of the recipe."""
    recipe = use.recipe
    teacher = recipe.teacher
    teacher_kind = kind(teacher)
    teacher_kind.refuse(teacher, use)
    given = teacher_kind.gives(teacher)
    for term in use.terms:
        for evidence in sorted(term.reads & (TEACHER_EVIDENCE | {REFERENCE}) - given):
            raise RecipeError(use.loss_path(term), teacher_kind.lacks(teacher, evidence))
    prune = recipe.student.start.prune
    for index, (name, step) in enumerate(steps):
        path = f"elicit[{index}].{name}"
        for evidence in sorted(step.needs - given):
            raise RecipeError(path, teacher_kind.lacks(teacher, evidence))
        if getattr(step, "reference", "") == "untouched" and prune is not None and prune.keep in JUDGED_ON_TEXT:
            raise RecipeError(
                f"{path}.reference",
                f"prune.keep: {prune.keep} is judged on the text that this step selects; set keep: uniform, or name a"
                " model",
            )
    if teacher.cache is not None:
        _check_cache(use, teacher.cache)
    for field in teacher.context.reads if teacher.context else []:
        lacking = [
            prompt.id
            for prompt in use.training_prompts
            if not (prompt.answers if field == "answer" else prompt.feedback)
        ]
        if lacking:
            raise RecipeError(
                "teacher.context.user",
                f"{{{field}}} stands in it, and {len(lacking)} prompts have none, such as {lacking[0]!r}; "
                "give prompts that all have one",
            )


def _check_cache(use: TeacherUse, cache: CacheSettings) -> None:
    """Refuse what can't be kept before the training, and losses that read more than the form holds."""
    recipe = use.recipe
    path = "teacher.cache"
    if recipe.student_writer is not None:
        raise RecipeError(
            path,
            "text that the student writes while it trains can't be kept before; leave the cache or that writer out",
        )
    if recipe.train.mixup is not None:
        raise RecipeError(path, "a teacher that reads mixed text is asked at every step; leave the cache out")
    for term in use.terms:
        if "teacher_distribution" not in term.reads:
            continue
        if refusal := form_of(cache).refusal(DIVERGENCES[term.name], softened=term.softened):
            raise RecipeError(use.loss_path(term), refusal)
    if "teacher_distribution" not in use.read:
        raise RecipeError(path, "no loss reads the teacher's distribution, so nothing would be kept; leave it out")
