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
from limbeck.commands.new import asked, command, student, write
from limbeck.commands.new.data import Example
from limbeck.commands.new.draft import block, inline, literal
from limbeck.commands.new.gold import calls_of, checks_of_answers, checks_of_results, number_of
from limbeck.commands.new.parts import room_for
from limbeck.commands.new.split import split
from limbeck.commands.new.student import has_the_teachers_tokens, learning_rate
from limbeck.commands.new.wishes import EMBEDDED, TASKS, Wishes, slug
from limbeck.config.yaml_text import load_yaml
from limbeck.elicit.rendering import render
from limbeck.elicit.verify import verify
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


SERVED = ["--teacher", "http://localhost:1/v1", "--teacher-model", "big"]


def written(*flags, **settings):
    """The recipe that the flags make, resolved, and its text."""
    new(*flags, **settings)
    folder = settings.get("where", "mine")
    recipe = load_recipe(f"{folder}/recipe.yaml")
    return recipe, Path(f"{folder}/recipe.yaml").read_text(encoding="utf-8")


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


def test_passages_that_can_not_be_read_are_not_left_out_silently():
    rows = [{"context": [{"n": n}], "question": f"How high is tower {n}?", "answer": f"{n} m"} for n in range(20)]
    with pytest.raises(UserError, match='line 1: "context" must be a text or a list of texts'):
        new(task="answer", data=lines(rows))


def test_columns_are_named_by_what_stands_between_the_spaces_and_a_misspelt_one_is_told():
    file = Path("rows.csv")
    body = "".join(f"message {n} here,{'ab'[n % 2]}\n" for n in range(40))
    file.write_text("Nachricht ,Art\n" + body)
    with pytest.raises(UserError, match="no column 'nachrichten'; did you mean 'Nachricht'"):
        new("--columns", "text=nachrichten,label=Art", task="classify", data=file)
    with pytest.raises(UserError, match="such as --columns text=Nachricht,label=Art"):
        new(task="classify", data=file)
    new("--columns", "text=Nachricht,label=Art", task="classify", data=file)
    assert load_task("mine/task").items
    with pytest.raises(UserError, match="did you mean 'label'"):
        new("--columns", "text=Nachricht,lable=Art", task="classify", data=file, where="other")


def test_the_only_column_of_a_file_is_its_text(here):
    Path("lines.csv").write_text("beschwerde\n" + "".join(f"The {thing} is broken.\n" for thing in THINGS))
    said = new("--instruction", "Rewrite it politely.", task="rewrite", data="lines.csv")
    assert "beschwerde as the prompt" in said and "is broken" in Path("mine/train.jsonl").read_text()


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(here):
    for flags, words in (
        (["--student", "qwen2.5-coder-0.5b"], "did you mean 'qwen2.5-coder-0.5b-instruct'"),
        (["--student", "absent.gguf"], "there is no file 'absent.gguf'"),
        (["--teacher", "gpt-4o-mini"], r"teacher: \{server: \{url: .*, name: .*\}\}"),
        (["--teacher", "api.example.com/v1", "--teacher-model", "big"], "write https://api.example.com/v1"),
    ):
        with pytest.raises(UserError, match=words):
            new(*flags)
        assert not (here / "mine").exists()


def test_extraction_without_answers_checks_the_form(here):
    (here / "form.json").write_text(json.dumps(SCHEMA))
    rows = [{"prompt": row["text"]} for row in FORMS]
    new("--schema", "form.json", task="extract", data=lines(rows))
    assert {item.check["type"] for item in load_task("mine/task").items} == {"json_schema"}


@pytest.mark.parametrize("column", ["context", "passages"])
@pytest.mark.parametrize("several", [False, True])
def test_questions_with_passages(column, several):
    rows = []
    for n, thing in enumerate(THINGS):
        passage = f"The {thing} is {n} m high."
        passages = ["All towers are old.", passage] if several else passage
        rows.append({column: passages, "question": f"How high is the {thing}?", "answer": f"{n} m"})
    said = new(task="answer", data=lines(rows))
    assert f"{column} stands before the question" in said and "NOT USED" not in said
    assert "ignored" not in said and ("All towers" in Path("mine/train.jsonl").read_text()) == several
    method = resolve(load_recipe("mine/recipe.yaml"))
    assert all("m high.\n\nQuestion: How high" in prompt.text for prompt in method.training_prompts)
    assert method.tasks[0].items[0].check["type"] == "pattern"


