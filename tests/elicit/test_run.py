"""The steps of `elicit:` from a recipe to trained text: the same pool whoever answers first, everything left out counted, going on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Annotated

import pytest
import yaml
from pydantic import Field

import limbeck
from limbeck.config.recipe import parse
from limbeck.elicit import steps
from limbeck.elicit.engine import Engine, StoppedEarlyError, elicit
from limbeck.elicit.flow import (
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    are_complete,
    ask,
    prompt_of,
    score,
    with_answer,
    with_scores,
)
from limbeck.elicit.run import Elicitation, TextSource, prompts_of
from limbeck.elicit.step import AskingStep, Estimate
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.storage.store import Store
from limbeck.types import Generated, LogProb, RecipeError, Request, Sample, Sampling, UserError
from tests.scripted_server import Scripted, answer


class Say(AskingStep):
    """Asks every prompt `n` times, then scores the answers."""

    paper = "none"
    needs = frozenset({"text", "log_probs"})
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 8

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        turns = [(sample, number) for sample in pool for number in range(self.n)]
        sampling = Sampling(1.0, 1.0, self.max_tokens)
        replies = yield from ask([context.request(sample.messages, sampling, number) for sample, number in turns])
        samples = [
            with_answer(sample, reply)
            for (sample, _), reply, complete in zip(turns, replies, are_complete(replies, tally), strict=True)
            if complete or reply.meta["finish"] == "length"
        ]
        log_probs = yield from score(
            [ScoreRequest(sample.messages[:-1], sample.messages[-1]["content"]) for sample in samples]
        )
        return [with_scores(sample, nats=one.nats) for sample, one in zip(samples, log_probs, strict=True)]

    def estimate(self, samples: int) -> Estimate:
        answers = samples * self.n
        return Estimate(answers, answers * self.max_tokens, answers, answers)


class Backwards:
    """Answers with the question's last word, the last request first; fails for some."""

    identity = "backwards@1"

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.asked: list[Request] = []
        self.broken = broken

    def answers(self, requests: Sequence[Request], stop=lambda: False) -> Iterator[tuple[Request, Generated]]:
        for request in reversed(requests):
            if stop():
                return
            self.asked.append(request)
            word = request.messages[-1]["content"].split()[-1]
            broken = word in self.broken
            yield request, Generated(None, "" if broken else word, "error" if broken else "ok", usage=(3, 1))


class ByLength:
    identity = "length@1"
    asked = 0

    def log_probs(self, questions: Sequence[ScoreRequest]) -> list[LogProb]:
        self.asked += len(questions)
        return [LogProb(-float(len(question.answer)), len(question.answer)) for question in questions]


def pool_of(*texts: str) -> Pool:
    return [Sample(({"role": "user", "content": text},), "corpus", meta={"prompt_id": text}) for text in texts]


def engine(store: Store, writer: Backwards, scorer: ByLength | None = None, stop=lambda: False) -> Engine:
    judge = scorer or ByLength()
    return Engine(store, lambda: writer, lambda by: judge, lambda by: f"{judge.identity}{by}", stop=stop)


def test_another_model_is_asked_and_its_opinion_kept_under_its_own_name(tmp_path):
    first, other = ByLength(), ByLength()
    with Store(tmp_path / "store.sqlite") as store:
        both = Engine(
            store, lambda: Backwards(), lambda by: other if by == "small" else first, lambda by: f"length@1{by}"
        )
        for by in ("", "small", "", "small"):
            both.run(score([ScoreRequest((), "a text", by)]))
        assert (first.asked, other.asked) == (1, 1) and len(store.scores("length@1small")) == 1
        with pytest.raises(AssertionError, match="all to one model"):
            both.run(score([ScoreRequest((), "a text"), ScoreRequest((), "a text", "small")]))


def test_answers_come_in_the_order_of_the_questions_and_are_paid_once(tmp_path):
    writer, scorer, tally = Backwards(), ByLength(), Tally("say")
    pool = pool_of("say one", "say two", "say three")
    with Store(tmp_path / "s.sqlite") as store:
        first = engine(store, writer, scorer).run(Say(n=2).run(pool, StepContext(writer.identity, 7, "0/say"), tally))
        again = engine(store, writer, scorer).run(
            Say(n=2).run(pool, StepContext(writer.identity, 7, "0/say"), Tally("say"))
        )
    assert [sample.messages[-1]["content"] for sample in first] == ["one", "one", "two", "two", "three", "three"]
    assert [sample.meta["scores"] for sample in first] == [{"nats": -float(n)} for n in (3, 3, 3, 3, 5, 5)]
    assert first == again and len(writer.asked) == 6 and scorer.asked == 3  # equal answers are one question
    assert first[0].parents[0] == pool[0].id and first[0].meta["prompt_id"] == "say one"


