"""How often a training step waits for its device.

A micro-batch: once for the sums, once for backward's factor, and once in each model's pass, where transformers asks
whether the rows are packed. A step: once for the gradient's norm.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.parametrize("losses", [["forward_kl"], ["reverse_kl", "cross_entropy"]])
def test_a_step_waits_four_times_a_micro_batch_and_once(losses):
    command = [sys.executable, "-m", "tests.devices.step_waits", json.dumps(losses)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    counted = json.loads(process.stdout.splitlines()[-1])
    assert counted["micro_batches"] >= 2
    assert 0 < sum(counted["waits"].values()) <= 4 * counted["micro_batches"] + 1, counted