def test_passages_may_be_absent_and_other_columns_none():
    rows = [
        {"context": 17, "passages": [f"The {thing} is {n} m high.", "", None], "question": f"How high is the {thing}?"}
        for n, thing in enumerate(THINGS)
    ]
    rows[3]["passages"] = []
    rows[4]["passages"] = [" "]
    with pytest.raises(UserError, match='"context" must be a text or a list of texts'):
        new(*SERVED, task="answer", data=lines(rows))
    for row in rows[3:5]:
        row["context"] = None
    new(*SERVED, task="answer", data=lines(rows))
    method = resolve(load_recipe("mine/recipe.yaml"))
    read = [prompt.text for prompt in (*method.training_prompts, *method.held_out_prompts)]
    bare = sorted(text for text in read if "Question:" not in text)
    assert bare == sorted(row["question"] for row in rows[3:5]) and len(read) == len(rows)
    assert all("m high.\n\nQuestion: How high" in text for text in read if text not in bare)


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
    assert recipe.loss[0].name == "cross_entropy" and recipe.writer[0].by == "elicited"


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
    assert recipe.prompts.limit == 60 and recipe.evaluate.limit == 30 and recipe.evaluate.limits == {"mine/task": 30}
    assert "64 texts, of which 60 are used" in Path("mine/recipe.yaml").read_text()


def test_every_recipe_is_short_and_explains_itself():
    new()
    text = Path("mine/recipe.yaml").read_text()
    assert all(len(line) <= 120 for line in text.splitlines()) and text.count("#") > 15


# Teachers behind servers


@pytest.mark.parametrize(
    ("kind", "concurrency"), [("vllm", 64), ("sglang", 64), ("llama.cpp", 4), ("openai", 8), ("states", 8)]
)
def test_a_server_is_asked_as_its_kind_can_answer(kind, concurrency):
    recipe, text = written(*SERVED, "--teacher-kind", kind, task="chat", data=lines(TALKS))
    server = recipe.teacher.server
    assert (server.kind, server.concurrency, server.tolerate, server.price) == (kind, concurrency, 0.01, None)
    assert "# price: {input: 0.10, output: 0.40}   # of a million tokens" in text and "    # limits: {" in text


def test_a_served_chat_is_drawn_as_long_as_the_datas_answers_and_without_cut_off_ones():
    talks = [{"prompt": f"Tell me of the {thing}.", "answer": thing * (20 + n)} for n, thing in enumerate(THINGS * 3)]
    recipe, text = written(*SERVED, "--instruction", "Be kind.", task="chat", data=lines(talks))
    drawn = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024}
    assert [(step.name, step.params) for step in recipe.elicit] == [("answer", drawn)]
    assert recipe.writer[0].model_dump(include=set(drawn)) == drawn and recipe.evaluate.max_tokens == 1024
    assert recipe.teacher.context.system == "Be kind." and "cut-off answers are left out" in text
    assert "look at perplexity" in text and "  # judge: NAME " in text
    (task,) = resolve(recipe).tasks
    assert task.kind.name == "perplexity" and task.items[0].text and recipe.evaluate.limits is None


def test_anthropic_is_given_a_temperature_alone():
    recipe, _ = written(
        "--teacher", "https://api.anthropic.com/v1", "--teacher-model", "big", task="chat", data=lines(TALKS)
    )
    assert recipe.teacher.server.kind == "anthropic" and recipe.writer[0].top_p == 1.0
    assert recipe.elicit[0].params["top_p"] == 1.0 and recipe.elicit[0].params["temperature"] == 0.7


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vllm", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("gemini", {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}),
    ],
)
def test_a_teacher_is_told_not_to_think(kind, options):
    recipe, _ = written(*SERVED, "--teacher-kind", kind, "--thinking", "off", data=table(labelled()))
    assert recipe.teacher.server.options == options and recipe.teacher.server.reasoning == "drop"
    assert recipe.elicit[0].params["constrain"] == "auto"


