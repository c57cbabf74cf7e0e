"""A copy of a model in another precision, kept up to date while the model trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


class Copy:
    """A lazy copy: made at the first `now`, then reused; it takes the memory of the weights in the other precision."""

    def __init__(self, net: PreTrainedModel, dtype: torch.dtype) -> None:
        self.net = net
        self.dtype = dtype
        self._copy: PreTrainedModel | None = None

    @torch.no_grad()
    def now(self) -> PreTrainedModel:
        """The copy with the model's present weights, in evaluation mode."""
        if self._copy is None:
            net: Any = copy.deepcopy(self.net)  # transformers' own `to` is not typed
            self._copy = net.to(self.dtype).requires_grad_(False)
            assert self._copy is not None
        else:
            parameters = dict(self.net.named_parameters())
            for name, parameter in self._copy.named_parameters():
                parameter.copy_(parameters[name])
        self._copy.eval()
        return self._copy
