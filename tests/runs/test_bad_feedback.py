"""What feedback can't teach anything by: all ties, an empty round, a judge that is the student."""

from __future__ import annotations

import json

import pytest

import limbeck
from limbeck.config.recipe import parse
from limbeck.elicit.compare import Compare
from limbeck.elicit.soft_preference import SoftPreference
from limbeck.runs.rounds import RoundsRun
from limbeck.storage.rounds import round_folder, rounds_record
from limbeck.types import NothingLeftError
from tests.flow_driver import answers, drive
from tests.runs.test_rounds import STAGES, TRAIN, data, played, summary  # noqa: F401 (a fixture)

SAMPLED = {"n": 3, "all": True, "temperature": 1.0, "top_p": 1.0, "max_tokens": 4}


def test_answers_that_are_all_tied_end_the_run_with_their_number(data, tmp_path):  # noqa: F811
    """No answer of a tiny model passes, so that all have the same score; run again, it is said again."""
    check = {"type": "number", "answer": 7}
    lines = "".join(json.dumps({"prompt": prompt, "check": check}) + "\n" for prompt in ("one", "two", "three"))
    (tmp_path / "checked.jsonl").write_text(lines)
    data["prompts"] = {"from": str(tmp_path / "checked.jsonl")}
    data["elicit"] = [{"answer": SAMPLED}, "pass_rate", {"pairs": {"score": "pass_rate"}}]
    data["loss"], data["rounds"] = ["dpo"], {"n": 1}
    for _ in range(2):
        with pytest.raises(NothingLeftError, match=r"left no sample \(.*pairs: a tie \(3\)"):
            limbeck.run(parse(data), tmp_path / "out", stages=TRAIN)
    account = json.loads((round_folder(tmp_path / "out", 1) / "elicitation.json").read_text())["steps"][-1]
    assert account["dropped"]["a tie"] == 3 and account["given"] == 0
    assert not (tmp_path / "out" / "student").exists()


def test_a_round_whose_stage_has_no_text_is_an_empty_round(data, tmp_path, tiny_folder, monkeypatch):  # noqa: F811
    """The student of the round before stands, and the stage is named."""
    stage = {"elicit": ["answer"], "loss": ["cross_entropy"], "train": data["train"]}
    data |= {"teacher": str(tiny_folder), "models": {"tutor": str(tiny_folder)}}
    data |= {"elicit": [{"answer": {"by": "tutor"}}], "rounds": {"n": 3, "stages": {"tutor": stage}}}
    played(monkeypatch, tiny_folder, [(summary(0.2), 0)])
    play = RoundsRun.round

    def round_(self, number):
        if number == 2:
            self.staged(number, "x")
        play(self, number)

    def nothing(*_, **__):
        raise NothingLeftError("no answer passed")

    monkeypatch.setattr(RoundsRun, "round", round_)
    monkeypatch.setattr("limbeck.runs.pipeline.run", nothing)
    with pytest.raises(NothingLeftError, match=r"round 2: tutor: no answer passed; the student of round 1 is in"):
        limbeck.run(parse(data), tmp_path / "out", stages=STAGES)
    assert rounds_record(tmp_path / "out")["kept"] == 1 and (tmp_path / "out" / "student" / "which.json").exists()


def judged(data, by, models=None, rewards=None):  # noqa: F811
    """A recipe whose answers, or whose student in the loop, are judged by this model."""
    if rewards is None:
        return data | {
            "models": models,
            "elicit": [{"answer": SAMPLED}, {"rate": {"by": by}}, "pairs"],
            "loss": ["dpo"],
        }
    rollout = {"prompts": 2, "group": 2, "rewards": rewards}
    del data["elicit"]
    return data | {"models": models, "writer": [{"by": "student"}], "rollout": rollout, "loss": ["ppo_clip"]}


def of_itself(recipe):
    return [caution for caution in limbeck.check(parse(recipe)).cautions if "is the student itself" in caution]


def test_a_judge_that_is_the_student_is_told_before_the_run(data, tiny_folder, tmp_path):  # noqa: F811
    tiny = str(tiny_folder)
    other = tmp_path / "other"
    other.symlink_to(tiny_folder)
    for by, models in (("untouched", None), ("previous", None), ("teacher", None), ("judge", {"judge": tiny})):
        (said,) = of_itself(judged(data, by, models))
        assert said.startswith(f"elicit[1].rate: {'untouched' if by == 'previous' else by} is the student itself")
    assert not of_itself(judged(data | {"teacher": str(other)}, "teacher"))
    assert not of_itself(judged(data, "judge", {"judge": str(other)})), "other files may hold other weights"
    rewarded = judged(data | {"teacher": str(other)}, "judge", {"judge": tiny}, [{"judge": "judge"}])
    assert len(of_itself(rewarded)) == 1 and "rollout.rewards[0]" in of_itself(rewarded)[0]


@pytest.mark.parametrize("step", [Compare(by="judge"), SoftPreference(by="judge")])
def test_of_every_judge_it_is_told_how_many_answers_are_its_own(step):
    pool = [*answers(("why", "one")), *answers(("why", "two"))]
    own = [type(sample)(sample.messages, "judge@1", meta=sample.meta) for sample in pool[:1]]
    _, tally, _ = drive(step, [*own, *pool[1:]], lambda *_: "VERDICT: A", lambda _: -1.0)
    assert tally.facts["of_its_own_answers"] == 0.5
