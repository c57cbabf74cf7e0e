"""Answers made longer part by part (Self-Lengthen): the first half is expanded, then the answer is gone on with."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.fence import DATA, conversation_text, fill_fenced
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    ask,
    ending,
    inherited,
    new_prompt,
    prompt_messages,
    said_by,
    unjudged,
    user,
    with_answer,
    with_scores,
)
from limbeck.elicit.merit import answered_only
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.wording import ends_well, words
from limbeck.types import Message, Sample, Sampling

EXPAND = (
    f"Below stand a request and the first part of an answer to it. {DATA}\n\nRequest:\n{{prompt}}\n\nFirst part:\n"
    "{part}\n\nWrite this part anew and at greater length: more detail, reasons and examples, in whole paragraphs, and"
    " nothing twice. Write the longer part alone; don't bring the answer to its end."
)
GO_ON = (
    f"Below stand a request, a short answer to it, and the beginning of a longer answer. {DATA}\n\nRequest:\n{{prompt}}"
    "\n\nShort answer:\n{answer}\n\nBeginning of the longer answer:\n{beginning}\n\nGo on where the beginning ends, as"
    " fully as it is written, with all that the short answer still has to say, and bring it to an end. Write only what"
    " follows the beginning."
)
EXTENDER = "extender"  # the task of samples that teach to lengthen
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
TRIED = 100  # what numbers of passes begin with: they tell requests of one text apart
KEPT = 2 / 3  # of an expanded part: its end may already close the answer


@dataclass(eq=False)
class Growth:
    """An answer that is made longer.

    Args:
        text: what it is now.
        reply: what it was last gone on with; None before it has grown.
        made: the questions and replies that made it, as (question, reply) each.
        fault: why it grew no further.
    """

    sample: Sample
    text: str
    reply: Sample | None = None
    made: list[tuple[str, Sample]] = field(default_factory=list)
    fault: str = ""

    @property
    def prompt(self) -> str:
        return conversation_text(prompt_messages(self.sample))


@register("lengthen")
class Lengthen(AskingStep):
    """Makes every answer longer: the model `by` expands its first half, of which two thirds are kept, and goes on from
    there to the end. The longer answer stands if it has more than `ratio` times as many words, ends in a whole sentence
    and repeats no `gram` words in a row; else there are further `tries`. `passes` make it longer again and again; an
    answer that never grows is dropped. The score `lengthened` says how many times as long it is. With `extender`, the
    questions and replies that made it are samples, too (task `extender`), which teach to lengthen. The authors' code
    continues the answer itself where this asks for what follows, and drops some of the short ones at random."""

    kind = "transform"
    paper = "Quan et al., arXiv:2410.23933"
    scores = frozenset({"lengthened"})
    by: By = TEACHER
    passes: Annotated[int, Field(ge=1, le=10)] = 1
    tries: Annotated[int, Field(ge=1, le=20)] = 2
    ratio: Annotated[float, Field(ge=1, le=10)] = 1.2
    gram: Annotated[int, Field(ge=2, le=50)] = 13
    extender: bool = False
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 512

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        growths = [Growth(sample, said_by(sample).strip()) for sample in answered_only(pool, tally)]
        waiting = growths
        for number in range(self.passes):
            grown: list[Growth] = []
            for attempt in range(self.tries):
                longer = (yield from self._grow(waiting, context, TRIED * number + attempt)) if waiting else []
                grown += longer
                waiting = [growth for growth in waiting if growth not in longer]
            tally.facts[f"grown_in_pass_{number + 1}"] = len(grown)
            waiting = [growth for growth in growths if growth in grown]
        samples: Pool = []
        for growth in growths:
            if growth.reply is None:
                tally.drop(growth.fault, growth.text)
            else:
                samples += self._samples(growth, growth.reply)
        scores = [score for sample in samples if (score := sample.meta.get("scores", {}).get("lengthened"))]
        tally.facts["mean_lengthened"] = sum(scores) / max(1, len(scores))
        return samples

    def _grow(self, growths: Sequence[Growth], context: StepContext, number: int) -> Questions[list[Growth]]:
        """Try once to make each longer; those that are. The others get a `fault`."""
        control = context.reader(self.by).control
        parts = [(growth, _expand(growth, control)) for growth in growths]
        begun = []
        for growth, question, reply in (yield from self._ask(parts, context, number, ("ok", "length"))):
            if beginning := _beginning(said_by(reply), ending(reply) == "ok"):
                begun.append((growth, question, reply, beginning))
            else:
                growth.fault = "answer: length"
        ends = [(growth, _go_on(growth, beginning, control)) for growth, _, _, beginning in begun]
        before = {id(growth): (question, reply, beginning) for growth, question, reply, beginning in begun}
        longer = []
        for growth, question, reply in (yield from self._ask(ends, context, number)):
            first_question, first_reply, beginning = before[id(growth)]
            text = _joined(beginning, said_by(reply).strip())
            growth.fault = self._fault(growth.text, text)
            if not growth.fault:
                growth.text, growth.reply = text, reply
                growth.made += [(first_question, first_reply), (question, reply)]
                longer.append(growth)
        return longer

    def _ask(
        self, turns: Sequence[tuple[Growth, str]], context: StepContext, number: int, endings: Collection[str] = ("ok",)
    ) -> Questions[list[tuple[Growth, str, Sample]]]:
        """(growth, its question, the reply) of every question whose reply ends so; the others get a `fault`."""
        reader = context.reader(self.by)
        fit: list[tuple[Growth, str, Message]] = []
        for growth, question in turns:
            if reader.fits((user(question),), self.max_tokens):
                fit.append((growth, question, user(question)))
            else:
                growth.fault = "too long to be shown"
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request((message,), sampling, number, by=self.by) for *_, message in fit])
        answered = []
        for (growth, question, _), reply in zip(fit, replies, strict=True):
            if (finish := ending(reply)) in endings:
                answered.append((growth, question, reply))
            else:
                growth.fault = f"answer: {finish}"
        return answered

    def _fault(self, before: str, text: str) -> str:
        """Why a longer answer can't stand; empty if it can."""
        spoken = words(text)
        grams = [tuple(spoken[at : at + self.gram]) for at in range(len(spoken) - self.gram + 1)]
        if len(spoken) <= self.ratio * len(words(before)):
            return "not longer"
        if not ends_well(text):
            return "ends within a sentence"
        return "repeats itself" if len(set(grams)) < len(grams) else ""

    def _samples(self, growth: Growth, reply: Sample) -> Pool:
        """The longer answer, and what made it."""
        sample = growth.sample
        longer = with_answer(unjudged(sample, "by"), reply, growth.text)
        times = len(words(growth.text)) / max(1, len(words(said_by(sample))))
        parents = dict.fromkeys((sample.id, *(other.id for _, other in growth.made)))
        whole = with_scores(replace(longer, parents=tuple(parents)), lengthened=times)
        if not self.extender:
            return [whole]
        told = inherited(sample, "kind", "weight") | {"task": EXTENDER}
        asked = [(new_prompt(question, [sample], sample.writer, **told), other) for question, other in growth.made]
        lessons = [with_answer(prompt, other) for prompt, other in asked if ending(other) == "ok"]
        return [whole, *lessons]

    def estimate(self, samples: int) -> Estimate:
        """Without further tries."""
        asked = Estimate.of_answers(2 * self.passes * samples, self.max_tokens)
        return replace(asked, samples=samples * (1 + (2 * self.passes if self.extender else 0)))

    def shows(self) -> StepPrompt | None:
        return VARIES if self.by == TEACHER else None


