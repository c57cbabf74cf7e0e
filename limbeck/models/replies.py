"""What a model server's reply says: its answer and how that ended, its tokens, and a setting that it refuses.

Nothing that a server says is trusted: a shape that is not the protocol's is `malformed`, and so is text in which a
control token was left. Reasoning that stands beside an answer is put before it between `<think>` and `</think>`, as the
models write it themselves. A recipe may drop it, wherever it stands.
"""

from __future__ import annotations

import re
from typing import Any

from limbeck.config.server import Served
from limbeck.elicit.conversation import OPEN, answer_text
from limbeck.elicit.thinking import without_thinking
from limbeck.models.budget import Billed
from limbeck.models.dialects import OPENAI, Dialect, get
from limbeck.models.http import Reply, as_dict, as_dicts, without_key
from limbeck.models.told import keep
from limbeck.types import Finish, Generated, Request, UserError, has_text

NOT_PROCESSED = frozenset({429, 503, 529})  # 529: Anthropic's "overloaded"
REPEATABLE = frozenset({408, 409})  # the request's own fault otherwise
CONTROL_TOKEN = re.compile(r"<\|[a-z_]{2,32}\|>|<(?:start|end)_of_turn>")
MOST_TOKENS = 2**40  # that a bill may name
STORED_BYTES = 64 * 2**10  # of an answer that is not whole
# what may follow a model's name where it stands for one version: a date, a number of three digits or more, "latest"
VERSION = re.compile(r"[-@:](?:\d{3,}|\d{2,4}-\d{2}(?:-\d{2,4})?|latest)")
# how servers name a setting that they don't take, where the reply has no field for it
REFUSALS = (
    re.compile(r"[Uu]nsupported (?:parameter|value):? ['\"`](\w+)['\"`]"),
    re.compile(r"^['\"`](\w+)['\"`] (?:is (?:deprecated|not supported)|(?:and ['\"`]\w+['\"`] )?cannot)"),
)
BROKE = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance")
FILTERED = ("content_filter", "content_policy_violation")


def read_generated(
    reply: Reply, request: Request, served: Served, dialect: Dialect, *, named: int | None = None
) -> Generated:
    """The answer in a reply. Its `usage` is (0, 0) where the server does not say it.

    Args:
        named: how many tokens of each position are kept; None where none were asked for.

    Raises:
        UserError: another model answers.
    """
    if reply.status != 200:
        finish: Finish = "filtered" if is_filtered(reply) else "error"
        return Generated(None, "", finish, reply.text(STORED_BYTES))
    data = reply.json()
    usage = read_usage(data, dialect)
    text, finish = read_answer(
        data,
        served.answers_as or served.name,
        raw=request.raw is not None,
        max_tokens=request.sampling.max_tokens,
        usage=usage,
        dialect=dialect,
        keep_reasoning=served.reasoning != "drop",
    )
    raw = None if finish == "ok" else reply.text(STORED_BYTES)
    told = None
    whole = finish in ("ok", "length") and without_key(text, reply.key) == text  # what is cut out is kept nowhere
    if whole and named is not None and (said := dialect.read(as_dict(data), False)) is not None:
        told = keep(said.logprobs, named)
    name = get(data, dialect.answered_by)
    pinned = without_key(name, reply.key) if isinstance(name, str) and served.answers_as is None else None
    shown = without_key(text, reply.key)
    return Generated(None, shown, finish, raw=raw, usage=usage or (0, 0), told=told, answered_by=pinned)


def read_answer(
    data: Any,
    model: str,
    *,
    raw: bool,
    max_tokens: int,
    usage: tuple[int, int] | None,
    dialect: Dialect = OPENAI,
    keep_reasoning: bool = True,
) -> tuple[str, Finish]:
    """(text, how it finished) of a reply's one answer.

    A reply of the wrong shape is `malformed`, whatever it says; an answer of `max_tokens` tokens is `length`, even if
    it says "stop"; reasoning without an answer is `empty`.

    Args:
        raw: the reply is a completion's, not a chat's.
        usage: tokens read and written, where the server says them.
        keep_reasoning: whether reasoning, beside the answer or before it, is part of the text.

    Raises:
        UserError: another model answers.
    """
    said = dialect.read(as_dict(data), raw)
    if said is None:
        return "", "malformed"
    check_name(get(data, dialect.answered_by), model)
    if said.refusal:
        return said.refusal, "refused"
    finish = dialect.finishes.get(said.reason, "malformed") if isinstance(said.reason, str) else "malformed"
    answer = said.text if isinstance(said.text, str) else ""
    if finish in ("filtered", "refused"):
        return answer, finish
    if not keep_reasoning:
        answer = without_thinking(answer) or ""
    text = _with_reasoning(said.reasoning, answer) if keep_reasoning else answer
    if not isinstance(said.text, str) or finish == "malformed" or has_control_token(text):
        return text, "malformed"
    if finish == "length" or (usage is not None and usage[1] >= max_tokens):
        return text, "length"
    return text, "ok" if has_text(answer) else "empty"