@pytest.mark.promise("R7")
def test_what_failed_is_asked_again_and_what_was_answered_is_not(tmp_path):
    writer = Backwards(broken=["two"])
    requests = [
        StepContext("m", 7, "0/x").request(sample.messages, Sampling()) for sample in pool_of("say one", "say two")
    ]
    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(UserError, match=r"1 of 2 answers can't be used \(1 failed\).*tolerate: 0\.5"):
            elicit(requests, store, lambda: writer)
        for _ in range(2):
            tolerated = elicit(requests, store, lambda: writer, tolerate=0.5)
            assert [sample.meta["finish"] for sample in tolerated] == ["ok", "error"] and len(writer.asked) == 3
        writer.broken = []
        for _ in range(2):
            assert [sample.meta["finish"] for sample in elicit(requests, store, lambda: writer)] == ["ok", "ok"]
        assert Store.count(store.path) == {"ok": 2} and store.bill("m") == (2, 9, 3)
    assert len(writer.asked) == 4


def test_one_of_a_small_batch_may_fail(tmp_path):
    requests = [StepContext("m", 7, "0/x").request(one.messages, Sampling()) for one in pool_of("say one", "say two")]
    with Store(tmp_path / "s.sqlite") as store:
        for tolerate in (None, 0.0):
            with pytest.raises(UserError, match="1 of 2 answers"):
                elicit(requests, store, lambda: Backwards(broken=["two"]), tolerate=tolerate)
        samples = elicit(requests, store, lambda: Backwards(broken=["two"]), tolerate=0.01)
        assert [sample.meta["finish"] for sample in samples] == ["ok", "error"]
    with Store(tmp_path / "both.sqlite") as store, pytest.raises(UserError, match="2 of 2 answers"):
        elicit(requests, store, lambda: Backwards(broken=["one", "two"]), tolerate=0.5)


@pytest.mark.promise("R14")
def test_a_stop_keeps_what_was_answered(tmp_path):
    writer, pool = Backwards(), pool_of("say one", "say two", "say three")
    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(StoppedEarlyError) as stopped:
            plan = Say().run(pool, StepContext(writer.identity, 7, "0/say"), Tally("say"))
            engine(store, writer, stop=lambda: len(writer.asked) == 2).run(plan)
        assert (stopped.value.done, stopped.value.total) == (2, 3)
        engine(store, writer).run(Say().run(pool, StepContext(writer.identity, 7, "0/say"), Tally("say")))
    assert len(writer.asked) == 3


def test_an_answer_stands_after_its_prompt_whatever_else_the_writer_was_shown():
    prompt = pool_of("why")[0]
    reply = Sample(
        ({"role": "system", "content": "Be brief."}, *prompt.messages, {"role": "assistant", "content": "so"}),
        "m",
        (5, 0),
    )
    sample = with_answer(prompt, reply, extra=1)
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.response_ids == (5, 0) and sample.meta["extra"] == 1 and sample.parents == (prompt.id, reply.id)
    assert with_answer(prompt, reply, "thus").response_ids is None


def test_request_keys_of_the_new_kinds_differ_and_the_old_ones_stay():
    scene, messages = StepContext("m", 7, "0/x"), ({"role": "user", "content": "q"},)
    plain = scene.request(messages, Sampling())
    others = [
        scene.request(messages, Sampling(), 1), scene.request(messages, Sampling(stop=("\n",))), scene.request((), Sampling(), raw="q"),
        scene.request(messages, Sampling(presence_penalty=2.0)), scene.request(messages, Sampling(), against=(), contrast=0.5),
        scene.request(messages, Sampling(), against=(), contrast=0.25),
    ]  # fmt: skip
    assert len({request.key for request in (plain, *others)}) == 7
    assert plain.key == Request("m", messages, Sampling(), 7).key and set(plain.asked["sampling"]) == {
        "temperature",
        "top_p",
        "max_tokens",
    }


