"""A user's own file, and a folder of any family, train in two commands: `limbeck new` and `limbeck run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from tests import families
from tests.conftest import make_tokenizer
from tests.families import FAMILIES, make_model

THINGS = [f"{size} {thing}" for size in ("small", "large", "old", "new") for thing in ("cup", "door", "lamp", "boat")]
SHORT = ["--set", "writer.0.max_tokens=16", "--set", "evaluate.max_tokens=16"]


def limbeck(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def chats():
    """A file in OpenAI's format."""
    file = Path("chats.jsonl")
    talks = [
        [{"role": "user", "content": f"Tell me of a {it}."}, {"role": "assistant", "content": f"A {it} is a thing."}]
        for it in THINGS
    ]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(file)


@pytest.fixture(autouse=True)
def roomy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(families.SIZES, "max_position_embeddings", 2048)


@pytest.mark.parametrize("family", [*list(FAMILIES)[::5], "lfm2", "qwen3-vl"])  # each was tried once
def test_a_folder_of_a_family(family):
    make_model(family, Path("model"), 0, make_tokenizer())
    limbeck("new", "small", "--task", "compress", "--data", chats(), "--teacher", "model", "--yes")
    limbeck("run", "small/recipe.yaml", *SHORT)
    assert Path("runs/small/report.html").is_file() and Path("runs/small/student/config.json").is_file()


def test_a_file_of_chats():
    make_model("llama", Path("model"), 0, make_tokenizer())
    limbeck("new", "mine", "--task", "chat", "--data", chats(), "--student", "model", "--yes")
    limbeck("run", "mine/recipe.yaml", *SHORT)
    systems = json.loads(Path("runs/mine/evaluation/summary.json").read_text())["systems"]
    before, after = (systems[name]["mine-task/bits_per_byte"]["value"] for name in ("untouched", "student"))
    assert after < before
