"""What can be added, added from outside the package: one of each, in two tiny runs that use them all.

Everything below stands in one place and is registered by `added()` alone, which also takes it out again. What it takes:

- a divergence, a step: one function or class with its decorator; a feature loss: one class with its decorator
- a metric, a control: one entry of METRICS or CONTROLS
- a kind of task: its class and an entry of KINDS
- a form of a cache: its settings and its class with `register_form`; a new signal in it is one more class
- a kind of teacher: its settings in TEACHER_KINDS, its class, and an entry of `models.teachers.KINDS`

Other families of losses are added in `objectives/test_registry.py`, sources of models in `models/test_extending.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import limbeck
from limbeck.config.recipe import parse
from limbeck.config.section import Section
from limbeck.config.teacher import MORE_FORMS, TEACHER_KINDS, Cache
from limbeck.elicit.flow import Pool, StepContext, Tally, prompt_of, with_new_answer
from limbeck.elicit.step import REGISTRY, LocalStep
from limbeck.elicit.step import register as register_step
from limbeck.evaluate.items import TaskSettings
from limbeck.evaluate.metrics import METRICS, OWN, OwnTextMean, SystemMetric, TaskMetric
from limbeck.evaluate.records import ItemResult
from limbeck.evaluate.task import TaskKind
from limbeck.evaluate.tasks import KINDS
from limbeck.models import teachers
from limbeck.models.teacher import InProcessTeacher
from limbeck.models.teacher_interface import WRITES
from limbeck.objectives.bindable import register_bound
from limbeck.objectives.bound import BoundLoss
from limbeck.objectives.distribution import Distribution, ValueAndGradient
from limbeck.objectives.divergence_loss import register_divergence
from limbeck.objectives.forward import NO_TAPS, Features, Positions, TeacherView
from limbeck.objectives.head import TeacherSignal
from limbeck.objectives.layers import mean_over_pairs
from limbeck.objectives.parameters import Anything, Range, Setting
from limbeck.objectives.registry import LOSSES
from limbeck.signals.forms import FORMS, KeptForm, Packed, register_form
from limbeck.storage.files import read_jsonl
from limbeck.training.controls import CONTROLS, Control
from limbeck.types import RecipeError, Sample
from tests.conftest import PROMPTS


def scaled_kl(p: Distribution, q: Distribution, *, scale: float = 2.0) -> ValueAndGradient:
    """`scale` times the forward KL."""
    return scale * (p.prob * (p.log - q.log)).sum(-1), scale * (q.prob - p.prob)


def teacher_entropy(p: Distribution, q: Distribution) -> ValueAndGradient:
    """How undecided the teacher is. It teaches nothing, and shows which teacher a training had."""
    return -(p.prob * p.log).sum(-1), torch.zeros_like(q.prob)


class MeanGap(BoundLoss):
    """The squared difference of the means of two hidden states."""

    settings: ClassVar[Mapping[str, Setting]] = {"layers": Anything("last")}

    def forward(self, student: Features, teacher: Features, positions: Positions) -> Tensor:
        at = (positions.row_N, positions.position_N)
        gaps = [student.hidden[i][at].mean(-1) - teacher.hidden[j][at].mean(-1) for i, j in self.pairs]
        return mean_over_pairs([gap.square() for gap in gaps])


@dataclass(frozen=True)
class TableSignal(TeacherSignal):
    """The log-probabilities of all tokens, as a table."""

    whole: ClassVar[bool] = True

    log_prob_NV: Tensor

    @property
    def device(self) -> torch.device:
        return self.log_prob_NV.device

    def to(self, device: torch.device | str) -> TableSignal:
        return TableSignal(self.log_prob_NV.to(device))

    def select(self, positions: slice | Tensor) -> TableSignal:
        return TableSignal(self.log_prob_NV[positions])

    chunk = rows = select

    def join(self, others: Sequence[TableSignal]) -> TableSignal:
        return TableSignal(torch.cat([signal.log_prob_NV for signal in (self, *others)]))

    @property
    def p(self) -> Distribution:
        return Distribution(self.log_prob_NV)

    def log_prob(self, targets_N: Tensor) -> Tensor:
        return self.p.log.gather(-1, targets_N[:, None])[:, 0]

    def compare(self, divergence, params, q, targets_R) -> ValueAndGradient:
        return divergence(self.p, q, params, targets_R)


class CachedTable(Section):
    dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True)
class TableForm(KeptForm):
    """The whole table."""

    name: ClassVar[str] = "table"

    settings: CachedTable

    def disk_bytes(self, tokens: int, width: int, head_parameters: int) -> float:
        return 8.0 * tokens * head_parameters / width

    def pack(self, signal: TeacherSignal, targets_N: Tensor, seed: int, vocab_size: int) -> Packed:
        rows = signal.chunk(slice(0, len(targets_N))).rows(slice(0, len(targets_N)))
        return {
            "table": rows.p.log.to("cpu", getattr(torch, self.settings.dtype)),
            "target": rows.log_prob(targets_N).cpu(),
        }

    def unpack(self, texts: Sequence[Mapping[str, Tensor]], vocab_size: int, head: Any) -> TableSignal:
        return TableSignal(torch.cat([text["table"] for text in texts]))


letters = SystemMetric("Letters", "an answer", "none", OWN, source=OwnTextMean(lambda facts: len(facts["text"])))
one_answer = Control(rows=lambda data: list(data.preferred_rows()[:1]))


@dataclass(frozen=True)
class Word:
    id: str
    text: str
    tokens: int


class Counting(TaskKind):
    """How many tokens a word has."""

    name = "counting"
    settings = TaskSettings
    metrics: Mapping[str, TaskMetric] = {"right": TaskMetric("Counted right", "high")}

    def parse(self, data, ident, place, settings) -> Any:
        return Word(ident, data["word"], data["tokens"])

    def score(self, task, system, progress, answers) -> list[ItemResult]:
        return [ItemResult(w.id, {"right": float(len(system.text_ids(w.text)) == w.tokens)}) for w in task.items]


class Shout(LocalStep):
    """Answers every prompt by `what` and its own last word."""

    what: str = "hey"

    def apply(self, pool: Pool, context: StepContext, tally: Tally) -> Pool:
        return [self._answered(sample) for sample in pool]

    def _answered(self, sample: Sample) -> Sample:
        return with_new_answer(sample, f"{self.what} {prompt_of(sample).split()[-1]}", writer="shout")


class UndecidedTeacher(Section):
    """A model whose distribution is blunted: its logits are divided by `temperature`."""

    kind: Literal["undecided"]
    model: str
    temperature: float
    server: None = None
    cache: Cache | None = None
    context: None = None


@dataclass(frozen=True)
class Undecided:
    """The model, with the blunted distribution."""

    inner: InProcessTeacher
    temperature: float
    gives: ClassVar[frozenset[str]] = frozenset({"teacher_distribution"})
    average: ClassVar[None] = None

    @property
    def model(self):
        return self.inner.model

    @property
    def identity(self) -> str:
        return f"{self.inner.identity} at {self.temperature:g}"

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def view(self, batch, taps=NO_TAPS, vocab_size=None) -> TeacherView:
        signal = self.inner.view(batch, taps, vocab_size).signal
        positions = slice(0, len(signal.hidden_NE))
        return TeacherView(TableSignal(signal.chunk(positions).rows(positions).p.at(self.temperature).log))


class UndecidedKind:
    def gives(self, settings: UndecidedTeacher) -> frozenset[str]:
        return WRITES | Undecided.gives

    def lacks(self, settings: UndecidedTeacher, evidence: str) -> str:
        return "an undecided teacher has its distribution alone; use a divergence"

    def refuse(self, settings: UndecidedTeacher, use) -> None:
        if settings.temperature < 1:
            raise RecipeError("teacher.temperature", "must be at least 1")

    def prepare(self, settings: UndecidedTeacher, parts) -> Undecided:
        return Undecided(parts.load(settings.model), settings.temperature)

    def caveats(self, settings: UndecidedTeacher, student: str | None) -> list[str]:
        return ["The teacher measured here is not undecided."]


REGISTRIES: list[dict] = [
    LOSSES, FORMS, MORE_FORMS, METRICS, KINDS, CONTROLS, REGISTRY, TEACHER_KINDS, teachers.KINDS,
]  # fmt: skip


@contextmanager
def added() -> Iterator[None]:
    """All of the above is known inside, and unknown afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    try:
        register_divergence("s KL(p || q)", "an example", scale=Range(0, 10))(scaled_kl)
        register_divergence("H(p)", "an example", softens=False)(teacher_entropy)
        register_bound("mean_gap", "(mean h_q - mean h_p)^2", "an example")(MeanGap)
        register_form(CachedTable)(TableForm)
        register_step("shout")(Shout)
        METRICS["letters"] = letters
        CONTROLS["one_answer"] = one_answer
        KINDS["counting"] = Counting()
        TEACHER_KINDS["undecided"] = UndecidedTeacher
        teachers.KINDS["undecided"] = UndecidedKind()
        yield
    finally:
        for registry, content in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:6]))
    (folder / "held_out.jsonl").write_text('{"prompt": "count one two"}\n{"prompt": "a dog ran"}\n')
    (folder / "count").mkdir()
    task = "{name: count, version: 1, kind: counting, description: d, test: test.jsonl}"
    (folder / "count" / "task.yaml").write_text(task)
    (folder / "count" / "test.jsonl").write_text('{"word": "\\n", "tokens": 1}\n{"word": "dog", "tokens": 99}\n')
    return folder


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "student": {"start": {"prune": {"layers": 3, "keep": "uniform"}}},
        "prompts": {"from": str(folder / "prompts.jsonl")},
        "writer": [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 8}],
        "train": {"steps": 2, "tokens_per_step": 24, "lr": 1e-3, "seed": 3},
        "evaluate": {"metrics": ["fidelity"], "prompts": str(folder / "held_out.jsonl"), "max_tokens": 8},
    } | changes


