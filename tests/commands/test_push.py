"""`limbeck push`: the real client of the hub against a server that plays the hub, since none can be reached from here."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.commands.push import write_data
from limbeck.config.recipe import as_yaml, parse
from limbeck.types import Sample, UserError


class Hub(ThreadingHTTPServer):
    """Keeps what is uploaded. `public` is whether the repository is; `refuses` answers a commit with 403."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.files, self.tokens = [], {}, set()
        self.public = self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"id": "me/small", "private": not self.server.public, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.tokens.add(self.headers["authorization"])
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply({"url": f"{self.server.url}/me/small", "name": "me/small"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.reply(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif "/commit/" in self.path and not self.server.refuses:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(
                {"commitUrl": f"{self.server.url}/me/small/commit/{40 * 'a'}", "commitOid": 40 * "a", "success": True}
            )
        else:
            self.reply({"error": "no write access"}, 403)

    def reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run_folder(tmp_path, tiny_folder):
    """A folder like a run's: a student with its card, and figures."""
    run = tmp_path / "small"
    student = run / "student"
    student.mkdir(parents=True)
    for file in tiny_folder.iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    (student / "README.md").write_text("# small: the student\n")
    (student / ".lock").write_text("")
    (run / "evaluation").mkdir()
    kl = {name: {"forward_kl": {"value": value, "low": value, "high": value, "n": 40}} for name, value in
          (("teacher", 0.0), ("untouched", 1.2), ("student", 0.4))}  # fmt: skip
    (run / "evaluation" / "summary.json").write_text(
        json.dumps({"name": "small", "systems": kl, "controls": ["untouched"]})
    )
    return run


def push(*arguments):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_student_its_card_and_its_figures_are_uploaded_and_private(hub, run_folder):
    card = (run_folder / "student" / "README.md").read_text()
    said = json.loads(push(run_folder, "--to", "me/small", "--json"))
    assert said == {"repository": f"{hub.url}/me/small", "private": True, "commit": 40 * "a"}
    assert hub.created[0]["visibility"] == "private" and hub.tokens == {"Bearer hf_secret"}
    assert set(hub.files) == {file.name for file in (run_folder / "student").iterdir()} - {".lock"}
    assert hub.files["model.safetensors"] == (run_folder / "student" / "model.safetensors").read_bytes()
    uploaded = hub.files["README.md"].decode()
    assert uploaded.startswith(card) and "## What was measured" in uploaded and "0.40 nats" in uploaded
    assert (run_folder / "student" / "README.md").read_text() == card, "the run's own card stays"
    assert "hf_secret" not in uploaded


def test_a_public_repository_wants_to_be_named_so(hub, run_folder):
    hub.public = True
    with pytest.raises(UserError, match="everybody can see it: add --public"):
        push(run_folder, "--to", "me/small")
    assert not hub.files
    assert json.loads(push(run_folder, "--to", "me/small", "--public", "--json"))["private"] is False and hub.files


def test_a_repository_that_is_there_and_private_stays_so_and_is_told_so(hub, run_folder):
    """--public makes a new repository public, and no other."""
    assert json.loads(push(run_folder, "--to", "me/small", "--public", "--json"))["private"] is True and hub.files


def test_the_training_text_is_uploaded_as_a_dataset(hub, tmp_path, tiny_folder):
    with pytest.raises(UserError, match="is no run folder"):
        push(tmp_path, "--to", "me/text", "--data")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "answer": str(n)}) + "\n" for n in range(60))
    )
    recipe = {
        "name": "digits",
        "teacher": str(tiny_folder),
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "prompts": {"from": str(tmp_path / "rows.jsonl")},
        "writer": [{"by": "corpus"}],
        "loss": ["cross_entropy"],
        "train": {"steps": 1, "tokens_per_step": 8},
        "evaluate": {"metrics": ["fidelity"], "limit": 2, "controls": []},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = tmp_path / "run"
    shown = CliRunner().invoke(app, ["elicit", str(tmp_path / "recipe.yaml"), "--out", str(run)])
    assert shown.exit_code == 0, shown.output
    said = json.loads(push(run, "--data", "--to", "me/text", "--json"))
    assert said["private"] and hub.created[0]["type"] == "dataset"
    lines = [json.loads(line) for line in hub.files["train.jsonl"].splitlines()]
    prompts = {line["messages"][0]["content"]: line["messages"][-1]["content"] for line in lines}
    assert len(prompts) >= 30 and all(prompts[f"Say {n}."] == str(n) for n in range(60) if f"Say {n}." in prompts)
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nconfigs:") and f"{len(lines)} conversations" in card
    assert str(tmp_path) not in card + hub.files["train.jsonl"].decode() and "hf_secret" not in card


def test_answers_that_teach_nothing_are_not_uploaded(recipe_data, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(as_yaml(parse(recipe_data)))
    said = ({"role": "user", "content": "why?"},)
    good, refused, empty = (
        Sample((*said, {"role": "assistant", "content": text}), "teacher", meta={"finish": finish})
        for text, finish in (("So.", "ok"), ("No.", "refused"), ("", "empty"))
    )
    samples = [good, refused, empty]
    stored = SimpleNamespace(text=SimpleNamespace(training=lambda: samples))
    monkeypatch.setattr("limbeck.runs.run.Run", lambda *_: stored)
    card = write_data(tmp_path, tmp_path)
    assert [json.loads(line)["id"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [good.id]
    assert "1 conversations" in card
    samples.remove(good)
    with pytest.raises(UserError, match="none of its 2 answers can be used"):
        write_data(tmp_path, tmp_path)


def test_what_can_not_be_pushed_is_one_message(hub, run_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a name that a repository can have"):
        push(run_folder, "--to", "me/small/er")
    hub.refuses = True
    with pytest.raises(UserError, match="the hub refused"):
        push(run_folder, "--to", "me/small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="can't be reached"):
        push(run_folder, "--to", "me/small")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        push(run_folder, "--to", "me/small")
    (run_folder / "student" / "README.md").unlink()
    with pytest.raises(UserError, match="write a model card"):
        push(run_folder, "--to", "me/small")
    with pytest.raises(UserError, match="there is no folder"):
        push(tmp_path / "nowhere", "--to", "me/small")
