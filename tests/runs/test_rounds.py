"""Rounds: each an ordinary run, one store, the next one's previous student; kills, ends and refusals."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
import yaml

import limbeck
from limbeck.commands.export.student import find_student
from limbeck.commands.watch import Watcher
from limbeck.config.recipe import parse
from limbeck.models.load import model_identity
from limbeck.models.teacher import InProcessTeacher
from limbeck.report.data import as_data
from limbeck.runs.at_once import at_once
from limbeck.runs.outcome import publish
from limbeck.runs.resolve import resolve
from limbeck.runs.rounds import CollapsedError, RoundsRun
from limbeck.storage.files import write_json
from limbeck.storage.rounds import at_once_folder, kept_round, round_folder, rounds_record, stage_folder
from limbeck.storage.store import Store
from limbeck.types import NothingLeftError, Request, Sample, Sampling, UserError

TRAIN = ("elicit", "train")


@pytest.fixture
def data(recipe_data, tiny_folder):
    return rounds_recipe(recipe_data, tiny_folder)


def rounds_recipe(recipe_data, tiny_folder):
    """Rounds of a student that is taught by its own answers."""
    return recipe_data | {
        "teacher": "previous",
        "student": {"start": {"pretrained": str(tiny_folder)}},
        "elicit": [{"answer": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "all": True}}],
        "writer": [{"by": "elicited"}],
        "loss": ["cross_entropy"],
        "train": {"steps": 2, "tokens_per_step": 32, "lr": 1e-2, "seed": 3, "save_seconds": 0},
        "rounds": {"n": 2},
        "evaluate": recipe_data["evaluate"] | {"metrics": ["fidelity"], "controls": ["untouched"], "max_tokens": 6},
    }


@pytest.fixture
def asked(monkeypatch):
    """The keys of all requests that a model in process was sent."""
    keys = []
    answers = InProcessTeacher.answers

    def counted(teacher, requests, *rest):
        keys.extend(request.key for request in requests)
        return answers(teacher, requests, *rest)

    monkeypatch.setattr(InProcessTeacher, "answers", counted)
    return keys


def answers_in(folder):
    with closing(sqlite3.connect(folder / "store.sqlite")) as db:
        return [key for (key,) in db.execute("select key from answers")]


def losses(folder):
    return [json.loads(line)["loss"].hex() for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_rounds_from_recipe_to_page_and_one_more(data, tmp_path, monkeypatch, asked):
    out = tmp_path / "out"
    result = limbeck.run(parse(data), out)
    homes = [round_folder(out, number) for number in (1, 2)]
    assert [run.folder for run in result.rounds] == homes == [run.folder for run in limbeck.load_run(out).rounds]
    assert len(asked) == len(set(asked)) == len(answers_in(out)) == 2 * (18 + 2), "each round asks its own teacher"
    assert not any((home / "store.sqlite").exists() for home in homes)
    identities = [model_identity(str(folder / "student")) for folder in (*homes, out)]
    assert identities[1] == identities[2] != identities[0]
    summary, last = (json.loads((f / "evaluation" / "summary.json").read_text()) for f in (out, homes[1]))
    assert summary == last | {"recipe": parse(data).hash, "round": 2}
    page = (out / "report.html").read_text()
    assert all(
        f'href="rounds/{n}/report.html"' in page and (h / "report.html").exists() for n, h in enumerate(homes, 1)
    )
    assert "Over 2 rounds" in result.verdict or "2 rounds." in result.verdict
    assert kept_round(out) == homes[1] and find_student(out).folder == out / "student"
    seconds = sum(json.loads(line)["seconds"] for h in homes for line in (h / "metrics.jsonl").read_text().splitlines())
    assert as_data(out)["worth"]["training"]["hours"] == pytest.approx(seconds / 3600)
    assert not list(out.rglob("checkpoints/step-*")), "what a finished round needs no more is removed"
    view = Watcher(out).look()
    assert view.stage == "round 2, done" and view.answers == {"length": 40}

    changing = {"report.html", ".lock", "store.sqlite-shm", "store.sqlite-wal"}
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name not in changing}
    with monkeypatch.context() as patched:
        patched.setattr(InProcessTeacher, "answers", lambda *_: pytest.fail("asked again"))
        patched.setattr("limbeck.training.loop.train", lambda *_: pytest.fail("trained again"))
        limbeck.run(parse(data), out)
    assert {file: file.stat().st_mtime_ns for file in before} == before

    moved = tmp_path / "moved"
    out.rename(moved)
    limbeck.run(parse(data | {"rounds": {"n": 3}}), moved, stages=TRAIN)
    assert len(asked) == 40 + 20 and losses(round_folder(moved, 3)), "the first two rounds are as they were"
    starts = [facts["start"] for facts in rounds_record(moved)["rounds"].values()]
    assert starts == [model_identity(data["student"]["start"]["pretrained"])] * 3, "by fingerprint"


class Killed(BaseException):
    """In place of a kill: nothing of ours catches it."""


KILLS = [
    ("limbeck.elicit.engine", "elicit.after_record", 23),  # in the text of round 2
    ("limbeck.training.loop", "train.after_step", 3),  # in the training of round 2
    ("limbeck.storage.files", "directory.before_rename", 3),  # while round 1's student is saved
]


@pytest.mark.promise("R3")
def test_killed_in_any_round_it_ends_as_its_twin(data, tmp_path, monkeypatch, asked):
    """The real kill: tests/long/test_kills.py."""
    limbeck.run(parse(data), tmp_path / "clean", stages=TRAIN)
    clean = rounds_record(tmp_path / "clean")
    for place, point, count in KILLS:
        folder, seen = tmp_path / point, []

        def kill(name, point=point, count=count, seen=seen):
            seen.append(name)
            if seen.count(point) == count:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(f"{place}.crash_point", kill)
            with pytest.raises(Killed):
                limbeck.run(parse(data), folder, stages=TRAIN)
        there = set(answers_in(folder))
        asked.clear()
        limbeck.run(parse(data), folder, stages=TRAIN)
        assert there.isdisjoint(asked) and len(asked) == len(set(asked)) == 40 - len(there), "nothing is asked twice"
        killed = rounds_record(folder)
        assert killed["rounds"] == clean["rounds"] and killed["kept"] == clean["kept"] == 2
        for number in (1, 2):
            assert losses(round_folder(folder, number)) == losses(round_folder(tmp_path / "clean", number))


@pytest.mark.parametrize("restart", ["base", "previous"])
def test_the_previous_student_is_a_writer_and_a_start(data, tmp_path, prompt_file, restart):
    """SPIN's pairs: the data's answer against the last student's."""
    lines = [json.loads(line) | {"answer": "the cat sat"} for line in prompt_file.read_text().splitlines()[:6]]
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    del data["elicit"]
    data["writer"] = [{"by": "corpus"}, {"by": "previous", "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}]
    data["rounds"]["restart"] = restart
    data["loss"] = ["spin"]
    out = limbeck.run(parse(data), tmp_path / "out", stages=TRAIN).folder
    start = model_identity(data["student"]["start"]["pretrained"])
    facts = rounds_record(out)["rounds"]
    assert facts["1"]["start"] == start and facts["2"]["start"] == (
        start if restart == "base" else facts["1"]["student"]
    )
    with closing(sqlite3.connect(out / "store.sqlite")) as db:
        writers = {json.loads(body)["writer"] for (body,) in db.execute("select body from samples")}
    assert writers == {start, facts["1"]["student"]}


def test_a_recipe_makes_the_fine_tuned_student_that_its_ranking_starts_from(data, tmp_path, prompt_file):
    lines = [json.loads(line) | {"answer": "the cat sat"} for line in prompt_file.read_text().splitlines()[:6]]
    prompt_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    del data["elicit"]
    data["writer"] = [{"by": "corpus"}, {"by": "previous", "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}]
    data["loss"] = ["dpo"]
    data["rounds"] = {"n": 1, "first": {"writer": [{"by": "corpus"}], "loss": ["cross_entropy"]}}
    out = limbeck.run(parse(data), tmp_path / "out", stages=TRAIN).folder
    facts = rounds_record(out)["rounds"]
    assert list(facts) == ["0", "1"] and facts["0"]["start"] == model_identity(data["student"]["start"]["pretrained"])
    assert facts["1"]["start"] == facts["0"]["student"] == model_identity(str(round_folder(out, 0) / "student"))
    with closing(sqlite3.connect(out / "store.sqlite")) as db:
        writers = {json.loads(body)["writer"] for (body,) in db.execute("select body from samples")}
    assert writers == {facts["0"]["start"], facts["0"]["student"]}
    assert len(answers_in(out)) == 2 + (6 + 2), "the start's held-out answers; the fine-tuned student's rejected ones"
    assert "dpo" in (round_folder(out, 1) / "metrics.jsonl").read_text()


def test_a_round_of_a_pruned_student_keeps_the_first_ones_layers(recipe_data, tmp_path):
    recipe_data["rounds"] = {"n": 2}
    recipe_data["train"]["steps"] = 1
    recipe_data["evaluate"] = {"metrics": ["fidelity"], "controls": [], "prompts": recipe_data["evaluate"]["prompts"]}
    out = limbeck.run(parse(recipe_data), tmp_path / "out", stages=TRAIN).folder
    first, second = ((round_folder(out, n) / "start.json").read_text() for n in (1, 2))
    assert json.loads(first)["kept"] and first == second
    record = rounds_record(out)
    assert record["rounds"]["1"]["start"] == record["rounds"]["2"]["start"]
    assert len(answers_in(out)) == 18 + 2, "one teacher, one text: nothing is asked twice"


# The control


def test_the_control_does_in_one_round_what_all_did(data, tmp_path, asked):
    """As many answers of the start as all rounds asked for, as many steps; what was asked already is not asked again."""
    out = tmp_path / "out"
    limbeck.run(parse(data), out)
    before, record = len(asked), rounds_record(out)
    with_control = parse(data | {"rounds": {"n": 2, "at_once": True}})
    result = limbeck.run(with_control, out)
    home = at_once_folder(out, 2)
    assert rounds_record(out) == record and len(result.rounds) == 2, "the rounds are as they were"
    assert len(asked) - before == 18 and len(set(asked)) == len(asked), (
        "the first round's answers are the control's, too"
    )
    steps = [len(losses(folder)) for folder in (round_folder(out, 1), round_folder(out, 2), home)]
    assert steps == [2, 2, 4]
    tokens = [
        sum(json.loads(line)["response_tokens"] for line in (folder / "metrics.jsonl").read_text().splitlines())
        for folder in (round_folder(out, 1), round_folder(out, 2), home)
    ]
    assert tokens[2] == pytest.approx(tokens[0] + tokens[1], rel=0.25), "up to how rows fill a step"
    assert not list(home.glob("checkpoints/step-*")) and (home / "student").is_dir()
    value = json.loads((home / "evaluation" / "summary.json").read_text())["systems"]["student"]["own_tokens"]["value"]
    page = (out / "report.html").read_text()
    assert 'href="at_once/2/report.html"' in page and "All at once" in page and str(round(value, 1)) in page
    moved = tmp_path / "moved"
    out.rename(moved)
    limbeck.run(with_control, moved)
    assert len(asked) - before == 18, "it is done"


def test_what_the_control_is_as_an_ordinary_recipe(data):
    data["rounds"] = {"n": 3, "restart": "previous", "at_once": True}
    data["train"] = {"epochs": 1.5, "tokens_per_step": 32, "lr": 1e-2}
    recipe = parse(data)
    control = at_once(recipe, 3, 17)
    assert control.rounds is None and control.train.steps == 17 and control.train.epochs is None
    assert control.teacher.model == control.student.start.pretrained == data["student"]["start"]["pretrained"]
    assert control.elicit[0].params == data["elicit"][0]["answer"] | {"n": 3} and "3 rounds at once" in control.title
    assert (resolve(recipe).rounds, resolve(recipe).at_once) == (3, 3)
    made = [{"self_instruct": {"count": 5, "requests": 4, "instances": 0}}, {"answer": {"n": 4}}, "rate", "pairs"]
    many = at_once(parse(data | {"elicit": made, "loss": ["dpo"]}), 3, 9)
    assert many.elicit[0].params == {"count": 15, "requests": 12, "instances": 0} and many.elicit[1].params == {"n": 4}
    judged = at_once(parse(data | {"elicit": ["given", "rate", {"best_of": {"score": "rating"}}]}), 3, 9)
    assert [entry.params for entry in judged.elicit] == [{}, {}, {"score": "rating"}], "feedback is asked as it was"
    first = {"writer": [{"by": "teacher"}], "train": data["train"]}
    from_base = at_once(parse(data | {"rounds": {"n": 2, "first": first, "at_once": True}}), 2, 5, "/r/0/student")
    assert from_base.student.start.pretrained == from_base.teacher.model == "/r/0/student"
    without = parse(data | {"rounds": {"n": 3, "restart": "previous", "at_once": False}})
    assert without.hash == parse(data | {"rounds": {"n": 3, "restart": "previous"}}).hash, "old hashes stay"
    with pytest.raises(limbeck.RecipeError, match=r"elicit\[0\].answer.n"):
        resolve(parse(data | {"elicit": [{"answer": {"n": 500}}]}))


# Stages


@pytest.fixture
def adversarial(data, tiny_folder):
    return adversarial_recipe(data, tiny_folder)


def adversarial_recipe(data, tiny_folder):
    """GAD: a discriminator before each round, whose score is the round's reward."""
    del data["elicit"]
    text = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
    stage = {
        "student": {"start": {"pretrained": str(tiny_folder)}, "head": "scalar"},
        "writer": [{"by": "teacher", **text}, {"by": "previous", **text}],
        "loss": ["bradley_terry"],
        "train": {"steps": 2, "tokens_per_step": 64, "lr": 3e-3, "seed": 3},
    }
    first = {"writer": [{"by": "teacher", **text}], "loss": ["cross_entropy"]}
    return data | {
        "teacher": str(tiny_folder),
        "writer": [{"by": "student", "max_tokens": 6}],
        "rollout": {"prompts": 2, "group": 3, "rewards": [{"model": "discriminator"}]},
        "loss": ["ppo_clip"],
        "rounds": {"n": 2, "restart": "previous", "first": first, "stages": {"discriminator": stage}},
    }


def test_a_stage_trains_a_reward_model_before_each_round(adversarial, tmp_path, asked):
    out = limbeck.run(parse(adversarial), tmp_path / "out").folder
    stages = [stage_folder(out, "discriminator", number) for number in (1, 2)]
    rounds = [round_folder(out, number) for number in (0, 1, 2)]
    recipes = [yaml.safe_load((home / "recipe.yaml").read_text()) for home in (*stages, *rounds[1:])]
    assert [recipe["previous"] for recipe in recipes[:2]] == [str(home / "student") for home in rounds[:2]]
    paths = [recipe["rollout"]["rewards"][0]["params"]["path"] for recipe in recipes[2:]]
    assert paths == [str(home) for home in stages], "a round is rewarded by the discriminator of its own"
    identities = {model_identity(str(home / "student")) for home in stages}
    assert len(identities) == 2, "each learnt another student's text"
    accuracy = json.loads((stages[1] / "evaluation" / "summary.json").read_text())["systems"]["student"]
    assert accuracy["preference/accuracy"]["n"] == 2, "measured on the held-out prompts"
    assert all(
        "reward" in json.loads(line)["rollout"] for line in (rounds[2] / "metrics.jsonl").read_text().splitlines()
    )
    with closing(sqlite3.connect(out / "store.sqlite")) as db:
        writers = [json.loads(body)["writer"] for (body,) in db.execute("select body from samples")]
    teacher = model_identity(adversarial["teacher"])
    students = {model_identity(str(home / "student")) for home in rounds[:2]}
    assert set(writers) == {teacher, *students}, (
        "the teacher's answers are asked for once, each student's before it changes"
    )
    page = (out / "report.html").read_text()
    assert 'href="stages/discriminator/2/report.html"' in page and "Round 2: discriminator" in page
    assert not list(out.rglob("checkpoints/step-*"))
    moved, before = tmp_path / "moved", len(asked)
    out.rename(moved)
    limbeck.run(parse(adversarial), moved)
    assert len(asked) == before, "moved, it is done"


@pytest.mark.promise("R3")
def test_killed_in_a_stage_it_ends_as_its_twin(adversarial, tmp_path, monkeypatch):
    homes = ["rounds/0", "stages/discriminator/1", "rounds/1", "stages/discriminator/2", "rounds/2"]
    limbeck.run(parse(adversarial), tmp_path / "clean", stages=TRAIN)
    for count in (4, 8):  # the second step of each stage
        folder, seen = tmp_path / f"killed-{count}", []

        def kill(name, count=count, seen=seen):
            seen.append(name)
            if seen.count("train.after_step") == count:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("limbeck.training.loop.crash_point", kill)
            with pytest.raises(Killed):
                limbeck.run(parse(adversarial), folder, stages=TRAIN)
        assert (folder / homes[2] / "student").exists() == (count == 8)
        limbeck.run(parse(adversarial), folder, stages=TRAIN)
        for home in homes:
            assert losses(folder / home) == losses(tmp_path / "clean" / home), home
        assert rounds_record(folder)["rounds"] == rounds_record(tmp_path / "clean")["rounds"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": {"start": {"pretrained": "x"}}}, r"rounds.stages.discriminator: .*head: scalar"),
        ({"rollout": {}}, r"rounds.stages.discriminator: 'rollout' is no section of a stage"),
        ({"loss": None}, r"rounds.stages.discriminator: loss is missing"),
        ({"loss": ["bradley_tery"]}, r"rounds.stages.discriminator.loss\[0\].*did you mean 'bradley_terry'"),
    ],
)
def test_a_stage_that_can_not_be_is_refused(adversarial, change, words):
    stage = adversarial["rounds"]["stages"]["discriminator"] | change
    stage = {key: value for key, value in stage.items() if value is not None}
    adversarial["rounds"] |= {"stages": {"discriminator": stage}}
    with pytest.raises(limbeck.RecipeError, match=words):
        resolve(parse(adversarial))


def test_a_stage_must_be_read_and_have_a_student_to_read(adversarial):
    limbeck.check(parse(adversarial))
    unread = adversarial | {"rollout": {"prompts": 2, "group": 3, "rewards": ["finished"]}}
    with pytest.raises(limbeck.RecipeError, match="no reward reads it"):
        resolve(parse(unread))
    stages = adversarial["rounds"]["stages"]
    with pytest.raises(limbeck.RecipeError, match="at_once is one training"):
        parse(adversarial | {"rounds": {"n": 2, "at_once": True, "stages": stages}})
    with pytest.raises(limbeck.RecipeError, match="there is no student before round 1"):
        start = {"prune": {"layers": 3, "keep": "uniform"}}
        resolve(parse(adversarial | {"rounds": {"n": 2, "stages": stages}, "student": {"start": start}}))
    with pytest.raises(limbeck.RecipeError, match="is called by its name"):
        parse(adversarial | {"rounds": {"n": 2, "stages": {"Judge 1": stages["discriminator"]}}})


# Ends, with rounds that are played


def played(monkeypatch, tiny_folder, summaries, raises=None):
    """Rounds that leave these evaluations at once, and students that differ in a file."""

    def round_(self, number):
        if number == raises:
            raise NothingLeftError("no answer passed")
        home = round_folder(self.folder, number)
        values, text = summaries[number - 1]
        if not (home / "student").exists():
            shutil.copytree(tiny_folder, home / "student")
            (home / "student" / "which.json").write_text(json.dumps(text))
        write_json(home / "evaluation" / "summary.json", values)

    monkeypatch.setattr(RoundsRun, "round", round_)


def summary(accuracy, repetition=0.1, before=0.3):
    value = {"low": 0, "high": 1, "n": 50}
    return {
        "systems": {
            "untouched": {"jsd": value | {"value": before}, "own_repetition": value | {"value": 0.1}},
            "student": {"jsd": value | {"value": accuracy}, "own_repetition": value | {"value": repetition}},
        },
        "metrics": {"jsd": {"better": "low"}},
    }


STAGES = ("elicit", "train", "evaluate")


@pytest.mark.parametrize(
    ("rounds", "stop", "kept", "ended"),
    [
        ([summary(0.2), summary(0.1), summary(0.05)], "jsd", 3, ""),
        ([summary(0.2), summary(0.25)], "jsd", 1, "jsd of round 2 is 0.25, no better than 0.2 of round 1"),
        ([summary(0.4)], "jsd", 1, "jsd of round 1 is 0.4, no better than 0.3 before training"),
        (
            [summary(0.2), summary(0.1), summary(0.15)],
            "jsd",
            2,
            "jsd of round 3 is 0.15, no better than 0.1 of round 2",
        ),
        ([summary(0.4), summary(0.5), summary(0.6)], None, 3, ""),
    ],
)
def test_rounds_end_by_a_metric(data, tmp_path, tiny_folder, monkeypatch, rounds, stop, kept, ended):
    played(monkeypatch, tiny_folder, [(values, number) for number, values in enumerate(rounds)])
    data["rounds"] = {"n": 3, "stop": stop}
    out = limbeck.run(parse(data), tmp_path / "out", stages=STAGES).folder
    record = rounds_record(out)
    assert record["kept"] == kept and record["ended"] == ended and len(record["rounds"]) == len(rounds)
    assert (out / "student" / "which.json").read_text() == str(kept - 1)
    assert json.loads((out / "evaluation" / "summary.json").read_text())["round"] == kept
    limbeck.run(parse(data), out, stages=STAGES)
    assert rounds_record(out) == record


def test_rounds_end_where_nothing_changes_any_more(data, tmp_path, tiny_folder, monkeypatch):
    played(monkeypatch, tiny_folder, [(summary(0.2), "one"), (summary(0.2), "one")])
    data["rounds"] = {"n": 9}
    out = limbeck.run(parse(data), tmp_path / "out", stages=STAGES).folder
    assert rounds_record(out)["kept"] == 2 and "to the bit" in rounds_record(out)["ended"]


def test_an_empty_round_and_a_collapse_end_with_what_stands(data, tmp_path, tiny_folder, monkeypatch):
    data["rounds"] = {"n": 3}
    played(monkeypatch, tiny_folder, [(summary(0.2), 0), (summary(0.1, repetition=0.8), 1)])
    with pytest.raises(
        CollapsedError, match=r"round 2 has collapsed: 80% of its 4-grams.*round 1 is in .*student"
    ) as one:
        limbeck.run(parse(data), tmp_path / "out", stages=STAGES)
    with pytest.raises(CollapsedError) as other:
        limbeck.run(parse(data), tmp_path / "out", stages=STAGES)
    assert str(one.value) == str(other.value) and rounds_record(tmp_path / "out")["kept"] == 1
    played(monkeypatch, tiny_folder, [(summary(0.2), 0)], raises=2)
    with pytest.raises(NothingLeftError, match="round 2: no answer passed; the student of round 1 is in"):
        limbeck.run(parse(data), tmp_path / "empty", stages=STAGES)
    assert (tmp_path / "empty" / "student" / "which.json").read_text() == "0"
    played(monkeypatch, tiny_folder, [], raises=1)
    with pytest.raises(NothingLeftError, match=r"^no answer passed$"):
        limbeck.run(parse(data), tmp_path / "first", stages=STAGES)


def test_an_empty_pool_stays_an_error_when_it_is_run_again(data, tmp_path):
    data["elicit"].append({"verify": {"against": "number"}})  # a tiny model's answers end in no such number
    for _ in range(2):
        with pytest.raises(NothingLeftError, match="left no sample"):
            limbeck.run(parse(data), tmp_path / "out", stages=TRAIN)
    assert not (tmp_path / "out" / "rounds" / "1" / "student").exists()


# Refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": {"n": 0}}, r"rounds.n: .*greater than or equal to 1; got 0"),
        ({"rounds": {"n": 2, "restart": "sideways"}}, r"rounds.restart: 'sideways' is not allowed here"),
        ({"rounds": {"n": 2, "stopp": "jsd"}}, r"rounds.stopp: unknown key; did you mean 'stop'"),
        ({"rounds": {"n": 2, "stop": "forward_lk"}}, r"rounds.stop: .*did you mean 'forward_kl'"),
        (
            {"rounds": {"n": 2, "stop": "jsd"}, "evaluate": {"metrics": ["fidelity"], "controls": []}},
            r"rounds.stop: .*add untouched to evaluate.controls",
        ),
        ({"rounds": {"n": 2, "stop": "own_tokens"}}, r"rounds.stop: .*'own_tokens' that can be better"),
        ({"rounds": {"n": 2, "first": {"teacher": "x"}}}, r"rounds.first: 'teacher' can't be other"),
        ({"rounds": {"n": 2, "first": {"writer": "x"}}}, r"rounds.first.writer: must be a list, such as \[{by: x}\]"),
        ({"rounds": {"n": 2, "first": {"writer": ["x"]}}}, r"rounds.first.writer\[0\]: Input should be"),
        ({"rounds": {"n": 2, "first": {"elicit": 3}}}, r"rounds.first.elicit: must be a list"),
        ({"rounds": {"n": 2, "first": {"rollout": "x"}}}, r"rounds.first.rollout: Input should be"),
        ({"rounds": {"n": 2, "first": {"loss": ["jds"]}}}, r"rounds.first.loss\[0\].*did you mean 'jsd'"),
        ({"rounds": None}, r"teacher.model: previous is the student of the round before"),
        ({"student": {"start": {"scratch": {}}}}, r"student.start: .*give start.pretrained"),
        ({"teacher": {"model": "previous", "weights": "live"}}, r"teacher.weights: .*in round 2"),
    ],
)
def test_what_no_round_can_be_is_refused_before_the_first(data, change, words):
    with pytest.raises(limbeck.RecipeError, match=words):
        resolve(parse(data | change))


def test_a_recipe_with_rounds_belongs_to_its_folder(data, tmp_path, monkeypatch, tiny_folder):
    played(monkeypatch, tiny_folder, [(summary(0.2), 0), (summary(0.2), 1)])
    limbeck.run(parse(data), tmp_path / "out", stages=STAGES)
    with pytest.raises(UserError, match="differs in train"):
        limbeck.run(parse(data | {"train": data["train"] | {"lr": 0.5}}), tmp_path / "out")
    with pytest.raises(UserError, match="differs in rounds"):
        limbeck.run(parse(data | {"rounds": {"n": 2, "restart": "previous"}}), tmp_path / "out")
    limbeck.run(parse(data | {"rounds": {"n": 1, "stop": "jsd"}}), tmp_path / "out", stages=STAGES)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["rounds"]["n"] == 1
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    data["student"] = {"start": {"pretrained": str(other)}}
    limbeck.run(parse(data), tmp_path / "mine", stages=STAGES)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="start changed since"):
        limbeck.run(parse(data), tmp_path / "mine", stages=STAGES)
    with pytest.raises(UserError, match="tiny has rounds"):
        limbeck.compare([parse(data), parse(data | {"name": "two"})], tmp_path / "compared")


