"""What a distillation is worth: costs by stated prices alone, JSON and CSV for programs, labels, fields, the first screen."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.report.data import COLUMNS, as_csv, as_data, rows
from limbeck.report.glance import example, glance_grid, price_note, worth_facts, worth_figure, worth_grid
from limbeck.report.item_files import all_items, item_files
from limbeck.report.labels import label_sections
from limbeck.report.page import read_comparison, read_summary, write_report
from limbeck.report.prices import Prices, prices_of, state_prices, stated_prices
from limbeck.report.worth import compared_worth, worth
from limbeck.storage.files import read_jsonl
from limbeck.types import UserError
from tests.report_folders import interval, labelled, make_comparison, make_run, write_lines


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", prompts=4)


def changed(folder, **parts):
    file = folder / "evaluation" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return read_summary(folder)


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def worth_of(folder):
    return worth(folder, read_summary(folder), recipe_of(folder))


def test_without_prices_there_are_tokens_and_seconds_and_no_money(folder):
    found = worth_of(folder)
    assert found["prices"] == {"teacher_in": None, "teacher_out": None, "hour": None}
    request = found["systems"]["student"]["request"]
    assert request == {"prompt_tokens": 200.0, "answer_tokens": 20.0, "seconds": pytest.approx(0.0744 + 19 / 37.5)}
    assert found["training"] == {"hours": pytest.approx(39 * 1.5 / 3600)}
    assert found["pays_after"]["requests"] is None and "stated prices" in found["pays_after"]["why"]
    assert "No price is stated" in price_note(found) and "--price-hour 0.50" in price_note(found)
    assert not any("requests" in title for title, _ in worth_grid(read_summary(folder), found).columns)
    assert worth_figure(found).title == "Pass rate by size"
    assert "price" in dict(worth_facts(found))["has paid after"]


def test_costs_follow_the_formulas_of_the_docs(folder):
    """Checked by hand: 1,000 x (500 x 2.5 + 40 x 10) / 10^6 = 1.65; seconds x 0.5 / 3600 x 1,000; total / saving. What
    the steps of elicitation asked is no request of a user's: only the held-out prompts are."""
    counted = {"answers": 4, "tokens_read": 2000, "tokens_written": 160}
    requests = read_summary(folder)["requests"] | {"counted": counted}
    bill = {"answers": 100, "tokens_read": 50_000, "tokens_written": 4_000, "money": 99.0}
    changed(folder, bill=bill | {"answers": 20}, requests=requests)
    state_prices(folder, Prices(2.5, 10.0, 0.5))
    found = worth_of(folder)
    teacher, student = (found["systems"][name]["request"] for name in ("teacher", "student"))
    assert teacher["cost_of_1000"] == pytest.approx(1.65) and teacher["by"] == "tokens"
    cost = 1000 * (0.0744 + 19 / 37.5) * 0.5 / 3600
    assert student["cost_of_1000"] == pytest.approx(cost) and student["by"] == "machine"
    assert found["training"]["bill"] == pytest.approx((50_000 * 2.5 + 4_000 * 10) / 1e6)
    total = 0.165 + 39 * 1.5 / 3600 * 0.5
    assert found["training"]["total"] == pytest.approx(total)
    assert found["pays_after"]["requests"] == pytest.approx(1000 * total / (1.65 - cost), abs=1)
    assert worth_figure(found).title == "Pass rate by cost"
    assert dict(worth_facts(found))["kept of the teacher's score"] == "80 % (70 % to 95 %)"
    changed(folder, bills={"judge": {"maybe_billed": {"tries": 3, "tokens_at_most": 1200}}})
    said = dict(worth_facts(worth_of(folder)))
    assert said["may have been billed without an answer"] == "3 requests, at most 1,200 tokens"
    changed(folder, bills={})
    page = write_report(folder).read_text()
    assert "a million tokens read by the teacher: 2.5" in page and "No price is stated" not in page


