"""From a recipe's words to concrete things: the only file that knows which class or function a name stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from limbeck.builtin import recipe_files, task_folders
from limbeck.data import BEST, MIXED, REST
from limbeck.elicit.flow import Step
from limbeck.elicit.prompts import Prompt, load_prompts
from limbeck.elicit.steps import STEPS
from limbeck.evaluate.perturb import perturbed
from limbeck.evaluate.tasks import Task, load_task
from limbeck.models.api import ApiTeacher
from limbeck.models.context import Sight
from limbeck.models.generate import Joint
from limbeck.models.joint import Mixture, Speculation
from limbeck.models.load import Model, load_model, model_identity
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.match import MATCHES
from limbeck.objectives.parameters import Range, defaults_of
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.objectives.schedule import Schedule, make_schedule
from limbeck.objectives.supervised import cross_entropy
from limbeck.objectives.term import CROSS_ENTROPY, WRITTEN, Term, make_term
from limbeck.recipe import Recipe, explain, load_recipe
from limbeck.settings import Joint as JointSettings
from limbeck.settings import Rollout, Validation
from limbeck.types import NAME, RecipeError, UserError, content_hash, nearest

HELD_OUT_SHARE = 0.1


def terms(recipe: Recipe) -> list[Term]:
    """The recipe's losses, their parameters checked."""
    built = [make_term(loss.name, loss.params, loss.weight, f"loss[{i}].{loss.name}") for i, loss in enumerate(recipe.loss)]
    labels = [term.label for term in built]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise RecipeError(
                f"loss[{index}]", f"{label} stands twice; give it once with the summed weight, or other text to each by `only`"
            )
    return built


def steps(recipe: Recipe) -> list[tuple[str, Step]]:
    """The recipe's steps of elicitation by name, their settings checked."""
    found = []
    for index, entry in enumerate(recipe.elicit or ()):
        path = f"elicit[{index}].{entry.name}"
        if entry.name not in STEPS:
            raise RecipeError(f"elicit[{index}]", f"there is no step {entry.name!r}{nearest(entry.name, STEPS)}")
        kind = STEPS[entry.name]
        try:
            found.append((entry.name, cast(Step, kind.model_validate(entry.params))))
        except ValidationError as error:
            raise explain(error, kind, path) from None
    return found


def teacher(recipe: Recipe) -> InProcessTeacher:
    return InProcessTeacher(load_model(recipe.teacher.model).seeing(sight(recipe)))


def served(recipe: Recipe) -> ApiTeacher | None:
    """The server that writes the teacher's text, where the recipe names one."""
    return None if recipe.teacher.server is None else ApiTeacher(recipe.teacher.server)


def sight(recipe: Recipe) -> Sight | None:
    """What the teacher is shown beside the prompts."""
    context = recipe.teacher.context
    if context is None:
        return None
    fields: dict[str, dict[str, str]] = {}
    for prompt in (prompt for part in prompts(recipe) for prompt in part):
        known = {"answer": prompt.answers[0] if prompt.answers else "", "feedback": prompt.feedback}
        shown = {name: text for name, text in known.items() if text and name in context.reads}
        if fields.setdefault(prompt.text, shown) != shown:
            raise RecipeError(
                "prompts.from", f"the prompt of {prompt.id!r} stands twice with other things to show the teacher; leave one out"
            )
    return Sight(context.system, context.user, fields)


def teacher_identity(recipe: Recipe) -> str:
    """What `teacher(recipe).identity` will be, without loading the weights."""
    return Model.named(model_identity(recipe.teacher.model), sight(recipe))


def model(path: Path) -> Model:
    return load_model(str(path))


def judge(source: str) -> Model:
    return load_model(source)


def judge_identity(source: str) -> str:
    """What `judge(source).identity` will be, without loading the weights."""
    return model_identity(source)


def prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), the two without a common text.

    Built-in prompts come with a held-out part. Of a user's own file every tenth or so is held out (by a hash of its
    text, so that it stays held out when lines are added), unless `evaluate.prompts` names another file.

    Raises:
        RecipeError: one of the two is empty, or a held-out prompt is among the training ones.
    """
    source, settings = recipe.prompts.source, recipe.evaluate
    training = load_prompts(source)
    if settings.prompts is not None:
        held_out = load_prompts(settings.prompts, part="test", path="evaluate.prompts")
    elif source.startswith("builtin/"):
        held_out = load_prompts(source, part="test")
    else:
        apart = [int(content_hash(prompt.text)[:8], 16) < HELD_OUT_SHARE * 16**8 for prompt in training]
        held_out = [prompt for prompt, out in zip(training, apart, strict=True) if out]
        training = [prompt for prompt, out in zip(training, apart, strict=True) if not out]
    training, held_out = training[: recipe.prompts.limit], held_out[: settings.limit]
    for part, path in ((training, "prompts"), (held_out, "evaluate.prompts")):
        if not part:
            raise RecipeError(path, "no prompt is left for this part; give more prompts, or a file under evaluate.prompts")
    if both := {prompt.text for prompt in training} & {prompt.text for prompt in held_out}:
        raise RecipeError("evaluate.prompts", f"{len(both)} held-out prompts are training prompts too, such as {min(both)!r}")
    return training, held_out


def tasks(recipe: Recipe) -> list[Task]:
    """The tasks named beside `fidelity`; `NAME@HOW` is the task NAME asked in another way."""
    found = []
    for name in (name for name in recipe.evaluate.metrics if name != "fidelity"):
        plain, _, how = name.partition("@")
        task = load_task(plain, recipe.evaluate.limit)
        found.append(perturbed(task, how) if how else task)
    if twice := {task.name for task in found if [other.name for other in found].count(task.name) > 1}:
        raise RecipeError("evaluate.metrics", f"the task {min(twice)} stands twice; leave one out")
    if len(found) == len(recipe.evaluate.metrics):
        raise RecipeError("evaluate.metrics", "fidelity is always measured, so list it")
    return found


def validate(recipe: Recipe) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
        RecipeError: a term that reads what no writer or teacher gives, an unknown task, prompts that aren't there.
    """
    _check_writers(recipe)
    steps(recipe)
    training, _ = prompts(recipe)
    _check_student_writer(recipe)
    _check_teacher(recipe, training)
    for index, term in enumerate(terms(recipe)):
        _check_evidence(recipe, term, training, f"loss[{index}].{term.name}")
    trained = {prompt.text for prompt in training}
    for task in tasks(recipe):
        if leak := [name for name, text in task.texts if text in trained]:
            raise RecipeError("evaluate.metrics", f"{len(leak)} items of the task {task.name} are training prompts too, such as {leak[0]}")
    if "gold_control" in recipe.evaluate.controls and not any(prompt.answers for prompt in training):
        raise RecipeError("evaluate.controls", "gold_control needs an answer beside the training prompts, and none has one; leave it out")
    if any(writer.by == "corpus" for writer in recipe.writer):
        for prompt in training:
            if not prompt.answers:
                raise RecipeError("writer", f"a corpus writer needs an answer beside every prompt; {prompt.id!r} has none")


def _check_writers(recipe: Recipe) -> None:
    """Refuse text by the untouched student alone where something needs other text."""
    beside_untouched = [writer for writer in recipe.fixed_writers if writer.by != "untouched"]
    others = beside_untouched if recipe.fixed_writers else recipe.writer  # for a student alone the teacher writes what these need
    prune = recipe.student.start.prune
    if not others and prune is not None and prune.keep in ("importance", "block_influence"):
        raise RecipeError("writer", f"prune.keep: {prune.keep} is judged on others' text; add a writer, or set keep: uniform")
    none_preferred = not others or (recipe.all_answer and recipe.writer[0].by in ("untouched", "student"))
    if {"sft_control", "shuffled_control"} & set(recipe.evaluate.controls) and none_preferred:
        raise RecipeError("evaluate.controls", "fine-tuning needs preferred text of a teacher or corpus; set controls: [untouched]")


