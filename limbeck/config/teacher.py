"""The sections of a recipe about its teacher: model or server, extra context, cache, other teachers, bridge."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model, model_validator

from limbeck.config.section import Section
from limbeck.config.sections import Dtype, Quantise
from limbeck.config.server import Served
from limbeck.types import RecipeError, nearest

FIELDS = ("prompt", "answer", "feedback")  # of a prompt's line, that a teacher can be shown
Together = Literal["mean", "least_cross_entropy", "uncertainty"]
Matching = Literal["strings", "edits"]


class Context(Section):
    """What the teacher sees and the student does not: a system message, another user message, or both. A server is
    sent it with every prompt.

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
    """What to compute once of the teacher and keep: exactly one of the three, or of `MORE_FORMS`.

    `folder` may be shared by runs; by default it is the run's `signals/`.
    """

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
        """What is kept, as plain data. Caches of the same form hold the same numbers."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"folder"})


MORE_FORMS: dict[str, type[Section]] = {}  # settings of forms from outside the package; `signals/forms.py` fills it


def _with_more_forms(settings: Any) -> Any:
    """The settings of a cache, which may also name one of `MORE_FORMS`."""
    if not MORE_FORMS or isinstance(settings, CacheSettings):
        return settings
    return _settings_of(tuple(MORE_FORMS.items())).model_validate(settings)


@cache
def _settings_of(forms: tuple[tuple[str, type[Section]], ...]) -> type[CacheSettings]:
    fields: Any = {name: (section | None, None) for name, section in forms}
    return create_model("CacheSettings", __base__=CacheSettings, **fields)


Cache = Annotated[SerializeAsAny[CacheSettings], BeforeValidator(_with_more_forms)]


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


class InProcess(Section):
    """How the weights of a teacher that runs here are kept: float32 by default, in a shorter `dtype`, or `quantise`d
    (embeddings and head stay in `dtype`); and the chat `template` of one that has none or several. All are part of its
    identity, and so of every answer and cache."""

    dtype: Dtype = None
    quantise: Quantise | None = None
    template: str | None = None


class LocalTeacher(InProcess):
    """A model whose weights are here. With a `server`, its text comes from there, and from the model here only what
    text can't say. With a `cache`, its distributions over the training text are computed once, and read by every epoch
    and every later run."""

    kind: Literal["local"] = "local"
    model: str
    server: Served | None = None
    cache: Cache | None = None
    context: Context | None = None

    REFUSES: ClassVar[dict[str, str]] = {}


class SelfTeacher(Section):
    """The student as its own teacher: its weights as they are at each step (`live`), or their moving `average`, which
    keeps `decay` of itself at every step. `model` is what both start from."""

    kind: Literal["self"] = "self"
    model: str
    weights: Literal["live", "average"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.95
    template: str | None = None
    server: None = None
    cache: None = None
    context: Context | None = None

    REFUSES: ClassVar[dict[str, str]] = {
        "server": "a server has the model's own weights, and this student teaches itself; leave server or weights out",
        "cache": "a teacher that changes is asked at every step; leave the cache out",
        "beside": "a student that teaches itself has no teachers beside it; leave beside or weights out",
        "bridge": "a student that teaches itself has its own tokens and needs no bridge; leave bridge or weights out",
        "dtype": "a student that teaches itself has its own weights: set train.precision, or leave dtype out",
        "quantise": "a student that teaches itself has its own weights; leave quantise out",
    }


class SeveralTeachers(InProcess):
    """Several models of the same tokens and template, whose distributions become one: the `mean` of all by weight, the
    one that finds a text likeliest (`least_cross_entropy`), or by the student's `uncertainty`: the large model's where
    the student is sure, the small one's, which stands in `beside`, where it is not."""

    kind: Literal["several"] = "several"
    model: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    beside: list[Other] = Field(default_factory=list)
    together: Together = "mean"
    server: Served | None = None
    cache: None = None
    context: Context | None = None

    REFUSES: ClassVar[dict[str, str]] = {
        "weights": "several teachers have their own weights; leave weights or beside out",
        "cache": "several teachers are asked at every step; leave the cache or beside out",
        "bridge": "only one teacher can be read over a bridge; leave bridge or beside out",
    }

    @model_validator(mode="after")
    def _two(self) -> SeveralTeachers:
        if not self.beside:
            raise ValueError("weight and together speak of several teachers: name others in beside, or leave those out")
        if self.together == "uncertainty" and (len(self.beside) != 1 or self.beside[0].only is not None):
            raise ValueError(
                "uncertainty moves between two teachers: name one small model beside the large one, without `only`"
            )
        return self


class BridgedTeacher(InProcess):
    """A model with other tokens or another template than the student's, read over a `bridge` at every step."""

    kind: Literal["bridged"] = "bridged"
    model: str
    bridge: BridgeSettings
    server: Served | None = None
    cache: None = None
    context: Context | None = None

    REFUSES: ClassVar[dict[str, str]] = {
        "weights": "a teacher read over a bridge has its own weights; leave weights or bridge out",
        "cache": "a teacher is read over a bridge at every step; leave the cache or bridge out",
        "beside": "only one teacher can be read over a bridge; leave beside or bridge out",
    }


