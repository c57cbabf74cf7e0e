"""Tasks as versioned data: a folder with task.yaml and its items, one JSON object per line.

A task is data: it names no code, and only files in its own folder. Its kind (see KINDS) decides how it is asked and
scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limbeck.config.builtin import task_folders
from limbeck.config.yaml_text import read_yaml
from limbeck.evaluate.choice import CLASSIFICATION, MULTIPLE_CHOICE
from limbeck.evaluate.generation import GenerationKind
from limbeck.evaluate.items import read_items
from limbeck.evaluate.perturb import perturbed
from limbeck.evaluate.ranking import RankingKind
from limbeck.evaluate.records import CheckedAnswer, ItemResult, Progress
from limbeck.evaluate.rolling import PerplexityKind
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.evaluate.task import GreedyAnswers, Task, TaskKind, WriteAnswers
from limbeck.models.model import Model
from limbeck.storage.files import user_path
from limbeck.types import NAME, RecipeError, UserError, nearest

KINDS: dict[str, TaskKind] = {
    kind.name: kind for kind in (GenerationKind(), MULTIPLE_CHOICE, CLASSIFICATION, PerplexityKind(), RankingKind())
}
MAX_BYTES = 64 * 1024
Section = TypeVar("Section", bound=BaseModel)


class _TaskFile(BaseModel):
    """What task.yaml may say. `train` holds prompts to train on, `references` one list of texts for every item of
    `test`."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str
    version: str
    kind: str = "generation"
    description: str
    licence: str = ""
    source: str = ""
    test: str
    train: str | None = None
    references: str | None = None
    metrics: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


def tasks_of(metrics: Sequence[str], limits: Mapping[str, int] | None = None) -> list[Task]:
    """The tasks in `evaluate.metrics`, which also holds `fidelity`; `NAME@HOW` is the task NAME asked in another way.

    Args:
        limits: how many items of a task are asked, by its entry; a task that has none is asked whole.

    Raises:
        RecipeError: no such task, one named twice, or no `fidelity`.
    """
    tasks = []
    for name in (name for name in metrics if name != "fidelity"):
        plain, _, how = name.partition("@")
        task = load_task(plain, (limits or {}).get(name))
        tasks.append(perturbed(task, how) if how else task)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RecipeError("evaluate.metrics", f"the task {min(twice)} is given twice; leave one out")
    if len(tasks) == len(metrics):
        raise RecipeError("evaluate.metrics", "fidelity is always measured, so list it")
    return tasks


def load_task(name_or_path: str, limit: int | None = None, path: str = "evaluate.metrics") -> Task:
    """A task with its first `limit` items.

    Args:
        name_or_path: a built-in task, or a folder with a task.yaml.
        path: where the recipe names it, for errors.

    Raises:
        RecipeError: no such task.
        UserError: a malformed one; the message names file, line and remedy.
    """
    folders = task_folders()
    folder = folders.get(name_or_path) or user_path(name_or_path)
    if not (folder / "task.yaml").is_file():
        hint = "; or give a folder with a task.yaml" if "/" not in name_or_path else "; its folder holds no task.yaml"
        raise RecipeError(
            path, f"no task is named {name_or_path!r}{nearest(name_or_path, [*folders, 'fidelity'])}{hint}"
        )
    file = folder / "task.yaml"
    data = _parsed(_TaskFile, _read_yaml(file), str(file))
    if not NAME.fullmatch(data.name) or data.name == "fidelity":
        raise UserError(
            f"{file}: name {data.name!r} must be lower-case letters, digits, '.', '_' or '-', at most 64, and not"
            " fidelity"
        )
    if data.kind not in KINDS:
        raise UserError(f"{file}: kind: there is no kind of task {data.kind!r}{nearest(data.kind, KINDS)}")
    kind = KINDS[data.kind]
    protocol = _parsed(kind.settings, data.settings, f"{file}: settings")
    references = None
    if data.references is not None:
        if not kind.takes_references:
            able = " or ".join(name for name, other in KINDS.items() if other.takes_references)
            raise UserError(f"{file}: only a task of kind {able} has references; leave the key out")
        references = _file_in(folder, data.references)
    items = read_items(_file_in(folder, data.test), f"{data.name}/", kind.parse, protocol, references=references)
    return Task(
        name=data.name,
        version=data.version,
        description=data.description,
        kind=kind,
        metrics=_metrics(data.metrics, kind.possible_metrics(protocol, items), str(file)),
        protocol=protocol,
        items=tuple(items[:limit]),
        available=len(items),
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES} bytes; put the items into a JSONL file")
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise UserError(
            f"{file} must hold a mapping with name, version, kind, description and test; see tasks/choices/task.yaml"
        )
    return data


