"""A teacher that is behind a server alone: its text is trained on, its answers and tasks are measured, no distance is made up."""

from __future__ import annotations

import json
import re

import pytest
import torch

import limbeck
from limbeck.config.recipe import as_yaml, load_recipe, parse
from limbeck.data.batches import Row
from limbeck.elicit.prompts import split_prompts
from limbeck.elicit.verify import verify
from limbeck.evaluate.fidelity import EvaluationText, fidelity
from limbeck.evaluate.tasks import load_task, tasks_of
from limbeck.progress import Silent
from limbeck.runs.advice import served_time
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.storage.files import read_jsonl
from limbeck.types import ANSWER_ENDS, RecipeError, UserError
from tests.command_line import called
from tests.scripted_server import Scripted, answer

CHECKS = {prompt.text: prompt.check for prompt in load_task("everyday").prompts}


def said(question):
    """Right where a number or a label is asked for; else the same words."""
    check = CHECKS.get(question) or {}
    return str(check["answer"]) if check.get("type") in ("number", "choice") else "the cat sat on the mat"


def teacher_answers(folder):
    return read_jsonl(folder / "evaluation" / "answers-teacher.jsonl")


def say(number, body):
    return answer(said(body["messages"][-1]["content"]))


@pytest.fixture
def served(recipe_data, tiny_folder):
    """A recipe by the address of its teacher."""

    def made(url="http://127.0.0.1:1/v1", **changes):
        teacher = {"server": {"url": url, "name": "toy"}}
        metrics = ["fidelity", {"everyday": {"limit": 24}}]
        evaluate = {**recipe_data["evaluate"], "limit": 24, "metrics": metrics}
        student = {"start": {"pretrained": str(tiny_folder)}}
        return parse(
            {
                **recipe_data,
                "teacher": teacher,
                "student": student,
                "loss": ["cross_entropy"],
                "evaluate": evaluate,
                **changes,
            }
        )

    return made


@pytest.mark.promise("S15", "R18")
def test_a_run_without_the_teachers_weights(served, tmp_path):
    with Scripted(say) as server:
        folder = run(served(server.url), tmp_path / "run")
        asked = len(server.seen)
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    teacher, student = summary["systems"]["teacher"], summary["systems"]["student"]
    evaluate = served(server.url).evaluate
    (task,) = tasks_of(evaluate.metrics, evaluate.limits)
    passed = [verify(prompt.check, said(prompt.text)) for prompt in task.prompts if prompt.check]
    assert teacher["everyday/pass_rate"]["value"] == pytest.approx(sum(passed) / len(passed)) and any(passed)
    assert not set(teacher) & {"forward_kl", "perplexity", "own_tokens", "ece"}
    assert not [name for name in student if "kl" in name or "jsd" in name or "top1" in name or "teacher" in name]
    assert {"perplexity", "entropy", "ece", "own_tokens", "own_entropy", "everyday/pass_rate"} <= set(student)
    assert student["perplexity"]["value"] < summary["systems"]["untouched"]["perplexity"]["value"]
    assert "perplexity" in summary["paired"]["student - untouched"] or "nll" in summary["paired"]["student - untouched"]
    page = (folder / "report.html").read_text()
    assert "toy, on a server" in page and "gives text alone" in page and "Forward KL" not in page
    assert json.loads((folder / "inputs.json").read_text())["teacher"].startswith("served:toy-")
    assert "served:toy-" in (folder / "student" / "README.md").read_text()
    assert summary["bill"] == {"answers": asked, "tokens_read": 5 * asked, "tokens_written": 3 * asked}
    counted = summary["requests"]["counted"]
    assert counted["tokens_read"] / counted["answers"] == 5 and counted["tokens_written"] / counted["answers"] == 3
    assert counted["answers"] == len(teacher_answers(folder)) < asked, "the held-out prompts alone"
    assert "Bill of the teacher" in page
    run(served(server.url), folder)  # the server is gone, and nothing is asked of it
    assert (folder / "report.html").read_text() == page
    (folder / "evaluation" / "summary.json").unlink()
    run(served(server.url), folder)
    assert json.loads((folder / "evaluation" / "summary.json").read_text())["systems"] == summary["systems"]
    recipe = served(server.url)
    found = split_prompts(recipe.prompts, recipe.evaluate)
    assert asked == len(found.training) + 2 * len(found.held_out) + len(
        task.prompts
    )  # held-out ones are asked as training ones, and greedily


def test_what_the_evaluation_asks_is_asked_with_the_text(served, tmp_path):
    """So a server may be gone when the training begins."""
    with Scripted(say) as server:
        recipe = served(server.url)
        run(recipe, tmp_path / "run", stages=("elicit",))
        asked = len(server.seen)
        run(recipe, tmp_path / "run", stages=("elicit",))
        assert len(server.seen) == asked and not (tmp_path / "run" / "evaluation").exists()
    folder = run(recipe, tmp_path / "run")
    assert (
        "everyday/pass_rate" in json.loads((folder / "evaluation" / "summary.json").read_text())["systems"]["teacher"]
    )


