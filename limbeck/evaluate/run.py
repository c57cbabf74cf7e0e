"""A run's evaluation: what is asked of its systems, and the summary that its page is made from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe
from limbeck.data.batches import Row
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.step_prompt import StepPrompt
from limbeck.elicit.training_text import TrainingText
from limbeck.evaluate.by_label import by_field, by_label, write_questions
from limbeck.evaluate.cautions import basis, task_facts
from limbeck.evaluate.fidelity import by_class
from limbeck.evaluate.judge import MAX_TOKENS, Ask, load_or_judge, summarise_verdicts
from limbeck.evaluate.leak import Leak, find_leaks
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.protocol import EvaluationProtocol
from limbeck.evaluate.records import DetailedProgress, SystemRecords
from limbeck.evaluate.shares import ALONE, Shares
from limbeck.evaluate.summary import by_kind, recovery, summarise, warnings
from limbeck.evaluate.task import Task
from limbeck.evaluate.worth import bill, kept, requests, teachers_requests
from limbeck.models.compatibility import OTHER_TOKENS
from limbeck.models.load import load_model, model_identity
from limbeck.models.model import Model
from limbeck.models.placement import Devices
from limbeck.models.scores import Scorer, is_scorer, load_scorer, scorer_identity
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.teachers import kind
from limbeck.storage.evaluation import open_records
from limbeck.storage.evaluation import write_summary as write_sealed
from limbeck.training.controls import CONTROLS, PROMPTED
from limbeck.types import Message, Sampling, UserError

OWN_PROMPTS = 24
OF_ORDER = ("swap_consistency", "first_position_share")  # what only a judge of pairs can be measured by
LEAK_KINDS = ("exact", "contained", "overlap", "same_but_for_numbers")  # the strongest first


@dataclass(frozen=True)
class Questions:
    """What a run's systems are asked, and the text that they were made from.

    `step_prompt` is what a step of elicitation showed the teacher; `others` are the texts of a comparison's methods
    that have their own.
    """

    recipe: Recipe
    tasks: Sequence[Task]
    text: TrainingText
    devices: Devices
    step_prompt: StepPrompt | None = None
    others: Sequence[TrainingText] = ()

    @cached_property
    def leaks(self) -> list[Leak]:
        return _leaks(self)

    @cached_property
    def leaked(self) -> set[str]:
        """The ids of prompts and items that the training text gives away."""
        return {leak.item for leak in self.leaks if leak.kind != "same_but_for_numbers"}

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts without those; the same question twice is one.

        Raises:
            UserError: none of them has an answer of the teacher's that can be measured on.
        """
        held_out = self.text.prompts[1]
        first = {prompt.identity: prompt.id for prompt in reversed(held_out)}
        answered = {prompt.id for prompt, sample in zip(held_out, self.text.held_out(), strict=True) if sample.teaches}
        left = [prompt for prompt in held_out if prompt.id not in self.leaked and first[prompt.identity] == prompt.id]
        if not any(prompt.id in answered for prompt in left):
            raise UserError(
                "no held-out answer is left to measure on: the training text holds all held-out prompts; give others in"
                " evaluate.prompts"
            )
        return left


def bench(
    questions: Questions,
    folder: Path,
    *,
    teacher: InProcessTeacher | None,
    reader: Model,
    rows: Sequence[Row],
    progress: DetailedProgress,
    shares: Shares = ALONE,
) -> Bench:
    """Where systems are measured: on the held-out prompts and tasks, without those that the training text gives away.

    Args:
        teacher: None where its weights are not here.
        reader: whose tokens the rows are in.
        rows: held-out teacher text, one row per answered prompt, named by its prompt's id.
        shares: which of the items this rank measures, where a run has several.
    """
    recipe = questions.recipe
    prompt_ids = {prompt.id for prompt in questions.prompts}
    rows = [row for row in rows if row.sample_id in prompt_ids]
    tasks = [
        replace(task, items=tuple(item for item in task.items if task.plain_id(item) not in questions.leaked))
        for task in questions.tasks
    ]
    protocol = EvaluationProtocol(
        rows=rows,
        prompts=questions.prompts,
        tasks=tasks,
        max_tokens=recipe.evaluate.max_tokens,
        own_prompts=recipe.evaluate.own_prompts or OWN_PROMPTS,
        seed=recipe.text_seed,
    )
    if shares.leads:
        open_records(folder)
    return Bench(folder, teacher, reader, protocol, progress=progress, shares=shares)


def _leaks(questions: Questions) -> list[Leak]:
    """Held-out prompts and task items that occur in the training text: per item the strongest leak, with one text that
    shows it."""
    texts = (questions.text, *questions.others)
    prompts = [(prompt.id, prompt.spoken) for text in texts for prompt in text.prompts[0]]
    training = prompts + [(sample.id, sample.messages[-1]["content"]) for text in texts for sample in text.training()]
    for name in questions.recipe.evaluate.controls:
        training += CONTROLS[name].extra_text(questions.text.given_prompts[0])
    items = {(prompt.id, prompt.spoken) for prompt in questions.text.prompts[1]}
    items |= {pair for task in questions.tasks for pair in task.texts}
    strongest: dict[str, Leak] = {}
    for leak in find_leaks(training, sorted(items), prompts=prompts):
        other = strongest.get(leak.item)
        if other is None or LEAK_KINDS.index(leak.kind) < LEAK_KINDS.index(other.kind):
            strongest[leak.item] = leak
    return list(strongest.values())


