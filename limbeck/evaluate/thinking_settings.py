"""The settings of a budget of thinking in generation tasks, and what its metrics are called. No model in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from limbeck.elicit.thinking import OPENS

PositiveInt = Annotated[int, Field(ge=1)]
MAX_WAITS = 100
BUDGETED = ("thinking_tokens", "cut_thinking")  # what is also measured under a budget


class ThinkingSettings(BaseModel):
    """A budget of thinking, in tokens: `most` of them, or each of `budgets` in turn. `waits` is how often an end of the
    thinking is taken away and `wait` put in its place. Thinking is what the model's own marks tell, or what follows the
    mark `begin`, which is put before the answer; or, with `cue`, all that comes before these words."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    most: PositiveInt | None = None
    budgets: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    waits: Annotated[int, Field(ge=0, le=MAX_WAITS)] = 0
    wait: Annotated[str, Field(min_length=1)] = "Wait"
    begin: str | None = None
    cue: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> ThinkingSettings:
        if (self.most is None) == (self.budgets is None):
            raise ValueError("say how many tokens: most, or several budgets such as [64, 128, 256], and not both")
        if self.budgets is not None and list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must rise, each given once; got {list(self.budgets)}")
        if self.begin is not None and self.cue is not None:
            raise ValueError("give begin or cue, not both: a cue is for thinking without marks")
        if self.begin is not None and not OPENS.fullmatch(self.begin):
            raise ValueError(f"begin must be a mark that opens thinking, such as <think>; got {self.begin!r}")
        if self.cue is not None and not self.cue.strip():
            raise ValueError("cue must be words that end the thinking, such as 'Answer:'")
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        """The budgets that are measured, the smallest first."""
        return self.budgets or (self.most or 0,)

    def suffix(self, most: int) -> str:
        """What the names of the metrics at a budget end with."""
        return "" if self.budgets is None else f"@{most}"

    def said(self, text: str) -> str:
        """What is judged of a text: all of it, whose thinking its marks tell; with a cue, what follows the last one."""
        at = -1 if self.cue is None else text.lower().rfind(self.cue.lower())
        return text if self.cue is None or at < 0 else text[at + len(self.cue) :]


def thinking_of(task: Any) -> ThinkingSettings | None:
    """The budget of a task's thinking, if it has one."""
    found = getattr(task.protocol, "thinking", None)
    return found if isinstance(found, ThinkingSettings) else None


def budget_metrics(names: Sequence[str], thinking: ThinkingSettings) -> list[str]:
    """The metrics of a task under budgets, those at the largest budget first."""
    every = [*names, *BUDGETED]
    return [f"{name}{thinking.suffix(most)}" for most in reversed(thinking.levels) for name in every]
