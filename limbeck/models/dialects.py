"""How the protocols of model servers word a request for text and their reply: OpenAI's, Anthropic's and Google's.

What a reply says is judged in `replies.py`. The shapes follow the providers' published references; only llama.cpp's and
vLLM's servers, which speak OpenAI's protocol, were also tried for real.

Not covered: tools whose calls would be text to train on (an answer that calls one is `malformed`), images and sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from limbeck.elicit.conversation import REASONING
from limbeck.models.chat import for_server, uses_tools
from limbeck.models.http import as_dict, as_dicts
from limbeck.types import Finish, Message, UserError


class Said(NamedTuple):
    """What one reply says before it is judged: text, why it ended, a refusal in words, its tokens' `logprobs`, and the
    reasoning that stands beside the text."""

    text: Any
    reason: Any
    refusal: str = ""
    reasoning: str = ""
    logprobs: Any = None


# the types of parts that hold the reasoning of an answer
THOUGHTS = ("thinking", "reasoning")


@dataclass(frozen=True)
class Dialect:
    """One protocol.

    Args:
        path: where requests go; `{model}` stands for the model's name.
        raw_path: where text without a template goes to be continued; None where there is no such place.
        models: where the server lists its models, and `listed` their descriptions by name.
        frame: the conversation as the request's body has it.
        places: where each of our settings stands in the body, its keys joined by dots.
        always: what every body has.
        read: what a reply says; None where it has not exactly one answer.
        finishes: what its reasons to end mean; any other is `malformed`.
        read_tokens, written_tokens: where a reply counts the tokens read and written. The counts are added up.
        answered_by: where a reply names the model.
        bad_key: how a reply of status 400 says that the key is wrong.
    """

    path: str
    raw_path: str | None
    models: str
    listed: Callable[[Any], dict[str, dict[str, Any]]]
    frame: Callable[[Sequence[Message]], dict[str, Any]]
    places: Mapping[str, str]
    read: Callable[[dict[str, Any], bool], Said | None]
    finishes: Mapping[str, Finish]
    read_tokens: Sequence[str]
    written_tokens: Sequence[str]
    answered_by: str = "model"
    always: Mapping[str, Any] = field(default_factory=dict)
    bad_key: bytes | None = None


def put(body: dict[str, Any], place: str, value: Any) -> None:
    """Set a value at a place of a body."""
    *outer, last = place.split(".")
    for key in outer:
        body = body.setdefault(key, {})
    body[last] = value


def get(data: Any, place: str) -> Any:
    """The value at a place of a reply; None where there is none."""
    for key in place.split("."):
        data = as_dict(data).get(key)
    return data


def merged(options: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the body's keys, which win; parts that are objects in both are merged."""
    result = dict(options)
    for key, value in body.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


# OpenAI: /v1/chat/completions


def _openai_listed(data: Any) -> dict[str, dict[str, Any]]:
    models = data if isinstance(data, list) else as_dict(data).get("data")  # some servers give the bare list
    return {str(model.get("id")): model for model in as_dicts(models)}


def _openai_frame(messages: Sequence[Message]) -> dict[str, Any]:
    return for_server(messages)


def _openai_said(data: dict[str, Any], raw: bool) -> Said | None:
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    message = choices[0] if raw else choices[0].get("message")
    if not isinstance(message, dict):
        return None
    refusal = message.get("refusal")
    content = message.get("text" if raw else "content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    calls = bool(message.get("tool_calls") or message.get("function_call"))
    beside = next((text for key in REASONING if isinstance(text := message.get(key), str) and text.strip()), "")
    return Said(
        None if calls else _text_of(parts),  # what stands beside a call is no answer
        choices[0].get("finish_reason"),
        refusal if isinstance(refusal, str) and refusal.strip() else "",
        reasoning=beside or _reasoning_of(parts),
        logprobs=as_dict(choices[0].get("logprobs")).get("content"),
    )


def _text_of(parts: Sequence[Any]) -> str | None:
    """The text of a message's parts, without those that hold reasoning; None where a part is something else."""
    texts = [part for part in parts if not (isinstance(part, dict) and part.get("type") in THOUGHTS)]
    return _joined(texts) if len(as_dicts(texts)) == len(texts) else None


def _reasoning_of(parts: Any) -> str:
    """The text of the parts that hold reasoning: plain, or in parts again."""
    texts = []
    for part in as_dicts(parts):
        value = part.get(str(part.get("type"))) if part.get("type") in THOUGHTS else None
        texts.append(value if isinstance(value, str) else _joined(as_dicts(value)) or "")
    return "\n".join(text for text in texts if text.strip())


OPENAI = Dialect(
    path="/chat/completions",
    raw_path="/completions",
    models="/models",
    listed=_openai_listed,
    frame=_openai_frame,
    places={
        "model": "model",
        "temperature": "temperature",
        "top_p": "top_p",
        "max_tokens": "max_tokens",
        "seed": "seed",
        "stop": "stop",
        "presence_penalty": "presence_penalty",
        "logprobs": "logprobs",
        "top_logprobs": "top_logprobs",
    },
    always={"stream": False},
    read=_openai_said,
    finishes={  # OpenAI's three, and what other servers of the protocol say
        **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "ok"),
        **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
        **dict.fromkeys(("content_filter", "safety"), "filtered"),
    },
    read_tokens=("usage.prompt_tokens",),
    written_tokens=("usage.completion_tokens",),
)


