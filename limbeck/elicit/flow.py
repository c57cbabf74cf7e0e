"""The data that elicitation works on: pools of samples, questions to models, and counts of what was left out.

A step yields questions (`ask`, `score`) and is sent the answers in the order of the questions, whoever answered first.
So the same seed and the same stored answers give the same pool, byte for byte. Only `engine` does I/O.

A sample in a pool is a conversation. If it ends with a user's message it is a prompt that waits for an answer; if it
ends with an assistant's message it is answered. Its `meta` may hold: `prompt_id` (shared by all answers to one prompt),
`kind`, `task` (the tag that a loss's `only` names), `weight`, `check` (see `verify`), `answers` (from the corpus, the
best first), `finish`, `scores` (by name), and whatever later steps read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from limbeck.config.named_models import TEACHER
from limbeck.elicit.thinking import after_thinking
from limbeck.types import AnswerForm, LogProb, Message, Request, Sample, Sampling, content_hash

Pool = list[Sample]
Show = Callable[[tuple[Message, ...]], tuple[Message, ...]]
T = TypeVar("T")
MAX_EXAMPLES = 3
EXAMPLE_CHARS = 160
NO_ANSWER = "nothing but thinking"
JUDGED = (
    "scores",
    "ratings",
    "rated_by",
    "compared",
    "compared_by",
    "rubric",
    "rubric_by",
)  # what steps say of an answer
OF_ITS_ANSWER = ("final", "rationale")  # what steps take from an answer
RETRIED = 1000  # what numbers of tries begin with: they tell requests of one question apart
WARM = 0.7  # the temperature of another try where the first one was greedy: it would come out the same
WRITTEN = ("ok", "length", "empty", NO_ANSWER)


@dataclass(frozen=True)
class ScoreRequest:
    """Asks a model how likely it finds an answer; the reply is a `LogProb`.

    Without messages the answer is plain text, outside any chat template. `model` is empty for the teacher, `untouched`
    (the student before training), a name under `models`, or any model's source; all requests of one batch go to one
    model.
    """

    messages: tuple[Message, ...]
    answer: str
    model: str = ""

    @property
    def key(self) -> str:
        return content_hash([list(self.messages), self.answer])


Questions = Generator[Sequence[Request] | Sequence[ScoreRequest], Sequence[Any], T]


def warmed(temperature: float, attempt: int) -> float:
    """The temperature of a try, the first being number 0."""
    return temperature or (WARM if attempt else 0.0)


def ask(requests: Sequence[Request]) -> Questions[list[Sample]]:
    """`replies = yield from ask(requests)`: one sample per request, in the order of the requests.

    The last message is the answer and `meta["finish"]` says how it ended. A request that failed for good has the answer
    "" and the finish "error".
    """
    return list((yield list(requests))) if requests else []


def score(requests: Sequence[ScoreRequest]) -> Questions[list[LogProb]]:
    """`log_probs = yield from score(requests)`: one LogProb per request, in the order of the requests."""
    return list((yield list(requests))) if requests else []


@dataclass
class Tally:
    """What a step did: samples in (`taken`) and out (`given`), how many were dropped and why, with a few examples,
    facts such as an acceptance rate, and `notes`, what its user should know in words."""

    step: str
    taken: int = 0
    given: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, text: str = "") -> None:
        """Count a dropped sample or answer under `reason`, a few plain words."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if text and len(examples) < MAX_EXAMPLES:
            examples.append(text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]}…")

    def add(self, fact: str, amount: float = 1) -> None:
        self.facts[fact] = self.facts.get(fact, 0) + amount


def _none_named(name: str) -> str:
    raise KeyError(name)  # `check_steps` refuses names of no model


@dataclass(frozen=True)
class Reader:
    """What is known beforehand of a model that is shown texts of others: its control tokens, whether a conversation
    leaves it room for so many tokens of an answer, and why it can't be held to a form (nothing if it can)."""

    control: Collection[str] = ()
    fits: Callable[[Sequence[Message], int], bool] = lambda messages, tokens: True
    unheld: Callable[[AnswerForm], str] = lambda form: "nothing is known of its forms"


@dataclass(frozen=True)
class StepContext:
    """What a step knows beside the pool: the models that it asks, and its source of random numbers.

    `header` is the text before a user's message in the model's own chat format, where that is known (see `magpie`).
    `unheld` says why the model can't be held to a form, and nothing if it can.
    `show` turns a conversation into the one that the teacher is shown, where that is another.
    `named` returns the identity of a model that the recipe names, `reader` what is known of a model as a reader.
    `given` are the recipe's own prompts, as the first step gets them.
    """

    model: str
    seed: int
    step: str
    header: str | None = None
    unheld: Callable[[AnswerForm], str] = lambda form: "nothing is known of its forms"
    show: Show | None = None
    named: Callable[[str], str] = _none_named
    reader: Callable[[str], Reader] = lambda by: Reader()
    given: Sequence[Sample] = ()

    def identity(self, by: str) -> str:
        """Of the teacher, or of another model by its name."""
        return self.model if by == TEACHER else self.named(by)

    def request(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        number: int = 0,
        *,
        raw: str | None = None,
        against: Sequence[Message] | None = None,
        contrast: float = 0.0,
        form: AnswerForm | None = None,
        by: str = TEACHER,
    ) -> Request:
        """A request to the model `by`. `number` tells several answers to the same messages apart."""
        seed = self.seed if number == 0 else int(content_hash([self.seed, number])[:7], 16)
        other = None if against is None else tuple(against)
        is_shown = self.show is not None and raw is None and by == TEACHER
        shown = self.show(tuple(messages)) if is_shown and self.show is not None else None
        return Request(
            self.identity(by),
            tuple(messages),
            sampling,
            seed,
            raw=raw,
            against=other,
            contrast=contrast,
            form=form,
            shown=shown,
        )

    def rng(self, *key: Any) -> random.Random:
        """Random numbers for this step, always the same for the same `key` (such as a round, or a sample's id)."""
        return random.Random(content_hash([self.seed, self.step, [str(part) for part in key]]))  # noqa: S311


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def prompt_of(sample: Sample) -> str:
    """The user's last message."""
    return next((message["content"] for message in reversed(sample.messages) if message["role"] == "user"), "")


