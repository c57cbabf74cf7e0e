"""`limbeck why` names the field that differs from what is stored."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from limbeck.config.recipe import parse
from limbeck.models.teacher import InProcessTeacher
from limbeck.runs import rounds
from limbeck.runs.pipeline import run
from limbeck.runs.why import differences
from limbeck.storage.store import Store
from limbeck.types import Generated
from tests.command_line import called
from tests.conftest import make_recipe_data, write_prompts


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """(a run folder that has its text, its recipe's file)"""
    folder = tmp_path_factory.mktemp("why")
    data = make_recipe_data(tiny_folder, write_prompts(folder), folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_STORE", "none")
        run(parse(data), folder / "run", stages=("elicit",))
    return folder / "run", folder / "recipe.yaml"


SQLITES = ("store.sqlite-shm", "store.sqlite-wal")  # also of one that is only read


def why(*arguments, status=0):
    ended, printed = called("why", *arguments)
    assert ended == status, printed
    return printed


@pytest.fixture(autouse=True)
def no_model_answers(monkeypatch, request):
    if "made" in request.fixturenames:
        request.getfixturevalue("made")
    monkeypatch.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("nothing is asked"))


def test_nothing_differs_from_the_run_itself(made):
    folder, recipe = made
    for arguments in ((folder,), (folder, "--recipe", recipe)):
        found = json.loads(why(*arguments, "--json"))
        assert found["recipe"] == found["inputs"] == []
        assert found["requests"] == {"answered": 18, "would_be_asked": 0, "because_of": {}}
    assert "recipe and inputs are those of the folder" in why(folder)


@pytest.mark.parametrize(
    ("change", "field", "effect", "reason"),
    [
        (
            "writer=[{by: teacher, temperature: 0.5, top_p: 1.0, max_tokens: 12}]",
            "writer[0].temperature",
            "the folder is refused",
            "sampling.temperature",
        ),
        ("train.lr=0.5", "train.lr", "the folder is refused", None),
        ("evaluate.max_tokens=9", "evaluate.max_tokens", "measured anew", None),
        ("title=Other", "title", "nothing", None),
        ("train.seed=4", "train.seed", "the folder is refused", "seed"),
    ],
)
@pytest.mark.promise("R12")
def test_a_changed_field_is_named_with_what_becomes_of_it(made, change, field, effect, reason):
    found = json.loads(why(made[0], "--set", change, "--json"))
    assert [(entry["field"], entry["effect"]) for entry in found["recipe"]] == [(field, effect)]
    because = found["requests"]["because_of"]
    assert list(because) == ([] if reason is None else [reason]) and found["requests"]["answered"] == 18 * (not reason)
    if reason is not None:
        assert because[reason]["requests"] == 18
    assert f"{field}: " in why(made[0], "--set", change)


def test_another_model_of_the_same_place_is_named(made, tiny_folder, tmp_path):
    import shutil

    other = shutil.copytree(tiny_folder, tmp_path / tiny_folder.name)
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "max_length": 77}))
    found = json.loads(why(made[0], "--set", f"teacher={other}", "--json"))
    assert [entry["field"] for entry in found["inputs"]] == ["teacher"] and found["inputs"][0]["refused"]
    assert list(found["requests"]["because_of"]) == ["model"]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory, tiny_folder):
    """(a run folder whose text two steps made, its recipe's file)"""
    folder = tmp_path_factory.mktemp("steps")
    data = make_recipe_data(tiny_folder, write_prompts(folder), folder)
    data["elicit"] = [{"answer": {"max_tokens": 6}}, {"rationale": {"n": 2, "calls": 1, "max_tokens": 6}}]
    data["writer"] = [{"by": "teacher", "temperature": 1.0, "top_p": 1.0, "max_tokens": 5}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))

    def answers(self, requests, stop=None):
        for request in requests:
            text = f"{request.messages[-1]['content']} The answer is {request.seed % 97}."
            yield request, Generated((5, 0), text, "ok")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_STORE", "none")
        patch.setattr(InProcessTeacher, "answers", answers)
        run(parse(data), folder / "run", stages=("elicit",))
    return folder / "run", folder / "recipe.yaml"


