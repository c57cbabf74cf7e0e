"""The page: inert whatever a model wrote, without network, and claiming no more than its intervals."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from xml.etree import ElementTree

import pytest
import yaml

from limbeck.report import excerpt as excerpts
from limbeck.report.excerpt import embedded, read_excerpt
from limbeck.report.figures import pareto_figures
from limbeck.report.grids import facts, kinds_grid, seeds_grid
from limbeck.report.metrics import Metric, is_clear, mark, metrics_of
from limbeck.report.page import compare_verdict, read_comparison, read_summary, verdict, write_report
from limbeck.report.plots import MOST_POINTS, Scale, Series, Spot, Text, Whisker, bars, curves, forest, scatter, spread, thinned
from limbeck.report.table import compare_markdown, markdown, paired_table, systems_tables
from limbeck.types import UserError
from tests.report_folders import KINDS, PAYLOADS, interval, make_comparison, make_run, write_lines

TEXT = Text("key", "A title", "What it shows", "x", "y")
LOW = Metric("forward_kl", "Forward KL", "nats", "low", "")


def make_old_run(folder, text="", prompts=0, words=0):
    """A run's folder as the first version wrote it: no descriptions of metrics, no p values, first choices only."""
    metrics = {"forward_kl": interval(0.5, 0.4, 0.6), "top1_agreement": interval(0.6, 0.5, 0.7), "day/pass_rate": interval(0.1, 0.0, 0.2)}
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
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": text, "title": "t" + text, "paper": text, "teacher": text}))
    answer = {"prompt_id": "p", "kind": text, "text": text, "tokens": 3, "finished": True, "passed": False}
    for name in ("teacher", "student"):
        write_lines(folder / "evaluation" / f"answers-{name}.jsonl", [answer])
    write_lines(folder / "evaluation" / "prompts.jsonl", [{"prompt_id": "p", "prompt": text}])
    tokens = [[text, 0.5, text, text], [" b", 9.0, "c", "d"]]
    write_lines(
        folder / "evaluation" / "lens.jsonl", [{"writer": writer, "prompt_id": "p", "tokens": tokens} for writer in ("teacher", "student")]
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


def test_the_policy_allows_one_script_and_one_style_sheet_and_nothing_else(tmp_path):
    file = write_report(make_run(tmp_path / "run"))
    page = parsed(file)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "default-src" in value)
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
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps({"systems": {"student": {"forward_kl": interval(0.5, 0.4, 0.6)}}}))
    page = "".join(parsed(write_report(tmp_path)).text)
    assert "stays 0.50 nats per token (0.40 to 0.60)" in page and "Answers side by side" not in page


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
        "3 stand there in the same words and are left out",
        "1 is like a training text, yet counted",
        "intervals are wide",
    ):
        assert text.index(words) < text.index("What was kept")
    assert "everyday/3" in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((-0.1, -0.2, -0.05), "it is nearer than fine-tuning"),
        ((0.1, 0.05, 0.2), "fine-tuning on the teacher's text came nearer"),
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
    few = {"student - untouched": {"forward_kl": interval(-0.5, -0.6, -0.4) | {"n": 9}}}
    assert "no clear change from 1.00" in verdict({"systems": systems, "paired": few})
    same = {"student - untouched": {"forward_kl": interval(0.1, -0.4, 0.6)}}
    assert "no clear change from 1.00" in verdict({"systems": systems, "paired": same})


def test_the_verdict_tells_of_leaks():
    summary = {
        "systems": {"student": {"forward_kl": interval(0.5, 0.4, 0.6)}},
        "leaks": [{"kind": "exact"}, {"kind": "same_but_for_numbers"}],
    }
    assert verdict(summary).endswith("2 evaluation items were found in the training text, 1 of them left out and 1 counted.")
    assert verdict(summary | {"leaks": [{"kind": "overlap"}]}).endswith("1 evaluation item was found in the training text and left out.")


