"""Every wait for a GPU leaves it idle until the host has caught up: at most two for each step of generation, in whatever
way rows are written, and nothing goes up while the same rows write."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.devices.write_on_pretend_gpu import WAYS


@pytest.mark.long
def test_a_step_waits_twice_at_most_and_writes_the_text_of_the_cpu():
    program = [sys.executable, "-m", "tests.devices.write_on_pretend_gpu"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen["ways"]) == set(WAYS)
    for way, cost in seen["ways"].items():
        assert cost["same"], f"{way}: other ids than on the CPU"
        assert sum(cost["waits"].values()) <= 2 * seen["steps"], f"{way}: {cost['waits']}"
        assert sum(cost["uploads"].values()) < seen["steps"], f"{way}: {cost['uploads']}"  # where one row leaves
