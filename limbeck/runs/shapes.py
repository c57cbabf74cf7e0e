"""The sizes of a decoder that determine its costs, and the floor of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from limbeck.models.weights import empty_model, layer_list, text_config


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that determine its costs. `used_share` is the part of its layers' weights that a token
    passes through: less than 1 in a mixture of experts. `other_parameters` are outside of layers, embeddings and head,
    such as what reads images; `layer_vectors` are those of a layer's weights that are in no matrix (norms, biases)."""

    layers: int
    layer_parameters: int
    head_parameters: int
    width: int = 0
    heads: int = 0
    query_width: int = 0
    key_value_width: int = 0
    tied: bool = True
    used_share: float = 1.0
    other_parameters: int = 0
    layer_vectors: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Counted in the model of that configuration on the meta device; what layers have by name alone (heads) is 0
        where the configuration has no such name.

        Raises:
            UserError: the configuration describes no decoder.
        """
        net = empty_model(config)
        text: Any = text_config(net.config)
        _, layers = layer_list(net.get_decoder())
        embeddings: Any = net.get_input_embeddings()
        head: Any = net.get_output_embeddings()
        inside = sum(parameter.numel() for parameter in layers.parameters())
        tied = head.weight is embeddings.weight
        embedded = head.weight.numel() * (1 if tied else 2)
        heads = getattr(text, "num_attention_heads", None) or 0
        heads = heads if isinstance(heads, int) else 0
        head_width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        return cls(
            layers=len(layers),
            layer_parameters=inside // len(layers),
            head_parameters=head.weight.numel(),
            width=text.hidden_size,
            heads=heads,
            query_width=heads * head_width,
            key_value_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
            tied=tied,
            used_share=_used_share(layers, text, inside),
            other_parameters=max(0, sum(parameter.numel() for parameter in net.parameters()) - inside - embedded),
            layer_vectors=sum(p.numel() for p in layers.parameters() if p.dim() < 2) // len(layers),
        )

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedded_parameters + self.other_parameters

    @property
    def used_parameters(self) -> float:
        """Of all layers, those that a token passes through."""
        return self.used_share * self.layers * self.layer_parameters

    @property
    def embedded_parameters(self) -> int:
        """Those of the embeddings and the head, which may be the same."""
        return self.head_parameters if self.tied else 2 * self.head_parameters

    def joined(self, others: Sequence[Shape]) -> Shape:
        """All of them as one for counting: a single layer with all their weights."""
        shapes = (self, *others)
        layer = sum(s.layers * s.layer_parameters for s in shapes)
        head = sum(s.head_parameters for s in shapes)
        used = sum(s.used_parameters for s in shapes) / layer
        joined = replace(self, layers=1, layer_parameters=layer, head_parameters=head, used_share=used)
        return joined if others else self

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)


@dataclass(frozen=True)
class Shapes:
    """The sizes of a run's models. `teacher` and `judge` are None if they don't run in process; `others` are the other
    teachers, `scorers` the reward models."""

    student: Shape
    teacher: Shape | None = None
    others: tuple[Shape, ...] = ()
    judge: Shape | None = None
    scorers: tuple[Shape, ...] = ()


def _used_share(layers: nn.ModuleList, config: Any, inside: int) -> float:
    """Experts lie in tensors of three dimensions, the first of which counts them; a token meets a few of them."""
    met = getattr(config, "num_experts_per_tok", None)
    if not isinstance(met, int):
        return 1.0
    idle = sum(
        parameter.numel() * max(0.0, 1 - met / len(parameter))
        for parameter in layers.parameters()
        if parameter.dim() == 3
    )
    return float(1 - idle / max(1, inside))


def step_flops(student: Shape, teacher: Shape | None, tokens: int, response_tokens: int) -> float:
    """Floor of one training step: student forward and backward, teacher forward; heads on response tokens only."""
    body = 6.0 * student.used_parameters * tokens + 6.0 * student.head_parameters * response_tokens
    if teacher is not None:
        body += forward_flops(teacher, tokens, response_tokens)
    return body


def forward_flops(shape: Shape, tokens: int, response_tokens: int) -> float:
    return 2.0 * shape.used_parameters * tokens + 2.0 * shape.head_parameters * response_tokens
