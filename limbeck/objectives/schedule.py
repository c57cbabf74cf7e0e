"""Numbers that change during the training: a term's weight or one of its parameters.

A schedule is a pure function of progress (0 at the first step, 1 after the last) and, for the adaptive ones, of a small
state that the loop stores in its checkpoint with the weights, so that a resumed run continues with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from limbeck.types import RecipeError, nearest

Shape = Literal["constant", "linear", "cosine", "step", "adaptive", "plateau", "measured"]
State = dict[str, float]
KEYS = {
    "constant": set(),
    "linear": {"over"},
    "cosine": {"over"},
    "step": {"at"},
    "adaptive": {"rate", "momentum"},
    "plateau": {"rise", "tolerance"},
    "measured": set(),
}


@dataclass(frozen=True)
class Schedule:
    """A number from `start` to `end`.

    - constant: `start`.
    - linear, cosine: over the first `over` of the training, then `end`.
    - step: `start` before `at` of the training, `end` from there on.
    - adaptive: TAID's rule (arXiv:2501.16937): at least linear, and faster while the term's loss falls relative to the
      step before. Its code feeds the rule a cross-entropy; here it is the term's own loss.
    - plateau: DistiLLM's threshold (arXiv:2402.03898): rises by `rise` whenever the loss it watches has grown by
      `tolerance` since it last rose.
    - measured: what the term itself measured at the previous step (KTO's baseline); `start` at the first step.
    """

    start: float
    end: float
    shape: Shape = "constant"
    over: float = 1.0
    at: float = 0.5
    rate: float = 5e-4
    momentum: float = 0.99
    rise: float = 0.1
    tolerance: float = 0.1

    @property
    def remembers(self) -> bool:
        """Whether the number depends on observed losses, not on progress alone."""
        return self.shape in ("adaptive", "plateau", "measured")

    def value(self, progress: float, state: Mapping[str, float] | None = None) -> float:
        """The number at `progress`, between 0 and 1."""
        if self.remembers:
            return self.start if not state else state["value"]
        if self.shape == "constant":
            return self.start
        if self.shape == "step":
            return self.start if progress < self.at else self.end
        part = min(1.0, progress / self.over)
        eased = part if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * part))
        return self.start + (self.end - self.start) * eased

    def after(self, state: Mapping[str, float] | None, progress: float, observed: float) -> State:
        """The state after a step that ended at `progress`; `observed` is the watched loss, or the measurement."""
        if self.shape == "measured":
            return {"value": observed}
        return self._adapted(state, progress, observed) if self.shape == "adaptive" else self._risen(state, observed)

    def _adapted(self, state: Mapping[str, float] | None, progress: float, loss: float) -> State:
        value = self.value(progress, state)
        speed, drop = (state["speed"], (state["loss"] - loss) / (state["loss"] + 1e-15)) if state else (0.0, 0.0)
        speed = self.momentum * speed + (1 - self.momentum) * drop
        ahead = value + self.rate / (1 + math.exp(-max(-60.0, min(60.0, speed)))) * (1 - value)
        value = min(self.end, max(self.start + (self.end - self.start) * progress, ahead))
        return {"value": value, "speed": speed, "loss": loss}

    def _risen(self, state: Mapping[str, float] | None, loss: float) -> State:
        if not state:
            return {"value": self.start, "loss": loss}
        if loss < state["loss"] + self.tolerance:
            return dict(state)
        return {"value": min(self.end, state["value"] + self.rise), "loss": loss}


def make_schedule(raw: object, path: str, check: Callable[[str, object], float]) -> Schedule:
    """A number, or `{from: 0.4, to: 1.0, shape: linear}`, as a schedule; `check` says whether a value is legal.

    Raises:
        RecipeError: a shape or key that does not exist, or an end that `check` refuses.
    """
    if not isinstance(raw, Mapping):
        value = check(path, raw)
        return Schedule(value, value)
    shape = raw.get("shape", "linear")
    # `measured` is chosen by the loss, not by a recipe
    legal = tuple(name for name in get_args(Shape) if name not in ("constant", "measured"))
    if shape not in legal:
        raise RecipeError(f"{path}.shape", f"no schedule has the shape {shape!r}{nearest(str(shape), legal)}")
    keys = {"from", "to", "shape"} | KEYS[shape]
    for key in raw:
        if key not in keys:
            raise RecipeError(f"{path}.{key}", f"a {shape} schedule has no such key{nearest(str(key), keys)}")
    for key in ("from", "to"):
        if key not in raw:
            raise RecipeError(path, "a schedule needs `from` and `to`, such as {from: 0.4, to: 1.0, shape: linear}")
    start, end = (check(f"{path}.{key}", raw[key]) for key in ("from", "to"))
    if shape in ("adaptive", "plateau") and end < start:
        raise RecipeError(path, f"a schedule of the shape {shape} rises; {start:g} to {end:g} falls")
    numbers = {key: _fraction(f"{path}.{key}", raw[key]) for key in KEYS[shape] if key in raw}
    return Schedule(start, end, shape, **numbers)


def _fraction(path: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(path, f"{value!r} is not a number in (0, 1]")
    return float(value)
