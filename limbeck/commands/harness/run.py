"""lm-evaluation-harness (EleutherAI) on a student, a model or a server, for numbers that compare with published ones.

Its templates are rendered in a sandbox here; a local YAML task is plain data (see tasks.py). A task given by name is
that program's own, with its Python files. Nothing is fetched but what such a task asks for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from limbeck.commands.harness.tasks import TASK_NAME, as_harness_task, local_task
from limbeck.config.yaml_text import read_yaml
from limbeck.models.http import check_address
from limbeck.models.load import load_model, load_tokenizer, model_folder
from limbeck.models.placement import Placement, find_device
from limbeck.storage.files import user_path, write_json, write_text
from limbeck.storage.metrics_log import read_json
from limbeck.types import UserError, canonical_json, content_hash, nearest

__all__ = ["as_harness_task", "harness"]

SEED = 0
OTHER_SEED = 1234  # lm-evaluation-harness's own defaults: Python's, and numpy's, torch's and the examples'
RESAMPLES = 1000  # for the standard errors that it bootstraps; those of means have a formula
MAX_TOKENS = 128
PROBE_TEXT = "The sky is blue."
LIKELIHOOD = frozenset({"multiple_choice", "loglikelihood", "loglikelihood_rolling"})


@dataclass(frozen=True)
class TestedModel:
    """The model that answers: one to load, or the model called `where` behind a server."""

    where: str
    base_url: str | None = None
    tokenizer: str | None = None

    @property
    def is_run(self) -> bool:
        return self.base_url is None and (Path(self.where) / "recipe.yaml").exists()

    @property
    def source(self) -> str:
        """The model to load: of a run its student."""
        if not self.is_run:
            return self.where
        if not (Path(self.where) / "student").is_dir():
            raise UserError(f"{self.where} holds no finished student: run `limbeck train` (or `limbeck run`) first")
        return str(Path(self.where) / "student")

    @property
    def max_tokens(self) -> int:
        """The longest answer to Limbeck's own prompts: for a run, its own limit."""
        if not self.is_run:
            return MAX_TOKENS
        file = Path(self.where) / "recipe.yaml"
        recipe = read_yaml(file)
        evaluate = recipe.get("evaluate", {}) if isinstance(recipe, dict) else None
        if not isinstance(evaluate, dict):
            raise UserError(f"{file} is no recipe of a run: give a run folder, or a model's")
        return int(evaluate.get("max_tokens", MAX_TOKENS))


@dataclass(frozen=True)
class TaskGroup:
    """A task (or a group of them) and how it is asked: through the chat template or not, choices tokenised apart or
    not."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    chat: bool
    apart: bool


def harness(
    where: str,
    names: Sequence[str],
    out: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    base_url: str | None = None,
    tokenizer: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness; their results are added to those in `out`.

    Args:
        where: a run folder (its student), a model folder, a known model's name, or with `base_url` the server's name
            for its model.
        names: tasks of that program, local YAML files, folders with a task.yaml of Limbeck, or builtin/NAME.
        out: a JSON file; for a run folder, evaluation/harness.json by default. Every item goes to harness-TASK.jsonl in
            the same folder.
        limit: how many items of each task, the first ones.
        chat: put tasks through the model's chat template (Limbeck's own tasks decide that themselves).
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1.
        tokenizer: a model with the tokenizer of the server's; likelihood tasks need it.
        note: called with a message before anything slow.

    Returns:
        The file, and the results of the new tasks.

    Raises:
        UserError: lm-evaluation-harness is missing, a task can't be run, the server can't do what a task needs.
    """
    tested = TestedModel(where, _address(base_url), tokenizer)
    if out is None:
        if not tested.is_run:
            raise UserError("say where the results should go: --out FILE (only a run folder has a place for them)")
        out = Path(where) / "evaluation" / "harness.json"
    _check_installed()
    with _quiet_and_sandboxed():
        groups = _task_groups(names, chat, tested.max_tokens, note)
        model_for = _answering_model(tested, groups)
        entries: dict[str, Any] = {}
        for group in groups:
            entries |= _evaluate(model_for(group), group, limit, _facts(tested, group, limit), out=out)
    earlier = (read_json(out) or {}).get("tasks", {})
    write_json(out, {"tasks": {**earlier, **entries}})
    return {"file": str(out), "tasks": entries}


