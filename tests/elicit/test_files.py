"""Files of prompts as people have them: every shape of row in every kind of file, and what is said about it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
from pathlib import Path

import pytest

from limbeck.config.sections import Evaluate, Prompts
from limbeck.elicit.prompt_file import PromptReader, find_files
from limbeck.elicit.prompts import load_prompts, split_prompts
from limbeck.elicit.shapes import SHAPES, example_rows
from limbeck.types import UserError, content_hash

pyarrow = pytest.importorskip("pyarrow")
ROWS = 5
QUESTION, ANSWER = "How high is tower 3?", "Tower 3 is 30 m high."
SYSTEM = {"role": "system", "content": "Be short."}
EXPECTED = {  # of row 3: (messages up to the answers, answers)
    "prompts": ([QUESTION], ()),
    "prompt and answers": ([QUESTION], (ANSWER, "I don't know.")),
    "instruction, input and output": ([f"Answer.\n\n{QUESTION}"], (ANSWER,)),
    "messages": ([SYSTEM, QUESTION, ("assistant", ANSWER), "Sure?"], ("Yes.",)),
    "messages with tools": (
        [
            "tools",
            QUESTION,
            "calls",
            {"role": "tool", "content": "70", "tool_call_id": "c1"},
        ],
        (ANSWER,),
    ),
    "messages with reasoning": ([QUESTION], (f"<think>\nTen times 3.\n</think>\n\n{ANSWER}",)),
    "conversations": ([SYSTEM, QUESTION], (ANSWER,)),
    "preference": ([QUESTION], (ANSWER, "I don't know.")),
    "preference as messages": ([QUESTION], (ANSWER, "I don't know.")),
    "preference without a prompt": ([QUESTION], (ANSWER, "I don't know.")),
}
CALL = [{"id": "c1", "type": "function", "function": {"name": "height", "arguments": {"n": 7}}}]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return file.getvalue()


def write_parquet(folder, rows):
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")
    return folder / "p.parquet"


def write_datasets(folder, rows):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


def write_zstd(folder, rows):
    with pyarrow.CompressedOutputStream(str(folder / "p.jsonl.zst"), "zstd") as out:
        out.write(json_lines(rows).encode())
    return folder / "p.jsonl.zst"


def bytes_writer(name, encode):
    def write(folder, rows):
        (folder / name).write_bytes(encode(rows))
        return folder / name

    return write


KINDS = {
    "JSON lines": bytes_writer("p.jsonl", lambda rows: json_lines(rows).encode()),
    "JSON lines, CRLF": bytes_writer("p.jsonl", lambda rows: json_lines(rows).replace("\n", "\r\n").encode()),
    "byte order mark": bytes_writer("p.jsonl", lambda rows: json_lines(rows).encode("utf-8-sig")),
    "UTF-16": bytes_writer("p.jsonl", lambda rows: json_lines(rows).encode("utf-16")),
    "UTF-16 without a mark": bytes_writer("p.jsonl", lambda rows: json_lines(rows).encode("utf-16-be")),
    "gzip": bytes_writer("p.jsonl.gz", lambda rows: gzip.compress(json_lines(rows).encode())),
    "zstd": write_zstd,
    "JSON array": bytes_writer("p.json", lambda rows: json.dumps(rows).encode()),
    "JSON array, indented": bytes_writer("p.json", lambda rows: json.dumps(rows, indent=2).encode()),
    "JSON object": bytes_writer("p.json", lambda rows: json.dumps({"version": 1, "data": rows}, indent=1).encode()),
    "JSON object in one line": bytes_writer("p.json", lambda rows: json.dumps({"train": rows}).encode()),
    "JSON objects, indented": bytes_writer(
        "p.json", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode()
    ),
    "CSV": bytes_writer("p.csv", lambda rows: as_csv(rows).encode()),
    "CSV with semicolons": bytes_writer("p.csv", lambda rows: as_csv(rows, ";").encode("utf-8-sig")),
    "TSV": bytes_writer("p.tsv", lambda rows: as_csv(rows, "\t").encode()),
    "Parquet": write_parquet,
    "datasets folder": write_datasets,
}


def full(message):
    if message == "tools" or message == "calls":
        return message
    if isinstance(message, str):
        return {"role": "user", "content": message}
    return {"role": message[0], "content": message[1]} if isinstance(message, tuple) else message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape_in_every_kind_of_file(tmp_path, shape, kind):
    file = KINDS[kind](tmp_path, example_rows(shape, ROWS))
    reader = PromptReader()
    prompts = list(reader.read([file]))
    assert len(prompts) == ROWS and sum(reader.accounts[0].taken.values()) == ROWS
    asked, answers = EXPECTED.get(shape.name, ([QUESTION], (ANSWER,)))
    shown = [dict(message) for message in prompts[3].messages]
    for message in shown:
        if message["role"] == "tools":
            assert json.loads(message["content"])[0]["function"]["name"] == "height"
        if "tool_calls" in message:
            assert json.loads(message["tool_calls"]) == CALL
    named = ["tools" if m["role"] == "tools" else "calls" if "tool_calls" in m else m for m in shown]
    assert named == [full(message) for message in asked] and prompts[3].answers == answers
    assert not reader.accounts[0].left_out and not reader.accounts[0].ignored


def write(folder, text, name="p.jsonl"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(file, **settings):
    reader = PromptReader(**settings)
    return list(reader.read(find_files(file, "prompts.from"))), [account.line for account in reader.accounts]


def test_plain_text_is_a_prompt_a_line(tmp_path):
    prompts, notes = read(write(tmp_path, "One?\r\n\r\n{Two}?\r\n", "p.txt"))
    assert [(p.text, p.id, p.line) for p in prompts] == [("One?", "line-1", 1), ("{Two}?", "line-3", 3)]
    assert "2 rows with prompt as the prompt" in notes[0]


def test_nulls_are_as_if_left_out(tmp_path):
    row = {"id": None, "weight": None, "feedback": None, "task": None, "kind": None, "check": None, "answers": None}
    file = write(tmp_path, '{"prompt": "a", "answer": NaN}\n' + json.dumps({"prompt": "b", "answer": "c"} | row))
    (bare, nulls), _ = read(file)
    assert bare.answers == () and nulls.answers == ("c",) and nulls.id == "line-2" and nulls.weight == 1.0
    assert (nulls.kind, nulls.task, nulls.feedback, nulls.check) == ("", "", "", None)


def test_numbers_are_answers(tmp_path):
    prompts, _ = read(write(tmp_path, '{"prompt": "a", "answer": 3}\n{"prompt": "b", "answers": [0.5, "x"]}'))
    assert [p.answers for p in prompts] == [("3",), ("0.5", "x")]


def test_whole_numbers_of_a_table_with_gaps_stay_whole(tmp_path):
    rows = [{"id": 1.0, "text": "a", "label": 1.0}, {"id": 2.0, "text": "b", "label": None}]
    rows += [{"id": 2.5, "text": "c", "label": 1e300}]
    prompts, _ = read(str(write_parquet(tmp_path, rows)))
    assert [(p.id, p.answers) for p in prompts] == [("1", ("1",)), ("2", ()), ("2.5", ("1e+300",))]


def test_one_line_says_what_was_taken_ignored_and_left_out(tmp_path):
    rows = [{"question": f"q{n}?", "answer": "a" if n % 4 else " ", "source": "s", "output": "other"} for n in range(9)]
    _, (note,) = read(write(tmp_path, json_lines([*rows, {"question": None, "answer": "x"}])))
    assert note == (
        f"{tmp_path / 'p.jsonl'}: 6 rows with question as the prompt, answer as the answer; NOT USED though it looks like"
        " content: output (prompts.columns can name it); ignored: source; 3 left out: its answer is empty (first: line 1);"
        " 1 left out: it has no prompt (first: line 10)"
    )


def test_columns_say_what_names_dont(tmp_path):
    file = write(
        tmp_path, json_lines([{"frage": "q?", "antwort": "a", "id": 1}, {"frage": "r?", "antwort": "b", "id": 1}])
    )
    with pytest.raises(UserError, match=r'line 1: needs a non-empty text under "prompt".*antwort, frage, id.*columns'):
        read(file)
    with pytest.raises(UserError, match=r"line 2: the id '1' is used twice.*columns: \{id: null\}"):
        read(file, columns={"prompt": "frage", "answer": "antwort"})
    prompts, _ = read(file, columns={"prompt": "frage", "answer": "antwort", "id": None})
    assert [(p.id, p.text, p.answers) for p in prompts] == [("line-1", "q?", ("a",)), ("line-2", "r?", ("b",))]
    with pytest.raises(
        UserError, match=r"prompts.columns.answer: no row has a value in a column 'atwort'; there are ant"
    ):
        read(file, columns={"prompt": "frage", "answer": "atwort", "id": None})
    settings = Prompts.model_validate({"from": file, "columns": {"promt": "frage"}})
    with pytest.raises(UserError, match=r"prompts.columns: 'promt' is nothing.*did you mean 'prompt'"):
        split_prompts(settings, Evaluate())


def test_several_files_and_patterns(tmp_path):
    for name in "ba":
        write(tmp_path, json_lines([{"prompt": f"{name}{n}"} for n in range(2)]), f"{name}.jsonl")
    prompts, notes = read(str(tmp_path / "*.jsonl"))
    assert [p.id for p in prompts] == ["a.jsonl/line-1", "a.jsonl/line-2", "b.jsonl/line-1", "b.jsonl/line-2"]
    assert len(notes) == 2
    with pytest.raises(UserError, match="no file fits"):
        read(str(tmp_path / "*.csv"))
    with pytest.raises(UserError, match="is named twice"):
        read([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])
    settings = Prompts.model_validate({"from": [str(tmp_path / "a.jsonl")]})
    found = split_prompts(settings, Evaluate(prompts=str(tmp_path / "b.jsonl")))
    assert [p.text for p in found.held_out] == ["b0", "b1"] and len(found.notes) == 2


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("x/a", "x/b", "y/b"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, json_lines([{"prompt": folder}, {"prompt": "own", "id": folder}]), "train.jsonl")
    write(tmp_path / "x", json_lines([{"prompt": "other"}]), "other.jsonl")
    prompts, _ = read(str(tmp_path / "**" / "*.jsonl"))
    numbered = {p.text: p.id for p in prompts if p.text != "own"}
    assert numbered == {
        "x/a": "a/train.jsonl/line-1", "x/b": "x/b/train.jsonl/line-1", "y/b": "y/b/train.jsonl/line-1",
        "other": "other.jsonl/line-1",
    }  # fmt: skip
    assert {p.id for p in prompts if p.text == "own"} == {f"train.jsonl/{name}" for name in ("x/a", "x/b", "y/b")}


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"sentence": f"Paris {n}", "sentiment": "good", "entities": [{"text": "Paris"}, {"text": "x"}]}
            for n in (1, 2)
        ],
        [{"sentence": "Paris 1", "sentiment": "good", "entities": [{"text": "Paris"}, {"text": "x"}]}],
        [{"utterance": f"Paris {n}", "intent": "good", "slots": [{"name": "n", "value": "v"}]} for n in range(3)],
        [{"frage": f"Paris {n}", "antwort": "good", "quellen": [{"prompt": "v"}]} for n in range(3)],
    ],
)
def test_a_row_with_a_list_of_objects_is_no_wrapper(tmp_path, rows):
    named = {"prompt": "frage", "answer": "antwort"} if "frage" in rows[0] else None
    for text in (json_lines(rows), "\n".join(json.dumps(row, indent=1) for row in rows)):
        prompts, _ = read(write(tmp_path, text), columns=named)
        assert [p.answers for p in prompts] == [("good",)] * len(rows) and prompts[0].text.startswith("Paris")


@pytest.mark.parametrize("frame", ["data", "documents", "passages", "contexts"])
def test_rows_in_a_frame_are_read(tmp_path, frame):
    rows = [{"prompt": f"q{n}", "answer": "a"} for n in range(3)]
    prompts, _ = read(write(tmp_path, json.dumps({frame: rows})))
    assert [prompt.text for prompt in prompts] == ["q0", "q1", "q2"]


def test_an_object_among_others_is_no_wrapper(tmp_path):
    rows = [{"name": "a", "data": [{"prompt": "q"}]}, {"name": "b", "data": []}]
    for text in (json_lines(rows), "\n".join(json.dumps(row, indent=1) for row in rows)):
        with pytest.raises(UserError, match=r"1.*needs a non-empty text.*its columns are data, name"):
            read(write(tmp_path, text))


def test_held_out_prompts_are_read_by_the_same_columns(tmp_path):
    def rows(name):
        return [{"doc": f"{name} {n}", "summary": "s", "question": f"{name} no {n}"} for n in range(3)]

    source = write(tmp_path, json_lines(rows("train")), "a.jsonl")
    settings = Prompts.model_validate({"from": source, "columns": {"prompt": "doc", "answer": "summary", "id": None}})
    bare = [{key: row[key] for key in ("doc", "summary")} | {"id": 1} for row in rows("test")]
    others = [{"question": "test 0", "summary": "s"}, {"question": "test 1"}]
    for number, held in enumerate((rows("test"), bare, others)):
        found = split_prompts(settings, Evaluate(prompts=write(tmp_path, json_lines(held), f"b{number}.jsonl")))
        assert [(p.text, p.answers) for p in found.held_out][:1] == [("test 0", ("s",))]
    found = split_prompts(settings, Evaluate(prompts="builtin/everyday"))
    assert found.training[0].text == "train 0" and len(found.held_out) >= 60


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"prompt": "a \\ud83d"}', "p.jsonl", r'line 1: "prompt" holds half a character'),
        ('{"prompt": "a", "answer": "\\ud83d"}', "p.jsonl", r'line 1: "answer" holds half'),
        ('{"prompt": "a", "id": "\\udc00"}', "p.jsonl", r'line 1: "id" holds half'),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "p.jsonl", r'line 1: "messages\[0\].content" holds half'),
        ('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', "p.jsonl", "line 2: not JSON .the key 'prompt' stands twice"),
        ('[{"prompt": "a"},\n {"prompt": "b"}\n {"prompt": "c"}]', "p.json", "line 3: not JSON .a comma"),
        ('[\n{"prompt": "a"},\n{"prompt": }]', "p.json", "line 3: not JSON"),
        ('[{"prompt": "a"}] 3', "p.json", "more after the array"),
        ('{"prompt": "a"}\n{"prompt":' + "[" * 100000, "p.jsonl", "line 2: not JSON"),
        ('prompt,answer\n"a\nb",c\nd,e,f\n', "p.csv", "line 4: 3 fields under 2 columns"),
        ('prompt,prompt\na,b\n', "p.csv", "line 1: the column 'prompt' stands twice"),
        ('prompt,answer\n"a,b\n', "p.csv", "not a table"),
        ("a\0b\n", "p.txt", "line 1 holds a zero byte"),
        ('{"prompt": "a", "completion": "b", "response": "c"}', "p.jsonl", "completion and response both look like the answer"),
        ('{"prompt": "a", "answer": "b", "answers": ["c"]}', "p.jsonl", "line 1: give one of"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "p.jsonl", r"line 1: .messages\[0\].role. is 'king'; legal"),
        ('{"messages": "[{\'role\': 1}]"}', "p.jsonl", "must be a list, or a list as JSON text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', "p.jsonl", "no text"),
        ('{"prompt": "a", "weight": "heavy"}', "p.jsonl", "line 1: .weight. must be a number"),
        ('{"chosen": "a", "rejected": "b"}', "p.jsonl", "has no prompt beside it"),
        ('{"prompt": "a", "chosen": "b"}', "p.jsonl", '"chosen" and "rejected" must be'),
    ],
)  # fmt: skip
def test_faults_are_refused_by_their_line(tmp_path, text, name, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path, text, name))
    assert name in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([("gpt", "a"), ("human", "b")], "it begins with the assistant"),
        ([("human", "a"), ("human", "b")], "the user speaks twice in a row"),
        ([("human", "a"), ("gpt", "")], "its answer is empty"),
        ([("human", "a"), ("gpt", ""), ("human", "b")], "a turn of the assistant is empty"),
        ([("system", "a")], "no user speaks"),
        ([], "it has no message"),
        ([("human", "a"), ("system", "b")], "a system message stands in the middle"),
        ([("human", "a"), ("function_call", '{"name": "f", "arguments": {}}')], "it ends with a call of a tool"),
    ],
)
def test_conversations_that_no_template_takes_are_left_out(tmp_path, messages, reason):
    rows = [{"conversations": [{"from": role, "value": text} for role, text in messages]}, {"prompt": "a"}]
    prompts, (note,) = read(write(tmp_path, json_lines(rows)))
    assert len(prompts) == 1 and f"1 left out: {reason}" in note and "(first: line 1)" in note


def test_transcripts_are_read(tmp_path):
    begin = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How?\n\nAssistant:"
    (prompt,), _ = read(write(tmp_path, json_lines([{"chosen": f"{begin} Well.", "rejected": f"{begin} No."}])))
    assert [m["content"] for m in prompt.messages] == ["Hi", "Hello!", "How?"] and prompt.answers == ("Well.", "No.")


def test_reasoning_is_kept_or_dropped_but_never_lost(tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "think b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nthink d\n</think>\n\nd"},
    ]
    file = write(tmp_path, json_lines([{"messages": messages}]))
    (kept,), _ = read(file)
    assert kept.before[1]["reasoning_content"] == "think b" and kept.answers[0] == messages[3]["content"]
    (dropped,), (note,) = read(file, keep_reasoning=False)
    assert dropped.before[1] == {"role": "assistant", "content": "b"} and dropped.answers == ("d",)
    assert "the reasoning of 1 rows was dropped" in note


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("r\n</think>\n\nd", "d"), ("<thinking>\nr\n</thinking>\n\nd", "d"), ("[THINK]r[/THINK]d", "d"),
        ("<think>r</think>\n<answer>d</answer>\n", "<answer>d</answer>\n"), ("<think>r", None), ("<think>r</think> ", None),
        ("Models write <think> first.", "Models write <think> first."), (" d\n", " d\n"),
    ],
)  # fmt: skip
def test_reasoning_in_any_marks_is_dropped(tmp_path, said, left):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}, {"role": "user", "content": "c"}]
    rows = [{"prompt": "a", "answer": said}, {"messages": turns}, {"prompt": "a"}]
    prompts, (note,) = read(write(tmp_path, json_lines(rows)), keep_reasoning=False)
    if left is None:
        assert len(prompts) == 1 and "2 left out: nothing follows its reasoning, which is dropped" in note
    else:
        assert prompts[0].answers == (left,) and prompts[1].before[1]["content"] == left
        assert ("the reasoning of 2 rows was dropped" in note) == (left != said)


def test_a_call_of_a_tool_may_have_reasoning_alone(tmp_path):
    call = {"role": "assistant", "content": "<think>r</think>", "tool_calls": CALL}
    messages = [full("a"), call, {"role": "tool", "content": "b"}, full(("assistant", "c"))]
    (prompt,), _ = read(write(tmp_path, json_lines([{"messages": messages}])), keep_reasoning=False)
    assert prompt.after[0]["content"] == "" and prompt.after[0]["tool_calls"] and prompt.answers == ("c",)


def test_a_system_message_that_says_nothing_is_left_out_alone(tmp_path):
    messages = [{"role": "system", "content": " "}, full("a"), full(("assistant", "b"))]
    rows = [{"messages": messages}, {"system": "S", "messages": messages}, {"messages": [full(" "), messages[2]]}]
    rows.append({"system": " ", "prompt": "a"})
    (bare, own, blank), (note,) = read(write(tmp_path, json_lines(rows)))
    assert blank.messages == (full("a"),)
    assert bare.messages == (full("a"),) and own.messages == ({"role": "system", "content": "S"}, full("a"))
    assert "1 left out: a turn of the user is empty" in note


def test_every_turn_of_the_assistant_can_be_a_prompt(tmp_path):
    def said(n):
        return [
            {"role": "user", "content": f"a{n}"},
            {"role": "assistant", "content": f"b{n}"},
            {"role": "user", "content": f"c{n}"},
            {"role": "assistant", "content": f"d{n}", "weight": 0},
            {"role": "user", "content": f"e{n}"},
            {"role": "assistant", "content": f"f{n}"},
        ]

    file = write(tmp_path, json_lines([{"messages": said(n)} for n in range(40)]))
    settings, evaluate = Prompts.model_validate({"from": file}), Evaluate()
    last, every = split_prompts(settings, evaluate), split_prompts(settings, evaluate, "all")
    assert len(every.training) == 2 * len(last.training) and every.held_out == last.held_out
    turns = every.training[:2]
    assert [(turn.text[0], turn.answers[0][0], len(turn.messages)) for turn in turns] == [("a", "b", 1), ("e", "f", 5)]
    assert len({turn.id for turn in every.training}) == len(every.training)


def test_of_few_prompts_one_is_held_out_whatever_their_order(tmp_path):
    """By chance none of nine may be in the tenth that is held out."""
    rows = [{"prompt": f"What is {n} plus {n}?"} for n in range(1, 10)]
    held_out = set()
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        settings = Prompts.model_validate({"from": write(tmp_path, json_lines(ordered), f"{name}.jsonl")})
        found = split_prompts(settings, Evaluate())
        assert len(found.training) == 8 and len(found.held_out) == 1
        held_out |= {prompt.text for prompt in found.held_out}
    assert len(held_out) == 1
    alone = Prompts.model_validate({"from": write(tmp_path, json_lines(rows[:1]), "alone.jsonl")})
    with pytest.raises(UserError, match="no prompt is left for this part"):
        split_prompts(alone, Evaluate())


def test_old_files_keep_their_identity(tmp_path):
    """What older versions read gives the same facts, so that their run folders go on."""
    file = write(tmp_path, '{"prompt": "a", "id": 7, "answer": "b", "weight": 2}\n\n{"prompt": "c", "kind": "k"}\n')
    bare = {"kind": "", "check": None, "task": "", "feedback": "", "answers": [], "weight": 1.0}
    facts = [
        bare | {"id": "7", "text": "a", "answers": ["b"], "weight": 2.0},
        bare | {"id": "line-3", "text": "c", "kind": "k"},
    ]
    assert content_hash([prompt.facts for prompt in load_prompts(file)]) == content_hash(facts)


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"there is no file '[^']*'; give"):
        read(str(tmp_path / "pipe"))
    with pytest.raises(UserError, match=re.escape(f"in {Path.cwd()}, where limbeck was called")):
        read("none.jsonl")
    with pytest.raises(UserError, match="is a folder; give its files"):
        read(str(tmp_path))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz can't be read"):
        read(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"p\.parquet can't be read"):
        read(str(tmp_path / "p.parquet"))


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    file = write_parquet(tmp_path, [{"prompt": "a"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'limbeck\[data\]'"):
        read(str(file))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them changed, removed, doubled or swapped for what parsers stumble over."""
    nasty = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\\ud83d", b"\r", b"\n", b"{", b"]", b"null", b"NaN", b"1e999",
             b"[" * 3000, b"\xf0\x9f", b",", b"9" * 5000, b"[]", b'{"role": 3}', b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([0, 1, 3, 40]))
        data = data[:at] + rng.choice([b"", rng.choice(nasty), data[at:end] * 2]) + data[end:]
    return data


