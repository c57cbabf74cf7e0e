"""The types that all other modules share. Imports nothing of Limbeck and, at run time, nothing heavy.

Shape legend used in the whole package: B rows (sequences), T positions of a row, N response positions of a batch,
D hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
Finish = Literal["ok", "length", "empty", "filtered", "malformed", "refused", "error"]
ANSWER_ENDS: dict[Finish, str] = {  # in words
    "ok": "complete",
    "length": "cut off",
    "empty": "empty",
    "filtered": "filtered by the server",
    "malformed": "malformed",
    "refused": "refused",
    "error": "failed",
}
TAUGHT_FINISHES = ("ok", "length")  # an answer that ended otherwise is not trained on

# sampling settings that have been in every request key since the first version
ALWAYS_IN_KEYS = ("temperature", "top_p", "max_tokens")

STUDENTS = ("untouched", "previous")  # writers that are the student: before training, and of the round before

TOLD = "told"  # the kind of evidence that a server's log-probabilities of its own text are stored as
TAUGHT = "taught"  # the column of text with gaps: 1 at tokens at which the teacher's distribution is known, else 0

SCORE = "score"  # the evidence that a scalar head gives of a whole conversation
PROBABILITY = "probability"  # the label of a pair: that its first answer is the better one
MARGIN = "margin"  # the label of a pair: by how much

BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters by their category, which show nothing
MOST_SHOWN = 300  # characters of another's words in a message of ours
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


class UserError(ValueError):
    """An error that the user can fix: its message has the place, the cause and the remedy. The command exits with 2."""


class NothingLeftError(UserError):
    """A run has no text to train on: no answer passed its steps, or none can be used."""


class RecipeError(UserError):
    """A recipe that can't be run. `path` is the place in the file, such as `loss[0].jsd.teacher_share`."""

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(f"{path}: {message}" if path else message)


def has_text(text: str) -> bool:
    """Whether anything of a text can be seen: not blanks, controls and marks of no width alone."""
    return any(
        not (character.isspace() or character in BLANK or unicodedata.category(character) in ("Cc", "Cf"))
        for character in text
    )


def canonical_json(value: Any) -> str:
    """JSON, the same for equal values: sorted keys, no spaces, UTF-8. NaN is refused, since it equals nothing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: independent of key order, process and hash seed."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def list_hash(lists: Iterable[Iterable[Any]]) -> str:
    """The `content_hash` of a list of lists, without holding its JSON in memory."""
    digest = hashlib.sha256(b"[")
    for number, entries in enumerate(lists):
        digest.update(b",[" if number else b"[")
        for place, entry in enumerate(entries):
            digest.update((("," if place else "") + canonical_json(entry)).encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


@dataclass(frozen=True)
class Sampling:
    """How text is sampled. `temperature` 0 is greedy. `max_tokens` counts the end-of-sequence token. Text ends before
    the first of `stop`; `presence_penalty` is subtracted from the logits of tokens that were written before."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like: exactly one of a JSON schema (as text, since the order of its properties matters),
    some labels, one of which is the whole answer, or a regular expression for the whole answer."""

    schema: str | None = None
    labels: tuple[str, ...] | None = None
    pattern: str | None = None

    @property
    def kind(self) -> str:
        """`schema`, `labels` or `pattern`."""
        return next(name for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Request:
    """One question to one model. Its `key` makes it idempotent: a second request reads the stored answer.

    A `raw` request has the model continue that text, control tokens included, without a chat template; `messages` are
    then the conversation that the answer is stored with. So they are with `shown`, which is what the model is shown in
    their place. With `against`, every token is drawn from
    log p(token | messages) - `contrast` * log p(token | against). With a `form`, only what keeps to it can be written.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    seed: int
    meta: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    raw: str | None = None
    against: tuple[Message, ...] | None = None
    contrast: float = 0.0
    form: AnswerForm | None = None
    shown: tuple[Message, ...] | None = None

    @property
    def conversation(self) -> tuple[Message, ...]:
        """What the model is shown."""
        return self.messages if self.shown is None else self.shown

    @property
    def asked(self) -> dict[str, Any]:
        """What its answer depends on, as plain data. Settings at their default are left out, so that old keys stay
        valid."""
        sampling = {
            name: value
            for name, value in vars(self.sampling).items()
            if name in ALWAYS_IN_KEYS or value != getattr(Sampling, name)
        }
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": list(self.messages),
            "seed": self.seed,
            "sampling": sampling,
        }
        if self.raw is not None:
            fields["raw"] = self.raw
        if self.against is not None:
            fields |= {"against": list(self.against), "contrast": self.contrast}
        if self.form is not None:
            value = getattr(self.form, self.form.kind)
            fields["form"] = {self.form.kind: list(value) if isinstance(value, tuple) else value}
        if self.shown is not None:
            fields["shown"] = list(self.shown)
        return fields

    @property
    def key(self) -> str:
        return content_hash(self.asked)


