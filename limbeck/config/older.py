"""Recipes in run folders of older versions: what a field meant that they do not have.

`recipe.yaml` of a run has every setting with a value. A field that came later, or whose default was none, is absent: it
stood for what its version did, not for today's default. Whoever changes a default raises `FORMAT` and says in `ABSENT`
what absence meant until then (a test holds the defaults against those of a golden folder).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INPUTS = "inputs.json"
FORMAT_NAME = "format"  # in inputs.json: the format of the folder; older ones have none
FORMAT = 1
ABSENT: dict[int, dict[str, Any]] = {}  # by the last format in which absence meant it: values by the field's path


def format_of(folder: Path) -> int:
    """The format that a run folder names; 0 for one that names none."""
    try:
        return int(json.loads((folder / INPUTS).read_text(encoding="utf-8")).get(FORMAT_NAME, 0))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return 0


def filled(resolved: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe of a run folder with the fields that it lacks and that meant something else than today's default."""
    data = copy.deepcopy(dict(resolved))
    since = format_of(folder)
    for number in sorted(ABSENT):
        for path, value in ABSENT[number].items() if since <= number else ():
            *outer, last = path.split(".")
            place: Any = data
            for key in outer:
                place = place.get(key) if isinstance(place, dict) else None
            if isinstance(place, dict):  # a section that is absent is not used
                place.setdefault(last, copy.deepcopy(value))
    return data
