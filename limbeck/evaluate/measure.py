"""Measures systems one by one on the same held-out text and questions and keeps every item. Summaries are made from the
items alone.

Files, each written whole, so that a killed evaluation continues where it stopped: `fidelity-SYSTEM.jsonl`,
`own-SYSTEM.jsonl` (text that the system wrote itself), `free-SYSTEM.jsonl` (text that the teacher wrote in the same
way), `answers-SYSTEM.jsonl`, `task-TASK+SYSTEM.jsonl`, `efficiency-SYSTEM.json` (sizes), `speeds.json`, `lens.jsonl`;
`protocol.json` holds hashes of the questions: records of other questions are removed and measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from limbeck.data.batches import Row
from limbeck.elicit.prompts import Prompt
from limbeck.elicit.thinking import after_thinking
from limbeck.elicit.verify import verify
from limbeck.evaluate import wording
from limbeck.evaluate.calibration import Reliability
from limbeck.evaluate.efficiency import sizes, time_in_turns
from limbeck.evaluate.fidelity import EvaluationText, fidelity
from limbeck.evaluate.generation import answer_all
from limbeck.evaluate.protocol import SHOWN, EvaluationProtocol, claim
from limbeck.evaluate.records import (
    CheckedAnswer,
    Choices,
    DetailedProgress,
    ItemFidelity,
    ItemResult,
    SystemRecords,
)
from limbeck.evaluate.shares import ALONE, Shares
from limbeck.evaluate.task import PromptDraw, Task
from limbeck.evaluate.tasks import run_task, run_task_by_text
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.model import Model
from limbeck.models.teacher import InProcessTeacher
from limbeck.storage.files import read_from, read_jsonl, read_object, write_json, write_text
from limbeck.training.controls import PROMPTED
from limbeck.types import Sample, Sampling, canonical_json, content_hash

SIZES = ("layers", "parameters", "bytes")
OWN_FACTS = ("tokens", "text", "finished", "repetition")
AGAIN = "remove it, and `limbeck evaluate` measures it again"
# a server's answers to (prompt, seed), in their order
AskServer = Callable[[Sequence[PromptDraw], Sampling], Sequence[Sample]]
T = TypeVar("T")


class Bench:
    """Measures into a folder; records that are there already are read back, and a system all of whose files are there
    is not loaded. `outdated` are the parts whose records were of other questions.

    Without a `teacher` (its weights are not here) no distance from its distribution is measured. The held-out text is
    in the tokens of `reader`: the teacher, or else the student. Where the ranks of a run share the items, each has a
    bench, and all call `measure` in the same order.
    """

    def __init__(
        self,
        folder: Path,
        teacher: InProcessTeacher | None,
        reader: Model,
        protocol: EvaluationProtocol,
        progress: DetailedProgress = lambda done, total, detail: None,
        shares: Shares = ALONE,
    ) -> None:
        self.folder = folder
        self.teacher = teacher
        self.reader = reader
        self.protocol = protocol
        self.progress = progress
        self.shares = shares
        self.held_out = EvaluationText(shares.part(protocol.rows), teacher)
        self.free: EvaluationText | None = None
        self.loads: dict[str, Callable[[], Model]] = {}  # of the systems that were measured
        self.shown = protocol.shown
        self.outdated = claim(folder, protocol) if shares.leads else []
        if shares.leads:
            write_text(folder / "prompts.jsonl", _lines([_shown(prompt) for prompt in protocol.prompts]))

    def measure(self, name: str, load: Callable[[], Model], lens: bool = False) -> SystemRecords:
        """All of one system's records but its speeds (see `timed`). With `lens` single tokens of the first answers are
        kept, too."""
        model = cache(load)
        self.loads[name] = load
        held_out = self._fidelity(name, model, lens)
        own, own_text = self._own(name, model, lens)
        free = self._free(name, model)
        answers = self._answers(name, model)
        return SystemRecords(
            name=name,
            fidelity=held_out,
            own=own,
            own_text=own_text,
            free=free,
            answers=answers,
            tasks={task.name: self._task(task, name, model, answers) for task in self.protocol.tasks},
            efficiency=self._sizes(name, model),
        )

    def by_text(self, name: str, ask: AskServer) -> SystemRecords:
        """What can be measured of a system that gives text alone: its greedy answers, and the tasks that it answers in
        a chat."""
        protocol = self.protocol
        greedy = Sampling(temperature=0.0, max_tokens=protocol.max_tokens)
        draws = [(prompt, 0) for prompt in protocol.prompts]
        answers = self._kept(f"answers-{name}.jsonl", CheckedAnswer, lambda: self._ask_server(ask, draws, greedy))
        write = partial(self._ask_server, ask)
        results = {}
        for task in protocol.tasks:
            run = partial(
                run_task_by_text, task, write, answers=self._shared(task, answers), max_tokens=protocol.max_tokens
            )
            results[task.name] = self._kept(f"task-{task.name}+{name}.jsonl", ItemResult, run)
        return SystemRecords(
            name=name, fidelity=[], own=[], own_text=[], free=[], answers=answers, tasks=results, efficiency={}
        )

    def _ask_server(self, ask: AskServer, draws: Sequence[PromptDraw], sampling: Sampling) -> list[CheckedAnswer]:
        replies = ask(draws, sampling)
        pairs = [(prompt, reply) for (prompt, _), reply in zip(draws, replies, strict=True)]
        return [self._checked(prompt, reply) for prompt, reply in pairs]

    def _checked(self, prompt: Prompt, reply: Sample) -> CheckedAnswer:
        text = reply.messages[-1]["content"]
        finished = reply.meta.get("finish") != "length"
        return CheckedAnswer(
            prompt_id=prompt.id,
            kind=prompt.kind,
            text=text,
            tokens=len(self.reader.text_ids(text)) + finished,
            finished=finished,
            passed=verify(prompt.check, text),
            answered=after_thinking(text) is not None,
        )

    def _kept(self, name: str, kind: type[T], make: Callable[[], Sequence[T]], shares: Shares = ALONE) -> list[T]:
        """The records of a file, which is written once; `make` returns those of this rank's share."""
        file = self.folder / name
        if shares.is_missing(file):
            shares.write(file, _lines([vars(record) for record in shares.all(make())]))
        return _read(file, lambda record: kind(**record))

    def _fidelity(self, name: str, model: Callable[[], Model], lens: bool) -> list[ItemFidelity]:
        file = self.folder / f"fidelity-{name}.jsonl"
        if self.shares.is_missing(file):
            shown = self.shown if lens else set()
            progress = partial(self._report_progress, f"fidelity of {name}")
            items = self.shares.all(fidelity(model(), self.held_out, shown, progress))
            if lens:
                self._write_lens("teacher", items, model())
            self.shares.write(file, _lines([_record(item) for item in items]))
        return _read(file, _item)

    def _write_lens(self, writer: str, items: Sequence[ItemFidelity], system: Model) -> None:
        """Keep single tokens of what `writer` wrote beside those of the other."""
        file = self.folder / "lens.jsonl"
        records = [_lens(writer, item, system) for item in items if item.lens]
        if self.shares.leads:
            others = [record for record in read_jsonl(file) if record["writer"] != writer]
            write_text(file, _lines(records + others if writer == "teacher" else others + records))

    def _own(
        self, name: str, model: Callable[[], Model], lens: bool
    ) -> tuple[list[ItemFidelity], list[dict[str, Any]]]:
        """Text that the system draws itself, and its distance from the teacher there."""
        file = self.folder / f"own-{name}.jsonl"
        if self.shares.is_missing(file):
            system = model()
            rows = self._write(name, system)
            shown = {prompt.id for prompt in self.protocol.own[:SHOWN]} if lens else set[str]()
            progress = partial(self._report_progress, f"own text of {name}")
            measured = fidelity(system, EvaluationText(rows, self.teacher), shown, progress)
            items = self.shares.all(list(zip(measured, rows, strict=True)))
            if lens:
                self._write_lens("student", [item for item, _ in items], system)
            self.shares.write(file, _lines([_record(item) | _own_text(row, system) for item, row in items]))
        return _read(file, _item), _read(file, lambda record: {key: record[key] for key in OWN_FACTS})

    def _free(self, name: str, model: Callable[[], Model]) -> list[ItemFidelity]:
        """Distance from the teacher on the teacher's own text at temperature 1: what a system's own text is held
        against."""
        if self.teacher is None:
            return []
        teacher = self.teacher.model
        file = self.folder / f"free-{name}.jsonl"
        if self.shares.is_missing(file):
            if self.free is None:
                self._own("teacher", lambda: teacher, False)
                records = read_jsonl(self.folder / "own-teacher.jsonl")
                prompts = {prompt.id: prompt for prompt in self.protocol.prompts}
                rows = [self._row(prompts[record["prompt_id"]], record["ids"], teacher) for record in records]
                self.free = EvaluationText(self.shares.part(rows), self.teacher)
            progress = partial(self._report_progress, f"{name} on the teacher's free text")
            items = self.shares.all(fidelity(model(), self.free, (), progress))
            self.shares.write(file, _lines([_record(item) for item in items]))
        return _read(file, _item)

    def _write(self, name: str, system: Model) -> list[Row]:
        """The system's own answers to this rank's share of the first held-out prompts, in the ids that were drawn."""
        prompts = self.shares.part(self.protocol.own)
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=self.protocol.max_tokens)
        jobs = [
            GenerationJob(
                system.prompt_ids(prompt.messages),
                sampling,
                int(content_hash([self.protocol.seed, prompt.id])[:15], 16),
            )
            for prompt in prompts
        ]
        rows: dict[int, Row] = {}
        for index, ids in generate(system.net, jobs, system.eos_ids, vocab_size=system.vocab_size):
            rows[index] = self._row(prompts[index], ids, system)
            self.progress(len(rows), len(jobs), f"{name} writes")
        return [rows[index] for index in range(len(jobs))]

    def _row(self, prompt: Prompt, ids: Sequence[int], system: Model) -> Row:
        """An answer after the prompt as the students see it, and as the teacher does where that is another."""
        teacher = system if self.reader.prompt_context is None else self.reader
        shown = None if teacher.prompt_context is None else tuple(teacher.prompt_ids(prompt.messages))
        return Row(
            prompt.id,
            tuple(self.reader.with_context(None).prompt_ids(prompt.messages)),
            tuple(ids),
            teacher_prompt_ids=shown,
        )

    def _answers(self, name: str, model: Callable[[], Model]) -> list[CheckedAnswer]:
        protocol = self.protocol
        progress = partial(self._report_progress, f"answers of {name}")
        prompts = self.shares.part(protocol.prompts)
        return self._kept(
            f"answers-{name}.jsonl",
            CheckedAnswer,
            lambda: answer_all(model(), prompts, protocol.max_tokens, progress),
            self.shares,
        )

    def _shared(self, task: Task, answers: Sequence[CheckedAnswer]) -> dict[str, CheckedAnswer]:
        """The answers to held-out prompts that the task asks, too: the same text under the same check."""
        asked = {prompt.id: (prompt.identity, prompt.check) for prompt in self.protocol.prompts}
        same = {prompt.id for prompt in task.prompts if asked.get(prompt.id) == (prompt.identity, prompt.check)}
        return {answer.prompt_id: answer for answer in answers if answer.prompt_id in same}

    def _task(
        self, task: Task, name: str, model: Callable[[], Model], answers: Sequence[CheckedAnswer]
    ) -> list[ItemResult]:
        by_prompt = self._shared(task, answers)
        progress = partial(self._report_progress, f"{task.name}: {name}")
        part = replace(task, items=tuple(self.shares.part(task.items)))
        return self._kept(
            f"task-{task.name}+{name}.jsonl",
            ItemResult,
            lambda: run_task(part, model(), progress, by_prompt, max_tokens=self.protocol.max_tokens),
            self.shares,
        )

    def _report_progress(self, detail: str, done: int, total: int) -> None:
        self.progress(done, total, detail)

    def _sizes(self, name: str, model: Callable[[], Model]) -> dict[str, Any]:
        if not self.shares.leads:
            return {}
        file = self.folder / f"efficiency-{name}.json"
        if not file.exists():
            write_json(file, sizes(model()))
        return {key: value for key, value in read_object(file, AGAIN).items() if key in SIZES}

    def timed(self, systems: dict[str, list[SystemRecords]], *, measure: bool) -> dict[str, list[SystemRecords]]:
        """The systems with their speeds, measured in turns once all else is measured; without `measure`, those that
        were measured before.

        Speeds are measured once per shape: systems that differ in their weights alone run alike; timing each only adds
        noise.
        """
        file = self.folder / "speeds.json"
        shapes = {one.name: self._shape(one) for seeds in systems.values() for one in seeds}
        first: dict[str, str] = {}
        for name, shape in shapes.items():
            if name in self.loads:
                first.setdefault(shape, name)
        measured = read_object(file, AGAIN)["shapes"] if file.exists() else {}
        if measure and first.keys() - measured.keys():
            prompts = sorted(self.protocol.prompts[:SHOWN], key=lambda prompt: len(prompt.spoken))
            middle = prompts[len(prompts) // 2].messages
            self.progress(0, 1, "speeds, in turns")
            by_name, seen = time_in_turns({name: self.loads[name] for name in first.values()}, middle)
            self.progress(1, 1, "speeds, in turns")
            measured = {shapes[name]: speeds for name, speeds in by_name.items()}
            write_json(file, {"shapes": measured, "machine": seen})
        return {
            name: [replace(one, efficiency=one.efficiency | measured.get(shapes[one.name], {})) for one in seeds]
            for name, seeds in systems.items()
        }

    def _shape(self, records: SystemRecords) -> str:
        """What a system's speeds depend on: its sizes, and whether it reads the teacher's own prompt."""
        shown = self.reader.prompt_context is not None and records.name in ("teacher", PROMPTED)
        return canonical_json(records.efficiency | ({"prompt": "the teacher's"} if shown else {}))

    def speeds(self) -> dict[str, Any]:
        """How the speeds were measured, and how busy the machine was; empty if they were not."""
        file = self.folder / "speeds.json"
        return dict(read_object(file, AGAIN)["machine"]) if file.exists() else {}


def _read(file: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `make` makes of the records of a file."""
    with read_from(file):
        return [make(record) for record in read_jsonl(file)]


def _lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(canonical_json(record) + "\n" for record in records)


def _record(item: ItemFidelity) -> dict[str, Any]:
    sums = {key: value for key, value in vars(item).items() if key not in ("lens", "reliability", "sample_id")}
    return {"prompt_id": item.sample_id, **sums, "bins": item.reliability.rows() if item.reliability else []}


def _shown(prompt: Prompt) -> dict[str, Any]:
    return {"prompt_id": prompt.id, "kind": prompt.kind, "prompt": prompt.shown}


def _own_text(row: Row, system: Model) -> dict[str, Any]:
    """What is kept of an answer that a system drew."""
    text = system.decode(row.response_ids)
    return {
        "text": text,
        "finished": row.response_ids[-1] in system.eos_ids,
        "repetition": wording.repetition(text),
        "ids": row.response_ids,
    }


def _item(record: dict[str, Any]) -> ItemFidelity:
    lengths, classes = (
        {name: (nats, count) for name, (nats, count) in record[key].items()} for key in ("lengths", "classes")
    )
    return ItemFidelity(
        sample_id=record["prompt_id"],
        tokens=record["tokens"],
        sums=record["sums"],
        lengths=lengths,
        classes=classes,
        reliability=Reliability.from_rows(record["bins"]),
    )


def _lens(writer: str, item: ItemFidelity, system: Model) -> dict[str, Any]:
    """Tokens as text with the divergence at each: [text, nats, the teacher's first choices, the system's]."""
    text = cache(lambda token: system.tokenizer.decode([token]))

    def choices(likeliest: Choices) -> list[list[Any]]:
        return [[text(token), round(share, 4)] for token, share in likeliest]

    return {
        "writer": writer,
        "prompt_id": item.sample_id,
        "tokens": [[text(t), nats, choices(a), choices(b)] for t, nats, a, b in item.lens],
    }
