"""Ways in which model servers differ from OpenAI's own, and what becomes of them: one table, which
`tests/models/test_server_ways.py` plays row by row and `docs/generate.py` prints.

A way changes what a plain server replies to a chat, or what it lists. Its outcome is one of `OUTCOMES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[[int, dict[str, Any]], Any]
OUTCOMES = {
    "answer": "an answer",
    "thought": "an answer after its reasoning",
    "cut off": "an answer that was cut off, taught without an end",
    "left out": "left out, and counted on the page",
    "bad": "ends the run, unless `tolerate` allows for it; asked for again",
    "refused": "ends the run with the server's words",
    "checked": "refused by `check`",
}


@dataclass(frozen=True)
class Way:
    """What a server does in words, the outcome, the reply to request `number` with this body, and what it lists."""

    title: str
    outcome: str
    reply: Reply
    listed: tuple[int, Any] = field(default=(200, {"data": [{"id": "toy"}]}))


def said(content: Any = "fine", reason: Any = "stop", model: str = "toy", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
    return {"id": "x", "model": model, "choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def status(number: int, **error: str) -> Any:
    return ("status", number, {}, json.dumps({"error": error}).encode())


def _always(reply: Any) -> Reply:
    return lambda number, body: reply


def _once(reply: Any) -> Reply:
    return lambda number, body: reply if number == 1 else said()


def _without(key: str, refusal: Any) -> Reply:
    return lambda number, body: refusal if key in body else said()


def _without_bill() -> dict[str, Any]:
    return {key: value for key, value in said().items() if key != "usage"}


TEXT = {"type": "text", "text": "fine"}
EXTRA = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
WAYS = (
    Way("the text in parts", "answer", _always(said([TEXT]))),
    Way("reasoning beside the text (`reasoning_content`, `reasoning`)", "thought", _always(said(reasoning="hm"))),
    Way("reasoning as a part", "thought", _always(said([{"type": "thinking", "thinking": "hm"}, TEXT]))),
    Way("reasoning and no text", "left out", _always(said(None, reasoning_content="hm"))),
    Way("ends with `eos_token` or `eos`", "answer", _always(said(reason="eos_token"))),
    Way("ends with `length` or `model_length`", "cut off", _always(said(reason="model_length"))),
    Way("no reason to end, or an unknown one", "bad", _once(said(reason=None))),
    Way("`message.refusal`", "left out", _always(said(None, refusal="I can't"))),
    Way("ends with `content_filter`", "left out", _always(said(reason="content_filter"))),
    Way("400 with the code `content_filter`", "left out", _always(status(400, code="content_filter"))),
    Way("a control token left in the text", "bad", _once(said("fine<|im_end|>"))),
    Way("HTML such as `<s>old</s>` in the text", "answer", _always(said("<s>old</s> fine"))),
    Way("a call of a tool", "bad", _once(said(None, "tool_calls", tool_calls=[{"id": "1"}]))),
    Way("text beside a call of a tool", "bad", _once(said("fine", tool_calls=[{"id": "1"}]))),
    Way("nothing that can be seen (a space of no width)", "left out", _always(said("\u200b"))),
    Way("no `usage`", "answer", _always(_without_bill())),
    Way("answers as a version of the model, or without its owner", "answer", _always(said(model="org/toy-2026-01-01"))),
    Way("answers as another version than before", "refused", lambda number, body: said(model=f"toy-00{number // 9}")),
    Way("answers under another name", "refused", _always(said(model="another"))),
    Way(
        "`max_tokens` refused in favour of `max_completion_tokens`",
        "answer",
        _without("max_tokens", status(400, message="Unsupported parameter: 'max_tokens'")),
    ),
    Way("`seed` refused", "answer", _without("seed", ("status", 422, {}, json.dumps(EXTRA).encode()))),
    Way("no money left (402, or 429 with `insufficient_quota`)", "refused", _always(status(402, message="Balance"))),
    Way("every request refused alike (400, 422)", "refused", _always(status(400, message="bad tools"))),
    Way("every answer malformed", "refused", _always({"output": "fine"})),
    Way("one request of several refused", "bad", _once(status(400))),
    Way("busy now and then (429, 503)", "answer", lambda number, body: status(429) if number % 2 else said()),
    Way("models as a bare list", "answer", _always(said()), (200, [{"id": "toy"}])),
    Way(
        "no list of models",
        "answer",
        lambda number, body: said() if body["messages"] else status(422),
        (404, {"error": "not found"}),
    ),
    Way("a wrong address", "checked", _always(status(404)), (404, {"error": "not found"})),
    Way("another model than the recipe's", "checked", _always(said()), (200, {"data": [{"id": "another"}]})),
    Way("a wrong key", "checked", _always(status(401)), (401, {"error": {"message": "bad key"}})),
)
