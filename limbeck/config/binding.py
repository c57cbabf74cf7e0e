"""What a run folder is bound to: the parts of a recipe that its text and training, or its evaluation, depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config.server import LIMITS_ALONE

PAGE = ("title", "paper")
EVALUATION = "evaluate"
HOW_MANY_ROUNDS = ("n", "stop")


def training_part(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What text and training depend on: not the evaluation, the page's words, how often to save, how many rounds there
    are, or a server's limits. All that may change under a run."""
    data = {key: value for key, value in resolved.items() if key not in (*PAGE, EVALUATION)}
    if isinstance(data.get("train"), Mapping):
        data["train"] = _without(data["train"], ("save_seconds",))
    if isinstance(data.get("rounds"), Mapping):
        data["rounds"] = _without(data["rounds"], HOW_MANY_ROUNDS)
    teacher = data.get("teacher")
    if isinstance(teacher, Mapping) and isinstance(teacher.get("server"), Mapping):
        data["teacher"] = {**teacher, "server": _without(teacher["server"], LIMITS_ALONE)}
    return data


def evaluation_part(resolved: Mapping[str, Any]) -> list[Any]:
    """What the summary depends on beside the training: the evaluation, and the price in its bill."""
    teacher = resolved.get("teacher")
    server = teacher.get("server") if isinstance(teacher, Mapping) else None
    return [resolved.get(EVALUATION), server.get("price") if isinstance(server, Mapping) else None]


def _without(section: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}
