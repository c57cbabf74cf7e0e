"""What the teacher alone is shown (`teacher.context`, the prompt of a step): it writes with it, wherever it runs, and is
measured with it; the students are trained and measured without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.data.batches import make_batch
from limbeck.elicit.flow import StepContext, user
from limbeck.elicit.parse import Parsing
from limbeck.elicit.step_prompt import PLAIN, VARIES, StepPrompt, of_templates
from limbeck.models.api import ApiTeacher
from limbeck.models.batch import BatchTeacher
from limbeck.models.context import PromptContext, conversation_key
from limbeck.progress import Silent, StoppedError
from limbeck.runs.fit import prepared
from limbeck.runs.pipeline import run
from limbeck.runs.preflight import check
from limbeck.runs.resolve import resolve
from limbeck.runs.run import Run
from limbeck.storage.files import read_jsonl
from limbeck.storage.store import Store
from limbeck.types import RecipeError, Request, Sample, Sampling, UserError, content_hash
from tests.conftest import make_net, make_tokenizer
from tests.scoring_server import ScoringServer
from tests.scripted_server import Scripted, answer

RULES = "You sort messages. " + "Rule upon rule, as long as a page. " * 5
TASK = {
    "name": "sorting",
    "version": "1.0",
    "kind": "generation",
    "description": "d",
    "test": "test.jsonl",
    "metrics": ["pass_rate"],
}


def knows(number, body):
    """A server whose model answers rightly only with the rules before it."""
    first = body["messages"][0]
    told = first["role"] == "system" and first["content"].startswith(RULES)
    return answer("the cat sat" if told else "Hello! How can I help you?")


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "sorting"
    folder.mkdir()
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    items = [
        {"id": f"t{n}", "prompt": f"sort number {n}", "check": {"type": "contains", "all": ["cat"]}} for n in range(4)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(folder)


@pytest.fixture
def small(recipe_data, tiny_folder, task):
    """A recipe that is soon done, with a served teacher where a url is given."""

    def made(url=None, context=None, server=(), evaluate=(), **changes):
        teacher = {"server": {"url": url, "name": "toy", **dict(server)}} if url else {"model": recipe_data["teacher"]}
        data = {
            **recipe_data,
            "teacher": teacher | ({"context": context} if context else {}),
            "student": {"start": {"pretrained": str(tiny_folder)}},
            "prompts": recipe_data["prompts"] | {"limit": 6},
            "loss": ["cross_entropy"],
            "train": recipe_data["train"] | {"steps": 2},
            "evaluate": recipe_data["evaluate"]
            | {"metrics": ["fidelity", task], "controls": ["untouched"], "own_prompts": 1, "max_tokens": 4}
            | dict(evaluate),
        }
        return parse({**data, **changes})

    return made


def summary_of(folder):
    return json.loads((folder / "evaluation" / "summary.json").read_text())


def test_a_served_teacher_writes_and_is_measured_with_its_long_prompt(small, tmp_path):
    with Scripted(knows) as server:
        recipe = small(server.url, {"system": RULES}, evaluate={"controls": ["untouched", "prompted"]})
        with pytest.raises(StoppedError):
            run(recipe, tmp_path / "run", stop=lambda: len(server.seen) >= 3)
        assert 3 <= len(server.seen) < 10
        folder = run(recipe, tmp_path / "run")
        sent = [body["messages"] for _, body, _ in server.seen]
        asked = len(server.seen)
        assert run(recipe, folder) == folder and len(server.seen) == asked
        keys = {headers["Idempotency-Key"] for _, _, headers in server.seen}
    assert len(keys) == 6 + 2 * 2 + 4  # training prompts, held-out ones as text and greedily, the task's
    assert all(messages[0] == {"role": "system", "content": RULES} and len(messages) == 2 for messages in sent)
    found = summary_of(folder)
    assert found["systems"]["teacher"]["sorting/pass_rate"]["value"] == 1
    assert list(found["systems"]) == ["teacher", "untouched", "prompted", "student"]
    assert found["shown"]["teacher"] == {"teacher.context": {"system": RULES}}
    shown, plainly = (found["systems"][name]["perplexity"]["value"] for name in ("prompted", "untouched"))
    assert shown != plainly
    page = (folder / "report.html").read_text()
    assert "measured as it is used: the teacher with teacher.context, student and controls without" in page
    method = prepared(recipe)
    text = Run(method, folder, Silent()).text.training()
    assert len(text) == 6 and {m["role"] for sample in text for m in sample.messages} == {"user", "assistant"}
    assert "+sight-" in json.loads((folder / "inputs.json").read_text())["teacher"]


def test_what_was_sent_is_in_the_key_and_nothing_else_changes_it():
    plain, shown, other = (
        StepContext("m", 7, "0/x", show=show).request((user("q"),), Sampling())
        for show in (None, PromptContext("A"), PromptContext("B"))
    )
    assert plain.key == content_hash(
        {
            "model": "m",
            "messages": [user("q")],
            "seed": 7,
            "sampling": {name: getattr(Sampling(), name) for name in ("temperature", "top_p", "max_tokens")},
        }
    )
    assert len({plain.key, shown.key, other.key}) == 3 and shown.messages == plain.messages == (user("q"),)
    assert shown.conversation == ({"role": "system", "content": "A"}, user("q"))


@pytest.mark.parametrize("teacher", [ApiTeacher, BatchTeacher])
def test_a_rows_own_system_message_follows_the_teachers(teacher):
    own = ({"role": "system", "content": "Be kind."}, user("q"))
    request = StepContext("m", 7, "0/x", show=PromptContext("Rules.", "Q: {prompt}")).request(own, Sampling())
    body = teacher(Served(url="http://127.0.0.1:1/v1", name="toy"))._body(request)
    assert body["messages"] == [{"role": "system", "content": "Rules.\n\nBe kind."}, user("Q: q")]


@pytest.mark.long
def test_weights_beside_a_server_are_shown_the_same(small, tiny_folder, tmp_path):
    with Scripted(knows) as server:
        teacher = {
            "model": str(tiny_folder),
            "server": {"url": server.url, "name": "toy"},
            "context": {"system": RULES},
        }
        job = Run(prepared(small(teacher=teacher, loss=["forward_kl"])), tmp_path / "run", Silent())
        (tmp_path / "run").mkdir()
        samples = job.text.training()
        assert {sample.messages[-1]["content"] for sample in samples} == {"the cat sat"}
        rows = job.rows(samples, job.models.initial_student())
    assert all(len(row.teacher_prompt_ids) > len(row.prompt_ids) + 20 for row in rows)


@pytest.mark.long
def test_a_server_that_scores_reads_the_text_after_the_teachers_prompt(small, tiny, tmp_path):
    short = {"system": "count one two"}
    with ScoringServer(tiny, "vLLM") as server:
        recipe = small(server.url, short, {"names": 5}, loss=["forward_kl"], evaluate={"metrics": ["fidelity"]})
        folder = run(recipe, tmp_path / "run", stages=("elicit", "train"))
        scored = [
            body["prompt"]
            for path, body, _ in server.seen
            if path.endswith("/completions") and "prompt_logprobs" in body
        ]
    ids = PromptContext(**short)
    with_it = tiny.with_context(ids)
    job = Run(prepared(recipe), folder, Silent())
    starts = [tuple(with_it.prompt_ids(sample.messages[:-1])) for sample in job.text.training()]
    assert len(scored) >= 6 and all(
        any(tuple(text[: len(s)]) == s for s in starts) for text in scored if len(text) > 40
    )
    (row, *_) = job.rows(job.text.training(), tiny)
    assert make_batch([row]).seen_by_teacher().tokens_BT.shape[1] > len(row)


# Steps of elicitation


def test_held_out_text_and_tasks_are_asked_as_the_step_asks(small, tmp_path):
    """Held-out text without the system message was chat, and the teacher was measured at 0."""
    steps = {
        "elicit": [{"answer": {"system": RULES, "temperature": 0.0}}],
        "writer": [{"by": "elicited", "max_tokens": 8}],
    }
    with Scripted(knows) as server:
        folder = run(small(server.url, **steps), tmp_path / "run")
        sent = [body["messages"] for _, body, _ in server.seen]
    assert len(sent) == 6 + 2 * 2 + 4 and all(messages[0]["content"] == RULES for messages in sent)
    found = summary_of(folder)
    assert found["systems"]["teacher"]["sorting/pass_rate"]["value"] == 1
    assert found["shown"]["teacher"] == {"elicit": {"system": RULES}}
    assert "the teacher with the prompt of its step under elicit" in (folder / "report.html").read_text()


@pytest.mark.long
def test_a_teacher_in_process_is_measured_with_the_steps_prompt(small, tiny_folder, tmp_path):
    system = "count one two"
    with Scripted() as server:
        teacher = {"model": str(tiny_folder), "server": {"url": server.url, "name": "toy"}}
        steps = {"elicit": [{"answer": {"system": system}}], "writer": [{"by": "elicited", "max_tokens": 8}]}
        evaluate = {"metrics": ["fidelity"], "controls": ["untouched", "prompted"]}
        recipe = small(teacher=teacher, evaluate=evaluate, **steps)
        folder = run(recipe, tmp_path / "run")
    job = Run(prepared(recipe), folder, Silent())
    asked = job.models.reference.model.prompt_ids((user("why"),))
    assert asked == job.models.teacher.model.prompt_ids(({"role": "system", "content": system}, user("why")))
    assert all(len(row.teacher_prompt_ids) > len(row.prompt_ids) for row in job.encoding.held_out())
    systems = summary_of(folder)["systems"]
    assert systems["prompted"]["forward_kl"]["value"] == pytest.approx(0, abs=1e-5)  # the teacher's weights, its prompt
    assert systems["untouched"]["forward_kl"]["value"] > 1e-3


LABELS = Parsing(label=("yes", "no"))
TEXT = Parsing(text=True)


@pytest.mark.parametrize(
    ("template", "system", "asked"),
    [
        ("Sort: {{ prompt }}", None, (user("Sort: a {{b}} q"),)),
        (
            "{{prompt}}\n{{ labels | join(' or ') }}?\n",
            "S",
            ({"role": "system", "content": "S"}, user("a {{b}} q\nyes or no?")),
        ),
        ("{% if labels %}L{% endif %} {{ prompt }} {{ prompt }}", None, (user("L a {{b}} q a {{b}} q"),)),
        ("No prompt", None, (user("No prompt"),)),
        ("{{ prompt | upper }}", None, None),
        ("{% if '?' in prompt %}A{% endif %}{{ prompt }}", None, None),
        ("{% set x = prompt %}{{ x }}", None, None),
        ("{% filter upper %}{{ prompt }}{% endfilter %}", None, None),
        ("{{ prompt }} {{ answer }}", None, None),
        ("{{ prompt }}", "{{ kind }}", None),
        ("{{ prompt }}", "{{ prompt }}", None),
    ],
)
def test_a_template_that_only_prints_the_prompt_holds_for_any(template, system, asked):
    step = of_templates(template, system, ("yes", "no"), LABELS)
    if asked is None:
        assert step is VARIES
    else:
        assert step((user("before"), {"role": "assistant", "content": "x"}, user("a {{b}} q"))) == asked


def test_a_steps_system_message_replaces_the_conversations_own_where_tools_are_offered_too():
    """Tools stand first, so that the own one was left beside the step's."""
    tools, own = {"role": "tools", "content": "[]"}, {"role": "system", "content": "own"}
    shown = StepPrompt(system="S")((tools, own, user("q")))
    assert shown == StepPrompt(system="S")((tools, user("q"))) == ({"role": "system", "content": "S"}, tools, user("q"))


