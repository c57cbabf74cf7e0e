"""Trackers get what the run folder has: each step once, whatever stops, and never at the cost of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

import limbeck
from limbeck.commands import track
from limbeck.commands.track import TRACKERS, TrackingReporter
from limbeck.config.recipe import parse
from limbeck.progress import Silent
from limbeck.types import UserError

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of foreign packages


class Notes(Silent):
    def __init__(self):
        self.notes, self.stages = [], []

    def note(self, text):
        self.notes.append(text)

    def stage(self, title):
        self.stages.append(title)


class Recorder:
    """A tracker that records what it gets, and raises at step `fail_at`."""

    entries: ClassVar[dict] = {}
    opened: ClassVar[list] = []
    closed: ClassVar[list] = []
    fail_at = None

    def __init__(self, info):
        self.info, self.id = info, info.previous_id or f"id-{info.training}"
        Recorder.opened.append((info.training, info.previous_id))

    def log(self, values, step):
        if step == Recorder.fail_at:
            raise ConnectionError("service down at https://me:canary@host/x\nwith a long trace")
        Recorder.entries.setdefault(self.info.training, []).append((step, values))

    def results(self, values, step):
        self.log(values, step)

    def flush(self):
        pass

    def close(self):
        Recorder.closed.append(self.info.training)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(TRACKERS, "recorder", Recorder)
    monkeypatch.setattr(track, "installed", lambda name: True)
    monkeypatch.setattr(track, "SECONDS_BETWEEN", 0.0)
    Recorder.entries, Recorder.opened, Recorder.closed, Recorder.fail_at = {}, [], [], None
    return Recorder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: tiny\nteacher: /secret/place\ntrain: {steps: 4, lr: 0.001, seed: 3}\n")
    return tmp_path


def step(number):
    return {
        "step": number,
        "loss": float(number),
        "terms": {"jsd": 0.5},
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens": 10,
        "seconds": 2.0,
    }


def send(folder, tracker, reporter=None):
    """Send everything new in the folder, as a command does that starts one stage and ends."""
    tracked = TrackingReporter(reporter or Notes(), folder, tracker)
    tracked.stage("Training: student")
    tracked.close()


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def scalars(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    series = {}
    for file in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                series.setdefault(value.tag, []).append(
                    (event.step, value.tensor.float_val[0] if value.tensor.float_val else value.simple_value)
                )
    return series


def test_a_run_is_told_as_it_goes(recorder, recipe_data, tmp_path):
    out, reporter = tmp_path / "out", Notes()
    tracked = TrackingReporter(reporter, out, "recorder")
    limbeck.run(parse(recipe_data), out, tracked)
    tracked.close()
    for name, place in (("student", out), ("sft_control", out / "controls" / "sft_control")):
        records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        entries = [entry for entry in recorder.entries[name] if "loss" in entry[1]]
        assert [at for at, _ in entries] == [record["step"] for record in records] == list(range(1, 7))
        for (_, values), record in zip(entries, records, strict=True):
            assert (
                values["loss"] == record["loss"]
                and values["lr"] == record["lr"]
                and values["grad_norm"] == record["grad_norm"]
            )
            assert {f"terms/{key}": value for key, value in record["terms"].items()}.items() <= values.items()
            assert values["tokens_per_second"] == record["tokens"] / record["seconds"]
    summary = json.loads((out / "evaluation" / "summary.json").read_text())["systems"]
    for name, metrics in summary.items():
        last = recorder.entries[name][-1]
        assert last == (
            6 if name in ("student", "sft_control") else 0,
            {f"evaluation/{m}": i["value"] for m, i in metrics.items()},
        )
    assert (
        set(recorder.closed) == set(summary)
        and not reporter.notes[-1].startswith("recorder")
        and "Report" in reporter.stages
    )


@pytest.mark.long
def test_killed_and_run_again_no_step_stands_twice(recorder, folder):
    write(folder, *map(step, (1, 2, 3, 4, 5)))
    TrackingReporter(Notes(), folder, "recorder").stage("killed after this: nothing is closed")
    cut = folder / "cut"
    cut.write_text("".join(json.dumps(step(n)) + "\n" for n in (1, 2, 3)))  # back to the checkpoint of step 3
    cut.replace(folder / "metrics.jsonl")
    again = TrackingReporter(Notes(), folder, "recorder")
    again.stage("Training: student")
    for number in (4, 5, 6):
        write(folder, step(number))
        again.progress(number, 6)
    again.close()
    assert [at for at, _ in recorder.entries["student"]] == [1, 2, 3, 4, 5, 6]
    assert recorder.opened == [("student", None), ("student", "id-student")]
    send(folder, "recorder")
    assert len(recorder.entries["student"]) == 6 and len(recorder.opened) == 2, "nothing new, so nothing was opened"


def test_a_folder_that_is_refused_is_not_told_of(recorder, folder, recipe_data):
    write(folder, step(1))
    tracked = TrackingReporter(Notes(), folder, "recorder")
    with pytest.raises(UserError, match="another recipe"):
        limbeck.run(parse(recipe_data), folder, tracked)
    tracked.close()
    assert not recorder.entries and not (folder / "tracking.json").exists()


def test_a_tracker_that_fails_is_told_of_once_and_left_alone(recorder, recipe_data, tmp_path):
    recorder.fail_at, reporter, out = 3, Notes(), tmp_path / "out"
    tracked = TrackingReporter(reporter, out, "recorder")
    limbeck.run(parse(recipe_data), out, tracked, stages=("elicit", "train"))
    tracked.close()
    notes = [note for note in reporter.notes if "service down" in note]
    assert len(notes) == 1 and "the run goes on" in notes[0]
    assert "canary" not in notes[0] and "https://host/x" in notes[0] and "trace" not in notes[0]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6 and (out / "student").is_dir()


@pytest.mark.long
def test_what_is_sent_beside_the_numbers_is_numbers_only(recorder, folder, monkeypatch):
    infos = []
    monkeypatch.setitem(TRACKERS, "recorder", lambda info: infos.append(info) or Recorder(info))
    write(folder, step(1))
    send(folder, "recorder")
    assert infos[0].settings == {"steps": 4, "lr": 0.001, "seed": 3} and infos[0].project == "tiny"


def test_unknown_and_missing_trackers_are_refused_before_anything(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        TrackingReporter(Notes(), tmp_path, "tensorbord")
    monkeypatch.setattr(track, "installed", lambda name: False)
    with pytest.raises(UserError, match=r"pip install limbeck\[track\]"):
        TrackingReporter(Notes(), tmp_path, "trackio")
    with pytest.raises(UserError, match="pip install wandb"):
        TrackingReporter(Notes(), tmp_path, "wandb")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_tensorboard_reads_back_what_was_trained(recipe_data, tmp_path):
    recipe_data["train"]["save_seconds"] = 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_data))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "limbeck",
        "run",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(out),
        "--track",
        "tensorboard",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        command,
        env={**environment, "LIMBECK_CRASH_AT": "train.after_step:4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 137, killed.stderr
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, place in (("student", out), ("sft_control", out / "controls" / "sft_control")):
        records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        series = scalars(out / "tensorboard" / name)
        assert [at for at, _ in series["loss"]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in series["loss"]] == pytest.approx([record["loss"] for record in records], rel=1e-6)
        assert {"lr", "grad_norm", "tokens_per_second"} <= set(series) and any(
            tag.startswith("terms/") for tag in series
        )
        assert len(series["evaluation/forward_kl"]) == 1
    assert "evaluation/forward_kl" in scalars(out / "tensorboard" / "teacher")


def test_trackio_keeps_the_numbers_on_this_machine(folder, tmp_path):
    """In a process of its own: trackio reads its folder when it is imported."""
    write(folder, step(1), step(2))
    code = (
        "import sys\nfrom pathlib import Path\nfrom limbeck.progress import Silent\nfrom limbeck.commands.track import TrackingReporter\n"
        "tracked = TrackingReporter(Silent(), Path(sys.argv[1]), 'trackio')\ntracked.stage('Training')\ntracked.close()\nsys.exit(tracked.failed)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    for records in ((), (step(3),)):
        write(folder, *records)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    read = (
        "import sys\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
        "runs = S.get_runs('tiny')\nprint([[(r['step'], r['loss']) for r in S.get_logs('tiny', run)] for run in runs])\n"
    )
    done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[[(1, 1.0), (2, 2.0), (3, 3.0)]]"


def test_wandb_is_asked_so(folder, monkeypatch):
    """Against a stub: what the real service does with it is not tested here."""
    calls, key_known = [], True

    class Run:
        summary = types.SimpleNamespace(update=lambda values: calls.append(("summary", values)))

        def log(self, values, step):
            calls.append(("log", step, values["loss"]))

        def finish(self):
            calls.append(("finish",))

    stub = types.ModuleType("wandb")
    stub.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=None))
    stub.login = lambda prompt: key_known and not prompt
    stub.init = lambda **kwargs: calls.append(("init", kwargs)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(track, "installed", lambda name: True)
    write(folder, step(1), step(2))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "summary.json").write_text('{"systems": {"student": {"jsd": {"value": 0.5}}}}')
    send(folder, "wandb")
    kind, settings = calls[0]
    assert (
        kind == "init"
        and settings["project"] == "tiny"
        and settings["name"] == "student"
        and settings["resume"] == "allow"
    )
    assert settings["dir"] == str(folder) and settings["config"] == {"steps": 4, "lr": 0.001, "seed": 3}
    assert calls[1:] == [("log", 1, 1.0), ("log", 2, 2.0), ("summary", {"evaluation/jsd": 0.5}), ("finish",)]
    write(folder, step(3))
    send(folder, "wandb")
    again = [call for call in calls if call[0] == "init"][1][1]
    key_known, reporter = False, Notes()
    write(folder, step(4))
    send(folder, "wandb", reporter)
    assert "has no key" in reporter.notes[0], "it must not ask on the terminal while a training waits"
    assert again["id"] == settings["id"] and calls[-2:] == [("log", 3, 3.0), ("finish",)]


def test_mlflow_is_asked_so(folder, monkeypatch):
    """Against a stub of its client."""
    calls = []

    class Client:
        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id="7") if any(call[0] == "experiment" for call in calls) else None

        def create_experiment(self, name):
            calls.append(("experiment", name))
            return "7"

        def create_run(self, experiment, run_name):
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def log_param(self, run, name, value):
            calls.append(("param", run, name, value))

        def log_metric(self, run, name, value, step):
            calls.append(("metric", run, name, value, step))

        def set_terminated(self, run):
            calls.append(("end", run))

    stub = types.ModuleType("mlflow")
    stub.MlflowClient = Client
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    monkeypatch.setattr(track, "installed", lambda name: True)
    write(folder, step(1))
    send(folder, "mlflow")
    assert calls[:2] == [("experiment", "tiny"), ("run", "7", "student")] and ("param", "r1", "lr", 0.001) in calls
    assert (
        ("metric", "r1", "loss", 1.0, 1) in calls
        and ("metric", "r1", "terms/jsd", 0.5, 1) in calls
        and calls[-1] == ("end", "r1")
    )
    write(folder, step(2))
    before = len(calls)
    send(folder, "mlflow")
    assert all(call[0] in ("metric", "end") for call in calls[before:]), "the known run goes on"


def test_no_key_is_read_or_written(recorder, folder, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "canary-key")
    write(folder, step(1))
    send(folder, "recorder")
    assert (
        "canary"
        not in "".join(file.read_text() for file in folder.rglob("*") if file.is_file()) + capsys.readouterr().out
    )
