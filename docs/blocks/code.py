"""Blocks that are made from the code, the recipes and the tests' tables."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import load_recipe
from limbeck.elicit.shapes import SHAPES, example_rows, form_of
from limbeck.elicit.steps import STEPS
from limbeck.models.engines import ALL, ENGINES
from limbeck.objectives.bindable import BINDABLE
from limbeck.objectives.divergence_loss import DIVERGENCES, TEMPERATURE
from limbeck.objectives.policy import POLICIES
from limbeck.objectives.rank import RANKINGS
from limbeck.training.rewards import REWARDS

from .table import table

FOLDERS = {
    "": "the public names, the command line, and the nouns that all share",
    "commands": "the verbs that are more than a call of `runs`",
    "runs": "a recipe as a whole: resolved, checked, priced, run, compared",
    "evaluate": "what was kept: fidelity, tasks, a judge, statistics",
    "training": "one training: its parts, its loop, the student as writer",
    "models": "models in process and behind servers: loaded, started, asked, and beside the student as teachers",
    "signals": "the teacher's side of the positions that are trained: whole, in part, over a bridge, kept in files",
    "elicit": "the text: prompts, steps of elicitation, verifiers, the engine that asks",
    "report": "the page, from a run folder alone; imports nothing that trains",
    "objectives": "the losses: pure functions on tensors",
    "data": "rows from users' files; the order of the text and its batches",
    "config": "a recipe: its sections, their defaults and ranges",
    "storage": "files that are whole or absent, the store of answers, checkpoints",
}  # from the top floor down; a file imports from floors below its own, and from its own folder
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "limbeck"
KINDS = ("expand", "curate", "label", "feedback", "verify", "select", "transform")
MOST_CHARS = 60


def parameters(defaults: Mapping[str, Any], legal: Mapping[str, object]) -> str:
    """Each parameter with its default and, where it has one, its legal range."""
    plain = {
        key: f"{value:g}" if isinstance(value, float) else json.dumps(value).replace('"', "")
        for key, value in defaults.items()
    }
    return (
        ", ".join(f"`{key}` {value}" + (f" in {legal[key]}" if key in legal else "") for key, value in plain.items())
        or "none"
    )


def shown_by(name: str) -> str:
    """The built-in recipes that have the term."""
    having = [
        recipe for recipe, path in recipe_files().items() if any(loss.name == name for loss in load_recipe(path).loss)
    ]
    return ", ".join(f"[{recipe}](../recipes/{recipe}.yaml)" for recipe in having)


def divergences() -> str:
    rows = []
    for name, loss in sorted(DIVERGENCES.items()):
        own = {key: value for key, value in loss.defaults.items() if key != "temperature"}
        # by top-k, sampled, written: signals/sparse.py
        carried = (loss.buckets, loss.sampled, loss.buckets and loss.one_hot)
        words = ["yes" if carries else "no" for carries in carried]
        rows.append(
            [f"`{name}`", f"`{loss.formula}`", parameters(own, loss.ranges), *words, loss.paper, shown_by(name)]
        )
    hard = ", ".join(f"`{name}`" for name, loss in sorted(DIVERGENCES.items()) if not loss.softens)
    note = f"Beside their own parameters all but {hard} take `temperature`, 1 in {TEMPERATURE}."
    return (
        table(["name", "formula", "parameters", "top-k", "sampled", "text alone", "paper", "recipes"], rows)
        + f"\n\n{note}"
    )


def ranking() -> str:
    rows = []
    for name, loss in sorted(RANKINGS.items()):
        measured = {"baseline": "measured, or a number"} if loss.measures else {}
        defaults = parameters(loss.defaults | measured, loss.legal)
        rows.append([f"`{name}`", f"`{loss.formula}`", defaults, loss.reference, loss.paper, shown_by(name)])
    return table(["name", "formula", "parameters", "reference", "paper", "recipes"], rows)


def features() -> str:
    rows = [
        [
            f"`{name}`",
            f"`{loss.formula}`",
            parameters(loss.defaults, loss.legal),
            loss.bound.tapped,
            loss.unit,
            loss.paper,
            shown_by(name),
        ]
        for name, loss in sorted(BINDABLE.items())
        if "teacher_features" in loss.reads
    ]
    return table(["name", "formula", "parameters", "reads", "unit", "paper", "recipes"], rows)


def rewards() -> str:
    """Every reward with its parameters."""
    rows = []
    for name, reward in REWARDS.items():
        fields = ", ".join(
            f"`{key}`" + ("" if field.is_required() else f" {field.default}" if field.default is not None else " none")
            for key, field in reward.model_fields.items()
        )
        rows.append([f"`{name}`", " ".join((reward.__doc__ or "").split()), fields])
    return table(["reward", "what it is", "parameters"], rows)


def policy() -> str:
    rows = []
    for name, loss in sorted(POLICIES.items()):
        columns = ", ".join(
            [*(f"`{column}`" for column in loss.needed), *(f"`{column}` (optional)" for column in loss.optional)]
        )
        rows.append([f"`{name}`", f"`{loss.formula}`", parameters(loss.defaults, loss.legal), columns, loss.paper])
    return table(["name", "formula", "parameters", "reads", "paper"], rows)


def steps() -> str:
    """The steps of elicitation with their settings."""
    rows = []
    for name, step in sorted(STEPS.items(), key=lambda entry: (KINDS.index(entry[1].kind), entry[0])):
        fields = step.model_fields.items()
        settings = (
            ", ".join(
                f"`{key}` {'required' if field.is_required() else _default(field.default)}" for key, field in fields
            )
            or "none"
        )
        first = " ".join((step.__doc__ or "").split("\n\n")[0].split())
        rows.append([f"`{name}`", step.kind, first, settings, ", ".join(sorted(step.needs)), step.paper])
    return table(["step", "kind", "what it does", "settings", "needs", "paper"], rows)


def _default(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}…"


def engines() -> str:
    """The kinds of servers, with what each takes and an example of its options."""
    rows = []
    for kind, engine in ENGINES.items():
        header, prefix = engine.key_header
        examples = [f"`{_flow(example)}`" for example in (engine.schema, engine.effort) if example is not None]
        named = f"{engine.most_logprobs}" if engine.most_logprobs else "none"
        named += ", plain" if engine.plain_logprobs else ""
        lacks = ", ".join(f"`{name}`" for name in sorted(ALL - engine.takes)) or "nothing"
        limit = engine.limit or engine.dialect.places["max_tokens"]
        key = f"`{header}: {prefix}…`"
        held = ", ".join(f"`{name}`" for name in engine.forms)
        rows.append(
            [f"`{kind}`", engine.title, f"`{engine.url}`", f"`{limit}`", lacks, key, named, held, "; ".join(examples)]
        )
    titles = [
        "kind",
        "server",
        "`url`",
        "longest answer",
        "lacks",
        "key",
        "`logprobs` at most",
        "`constrain`",
        "examples of `options`",
    ]
    return table(titles, rows)


def _flow(value: Any) -> str:
    """Plain data as YAML in one line, with SCHEMA for a schema."""
    if isinstance(value, Mapping) and value.get("type") == "object":
        return "SCHEMA"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value).strip('"')


def families() -> str:
    """The families of models that the tests send down every road, from the tests' own table."""
    tried = from_tests("families")
    rows = []
    for family in tried.FAMILIES:
        roads = ["refused" if (family, road) in tried.REFUSED else "yes" for road in tried.ROADS]
        rows.append([family, *roads, "yes"])
    return table(["family", *tried.ROADS, tried.CHECKED], rows)


