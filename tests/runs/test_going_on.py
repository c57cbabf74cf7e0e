"""A run folder goes on when what is measured changes, is refused when what is trained does, and nothing is paid twice."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.config.recipe import load_recipe, parse
from limbeck.models.teacher import InProcessTeacher
from limbeck.progress import Silent, StoppedError
from limbeck.runs import pipeline
from limbeck.runs.claim import claim, training_key
from limbeck.runs.fit import fitted
from limbeck.runs.pipeline import run
from limbeck.runs.resolve import resolve
from limbeck.storage.answers import FILE
from limbeck.types import UserError, content_hash
from tests.conftest import PROMPTS
from tests.scripted_server import Scripted


class Noting(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Runs share answers here."""
    folder = tmp_path / "shared"
    monkeypatch.setenv("LIMBECK_STORE", str(folder))
    return folder


@pytest.fixture
def served(recipe_data, tiny_folder):
    def made(url, server=(), **changes):
        price = {"input": 1000.0, "output": 1000.0}
        teacher = {"server": {"url": url, "name": "toy", "price": price, **dict(server)}}
        student = {"start": {"pretrained": str(tiny_folder)}}
        evaluate = {**recipe_data["evaluate"], "metrics": ["fidelity"], "controls": ["untouched"]}
        common = {"teacher": teacher, "student": student, "loss": ["cross_entropy"], "evaluate": evaluate}
        return parse({**recipe_data, **common, **changes})

    return made


def summary_of(folder):
    return json.loads((folder / "evaluation" / "summary.json").read_text())


# Answers


def test_another_recipe_pays_for_new_questions_alone(served, answers, tmp_path):
    with Scripted() as server:
        with pytest.raises(UserError, match="ceiling of 20 requests"):
            run(served(server.url, server={"limits": {"requests": 20}}), tmp_path / "first", stages=("elicit",))
        run(served(server.url, server={"limits": {"requests": 22}}), tmp_path / "first")  # and goes on
        assert len(server.seen) == 22, "two of them for the evaluation"
        reporter = Noting()
        other = served(server.url, name="other", train={"steps": 3, "seed": 3})
        folder = run(other, tmp_path / "second", reporter, stages=("elicit",))
        assert len(server.seen) == 22, "the other training asks nothing"
        assert (
            "18 of 18 answers are taken from earlier runs (paid then: 90 tokens read, 54 written, 0.144 by today's price)"
            in (reporter.notes)
        )
        bill = summary_of(run(other, folder))["bill"]
        assert len(server.seen) == 22
    spent = {"tokens_read": 110, "tokens_written": 66, "money": pytest.approx(0.176)}
    nothing = {"answers": 0, "tokens_read": 0, "tokens_written": 0, "money": 0}
    assert bill == {**nothing, "reused": {"answers": 22, **spent}}
    assert "reused: answers" in (folder / "report.html").read_text()


def test_a_refused_folder_says_that_its_answers_are_kept(served, answers, tmp_path):
    with Scripted() as server:
        recipe = served(server.url)
        run(recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"answers": "none"})}),
            tmp_path / "first", stages=("elicit",))  # fmt: skip
        assert not answers.exists()
        fewer = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"limit": 9})})
        with pytest.raises(UserError, match=r"differs in prompts\).*its 22 answers are kept in .*shared for all runs"):
            run(fewer, tmp_path / "first", stages=("elicit",))
        run(fewer, tmp_path / "second", stages=("elicit",))
        assert len(server.seen) == 22
        elsewhere = served(server.url, server={"name": "other"})
        with pytest.raises(UserError) as refusal:
            run(elsewhere, tmp_path / "first", stages=("elicit",))
        assert "are kept" not in str(refusal.value)


def test_what_can_not_be_read_stops_a_paid_run_and_not_a_local_one(served, recipe_data, answers, tmp_path):
    answers.mkdir()
    (answers / FILE).write_bytes(b"something else entirely" * 300)
    with Scripted() as server, pytest.raises(UserError, match=r"answers\.sqlite.*machine\.answers"):
        run(served(server.url), tmp_path / "paid", stages=("elicit",))
    assert server.seen == []
    reporter = Noting()
    run(parse(recipe_data), tmp_path / "local", reporter, stages=("elicit",))
    assert sum("this run writes all of its text itself" in note for note in reporter.notes) == 1


