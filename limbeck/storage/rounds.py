"""Where the rounds of a run are: `RUN/rounds/1`, ..., their stages `RUN/stages/NAME/1`, ..., their control
`RUN/at_once/3`; and `RUN/rounds.json`, which says how far they got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.storage.metrics_log import read_json

RECORD = "rounds.json"


def has_rounds(folder: Path) -> bool:
    """Whether the folder is that of a run in rounds."""
    return (folder / RECORD).exists()


def round_folder(folder: Path, number: int) -> Path:
    """The run folder of one round, counted from 1."""
    return folder / "rounds" / str(number)


def rounds_in(folder: Path) -> dict[int, Path]:
    """The folders of the rounds that have begun, by number."""
    numbers = sorted(int(path.name) for path in (folder / "rounds").glob("*") if path.name.isdecimal())
    return {number: round_folder(folder, number) for number in numbers}


def at_once_folder(folder: Path, rounds: int) -> Path:
    """The run folder of the control that stands for so many rounds."""
    return folder / "at_once" / str(rounds)


def stage_folder(folder: Path, name: str, number: int) -> Path:
    """The run folder of a stage of a round."""
    return folder / "stages" / name / str(number)


def stages_in(folder: Path) -> list[Path]:
    """The run folders of all stages that have begun."""
    return sorted(path for path in folder.glob("stages/*/*") if path.name.isdecimal())


def parts_of(folder: Path) -> list[Path]:
    """The run folders of all rounds, stages and controls that have begun."""
    controls = sorted(path for path in folder.glob("at_once/*") if path.name.isdecimal())
    return [*rounds_in(folder).values(), *stages_in(folder), *controls]


def trained_rounds(folder: Path, most: int) -> int:
    """How many of the rounds 1 to `most` have been trained."""
    return sum(0 < int(number) <= most for number in rounds_record(folder).get("rounds", {}))


def rounds_record(folder: Path) -> dict[str, Any]:
    """`place`, the folder's path when it was written; `kept`, the number of the round whose student is the run's;
    `ended`, why no more rounds follow, if they ended early; and of every finished round its `start` and `student`."""
    return read_json(folder / RECORD) or {}


def whole_of(part: Path) -> Path | None:
    """The folder of all rounds that a round, stage or control belongs to; None if it belongs to none."""
    parents = list(part.absolute().parents)[1:3]  # RUN/rounds/1, RUN/stages/NAME/1
    return next((parent for parent in parents if has_rounds(parent) and part.absolute() in parts_of(parent)), None)


def kept_round(folder: Path) -> Path:
    """The folder of the round whose student is the run's; the folder itself where it has no rounds."""
    kept = rounds_record(folder).get("kept")
    return round_folder(folder, kept) if isinstance(kept, int) else folder


def current_round(folder: Path) -> Path:
    """The folder of the newest round; the folder itself where it has none."""
    return next(reversed(rounds_in(folder).values()), folder)
