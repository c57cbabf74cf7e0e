"""The tutorial's marked commands and the notebook, run as they stand, with the real teacher: some minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.docs_text import DOCS, ROOT, marked_commands

QUESTIONS = (
    "question,answer,agent\n" + "".join(f"What is {n} plus {n}?,{n + n},mia\n" for n in range(1, 10)) + ",x,mia\n"
)


def limbeck(args: list[str], where: Path) -> str:
    """What a command prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *args], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"limbeck {' '.join(args)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_marked_commands_of_the_tutorial_run(tmp_path):
    (tmp_path / "questions.csv").write_text(QUESTIONS)
    printed = []
    for page in sorted((DOCS / "tutorial").glob("*.md")):
        for args in marked_commands(page):
            printed.append(limbeck(args, tmp_path))
    first = tmp_path / "runs" / "first"
    assert (first / "report.html").is_file() and "| Student |" in "".join(printed)
    assert "9 rows with question as the prompt" in "".join(printed)
    assert list(first.glob("exports/gguf-q8_0/*.gguf")) and list(first.glob("exports/ollama-q8_0/Modelfile"))
    assert json.loads((tmp_path / "runs/gkd/evaluation/summary.json").read_text())["systems"]["student"]


def test_the_cells_of_the_notebook_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "first_distillation.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["summary"]["systems"]["student"]["forward_kl"]["value"] > 0
    assert bool((names["values"] > 0).all())
