"""The faces that others rely on: Python names, commands and their options, frozen."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import limbeck
from limbeck.cli import app
from limbeck.config.recipe import as_yaml, parse
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.on_logits import DivergenceName, DivergenceParams
from tests.command_line import called

NAMES = [
    "ComparisonResult", "PrintingReporter", "Recipe", "RecipeError", "RunResult", "StoppedError", "UserError", "check", "compare",
    "divergence", "load_model", "load_recipe", "load_run", "methods", "run",
]  # fmt: skip
PRICES = {"--price-teacher-in", "--price-teacher-out", "--price-hour"}
RESULT = {
    "cautions",
    "folder",
    "frame",
    "items",
    "metric",
    "report",
    "rounds",
    "student",
    "summary",
    "systems",
    "verdict",
    "worth",
}
RUNS = {"recipe", "--set", "--scale", "--machine", "--out", "--json"}
COMMANDS = {
    "run": RUNS | {"--track", "--ranks"},
    "elicit": RUNS,
    "train": RUNS | {"--profile", "--track", "--ranks"},
    "evaluate": RUNS | {"--ranks"},
    "doctor": RUNS,
    "cache": RUNS | {"--import", "--export"},
    "report": {"run_folder", "--json", "--csv", "--table"} | PRICES,
    "compare": {"recipes", "--like", "--seeds", "--base", "--set", "--scale", "--out", "--keep", "--json"},
    "check": {"recipe", "--set", "--scale", "--machine", "--out", "--device-like", "--json"},
    "methods": {"name", "--json"},
    "models": {"action", "name", "--json"},
    "watch": {"run_folder", "--once"},
    "harness": {"where", "--task", "--limit", "--out", "--chat", "--base-url", "--tokenizer", "--json"},
    "serve": {"model", "--port", "--context", "--slots", "--threads", "--states", "--host", "--dtype"},
    "export": {"where", "--to", "--type", "--out", "--json"},
    "new": {
        "where", "--task", "--data", "--test", "--columns", "--teacher", "--teacher-model", "--teacher-kind", "--thinking",
        "--student", "--lora", "--learn-from", "--run-on", "--scale", "--schema", "--instruction", "--yes", "--json",
    },
    "chat": {"run_folder", "--max-tokens", "--temperature", "--device"},
    "push": {"--data", "where", "--to", "--public", "--json"},
    "why": {"what", "--run", "--recipe", "--set", "--scale", "--json"},
    "answers": {"--forget", "--prune", "--add", "--json"},
}  # fmt: skip


def test_public_names():
    assert limbeck.__all__ == NAMES and len(NAMES) <= 15
    for name in NAMES:
        assert getattr(limbeck, name).__doc__


def test_a_recipe_may_be_named_wherever_one_is_taken(recipe_data, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(parse(recipe_data)))
    plans = [limbeck.check(recipe).requests for recipe in (file, str(file), limbeck.load_recipe(file))]
    assert plans == [20, 20, 20]


def test_a_reporter_prints_plain_lines_and_seldom(capsys):
    reporter = limbeck.PrintingReporter(every=60)
    reporter.stage("Training")
    for step in range(1, 6):
        reporter.progress(step, 5, "loss 1.0")
    reporter.note("a \x1b[31mnote\n")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == ["Training", "  1/5; loss 1.0", "  5/5; loss 1.0", "  a  [31mnote "]


def test_the_command_says_its_version():
    assert called("--version") == (0, f"{limbeck.__version__}\n")


def test_results_have_these_names():
    public = {name for name in dir(limbeck.RunResult) if not name.startswith("_")} | {"folder"}
    assert public == RESULT
    assert {name for name in dir(limbeck.ComparisonResult) if not name.startswith("_")} | {"folder"} == RESULT | {
        "runs"
    }
    for name in RESULT - {"folder"}:
        assert getattr(limbeck.RunResult, name).__doc__


def test_the_parameters_of_a_divergence_are_typed_and_complete():
    """Names and parameters that a type checker knows are those that are registered."""
    ours = {name: facts for name, facts in DIVERGENCES.items() if facts.fn.__module__.startswith("limbeck.")}
    assert set(typing.get_args(DivergenceName)) == set(ours)
    assert set(DivergenceParams.__annotations__) == {key for facts in ours.values() for key in facts.defaults}
    (params,) = (hint for name, hint in typing.get_type_hints(limbeck.divergence).items() if name == "params")
    assert typing.get_args(params) == (DivergenceParams,)


def test_the_package_says_that_it_is_typed():
    assert (Path(limbeck.__file__).parent / "py.typed").is_file()


def test_commands_and_options():
    found = {}
    for command in app.registered_commands:
        options = set()
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            if name == "return":
                continue
            (info,) = hint.__metadata__
            declared = (info.default if isinstance(info.default, str) else None, *(info.param_decls or ()))
            options |= {flag for flag in declared if flag and flag.startswith("--")} or {name}
        found[command.name or command.callback.__name__] = options
        assert command.callback.__doc__ and command.epilog.startswith("Example: ")
    assert found == COMMANDS


def test_importing_the_package_and_the_command_loads_nothing_heavy():
    code = "import sys, limbeck, limbeck.cli; print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_methods_lists_every_divergence_with_formula_and_paper():
    listed = limbeck.methods()
    assert {"forward_kl", "reverse_kl", "jsd"} <= set(listed["divergences"])
    assert all(facts["formula"] and facts["paper"] for facts in listed["divergences"].values())
    assert listed["steps"]["self_instruct"]["settings"]["threshold"] == 0.7 and listed["steps"]["magpie"]["needs"] == [
        "raw",
        "text",
    ]
    assert all(facts["what"] and facts["kind"] for facts in listed["steps"].values())
    assert "quickstart" in listed["recipes"] and "everyday" in listed["tasks"]
