"""Case study: customers' intents, from a CSV file to two small classifiers and what they are worth; writes
docs/evidence/case-intents.json and .html.

    make case-intents DATA=path/to/banking77      # about an hour on two idle cores; killed, it goes on

The data is BANKING77 (Casanueva et al., arXiv:2003.04807, CC-BY-4.0), read from the given folder and not part of this
repository: the first INTENTS intents by name, EACH texts of each from train.csv, of which `limbeck new` holds out a
fifth. The teacher is the strongest model known by name that answers on two cores, behind the packaged llama.cpp; it is
asked with the labels and examples, the students see the text alone. One student trains all its weights, one trains
adapters; both learn the same answers, which are asked for once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from limbeck.commands.serve import KEY, serve
from limbeck.storage.files import write_json

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
TEACHER = "qwen2.5-coder-1.5b-instruct"
INTENTS, EACH = 20, 24
ADAPTERS = ["--set=student.lora={rank: 16, alpha: 32}", "--set=train.lr=1.0e-3"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The first EACH texts of each of the first INTENTS intents."""
    texts = defaultdict(list)
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts[row["category"]].append(row["text"])
    return [{"text": text, "label": label} for label in sorted(texts)[:INTENTS] for text in texts[label][:EACH]]


def limbeck(*arguments: str) -> float:
    """Run the command; the seconds that it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "limbeck", *arguments], check=True)  # noqa: S603 (our own command)
    return time.perf_counter() - began


def figures(run: Path) -> dict[str, Any]:
    """What the run says of its systems on the task, their size and speed."""
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
        "sizes": summary["sizes"],
        "answers": json.loads((run / "answers.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/case-intents"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = given.out / "intents.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows_of(given.data))
    os.environ.setdefault(KEY, secrets.token_urlsafe(24))
    port = given.out / "port"  # the same at every start, since it is part of the recipe
    server = serve(TEACHER, port=int(port.read_text()) if port.exists() else 0, context=2048, slots=2)
    port.write_text(server.url.rpartition(":")[2].partition("/")[0])
    folder = given.out / "intents"
    if not folder.exists():
        limbeck("new", str(folder), *f"--task classify --data {table} --teacher {server.url}".split(),
                "--teacher-model", server.name, "--yes")  # fmt: skip
    recipe = str(folder / "recipe.yaml")
    seconds, found = {}, {}
    for name, overrides in {"full": [], "adapters": ADAPTERS}.items():
        run = given.out / name
        seconds[name] = limbeck("run", recipe, *overrides, "--out", str(run))
        found[name] = figures(run)
    shutil.copy(given.out / "full" / "report.html", EVIDENCE / "case-intents.html")
    write_json(
        EVIDENCE / "case-intents.json",
        {"intents": INTENTS, "texts": INTENTS * EACH, "teacher": TEACHER, "seconds": seconds, "students": found},
    )


if __name__ == "__main__":
    main()
