"""One model's part of a running batch of generation, in the library's own cache: for models whose layers carry states
(convolutions, Mamba, linear attention), or count positions by themselves, so that rows can't be padded or moved.

Rows whose prompts are equally long share a cache: nothing is padded, so the text is the library's own. Slower than
`slots.py`: every length of prompt is a pass of its own.

Shapes: B slots, N of them, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.models.cache_name import cache_name
from limbeck.models.sample import upload
from limbeck.models.weights import head_rows


@dataclass
class _Group:
    """Rows that share a cache, by their slots; a slot that another row has taken is None."""

    slots: list[int | None]
    cache: Any


class OwnCaches:
    """As `slots.Slots`: prompts are admitted into slots, every slot is fed its last token, and `logits_BV` told."""

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        self.model = model
        self.device = model.device
        self.key = cache_name(model)
        self.groups: list[_Group] = []
        self.logits_BV = torch.zeros(size, head_rows(model), device=self.device)

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Prefill new rows, those of one length together."""
        self._forget(slots)
        lengths: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            lengths.setdefault(len(prompt), []).append(number)
        for numbers in lengths.values():
            tokens_NT = torch.tensor([list(prompts[number]) for number in numbers])
            group = _Group([slots[number] for number in numbers], None)
            self._run(group, upload(tokens_NT, self.device))
            self.groups.append(group)

    def step(self, last_B: Tensor, running: Sequence[int]) -> None:
        """Feed every slot its last token."""
        live = set(running)
        self.groups = [group for group in self.groups if live & set(group.slots)]
        last_B = last_B.to(self.device)
        for group in self.groups:
            slots_N = upload(torch.tensor([slot or 0 for slot in group.slots]), self.device)
            self._run(group, last_B[slots_N][:, None])

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots."""
        number = {slot: new for new, slot in enumerate(slots)}
        for group in self.groups:
            group.slots = [None if slot is None else number.get(slot) for slot in group.slots]
        self.logits_BV = self.logits_BV[upload(torch.tensor(list(slots)), self.device)]

    def _run(self, group: _Group, tokens_NT: Tensor) -> None:
        known = {} if group.cache is None else {self.key: group.cache}
        told = self.model(input_ids=tokens_NT, use_cache=True, **known)
        group.cache = getattr(told, self.key)
        for row, slot in enumerate(group.slots):
            if slot is not None:
                self.logits_BV[slot] = told.logits[row, -1].float()

    def _forget(self, slots: Sequence[int]) -> None:
        taken = set(slots)
        for group in self.groups:
            group.slots = [None if slot in taken else slot for slot in group.slots]
