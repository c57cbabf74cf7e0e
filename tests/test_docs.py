"""docs/objectives.md says what the code does: generated blocks, examples, links."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.config.recipe import load_recipe
from limbeck.objectives.distribution import Distribution
from limbeck.objectives.divergence_loss import DIVERGENCES
from limbeck.objectives.registry import LOSSES
from limbeck.runs.resolve import resolve, terms_of
from limbeck.signals.sparse import Sampled, TextSignal, TopK
from limbeck.types import UserError

IN_PROSE = {"cross_entropy", "consistency", "dual_space", "bradley_terry"}  # described in words, not in a table
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "objectives.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def generator(monkeypatch):
    """docs/generate.py as a module, which is a script beside its own package."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_generated_blocks_are_up_to_date(generator):
    for page in generator.PAGES:
        text = page.read_text(encoding="utf-8")
        assert generator.generated(text) == text, "run python docs/generate.py"
    assert set(re.findall(r"<!-- generated: (\w+) -->", TEXT)) == {
        "divergences",
        "ranking",
        "features",
        "policy",
        "head",
    }


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if name not in IN_PROSE])
def test_every_loss_has_its_row(name):
    assert f"\n| `{name}` |" in TEXT


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_table_is_right_about_signals(name):
    """What the columns say is what the signals accept."""
    q, ids_N = Distribution(torch.linspace(-1, 1, 10).view(2, 5)), torch.tensor([0, 3])
    ids_NK, share_NK = torch.tensor([[0, 1], [3, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    found = []
    for signal in (TopK(ids_NK, share_NK.log()), Sampled(ids_NK, share_NK), TextSignal(ids_N)):
        try:
            values_N, _ = signal.compare(DIVERGENCES[name], DIVERGENCES[name].defaults, q, ids_N)
            found.append("yes" if values_N.isfinite().all() else "no")
        except UserError:
            found.append("no")
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
    assert cells[4:7] == found


def test_the_python_example_runs():
    (code,) = blocks("python")
    after = "assert values_N.shape == (4,) and (values_N > 0).all() and student.grad.abs().sum() > 0"
    subprocess.run([sys.executable, "-c", f"{code}\n{after}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_yaml_examples_are_legal_losses(block):
    entries = yaml.safe_load(block)["loss"]
    recipe = load_recipe("quickstart", [f"loss={json.dumps(entries)}"])
    assert len(terms_of(recipe)) == len(entries)


def test_the_head_table_is_made_from_what_the_benchmark_writes(generator, tmp_path, monkeypatch):
    module, cost = generator.evidence, {"times_the_floor": 1.5, "lowest": 1.25, "highest": 2.0, "peak_extra_mib": 1234}
    results = {"jsd": {"2048": cost, "8192": cost}, "naive forward_kl": {"2048": cost}}
    results["floor"] = {size: {"seconds": 0.5, "gflop_per_second": 80.0} for size in ("2048", "8192")}
    monkeypatch.setattr(module, "HEAD", tmp_path / "head.json")
    assert "run python benchmarks/head.py" in module.head()
    module.HEAD.write_text(json.dumps({"machine": {"device": "cpu"}, "results": results}))
    assert "| naive forward_kl | 1.50 (1.25 to 2.00) | 1,234 |  |  |" in module.head().splitlines()


def test_the_on_policy_table_is_made_from_what_the_benchmark_writes(generator, tmp_path, monkeypatch):
    module, run = generator.evidence, {"trained": 100.4, "real": 200.0, "writing": 0.25, "peak_mib": 2345}
    monkeypatch.setattr(module, "ON_POLICY", tmp_path / "on-policy.json")
    assert "run python benchmarks/on_policy.py" in module.on_policy()
    module.ON_POLICY.write_text(
        json.dumps({"about": {"rows": 8}, "results": {"limbeck": [run, run | {"trained": 110.4}]}})
    )
    assert "| limbeck | 105 (100 to 110) | 200 | 25 % | 2,345 |" in module.on_policy().splitlines()


@pytest.mark.parametrize(
    "block", re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "writers.md").read_text(), re.DOTALL)
)
def test_the_yaml_examples_of_writers_are_legal(block):
    settings = [f"{key}={json.dumps(value)}" for key, value in yaml.safe_load(block).items()]
    resolve(load_recipe("quickstart", settings))
