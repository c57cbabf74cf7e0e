"""The sections of a recipe that say who teaches: the model or server, what it is shown, what of it is kept, and who
stands beside it."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.sections import Section

FIELDS = ("prompt", "answer", "feedback")  # what a teacher can be shown of a prompt's line
Together = Literal["mean", "least_cross_entropy", "uncertainty"]
Matching = Literal["strings", "edits"]


class Context(Section):
    """What the teacher sees beside the prompt and the student does not: a system message, the prompt in other words, or
    both.

    In `user`, `{prompt}`, `{answer}` (the corpus's first) and `{feedback}` stand for what the prompt's line holds.
    """

    system: str | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _names(self) -> Context:
        if self.system is None and self.user is None:
            raise ValueError("give system, user, or both, such as {system: Answer in one short sentence.}")
        if self.user is not None and "{prompt}" not in self.user:
            raise ValueError("user must hold {prompt}, and may hold {answer} and {feedback}")
        for name in re.findall(r"\{([a-z]+)\}", self.user or ""):
            if name not in FIELDS and (close := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.6)):
                raise ValueError(f"{{{name}}} in user is not filled in; did you mean {{{close[0]}}}?")
        return self

    @property
    def reads(self) -> list[str]:
        """The fields of a prompt's line that it needs beside the prompt."""
        return [name for name in ("answer", "feedback") if self.user is not None and f"{{{name}}}" in self.user]


class Price(Section):
    """Money per million tokens, read and written, in any currency."""

    input: Annotated[float, Field(ge=0)] = 0.0
    output: Annotated[float, Field(ge=0)] = 0.0


class Limits(Section):
    """Ceilings that are never passed: requests (tries count), tokens (read and written), money (by the price)."""

    requests: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    money: Annotated[float, Field(gt=0)] | None = None


class Served(Section):
    """An OpenAI-compatible server that writes the teacher's text: its address (up to `/v1`), the model's `name` there,
    and the environment variable that holds its key. `concurrency` requests are under way at once; one answer may take
    `timeout` seconds and be asked for `retries` times more. With `batch` the requests go through its batch interface:
    within a day, at half the price where there is one. It `names` so many of its likeliest tokens at each position of
    every step's text, which the student may write."""

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
    """Its last hidden states, with its head once: the whole distribution, exactly in float32."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class CachedTop(Section):
    """Its `k` likeliest tokens, or as few of them as together have `mass`, and what is left in one number. A
    log-probability is kept in `bits` bits, evenly from 0 to the smallest of its position."""

    k: Annotated[int, Field(ge=1, le=65535)] = 256
    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    bits: Literal[8, 16] = 8


class CachedSamples(Section):
    """Tokens drawn from its distribution at `temperature`, weighted so that their expectation is the distribution
    (arXiv:2503.16870)."""

    draws: Annotated[int, Field(ge=1, le=65535)] = 50
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0


class CacheSettings(Section):
    """What of the teacher is computed once and kept beside the text: exactly one of the three. `folder` is where, and
    may be shared by runs; left out, the run's `signals/`."""

    hidden: CachedHidden | None = None
    top_k: CachedTop | None = None
    sampled: CachedSamples | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one(self) -> CacheSettings:
        names = [name for name in type(self).model_fields if name != "folder"]
        chosen = [name for name in names if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(names)}, such as {{top_k: {{k: 64}}}}; got {chosen or 'none'}"
            )
        return self

    @property
    def chosen(self) -> tuple[str, Section]:
        """The form that is set: its name and its settings. `signals/forms.py` has the class of each."""
        return next((name, section) for name, section in self if isinstance(section, Section))

    @property
    def form(self) -> dict[str, Any]:
        """What is kept, as plain data: two caches of one form hold the same."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"folder"})


class Other(Section):
    """One more teacher, with its weight beside the others'; with `only` it teaches the text of that tag, and alone."""

    model: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    only: str | None = None


class BridgeSettings(Section):
    """How a teacher with other tokens than the student's is read. Tokens are paired by their bytes (`strings`; with
    `edits` a likely one without its like counts as the student's that is spelled most alike, and the rest is left out).
    `rest`: what has no pair is one outcome, or its `sorted` probabilities are compared besides. `spans`: where several
    tokens stand against others the `chain` rule tells the first one's probability, or only `equal` tokens are compared.
    `others`: elsewhere nothing is taught (`skip`), or the text."""

    match: Matching = "strings"
    rest: Literal["bucket", "sorted"] = "bucket"
    spans: Literal["chain", "equal"] = "chain"
    others: Literal["skip", "written"] = "skip"

    @model_validator(mode="after")
    def _agree(self) -> BridgeSettings:
        if self.match == "edits" and (self.rest == "sorted" or self.spans == "chain"):
            raise ValueError("match: edits leaves no rest and compares equal spans: write {match: edits, spans: equal}")
        return self


class TeacherSettings(Section):
    """Whose knowledge is taught. `weights: own` are the model's; the others are the student's, which then teaches
    itself: `live` (at this step), or their moving `average`, which keeps `decay` of itself at every step. With a
    `server` its text comes from there, and only what text can't say from the model here; without a `model`, its text is
    all there is. With a `cache` its distributions over the training text are computed once, and read by every epoch and
    every run after.

    With others `beside` it (same tokens and template), what is taught is the `mean` of all distributions by weight, the
    one that finds a text likeliest (`least_cross_entropy`), or the large model's where the student is sure and the
    small one's, which stands beside it, as far as it is not (`uncertainty`). A teacher with other tokens or another
    template than the student's needs a `bridge`.
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
        """What people call it."""
        return self.model or (self.server.name if self.server is not None else "")