def test_thinking_has_room_of_its_own():
    sizes = {}
    for thinking in ("", "keep"):
        for task, data in (("classify", table(labelled())), ("reason", lines(QUESTIONS, "questions.jsonl"))):
            flags = ["--teacher-kind", "vllm", *(["--thinking", thinking] if thinking else [])]
            recipe, _ = written(*SERVED, *flags, task=task, data=data, where=f"{task}{thinking}")
            (task_settings,) = [one.protocol for one in resolve(recipe).tasks]
            sizes[task, thinking] = [
                recipe.elicit[0].params["max_tokens"],
                recipe.writer[0].max_tokens,
                recipe.evaluate.max_tokens,
                task_settings.max_tokens,
            ]
            drops = "drop" if (task, thinking) == ("classify", "keep") else None
            assert recipe.teacher.server.reasoning == drops and recipe.teacher.server.options == {}
            held = (task, thinking) == ("classify", "")
            assert recipe.elicit[0].params.get("constrain") == ("auto" if held else None)
    for task in ("classify", "reason"):
        assert [more - size for size, more in zip(sizes[task, ""], sizes[task, "keep"], strict=True)] == [4096] * 4


def test_labels_are_held_where_the_server_can_hold_them():
    recipe, _ = written(*SERVED)
    assert "constrain" not in recipe.elicit[0].params
    recipe, _ = written(*SERVED, "--teacher-kind", "llama.cpp", where="held")
    assert recipe.elicit[0].params["constrain"] == "auto"


def test_held_out_text_is_drawn_as_the_training_text():
    for task, data, temperature in (
        ("classify", table(labelled()), 0.0),
        ("answer", lines(QUESTIONS, "questions.jsonl"), 0.0),
        ("rewrite", lines(QUESTIONS, "questions.jsonl"), 0.0),
        ("tools", lines(CALLS, "calls.jsonl"), 0.0),
        ("reason", lines(QUESTIONS, "questions.jsonl"), 0.7),
    ):
        recipe, _ = written(*SERVED, task=task, data=data, where=task)
        step, writer = recipe.elicit[0].params, recipe.writer[0]
        assert (writer.temperature, writer.top_p) == (temperature, 1.0), task
        assert step.get("temperature", 0.7) == temperature and writer.max_tokens == step["max_tokens"], task


# The student, the machine


@pytest.mark.parametrize(
    ("parameters", "rate", "adapters"),
    [
        (135e6, "5.0e-5", "1.0e-3"),
        (300e6, "2.0e-5", "2.0e-4"),
        (1.2e9, "2.0e-5", "2.0e-4"),
        (7e9, "1.0e-5", "2.0e-4"),
        (None, "2.0e-5", "2.0e-4"),
    ],
)
def test_the_learning_rate_follows_the_students_size(monkeypatch, parameters, rate, adapters):
    monkeypatch.setattr(student, "_parameters", lambda model: parameters)
    assert learning_rate(Wishes(Path("x"), "chat")) == rate
    assert learning_rate(Wishes(Path("x"), "chat", lora=True)) == adapters


def test_a_students_size_is_counted_without_its_weights(tiny_folder, here):
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert student._parameters(str(here / "bare")) == student._parameters(str(tiny_folder)) < 1e6
    assert 130e6 < student._parameters(EMBEDDED) < 140e6 and student._parameters("nobody/nothing") is None


def test_adapters_are_trained_if_asked_for():
    recipe, _ = written("--teacher", "none", "--lora", "--run-on", "gpu")
    assert recipe.student.lora.model_dump() == {"rank": 16, "alpha": 32, "base": "bfloat16"}
    assert recipe.train.lr == 1e-3
    recipe, _ = written("--teacher", "none", "--lora", "--run-on", "laptop", where="small")
    assert recipe.student.lora.base is None


