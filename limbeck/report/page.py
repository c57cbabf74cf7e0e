"""One self-contained HTML page from a run folder: no script, no network, every text escaped.

Reads files only; imports nothing that trains. Text that a model wrote reaches the page through the template engine's
escaping and nowhere else; colours are numbers made here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from limbeck.durable import read_jsonl, write_text
from limbeck.types import UserError

LABELS = {
    "teacher": "Teacher",
    "untouched": "Student before training",
    "sft_control": "Fine-tuning control",
    "student": "Student",
}
METRICS = {
    "forward_kl": ("Forward KL", "nats a token", "low"),
    "reverse_kl": ("Reverse KL", "nats a token", "low"),
    "jsd": ("Jensen-Shannon", "nats, at most 0.69", "low"),
    "top1_agreement": ("Same first choice", "share of tokens", "high"),
    "perplexity": ("Perplexity", "teacher's text", "low"),
}
SATURATED_NATS = 4.0
CHART = (640, 220, 44)


def write_report(folder: Path) -> Path:
    """Build `report.html` in a run folder.

    Raises:
        UserError: the folder holds no evaluation.
    """
    summary = read_summary(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    page = _template().render(
        recipe=recipe,
        recipe_text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        summary=summary,
        labels=LABELS,
        verdict=verdict(summary),
        table=_table(summary),
        differences=_differences(summary),
        chart=_chart(folder),
        answers=_answers(folder),
        cost=_cost(folder),
        start=_start(folder),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def read_summary(folder: Path) -> dict[str, Any]:
    """The measurements of a run folder.

    Raises:
        UserError: there are none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    file = folder / "evaluation" / "summary.json"
    if not file.exists():
        raise UserError(f"{folder} holds no evaluation/summary.json: run `limbeck evaluate` first")
    return dict(json.loads(file.read_text()))


def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = _number
    return environment.get_template("page.html.jinja")


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 20 else f"{round(value, 3) + 0.0:.3f}"


def verdict(summary: dict[str, Any]) -> str:
    """One sentence that claims no more than the paired interval allows."""
    systems, paired = summary["systems"], summary["paired"]
    kl = systems["student"]["forward_kl"]
    text = f"The student stays {kl['value']:.2f} nats per token ({kl['low']:.2f} to {kl['high']:.2f}) from its teacher"
    if "untouched" in systems:
        change = paired["student - untouched"]["forward_kl"]
        before = f"{systems['untouched']['forward_kl']['value']:.2f}"
        moved = "down from" if change["high"] < 0 else "up from" if change["low"] > 0 else "with no clear change from"
        text += f", {moved} {before} before training"
    difference = paired.get("student - sft_control", {}).get("forward_kl")
    if difference is None:
        return text + "."
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if high < 0:
        return f"{text}; it is nearer than fine-tuning on the same text by {-value:.3f} nats ({-high:.3f} to {-low:.3f})."
    if low > 0:
        return f"{text}; fine-tuning on the same text came nearer, by {value:.3f} nats ({low:.3f} to {high:.3f})."
    return f"{text}; against fine-tuning on the same text the difference, {value:+.3f} nats ({low:+.3f} to {high:+.3f}), may be chance."


def _metric(name: str) -> dict[str, str]:
    task, _, measure = name.rpartition("/")
    title, unit, good = METRICS.get(name, (measure.replace("_", " ").capitalize(), f"task {task}", "high"))
    return {"name": name, "title": title, "unit": unit, "good": good}