def _expand(growth: Growth, control: Collection[str]) -> str:
    return fill_fenced(EXPAND, control, prompt=growth.prompt, part=first_half(growth.text))


def _go_on(growth: Growth, beginning: str, control: Collection[str]) -> str:
    return fill_fenced(GO_ON, control, prompt=growth.prompt, answer=growth.text, beginning=beginning)


def _pieces(text: str) -> tuple[list[str], str]:
    """(a text's paragraphs or, if it is one, its sentences; what stands between them)."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(paragraphs) > 1:
        return paragraphs, "\n\n"
    return [part.strip() for part in SENTENCE.split(text) if part.strip()], " "


def first_half(text: str) -> str:
    """The paragraphs of a text (of a single one, its sentences) from the first on that hold about half of its words."""
    pieces, between = _pieces(text)
    half, count = pieces[:1], len(words("".join(pieces[:1])))
    for piece in pieces[1:]:
        more = len(words(piece))
        if 2 * count + more > len(words(text)):  # nearer to the half without it
            break
        half.append(piece)
        count += more
    return between.join(half)


def _beginning(text: str, is_whole: bool) -> str:
    """The first two thirds of an expanded part; empty where nothing of it is whole."""
    pieces, between = _pieces(text.strip())
    pieces = pieces if is_whole or len(pieces) < 2 else pieces[:-1]
    if not pieces or (len(pieces) == 1 and not (is_whole or ends_well(pieces[0]))):
        return ""
    return between.join(pieces[: max(1, int(KEPT * len(pieces)))])


def _joined(beginning: str, rest: str) -> str:
    """The beginning and what follows it, which may say the beginning again."""
    return rest if rest.startswith(beginning) else f"{beginning}\n\n{rest}"