def test_what_the_teacher_is_shown_of_a_prompts_own_fields_holds_behind_a_step_too():
    """The fields were looked up by the conversation that the step had changed, and the message was left as it was."""
    talk = (user("q1"), {"role": "assistant", "content": "a1"}, user("q2"))
    context = PromptContext(None, "{prompt} It is {answer}.", {conversation_key(talk): {"answer": "42"}})
    for step, said in (
        (StepPrompt(system="Be brief."), "q2 It is 42."),
        (StepPrompt(pieces=("Say: ", "")), "Say: q2 It is 42."),
    ):
        assert replace(context, step=step)(talk)[-1] == user(said)


def test_a_reply_is_read_as_the_step_reads_it():
    def said(text, parse):
        reply = Sample((user("q"), {"role": "assistant", "content": text}), "m", (1, 2), meta={"finish": "ok"})
        return StepPrompt(pieces=("", ""), parse=parse).reads(reply)

    read = said("It is YES, surely.", LABELS)
    assert read.messages[-1]["content"] == "yes" and read.response_ids is None and read.teaches
    assert not said("yes or no", LABELS).teaches and said("yes", LABELS).response_ids == (1, 2)
    assert said("free", TEXT).messages[-1]["content"] == "free"


def test_which_step_counts(small):
    def found(elicit, writer=({"by": "elicited"},)):
        return resolve(small(elicit=elicit, writer=list(writer))).step_prompt

    ask = {"ask": {"prompt": "Say of {{ prompt }}"}}
    assert found([{"answer": {}}]) is None and found([{"answer": {"system": "S", "keep_system": True}}]) is None
    assert found([{"answer": {"system": "S"}}, "repetitive"]) == StepPrompt("S")
    assert found([{"answer": {"system": "S"}}, ask]).pieces == ("Say of ", "")
    assert found([{"answer": {"system": "S"}}, {"ask": {"prompt": "Kind?", "into": "kind"}}]) == StepPrompt("S")
    assert found(["explain"]) is VARIES and found(["rationale"]) is VARIES
    assert found([{"answer": {"system": "S"}}], ({"by": "teacher"},)) is None
    assert (
        found([{"answer": {"system": "S"}}], ({"by": "elicited", "share": 0.5}, {"by": "teacher", "share": 0.5}))
        is None
    )
    assert PLAIN.is_plain and not VARIES.is_plain