def test_a_model_of_the_same_family_learns_distributions(tiny_folder, here):
    (here / "large").mkdir()
    for file in tiny_folder.iterdir():
        (here / "large" / file.name).write_bytes(file.read_bytes())
    pair = ["--teacher", "large", "--student", str(tiny_folder)]
    recipe, text = written(*pair, "--run-on", "gpu", task="chat", data=lines(TALKS))
    assert recipe.loss[0].name == "forward_kl" and recipe.writer[0].by == "teacher" and recipe.elicit is None
    assert recipe.teacher.dtype == "bfloat16" and "look at forward_kl" in text and "judge" not in text
    assert not has_the_teachers_tokens(Wishes(here, "chat", teacher="nobody/nothing", student=str(tiny_folder)))
    template = here / "large" / "chat_template.jinja"
    settings = here / "large" / "tokenizer_config.json"
    file = template if template.exists() else settings
    file.write_text(file.read_text().replace("<|{{ message", "<| {{ message"))
    other = Wishes(here, "chat", teacher=str(here / "large"), student=str(tiny_folder))
    assert not has_the_teachers_tokens(other)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    has = {"device": True, "bfloat16": True}
    monkeypatch.setattr("torch.cuda.is_available", lambda: has["device"])
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: has["bfloat16"])
    line = "machine: gpu, as there is one here; --run-on laptop says otherwise"
    assert line in quickly() and load_recipe("mine/recipe.yaml").machine.device == "cuda"
    assert line not in quickly("--json", where="quiet")
    assert line not in quickly("--run-on", "laptop", where="asked")
    has["bfloat16"] = False
    assert line not in quickly(where="old") and load_recipe("old/recipe.yaml").machine.device == "auto"


# What is measured, how long answers are


def test_where_a_teacher_chats_300_texts_are_measured_and_the_others_trained():
    talks = [{"prompt": f"{thing} number {n}"} for n in range(160) for thing in THINGS]
    recipe, text = written(*SERVED, task="chat", data=lines(talks))
    assert recipe.evaluate.limit == 300 == len(read("mine/held-out.jsonl"))
    assert len(read("mine/train.jsonl")) == 2900 and recipe.evaluate.metrics == ["fidelity"]
    assert "limit: 300   # of these prompts at most\n" in text


def test_a_task_is_measured_whole_at_full_scale():
    recipe, text = written("--teacher", "none", data=table(labelled(each=20)))
    assert recipe.evaluate.limit == 64 and recipe.evaluate.limits is None
    assert "# of these prompts at most; a task is measured whole" in text


@pytest.mark.parametrize("task", ["chat", "tools"])
def test_every_answer_of_a_conversation_is_learnt(task):
    def said(thing):
        turns = [
            ("user", f"What is the {thing}?"),
            ("assistant", f"A {thing}."),
            ("user", "Is it?"),
            ("assistant", "Yes."),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in turns], "tools": [HEIGHT]}

    data = [said(thing) for thing in THINGS]
    new("--teacher", "none", task=task, data=lines(data))
    recipe = load_recipe("mine/recipe.yaml")
    assert recipe.train.turns == "all" and "turns: all   # every answer" in Path("mine/recipe.yaml").read_text()
    trained = resolve(recipe).training_prompts
    assert len(trained) == 2 * len(read("mine/train.jsonl")) and {"Yes."} < {prompt.answers[0] for prompt in trained}
    assert "15 conversations hold 30 answers" in new("--teacher", "none", task=task, data=lines(data), where="again")
    recipe, _ = written(*SERVED, task=task, data=lines(data), where="served")
    assert recipe.train.turns is None and all("messages" in row for row in read("served/train.jsonl"))


def test_a_held_out_text_that_begins_a_trained_conversation_is_left_out():
    def said(*turns):
        roles = ("user", "assistant") * len(turns)
        return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}

    alone = [said(f"Tell me of the {thing}.", f"A {thing}.") for thing in THINGS]
    longer = [said(f"Tell me of the {thing}.", f"A {thing}.", "And more?", "No.") for thing in THINGS[:19]]
    told = new("--teacher", "none", task="chat", data=lines([*alone, *longer]))
    held = [row["messages"][0]["content"] for row in read("mine/held-out.jsonl") if len(row["messages"]) == 2]
    begun = {row["messages"][0]["content"] for row in read("mine/train.jsonl") if len(row["messages"]) == 4}
    assert begun.isdisjoint(held) and "begin trained conversations, left out" in told


