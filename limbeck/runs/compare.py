"""Compares methods fairly: same teacher, initial weights, text, steps, tokens, seeds and questions; only writers and
losses differ.

A comparison's folder holds `store.sqlite` (the text, drawn once), `runs/METHOD-sSEED/` (one run folder per training),
`evaluation/` (every item of every system), `comparison.json` and `report.html`. A killed comparison goes on with the
same command.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe, load_recipe, parse
from limbeck.config.rounds import without_rounds
from limbeck.config.teacher import BridgedTeacher, SelfTeacher
from limbeck.config.yaml_text import dump_yaml, read_yaml
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.measure import Bench
from limbeck.evaluate.records import SystemRecords
from limbeck.evaluate.statistics import holm
from limbeck.evaluate.summary import by_kind, recovery, summarise, values_by_seed, warnings
from limbeck.progress import Reporter, Silent
from limbeck.report.page import write_report
from limbeck.runs.advice import replaced_settings
from limbeck.runs.fit import prepared
from limbeck.runs.measuring import measured_teacher
from limbeck.runs.preflight import check
from limbeck.runs.resolve import terms_of
from limbeck.runs.run import Run
from limbeck.runs.servers import look_at_writer
from limbeck.storage.files import exclusive, read_jsonl, write_json, write_text
from limbeck.storage.metrics_log import mean_of, steps_made, writing_share
from limbeck.training.job import tokens_beside, total_steps
from limbeck.types import Sample, UserError, content_hash

SEEDS = 3
ROLLOUT_FACTS = ("length", "finished", "repetition", "overlap", "entropy", "teacher_log_prob")
COMMON = ("teacher", "student", "prompts", "train", "evaluate")
NAMES = ("name", "title", "paper")  # what tells nothing of a method
# a comparison trains no controls and uses no judge
UNJUDGED: dict[str, Any] = {"controls": ["untouched"], "judge": None}


@dataclass(frozen=True)
class Entry:
    """One method: its own writers and losses in the common settings, trained once per seed."""

    name: str
    recipe: Recipe

    def seeded(self, seed: int) -> Recipe:
        """The recipe of one training; the text keeps the common seed."""
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update={"seed": seed})})


def entries(recipes: Sequence[Recipe], like: Recipe) -> list[Entry]:
    """Every recipe with the common settings of `like`. Its teacher writer samples as `like`'s does, so that all methods
    train on the same text.

    Raises:
        UserError: the same name twice, a reserved name, fewer than two recipes, or recipes that can't be compared.
    """
    for recipe in (*recipes, like):
        without_rounds(
            recipe.rounds,
            recipe.name,
            "run it by itself, then compare its RUN/rounds/1/recipe.yaml, which is one round from where that began",
        )
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice[0]!r} stands twice; a comparison needs recipes of different names")
    if reserved := sorted({"teacher", "untouched"} & set(names)):
        raise UserError(
            f"a method can't be called {reserved[0]!r}, which is what every comparison measures beside the methods;"
            " rename the recipe"
        )
    if len(recipes) < 2:
        raise UserError(
            "a comparison needs at least two recipes, such as `limbeck compare seq-kd forward-kl --like quickstart`"
        )
    if scoring := [recipe.name for recipe in (*recipes, like) if recipe.student.scores]:
        raise UserError(
            f"{scoring[0]} trains a model that gives scores, and methods are compared by what students write: run it by"
            " itself"
        )
    sampling = like.held_out_writer.model_dump(include={"temperature", "top_p", "max_tokens"})
    common = {key: like.resolved()[key] for key in COMMON}
    common["prompts"] = common["prompts"] | {"seed": like.text_seed}
    common["evaluate"] = common["evaluate"] | UNJUDGED
    methods = []
    for recipe in recipes:
        own = recipe.resolved()
        if any(writer.by == "corpus" for writer in recipe.writer) != any(
            writer.by == "corpus" for writer in like.writer
        ):
            raise UserError(
                f"{recipe.name} and {like.name} differ in whether a corpus writes; compare recipes of one kind"
            )
        if _teacher_traits(recipe) != _teacher_traits(like):
            raise UserError(
                f"{recipe.name} and {like.name} differ in their kind of teacher (shown more than the prompt, the"
                " student itself, or over a bridge): methods are compared under one teacher, so give a --like that has"
                " this one"
            )
        writers = [writer | _sampling(writer, sampling) for writer in own["writer"]]
        method = parse({**own, **common, "writer": writers})
        methods.append(Entry(recipe.name, method.model_copy(update={"machine": like.machine})))
    _refuse_alike(methods)
    return methods


def _refuse_alike(methods: Sequence[Entry]) -> None:
    """Refuse two methods that would be the same training under two names."""
    seen: dict[str, str] = {}
    for entry in methods:
        settings = {key: part for key, part in entry.recipe.resolved().items() if key not in NAMES}
        losses = [repr((term.label, term.weight, term.settings)) for term in terms_of(entry.recipe)]  # with defaults
        same = content_hash(settings | {"loss": losses})
        if same in seen:
            raise UserError(
                f"{seen[same]} and {entry.name} differ in nothing but settings that all methods take from --like"
                f" ({', '.join(COMMON)}), so they would be one training twice: to compare settings, run each recipe by"
                " itself, under several values of train.seed"
            )
        seen[same] = entry.name


def _teacher_traits(recipe: Recipe) -> tuple[Any, ...]:
    """What two recipes' teachers must have in common for their methods to be compared."""
    teacher = recipe.teacher
    weights = teacher.weights if isinstance(teacher, SelfTeacher) else "own"
    bridge = teacher.bridge if isinstance(teacher, BridgedTeacher) else None
    return teacher.context, weights, bridge