def _table(summary: dict[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(metric for system in summary["systems"].values() for metric in system))
    ordered = [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]
    rows = [(name, [summary["systems"][name].get(metric) for metric in ordered]) for name in summary["systems"]]
    return {"metrics": [_metric(name) for name in ordered], "rows": rows}


def _differences(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Per pair and metric the difference, and whether its interval leaves 0 out, and on which side."""
    found = []
    for pair, metrics in summary["paired"].items():
        against = pair.removeprefix("student - ")
        for name, interval in metrics.items():
            lower_is_better = name == "nll" or _metric(name)["good"] == "low"
            better = interval["high"] < 0 if lower_is_better else interval["low"] > 0
            worse = interval["low"] > 0 if lower_is_better else interval["high"] < 0
            title = "Negative log-likelihood" if name == "nll" else _metric(name)["title"]
            found.append({"against": against, "title": title, "interval": interval,
                          "verdict": "better" if better else "worse" if worse else "no clear difference"})  # fmt: skip
    return found


@dataclass(frozen=True)
class Line:
    """One curve as SVG points, with its last value."""

    label: str
    points: str
    last: float


def _chart(folder: Path) -> dict[str, Any] | None:
    """The training losses by step. Each has its own unit (its own objective), so only the falling is comparable."""
    series = {}
    for name, place in (("student", folder), ("sft_control", folder / "controls" / "sft_control")):
        records = read_jsonl(place / "metrics.jsonl")
        if len(records) > 1:
            series[name] = [(record["step"], record["loss"]) for record in records]
    if not series:
        return None
    width, height, margin = CHART
    right = max(step for points in series.values() for step, _ in points)
    top = max(loss for points in series.values() for _, loss in points) * 1.05

    def place_point(step: float, loss: float) -> str:
        x = margin + (width - margin - 10) * (step - 1) / max(1, right - 1)
        return f"{x:.1f},{10 + (height - 40) * (1 - loss / top):.1f}"

    lines = [Line(name, " ".join(place_point(*p) for p in points), points[-1][1]) for name, points in series.items()]
    ticks = [(round(top * share, 2), 10 + (height - 40) * (1 - share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"width": width, "height": height, "margin": margin, "lines": lines, "ticks": ticks, "steps": right}


def _answers(folder: Path) -> list[dict[str, Any]]:
    """The held-out questions that the lens was taken of, with every system's answer."""
    lens: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in read_jsonl(folder / "evaluation" / "lens.jsonl"):
        lens.setdefault(record["prompt_id"], {})[record["writer"]] = [_token(*token) for token in record["tokens"]]
    by_system = {
        name: {record["prompt_id"]: record for record in read_jsonl(folder / "evaluation" / f"answers-{name}.jsonl")} for name in LABELS
    }
    texts = {record["prompt_id"]: record["prompt"] for record in read_jsonl(folder / "evaluation" / "prompts.jsonl")}
    return [
        {
            "id": prompt_id,
            "prompt": texts.get(prompt_id, prompt_id),
            "systems": [(name, given[prompt_id]) for name, given in by_system.items() if prompt_id in given],
            "lens": found,
        }
        for prompt_id, found in lens.items()
    ]


def _token(text: str, nats: float, teacher: str, student: str) -> dict[str, Any]:
    """A token with its share of the colour scale: 0 at no divergence, 1 at SATURATED_NATS and above."""
    strength = min(1.0, (nats / SATURATED_NATS) ** 0.5) if nats > 0 else 0.0
    title = f"{nats:.2f} nats; teacher's first choice {teacher!r}, student's {student!r}"
    return {"text": text, "percent": round(100 * strength), "title": title}


def _cost(folder: Path) -> list[tuple[str, int, int, float]]:
    """(system, trained tokens, steps, minutes) of every training."""
    found: list[tuple[str, int, int, float]] = []
    for name, place in (("student", folder), ("sft_control", folder / "controls" / "sft_control")):
        records: Sequence[dict[str, Any]] = read_jsonl(place / "metrics.jsonl")
        if records:
            tokens = sum(record["response_tokens"] for record in records)
            found.append((name, tokens, len(records), round(sum(record["seconds"] for record in records) / 60, 1)))
    return found


def _start(folder: Path) -> dict[str, Any]:
    file = folder / "start.json"
    return {"drops": []} | (json.loads(file.read_text()) if file.exists() else {})