def test_single_answers_need_no_turns():
    recipe, _ = written("--teacher", "none", task="chat", data=lines(TALKS))
    assert recipe.train.turns is None


def test_tools_behind_a_server_are_measured_by_perplexity():
    recipe, text = written(*SERVED, task="tools", data=lines(CALLS))
    assert [task.kind.name for task in resolve(recipe).tasks] == ["perplexity"]
    assert "look at perplexity" in text and "# judge: NAME" in text


def test_there_is_room_for_the_datas_answers():
    wishes = Wishes(Path("x"), "chat")
    assert room_for(wishes, []) == (384, [])
    served = Wishes(Path("x"), "chat", teacher="http://localhost/v1")
    assert room_for(served, [])[0] == room_for(Wishes(Path("x"), "chat", run_on="gpu"), [])[0] == 1024
    assert room_for(served, examples(["x"] * 10, ["a" * 6000] * 10)) == (2251, [])
    assert room_for(served, examples(["x"] * 10, ["答" * 1000] * 10)) == (2251, [])  # a token or two a letter
    room, notes = room_for(served, examples(["x"] * 10, ["a" * 12000] * 10))
    assert room == 4096 and notes == ["the longest 5 % of the answers may not fit in 4,096 tokens"]


def test_there_is_room_for_labels_of_digits():
    """A digit or a mark is a token of its own."""
    labels = ("8471.30.0100", "8517.62.0090")
    for flags in ([], ["--teacher", "none"]):
        where = f"mine-{len(flags)}"
        recipe, _ = written(*flags, data=table(labelled(labels)), where=where)
        (task,) = resolve(recipe).tasks
        assert recipe.evaluate.max_tokens == task.protocol.max_tokens > 24


def test_an_answer_leaves_room_for_the_prompt(tiny_folder):
    wishes = Wishes(Path("x"), "chat", student=str(tiny_folder))
    assert room_for(wishes, [])[0] == 128  # of a context of 256 tokens


def test_what_is_wanted_of_others_is_named_as_it_can_be_had(monkeypatch):
    monkeypatch.setattr(asked.importlib.util, "find_spec", lambda name: None)
    said = new(*SERVED, task="rewrite", data=lines([{"prompt": f"A {thing}.", "answer": thing} for thing in THINGS]))
    assert "pip install rouge-score to compare" in said and "export LIMBECK_API_KEY=...   # (if it wants a key)" in said


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
        (["--teacher-kind", "vllm"], "--teacher URL"),
        ([*SERVED, "--teacher-kind", "vlm"], "did you mean 'vllm'"),
        (["--thinking", "off"], "behind a server"),
        ([*SERVED, "--thinking", "less"], "--thinking"),
        ([*SERVED, "--teacher-kind", "states", "--thinking", "off"], "nothing tells a server of kind states"),
        (["--task", "compress", "--lora"], "leave --lora out"),
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


def test_thinking_that_has_no_room_in_the_student_is_refused(here, tiny_folder):
    flags = [*SERVED, "--teacher-kind", "vllm", "--thinking", "keep", "--student", str(tiny_folder)]
    with pytest.raises(UserError, match=r"--thinking keep: .* tokens .* more than the .* take --thinking off"):
        new(*flags, task="classify", data=table(labelled()))
    assert not (here / "mine").exists()


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
    assert "1 labels have no held-out text, so they are trained and not measured: rare" in said


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


def test_near_duplicates_are_found_among_many_texts():
    rng = random.Random(2)
    apart = [" ".join(f"{rng.getrandbits(20)}" for _ in range(8)) for _ in range(21_000)]
    twins = [f"{text} {end}" for text in apart[:3000] for end in ("then", "now")]
    parts = split(examples(apart[3000:] + twins, ["a"] * 24_000), ["a"])
    assert len(parts.held_out) == 1000 and parts.near == 0
    assert not {example.text for example in parts.held_out} & set(twins)


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
    assert number_of(".5") == 0.5 and number_of("$.5") == 0.5 and number_of("5 €.") == 5 and number_of(". 5") is None
    assert number_of("1,234.5") == 1234.5 and number_of("12 apples") is None and number_of("1,2") is None
    assert calls_of('[{"name": "f", "arguments": {"x": 1}}]')["calls"] == [{"name": "f", "arguments": {"x": [1]}}]
    assert calls_of("just text") is None