def has_control_token(text: str) -> bool:
    """Whether the server left a mark of a template in its text. Pairs of <s> and </s> within a text are HTML."""
    begins, ends = text.count("<s>"), text.count("</s>")
    inner = text.strip()
    is_wrapped = begins == 1 and inner.startswith("<s>") and inner.endswith("</s>")
    return CONTROL_TOKEN.search(text) is not None or begins != ends or is_wrapped


def _with_reasoning(reasoning: str, answer: str) -> str:
    """The answer after its reasoning, which stays open where no answer follows it."""
    reasoning = reasoning.strip()
    if not reasoning:
        return answer
    if not answer.strip():
        return f"{OPEN}\n{reasoning}"
    message = {"role": "assistant", "content": answer.lstrip("\n"), "reasoning_content": reasoning}
    return answer_text(message, keep_reasoning=True)


def check_name(answered_by: Any, model: str) -> None:
    """Refuse the answer of another model. A server may name a version of the model, or leave its owner out.

    Raises:
        UserError: with the name that answers, and what to do about it.
    """
    if isinstance(answered_by, str) and answered_by and not is_same_model(answered_by, model):
        raise UserError(
            f"the server was asked for {model!r}, and {answered_by!r} answers: set teacher.server.name to the model"
            f" that you mean, or, if both are one, teacher.server.answers_as: {answered_by!r}"
        )


def is_same_model(answered_by: str, model: str) -> bool:
    """Whether two names are one, up to an owner or folder before it, a version after it, and case."""
    names = [name.casefold() for name in (answered_by, model)]
    if any("/" not in name for name in names):
        names = [name.rpartition("/")[2] for name in names]
    short, long = sorted((name.removesuffix("-latest") for name in names), key=len)
    return long.startswith(short) and (long == short or VERSION.fullmatch(long[len(short) :]) is not None)


def read_usage(data: Any, dialect: Dialect = OPENAI) -> tuple[int, int] | None:
    """(tokens read, tokens written) of a reply, None where it does not say both."""
    sums = []
    for places in (dialect.read_tokens, dialect.written_tokens):
        counts = [count for place in places if type(count := get(data, place)) is int]
        if not counts or not all(0 <= count < MOST_TOKENS for count in counts):
            return None
        sums.append(sum(counts))
    return sums[0], sums[1]


def refused_setting(reply: Reply) -> str | None:
    """The key of the body that a reply of status 400 or 422 says this model does not take; None where it says none."""
    if reply.status not in (400, 422):
        return None
    data = as_dict(reply.json())
    error = as_dict(data.get("error"))
    if error.get("code") in ("unsupported_parameter", "unsupported_value") and isinstance(error.get("param"), str):
        return str(error["param"])
    for detail in as_dicts(data.get("detail")):  # of servers that check requests with pydantic
        where = detail.get("loc")
        if detail.get("type") == "extra_forbidden" and isinstance(where, list) and where:
            return str(where[-1])
    matches = [match for pattern in REFUSALS if (match := pattern.search(reply.error_text()))]
    return matches[0][1] if matches else None


def lacks_money(reply: Reply) -> bool:
    """Whether the server refuses because nothing is left to pay it with."""
    return reply.status == 402 or (reply.status in (403, 429) and bool(_codes(reply) & set(BROKE)))


def is_filtered(reply: Reply) -> bool:
    """Whether the server's filter refused the prompt, as some do with status 400."""
    return reply.status in (400, 403) and bool(_codes(reply) & set(FILTERED))


def _codes(reply: Reply) -> set[str]:
    error = as_dict(as_dict(reply.json()).get("error"))
    return {value for key in ("code", "type") if isinstance(value := error.get(key), str)}


def is_refused(status: int) -> bool:
    """Whether the same request would be refused again."""
    return 300 <= status < 500 and status not in (*NOT_PROCESSED, *REPEATABLE)


def was_billed(reply: Reply) -> Billed:
    """Whether the try that this reply ended is paid for."""
    if reply.status == 200:
        return "yes"
    unprocessed = reply.status in NOT_PROCESSED or reply.failure == "no connection"
    return "no" if unprocessed or is_refused(reply.status) else "maybe"