def test_what_a_round_is_as_an_ordinary_recipe(data):
    recipe = parse(data | {"student": data["student"] | {"template": "chatml"}})
    first, second = recipe.of_round(1, None), recipe.of_round(2, "/r/1/student")
    assert first.rounds is second.rounds is None and first.title == "tiny, round 1"
    assert (first.teacher.model, first.teacher.template) == (data["student"]["start"]["pretrained"], "chatml")
    assert (second.teacher.model, second.teacher.template) == ("/r/1/student", None), "a trained student has its own"
    assert second.student == first.student
    on = parse(data | {"student": recipe.student.model_dump(), "rounds": {"n": 2, "restart": "previous"}})
    assert on.of_round(2, "/r/1/student").student.model_dump(exclude_none=True) == {
        "start": {"pretrained": "/r/1/student"}
    }
    before = parse(data | {"rounds": {"n": 1, "first": {"writer": [{"by": "teacher"}], "train": data["train"]}}})
    zero, one = before.of_round(0, None), before.of_round(1, "/r/0/student", "/r/0/student")
    assert zero.elicit is None and zero.writer[0].by == "teacher" and zero.loss == one.loss
    assert one.elicit and one.student.start.pretrained == one.teacher.model == "/r/0/student" and one.previous is None
    plain = {key: value for key, value in data.items() if key != "rounds"} | {"teacher": "x"}
    assert "rounds" not in parse(plain).resolved() and "previous" not in parse(plain).resolved(), "old hashes stay"


