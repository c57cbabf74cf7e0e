"""Case study: grade-school maths, from worked solutions that come to the right result to a small student; writes
docs/evidence/case-maths.json and .html.

    make case-maths DATA=path/to/gsm8k      # some hours on two cores; killed, it goes on

The data is GSM8K (Cobbe et al., arXiv:2110.14168, MIT), read from the given folder and not part of this repository: the
first TRAINED problems of train.jsonl, of which those solutions of the teacher are learnt that come to the result, and
the first TESTED of test.jsonl, on which every system is measured.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from case_study import study

TRAINED, TESTED = 150, 300
INSTRUCTION = (
    "Solve the problem step by step in a few short lines, one calculation a line, without LaTeX. End with a line of the"
    " form: The answer is ..."
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/case-maths"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for part, most in (("train", TRAINED), ("test", TESTED)):
        with (given.data / f"{part}.jsonl").open(encoding="utf-8") as file:
            rows = [json.dumps(json.loads(line)) for line in islice(file, most)]
        (given.out / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    data = ["--data", str(given.out / "train.jsonl"), "--test", str(given.out / "test.jsonl")]
    arguments = ["--task", "reason", *data, "--instruction", INSTRUCTION]
    study("case-maths", given.out, arguments, {"trained": TRAINED, "tested": TESTED}, students=["full"])


if __name__ == "__main__":
    main()
