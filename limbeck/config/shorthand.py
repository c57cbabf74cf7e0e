"""The short forms of a recipe, written out: `loss: [forward_kl]`, `elicit: [answer]`, `evaluate: [fidelity]`."""

from __future__ import annotations

from typing import Any

from limbeck.types import RecipeError

OLD_TAGS = {"best": "chosen", "rest": "rejected"}  # as recipes once called the answers of a preference

MEASURED_BY_SCORES = {"metrics": ["preference"], "controls": ["untouched"]}  # by default, of a student that scores


def expand(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a recipe with its short forms written out; the mapping itself is changed."""
    if isinstance(data.get("loss"), list):
        data["loss"] = [_loss(entry, f"loss[{index}]") for index, entry in enumerate(data["loss"])]
    if isinstance(data.get("elicit"), list):
        data["elicit"] = [_step(entry, f"elicit[{index}]") for index, entry in enumerate(data["elicit"])]
        if data["elicit"] and "writer" not in data:
            data["writer"] = [{"by": "elicited"}]
    if isinstance(rollout := data.get("rollout"), dict) and isinstance(rollout.get("rewards"), list):
        rewards = [_reward(entry, f"rollout.rewards[{index}]") for index, entry in enumerate(rollout["rewards"])]
        data["rollout"] = rollout | {"rewards": rewards}
    if isinstance(data.get("evaluate"), list):
        data["evaluate"] = {"metrics": data["evaluate"]}
    student, evaluate = data.get("student"), data.get("evaluate", {})
    if isinstance(student, dict) and student.get("head") == "scalar" and isinstance(evaluate, dict):
        data["evaluate"] = MEASURED_BY_SCORES | evaluate
    return data


def _loss(entry: Any, path: str) -> Any:
    named = _named(entry, path, "loss", "- jsd: {teacher_share: 0.5}")
    if named is not entry and "weight" in named["params"]:
        named["weight"] = named["params"].pop("weight")
    params = named.get("params") if isinstance(named, dict) else None
    if isinstance(params, dict) and isinstance(params.get("only"), str):
        only = params["only"]
        named = named | {"params": params | {"only": OLD_TAGS.get(only, only)}}
    return named


def _reward(entry: Any, path: str) -> Any:
    if isinstance(entry, dict) and isinstance(entry.get("model"), str):
        entry = {"model": {"path": entry["model"]}} if len(entry) == 1 else entry
    if isinstance(entry, dict) and isinstance(entry.get("judge"), str) and len(entry) == 1:
        entry = {"judge": {"rate": {"by": entry["judge"]}}}
    named = _named(entry, path, "reward", "- length: {most: 200, weight: 0.5}")
    if named is not entry and "weight" in named["params"]:
        named["weight"] = named["params"].pop("weight")
    return named


def _step(entry: Any, path: str) -> Any:
    return _named(entry, path, "step", "- answer: {temperature: 0.7}")


def _named(entry: Any, path: str, what: str, example: str) -> Any:
    """Expand `NAME` or `NAME: {parameters}` to {"name": ..., "params": ...}."""
    if isinstance(entry, str):
        return {"name": entry, "params": {}}
    if not isinstance(entry, dict) or "name" in entry:
        return entry
    if len(entry) != 1:
        raise RecipeError(path, f"give one {what} per list entry, such as `{example}`; got {entry!r}")
    ((name, params),) = entry.items()
    if not isinstance(params, dict | None):
        raise RecipeError(f"{path}.{name}", f"parameters must be a mapping; got {params!r}")
    return {"name": name, "params": dict(params or {})}
