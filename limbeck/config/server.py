"""The section of a recipe about the server that writes the teacher's text: address, kind, options, limits, prices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from limbeck.config.keys import check_key
from limbeck.config.section import Section

ServerKind = Literal[
    "openai-compatible", "openai", "vllm", "sglang", "ollama", "lm-studio", "llama.cpp", "states", "anthropic", "gemini"
]
# keys of a request that are set from elsewhere, whatever the protocol; and where
_NAME = "teacher.server.name says it"
_TEXT = "the prompts are the conversation"
_DRAW = "the writer's settings say it"
_READING = "answers are read whole, one to a request"
_LOG_PROBS = "teacher.server.logprobs asks for them"
_KEY = "keys come from the environment, see teacher.server.key"
OURS: dict[str, str] = (
    dict.fromkeys(("model",), _NAME)
    | dict.fromkeys(("messages", "prompt", "input", "contents", "system", "systemInstruction"), _TEXT)
    | dict.fromkeys(("temperature", "top_p", "topP", "presence_penalty", "presencePenalty"), _DRAW)
    | dict.fromkeys(("max_tokens", "max_completion_tokens", "maxOutputTokens"), _DRAW)
    | dict.fromkeys(("stop", "stop_sequences", "stopSequences"), "the steps that need one set it")
    | dict.fromkeys(("seed",), "every request has its own, from its key")
    | dict.fromkeys(("stream", "stream_options", "n", "candidateCount", "best_of", "echo"), _READING)
    | dict.fromkeys(("logprobs", "top_logprobs", "responseLogprobs", "prompt_logprobs", "n_probs"), _LOG_PROBS)
    | dict.fromkeys(("key", "api_key", "apiKey", "authorization", "Authorization", "password"), _KEY)
)
# how much is asked at once, for how long and how much money: no answer depends on it, so it may change under a run
LIMITS_ALONE = (
    *("key", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "retries", "batch", "answers_as"),
    *("tolerate", "price", "limits"),
)
NESTED = ("generationConfig",)  # a part of a request in which keys of ours stand, too


def _addresses(url: Any) -> Any:
    """One address as a text, several as they are."""
    if not isinstance(url, list | tuple):
        return url
    plain = [address.rstrip("/") for address in url if isinstance(address, str)]
    if not plain or len(set(plain)) < len(url):
        raise ValueError(f"give one address, or several different ones; got {url!r}")
    return plain[0] if len(plain) == 1 else tuple(url)


class Price(Section):
    """The price of a million tokens read (`input`) and written (`output`), in any currency."""

    input: Annotated[float, Field(ge=0)] = 0.0
    output: Annotated[float, Field(ge=0)] = 0.0


class Limits(Section):
    """Hard limits: requests (retries count), tokens (read and written) and money (by the price)."""

    requests: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    money: Annotated[float, Field(gt=0)] | None = None


class Served(Section):
    """A server that writes the teacher's text.

    `url` is its address up to `/v1`, or a list of addresses that all serve the same model: each request goes to the one
    with the fewest under way, and one that fails is left alone for a while. `name` is the model's name there, `key` the
    environment variable with its key: `LIMBECK_...`, or a provider's own, which goes to that provider alone. `kind` is
    the program or the provider (`models/engines.py` has their table); `options` go into the body of every request as
    they are. Up to `concurrency` requests run at once at each address; each may take `timeout` seconds and is retried
    `retries` times. With `batch`, requests use the server's batch interface: answers within a day, usually at half the
    price. With `names`, the server also gives this many top tokens at each position of every step's text, which the
    student may write. With `logprobs`, it gives this many at each position of the text that it writes itself. The kind
    `states` gives its last hidden states and its head, so the whole distribution, in the `wire`'s type (the model's own
    if left out, which is exact).

    `answers_as` is the model's name in its answers, where that is another. Reasoning that comes beside an answer is
    taught before it; `reasoning: drop` leaves it out. No more than the share `tolerate` of the answers (rounded up)
    may fail or be malformed; those are not trained on. It is no part of the recipe's hash.
    """

    url: Annotated[str | tuple[str, ...], BeforeValidator(_addresses)]
    name: str
    kind: ServerKind = "openai-compatible"
    options: dict[str, JsonValue] = Field(default_factory=dict)
    key: str = Field(default="LIMBECK_API_KEY", pattern=r"^[A-Z][A-Z0-9_]*$")
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 300.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    batch: bool = False
    names: Annotated[int, Field(ge=1, le=65535)] | None = None
    logprobs: Annotated[int, Field(ge=1, le=1024)] | None = None
    wire: Literal["float32", "bfloat16"] | None = None
    answers_as: str | None = None
    reasoning: Literal["drop"] | None = None
    tolerate: Annotated[float, Field(ge=0, lt=1)] | None = None
    price: Price | None = None
    limits: Limits = Limits()

    @property
    def urls(self) -> tuple[str, ...]:
        """Its addresses, one or several."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @model_validator(mode="after")
    def _agree(self) -> Served:
        for url in self.urls:
            check_key(self.key, url)
        for path, key in _keys(self.options):
            if key in OURS:
                raise ValueError(f"options.{path} can't be set here: {OURS[key]}")
        if (unkept := _unkept("options", self.options)) is not None:
            raise ValueError(f"{unkept} has no value, and would not be kept: leave it out")
        if self.batch and len(self.urls) > 1:
            raise ValueError("batches are files of one provider: give url one address, or leave batch out")
        if self.batch and self.kind in ("anthropic", "gemini"):
            raise ValueError(f"batch speaks OpenAI's protocol, and {self.kind} has its own; leave batch out")
        if self.kind == "states" and (self.batch or self.names is not None or self.logprobs is not None):
            raise ValueError("a states server gives whole distributions: leave batch, names and logprobs out")
        if self.wire is not None and self.kind != "states":
            raise ValueError("wire is the type of hidden states: set kind: states, or leave it out")
        if self.names is not None and self.logprobs is not None:
            raise ValueError("names asks about any text, logprobs about the server's own; leave one of them out")
        return self


def _keys(options: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """(path, key) of every option that stands where keys of ours can stand."""
    for key, value in options.items():
        yield key, key
        if key in NESTED and isinstance(value, dict):
            yield from ((f"{key}.{inner}", inner) for inner in value)


def _unkept(path: str, value: JsonValue) -> str | None:
    """The path of a key that is null, which a recipe's data would lose; None without one."""
    parts = {**value} if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, inner in parts.items():
        if inner is None and isinstance(value, dict):
            return f"{path}.{key}"
        if (found := _unkept(f"{path}.{key}", inner)) is not None:
            return found
    return None
