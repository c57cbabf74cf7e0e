"""All losses by name. A file that defines a loss registers it here; `objectives/__init__.py` imports those files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from limbeck.objectives.loss import Loss
from limbeck.types import RecipeError, nearest

LOSSES: dict[str, Loss] = {}
AnyLoss = TypeVar("AnyLoss", bound=Loss)


def register(loss: AnyLoss) -> AnyLoss:
    """Add a loss to the registry under its name."""
    assert loss.name not in LOSSES, f"two losses are named {loss.name}"
    LOSSES[loss.name] = loss
    return loss


def loss_named(name: str, path: str = "") -> Loss:
    """The loss of this name. RecipeError, with the place in the recipe and the nearest name, if there is none."""
    if name not in LOSSES:
        raise RecipeError(path, f"no loss is named {name!r}{nearest(name, LOSSES)}")
    return LOSSES[name]


class LossesOf(Mapping[str, AnyLoss]):
    """The registered losses of one class, as they are now."""

    def __init__(self, kind: type[AnyLoss]) -> None:
        self.kind = kind

    def _losses(self) -> dict[str, AnyLoss]:
        return {name: loss for name, loss in LOSSES.items() if isinstance(loss, self.kind)}

    def __getitem__(self, name: str) -> AnyLoss:
        return self._losses()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses())

    def __len__(self) -> int:
        return len(self._losses())
