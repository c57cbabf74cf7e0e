"""The sizes of a decoder that determine its costs, and the floor of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.types import UserError

SIZES = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that determine its costs."""

    layers: int
    layer_parameters: int
    head_parameters: int
    width: int = 0
    heads: int = 0
    query_width: int = 0
    key_value_width: int = 0
    tied: bool = True

    @classmethod
    def of(cls, config: Any) -> Shape:
        missing = [name for name in SIZES if getattr(config, name, None) is None]
        if missing:
            raise UserError(
                f"models of type {getattr(config, 'model_type', '?')!r} are not supported: their configuration has no"
                f" {missing[0]}"
            )
        width = config.hidden_size
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or width // heads
        key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_width
        attention = 2 * width * heads * head_width + 2 * width * key_value
        layer = attention + 3 * width * config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            layer_parameters=layer,
            head_parameters=config.vocab_size * width,
            width=width,
            heads=heads,
            query_width=heads * head_width,
            key_value_width=key_value,
            tied=bool(getattr(config, "tie_word_embeddings", True)),
        )

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedded_parameters

    @property
    def embedded_parameters(self) -> int:
        """Those of the embeddings and the head, which may be the same."""
        return self.head_parameters if self.tied else 2 * self.head_parameters

    def joined(self, others: Sequence[Shape]) -> Shape:
        """All of them as one for counting: a single layer with all their weights."""
        shapes = (self, *others)
        layer = sum(s.layers * s.layer_parameters for s in shapes)
        head = sum(s.head_parameters for s in shapes)
        return replace(self, layers=1, layer_parameters=layer, head_parameters=head) if others else self

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)


def step_flops(student: Shape, teacher: Shape | None, tokens: int, response_tokens: int) -> float:
    """Floor of one training step: student forward and backward, teacher forward; heads on response tokens only."""
    body = 6.0 * student.layers * student.layer_parameters * tokens + 6.0 * student.head_parameters * response_tokens
    if teacher is not None:
        body += (
            2.0 * teacher.layers * teacher.layer_parameters * tokens + 2.0 * teacher.head_parameters * response_tokens
        )
    return body


def forward_flops(shape: Shape, tokens: int, response_tokens: int) -> float:
    return 2.0 * shape.layers * shape.layer_parameters * tokens + 2.0 * shape.head_parameters * response_tokens
