"""A mistake in a recipe is said before anything heavy is imported, and in the words that people use."""

from __future__ import annotations

import subprocess
import sys

import pytest

from limbeck.types import SYNONYMS, nearest

HEAVY = ("torch", "transformers", "numpy", "pyarrow")
PROGRAM = """
import sys
from typer.testing import CliRunner
from limbeck.cli import app
for command in (["check"], ["run"], ["doctor"], ["compare", "--like"], ["train", "--profile"], ["cache"], ["elicit"]):
    result = CliRunner().invoke(app, [*command, sys.argv[1], *(["seq-kd"] if "compare" in command else [])])
    assert "did you mean 'lr'" in str(result.exception), (command, result.exception, result.output)
from limbeck.config.recipe import load_recipe
load_recipe("quickstart")
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


def test_a_recipe_is_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "name: bad\nteacher: x\nstudent: {start: {pretrained: y}}\nprompts: {from: builtin/everyday}\nloss: [jsd]\n"
        "train: {steps: 3, learning_rate: 0.1}\n"
    )
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "bad.yaml"), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("name", "legal", "hint"),
    [
        ("learning_rate", ["lr", "steps"], "'lr'"),
        ("Learning-Rate", ["lr", "steps"], "'lr'"),
        ("kl", ["forward_kl", "jsd", "reverse_kl"], "'forward_kl'"),
        ("cot", ["scott", "rationale", "fine-tune-cot"], "'rationale' or 'fine-tune-cot'"),
        ("cot", ["scott"], "'scott'"),  # what is meant is not legal here: what is spelt alike
        ("stepz", ["lr", "steps"], "'steps'"),
    ],
)
def test_the_fields_other_names_are_understood(name, legal, hint):
    assert nearest(name, legal) == f"; did you mean {hint}?"


def test_no_word_of_ours_has_another_meaning():
    assert not [name for name, meant in SYNONYMS.items() if name in meant]
    assert nearest("nothing like it", ["a", "b"]) == "; legal: a, b" and nearest("kl", []) == ""


def test_what_is_meant_exists():
    import limbeck
    from limbeck.config.machine import Machine
    from limbeck.config.recipe import Recipe
    from limbeck.config.section import Section
    from limbeck.config.sections import Evaluate, Lora, LossEntry, Prompts, Prune, Train, Writer
    from limbeck.config.server import Served
    from limbeck.config.teacher import Context, LocalTeacher

    sections: list[type[Section]] = [
        Machine, Recipe, Evaluate, LossEntry, Lora, Prompts, Prune, Train, Writer, Served, Context, LocalTeacher,
    ]  # fmt: skip
    known = {field.alias or name for section in sections for name, field in section.model_fields.items()}
    found = limbeck.methods()
    known |= {name for kind in ("divergences", "losses", "steps", "recipes") for name in found[kind]}
    assert {name for meant in SYNONYMS.values() for name in meant} <= known
