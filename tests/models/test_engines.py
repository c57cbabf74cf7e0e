"""Every kind of server in its own protocol, with replies in the shapes of the providers' references: what is asked of it, and what becomes of
answers, refusals, filters, cut-off answers and errors. Loopback servers play them; llama.cpp runs for real in tests/engines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from limbeck.config.recipe import load_recipe
from limbeck.config.server import OURS, Served, ServerKind
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.models.dialects import ANTHROPIC, GEMINI, OPENAI, merged
from limbeck.models.engines import ENGINES, find_engine
from limbeck.models.http import Reply
from limbeck.models.replies import read_answer, refused_setting
from limbeck.types import RecipeError, Sampling, UserError
from tests.scripted_server import MODEL, Handler, Scripted, answer

SECRET = "sk-canary-4711"
SAYS = {  # what each program says of itself
    "vllm": {"/version": {"version": "0.32.0"}},
    "sglang": {"/get_server_info": {"model_path": "m", "version": "0.5"}},
    "ollama": {"/api/version": {"version": "0.13.0"}},
    "llama.cpp": {"/props": {"default_generation_settings": {"n_ctx": 512}}},
    "states": {"/v1/states": {"fingerprint": "f"}},
    "anthropic": {"/v1/models?limit=1000": {"data": [{"type": "model", "id": MODEL}], "has_more": False}},
    "gemini": {"/v1/models?pageSize=1000": {"models": [{"name": f"models/{MODEL}"}]}},
}


class Engine(Scripted):
    """A server that also answers its kind's probe and lists its models in its kind's way."""

    def __init__(self, kind, script=lambda number, body: answer()):
        super().__init__(script)
        self.says, self.RequestHandlerClass = SAYS.get(kind, {}), EngineHandler


class EngineHandler(Handler):
    def do_GET(self):
        says = self.server.says | (
            {} if any("models" in path for path in self.server.says) else {"/v1/models": {"data": self.server.models}}
        )
        found = says.get(self.path)
        self.reply(404 if found is None else 200, json.dumps(found).encode())


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LIMBECK_API_KEY", SECRET)


class Waits:
    def __init__(self):
        self.pauses = []

    async def sleep(self, seconds):
        self.pauses.append(seconds)


def ask(server, kind, sampling=None, raw=None, count=1, **settings):
    """(answers, the teacher, how long it waited)."""
    waits = Waits()
    made = ApiTeacher(Served(url=server.url, name=MODEL, kind=kind, **settings), waits.sleep)
    scene = StepContext("served:toy", 7, "0/x")
    asked = [
        scene.request(
            ({"role": "system", "content": "be brief"}, user(f"question {n}")),
            sampling or Sampling(0.5, 0.9, 16),
            raw=raw,
        )
        for n in range(count)
    ]
    return [found for _, found in made.answers(asked)], made, waits.pauses


def claude(text="fine", reason="end_turn", **more):
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": f"{MODEL}-20260101",
        "content": [{"type": "text", "text": text}], "stop_reason": reason, "stop_sequence": None,
        "usage": {"input_tokens": 5, "cache_read_input_tokens": 2, "output_tokens": 3}, **more,
    }  # fmt: skip


def gemini(*parts, reason="STOP", **more):
    found = parts or ({"text": "fine"},)
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 3, "thoughtsTokenCount": 4, "totalTokenCount": 12}
    candidate = {"content": {"role": "model", "parts": list(found)}, "finishReason": reason, "index": 0}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": MODEL, **more}


FINE = {"anthropic": claude(), "gemini": gemini()}


def said(kind):
    return FINE.get(kind, answer())


# The table


def test_the_table_is_whole():
    assert set(ENGINES) == set(get_args(ServerKind))
    for kind, engine in ENGINES.items():
        assert "max_tokens" in engine.takes and set(engine.takes) <= set(engine.dialect.places), kind
        assert not set(engine.defaults) - engine.takes and (engine.most_logprobs > 0) <= (
            "top_logprobs" in engine.dialect.places
        ), kind
        assert engine.limit is None or engine.limit in OURS
        for example in (engine.schema, engine.effort):  # the options that the docs show are legal ones
            assert example is None or Served(url=engine.url, name="m", kind=kind, options=example).options == example


def test_no_option_stands_where_limbeck_writes():
    for dialect in (OPENAI, ANTHROPIC, GEMINI):
        body = dialect.frame([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
        ours = (
            {place.rpartition(".")[2] for place in dialect.places.values()} - {"logprobs"}
            | set(body)
            | set(dialect.always)
        )
        assert ours <= set(OURS), dialect.path
    for options, place in (
        ({"model": "x"}, "options.model"),
        ({"stream": True}, "options.stream"),
        ({"logprobs": True}, "options.logprobs"),
        ({"api_key": "x"}, "options.api_key can't be set here: keys come from the environment"),
        ({"generationConfig": {"temperature": 1}}, "options.generationConfig.temperature"),
        ({"a": {"b": None}}, "options.a.b has no value"),
        ({"a": [{"b": None}]}, "options.a.0.b has no value"),
    ):
        with pytest.raises(ValueError, match=place.replace(".", r"\.")):
            Served(url="http://x/v1", name="m", options=options)
    schema = {"response_format": {"json_schema": {"schema": {"properties": {"model": {}, "seed": {}}}}}}
    assert Served(url="http://x/v1", name="m", options=schema).options == schema  # names of a schema are its own
    with pytest.raises(ValueError, match="leave batch out"):
        Served(url="http://x/v1", name="m", kind="anthropic", batch=True)


@pytest.mark.parametrize("kind", ENGINES)
def test_each_kind_is_asked_in_its_own_words(kind):
    with Engine(kind, lambda number, body: said(kind)) as server:
        (found,), made, _ = ask(server, kind, options={"extra": {"deep": 1}})
        assert (found.text, found.finish) == ("fine", "ok") and made.identity.startswith("served:toy-")
        path, body, headers = server.seen[0]
        header, prefix = ENGINES[kind].key_header
        assert headers[header] == f"{prefix}{SECRET}" and body["extra"] == {"deep": 1}
        assert sum(SECRET in value for value in headers.values()) == 1
    if kind == "gemini":
        assert path == f"/v1/models/{MODEL}:generateContent" and "model" not in body and "stream" not in body
        assert body["systemInstruction"] == {"parts": [{"text": "be brief"}]}
        assert body["contents"] == [{"role": "user", "parts": [{"text": "question 0"}]}]
        config = body["generationConfig"]
        assert config.pop("seed") and config == {"temperature": 0.5, "topP": 0.9, "maxOutputTokens": 16}
        assert found.usage == (5, 7)  # thoughts are billed, too
    elif kind == "anthropic":
        assert path == "/v1/messages" and headers["anthropic-version"] == "2023-06-01" and "seed" not in body
        assert body["system"] == "be brief" and [message["role"] for message in body["messages"]] == ["user"]
        assert body["max_tokens"] == 16 and found.usage == (7, 3)
    else:
        assert path == "/v1/chat/completions" and [message["role"] for message in body["messages"]] == [
            "system",
            "user",
        ]
        limit = "max_completion_tokens" if kind == "openai" else "max_tokens"
        assert body[limit] == 16 and len({"max_tokens", "max_completion_tokens"} & set(body)) == 1 and body["seed"]
        assert body["stream"] is False and found.usage == (5, 3)


def test_what_a_provider_does_anyway_is_left_out():
    """Reasoning models refuse a temperature, even the one that they use."""
    for kind in ("openai", "anthropic"):
        with Engine(kind, lambda number, body, kind=kind: said(kind)) as server:
            ask(server, kind, Sampling(1.0, 1.0, 16))
            assert not {"temperature", "top_p"} & set(server.seen[0][1])
    with Engine("openai-compatible") as server:
        ask(server, "openai-compatible", Sampling(1.0, 1.0, 16))
        assert server.seen[0][1]["temperature"] == 1.0


def test_a_servers_own_cuts_and_penalties_are_left_out_of_the_text():
    """llama.cpp draws from the 40 likeliest tokens unless it is told not to, vLLM as the model's files say."""
    for kind, most in (("vllm", -1), ("sglang", -1), ("llama.cpp", 0)):
        with Engine(kind) as server:
            ask(server, kind, Sampling(1.0, 1.0, 16))
            ask(server, kind, Sampling(1.0, 1.0, 16, presence_penalty=1.5), options={"min_p": 0.1})
            plain, own = (body for _, body, _ in server.seen)
            assert (plain["top_k"], plain["min_p"], plain["presence_penalty"]) == (most, 0.0, 0.0)
            assert plain.get("repeat_penalty", plain.get("repetition_penalty")) == 1.0
            assert (own["top_k"], own["min_p"], own["presence_penalty"]) == (most, 0.1, 1.5), "the recipe's own win"
    with Engine("openai-compatible") as server:
        ask(server, "openai-compatible", Sampling(1.0, 1.0, 16))
        assert "top_k" not in server.seen[0][1]


