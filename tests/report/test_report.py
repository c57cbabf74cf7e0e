"""The page: inert whatever a model wrote, without network, and claiming no more than its intervals."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import yaml

from limbeck.config.recipe import parse
from limbeck.elicit.two_orders import PairVerdict
from limbeck.evaluate.judge import summarise_verdicts
from limbeck.report import excerpt as excerpts
from limbeck.report.card import model_card
from limbeck.report.excerpt import embedded, read_excerpt
from limbeck.report.figures import pareto_figures
from limbeck.report.grids import facts, kinds_grid, seeds_grid, spent_grid, training_grid
from limbeck.report.judge import judge_section
from limbeck.report.metrics import Metric, fixed, is_clear, mark, metrics_of, number, percent, task_headlines
from limbeck.report.page import compare_verdict, read_comparison, read_summary, verdict, write_report
from limbeck.report.plots import (
    MAX_POINTS,
    Label,
    Scale,
    Series,
    Spot,
    Whisker,
    bars,
    curves,
    forest,
    scatter,
    spread,
    thinned,
)
from limbeck.report.rollouts import MEASURES, PLOTS, own_text_grid, own_texts
from limbeck.report.table import compare_markdown, markdown, paired_table, systems_tables
from limbeck.report.teacher import teacher_aside, teacher_facts, teacher_name
from limbeck.types import UserError
from tests.report_folders import KINDS, PAYLOADS, interval, judged_pair, make_comparison, make_run, rollout, write_lines

LABEL = Label("key", "A title", "What it shows", "x", y_title="y")
LOW = Metric("forward_kl", "Forward KL", "nats", "low", "")


def make_old_run(folder, text="", prompts=0, words=0):
    """A run's folder as the first version wrote it: no descriptions of metrics, no p values, first choices only."""
    metrics = {
        "forward_kl": interval(0.5, 0.4, 0.6),
        "top1_agreement": interval(0.6, 0.5, 0.7),
        "day/pass_rate": interval(0.1, 0.0, 0.2),
    }
    summary = {
        "recipe": "a" * 64, "name": text, "controls": ["untouched"],
        "systems": {"teacher": metrics, "untouched": metrics, "student": metrics | {"x" + text: interval(1, 0, 2)}},
        "paired": {"student - untouched": {"forward_kl": interval(-0.1, -0.2, -0.05), "nll": interval(0, -1, 1)}},
        "tasks": {"day" + text: {"version": text, "decoding": "greedy", "max_tokens": 5}},
        "sizes": {name: {"layers": 3, "parameters": 10} for name in ("teacher", "student")},
        "held_out": {"answers": 60, "temperature": 0.7, "top_p": 1.0, "max_tokens": 5, "cut_off": 1},
        "machine": {"python": text, "torch": text, "threads": 2},
    }  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": text, "title": "t" + text, "paper": text, "teacher": text})
    )
    answer = {"prompt_id": "p", "kind": text, "text": text, "tokens": 3, "finished": True, "passed": False}
    for name in ("teacher", "student"):
        write_lines(folder / "evaluation" / f"answers-{name}.jsonl", [answer])
    write_lines(folder / "evaluation" / "prompts.jsonl", [{"prompt_id": "p", "prompt": text}])
    tokens = [[text, 0.5, text, text], [" b", 9.0, "c", "d"]]
    write_lines(
        folder / "evaluation" / "lens.jsonl",
        [{"writer": writer, "prompt_id": "p", "tokens": tokens} for writer in ("teacher", "student")],
    )
    return folder


MAKERS = {"run": make_run, "comparison": make_comparison, "old run": make_old_run}


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag in ("script", "style"):
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.text.append(data)


