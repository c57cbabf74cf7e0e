"""What a model calls its cache, as an argument of `forward` and as a field of what it returns: `cache` since
transformers 5.24; before, `past_key_values`, or `cache_params` where its layers carry states alone."""

from __future__ import annotations

import inspect

from torch import nn

NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(model: nn.Module) -> str:
    """The name by which `model`, a causal model or its decoder, takes and returns its cache."""
    names = inspect.signature(model.forward).parameters
    name = next((name for name in NAMES if name in names), None)
    assert name is not None, f"{type(model).__name__}.forward takes no cache: none of {', '.join(NAMES)}"
    return name