def _check_installed() -> None:
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.models.openai_completions  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error.name} is missing): pip install 'limbeck[eval]'"
        ) from error


@contextlib.contextmanager
def _quiet_and_sandboxed() -> Iterator[None]:
    """Have its templates rendered by an environment that runs no code, and silence all but its errors."""
    from lm_eval import utils

    logger = logging.getLogger("lm_eval")
    before = utils.env
    level = logger.level
    sandbox = ImmutableSandboxedEnvironment(
        loader=before.loader, undefined=before.undefined, keep_trailing_newline=True
    )
    sandbox.filters.update(before.filters)
    logger.setLevel(logging.ERROR)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before
        logger.setLevel(level)


def _address(base_url: str | None) -> str | None:
    """The server's address ending in its version, as in http://localhost:8000/v1, without name and password."""
    if base_url is None:
        return None
    url = check_address(base_url, "--base-url", "http://localhost:8000/v1", "OPENAI_API_KEY")
    return url if urlsplit(url).path else f"{url}/v1"


# Tasks


def _task_groups(names: Sequence[str], chat: bool, max_tokens: int, note: Callable[[str], None]) -> list[TaskGroup]:
    """The tasks, loaded and checked, with how each is asked."""
    if len(set(names)) < len(names) or not names:
        raise UserError("give --task at least once, and each task only once")
    groups: list[TaskGroup] = []
    for name in names:
        path = user_path(name)
        spec: str | dict[str, Any] = name
        apart = False
        in_chat = chat
        if name.startswith("builtin/") or (path / "task.yaml").is_file():
            spec = as_harness_task(name.removeprefix("builtin/"), max_tokens)
            apart = True
            in_chat = spec["metadata"]["chat"]
        elif path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise UserError(f"there is no task file {name}")
            spec = local_task(path, _metrics())
        if isinstance(spec, str):
            note("reading the list of lm-evaluation-harness's tasks, which takes a while")
        note(f"loading the task {name}")
        loaded = _load(name, spec)
        groups.append(TaskGroup(loaded["tasks"], loaded.get("groups", {}), in_chat, apart))
    loaded_names = [task for group in groups for task in group.tasks]
    if twice := sorted({task for task in loaded_names if loaded_names.count(task) > 1}):
        raise UserError(f"the task {twice[0]} is given twice; leave one out")
    return groups


def _metrics() -> list[str]:
    from lm_eval.api import metrics, registry

    assert metrics
    return sorted(registry.metric_registry)


def _load(name: str, spec: str | dict[str, Any]) -> Any:
    """The task (or group of tasks) with its data, as lm-evaluation-harness has it.

    Raises:
        UserError: no such task, data that can't be had, or a task that runs what the model writes.
    """
    manager = _manager(isinstance(spec, str))
    if isinstance(spec, str) and spec not in manager.task_index:
        raise UserError(
            f"no task of lm-evaluation-harness is named {name!r}{_near(name, manager.all_tasks)}; or give a YAML file"
        )
    try:
        loaded = manager.load([spec])
    except Exception as error:  # its loaders raise many kinds; the user needs one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the task {name} can't be loaded: {reason} ({type(error).__name__}); a task that is not local needs the"
            " network"
        ) from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"the task {task_name} runs what the model writes (unsafe_code); that is not done here")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


