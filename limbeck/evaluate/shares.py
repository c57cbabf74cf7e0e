"""How an evaluation is shared by the ranks of a run: each measures its part of the items of every system, rank 0 writes
the records of all.

All ranks go through the same systems and files in the same order; whether a file is there is for rank 0 to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from limbeck.storage.files import write_text
from limbeck.training import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """Over all ranks, or, unless `over_ranks`, this process alone."""

    over_ranks: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return not self.over_ranks or distributed.rank() == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank measures."""
        return distributed.in_turns(items) if self.over_ranks else items

    def all(self, part: Sequence[T]) -> list[T]:
        """The records of all items in their order, from this rank's and those of the others."""
        return distributed.gather_in_turns(part) if self.over_ranks else list(part)

    def is_missing(self, file: Path) -> bool:
        if not self.over_ranks:
            return not file.exists()
        return distributed.from_first(lambda: not file.exists())

    def write(self, file: Path, text: str) -> None:
        """Write a file that all ranks can read afterwards."""
        if self.leads:
            write_text(file, text)
        if self.over_ranks:
            distributed.wait()


ALONE = Shares()
