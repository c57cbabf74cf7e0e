"""Combinations in a recipe that can't work, each refused with its place and the cure, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.config.recipe import Recipe
from limbeck.config.sections import Rollout, Validation
from limbeck.config.teacher import BridgeSettings, CacheSettings
from limbeck.data.batches import CHOSEN, MIXED, REJECTED
from limbeck.elicit.prompts import Prompt
from limbeck.objectives.consistency import CONSISTENCY
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.term import CROSS_ENTROPY, STUDENT, Term
from limbeck.runs import build
from limbeck.runs.cost import TEACHER_EVIDENCE
from limbeck.training.controls import check_controls
from limbeck.types import RecipeError, nearest


def validate(recipe: Recipe) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
        RecipeError: a term that reads what no writer or teacher gives, an unknown task, prompts that aren't there.
    """
    _check_writers(recipe)
    build.steps(recipe)
    training, _ = build.prompts(recipe)
    check_controls(recipe, training)
    _check_student_writer(recipe)
    _check_teacher(recipe, training)
    for index, term in enumerate(build.terms(recipe)):
        _check_evidence(recipe, term, training, f"loss[{index}].{term.name}")
    trained = {prompt.text for prompt in training}
    for task in build.tasks(recipe):
        if leak := [name for name, text in task.texts if text in trained]:
            raise RecipeError(
                "evaluate.metrics",
                f"{len(leak)} items of the task {task.name} are training prompts too, such as {leak[0]}",
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
    if not others and prune is not None and prune.keep in ("importance", "block_influence"):
        raise RecipeError(
            "writer", f"prune.keep: {prune.keep} is judged on others' text; add a writer, or set keep: uniform"
        )


def _check_evidence(recipe: Recipe, term: Term, training: Sequence[Prompt], path: str) -> None:
    """Refuse a term whose evidence no writer, prompt or teacher gives."""
    writers = {writer.by for writer in recipe.writer}
    several = recipe.all_answer or any(len(prompt.answers) > 1 for prompt in training)
    tags = writers | {prompt.task for prompt in training if prompt.task} | ({CHOSEN, REJECTED} if several else {CHOSEN})
    tags |= {MIXED} if recipe.train.mixup is not None else set()
    _check_written(recipe, term, path)
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


def _check_written(recipe: Recipe, term: Term, path: str) -> None:
    """Refuse a term that speaks of the student's own text where there is none, or of numbers that nobody writes beside
    it."""
    if STUDENT in term.reads and recipe.student_writer is None:
        raise RecipeError(
            path, f"{term.name} reads text that the student writes while it trains; add a writer {{by: student}}"
        )
    if missing := sorted(term.reads & {"advantage", "reference_log_prob", "importance_weight"}):
        raise RecipeError(
            path, f"{term.name} reads {missing[0]}, which comes from rewards, and nothing gives rewards yet"
        )
    policies = [POLICIES[other.name] for other in build.terms(recipe) if other.name in POLICIES]
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
    other_prompts = recipe.teacher.context is not None
    if other_prompts and term.match is not None:
        raise RecipeError(
            path,
            f"{term.name} compares position by position, and this teacher is shown other prompts; use a divergence",
        )
    if term.name == "contrast" and recipe.student_writer is not None:
        raise RecipeError(
            path, "its bank holds texts that are there before the training; leave the student out of the writers"
        )
    if term.name == "filtered_match" and not recipe.fixed_writers:
        raise RecipeError(path, "its filters are learned from text that is there before the training; add a writer")
    if recipe.teacher.weights != "own" and "reference_teacher" in term.reads:
        raise RecipeError(path, f"{term.name} compares with a frozen teacher, and this student teaches itself")


def _check_student_writer(recipe: Recipe) -> None:
    """Refuse what the student can't write, or the loop can't train."""
    writer = recipe.student_writer
    settings = recipe.rollout or Rollout()
    if writer is None:
        return
    at = f"writer[{recipe.writer.index(writer)}]"
    fixed = recipe.fixed_writers
    share, _ = build.shares(recipe)
    if fixed and not recipe.all_answer and all(term.only == STUDENT for term in build.terms(recipe)):
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
    if settings.joint is not None and recipe.teacher.weights != "own":
        raise RecipeError(
            "rollout.joint", "a student that teaches itself can't write beside itself; leave it out, or name a teacher"
        )


def _check_teacher(recipe: Recipe, training: Sequence[Prompt]) -> None:
    """Refuse a teacher that can't see what it is to be shown, or a student that teaches itself and is not itself."""
    teacher = recipe.teacher
    if teacher.model is None:
        _check_text_only(recipe, teacher.cache)
    if teacher.server is not None and (teacher.context is not None or teacher.weights != "own"):
        raise RecipeError(
            "teacher.server",
            "a server has the model's own weights and sees the prompt alone; leave context and weights out",
        )
    prune = recipe.student.start.prune
    for index, (name, step) in enumerate(build.steps(recipe)):
        if (
            getattr(step, "reference", "") == "untouched"
            and prune is not None
            and prune.keep in ("importance", "block_influence")
        ):
            path = f"elicit[{index}].{name}.reference"
            raise RecipeError(
                path,
                f"prune.keep: {prune.keep} is judged on the text that this step selects; set keep: uniform, or name a"
                " model",
            )
        if teacher.server is not None and "contrast" in step.needs:
            raise RecipeError(
                f"elicit[{index}].{name}",
                "it writes against another prompt, which a server can't; leave teacher.server out",
            )
    if teacher.weights != "own" and recipe.student.start.pretrained != teacher.model:
        raise RecipeError(
            "teacher.weights",
            f"{teacher.weights} weights are the student's own: set student.start.pretrained: {teacher.model}",
        )
    if teacher.bridge is not None:
        _check_bridge(recipe, teacher.bridge)
    if teacher.cache is not None:
        _check_cache(recipe, teacher.cache)
    if teacher.beside or teacher.together != "mean" or teacher.weight != 1:
        _check_several(recipe, training)
    for name in teacher.context.reads if teacher.context else []:
        lacking = [prompt.id for prompt in training if not (prompt.answers if name == "answer" else prompt.feedback)]
        if lacking:
            raise RecipeError(
                "teacher.context.user",
                f"{{{name}}} stands in it, and {len(lacking)} prompts have none, such as {lacking[0]!r}; "
                "give prompts that all have one",
            )


def _check_bridge(recipe: Recipe, bridge: BridgeSettings) -> None:
    """Refuse what a teacher with other tokens can't give."""
    teacher = recipe.teacher
    path = "teacher.bridge"
    rollout = recipe.rollout
    if teacher.model is None or teacher.beside or teacher.cache is not None or teacher.weights != "own":
        raise RecipeError(
            path,
            "one teacher whose weights are here is read through it, at every step; leave beside, cache and weights out",
        )
    if recipe.student.start.pretrained is None:
        raise RecipeError(
            "student.start", "a student made of the teacher has its tokens and needs no bridge: give pretrained"
        )
    if recipe.train.mixup is not None or (rollout is not None and rollout.joint is not None):
        raise RecipeError(
            path, "texts are mixed, and written by two models, in one vocabulary only; leave train.mixup and joint out"
        )
    read = False
    for index, term in enumerate(build.terms(recipe)):
        at = f"loss[{index}].{term.name}"
        if (
            term.match is not None
            or "reference_teacher" in term.reads
            or (term.name in POLICIES and "teacher_distribution" in term.reads)
        ):
            raise RecipeError(
                at,
                "it reads the teacher token by token, and this one has other tokens; use a divergence, uld or"
                " dual_space",
            )
        read = read or bool(term.reads & TEACHER_EVIDENCE)
        if "teacher_distribution" not in term.reads:
            continue
        loss = DIVERGENCES[term.name]
        if not loss.sorts and (not loss.buckets or _softened(term)):
            raise RecipeError(at, f"{term.name} (or its temperature) needs one vocabulary; use forward_kl, jsd or uld")
        if bridge.others == "written" and not (loss.one_hot and loss.buckets):
            raise RecipeError(
                at, f"{term.name} says nothing of the text alone, which others: written teaches; use forward_kl or jsd"
            )
    if not read:
        raise RecipeError(path, "no loss reads the teacher's distribution or states; leave it out")


def _softened(term: Term) -> bool:
    return any(getattr(term.params.get("temperature"), end, 1) != 1 for end in ("start", "end"))


def _check_several(recipe: Recipe, training: Sequence[Prompt]) -> None:
    """Refuse teachers that can't be one, one that has no text, and losses that read one teacher's."""
    teacher = recipe.teacher
    path = "teacher.beside"
    if not teacher.beside or teacher.model is None:
        raise RecipeError(
            path, "weight and together speak of several teachers whose weights are here: name them, or leave those out"
        )
    if teacher.weights != "own" or teacher.cache is not None:
        raise RecipeError(
            path, "several teachers are asked at every step, each with its own weights; leave weights and cache out"
        )
    if teacher.together == "uncertainty" and (len(teacher.beside) != 1 or teacher.beside[0].only is not None):
        raise RecipeError(
            path, "uncertainty moves between two teachers: name one small model beside the large one, without `only`"
        )
    tags = {writer.by for writer in recipe.writer} | {prompt.task for prompt in training} | {CHOSEN, REJECTED}
    for number, other in enumerate(teacher.beside):
        if other.only is not None and other.only not in tags and recipe.elicit is None:
            raise RecipeError(
                f"{path}[{number}].only", f"no text is by or for {other.only!r}{nearest(other.only, tags - {''})}"
            )
    for index, term in enumerate(build.terms(recipe)):
        policy = POLICIES.get(term.name)
        if (
            policy is not None
            and "teacher_distribution" in term.reads
            and (policy.prepare or teacher.together == "uncertainty")
        ):
            raise RecipeError(
                f"loss[{index}].{term.name}",
                "it reads one teacher's opinion of the text; use a divergence, or one teacher",
            )
    if not any("teacher_distribution" in term.reads for term in build.terms(recipe)):
        raise RecipeError(
            path, "no loss reads the teachers' distribution, so those beside would teach nothing; leave them out"
        )


def _check_cache(recipe: Recipe, cache: CacheSettings) -> None:
    """Refuse what can't be kept before the training, and losses that read more than the form holds."""
    path = "teacher.cache"
    if recipe.student_writer is not None:
        raise RecipeError(
            path,
            "text that the student writes while it trains can't be kept before; leave the cache or that writer out",
        )
    if recipe.teacher.weights != "own" or recipe.train.mixup is not None:
        raise RecipeError(
            path, "a teacher that changes, or one that reads mixed text, is asked at every step; leave the cache out"
        )
    read = False
    for index, term in enumerate(build.terms(recipe)):
        at = f"loss[{index}].{term.name}"
        if term.match is not None or term.divergence:
            raise RecipeError(
                at, "it reads the teacher's layers, and the cache keeps its last distribution; leave teacher.cache out"
            )
        if "teacher_distribution" not in term.reads:
            continue
        read = True
        loss = DIVERGENCES[term.name]
        name = term.name
        soft = _softened(term)
        if cache.sampled is not None and (name != "forward_kl" or soft):
            raise RecipeError(
                at, "sampled tokens carry forward_kl at temperature 1 alone: use it, or keep {hidden: {}}"
            )
        if cache.top_k is not None and (not loss.buckets or soft):
            raise RecipeError(
                at,
                f"{name} (or its temperature) needs whole distributions, and top tokens are not: keep {{hidden: {{}}}}",
            )
    if not read:
        raise RecipeError(path, "no loss reads the teacher's distribution, so nothing would be kept; leave it out")


def _check_text_only(recipe: Recipe, cache: CacheSettings | None) -> None:
    """Refuse what needs the weights of a teacher that is behind a server alone. Its likeliest tokens it may give, where
    they are kept."""
    cure = "or name the same model's weights in teacher.model"
    if cache is not None and cache.top_k is None:
        raise RecipeError(
            "teacher.cache", f"a server names its likeliest tokens at most: keep {{top_k: {{k: 20}}}}, {cure}"
        )
    if cache is not None and recipe.teacher.server is not None and recipe.teacher.server.batch:
        raise RecipeError(
            "teacher.server.batch", f"text is scored by requests of their own: leave batch or the cache out, {cure}"
        )
    named = recipe.teacher.server.names if recipe.teacher.server is not None else None
    if named is not None and cache is not None:
        raise RecipeError("teacher.server.names", "what a cache keeps is asked for once; leave names or the cache out")
    given = {"teacher_distribution"} if cache is not None or named is not None else set()
    if recipe.student.start.pretrained is None:
        raise RecipeError(
            "student.start", f"nothing can be made of a teacher whose weights are not here: give pretrained, {cure}"
        )
    for index, term in enumerate(build.terms(recipe)):
        if missing := sorted(term.reads & (TEACHER_EVIDENCE | {"reference_teacher"}) - given):
            what = missing[0].replace("_", " ")
            kept = (
                "keep what it says of the text (teacher.cache: {top_k: {k: 20}}), or ask it at every step"
                " (teacher.server.names: 20), "
            )
            hint = kept if missing == ["teacher_distribution"] else ""
            raise RecipeError(
                f"loss[{index}].{term.name}",
                f"it reads the {what}, and a server gives text: use cross_entropy, {hint}{cure}",
            )
    for index, (name, step) in enumerate(build.steps(recipe)):
        if missing := sorted(step.needs - {"text"}):
            what = missing[0].replace("_", " ")
            raise RecipeError(
                f"elicit[{index}].{name}", f"it needs {what}, and a server gives text: leave it out, {cure}"
            )
    if recipe.rollout is not None and recipe.rollout.joint is not None:
        raise RecipeError("rollout.joint", f"two models write one text in process only: leave it out, {cure}")