def parsed(file):
    page = Tags()
    page.feed(file.read_text())
    return page


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("text", PAYLOADS)
@pytest.mark.promise("S6")
def test_everything_a_model_could_write_stays_text(tmp_path, text, maker):
    attacked = parsed(write_report(MAKERS[maker](tmp_path / "attacked", text, prompts=3, words=5)))
    plain = parsed(write_report(MAKERS[maker](tmp_path / "plain", "hello", prompts=3, words=5)))
    assert attacked.tags == plain.tags and attacked.tags.count("script") == 2
    assert [(tag, name) for tag, name, _ in attacked.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    for _, name, value in attacked.attributes:
        assert not name.startswith("on") and name not in ("src", "style")
        assert name != "href" or value == "data:," or value.startswith("#")
    assert text in "".join(attacked.text)
    data = json.loads(attacked.scripts[1])
    assert text in data["items"][0]["prompt"] and text in data["items"][0]["answers"][0][0]


@pytest.mark.promise("S6")
def test_the_policy_allows_one_script_and_one_style_sheet_and_nothing_else(tmp_path):
    file = write_report(make_run(tmp_path / "run"))
    page = parsed(file)
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "default-src" in value
    )
    for kind, text in (("style-src", page.scripts[0]), ("script-src", page.scripts[2])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert "innerHTML" not in page.scripts[2] and "eval" not in page.scripts[2]
    assert "http://" not in file.read_text() and "https://" not in file.read_text() and "url(" not in file.read_text()


def test_a_run_of_the_first_version_still_makes_a_page(tmp_path):
    page = "".join(parsed(write_report(make_old_run(tmp_path / "run", "hello"))).text)
    for words in ("Forward KL", "Same first choice", "day pass rate", "Fidelity on held-out text", "3 layers"):
        assert words in page


def test_a_summary_with_the_least_makes_a_page(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "recipe.yaml").write_text("{name: least, title: null, paper: null, teacher: t}")
    (tmp_path / "evaluation" / "summary.json").write_text(
        json.dumps({"systems": {"student": {"forward_kl": interval(0.5, 0.4, 0.6)}}})
    )
    page = "".join(parsed(write_report(tmp_path)).text)
    assert "is 0.50 nats per token (0.40 to 0.60)" in page and "Answers side by side" not in page


def test_lone_surrogates_and_controls_do_not_break_the_page(tmp_path):
    assert write_report(make_run(tmp_path / "run", "\ud800\x00\x0b")).stat().st_size > 10_000


def test_without_an_evaluation_the_user_is_told(tmp_path):
    with pytest.raises(UserError, match="limbeck evaluate"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="limbeck compare"):
        read_comparison(tmp_path)


def test_leaks_and_warnings_stand_before_the_results(tmp_path):
    text = "".join(parsed(write_report(make_run(tmp_path / "run"))).text)
    for words in (
        "4 evaluation items found",
        "3 appear there word for word and are left out",
        "1 is similar to a training text and still counted",
        "intervals are wide",
    ):
        assert text.index(words) < text.index("Fidelity on held-out text")
    assert "everyday/3" in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((-0.1, -0.2, -0.05), "it is closer than fine-tuning"),
        ((0.1, 0.05, 0.2), "fine-tuning on the teacher's text came closer"),
        ((-0.1, -0.2, 0.01), "may be chance"),
    ],
)
def test_the_verdict_claims_what_the_interval_allows(difference, words):
    systems = {"student": {"forward_kl": interval(0.5, 0.4, 0.6)}, "untouched": {"forward_kl": interval(1.0, 0.9, 1.1)}}
    nearer = {"student - untouched": {"forward_kl": interval(-0.5, -0.6, -0.4)}}
    summary = {"systems": systems, "paired": nearer | {"student - sft_control": {"forward_kl": interval(*difference)}}}
    assert words in verdict(summary)
    assert verdict({"systems": systems, "paired": nearer}).endswith("down from 1.00 before training.")
    farther = {"student - untouched": {"forward_kl": interval(0.5, 0.4, 0.6)}}
    assert verdict({"systems": systems, "paired": farther}).endswith("up from 1.00 before training.")
    same = {"student - untouched": {"forward_kl": interval(0.1, -0.4, 0.6)}}
    assert "1.00 before training, a change that may be chance" in verdict({"systems": systems, "paired": same})


def test_a_large_effect_over_few_items_is_said_with_their_number():
    """From 0.22 to 3.98 nats over 4 answers is neither 'no change' nor a clear one."""
    summary = {
        "systems": {"student": {"forward_kl": interval(3.98, 3.1, 4.6, 4)}, "untouched": {"forward_kl": interval(0.22, 0.2, 0.3, 4)}},
        "paired": {"student - untouched": {"forward_kl": interval(3.76, 3, 4.4, 4, p=1.0)}, "student - sft_control": {"forward_kl": interval(1, 0.9, 1.1, 4, p=1.0)}},
    }  # fmt: skip
    assert verdict(summary) == (
        "The student is 3.98 nats per token (3.10 to 4.60) from its teacher, 0.22 before training, over only 4 answers;"
        " the difference from fine-tuning on the teacher's text is +1.000 nats (+0.900 to +1.100)."
    )


def of_tasks(items=120, better="high", change=(0.89, 0.83, 0.94), **tasks):
    """A summary with tasks; by default the student goes from 0 to 0.89 where the teacher reaches 0.87."""
    systems = {name: {"forward_kl": interval(0.5, 0.4, 0.6)} for name in ("teacher", "untouched", "student")}
    paired = {"student - untouched": {"forward_kl": interval(-0.5, -0.6, -0.4)}}
    metrics = {}
    for task, metric in (tasks or {"intents": "acc"}).items():
        name = f"{task}/{metric}"
        metrics[name] = {"title": "Accuracy", "unit": "", "better": better, "group": f"Task {task}", "role": "headline"}
        for system, value in (("teacher", 0.87), ("untouched", 0.0), ("student", 0.89)):
            systems[system][name] = interval(value, value - 0.05, value + 0.05, items)
        paired["student - untouched"][name] = interval(*change, items, p=0.001)
    return {"systems": systems, "paired": paired, "metrics": metrics}


def test_the_verdict_speaks_of_the_users_task_first_then_of_nats():
    sentence = verdict(of_tasks())
    assert sentence.startswith(
        "Accuracy on intents rose from 0.00 to 0.89 (0.84 to 0.94) over 120 items; the teacher reaches 0.87."
    )
    assert sentence.index("The student is 0.50 nats") > 0 and "clearly" not in sentence
    several = of_tasks(everyday="acc", **{"intents@typos": "acc", "mine": "acc"})
    assert verdict(several).startswith("Accuracy on mine ")
    assert [metric.task for metric in task_headlines(metrics_of(several), [several["systems"]["student"]])] == [
        "mine", "everyday", "intents@typos",
    ]  # fmt: skip
    assert verdict(of_tasks(everyday="acc")).startswith("Accuracy on everyday rose")


@pytest.mark.parametrize(
    ("items", "change", "words"),
    [
        (29, (0.89, 0.83, 0.94), "went from 0.00 to 0.89 (0.84 to 0.94) over only 29 items; the teacher"),
        (30, (0.89, 0.83, 0.94), "rose from 0.00 to 0.89 (0.84 to 0.94) over 30 items; the teacher"),
        (120, (-0.2, -0.3, -0.1), "fell from"),
        (120, (0.1, -0.1, 0.3), "went from 0.00 to 0.89 (0.84 to 0.94) over 120 items, a change that may be chance;"),
    ],
)
def test_a_change_is_called_one_if_it_is_clear_over_enough_items(items, change, words):
    assert words in verdict(of_tasks(items, change=change))
    assert "on intents, lower is better, " in verdict(of_tasks(items, better="low", change=change))


