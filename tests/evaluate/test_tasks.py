"""Tasks as data: what is read, what is refused and how it is said; what a system writes, draws and is given."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from limbeck.config.builtin import task_folders
from limbeck.elicit.prompts import load_prompts
from limbeck.elicit.verify import verify
from limbeck.evaluate import measure
from limbeck.evaluate import protocol as protocols
from limbeck.evaluate.generation import answer_all
from limbeck.evaluate.protocol import EvaluationProtocol
from limbeck.evaluate.records import CheckedAnswer, ItemResult
from limbeck.evaluate.statistics import pass_at_k, ratio_interval
from limbeck.evaluate.tasks import load_task, run_task, summarise
from limbeck.evaluate.wording import rouge_l
from limbeck.storage.files import file_sha256
from limbeck.types import RecipeError, UserError, canonical_json

HEAD = "name: mine\nversion: 3\ndescription: d\ntest: test.jsonl\n"
CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 0}
RANKING = {"query": "q", "documents": [{"text": "a", "relevance": 1}, {"text": "b", "relevance": 0}]}


def write(folder, yaml, *lines, references=None):
    folder.mkdir(exist_ok=True)
    given = [line.partition(":")[0] for line in yaml.splitlines()]
    head = [line for line in HEAD.splitlines(keepends=True) if line.partition(":")[0] not in given]
    (folder / "task.yaml").write_text("".join(head) + yaml)
    (folder / "test.jsonl").write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    if references is not None:
        (folder / "refs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in references))
    return str(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_items_are_read_as_tables_write_them(encoding, tmp_path):
    """Keys without a value are as if left out, whatever the encoding."""
    rows = [CHOICE | {"question": text, "id": None, "kind": None, "source": None} for text in ("é", "日本")]
    folder = write(tmp_path / "mine", "kind: multiple_choice\n")
    (tmp_path / "mine" / "test.jsonl").write_bytes(
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode(encoding)
    )
    items = load_task(folder).items
    assert [(item.id, item.fields["question"]) for item in items] == [("mine/line-1", "é"), ("mine/line-2", "日本")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (r'{"question": "\ud83d", "choices": ["a", "b"], "answer": 0}', "half a character"),
        ('{"question": "a", "question": "b", "choices": ["a", "b"], "answer": 0}', "'question' stands twice"),
        ("[" * 100000, "not JSON"),
    ],
    ids=range(3),
)
def test_items_that_are_no_text_are_refused_by_their_line(line, words, tmp_path):
    with pytest.raises(UserError, match=rf"test\.jsonl, line 2: .*{words}"):
        load_task(write(tmp_path / "mine", "kind: multiple_choice\n", CHOICE, line))


SIZES = {"everyday": 72, "choices": 48, "topics": 48, "passages": 14, "lookup": 18, "sums": 24, "sums-budgets": 24}


def test_the_built_in_tasks_are_what_they_claim():
    tasks = {name: load_task(name) for name in task_folders()}
    assert {name: len(task.items) for name, task in tasks.items()} == SIZES
    for name, task in tasks.items():
        assert (
            task.name == name
            and task.version
            and task.description
            and "licence" in (task_folders()[name] / "task.yaml").read_text()
        )
        assert all(item.id.startswith(f"{name}/") for item in task.items)
        assert len({item.text for item in task.items}) == len(task.items) and all(text for _, text in task.texts)
        assert all(task.title(metric) and task.better(metric) in ("low", "high", "none") for metric in task.metrics)
        assert json.loads(canonical_json(task.settings)) == task.settings
    assert Counter(item.answer for item in tasks["choices"].items) == dict.fromkeys(range(4), 12)
    assert all(len(item.choices) == 4 for item in tasks["choices"].items)
    assert Counter(item.answer for item in tasks["topics"].items) == dict.fromkeys(range(6), 8)
    assert all(60 <= len(item.text.split()) <= 100 for item in tasks["passages"].items)
    assert all(sorted(item.relevances) == [0, 0, 1, 2] for item in tasks["lookup"].items)
    first = Counter(item.relevances.index(2) for item in tasks["lookup"].items)
    assert max(first.values()) - min(first.values()) <= 1
    headlines = {name: (task.metrics[0], task.better(task.metrics[0])) for name, task in tasks.items()}
    assert headlines == {
        "everyday": ("pass_rate", "high"), "sums": ("pass_rate", "high"), "choices": ("acc", "high"), "topics": ("acc", "high"), "passages": ("bits_per_byte", "low"),
        "lookup": ("ndcg@4", "high"), "sums-budgets": ("pass_rate@128", "high"),
    }  # fmt: skip


PINNED = {  # a change of items is another task: raise its version, then pin it here
    "choices": ("1.0", "dddaaacd5dc2b462"), "topics": ("1.0", "11a3e40569c2c6e7"), "passages": ("1.0", "ad70f0acd8409fa1"), "lookup": ("1.0", "b20089568cc46378"),
    "everyday": ("1.1", "434b819aa350acae"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_items_do_not_change_without_their_version(name):
    assert (load_task(name).version, file_sha256(task_folders()[name] / "test.jsonl")[:16]) == PINNED[name]


def test_held_out_prompts_and_the_task_are_the_same_prompts():
    assert load_task("everyday", limit=9).prompts == tuple(load_prompts("builtin/everyday", part="test")[:9])
    assert load_task("choices").prompts == ()


def test_a_folder_of_the_users_own_is_a_task(tmp_path):
    task = load_task(write(tmp_path / "t", "kind: multiple_choice\n", CHOICE, CHOICE | {"id": "x", "kind": "hard"}))
    assert (task.name, task.version, task.kind.name, task.metrics) == (
        "mine",
        "3",
        "multiple_choice",
        ("acc", "acc_norm", "probability", "brier"),
    )
    assert [item.id for item in task.items] == ["mine/line-1", "mine/x"]
    assert task.settings["template"] == "Question: {question}\nAnswer:"
    assert task.title("pass@5") == "Pass@5" and task.better("brier") == "low" and task.better("unheard") == "none"


def test_an_unknown_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(
        RecipeError, match=r"evaluate.metrics: no task is named 'choicse'; did you mean 'choices'\?; or give a folder"
    ):
        load_task("choicse")
    with pytest.raises(RecipeError, match=r"its folder holds no task\.yaml"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("kind: [\n", "not valid YAML"), ("kind: multiple\n", "kind"), ("kinds: perplexity\n", "kinds is unknown; did you mean 'kind'?"),
        ("settings: {temprature: 1}\n", "settings: temprature is unknown; did you mean 'temperature'?"),
        ("settings: {seeds: [1, 2]}\n", "at temperature 0 every answer is the same"), ("settings: {temperature: -1}\n", "temperature"),
        ("settings: {temperature: 1, samples: 4, pass_at: [5]}\n", "raise samples"), ("settings: {temperature: 1, samples: 4, seeds: [1]}\n", "not both"),
        ("settings: {temperature: 1, seeds: [1, 1]}\n", "is given twice"), ("settings: {template: 'Say {x}'}\n", "template must name {prompt}"),
        ("metrics: [acc]\n", "can't give the metric 'acc'"), ("metrics: [rouge_l]\n", "can't give the metric 'rouge_l'"),
        ("test: ../test.jsonl\n", "without any folder"), ("test: none.jsonl\n", "can't read"), ("name: A/B\n", "name 'A/B'"), ("name: fidelity\n", "not fidelity"),
        ("kind: classification\n", "labels is required"), ("kind: classification\nsettings: {labels: [a, a]}\n", "is given twice"),
        ("kind: perplexity\nsettings: {window: 8, stride: 8}\n", "stride 8 must be below the window"), ("kind: ranking\nsettings: {k: []}\n", "settings: k"),
        ("kind: multiple_choice\nsettings: {template: 'Answer:'}\n", "must name a field"), ("kind: multiple_choice\nsettings: {template: '{answer}'}\n", "can't name answer"),
        ("kind: perplexity\nreferences: refs.jsonl\n", "only a task of kind generation"),
    ],
)  # fmt: skip
def test_a_malformed_task_file_is_named_with_its_cure(tmp_path, yaml, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_task(write(tmp_path / "t", yaml, {"prompt": "p"}))
    assert "task.yaml" in str(error.value) or "none.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("generation", {"prompt": " "}, 'needs a non-empty text under "prompt"'), ("generation", {"prompt": "p", "reference": ["x"]}, "did you mean 'references'?"),
        ("generation", {"prompt": "p", "references": []}, '"references"'), ("generation", {"prompt": "p", "references": ["", "a"]}, '"references"'),
        ("generation", {"prompt": "p", "check": {"type": "numbr"}}, "no verifier 'numbr'"), ("generation", "{", "not JSON"), ("generation", "[1]", "must be a JSON object"),
        ("multiple_choice", CHOICE | {"answer": 2}, "0 to 1; got 2"), ("multiple_choice", CHOICE | {"answer": True}, "got True"), ("multiple_choice", CHOICE | {"answer": "a"}, "got 'a'"),
        ("multiple_choice", CHOICE | {"choices": ["a"]}, "at least two different"), ("multiple_choice", CHOICE | {"choices": ["a", "a"]}, "at least two different"),
        ("multiple_choice", CHOICE | {"question": 1}, '"question"'), ("multiple_choice", CHOICE | {"choises": 1}, "did you mean 'choices'?"),
        ("ranking", RANKING | {"documents": ["a"]}, '"documents" must be a list'), ("ranking", RANKING | {"query": ""}, '"query"'),
        ("ranking", {"query": "q", "documents": [{"text": "a", "relevance": 1}, {"text": "b", "relevance": 1}]}, "two different relevances"),
        ("ranking", {"query": "q", "documents": [{"text": "a", "relevance": -1}, {"text": "b", "relevance": 1}]}, "got -1"),
        ("ranking", '{"query": "q", "documents": [{"text": "a", "relevance": NaN}]}', "got nan"), ("ranking", '{"query": "q", "documents": [{"text": "a", "relevance": 1' + "0" * 400 + "}]}", "got 1000"),
        ("perplexity", {"text": ""}, '"text"'),
    ],
)  # fmt: skip
def test_a_malformed_item_names_file_and_line(tmp_path, kind, line, message):
    good = {"generation": {"prompt": "p"}, "multiple_choice": CHOICE, "ranking": RANKING, "perplexity": {"text": "t"}}[
        kind
    ]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_task(write(tmp_path / "t", f"kind: {kind}\n", good, "", line))
    assert "test.jsonl, line 3" in str(error.value)


def test_labels_ids_and_empty_tasks_are_checked(tmp_path):
    labels = "kind: classification\nsettings: {labels: [spam, fine]}\n"
    with pytest.raises(UserError, match="line 1: 'spma' is not one of the task's labels; did you mean 'spam'"):
        load_task(write(tmp_path / "a", labels, {"text": "t", "label": "spma"}))
    with pytest.raises(UserError, match="line 2: the id 'x' is given twice"):
        load_task(write(tmp_path / "b", "", {"id": "x", "prompt": "p"}, {"id": "x", "prompt": "q"}))
    with pytest.raises(UserError, match="holds no item"):
        load_task(write(tmp_path / "c", "", "", "  "))


def test_references_may_stand_in_a_file_of_the_same_length(tmp_path):
    items, yaml = [{"prompt": "p"}, {"prompt": "q"}], "references: refs.jsonl\n"
    task = load_task(write(tmp_path / "a", yaml, *items, references=["one", ["two", "three"]]))
    assert [prompt.answers for prompt in task.prompts] == [("one",), ("two", "three")] and "rouge_l" in task.metrics
    with pytest.raises(UserError, match=r"holds references for 1 items, .* holds 2"):
        load_task(write(tmp_path / "b", yaml, *items, references=["one"]))
    with pytest.raises(UserError, match="references for 3 items"):
        load_task(write(tmp_path / "c", yaml, *items, references=["one", "two", "three"]))
    with pytest.raises(UserError, match="line 2: must be a text or a list"):
        load_task(write(tmp_path / "d", yaml, *items, references=["one", 2]))
    with pytest.raises(UserError, match="give them in one place"):
        load_task(write(tmp_path / "e", yaml, {"prompt": "p", "references": ["r"]}, references=["one"]))


LINES = [
    {
        "id": "a",
        "prompt": "why is the sky blue",
        "check": {"type": "pattern", "pattern": "a"},
        "references": ["the sky is blue", "a cat"],
    },
    {"id": "b", "prompt": "count one two", "check": {"type": "contains", "all": ["zzz"]}},
    {"id": "c", "prompt": "the cat", "references": ["the cat sat on the mat"]},
]


def test_greedy_answers_are_scored_where_a_metric_applies(tmp_path, tiny):
    task = load_task(write(tmp_path / "t", "", *LINES))
    told = []
    scored = run_task(task, tiny, lambda *counts: told.append(counts), max_tokens=12)
    answers = answer_all(tiny, task.prompts, 12)
    assert told[-1] == (3, 3) and [item.item for item in scored] == ["mine/a", "mine/b", "mine/c"]
    always = {"finished", "answered", "tokens"}
    assert [set(item.scores) for item in scored] == [
        {*always, "pass_rate", "rouge_l"}, {*always, "pass_rate"}, {*always, "rouge_l"},
    ]  # fmt: skip
    for item, answer, prompt in zip(scored, answers, task.prompts, strict=True):
        assert item.text == answer.text and item.facts == {
            "tokens": answer.tokens,
            "finished": answer.finished,
            "passed": answer.passed,
            "answered": True,
        }
        assert item.scores["tokens"] == answer.tokens
        if prompt.check:
            assert item.scores["pass_rate"] == float(verify(prompt.check, answer.text))
        if prompt.answers:
            assert item.scores["rouge_l"] == max(rouge_l(answer.text, [reference]) for reference in prompt.answers)
    summary = summarise(task, scored)
    assert (
        list(summary) == ["mine/pass_rate", "mine/rouge_l", "mine/finished", "mine/answered", "mine/tokens"]
        and summary["mine/pass_rate"]["n"] == 2
    )
    assert summary["mine/rouge_l"]["value"] == pytest.approx(
        np.mean([scored[0].scores["rouge_l"], scored[2].scores["rouge_l"]])
    )
    assert (
        run_task(task, tiny, max_tokens=12) == scored
        and ItemResult(**json.loads(canonical_json(vars(scored[0])))) == scored[0]
    )


def test_given_answers_are_taken_and_only_the_others_written(tmp_path, tiny, monkeypatch):
    task = load_task(write(tmp_path / "t", "", *LINES))
    given = {
        prompt.id: CheckedAnswer(prompt.id, "", "the cat sat on the mat", 7, True, True) for prompt in task.prompts[1:]
    }
    scored = run_task(task, tiny, answers=given, max_tokens=6)
    assert [item.text for item in scored[1:]] == ["the cat sat on the mat"] * 2
    assert scored[1].scores["pass_rate"] == 1 and scored[2].scores["rouge_l"] == 1
    assert scored[0] == run_task(load_task(str(tmp_path / "t"), limit=1), tiny, max_tokens=6)[0]
    own_length = load_task(write(tmp_path / "u", "settings: {max_tokens: 4}\n", *LINES))
    assert not own_length.shares_answers and task.shares_answers
    assert all(item.scores["tokens"] <= 4 for item in run_task(own_length, tiny, answers=given))


def test_draws_of_a_prompt_are_one_item_and_its_mean(tmp_path, tiny):
    """MiniLLM's protocol: temperature 1, several seeds, ROUGE-L with stemming, the best reference; and pass@k over the draws."""
    yaml = "settings: {temperature: 1.0, seeds: [10, 20, 30, 40, 50], pass_at: [1, 3], max_tokens: 16}\n"
    task = load_task(write(tmp_path / "t", yaml, *LINES))
    assert (
        task.metrics == ("pass_rate", "pass@1", "pass@3", "rouge_l", "finished", "answered", "tokens")
        and not task.shares_answers
    )
    given = {prompt.id: CheckedAnswer(prompt.id, "", "x", 1, True, True) for prompt in task.prompts}
    scored = run_task(task, tiny, answers=given)
    for item, prompt in zip(scored, task.prompts, strict=True):
        draws = item.facts["draws"]
        assert [draw["seed"] for draw in draws] == [10, 20, 30, 40, 50] and len({draw["text"] for draw in draws}) > 1
        assert item.scores["tokens"] == pytest.approx(np.mean([draw["tokens"] for draw in draws]))
        if prompt.check:
            passed = [verify(prompt.check, draw["text"]) for draw in draws]
            assert item.scores["pass_rate"] == item.scores["pass@1"] == pytest.approx(np.mean(passed))
            assert item.scores["pass@3"] == pass_at_k(5, sum(passed), 3)
        if prompt.answers:
            assert item.scores["rouge_l"] == pytest.approx(
                np.mean([rouge_l(draw["text"], prompt.answers) for draw in draws])
            )
    assert 0 < scored[0].scores["pass@1"] < scored[0].scores["pass@3"]
    assert (
        run_task(load_task(str(tmp_path / "t"), limit=1), tiny)[0] == scored[0]
    )  # draws don't depend on the other prompts
    assert summarise(task, scored)["mine/pass@3"]["n"] == 2


