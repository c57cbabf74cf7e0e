"""Case study: customers' intents, from a CSV file to two small classifiers and what they are worth; writes
docs/evidence/case-intents.json and .html.

    make case-intents DATA=path/to/banking77      # about an hour on two idle cores; killed, it goes on

The data is BANKING77 (Casanueva et al., arXiv:2003.04807, CC-BY-4.0), read from the given folder and not part of this
repository: the first INTENTS intents by name, EACH texts of each from train.csv, of which `limbeck new` holds out a
fifth. The teacher is asked with the labels and examples, the students see the text alone. One student trains all its
weights, one trains adapters; both learn the same answers, which are asked for once.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from case_study import study

INTENTS, EACH = 20, 24


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The first EACH texts of each of the first INTENTS intents."""
    texts = defaultdict(list)
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts[row["category"]].append(row["text"])
    return [{"text": text, "label": label} for label in sorted(texts)[:INTENTS] for text in texts[label][:EACH]]


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
    facts = {"intents": INTENTS, "texts": INTENTS * EACH}
    study("case-intents", given.out, ["--task", "classify", "--data", str(table)], facts)


if __name__ == "__main__":
    main()