@dataclass(frozen=True)
class Generated:
    """What a model wrote: `ids` as sampled (they end with the end-of-sequence token if `finish` is ok), or None if
    there is only text.

    `raw` is the body of a server's answer, kept for audit; `usage` the billed tokens, (read, written); `told` the
    server's likeliest tokens at every position of the text, as `models/told.py` keeps them; `answered_by` the name of
    the model that the server gives, where it has to stay the same.
    """

    ids: tuple[int, ...] | None
    text: str
    finish: Finish
    raw: str | None = None
    usage: tuple[int, int] | None = None
    told: Any = field(default=None, hash=False)
    answered_by: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sample:
    """A conversation that a student may train on; the last message is the response.

    `response_ids` are the tokens that the writer sampled, and the student is trained on just these. Text without ids
    (of a corpus or an API) has None.
    """

    messages: tuple[Message, ...]
    writer: str
    response_ids: tuple[int, ...] | None = None
    parents: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def teaches(self) -> bool:
        """Whether the response is an answer of its writer: not empty, refused, filtered, malformed or missing."""
        return self.meta.get("finish", "ok") in TAUGHT_FINISHES and has_text(self.messages[-1]["content"])

    @property
    def id(self) -> str:
        ids = None if self.response_ids is None else list(self.response_ids)
        return content_hash({"messages": list(self.messages), "writer": self.writer, "ids": ids})


@dataclass(frozen=True)
class Evidence:
    """A judgement of a sample. `value` is JSON; `tensor_ref` names a tensor in a shard."""

    sample_id: str
    kind: str
    judge: str
    value: Any = None
    tensor_ref: str | None = None


@dataclass(frozen=True)
class LogProb:
    """log p(answer | messages) in nats, its end token not counted, and the answer's number of tokens."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right. `mask_BT[b, t]` is 1 where `tokens_BT[b, t]` is a response token.

    Position t is predicted from position t - 1: `response_positions` are the hidden states that are projected.

    Args:
        weight_BT: the weight of each response token, the same for all of a row.
        tags: each row's writer, task and rank.
        groups: the rows that answer one prompt, the chosen one first.
        references: by name of a frozen model, log-probabilities [B] of the responses.
        labels: by name, what is known of the pair whose first row it is [B]; NaN elsewhere.
        columns: by name, numbers [B, T] of the response tokens.
        seen: (tokens, mask) [B, S] of the same responses after the teacher's prompts, if those differ.
        mixed: (tokens, weight of the row's own embedding) [B, T] of the rows whose embeddings are mixed into these.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    weight_BT: Tensor
    sample_ids: tuple[str, ...]
    tags: tuple[frozenset[str], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    references: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    seen: tuple[Tensor, Tensor] | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def seen_by_teacher(self) -> Batch:
        """The same responses after the teacher's prompts; the n-th response position is the same token in both."""
        return self if self.seen is None else replace(self, tokens_BT=self.seen[0], mask_BT=self.seen[1], seen=None)

    def response_positions(self) -> tuple[Tensor, Tensor]:
        """(row_N, position_N) of the hidden states that predict a response token."""
        rows_N, targets_N = self.mask_BT.nonzero(as_tuple=True)
        return rows_N, targets_N - 1

    def last_positions(self) -> tuple[Tensor, Tensor]:
        """(row_B, position_B) of every row's last token."""
        last_B = self.mask_BT.shape[1] - 1 - self.mask_BT.flip(1).int().argmax(1)
        return last_B.new_ones(last_B.shape).cumsum(0) - 1, last_B

    def rows_on(self, tag: str | None) -> Tensor:
        """[B], whether a row has the tag; true for all rows if `tag` is None."""
        has_tag = [tag in tags for tags in self.tags] if tag is not None else [True] * len(self.sample_ids)
        return self.mask_BT.new_tensor(has_tag)

    def row_weights(self) -> Tensor:
        """[B] the weight of each row, which is that of each of its tokens."""
        return (self.weight_BT * self.mask_BT).amax(1)

    def group_weights(self) -> Tensor:
        """[G] the weight of each group: that of its first row."""
        return self.row_weights()[[group[0] for group in self.groups]]

    def token_weights(self, column: str | None = None) -> Tensor:
        """[B, T] weights of the response tokens, times the named column if the batch has it."""
        weight_BT = self.weight_BT * self.mask_BT
        return weight_BT if column is None or column not in self.columns else weight_BT * self.columns[column]

    def amount(self, unit: str, tag: str | None = None, column: str | None = None) -> float:
        """The denominator of a term with this unit: the sum of token weights (times the named column, if the batch has
        it), of row weights, or of group weights."""
        if unit == "group":
            return float(self.group_weights().sum())
        weight_B = self.row_weights() if unit == "row" else self.token_weights(column).sum(1)
        return float(weight_B[self.rows_on(tag)].sum())


