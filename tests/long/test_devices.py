"""Every kind of recipe on a device that is not the CPU; in a process of its own, since the device registers itself."""

from __future__ import annotations

import json
import subprocess
import sys


def test_every_kind_of_recipe_gives_the_cpus_losses_on_a_device():
    process = subprocess.run(
        [sys.executable, "-m", "tests.long.recipes_on_a_device"], capture_output=True, text=True, check=False
    )
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    wrong = [result for result in results if result["result"] != "same"]
    assert not wrong, json.dumps(wrong, indent=1)
    assert process.returncode == 0 and len(results) >= 60, process.stderr[-2000:]
