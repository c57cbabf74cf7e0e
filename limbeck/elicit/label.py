"""Requests for answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from limbeck.elicit.prompts import Prompt
from limbeck.types import Request, Sampling


def label(prompts: Sequence[Prompt], model: str, sampling: Sampling, seed: int) -> Iterator[Request]:
    """One request per prompt."""
    for prompt in prompts:
        meta = {"prompt_id": prompt.id, "kind": prompt.kind}
        yield Request(model, prompt.messages, sampling, seed, meta=meta)