def test_a_local_teachers_text_is_shared_and_the_students_is_not(
    recipe_data, answers, tmp_path, tiny_folder, monkeypatch
):
    recipe_data["writer"] = [{"by": "teacher", "max_tokens": 4}, {"by": "untouched", "max_tokens": 4}]
    recipe_data["evaluate"]["controls"] = ["untouched"]
    run(parse(recipe_data), tmp_path / "first", stages=("elicit",))
    asked = []
    whole = InProcessTeacher.answers
    monkeypatch.setattr(
        InProcessTeacher,
        "answers",
        lambda self, requests, stop: asked.append(len(requests)) or whole(self, requests, stop),
    )
    recipe_data["train"]["lr"] = 0.5
    run(parse(recipe_data), tmp_path / "second", stages=("elicit",))
    assert asked == [18], "the untouched student writes its own"


@pytest.mark.promise("R12")
def test_what_the_teacher_is_shown_beside_the_prompt_is_part_of_the_question(
    recipe_data, answers, tmp_path, prompt_file
):
    lines = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    recipe_data["teacher"] = {"model": recipe_data["teacher"], "context": {"user": "{prompt} Hint: {answer}"}}

    def asked(hint, name):
        prompt_file.write_text("".join(json.dumps(line | {"answer": hint}) + "\n" for line in lines))
        reporter = Noting()
        run(parse(recipe_data), tmp_path / name, reporter, stages=("elicit",))
        return [note for note in reporter.notes if "earlier runs" in note]

    assert asked("a cat", "first") == []
    assert asked("a cat", "second") == [
        "18 of 18 answers are taken from earlier runs (written then)",
        "2 of 2 answers are taken from earlier runs (written then)",
    ]
    assert asked("a dog", "third") == ["2 of 2 answers are taken from earlier runs (written then)"], (
        "held-out ones alone"
    )


@pytest.mark.long
def test_the_command(served, answers, tmp_path):
    def command(*arguments):
        return CliRunner().invoke(app, ["answers", *arguments, "--json"])

    assert "not there yet" in command().stdout
    with Scripted() as server:
        recipe = served(server.url)
        run(recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"answers": "none"})}),
            tmp_path / "old", stages=("elicit",))  # fmt: skip
    assert json.loads(command("--add", str(tmp_path / "old")).stdout)["added"] == 20
    (teacher,) = json.loads(command().stdout)["teachers"]
    assert (teacher["answers"], teacher["tokens_read"], teacher["origin"]) == (20, 100, server.url)
    assert "toy (served:toy-" in CliRunner().invoke(app, ["answers"]).stdout
    assert json.loads(command("--prune", "1").stdout).get("removed") == 0
    wrong = command("--forget", "toi")
    assert isinstance(wrong.exception, UserError) and "did you mean 'toy'" in str(wrong.exception)
    assert json.loads(command("--forget", "toy").stdout) | {"bytes": 0, "file": ""} == {
        "removed": 20, "bytes": 0, "file": "", "teachers": []
    }  # fmt: skip
    wrong = command("--add", str(tmp_path))
    assert isinstance(wrong.exception, UserError) and "name a run folder" in str(wrong.exception)


# The folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A recipe's data and its finished folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "held_out.jsonl").write_text('{"id": "h1", "prompt": "count one"}\n{"id": "h2", "prompt": "a dog ran"}\n')
    data = {
        "name": "tiny",
        "teacher": str(tiny_folder),
        "student": {"start": {"prune": {"layers": 3, "keep": "first"}}},
        "prompts": {"from": str(folder / "prompts.jsonl")},
        "writer": [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}],
        "loss": ["forward_kl"],
        "train": {"steps": 4, "tokens_per_step": 32, "lr": 1e-3, "seed": 3},
        "evaluate": {"metrics": ["fidelity"], "prompts": str(folder / "held_out.jsonl"), "max_tokens": 8, "limit": 3},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_STORE", "none")
        return data, limbeck.run(parse(data), folder / "out").folder


@pytest.fixture
def trained(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "trained")


@pytest.fixture
def data(finished):
    return copy.deepcopy(finished[0])


def test_what_is_measured_may_change_under_a_run(trained, data, monkeypatch):
    """A task and a control come, a control goes, and the answers are longer: only what that touches is done again."""
    student = (trained / "student" / "model.safetensors").stat().st_mtime_ns
    before = summary_of(trained)
    kept = {
        name: (trained / "evaluation" / name).read_bytes() for name in ("fidelity-student.jsonl", "own-student.jsonl")
    }
    monkeypatch.setattr("limbeck.evaluate.measure.fidelity", lambda *_: pytest.fail("measured again"))
    data["evaluate"] |= {"metrics": ["fidelity", "sums"], "controls": ["sft_control"]}
    data["title"] = "Another title"
    limbeck.run(parse(data), trained)
    after = summary_of(trained)
    assert list(after["systems"]) == ["teacher", "sft_control", "student"] and after["recipe"] == parse(data).hash
    assert list(after["tasks"]) == ["sums"] and not before["tasks"]
    same = [name for name in before["systems"]["student"] if "/" not in name]
    assert same and all(after["systems"]["student"][name] == before["systems"]["student"][name] for name in same)
    page = (trained / "report.html").read_text()
    assert "Another title" in page and "Before training" not in page
    assert (trained / "evaluation" / "answers-untouched.jsonl").exists(), "what was measured stays on disk"
    assert all((trained / "evaluation" / name).read_bytes() == content for name, content in kept.items())
    monkeypatch.undo()
    data["evaluate"] |= {"controls": ["untouched", "shuffled_control"], "max_tokens": 5}
    reporter = Noting()
    limbeck.run(parse(data), trained, reporter)
    assert any(
        note.startswith("measured anew, since the questions changed: own text, answers, task-sums")
        for note in reporter.notes
    )
    last = summary_of(trained)
    assert list(last["systems"]) == ["teacher", "untouched", "shuffled_control", "student"]
    records = [json.loads(line) for line in (trained / "evaluation" / "answers-student.jsonl").read_text().splitlines()]
    assert max(record["tokens"] for record in records) <= 5
    page = (trained / "report.html").read_text()
    assert "Shuffled" in page and "Fine-tuning: the loss" not in page
    assert (trained / "student" / "model.safetensors").stat().st_mtime_ns == student


def test_going_back_to_the_earlier_questions_gives_the_earlier_figures(trained, data):
    before = summary_of(trained)
    changed = data | {"evaluate": data["evaluate"] | {"max_tokens": 5, "limit": 1}}
    limbeck.run(parse(changed), trained)
    assert summary_of(trained)["systems"] != before["systems"]
    limbeck.run(parse(data), trained)
    again = summary_of(trained)
    timed = ("efficiency", "speeds")
    assert {name: value for name, value in again.items() if name not in timed} == {
        name: value for name, value in before.items() if name not in timed
    }


def test_held_out_prompts_may_change_and_training_prompts_may_not(trained, data):
    """Their files are edited under the run, whose recipe stays."""
    files = [Path(data["evaluate"]["prompts"]), Path(data["prompts"]["from"])]
    held_out, training = [file.read_text() for file in files]
    try:
        files[0].write_text(held_out + '{"id": "h3", "prompt": "a dog sat"}\n')
        limbeck.run(parse(data), trained)
        assert summary_of(trained)["held_out"]["answers"] == 3
        files[1].write_text('{"prompt": "new"}\n' + training)
        with pytest.raises(UserError, match="prompts changed"):
            limbeck.run(parse(data), trained)
    finally:
        files[0].write_text(held_out)
        files[1].write_text(training)


@pytest.mark.long
def test_a_folder_of_an_older_version_goes_on(recipe_data, tmp_path, monkeypatch):
    """Killed in its training, with checkpoints named by the hash of all of its recipe; then its evaluation changes."""
    recipe_data["train"]["save_seconds"] = 0
    recipe_data["evaluate"]["metrics"] = ["fidelity"]
    recipe = parse(recipe_data)
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "training_key", lambda folder, recipe: recipe.hash)
    done = []
    with pytest.raises(StoppedError):
        limbeck.run(recipe, out, stop=lambda: (out / "metrics.jsonl").exists() and len(done.append(1) or done) > 3)
    monkeypatch.undo()
    inputs = json.loads((out / "inputs.json").read_text())
    inputs = {"teacher": inputs["teacher"], "prompts": fitted(resolve(recipe)).prompts_key}
    (out / "inputs.json").write_text(json.dumps(inputs))
    assert list((out / "checkpoints").glob("step-*"))
    recipe_data["evaluate"] |= {"limit": 1, "controls": ["untouched"]}
    limbeck.run(parse(recipe_data), out)
    assert summary_of(out)["held_out"]["answers"] == 1
    assert training_key(out, parse(recipe_data)) == recipe.hash != parse(recipe_data).training_hash


def test_records_of_a_version_that_did_not_say_whose_they_are(trained, data):
    """With the same questions they are kept, with others all are measured anew."""
    file = trained / "evaluation" / "protocol.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"hash": whole["hash"]}))
    (trained / "evaluation" / "manifest.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (trained / "evaluation").glob("*-student.jsonl")}
    (trained / "evaluation" / "summary.json").unlink()
    limbeck.run(parse(data), trained)
    assert json.loads(file.read_text()) == whole and all(path.stat().st_mtime_ns == at for path, at in times.items())
    file.write_text(json.dumps({"hash": "another"}))
    for name in ("manifest.json", "summary.json"):
        (trained / "evaluation" / name).unlink()
    limbeck.run(parse(data), trained)
    assert all(path.stat().st_mtime_ns > at for path, at in times.items())


def test_limits_of_the_server_may_change_and_the_server_may_not(served):
    plain = served("http://x/v1")
    limits = {
        "key": "LIMBECK_OTHER_KEY", "concurrency": 9, "requests_per_minute": 5, "tokens_per_minute": 7, "timeout": 3.0,
        "retries": 1, "batch": True, "answers_as": "x", "tolerate": 0.1, "price": {"input": 1}, "limits": {"money": 3},
    }  # fmt: skip
    for name, value in limits.items():
        assert served("http://x/v1", server={name: value}).training_hash == plain.training_hash, name
    for name, value in {"url": "http://y/v1", "name": "z", "kind": "vllm", "options": {"a": 1}, "logprobs": 3}.items():
        assert served("http://x/v1", server={name: value}).training_hash != plain.training_hash, name


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"title": "x"}, False), ({"paper": "x"}, False), ({"evaluate": ["fidelity"]}, False),
        ({"train": {"steps": 6, "tokens_per_step": 32, "lr": 1e-3, "seed": 3, "save_seconds": 1}}, False),
        ({"name": "x"}, True), ({"loss": ["reverse_kl"]}, True), ({"train": {"steps": 7, "seed": 3}}, True),
        ({"machine": {"answers": "none"}}, False),
    ],
)  # fmt: skip
def test_what_binds_a_folder(recipe_data, change, bound):
    assert (parse(recipe_data | change).training_hash != parse(recipe_data).training_hash) == bound


def test_a_start_that_was_killed_or_refused_binds_nothing(served, tmp_path):
    """A store alone, and a recipe whose server was not there, leave a folder that can be used."""
    out = tmp_path / "out"
    with Scripted() as server:
        run(served(server.url), out, stages=("elicit",))
        for name in ("recipe.yaml", "inputs.json"):
            (out / name).unlink()
        run(served(server.url), out, stages=("elicit",))
        assert len(server.seen) == 22
        other = tmp_path / "other"
        with pytest.raises(UserError, match="no answer from"):
            run(served("http://127.0.0.1:9/v1"), other, stages=("elicit",))
        run(served(server.url), other, stages=("elicit",))


def test_a_recipe_that_is_refused_leaves_the_summary(trained, data):
    before = (trained / "evaluation" / "summary.json").read_bytes()
    refused = data | {"evaluate": data["evaluate"] | {"limit": 1}, "loss": ["reverse_kl"]}
    with pytest.raises(UserError, match=r"differs in loss\)"):
        limbeck.run(parse(refused), trained)
    assert (trained / "evaluation" / "summary.json").read_bytes() == before


def test_a_report_in_between_shows_nothing_stale(trained, data):
    data["evaluate"]["limit"] = 1
    limbeck.run(parse(data), trained, stages=("train",))
    result = CliRunner().invoke(app, ["report", str(trained)])
    assert isinstance(result.exception, UserError) and "run `limbeck evaluate` first" in str(result.exception)


def test_a_title_alone_measures_and_loads_nothing(trained, data, monkeypatch):
    data["title"] = "A better title"
    monkeypatch.setattr("limbeck.runs.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    limbeck.run(parse(data), trained)
    assert summary_of(trained)["recipe"] == parse(data).hash
    assert "A better title" in (trained / "report.html").read_text()
    assert load_recipe(trained / "recipe.yaml").title == "A better title"


def test_elicited_samples_stay_when_held_out_prompts_change(recipe_data, tmp_path):
    recipe_data |= {"elicit": [{"answer": {"max_tokens": 8, "all": True}}], "writer": [{"by": "elicited"}]}
    out = limbeck.run(parse(recipe_data), tmp_path / "out", stages=("elicit",)).folder
    before = (out / "elicited.jsonl").stat().st_mtime_ns
    recipe_data["evaluate"]["limit"] = 1
    limbeck.run(parse(recipe_data), out, stages=("elicit",))
    assert (out / "elicited.jsonl").stat().st_mtime_ns == before


@pytest.mark.long
def test_the_folders_key_outlives_hashes(recipe_data, tmp_path):
    recipe = parse(recipe_data)
    (tmp_path / "out").mkdir()
    claim(tmp_path / "out", recipe, lambda: {"prompts": "x"}, lambda: None)
    assert training_key(tmp_path / "out", recipe) == recipe.training_hash
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    (tmp_path / "old" / "inputs.json").write_text('{"prompts": "x"}')
    claim(tmp_path / "old", recipe, lambda: {"prompts": "x"}, lambda: None)
    assert training_key(tmp_path / "old", recipe) == recipe.hash == content_hash(recipe.resolved())


def test_a_student_that_changed_is_not_taken_for_the_one_that_was_measured(trained, data):
    """Its records are there, so that it would not be loaded."""
    (trained / "evaluation" / "summary.json").unlink()
    file = trained / "student" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        limbeck.run(parse(data), trained)
