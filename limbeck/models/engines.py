"""What each kind of model server takes: one row per program or provider, read by `api.py` and shown in docs/signals.md.

The names come from the providers' references and issue threads, looked up in 2026. Confirmed against a program that ran
here: llama.cpp. Not confirmed by any reference that we found: whether the log-probabilities of openai, gemini, ollama
and of other compatible servers are those of the plain softmax at other temperatures than 1 (some providers scale them,
so such text must be drawn plainly); whether LM Studio checks a key; how many `top_logprobs` Ollama and SGLang give at
most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.config.server import Served
from limbeck.models import answer_forms as forms
from limbeck.models.answer_forms import Wording
from limbeck.models.dialects import ANTHROPIC, GEMINI, OPENAI, Dialect
from limbeck.models.http import Call, Connection, as_dict
from limbeck.types import AnswerForm

ALL = frozenset({"temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty"})
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
OPENAI_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}}
WORDS = {"schema": "a JSON schema", "labels": "one of some labels", "pattern": "a pattern"}
EFFORT = {"reasoning_effort": "low"}
# what leaves a server's own cuts and penalties out: else text drawn at temperature and top_p 1 is not the model's
NEUTRAL = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
LLAMA_NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}  # of templates that have the switch, as Qwen3's


@dataclass(frozen=True)
class EndpointKind:
    """One kind of server.

    Args:
        title: its name in words.
        url: an address of it, as a recipe names it.
        dialect: its protocol.
        limit: the key of the longest answer, where it is not the dialect's. Of a reasoning model it counts the
            reasoning, too.
        takes: which of our settings it takes. A `seed` that it does not take is left out; another one is refused.
        defaults: settings that are left out at these values, since they are its own and some models refuse them.
        neutral: what is sent beside our settings, under the recipe's options, so that nothing else shapes the text.
        key_header: the header of the key, and what stands before the key there.
        headers: what every request needs beside it.
        most_logprobs: the most likely tokens that it names with its text; 0 for none.
        plain_logprobs: whether their probabilities are those of the softmax at temperature 1, whatever is drawn.
        forms: how it is told the form of an answer (see `types.AnswerForm`), by the form's kind.
        schema, effort: options for an answer in a JSON schema, and for how long to reason; None where it has none.
        tools: whether it takes tools (answers that call one are no text, see `dialects.py`).
        probe: (path beside `/v1`, key of the reply) that only this program has.
    """

    title: str
    url: str
    dialect: Dialect = OPENAI
    limit: str | None = None
    takes: frozenset[str] = ALL
    defaults: Mapping[str, float] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    key_header: tuple[str, str] = ("Authorization", "Bearer ")
    headers: Mapping[str, str] = field(default_factory=dict)
    most_logprobs: int = 20
    plain_logprobs: bool = False
    forms: Mapping[str, Wording] = field(default_factory=lambda: {"schema": forms.response_format})
    schema: Mapping[str, Any] | None = field(default_factory=lambda: OPENAI_SCHEMA)
    effort: Mapping[str, Any] | None = field(default_factory=lambda: EFFORT)
    tools: bool = True
    probe: tuple[str, str] | None = None


ENGINES: dict[str, EndpointKind] = {
    "openai-compatible": EndpointKind(
        "any other server with OpenAI's protocol", "http://127.0.0.1:8080/v1", most_logprobs=1024
    ),
    "openai": EndpointKind(
        "OpenAI",
        "https://api.openai.com/v1",
        limit="max_completion_tokens",
        defaults={"temperature": 1.0, "top_p": 1.0},  # reasoning models refuse any other
    ),
    "vllm": EndpointKind(
        "vLLM",
        "http://127.0.0.1:8000/v1",
        neutral=NEUTRAL,
        plain_logprobs=True,  # unless it was started with another --logprobs-mode than raw_logprobs
        forms={"schema": forms.response_format, "labels": forms.vllm_choice, "pattern": forms.vllm_regex},
        effort=NO_THINKING,
        probe=("/version", "version"),
    ),
    "sglang": EndpointKind(
        "SGLang",
        "http://127.0.0.1:30000/v1",
        neutral=NEUTRAL,
        forms={"schema": forms.response_format, "labels": forms.sglang_regex, "pattern": forms.sglang_regex},
        effort=NO_THINKING,
        probe=("/get_server_info", "model_path"),
    ),
    "ollama": EndpointKind("Ollama", "http://127.0.0.1:11434/v1", probe=("/api/version", "version")),
    "lm-studio": EndpointKind(
        "LM Studio",
        "http://127.0.0.1:1234/v1",
        most_logprobs=0,  # its /v1/chat/completions answers without them
    ),
    "llama.cpp": EndpointKind(
        "llama.cpp",
        "http://127.0.0.1:8080/v1",
        neutral=LLAMA_NEUTRAL,
        most_logprobs=1024,
        plain_logprobs=True,
        forms={"schema": forms.response_format, "labels": forms.gbnf},
        effort=NO_THINKING,
        probe=("/props", "default_generation_settings"),
    ),
    "states": EndpointKind(
        "`limbeck serve --states`",
        "http://127.0.0.1:8090/v1",
        most_logprobs=0,
        forms={},
        schema=None,
        effort=None,
        tools=False,
        probe=("/v1/states", "fingerprint"),
    ),
    "anthropic": EndpointKind(
        "Anthropic (/v1/messages)",
        "https://api.anthropic.com/v1",
        ANTHROPIC,
        takes=frozenset({"temperature", "top_p", "max_tokens", "stop"}),
        defaults={"temperature": 1.0, "top_p": 1.0},  # newer models take only one of the two, the newest neither
        key_header=("x-api-key", ""),
        headers={"anthropic-version": "2023-06-01"},
        most_logprobs=0,
        forms={"schema": forms.output_config},
        schema={
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA | {"additionalProperties": False}}}
        },
        effort={"output_config": {"effort": "low"}},
    ),
    "gemini": EndpointKind(
        "Google (generateContent)",
        "https://generativelanguage.googleapis.com/v1beta",
        GEMINI,
        key_header=("x-goog-api-key", ""),
        forms={"schema": forms.response_json_schema, "labels": forms.gemini_enum},
        schema={"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}},
        effort={"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}},
    ),
}


def form_words(server: Served, form: AnswerForm) -> dict[str, Any] | str:
    """The keys of a request's body that hold this server to a form; or, as a text, why it can't be."""
    engine = ENGINES[server.kind]
    words = engine.forms[form.kind](form) if form.kind in engine.forms else None
    if words is None:
        what = "a schema that is not strict" if form.kind in engine.forms else WORDS[form.kind]
        return f"{engine.title} can't be held to {what}"
    if (key := forms.clash(server.options, words)) is not None:
        return f"teacher.server.options.{key} says the form already"
    return words


async def find_engine(connection: Connection) -> str | None:
    """Which of the programs that can be told apart this server is: a key of ENGINES, None where it is none of them."""
    for kind, engine in ENGINES.items():
        if engine.probe is not None and await is_engine(connection, engine):
            return kind
    return None


async def is_engine(connection: Connection, engine: EndpointKind) -> bool:
    """Whether the server answers this engine's probe."""
    if engine.probe is None:
        return False
    path, key = engine.probe
    reply = await connection.send(Call("GET", path, at_root=True))
    return reply.status == 200 and key in as_dict(reply.json())
