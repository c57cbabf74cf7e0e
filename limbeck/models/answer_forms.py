"""How servers are told the form of an answer (`types.AnswerForm`), and what they can't be told.

What is sent: OpenAI's `response_format`, which most servers of its protocol read (vLLM, SGLang, llama.cpp, Ollama from
0.5, LM Studio); for labels and patterns vLLM's `structured_outputs` (0.11 on; `guided_*` before), SGLang's `regex`,
llama.cpp's `grammar`; Anthropic's `output_config`; Google's `responseJsonSchema` and `text/x.enum`. A bare label is no
JSON, so a server without a way to say "one of these texts" is not held to labels. Tried against a program: llama.cpp.
Servers answer 200 and drop what they don't know, so the step that asks counts answers that don't keep to their form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from limbeck.types import AnswerForm

Wording = Callable[[AnswerForm], dict[str, Any] | None]  # keys of a request's body; None where it can't say this form
# what strict schemas of OpenAI and Anthropic may have; both refuse others, or some of their values
STRICT = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs"}
    | {"title", "description"}
)


def response_format(form: AnswerForm) -> dict[str, Any]:
    """OpenAI's; strict where the schema qualifies, since OpenAI refuses other schemas as strict."""
    schema = json.loads(str(form.schema))
    named = {"name": "answer", "schema": schema} | ({"strict": True} if is_strict(schema) else {})
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def output_config(form: AnswerForm) -> dict[str, Any] | None:
    """Anthropic's, which refuses schemas that are not strict."""
    schema = json.loads(str(form.schema))
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}} if is_strict(schema) else None


def response_json_schema(form: AnswerForm) -> dict[str, Any]:
    schema = json.loads(str(form.schema))
    return {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": schema}}


def gemini_enum(form: AnswerForm) -> dict[str, Any]:
    schema = {"type": "STRING", "enum": list(form.labels or ())}
    return {"generationConfig": {"responseMimeType": "text/x.enum", "responseSchema": schema}}


def vllm_choice(form: AnswerForm) -> dict[str, Any]:
    return {"structured_outputs": {"choice": list(form.labels or ())}}


def vllm_regex(form: AnswerForm) -> dict[str, Any]:
    return {"structured_outputs": {"regex": form.pattern}}


def sglang_regex(form: AnswerForm) -> dict[str, Any]:
    return {"regex": form.pattern or "|".join(f"({re.escape(label)})" for label in form.labels or ())}


def gbnf(form: AnswerForm) -> dict[str, Any]:
    """llama.cpp's grammar of some labels."""
    return {"grammar": "root ::= " + " | ".join(_quoted(label) for label in form.labels or ())}


def _quoted(label: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(letter, letter) for letter in label) + '"'


def is_strict(schema: Any, root: bool = True) -> bool:
    """Whether a schema has only what strict modes take: an object at the root, and objects whose properties are all
    required and the only ones."""
    if not isinstance(schema, dict) or not schema.keys() <= STRICT or (root and schema.get("type") != "object"):
        return False
    kinds = schema.get("type")
    if "properties" in schema or "object" in (kinds if isinstance(kinds, list) else [kinds]):
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("required", ())) != set(schema.get("properties", {})):
            return False
    return all(is_strict(part, root=False) for part in _inner(schema))


def _inner(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("properties", "$defs"):
        yield from schema.get(key, {}).values()
    yield from schema.get("anyOf", ())
    if "items" in schema:
        yield schema["items"]


def clash(options: Mapping[str, Any], words: Mapping[str, Any], path: str = "") -> str | None:
    """The first key that both set, where they can't be merged; None without one."""
    for key, value in words.items():
        if key in options:
            theirs = options[key]
            if not (isinstance(theirs, dict) and isinstance(value, dict)):
                return f"{path}{key}"
            if (found := clash(theirs, value, f"{path}{key}.")) is not None:
                return found
    return None
