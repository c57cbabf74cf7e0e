"""What a run has paid the servers of its models for, from its store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.config.named_models import TEACHER
from limbeck.config.recipe import Recipe
from limbeck.config.server import Served
from limbeck.storage.store import Store
from limbeck.storage.tries import Tries


@dataclass(frozen=True)
class Bills:
    """The bills in `store.sqlite` of `folder`.

    Args:
        identity: returns a model's name in request keys, by its name in the recipe.
    """

    recipe: Recipe
    folder: Path
    identity: Callable[[str], str]

    def server(self, by: str) -> Served | None:
        """The server of the teacher, or of another model by its name."""
        named = self.recipe.models or {}
        return self.recipe.teacher.server if by == TEACHER else named[by].server if by in named else None

    def paid(self, by: str) -> tuple[int, int, int]:
        """(answers, tokens read, tokens written) that the model's server billed."""
        with Store(self.folder / "store.sqlite") as store:
            return store.bill(self.identity(by))

    def unmetered(self, by: str) -> int:
        """How many of those answers the server did not count the tokens of."""
        with Store(self.folder / "store.sqlite") as store:
            return store.unmetered(self.identity(by))

    def usage_of(self, keys: Sequence[str]) -> tuple[int, int, int]:
        """(answers, tokens read, tokens written) of the answers to these requests whose tokens a server counted."""
        with Store(self.folder / "store.sqlite") as store:
            return store.usage_of(keys)

    def reused(self, by: str) -> tuple[int, int, int]:
        """(answers, tokens read, tokens written) that earlier runs were billed for and this one took over."""
        with Store(self.folder / "store.sqlite") as store:
            return store.reused(self.identity(by))

    def tries(self, by: str) -> Tries:
        """The tries at the model's server."""
        with Store(self.folder / "store.sqlite"):  # makes the file
            return Tries(self.folder / "store.sqlite", self.identity(by))

    def unanswered(self, by: str) -> tuple[int, int]:
        """(tries that may have been billed and have no answer, the tokens that they cost at most)."""
        return self.tries(by).unanswered()

    def money(self, by: str) -> float | None:
        """The cost of the answers so far by the recipe's price; None without one."""
        _, read, written = self.paid(by)
        return self.price(read, written, by)

    def price(self, read: int, written: int, by: str) -> float | None:
        """What so many tokens cost by the recipe's price; None without one."""
        server = self.server(by)
        if server is None or server.price is None:
            return None
        return (read * server.price.input + written * server.price.output) / 1e6