def test_samples_that_ask_different_things_are_different_prompts():
    one, two = pool_of("a", "b")
    same = [
        Sample((*one.messages, {"role": "assistant", "content": text}), "m", meta={"prompt_id": "p"})
        for text in ("x", "y")
    ]
    other = Sample(
        (*two.messages, {"role": "assistant", "content": "z"}),
        "m",
        meta={"prompt_id": "p", "task": "label", "weight": 2.0},
    )
    prompts, answers = prompts_of([*same, other, one])
    assert [prompt.text for prompt in prompts] == ["a", "b"] and prompts[0].id == "p" != prompts[1].id
    assert answers[prompts[0].id] == same and answers[prompts[1].id] == [other]
    assert (prompts[1].task, prompts[1].weight) == ("label", 2.0)
    turns = Sample(
        (*one.messages, {"role": "assistant", "content": "x"}, *two.messages, {"role": "assistant", "content": "y"}),
        "m",
    )
    (prompt,), _ = prompts_of([turns])
    assert prompt.messages == turns.messages[:-1]


@pytest.fixture
def saying(monkeypatch):
    monkeypatch.setitem(steps.STEPS, "say", Say)


def recipe_of(recipe_data, elicit, **changes):
    return parse(
        {
            **recipe_data,
            "elicit": elicit,
            "writer": [{"by": "elicited"}],
            "evaluate": {"metrics": ["fidelity"], "controls": []},
            **changes,
        }
    )


def test_a_recipe_with_steps_runs_to_its_report(recipe_data, saying, tmp_path):
    recipe = recipe_of(recipe_data, [{"say": {"n": 2}}], loss=["cross_entropy"])
    plan = check(recipe)
    folder = run(recipe, tmp_path / "run")
    samples = [json.loads(line) for line in (folder / "elicited.jsonl").read_text().splitlines()]
    account = json.loads((folder / "elicitation.json").read_text())
    (step,) = account["steps"]
    assert step["given"] == len(samples) and step["taken"] * 2 == sum(step["answers"].values()) <= plan.requests
    assert {record["writer"] for record in samples} == {account["writer"]} and all(
        record["response_ids"] for record in samples
    )
    assert "What say left out" in (folder / "report.html").read_text() or not step["dropped"]
    before = {name: (folder / name).read_bytes() for name in ("elicited.jsonl", "elicitation.json", "report.html")}
    run(recipe, folder)
    assert before == {name: (folder / name).read_bytes() for name in before}
    (folder / "elicited.jsonl").unlink()
    (folder / "elicitation.json").unlink()
    run(recipe, folder, stages=("elicit",))  # from the stored answers alone
    assert (folder / "elicited.jsonl").read_bytes() == before["elicited.jsonl"]


def test_a_held_out_prompt_is_never_trained_on(recipe_data, saying, tmp_path):
    recipe = recipe_of(recipe_data, ["say"])

    def elicitation(held_out):
        source = TextSource(recipe, steps.steps_of(recipe.elicit), prompts, held_out)
        return Elicitation(source, tmp_path, "backwards@1", lambda: None)

    from limbeck.elicit.prompts import Prompt

    prompts = [Prompt(str(n), text) for n, text in enumerate(("say one", "say two"))]
    with Store(tmp_path / "s.sqlite") as store:
        pool = elicitation([Prompt("h", "Say  TWO")]).run(engine(store, Backwards()))
        assert [prompt_of(sample) for sample in pool] == ["say one"]
        account = json.loads((tmp_path / "elicitation.json").read_text())
        assert account["steps"][-1]["dropped"] == {"asks a held-out prompt": 1}
        both = elicitation([Prompt("h", "say two"), Prompt("i", "say one")])
        assert both.finished() == pool, "finished samples stay under other held-out prompts"
        (tmp_path / "elicitation.json").unlink()
        with pytest.raises(UserError, match=r"left no sample.*held-out prompt \(2\)"):
            both.run(engine(store, Backwards()))


@pytest.mark.parametrize(
    ("elicit", "match"),
    [
        ([{"sayy": {}}], r"elicit\[0\]: there is no step 'sayy'; did you mean 'say'"),
        ([{"say": {"m": 2}}], r"elicit\[0\].say.m: unknown key"),
        ([{"say": {"n": 0}}], r"elicit\[0\].say.n: "),
        ([{"say": {}, "given": {}}], r"elicit\[0\]: give one step per list entry"),
    ],
)
def test_a_wrong_step_is_refused_with_its_place(recipe_data, saying, elicit, match):
    with pytest.raises(RecipeError, match=match):
        check(recipe_of(recipe_data, elicit))


