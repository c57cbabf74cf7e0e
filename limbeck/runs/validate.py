"""Refuses combinations in a recipe that can't work, with place and remedy, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.config.named_models import NO_ROUNDS, PREVIOUS, TEACHER, UNTOUCHED, check_name
from limbeck.config.recipe import Recipe
from limbeck.config.rounds import NAMING
from limbeck.config.sections import Advantage, Rollout, Validation
from limbeck.config.server import Served
from limbeck.config.teacher import BridgedTeacher, CacheSettings, SelfTeacher, SeveralTeachers
from limbeck.data.batches import CHOSEN, MIXED, REJECTED
from limbeck.elicit.step import AskingStep, ElicitStep
from limbeck.evaluate.task import Task
from limbeck.evaluate.thinking_settings import thinking_of
from limbeck.models.constrain import unheld
from limbeck.models.teacher_interface import REFERENCE, TEACHER_EVIDENCE, TeacherUse
from limbeck.models.teachers import kind
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.facts import TeacherFacts, TextFacts
from limbeck.objectives.loss import ADVANTAGE, STUDENT
from limbeck.objectives.rewards import SCALES
from limbeck.objectives.schedule import Schedule
from limbeck.objectives.term import Term
from limbeck.signals.forms import form_of
from limbeck.training.controls import check_controls
from limbeck.types import STUDENTS, RecipeError, nearest

JUDGED_ON_TEXT = ("importance", "block_influence")  # choices of layers that need text


def check_parts(
    use: TeacherUse,
    *,
    steps: Sequence[tuple[str, ElicitStep]],
    tasks: Sequence[Task],
    share: Schedule | None,
    judges: Sequence[tuple[str, AskingStep]] = (),
) -> None:
    """Refuse parts of a recipe that can't work together.

    Args:
        judges: (its place in the recipe, the step that it judges by) of each reward by a judge.

    Raises:
        RecipeError: a loss that reads what no writer or teacher gives, a held-out item that is trained on, ...
    """
    recipe = use.recipe
    training = use.training_prompts
    _check_writers(recipe)
    check_controls(recipe, training)
    _check_rewards(recipe, use.terms)
    _check_student_writer(recipe, use.terms, share)
    _check_teacher(use, steps)
    _check_mixup(recipe)
    _check_judges(recipe, judges)
    _check_models(recipe, steps, judges)
    facts = _text_facts(use, steps)
    for term in use.terms:
        term.check_text(facts)
    trained = {prompt.spoken for prompt in training}
    for task in tasks:
        _check_budget(recipe, task)
        if leak := [name for name, text in task.texts if text in trained]:
            raise RecipeError(
                "evaluate.metrics",
                f"{len(leak)} items of the task {task.name} are training prompts too, such as {leak[0]}",
            )
    if any(writer.by == "corpus" for writer in recipe.writer):
        for prompt in training:
            if not prompt.answers:
                raise RecipeError(
                    "writer",
                    f"a corpus writer needs an answer beside every prompt; there is none at {prompt.place}",
                )


def _check_budget(recipe: Recipe, task: Task) -> None:
    """Refuse a budget of thinking for a teacher that gives text alone."""
    if thinking_of(task) is not None and recipe.teacher.model is None and recipe.teacher.server is not None:
        raise RecipeError(
            "evaluate.metrics",
            f"the task {task.name} holds thinking to a budget, which a teacher behind a server can't be held to: its"
            " text can't be stopped and continued there; name its weights in teacher.model, or leave the task out",
        )


def _check_writers(recipe: Recipe) -> None:
    """Refuse a recipe whose only text is the untouched student's if pruning needs other text."""
    beside_untouched = [writer for writer in recipe.fixed_writers if writer.by not in STUDENTS]
    # if only the student writes, the teacher's text serves for pruning
    others = beside_untouched if recipe.fixed_writers else recipe.writer
    prune = recipe.student.start.prune
    if not others and prune is not None and prune.keep in JUDGED_ON_TEXT:
        raise RecipeError(
            "writer", f"prune.keep: {prune.keep} is judged on others' text; add a writer, or set keep: uniform"
        )


def _check_models(
    recipe: Recipe, steps: Sequence[tuple[str, ElicitStep]], judges: Sequence[tuple[str, AskingStep]] = ()
) -> None:
    """Refuse names of no model, models that nothing asks, and what a model can't give."""
    models = recipe.models or {}
    prune = recipe.student.start.prune
    for index, (name, step) in enumerate(steps):
        path = f"elicit[{index}].{name}.by"
        for setting in NAMING[1:]:  # of whom answers are, or by whom texts are scored
            if recipe.previous is None and getattr(step, setting, None) == PREVIOUS:
                raise RecipeError(f"elicit[{index}].{name}.{setting}", NO_ROUNDS)
        for by in step.asks():
            check_name(by, models, path, recipe.previous)
            if by == UNTOUCHED and prune is not None and prune.keep in JUDGED_ON_TEXT:
                raise RecipeError(
                    path, f"prune.keep: {prune.keep} is judged on the text that this step gives; set keep: uniform"
                )
            if isinstance(step, AskingStep):
                _check_gives(recipe, by, step, path)
    asked = {by for _, step in (*steps, *judges) for by in (*step.asks(), getattr(step, "reference", ""))}
    asked.add(recipe.evaluate.judge or "")
    if idle := [name for name in models if name not in asked]:
        raise RecipeError(f"models.{idle[0]}", "no step and no judge names it: name it in `by`, or leave it out")


