"""Systems measured in processes of their own, in turns, so that other work on the machine slows all alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def in_turns(
    script: str, names: Sequence[str], student: Path, folder: Path, *, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What `SCRIPT NAME STUDENT WORK` prints last, as JSON, for every name, once a round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for number, name in enumerate(names):
            work = folder / f"{turn}-{number}"
            work.mkdir()
            command = [sys.executable, script, name, str(student), str(work)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)  # noqa: S603 (ours)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(turn, name, found[name][-1], flush=True)
    return found