def test_an_answer_that_failed_is_not_measured_as_one(served, tmp_path):
    """An evaluation waits for the server to answer."""
    broken = [True]

    def some(number, body):
        return ("status", 400) if broken[0] and body["temperature"] == 0 else say(number, body)

    with Scripted(some) as server:
        with pytest.raises(
            UserError, match=r"of \d+ answers can't be used \(\d+ failed\).*leave these prompts out of the evaluation"
        ):
            run(served(server.url), tmp_path / "run")
        broken[0] = False
        assert (run(served(server.url), tmp_path / "run") / "report.html").exists()


BAD = {
    "refused": lambda: answer(None, refusal="I'm sorry"),
    "filtered": lambda: answer("The first step", "content_filter"),
    "malformed": lambda: answer("The first step", None),
    "error": lambda: ("status", 400, {}, b'{"error": {"message": "too long"}}'),
}


def poisoned(ends):
    """A server that ends the first answers to training prompts so, and then answers. What is left of `ends` is its
    own."""

    def script(number, body):
        return BAD[ends.pop()]() if ends and body["temperature"] > 0 else say(number, body)

    return script


def limited(url, **settings):
    return {"server": {"url": url, "name": "toy", "concurrency": 1, **settings}}


@pytest.mark.promise("R11")
def test_refused_and_filtered_answers_are_left_out_and_counted(served, tmp_path):
    notes = []

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    with Scripted(poisoned(["refused", "refused", "filtered"])) as server:
        recipe = served(server.url, teacher=limited(server.url))
        folder = run(recipe, tmp_path / "run", Noting())
    total = len(split_prompts(recipe.prompts, recipe.evaluate).training)
    words = f"training text: 3 of {total} answers are left out (1 filtered by the server, 2 refused)"
    assert words in notes
    ends = json.loads((folder / "answers.json").read_text())
    assert ends["training text"] == {"ok": total - 3, "filtered": 1, "refused": 2}
    page = (folder / "report.html").read_text()
    assert "Answers: training text" in page and "filtered by the server" in page


@pytest.mark.parametrize("end", ["malformed", "error"])
@pytest.mark.promise("R11")
def test_answers_that_can_not_be_used_end_the_run_or_are_tolerated(served, tmp_path, end):
    ends = [end] * 3
    with Scripted(poisoned(ends)) as server:
        strict = served(server.url, teacher=limited(server.url))
        total = len(split_prompts(strict.prompts, strict.evaluate).training)
        with pytest.raises(UserError, match=rf"3 of {total} answers can't be used \(3 .*tolerate: 0\.") as refusal:
            run(strict, tmp_path / "run")
        share = float(str(refusal.value).split("tolerate: ")[1].split(". The")[0])
        loose = served(server.url, teacher=limited(server.url, tolerate=share))
        assert loose.hash == strict.hash
        ends += [end] * 3 if end == "error" else []  # malformed answers are there already
        folder = run(loose, tmp_path / "run")
        student = (folder / "student" / "model.safetensors").read_bytes()
        assert json.loads((folder / "answers.json").read_text())["training text"] == {"ok": total - 3, end: 3}
        words = re.sub(r"(\s|<[^>]*>)+", " ", (folder / "report.html").read_text())
        assert f"Answers: training text complete {total - 3} {ANSWER_ENDS[end]} 3 " in words
        assert load_recipe(folder / "recipe.yaml").teacher.server.tolerate == share
        asked = len(server.seen)
        run(loose, folder)
        assert len(server.seen) == asked and (folder / "student" / "model.safetensors").read_bytes() == student
    with Scripted(poisoned([end] * 3)) as server:  # asked again, they are answered
        recipe = served(server.url, teacher=limited(server.url))
        with pytest.raises(UserError, match="can't be used"):
            run(recipe, tmp_path / "again", stages=("elicit",))
        folder = run(recipe, tmp_path / "again", stages=("elicit",))
    assert json.loads((folder / "answers.json").read_text())["training text"] == {"ok": total}


def test_a_command_that_only_elicits_ends_with_2_where_answers_are_missing(served, tmp_path):
    with Scripted(poisoned(["error"])) as server:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(as_yaml(served(server.url, teacher=limited(server.url))))
        command = ["elicit", str(recipe), "--out", str(tmp_path / "run")]
        status, printed = called(*command)
        assert status == 2 and "(1 failed)" in " ".join(printed.split())
        assert called(*command)[0] == 0