def _check_evidence(recipe: Recipe, term: Term, training: Sequence[Prompt], path: str) -> None:
    """Refuse a term whose evidence no writer, prompt or teacher gives."""
    writers = {writer.by for writer in recipe.writer}
    several = recipe.all_answer or any(len(prompt.answers) > 1 for prompt in training)
    tags = writers | {prompt.task for prompt in training if prompt.task} | ({BEST, REST} if several else {BEST})
    tags |= {MIXED} if recipe.train.mixup is not None else set()
    _check_written(recipe, term, path)
    if term.only is not None and term.only not in tags and recipe.elicit is None:  # steps give tags of their own
        raise RecipeError(f"{path}.only", f"no text is by or for {term.only!r}{nearest(term.only, tags)}")
    if term.name == CROSS_ENTROPY and WRITTEN in writers:
        legal = writers - {WRITTEN} | ({BEST} if recipe.writer[0].by != WRITTEN and recipe.fixed_writers else set())
        if term.only not in legal:
            how = f"limit it, such as {{only: {min(writers - {WRITTEN})}}}" if writers != {WRITTEN} else "choose a divergence"
            raise RecipeError(path, f"it would teach the student its own text, and so to stay as it is; {how}")
    if recipe.train.mixup is not None:
        _check_mixed(recipe, term, path)
    poor = "untouched" in writers or ("corpus" in writers and any(len(prompt.answers) > 1 for prompt in training))
    if term.name == CROSS_ENTROPY and term.only is None and poor:
        raise RecipeError(path, "it would also fit answers that are not preferred, or the student's own; limit it, such as {only: best}")
    if "answers" not in term.reads:
        return
    if WRITTEN in writers and any(read.startswith("reference_") for read in term.reads):
        raise RecipeError(path, f"{term.name} compares with a frozen model's opinion, which text written while training does not have")
    ranked = writers == {"corpus"} and all(len(prompt.answers) > 1 for prompt in training)
    if not (recipe.all_answer or ranked):
        raise RecipeError(
            path,
            f"{term.name} compares answers to one prompt, and here every prompt has one: let all writers answer every prompt (leave their "
            "shares out, the preferred writer first), or give a corpus with `answers` or `chosen` and `rejected`",
        )


def _check_mixed(recipe: Recipe, term: Term, path: str) -> None:
    """Refuse what a mixture of two texts can't teach."""
    if recipe.student_writer is not None or recipe.all_answer or recipe.teacher.context is not None:
        raise RecipeError(
            "train.mixup", "only text that is there before the training is mixed, and a teacher that sees the same prompts reads it"
        )
    if "answers" in term.reads:
        raise RecipeError(path, f"{term.name} compares answers to one prompt, and a mixed text answers none; leave train.mixup out")
    if term.only in (None, MIXED) and "teacher_distribution" not in term.reads:
        raise RecipeError(
            path, f"a mixed text has no label but the teacher's distribution, which {term.name} doesn't read; limit it to a writer"
        )