def test_prompted_is_refused_where_the_teacher_has_no_prompt(small):
    with pytest.raises(RecipeError, match=r"evaluate.controls: prompted .* give teacher.context"):
        check(small(evaluate={"controls": ["prompted"]}))


# Text alone


@pytest.fixture
def other_folder(tmp_path):
    """A model with other tokens than the tiny one."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<other>", "<tokens>"])
    make_net(seed=5, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_a_loss_on_text_alone_needs_no_common_tokens(small, other_folder, tmp_path):
    recipe = small(teacher={"model": other_folder, "context": {"system": "count one two"}})
    check(recipe)
    folder = run(recipe, tmp_path / "run")
    found = summary_of(folder)
    assert {"perplexity", "sorting/pass_rate"} <= set(found["systems"]["student"])
    assert "sorting/pass_rate" in found["systems"]["teacher"] and "forward_kl" not in found["systems"]["student"]
    assert sum("other tokens" in warning for warning in found["warnings"]) == 1
    assert "compared by their text" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match="different vocabularies") as refusal:
        check(small(teacher=other_folder, loss=["forward_kl"]))
    assert "bridge" in str(refusal.value)


def test_a_long_prompt_needs_room_in_the_teacher_alone(small, tiny, other_folder):
    long = {"system": "count " * 300}  # more than the student's context
    with Scripted(knows) as server:
        prepared(small(server.url, long))
        with pytest.raises(ValueError, match="more than the context"):
            prepared(small(server.url, long, {"names": 5}, loss=["forward_kl"]))


# Gold answers beside steps


@pytest.mark.long
def test_gold_answers_are_those_of_the_prompts_before_the_steps(small, prompt_file, tmp_path):
    lines = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    prompt_file.write_text("".join(json.dumps(line | {"answer": "one two three"}) + "\n" for line in lines))
    steps = [{"limit": {"count": 4}}, {"ask": {"prompt": "Other words: {{ prompt }}", "into": "prompt"}}, "explain"]
    evaluate = {"controls": ["gold_control"], "metrics": ["fidelity"]}
    with Scripted(lambda number, body: answer(f"words {number}")) as server:
        recipe = small(server.url, elicit=steps, writer=[{"by": "elicited"}], evaluate=evaluate)
        check(recipe)
        folder = run(recipe, tmp_path / "run")
    assert "gold_control" in summary_of(folder)["systems"]
    trained = read_jsonl(folder / "controls" / "gold_control" / "metrics.jsonl")
    assert len(trained) == len(read_jsonl(folder / "metrics.jsonl")) == 2
    assert summary_of(folder)["shown"] == {"teacher": "the plain prompt", "others": "the plain prompt"}
    assert "measured without what its step under elicit showed it" in (folder / "report.html").read_text()


def test_gold_and_too_few_answers_are_refused_before_anything_is_spent(small):
    for controls, match in ((["gold_control"], "gold_control needs an answer"), (["shuffled_control"], "at least two")):
        with pytest.raises(RecipeError, match=match):
            steps = {"elicit": [{"answer": {}}], "writer": [{"by": "elicited"}]} if "gold" in controls[0] else {}
            recipe = small(evaluate={"controls": controls}, **steps)
            check(recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"limit": 1})}))


def test_a_held_out_text_that_is_given_away_is_refused_before_the_training(small, tmp_path, prompt_file):
    with Scripted(lambda number, body: answer("count one two and a dog ran to the house and count one two")) as server:
        recipe = small(server.url)
        held_out = recipe.evaluate.prompts
        prompt = "please count one two three four five six seven eight nine ten"
        Path(held_out).write_text(json.dumps({"id": "h", "prompt": prompt}) + "\n")
        prompt_file.write_text(json.dumps({"id": "p", "prompt": f"Tell me: {prompt}"}) + "\n")
        with pytest.raises(ValueError, match="no held-out answer is left"):
            run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_answers_of_a_context_are_not_those_of_another(tmp_path):
    requests = [Request("m", (user("q"),), Sampling(), 1, shown=shown) for shown in (None, (user("x"),))]
    with Store(tmp_path / "store.sqlite") as store:
        for request, text in zip(requests, ("one", "two"), strict=True):
            store.record(request, Sample((*request.messages, {"role": "assistant", "content": text}), "m"), "ok")
        assert [store.answered(request).messages[-1]["content"] for request in requests] == ["one", "two"]


def test_held_out_text_is_held_to_the_form_of_the_step(small, tmp_path):
    schema = {
        "type": "object",
        "required": ["kind"],
        "additionalProperties": False,
        "properties": {"kind": {"enum": ["yes", "no"]}},
    }
    ask = {"prompt": "{{ prompt }} JSON:", "parse": {"json": schema}, "retries": 0, "max_tokens": 48}
    recipe = small(elicit=[{"ask": ask}], writer=[{"by": "elicited", "max_tokens": 48}])
    (tmp_path / "run").mkdir()
    held_out = Run(prepared(recipe), tmp_path / "run", Silent()).text.held_out()
    assert {sample.meta["finish"] for sample in held_out} == {"ok"}, "a random model writes no JSON by itself"
    assert all(json.loads(sample.messages[-1]["content"])["kind"] in ("yes", "no") for sample in held_out)
    free = resolve(small(elicit=[{"ask": ask | {"constrain": False}}], writer=[{"by": "elicited"}]))
    assert free.step_prompt.form is None
