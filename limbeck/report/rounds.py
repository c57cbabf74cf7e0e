"""The content of the page over a run's rounds, read from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.config.yaml_text import dump_yaml, read_yaml
from limbeck.report.figures import Figure
from limbeck.report.grids import Grid
from limbeck.report.item_files import over_common_items
from limbeck.report.metrics import Metric, metrics_of, number, task_headlines
from limbeck.report.plots import Label, Series, curves
from limbeck.report.verdict import LEFT_OUT, leaks_note
from limbeck.storage.files import read_jsonl
from limbeck.storage.metrics_log import read_json
from limbeck.storage.rounds import at_once_folder, rounds_in, rounds_record, stage_folder, trained_rounds

BEFORE = "Before training"
AT_ONCE = "All at once"
OWN_TEXT = ("own_tokens", "own_finished", "own_repetition")  # where a collapse shows
OF_TEACHER = ("forward_kl", "top1_agreement")  # comparable only where all rounds have one teacher
CONTROL = 2**31  # stands for the control among the numbers of rounds, after all of them
COMMON = (
    "Rounds leave out the items that their own training text gives away: values without an interval are over the items"
    " that all rounds were asked."
)
Summaries = dict[int, dict[str, Any]]
Values = dict[int, dict[str, Any]]  # a metric by the number of the round


def rounds_content(folder: Path) -> dict[str, Any]:
    """The variables of `rounds.html.jinja`."""
    recipe = read_yaml(folder / "recipe.yaml")
    record = rounds_record(folder)
    summaries = _summaries(folder)
    metrics = round_metrics(recipe, summaries)
    values = {metric: _values(folder, metric, summaries, recipe) for metric in metrics}
    return {
        "recipe": recipe,
        "recipe_text": dump_yaml(recipe),
        "verdict": rounds_verdict(folder),
        "results": _results(values, summaries),
        "at_once": (_control_folder(folder, recipe) / "recipe.yaml").exists(),
        "links": _links(folder, recipe),
        "figures": [figure for metric in metrics if (figure := _figure(metric, values[metric]))],
        "spent": _spent(folder, recipe),
        "kept": record.get("kept"),
        "ended": record.get("ended") or "",
        "weights": [
            (_name(int(key)), [("began with", facts["start"]), ("left", facts["student"])])
            for key, facts in (record.get("rounds") or {}).items()
        ],
        "excerpt": None,
        "shown": [],
    }


def rounds_verdict(folder: Path) -> str:
    """How the students of the rounds do at the page's first task, or how far they are from a common teacher."""
    recipe = read_yaml(folder / "recipe.yaml")
    record = rounds_record(folder)
    summaries = _summaries(folder)
    planned = recipe["rounds"]["n"]
    done = sum(key > 0 for key in summaries)
    count = f"{done} of {planned} rounds" if done < planned else f"{planned} rounds" if planned > 1 else "1 round"
    text = f"{count}."
    if metrics := [metric for metric in round_metrics(recipe, summaries) if metric.better != "none"]:
        values = _values(folder, metrics[0], summaries, recipe)
        first = min(summaries) - 1
        before = f" from {number(values[first]['value'])} before training" if first in values else ""
        after = ", ".join(number(values[key]["value"]) for key in summaries if key in values)
        text = f"Over {count}, {metrics[0].title.lower()}{_where(metrics[0])} went{before} to {after}."
        if at_once := values.get(CONTROL):
            text += f" One round with as much text and as many steps reached {number(at_once['value'])}."
    ended = f" The rounds ended early: {record['ended']}." if record.get("ended") else ""
    return text + ended + leaks_note(_leaks(summaries))


def _leaks(summaries: Summaries) -> list[dict[str, str]]:
    """Every item that a round's text gives away, once, as the round has it that left it out."""
    every = [leak for summary in summaries.values() for leak in summary.get("leaks") or []]
    return list({leak["item"]: leak for leak in sorted(every, key=lambda leak: leak["kind"] in LEFT_OUT)}.values())


def round_metrics(recipe: dict[str, Any], summaries: Summaries) -> list[Metric]:
    """The metrics that can be held against each other over rounds: of every task the first, nearness to the teacher
    where that is one for all rounds, and what the students' own text is like."""
    students = [summary["systems"].get("student", {}) for summary in summaries.values()]
    if not students:
        return []
    metrics = metrics_of(next(iter(summaries.values())))
    teacher = recipe.get("teacher")
    changes = "previous" in (teacher, teacher.get("model") if isinstance(teacher, dict) else None)
    names = [*(() if changes else OF_TEACHER), *OWN_TEXT]
    own = [metrics[name] for name in names if name in metrics and all(student.get(name) for student in students)]
    return [*task_headlines(metrics, students), *own]


def _summaries(folder: Path) -> Summaries:
    """The evaluations of the rounds up to the one that is kept, and of those after it that were measured."""
    found = {key: read_json(home / "evaluation" / "summary.json") for key, home in rounds_in(folder).items()}
    return {key: summary for key, summary in found.items() if summary}