def _check_written(recipe: Recipe, term: Term, path: str) -> None:
    """Refuse a term that speaks of the student's own text where there is none, or of numbers that nobody writes beside it."""
    if WRITTEN in term.reads and recipe.student_writer is None:
        raise RecipeError(path, f"{term.name} reads text that the student writes while it trains; add a writer {{by: student}}")
    if missing := sorted(term.reads & {"advantage", "reference_log_prob", "importance_weight"}):
        raise RecipeError(path, f"{term.name} reads {missing[0]}, which comes from rewards, and nothing gives rewards yet")
    policies = [POLICIES[other.name] for other in terms(recipe) if other.name in POLICIES]
    made = {column for policy in policies if policy.prepare for column in policy.reads}
    if term.by is not None and term.only != WRITTEN and recipe.fixed_writers:
        raise RecipeError(f"{path}.by", f"{term.by} stands beside the student's tokens alone; limit it: only: student")
    if term.name in POLICIES and POLICIES[term.name].prepare and recipe.rollout and (recipe.rollout.ahead > 1 or recipe.rollout.replay):
        raise RecipeError(
            path, f"{term.name} reads what the student thought when it wrote, so its text must be new: leave ahead and replay out"
        )
    if term.name in POLICIES and POLICIES[term.name].prepare and recipe.rollout and recipe.rollout.dtype:
        raise RecipeError(path, f"{term.name} takes the student itself to be the one that wrote, and its copy is another: leave dtype out")
    if term.name in POLICIES and recipe.student_writer is not None and recipe.student_writer.temperature == 0:
        raise RecipeError(path, f"{term.name} is right in expectation over drawn text, and this student draws none; give it a temperature")
    if term.by is not None and term.by not in made:
        makers = [name for name, policy in POLICIES.items() if policy.prepare and term.by in policy.reads]
        raise RecipeError(f"{path}.by", f"nothing writes {term.by} beside the tokens; add the loss {' or '.join(makers)}")
    other_prompts = recipe.teacher.context is not None
    if other_prompts and term.match is not None:
        raise RecipeError(path, f"{term.name} compares position by position, and this teacher is shown other prompts; use a divergence")
    if term.name == "contrast" and recipe.student_writer is not None:
        raise RecipeError(path, "its bank holds texts that are there before the training; leave the student out of the writers")
    if term.name == "filtered_match" and not recipe.fixed_writers:
        raise RecipeError(path, "its filters are learned from text that is there before the training; add a writer")
    if recipe.teacher.weights != "own" and "reference_teacher" in term.reads:
        raise RecipeError(path, f"{term.name} compares with a frozen teacher, and this student teaches itself")


SHARE_SHAPES = ("constant", "linear", "cosine", "step", "plateau")


def shares(recipe: Recipe) -> tuple[Schedule, Schedule]:
    """(the student's share of the text, and how much of that is written anew) as schedules."""
    writer, replay = recipe.student_writer, (recipe.rollout or Rollout()).replay
    assert writer is not None
    at = f"writer[{recipe.writer.index(writer)}].share"
    share = make_schedule(writer.share, at, Range(0, 1).check)
    fresh = make_schedule(replay.fresh if replay else 1.0, "rollout.replay.fresh", Range(0, 1).check)
    for path, schedule, shapes in ((at, share, SHARE_SHAPES), ("rollout.replay.fresh", fresh, SHARE_SHAPES[:-1])):
        if schedule.shape not in shapes:
            raise RecipeError(f"{path}.shape", f"{schedule.shape} is not possible here; legal: {', '.join(shapes[1:])}")
    return share, fresh


def joint(settings: JointSettings) -> Joint:
    """How two models write one text."""
    if settings.teacher_share is not None:
        return Mixture(settings.teacher_share, settings.teacher_temperature)
    assert settings.teacher_top_k is not None
    return Speculation(settings.teacher_top_k, settings.teacher_temperature)


def _check_student_writer(recipe: Recipe) -> None:
    """Refuse what the student can't write, or the loop can't train."""
    writer, settings = recipe.student_writer, recipe.rollout or Rollout()
    if writer is None:
        return
    at, fixed = f"writer[{recipe.writer.index(writer)}]", recipe.fixed_writers
    share, _ = shares(recipe)
    if fixed and not recipe.all_answer and all(term.only == WRITTEN for term in terms(recipe)):
        raise RecipeError(
            "loss", f"no loss reads the text of the {fixed[0].by}, so its steps would teach nothing; add one, or leave it out"
        )
    if not fixed and recipe.train.steps is None:
        raise RecipeError("train.epochs", "how long the student's answers will be is not known before; give train.steps")
    if share.shape == "plateau" and not fixed:
        raise RecipeError(f"{at}.share", "an adaptive share moves between the student's text and other text; add a writer")
    if share.shape != "plateau" and settings.validation != Validation():
        raise RecipeError("rollout.validation", f"only an adaptive share looks at it; set {at}.share.shape: plateau, or leave it out")
    if recipe.all_answer and fixed and (settings.ahead > 1 or settings.replay is not None):
        raise RecipeError("rollout", "where every writer answers every prompt, the student writes at each step: leave ahead and replay out")
    if settings.joint is not None and (writer.top_p < 1 or writer.temperature == 0):
        raise RecipeError("rollout.joint", f"two models write one text from whole distributions; set {at}.top_p: 1.0 and a temperature")
    if settings.through is not None and settings.dtype is not None:
        raise RecipeError("rollout.dtype", "a server writes in the precision it was started with; leave dtype or through out")
    if settings.through is not None and settings.joint is not None:
        raise RecipeError("rollout.through", "two models write one text in process only; leave joint or through out")
    if settings.through is not None and writer.temperature != 0 and (writer.temperature, writer.top_p) != (1.0, 1.0):
        raise RecipeError(
            "rollout.through", f"a server gives the log-probabilities of plain draws only; set {at}'s temperature and top_p to 1"
        )
    if settings.joint is not None and recipe.teacher.weights != "own":
        raise RecipeError("rollout.joint", "a student that teaches itself can't write beside itself; leave it out, or name a teacher")