def test_steps_are_looked_at_up_to_the_first_that_lacks_an_answer(stepped):
    folder, _ = stepped
    finished = json.loads(why(folder, "--json"))["requests"]
    assert finished["would_be_asked"] == 0 and "step" not in finished
    account = (folder / "elicitation.json").rename(folder / "set-aside.json")
    try:
        all_there = json.loads(why(folder, "--json"))["requests"]
        assert all_there["step"] is None and all_there["would_be_asked"] == 0
        second = json.loads(why(folder, "--set", "elicit.1.params.temperature=0.5", "--json"))["requests"]
        first = json.loads(why(folder, "--set", "elicit.0.params.temperature=0.5", "--json"))["requests"]
    finally:
        account.rename(folder / "elicitation.json")
    assert second["step"] == "rationale" and list(second["because_of"]) == ["sampling.temperature"]
    assert second["would_be_asked"] == 2 * second["answered"] > 0
    assert first["step"] == "answer" and first["answered"] == 0 and first["would_be_asked"] == second["answered"]
    assert "by step answer; what the steps after it ask follows" in why(
        folder, "--set", "elicit.0.params.temperature=0.5"
    )


def test_writers_over_what_the_steps_leave_are_asked_too(stepped):
    found = json.loads(why(stepped[0], "--set", "writer.0.temperature=0.5", "--json"))["requests"]
    assert list(found["because_of"]) == ["sampling.temperature"] and "step" not in found
    writers = found["would_be_asked"]
    assert writers > 0 and found["answered"] > 0
    whole = json.loads(why(stepped[0], "--json"))["requests"]
    assert whole["answered"] == found["answered"] + writers


def test_steps_that_ask_a_student_who_is_not_there_yet_write_nothing(stepped, tmp_path):
    folder = shutil.copytree(stepped[0], tmp_path / "run")
    (folder / "start.json").unlink(missing_ok=True)

    def contents():
        return {file: file.read_bytes() for file in folder.iterdir() if file.name not in SQLITES}

    files = contents()
    said = why(folder, "--set", "elicit.0.params.by=untouched", "--set", "student.start.prune.keep=uniform")
    assert "not looked at further: a step asks the student before training" in said
    assert contents() == files


def test_steps_of_a_folder_without_answers(stepped, tmp_path):
    (tmp_path / "recipe.yaml").write_text((stepped[0] / "recipe.yaml").read_text())
    assert "none are stored; the first step, answer, would ask" in why(tmp_path)
    assert not (tmp_path / "store.sqlite").exists()


def test_rounds_are_told_one_by_one(tiny_folder, tmp_path, monkeypatch):
    data = make_recipe_data(tiny_folder, write_prompts(tmp_path), tmp_path)
    data["rounds"] = {"n": 2}
    monkeypatch.undo()  # the rounds are asked; `why` is not
    rounds.run(parse(data), tmp_path / "run", stages=("elicit",))
    monkeypatch.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("nothing is asked"))
    found = json.loads(why(tmp_path / "run", "--set", "train.lr=0.5", "--json"))
    assert [field["effect"] for field in found["recipe"]] == ["the folder is refused"]
    assert [part["run"] for part in found["parts"]] == [str(tmp_path / "run" / "rounds" / "1")]
    assert found["parts"][0]["requests"] == {"answered": 18, "would_be_asked": 0, "because_of": {}}
    (tmp_path / "run" / "rounds" / "2").mkdir()
    said = why(tmp_path / "run")
    assert f"{tmp_path / 'run' / 'rounds' / '1'}:" in said and "not looked at further" in said
    one = json.loads(why(tmp_path / "run" / "rounds" / "1", "--json"))
    assert one["requests"] == found["parts"][0]["requests"]


def test_a_key_is_told_with_the_most_similar_request(made):
    folder, _ = made
    questions = Store.questions(folder / "store.sqlite")
    key = next(iter(questions))
    found = json.loads(why(key[:12], "--run", folder, "--json"))
    assert found["key"] == key and found["asked"] == questions[key][0] and found["finish"] in ("ok", "length")
    fields = {entry["field"] for entry in found["nearest"]["differs"]}
    assert "messages[0].content" in fields and not fields & {"model", "sampling.top_p"}
    assert "the most similar request" in why(key, "--run", folder)
    assert "no request ffffff" in why("ffffff" + "0" * 58, "--run", folder, status=2)
    assert "neither a run folder nor the key" in why("xyz", status=2)


def test_a_step_that_was_not_finite_is_told(made):
    folder, _ = made
    record = {"step": 3, "seed": 7, "guilty": ["abc"], "samples": ["abc", "def"]}
    (folder / "nonfinite.json").write_text(json.dumps(record))
    try:
        assert "step 3 was not finite (seed 7); guilty samples: abc" in why(folder)
        assert list(json.loads(why(folder, "--json"))["not_finite"].values()) == [record]
    finally:
        (folder / "nonfinite.json").unlink()


def test_differences_are_by_field_and_type():
    then, now = {"a": {"b": [1, 2]}, "c": 1, "d": [1]}, {"a": {"b": [1, 3]}, "c": True, "d": [1, 2], "e": None}
    assert list(differences(then, now)) == [("a.b[1]", 2, 3), ("c", 1, True), ("d", [1], [1, 2])]