# Anthropic: /v1/messages


def _anthropic_frame(messages: Sequence[Message]) -> dict[str, Any]:
    system, others = _system_apart(messages)
    return ({"system": system} if system else {}) | {"messages": others}


def _anthropic_said(data: dict[str, Any], _: bool) -> Said | None:
    content = data.get("content")
    if data.get("type") != "message" or not isinstance(content, list):
        return None
    blocks = [block for block in as_dicts(content) if block.get("type") not in (*THOUGHTS, "redacted_thinking")]
    return Said(_joined(blocks), data.get("stop_reason"), reasoning=_reasoning_of(content))


ANTHROPIC = Dialect(
    path="/messages",
    raw_path=None,
    models="/models?limit=1000",
    listed=_openai_listed,
    frame=_anthropic_frame,
    places={
        "model": "model",
        "temperature": "temperature",
        "top_p": "top_p",
        "max_tokens": "max_tokens",
        "stop": "stop_sequences",
    },
    always={"stream": False},
    read=_anthropic_said,
    finishes={
        "end_turn": "ok",
        "stop_sequence": "ok",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        "refusal": "refused",
    },
    read_tokens=("usage.input_tokens", "usage.cache_creation_input_tokens", "usage.cache_read_input_tokens"),
    written_tokens=("usage.output_tokens",),
)


# Google: models/NAME:generateContent


def _gemini_listed(data: Any) -> dict[str, dict[str, Any]]:
    models = as_dicts(as_dict(data).get("models"))
    return {str(model.get("name")).removeprefix("models/"): model for model in models}


def _gemini_frame(messages: Sequence[Message]) -> dict[str, Any]:
    system, others = _system_apart(messages)
    contents = [
        {
            "role": "model" if message["role"] == "assistant" else message["role"],
            "parts": [{"text": message["content"]}],
        }
        for message in others
    ]
    return ({"systemInstruction": {"parts": [{"text": system}]}} if system else {}) | {"contents": contents}


def _gemini_said(data: dict[str, Any], _: bool) -> Said | None:
    if get(data, "promptFeedback.blockReason") is not None and not data.get("candidates"):
        return Said("", "BLOCKED")  # the prompt was filtered, so there is no answer
    candidates = data.get("candidates")
    if not isinstance(candidates, list) or len(candidates) != 1 or not isinstance(candidates[0], dict):
        return None
    parts = as_dicts(as_dict(candidates[0].get("content")).get("parts"))
    return Said(
        _joined([part for part in parts if not part.get("thought")]),
        candidates[0].get("finishReason"),
        reasoning=_joined([part for part in parts if part.get("thought")]) or "",
        logprobs=_gemini_logprobs(candidates[0].get("logprobsResult")),
    )


def _gemini_logprobs(result: Any) -> list[dict[str, Any]] | None:
    """Google's two lists of tokens in OpenAI's shape; they have no bytes, so a token's text stands for them."""
    chosen = as_dicts(as_dict(result).get("chosenCandidates"))
    top = as_dicts(as_dict(result).get("topCandidates"))
    if not chosen or len(chosen) != len(top):
        return None
    return [
        _gemini_token(token) | {"top_logprobs": [_gemini_token(each) for each in as_dicts(named.get("candidates"))]}
        for token, named in zip(chosen, top, strict=True)
    ]


def _gemini_token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": token.get("token"), "logprob": token.get("logProbability")}


GEMINI = Dialect(
    path="/models/{model}:generateContent",
    raw_path=None,
    models="/models?pageSize=1000",
    listed=_gemini_listed,
    frame=_gemini_frame,
    places={
        "temperature": "generationConfig.temperature",
        "top_p": "generationConfig.topP",
        "max_tokens": "generationConfig.maxOutputTokens",
        "seed": "generationConfig.seed",
        "stop": "generationConfig.stopSequences",
        "presence_penalty": "generationConfig.presencePenalty",
        "logprobs": "generationConfig.responseLogprobs",
        "top_logprobs": "generationConfig.logprobs",
    },
    read=_gemini_said,
    finishes={
        "STOP": "ok",
        "MAX_TOKENS": "length",
        **dict.fromkeys(
            ("BLOCKED", "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"), "filtered"
        ),
    },
    read_tokens=("usageMetadata.promptTokenCount",),
    written_tokens=("usageMetadata.candidatesTokenCount", "usageMetadata.thoughtsTokenCount"),
    answered_by="modelVersion",
    bad_key=b"API_KEY_INVALID",
)


def _system_apart(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system messages as one text, and the others.

    Raises:
        UserError: a conversation with tools, which this protocol words otherwise.
    """
    if uses_tools(messages):
        raise UserError("tools go to servers of OpenAI's protocol only: use one, or leave those conversations out")
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    plain = [{key: message[key] for key in ("role", "content")} for message in messages]
    return system, [message for message in plain if message["role"] != "system"]


def _joined(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of all parts; None where one has none, such as a call of a function."""
    texts = [text for part in parts if isinstance(text := part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else None