def write_summary(
    questions: Questions, bench: Bench, systems: dict[str, list[SystemRecords]], *, steps: int | None = None
) -> dict[str, Any]:
    """`summary.json` of a run: the teacher first, the student last. `steps` are the updates of its training."""
    recipe = questions.recipe
    tasks = bench.protocol.tasks
    against = [name for name in systems if name not in ("teacher", "student")]
    summary = {
        "name": recipe.name,
        "recipe": recipe.hash,
        "controls": against,
        **summarise(systems, tasks, [("student", name) for name in against]),
        **facts(questions, bench, seeds=[recipe.train.seed], steps=steps),
    }
    if "untouched" in systems:
        summary["recovered"] = recovery(systems["student"], systems["untouched"], systems["teacher"], tasks)
    summary["by_kind"] = by_kind(systems, {prompt.id: prompt.kind for prompt in bench.protocol.prompts}, tasks)
    summary["by_token_class"] = by_class(systems["student"][0].fidelity)
    summary |= {"by_label": by_label(systems, tasks), "by_field": by_field(systems, tasks)}
    summary["kept"] = kept(systems["student"][0], systems["teacher"][0], tasks)
    write_questions(bench.folder, tasks)
    summary["warnings"] = warnings(systems, summary, ["student"])
    summary["warnings"] += teacher_warnings(questions, bench)
    if recipe.evaluate.judge is not None:
        first_seeds = {name: seeds[0] for name, seeds in systems.items()}
        summary["judge"] = judge_systems(questions, bench, first_seeds)
        summary["warnings"] += judge_warnings(summary["judge"])
    write_sealed(bench.folder, summary)
    return summary


def judge_systems(questions: Questions, bench: Bench, systems: Mapping[str, SystemRecords]) -> dict[str, Any]:
    """A judge's verdicts on the student's greedy answers against those of each control and of the teacher.

    `judge-SYSTEM.jsonl` holds every verdict, written once. The judge is loaded where one is missing; where it is the
    teacher, no second copy of it is loaded.
    """
    judge = _judge(questions, bench)
    answers = {name: {answer.prompt_id: answer.text for answer in records.answers} for name, records in systems.items()}
    pairs = {}
    for name in sorted((name for name in systems if name != "student"), key=lambda name: name == "teacher"):
        verdicts = load_or_judge(
            bench.folder / f"judge-{name}.jsonl",
            judge=judge.load,
            identity=judge.identity,
            prompts=bench.protocol.prompts,
            first=answers["student"],
            second=answers[name],
            progress=partial(_report_progress, bench.progress, f"the judge: student and {name}"),
            control=judge.control,
        )
        pairs[f"student - {name}"] = summarise_verdicts(verdicts, judge.is_teacher)
        if judge.scores:
            pairs[f"student - {name}"] |= dict.fromkeys(OF_ORDER)
    scores = {"scores": True} if judge.scores else {}
    return {"model": judge.identity, "max_tokens": MAX_TOKENS, "pairs": pairs, **scores}


@dataclass(frozen=True)
class SummaryJudge:
    """Who judges; `control` are its control tokens where `load` gives no model, but a function that asks it. One that
    `scores` each answer by itself is shown no pair."""

    identity: str
    load: Callable[[], Model | Scorer | Ask]
    is_teacher: bool
    control: Collection[str] = ()
    scores: bool = False


def _judge(questions: Questions, bench: Bench) -> SummaryJudge:
    """The judge that the recipe names: a model under `models`, whose replies are kept with the run's text, or any model
    by its source."""
    source = str(questions.recipe.evaluate.judge)
    text = questions.text
    if source in (questions.recipe.models or {}):
        identity = text.models.writer_identity(source)
        is_teacher = _weights(identity) == _weights(text.models.writer_identity(TEACHER).partition("+sight-")[0])
        reader = text.models.as_reader(source)
        return SummaryJudge(identity, lambda: partial(_ask_named, text, source), is_teacher, reader.control)
    # a judge is shown the pair alone
    teacher = None if bench.teacher is None else bench.teacher.model.with_context(None)
    scores = is_scorer(source)
    identity = scorer_identity(source) if scores else model_identity(source)
    is_teacher = teacher is not None and _weights(identity) == _weights(teacher.identity)
    placement = questions.devices.teacher

    @cache
    def load() -> Model | Scorer:
        if scores:
            return load_scorer(source, placement)
        return teacher if is_teacher and teacher is not None else load_model(source, placement=placement)

    return SummaryJudge(identity, load, is_teacher, scores=scores)