def test_the_metric_of_a_task_is_the_one_that_the_task_names_first():
    summary = of_tasks(intents="macro_f1")
    other = {"title": "Answered", "unit": "", "better": "high", "group": "Task intents"}
    summary["metrics"] = {"intents/answered": other, **summary["metrics"]}
    summary["systems"]["student"]["intents/answered"] = interval(1, 1, 1)
    (metric,) = task_headlines(metrics_of(summary), [summary["systems"]["student"]])
    assert metric.name == "intents/macro_f1"


def test_one_seed_of_a_comparison_is_never_clearly_better():
    comparison = comparison_of(a=interval(-0.1, -0.2, -0.05, p_holm=0.01))
    sentence = compare_verdict(comparison | {"seeds": [1]})
    assert "is better than base" in sentence and "clearly" not in sentence
    assert sentence.endswith("One seed says nothing of another training.")
    few = comparison_of(a=interval(-0.1, -0.2, -0.05, 12, p_holm=0.01))
    assert "over only 12 items" in compare_verdict(few) and "no method is clearly better" in compare_verdict(few)


def test_where_nobody_teaches_no_teacher_is_spoken_of():
    """`limbeck new --teacher none`: the student before training stands as the teacher, and the text is the data's."""
    summary = of_tasks()
    summary["systems"]["untouched"]["forward_kl"] = interval(0.0, 0.0, 0.0)
    assert "teacher" in verdict(summary), "its own text is not the data's"
    assert verdict(summary | {"held_out": {"writer": "corpus"}}) == (
        "Accuracy on intents rose from 0.00 to 0.89 (0.84 to 0.94) over 120 items."
    )


def test_the_verdict_tells_of_leaks():
    summary = {
        "systems": {"student": {"forward_kl": interval(0.5, 0.4, 0.6)}},
        "leaks": [{"kind": "exact"}, {"kind": "same_but_for_numbers"}],
    }
    assert verdict(summary).endswith(
        "2 evaluation items were found in the training text, 1 of them left out and 1 counted."
    )
    assert verdict(summary | {"leaks": [{"kind": "overlap"}]}).endswith(
        "1 evaluation item was found in the training text and left out."
    )


def test_a_run_without_divergences_is_judged_by_its_task():
    metrics = {"t/score": {"title": "Score", "unit": "", "better": "high", "group": "Task t"}}
    summary = {
        "systems": {"student": {"t/score": interval(0.4, 0.3, 0.5)}}, "metrics": metrics,
        "paired": {"student - untouched": {"t/score": interval(0.2, 0.1, 0.3)}, "student - sft_control": {"t/score": interval(0.1, -0.1, 0.3)}},
    }  # fmt: skip
    assert verdict(summary) == "Score on t is 0.40 (0.30 to 0.50) over 60 items."
    control = {"sft_control": {"t/score": interval(0.3, 0.2, 0.4)}}
    assert verdict(summary | {"systems": summary["systems"] | control}).endswith(
        "fine-tuning on the teacher's text reaches 0.30, a difference that may be chance."
    )
    assert "Nothing was measured" in verdict({"systems": {"student": {}}})


@pytest.mark.parametrize(("difference", "more"), [((-0.2, -0.3, -0.1), "more"), ((0.2, 0.1, 0.3), "less")])
def test_a_clear_difference_from_fine_tuning_is_called_one(difference, more):
    summary = of_tasks()
    summary["systems"]["sft_control"] = {"intents/acc": interval(0.8, 0.7, 0.9, 120)}
    summary["paired"]["student - sft_control"] = {"intents/acc": interval(*difference, 120, p=0.001)}
    assert f"; fine-tuning on the teacher's text reaches 0.80, clearly {more}." in verdict(summary)


def test_small_numbers_are_not_rounded_to_nothing():
    """'0.00 nats (0.00 to 0.00), down from 0.00' says that nothing changed, and that something did."""
    systems = {
        "student": {"forward_kl": interval(0.0012, 0.0011, 0.0013)},
        "untouched": {"forward_kl": interval(0.0047, 0.0046, 0.0048)},
    }
    paired = {
        "student - untouched": {"forward_kl": interval(-0.0035, -0.0036, -0.0034)},
        "student - sft_control": {"forward_kl": interval(-0.0003, -0.0004, -0.0002)},
    }
    assert verdict({"systems": systems, "paired": paired}) == (
        "The student is 0.0012 nats per token (0.0011 to 0.0013) from its teacher, down from 0.0047 before training; it"
        " is closer than fine-tuning on the teacher's text by 0.00030 nats (0.00020 to 0.00040)."
    )
    assert [percent(share) for share in (0, 0.004, 0.0003, 0.5, 0.996, 0.9996, 1, 1 - 1e-12)] == ["0 %", "0.4 %", "0.03 %", "50 %", "99.6 %", "99.96 %", "100 %", "100 %"]  # fmt: skip
    assert [number(value) for value in (0.0, 1e-9, -1e-9, 0.00042, -0.00042, 0.5)] == ["0.000", "0.000", "0.000", "0.00042", "-0.00042", "0.500"]  # fmt: skip
    assert fixed(0.0004, 3, "+") == "+0.00040" and fixed(-1e-9, 3, "+") == "+0.000"