@pytest.fixture(scope="module")
def full_recipe(folder, tiny_folder) -> dict[str, Any]:
    data = tiny_recipe(
        folder,
        teacher=str(tiny_folder),
        elicit=[{"shout": {"what": "the cat"}}],
        writer=[{"by": "elicited", "max_tokens": 8}],
        loss=["forward_kl", {"scaled_kl": {"scale": 3}}, "mean_gap"],
    )
    data["evaluate"] |= {"metrics": ["fidelity", str(folder / "count")], "controls": ["untouched", "one_answer"]}
    return data


@pytest.fixture(scope="module")
def full_run(folder, full_recipe) -> Path:
    with added():
        return limbeck.run(parse(full_recipe), folder / "full").folder


@pytest.fixture(scope="module")
def undecided_recipe(folder, tiny_folder) -> dict[str, Any]:
    """A teacher that finds all tokens equally likely."""
    teacher = {"kind": "undecided", "model": str(tiny_folder), "temperature": 1e9, "cache": {"table": {}}}
    return tiny_recipe(folder, teacher=teacher, loss=["forward_kl", "teacher_entropy"])


@pytest.fixture(scope="module")
def undecided_run(folder, undecided_recipe) -> Path:
    with added():
        return limbeck.run(parse(undecided_recipe), folder / "undecided", stages=("elicit", "train")).folder