def test_no_damaged_file_gives_a_traceback(tmp_path):
    """Of damaged files of every shape and kind each is read, with an account of all its rows, or refused by a message."""
    seed = int(os.environ.get("LIMBECK_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    print("LIMBECK_FUZZ_SEED =", seed)
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != "datasets folder"]
    refused = 0
    for number in range(150):
        shape, kind = rng.choice(SHAPES), rng.choice(kinds)
        rows = example_rows(shape, ROWS)
        if rng.random() < 0.3:  # a value of a wrong type
            row = rng.choice(rows)
            row[rng.choice(list(row))] = rng.choice(
                [None, 3, True, [], {}, "", [[]], {"a": []}, [{"role": None}], "\ud800"]
            )
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            file = KINDS[kind](folder, rows)
        except (UnicodeEncodeError, pyarrow.ArrowException):
            continue  # that no such file can hold
        file.write_bytes(mutated(file.read_bytes(), rng))
        reader = PromptReader()
        try:
            prompts = list(reader.read([file]))
        except UserError as error:
            refused += 1
            assert str(file) in str(error), f"{seed}: {error}"
            continue
        (account,) = reader.accounts
        assert sum(account.taken.values()) == len(prompts), seed
        content_hash([prompt.facts for prompt in prompts])  # everything in it can be stored
    assert refused > 10, seed