@pytest.mark.parametrize(
    ("difference", "comparisons", "clear"),
    [
        (interval(-1, -2, -0.1), 1, True),
        (interval(-1, -2, 0.1), 1, False),
        (interval(-1, -2, -0.1, p=0.2), 1, False),
        (interval(-1, -2, -0.1, p=0.01), 3, False),
        (interval(-1, -2, -0.1, p=0.01, p_holm=0.03), 3, True),
        (interval(-1, -2, -0.1, p=0.01, p_holm=0.06), 3, False),
        (interval(-1, -2, -0.1), 2, False),
    ],
)
def test_a_difference_is_clear_by_its_interval_and_among_several_by_its_adjusted_p(difference, comparisons, clear):
    assert is_clear(difference, comparisons) is clear
    assert (mark(LOW, difference, comparisons) == "better") is clear


def test_marks_follow_the_better_side():
    below, above = interval(-1, -2, -0.5), interval(1, 0.5, 2)
    sides = {
        better: (mark(Metric("m", "M", "", better, ""), below), mark(Metric("m", "M", "", better, ""), above))
        for better in ("low", "high", "none")
    }
    assert sides == {"low": ("better", "worse"), "high": ("worse", "better"), "none": ("lower", "higher")}


def comparison_of(**differences):
    systems = {name: {"forward_kl": interval(0.5, 0.4, 0.6)} for name in ("base", *differences)}
    return {
        "base": "base",
        "seeds": [1, 2],
        "systems": systems,
        "paired": {f"{name} - base": {"forward_kl": x} for name, x in differences.items()},
    }


def test_the_verdict_of_a_comparison_claims_what_holm_allows():
    clear, adjusted_away = interval(-0.1, -0.2, -0.05, p_holm=0.01), interval(-0.1, -0.2, -0.05, p_holm=0.2)
    worse = interval(0.1, 0.05, 0.2, p_holm=0.01)
    sentence = compare_verdict(comparison_of(a=clear, b=worse, c=adjusted_away))
    assert (
        "over 2 seeds" in sentence and "a (-0.100, -0.200 to -0.050, p = 0.010) is clearly better than base" in sentence
    )
    assert (
        "b (+0.100, +0.050 to +0.200, p = 0.010) is clearly worse" in sentence
        and "the difference of c (-0.100, -0.200 to -0.050) may be chance" in sentence
    )
    assert "no method is clearly better than base" in compare_verdict(comparison_of(a=adjusted_away, b=worse))
    assert "a (-0.100, -0.200 to -0.050, p = 0.010) and b (-0.1" in compare_verdict(comparison_of(a=clear, b=clear))
    assert compare_verdict(comparison_of()) == "Nothing was compared with base."


def test_pairs_of_two_other_methods_do_not_count_as_against_the_base():
    comparison = comparison_of(a=interval(-0.1, -0.2, 0.05, p_holm=0.4))
    comparison["paired"]["b - a"] = {"forward_kl": interval(-9, -10, -8, p_holm=0.001)}
    assert "no method is clearly better" in compare_verdict(comparison)
    assert paired_table(comparison)[0] == ["a"]


def test_tables_are_grouped_in_the_order_of_the_summary(tmp_path):
    summary = read_summary(make_run(tmp_path / "run"))
    tables = systems_tables(summary)
    assert [table.group for table in tables] == ["Fidelity on held-out text", "On its own text", "Task everyday"]
    assert [metric.name for metric in tables[1].metrics] == ["own_forward_kl", "own_repetition"]
    assert tables[0].recovered[0][1][0]["value"] == 0.57 and not tables[1].recovered
    _, body = paired_table(summary)
    cells = {metric.name: [cell.mark for cell in row] for metric, row in body[0][1]}
    assert cells["forward_kl"] == ["better", "unclear"] and cells["jsd"] == ["better", "worse"]


def test_markdown_keeps_cells_apart_and_leaves_out_what_has_no_better_side(tmp_path):
    text = markdown(read_summary(make_run(tmp_path / "run", "|<b>*_`[x](y)")))
    assert "Entropy" not in text and "<b>" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    table = compare_markdown(read_comparison(make_comparison(tmp_path / "comparison")))
    assert "| Forward KL (on its own text) | -0.110 (-0.140 to -0.080), p = 0.003, better |" in table


@pytest.mark.promise("S6")
def test_embedded_json_has_no_sign_that_ends_a_script():
    value = {"a": PAYLOADS, "b": [1, None, True, 0.5]}
    text = embedded(value)
    assert not set(text) & set("<>&\u2028\u2029") and json.loads(text) == value
    with pytest.raises(ValueError):
        embedded(float("nan"))


def test_a_large_run_is_shortened_then_thinned_and_says_so(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", prompts=200, words=100)
    whole = read_excerpt(folder / "evaluation", ["teacher"])
    assert len(whole.items) == whole.prompts == 200 and whole.shortened == 0 and whole.systems[0] == "teacher"
    monkeypatch.setattr(excerpts, "ANSWER_BYTES", 380_000)
    short = read_excerpt(folder / "evaluation", ["teacher"])
    assert (
        len(short.items) == 200
        and short.shortened == 800
        and all(len(a[0]) == 400 for item in short.items for a in item["answers"])
    )
    monkeypatch.setattr(excerpts, "ANSWER_BYTES", 150_000)
    monkeypatch.setattr(excerpts, "LENS_BYTES", 20_000)
    few = read_excerpt(folder / "evaluation", ["teacher"])
    assert 24 < len(few.items) < 100 and {item["kind"] for item in few.items} == set(KINDS) and few.lenses_left_out > 0
    assert sum(len(embedded(item | {"lens": {}})) for item in few.items) < 150_000 + 20 * len(few.items)
    assert [item["id"] for item in few.items[:24]] == [item["id"] for item in whole.items[:24]]
    page = "".join(parsed(write_report(folder)).text)
    assert (
        f"{len(few.items)} of 200 prompts are on this page" in page
        and "shortened here" in page
        and "did not fit" in page
    )


def test_choices_of_a_token_may_be_one_text_or_several_with_probabilities(tmp_path):
    tokens = [["a", 0.5, "b", [["c", 0.7512345], ["d", 0.1]]], ["x", float("inf"), "y", "z"]]
    write_lines(tmp_path / "lens.jsonl", [{"writer": "teacher", "prompt_id": "p", "tokens": tokens}])
    write_lines(
        tmp_path / "answers-teacher.jsonl",
        [{"prompt_id": "p", "kind": "k", "text": "t", "tokens": 1, "finished": True, "passed": None}],
    )
    (item,) = read_excerpt(tmp_path, []).items
    assert item["lens"]["teacher"] == [
        ["a", 0.5, [["b", None]], [["c", 0.7512], ["d", 0.1]]],
        ["x", None, [["y", None]], [["z", None]]],
    ]


@pytest.mark.promise("S9")
def test_a_name_in_a_summary_is_never_a_path(tmp_path):
    folder = make_run(tmp_path / "run")
    secret = '{"prompt_id": "explain-00000", "text": "secret", "tokens": 4711}\n'
    (folder / "secret.jsonl").write_text(secret)
    (folder / "evaluation" / "answers-x").mkdir()  # so that the name would be a path to it
    assert (folder / "evaluation" / "answers-x/../../secret.jsonl").read_text() == secret
    file = folder / "evaluation" / "summary.json"
    summary = json.loads(file.read_text())
    summary["systems"]["x/../../secret"] = summary["systems"]["student"]
    file.write_text(json.dumps(summary))
    page = write_report(folder).read_text()
    assert '"secret"' not in page and "4,711" not in page and "4711" not in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [0, 5, 10]), (0.0, 4e-5, [0, 1e-5, 2e-5, 3e-5, 4e-5]), (5, 5, None)],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    scale = Scale(low, high, 0, 100)
    assert ticks is None or scale.ticks() == pytest.approx(ticks)
    assert scale(low) == 0 and (low == high or scale(high) == 100)


def test_labels_are_spread_and_keep_their_order():
    moved = spread([10, 10, 11, 80], 14)
    assert moved[0] < moved[1] < moved[2] and min(moved[1] - moved[0], moved[2] - moved[1]) > 13.5 and moved[3] == 80


def test_long_curves_are_thinned_to_means():
    points = thinned([(n, n % 2) for n in range(10_000)])
    assert len(points) <= MAX_POINTS + 1 and points[-1] == (9999, 1) and all(0.4 < y < 0.6 for _, y in points[:-1])


def test_plots_are_well_formed_and_say_what_they_show():
    hostile = "</svg><script>&\"'"
    plots = [
        curves(
            LABEL,
            [Series(hostile, [(1, 2.0), (2, 1.0), (3, float("nan"))], "accent"), Series("flat", [(1, 0.0), (2, 0.0)])],
            diagonal=True,
        ),
        scatter(LABEL, [Spot(hostile, 1, 2, 1.5, 2.5, True), Spot("b", 3, 1, 0.5, 1.5)], [(1, 2), (3, 1)]),
        forest(LABEL, [Whisker(hostile, -0.1, -0.2, -0.05, True), Whisker("b", 0, -0.2, 0.2, False)]),
        bars(LABEL, [(hostile, 0.5, "50 %"), ("b", 0.0, "0 %")]),
    ]
    for svg in plots:
        root = ElementTree.fromstring(svg)
        assert (
            root.find("title").text == "A title"
            and root.find("desc").text == "What it shows"
            and root.get("role") == "img"
        )
        assert hostile in "".join(root.itertext()) and "nan" not in svg and "style" not in svg
    whiskers = ElementTree.fromstring(plots[2]).findall("circle")
    assert [circle.get("class") for circle in whiskers] == ["dot accent", "dot hollow"]
    low, high = (ElementTree.fromstring(plots[0]).find("polyline").get("points").split()[n] for n in (1, 0))
    assert float(low.split(",")[1]) > float(high.split(",")[1]), "less stands lower on the page"
    assert curves(LABEL, [Series("one", [(1, 1)])]) == scatter(LABEL, []) == forest(LABEL, []) == bars(LABEL, []) == ""


@pytest.mark.parametrize(
    ("values", "top", "bottom"), [((-1.5, -0.5), "0", "−1.5"), ((-0.2, 0.4), "0.4", "−0.2"), ((1.0, 2.0), "2", "0")]
)
def test_curves_stay_inside_their_axes_on_either_side_of_zero(values, top, bottom):
    root = ElementTree.fromstring(curves(LABEL, [Series("s", list(enumerate(values)))]))
    places = [float(place.split(",")[1]) for place in root.find("polyline").get("points").split()]
    assert 34 <= min(places) < max(places) <= 280 - 46
    ticks = {
        text.text: float(text.get("y"))
        for text in root.findall("text")
        if text.get("class") == "tick" and text.get("text-anchor") == "end"
    }
    assert min(ticks, key=ticks.get) == top and max(ticks, key=ticks.get) == bottom and "0" in ticks


def test_the_frontier_joins_what_no_other_beats(tmp_path):
    comparison = read_comparison(make_comparison(tmp_path / "comparison"))
    seconds, memory = pareto_figures(comparison, metrics_of(comparison)["forward_kl"], {})
    root = ElementTree.fromstring(seconds.svg)
    strong = [text.text for text in root.findall("text") if text.get("class") == "name accent"]
    assert strong == ["seq-kd", "forward-kl"] and "minutes" in seconds.svg and "MiB" in memory.svg


