"""What a run folder is bound to: the parts of a recipe that its text and training, or its evaluation, depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config.server import LIMITS_ALONE

PAGE = ("title", "paper")
EVALUATION = "evaluate"
HOW_MANY_ROUNDS = ("n", "stop", "at_once")


def training_part(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What text and training depend on: not the evaluation, the page's words, how often to save, how many rounds there
    are, what they are compared with, or a server's limits. All that may change under a run."""
    data = {key: value for key, value in resolved.items() if key not in (*PAGE, EVALUATION)}
    if isinstance(data.get("train"), Mapping):
        data["train"] = _without(data["train"], ("save_seconds",))
    if isinstance(data.get("rounds"), Mapping):
        data["rounds"] = _without(data["rounds"], HOW_MANY_ROUNDS)
    teacher = data.get("teacher")
    if isinstance(teacher, Mapping) and isinstance(teacher.get("server"), Mapping):
        data["teacher"] = _unlimited(teacher)
    asked = _texts([data.get("elicit"), data.get("rounds")])
    models = {name: _unlimited(model) for name, model in (data.pop("models", None) or {}).items() if name in asked}
    return data | ({"models": models} if models else {})


def evaluation_part(resolved: Mapping[str, Any]) -> list[Any]:
    """What the summary depends on beside the training: the evaluation with its judge, and the prices in its bills."""
    models = resolved.get("models") or {}
    evaluation = resolved.get(EVALUATION) or {}
    judge = models.get(evaluation.get("judge")) if isinstance(evaluation, Mapping) else None
    prices = {name: price for name, model in models.items() if (price := _price(model)) is not None}
    parts = [resolved.get(EVALUATION), _price(resolved.get("teacher"))]
    return [*parts, _unlimited(judge), prices] if models else parts


def _price(model: Any) -> Any:
    server = model.get("server") if isinstance(model, Mapping) else None
    return server.get("price") if isinstance(server, Mapping) else None


def _unlimited(model: Any) -> Any:
    """A model without its server's limits, and of several addresses with the first."""
    if not isinstance(model, Mapping) or not isinstance(model.get("server"), Mapping):
        return model
    server = _without(model["server"], LIMITS_ALONE)
    if isinstance(server.get("url"), list | tuple):
        server["url"] = server["url"][0]
    return {**model, "server": server}


def _texts(value: Any) -> set[str]:
    """All texts that stand in it: a model that no step names asks for no training text."""
    if isinstance(value, str):
        return {value}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return set[str]().union(*map(_texts, parts))


def _without(section: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}