class ServedTeacher(Section):
    """A model behind a server alone: it gives text, and its likeliest tokens where a `cache` keeps them, the server
    `names` them at every step, or gives them with its own text (`logprobs`); or its whole distribution, if the server
    gives hidden states (`limbeck serve --states`)."""

    kind: Literal["served"] = "served"
    model: None = None
    server: Served
    cache: Cache | None = None
    context: Context | None = None

    REFUSES: ClassVar[dict[str, str]] = {
        "dtype": "a server chooses the precision of its model; leave dtype out, and start the server with it",
        "quantise": "a server chooses the precision of its model; leave quantise out, and start the server with it",
        "template": "a server frames a conversation itself; set student.template, and start the server with the same",
        "weights": "a server has the model's own weights; leave weights out",
        "beside": "several teachers need weights that are here; name them in teacher.model",
        "bridge": "a bridge reads weights that are here; name them in teacher.model, or leave bridge out",
    }

    @model_validator(mode="after")
    def _tokens(self) -> ServedTeacher:
        cure = "or name the same model's weights in teacher.model"
        if self.cache is not None and self.cache.top_k is None and not self.gives_states:
            raise ValueError(
                "a server names its likeliest tokens at most: keep cache: {top_k: {k: 20}}, serve it with `limbeck"
                f" serve --states` (kind: states), {cure}"
            )
        if self.cache is not None and self.server.batch:
            raise ValueError(f"text is scored by requests of its own: leave server.batch or the cache out, {cure}")
        if self.cache is not None and self.server.names is not None:
            raise ValueError("what a cache keeps is asked for once; leave server.names or the cache out")
        if self.cache is not None and self.server.logprobs is not None:
            raise ValueError("log-probabilities of its own text are kept with the text; leave the cache out")
        return self

    @property
    def gives_states(self) -> bool:
        """Whether the server gives its hidden states, and so its whole distribution."""
        return self.server.kind == "states"

    @property
    def reads_given_text(self) -> bool:
        """Whether the server is asked what it says of given text."""
        return self.gives_states or self.named_tokens is not None

    @property
    def named_tokens(self) -> int | None:
        """How many likeliest tokens the server is asked for at each position of given text; None where it is not."""
        if self.gives_states:
            return None
        if self.cache is not None and self.cache.top_k is not None:
            return self.cache.top_k.k
        return self.server.names


def kind_of(teacher: Any) -> str:
    """The kind of a teacher as a recipe writes it: `kind`, or where that is left out, what its other keys imply."""
    if not isinstance(teacher, Mapping):
        return str(getattr(teacher, "kind", "local"))
    if "kind" in teacher:
        return str(teacher["kind"])
    if teacher.get("bridge") is not None:
        return "bridged"
    if teacher.get("weights", "own") != "own":
        return "self"
    if {"beside", "together", "weight"} & teacher.keys():
        return "several"
    return "served" if teacher.get("model") is None and teacher.get("server") is not None else "local"


TeacherSettings = LocalTeacher | SelfTeacher | SeveralTeachers | BridgedTeacher | ServedTeacher
# A kind from outside the package has these keys too: `kind` (without a default), model, server, cache, context.
TEACHER_KINDS: dict[str, type[Section]] = {
    "local": LocalTeacher,
    "self": SelfTeacher,
    "several": SeveralTeachers,
    "bridged": BridgedTeacher,
    "served": ServedTeacher,
}


# what a recipe could say of any teacher before there were kinds, and changed nothing
OLD_DEFAULTS: dict[str, Any] = {"weights": "own", "decay": 0.95, "weight": 1.0, "together": "mean", "beside": []}


def teacher_data(teacher: Any) -> Any:
    """A recipe's teacher as the data of its kind: a name stands for a local model, and a key of another kind is
    refused.

    Raises:
        RecipeError: a key that this kind of teacher does not have, with the reason and the cure.
    """
    if isinstance(teacher, str):
        return {"model": teacher}
    if not isinstance(teacher, Mapping):
        return teacher
    data = {key: value for key, value in teacher.items() if value is not None and value != OLD_DEFAULTS.get(key)}
    kind = kind_of(data)
    if kind not in TEACHER_KINDS:
        raise RecipeError("teacher.kind", f"{kind!r} is no kind of teacher{nearest(kind, TEACHER_KINDS)}")
    refused: dict[str, str] = getattr(TEACHER_KINDS[kind], "REFUSES", {})
    for key, reason in refused.items():
        if data.get(key) not in (None, []):
            raise RecipeError(f"teacher.{key}", reason)
    server = data.get("server")
    if kind != "served" and isinstance(server, Mapping) and server.get("logprobs") is not None:
        raise RecipeError(
            "teacher.server.logprobs",
            "weights that are here know more of the text than its server says; leave logprobs or teacher.model out",
        )
    if "model" not in data and "server" not in data:
        raise RecipeError("teacher", "name a model, a server that writes its text, or both")
    return data
