"""The sections of a recipe: their settings, defaults and ranges. How they fit together is checked in `recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from limbeck.config.section import Section
from limbeck.types import RecipeError

REWARDED = ("prompts", "group", "passes", "resample", "advantage")  # what only rewards need
Keep = Literal["importance", "block_influence", "uniform", "first"]


class Prune(Section):
    """Start as the teacher with only `layers` of its layers. `keep` says how to choose them, or lists them."""

    layers: Annotated[int, Field(ge=1)] | None = None
    keep: Keep | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "importance"
    calibration: Annotated[int, Field(ge=1)] = 6  # teacher answers for judging the layers

    @field_validator("keep", mode="before")
    @classmethod
    def _not_last(cls, keep: Any) -> Any:
        if keep == "last":
            raise ValueError("to drop the last layers, write keep: first")
        return keep

    @model_validator(mode="after")
    def _agree(self) -> Prune:
        if isinstance(self.keep, list):
            if self.keep != sorted(set(self.keep)):
                raise ValueError(f"keep must list layer numbers in rising order, each once; got {self.keep}")
            if self.layers not in (None, len(self.keep)):
                raise ValueError(f"layers is {self.layers}, but keep lists {len(self.keep)}; remove layers")
        elif self.layers is None:
            raise ValueError("layers is missing: how many layers should the student have?")
        return self


class Scratch(Section):
    """Start with random weights in the teacher's architecture, with these settings of its configuration replaced."""

    config: dict[str, int | float | bool] = Field(default={})


def _none_for_default(value: Any) -> Any:
    """float32 is the default, so saying it is saying nothing: both have the same hash."""
    return None if value == "float32" else value


def _none_for_keep(value: Any) -> Any:
    """What is so by default: saying it is saying nothing."""
    return None if value in ("keep", "last", "vocabulary") else value


Precision = Annotated[Literal["bfloat16"] | None, BeforeValidator(_none_for_default)]
Dtype = Annotated[Literal["bfloat16", "float16"] | None, BeforeValidator(_none_for_default)]
Quantise = Literal["int8", "int4"]


class Lora(Section):
    """Train low-rank adapters (arXiv:2106.09685) instead of all weights. They are merged on export.

    The frozen weights may be in bfloat16, or quantised (QLoRA, arXiv:2305.14314); the adapters stay in float32, and are
    merged into the weights as they were.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    base: Annotated[Literal["bfloat16"] | Quantise | None, BeforeValidator(_none_for_default)] = None


class Start(Section):
    """The student's initial weights: exactly one of the three."""

    pretrained: str | None = None
    prune: Prune | None = None
    scratch: Scratch | None = None

    @model_validator(mode="after")
    def _one(self) -> Start:
        starts = [name for name in ("pretrained", "prune", "scratch") if getattr(self, name) is not None]
        if len(starts) != 1:
            raise ValueError(f"give exactly one of pretrained, prune, scratch; got {starts or 'none'}")
        return self


class Student(Section):
    """The model to train; with `head: scalar` a reward model. `template` is its chat template where it has none or
    several: `chatml`, `alpaca`, `plain`, a name among its own, or a `.jinja` file."""

    start: Start
    lora: Lora | None = None
    head: Annotated[Literal["scalar"] | None, BeforeValidator(_none_for_keep)] = None
    template: str | None = None

    @model_validator(mode="after")
    def _own_template(self) -> Student:
        if self.template is not None and self.start.pretrained is None:
            raise ValueError("a student made of the teacher has its chat template: set teacher.template instead")
        return self

    @property
    def scores(self) -> bool:
        return self.head == "scalar"


