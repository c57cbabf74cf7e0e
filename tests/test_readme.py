"""The README's numbers are the ones that a command of ours wrote."""

from __future__ import annotations

import json
from pathlib import Path

from limbeck.config.recipe import load_recipe
from limbeck.report.page import verdict
from limbeck.report.table import markdown
from limbeck.types import content_hash

ROOT = Path(__file__).parent.parent


def test_the_result_table_is_the_measured_one():
    summary = json.loads((ROOT / "docs" / "evidence" / "quickstart.json").read_text())
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## What the quickstart shows\n")[2].partition("\n## ")[0]
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert set(tables) <= set(markdown(summary).splitlines()) and len(tables) > 10
    assert verdict(summary) in " ".join(section.split())
    now = content_hash(load_recipe("quickstart").resolved())
    assert summary["recipe"] == now, "measure again: the recipe is not the one that was measured"


def test_the_tutorial_quotes_the_measured_differences():
    printed = markdown(json.loads((ROOT / "docs" / "evidence" / "quickstart.json").read_text()))
    page = (ROOT / "docs" / "tutorial" / "5-prove-and-ship.md").read_text()
    quoted = [line.split(" ", 3)[3] for line in page.splitlines() if line.startswith("> ") and " KL " in line]
    assert len(quoted) == 2 and all(figures in printed for figures in quoted)


def test_every_page_of_the_docs_is_on_the_map():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme
