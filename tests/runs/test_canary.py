"""A key that a server writes back in every way it can is in nothing that a run prints or writes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from limbeck.config.recipe import as_yaml, parse
from tests.command_line import called
from tests.scripted_server import Handler, Scripted, answer

CANARY = "sk-canary/0123456789abcdef"
SPELLINGS = (
    CANARY,
    json.dumps(CANARY).strip('"').replace("/", "\\/"),
    "".join(f"\\u{ord(character):04x}" for character in CANARY),
    "".join(f"%{ord(character):02x}" for character in CANARY),
)


class Leaking(Handler):
    """A server whose list of models, headers and errors have the key."""

    def do_GET(self):
        models = [{"id": "toy", "root": CANARY, "owned_by": CANARY}, {"id": CANARY}]
        self.reply(200, json.dumps({"data": models}).encode(), {"X-Request-Id": CANARY})


def leaked(number, body):
    """Replies of all kinds with the key in them."""
    if number == 3:
        return ("status", 400, {}, json.dumps({"error": {"message": f"no: {CANARY}"}}).encode())
    if number == 4:
        return ("status", 500, {}, SPELLINGS[2].encode())
    if number % 7 == 5:
        return ("bytes", json.dumps(answer(f"the cat {CANARY}", "odd")).replace(CANARY, SPELLINGS[2]).encode())
    text = "the cat sat on the mat"
    return answer(f"{text} {CANARY}" if number % 3 else text, system_fingerprint=CANARY)


def decoded(content: bytes) -> str:
    """What a reader finds who decodes the JSON in it, and JSON within that."""
    text = content.decode("latin-1")
    for _ in range(2):
        text += text.replace("\\/", "/").encode("latin-1", "replace").decode("unicode_escape", "replace")
    return text


def everything(folder):
    """(name, bytes) of every file, and of every value in every database."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield file.name, file.read_bytes()
        if file.suffix == ".sqlite":
            with closing(sqlite3.connect(file)) as db:
                for (table,) in db.execute("select name from sqlite_master where type = 'table'").fetchall():
                    for row in db.execute(f"select * from {table}"):
                        yield f"{file.name} {table}", repr(row).encode()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of unicode_escape, which meets all kinds of bytes here
@pytest.mark.promise("S8")
def test_a_canary_key_is_nowhere(recipe_data, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", CANARY)
    monkeypatch.setenv("LIMBECK_STORE", str(tmp_path / "shared"))
    out, printed = tmp_path / "run", []
    with Scripted(leaked) as server:
        server.RequestHandlerClass = Leaking
        teacher = {"server": {"url": server.url, "name": "toy", "concurrency": 1, "retries": 1}}
        common = {
            "teacher": teacher,
            "student": {"start": {"pretrained": str(tiny_folder)}},
            "loss": ["cross_entropy"],
            "evaluate": {**recipe_data["evaluate"], "metrics": ["fidelity"], "controls": ["untouched"]},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(as_yaml(parse({**recipe_data, **common})))
        wrong = tmp_path / "wrong.yaml"
        teacher["server"]["name"] = "other"
        wrong.write_text(as_yaml(parse({**recipe_data, **common})))
        loose = ("--set", "teacher.server.tolerate=0.6")
        for command, status in (
            (("run", str(wrong), "--out", str(tmp_path / "wrong")), 2),
            (("check", str(file)), 0),
            (("run", str(file), "--out", str(out)), 2),
            (("run", str(file), "--out", str(out), *loose), 0),
            (("report", str(out)), 0),
            (("doctor", str(file)), None),
        ):
            ended, text = called(*command)
            assert status in (None, ended), (command, text)
            printed.append((command[0], text.encode()))
        assert all(CANARY in headers["Authorization"] for _, _, headers in server.seen)
        assert len(server.seen) > 20
    searched = [*everything(tmp_path), *printed]
    names = {name for name, _ in searched}
    assert {"report.html", "summary.json", "store.sqlite bodies", "answers.sqlite answers"} <= names
    for name, content in searched:
        text = decoded(content)
        found = [spelling for spelling in SPELLINGS if spelling in text]
        assert not found, f"{found[0]} in {name}"