def server_ways() -> str:
    """What becomes of the ways of servers, from the tests' own table."""
    tried = from_tests("server_ways")
    return table(["the server", "becomes"], [[way.title, tried.OUTCOMES[way.outcome]] for way in tried.WAYS])


def from_tests(name: str) -> Any:
    """A module of the tests that holds a table."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def house() -> str:
    """Every folder of the package from the top floor down, and what each of its files is for, in its own words."""
    lines = []
    for folder, what in FOLDERS.items():
        files = sorted((PACKAGE / folder).glob("*.py" if folder in ("", "commands") else "**/*.py"))
        files += sorted((PACKAGE / folder).glob("*/*.py")) if folder == "commands" else []
        lines += [f"**`{'/'.join(filter(None, ('limbeck', folder)))}/`**: {what}", ""]
        lines += [f"- `{file.relative_to(PACKAGE / folder)}`: {first_sentence(file)}" for file in files]
        lines.append("")
    return "\n".join(lines).rstrip()


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, in one line."""
    docstring = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[.?!])\s", docstring, maxsplit=1)[0].rstrip(".")


def shapes() -> str:
    """The shapes of rows that are read, with what is taken for what."""
    rows = []
    for shape in SHAPES:
        example = example_rows(shape, 1)[0]
        form = form_of(frozenset(example))
        named = [
            f"`{name}`" + (" (messages)" if isinstance(value, list) and name != "answers" else "")
            for name, value in example.items()
            if name != "tools"
        ]
        named += ["`tools`"] if "tools" in example else []
        rows.append((shape.name, ", ".join(named), form.words, shape.known_from))
    return table(("Shape", "Columns", "Taken as", "Known from"), rows)
