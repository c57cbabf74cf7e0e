"""How a reward model is measured: held-out pairs of answers, the better one known.

A prompt is one item, whose pairs count together. A pair that is labelled as even has no better answer and is left out
of the accuracy. Beside the student stand its start, whose row of scores is random, and `longer`, which prefers the
answer of more tokens: what length alone would reach.

Files: `task-preference+SYSTEM.jsonl`, every prompt with its scores; `preference.json`, the questions that they answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.evaluate import calibration
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.cautions import basis
from limbeck.evaluate.efficiency import sizes
from limbeck.evaluate.items import TaskSettings
from limbeck.evaluate.metrics import TaskMetric
from limbeck.evaluate.records import ItemResult, Progress, SystemRecords
from limbeck.evaluate.run import Questions
from limbeck.evaluate.statistics import Interval
from limbeck.evaluate.summary import summarise
from limbeck.evaluate.task import GreedyAnswers, Task, TaskKind
from limbeck.models.model import Model
from limbeck.models.scores import Conversation, load_scorer, scores_of
from limbeck.storage.evaluation import open_records
from limbeck.storage.evaluation import write_summary as write_sealed
from limbeck.storage.files import read_from, read_jsonl, read_object, write_json, write_text
from limbeck.types import PROBABILITY, UserError, canonical_json, content_hash

PREFERENCE = "preference"
LONGER = "longer"
MUCH = 0.02  # of accuracy: a student that leads the rule of length by less has hardly learnt more
EVEN = 0.5
LARGEST = 700.0  # exp of more is no longer a double
SHOWN = 400  # characters of a text that is kept for the page


def _ece(_: Any, results: Sequence[ItemResult]) -> Interval | None:
    tables = [Reliability.from_rows(item.facts["bins"]) for item in results if item.facts.get("bins")]
    return calibration.ece_interval(tables) if tables else None


class PreferenceKind(TaskKind):
    """Pairs of answers to one prompt, of which a model that gives scores prefers one."""

    name = PREFERENCE
    settings = TaskSettings
    metrics: Mapping[str, TaskMetric] = {
        "accuracy": TaskMetric("Pairs in the right order", "high"),
        "margin": TaskMetric("Mean lead of the better answer", "none"),
        "log_loss": TaskMetric("Log loss, nats a pair", "low"),
        "ece": TaskMetric("Calibration error", "low", _ece),
    }

    def parse(self, data: dict[str, Any], ident: str, place: str, settings: Any) -> Prompt:
        raise UserError(f"{place}: pairs of answers are read from prompts; list preference in evaluate.metrics")

    def score(self, task: Task, system: Model, progress: Progress, answers: GreedyAnswers) -> list[ItemResult]:
        """What the system's scores say of every prompt's pairs."""
        texts = [system.whole_ids(*conversation) for prompt in task.items for conversation in conversations(prompt)]
        scores = iter(scores_of(system.net, texts))
        results = []
        for done, prompt in enumerate(task.items, 1):
            results.append(judged(prompt, [next(scores) for _ in prompt.answers]))
            progress(done, len(task.items))
        return results


def conversations(prompt: Prompt) -> list[Conversation]:
    """A prompt with each of its answers, as they are scored."""
    return [(prompt.messages, said(answer), rank in prompt.cut) for rank, answer in enumerate(prompt.answers)]


def said(answer: str) -> str:
    """What of an answer is scored: what follows its thinking."""
    return after_thinking(answer) or answer


def judged(prompt: Prompt, scores: Sequence[float], probabilities: bool = True) -> ItemResult:
    """What scores of a prompt's answers, the best answer first, say of its pairs.

    Args:
        probabilities: whether the logistic of a lead is the probability to be preferred; else only the order counts.
    """
    first_better = dict(prompt.labels).get(PROBABILITY, 1.0)
    leads = [scores[i] - scores[j] for i, j in combinations(range(len(scores)), 2)]
    ahead = [] if first_better == EVEN else [lead if first_better > EVEN else -lead for lead in leads]
    sums: dict[str, float] = {}
    if ahead:
        sums["accuracy"] = sum(EVEN if lead == 0 else float(lead > 0) for lead in ahead)
    facts: dict[str, Any] = {"scores": [round(score, 6) for score in scores]}
    if probabilities:
        sums["log_loss"] = sum(first_better * _softplus(-lead) + (1 - first_better) * _softplus(lead) for lead in leads)
        if ahead:
            sums["margin"] = sum(ahead)
        if decided := [lead for lead in ahead if lead != 0]:
            sure = [1 / (1 + math.exp(-min(abs(lead), LARGEST))) for lead in decided]
            facts["bins"] = Reliability.of(np.array(sure), np.array(decided) > 0).rows()
    return ItemResult(prompt.id, sums, {name: float(len(leads)) for name in sums}, facts=facts)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


VERSION = 2  # of what is scored of an answer; 1 scored the thinking, too


@dataclass(frozen=True)
class PreferenceBench:
    """Measures models that give scores on held-out pairs, each once.

    Args:
        questions: the recipe, its text, and what leaks of it.
        folder: receives the records and the summary.
        progress: called with (done, total, what).
    """

    questions: Questions
    folder: Path
    progress: Callable[[int, int, str], None]

    def evaluate(self, start: Callable[[], Model], student: Path, *, steps: int | None) -> None:
        """Measure the student's folder, its start and the rule of length, into `summary.json`."""
        task = self.task()
        devices = self.questions.devices
        open_records(self.folder)
        self.claim(task)
        systems = {
            "untouched": self.measure("untouched", start, task),
            LONGER: self.longer(start, task),
            "student": self.measure("student", lambda: load_scorer(str(student), devices.student).model, task),
        }
        self.write_summary(systems, task, steps=steps, machine=devices.facts())

    def task(self) -> Task:
        """The held-out pairs that the training text does not hold.

        Raises:
            UserError: none is left.
        """
        held_out = self.questions.text.held_out_pairs()
        paired = [prompt for prompt in held_out if len(set(map(said, prompt.answers))) > 1]
        left = [prompt for prompt in paired if prompt.id not in self.questions.leaked]
        if not left:
            raise UserError(
                f"no held-out pair of answers is left to measure on: of {len(held_out)} held-out prompts"
                f" {len(paired)} have two, and the training text holds those: give others in evaluate.prompts"
            )
        return Task(
            name=PREFERENCE,
            version="1",
            description="Held-out pairs of answers",
            kind=PreferenceKind(),
            metrics=tuple(PreferenceKind.metrics),
            protocol=TaskSettings(),
            items=tuple(left),
            available=len(left),
        )

    def measure(self, name: str, load: Callable[[], Model], task: Task) -> SystemRecords:
        """A system's records, written once."""
        model = cache(load)

        def report(done: int, total: int) -> None:
            self.progress(done, total, f"{PREFERENCE}: {name}")

        results = self._kept(name, lambda: task.kind.score(task, model(), report, GreedyAnswers({}, 0)))
        file = self.folder / f"efficiency-{name}.json"
        if not file.exists():
            write_json(file, sizes(model()))
        return _records(name, results, read_object(file))

    def longer(self, reader: Callable[[], Model], task: Task) -> SystemRecords:
        """The rule that prefers the answer of more tokens."""

        def make() -> list[ItemResult]:
            lengths = [[len(reader().text_ids(said(a))) for a in prompt.answers] for prompt in task.items]
            return [judged(prompt, of, probabilities=False) for prompt, of in zip(task.items, lengths, strict=True)]

        return _records(LONGER, self._kept(LONGER, make), {})

    def claim(self, task: Task) -> None:
        """Remove records of other questions."""
        file = self.folder / "preference.json"
        key = content_hash([VERSION, [prompt.facts for prompt in task.items]])
        if not file.exists() or read_object(file).get("questions") != key:
            for old in (*self.folder.glob(f"task-{PREFERENCE}+*.jsonl"), *self.folder.glob("efficiency-*.json")):
                old.unlink()
            write_json(file, {"questions": key})

    def _kept(self, name: str, make: Callable[[], Sequence[ItemResult]]) -> list[ItemResult]:
        file = self.folder / f"task-{PREFERENCE}+{name}.jsonl"
        if not file.exists():
            write_text(file, "".join(canonical_json(vars(record)) + "\n" for record in make()))
        with read_from(file):
            return [ItemResult(**record) for record in read_jsonl(file)]

    def write_summary(
        self, systems: Mapping[str, SystemRecords], task: Task, *, steps: int | None, machine: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`summary.json` of a reward model: accuracy, lead, log loss and calibration with their intervals."""
        recipe = self.questions.recipe
        others = [name for name in systems if name != "student"]
        pairs = sum(math.comb(len(prompt.answers), 2) for prompt in task.items)
        summary = {
            "name": recipe.name,
            "recipe": recipe.hash,
            "controls": [name for name in others if name != LONGER],
            **summarise({name: [of] for name, of in systems.items()}, [task], [("student", name) for name in others]),
            **basis([task], held_out=0, seeds=[recipe.train.seed], steps=steps),
            "tasks": {PREFERENCE: {"prompts": len(task.items), "pairs": pairs}},
            "leaks": [vars(leak) for leak in self.questions.leaks],
            "machine": dict(machine),
        }
        summary["preference"] = {
            "calibration": {
                name: calibration.curve(calibration.merged(tables))
                for name, records in systems.items()
                if (tables := _tables(records))
            },
            "worst": _worst(task, systems["student"]),
        }
        summary["warnings"] = _warnings(summary)
        write_sealed(self.folder, summary)
        return summary


def _records(name: str, results: list[ItemResult], size: dict[str, Any]) -> SystemRecords:
    return SystemRecords(
        name=name, fidelity=[], own=[], own_text=[], free=[], answers=[], tasks={PREFERENCE: results}, efficiency=size
    )


def _tables(records: SystemRecords) -> list[Reliability]:
    return [Reliability.from_rows(item.facts["bins"]) for item in records.tasks[PREFERENCE] if item.facts.get("bins")]


def _worst(task: Task, records: SystemRecords, most: int = 8) -> list[dict[str, Any]]:
    """The prompts whose better answer trails most, with both texts."""
    prompts = {prompt.id: prompt for prompt in task.items}
    wrong = []
    for item in records.tasks[PREFERENCE]:
        prompt, scores = prompts[item.item], item.facts["scores"]
        swap = dict(prompt.labels).get(PROBABILITY, 1.0) < EVEN
        better, worse = (1, 0) if swap else (0, max(range(1, len(scores)), key=lambda rank: scores[rank]))
        if scores[better] < scores[worse] and "accuracy" in item.scores:
            texts = {"better": prompt.answers[better], "worse": prompt.answers[worse], "prompt": prompt.shown}
            shown = {key: text[:SHOWN] for key, text in texts.items()}
            wrong.append({"item": item.item, "lead": scores[better] - scores[worse], **shown})
    return sorted(wrong, key=lambda entry: float(entry["lead"]))[:most]


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing a figure."""
    student, longer = (summary["systems"][name].get(f"{PREFERENCE}/accuracy") for name in ("student", LONGER))
    messages = []
    if student and longer and student["value"] < longer["value"] + MUCH:
        messages.append(
            f"Always preferring the longer answer is right in {longer['value']:.0%} of the pairs, the student in"
            f" {student['value']:.0%}: it may have learnt no more than length."
        )
    return messages