def test_a_teacher_whose_server_counts_no_tokens_is_not_free(folder):
    state_prices(folder, Prices(2.5, 10.0, 0.5))
    nothing = {"answers": 420, "tokens_read": 0, "tokens_written": 0, "money": 0.0}  # of an older run
    for bill in (nothing, nothing | {"tokens_read": 90, "tokens_written": 50, "unmetered": 20}):
        changed(folder, bill=bill)
        found = worth_of(folder)
        assert found["systems"]["teacher"]["request"].get("by") != "tokens"
        assert not {"bill", "total"} & set(found["training"])
        count = bill.get("unmetered", 420)
        said = f"servers did not say how many tokens {count} answers took"
        assert found["pays_after"]["requests"] is None and said in found["pays_after"]["why"]
        assert said in dict(worth_facts(found))["not counted by its server"]
        assert said in write_report(folder).read_text()


def test_without_its_servers_count_a_request_is_what_the_teacher_reads_and_writes_here(folder):
    changed(folder, bill={"answers": 9, "tokens_read": 50_000, "tokens_written": 4_000})
    request = worth_of(folder)["systems"]["teacher"]["request"]
    assert (request["prompt_tokens"], request["answer_tokens"]) == (300.0, 20.0)
    summary = read_summary(folder)
    changed(folder, systems=summary["systems"] | {"prompted": summary["systems"]["untouched"]})
    assert worth_of(folder)["systems"]["prompted"]["request"]["prompt_tokens"] == 300.0, (
        "it reads what the teacher does"
    )


def test_answers_of_earlier_runs_are_told_with_their_worth(folder):
    reused = {"answers": 1200, "tokens_read": 400_000, "tokens_written": 100_000}
    bill = {"answers": 0, "tokens_read": 0, "tokens_written": 0, "reused": reused}
    changed(folder, bill=bill)
    assert dict(worth_facts(worth_of(folder)))["taken from earlier runs, not counted"] == "1,200 answers"
    state_prices(folder, Prices(2.5, 10.0, 0.5))
    found = worth_of(folder)
    assert found["training"]["reused"] == {"answers": 1200, "worth": 2.0} and found["training"]["bill"] == 0
    assert dict(worth_facts(found))["taken from earlier runs, not counted"] == "1,200 answers, worth 2.00"
    changed(folder, bills={"judge": {"answers": 0, "reused": reused}})
    assert worth_of(folder)["training"]["reused"] == {"answers": 2400}, "what the judge's would cost is not known"


def test_a_student_that_costs_more_never_pays(folder):
    state_prices(folder, Prices(0.0, 0.0001, 50.0))
    found = worth_of(folder)
    assert found["pays_after"]["requests"] is None and found["pays_after"]["why"].startswith("never")


def test_a_part_of_the_prices_says_which_are_missing(folder):
    state_prices(folder, Prices(teacher_in=2.5))
    found = worth_of(folder)
    assert "the cost of a request to the student" in found["pays_after"]["why"]
    assert "cost_of_1000" in found["systems"]["teacher"]["request"] and "State the others" in price_note(found)


def test_prices_are_kept_added_to_and_refused(folder, tmp_path):
    state_prices(folder, Prices(teacher_in=2.5, hour=1.0))
    state_prices(folder, Prices(hour=0.5))
    state_prices(folder, Prices())
    assert stated_prices(folder) == Prices(2.5, None, 0.5)
    for wrong in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(UserError, match="0 or more"):
            Prices(hour=wrong)
    with pytest.raises(UserError, match="no measured run"):
        state_prices(make_comparison(tmp_path / "cmp", prompts=1), Prices(hour=1.0))
    for text in ("{", "[]", '{"day": 3}', '{"hour": -2}'):
        (folder / "prices.json").write_text(text)
        with pytest.raises(UserError, match=r"prices\.json"):
            stated_prices(folder)


def test_the_recipes_price_is_the_teachers_until_another_is_stated(folder):
    recipe = {"teacher": {"server": {"name": "m", "price": {"input": 3, "output": 15}}}}
    assert prices_of(folder, recipe) == Prices(3.0, 15.0, None)
    state_prices(folder, Prices(teacher_out=8.0))
    assert prices_of(folder, recipe) == Prices(None, 8.0, None)