def systems_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation" / "summary.json").read_text())["systems"]


def test_a_divergence(full_run):
    for record in read_jsonl(full_run / "metrics.jsonl"):
        assert record["terms"]["scaled_kl"] == pytest.approx(3 * record["terms"]["forward_kl"], rel=1e-5) != 0
    assert "scaled_kl" in (full_run / "report.html").read_text()


def test_a_feature_loss(full_run):
    first, second = (record["terms"]["mean_gap"] for record in read_jsonl(full_run / "metrics.jsonl"))
    assert first > 1e-6 and second > 1e-6 and first != second


def test_a_metric(full_run):
    assert all(system["letters"]["value"] > 0 for system in systems_of(full_run).values())
    assert "Letters" in (full_run / "report.html").read_text()


def test_a_control(full_run):
    systems = systems_of(full_run)
    assert systems["one_answer"]["forward_kl"] != systems["untouched"]["forward_kl"]
    assert len(read_jsonl(full_run / "controls" / "one_answer" / "metrics.jsonl")) == 2
    assert "one_answer" in (full_run / "report.html").read_text()


def test_a_kind_of_task(full_run):
    assert {system["count/right"]["value"] for system in systems_of(full_run).values()} == {0.5}
    assert "Counted right" in (full_run / "report.html").read_text()


