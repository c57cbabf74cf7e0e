"""The sections of a recipe: what can be set, its defaults and its ranges. How they fit together is `recipe`'s
business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Keep = Literal["importance", "block_influence", "uniform", "first"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prune(Section):
    """Start as the teacher with `layers` layers left; `keep` chooses them (or lists them: `keep: [0, 1, 29]`)."""

    layers: Annotated[int, Field(ge=1)] | None = None
    keep: Keep | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "importance"
    calibration: Annotated[int, Field(ge=1)] = 6  # teacher answers to judge layers on

    @field_validator("keep", mode="before")
    @classmethod
    def _not_last(cls, keep: Any) -> Any:
        if keep == "last":
            raise ValueError("to drop the last layers, keep the first: write keep: first")
        return keep

    @model_validator(mode="after")
    def _agree(self) -> Prune:
        if isinstance(self.keep, list):
            if self.keep != sorted(set(self.keep)):
                raise ValueError(f"keep must list rising layer numbers, each once; got {self.keep}")
            if self.layers not in (None, len(self.keep)):
                raise ValueError(f"layers is {self.layers}, but keep lists {len(self.keep)}; leave layers out")
        elif self.layers is None:
            raise ValueError("layers is missing: how many layers should the student have?")
        return self


class Scratch(Section):
    """Start from random weights in the teacher's shape, with these settings of its configuration replaced."""

    config: dict[str, int | float | bool] = {}


class Lora(Section):
    """Train low-rank adapters (arXiv:2106.09685) instead of all weights; they are merged on export."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32


class Start(Section):
    """How the student begins: exactly one of the three."""

    pretrained: str | None = None
    prune: Prune | None = None
    scratch: Scratch | None = None

    @model_validator(mode="after")
    def _one(self) -> Start:
        given = [name for name in ("pretrained", "prune", "scratch") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of pretrained, prune, scratch; got {given or 'none'}")
        return self


class Student(Section):
    start: Start
    lora: Lora | None = None


class Prompts(Section):
    """`from` is `builtin/NAME` or a JSONL file with a `prompt` (and, for a corpus, an `answer`) on every line.

    `seed` draws the text; left out, it is the training's. With a seed of its own the text stays while the training
    varies.
    """

    source: str = Field(alias="from")
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class Elicit(Section):
    """One step of the elicitation: its name and its own settings (see `limbeck methods`)."""

    name: str
    params: dict[str, Any] = {}


class Writer(Section):
    """Who writes the text the student trains on, and how it is drawn. `untouched` is the student before training,
    `student` the student at this step, `elicited` whoever answered in the steps of `elicit`.

    Shares add up to 1 (each prompt goes to one writer), or are all 1 (each prompt goes to all, the preferred writer
    first). The student's may be a schedule; the others then share the rest.
    """

    by: Literal["teacher", "corpus", "elicited", "untouched", "student"]
    share: Annotated[float, Field(ge=0, le=1)] | dict[str, Any] = 1.0
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="before")
    @classmethod
    def _as_it_is(cls, data: Any) -> Any:
        """The student's text is drawn from the student as it is: any other draw is another writer's."""
        return (
            {"temperature": 1.0, "top_p": 1.0} | data
            if isinstance(data, dict) and data.get("by") == "student"
            else data
        )

    @property
    def fixed_share(self) -> float:
        """Its share where that is a number; of a schedule, what it starts with."""
        return float(self.share["from"] if isinstance(self.share, dict) else self.share)


class JointSettings(Section):
    """Two models write one text, token by token: exactly one of a mixture of both distributions in which the teacher
    has `teacher_share` (MiniLLM), and the student's tokens as long as they are among the teacher's `teacher_top_k`
    likeliest, else the teacher's own (speculative KD)."""

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
    """Text of the student that is read again: the newest `size` answers. A step takes `fresh` text with that
    probability, which may be a schedule, and always until the buffer is full."""

    size: Annotated[int, Field(ge=1)] = 1000
    fresh: Annotated[float, Field(ge=0, le=1)] | dict[str, Any] = 0.5