def test_spreads_of_speeds_are_shown_where_the_summary_has_them(folder):
    summary = read_summary(folder)
    summary["efficiency"]["student"]["decode_tokens_per_second"] = {"value": 40.0, "low": 38.0, "high": 41.0}
    changed(folder, efficiency=summary["efficiency"])
    found = worth_of(folder)
    assert found["systems"]["student"]["request"]["seconds"] == pytest.approx(0.0744 + 19 / 40)
    grid = glance_grid(read_summary(folder), found)
    assert dict(grid.rows)["Student"][-1] == {"value": 40.0, "low": 38.0, "high": 41.0}
    assert write_report(folder).exists()


def test_the_size_on_disk_is_that_of_the_students_folder(folder):
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"x" * 2_500_000)
    assert worth_of(folder)["systems"]["student"]["bytes_on_disk"] == 2_500_000


def test_the_example_is_the_first_item_whatever_its_outcome(folder):
    assert example(folder, read_summary(folder)).where == "The first held-out prompt"
    summary = read_summary(folder)
    summary["metrics"]["intents/acc"] = {"title": "Accuracy", "better": "high", "group": "", "role": "headline"}
    for values in summary["systems"].values():
        values["intents/acc"] = interval(0.6, 0.5, 0.7)
    shown = example(folder, summary)
    assert (shown.where, shown.prompt, shown.right) == ("The first item of intents", "message 0", "billing")
    assert shown.answers == [("Teacher", "billing"), ("Student before training", "other"), ("Student", "refund")]


# Labels and fields


def test_a_matrix_shows_every_confusion_and_the_worst_come_first(folder):
    labels, fields = label_sections(folder, read_summary(folder))
    (_, _, matrix), (_, _, figures) = labels.grids
    assert [title for title, _ in matrix.columns] == ["billing", "refund", "other", "(no label)"]
    assert dict(matrix.rows)["billing"] == ["–", "18", "–", "2"] and len(matrix.rows) == 3
    assert [name for name, _ in figures.rows] == ["Mean of all labels (macro F1)", "billing", "refund", "other"]
    assert figures.rows[1][1][1] == "never said"
    (first, cells), (second, _) = labels.worst.rows
    assert (first, second) == ("intents/0", "intents/4")
    assert cells == ["message 0", "billing", "refund", "90 %", "billing"]
    assert fields.grids[0][2].rows[0][0] == "city" and fields.worst is None


def test_an_answer_under_budgets_of_thinking_is_as_right_as_at_the_largest(folder):
    facts = {"budgets": {"128": {"passed": True}, "64": {"passed": False}}}
    write_lines(
        folder / "evaluation" / "task-intents+student.jsonl", [{"item": "intents/0", "text": "x", "facts": facts}]
    )
    assert label_sections(folder, read_summary(folder))[0].worst is None


def test_of_many_labels_the_commonest_confusions_are_listed(folder):
    facts = labelled()
    names = [f"label {n}" for n in range(30)]
    of = facts["systems"]["student"]["by_label"][2]
    student = {"by_label": [of] * 30, "macro_f1": interval(0.5, 0.4, 0.6), "confusions": [[n, n + 1, 20 - n] for n in range(20)] + [[29, 30, 1], [29, 29, 8]]}  # fmt: skip
    changed(folder, by_label={"many": {"labels": [*names, "(no label)"], "systems": {"student": student}}}, by_field={})
    (section,) = label_sections(folder, read_summary(folder))
    grid = section.grids[0][2]
    assert [title for title, _ in grid.columns] == ["Said instead", "Times", "Share", "Teacher"]
    assert grid.rows[0] == ("label 0", ["label 1", "20", "100 %", ""]) and len(grid.rows) == 20
    assert "The 20 commonest of 21" in grid.note
    assert write_report(folder).exists()


# For programs


def test_json_has_verdict_systems_worth_and_paths_and_no_nan(folder):
    summary = read_summary(folder)
    summary["systems"]["student"]["forward_kl"]["high"] = float("nan")
    changed(folder, systems=summary["systems"])
    write_report(folder)
    data = as_data(folder)
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text) == data and data["systems"]["student"]["forward_kl"]["high"] is None
    assert data["kind"] == "run" and data["worth"]["quality"]["metric"] == "everyday/pass_rate"
    assert data["verdict"].startswith("Pass rate on everyday") and data["paths"]["report"].endswith("report.html")