def printable(value: object) -> str:
    """The value as one line of at most 300 characters that a terminal can show."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value)[:MOST_SHOWN])


# What other tools and papers call it, and what it is called here. A suggestion names those that are legal in its place.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "kl": ("forward_kl",),
    "kld": ("forward_kl",),
    "kl_div": ("forward_kl",),
    "kl_divergence": ("forward_kl",),
    "fkl": ("forward_kl",),
    "rkl": ("reverse_kl",),
    "backward_kl": ("reverse_kl",),
    "js": ("jsd",),
    "jensen_shannon": ("jsd",),
    "skl": ("skew_kl",),
    "srkl": ("skew_reverse_kl",),
    "total_variation": ("tvd",),
    "mse": ("logit_mse", "hidden_match"),
    "ce": ("cross_entropy",),
    "nll": ("cross_entropy",),
    "sft": ("cross_entropy",),
    "fine_tuning": ("cross_entropy",),
    "word_level_kd": ("forward_kl", "hinton-kd"),
    "kd": ("forward_kl", "hinton-kd"),
    "seqkd": ("seq-kd",),
    "sequence_level_kd": ("seq-kd",),
    "opd": ("on_policy_distillation",),
    "on_policy": ("on_policy_distillation",),
    "context_distillation": ("prompt-baking",),
    "cot": ("rationale", "fine-tune-cot"),
    "chain_of_thought": ("rationale", "fine-tune-cot"),
    "rejection_sampling": ("best_of", "verify"),
    "dedup": ("deduplicate",),
    "classify": ("ask",),
    "max_steps": ("steps",),
    "num_steps": ("steps",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "batch_size": ("tokens_per_step", "concurrency"),
    "warmup_ratio": ("warmup",),
    "max_grad_norm": ("clip",),
    "grad_clip": ("clip",),
    "max_new_tokens": ("max_tokens",),
    "max_length": ("max_tokens",),
    "temp": ("temperature",),
    "system_prompt": ("system",),
    "dataset": ("prompts", "from"),
    "data": ("prompts", "from"),
    "max_samples": ("limit",),
    "losses": ("loss",),
    "tasks": ("metrics",),
    "bf16": ("precision", "dtype"),
    "gradient_checkpointing": ("checkpointing",),
    "attn_implementation": ("attention",),
    "device_map": ("device",),
    "num_layers": ("layers",),
    "num_hidden_layers": ("layers",),
    "lora_r": ("rank",),
    "r": ("rank",),
    "base_url": ("url",),
    "api_key": ("key",),
}


def nearest(name: str, legal: Iterable[str]) -> str:
    """A hint such as `; did you mean 'steps'?`: what the field's other names mean here, else what is spelt alike, else
    the list of legal names."""
    names = sorted(legal)
    meant = [repr(other) for other in SYNONYMS.get(name.lower().replace("-", "_"), ()) if other in names]
    close = meant or [repr(other) for other in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else f"; legal: {', '.join(names)}" if names else ""
