"""Decisions of a judge: the last line of what it says, which holds one word of two and nothing else."""

from __future__ import annotations

import re


def decision(said: str, word: str = "revise") -> tuple[str, bool | None]:
    """(what is said before its last line, whether that says `WORD: YES`): None where it can't be read, or where another
    line says otherwise."""
    mark = re.compile(rf"{word}:[ \t]*(yes|no)\.?", re.IGNORECASE)
    lines = [line for line in said.splitlines() if line.strip(" \t*_`")]
    found = [mark.fullmatch(line.strip(" \t*_`")) for line in lines]
    said_so = {match[1].lower() for match in found if match}
    if not lines or found[-1] is None or len(said_so) != 1:
        return said.strip(), None
    return said.rstrip()[: said.rstrip().rindex(lines[-1].strip())].strip(), "yes" in said_so
