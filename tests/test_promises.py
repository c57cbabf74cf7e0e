"""What docs/reliability.md promises has a test that carries its name, or says why it has none."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def table(monkeypatch):
    """docs/blocks/promises.py, which stands outside any package."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("blocks.promises")


def entries(table):
    return {name: entry for group in table.read_promises() for name, entry in group["promises"].items()}


def test_every_promise_is_proved_or_says_why_it_can_not_be(table):
    known, proved = entries(table), table.proofs()
    assert proved.keys() <= known.keys(), "a test proves what is promised nowhere"
    for name, entry in known.items():
        assert entry.keys() <= {"promise", "text", "not", "measured", "reason"} and {"promise", "text"} <= entry.keys()
        assert bool(proved.get(name)) != bool(entry.get("reason")), f"{name}: a test, or the reason why there is none"


def test_the_page_has_all_of_it(table):
    page = (ROOT / "docs" / "reliability.md").read_text()
    for name, entry in entries(table).items():
        assert f"### {entry['promise']}\n" in page and f"(`{name}`)" in page
    assert "## What is not promised" in page


def test_marks_are_found_where_they_stand_and_an_unproved_promise_is_seen(table, tmp_path):
    (tmp_path / "test_a.py").write_text(
        '@pytest.mark.promise("R1", "S2")\n@pytest.mark.long\ndef test_one():\n    pass\n\n\n'
        'def test_two():  # @pytest.mark.promise("R3")\n    pass\n'
    )
    file = tmp_path / "test_a.py"
    assert table.proofs(tmp_path) == {"R1": [(file, "test_one")], "S2": [(file, "test_one")]}
    assert table._proved_by("R9", [], "a disk can't be asked") == "No test: a disk can't be asked (`R9`)"


def test_a_misspelt_mark_is_refused(tmp_path):
    """The mark is registered, and misspelt ones are errors."""
    (tmp_path / "test_a.py").write_text('import pytest\n\n\n@pytest.mark.promis("R1")\ndef test_one():\n    pass\n')
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--collect-only", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_a.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0 and "'promis' not found in `markers`" in done.stdout