def test_where_the_student_loses_most_comes_first(tmp_path):
    summary = read_summary(make_run(tmp_path / "run"))
    assert [name for name, _ in kinds_grid(summary, "student", {}).rows] == KINDS[::-1]
    comparison = read_comparison(make_comparison(tmp_path / "comparison"))
    grid = seeds_grid(comparison, metrics_of(comparison)["forward_kl"], {})
    assert [title for title, _ in grid.columns] == ["Seed 7", "Seed 8", "Seed 9", "Range"] and grid.rows[1][1] == [
        "0.698",
        "0.699",
        "0.700",
        "0.0022",
    ]


def test_facts_are_written_one_by_one():
    assert facts({"top_p": 0.95, "gpu": None, "settings": {"decoding": "greedy", "n": 12_000}, "on": True, "list": [1]}) == [
        ("top p", "0.95"), ("gpu", "none"), ("settings: decoding", "greedy"), ("settings: n", "12,000"), ("on", "yes"), ("list", "[1]"),
    ]  # fmt: skip


# The student's own text


def test_a_run_whose_student_wrote_has_a_section_on_it(tmp_path):
    folder = make_run(tmp_path / "run", prompts=3)
    (own,) = own_texts(folder)
    assert own.summary == (
        "The student wrote 208 answers, and trained on its own text in 26 of 39 steps. Writing took 27 % of the training time."
    )
    assert [figure.title for figure in own.figures] == [
        "Length of an answer", "Endings and repetition", "Log-probability of the student's text", "Shared top tokens", "Entropy on the student's text",
    ]  # fmt: skip
    endings = ElementTree.fromstring(own.figures[1].svg)
    ends = [float(line.get("points").split()[-1].split(",")[1]) for line in endings.findall("polyline")]
    assert len(ends) == 3 and ends[0] < ends[1] < ends[2], "0.88 ended, 0.8 distinct and 0.11 repeated, from above"
    assert own.grid.columns == [("First third", "steps 1 to 13"), ("Last third", "steps 27 to 39")]
    rows = dict(own.grid.rows)
    first, last = [1, 2, 4, 5, 7, 8, 10, 11, 13], [28, 29, 31, 32, 34, 35, 37, 38]
    assert (
        rows["Length, tokens per answer"]
        == [f"{80 - sum(part) / len(part):.1f}" for part in (first, last)]
        == ["73.2", "47.0"]
    )
    assert rows["Ended by itself, % of answers"] == ["56.8", "83.0"] and rows["Shared top tokens, % of 16"] == [
        "46.8",
        "73.0",
    ]
    assert rows["Teacher's log-probability, nats per token"] == ["−1.831", "−1.175"]
    assert rows["Writing time, % of training"] == [
        f"{100 * 0.6 * len(part) / (1.5 * 13):.1f}" for part in (first, last)
    ]
    page = parsed(write_report(folder))
    assert ("a", "href", "#rollouts") in page.attributes and ("h2", "id", "rollouts") in page.attributes
    text = "".join(page.text)
    assert text.index("Step 13: the student repeats itself") > text.index("What each training cost")


def test_a_run_whose_student_wrote_nothing_has_no_such_section(tmp_path):
    folder = make_run(tmp_path / "run", prompts=3)
    records = [{"step": n, "loss": 1.0, "response_tokens": 9, "seconds": 1.0} for n in range(1, 5)]
    write_lines(folder / "metrics.jsonl", records)
    page = parsed(write_report(folder))
    assert own_texts(folder) == [] and "rollouts" not in {value.lstrip("#") for _, _, value in page.attributes}
    assert "Writing time" not in [title for title, _ in training_grid(folder).columns]
    write_lines(folder / "metrics.jsonl", [records[0], records[1] | {"rollout": {"seconds": 0.5, "written": 1}}])
    (own,) = own_texts(folder)
    assert own.figures == [] and own.summary.startswith(
        "The student wrote 1 answer, and trained on its own text in 0 of 2 steps. Writing took 25 %"
    )
    assert [name for name, _ in own.grid.rows] == ["Writing time, % of training"]
    grid = training_grid(folder)
    assert grid.columns[3] == ("Writing time", "% of training")
    assert {name: cells[3] for name, cells in grid.rows} == {"Student": "25.0", "Fine-tuning control": "0"}


def test_every_line_of_a_plot_of_own_text_is_a_measure_with_a_title():
    assert {line.fact for plot in PLOTS for line in plot.lines} <= MEASURES.keys()


def test_what_only_some_trainings_tell_is_shown_where_it_says_something(tmp_path):
    def titles(**more):
        write_lines(
            tmp_path / "metrics.jsonl",
            [
                {"step": n, "seconds": 1.0, "rollout": rollout(n) | {k: v[n - 1] for k, v in more.items()}}
                for n in (1, 2, 3)
            ],
        )
        (own,) = own_texts(tmp_path)
        return {figure.title for figure in own.figures}, dict(own.grid.rows)

    plain, rows = titles()
    for facts_, title, row, cells in (
        ({"age": [0.0, 1.5, 2.5]}, "Age of the text", "Age, steps", ["0.000", "2.500"]),
        (
            {"own": [1.0, 0.9, 0.75]},
            "The student's own tokens",
            "Student's own tokens, % of tokens",
            ["100.0", "75.0"],
        ),
        ({"validation_loss": [2.0, None, 1.0]}, "Validation loss", "Validation loss", ["2.000", "1.000"]),
        (
            {"share": [0.1, float("nan"), 0.5]},
            "The student's share",
            "Student's share, % of the text",
            ["10.0", "50.0"],
        ),
    ):
        assert title not in plain and row not in rows
        shown, row_cells = titles(**facts_)
        assert shown - plain == {title} and row_cells[row] == cells
    assert rows["Student's entropy, nats"] == ["1.200", "1.200"]


