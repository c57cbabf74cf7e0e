"""Asking the teacher anything: a question that a recipe writes as a template, and how the answer is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.config.named_models import TEACHER
from limbeck.elicit import flow
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ending,
    prompt_of,
    said_by,
    user,
    warmed,
    with_answer,
    with_scores,
)
from limbeck.elicit.parse import Parsing, UnparsedError
from limbeck.elicit.rendering import render
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import StepPrompt, of_templates
from limbeck.elicit.template_fields import (
    ALWAYS,
    SOMETIMES,
    fault_of,
    fields_of,
    own_names,
    refuse_templates,
    with_prompt,
)
from limbeck.types import AnswerForm, Message, Request, Sample, Sampling

TEMPLATE_CHARS = 64 * 1024
FINAL = ("refused", "filtered", "error", "length")  # asking again would hardly change it, or was done already
MOST = 1000  # draws
OWN = (ALWAYS | SOMETIMES | {"prompt_id", "finish", "place"}) - {"kind", "task", "prompt", "answer"}
TEXTS = ("kind", "task", "final", "rationale")  # fields that other steps and losses read as text
TEXT: Any = "text"  # as a recipe writes it
FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Draw:
    """One of the answers that are asked for about a sample."""

    sample: Sample
    messages: tuple[Message, ...]
    number: int


@dataclass(frozen=True)
class Read:
    """What was read from a reply."""

    value: Any
    text: str
    reply: Sample


@register("ask")
class Ask(AskingStep):
    """Asks the model `by` what `prompt` says: a jinja template that sees the sample's `prompt` and `answer`, whatever
    earlier steps wrote, and the columns of the prompt's file. Reads the reply (`parse`) as text, one of some labels,
    JSON of a schema, or the groups of a pattern, and makes it the sample's answer, its prompt, or a field for later
    steps (`into`). With `constrain`, the model can write nothing beside what `parse` reads. What can't be read is
    asked again up to `retries` times, then dropped; what was cut off is dropped at once. With `vote`, the most frequent
    of `n` readings wins, and ties are dropped. The student sees neither template nor `system`."""

    by: By = TEACHER
    prompt: Annotated[str, Field(min_length=1, max_length=TEMPLATE_CHARS)]
    system: Annotated[str, Field(min_length=1, max_length=TEMPLATE_CHARS)] | None = None
    parse: Annotated[Parsing, Field(validate_default=True)] = TEXT
    # Left out, JSON is written in its schema where the teacher can be held to it: whoever gives a schema wants nothing
    # beside it. Labels and patterns are looked for in a longer answer, often after reasons, so they are held to only
    # where the recipe says so. A recipe's hash has what the recipe says, so hashes stay, and requests without a form
    # keep their keys: those of all built-in recipes that are older than this setting.
    constrain: bool | Literal["auto"] | None = None
    into: str = "answer"
    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    vote: bool = False
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: TokenCount = 256

    @field_validator("into")
    @classmethod
    def _is_free(cls, into: str) -> str:
        if into in OWN or not FIELD.fullmatch(into):
            raise ValueError(f"{into!r} can't be written; give answer, prompt, or another name of small letters")
        return into

    @model_validator(mode="after")
    def _draws_agree(self) -> Ask:
        if self.vote and self.n < 2:
            raise ValueError("a vote needs several draws; set n: 5 and a temperature, or leave vote out")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"{self.n} draws at temperature 0 are all the same; set a temperature, such as 0.7")
        if self.n > 1 and not self.vote and self.into not in ("answer", "prompt"):
            raise ValueError(f"{self.into!r} takes one value and n is {self.n}; set vote: true, or n: 1")
        return self

    @model_validator(mode="after")
    def _has_a_form(self) -> Ask:
        if self.constrain is True and self.parse.form is None:
            raise ValueError("any text is read as text: leave constrain out, or give parse a label, json or a pattern")
        return self

    def must_hold(self) -> AnswerForm | None:
        return self.parse.form if self.constrain is True else None

    def reads(self, place: str) -> frozenset[str]:
        return own_names(self._templates, place)

    def gives_scores(self) -> frozenset[str]:
        return frozenset({"agreement"} if self.vote else ())

    def writes(self) -> frozenset[str]:
        return frozenset({self.into}) - {"answer", "prompt"}

    def refuse(self, place: str, known: frozenset[str], pool: Pool | None) -> None:
        refuse_templates(self._templates, [self._fields(sample) for sample in pool or ()], place, known)

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        draws = self._draws(pool, context, tally)
        form = self._form(context, tally)
        read: dict[int, Read] = {}
        waiting = list(range(len(draws)))
        for attempt in range(self.retries + 1):
            requests = [self._request(context, draws[place], attempt, form=form) for place in waiting]
            replies = yield from flow.ask(requests)
            again = []
            for place, reply in zip(waiting, replies, strict=True):
                finish = ending(reply)
                if form is not None and finish == "ok":
                    tally.add("asked_in_form")
                    tally.add("outside_form", not self.parse.keeps_to_form(said_by(reply)))
                try:
                    read[place] = self._read(reply, finish)
                except UnparsedError as error:
                    if attempt < self.retries and finish not in FINAL:
                        again.append(place)
                    else:
                        tally.drop(f"answer: {error}", reply.messages[-1]["content"])
            waiting = again
            if again:
                tally.add("asked_again", len(again))
        if outside := int(tally.facts.get("outside_form", 0)):
            of = int(tally.facts["asked_in_form"])
            tally.notes.append(f"the writer ignores the form of answers: {outside:,} of {of:,} don't keep to it")
        found: Pool = []
        for first in range(0, len(draws), self.n):
            of_sample = [read[place] for place in range(first, first + self.n) if place in read]
            found += self._voted(draws[first].sample, of_sample, tally) if self.vote else []
            found += [] if self.vote else self._distinct(draws[first].sample, of_sample, tally)
        return found

    def estimate(self, samples: int) -> Estimate:
        """At most: every answer is asked for again as often as `retries` allows."""
        requests = samples * self.n * (1 + self.retries)
        tokens = int(requests * self._reply_tokens())
        return Estimate(requests, tokens, samples=samples if self.vote else samples * self.n)

    def answer_tokens(self) -> float | None:
        return self._reply_tokens() if self.into == "answer" else None

    def _reply_tokens(self) -> float:
        """Of a label about its letters', and its end; of all else the usual share of `max_tokens`."""
        usual = max(1.0, self.max_tokens * ANSWER_SHARE)
        labels = self.parse.label
        return min(usual, sum(len(label) / 4 + 1 for label in labels) / len(labels)) if labels else usual

    def shows(self) -> StepPrompt | None:
        if self.into != "answer" or self.by != TEACHER:
            return None
        return of_templates(self.prompt, self.system, self.parse.label or (), self.parse, form=self._wanted_form)

    # What is asked

    @property
    def _templates(self) -> dict[str, str]:
        return {"prompt": self.prompt} | ({} if self.system is None else {"system": self.system})

    def _fields(self, sample: Sample) -> dict[str, Any]:
        """What the templates see of a sample."""
        return fields_of(sample, self.parse.label or ())

    def _draws(self, pool: Pool, context: StepContext, tally: Tally) -> list[Draw]:
        """`n` for every sample for which the templates can be rendered; the other samples count as dropped."""
        rendered = render(self._templates, [self._fields(sample) for sample in pool], context.step)
        draws = []
        for sample, texts in zip(pool, rendered.rows, strict=True):
            if isinstance(texts, str) or fault_of(texts):
                tally.drop(f"the template: {fault_of(texts)}", prompt_of(sample))
                continue
            system = ({"role": "system", "content": texts["system"]},) if texts.get("system") else ()
            draws += [Draw(sample, (*system, user(texts["prompt"])), number) for number in range(self.n)]
        return draws

    @property
    def _wanted_form(self) -> AnswerForm | None:
        """The form that the model is held to if it can be."""
        form = self.parse.form
        if form is None or self.constrain is False or (self.constrain is None and form.kind != "schema"):
            return None
        return form

    def _form(self, context: StepContext, tally: Tally) -> AnswerForm | None:
        """The form that the model is held to."""
        form = self._wanted_form
        if form is None:
            return None
        if why := (context.unheld if self.by == TEACHER else context.reader(self.by).unheld)(form):
            tally.notes.append(f"answers are not held to their form: {why}")
            return None
        return form

    def _request(self, context: StepContext, draw: Draw, attempt: int, *, form: AnswerForm | None) -> Request:
        temperature = warmed(self.temperature, attempt)
        sampling = Sampling(temperature, self.top_p, self.max_tokens)
        return context.request(draw.messages, sampling, draw.number + MOST * attempt, form=form, by=self.by)

    # What the answers become

    def _read(self, reply: Sample, finish: str) -> Read:
        if finish != "ok":
            raise UnparsedError(finish)
        value = self.parse.read(said_by(reply))
        return Read(value, self.parse.written(value), reply)

    def _voted(self, sample: Sample, read: Sequence[Read], tally: Tally) -> Pool:
        """The sample with the most frequent reading; nothing if two are."""
        if not read:
            return []
        votes = Counter(one.text for one in read).most_common()
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            tally.drop("a tie", "; ".join(text for text, _ in votes))
            return []
        winner = next(one for one in read if one.text == votes[0][0])
        return [with_scores(self._with(sample, winner), agreement=votes[0][1] / self.n)]

    def _distinct(self, sample: Sample, read: Sequence[Read], tally: Tally) -> Pool:
        by_text: dict[str, Read] = {}
        for one in read:
            if one.text in by_text:
                tally.drop("the same again", one.text)
            by_text.setdefault(one.text, one)
        return [self._with(sample, one) for one in by_text.values()]

    def _with(self, sample: Sample, read: Read) -> Sample:
        """The sample with what was read in its place. What judged its old answer or prompt is left out."""
        text = read.text
        if self.into == "answer":
            said = read.reply.messages[-1]["content"]
            whole = text == (said.strip() if self.parse.text else said)  # then its tokens are known
            asked = replace(sample, meta=_without(sample.meta, "scores"))
            return with_answer(asked, read.reply, None if whole else text, finish="ok")
        if self.into == "prompt":
            return with_prompt(sample, text, read.reply)
        value = text if self.into in TEXTS else read.value
        return replace(sample, parents=(*sample.parents, read.reply.id), meta=sample.meta | {self.into: value})


def _without(meta: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in meta.items() if name not in names}
