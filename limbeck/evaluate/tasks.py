"""Tasks as versioned data: a folder with task.yaml and its items, one JSON object per line. Five kinds:

- `generation`: the system writes, greedily or sampled; verifiers and references judge.
- `multiple_choice`, `classification`: the most likely of given choices or labels (choice.py).
- `perplexity`: documents by rolling log-likelihood (rolling.py).
- `ranking`: documents by the likelihood of the query (choice.py).

A task is data: it names no code, and files beside task.yaml only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limbeck.config.builtin import task_folders
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.verify import verify
from limbeck.evaluate.choice import Progress, macro_f1, prompt_ids, score_choices, score_rankings
from limbeck.evaluate.items import (
    ChoiceItem,
    ChoiceSettings,
    GenerationSettings,
    Item,
    LabelSettings,
    Parser,
    Passage,
    PassageSettings,
    RankingItem,
    RankingSettings,
    Scored,
    Settings,
    parse_choice,
    parse_label,
    parse_passage,
    parse_prompt,
    parse_ranking,
    read_items,
)
from limbeck.evaluate.rolling import perplexity, score_passages
from limbeck.evaluate.statistics import Interval, pass_at_k, ratio_interval
from limbeck.evaluate.wording import rouge_l
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model
from limbeck.types import NAME, RecipeError, Sampling, UserError, content_hash, nearest

Better = Literal["low", "high", "none"]
Kind = Literal["generation", "multiple_choice", "classification", "perplexity", "ranking"]
TITLES: dict[str, tuple[str, Better]] = {
    "pass_rate": ("Pass rate", "high"),
    "pass": ("Pass", "high"),
    "rouge_l": ("ROUGE-L", "high"),
    "finished": ("Finished", "none"),
    "tokens": ("Length in tokens", "none"),
    "acc": ("Accuracy", "high"),
    "acc_norm": ("Accuracy, length-normalised", "high"),
    "probability": ("Probability of the right choice", "high"),
    "brier": ("Brier score", "low"),
    "macro_f1": ("Macro F1", "high"),
    "bits_per_byte": ("Bits per byte", "low"),
    "byte_perplexity": ("Perplexity per byte", "low"),
    "word_perplexity": ("Perplexity per word", "low"),
    "ndcg": ("nDCG", "high"),
}
KINDS: dict[Kind, tuple[type[Settings], Parser]] = {
    "generation": (GenerationSettings, parse_prompt),
    "multiple_choice": (ChoiceSettings, parse_choice),
    "classification": (LabelSettings, parse_label),
    "perplexity": (PassageSettings, parse_passage),
    "ranking": (RankingSettings, parse_ranking),
}
MAX_BYTES = 64 * 1024
Section = TypeVar("Section", bound=BaseModel)
__all__ = ["Answer", "Scored", "Task", "answer_all", "load_task", "run_task", "summarise"]


@dataclass(frozen=True)
class Task:
    """One task, read and checked. The first of `metrics` is the headline; `protocol` says how it is asked."""

    name: str
    version: str
    description: str
    kind: Kind
    metrics: tuple[str, ...]
    protocol: Settings
    items: tuple[Item, ...]

    @property
    def metric(self) -> str:
        return self.metrics[0]

    @property
    def settings(self) -> dict[str, Any]:
        """The protocol as plain data, to be printed with every number."""
        return self.protocol.model_dump(mode="json", exclude_none=True)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What a system has to answer in writing; nothing for tasks that are scored by probability."""
        return tuple(item for item in self.items if isinstance(item, Prompt))

    @property
    def shares_answers(self) -> bool:
        """True where `run_task` takes answers that are there already: plain greedy ones, of the length the run
        allows."""
        return isinstance(self.protocol, GenerationSettings) and self.protocol.shares_answers

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(id, text) of every item without its solution, to be looked for in training text."""
        parts = (
            (item.id, (item.query, *item.documents) if isinstance(item, RankingItem) else (item.text,))
            for item in self.items
        )
        return [(name, text) for name, texts in parts for text in texts]

    def better(self, metric: str) -> Better:
        return TITLES.get(metric.partition("@")[0], ("", "none"))[1]

    def title(self, metric: str) -> str:
        name, at, k = metric.partition("@")
        return TITLES.get(name, (name.replace("_", " ").capitalize(), "none"))[0] + at + k


class _TaskFile(BaseModel):
    """What task.yaml may say. `train` holds prompts to train on, `references` what stands beside every item of
    `test`."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str
    version: str
    kind: Kind = "generation"
    description: str
    licence: str = ""
    source: str = ""
    test: str
    train: str | None = None
    references: str | None = None
    metrics: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


