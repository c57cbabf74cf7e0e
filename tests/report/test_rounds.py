"""The page over rounds: each leaves out what its own text gives away, so values are held against each other over the same items."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from limbeck.report.item_files import over_common_items
from limbeck.report.page import write_report
from limbeck.report.rounds import rounds_content, rounds_verdict
from limbeck.runs.rounds import RoundsRun
from limbeck.storage.rounds import at_once_folder, round_folder
from tests.report_folders import around, write_lines


def measured(home, systems, leaks=()):
    """A round's evaluation: of each system the scores of items 0, 1, ...; None for one that was left out."""
    facts = {"title": "Accuracy", "unit": "", "better": "high", "group": "Task mine", "role": "headline"}
    summary = {"systems": {}, "metrics": {"mine/acc": facts}, "leaks": [*leaks]}
    for name, scores in systems.items():
        of = {f"mine/{n}": float(score) for n, score in enumerate(scores) if score is not None}
        write_lines(
            home / "evaluation" / f"task-mine+{name}.jsonl",
            [{"item": item, "scores": {"acc": score}} for item, score in of.items()],
        )
        summary["systems"][name] = {"mine/acc": around(sum(of.values()) / len(of), n=len(of))}
    (home / "evaluation" / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def folder(tmp_path):
    recipe = {
        "name": "mine",
        "title": "Mine",
        "paper": "",
        "teacher": "t",
        "rounds": {"n": 2, "restart": "base", "at_once": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rounds.json").write_text(
        json.dumps({"rounds": {str(n): {"start": "", "student": ""} for n in (1, 2)}})
    )
    return tmp_path


def leak(number, kind="exact"):
    return {"item": f"mine/{number}", "training": "t", "kind": kind, "excerpt": "e"}


def test_rounds_are_held_against_each_other_over_the_items_of_all(folder):
    """Round 2 leaves out the two items that all get right, and is no worse for it."""
    measured(round_folder(folder, 1), {"untouched": [1, 1, 0, 0, 0, 0], "student": [1, 1, 1, 0, 0, 0]}, [leak(5, "same_but_for_numbers")])  # fmt: skip
    measured(round_folder(folder, 2), {"student": [None, None, 1, 1, 0, 0]}, [leak(0), leak(1), leak(0, "overlap")])
    measured(at_once_folder(folder, 2), {"student": [1, 1, 1, 1, 1, 0]})
    said = rounds_verdict(folder)
    assert "went from 0.000 before training to 0.250, 0.500." in said and "as many steps reached 0.750." in said
    assert said.endswith(" 3 evaluation items were found in the training text, 2 of them left out and 1 counted.")
    grid = rounds_content(folder)["results"]
    assert dict(grid.rows)["Round 2"] == ["0.500"] and "over the items that all rounds were asked" in grid.note
    shutil.copytree(round_folder(folder, 2) / "evaluation", folder / "evaluation")
    assert grid.note in write_report(folder).read_text()


def test_rounds_over_the_same_items_are_what_their_summaries_say(folder):
    for number in (1, 2):
        measured(round_folder(folder, number), {"untouched": [0, 0], "student": [1, 0]})
    assert rounds_content(folder)["results"].rows[1] == ("Round 1", [around(0.5, n=2)])
    assert rounds_verdict(folder).endswith("to 0.500, 0.500.")


def test_a_round_is_better_than_the_one_before_over_the_same_items(folder):
    run = RoundsRun(None, type("Rounds", (), {"n": 3, "stop": "mine/acc"})(), folder, None, None, ())
    run.record = {"rounds": {str(n): {"contents": n} for n in (1, 2)}}
    measured(round_folder(folder, 1), {"untouched": [0] * 6, "student": [1, 1, 1, 0, 0, 0]})
    measured(round_folder(folder, 2), {"student": [None, None, 1, 1, 0, 0]})
    assert run.no_more(2) == "", "0.5 is no more than 0.5, but 0.25 on these items"
    measured(round_folder(folder, 2), {"student": [1, 1, None, 0, 0, 0]})
    assert run.no_more(2) == "mine/acc of round 2 is 0.4, no better than 0.4 of round 1"


def test_other_metrics_are_means_over_tokens_or_answers(tmp_path):
    for name, items in (("a", "xy"), ("b", "y")):
        facts = [{"prompt_id": item, "tokens": 2 + (item == "y"), "sums": {"nll": 6.0, "top1": 1.5}} for item in items]
        write_lines(tmp_path / f"fidelity-{name}.jsonl", facts)
        write_lines(tmp_path / f"own-{name}.jsonl", [one | {"finished": True, "repetition": None} for one in facts])
    systems = {name: (tmp_path, name) for name in "ab"}
    found = {
        name: over_common_items(systems, name).get("a") for name in ("top1_agreement", "own_tokens", "own_finished")
    }
    assert found == {"top1_agreement": 0.5, "own_tokens": 3.0, "own_finished": 1.0}
    assert over_common_items(systems, "perplexity")["a"] == pytest.approx(2.718281828**2)
    assert over_common_items(systems, "own_repetition") == over_common_items(systems, "ece") == {}
    assert over_common_items({"a": systems["a"]}, "nll") == {}