def _control_folder(folder: Path, recipe: dict[str, Any]) -> Path:
    """Where the control is that stands for all rounds of the run, if it has one."""
    return at_once_folder(folder, trained_rounds(folder, recipe["rounds"]["n"]))


def _control(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the control's student, by metric; empty without one."""
    summary = read_json(_control_folder(folder, recipe) / "evaluation" / "summary.json") or {}
    return dict(summary.get("systems", {}).get("student", {}))


def _homes(folder: Path, recipe: dict[str, Any]) -> dict[str, Path]:
    """The run folders of all rounds, of the stages before each, and of the control, by the names of their rows."""
    homes: dict[str, Path] = {}
    for key, home in rounds_in(folder).items():
        for stage in recipe["rounds"].get("stages") or {}:
            if key and (staged := stage_folder(folder, stage, key)).exists():
                homes[f"{_name(key)}: {stage}"] = staged
        homes[_name(key)] = home
    if (control := _control_folder(folder, recipe)).exists():
        homes[AT_ONCE] = control
    return homes


def _links(folder: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """The pages of the rounds and of their control, by the names of their rows."""
    pages = {name: home / "report.html" for name, home in _homes(folder, recipe).items()}
    return {name: page.relative_to(folder).as_posix() for name, page in pages.items() if page.exists()}


def _name(key: int) -> str:
    return f"Round {key}" if key else "Before the rounds"


def _where(metric: Metric) -> str:
    return f" on {metric.task}" if metric.task else ""


def _values(folder: Path, metric: Metric, summaries: Summaries, recipe: dict[str, Any]) -> Values:
    """The metric with its interval of the student before any training (under the number before the first), of every
    round's, and of the control's. Where these were not asked the same items, since each leaves out what its own text
    gives away, over those that all were asked, without intervals."""
    first, *_ = summaries
    homes = rounds_in(folder) | {CONTROL: _control_folder(folder, recipe)}
    found = {first - 1: summaries[first]["systems"].get("untouched", {}).get(metric.name)}
    found |= {key: summary["systems"]["student"].get(metric.name) for key, summary in summaries.items()}
    found |= {CONTROL: _control(folder, recipe).get(metric.name)}
    values = {key: value for key, value in found.items() if value}
    places = {key: (homes[key] / "evaluation", "student") for key in values if key in homes}
    if first - 1 in values:
        places[first - 1] = (homes[first] / "evaluation", "untouched")
    common = over_common_items(places, metric.name)
    return {key: {"value": common[key]} for key in values} if common else values


def _results(values: dict[Metric, Values], summaries: Summaries) -> Grid:
    numbers = sorted({key for by_key in values.values() for key in by_key})
    names = {key: AT_ONCE if key == CONTROL else _name(key) if key in summaries else BEFORE for key in numbers}
    rows = [(names[key], [_cell(by_key.get(key)) for by_key in values.values()]) for key in numbers]
    is_common = any("low" not in value for by_key in values.values() for value in by_key.values())
    columns = [(f"{metric.title}{_where(metric)}", _side(metric)) for metric in values]
    return Grid("Student", columns, rows, COMMON if is_common else "")


def _cell(value: dict[str, Any] | None) -> Any:
    return number(value["value"]) if value and "low" not in value else value


def _side(metric: Metric) -> str:
    side = "" if metric.better == "none" else f"{'lower' if metric.better == 'low' else 'higher'} is better"
    return ", ".join(part for part in (metric.unit, side) if part)


def _figure(metric: Metric, by_key: Values) -> Figure | None:
    values = {key: value for key, value in by_key.items() if key != CONTROL}
    if len(values) < 3:  # a line between two points shows nothing that the table doesn't
        return None
    title = f"{metric.title}{_where(metric)} by round"
    spans = [(value["low"], value["high"]) for value in values.values() if "low" in value]
    about = "The first point is the student before training."
    about += " Lines across are 95 % intervals over items." if spans else f" {COMMON}"
    label = Label(f"rounds-{metric.name.replace('/', '-')}", title, about, x_title="round", y_title=metric.unit)
    points = [(float(key), value["value"]) for key, value in values.items()]
    svg = curves(label, [Series("student", points, "accent", spans)])
    return Figure(title, svg, about) if svg else None


def _spent(folder: Path, recipe: dict[str, Any]) -> Grid:
    """What every round, its stages and the control asked, kept and trained on."""
    rows = []
    for name, home in _homes(folder, recipe).items():
        steps = (read_json(home / "elicitation.json") or {}).get("steps") or []
        records = read_jsonl(home / "metrics.jsonl")
        asked = sum(sum(step["answers"].values()) for step in steps)
        cells = [
            f"{asked:,}" if steps else "",
            f"{steps[-1]['given']:,}" if steps else "",
            f"{len(records):,}",
            f"{sum(record['response_tokens'] for record in records):,}",
            f"{sum(record['seconds'] for record in records) / 60:,.1f}",
        ]
        rows.append((name, cells))
    columns = [
        ("Answers", "asked for by steps"),
        ("Samples", "left by the steps"),
        ("Steps", "of training"),
        ("Tokens", "trained on"),
        ("Minutes", "of training"),
    ]
    return Grid("Round", columns, rows)