def test_short_answers_are_checked_as_a_whole():
    def checks(*answers):
        return checks_of_answers(examples(["x"] * len(answers), answers))

    yes, no = checks("Yes.", "No", "yes", "No.", "Yes", "No")[:2]
    assert verify(no, "No, it is not.") and not verify(no, "I do not know.") and not verify(no, "Yes, as noted.")
    assert verify(yes, "yes") and yes["labels"] == ["No", "Yes"]
    a, dots, paris, height = checks("A", "...", "Paris.", "3 m")
    assert dots is None and not verify(a, "B. Apples") and verify(a, "a: apples")
    assert verify(paris, "It is PARIS!") and not verify(paris, "The Parisian") and not verify(height, "13 m")
    assert checks("x" * 61) == [None] and checks("7 %")[0] == {"type": "number", "answer": 7}


def test_conversations_that_differ_in_what_stands_before_them_are_no_repeats():
    rows = [
        {"messages": [{"role": "system", "content": system}, *row["messages"]]}
        for row in TALKS
        for system in ("Speak as a pirate.", "Speak as a poet.", "speak as  a Poet.")
    ]
    said = new(task="chat", data=lines(rows))
    assert len(read("mine/train.jsonl")) + len(read("mine/held-out.jsonl")) == 2 * len(TALKS)
    assert f"{len(TALKS)} rows repeat" in said
    said = [{row["messages"][-2]["content"] for row in read(f"mine/{part}.jsonl")} for part in ("train", "held-out")]
    assert said[1] and not said[0] & said[1]
    tools = [[{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("add", "take")]
    new("--teacher", "none", task="tools", data=lines([row | {"tools": t} for row in TALKS for t in tools]), where="t")
    assert len(read("t/train.jsonl")) + len(read("t/held-out.jsonl")) == 2 * len(TALKS)
    systems = [{"role": "system", "content": f"Speak as {thing}."} for thing in THINGS]
    with pytest.raises(UserError, match="say the same after another system message"):
        new(task="chat", data=lines([{"messages": [s, *TALKS[0]["messages"]]} for s in systems]), where="same")


def test_a_repeated_text_keeps_the_check_of_the_row_that_is_kept():
    new("--teacher", "none", task="reason", data=lines([*QUESTIONS, *(row | {"answer": "77777"} for row in QUESTIONS)]))
    assert all(row["check"]["answer"] != 77777 for row in read("mine/train.jsonl"))


def test_an_answer_that_its_schema_refuses_is_named(here):
    (here / "form.json").write_text(json.dumps(SCHEMA))
    rows = [*FORMS[:-1], FORMS[-1] | {"answer": '{"other": 1}'}]
    with pytest.raises(UserError, match=rf"line {len(rows)}: --schema form.json refuses its answer"):
        new("--schema", "form.json", "--columns", "text=text", task=None, data=lines(rows))


@pytest.mark.parametrize("usable", [0, 12])
def test_calls_in_a_field_of_the_last_message_are_named(usable):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    end = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [{"messages": [{"role": "user", "content": f"Add {n}."}, end], "tools": tools} for n in range(30)]
    rows += [{"messages": [{"role": "user", "content": f"Take {n}."}], "tools": tools} for n in range(usable)]
    with pytest.raises(UserError, match=r"30 conversations end with a message that has `tool_calls` \(first: line 1\)"):
        new(task="tools", data=lines(rows))


def test_names():
    assert slug("My Tickets (2024)") == "my-tickets-2024" and slug("билеты") == "mine" and len(slug("x" * 99)) == 50
    assert set(TASKS) == {"classify", "extract", "answer", "rewrite", "chat", "reason", "tools", "compress"}