def _check_teacher(recipe: Recipe, training: Sequence[Prompt]) -> None:
    """Refuse a teacher that can't see what it is to be shown, or a student that teaches itself and is not itself."""
    teacher = recipe.teacher
    if teacher.server is not None and (teacher.context is not None or teacher.weights != "own"):
        raise RecipeError("teacher.server", "a server has the model's own weights and sees the prompt alone; leave context and weights out")
    for index, (name, step) in enumerate(steps(recipe)):
        if teacher.server is not None and "contrast" in step.needs:
            raise RecipeError(f"elicit[{index}].{name}", "it writes against another prompt, which a server can't; leave teacher.server out")
    if teacher.weights != "own" and recipe.student.start.pretrained != teacher.model:
        raise RecipeError(
            "teacher.weights", f"{teacher.weights} weights are the student's own: set student.start.pretrained: {teacher.model}"
        )
    for name in teacher.context.reads if teacher.context else []:
        lacking = [prompt.id for prompt in training if not (prompt.answers if name == "answer" else prompt.feedback)]
        if lacking:
            raise RecipeError(
                "teacher.context.user", f"{{{name}}} stands in it, and {len(lacking)} prompts have none, such as {lacking[0]!r}; "
                "give prompts that all have one"
            )  # fmt: skip


def methods() -> dict[str, Any]:
    """What can be named in a recipe: divergences, other losses, steps of elicitation, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    return {
        "divergences": _listed(DIVERGENCES),
        "losses": {
            CROSS_ENTROPY: {"formula": "-log q(token)", "paper": "", "parameters": defaults_of(cross_entropy)},
            **_listed(RANKINGS),
            **{name: {"formula": kind.formula, "paper": kind.paper, "parameters": dict(kind.defaults)} for name, kind in MATCHES.items()},
            **{name: facts | {"needs": _needs(name)} for name, facts in _listed(POLICIES).items()},
        },
        "steps": {name: _step(step) for name, step in sorted(STEPS.items())},
        "recipes": {name: {"title": recipe.title, "paper": recipe.paper} for name, recipe in recipes.items()},
        "tasks": sorted(task_folders()),
    }


def _step(step: Any) -> dict[str, Any]:
    fields = step.model_fields.items()
    settings = {name: "required" if field.is_required() else field.default for name, field in fields}
    return {
        "kind": step.kind,
        "what": " ".join(step.__doc__.split()),
        "settings": settings,
        "needs": sorted(step.needs),
        "paper": step.paper,
    }


def _needs(policy: str) -> str:
    """What must be there for a policy gradient."""
    gradient = make_term(policy, {})
    unmet = gradient.reads & {"advantage", "reference_log_prob", "importance_weight"}
    return "rewards, which nothing gives yet" if unmet else "text that the student writes: a writer {by: student}"


def _listed(known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"formula": loss.formula, "paper": loss.paper, "parameters": loss.defaults} for name, loss in sorted(known.items())}


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a run lives: `--out`, else runs/NAME."""
    if out is None and not NAME.fullmatch(recipe.name):
        raise UserError(f"the recipe's name {recipe.name!r} can't be a folder's name; give --out")
    return Path(out) if out is not None else Path("runs") / recipe.name
