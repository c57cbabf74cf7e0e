"""The sections of a recipe about its teacher: model or server, extra context, cache, other teachers, bridge."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.sections import Section

FIELDS = ("prompt", "answer", "feedback")  # of a prompt's line, that a teacher can be shown
Together = Literal["mean", "least_cross_entropy", "uncertainty"]
Matching = Literal["strings", "edits"]


class Context(Section):
    """What the teacher sees and the student does not: a system message, another user message, or both.

    In `user`, `{prompt}`, `{answer}` (the corpus's first one) and `{feedback}` are replaced by the fields of the
    prompt's line.
    """

    system: str | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _names(self) -> Context:
        if self.system is None and self.user is None:
            raise ValueError("give system, user, or both, such as {system: Answer in one short sentence.}")
        if self.user is not None and "{prompt}" not in self.user:
            raise ValueError("user must contain {prompt}, and may contain {answer} and {feedback}")
        for name in re.findall(r"\{([a-z]+)\}", self.user or ""):
            if name not in FIELDS and (close := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.6)):
                raise ValueError(f"{{{name}}} in user is not filled in; did you mean {{{close[0]}}}?")
        return self

    @property
    def reads(self) -> list[str]:
        """The fields of a prompt's line that it needs, besides the prompt."""
        return [name for name in ("answer", "feedback") if self.user is not None and f"{{{name}}}" in self.user]


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
    """An OpenAI-compatible server that writes the teacher's text.

    `url` is its address up to `/v1`, `name` the model's name there, `key` the environment variable with its key. Up to
    `concurrency` requests run at once; each may take `timeout` seconds and is retried `retries` times. With `batch`,
    requests use the server's batch interface: answers within a day, usually at half the price. With `names`, the server
    also gives this many top tokens at each position of every step's text, which the student may write.
    """

    url: str
    name: str
    key: str = Field(default="LIMBECK_API_KEY", pattern=r"^[A-Z][A-Z0-9_]*$")
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 300.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    batch: bool = False
    names: Annotated[int, Field(ge=1, le=65535)] | None = None
    price: Price | None = None
    limits: Limits = Limits()


class CachedHidden(Section):
    """Keep the last hidden states, and the head once: the whole distribution, exact in float32."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class CachedTop(Section):
    """Keep the top `k` tokens, or only the first ones that together reach `mass`, and the rest as one number.

    Log-probabilities are kept in `bits` bits, in even steps from 0 to the smallest at the position.
    """

    k: Annotated[int, Field(ge=1, le=65535)] = 256
    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    bits: Literal[8, 16] = 8


class CachedSamples(Section):
    """Keep tokens sampled at `temperature`, with weights that make their expectation the distribution
    (arXiv:2503.16870)."""

    draws: Annotated[int, Field(ge=1, le=65535)] = 50
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0


class CacheSettings(Section):
    """What to compute once of the teacher and keep: exactly one of the three.

    `folder` may be shared by runs; by default it is the run's `signals/`.
    """

    hidden: CachedHidden | None = None
    top_k: CachedTop | None = None
    sampled: CachedSamples | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one(self) -> CacheSettings:
        forms = [name for name in ("hidden", "top_k", "sampled") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(
                f"give exactly one of hidden, top_k, sampled, such as {{top_k: {{k: 64}}}}; got {forms or 'none'}"
            )
        return self

    @property
    def form(self) -> dict[str, Any]:
        """What is kept, as plain data. Caches of the same form hold the same numbers."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"folder"})


class Other(Section):
    """One more teacher with its weight. With `only`, it teaches the text with that tag, and teaches it alone."""

    model: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    only: str | None = None


class BridgeSettings(Section):
    """How to compare a teacher whose tokenizer differs from the student's.

    `match`: with `strings`, tokens with the same bytes are paired; with `edits`, a likely teacher token without a pair
    counts as the student token with the most similar spelling, and other unpaired tokens are ignored. `rest`: unpaired
    tokens are one outcome (`bucket`), or their `sorted` probabilities are compared as well. `spans`: if the two split a
    piece of text differently, the `chain` rule gives the probability of the student's first token; with `equal`, only
    identical tokens are compared. `others`: at all other positions, teach nothing (`skip`) or the text (`written`).
    """

    match: Matching = "strings"
    rest: Literal["bucket", "sorted"] = "bucket"
    spans: Literal["chain", "equal"] = "chain"
    others: Literal["skip", "written"] = "skip"

    @model_validator(mode="after")
    def _agree(self) -> BridgeSettings:
        if self.match == "edits" and (self.rest == "sorted" or self.spans == "chain"):
            raise ValueError(
                "match: edits has no rest and only compares equal spans: write {match: edits, spans: equal}"
            )
        return self


class TeacherSettings(Section):
    """Who teaches.

    `weights: own` are the model's. With `live` or `average` the student teaches itself: with its weights at the current
    step, or with a moving average that keeps `decay` of itself at every step. With a `server`, the text comes from
    there, and the model here is used for everything else; without a `model`, the text is all there is. With a `cache`,
    distributions over the training text are computed once and reused by every epoch and later run.

    `beside` lists other teachers with the same tokens and template. What is taught is then the weighted `mean` of all
    distributions, the distribution of the teacher that finds a text most likely (`least_cross_entropy`), or a mixture
    that moves from the large model to the small one beside it, the less certain the student is (`uncertainty`). A
    teacher with other tokens or another template than the student's needs a `bridge`.
    """

    model: str | None = None
    server: Served | None = None
    cache: CacheSettings | None = None
    context: Context | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    beside: list[Other] = Field(default_factory=list)
    together: Together = "mean"
    bridge: BridgeSettings | None = None
    weights: Literal["own", "live", "average"] = "own"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.95

    @model_validator(mode="after")
    def _someone(self) -> TeacherSettings:
        if self.model is None and self.server is None:
            raise ValueError("name a model, a server that writes its text, or both")
        return self

    @property
    def name(self) -> str:
        """The model, or its name on the server."""
        return self.model or (self.server.name if self.server is not None else "")
