"""The house rules that a program can check: floors, sizes, and what may be imported where."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "limbeck"
FLOORS = [
    ["types"],
    ["config", "progress", "storage"],
    ["objectives", "data"],
    ["signals", "elicit", "report"],
    ["models"],
    ["training"],
    ["evaluate"],
    ["runs"],
    ["__init__"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FILES = sorted(PACKAGE.rglob("*.py"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def floor(name: str) -> int:
    found = [
        (len(room), number)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if name == room or name.startswith(room + ".")
    ]
    if found:
        return max(found)[1]  # the room named most exactly
    raise AssertionError(f"{name} has no floor: give it one in {__file__}")


@cache
def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports while it is loaded, later, or for type checkers."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "limbeck":
            inner = node.module.removeprefix("limbeck").lstrip(".")
            for alias in node.names:
                candidate = f"{inner}.{alias.name}".lstrip(".")
                is_module = (PACKAGE / Path(*candidate.split("."))).with_suffix(".py").exists()
                modules.add(candidate if is_module else inner)
    return modules - {""}


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_go_down(file):
    own = floor(module(file))
    for other in imports(file):
        assert floor(other) < own or (floor(other) == own and other.split(".")[0] == module(file).split(".")[0]), (
            f"{module(file)} imports {other}"
        )


def test_no_circle():
    TopologicalSorter({module(file): imports(file) for file in FILES}).prepare()  # CycleError names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_losses_know_tensors_only():
    for file in (PACKAGE / "objectives").glob("*.py"):
        for other in imports(file):
            assert other.startswith("objectives") or other == "types", f"{file.name} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=module)
def test_sizes(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


def is_command(node):
    return any(isinstance(by, ast.Call) and ast.unparse(by.func) == "app.command" for by in node.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=module)
def test_calls_by_keyword(file):
    """At most four positional arguments in a call, at most eight parameters of a function; a command has options."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            assert len(node.args) <= 4, f"line {node.lineno}: {ast.unparse(node.func)} has {len(node.args)} positional"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_command(node):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            assert len(names) <= 8, f"{node.name} has {len(names)} parameters"


def test_no_two_classes_of_one_name():
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module(file))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_the_root_is_small_and_the_table_short():
    assert len(list(PACKAGE.glob("*.py"))) <= 6 and len(FLOORS) <= 12
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES} == {
        name for row in FLOORS for name in row
    }


def test_every_file_has_its_line_in_the_map_of_the_house():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for file in FILES:
        folder = file.relative_to(PACKAGE).parts[0] if file.parent != PACKAGE else ""
        heading = f"**`limbeck/{folder}/`**" if folder else "**`limbeck/`**"
        section = text.split(heading, 1)[1].split("\n**`", 1)[0]
        assert f"- `{file.relative_to(PACKAGE / folder).as_posix()}`: " in section, file


def test_no_room_for_odds_and_ends():
    assert not [file for file in FILES if file.stem in {"utils", "helpers", "misc", "common"}]


@pytest.mark.parametrize("file", FILES, ids=module)
@pytest.mark.promise("S1", "S3", "S12", "S2")
def test_nothing_that_runs_what_it_reads(file):
    """No pickle, no eval, one template engine in one file, subprocesses only where weights are fetched, and where verifiers, a
    user's chat template, an exported file and the templates of a recipe's prompts need a process of their own."""
    allowed = {
        "jinja2": {"report.page", "commands.harness.run", "data.render_alone"},
        "subprocess": {
            "models.named",
            "elicit.equivalence",
            "elicit.sandbox",
            "data.render_alone",
            "commands.export.check",
        },
        **{name: set() for name in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "_pickle")},
    }
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            assert top not in allowed or module(file) in allowed[top], f"{module(file)} imports {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            assert ast.unparse(node.func.value) != "torch", "torch.load reads pickles"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in {alias.name for alias in node.names}, "torch.load reads pickles"
        if isinstance(node, ast.Attribute):
            assert node.attr != "read_pickle"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def test_no_mean_in_a_term():
    for file in (PACKAGE / "objectives").glob("*.py"):
        assert ".mean(" not in file.read_text(), file.name