def test_a_run_without_divergences_is_judged_by_its_task():
    metrics = {"t/score": {"title": "Score", "unit": "", "better": "high", "group": "Task t"}}
    summary = {
        "systems": {"student": {"t/score": interval(0.4, 0.3, 0.5)}}, "metrics": metrics,
        "paired": {"student - untouched": {"t/score": interval(0.2, 0.1, 0.3)}, "student - sft_control": {"t/score": interval(0.1, -0.1, 0.3)}},
    }  # fmt: skip
    told = verdict(summary)
    assert "reaches 0.400 (0.300 to 0.500); better than the student before training (+0.200" in told
    assert "no clear difference from the fine-tuning control (+0.100" in told
    assert "Nothing was measured" in verdict({"systems": {"student": {}}})


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
    told = compare_verdict(comparison_of(a=clear, b=worse, c=adjusted_away))
    assert "over 2 seeds" in told and "a (-0.100, -0.200 to -0.050, p = 0.010) is clearly better than base" in told
    assert (
        "b (+0.100, +0.050 to +0.200, p = 0.010) is clearly worse" in told
        and "of c (-0.100, -0.200 to -0.050) the difference may be chance" in told
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
    told = compare_markdown(read_comparison(make_comparison(tmp_path / "comparison")))
    assert "| Forward KL (on its own text) | -0.110 (-0.140 to -0.080), p = 0.003, better |" in told


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
    assert len(short.items) == 200 and short.shortened == 800 and all(len(a[0]) == 400 for item in short.items for a in item["answers"])
    monkeypatch.setattr(excerpts, "ANSWER_BYTES", 150_000)
    monkeypatch.setattr(excerpts, "LENS_BYTES", 20_000)
    few = read_excerpt(folder / "evaluation", ["teacher"])
    assert 24 < len(few.items) < 100 and {item["kind"] for item in few.items} == set(KINDS) and few.lenses_left_out > 0
    assert sum(len(embedded(item | {"lens": {}})) for item in few.items) < 150_000 + 20 * len(few.items)
    assert [item["id"] for item in few.items[:24]] == [item["id"] for item in whole.items[:24]]
    page = "".join(parsed(write_report(folder)).text)
    assert f"{len(few.items)} of 200 prompts are on this page" in page and "shortened here" in page and "found no room" in page


def test_choices_of_a_token_may_be_one_text_or_several_with_probabilities(tmp_path):
    tokens = [["a", 0.5, "b", [["c", 0.7512345], ["d", 0.1]]], ["x", float("inf"), "y", "z"]]
    write_lines(tmp_path / "lens.jsonl", [{"writer": "teacher", "prompt_id": "p", "tokens": tokens}])
    write_lines(
        tmp_path / "answers-teacher.jsonl", [{"prompt_id": "p", "kind": "k", "text": "t", "tokens": 1, "finished": True, "passed": None}]
    )
    (item,) = read_excerpt(tmp_path, []).items
    assert item["lens"]["teacher"] == [["a", 0.5, [["b", None]], [["c", 0.7512], ["d", 0.1]]], ["x", None, [["y", None]], [["z", None]]]]


def test_a_name_in_a_summary_is_never_a_path(tmp_path):
    folder = make_run(tmp_path / "run")
    (tmp_path / "run" / "secret.jsonl").write_text('{"prompt_id": "explain-00000", "text": "secret"}\n')
    file = folder / "evaluation" / "summary.json"
    summary = json.loads(file.read_text())
    summary["systems"]["x/../../secret"] = summary["systems"]["student"]
    file.write_text(json.dumps(summary))
    assert '"secret"' not in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [0, 5, 10]), (0.0, 4e-5, [0, 1e-5, 2e-5, 3e-5, 4e-5]), (5, 5, None)],
)
def test_ticks_are_round_and_inside(low, high, wanted):
    scale = Scale(low, high, 0, 100)
    assert wanted is None or scale.ticks() == pytest.approx(wanted)
    assert scale(low) == 0 and (low == high or scale(high) == 100)


def test_labels_are_spread_and_keep_their_order():
    moved = spread([10, 10, 11, 80], 14)
    assert moved[0] < moved[1] < moved[2] and min(moved[1] - moved[0], moved[2] - moved[1]) > 13.5 and moved[3] == 80


def test_long_curves_are_thinned_to_means():
    points = thinned([(n, n % 2) for n in range(10_000)])
    assert len(points) <= MOST_POINTS + 1 and points[-1] == (9999, 1) and all(0.4 < y < 0.6 for _, y in points[:-1])


def test_plots_are_well_formed_and_say_what_they_show():
    hostile = "</svg><script>&\"'"
    plots = [
        curves(
            TEXT, [Series(hostile, [(1, 2.0), (2, 1.0), (3, float("nan"))], "accent"), Series("flat", [(1, 0.0), (2, 0.0)])], diagonal=True
        ),
        scatter(TEXT, [Spot(hostile, 1, 2, 1.5, 2.5, True), Spot("b", 3, 1, 0.5, 1.5)], [(1, 2), (3, 1)]),
        forest(TEXT, [Whisker(hostile, -0.1, -0.2, -0.05, True), Whisker("b", 0, -0.2, 0.2, False)]),
        bars(TEXT, [(hostile, 0.5, "50 %"), ("b", 0.0, "0 %")]),
    ]
    for svg in plots:
        root = ElementTree.fromstring(svg)
        assert root.find("title").text == "A title" and root.find("desc").text == "What it shows" and root.get("role") == "img"
        assert hostile in "".join(root.itertext()) and "nan" not in svg and "style" not in svg
    whiskers = ElementTree.fromstring(plots[2]).findall("circle")
    assert [circle.get("class") for circle in whiskers] == ["dot accent", "dot hollow"]
    low, high = (ElementTree.fromstring(plots[0]).find("polyline").get("points").split()[n] for n in (1, 0))
    assert float(low.split(",")[1]) > float(high.split(",")[1]), "less stands lower on the page"
    assert curves(TEXT, [Series("one", [(1, 1)])]) == scatter(TEXT, []) == forest(TEXT, []) == bars(TEXT, []) == ""


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
        "0.002",
    ]


def test_facts_are_written_one_by_one():
    assert facts({"top_p": 0.95, "gpu": None, "settings": {"decoding": "greedy", "n": 12_000}, "on": True, "list": [1]}) == [
        ("top p", "0.95"), ("gpu", "none"), ("settings: decoding", "greedy"), ("settings: n", "12,000"), ("on", "yes"), ("list", "[1]"),
    ]  # fmt: skip