def test_two_trainings_that_wrote_stand_apart(tmp_path):
    folder = make_run(tmp_path / "run", prompts=3)
    (folder / "controls" / "gold_control").mkdir()
    (folder / "controls" / "gold_control" / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    page = parsed(write_report(folder))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids) and {"advice-student", "advice-gold_control"} < set(ids)
    named = {name for _, key, value in page.attributes if key == "aria-labelledby" for name in value.split()}
    assert named <= set(ids) and [one.title for one in own_texts(folder)] == ["Student", "Fine-tuning on gold"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_advice_and_the_teachers_context_are_written_out_as_they_are(tmp_path, payload):
    text = "".join(parsed(write_report(make_run(tmp_path / "run", payload, prompts=1, words=1))).text)
    for words in ("lower its share", "Answer in one short sentence.", "Think first."):
        assert words + payload in text


def test_the_comparison_tells_of_the_text_and_of_the_time_it_took(tmp_path):
    comparison = read_comparison(make_comparison(tmp_path / "comparison", prompts=3))
    spent = spent_grid(comparison, {})
    place = spent.columns.index(("Writing time", "% of training"))
    assert [cells[place] for _, cells in spent.rows] == ["0", "21.3", "42.6", "63.9"]
    own = own_text_grid(comparison, {"jsd": "JSD"})
    assert [title for title, _ in own.columns] == [
        "Length",
        "Ended by itself",
        "Repetition",
        "Shared top tokens",
        "Student's entropy",
    ]
    assert own.rows == [
        ("forward-kl", ["61.5", "93.4", "0.4", "71.0", "1.250"]),
        ("JSD", ["61.5", "93.4", "0.4", "71.0", "1.250"]),
    ]
    assert "not listed trained on text that others wrote" in own.note
    comparison["rollout"] = {name: {"length": 5, "overlap": None} for name in comparison["methods"]}
    own = own_text_grid(comparison, {})
    assert own.columns == [("Length", "tokens per answer")] and "not listed" not in own.note
    page = parsed(write_report(tmp_path / "comparison"))
    assert ("a", "href", "#rollouts") in page.attributes and "The student's own text during training" in "".join(
        page.text
    )
    for cost in comparison["cost"].values():
        cost["writing_share"] = 0.0
    del comparison["rollout"]
    (tmp_path / "comparison" / "comparison.json").write_text(json.dumps(comparison))
    page = parsed(write_report(tmp_path / "comparison"))
    assert ("a", "href", "#rollouts") not in page.attributes and "Writing time" not in "".join(page.text)
    assert own_text_grid(comparison, {}) is None


@pytest.mark.parametrize(
    ("teacher", "head", "words"),
    [
        ("smollm2", "smollm2", []),
        ({"model": "m"}, "m", [("model", "m"), ("prompt", "the same as the student's")]),
        (
            {"model": "m", "weights": "average"}, "m, with the student's weights",
            [("model", "m"), ("weights", "a moving average of the student's (decay 0.95 per step)"), ("prompt", "the same as the student's")],
        ),
        (
            {"model": "m", "weights": "live", "context": {"system": "Be brief.", "user": "{prompt} It is {answer}."}},
            "m, with the student's weights, with other prompts than the student",
            [("model", "m"), ("weights", "the student's, at the current step"), ("system message", "Be brief."),
             ("prompt", "{prompt} It is {answer}."), ("where", "{prompt} is the plain prompt; {answer} is the prompt's known answer"),
             ("student sees", "the plain prompt")],
        ),
        ({"model": "m", "context": {"system": "Be brief."}}, "m, with other prompts than the student",
         [("model", "m"), ("system message", "Be brief."), ("student sees", "the plain prompt")]),
    ],
)  # fmt: skip
def test_the_teacher_is_a_name_or_a_record_and_the_page_says_what_it_was_shown(tmp_path, teacher, head, words):
    assert teacher_name(teacher) + teacher_aside(teacher) == head and teacher_facts(teacher) == words
    folder = make_old_run(tmp_path / "run", "hello")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"teacher": teacher}))
    text = "".join(parsed(write_report(folder)).text)
    name, _, aside = head.partition(",")
    assert f"Teacher: {name} (3 layers, 0 million parameters){',' if aside else ''}{aside}." in text
    source = text[text.rindex("Data and settings") :]
    assert all(name + detail in source for name, detail in words)


def test_a_model_card_says_what_the_teacher_was_shown_and_no_path(recipe_data):
    def settings_of(card):
        return json.loads(card.split("```json")[1].split("```")[0])

    assert not settings_of(model_card(parse(recipe_data), "student", "tiny@1")).keys() & {"teacher", "rollout"}
    writes = {"writer": [{"by": "student"}], "rollout": {"ahead": 4}}
    path = recipe_data["teacher"]
    shown = model_card(
        parse(recipe_data | writes | {"teacher": {"model": path, "context": {"system": "Be brief."}}}),
        "student",
        "tiny@1",
    )
    settings = settings_of(shown)
    assert (
        settings["teacher"] == {"context": {"system": "Be brief."}}
        and settings["rollout"]["ahead"] == 4
        and path not in shown
    )


