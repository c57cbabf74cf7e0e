"""The page: inert whatever a model wrote, without scripts or network, and claiming no more than its intervals."""

from __future__ import annotations

import html.parser
import json

import pytest
import yaml

from limbeck.report.page import verdict, write_report
from limbeck.types import UserError

CORPUS = [
    "<script>alert(1)</script>", "</p><img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "javascript:alert(1)", "{{ 7 * 7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}x{% endfor %}", "<!--", "]]>", "</title><svg onload=alert(1)>", "\u202etxt", "&lt;b&gt;",
]  # fmt: skip


def interval(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 60}


def make_run(folder, text="hello"):
    metrics = {"forward_kl": interval(0.5, 0.4, 0.6), "top1_agreement": interval(0.6, 0.5, 0.7), text: interval(0.1, 0.0, 0.2)}
    summary = {
        "recipe": "a" * 64, "name": text, "controls": ["untouched"],
        "systems": {"teacher": metrics, "untouched": metrics, "student": metrics, text: {}},
        "paired": {"student - untouched": {"forward_kl": interval(-0.1, -0.2, -0.05), text: interval(0, -1, 1)}},
        "tasks": {text: {"version": text, "decoding": "greedy", "max_tokens": 5}},
        "sizes": {name: {"layers": 3, "parameters": 10} for name in ("teacher", "student")},
        "held_out": {"answers": 60, "temperature": 0.7, "top_p": 1.0, "max_tokens": 5, "cut_off": 1},
        "machine": {"python": text, "torch": text, "threads": 2},
    }  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": text, "title": text, "paper": text, "teacher": text}))
    answer = {"prompt_id": "p", "kind": text, "text": text, "tokens": 3, "finished": True, "passed": False}
    for name in ("teacher", "student"):
        (folder / "evaluation" / f"answers-{name}.jsonl").write_text(json.dumps(answer) + "\n")
    (folder / "evaluation" / "prompts.jsonl").write_text(json.dumps({"prompt_id": "p", "prompt": text}) + "\n")
    lens = [
        {"writer": writer, "prompt_id": "p", "tokens": [[text, 0.5, text, text], [" b", 9.0, "c", "d"]]}
        for writer in ("teacher", "student")
    ]
    (folder / "evaluation" / "lens.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lens))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1.0 / n, "response_tokens": 10, "seconds": 1.0}) + "\n" for n in (1, 2, 3))
        + '{"step": 4, "lo'
    )
    (folder / "start.json").write_text(json.dumps({"kept": [0], "drops": [[1, 0.5]]}))
    return folder


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("text", CORPUS)
def test_everything_a_model_could_write_stays_text(tmp_path, text):
    def structure(content, name):
        page = Tags()
        page.feed(write_report(make_run(tmp_path / name, content)).read_text())
        return page

    attacked, plain = structure(text, "attacked"), structure("hello", "plain")
    assert attacked.tags == plain.tags
    assert [(tag, name) for tag, name, _ in attacked.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert "script" not in attacked.tags
    for _, name, value in attacked.attributes:
        assert not name.startswith("on") and name != "src"
        if name == "href":
            assert value == "data:,"
    assert text in "".join(attacked.text)


def test_the_page_forbids_scripts_and_network(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    assert "default-src 'none'" in page and "<script" not in page and "http://" not in page and "https://" not in page


def test_without_an_evaluation_the_user_is_told(tmp_path):
    with pytest.raises(UserError, match="limbeck evaluate"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((-0.1, -0.2, -0.05), "it is nearer than fine-tuning"),
        ((0.1, 0.05, 0.2), "fine-tuning on the same text came nearer"),
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
    assert "no clear change from 1.00" in verdict({"systems": systems, "paired": same})