def _sampling(writer: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """How a writer samples: a teacher as the common recipe's teacher, unless it is greedy; `max_tokens` is the same for
    all."""
    if writer["by"] == "corpus":
        return {}
    return like if writer["by"] == "teacher" and writer["temperature"] > 0 else {"max_tokens": like["max_tokens"]}


@dataclass
class Comparison:
    """Trains and measures every entry under every seed, in one folder."""

    folder: Path
    like: Recipe
    entries: Sequence[Entry]
    seeds: Sequence[int]
    base: str
    reporter: Reporter
    stop: Callable[[], bool]
    keep: bool = False

    @cached_property
    def common(self) -> Run:
        """The run whose teacher, text and initial student all others share."""
        return Run(prepared(self.like), self.folder, self.reporter, self.stop)

    @cached_property
    def complete_entries(self) -> list[Entry]:
        """The entries with the settings that depend on the text: which layers the student keeps, and the number of
        steps."""
        choice = self.common.models.choice()
        rows = (
            self.common.rows(self.common.text.training(), self.common.models.reader) if self.like.fixed_writers else []
        )
        self.common.models.named.release()  # the text is written
        steps = total_steps(rows, self.like.train, False, tokens_beside(self.like))
        train = self.like.train.model_copy(update={"steps": steps, "epochs": None})
        complete = []
        for entry in self.entries:
            student = entry.recipe.student
            if choice is not None and student.start.prune is not None:
                prune = student.start.prune.model_copy(update={"keep": list(choice.kept), "layers": None})
                student = student.model_copy(update={"start": student.start.model_copy(update={"prune": prune})})
            complete.append(Entry(entry.name, entry.recipe.model_copy(update={"student": student, "train": train})))
        return complete

    @cached_property
    def runs(self) -> list[tuple[str, int, Run]]:
        """(method, seed, run), seed by seed, so that an unfinished comparison covers every method."""

        def run(entry: Entry, seed: int) -> Run:
            folder = self.folder / "runs" / f"{entry.name}-s{seed}"
            method = prepared(entry.seeded(seed))
            return Run(method, folder, self.reporter, self.stop, shared=self.common)

        return [(entry.name, seed, run(entry, seed)) for seed in self.seeds for entry in self.complete_entries]

    @cached_property
    def questions(self) -> evaluation.Questions:
        """What all systems are asked: no method's text gives it away."""
        first = self.runs[: len(self.entries)]  # other seeds train on the same text
        others = [run.text for _, _, run in first if run.recipe.elicit]
        return replace(self.common.questions, others=others)

    def bench(self) -> Bench:
        return self.common.bench(self.folder / "evaluation", questions=self.questions)

    def train_and_measure(self) -> dict[str, list[SystemRecords]]:
        """Every system's records: teacher, untouched, then the methods with one per seed."""
        runs = self.runs
        for _, _, run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.claim()
        bench = self.bench()
        systems = {"teacher": [measured_teacher(self.common, bench)]}
        systems["untouched"] = [bench.measure("untouched", runs[0][2].models.initial_student)]
        for number, (method, seed, run) in enumerate(runs):
            self.reporter.stage(f"{method}, seed {seed} ({number + 1} of {len(runs)})")
            if not run.path("measured").exists():
                run.train("student")
            records = bench.measure(f"{method}-s{seed}", partial(run.trained, "student"))
            systems.setdefault(method, []).append(records)
            shutil.rmtree(run.path("checkpoints"), ignore_errors=True)
            if not self.keep and seed != self.seeds[0]:  # half a gigabyte each; the first seed's student stays
                write_text(run.path("measured"), "the student was measured and removed; `--keep` keeps it\n")
                shutil.rmtree(run.path("student"), ignore_errors=True)
        return bench.timed(systems, measure=self.common.recipe.evaluate.speeds is not False)

    def write(self, systems: dict[str, list[SystemRecords]]) -> None:
        """Write `comparison.json` and `report.html`."""
        bench = self.bench()
        tasks = bench.protocol.tasks
        methods = [entry.name for entry in self.entries]
        pairs = [(method, self.base) for method in methods if method != self.base]
        summary = summarise(systems, tasks, pairs)
        _adjust(summary["paired"])
        runs = self.runs
        comparison = {
            "name": self.folder.name,
            "base": self.base,
            **summary,
            **evaluation.facts(self.questions, bench, seeds=self.seeds, steps=steps_made(runs[0][2].folder)),
            "methods": {entry.name: _method(entry) for entry in self.complete_entries},
            "by_seed": {method: values_by_seed(self.seeds, systems[method], tasks) for method in methods},
            "recovered": {
                method: recovery(systems[method], systems["untouched"], systems["teacher"], tasks) for method in methods
            },
            "by_kind": by_kind(systems, {prompt.id: prompt.kind for prompt in bench.protocol.prompts}, tasks),
            "cost": {method: self._cost([run for name, _, run in runs if name == method]) for method in methods},
            "rollout": _rollout_facts({method: [run for name, _, run in runs if name == method] for method in methods}),
            "warnings": [
                *warnings(systems, summary, methods),
                *evaluation.teacher_warnings(self.questions, bench),
            ],
            "settings": {key: self.complete_entries[0].recipe.resolved()[key] for key in COMMON},
        }
        write_json(self.folder / "comparison.json", comparison)
        write_report(self.folder)

    def _cost(self, runs: Sequence[Run]) -> dict[str, float]:
        """Tokens, steps and seconds of training as means over the seeds, peak memory, and the tokens that the teacher
        wrote; those are left out of a method that has its text elicited, since steps ask for more than they keep."""
        records = [read_jsonl(run.path("metrics.jsonl")) for run in runs]
        all_records = [record for of_seed in records for record in of_seed]
        written = runs[0].text.training()
        asked = any(sample.meta["writer"] == "elicited" for sample in written)
        cost: dict[str, float] = (
            {} if asked else {"teacher_tokens": _teacher_tokens(written, self.common.models.reader.text_ids)}
        )
        cost |= {
            "trained_tokens": sum(record["response_tokens"] for record in all_records) / len(runs),
            "steps": len(all_records) / len(runs),
            "seconds": sum(record["seconds"] for record in all_records) / len(runs),
        }
        if writing := writing_share(all_records):
            cost["writing_share"] = writing
        peaks = [peak for record in all_records if (peak := record.get("device_memory_mib", record.get("memory_mib")))]
        return cost | ({"peak_memory_mib": max(peaks)} if peaks else {})


def _teacher_tokens(samples: Sequence[Sample], text_ids: Callable[[str], list[int]]) -> int:
    """The tokens of the teacher's answers, the one that ends an answer included; a server's text has those that
    `text_ids` gives it."""
    tokens = 0
    for sample in (sample for sample in samples if sample.meta["writer"] == TEACHER):
        ends = sample.meta.get("finish") != "length"
        ids = sample.response_ids
        tokens += len(text_ids(sample.messages[-1]["content"])) + ends if ids is None else len(ids)
    return tokens


def _rollout_facts(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Facts about the student's text during training: means over the last third of the steps, and over the seeds."""
    by_method: dict[str, dict[str, float]] = {}
    for method, runs_of_method in runs.items():
        records = [read_jsonl(run.path("metrics.jsonl")) for run in runs_of_method]
        late = [record for of_seed in records for record in of_seed[2 * len(of_seed) // 3 :]]
        means = {fact: mean_of(late, fact) for fact in ROLLOUT_FACTS}
        if facts := {fact: mean for fact, mean in means.items() if mean is not None}:
            by_method[method] = facts
    return by_method


def _method(entry: Entry) -> dict[str, Any]:
    recipe = entry.recipe
    return {
        "title": recipe.title,
        "paper": recipe.paper,
        "loss": [loss.name for loss in recipe.loss],
        "writer": [writer.by for writer in recipe.writer],
        "recipe": recipe.hash,
    }


def _adjust(paired: dict[str, dict[str, Any]]) -> None:
    """Add p-values with Holm's adjustment within each metric, over the methods compared with the base."""
    for metric in {metric for differences in paired.values() for metric in differences}:
        adjusted = holm(
            {pair: differences[metric]["p"] for pair, differences in paired.items() if metric in differences}
        )
        for pair, p in adjusted.items():
            paired[pair][metric]["p_holm"] = p


def compare(
    recipes: Sequence[str | Path | Recipe],
    out: str | Path | None = None,
    *,
    like: str | Path | Recipe | None = None,
    seeds: int | Sequence[int] = SEEDS,
    base: str | None = None,
    keep: bool = False,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train and measure recipes under the same conditions, as `limbeck.compare` says; more seeds go on in the same
    folder. Returns the comparison's folder."""
    loaded = [recipe if isinstance(recipe, Recipe) else load_recipe(recipe) for recipe in recipes]
    common = _common(loaded, like)
    found = entries(loaded, common)
    numbers = [common.train.seed + n for n in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"seeds must be at least one, each once; got {numbers}")
    against = base or found[0].name
    if against not in {entry.name for entry in found}:
        raise UserError(f"the base {against!r} is none of the recipes: {', '.join(entry.name for entry in found)}")
    for entry in found:  # how many steps there will be is known once the text is there
        length = {"steps": entry.recipe.train.steps or 1, "epochs": None} if common.fixed_writers else {}
        check(entry.recipe.model_copy(update={"train": entry.recipe.train.model_copy(update=length)}))
    prepared(common)  # refused before the folder is made
    folder = (
        Path(out)
        if out is not None
        else Path("runs") / f"compare-{content_hash([entry.recipe.hash for entry in found])[:8]}"
    )
    with exclusive(folder / ".lock"):
        comparison = Comparison(
            folder,
            common,
            entries=found,
            seeds=numbers,
            base=against,
            reporter=reporter or Silent(),
            stop=stop,
            keep=keep,
        )
        _claim(comparison)
        for note in (note for recipe in loaded for note in replaced_settings(recipe, common)):
            comparison.reporter.note(note)
        comparison.reporter.stage("Teacher's text and student's start")
        comparison.write(comparison.train_and_measure())
    return folder


def _common(loaded: Sequence[Recipe], like: str | Path | Recipe | None) -> Recipe:
    """The recipe whose settings all share, measured against nothing but the start."""
    if not loaded:
        raise UserError("name the recipes to compare, such as `limbeck compare seq-kd forward-kl --like quickstart`")
    common = loaded[0] if like is None else like if isinstance(like, Recipe) else load_recipe(like)
    return common.model_copy(update={"evaluate": common.evaluate.model_copy(update=UNJUDGED)})


def _claim(comparison: Comparison) -> None:
    """Look at the servers that students write on; bind the folder to this comparison, or refuse that of another."""
    if not comparison.folder.joinpath("comparison.json").exists():
        for entry in comparison.entries:
            look_at_writer(entry.recipe)
    facts = {"methods": {entry.name: entry.recipe.hash for entry in comparison.entries}}
    file = comparison.folder / "comparison.yaml"
    if file.exists() and read_yaml(file) != facts:
        raise UserError(
            f"{comparison.folder} holds another comparison (of other recipes): give another --out, or remove it"
        )
    comparison.common.claim()
    write_text(file, dump_yaml(facts))
