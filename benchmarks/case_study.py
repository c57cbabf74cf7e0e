"""What the case studies share: a teacher behind llama.cpp, `limbeck new`, two students, and the figures of each.

A study is killed and goes on: the teacher's answers, the runs and the server's port stay in its folder.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.commands.serve import KEY, serve
from limbeck.storage.files import write_json

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
TEACHER = "qwen2.5-coder-1.5b-instruct"  # the strongest model known by name that answers on two cores
STUDENTS = {  # the control that learns the data's own answers is trained once
    "full": [],
    "adapters": [
        "--set=student.lora={rank: 16, alpha: 32}",
        "--set=train.lr=1.0e-3",
        "--set=evaluate.controls=[untouched]",
    ],
}


def limbeck(*arguments: str) -> float:
    """Run the command; the seconds that it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "limbeck", *arguments], check=True)  # noqa: S603 (our own command)
    return time.perf_counter() - began


def figures(run: Path) -> dict[str, Any]:
    """What the run says of its systems on the task, their sizes and speeds."""
    report = subprocess.run(  # noqa: S603 (our own command)
        [sys.executable, "-m", "limbeck", "report", str(run), "--json"], check=True, capture_output=True, text=True
    )
    said = json.loads(report.stdout)
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    return {
        "verdict": said["verdict"],
        "systems": {
            name: {metric: value for metric, value in metrics.items() if "task" in metric}
            for name, metrics in summary["systems"].items()
        },
        "efficiency": summary.get("efficiency", {}),
        "answers": json.loads((run / "answers.json").read_text()),
        "steps": [
            {key: step[key] for key in ("step", "taken", "given")}
            for step in json.loads((run / "elicitation.json").read_text())["steps"]
        ],
    }


def study(
    name: str, folder: Path, arguments: Sequence[str], facts: dict[str, Any], students: Sequence[str] = tuple(STUDENTS)
) -> None:
    """From a file of data to the students; writes docs/evidence/NAME.json and the first student's page.

    Args:
        folder: where all that the study makes is kept.
        arguments: of `limbeck new`, without the teacher.
        facts: about the data, for the JSON file.
        students: which of STUDENTS.
    """
    os.environ.setdefault(KEY, secrets.token_urlsafe(24))
    port = folder / "port"  # the same at every start, since it is part of the recipe
    server = serve(
        TEACHER, port=int(port.read_text()) if port.exists() else 0, context=2048, slots=4, threads=os.cpu_count()
    )
    port.write_text(server.url.rpartition(":")[2].partition("/")[0])
    made = folder / "made"
    if not made.exists():
        limbeck("new", str(made), *arguments, "--teacher", server.url, "--teacher-model", server.name, "--yes")
    record = folder / "seconds.json"  # of all calls that came to their end
    seconds: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    found = {}
    for student in students:
        run = folder / student
        spent = limbeck("run", str(made / "recipe.yaml"), *STUDENTS[student], "--out", str(run))
        seconds[student] = seconds.get(student, 0.0) + spent
        write_json(record, seconds)
        found[student] = figures(run)
    shutil.copy(folder / "full" / "report.html", EVIDENCE / f"{name}.html")
    write_json(EVIDENCE / f"{name}.json", facts | {"teacher": TEACHER, "seconds": seconds, "students": found})
