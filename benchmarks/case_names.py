"""Case study: the parts of people's names as JSON of a schema, and what two small students of it are worth; writes
docs/evidence/case-names.json and .html.

    pip download --no-deps --no-binary :all: probablepeople==0.5.6      # and unpack it
    make case-names DATA=path/to/probablepeople-0.5.6                   # killed, it goes on

The data is the labelled names of probablepeople (The Atlanta Journal Constitution and DataMade, MIT), read from the
given folder and not part of this repository: NAMES names of at least two words, evenly over its file, without couples,
nicknames and cut surnames, which the schema has no place for. `limbeck new` holds out a fifth. The teacher is held to
the schema; the students see the name alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

from case_study import study

NAMES = 400
PARTS = {
    "PrefixMarital": "prefix",
    "PrefixOther": "prefix",
    "GivenName": "given",
    "FirstInitial": "given",
    "MiddleName": "middle",
    "MiddleInitial": "middle",
    "Surname": "surname",
    "SuffixGenerational": "suffix",
    "SuffixOther": "suffix",
}
MEANING = {
    "prefix": "title, such as Dr. or Mrs.",
    "given": "first name or its initial",
    "middle": "middle names or initials",
    "surname": "family name",
    "suffix": "what follows the name, such as Jr. or PhD",
}
INSTRUCTION = (
    "Split the person's name into its parts, each written as in the text without commas; a part that is missing is an"
    " empty string. The schema:"
)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Names with the JSON that is right."""
    rows: dict[str, dict[str, str]] = {}
    file = folder / "name_data" / "labeled" / "person_labeled.xml"
    for name in ElementTree.parse(file).getroot():  # noqa: S314 (a published file)
        words = [(part.tag, (part.text or "").strip()) for part in name]
        if len(words) < 2 or any(tag not in PARTS for tag, _ in words):
            continue
        parts = dict.fromkeys(MEANING, "")
        for tag, word in words:
            parts[PARTS[tag]] = f"{parts[PARTS[tag]]} {word.strip(',')}".strip()
        text = " ".join(word for _, word in words)
        rows.setdefault(text.casefold(), {"text": text, "label": json.dumps(parts, ensure_ascii=False)})
    found = list(rows.values())
    return [found[place * len(found) // NAMES] for place in range(NAMES)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/case-names"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names, schema = given.out / "names.jsonl", given.out / "schema.json"
    names.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(given.data)))
    properties = {part: {"type": "string", "description": words} for part, words in MEANING.items()}
    form = {"type": "object", "properties": properties, "required": list(MEANING), "additionalProperties": False}
    schema.write_text(json.dumps(form))
    arguments = ["--task", "extract", "--data", str(names), "--schema", str(schema), "--instruction", INSTRUCTION]
    study("case-names", given.out, arguments, {"names": NAMES})


if __name__ == "__main__":
    main()
