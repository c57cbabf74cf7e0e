"""What a real vLLM answered, as `tests/engines/record_vllm.py` wrote it down; servers that play vLLM answer in these shapes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures" / "vllm-0.32"
TOKEN = re.compile(r"^(token_id:)?\d+$")


@cache
def _text(name: str) -> str:
    return (FIXTURES / f"{name}.json").read_text(encoding="utf-8")


def recorded(name: str) -> tuple[int, Any]:
    """(status, answer) of one call, to be changed at will."""
    found = json.loads(_text(name))
    return found["status"], found["answer"]


def shape(value: Any) -> Any:
    """Keys and types of an answer, without its values; of a list, those of its first element; of token ids, that they are."""
    if isinstance(value, dict):
        return {TOKEN.sub("TOKEN", key): shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value[:1]]
    return type(value).__name__