class Prompts(Section):
    """`from` is `builtin/NAME`, or files (one, a list, or a pattern) whose rows hold a prompt or a conversation.

    `columns` names the column of a prompt, an answer, ... where the names of columns don't tell. `seed` is for drawing
    the text; by default it is the training's. Set it to vary the training on the same text. `too_long` says what
    happens to rows that are longer than the context or, in training, with their answer than `longest` tokens;
    `reasoning: drop` leaves out the thinking before answers.
    """

    source: str | Annotated[list[str], Field(min_length=1)] = Field(alias="from")
    columns: dict[str, str | None] | None = None
    too_long: Literal["drop", "cut"] | None = None
    longest: Annotated[int, Field(ge=1)] | None = None
    reasoning: Annotated[Literal["drop"] | None, BeforeValidator(_none_for_keep)] = None
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class Elicit(Section):
    """One elicitation step: its name and its settings (see `limbeck methods`)."""

    name: str
    params: dict[str, Any] = Field(default={})


class Writer(Section):
    """Who writes the text the student trains on, and how it is sampled.

    `untouched` is the student before training, `previous` that of the round before (in the first, `untouched`),
    `student` the student at the current step, `elicited` whoever answered in the steps of `elicit`. Shares add up to 1
    (each prompt goes to one writer), or are all 1 (each prompt goes to all writers, the preferred one first). The
    student's share may be a schedule; the others then share the rest.
    """

    by: Literal["teacher", "corpus", "elicited", "untouched", "previous", "student"]
    share: Annotated[float, Field(ge=0, le=1)] | dict[str, Any] = 1.0
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="before")
    @classmethod
    def _plain_sampling(cls, data: Any) -> Any:
        """By default, sample the student from its own distribution, unlike other writers."""
        return (
            {"temperature": 1.0, "top_p": 1.0} | data
            if isinstance(data, dict) and data.get("by") == "student"
            else data
        )

    @property
    def fixed_share(self) -> float:
        """The share; of a schedule, its start."""
        return float(self.share["from"] if isinstance(self.share, dict) else self.share)


class JointSettings(Section):
    """Teacher and student write one text together, token by token, in exactly one of two ways.

    With `teacher_share`, tokens are sampled from a mixture of both distributions in which the teacher has this weight
    (MiniLLM). With `teacher_top_k`, the student proposes each token, and the teacher's own token replaces it if it
    is not among the teacher's top k (speculative KD).
    """

    teacher_share: Annotated[float, Field(ge=0, le=1)] | None = None
    teacher_top_k: Annotated[int, Field(ge=1)] | None = None
    teacher_temperature: Annotated[float, Field(ge=0, le=10)] = 1.0

    @model_validator(mode="after")
    def _one(self) -> JointSettings:
        if (self.teacher_share is None) == (self.teacher_top_k is None):
            raise ValueError("give exactly one of teacher_share and teacher_top_k")
        if self.teacher_share is not None and self.teacher_temperature == 0:
            raise ValueError("a mixture needs the teacher's distribution; give a teacher_temperature above 0")
        return self


class Replay(Section):
    """Train again on the student's newest `size` answers. `fresh` is the probability that a step uses new text.

    It may be a schedule. Until the buffer is full, every step uses new text.
    """

    size: Annotated[int, Field(ge=1)] = 1000
    fresh: Annotated[float, Field(ge=0, le=1)] | dict[str, Any] = 0.5


class Validation(Section):
    """What an adaptive share depends on: the loss on `prompts` prompts kept out of training, `every` so many steps."""

    prompts: Annotated[int, Field(ge=1)] = 16
    every: Annotated[int, Field(ge=1)] = 10


class Server(Section):
    """A vLLM server that generates the student's text.

    `model` is the student's name on the server, `folder_there` the server's path of the run's `vllm/` folder.
    """

    vllm: str
    model: str | None = None
    folder_there: str | None = None


class RewardEntry(Section):
    """One reward: its name, its weight (below 0 for a penalty) and its parameters."""

    name: str
    weight: float = 1.0
    params: dict[str, Any] = Field(default={})


