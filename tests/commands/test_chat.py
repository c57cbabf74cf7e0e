"""`limbeck chat` loads the teacher as its run had it, and says why one is missing."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from limbeck.commands import chat
from limbeck.config.recipe import as_yaml, parse
from tests.command_line import called


@pytest.fixture
def run_of(recipe_data, tiny_folder, tmp_path):
    """A finished run of a recipe."""

    def made(machine=None, **changes):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(tiny_folder, folder / "student")
        (folder / "recipe.yaml").write_text(as_yaml(parse({**recipe_data, **changes})))
        (folder / "machine.json").write_text(json.dumps({"device": "cpu", "settings": machine or {}}))
        return folder

    return made


def test_the_teacher_is_the_runs(run_of, tiny_folder, monkeypatch):
    spoke = {}
    monkeypatch.setattr(chat, "answer", lambda model, *_: spoke.setdefault(model.identity, model) and "fine")
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n\n"))
    teacher = {"model": str(tiny_folder), "dtype": "bfloat16", "context": {"system": "Be brief."}}
    chat.converse(run_of(teacher=teacher), 4, 0.0)
    first, student = spoke.values()
    assert str(first.net.dtype) == "torch.bfloat16" and first.prompt_context.system == "Be brief."
    assert str(student.net.dtype) == "torch.float32" and student.prompt_context is None


ASK = {"ask": {"prompt": "Is it good? {{ prompt }}", "parse": {"label": ["yes", "no"]}}}


@pytest.mark.parametrize(
    ("step", "asked"),
    [(ASK, "Is it good? why?"), ({"ask": {"prompt": "{{ prompt | upper }}", "parse": "text"}}, "why?")],
)
def test_the_teacher_is_asked_with_the_question_that_it_taught_with(
    run_of, tiny_folder, monkeypatch, capsys, step, asked
):
    spoke = {}
    monkeypatch.setattr(chat, "answer", lambda model, *_: spoke.setdefault(model.identity, model) and "fine")
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n\n"))
    chat.converse(
        run_of(teacher={"model": str(tiny_folder)}, elicit=[step], writer=[{"by": "elicited"}], loss=["cross_entropy"]),
        4,
        0.0,
    )
    teacher = next(iter(spoke.values()))
    question = ({"role": "user", "content": "why?"},)
    shown = question if teacher.prompt_context is None else teacher.prompt_context(question)
    assert shown[-1]["content"] == asked
    assert ("another thing for every prompt" in " ".join(capsys.readouterr().err.split())) == (asked == "why?")


def test_the_device_is_the_machines_unless_it_is_named(run_of, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    folder = run_of(machine={"device": "cuda:97"})
    status, printed = called("chat", folder)
    assert status == 2 and "cuda:97" in printed
    assert called("chat", folder, "--device", "cpu")[0] == 0


def test_a_teacher_behind_a_server_is_named_and_not_asked(run_of, tiny_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n\n"))
    folder = run_of(
        teacher={"server": {"url": "http://127.0.0.1:1/v1", "name": "toy"}},
        student={"start": {"pretrained": str(tiny_folder)}},
        loss=["cross_entropy"],
    )
    status, printed = called("chat", folder, "--max-tokens", 2)
    assert status == 0 and "the teacher is behind a server and is not asked" in printed and "student" in printed
