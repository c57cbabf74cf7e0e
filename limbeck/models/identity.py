"""Which model a server serves: its name with a hash of what the server says of it, and what to check where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from limbeck.config.server import Served
from limbeck.models.dialects import OPENAI, Dialect
from limbeck.models.engines import ENGINES, EndpointKind, is_engine
from limbeck.models.http import Call, Connection, Reply, as_dict
from limbeck.models.replies import NOT_PROCESSED, REPEATABLE, lacks_money
from limbeck.types import UserError, content_hash, printable

# every request would get these; where to look
FATAL = {
    401: "the key",
    402: "what is left to pay the server with",
    403: "the key's rights",
    404: "the address and the model's name",
}
KEYS = (401, 403)
LOOK_SECONDS = 20.0  # for a server's list of models, which it has ready
# programs that name themselves in their list of models, by that name
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
UNLISTED = (404, 405, 501)  # what a server without a list of models answers when it is asked for one


class NoAnswerError(UserError):
    """A server that is not there, or fails."""


class Identity(NamedTuple):
    """Which model a server serves: its name with a hash of what the server says of it and of what is asked of it; the
    same on another port. `neutral` is sent with every request, as `EndpointKind` has it."""

    name: str
    neutral: Mapping[str, Any]


async def identify(settings: Served, engine: EndpointKind, connection: Connection) -> Identity:
    """Ask a server which model it serves.

    Raises:
        UserError: no such server, another kind of server, or no such model.
    """
    url, name = connection.endpoint.url, settings.name
    models = await _models(settings, engine, connection)
    if engine.probe is not None and not await is_engine(connection, engine):
        raise UserError(
            f"{url} is not {engine.title} ({engine.probe[0]} says nothing of it): correct teacher.server.kind,"
            f" {settings.kind!r}, or leave it out"
        )
    if name not in models:
        served = printable(", ".join(sorted(models)) or "no model")
        raise UserError(f"{url} serves {served}, not {name!r}: set teacher.server.name")
    meta = as_dict(models[name].get("meta"))
    sizes = {key: meta[key] for key in ("n_params", "size", "n_vocab") if isinstance(meta.get(key), int)}
    facts = [name, str(models[name].get("root", "")), sizes]
    chosen = {key: getattr(settings, key) for key in ("kind", "options", "logprobs")}
    if settings.reasoning is not None:
        chosen["reasoning"] = settings.reasoning
    defaults = {key: Served.model_fields[key].get_default(call_default_factory=True) for key in chosen}
    if chosen != defaults:  # left out before, so that old answers keep their keys
        facts.append(chosen)
    neutral = engine.neutral
    if settings.kind == "openai-compatible" and (owner := OWNERS.get(str(models[name].get("owned_by")))) is not None:
        neutral = ENGINES[owner].neutral
        facts.append({"neutral": owner})
    return Identity(f"served:{name}-{content_hash(facts)[:12]}", neutral)


async def identify_all(
    settings: Served, engine: EndpointKind, connection: Connection
) -> tuple[Identity, dict[str, str]]:
    """What `identify` says of all of a server's addresses, and which of them did not answer, and how.

    Raises:
        UserError: none answers, or they serve different models.
    """
    found: dict[str, Identity] = {}
    lost: dict[str, NoAnswerError] = {}
    for url in connection.endpoint.urls:
        try:
            found[url] = await identify(settings, engine, connection.at(url))
        except NoAnswerError as error:
            lost[url] = error
    if not found:
        raise next(iter(lost.values()))
    (first, identity), *others = found.items()
    for url, other in others:
        if other != identity:
            raise UserError(
                f"{first} serves {identity.name} and {url} {other.name}: the addresses of one server must serve the"
                " same model under one name, from one folder; start them alike, or leave one out of teacher.server.url"
            )
    return identity, {url: str(error) for url, error in lost.items()}


async def _models(settings: Served, engine: EndpointKind, connection: Connection) -> dict[str, dict[str, Any]]:
    """What the server says of its models, by their names; of one without a list, the name that the recipe gives."""
    url = connection.endpoint.url
    seconds = min(LOOK_SECONDS, connection.endpoint.timeout)
    reply = await connection.send(Call("GET", engine.dialect.models), seconds=seconds)
    if reply.failure:
        cure = "is there a network, and is the address right?" if url.startswith("https:") else "is the server running?"
        raise NoAnswerError(f"no answer from {url}: {reply.error}; {cure}")
    if reply.status == 200:
        return engine.dialect.listed(reply.json())
    if reply.status in UNLISTED and await _takes_requests(settings, engine, connection):
        return {settings.name: {}}
    kind = NoAnswerError if reply.status >= 500 else UserError
    raise kind(f"{url}/models answers {reply.status}: check {what_to_check(reply, settings, engine.dialect)}")


async def _takes_requests(settings: Served, engine: EndpointKind, connection: Connection) -> bool:
    """Whether there is a place for requests. An empty conversation is refused there, and costs nothing."""
    if engine.dialect is not OPENAI:
        return False
    body = {"model": settings.name, "messages": []}
    reply = await connection.send(Call("POST", engine.dialect.path, body))
    return reply.failure in ("", "broken connection") and reply.status not in (*FATAL, *UNLISTED)


def what_to_check(reply: Reply, settings: Served, dialect: Dialect) -> str:
    """What the user should look at after such a reply."""
    if 300 <= reply.status < 400:
        return "the address, which redirects elsewhere"
    if lacks_money(reply):
        return FATAL[402]
    wrong_key = is_bad_key(reply, dialect)
    where = FATAL[401] if wrong_key else FATAL.get(reply.status, "the server")
    if not wrong_key and reply.status not in KEYS:
        return where
    is_set = "which is set" if reply.key else "which is not set"
    return f"{where}, from the environment variable {settings.key}, {is_set}"


def is_bad_key(reply: Reply, dialect: Dialect) -> bool:
    """Whether the server refuses the key with a status that says less."""
    return reply.status == 400 and dialect.bad_key is not None and dialect.bad_key in reply.body


def is_answer(status: int) -> bool:
    """A whole answer, or the fault of this request alone, such as a prompt that is too long."""
    return status == 200 or (400 <= status < 500 and status not in (*NOT_PROCESSED, *FATAL, *REPEATABLE))
