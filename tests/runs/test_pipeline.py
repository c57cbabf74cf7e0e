"""The whole road on a tiny model: a run ends, goes on after a kill, repeats nothing, and refuses what is another's."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.config.recipe import parse
from limbeck.models.teacher import InProcessTeacher
from limbeck.progress import Silent, StoppedError
from limbeck.runs.claim import claim
from limbeck.runs.fit import prepared
from limbeck.runs.run import Run
from limbeck.storage.store import Store

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def recipe_file(tmp_path, recipe_data):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_data))
    return file


def command(*arguments, crash_at="", cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LIMBECK_CRASH_AT": crash_at}
    return subprocess.run(
        [sys.executable, "-m", "limbeck", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def kept(folder):
    """How many answers are stored."""
    file = folder / "store.sqlite"
    return sum(Store.count(file).values()) if file.exists() else 0


def losses(folder):
    return [json.loads(line)["loss"].hex() for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_recipe_to_report(recipe_data, tmp_path):
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out)
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert list(summary["systems"]) == ["teacher", "untouched", "sft_control", "student"]
    for metrics in summary["systems"].values():
        assert {"forward_kl", "reverse_kl", "jsd", "top1_agreement", "perplexity"} <= set(metrics)
        assert all({"value", "low", "high", "n"} == set(interval) for interval in metrics.values())
    assert summary["systems"]["teacher"]["forward_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert summary["systems"]["teacher"]["top1_agreement"]["value"] == 1
    measured = [summary["systems"][name]["forward_kl"]["value"] for name in ("untouched", "sft_control", "student")]
    assert len(set(measured)) == 3 and min(measured) > 0.01
    assert {"student - untouched", "student - sft_control"} == set(summary["paired"])
    assert summary["recipe"] == parse(recipe_data).hash
    student = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    ids = tokenizer("why is the sky", return_tensors="pt").input_ids
    assert (
        student.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids)).shape[1]
        > ids.shape[1]
    )
    assert "Teacher" in (out / "report.html").read_text()
    for file in ("config.json", "tokenizer_config.json", "README.md"):
        assert str(tmp_path) not in (out / "student" / file).read_text().replace(recipe_data["teacher"], "").replace(
            recipe_data["prompts"]["from"], ""
        ).replace(recipe_data["evaluate"]["prompts"], "")


def test_a_finished_run_loads_no_model_and_changes_nothing(recipe_data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out)
    before = {
        file: file.stat().st_mtime_ns
        for file in out.rglob("*")
        if file.is_file() and file.name not in {"report.html", ".lock"}
    }
    monkeypatch.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr("limbeck.training.loop.train", lambda *_: pytest.fail("trained again"))
    limbeck.run(parse(recipe_data), out)
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("crash_at", ["train.after_step:4"])  # more in tests/long/test_kills.py
@pytest.mark.promise("R3")
def test_killed_anywhere_it_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, crash_at):
    recipe_data["train"]["save_seconds"] = 0
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    out = tmp_path / "killed"
    assert command("run", recipe_file, "--out", out, crash_at=crash_at).returncode == 137
    with sqlite3.connect(out / "store.sqlite") as db:
        before = dict(db.execute("select key, sample_id from answers"))
    done = command("run", recipe_file, "--out", out)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(out / "store.sqlite") as db:
        after = dict(db.execute("select key, sample_id from answers"))
    assert before.items() <= after.items() and len(after) == 20
    clean = tmp_path / "clean"
    assert command("run", recipe_file, "--out", clean).returncode == 0
    assert losses(out) == losses(clean)
    assert losses(out / "controls" / "sft_control") == losses(clean / "controls" / "sft_control")
    ours, theirs = (
        json.loads((folder / "evaluation" / "summary.json").read_text())["systems"] for folder in (out, clean)
    )
    assert ours == theirs


class FewPages(sqlite3.Connection):
    """A store on a disk that has room for a few pages more."""

    most = 0

    def execute(self, *arguments):
        super().execute(f"pragma max_page_count={self.most}")
        return super().execute(*arguments)


@pytest.mark.parametrize("room", ["the store", 4, 12, 20])
@pytest.mark.promise("R13")
def test_after_a_full_disk_the_run_goes_on_to_the_same_end(recipe_data, tmp_path, monkeypatch, room):
    recipe_data["train"]["save_seconds"] = 0
    clean, out = tmp_path / "clean", tmp_path / "out"
    limbeck.run(parse(recipe_data), clean)
    with monkeypatch.context() as patch:
        if room == "the store":
            patch.setattr(FewPages, "most", 25)
            patch.setattr("limbeck.storage.store.sqlite3.connect", partial(sqlite3.connect, factory=FewPages))
        else:
            sync, left = os.fsync, iter(range(room))

            def full(number):
                if next(left, None) is None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                sync(number)

            patch.setattr(os, "fsync", full)
        with pytest.raises((OSError, sqlite3.OperationalError), match=r"(?i)no space left|disk is full"):
            limbeck.run(parse(recipe_data), out)
    assert (kept(out) > 0) == (room != 4)
    limbeck.run(parse(recipe_data), out)
    assert losses(out) == losses(clean)
    ours, theirs = (json.loads((folder / "evaluation" / "summary.json").read_text()) for folder in (out, clean))
    assert ours["systems"] == theirs["systems"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.promise("R14")
def test_a_signal_stops_after_the_step_and_the_run_goes_on_to_the_same_end(recipe_data, recipe_file, tmp_path, number):
    recipe_data["train"] |= {"steps": 150, "save_seconds": 600}
    recipe_data["evaluate"]["controls"] = []
    recipe_file.write_text(yaml.safe_dump(recipe_data))
    out, log = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "train", str(recipe_file), "--out", str(out)],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "run it again" in said and "Traceback" not in said, said
    done = len(losses(out))
    assert 2 < done < 150 and (out / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    assert command("train", recipe_file, "--out", out).returncode == 0
    assert command("train", recipe_file, "--out", tmp_path / "clean").returncode == 0
    assert len(losses(out)) == 150 and losses(out) == losses(tmp_path / "clean")


def test_stopping_keeps_what_is_done(recipe_data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(StoppedError, match="run it again"):
        limbeck.run(parse(recipe_data), out, stop=lambda: kept(out) >= 3)
    assert 3 <= kept(out) < 20
    limbeck.run(parse(recipe_data), out)
    assert kept(out) == 20


def test_a_folder_of_another_recipe_is_refused_and_left_alone(recipe_data, tmp_path):
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out, stages=("elicit",))
    before = (out / "recipe.yaml").read_bytes()
    recipe_data["train"]["lr"] = 0.5
    with pytest.raises(limbeck.UserError, match="differs in train"):
        limbeck.run(parse(recipe_data), out)
    assert (out / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
@pytest.mark.parametrize("name", ["recipe.yaml", "inputs.json"])
def test_a_folder_whose_papers_are_damaged_is_refused(name, content, recipe_data, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    recipe = parse(recipe_data)
    claim(folder, recipe, dict, lambda: None)
    claim(folder, recipe, dict, lambda: None)
    (folder / name).write_bytes(content)
    with pytest.raises(limbeck.UserError, match=f"{name} is damaged.*another --out"):
        claim(folder, recipe, dict, lambda: None)


def test_a_folder_with_strangers_is_refused(recipe_data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(limbeck.UserError, match=r"thesis\.txt"):
        limbeck.run(parse(recipe_data), tmp_path / "out")


def test_nothing_of_the_users_is_swept_away(recipe_data, tmp_path):
    out = tmp_path / "out"
    (out / ".config.old").mkdir(parents=True)
    (out / ".config.old" / "precious").write_text("mine")
    with pytest.raises(limbeck.UserError, match="config"):
        limbeck.run(parse(recipe_data), out)
    assert (out / ".config.old" / "precious").read_text() == "mine"


def test_two_prompts_of_the_same_text_share_one_answer(recipe_data, tmp_path, prompt_file):
    prompt_file.write_text('{"prompt": "why"}\n{"prompt": "why"}\n{"prompt": "a dog"}\n')
    limbeck.run(parse(recipe_data), tmp_path / "out", stages=("elicit", "train"))
    with sqlite3.connect(tmp_path / "out" / "store.sqlite") as db:
        assert db.execute("select count(*) from answers").fetchone() == (2 + 2,)


def test_an_edited_prompt_file_under_a_run_is_noticed(recipe_data, tmp_path, prompt_file):
    limbeck.run(parse(recipe_data), tmp_path / "out", stages=("elicit",))
    prompt_file.write_text('{"prompt": "new"}\n' + prompt_file.read_text())
    with pytest.raises(limbeck.UserError, match="prompts changed"):
        limbeck.run(parse(recipe_data), tmp_path / "out")


def test_a_task_is_scored_on_its_own_prompts(recipe_data, tmp_path):
    recipe_data["evaluate"] |= {"limit": 1, "metrics": ["fidelity", {"everyday": {"limit": 7}}]}
    limbeck.run(parse(recipe_data), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
    assert summary["systems"]["student"]["everyday/tokens"]["n"] == 7 and summary["held_out"]["answers"] == 1


@pytest.mark.long
def test_other_starts_losses_and_writers_run_too(recipe_data, tmp_path, prompt_file, tiny_folder):
    lines = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    prompt_file.write_text("".join(json.dumps(line | {"answer": "the cat sat"}) + "\n" for line in lines))
    recipe_data["evaluate"]["metrics"] = ["fidelity"]
    recipe_data["writer"] = [{"by": "teacher", "share": 0.5, "max_tokens": 8}, {"by": "corpus", "share": 0.5}]
    recipe_data["loss"] = ["reverse_kl", {"cross_entropy": {"weight": 0.5}}]
    recipe_data["student"] = {"start": {"scratch": {"config": {"num_hidden_layers": 1}}}}
    limbeck.run(parse(recipe_data), tmp_path / "scratch")
    with sqlite3.connect(tmp_path / "scratch" / "store.sqlite") as db:
        (asked,) = db.execute("select count(*) from answers").fetchone()
    assert 2 < asked < 20
    recipe_data["student"] = {"start": {"pretrained": str(tiny_folder)}, "lora": {"rank": 2}}
    recipe_data["loss"] = ["cross_entropy"]
    limbeck.run(parse(recipe_data), tmp_path / "lora")
    systems = json.loads((tmp_path / "lora" / "evaluation" / "summary.json").read_text())["systems"]
    assert list(systems) == ["teacher", "untouched", "student"], "fine-tuning is its own control"


@pytest.mark.long
def test_profile_prints_rate_and_floor(recipe_file, tmp_path):
    done = command("train", recipe_file, "--profile", "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["times_the_floor"] > 0 and found["matrix_product_gflop_per_second"] > 0
    assert command("train", recipe_file, "--out", tmp_path / "out").returncode == 0


@pytest.mark.long
def test_the_command_ends_with_2_for_the_users_mistakes_and_says_one_thing(recipe_file, tmp_path):
    for arguments, words in [
        (("run", tmp_path / "none.yaml"), "no recipe file"),
        (("check", recipe_file, "--set", "train.stepz=3"), "did you mean 'steps'"),
        (("run", recipe_file, "--set", "teacher=./nowhere", "--out", tmp_path / "x"), "./nowhere"),
        (("report", tmp_path), "limbeck evaluate"),
        (("chat", tmp_path), "no finished student"),
        (("methods", "jds"), "jsd"),
        (("models", "get", "smollm"), "smollm2-135m-instruct"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.long
@pytest.mark.promise("R13")
def test_a_full_disk_is_one_message(recipe_file, tmp_path):
    code = (
        "import errno, sys, limbeck.storage.files as d\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "d.os.fsync = full\n"
        "sys.argv = ['limbeck', 'run', sys.argv[1], '--out', sys.argv[2]]\n"
        "from limbeck.cli import main\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_file), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "the disk is full" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_ctrl_c_is_one_message(recipe_file, tmp_path):
    out = tmp_path / "out"
    assert command("run", recipe_file, "--out", out).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "chat", str(out), "--max-tokens", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    process.stdin.write("why\n")
    process.stdin.flush()
    while "student" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "stopped" in said and "Traceback" not in said


@pytest.mark.promise("R16")
def test_a_second_process_is_refused(recipe_data, tmp_path):
    from limbeck.storage.files import exclusive

    with exclusive(tmp_path / "out" / ".lock"), pytest.raises(limbeck.UserError, match="in use"):
        limbeck.run(parse(recipe_data), tmp_path / "out")


@pytest.mark.long
def test_chat_answers_side_by_side(recipe_file, tmp_path):
    out = tmp_path / "out"
    assert command("run", recipe_file, "--out", out).returncode == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "chat", str(out), "--max-tokens", "8"],
        input="why is the sky\n\n",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "teacher" in done.stdout and "student" in done.stdout


@pytest.mark.parametrize(("loss", "stays"), [("cross_entropy", False), ("forward_kl", True)])
def test_a_teacher_that_no_term_reads_is_released_for_the_training(recipe_data, tiny_folder, tmp_path, loss, stays):
    start = {"student": {"start": {"pretrained": str(tiny_folder)}}}
    job = Run(prepared(parse(recipe_data | start | {"loss": [loss]})), tmp_path / "run", Silent())
    assert job.text.training() and job.models.loaded
    job.job("student", job.models.student_to_train())
    assert bool(job.models.loaded) is stays
