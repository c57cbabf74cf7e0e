"""Columns of a prompt's file in the templates of `ask`: kept only where they are named, checked by name, always data."""

from __future__ import annotations

import json

import pytest

from limbeck import check
from limbeck.config.recipe import parse
from limbeck.config.sections import Evaluate, Prompts
from limbeck.elicit.prompts import load_prompts, split_prompts
from limbeck.elicit.run import prompt_sample
from limbeck.elicit.steps import check_steps, columns_read
from limbeck.runs.resolve import resolve
from limbeck.types import RecipeError, UserError
from tests.elicit.test_ask import asking
from tests.flow_driver import drive, prompts

ROWS = [
    {
        "prompt": f"question {n}",
        "subject": f"{{{{ 7 * 7 }}}} {n}",
        "tags": ["a", n],
        "other": {"deep": n},
        "empty": None,
    }
    for n in range(40)
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(file, *steps):
    named = columns_read([("ask", step) for step in steps])
    return split_prompts(Prompts(**{"from": str(file)}), Evaluate(), None, named)


def asked(file, template):
    step = asking(prompt=template)
    found = read(file, step)
    pool = [prompt_sample(prompt) for prompt in found.training]
    check_steps([("ask", step)], pool, found.columns)
    _, _, requests = drive(step, pool, lambda request, number: "x")
    return [request.messages[-1]["content"] for request in requests], found


def test_a_template_sees_the_columns_that_it_names(file):
    texts, found = asked(
        file, "{{ subject }}|{{ row.subject }}|{{ row['tags'] | join('-') }}|{{ other.deep }}|{{ empty }}|{{ prompt }}"
    )
    first = found.training[0]
    n = int(first.text.split()[1])
    assert texts[0] == f"{{{{ 7 * 7 }}}} {n}|{{{{ 7 * 7 }}}} {n}|a-{n}|{n}||question {n}", "a value is no template"
    assert {name for name, _ in first.row} == {"subject", "tags", "other", "empty"}


def test_what_no_template_names_is_not_kept_and_changes_no_key(file):
    plain = load_prompts(str(file))
    texts, found = asked(file, "{{ prompt }}")
    assert all(prompt.row == () and "row" not in prompt.facts for prompt in found.training)
    assert {prompt.id: prompt.facts for prompt in found.training}.items() <= {p.id: p.facts for p in plain}.items()
    assert "row" not in prompt_sample(plain[0]).meta
    _, named = asked(file, "{{ subject }}")
    facts = named.training[0].facts
    assert facts.pop("row") == [("subject", ROWS[int(named.training[0].text.split()[1])]["subject"])]
    assert facts == found.training[0].facts
    assert "ignored: other, subject, tags" in found.notes[0] and "ignored: other, tags" in named.notes[0]


def test_all_columns_are_kept_where_a_template_reads_the_row(file):
    texts, found = asked(file, "{% for name in row %}{{ name }} {% endfor %}")
    assert texts[0] == "prompt subject tags other empty"
    texts, _ = asked(file, "{{ row[prompt.split()[0] ~ 's'] is defined }}{{ row }}")
    assert texts[0].startswith("False{") or texts[0].startswith("false{")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ subjet }}", "no field or column 'subjet'; did you mean 'subject'?; the columns of the prompts: empty, other, prompt, subject, tags; fields: answer"),
        ("{{ row.subjet }}", "no column 'subjet'; did you mean 'subject'?; the columns of the prompts: empty, other, prompt, subject, tags"),
        ("{{ nothing_like_it }}", "no field or column 'nothing_like_it'; the columns of the prompts: empty, other, prompt, subject, tags; fields"),
    ],
)  # fmt: skip
def test_an_unknown_column_is_refused_with_the_nearest(file, template, words):
    with pytest.raises(RecipeError) as error:
        asked(file, template)
    assert str(error.value).startswith("elicit[0].ask.prompt: ") and words in str(error.value)


def test_a_row_without_the_column_is_refused_by_its_prompt(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *({"prompt": f"bare {n}"} for n in range(9))]))
    with pytest.raises(RecipeError, match="'subject' is undefined, for the prompt 'bare"):
        asked(file, "{{ subject }}")
    texts, _ = asked(file, "{{ subject | default('none') }}")
    assert "none" in texts


def test_fields_go_before_columns_of_their_name(file):
    steps = [asking(into="subject"), asking(prompt="{{ subject }} {{ row.subject }}")]
    assert columns_read([("ask", steps[1])]) == {"subject"}
    assert columns_read([("ask", step) for step in steps]) == {"subject"}
    assert columns_read([("ask", steps[0]), ("ask", asking(prompt="{{ subject }}"))]) == set()
    pool = prompts("a", row={"subject": "column", "answer": "column", "kind": "column"}, subject="field", kind="k")
    _, _, (request,) = drive(
        asking(prompt="{{ subject }} {{ row.subject }} {{ kind }} {{ row.answer }}"), pool, lambda *_: "x"
    )
    assert request.messages[-1]["content"] == "field column k column"
    with pytest.raises(RecipeError, match="'row' can't be written"):
        asking(into="row")


def test_what_is_no_plain_data_is_refused_with_its_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "x": "\\ud800"}\n')
    with pytest.raises(UserError, match=r'rows\.jsonl, line 1: "x"'):
        read(file, asking(prompt="{{ x }}"))


def test_tables_and_turns_have_columns_too(tmp_path, file):
    table = tmp_path / "rows.csv"
    table.write_text("prompt,subject\n" + "".join(f"question {n},s{n}\n" for n in range(40)))
    texts, _ = asked(table, "{{ subject }}!")
    assert texts[0].startswith("s") and len(texts) > 20


def test_a_recipe_checks_them(recipe_data, file):
    data = recipe_data | {"prompts": {"from": str(file)}, "writer": [{"by": "elicited"}]}
    good = parse(data | {"elicit": [{"ask": {"prompt": "{{ subject }}", "max_tokens": 8}}]})
    check(good)
    method = resolve(good)
    assert dict(method.training_prompts[0].row).keys() == {"subject"}
    plain = resolve(parse(data | {"elicit": [{"ask": {"prompt": "{{ prompt }}", "max_tokens": 8}}]}))
    assert plain.prompts_key != method.prompts_key
    with pytest.raises(RecipeError, match=r"^elicit\[0\]\.ask\.prompt: there is no field or column 'subjct'; did you"):
        check(parse(data | {"elicit": [{"ask": {"prompt": "{{ subjct }}", "max_tokens": 8}}]}))