def test_who_writes_must_fit_the_steps(recipe_data):
    with pytest.raises(RecipeError, match="`elicited` needs steps"):
        parse({**recipe_data, "writer": [{"by": "elicited"}]})
    with pytest.raises(RecipeError, match="by: elicited"):
        parse({**recipe_data, "elicit": ["given"], "writer": [{"by": "corpus"}]})
    assert [
        writer.by
        for writer in parse(
            {key: value for key, value in recipe_data.items() if key != "writer"} | {"elicit": ["given"]}
        ).writer
    ] == ["elicited"]


@pytest.mark.long
def test_a_served_teacher_writes_the_text_and_is_not_needed_again(recipe_data, saying, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", "sk-canary-4711")
    facts = {"id": "toy", "meta": {"n_params": 1}}
    with Scripted(lambda number, body: answer("the cat " + body["messages"][-1]["content"]), [facts]) as server:
        teacher = {"model": recipe_data["teacher"], "server": {"url": server.url, "name": "toy"}}
        recipe = recipe_of(recipe_data, ["say"], loss=["cross_entropy"], teacher=teacher)
        folder = run(recipe, tmp_path / "run")
        asked = len(server.seen)
    assert asked == len(server.bills) > 10
    samples = [json.loads(line) for line in (folder / "elicited.jsonl").read_text().splitlines()]
    assert all(
        sample["messages"][-1]["content"].startswith("the cat") and sample["response_ids"] is None for sample in samples
    )
    assert {sample["writer"] for sample in samples} == {json.loads((folder / "inputs.json").read_text())["server"]}
    assert "served:toy-" in samples[0]["writer"] and "sk-canary" not in "".join(
        f.read_text(errors="ignore") for f in folder.rglob("*") if f.is_file()
    )
    report = (folder / "report.html").read_bytes()
    assert b"written by toy on a server" in report
    run(recipe, folder)  # the server is gone, and nothing is asked of it
    assert (folder / "report.html").read_bytes() == report
    with Scripted(models=[facts | {"meta": {"n_params": 2}}]) as server:
        teacher["server"]["url"] = server.url
        other = recipe_of(recipe_data, ["say"], loss=["cross_entropy"], teacher=teacher)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(other.resolved()))
        (folder / "elicitation.json").unlink()
        (folder / "store.sqlite").unlink()
        with pytest.raises(UserError, match="give another --out"):
            run(other, folder, stages=("elicit",))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"elicit": ["contrastive"]}, r"elicit\[0\].contrastive: it writes against another prompt"),
        ({"teacher": {"server": {"url": "http://x/v1", "name": "m", "key": "sk-123"}}}, "teacher.server.key"),
    ],
)
def test_what_a_server_can_not_do_is_refused(recipe_data, changes, match):
    teacher = {
        "model": recipe_data["teacher"],
        "server": {"url": "http://127.0.0.1:1/v1", "name": "toy"},
    } | changes.pop("teacher", {})
    with pytest.raises(RecipeError, match=match):
        check(recipe_of(recipe_data, changes.get("elicit", ["given"]), teacher=teacher))


@pytest.mark.long
def test_recipes_that_elicit_other_text_are_compared_at_equal_steps(recipe_data, saying, tmp_path):
    made = [recipe_of(recipe_data, [{"say": {"n": n}}], loss=["cross_entropy"], name=f"say-{n}") for n in (1, 2)]
    folder = limbeck.compare(made, tmp_path / "cmp", seeds=1).folder
    found = json.loads((folder / "comparison.json").read_text())
    assert found["cost"]["say-1"]["steps"] == found["cost"]["say-2"]["steps"]
    given = [json.loads((folder / "runs" / f"say-{n}-s3" / "elicitation.json").read_text())["steps"][0] for n in (1, 2)]
    assert sum(given[1]["answers"].values()) == 2 * sum(given[0]["answers"].values())
    with sqlite3.connect(folder / "store.sqlite") as store:  # the first answer to each prompt is one question of both
        asked = [json.loads(request) for (request,) in store.execute("select request from answers")]
    assert sum(request["sampling"]["max_tokens"] == 8 for request in asked) == sum(given[1]["answers"].values())
