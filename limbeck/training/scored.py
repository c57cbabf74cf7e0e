"""What the rewards of a step's answers come to: sums, means, and groups that teach nothing.

Shapes: G prompts of a step, K answers to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from limbeck.objectives.rewards import equal_groups


@dataclass(frozen=True)
class Scored:
    """The rewards of a step's answers.

    Args:
        total: the weighted sum of an answer's rewards, None if one of them can't be told; one list for each prompt.
        parts: the mean of each reward alone, by its name.
        unread: how many answers have a reward that can't be told.
        why: of the rewards that say why they can't be told, how many say what; by "REWARD_WORD".
    """

    total: list[list[float | None]]
    parts: Mapping[str, float]
    unread: int
    why: Mapping[str, int] = field(default_factory=dict)

    @property
    def teaches_nothing(self) -> list[bool]:
        """Whether no answer to a prompt can be told from the others, for each prompt: fewer than two have a reward, or
        all have the same."""
        told = [sum(reward is not None for reward in group) for group in self.total]
        return [same or count < 2 for same, count in zip(self.equal, told, strict=True)]

    @property
    def equal(self) -> list[bool]:
        """Whether all answers to a prompt have the same reward, for each prompt."""
        return [bool(same) for same in equal_groups(*self.tensors())]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards [G, K], who has one [G, K])."""
        reward_GK = torch.tensor([[reward or 0.0 for reward in group] for group in self.total], dtype=torch.float64)
        return reward_GK, torch.tensor([[reward is not None for reward in group] for group in self.total])

    @property
    def facts(self) -> dict[str, float]:
        """Mean and deviation of the rewards that can be told, each reward's mean, equal groups: for the metrics."""
        told = [reward for group in self.total for reward in group if reward is not None]
        mean = sum(told) / max(1, len(told))
        spread = (sum((reward - mean) ** 2 for reward in told) / max(1, len(told))) ** 0.5
        parts = self.parts.items() if len(self.parts) > 1 else ()
        return {
            "reward": round(mean, 4),
            "reward_deviation": round(spread, 4),
            **{f"reward_{name}": round(value, 4) for name, value in parts},
            "equal_groups": round(sum(self.equal) / len(self.total), 4),
            **({"unread_rewards": self.unread} if self.unread else {}),
            **self.why,
        }