def load_task(name_or_path: str, limit: int | None = None, path: str = "evaluate.metrics") -> Task:
    """A task with its first `limit` items.

    Args:
        name_or_path: a built-in task, or a folder with a task.yaml.
        path: where the recipe names it, for errors.

    Raises:
        RecipeError: no such task.
        UserError: a malformed one; the message names file, line and cure.
    """
    folders = task_folders()
    folder = folders.get(name_or_path) or Path(name_or_path).expanduser()
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
    model, parser = KINDS[data.kind]
    protocol = _parsed(model, data.settings, f"{file}: settings")
    references = None
    if data.references is not None:
        if data.kind != "generation":
            raise UserError(f"{file}: only a task of kind generation has references; leave the key out")
        references = _beside(folder, data.references)
    items = read_items(_beside(folder, data.test), f"{data.name}/", parser, protocol, references)
    metrics = _metrics(data, protocol, items, str(file))
    return Task(data.name, data.version, data.description, data.kind, metrics, protocol, tuple(items[:limit]))


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES} bytes; put the items into a JSONL file")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(
            f"{file} must hold a mapping with name, version, kind, description and test; see tasks/choices/task.yaml"
        )
    return data


def _beside(folder: Path, name: str) -> Path:
    """A file in the task's own folder: a task that came from elsewhere reads nothing else."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{folder / 'task.yaml'}: {name!r} must be the name of a file beside it, without any folder")
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
        shown = "" if first["type"] == "value_error" else f"; got {first.get('input')!r}"
        raise UserError(f"{where}: {message}{shown}") from None


def _metrics(data: _TaskFile, protocol: Settings, items: Sequence[Item], place: str) -> tuple[str, ...]:
    """The metrics asked for, or all that this task can give."""
    possible = _possible(data.kind, protocol, items)
    for metric in data.metrics:
        if metric not in possible:
            raise UserError(f"{place}: this task can't give the metric {metric!r}{nearest(metric, possible)}")
    return tuple(dict.fromkeys(data.metrics)) or tuple(possible)


def _possible(kind: Kind, protocol: Settings, items: Sequence[Item]) -> list[str]:
    if isinstance(protocol, GenerationSettings):
        prompts = [item for item in items if isinstance(item, Prompt)]
        checked = any(prompt.check is not None for prompt in prompts)
        compared = any(prompt.answers for prompt in prompts)
        passes = ["pass_rate", *(f"pass@{k}" for k in protocol.pass_at)] if checked else []
        return [*passes, *(["rouge_l"] if compared else []), "finished", "tokens"]
    if isinstance(protocol, RankingSettings):
        return [f"ndcg@{k}" for k in protocol.k]
    if kind == "perplexity":
        return ["bits_per_byte", "byte_perplexity", "word_perplexity"]
    return (
        ["acc", "macro_f1", "probability", "brier"]
        if kind == "classification"
        else ["acc", "acc_norm", "probability", "brier"]
    )


Asked = tuple[Prompt, int]


@dataclass(frozen=True)
class Answer:
    """One system's answer to one prompt; `passed` is None where no verifier applies. `tokens` count the end-of-sequence
    token."""

    prompt_id: str
    kind: str
    text: str
    tokens: int
    finished: bool
    passed: bool | None


def answer_all(
    system: Model, prompts: Sequence[Prompt], max_tokens: int, progress: Progress = lambda done, total: None
) -> list[Answer]:
    """The system's greedy answers, in the order of the prompts, each judged by its check."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    return _written(
        system,
        prompts,
        [GenerationJob(system.prompt_ids(prompt.messages), sampling, 0) for prompt in prompts],
        progress,
    )


def _written(
    system: Model, prompts: Sequence[Prompt], jobs: Sequence[GenerationJob], progress: Progress
) -> list[Answer]:
    """The answer of every job, which asks the prompt at its place."""
    answers: dict[int, Answer] = {}
    for index, ids in generate(system.net, jobs, system.eos_ids, vocab_size=system.vocab_size):
        prompt = prompts[index]
        text = system.decode(ids)
        answers[index] = Answer(
            prompt.id, prompt.kind, text, len(ids), ids[-1] in system.eos_ids, verify(prompt.check, text)
        )
        progress(len(answers), len(jobs))
    return [answers[index] for index in range(len(jobs))]


def run_task(
    task: Task,
    system: Model,
    progress: Progress = lambda done, total: None,
    given: Mapping[str, Answer] | None = None,
    max_tokens: int = 96,
) -> list[Scored]:
    """The system's result on every item, in the order of the items, with the task's own metrics.

    Args:
        given: greedy answers by prompt id that are there already; used where `task.shares_answers`.
        max_tokens: of an answer, where the task does not say it itself.

    Raises:
        UserError: an item that the model can't take, or a package that a metric needs is missing.
    """
    protocol = task.protocol
    items = task.items
    if isinstance(protocol, GenerationSettings):

        def write(asked: Sequence[Asked], sampling: Sampling) -> list[Answer]:
            jobs = [
                GenerationJob(
                    prompt_ids(system, protocol, {"prompt": prompt.text}),
                    sampling,
                    int(content_hash([prompt.id, seed])[:15], 16),
                )
                for prompt, seed in asked
            ]
            return _written(system, [prompt for prompt, _ in asked], jobs, progress)

        return score_written(task, write, given or {}, max_tokens)
    if isinstance(protocol, ChoiceSettings | LabelSettings):
        scored = score_choices([item for item in items if isinstance(item, ChoiceItem)], protocol, system, progress)
    elif isinstance(protocol, RankingSettings):
        scored = score_rankings([item for item in items if isinstance(item, RankingItem)], protocol, system, progress)
    else:
        assert isinstance(protocol, PassageSettings)
        scored = score_passages([item for item in items if isinstance(item, Passage)], protocol, system, progress)
    return _asked_for(task, scored)