def test_only_the_metrics_asked_for_are_kept_in_their_order(tmp_path, tiny):
    task = load_task(write(tmp_path / "t", "kind: multiple_choice\nmetrics: [brier, acc]\n", CHOICE))
    scored = run_task(task, tiny)
    assert set(scored[0].scores) == {"brier", "acc"} and list(summarise(task, scored)) == ["mine/brier", "mine/acc"]


@pytest.mark.parametrize("name", ["choices", "topics", "passages", "lookup"])
def test_every_built_in_task_runs_and_sums_up(tiny, name):
    task = load_task(name, limit=3)
    scored = run_task(task, tiny)
    assert [item.item for item in scored] == [item.id for item in task.items]
    summary = summarise(task, scored)
    assert list(summary) == [f"{name}/{metric}" for metric in task.metrics]
    for metric in scored[0].scores:
        weights = [item.weights.get(metric, 1.0) for item in scored]
        values, share = [item.scores[metric] for item in scored], task.better(metric) == "high"
        assert summary[f"{name}/{metric}"] == ratio_interval(values, weights, of_share=share).as_dict()
    if name == "topics":
        answers = [(item.facts["answer"], item.facts["chosen"]) for item in scored]
        hits = Counter(a for a, b in answers if a == b)
        named = Counter(place for pair in answers for place in pair)
        assert summary["topics/macro_f1"]["value"] == pytest.approx(
            np.mean([2 * hits[label] / named[label] for label in named])
        )
    assert summarise(task, []) == {}