class Advantage(Section):
    """How the rewards of a step's answers become advantages. `baseline` is subtracted from a reward: the mean of the
    answers to the same prompt (`group`, GRPO), of the others among them (`others`, RLOO), of all of the step (`step`),
    or nothing (`none`). `scale` divides by the standard deviation in the group or in the step. `count: answers` gives
    every answer the same weight (GRPO), `tokens` every token (DAPO), `constant` divides the sum over an answer's tokens
    by max_tokens (Dr. GRPO).
    """

    baseline: Literal["group", "others", "step", "none"] = "group"
    scale: Literal["group", "step", "none"] = "group"
    count: Literal["answers", "tokens", "constant"] = "answers"


class Rollout(Section):
    """How the student writes while it trains.

    The writer is drawn `per` sample, or per batch (a whole step). Text for `ahead` steps is written at once, `rows`
    answers at a time, in process or `through` a server. With `dtype: bfloat16`, a copy of the student in that precision
    writes; it differs from the student by rounding, so the copy's log-probabilities are stored with the text. Left out,
    it is `train.precision`, unless a loss takes the student itself to be the one that wrote.

    With `rewards`, every step asks `prompts` prompts, each `group` times, and the rewards judge the answers; `passes`
    updates use the same answers. `resample` asks up to so many times as many prompts again, in the place of groups in
    which all answers have the same reward, which teach nothing.
    """

    per: Literal["sample", "batch"] = "sample"
    dtype: Literal["bfloat16", "float32"] | None = None
    through: Server | None = None
    ahead: Annotated[int, Field(ge=1)] = 1
    rows: Annotated[int, Field(ge=1)] = 64
    joint: JointSettings | None = None
    replay: Replay | None = None
    validation: Validation = Validation()
    rewards: Annotated[list[RewardEntry], Field(min_length=1)] | None = None
    prompts: Annotated[int, Field(ge=1)] | None = None
    group: Annotated[int, Field(ge=1, le=1024)] | None = None
    passes: Annotated[int, Field(ge=1, le=100)] | None = None
    resample: Annotated[int, Field(ge=1, le=20)] | None = None
    advantage: Advantage | None = None

    @model_validator(mode="after")
    def _rewarded(self) -> Rollout:
        given = [name for name in REWARDED if getattr(self, name) is not None]
        if self.rewards is None and given:
            raise ValueError(f"{given[0]} is for answers that rewards judge; add rewards, such as [check]")
        if self.rewards is not None and (self.prompts is None or self.group is None):
            raise ValueError("rewards need a size: how many prompts a step asks, and how often each (prompts, group)")
        return self


class LossEntry(Section):
    """One term of the loss: its name, its weight (a number or a schedule) and its parameters."""

    name: str
    weight: Annotated[float, Field(gt=0)] | dict[str, Any] = 1.0
    params: dict[str, Any] = Field(default={})