def _check_gives(recipe: Recipe, by: str, step: AskingStep, path: str) -> None:
    """Refuse to ask a named model behind a server for more than text."""
    models = recipe.models or {}
    needs = step.demands_of(by) - {"text", "raw"}
    if by in models and models[by].server is not None and needs:
        what = ", ".join(sorted(needs)).replace("_", " ")
        raise RecipeError(path, f"it needs {what}, and {by} is behind a server: name weights in models.{by}.model")


def _check_judges(recipe: Recipe, judges: Sequence[tuple[str, AskingStep]]) -> None:
    """Refuse judges of the student's answers that are none of the recipe's `models`, or can't judge so."""
    models = recipe.models or {}
    for path, step in judges:
        for by in step.asks():
            if by not in models:
                raise RecipeError(
                    path,
                    f"{by!r} can't judge while the student trains{nearest(by, models)}: give the judge a name under"
                    " `models`, such as {judge: MODEL}, and name it in `by`",
                )
            _check_gives(recipe, by, step, path)


def _text_facts(use: TeacherUse, steps: Sequence[tuple[str, ElicitStep]]) -> TextFacts:
    """Facts about the training text, for the losses' checks."""
    recipe = use.recipe
    ranked = any(step.ranks for _, step in steps)
    training = use.training_prompts
    writers = {writer.by for writer in recipe.writer}
    several = any(len(prompt.answers) > 1 for prompt in training)
    tags = writers | {prompt.task for prompt in training if prompt.task} | {CHOSEN}
    tags |= {REJECTED} if recipe.all_answer or several else set()
    tags |= {MIXED} if recipe.train.mixup is not None else set()
    preferred = {CHOSEN} if recipe.writer[0].by != STUDENT and recipe.fixed_writers else set()
    rollout = recipe.rollout or Rollout()
    return TextFacts(
        writers=frozenset(writers),
        tags=frozenset(tags) if recipe.elicit is None else None,  # steps give tags of their own
        others_tags=frozenset(writers - {STUDENT} | preferred),
        fixed=bool(recipe.fixed_writers),
        all_preferred=writers.isdisjoint(STUDENTS) and not ("corpus" in writers and several) and not ranked,
        several_answers=recipe.all_answer or several or recipe.elicit is not None,
        ranked_answers=recipe.all_answer
        or ranked
        or (writers == {"corpus"} and all(len(prompt.answers) > 1 for prompt in training)),
        columns=frozenset(column for term in use.terms for column in term.loss.writes),
        temperature=None if recipe.student_writer is None else recipe.student_writer.temperature,
        top_p=1.0 if recipe.student_writer is None else recipe.student_writer.top_p,
        writes_jointly=rollout.joint is not None,
        reuses_rollouts=rollout.ahead > 1 or bool(rollout.replay) or (rollout.passes or 1) > 1,
        repeats_rollouts=rollout.ahead <= 1 and not rollout.replay,
        copy_writes=rollout.dtype == "bfloat16",
        teacher_prompts=recipe.teacher.context is not None,
        self_taught=isinstance(recipe.teacher, SelfTeacher),
        rewarded=rollout.rewards is not None,
        mixed_tag=None if recipe.train.mixup is None else MIXED,
        scores=recipe.student.scores,
        labels=frozenset(name for prompt in training for name, _ in prompt.labels) if recipe.elicit is None else None,
    )


def _teacher_facts(recipe: Recipe) -> TeacherFacts:
    """Facts about the teacher, for the losses' checks."""
    teacher = recipe.teacher
    bridge = teacher.bridge if isinstance(teacher, BridgedTeacher) else None
    return TeacherFacts(
        bridged=bridge is not None,
        written_elsewhere=bridge is not None and bridge.others == "written",
        cached=teacher.cache is not None,
        together=teacher.together if isinstance(teacher, SeveralTeachers) else None,
    )


def _check_mixup(recipe: Recipe) -> None:
    """Refuse text that can't be mixed."""
    if recipe.train.mixup is None:
        return
    if recipe.student_writer is not None or recipe.all_answer or recipe.teacher.context is not None:
        raise RecipeError(
            "train.mixup",
            "only text that is there before the training is mixed, and a teacher that sees the same prompts reads it",
        )


