"""How large micro-batches may be on a device: what the user says, what its memory suggests, and what has fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.models.placement import describe, free_bytes
from limbeck.models.sharding import held
from limbeck.storage.files import write_json
from limbeck.storage.metrics_log import read_json
from limbeck.training import distributed
from limbeck.types import Batch, UserError

ACTIVATION_BYTES = 33  # for the backward pass, per token and layer, as a multiple of the width; measured on decoders
LARGEST = 2**16  # tokens; more gains nothing


@dataclass
class Room:
    """How many padded tokens of a micro-batch fit the device; `tokens` is None where they are left as the text has
    them. What was learned is kept in `room.json`, and holds for the same device only."""

    file: Path
    device: torch.device
    tokens: int | None

    @classmethod
    def begin(cls, folder: Path, net: PreTrainedModel, micro_tokens: int | None) -> Room:
        """The user's size, or what should fit the device, but no more than what did fit before."""
        device = net.device
        tokens = micro_tokens if micro_tokens is not None else _derived(net)
        before: Any = read_json(folder / "room.json") or {}
        if before.get("device") == describe(device):
            tokens = min(tokens or before["micro_tokens"], before["micro_tokens"])
        return cls(folder / "room.json", device, tokens)

    def shrink(self, batches: Sequence[Batch], reason: str, together: bool) -> None:
        """Halve the size after memory ran out in one of these micro-batches; `reason` says where.

        Raises:
            UserError: they are as small as they can be.
        """
        largest = max(batches, key=lambda batch: batch.tokens_BT.numel())
        units = len(largest.groups) if together else len(largest.tokens_BT)
        if units == 1:
            what = "the answers to one prompt" if together else "one row"
            raise UserError(
                f"there is no room for {what} of {largest.tokens_BT.numel()} tokens ({reason});"
                " no step was taken: set machine.checkpointing=true, train.precision=bfloat16, student.lora or"
                " teacher.quantise, or shorten the text"
            )
        self.tokens = max(16, largest.tokens_BT.numel() // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if distributed.rank() == 0:
            write_json(self.file, {"device": describe(self.device), "micro_tokens": self.tokens})


def _derived(net: PreTrainedModel) -> int | None:
    """What should fit. None on the CPU, and where the device does not say what is free."""
    free = free_bytes(net.device)
    if free is None:
        return None
    config: Any = net.config.get_text_config()
    trained = held(parameter for parameter in net.parameters() if parameter.requires_grad)
    return tokens_within(free, trained, layers=config.num_hidden_layers, width=config.hidden_size)


def tokens_within(free: int, trained: int, *, layers: int, width: int) -> int:
    """How many tokens should fit where so many bytes are free: in half of them, once there are gradients and moments of
    the trained parameters."""
    per_token = ACTIVATION_BYTES * layers * width * 4
    return int(min(LARGEST, max(1024, (free - 12 * trained) / 2 / per_token)))
