"""Every command and every part of a recipe that the docs show is one that Limbeck takes."""

from __future__ import annotations

import json
import re

import pytest
import typer
import yaml

from limbeck import cli
from limbeck.config.builtin import recipe_files
from limbeck.config.recipe import Recipe, load_recipe
from tests.docs_text import DOCS, PAGES, ROOT, blocks, commands, commands_of, marked_commands, name_of

COMMANDS = typer.main.get_command(cli.app).commands
COMING = {"new"} - set(COMMANDS)  # the tutorial is ahead of it
SHOWN = [(page, args) for page in PAGES for args in commands(page) if args[0] not in COMING]
OWN_FILES = re.compile(r"^(\.|runs/)|.+/.+\.ya?ml$|^(mine|my-|served)")
# blocks that are no part of a recipe, by their page and first key
OTHER_YAML = {
    ("docs/evaluation.md", "name"),
    ("docs/evaluation.md", "settings"),
    ("docs/launch.md", "apiVersion"),
    ("docs/launch.md", "name"),
}


@pytest.mark.parametrize(("page", "args"), SHOWN, ids=lambda value: None if isinstance(value, list) else value.name)
def test_a_command_parses(page, args):
    assert args[0] in COMMANDS, args
    parsed = COMMANDS[args[0]].make_context(args[0], list(args[1:])).params
    named = [parsed.get("recipe"), parsed.get("like"), *(parsed.get("recipes") or ())]
    recipes = [name for name in named if name]
    for name in recipes:
        if name in recipe_files() or (ROOT / name).is_file():
            load_recipe(name if name in recipe_files() else ROOT / name, parsed.get("overrides") or ())
        else:
            assert OWN_FILES.match(name), f"no recipe has the name {name}"


def test_commands_are_found_and_can_fail():
    assert len(SHOWN) > 40 and any(args[0] == "compare" for _, args in SHOWN)
    (found,) = commands_of("LIMBECK_API_KEY=x limbeck run quickstart \\\n  --set 'a.b={c: 1}'  # says so\nls limbeck\n")
    assert found == ["run", "quickstart", "--set", "a.b={c: 1}"]
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["run"].make_context("run", ["quickstart", "--sett", "a=1"])


def test_commands_in_prose_are_commands():
    for page in PAGES[:2] + PAGES[3:]:
        for name in re.findall(r"`limbeck ([a-z]+)[ `]", page.read_text(encoding="utf-8")):
            assert name in COMMANDS or name in COMING, (name_of(page), name)


def yaml_blocks():
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
            if (name_of(page), next(iter(yaml.safe_load(block)))) not in OTHER_YAML:
                yield pytest.param(block, id=page.name)


@pytest.mark.parametrize("block", yaml_blocks())
def test_a_part_of_a_recipe_is_legal(block, tmp_path):
    given = yaml.safe_load(block)
    assert set(given) <= set(Recipe.model_fields)
    if "name" in given:
        (tmp_path / "whole.yaml").write_text(block)
        load_recipe(tmp_path / "whole.yaml")
        return
    rest = "classify-with-a-prompt" if "elicit" in given and "writer" not in given else "quickstart"
    load_recipe(rest, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def test_the_choice_names_recipes_that_exist():
    text = (DOCS / "choose.md").read_text(encoding="utf-8")
    named = [match for row in re.findall(r"^\| .*", text, re.MULTILINE) for match in re.findall(r"\[([\w-]+)\]\(", row)]
    assert len(named) > 15 and set(named) <= set(recipe_files())


def test_some_commands_of_the_tutorial_are_run_by_a_test():
    marked = [args for page in sorted((DOCS / "tutorial").glob("*.md")) for args in marked_commands(page)]
    assert {args[0] for args in marked} >= {"check", "run", "report", "export"}


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_is_small_and_holds_no_output(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert len(cell["source"]) <= 20
