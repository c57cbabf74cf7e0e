"""Tasks for lm-evaluation-harness as plain data: a user's own YAML, checked, and Limbeck's tasks, turned into its form.

That program's YAML may name Python functions, metrics and prompt files that are fetched and run, and data in pickles. A
local file here may not: only keys that hold data are accepted, and data are JSON, CSV, Parquet or text files on this
machine, or a dataset of the hub by its name. Not covered: a filter's regular expression that never ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.evaluate.task import TaskKind
from limbeck.evaluate.tasks import KINDS, load_task
from limbeck.storage.files import user_path
from limbeck.types import UserError, nearest

KEYS = frozenset(
    {
        "task",
        "task_alias",
        "tag",
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
        "fewshot_split",
        "fewshot_config",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "description",
        "target_delimiter",
        "fewshot_delimiter",
        "num_fewshot",
        "metric_list",
        "output_type",
        "generation_kwargs",
        "repeats",
        "filter_list",
        "gen_prefix",
        "metadata",
        "unsafe_code",
    }
)
FEWSHOT_KEYS = frozenset(
    {
        "sampler",
        "split",
        "fewshot_indices",
        "samples",
        "doc_to_text",
        "doc_to_choice",
        "doc_to_target",
        "gen_prefix",
        "fewshot_delimiter",
        "target_delimiter",
    }
)
RUNS_CODE = frozenset(
    {"process_docs", "process_results", "custom_dataset", "class", "use_prompt", "doc_to_image", "doc_to_audio"}
)
FILE_FORMATS = ("json", "csv", "parquet", "text")
HUB_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MAX_BYTES = 256 * 1024


def local_task(file: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """The task in a local YAML file, as a dict of plain data that lm-evaluation-harness takes.

    Args:
        metrics: the names of its built-in metrics; it would look for any other on the hub, and run it.

    Raises:
        UserError: not readable, not plain data, or something in it that would run code.
    """
    config = _read(file)
    for key in config:
        if key in RUNS_CODE:
            raise UserError(
                f"{file}: {key} names code, which a local task can't; write the task with templates and data only"
            )
        if key in ("include", "group"):
            raise UserError(f"{file}: {key} is not followed; put one whole task into one file")
        if key not in KEYS:
            raise UserError(f"{file}: unknown key {key!r}{nearest(str(key), KEYS)}")
    if not isinstance(config.get("task"), str) or not TASK_NAME.fullmatch(config["task"]):
        raise UserError(f"{file}: task must be a name of letters, digits, '.', '_' and '-'; got {config.get('task')!r}")
    if config.get("unsafe_code"):
        raise UserError(f"{file}: unsafe_code asks to run what the model writes; that is not done here")
    _check_fewshot(config.get("fewshot_config"), file)
    _check_metrics(config.get("metric_list"), metrics, file)
    return {**config, **_dataset(config, file)}


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES} bytes; put the items into a data file")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(
            f"{file}, line {line}: {error.problem}; a tag such as !function would run code, so a local task is read as"
            " plain data only"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a mapping with task, dataset_path, doc_to_text and the like")
    return config


def _check_fewshot(config: Any, file: Path) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise UserError(f"{file}: fewshot_config must be a mapping")
    for key in config:
        if key not in FEWSHOT_KEYS:
            raise UserError(
                f"{file}: fewshot_config.{key} is not allowed in a local task{nearest(str(key), FEWSHOT_KEYS)}"
            )


def _check_metrics(metric_list: Any, names: Sequence[str], file: Path) -> None:
    if metric_list is None:
        return
    if not isinstance(metric_list, list) or not all(isinstance(entry, dict) for entry in metric_list):
        raise UserError(f"{file}: metric_list must be a list such as [{{metric: acc}}]")
    for entry in metric_list:
        if entry.get("hf_evaluate"):
            raise UserError(
                f"{file}: hf_evaluate fetches a metric and runs it; use one of lm-evaluation-harness itself"
            )
        if entry.get("metric") not in names:
            raise UserError(
                f"{file}: no metric is named {entry.get('metric')!r}{nearest(str(entry.get('metric')), names)}"
            )


def _dataset(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`dataset_path` and `dataset_kwargs`, with local files relative to the task's own."""
    path = config.get("dataset_path")
    kwargs = config.get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict) or (other := sorted(set(kwargs) - {"data_files", "field"})):
        raise UserError(
            f"{file}: dataset_kwargs may hold data_files and field; got"
            f" {other if isinstance(kwargs, dict) else kwargs!r}"
        )
    if path in FILE_FORMATS:
        if "data_files" not in kwargs:
            raise UserError(f"{file}: dataset_path {path} needs dataset_kwargs: {{data_files: {{test: FILE}}}}")
        return {"dataset_path": path, "dataset_kwargs": {**kwargs, "data_files": _located(kwargs["data_files"], file)}}
    if not isinstance(path, str) or not HUB_DATASET.fullmatch(path) or Path(path).exists():
        raise UserError(
            f"{file}: dataset_path must be {', '.join(FILE_FORMATS)} with local data_files, or a hub dataset OWNER/NAME"
        )
    if "data_files" in kwargs:
        raise UserError(f"{file}: data_files go with dataset_path {FILE_FORMATS[0]}, not with a dataset of the hub")
    return {"dataset_path": path, "dataset_kwargs": kwargs or None}


def _located(files: Any, task_file: Path) -> Any:
    if isinstance(files, dict):
        return {split: _located(part, task_file) for split, part in files.items()}
    if isinstance(files, list):
        return [_located(part, task_file) for part in files]
    if not isinstance(files, str) or "://" in files:
        raise UserError(f"{task_file}: data_files must be paths of local files; got {files!r}")
    path = task_file.parent / user_path(files)
    if not path.is_file():
        raise UserError(f"{task_file}: there is no data file {path}")
    return str(path.resolve())


def as_harness_task(folder: str | Path, max_tokens: int = 128) -> dict[str, Any]:
    """One of Limbeck's tasks (a built-in name, or a folder with a task.yaml) in the form of lm-evaluation-harness.

    The prompt is the very text that Limbeck asks. `acc` of both programs is the same number, and Limbeck's `acc_norm`
    is called `acc_bytes` there (its `acc_norm` divides by characters); `brier` is `brier_score`. For this the choices
    must be tokenised apart from the prompt, as `harness.evaluate` does for these tasks. `metadata.chat` says whether
    the prompt goes through the model's chat template.

    Args:
        max_tokens: of an answer, where the task itself sets no limit.

    Raises:
        UserError: no such task, or one that can't be put so.
    """
    task = load_task(str(folder))
    form = task.kind.harness_form(task, max_tokens)
    if form is None:
        able = [name for name, kind in KINDS.items() if type(kind).harness_form is not TaskKind.harness_form]
        raise UserError(
            f"{task.name}: lm-evaluation-harness has no form for a task of kind {task.kind.name}; it has one for"
            f" {', '.join(able)}"
        )
    return {
        "task": task.name,
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": task.version, "chat": form.chat},
        "custom_dataset": _dataset_of(form.docs),
        **form.config,
    }


def _dataset_of(docs: Sequence[dict[str, Any]]) -> Any:
    """The function that lm-evaluation-harness calls for the data: in memory, so that nothing is cached or fetched."""

    def make(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(docs))}

    return make