def _ask_named(text: TrainingText, name: str, conversations: list[tuple[Message, ...]]) -> list[str | None]:
    """The replies of a named model to pairs of conversations; None to both where either leaves no room for a reply, and
    nothing for a reply that did not come to its end."""
    reader = text.models.as_reader(name)
    fits = [reader.fits(messages, MAX_TOKENS) for messages in conversations]
    places = [place for place in range(len(conversations)) if fits[place] and fits[place ^ 1]]
    sampling = Sampling(0.0, 1.0, MAX_TOKENS)
    replies = text.asked_of(name, [conversations[place] for place in places], sampling)
    said: list[str | None] = [None] * len(conversations)
    for place, reply in zip(places, replies, strict=True):
        said[place] = reply.messages[-1]["content"] if reply.meta["finish"] == "ok" else ""
    return said


def _weights(identity: str) -> str:
    """The part of an identity that names the weights: a copy in another folder is the same model."""
    return identity.rpartition("@")[2]


def _report_progress(progress: DetailedProgress, detail: str, done: int, total: int) -> None:
    progress(done, total, detail)


def judge_warnings(judge: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the judge."""
    pairs = judge["pairs"]
    messages = []
    if any(pair["judge_is_teacher"] for pair in pairs.values()):
        messages.append(
            "The judge is the teacher itself: it may favour its own manner of writing, and whoever writes like it."
        )
    unread = [name.removeprefix("student - ") for name, pair in pairs.items() if (pair["unparsable_share"] or 0) > 0.5]
    if unread:
        messages.append(
            f"More than half of what the judge says of the student against {', '.join(unread)} can't be read: this"
            " model can't judge; name another in evaluate.judge."
        )
    if left_out := sum(pair["outcomes"]["too_long"] for pair in pairs.values()):
        total = sum(sum(pair["outcomes"].values()) for pair in pairs.values())
        messages.append(
            f"The judge's context has no room for {left_out} of {total} pairs of answers, which were left out."
        )
    return messages


def teacher_warnings(questions: Questions, bench: Bench) -> list[str]:
    """What to know of a teacher that is shown more than the students, has other tokens, or is the student itself,
    before believing its figures."""
    recipe = questions.recipe
    text = questions.text
    context = recipe.teacher.context
    messages = kind(recipe.teacher).caveats(recipe.teacher, recipe.student.start.pretrained)
    if bench.teacher is None and recipe.teacher.model is not None and OTHER_TOKENS not in messages:
        messages.append(OTHER_TOKENS)
    messages += _shown_in_words(questions)
    for name in context.reads if context else []:
        fields = [prompt.answers if name == "answer" else prompt.feedback for prompt in text.prompts[1]]
        count = sum(map(bool, fields))
        messages.append(
            f"The teacher was shown the {name} of {count} of {len(text.prompts[1])} held-out prompts: there its"
            " figures are no ceiling that a student could reach, and shares of its lead mean little."
        )
    return messages


def shown(questions: Questions) -> dict[str, Any]:
    """What each side is shown while it is measured."""
    step = questions.step_prompt
    context = questions.recipe.teacher.context
    facts: dict[str, Any] = {}
    if context is not None:
        facts["teacher.context"] = context.model_dump(exclude_none=True)
    if step is not None and not step.varies:
        facts["elicit"] = {name: value for name, value in (("system", step.system), ("prompt", step.pieces)) if value}
    return {"teacher": facts or "the plain prompt", "others": "the plain prompt"}


def _shown_in_words(questions: Questions) -> list[str]:
    step = questions.step_prompt
    names = {"teacher.context": "teacher.context", "elicit": "the prompt of its step under elicit"}
    where = " and ".join(name for place, name in names.items() if place in shown(questions)["teacher"])
    words = []
    if where:
        prompted = PROMPTED in questions.recipe.evaluate.controls
        words.append(
            f"Each is measured as it is used: the teacher with {where}, student and controls without"
            + (" (but the control `prompted`, which is shown it, too)." if prompted else ".")
        )
    if step is not None and step.varies:
        words.append(
            "The teacher is measured without what its step under elicit showed it when it wrote the training answers,"
            " which was another thing for every prompt: its figures may be lower than what it taught."
        )
    return words


def facts(questions: Questions, bench: Bench, *, seeds: Sequence[int], steps: int | None) -> dict[str, Any]:
    """How the figures were obtained and what they rest on: held-out text, tasks with their settings, leaks, machine,
    speeds, and the cautions that follow (see `cautions`)."""
    recipe = questions.recipe
    text = questions.text
    tasks = bench.protocol.tasks
    rows = bench.protocol.rows
    ends = bench.reader.eos_ids
    return bill(text.bills) | {
        "requests": requests(rows) | teachers_requests(text, bench.protocol),
        "held_out": (
            text.facts() | {"answers": len(rows), "cut_off": sum(row.response_ids[-1] not in ends for row in rows)}
        ),
        "own_text": {
            "prompts": bench.protocol.own_prompts,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": recipe.evaluate.max_tokens,
        },
        "tasks": {task.name: task_facts(task) for task in tasks},
        "speeds": bench.speeds(),
        **basis(tasks, held_out=len(rows), seeds=seeds, steps=steps),
        "shown": shown(questions),
        "leaks": [vars(leak) for leak in questions.leaks],
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **questions.devices.facts(),
        },
    }