def test_a_step(full_run):
    answers = [sample["messages"][-1]["content"] for sample in read_jsonl(full_run / "elicited.jsonl")]
    assert len(answers) == 6 and set(answers) == {"the cat mat", "the cat house"}
    assert "shout" in (full_run / "report.html").read_text()


def test_a_signal_and_its_form(undecided_run):
    (shard,) = (undecided_run / "signals").glob("shard-*.safetensors")
    table_NV = load_file(str(shard))["table"]
    torch.testing.assert_close(table_NV, torch.full_like(table_NV, -math.log(table_NV.shape[1])))
    assert json.loads((undecided_run / "signals" / "about.json").read_text())["form"] == {"table": {"dtype": "float32"}}


def test_a_kind_of_teacher(undecided_run):
    about = json.loads((undecided_run / "signals" / "about.json").read_text())
    for record in read_jsonl(undecided_run / "metrics.jsonl"):
        assert record["terms"]["teacher_entropy"] == pytest.approx(math.log(about["vocabulary"]))
        assert record["terms"]["forward_kl"] > 0
    assert " at 1e+09" in about["teacher"]


def test_a_recipe_with_added_kinds_reads_back(undecided_recipe):
    with added():
        recipe = parse(undecided_recipe)
        assert parse(recipe.resolved()) == recipe and parse(recipe.resolved()).hash == recipe.hash
        with pytest.raises(RecipeError, match="must be at least 1") as error:
            limbeck.check(parse(undecided_recipe | {"teacher": undecided_recipe["teacher"] | {"temperature": 0.5}}))
        assert error.value.path == "teacher.temperature"
        with pytest.raises(RecipeError, match="unknown key") as error:
            parse(
                undecided_recipe | {"teacher": undecided_recipe["teacher"] | {"cache": {"table": {"dtyp": "float32"}}}}
            )
        assert error.value.path == "teacher.cache.table.dtyp"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": ["scaled_kl"]}, "no loss is named 'scaled_kl'"),
        ({"loss": ["mean_gap"]}, "no loss is named 'mean_gap'"),
        ({"elicit": ["shout"], "writer": [{"by": "elicited"}]}, "no step 'shout'"),
        ({"evaluate": {"metrics": ["fidelity"], "controls": ["one_answer"]}}, "no control 'one_answer'"),
        ({"evaluate": {"metrics": ["fidelity", "count"]}}, "no kind of task 'counting'"),
        ({"teacher": {"kind": "undecided", "model": "x"}}, "'undecided' is no kind of teacher"),
        ({"teacher": {"model": "x", "cache": {"table": {}}}}, "unknown key"),
    ],
)
def test_all_is_gone_afterwards(folder, tiny_folder, changes, words):
    with added():
        pass
    data = tiny_recipe(folder, teacher=str(tiny_folder), loss=["forward_kl"]) | changes
    if "count" in data["evaluate"]["metrics"]:
        data["evaluate"]["metrics"][1] = str(folder / "count")
    with pytest.raises(limbeck.UserError, match=words):
        limbeck.check(parse(data))
    assert "letters" not in METRICS
