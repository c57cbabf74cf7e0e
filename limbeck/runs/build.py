"""From a recipe's words to concrete things: the only file that knows which class or function a name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.builtin import recipe_files, task_folders
from limbeck.config.recipe import Recipe, load_recipe
from limbeck.config.sections import JointSettings, Rollout
from limbeck.elicit.prompts import Prompt, split_prompts
from limbeck.elicit.step import ElicitStep
from limbeck.elicit.steps import STEPS, steps_of
from limbeck.evaluate.perturb import perturbed
from limbeck.evaluate.tasks import Task, load_task
from limbeck.models.api import ApiTeacher
from limbeck.models.batch import BatchTeacher
from limbeck.models.bridge import BridgedTeacher
from limbeck.models.context import PromptContext
from limbeck.models.generate import Joint
from limbeck.models.joint import Mixture, Speculation
from limbeck.models.load import Model, load_model, load_tokenizer, model_identity
from limbeck.models.score import ServerScorer
from limbeck.models.several import SeveralTeachers
from limbeck.models.teacher import InProcessTeacher
from limbeck.objectives import consistency, dual
from limbeck.objectives.consistency import CONSISTENCY
from limbeck.objectives.divergence import DIVERGENCES
from limbeck.objectives.match import MATCHES
from limbeck.objectives.parameters import Range, defaults_of
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.objectives.schedule import Schedule, make_schedule
from limbeck.objectives.supervised import cross_entropy
from limbeck.objectives.term import CROSS_ENTROPY, Term, make_term
from limbeck.types import NAME, RecipeError, UserError


def terms(recipe: Recipe) -> list[Term]:
    """The recipe's losses, their parameters checked."""
    built = [
        make_term(loss.name, loss.params, loss.weight, f"loss[{i}].{loss.name}") for i, loss in enumerate(recipe.loss)
    ]
    labels = [term.label for term in built]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise RecipeError(
                f"loss[{index}]",
                f"{label} stands twice; give it once with the summed weight, or other text to each by `only`",
            )
    return built


def steps(recipe: Recipe) -> list[tuple[str, ElicitStep]]:
    """The recipe's steps of elicitation by name, their settings checked."""
    return steps_of(recipe.elicit or ())


def teacher(recipe: Recipe) -> InProcessTeacher:
    """The teacher in process; `validate` saw to it that nobody asks for one whose weights are not here."""
    assert recipe.teacher.model is not None
    return InProcessTeacher(load_model(recipe.teacher.model).with_context(prompt_context(recipe)))


def several(recipe: Recipe, first: InProcessTeacher) -> InProcessTeacher | SeveralTeachers:
    """The teacher with those that stand beside it, where there are any."""
    settings = recipe.teacher
    if not settings.beside:
        return first
    others = [
        InProcessTeacher(load_model(other.model).with_context(prompt_context(recipe))) for other in settings.beside
    ]
    weights = [settings.weight, *(other.weight for other in settings.beside)]
    return SeveralTeachers(
        [first, *others], weights, [None, *(other.only for other in settings.beside)], settings.together
    )


def bridged(recipe: Recipe, teacher: InProcessTeacher, student: Model) -> BridgedTeacher:
    """The teacher as one that reads the student's text in its own tokens."""
    assert recipe.teacher.bridge is not None
    return BridgedTeacher(teacher, student, recipe.teacher.bridge)


def other_tokens(recipe: Recipe) -> bool:
    """Whether the teacher, read through a bridge, has other tokens or another template than the student."""
    if recipe.teacher.bridge is None or recipe.teacher.model is None:
        return False
    theirs = load_tokenizer(recipe.teacher.model)
    ours = load_tokenizer(str(recipe.student.start.pretrained))
    return theirs.get_vocab() != ours.get_vocab() or theirs.chat_template != ours.chat_template


def served(recipe: Recipe) -> ApiTeacher | None:
    """The server that writes the teacher's text, where the recipe names one."""
    server = recipe.teacher.server
    return None if server is None else BatchTeacher(server) if server.batch else ApiTeacher(server)


def scorer(recipe: Recipe, api: ApiTeacher) -> ServerScorer | None:
    """The server as one that scores the training text, where the recipe reads that and has no weights of it."""
    cache = recipe.teacher.cache
    server = recipe.teacher.server
    named = (
        cache.top_k.k if cache is not None and cache.top_k is not None else server.names if server is not None else None
    )
    reads_written = any(term.name in POLICIES and "teacher_distribution" in term.reads for term in terms(recipe))
    return None if named is None else ServerScorer(api, named, load_tokenizer(recipe.speaker), reads_written)


def prompt_context(recipe: Recipe) -> PromptContext | None:
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
                "prompts.from",
                f"the prompt of {prompt.id!r} stands twice with other things to show the teacher; leave one out",
            )
    return PromptContext(context.system, context.user, fields)


def teacher_identity(recipe: Recipe) -> str:
    """What `teacher(recipe).identity` will be, without loading the weights."""
    assert recipe.teacher.model is not None
    return Model.named(model_identity(recipe.teacher.model), prompt_context(recipe))


def model(path: Path) -> Model:
    return load_model(str(path))


def judge(source: str) -> Model:
    return load_model(source)


def judge_identity(source: str) -> str:
    """What `judge(source).identity` will be, without loading the weights."""
    return model_identity(source)


def prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), the two without a common text."""
    evaluate = recipe.evaluate
    return split_prompts(recipe.prompts.source, recipe.prompts.limit, evaluate.prompts, evaluate.limit)


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


SHARE_SHAPES = ("constant", "linear", "cosine", "step", "plateau")


def shares(recipe: Recipe) -> tuple[Schedule, Schedule]:
    """(the student's share of the text, and how much of that is written anew) as schedules."""
    writer = recipe.student_writer
    replay = (recipe.rollout or Rollout()).replay
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


def methods() -> dict[str, Any]:
    """What can be named in a recipe: divergences, other losses, steps of elicitation, built-in recipes and tasks."""
    recipes = {name: load_recipe(path) for name, path in recipe_files().items()}
    return {
        "divergences": _listed(DIVERGENCES),
        "losses": {
            CROSS_ENTROPY: {"formula": "-log q(token)", "paper": "", "parameters": defaults_of(cross_entropy)},
            **_listed(RANKINGS),
            CONSISTENCY: {
                "formula": consistency.FORMULA,
                "paper": consistency.PAPER,
                "parameters": consistency.DEFAULTS,
            },
            dual.DUAL_SPACE: {"formula": dual.FORMULA, "paper": dual.PAPER, "parameters": dual.DEFAULTS},
            **{
                name: {"formula": kind.formula, "paper": kind.paper, "parameters": dict(kind.defaults)}
                for name, kind in MATCHES.items()
            },
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
    return {
        name: {"formula": loss.formula, "paper": loss.paper, "parameters": loss.defaults}
        for name, loss in sorted(known.items())
    }


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a run lives: `--out`, else runs/NAME."""
    if out is None and not NAME.fullmatch(recipe.name):
        raise UserError(f"the recipe's name {recipe.name!r} can't be a folder's name; give --out")
    return Path(out) if out is not None else Path("runs") / recipe.name
