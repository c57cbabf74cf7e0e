"""The page's part on classifications and extractions: confusions, figures per label and per field, worst examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.grids import Grid
from limbeck.report.item_files import questions, task_records
from limbeck.report.metrics import label, number, percent

MOST_COLUMNS = 20  # labels of a matrix; with more, only the commonest confusions are listed
MOST_CONFUSIONS = 20
MOST_LABELS = 40
WORST = 8
MAX_TEXT = 400


@dataclass(frozen=True)
class LabelSection:
    """What the page shows of one classification or extraction."""

    task: str
    key: str
    grids: list[tuple[str, str, Grid]] = field(default_factory=list)  # (caption, key, table)
    worst: Grid | None = None


def label_sections(folder: Path, summary: dict[str, Any]) -> list[LabelSection]:
    """One section per classification and per extraction of a run; empty without any."""
    sections = []
    for number_, (task, facts) in enumerate((summary.get("by_label") or {}).items()):
        student = facts["systems"].get("student")
        if student is not None:
            key = f"labels-{number_}"
            shown = [
                ("What the student says for each true label", f"{key}-confusions", _confusions(facts, student)),
                ("Precision, recall and F1 of each label", f"{key}-figures", _figures(facts, student)),
            ]
            section = LabelSection(task, key, shown, _worst(folder / "evaluation", task))
            sections.append(section)
    for number_, (task, fields) in enumerate((summary.get("by_field") or {}).items()):
        key = f"fields-{number_}"
        sections.append(LabelSection(task, key, [("Share of exact values, by field", f"{key}-table", _fields(fields))]))
    return sections


def _confusions(facts: dict[str, Any], student: dict[str, Any]) -> Grid:
    """A matrix, or with many labels the commonest confusions."""
    labels = facts["labels"]
    counts = {(truth, chosen): times for truth, chosen, times in student["confusions"]}
    used = [n for n in range(len(labels)) if n < len(labels) - 1 or any(chosen == n for _, chosen in counts)]
    if len(used) <= MOST_COLUMNS:
        rows = [
            (labels[truth], [f"{counts[truth, chosen]:,}" if (truth, chosen) in counts else "–" for chosen in used])
            for truth in used
            if truth < len(labels) - 1
        ]
        note = "Rows are true labels, columns what the student said; right answers are on the diagonal."
        return Grid("True label", [(labels[n], "") for n in used], rows, note)
    teacher = facts["systems"].get("teacher", {}).get("confusions", [])
    theirs = {(truth, chosen): times for truth, chosen, times in teacher}
    wrong = sorted(((pair, times) for pair, times in counts.items() if pair[0] != pair[1]), key=lambda item: -item[1])
    body = [
        (
            labels[truth],
            [
                labels[chosen],
                f"{times:,}",
                percent(times / student["by_label"][truth]["items"]),
                f"{theirs.get((truth, chosen), 0):,}" if teacher else "",
            ],
        )
        for (truth, chosen), times in wrong[:MOST_CONFUSIONS]
    ]
    left = len(wrong) - len(body)
    note = f"The {len(body)} commonest of {len(wrong):,} confusions; all are in summary.json." if left > 0 else ""
    columns = [("Said instead", ""), ("Times", ""), ("Share", "of the label's items"), ("Teacher", "times")]
    return Grid("True label", columns, body, note)


def _figures(facts: dict[str, Any], student: dict[str, Any]) -> Grid:
    """Precision, recall and F1 of the student, F1 of the others; the worst labels first, macro F1 above them."""
    labels = facts["labels"]
    others = [name for name in facts["systems"] if name != "student"]
    order = sorted(range(len(labels) - 1), key=lambda n: (student["by_label"][n]["f1"] or {}).get("value", 0.0))
    shown = [n for n in order if student["by_label"][n]["items"] or student["by_label"][n]["chosen"]]

    def f1(name: str, n: int) -> Any:
        return facts["systems"][name]["by_label"][n]["f1"]

    rows: list[tuple[str, list[Any]]] = [
        (
            "Mean of all labels (macro F1)",
            [
                f"{sum(of['items'] for of in student['by_label']):,}",
                "–",
                "–",
                student["macro_f1"],
                *(facts["systems"][name]["macro_f1"] for name in others),
            ],
        )
    ]
    for n in shown[:MOST_LABELS]:
        of = student["by_label"][n]
        undefined = "never said"
        cells = [f"{of['items']:,}", of["precision"] or undefined, of["recall"] or "–", of["f1"] or "–"]
        rows.append((labels[n], [*cells, *(f1(name, n) or "–" for name in others)]))
    left = len(shown) - MOST_LABELS
    note = "The worst labels first." + (f" {left} more labels are in summary.json." if left > 0 else "")
    columns = [("Items", ""), ("Precision", ""), ("Recall", ""), ("F1", "student")]
    return Grid("Label", [*columns, *(("F1", label(name).lower()) for name in others)], rows, note)


def _worst(folder: Path, task: str) -> Grid | None:
    """The student's wrong answers: the surest first, or without probabilities those that the teacher gets right."""
    asked = questions(folder)
    teacher = {record["item"]: record for record in task_records(folder, task, "teacher")}
    wrong = [record for record in task_records(folder, task, "student") if not _is_right(record)]

    def rank(record: dict[str, Any]) -> tuple[float, bool]:
        theirs = teacher.get(record["item"])
        return -(_confidence(record) or 0.0), not (theirs is not None and _is_right(theirs))

    rows = []
    for record in sorted(wrong, key=rank)[:WORST]:
        question = asked.get(record["item"], {})
        theirs = teacher.get(record["item"])
        sure = _confidence(record)
        cells = [
            _shortened(question.get("text", "")),
            _shortened(question.get("answer", "")),
            _shortened(record.get("text", "")) or "(nothing)",
            "" if sure is None else percent(sure),
            _shortened(theirs.get("text", "")) if theirs else "",
        ]
        rows.append((record["item"], cells))
    if not rows:
        return None
    titles = [("Asked", ""), ("Right", ""), ("Student", ""), ("Sure", "the student's probability"), ("Teacher", "")]
    kept = [n for n in range(len(titles)) if any(cells[n] for _, cells in rows)]
    note = f"{len(rows)} of {number(len(wrong))} wrong answers; all are in evaluation/."
    return Grid("Item", [titles[n] for n in kept], [(name, [cells[n] for n in kept]) for name, cells in rows], note)


def _is_right(record: dict[str, Any]) -> bool:
    facts = record.get("facts", {})
    if budgets := facts.get("budgets"):
        facts = budgets[max(budgets, key=int)]  # whose text the record has
    return bool(facts["chosen"] == facts.get("answer") if "chosen" in facts else facts.get("passed"))


def _confidence(record: dict[str, Any]) -> float | None:
    facts = record.get("facts", {})
    shares, chosen = facts.get("probabilities"), facts.get("chosen")
    return float(shares[chosen]) if shares and isinstance(chosen, int) and chosen < len(shares) else None


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _fields(fields: dict[str, Any]) -> Grid:
    names = list(dict.fromkeys(name for of_systems in fields.values() for name in of_systems))
    rows = [
        (
            field_name,
            [f"{max(x['n'] for x in of_systems.values()):,}", *(of_systems.get(name) for name in names)],
        )
        for field_name, of_systems in fields.items()
    ]
    return Grid("Field", [("Items", ""), *((label(name), "") for name in names)], rows)