# The judge


def of_judge(**pairs):
    return judge_section(
        {"judge": {"model": "judge@1", "pairs": {f"student - {name}": pair for name, pair in pairs.items()}}}
    )


def test_what_a_judge_says_stands_in_a_table_with_how_far_to_believe_it(tmp_path):
    folder = make_run(tmp_path / "run", prompts=3)
    section = judge_section(read_summary(folder))
    assert [title for title, _ in section.grid.columns] == [
        "Win rate", "Wins", "Ties", "Losses", "Unreadable", "Consistency", "First answer wins", "Longer answer wins", "Length",
    ]  # fmt: skip
    rows = dict(section.grid.rows)
    assert list(rows) == ["Student before training", "Fine-tuning control", "Teacher"]
    assert (
        rows["Teacher"][1:] == ["9", "12", "36", "3", "80 %", "52 %", "55 %", "−0.62"] and rows["Teacher"][0]["n"] == 57
    )
    assert section.trust == (
        "Trust the judge with care: it keeps too few of its verdicts when answers are swapped, against the "
        "fine-tuning control (41 %); its verdicts correlate with length against the teacher (correlation −0.62)."
    )
    page = parsed(write_report(folder))
    assert ("a", "href", "#judge") in page.attributes and ("h2", "id", "judge") in page.attributes
    text = "".join(page.text)
    assert section.trust in text and section.intro in text and "judge@0123456789abcdef" in text
    assert text.index("The student against each control") < text.index("Verdicts on the held-out prompts")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"judge_is_teacher": True}, "it is the teacher itself and may prefer its own style"),
        (
            {"swap_consistency": 0.59},
            "too few of its verdicts when answers are swapped, against the fine-tuning control (59 %)",
        ),
        ({"length_correlation": 0.51}, "correlate with length against the fine-tuning control (correlation 0.51)"),
        ({"length_correlation": -0.51}, "(correlation −0.51)"),
        ({"unparsable_share": 0.6}, "are unreadable against the fine-tuning control (60 %)"),
        ({"win_rate": interval(1, 1, 1, 9)}, "few of its verdicts are readable against the fine-tuning control (9)"),
    ],
)
def test_every_reason_to_doubt_a_judge_is_named(more, words):
    good = {"swap_consistency": 0.6, "length_correlation": 0.5}
    assert "with care" not in of_judge(sft_control=judged_pair((9, 1, 5, 0), **good)).trust
    section = of_judge(sft_control=judged_pair((9, 1, 5, 0), **good | more), teacher=judged_pair((9, 1, 5, 0), **good))
    assert section.trust.startswith("Trust the judge with care: ") and words in section.trust
    both = of_judge(
        sft_control=judged_pair((9, 1, 5, 0), **good | more), untouched=judged_pair((9, 1, 5, 0), **good | more)
    ).trust
    assert ") and the student before training (" in both or "teacher itself" in both


def test_a_judge_whose_every_verdict_goes_to_the_longer_answer_is_doubted():
    """All verdicts are alike, so that they correlate with nothing."""
    verdicts = [PairVerdict(f"p{n}", "first", "first", 400 + n, 50 + n, ("", "")) for n in range(40)]
    pair = summarise_verdicts(verdicts, judge_is_teacher=False)
    assert pair["length_correlation"] is None and pair["longer_wins"] == 1
    said = of_judge(untouched=pair).trust
    assert said == (
        "Trust the judge with care: the longer answer wins nearly always against the student before training (100 %)."
    )
    short = summarise_verdicts([replace(one, second_length=900) for one in verdicts], judge_is_teacher=False)
    assert "longer" not in of_judge(untouched=short).trust


def test_a_judge_that_scores_shows_no_order():
    pair = judged_pair((9, 1, 5, 0), swap_consistency=None, first_position_share=None)
    judge = {"model": "judge@1", "scores": True, "pairs": {"student - untouched": pair}}
    section = judge_section({"judge": judge})
    assert "each by itself" in section.intro and "order" not in section.intro + section.trust
    assert "swapped" not in section.trust and "not the teacher and it does not just" in section.trust
    titles = [title for title, _ in section.grid.columns]
    cells = dict(zip(titles, section.grid.rows[0][1], strict=True))
    assert cells.get("Consistency", "") == cells.get("First answer wins", "") == ""


def test_a_judge_that_said_nothing_is_believed_nothing():
    nothing = {
        "win_rate": None,
        "swap_consistency": None,
        "first_position_share": None,
        "longer_wins": None,
        "length_correlation": None,
    }
    mute = of_judge(untouched=judged_pair((0, 0, 0, 5), **nothing))
    assert mute.trust == "The judge gave no readable verdict, so nothing follows from it."
    assert mute.grid.rows == [("Student before training", [None, "0", "0", "0", "5", "", "", "", ""])]
    long = judged_pair((8, 2, 2, 0))
    section = of_judge(teacher=long | {"outcomes": long["outcomes"] | {"too_long": 3}})
    assert section.grid.columns[5] == ("Too long", "not judged") and section.grid.rows[0][1][5] == "3"
    assert (
        judge_section({})
        is judge_section({"judge": {}})
        is judge_section({"judge": {"model": "m", "pairs": {}}})
        is None
    )


def test_a_run_without_a_judge_has_no_such_section(tmp_path):
    folder = make_run(tmp_path / "run", prompts=3)
    file = folder / "evaluation" / "summary.json"
    summary = json.loads(file.read_text())
    del summary["judge"]
    file.write_text(json.dumps(summary))
    assert "judge" not in {value.lstrip("#") for _, _, value in parsed(write_report(folder)).attributes}