def test_thinking_that_the_template_begins_and_never_ends_is_no_answer(tmp_path, tiny, monkeypatch):
    task = load_task(write(tmp_path / "t", "", *LINES))
    plain = run_task(task, tiny, max_tokens=12)
    monkeypatch.setattr(type(tiny), "opens_thinking", lambda model, prompt_ids: "<think>")
    thought = run_task(task, tiny, max_tokens=12)
    assert [item.scores["answered"] for item in plain] == [1, 1, 1] and [
        item.scores["answered"] for item in thought
    ] == [0, 0, 0]
    assert thought[0].scores["pass_rate"] == 0 and thought[2].scores["rouge_l"] == 0
    assert [item.text for item in thought] == ["<think>" + item.text for item in plain]
    monkeypatch.undo()
    prompt = tiny.text_ids("assistant\n<think>\n")
    assert tiny.opens_thinking(prompt) == "<think>" and tiny.opens_thinking(prompt + tiny.text_ids("</think>")) == ""


def test_records_of_other_verdicts_are_measured_anew(tmp_path, tiny, monkeypatch):
    protocol = EvaluationProtocol(rows=(), prompts=(), tasks=(), max_tokens=8, own_prompts=1)
    assert measure.Bench(tmp_path, None, tiny, protocol).outdated == []
    for name in ("answers-student.jsonl", "own-student.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert measure.Bench(tmp_path, None, tiny, protocol).outdated == []
    monkeypatch.setattr(protocols, "VERSION", protocols.VERSION + 1)
    assert measure.Bench(tmp_path, None, tiny, protocol).outdated == ["answers"]
    assert not (tmp_path / "answers-student.jsonl").exists() and (tmp_path / "own-student.jsonl").exists()