@pytest.mark.promise("R12")
def test_a_run_keeps_to_the_version_that_answered_first_over_restarts(served, tmp_path):
    version = ["toy-2025-01-01"]

    def script(number, body):
        return say(number, body) | {"model": version[0]} if number < 5 or version[1:] else ("status", 401)

    with Scripted(script) as server:
        recipe = served(server.url, teacher=limited(server.url))
        with pytest.raises(UserError, match="401"):
            run(recipe, tmp_path / "run", stages=("elicit",))
        version[:] = ["toy-2026-01-01", "on"]
        with pytest.raises(UserError, match="'toy-2026-01-01' answers now, and 'toy-2025-01-01' answered before"):
            run(recipe, tmp_path / "run", stages=("elicit",))
        allowed = served(server.url, teacher=limited(server.url, answers_as="toy"))
        run(allowed, tmp_path / "run", stages=("elicit",))


@pytest.mark.promise("R9")
def test_ceilings_are_a_runs_and_not_a_processs(served, tmp_path):
    """Started again, a run counts what it paid for before; what it paid is told while it goes on."""
    told = []

    class Told(Silent):
        def progress(self, done, total, detail):
            told.append(detail)

    with Scripted(say) as server:
        teacher = {
            "server": {
                "url": server.url,
                "name": "toy",
                "price": {"input": 1000.0, "output": 1000.0},
                "limits": {"requests": 3},
            }
        }
        for _ in range(2):
            with pytest.raises(UserError, match="ceiling of 3 requests"):
                run(served(server.url, teacher=teacher), tmp_path / "run", Told(), stages=("elicit",))
        assert len(server.seen) == 3
    assert any("0.024 spent" in detail for detail in told)  # 3 answers of 8 tokens each, a thousandth a token


def test_methods_are_compared_by_what_text_can_say(served, tmp_path):
    with Scripted(say) as server:
        recipes = [
            served(server.url, name=f"x-{part}", loss=[{"cross_entropy": {"label_smoothing": part}}])
            for part in (0.0, 0.5)
        ]
        folder = limbeck.compare(recipes, tmp_path / "cmp", seeds=1).folder
    found = json.loads((folder / "comparison.json").read_text())
    assert {"nll", "own_tokens"} <= set(found["paired"]["x-0.5 - x-0.0"]) and "forward_kl" not in found["metrics"]
    assert "Perplexity" in (folder / "report.html").read_text() or "likelihood" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"loss": ["forward_kl"]},
            r"loss\[0\].forward_kl: it reads the teacher distribution, and a server gives text: use cross_entropy",
        ),
        (
            {"student": {"start": {"prune": {"layers": 2, "keep": "uniform"}}}},
            "student.start: nothing can be made of a teacher whose weights",
        ),
        ({"elicit": ["ifd"], "writer": [{"by": "elicited"}]}, r"elicit\[0\].ifd: it needs log probs"),
        ({"elicit": ["magpie"], "writer": [{"by": "elicited"}]}, r"elicit\[0\].magpie: it needs raw"),
        ({"teacher": {}}, "name a model, a server that writes its text, or both"),
    ],
)
def test_what_text_can_not_give_is_refused(served, changes, match):
    with pytest.raises(RecipeError, match=match):
        check(served(**changes))


def test_a_plan_without_the_teachers_weights(served, recipe_data):
    plan, whole = check(served()), check(parse({**recipe_data, "loss": ["cross_entropy"]}))
    greedy = len(resolve(served()).held_out_prompts) + sum(len(task.prompts) for task in resolve(served()).tasks)
    assert plan.requests == whole.requests + greedy and whole.seconds["elicit"] > 0 and not whole.unknown
    assert "elicit" not in plan.seconds and "depends on the server" in plan.unknown["elicit"]
    limited = served()
    server = limited.teacher.server.model_copy(update={"requests_per_minute": 2.0})
    assert served_time(limited, 20, 900)["elicit"].startswith("unknown")
    slow = limited.model_copy(update={"teacher": limited.teacher.model_copy(update={"server": server})})
    assert served_time(slow, 20, 900)["elicit"].startswith("at least 10.0 min")
    assert not any("0.0 min" in text for title, text in plan.lines() if title == "time, elicit")


def test_what_a_student_thinks_alone_is_what_it_thinks_beside_a_teacher(tiny):
    from limbeck.models.teacher import InProcessTeacher

    rows = [Row("a", (1, 2, 3), (4, 5, 6, 7)), Row("b", (1, 2), (3, 4))]
    torch.manual_seed(0)
    alone, beside = (fidelity(tiny, EvaluationText(rows, teacher)) for teacher in (None, InProcessTeacher(tiny)))
    for one, other in zip(alone, beside, strict=True):
        assert set(one.sums) == {"nll", "entropy", "wrong"} and one.tokens == other.tokens
        for name, value in one.sums.items():
            assert value == pytest.approx(other.sums[name], rel=1e-5)
