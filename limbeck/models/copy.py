"""A copy of a model in another precision, kept up to date while the model trains."""

from __future__ import annotations

import copy

import torch
from torch import nn
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
            self._copy = copy.deepcopy(self.net)
            cast(self._copy, self.dtype)
            self._copy.requires_grad_(False)
        else:
            parameters = dict(self.net.named_parameters())
            for name, parameter in self._copy.named_parameters():
                parameter.copy_(parameters[name])
        self._copy.eval()
        return self._copy


@torch.no_grad()
def cast(net: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the type of a model's weights in place. Buffers stay as they are, as where a model is loaded in that type:
    the frequencies of rotary embeddings would lose distant positions; so do the codes of quantised weights."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # old ones are kept alive, so that their ids stay theirs
    for module in net.modules():
        for name, old in module.named_parameters(recurse=False):
            if old.is_floating_point() and old.dtype != dtype:
                if id(old) not in made:
                    made[id(old)] = old, nn.Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)
                setattr(module, name, made[id(old)][1])
