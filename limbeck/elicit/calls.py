"""Tool calls in an answer, in the forms that families of models write them: data only, nothing is run.

JSON in <tool_call> tags (Qwen, Hermes), after [TOOL_CALLS] (Mistral), after <|python_tag|> and with `parameters`
(Llama 3), as OpenAI's message, in a fence or alone; [f(x=1)] (Llama 3.2 and 4, tool_code of Gemma); <function=f>
(Llama, Qwen-Coder), <arg_key> (GLM), <invoke> (Anthropic's style), channels (gpt-oss), DeepSeek's, Kimi's and
Cohere's tokens.
A call that is only talked about in a sentence ("I'd use height(n=7)") is none.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from limbeck.elicit.json_in import NotJSONError, fenced, read_json, same, values_in

Call = dict[str, Any]
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
MARKED = re.compile(r"\[TOOL_CALLS\]|<\|tool_call\|>|<\|START_ACTION\|>|functools(?=\[)")
MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]{1,128})\s*(?:\[CALL_ID\]\s*\w{1,64}\s*)?(?:\[ARGS\])?\s*(?=\{)")
CHANNEL = re.compile(r"<\|channel\|>[^<]{0,80}?to=([\w.-]{1,128})[^<]{0,80}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>")
DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s*([\w.-]{1,128})\s*(?:<｜tool▁sep｜>)?\s*(?:```json\s*)?"
)
KIMI = re.compile(r"<\|tool_call_begin\|>\s*([\w.-]{1,128})(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*")
FUNCTION = re.compile(r"<function=([\w.-]{1,128})>(.*?)(?:</function>|\Z)", re.DOTALL)
INVOKE = re.compile(r'<invoke name="([\w.-]{1,128})">(.*?)(?:</invoke>|\Z)', re.DOTALL)
PARAMETER = re.compile(r'<parameter(?:=| name=")([^">\n]{1,128})"?>(.*?)</parameter>', re.DOTALL)
GLM = re.compile(r"\s*([\w.-]{1,128})\s*(?=<arg_key>|\Z)")
GLM_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
PYTHON_TAG = "<|python_tag|>"
PYTHON_CHARS = 20_000
SPACES = ("functions.", "default_api.", "tools.")
WORDS = {"true": True, "false": False, "null": None}


class Untyped(str):
    """An argument that was written without its type, as XML does."""

    __slots__ = ()


def tool_calls(text: str) -> list[Call] | None:
    """The calls in an answer as {"name", "arguments"}; None if there are none, or some can't be read."""
    for read in (_named, _xml, _tagged, _marked, _pythonic, _bare):
        calls = read(text)
        if calls is not None:
            return calls if calls and all(map(is_call, calls)) else None
    return None


def is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return False
    return isinstance(call.get("arguments", {}), dict)


def same_argument(written: Any, allowed: Any) -> bool:
    """Whether an argument has this value; one that was written without a type may be of any."""
    if not isinstance(written, Untyped):
        return same(written, allowed)
    if isinstance(allowed, str):
        return same(str(written), allowed)
    try:
        return same(read_json(written.strip()), allowed)
    except NotJSONError:
        return written.strip() in ("True", "False", "None") and same(ast.literal_eval(written.strip()), allowed)


def _plain(call: Any) -> list[Any]:
    """The calls in a JSON value: one, a list of them, or a message that holds them."""
    if isinstance(call, list):
        return [each for entry in call for each in _plain(entry)]
    if not isinstance(call, dict):
        return [call]
    if isinstance(call.get("tool_calls"), list):
        return _plain(call["tool_calls"])
    if isinstance(call.get("function"), dict):
        return _plain(call["function"])
    name = call.get("name", call.get("tool_name", call.get("function")))
    arguments: Any = next((call[key] for key in ("arguments", "parameters", "args", "input") if key in call), {})
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except NotJSONError:
            return [call | {"name": None}]
    return [{"name": _bare_name(name), "arguments": {} if arguments is None else arguments}]