def _asked_for(task: Task, scored: list[Scored]) -> list[Scored]:
    """The results with the task's own metrics alone."""
    for item in scored:
        for metric in item.scores.keys() - set(task.metrics):
            del item.scores[metric]
    return scored


def score_written(
    task: Task,
    write: Callable[[Sequence[Asked], Sampling], Sequence[Answer]],
    given: Mapping[str, Answer],
    max_tokens: int,
) -> list[Scored]:
    """One result per prompt, the mean over its draws, so that resampling items keeps the draws of a prompt together.

    Args:
        write: the answers to (prompt, seed) in their order; the prompt's text is still to be put into the task's
            wording. given, max_tokens: as for `run_task`.
    """
    settings = task.protocol
    assert isinstance(settings, GenerationSettings)
    if "rouge_l" in task.metrics:
        rouge_l("a word", ["a word"])  # a missing package is told before anything is written
    known = given if task.shares_answers else {}
    asked = [(prompt, seed) for prompt in task.prompts if prompt.id not in known for seed in settings.draws]
    new: dict[str, list[Answer]] = {}
    for answer in write(asked, Sampling(settings.temperature, settings.top_p, settings.max_tokens or max_tokens)):
        new.setdefault(answer.prompt_id, []).append(answer)
    scored = [
        _scored_prompt(prompt, new.get(prompt.id) or [known[prompt.id]], settings, task.metrics)
        for prompt in task.prompts
    ]
    return _asked_for(task, scored)


def _scored_prompt(
    prompt: Prompt, answers: Sequence[Answer], settings: GenerationSettings, metrics: Sequence[str]
) -> Scored:
    draws: list[dict[str, Any]] = [
        {
            "seed": seed,
            "text": answer.text,
            "tokens": answer.tokens,
            "finished": answer.finished,
            "passed": answer.passed,
        }
        for seed, answer in zip(settings.draws, answers, strict=True)
    ]
    scores = {"finished": _mean(draws, "finished"), "tokens": _mean(draws, "tokens")}
    if prompt.check is not None:
        scores["pass_rate"] = _mean(draws, "passed")
        passed = sum(bool(draw["passed"]) for draw in draws)
        scores |= {f"pass@{k}": pass_at_k(len(draws), passed, k) for k in settings.pass_at}
    if prompt.answers and "rouge_l" in metrics:
        for draw in draws:
            draw["rouge_l"] = rouge_l(draw["text"], prompt.answers, stemmer=settings.stemmer)
        if draws[0]["rouge_l"] is not None:  # None for references without a word that ROUGE knows
            scores["rouge_l"] = _mean(draws, "rouge_l")
    facts = {key: draws[0][key] for key in ("tokens", "finished", "passed")} if len(draws) == 1 else {"draws": draws}
    return Scored(prompt.id, scores, {}, answers[0].text, facts)


def _mean(draws: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(draw[key]) for draw in draws) / len(draws)


def summarise(task: Task, scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """{TASK/METRIC: value with its interval over items}. A metric that applies to no item is left out, never called
    0."""
    found: dict[str, Interval] = {}
    for metric in task.metrics if scored else ():
        interval = _DERIVED[metric](task, scored) if metric in _DERIVED else _ratio(metric, scored)
        if interval is not None:
            found[f"{task.name}/{metric}"] = interval
    return {name: interval.as_dict() for name, interval in found.items()}


def _ratio(metric: str, scored: Sequence[Scored]) -> Interval | None:
    having = [item for item in scored if metric in item.scores]
    if not having:
        return None
    return ratio_interval([item.scores[metric] for item in having], [item.weights.get(metric, 1.0) for item in having])


def _macro_f1(task: Task, scored: Sequence[Scored]) -> Interval:
    assert isinstance(task.protocol, LabelSettings)
    truth_I, chosen_I = (np.array([item.facts[key] for item in scored]) for key in ("answer", "chosen"))
    return macro_f1(truth_I, chosen_I, len(task.protocol.labels))


# functions of all items, not means over them
_DERIVED: dict[str, Callable[[Task, Sequence[Scored]], Interval | None]] = {
    "macro_f1": _macro_f1,
    "byte_perplexity": lambda task, scored: perplexity(scored, "bytes"),
    "word_perplexity": lambda task, scored: perplexity(scored, "words"),
}
