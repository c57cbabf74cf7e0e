"""A copy of a model in another precision that follows it while it trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


class Copy:
    """Made when it is first asked for, and kept; its memory is that of the weights in the other precision."""

    def __init__(self, net: PreTrainedModel, dtype: torch.dtype) -> None:
        self.net = net
        self.dtype = dtype
        self._made: PreTrainedModel | None = None

    @torch.no_grad()
    def now(self) -> PreTrainedModel:
        """The copy with the model's weights of this moment, in evaluation mode."""
        if self._made is None:
            made: Any = copy.deepcopy(self.net)  # transformers' own `to` is not typed
            self._made = made.to(self.dtype).requires_grad_(False)
            assert self._made is not None
        else:
            theirs = dict(self.net.named_parameters())
            for name, own in self._made.named_parameters():
                own.copy_(theirs[name])
        self._made.eval()
        return self._made