def _check_rewards(recipe: Recipe, terms: Sequence[Term]) -> None:
    """Refuse rewards of text that others write, too, or that no loss reads."""
    settings = recipe.rollout
    if settings is None or settings.rewards is None:
        return
    if len(recipe.writer) > 1:
        raise RecipeError("writer", "rewards judge text that the student alone writes; leave the other writers out")
    for name, given in (("ahead", settings.ahead > 1), ("replay", settings.replay), ("joint", settings.joint)):
        if given:
            raise RecipeError(f"rollout.{name}", "rewards judge what the student alone has just written; leave it out")
    if (writer := recipe.student_writer) is not None and (writer.temperature, writer.top_p) != (1, 1):
        raise RecipeError(
            "writer[0]",
            "losses on rewards are right for what the student draws from its own distribution; set temperature and"
            " top_p to 1",
        )
    if not any(ADVANTAGE in term.reads for term in terms):
        raise RecipeError("loss", "no loss reads the rewards; add ppo_clip, or reinforce")
    advantage = settings.advantage or Advantage()
    if advantage.scale not in (legal := SCALES[advantage.baseline]):
        raise RecipeError(
            "rollout.advantage",
            f"baseline: {advantage.baseline} with scale: {advantage.scale} divides by 0 where all answers have the"
            f" same reward; set scale: {' or '.join(legal)}",
        )
    if settings.group == 1 and (advantage.baseline in ("group", "others") or advantage.scale == "group"):
        raise RecipeError(
            "rollout.group",
            "one answer to a prompt can't be compared with others; ask for more, or set"
            " rollout.advantage: {baseline: step, scale: step}",
        )
    if settings.resample and advantage.baseline not in ("group", "others"):
        raise RecipeError(
            "rollout.resample",
            f"with baseline: {advantage.baseline} answers of equal reward to one prompt teach something, too, so there"
            " is nothing to ask again: leave it out, or set rollout.advantage.baseline: group or others",
        )
    if (settings.passes or 1) > 1 and any(term.name == "reinforce" for term in terms):
        raise RecipeError(
            "rollout.passes", "reinforce is right for text of today's student alone; use ppo_clip, or leave passes out"
        )


def _check_student_writer(recipe: Recipe, terms: Sequence[Term], share: Schedule | None) -> None:
    """Refuse settings of the student's writing that can't work."""
    writer = recipe.student_writer
    settings = recipe.rollout or Rollout()
    if writer is None:
        return
    assert share is not None
    at = f"writer[{recipe.writer.index(writer)}]"
    fixed = recipe.fixed_writers
    torn = [term.label for term in terms if term.unit == "group"] if fixed and not recipe.all_answer else []
    if torn:
        raise RecipeError(
            f"loss.{torn[0]}",
            "it compares all answers to a prompt, and a student that writes a share of the text takes some away: let"
            " every writer answer every prompt (leave share out), or leave the student out",
        )
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


def _check_teacher(use: TeacherUse, steps: Sequence[tuple[str, ElicitStep]]) -> None:
    """Refuse what this kind of teacher can't give or be shown, or can't do with the rest of the recipe."""
    recipe = use.recipe
    teacher = recipe.teacher
    teacher_kind = kind(teacher)
    facts = _teacher_facts(recipe)
    for term in use.terms:
        term.check_teacher(facts)
    teacher_kind.refuse(teacher, use)
    available = teacher_kind.gives(teacher)
    for term in use.terms:
        for evidence in sorted(term.reads & (TEACHER_EVIDENCE | {REFERENCE}) - available):
            raise RecipeError(use.loss_path(term), teacher_kind.lacks(teacher, evidence))
    prune = recipe.student.start.prune
    for index, (name, step) in enumerate(steps):
        path = f"elicit[{index}].{name}"
        needs = step.demands_of(TEACHER) if isinstance(step, AskingStep) and TEACHER in step.asks() else frozenset()
        for evidence in sorted(needs - available):
            raise RecipeError(path, teacher_kind.lacks(teacher, evidence))
        if (form := step.must_hold()) is not None and (why := unheld(form, _server_of(recipe, step.asks()[0]))):
            raise RecipeError(f"{path}.constrain", f"{why}; or leave constrain out")
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


def _server_of(recipe: Recipe, by: str) -> Served | None:
    """The server of the teacher, or of a model by its name; None where its weights are here."""
    named = (recipe.models or {}).get(by)
    return recipe.teacher.server if by == TEACHER else None if named is None else named.server


def _check_cache(use: TeacherUse, cache: CacheSettings) -> None:
    """Refuse text that can't be cached before the training, and losses that read more than the cache holds."""
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
        if term.name not in DIVERGENCES:  # other losses say themselves whether they can do with a cache
            continue
        if refusal := form_of(cache).refusal(DIVERGENCES[term.name], softened=term.settings.softened()):
            raise RecipeError(use.loss_path(term), refusal)
    if "teacher_distribution" not in use.read:
        raise RecipeError(path, "no loss reads the teacher's distribution, so nothing would be kept; leave it out")
