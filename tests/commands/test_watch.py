"""`limbeck watch`: what a run folder says while it grows, and at its end."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import limbeck
from limbeck.commands.watch import BARS, Watcher, draw, sparkline, watch
from limbeck.config.recipe import parse
from limbeck.storage.metrics_log import Metrics, mean_of, values_of, writing_share
from limbeck.types import UserError

ROOT = Path(__file__).parent.parent.parent


def step(number, loss=2.0, **more):
    return {
        "step": number, "steps": 20, "loss": loss, "terms": {"jsd": loss}, "grad_norm": 1.5, "lr": 2e-4, "tokens": 1000, "seconds": 0.5, **more,
    }  # fmt: skip


def write(file, records, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write("\n".join(json.dumps(record) for record in records) + end)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: tiny\ntrain: {steps: 20, epochs: null}\n")
    return tmp_path


def shown(folder, width=100):
    screen = Console(width=width, record=True, file=io.StringIO())
    watch(folder, screen, once=True)
    return screen.export_text()


def test_a_growing_file_is_read_on_and_a_half_line_waits(folder):
    file = folder / "metrics.jsonl"
    metrics = Metrics(file)
    assert metrics.update() == []
    write(file, [step(1), step(2)])
    assert [r["step"] for r in metrics.update()] == [1, 2]
    line = json.dumps(step(3))
    write(file, [], end=line[:20])
    assert [r["step"] for r in metrics.update()] == [1, 2]
    write(file, [], end=line[20:] + "\n")
    assert [r["step"] for r in metrics.update()] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(0, 400, 7))
@pytest.mark.promise("R18")
def test_cut_anywhere_only_whole_steps_count(folder, cut):
    content = "".join(json.dumps(step(n)) + "\n" for n in (1, 2, 3)).encode()[:cut]
    (folder / "metrics.jsonl").write_bytes(content)
    records = Metrics(folder / "metrics.jsonl").update()
    assert [r["step"] for r in records] == list(range(1, content.count(b"\n") + 1))


def test_a_training_that_goes_on_from_a_checkpoint_is_read_anew(folder):
    file = folder / "metrics.jsonl"
    write(file, [step(n, loss=float(n)) for n in range(1, 6)])
    metrics = Metrics(file)
    assert len(metrics.update()) == 5
    beside = folder / "beside"
    beside.write_text("".join(json.dumps(step(n, loss=9.0)) + "\n" for n in (1, 2)))
    beside.replace(file)
    assert [r["loss"] for r in metrics.update()] == [9.0, 9.0]
    write(file, [step(3, loss=8.0)])
    assert [r["loss"] for r in metrics.update()] == [9.0, 9.0, 8.0]
    file.unlink()
    assert metrics.update() == []


def test_lines_that_are_no_steps_are_left_out(folder):
    (folder / "metrics.jsonl").write_text('{"step": "x"}\n[1]\nnonsense\n\n' + json.dumps(step(4)) + "\n")
    assert [r["step"] for r in Metrics(folder / "metrics.jsonl").update()] == [4]


def test_values_leave_out_what_is_no_number():
    record = step(1, loss=math.nan, terms={"jsd": 0.5, "bad": "0.7"}, lr=True, scheduled={"jsd.weight": 0.1})
    assert values_of(record) == {
        "grad_norm": 1.5, "terms/jsd": 0.5, "scheduled/jsd.weight": 0.1, "tokens_per_second": 2000.0,
    }  # fmt: skip
    assert "tokens_per_second" not in values_of(step(1, seconds=0))
    assert values_of({"step": 1, "terms": 3}) == {}


def test_the_stages_of_a_run(folder):
    assert Watcher(folder).look().stage == "starting"
    (folder / "start.json").write_text("{}")
    assert Watcher(folder).look().stage == "student's initial weights"
    write(folder / "metrics.jsonl", [step(n, loss=3.0 - n / 10) for n in range(1, 11)])
    watcher = Watcher(folder)
    view = watcher.look()
    assert view.stage == "training: student" and view.age is not None and 0 <= view.age < 60
    (student,) = view.trainings
    assert (student.step, student.steps, student.finished) == (10, 20, False)
    assert student.tokens_per_second == pytest.approx(2000) and student.seconds_left == pytest.approx(5.0)
    assert student.values["loss"] == 2.0 and len(student.losses) == 10
    write(folder / "metrics.jsonl", [step(n) for n in range(11, 21)])
    (folder / "student").mkdir()
    view = watcher.look()
    assert view.stage == "trained: student" and view.age is None and view.trainings[0].seconds_left is None
    write(folder / "controls" / "sft_control" / "metrics.jsonl", [step(1)])
    view = watcher.look()
    assert view.stage == "training: sft_control" and [t.name for t in view.trainings] == ["student", "sft_control"]
    (folder / "controls" / "sft_control" / "student").mkdir()
    (folder / "evaluation").mkdir()
    assert watcher.look().stage == "evaluation"
    systems = {"student": {"forward_kl": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 9}}}
    (folder / "evaluation" / "summary.json").write_text(json.dumps({"systems": systems}))
    assert watcher.look().stage == "report"
    (folder / "report.html").write_text("")
    view = watcher.look()
    assert view.stage == "done" and view.evaluation == {"student": {"forward_kl": 0.25}}
    assert "0.25" in shown(folder)


def test_how_many_steps_from_the_record_else_the_recipe_else_unknown(folder):
    write(folder / "metrics.jsonl", [{key: value for key, value in step(3).items() if key != "steps"}])
    assert Watcher(folder).look().trainings[0].steps == 20
    (folder / "recipe.yaml").write_text("name: tiny\ntrain: {epochs: 2}\n")
    (training,) = Watcher(folder).look().trainings
    assert training.steps is None and training.seconds_left is None
    assert "of" not in shown(folder).split("step", 1)[1].splitlines()[0].replace("of loss", "")


def test_answers_are_counted_without_touching_the_store(folder):
    from limbeck.storage.store import Store
    from limbeck.types import Request, Sample, Sampling

    with Store(folder / "store.sqlite") as store:
        for number, finish in enumerate(["ok", "ok", "length"]):
            request = Request("m@1", ({"role": "user", "content": str(number)},), Sampling(), 0)
            sample = Sample((*request.messages, {"role": "assistant", "content": "yes"}), "teacher", (1,))
            store.record(request, sample, finish)
        assert Watcher(folder).look().answers == {"length": 1, "ok": 2}
    assert "2 ok" in shown(folder)
    (folder / "store.sqlite").write_bytes(b"no database")
    assert Watcher(folder).look().answers == {}


def test_the_page_shows_numbers_curve_and_no_control_characters(folder):
    (folder / "recipe.yaml").write_text('name: "ti\\e[31mny"\ntrain: {steps: 20}\n')
    write(folder / "metrics.jsonl", [step(n, loss=3.0 - n / 10, terms={"x\x1b[2J[bold]": 0.5}) for n in range(1, 11)])
    text = shown(folder)
    for words in ("training: student", "10 of 20", "2.00e-04", "2,000", "5 s", "x[2J[bold]"):
        assert words in text, text
    assert "\x1b" not in text and BARS[-1] in text and BARS[0] in text


def wrote(number, **more):
    facts = {"seconds": 0.2, "written": 4, "length": 50.0 + number, "finished": 0.9, "overlap": 0.75}
    return step(number, rollout=facts | more)


def test_what_the_student_writes_has_a_line_of_its_own(folder):
    write(folder / "metrics.jsonl", [step(1)])
    assert "writes:" not in shown(folder) and Watcher(folder).look().trainings[0].rollout is None
    advice = "more and more answers run into max_tokens: give the student a cold start, lower its share, or raise\x1b[2J max_tokens"
    records = [
        wrote(2, advice=["the first"]),
        wrote(3, finished=0.1, advice=["the second", advice]),
        *(wrote(n) for n in range(4, 13)),
        step(13),
    ]
    write(folder / "metrics.jsonl", records)
    (student,) = Watcher(folder).look().trainings
    assert student.rollout.length == pytest.approx(58.0) and student.rollout.finished == pytest.approx(0.9)
    assert student.rollout.time == pytest.approx(0.2 * 9 / (0.5 * 10)), "of ten recent steps, in nine of which it wrote"
    lines = shown(folder, width=200).splitlines()
    assert (
        "student writes: 58 tokens per answer, 90 % ended by themselves, 75 % of top tokens shared, 36 % of the time"
        in lines
    )
    assert f"advice, step 3: {advice}".replace("\x1b", "") in lines and "the first" not in "".join(lines)


def test_a_student_that_wrote_long_ago_or_with_few_facts(folder):
    write(folder / "metrics.jsonl", [wrote(1), *(step(n) for n in range(2, 12))])
    assert "student writes: nothing in the last 10 steps" in shown(folder)
    write(folder / "metrics.jsonl", [step(12, rollout={"length": 7.0})])
    assert "student writes: 7 tokens per answer, 0 % of the time\n" in shown(folder).replace(" \n", "\n")


def test_means_and_shares_of_what_was_written():
    records = [wrote(1), step(2), wrote(3, overlap=math.nan), {"step": 4, "seconds": None, "rollout": 7}]
    assert (
        mean_of(records, "length") == 52.0 and mean_of(records, "overlap") == 0.75 and mean_of(records, "none") is None
    )
    assert (
        writing_share(records) == pytest.approx(0.4 / 1.5)
        and writing_share(records[1:2]) == 0
        and writing_share([]) is None
    )
    assert writing_share([step(1, seconds=0)]) is None


def test_sparkline():
    assert sparkline([]) == "" and sparkline([1.0, 1.0]) == BARS[0] * 2
    assert sparkline([0.0, 7.0]) == BARS[0] + BARS[-1]
    assert sparkline([float(n) for n in range(8)]) == BARS
    assert len(sparkline([float(n % 5) for n in range(1000)], width=32)) == 32
    assert sparkline([3.0, 1.0, 2.0, 0.0], width=2) == BARS[-1] + BARS[0]


def test_no_folder_or_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        Watcher(tmp_path / "none")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        Watcher(tmp_path)


def test_a_run_of_ours_from_beginning_to_end(recipe_data, tmp_path):
    out = tmp_path / "out"
    limbeck.run(parse(recipe_data), out, stages=("elicit",))
    view = Watcher(out).look()
    assert view.stage == "teacher's text" and sum(view.answers.values()) == 20 and not view.trainings
    watcher = Watcher(out)
    limbeck.run(parse(recipe_data), out)
    view = watcher.look()
    assert view.stage == "done" and [(t.name, t.step, t.steps) for t in view.trainings] == [
        ("student", 6, 6),
        ("sft_control", 6, 6),
    ]
    assert {"teacher", "untouched", "sft_control", "student"} == set(view.evaluation)
    assert "sft_control" in shown(out) and "forward_kl" in shown(out)


def test_ctrl_c_ends_the_watching_with_0_and_what_came_meanwhile_was_shown(folder):
    write(folder / "metrics.jsonl", [step(1)])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "100",
        "TERM": "xterm",
        "FORCE_COLOR": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "watch", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = ""
    while "1 of 20" not in output:
        output += process.stdout.readline()
    write(folder / "metrics.jsonl", [step(2)])
    while "2 of 20" not in output:
        output += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""


def test_once_as_a_command(folder):
    write(folder / "metrics.jsonl", [step(7)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    command = [sys.executable, "-m", "limbeck", "watch", str(folder), "--once"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "7 of 20" in done.stdout, done.stderr
    assert time.monotonic() - began < 20
    assert draw(Watcher(folder).look()).renderables


def test_without_a_terminal_the_state_is_printed_once_with_how_many_answers_there_will_be(folder):
    from limbeck.storage.store import Store
    from limbeck.types import Request, Sample, Sampling

    with Store(folder / "store.sqlite") as store:
        request = Request("m@1", ({"role": "user", "content": "why"},), Sampling(), 0)
        sample = Sample((*request.messages, {"role": "assistant", "content": "yes"}), "teacher", (1,))
        store.record(request, sample, "ok")
    (folder / "plan.json").write_text(json.dumps({"requests": 204}))
    pipe = Console(file=io.StringIO(), width=100)
    watch(folder, pipe)  # returns: nothing would be seen of a change
    assert "answers stored: 1 of about 204; 1 ok" in pipe.file.getvalue()
    write(folder / "metrics.jsonl", [step(1)])
    assert "of about" not in shown(folder)
    for damaged in ("{", '{"requests": "many"}', "[1]", '{"requests": true}'):
        (folder / "plan.json").write_text(damaged)
        assert Watcher(folder).look().asked is None