class Train(Section):
    """`steps` updates (or `epochs`) of about `tokens_per_step` response tokens each.

    The optimiser is AdamW, with warm-up and a cosine decay to `final_lr` x `lr`. With `mixup`, every micro-batch is
    followed by a copy whose embeddings are mixed with other rows of the step (MixKD, arXiv:2011.00593), with weights
    from Beta(mixup, mixup); losses with `only: mixed` see it. `precision: bfloat16` computes the student's passes in
    bfloat16; its weights, their gradients, the optimiser's moments and the losses stay in float32. `turns: all` trains
    on every turn of the assistant in a conversation, not on the last alone.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens_per_step: Annotated[int, Field(ge=1)] = 1024
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    clip: Annotated[float, Field(gt=0)] = 1.0
    mixup: Annotated[float, Field(gt=0, le=100)] | None = None
    precision: Precision = None
    turns: Annotated[Literal["all"] | None, BeforeValidator(_none_for_keep)] = None
    save_seconds: Annotated[float, Field(ge=0)] = 60.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Evaluate(Section):
    """What to measure: `fidelity` to the teacher, and tasks by name.

    `limit` bounds the held-out prompts. A task is measured whole, unless its own entry limits it, as in
    `metrics: [fidelity, {everyday: {limit: 60}}]`, which is kept as `limits`: {task: its first items}. Every system
    also writes its own text for the first `own_prompts` of the held-out prompts (by default OWN_PROMPTS). `untouched`
    is the student before training, `prompted` the same with the prompt that only the teacher is shown. The other
    controls are trained for as many steps and tokens as the student: `sft_control` on the teacher's text,
    `gold_control` on the prompts' own answers, `shuffled_control` on the teacher's answers shuffled over the prompts.
    `judge` is a model that compares the student's answers with every other system's. `speeds: false` measures no
    speeds, as on a machine that is busy with other work.
    """

    metrics: list[str] = Field(default=["fidelity"])
    prompts: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 96
    own_prompts: Annotated[int, Field(ge=1)] | None = None
    controls: list[str] = Field(default=["untouched", "sft_control"])  # names in training.controls.CONTROLS
    judge: str | None = None
    speeds: Annotated[Literal[False] | None, BeforeValidator(lambda value: None if value is True else value)] = None
    limits: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _entries(cls, data: Any) -> Any:
        """Take `{TASK: {limit: n}}` among the metrics apart."""
        if not isinstance(data, dict) or not isinstance(data.get("metrics"), list):
            return data
        names: list[Any] = []
        limits: dict[str, int] = {}
        for place, entry in enumerate(data["metrics"]):
            if isinstance(entry, dict):
                entry, limit = _limited(entry, f"evaluate.metrics[{place}]")
                if limits.get(entry, limit) != limit:
                    raise RecipeError(f"evaluate.metrics[{place}]", f"{entry} has two limits; leave one out")
                limits |= {entry: limit}
            names.append(entry)
        if not limits:
            return data
        given = data.get("limits")
        if given is not None and not isinstance(given, dict):
            return data
        return data | {"metrics": names, "limits": limits | (given or {})}

    @model_validator(mode="after")
    def _limits_are_of_tasks(self) -> Evaluate:
        for name in self.limits or {}:
            if name not in self.metrics or name == "fidelity":
                cure = "evaluate.limit bounds the held-out prompts" if name == "fidelity" else "list it in metrics"
                raise ValueError(f"limits: {name!r} is none of the tasks in metrics; {cure}")
        return self


def _limited(entry: dict[Any, Any], path: str) -> tuple[str, int]:
    """The task and the limit of `{TASK: {limit: n}}`."""
    name, settings = next(iter(entry.items()), (None, None))
    if len(entry) != 1 or not isinstance(name, str) or not isinstance(settings, dict) or set(settings) != {"limit"}:
        raise RecipeError(path, f"a task with a limit is written {{everyday: {{limit: 60}}}}; got {entry!r}")
    limit = settings["limit"]
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise RecipeError(f"{path}.{name}.limit", f"must be a whole number of items, 1 or more; got {limit!r}")
    if name == "fidelity":
        raise RecipeError(path, "fidelity is measured on the held-out prompts: evaluate.limit bounds them")
    return name, limit


def check_shares(writers: Sequence[Writer]) -> None:
    """Raise a ValueError that says which shares don't fit together (see `Writer`), and why."""
    if any(isinstance(writer.share, dict) or writer.share == 0 for writer in writers if writer.by != "student"):
        raise ValueError("only the student's share may be a schedule or 0; give the others a number above 0")
    shares = [writer.fixed_share for writer in writers if writer.by != "student"]
    own = [writer.share for writer in writers if writer.by == "student"]
    if len(own) > 1:
        raise ValueError("only one writer can be the student; merge them into one")
    is_schedule = bool(own) and isinstance(own[0], dict)
    rest = 1.0 - (0.0 if not own or isinstance(own[0], dict) else own[0])
    all_answer = all(share == 1 for share in shares) and not is_schedule and rest in (0.0, 1.0) and own != [0]
    takes_the_rest = bool(own) and own != [1] and shares == [1]
    if not all_answer and not takes_the_rest and abs(sum(shares) - rest) > 1e-9:
        raise ValueError(
            f"the writers' shares add up to {sum(shares) + 1 - rest:g}; they must add up to 1, or all be 1 so that"
            " every writer answers every prompt"
        )