def _file_in(folder: Path, name: str) -> Path:
    """A file in the task's own folder: a task that came from elsewhere reads nothing else."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(
            f"{folder / 'task.yaml'}: {name!r} must be the name of a file in the same folder, without any folder"
        )
    return folder / name


def _parsed(model: type[Section], data: Any, place: str) -> Section:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        where = f"{place}: {key}" if key else place
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where} is unknown{nearest(key, model.model_fields)}") from None
        if first["type"] == "missing":
            raise UserError(f"{where} is required") from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "value_error" else f"; got {first.get('input')!r}"
        raise UserError(f"{where}: {message}{value}") from None


def _metrics(names: Sequence[str], possible: Sequence[str], place: str) -> tuple[str, ...]:
    """The metrics that the file names, or all that the task can give."""
    for name in names:
        if name not in possible:
            raise UserError(f"{place}: this task can't give the metric {name!r}{nearest(name, possible)}")
    return tuple(dict.fromkeys(names)) or tuple(possible)


def run_task(
    task: Task,
    system: Model,
    progress: Progress = lambda done, total: None,
    answers: Mapping[str, CheckedAnswer] | None = None,
    max_tokens: int = 96,
) -> list[ItemResult]:
    """The system's result on every item, in the order of the items, with the task's own metrics.

    Args:
        answers: greedy answers by prompt id that are there already; used where `task.shares_answers`.
        max_tokens: of an answer, where the task does not say it itself.

    Raises:
        UserError: an item that the model can't take, or a package that a metric needs is missing.
    """
    return _own_metrics(task, task.kind.score(task, system, progress, GreedyAnswers(answers or {}, max_tokens)))


def run_task_by_text(
    task: Task, write: WriteAnswers, answers: Mapping[str, CheckedAnswer], max_tokens: int
) -> list[ItemResult]:
    """As `run_task` for a system that gives text alone, written by `write`; empty where text does not do."""
    return _own_metrics(task, task.kind.score_by_text(task, write, GreedyAnswers(answers, max_tokens)))


def _own_metrics(task: Task, results: list[ItemResult]) -> list[ItemResult]:
    """The results with the task's own metrics alone."""
    for item in results:
        for metric in item.scores.keys() - set(task.metrics):
            del item.scores[metric]
    return results


def summarise(task: Task, results: Sequence[ItemResult]) -> dict[str, dict[str, Any]]:
    """{TASK/METRIC: value with its interval over items}. A metric that applies to no item is left out, never called
    0."""
    intervals: dict[str, Interval] = {}
    for metric in task.metrics if results else ():
        declared = task.kind.metrics.get(metric.partition("@")[0])
        whole = declared.interval if declared else None
        interval = _ratio(task, metric, results) if whole is None else whole(task.protocol, results)
        if interval is not None:
            intervals[f"{task.name}/{metric}"] = interval
    return {name: interval.as_dict() for name, interval in intervals.items()}


def _ratio(task: Task, metric: str, results: Sequence[ItemResult]) -> Interval | None:
    scored = [item for item in results if metric in item.scores]
    if not scored:
        return None
    values, weights = zip(*((item.scores[metric], item.weights.get(metric, 1.0)) for item in scored), strict=True)
    return ratio_interval(values, weights, of_share=task.is_share(metric))