def answer_of(sample: Sample) -> str | None:
    """The answer, or None for a prompt that waits for one."""
    last = sample.messages[-1]
    return last["content"] if last["role"] == "assistant" else None


def said_by(sample: Sample) -> str:
    """The answer without the thinking before it; empty where there is none. Replies are parsed through this."""
    return after_thinking(answer_of(sample) or "") or ""


def by_conversation(pool: Pool) -> list[Pool]:
    """The samples in groups that answer the same conversation, in the order of the first of each."""
    groups: dict[str, Pool] = {}
    for sample in pool:
        groups.setdefault(content_hash(list(prompt_messages(sample))), []).append(sample)
    return list(groups.values())


def prompt_messages(sample: Sample) -> tuple[Message, ...]:
    """The conversation up to the answer."""
    return sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages


def new_prompt(text: str, parents: Sequence[Sample], writer: str, **meta: Any) -> Sample:
    """A prompt made from `parents`. It inherits none of their meta: pass what still holds."""
    sample = Sample((user(text),), writer, parents=tuple(parent.id for parent in parents), meta=meta)
    return replace(sample, meta={"prompt_id": sample.id[:16], **meta})


def with_answer(prompt: Sample, reply: Sample, text: str | None = None, **meta: Any) -> Sample:
    """The prompt with the answer of `reply` (text and token ids), or with `text` that was parsed from it.

    The answer follows the prompt's own messages, whatever else the model was shown (a system message, demonstrations).
    The prompt's meta stays, but for the `final` and `rationale` of an answer that it had.
    """
    content, ids = (reply.messages[-1]["content"], reply.response_ids) if text is None else (text, None)
    message = {"role": "assistant", "content": content}
    stale = () if answer_of(prompt) is None else OF_ITS_ANSWER
    kept = {name: value for name, value in prompt.meta.items() if name not in stale}
    return Sample(
        (*prompt_messages(prompt), message),
        reply.writer,
        ids,
        parents=(prompt.id, reply.id),
        meta={**kept, "finish": reply.meta.get("finish", "ok"), **meta},
    )


def unjudged(sample: Sample, *more: str) -> Sample:
    """The sample without what was said of its answer, and without `more` of its meta; for an answer in its place."""
    return replace(sample, meta={name: value for name, value in sample.meta.items() if name not in (*JUDGED, *more)})


def with_new_answer(sample: Sample, answer: str, writer: str, **meta: Any) -> Sample:
    """The sample with another answer, derived from its own."""
    return Sample(
        (*prompt_messages(sample), {"role": "assistant", "content": answer}),
        writer,
        parents=(sample.id,),
        meta={**sample.meta, **meta},
    )


def with_scores(sample: Sample, **scores: float) -> Sample:
    """The sample with these scores added to its meta."""
    return replace(sample, meta=sample.meta | {"scores": {**sample.meta.get("scores", {}), **scores}})


def inherited(sample: Sample, *keys: str) -> dict[str, Any]:
    """The entries of the sample's meta under these keys, where it has them."""
    return {key: sample.meta[key] for key in keys if key in sample.meta}


def drop_if(reject: Callable[[Sample], tuple[str, str] | None], pool: Pool, tally: Tally) -> Pool:
    """The samples that `reject` has nothing against. For others it gives (reason, the text to show as an example)."""
    passed: Pool = []
    for sample in pool:
        if rejection := reject(sample):
            tally.drop(*rejection)
        else:
            passed.append(sample)
    return passed


def ending(reply: Sample) -> str:
    """How a reply ended: `ok` if by itself and with an answer, else length, empty, refused, ..., or "nothing but
    thinking"."""
    finish = str(reply.meta.get("finish", "ok"))
    if finish == "ok" and (answer_of(reply) or "").strip() and not said_by(reply).strip():
        return NO_ANSWER
    return finish


def are_complete(replies: Sequence[Sample], tally: Tally) -> list[bool]:
    """Which replies ended by themselves and answer something. The others count as dropped, by how they ended."""
    complete = []
    for reply in replies:
        finish = ending(reply)
        complete.append(finish == "ok")
        if finish != "ok":
            tally.drop(f"answer: {finish}", reply.messages[-1]["content"])
    return complete


def complete_replies(turns: Sequence[T], replies: Sequence[Sample], tally: Tally) -> list[tuple[T, Sample]]:
    """(turn, its reply) for every reply that is complete; the others count as dropped. One reply per turn."""
    complete = are_complete(replies, tally)
    return [(turn, reply) for turn, reply, whole in zip(turns, replies, complete, strict=True) if whole]


def written_replies(turns: Sequence[T], replies: Sequence[Sample], tally: Tally) -> list[tuple[T, Sample]]:
    """(turn, its reply) for every reply that the model wrote, complete or not: cut off, empty, or nothing but thinking.
    Those that were refused or filtered, or failed, count as dropped."""
    written = []
    for turn, reply in zip(turns, replies, strict=True):
        finish = ending(reply)
        if finish in WRITTEN:
            written.append((turn, reply))
        else:
            tally.drop(f"answer: {finish}", reply.messages[-1]["content"])
    return written