def test_the_bill_is_of_all_rounds_whichever_is_kept(data, tmp_path):
    """The hours of the page are those of all rounds, so its bill has to be."""
    server = {"url": "http://localhost:1/v1", "name": "toy", "price": {"input": 1, "output": 2}}
    recipe = parse(data | {"teacher": {"server": server}, "rounds": {"n": 2, "restart": "previous"}})
    for number, answers in ((1, 1), (2, 3)):
        home = round_folder(tmp_path, number)
        (home / "evaluation").mkdir(parents=True)
        write_json(home / "inputs.json", {"teacher": "served:toy-1"})
        write_json(home / "evaluation" / "summary.json", {"systems": {}, "bill": {"answers": answers}})
    with Store(tmp_path / "store.sqlite") as store:
        for seed in range(3):  # two of the second round
            request = Request("served:toy-1", ({"role": "user", "content": "q"},), Sampling(), seed)
            sample = Sample((*request.messages, {"role": "assistant", "content": "a"}), request.model)
            store.record(request, sample, "ok", usage=(5, 3))
    publish(tmp_path, recipe, kept=1, page=False)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    paid = {"answers": 3, "tokens_read": 15, "tokens_written": 9, "money": pytest.approx(33e-6)}
    assert summary["bill"] == paid and summary["round"] == 1
    assert json.loads((home / "evaluation" / "summary.json").read_text())["bill"] == {"answers": 3}