def test_json_and_csv_of_a_comparison(tmp_path):
    folder = make_comparison(tmp_path / "cmp", prompts=2)
    data = as_data(folder)
    assert data["kind"] == "comparison" and data["worth"] is None and data["base"] == "seq-kd"
    assert {row["system"] for row in rows(folder)} == set(data["systems"])


def test_a_comparison_shows_what_each_method_is_worth_in_use(tmp_path):
    folder = make_comparison(tmp_path / "comparison", prompts=4)
    student = folder / "runs" / "jsd-s7" / "student"
    student.mkdir(parents=True)
    (student / "model.safetensors").write_bytes(b"12345")
    comparison = read_comparison(folder)
    comparison["efficiency"]["jsd"] = {"first_token_ms": 100.0, "decode_tokens_per_second": 10.0}
    found = compared_worth(folder, comparison)
    assert found["quality"]["metric"] == "everyday/pass_rate" and set(found["quality"]["values"]) == set(
        comparison["systems"]
    )
    answers = [record["tokens"] for record in read_jsonl(folder / "evaluation" / "answers-jsd-s7.jsonl")]
    mean = sum(answers) / len(answers)
    of_jsd = found["systems"]["jsd"]
    assert of_jsd["bytes_on_disk"] == 5 and "bytes_on_disk" not in found["systems"]["forward-kl"]
    assert of_jsd["request"] == {"answer_tokens": mean, "seconds": pytest.approx(0.1 + (mean - 1) / 10)}
    names = [name for name, _ in worth_grid(comparison, found).rows]
    assert names == ["Teacher", "Student before training", *list(comparison["systems"])[2:]]
    page = write_report(folder).read_text()
    assert 'href="#worth"' in page and "Quality, size and speed" in page
    comparison["efficiency"] = {}
    assert worth_grid(comparison, compared_worth(tmp_path / "elsewhere", comparison)) is None


def test_csv_is_rfc_4180_and_no_cell_is_a_formula(tmp_path):
    folder = make_run(tmp_path / "run", '=HYPERLINK("x"),a\nb', prompts=1)
    text = as_csv(folder)
    assert text.count("\r\n") >= 30 and text.startswith(",".join(COLUMNS) + "\r\n")
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(read) == len(rows(folder)) and {row["run"] for row in read} == {'run=HYPERLINK("x"),a\nb'}
    systems = {row["system"] for row in read}
    assert '\'=HYPERLINK("x"),a\nb' in systems and not any(name[:1] in "=+-@" for name in systems)
    assert float(read[0]["value"]) == rows(folder)[0]["value"]
    for start in "=+-@":
        (folder / "recipe.yaml").write_text("{name: x}")
        changed(folder, name=f"{start}1+1")
        assert f"\r\n'{start}1+1," in as_csv(folder)


def called(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.long
def test_the_command_prints_what_was_asked_for(folder):
    data = json.loads(called(folder, "--json", "--price-hour", "0.5").stdout)
    assert data["report"].endswith("report.html") and data["worth"]["prices"]["hour"] == 0.5
    assert called(folder, "--csv").stdout.startswith("run,system,label,")
    assert "| Teacher |" in called(folder, "--table").stdout
    assert "verdict: Pass rate on everyday" in called(folder).stdout
    assert called(folder, "--price-hour", "-1").exit_code == 2
    assert isinstance(called(folder, "--json", "--csv").exception, UserError)


def test_every_item_is_found_with_what_was_asked(folder):
    (folder / "evaluation" / "task-a+b+student.jsonl").write_text("")
    assert ("a+b", "student") in item_files(folder / "evaluation")
    items = list(all_items(folder / "evaluation", ["student"]))
    assert {item["task"] for item in items} == {"", "intents"} and {item["system"] for item in items} == {"student"}
    assert all(item["prompt"] and item["item"] for item in items) and len(items) == 4 + 6
    write_lines(folder / "evaluation" / "answers-x.jsonl", [])
    assert list(all_items(folder / "evaluation", ["x"])) == []
