"""`limbeck new`: what it writes for every job, what it says of the data, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck import check, load_recipe, run
from limbeck.cli import app
from limbeck.commands.new import command, write
from limbeck.commands.new.data import Example
from limbeck.commands.new.draft import block, inline, literal
from limbeck.commands.new.gold import calls_of, checks_of_results, number_of
from limbeck.commands.new.split import split
from limbeck.commands.new.wishes import EMBEDDED, TASKS, slug
from limbeck.config.yaml_text import load_yaml
from limbeck.elicit.rendering import render
from limbeck.evaluate.by_label import labels_of
from limbeck.evaluate.tasks import load_task
from limbeck.models import placement
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError, UserError

THINGS = [
    f"{size} {thing}" for size in ("small", "large", "old", "new", "red") for thing in ("cup", "door", "lamp", "boat")
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(rows, columns=("text", "label"), name="data.csv", encoding="utf-8"):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    Path(name).write_bytes(text.getvalue().encode(encoding))
    return name


def lines(rows, name="data.jsonl"):
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def labelled(labels=("good", "bad"), each=10):
    return [(f"{thing} number {n} of {label}", label) for label in labels for n, thing in enumerate(THINGS[:each])]


def quickly(*flags, **settings):
    """Without a teacher, whose question would be rendered in a process of its own."""
    return new("--teacher", "none", *flags, **settings)


def new(*flags, task="classify", data=None, where="mine", answers=None):
    data = data or table(labelled())
    options = ["--task", task] if task else []
    result = CliRunner().invoke(app, ["new", where, *options, "--data", data, *flags], input=answers)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# What is written


def test_a_table_becomes_a_classifier(here):
    said = new()
    assert {file.name for file in (here / "mine").iterdir()} == {
        "recipe.yaml",
        "train.jsonl",
        "held-out.jsonl",
        "task",
    }
    recipe = load_recipe("mine/recipe.yaml")
    method = resolve(recipe)
    (task,) = method.tasks
    assert task.kind.name == "generation" and "teacher is asked with its question" in task.description
    trained = {prompt.text for prompt in method.training_prompts}
    assert len(trained) == 16 and len(task.items) == 4 and trained.isdisjoint(item.text for item in task.items)
    assert Counter(item.check["answer"] for item in task.items) == {"good": 2, "bad": 2}
    assert labels_of(task) == ["bad", "good"]
    assert recipe.elicit[0].params["parse"] == {"label": ["bad", "good"]}
    assert recipe.evaluate.controls == ["untouched", "gold_control"] and recipe.loss[0].name == "cross_entropy"
    assert "2 labels: good 10, bad 10" in said and "16 texts to train on, 4 held out" in said
    assert "text as the prompt, label as the answer" in said and "limbeck check mine/recipe.yaml" in said


def test_the_teacher_is_asked_with_all_labels_and_an_example_of_each():
    new()
    ask = load_recipe("mine/recipe.yaml").elicit[0].params
    (row,) = render({"prompt": ask["prompt"]}, [{"prompt": "a {text}", "labels": ask["parse"]["label"]}], "here").rows
    assert "\n- bad\n- good\n" in row["prompt"] and row["prompt"].endswith("Text: a {text}\nLabel:")
    assert row["prompt"].count("\nLabel: ") == 2
    trained = {prompt["prompt"]: prompt["answer"] for prompt in read("mine/train.jsonl")}
    for part in row["prompt"].split("Text: ")[1:-1]:
        text, label = part.strip().split("\nLabel: ")
        assert trained[text] == label
    method = resolve(load_recipe("mine/recipe.yaml"))
    assert method.tasks[0].protocol.fill({"prompt": "a {text}"}) == "a {text}"
    (shown,) = method.measured_context.step(({"role": "user", "content": "a {text}"},))
    assert shown["content"] == row["prompt"], "the teacher is measured with its question"


ODD = [
    "yes",
    "no",
    "null",
    "1e3",
    "a, b",
    'say "so"',
    "it's: # x",
    "- [x]",
    "{{ y }}",
    "{% raw %}",
    "почта",
    "返品",
    "true",
    "~",
    "C",
    "C++",
]


def test_odd_labels_stay_what_they_are(here):
    rows = [(f"{thing} {n} of {place}", label) for place, label in enumerate(ODD) for n, thing in enumerate(THINGS[:6])]
    new(data=table(rows))
    recipe = load_recipe("mine/recipe.yaml")
    assert set(recipe.elicit[0].params["parse"]["label"]) == set(ODD)
    trained = {row["prompt"]: row["answer"] for row in read("mine/train.jsonl")}
    assert trained.items() <= dict(rows).items() and set(trained.values()) == set(ODD)
    task = load_task("mine/task")
    assert task.kind.name == "generation"  # C begins C++, and is likelier than that by construction
    assert all(
        item.check == {"type": "exact", "answer": dict(rows)[item.text], "normalise": False} for item in task.items
    )
    resolve(recipe)
    (row,) = render({"prompt": recipe.elicit[0].params["prompt"]}, [{"prompt": "x", "labels": ODD}], "here").rows
    assert all(f"- {label}\n" in row["prompt"] for label in ODD)


def test_spaces_around_a_label_are_none_of_it():
    rows = [
        (f"{thing} {n}", label)
        for n, (thing, label) in enumerate(zip(THINGS, [" good", "good", "bad\n", "very  bad"] * 5, strict=True))
    ]
    said = quickly(data=table(rows))
    assert "3 labels: good 10, bad 5, very bad 5" in said and "15 labels had spaces" in said


@pytest.mark.parametrize("columns", [("sentence", "category"), ("utterance", "intent"), ("review", "sentiment")])
def test_other_names_of_columns(columns):
    assert f"{columns[0]} as the prompt, {columns[1]} as the answer" in quickly(data=table(labelled(), columns))


def test_columns_can_be_named():
    quickly("--columns", "text=v2,label=v1", data=table([(b, a) for a, b in labelled()], ("v1", "v2")))
    assert {row["answer"] for row in read("mine/train.jsonl")} == {"good", "bad"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_other_encodings(encoding):
    quickly(data=table(labelled(("хорошо", "плохо")), encoding=encoding))
    assert {row["answer"] for row in read("mine/train.jsonl")} == {"хорошо", "плохо"}


def test_labels_of_the_data_are_learnt_without_a_teacher(here):
    new("--teacher", "none", "--scale", "quick")
    recipe = load_recipe("mine/recipe.yaml")
    assert recipe.writer[0].by == "corpus" and recipe.elicit is None
    (task,) = resolve(recipe).tasks
    assert "question" not in task.description
    assert recipe.prompts.limit is None and recipe.evaluate.controls == ["untouched"]
    assert {row["answer"] for row in read("mine/held-out.jsonl")} == {"good", "bad"}
    assert check(recipe).requests == 0


def test_a_small_run_from_a_table_to_a_measured_student(tiny_folder, here):
    new("--teacher", "none", "--student", str(tiny_folder), "--scale", "quick")
    short = ["train.epochs=null", "train.steps=2", "evaluate.own_prompts=2"]
    folder = run(load_recipe("mine/recipe.yaml", short), here / "run").folder
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert summary["systems"]["student"]["mine-task/pass_rate"]["n"] == 4
    assert summary["held_out"] == {"answers": 4, "cut_off": 0, "writer": "corpus"}


# The other jobs

QUESTIONS = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(20)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Tell me of the {thing}."},
            {"role": "assistant", "content": f"The {thing}."},
        ]
    }
    for thing in THINGS
]
FORMS = [
    {"text": f"The {thing} costs {n} euros.", "answer": json.dumps({"thing": thing, "price": n})}
    for n, thing in enumerate(THINGS)
]
SCHEMA = {
    "type": "object",
    "properties": {"thing": {"type": "string"}, "price": {"type": "number"}},
    "required": ["thing"],
}
HEIGHT = {
    "type": "function",
    "function": {"name": "height", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
}
CALLS = [
    {"prompt": f"How high is the {thing}?", "tools": [HEIGHT], "answer": json.dumps([{"name": "height", "arguments": {"of": thing}}])}
    for thing in THINGS
]  # fmt: skip


def test_extraction_by_a_schema(here):
    (here / "form.json").write_text(json.dumps(SCHEMA))
    new("--schema", "form.json", "--columns", "text=text", task=None, data=lines(FORMS))
    recipe = load_recipe("mine/recipe.yaml")
    assert recipe.elicit[0].params["parse"] == {"json": SCHEMA}
    (row,) = render({"prompt": recipe.elicit[0].params["prompt"]}, [{"prompt": "x"}], "here").rows
    assert json.dumps(SCHEMA) in row["prompt"]
    for task in resolve(recipe).tasks:
        assert {item.check["type"] for item in task.items} == {"json"} and len(task.items) == 5


def test_extraction_without_answers_checks_the_form(here):
    (here / "form.json").write_text(json.dumps(SCHEMA))
    rows = [{"prompt": row["text"]} for row in FORMS]
    new("--schema", "form.json", task="extract", data=lines(rows))
    assert {item.check["type"] for item in load_task("mine/task").items} == {"json_schema"}


def test_questions_with_passages():
    rows = [
        {"context": f"The {thing} is {n} m high.", "question": f"How high is the {thing}?", "answer": f"{n} m"}
        for n, thing in enumerate(THINGS)
    ]
    said = new(task="answer", data=lines(rows))
    assert "context stands before the question" in said and "NOT USED" not in said
    method = resolve(load_recipe("mine/recipe.yaml"))
    assert all("m high.\n\nQuestion: How high" in prompt.text for prompt in method.training_prompts)
    assert method.tasks[0].items[0].check["type"] == "contains"


def test_rewriting_by_an_instruction():
    new(
        "--instruction",
        "Say {{ it }} in {prompt} words.",
        task="rewrite",
        data=lines([{"prompt": f"A {thing}."} for thing in THINGS]),
    )
    recipe = load_recipe("mine/recipe.yaml")
    (row,) = render({"prompt": recipe.elicit[0].params["prompt"]}, [{"prompt": "A cup."}], "here").rows
    assert row["prompt"] == "Say {{ it }} in {prompt} words.\n\nText: A cup."
    assert recipe.evaluate.metrics == ["fidelity"]


def test_conversations():
    said = new(task="chat", data=lines(TALKS))
    assert load_recipe("mine/recipe.yaml").writer[0].by == "corpus"
    (task,) = resolve(load_recipe("mine/recipe.yaml")).tasks
    assert task.kind.name == "perplexity" and task.items[0].messages[-1]["role"] == "user" and task.items[0].text
    assert "look at mine-task/bits_per_byte" in Path("mine/recipe.yaml").read_text()
    assert "no --teacher is named, so the student learns the data's own answers" in said
    new("--teacher", "http://localhost:1/v1", "--teacher-model", "big", task="chat", data=lines(TALKS), where="served")
    recipe = load_recipe("served/recipe.yaml")
    assert recipe.loss[0].name == "cross_entropy" and recipe.writer[0].by == "teacher"


def test_a_chat_with_itself_is_refused():
    with pytest.raises(UserError, match="the student would learn to be itself"):
        new("--teacher", "smollm2-135m-instruct", task="chat", data=lines(TALKS))
    assert not Path("mine").exists()


def test_a_file_of_tests_is_held_out_and_not_trained():
    rows = labelled()
    tests = [*rows[:2], *((f"quite another {text}", label) for text, label in rows[2:12])]
    said = quickly("--test", table(tests, name="test.csv"), data=table(rows))
    trained, held = ({row["prompt"] for row in read(f"mine/{name}.jsonl")} for name in ("train", "held-out"))
    assert held == {text for text, _ in tests} and trained == {text for text, _ in rows[2:]}
    assert len(read("mine/task/items.jsonl")) == 12 and "2 texts are in test.csv too, and not trained" in said
    with pytest.raises(UserError, match="no text to train on has the label 'odd'"):
        quickly("--test", table([*tests, ("one more", "odd")], name="odd.csv"), data=table(rows), where="odd")
    with pytest.raises(UserError, match="--test: there is no file"):
        quickly("--test", "none.csv", data=table(rows), where="none")


def test_problems_are_checked_by_their_results():
    new(task="reason", data=lines(QUESTIONS))
    method = resolve(load_recipe("mine/recipe.yaml"))
    assert [name for name, _ in method.steps] == ["rationale", "verify", "deduplicate"]
    assert {prompt.check["type"] for prompt in method.training_prompts} == {"number"}
    assert method.recipe.evaluate.controls == ["untouched", "gold_control"]  # which learns the data's own answers
    assert all(prompt.answers == (str(prompt.check["answer"]),) for prompt in method.training_prompts)
    assert method.recipe.writer[0].by == "elicited" and method.tasks[0].items[0].check["type"] == "number"


def test_an_instruction_of_its_own_is_the_teachers_system_message(tiny_folder):
    words = 'Think in "short" lines:\none # calculation each.'
    for task, data, teacher in (("reason", QUESTIONS, "http://localhost:1/v1"), ("chat", TALKS, str(tiny_folder))):
        named = ["--teacher-model", "big"] if teacher.startswith("http") else ["--student", str(tiny_folder)]
        arguments = ["--instruction", words, "--teacher", teacher, *named]
        new(*arguments, task=task, data=lines(data), where=task)
        recipe = load_recipe(f"{task}/recipe.yaml")
        assert recipe.teacher.context.system == words
        (prompt, *_), student = resolve(recipe).training_prompts, recipe.student.start
        assert words not in str(prompt.messages) and student.pretrained == (named[1] if task == "chat" else EMBEDDED)
    with pytest.raises(UserError, match="leave it out"):
        new("--instruction", words, task="classify", data=table(labelled()), where="no")
    with pytest.raises(UserError, match="none is asked"):
        new("--instruction", words, "--teacher", "none", task="reason", data=lines(QUESTIONS), where="no")


def test_calls_of_tools_are_compared_with_the_datas():
    new(task="tools", data=lines(CALLS))
    method = resolve(load_recipe("mine/recipe.yaml"))
    prompt = method.training_prompts[0]
    assert prompt.before[0]["role"] == "tools" and prompt.check["calls"][0]["name"] == "height"
    assert [name for name, _ in method.steps] == ["answer", "verify"]


def test_a_teacher_with_fewer_layers(tiny_folder):
    new("--teacher", str(tiny_folder), task="compress", data=lines([{"prompt": f"A {thing}."} for thing in THINGS]))
    recipe = load_recipe("mine/recipe.yaml")
    assert recipe.student.start.prune.layers == 3 and recipe.loss[0].name == "forward_kl"
    resolve(recipe)


@pytest.mark.parametrize(("has", "precision"), [(True, "bfloat16"), (False, None)])
def test_a_processor_with_products_of_bfloat16_trains_in_it(monkeypatch, has, precision):
    monkeypatch.setattr(placement, "multiplies_in_bfloat16", lambda: has)
    quickly()
    assert load_recipe("mine/recipe.yaml").train.precision == precision


@pytest.mark.parametrize(
    ("url", "kind"), [("https://api.openai.com/v1", "openai"), ("http://127.0.0.1:8000/v1", "openai-compatible")]
)
def test_a_teacher_behind_a_server(monkeypatch, here, url, kind):
    monkeypatch.setenv("LIMBECK_API_KEY", "very-secret")
    said = new("--teacher", url, "--teacher-model", "big", "--run-on", "h100-80gb")
    recipe = load_recipe("mine/recipe.yaml")
    assert (recipe.teacher.server.kind, recipe.teacher.server.name, recipe.train.precision) == (kind, "big", "bfloat16")
    assert "--device-like h100-80gb" in said and "export LIMBECK_API_KEY" in said
    assert all("very-secret" not in file.read_text() for file in here.rglob("mine/**/*") if file.is_file())


def test_quick_takes_a_part_and_says_so():
    quickly(
        "--scale",
        "quick",
        data=table(labelled(each=20) + [(text + " again", label) for text, label in labelled(each=20)]),
    )
    recipe = load_recipe("mine/recipe.yaml")
    assert recipe.prompts.limit == 60 and recipe.evaluate.limit == 30
    assert "64 texts, of which 60 are used" in Path("mine/recipe.yaml").read_text()


def test_every_recipe_is_short_and_explains_itself():
    new()
    text = Path("mine/recipe.yaml").read_text()
    assert all(len(line) <= 120 for line in text.splitlines()) and text.count("#") > 15


# What is refused

REFUSED = {
    "one label": (lambda: table(labelled(("good",))), "one label only"),
    "a label for each row": (lambda: table([(f"{thing} x", thing) for thing in THINGS]), "these are no labels"),
    "no rows": (lambda: table([]), "holds no rows"),
    "an empty file": (lambda: table([], columns=()), "none|no rows"),
    "three rows": (lambda: table(labelled()[:3]), "3 different texts"),
    "no such file": (lambda: "nowhere.csv", "no file 'nowhere.csv'"),
    "latin-1": (lambda: table(labelled(("süß", "bad")), encoding="latin-1"), "UTF-8"),
    "case alone": (lambda: table(labelled(("Good", "good"))), "differ in case"),
    "long labels": (lambda: table(labelled(("x" * 101, "y"))), "more than 100 characters"),
    "control characters": (lambda: table(labelled(("a\x07", "b"))), "control character"),
    "text alone": (lambda: table([(f"a {thing}",) for thing in THINGS], ("prompt",)), "no labels"),
    "unknown columns": (lambda: table(labelled(), ("v1", "v2")), "--columns text=v1,label=v2"),
    "two texts": (lambda: table([(a, a, b) for a, b in labelled()], ("text", "sentence", "label")), "columns"),
    "conversations": (lambda: lines([{"messages": [{"role": "system", "content": "Be short."}, *row["messages"]]} for row in TALKS]), "conversation"),
    "a ragged table": (lambda: table([*labelled(), ("a", "b", "c")]), "line 22"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_make_no_classifier_are_refused_and_nothing_is_written(here, case):
    make, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        new(data=make())
    assert [file for file in here.iterdir() if file.is_dir()] == []


def test_too_many_labels_are_refused():
    rows = [(f"{thing} {n} of {label}", f"label {label}") for label in range(201) for n, thing in enumerate(THINGS[:3])]
    with pytest.raises(UserError, match="more than the 200"):
        new(data=table(rows))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "clasify"], "did you mean 'classify'"),
        (["--task", "extract"], "--schema"),
        (["--task", "tools"], "column `tools`"),
        (["--task", "compress", "--teacher", "http://localhost/v1", "--teacher-model", "x"], "weights are here"),
        (["--teacher", "http://localhost/v1"], "--teacher-model"),
        (["--teacher", "http://me:secret@localhost/v1", "--teacher-model", "x"], "password"),
        (["--teacher-model", "x"], "--teacher URL"),
        (["--run-on", "h100-80g"], "did you mean 'h100-80gb'"),
        (["--scale", "huge"], "--scale"),
        (["--columns", "text"], "ROLE=COLUMN"),
        (["--columns", "texxt=text"], "nothing that a column can be"),
        (["--columns", "text=nothere"], "nothere|columns"),
        (["--schema", "nowhere.json"], "--schema"),
        (["--learn-from", "labels", "--teacher", "x"], "leave --teacher out"),
    ],
)
def test_wishes_that_cannot_be_are_refused(here, flags, words):
    with pytest.raises(UserError, match=words):
        new(*flags, task=None if "--task" in flags else "classify")
    assert not (here / "mine").exists()


def test_without_a_terminal_what_is_missing_is_named_by_its_flag():
    runner = CliRunner()
    for flags, flag in (
        ([], "--data"),
        (["--data", table(labelled())], "--task"),
        (["--data", "data.csv", "--task", "classify"], "DIR"),
    ):
        result = runner.invoke(app, ["new", *flags])
        assert isinstance(result.exception, UserError) and str(result.exception).startswith(flag)


def test_nothing_is_overwritten(here):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="exists already"):
        new()
    assert (here / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_folder_is_whole_or_absent(here, monkeypatch):
    def refuse(path, *_):
        raise RecipeError("train", "no")

    monkeypatch.setattr(write, "load_recipe", refuse)
    with pytest.raises(RecipeError):
        new()
    assert [file.name for file in here.iterdir()] == ["data.csv"]


# Questions


def test_it_asks_on_a_terminal(monkeypatch):
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    table(labelled(), ("Message", "Kind"))
    order = ["data.csv", "Message", "nonsense", "Kind", "classify", "mine", "labels", "", "laptop", "quick"]
    result = CliRunner().invoke(app, ["new"], input="\n".join(order) + "\n")
    assert result.exception is None, (result.output, result.exception)
    assert load_recipe("mine/recipe.yaml").writer[0].by == "corpus"
    assert "classify  give a text one of some labels" in result.output


def test_yes_asks_nothing_and_tells_what_it_took(monkeypatch):
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    result = CliRunner().invoke(app, ["new", "--data", table(labelled()), "--yes"])
    assert result.exception is None and "task: classify" in result.output
    assert load_recipe("data/recipe.yaml").name == "data"


def test_json_for_programs():
    facts = json.loads(quickly("--json"))
    assert (
        facts["recipe"] == "mine/recipe.yaml"
        and len(facts["notes"]) >= 4
        and facts["next"][0].startswith("limbeck check")
    )


# What is seen


def test_repeated_and_contradicting_texts_are_told():
    rows = [*labelled(), ("SMALL cup  number 0 of good", "good"), (labelled()[1][0], "bad")]
    said = quickly(data=table(rows))
    assert "2 rows repeat a text" in said and "1 text has two different labels" in said
    assert labelled()[1][0] not in {row["prompt"] for row in read("mine/train.jsonl")}


def test_rare_and_lopsided_labels_are_told():
    rows = (
        [(f"{thing} {n}", "many") for n in range(5) for thing in THINGS]
        + [("one alone", "rare")]
        + [(f"few {n}", "few") for n in range(3)]
    )
    said = quickly(data=table(rows))
    assert "fewer than 5 texts: few, rare" in said and "96% of the texts are many" in said
    assert "1 labels with one text are trained and not measured: rare" in said


def test_rows_without_a_label_are_left_out_and_counted():
    assert "2 without a label left out" in quickly(data=table([*labelled(), ("what is this", ""), ("and this", "")]))


def examples(texts, labels):
    return [Example(text, label, f"line {n}", {}) for n, (text, label) in enumerate(zip(texts, labels, strict=True))]


def test_the_split_is_fixed_fair_and_apart():
    rng = random.Random(0)
    labels = [rng.choice("aaaaab") for _ in range(400)]
    whole = examples([f"{rng.random()} {rng.random()} {rng.random()}" for _ in labels], labels)
    parts = split(whole, ["a", "b"])
    assert split(whole, ["a", "b"]) == parts and len(parts.training) + len(parts.held_out) == 400
    assert {one.text for one in parts.training}.isdisjoint(one.text for one in parts.held_out)
    counts, all_of = Counter(one.answer for one in parts.held_out), Counter(labels)
    assert all(abs(counts[label] - 0.2 * all_of[label]) < 1 for label in "ab")


def test_near_duplicates_stay_together_or_are_counted():
    words = "the parcel has been lying in the hall of the old house since Monday and nobody came to fetch it number"
    alike = examples([f"{words} {n}" for n in range(20)], ["a"] * 20)
    parts = split(alike, ["a"])
    assert parts.near == len(parts.held_out) == 5
    rng = random.Random(1)
    apart = examples([" ".join(str(rng.random()) for _ in range(8)) for _ in range(80)], ["a"] * 80)
    assert split([*alike, *apart], ["a"]).near == 0


@pytest.mark.parametrize(
    "text", [*ODD, "", " x", "a\nb", "tab\t", "\x85", "\u2028", "\x7f", "\ufeff", "🙂", "a\\b", "2e-4", "'"]
)
def test_texts_survive_yaml(text):
    for form in (inline(text), block(text, 2), block(f"x\n{text}\ny", 2)):
        value = load_yaml(f"a:\n  b: {form if not form.startswith('|') else form.replace(chr(10), chr(10) + '  ')}\n")
        assert value["a"]["b"] in (text, f"x\n{text}\ny")
    assert load_yaml(f"[{inline([text])}]") == [[text]]


@pytest.mark.parametrize("text", ["{{ a }}", "{% if %}", "{# c #}", "{% raw %}{{ a }}", "plain {a}"])
def test_texts_survive_a_template(text):
    (row,) = render({"prompt": literal(text)}, [{}], "here").rows
    assert row["prompt"] == text


def test_results_of_worked_solutions():
    def kinds(answers):
        return [check and check["type"] for check in checks_of_results(examples(["x"] * len(answers), answers))]

    assert kinds(["2 + 2 = 4\n#### 4", "$1,200", "7 %", ""]) == ["number", "number", "number", None]
    assert kinds(["A", "B", "A", "B", "The answer is A.", "B"]) == ["choice"] * 6
    assert kinds(["Paris", "Rome", "Oslo"]) == ["contains"] * 3
    assert number_of("1,234.5") == 1234.5 and number_of("12 apples") is None and number_of("1,2") is None
    assert calls_of('[{"name": "f", "arguments": {"x": 1}}]')["calls"] == [{"name": "f", "arguments": {"x": [1]}}]
    assert calls_of("just text") is None


def test_names():
    assert slug("My Tickets (2024)") == "my-tickets-2024" and slug("билеты") == "mine" and len(slug("x" * 99)) == 50
    assert set(TASKS) == {"classify", "extract", "answer", "rewrite", "chat", "reason", "tools", "compress"}
