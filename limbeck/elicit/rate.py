"""Feedback: a judge rates the answers to each prompt by aspects, on a scale.

A rating that can't be read stays what it is, "unreadable", and is never a number: an answer without one has no score of
that name, and steps that need the score drop it and count it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.config.named_models import TEACHER
from limbeck.elicit.aspects import ASPECTS
from limbeck.elicit.flow import (
    RETRIED,
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    ask,
    by_conversation,
    ending,
    said_by,
    score,
    user,
    warmed,
    with_scores,
)
from limbeck.elicit.merit import answered_only, expected, tell_own_answers
from limbeck.elicit.ratings import NOT_APPLICABLE, TOO_LONG, UNREADABLE, AspectQuestion, Rating
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.types import Message, Sample, Sampling, nearest

# by (place, aspect, number of the time it was asked): the rating, and the id of its reply
Found = dict[tuple[int, str, int], tuple[float | str, str]]


@dataclass(frozen=True)
class Question:
    """One question to the judge. `places` are those of the answers in the pool, in the order in which they are
    shown."""

    asked: AspectQuestion
    places: tuple[int, ...]
    messages: tuple[Message, ...]


@register("rate")
class Rate(AskingStep):
    """The model `by` rates the answers to each prompt by every aspect, on a `scale` (UltraFeedback). An aspect is a
    name that is known here, or has its question: `{brevity: Is it short?}`. All answers to a prompt are shown
    `together`, in a drawn order, or each alone. It gives `reasons` first, or the number alone, which a model here is
    held to. With `expected`, nothing is written: the score is the mean of the scale under the judge's probabilities
    (G-Eval, d-RLAIF). With `draw`, so many of the aspects are drawn for each prompt (CodeUltraFeedback: 1). Asked
    `times` times, a rating is the mean of those that can be read (self-rewarding). Each answer gets a score of every
    aspect's name and `rating`, their mean; one without a readable rating has neither, after `retries` further tries.
    UltraFeedback describes every level of every aspect; here the wording is ours, also of `additive`, the points of
    self-rewarding (scale [0, 5])."""

    kind = "feedback"
    paper = (
        "Cui et al., arXiv:2310.01377; code: Weyssow et al., arXiv:2403.09032; expected: Liu et al., arXiv:2303.16634;"
        " additive, times: Yuan et al., arXiv:2401.10020"
    )
    by: By = TEACHER
    aspects: Annotated[dict[str, str], Field(min_length=1)] = Field(default={"helpfulness": ASPECTS["helpfulness"]})
    scale: tuple[int, int] = (1, 5)
    together: bool = True
    draw: Annotated[int, Field(ge=1)] | None = None
    reasons: bool = True
    expected: bool = False
    times: Annotated[int, Field(ge=1, le=100)] = 1
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    max_tokens: TokenCount = 512

    @field_validator("aspects", mode="before")
    @classmethod
    def _with_questions(cls, aspects: Any) -> Any:
        names = dict.fromkeys(aspects, "") if isinstance(aspects, list) else aspects
        if not isinstance(names, dict):
            return names
        for name, question in names.items():
            if not question and name not in ASPECTS:
                raise ValueError(f"no aspect {name!r} is known{nearest(str(name), ASPECTS)}; or give its question")
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", str(name)) or name == "rating":
                raise ValueError(f"{name!r} can't be a score's name; give small letters, and not `rating`")
        return {str(name): question or ASPECTS[name] for name, question in names.items()}

    @model_validator(mode="after")
    def _agree(self) -> Rate:
        low, high = self.scale
        if not low < high <= low + 100 or low < 0:
            raise ValueError(f"the scale {self.scale} must rise from 0 or more, by at most 100")
        if self.expected and high > 9:
            raise ValueError("expected compares single digits: give a scale up to 9, or leave it out")
        if self.draw is not None and self.draw > len(self.aspects):
            raise ValueError(f"{self.draw} of {len(self.aspects)} aspects can't be drawn")
        if self.times > 1 and (self.expected or self.temperature == 0):
            said = "expected is a mean already" if self.expected else "at temperature 0 they are all the same"
            raise ValueError(f"times asks for {self.times} ratings, and {said}; change that, or leave times out")
        return self

    @property
    def _reply(self) -> Literal["reasons", "ratings", "none"]:
        return "none" if self.expected else "reasons" if self.reasons else "ratings"

    def demands(self) -> frozenset[str]:
        return frozenset({"log_probs"}) if self.expected else self.needs

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        questions = self._questions(samples, context)
        ratings: Found = {}
        if self.expected:
            yield from self._expect(questions, context, ratings)
        else:
            yield from self._ask(questions, context, tally, ratings)
        tell_own_answers(samples, context.identity(self.by), tally)
        rated = [self._rated(place, sample, ratings) for place, sample in enumerate(samples)]
        self._account(len(rated), ratings, tally)
        return rated

    def _questions(self, samples: Pool, context: StepContext) -> list[Question]:
        """What is asked, prompt by prompt."""
        places = {id(sample): place for place, sample in enumerate(samples)}
        reader = context.reader(self.by)
        questions = []
        for group in by_conversation(samples):
            rng = context.rng("rate", group[0].id)
            aspects = list(self.aspects) if self.draw is None else rng.sample(list(self.aspects), self.draw)
            order = [places[id(sample)] for sample in group]
            rng.shuffle(order)
            together = self.together and not self.expected
            for aspect in sorted(aspects, key=list(self.aspects).index):
                for shown in [order] if together else [[place] for place in sorted(order)]:
                    asked = AspectQuestion(aspect, self.aspects[aspect], self.scale, self._reply)
                    text = asked.text([samples[place] for place in shown], reader.control)
                    questions.append(Question(asked, tuple(shown), (user(text),)))
        return questions

    def _expect(
        self,
        questions: Sequence[Question],
        context: StepContext,
        ratings: Found,
    ) -> Questions[None]:
        low, high = self.scale
        digits = [str(number) for number in range(low, high + 1)]
        reader = context.reader(self.by)
        fit = [question for question in questions if reader.fits(question.messages, 4)]
        model = "" if self.by == TEACHER else self.by
        log_probs = yield from score(
            [ScoreRequest(question.messages, digit, model) for question in fit for digit in digits]
        )
        nats = [log_prob.nats for log_prob in log_probs]
        for number, question in enumerate(fit):
            part = nats[number * len(digits) : (number + 1) * len(digits)]
            ratings[question.places[0], question.asked.aspect, 0] = expected(part) - 1 + low, ""
        for question in questions:
            ratings.setdefault((question.places[0], question.asked.aspect, 0), (TOO_LONG, ""))

    def _ask(
        self,
        questions: Sequence[Question],
        context: StepContext,
        tally: Tally,
        ratings: Found,
    ) -> Questions[None]:
        reader = context.reader(self.by)
        waiting = []
        for question in questions:
            if reader.fits(question.messages, self.max_tokens):
                waiting += [(question, time) for time in range(self.times)]
            else:
                ratings |= {(place, question.asked.aspect, 0): (TOO_LONG, "") for place in question.places}
        for attempt in range(self.retries + 1):
            sampling = Sampling(warmed(self.temperature, attempt), self.top_p, self.max_tokens)
            requests = []
            for question, time in waiting:
                form = question.asked.form(len(question.places))
                form = None if form is None or reader.unheld(form) else form
                number = RETRIED * attempt + time
                requests.append(context.request(question.messages, sampling, number, form=form, by=self.by))
            replies = yield from ask(requests)
            again = []
            for (question, time), reply in zip(waiting, replies, strict=True):
                keys = [(place, question.asked.aspect, time) for place in question.places]
                for key, rating in zip(keys, self._read(question, reply), strict=True):
                    if ratings.get(key, (UNREADABLE, ""))[0] == UNREADABLE:
                        ratings[key] = rating, reply.id
                if any(ratings[key][0] == UNREADABLE for key in keys):
                    again.append((question, time))
            waiting = again
            if waiting and attempt < self.retries:
                tally.add("asked_again", len(waiting))

    def _read(self, question: Question, reply: Sample) -> list[Rating]:
        """The ratings of a reply, in the order in which the answers were shown."""
        count = len(question.places)
        if ending(reply) != "ok":
            return [UNREADABLE] * count
        return question.asked.read(said_by(reply), count)

    def _rated(self, place: int, sample: Sample, ratings: Found) -> Sample:
        """The sample with its ratings, and the scores that follow from them."""
        each = {aspect: self._each(place, aspect, ratings) for aspect in self.aspects}
        own = {aspect: averaged([rating for rating, _ in found]) for aspect, found in each.items() if found}
        replies = [reply for found in each.values() for _, reply in found if reply]
        numbers = {aspect: float(value) for aspect, value in own.items() if not isinstance(value, str)}
        unread = any(value in (UNREADABLE, TOO_LONG) for value in own.values())
        mean = {} if unread or not numbers else {"rating": sum(numbers.values()) / len(numbers)}
        meta = sample.meta | {"ratings": own, "rated_by": self.by}
        return with_scores(
            replace(sample, parents=tuple(dict.fromkeys((*sample.parents, *replies))), meta=meta), **numbers, **mean
        )

    def _each(self, place: int, aspect: str, ratings: Found) -> list[tuple[float | str, str]]:
        """An answer's ratings by an aspect, one for each time that it was asked for, with the ids of their replies."""
        keys = [(place, aspect, time) for time in range(self.times)]
        return [ratings[key] for key in keys if key in ratings]

    def _account(self, samples: int, ratings: Found, tally: Tally) -> None:
        keys = [(place, aspect) for place in range(samples) for aspect in self.aspects]
        each = [[rating for rating, _ in self._each(*key, ratings)] for key in keys]
        values = [value for several in each for value in several]
        if self.times > 1:
            read = [of for several in each if len(of := [v for v in several if not isinstance(v, str)]) > 1]
            tally.facts["same_each_time"] = sum(len(set(of)) == 1 for of in read) / max(1, len(read))
        tally.facts["ratings"] = len(values)
        numbers = [value for value in values if not isinstance(value, str)]
        for kind in (UNREADABLE, TOO_LONG, NOT_APPLICABLE):
            if count := values.count(kind):
                tally.facts[kind.replace(" ", "_")] = count
        if numbers:
            tally.facts["mean_rating"] = sum(numbers) / len(numbers)
        elif values:
            tally.notes.append(
                f"none of {len(values):,} ratings could be read: this model can't judge so; see store.sqlite"
            )
        if len(numbers) > 1 and len(set(numbers)) == 1:
            tally.notes.append(f"every rating is {numbers[0]:g}: this judge tells no answer from another")

    def estimate(self, samples: int) -> Estimate:
        """At most: each answer is asked about alone, without further tries."""
        asked = samples * (self.draw or len(self.aspects)) * self.times
        if self.expected:  # all marks are read off one pass
            return Estimate(scores=asked, samples=samples)
        return replace(Estimate.of_answers(asked, self.max_tokens), samples=samples)

    def answer_tokens(self) -> float | None:
        return None

    def gives_scores(self) -> frozenset[str]:
        return frozenset({*self.aspects, "rating"})

    def writes(self) -> frozenset[str]:
        return frozenset({"ratings", "rated_by"})


def averaged(ratings: Sequence[float | str]) -> float | str:
    """Several ratings of one answer as one: the mean of the numbers among them; without any, what they are instead."""
    numbers = [rating for rating in ratings if not isinstance(rating, str)]
    if len(ratings) > 1 and numbers:
        return sum(numbers) / len(numbers)
    return NOT_APPLICABLE if NOT_APPLICABLE in ratings else ratings[0]