class Validation(Section):
    """What an adaptive share watches: the loss on this many prompts, taken out of the training, every so many steps."""

    prompts: Annotated[int, Field(ge=1)] = 16
    every: Annotated[int, Field(ge=1)] = 10


class Server(Section):
    """A vLLM server that writes for the student; `model` is its name there, `folder_there` the server's path to the
    run's `vllm/`."""

    vllm: str
    model: str | None = None
    folder_there: str | None = None


class Rollout(Section):
    """How the student writes while it trains: who writes is drawn per `sample` or per `batch` (a whole step), text for
    `ahead` steps is written at once, `rows` answers together, in process or `through` a server. With `dtype: bfloat16`
    a copy of the student in that precision writes: text of a student that differs from it by rounding, whose own
    log-probabilities stand beside it."""

    per: Literal["sample", "batch"] = "sample"
    dtype: Literal["bfloat16"] | None = None
    through: Server | None = None
    ahead: Annotated[int, Field(ge=1)] = 1
    rows: Annotated[int, Field(ge=1)] = 64
    joint: JointSettings | None = None
    replay: Replay | None = None
    validation: Validation = Validation()


class Loss(Section):
    """One term: its name, its weight (a number or a schedule) and its own parameters."""

    name: str
    weight: Annotated[float, Field(gt=0)] | dict[str, Any] = 1.0
    params: dict[str, Any] = {}


class Train(Section):
    """`steps` updates of about `tokens_per_step` response tokens; AdamW, warm-up, cosine to `final_lr` x lr.

    With `mixup`, every micro-batch is followed by its rows mixed with others of the step in their embeddings (MixKD,
    arXiv:2011.00593), with weights from Beta(mixup, mixup); a loss sees them under `only: mixed`.
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
    save_seconds: Annotated[float, Field(ge=0)] = 60.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Evaluate(Section):
    """What is measured: `fidelity` to the teacher, and tasks by name. `limit` bounds the held-out prompts.

    Every system also writes text of its own to the first `own_prompts` of them (left out: OWN_PROMPTS). Controls that
    are trained: `sft_control` on the teacher's text, `gold_control` on the prompts' own answers, `shuffled_control` on
    the teacher's text with the answers dealt to other prompts; all for as many steps and tokens as the student. `judge`
    is a model that compares the student's answers with every other system's.
    """

    metrics: list[str] = ["fidelity"]
    prompts: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 96
    own_prompts: Annotated[int, Field(ge=1)] | None = None
    controls: list[str] = ["untouched", "sft_control"]  # names in training.controls.CONTROLS
    judge: str | None = None


def check_shares(writers: Sequence[Writer]) -> None:
    """Refuse shares that don't say who writes what (see `Writer`); ValueError."""
    if any(isinstance(writer.share, dict) or writer.share == 0 for writer in writers if writer.by != "student"):
        raise ValueError("only the student's share may be a schedule, or 0; give the others a number above 0")
    shares = [writer.fixed_share for writer in writers if writer.by != "student"]
    own = [writer.share for writer in writers if writer.by == "student"]
    if len(own) > 1:
        raise ValueError("only one writer can be the student; put all its settings into one")
    moves = bool(own) and isinstance(own[0], dict)
    rest = 1.0 - (0.0 if not own or isinstance(own[0], dict) else own[0])
    all_answer = all(share == 1 for share in shares) and not moves and rest in (0.0, 1.0) and own != [0]
    takes_the_rest = bool(own) and own != [1] and shares == [1]
    if not all_answer and not takes_the_rest and abs(sum(shares) - rest) > 1e-9:
        raise ValueError(
            f"the writers' shares add up to {sum(shares) + 1 - rest:g}, not 1 (and are not all 1, for every writer to"
            " answer every prompt)"
        )