@cache
def _manager(named: bool) -> Any:
    """What loads tasks; for tasks given by name it reads some 14,000 files, so it is cached."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def _near(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("; did") else ""


# Models


def _answering_model(tested: TestedModel, groups: Sequence[TaskGroup]) -> Any:
    """A function from a group to the model that answers it, in the form of lm-evaluation-harness."""
    from limbeck.commands.harness import models

    if tested.base_url is None:
        model = load_model(tested.source, placement=Placement(find_device("auto")))
        return lambda group: models.LocalModel(model, group.apart, group.chat)
    folder = str(model_folder(tested.tokenizer)) if tested.tokenizer else None
    likelihood = [name for group in groups for name, task in group.tasks.items() if task.OUTPUT_TYPE in LIKELIHOOD]
    if likelihood and folder is None:
        raise UserError(
            f"{likelihood[0]} scores given text, which a chat server can't: say --tokenizer MODEL (whose tokenizer the"
            " served model has), and use a server that returns a prompt's log-probabilities; or give the model's"
            " folder instead of --base-url"
        )
    text_server = models.TextServer
    if likelihood and tested.tokenizer:
        ids = load_tokenizer(tested.tokenizer)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        text_server = models.scorer(tested.where, tested.base_url, list(ids))

    def model_for(group: TaskGroup) -> Any:
        assert tested.base_url is not None
        if group.chat and folder is None:
            return models.ChatServer(tested.where, tested.base_url)
        return text_server(tested.where, tested.base_url, folder, group.apart)

    return model_for


# Results


def _evaluate(model: Any, group: TaskGroup, limit: int | None, facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run one group; writes every item, and returns each task's entry."""
    import requests
    from lm_eval.evaluator import evaluate

    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    loaded = {"tasks": group.tasks, "groups": group.groups, "group_map": {}}
    try:
        output = evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=group.chat,
            fewshot_as_multiturn=group.chat,
            confirm_run_unsafe_code=False,
        )
    except requests.RequestException as error:
        raise UserError(f"the server gave no usable answer: {type(error).__name__}: {str(error)[:300]}") from error
    entries = {}
    for name, values in output["results"].items():
        entry = {**facts, "results": _results(values)}
        if name in group.tasks:
            task = group.tasks[name]
            samples = output["samples"][name]
            file = out.parent / f"harness-{name if TASK_NAME.fullmatch(name) else content_hash(name)[:16]}.jsonl"
            write_text(file, "".join(canonical_json(_plain(sample)) + "\n" for sample in samples))
            entry |= {
                "version": _plain(task.VERSION),
                "items": output["n-samples"][name]["effective"],
                "samples": file.name,
            }
            entry["settings"] = facts["settings"] | {
                "output_type": task.OUTPUT_TYPE,
                "num_fewshot": task.get_config("num_fewshot"),
                "generation": _plain(task.get_config("generation_kwargs")),
                "target_delimiter": task.get_config("target_delimiter"),
            }
        entries[name] = entry
    return entries


def _results(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{metric: {value, stderr}}; a filter other than none is part of the name. None where there is no number."""
    results: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        metric, comma, rule = key.partition(",")
        if not comma:
            continue
        base = metric.removesuffix("_stderr")
        name = base if rule == "none" else f"{base}/{rule}"
        number = float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None
        results.setdefault(name, {"value": None, "stderr": None})["stderr" if metric != base else "value"] = number
    return results


def _facts(tested: TestedModel, group: TaskGroup, limit: int | None) -> dict[str, Any]:
    """Model, settings and versions, to be stored with every number."""
    from limbeck import __version__

    if tested.base_url is None:
        from limbeck.models.load import model_identity

        model = {"model": model_identity(tested.source)}
    else:
        model = {"model": tested.where, "server": tested.base_url}
    return {
        **model,
        "settings": {
            "chat": group.chat,
            "choices_tokenised": "apart" if group.apart else "joined",
            "limit": limit,
            "seed": SEED,
            "other_seeds": OTHER_SEED,
        },
        "versions": {
            "limbeck": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        },
    }


def _plain(value: Any) -> Any:
    """The value as JSON holds it; a number that is not finite becomes None, an unknown object its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    return str(value)