def _bare_name(name: Any) -> Any:
    for space in SPACES if isinstance(name, str) else ():
        name = name.removeprefix(space)
    return name


def _looks_like_call(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_looks_like_call, value))
    return isinstance(value, dict) and (
        isinstance(value.get("tool_calls"), list)
        or isinstance(value.get("function"), dict)
        or isinstance(value.get("name", value.get("tool_name", value.get("function"))), str)
    )


def _named(text: str) -> list[Call] | None:
    """Calls whose name stands before their arguments, with tokens between them."""
    for form in (CHANNEL, MISTRAL, DEEPSEEK, KIMI):
        calls: list[Call] = []
        for match in form.finditer(text):
            try:
                arguments, _ = json.JSONDecoder().raw_decode(text, match.end())
            except (ValueError, RecursionError):
                arguments = None
            calls.append({"name": _bare_name(match[1]), "arguments": arguments})
        if calls:
            return calls
    return None


def _xml(text: str) -> list[Call] | None:
    calls: list[Call] = []
    for form in (FUNCTION, INVOKE):
        for match in form.finditer(text):
            body = match[2].strip()
            arguments: Any = {name.strip(): Untyped(value.strip("\n")) for name, value in PARAMETER.findall(body)}
            if body.startswith("{"):
                try:
                    arguments = read_json(body)
                except NotJSONError:
                    arguments = None
            calls.append({"name": _bare_name(match[1]), "arguments": arguments})
    return calls or None


def _tagged(text: str) -> list[Any] | None:
    calls: list[Any] = []
    for body in TAGGED.findall(text):
        if body.lstrip()[:1] in ("{", "["):
            values = values_in(body)
            calls += _plain(values) if values else [None]
        else:
            name = GLM.match(body)
            pairs = {key.strip(): Untyped(value) for key, value in GLM_PAIR.findall(body)}
            calls.append({"name": name[1] if name else None, "arguments": pairs})
    return calls or None


def _marked(text: str) -> list[Any] | None:
    """JSON after a token that announces calls."""
    if PYTHON_TAG in text:
        text = text.rpartition(PYTHON_TAG)[2].strip()
        return _plain(values_in(text)) if text.startswith(("{", "[")) else _python(text)
    announced = MARKED.search(text)
    return _plain(values_in(text[announced.end() :])) if announced else None


def _pythonic(text: str) -> list[Any] | None:
    """A list of Python calls that stands at the beginning of a line, or a block of tool_code."""
    for language, block in fenced(text):
        if language == "tool_code":
            return _python(block.strip())
    body = next((block for language, block in fenced(text) if language in ("", "python")), text)
    at = re.search(r"^[ \t]*(?=\[\s*[A-Za-z_][\w.]{0,127}\()", body, re.MULTILINE)
    if at is None:
        return None
    rest = body[at.end() :].strip()
    calls = _python(rest)
    return calls if calls != [None] else _python(rest.partition("\n")[0])


def _python(text: str) -> list[Any] | None:
    """The calls of a Python expression; [None] where it is none, or an argument is no plain value."""
    try:
        parsed = ast.parse(text[:PYTHON_CHARS], mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [None]
    nodes = parsed.elts if isinstance(parsed, ast.List) else [parsed]
    calls: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and node.args:
            node = node.args[0]
        if not isinstance(node, ast.Call) or node.args:
            return [None]
        try:
            arguments = {str(word.arg): _literal(word.value) for word in node.keywords}
        except (ValueError, TypeError, RecursionError):
            return [None]
        calls.append({"name": _bare_name(ast.unparse(node.func).removesuffix(".call")), "arguments": arguments})
    return calls


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    return ast.literal_eval(node)


def _bare(text: str) -> list[Any] | None:
    """JSON in fences or between the lines."""
    found = [value for _, block in fenced(text) for value in values_in(block)] or values_in(text)
    calls = [value for value in found if _looks_like_call(value)]
    return _plain(calls) if calls else None