def test_options_are_merged_into_parts_that_limbeck_writes_too():
    options = {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}
    with Engine("gemini", lambda number, body: gemini()) as server:
        ask(server, "gemini", options=options)
        config = server.seen[0][1]["generationConfig"]
        assert config["thinkingConfig"] == {"thinkingBudget": 0} and config["maxOutputTokens"] == 16
    assert merged({"a": {"x": 1, "y": 1}, "b": 1}, {"a": {"x": 2}, "b": {}}) == {"a": {"x": 2, "y": 1}, "b": {}}
    assert options == {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}


def test_a_setting_that_a_server_lacks_is_not_dropped():
    with Engine("anthropic", lambda number, body: claude()) as server:
        with pytest.raises(UserError, match="takes no presence_penalty"):
            ask(server, "anthropic", Sampling(0.5, 1.0, 16, presence_penalty=1.0))
        with pytest.raises(UserError, match="conversations only"):
            ask(server, "anthropic", raw="<|user|>")
        assert not server.seen


def test_the_example_in_the_docs_is_a_recipe(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "signals.md").read_text()
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "server:" in block]
    assert len(blocks) >= 2
    rest = "name: x\nstudent: {start: {pretrained: smollm2-135m-instruct}}\nprompts: {from: builtin/everyday}\nloss: [cross_entropy]\ntrain: {epochs: 1}\n"
    for block in blocks:
        lines = [
            line
            for line in rest.splitlines()
            if line.split(":")[0] + ":" not in block.split("\n", 1)[1] or line.startswith("name")
        ]
        (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n" + block)
        assert load_recipe(tmp_path / "recipe.yaml").teacher.server is not None


# What replies mean

ENDS = [
    ("openai", answer("", "stop", refusal="I can't"), ("I can't", "refused")),
    ("openai", answer(None, "content_filter"), ("", "filtered")),
    ("openai", answer("fi", "length"), ("fi", "length")),
    ("openai", answer([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]), ("fine", "ok")),
    ("openai", answer([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "fine"}]), ("<think>\nhm\n</think>\n\nfine", "ok")),
    ("openai", answer([{"type": "image_url", "image_url": {}}]), ("", "malformed")),
    ("openai", answer("fine", reasoning_content="hm\n"), ("<think>\nhm\n</think>\n\nfine", "ok")),
    ("openai", answer("\n\nfine", reasoning="hm"), ("<think>\nhm\n</think>\n\nfine", "ok")),
    ("openai", answer("<think>hm</think>fine", reasoning="hm"), ("<think>hm</think>fine", "ok")),
    ("openai", answer(None, reasoning_content="hm"), ("<think>\nhm", "empty")),
    ("openai", answer("", "length", reasoning_content="hm"), ("<think>\nhm", "length")),
    ("openai", answer("fine", "eos_token"), ("fine", "ok")),
    ("openai", answer("fine", None), ("fine", "malformed")),
    ("openai", answer("fine", "abort"), ("fine", "malformed")),
    ("openai", answer("<s>old</s> is struck"), ("<s>old</s> is struck", "ok")),
    ("openai", answer("fine</s>"), ("fine</s>", "malformed")),
    ("openai", answer("<s>fine</s>"), ("<s>fine</s>", "malformed")),
    ("openai", answer(None, "tool_calls", tool_calls=[{"id": "1"}]), ("", "malformed")),
    ("openai", {"id": "x", "model": MODEL, "choices": [], "usage": {}}, ("", "malformed")),
    ("openai", {"error": {"message": "upstream failed"}}, ("", "malformed")),
    ("anthropic", claude("I can't", "refusal"), ("I can't", "refused")),
    ("anthropic", claude("fi", "max_tokens"), ("fi", "length")),
    ("anthropic", claude("fi", "model_context_window_exceeded"), ("fi", "length")),
    ("anthropic", claude(content=[]), ("", "empty")),
    ("anthropic", claude(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fine"}]), ("<think>\nhm\n</think>\n\nfine", "ok")),
    ("anthropic", claude("", "tool_use", content=[{"type": "tool_use", "id": "1"}]), ("", "malformed")),
    ("anthropic", {"type": "error", "error": {"type": "api_error"}}, ("", "malformed")),
    ("anthropic", claude(content="fine"), ("", "malformed")),
    ("gemini", gemini(reason="SAFETY"), ("fine", "filtered")),
    ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": MODEL}, ("", "filtered")),
    ("gemini", gemini({"text": "fi"}, reason="MAX_TOKENS"), ("fi", "length")),
    ("gemini", gemini({"text": "hm", "thought": True}, {"text": "fi"}, {"text": "ne"}), ("<think>\nhm\n</think>\n\nfine", "ok")),
    ("gemini", gemini({"functionCall": {"name": "f"}}), ("", "malformed")),
    ("gemini", gemini(reason="MALFORMED_FUNCTION_CALL"), ("fine", "malformed")),
    ("gemini", {"candidates": [], "modelVersion": MODEL}, ("", "malformed")),
    ("gemini", gemini(reason=["STOP"]), ("fine", "malformed")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "reply", "expected"), ENDS, ids=lambda value: value if isinstance(value, str) else "")
def test_ends_of_answers(kind, reply, expected):
    with Engine(kind, lambda number, body: reply) as server:
        (found,), _, _ = ask(server, kind)
    assert (found.text, found.finish) == expected
    assert (found.raw is None) == (found.finish == "ok"), "what is no whole answer is kept for a look"


def test_reasoning_is_dropped_where_the_recipe_says_so():
    with Engine("openai", lambda number, body: answer("fine", reasoning_content="hm")) as server:
        (found,), made, _ = ask(server, "openai", reasoning="drop")
        assert (found.text, found.finish) == ("fine", "ok")
        kept = ApiTeacher(Served(url=server.url, name=MODEL, kind="openai"))
        assert made.identity != kept.identity, "an answer with its reasoning is another text"


@pytest.mark.parametrize(
    ("said", "finish", "found"),
    [
        ("<think>hm</think>\n\nfine", "stop", ("fine", "ok")),
        ("hm\n</think>\n\nfine", "stop", ("fine", "ok")),
        ("<think>hm", "stop", ("", "empty")),
        ("<think>hm", "length", ("", "length")),
        ("Write <think> first.", "stop", ("Write <think> first.", "ok")),
    ],
)
def test_reasoning_within_the_text_is_dropped_too(said, finish, found):
    asked = {"raw": False, "max_tokens": 9, "usage": None}
    assert read_answer(answer(said, finish), MODEL, **asked, keep_reasoning=False) == found
    assert read_answer(answer(said, finish), MODEL, **asked)[0] == said


NAMES = {  # (name in the recipe, name in the answer): whether they are one model
    ("toy", "toy"): True, ("toy", "org/toy"): True, ("org/toy", "toy"): True, ("models/flash-x", "flash-x"): True,
    ("gpt-4o", "gpt-4o-2024-08-06"): True, ("gpt-4", "gpt-4-0613"): True, ("claude-x", "claude-x-20250929"): True,
    ("claude-x-latest", "claude-x-20250929"): True, ("toy", "toy:latest"): True, ("flash", "flash-002"): True, ("Toy", "toy"): True,
    ("gpt-4o", "gpt-4o-mini"): False, ("gpt-4", "gpt-4o"): False, ("llama-3", "llama-3.1"): False, ("m", "served-name-0613"): False,
    ("a/toy", "b/toy"): False, ("qwen", "qwen-7b"): False, ("toy-2", "toy-20"): False,
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_another_model_that_answers_ends_the_run_by_its_name(names):
    name, answered_by = names
    with Scripted(lambda number, body: answer(model=answered_by), models=[{"id": name}]) as server:
        made = ApiTeacher(Served(url=server.url, name=name))
        asked = [StepContext("served:toy", 7, "0/x").request((user("question"),), Sampling(0.5, 0.9, 16))]
        if NAMES[names]:
            ((_, found),) = made.answers(asked)
            assert found.finish == "ok"
            return
        with pytest.raises(UserError, match=re.escape(f"asked for {name!r}, and {answered_by!r} answers")):
            list(made.answers(asked))
        allowed = ApiTeacher(Served(url=server.url, name=name, answers_as=answered_by))
        ((_, found),) = allowed.answers(asked)
        assert found.finish == "ok"


def test_a_bare_list_of_models_is_read_and_none_is_needed():
    class Listing(Handler):
        def do_GET(self):
            self.reply(self.server.says[0], json.dumps(self.server.says[1]).encode())

    with Scripted(lambda number, body: answer() if body["messages"] else ("status", 422)) as server:
        server.RequestHandlerClass = Listing
        names = []
        for server.says in ((200, [{"id": MODEL}]), (200, {"data": [{"id": MODEL}]}), (404, {}), (405, {})):
            names.append(ApiTeacher(Served(url=server.url, name=MODEL)).identity)
        assert len(set(names)) == 1
        server.says = (200, [{"id": "other"}])
        with pytest.raises(UserError, match="serves other, not 'toy'"):
            _ = ApiTeacher(Served(url=server.url, name=MODEL)).identity
        server.says, server.script = (404, {}), lambda number, body: ("status", 404)
        with pytest.raises(UserError, match="answers 404: check the address"):
            _ = ApiTeacher(Served(url=server.url, name=MODEL)).identity


def error(status, **body):
    return ("status", status, {}, json.dumps({"error": body}).encode())


def test_a_server_that_refuses_everything_ends_the_run_with_its_own_words():
    for reply, most, words in (
        (error(402, message="Insufficient Balance"), 4, "402: check what is left to pay.*Insufficient Balance"),
        (error(429, code="insufficient_quota", message="no quota"), 4, "429: check what is left to pay.*no quota"),
        (
            error(400, message="bad tools"),
            12,
            r"\d+ replies in a row that are no answers \(last: refusal, 400\).*bad tools",
        ),
        (answer("fine", None), 12, r"\d+ replies in a row that are no answers \(last: malformed"),
        (
            error(422, message="bad body"),
            12,
            r"\d+ replies in a row that are no answers \(last: refusal, 422\).*bad body",
        ),
    ):
        with Scripted(lambda number, body, reply=reply: reply) as server:
            with pytest.raises(UserError, match=words):
                ask(server, "openai-compatible", count=100)
            assert len(server.seen) <= most


def test_a_filter_that_refuses_a_prompt_is_no_failure():
    for status, code in ((400, "content_filter"), (400, "content_policy_violation"), (403, "content_filter")):
        filtered = error(status, code=code)
        with Scripted(lambda number, body, filtered=filtered: filtered if number % 2 else answer()) as server:
            found, _, _ = ask(server, "openai-compatible", count=40, concurrency=1)
        assert [one.finish for one in found] == ["ok", "filtered"] * 20


def unsupported(param, message, code="unsupported_parameter"):
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return ("status", 400, {}, json.dumps({"error": error}).encode())


O_SERIES = unsupported(
    "max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)  # fmt: skip


def test_a_reasoning_model_is_asked_again_with_the_other_limit_once():
    with Engine("x", lambda number, body: O_SERIES if "max_tokens" in body else answer()) as server:
        found, _, _ = ask(server, "openai-compatible", count=3, concurrency=1)
        assert [each.finish for each in found] == ["ok"] * 3
        limits = [sorted({"max_tokens", "max_completion_tokens"} & set(body)) for _, body, _ in server.seen]
        assert limits == [["max_tokens"]] + [["max_completion_tokens"]] * 3, "it is remembered"
        keys = [headers["Idempotency-Key"] for _, _, headers in server.seen]
        assert len(set(keys)) == 4, "another body is another request"
    with Engine("x", lambda number, body: O_SERIES) as server:  # it refuses both: asked twice, no more
        (found,), _, _ = ask(server, "openai-compatible")
        assert found.finish == "error" and len(server.seen) == 2
    old = unsupported("max_completion_tokens", "Unrecognized request argument supplied: max_completion_tokens")
    with Engine("openai", lambda number, body: answer() if "max_tokens" in body else old) as server:
        assert ask(server, "openai")[0][0].finish == "ok"


def test_a_server_without_seeds_is_asked_without():
    extra = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
    refusal = ("status", 422, {}, json.dumps(extra).encode())
    with Engine("x", lambda number, body: refusal if "seed" in body else answer()) as server:
        found, _, _ = ask(server, "openai-compatible", count=2, concurrency=1)
        assert [each.finish for each in found] == ["ok"] * 2 and len(server.seen) == 3


@pytest.mark.parametrize(
    ("kind", "reply", "options", "message"),
    [
        (
            "openai",
            unsupported("temperature", "'temperature' does not support 0.5 with this model", "unsupported_value"),
            {},
            "set them to 1",
        ),
        (
            "anthropic",
            ("status", 400, {}, b'{"type": "error", "error": {"type": "invalid_request_error", "message": "`temperature` and `top_p` cannot both be specified for this model. Please use only one."}}'),
            {},
            "only one of them",
        ),
        (
            "anthropic",
            ("status", 400, {}, b'{"type": "error", "error": {"type": "invalid_request_error", "message": "`temperature` is deprecated for this model."}}'),
            {},
            "set them to 1",
        ),
        (
            "openai",
            unsupported("reasoning_effort", "Unsupported parameter: 'reasoning_effort' is not supported"),
            {"reasoning_effort": "low"},
            "options.reasoning_effort: leave it out",
        ),
        (
            "openai",
            unsupported("response_format.json_schema", "Unsupported value", "unsupported_value"),
            {"response_format": {"type": "json_schema"}},
            "options.response_format: leave it out",
        ),
        ("gemini", ("status", 400, {}, b'{"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}}'), {}, "check the key"),
    ],
)  # fmt: skip
def test_what_would_befall_every_request_ends_the_run(kind, reply, options, message):
    with Engine(kind, lambda number, body: reply) as server, pytest.raises(UserError, match=message):
        ask(server, kind, options=options, count=5, concurrency=1)
    assert len(server.seen) == 1


def test_an_error_that_names_no_setting_is_this_requests_own():
    too_long = json.dumps({"error": {"message": "This model's maximum context length is 8 tokens", "code": None}})
    with Engine("x", lambda number, body: ("status", 400, {}, too_long.encode())) as server:
        (found,), _, _ = ask(server, "openai-compatible")
        assert found.finish == "error" and len(server.seen) == 1
    assert refused_setting(Reply(400, b"not json")) is None and refused_setting(Reply(500, O_SERIES[3])) is None


@pytest.mark.parametrize("kind", ["openai", "anthropic", "gemini"])
@pytest.mark.parametrize("status", [429, 503, 529])
def test_busy_servers_are_waited_for_as_they_ask(kind, status):
    script = lambda number, body: ("status", status, {"Retry-After": "9"}) if number < 2 else said(kind)  # noqa: E731
    with Engine(kind, script) as server:
        (found,), made, pauses = ask(server, kind)
        assert found.finish == "ok" and pauses == [9.0, 9.0] and made.spending.maybe_billed == 0


# Who it is


@pytest.mark.parametrize("kind", [kind for kind, engine in ENGINES.items() if engine.probe])
def test_programs_are_told_apart(kind):
    with Engine(kind) as server:
        made = ApiTeacher(Served(url=server.url, name=MODEL, kind=kind))
        assert made.identity and made.endpoint.run(find_engine) == kind
        for other in set(SAYS) & {name for name, engine in ENGINES.items() if engine.probe} - {kind}:
            with pytest.raises(UserError, match=r"correct teacher\.server\.kind"):
                _ = ApiTeacher(Served(url=server.url, name=MODEL, kind=other)).identity
    with Engine("nothing") as server:
        assert ApiTeacher(Served(url=server.url, name=MODEL)).endpoint.run(find_engine) is None


def test_kind_and_options_are_part_of_the_teacher_and_of_the_recipe(tmp_path):
    with Engine("vllm") as server:
        names = [
            ApiTeacher(Served(url=server.url, name=MODEL, **more)).identity
            for more in ({}, {"options": {}}, {"kind": "vllm"}, {"options": {"top_k": 5}}, {"options": {"top_k": 6}}, {"logprobs": 5})
        ]  # fmt: skip
    assert names[0] == names[1] and len(set(names)) == 5
    plain = load_recipe("api-top-logprobs")
    same = load_recipe("api-top-logprobs", ["teacher.server.kind=openai-compatible", "teacher.server.options={}"])
    assert plain.hash == same.hash and "kind" not in json.dumps(plain.resolved()["teacher"])
    hashes = {
        load_recipe("api-top-logprobs", [change]).hash
        for change in ("teacher.server.kind=vllm", "teacher.server.options={top_k: 5}", "teacher.server.options={top_k: 6}")
    }  # fmt: skip
    assert len(hashes | {plain.hash}) == 4
    with pytest.raises(RecipeError, match=r"teacher\.server.*did you mean 'llama.cpp'"):
        load_recipe("api-top-logprobs", ["teacher.server.kind=llamacpp"])
    with pytest.raises(RecipeError, match=r"teacher\.server\.kind"):
        load_recipe("api-top-logprobs", ["teacher.server.kind=grpc"])
