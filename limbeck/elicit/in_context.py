"""Feedback: how much an answer helps a student with other questions, when it is shown as an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.config.named_models import TEACHER, UNTOUCHED
from limbeck.elicit.flow import (
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    ending,
    new_prompt,
    prompt_messages,
    prompt_of,
    said_by,
    score,
    with_answer,
    with_scores,
)
from limbeck.elicit.merit import answered_only, nats_per_token
from limbeck.elicit.step import AskingStep, By, Estimate, TokenCount, register
from limbeck.elicit.verified import AnswerType, verdict_of
from limbeck.types import Message, RecipeError, Sample, Sampling

NOT_WRITTEN = ("refused", "filtered", "error")


@dataclass(frozen=True)
class Shown:
    """A sample whose help is measured: the example made of it, and the probes that it is tried on."""

    sample: Sample
    example: tuple[Message, ...]
    probes: tuple[Sample, ...]


@register("in_context")
class InContext(AskingStep):
    """How much an answer helps: the model `by` (a student) is shown the prompt with this answer as an example, and then
    asked `probes` of the recipe's own prompts whose right answers are known. The score `helps` is how much better it
    does than without the example: by `likelihood`, in nats per token of the right answer, or by `accuracy`, the share
    of its greedy answers that pass their prompt's check (or, with `against`, agree with the corpus's answer), as in
    ARTE. Where answers are drafts of questions, `author` is the model that answers each first, and the example is the
    draft with that answer; `questions` is the task of such samples, by default all are. All samples have the same
    probes, but none whose text stands in the sample itself. `pairs: {score: helps}` makes preferences of it."""

    kind = "feedback"
    paper = "Liu et al., arXiv:2406.19227"
    scores = frozenset({"helps"})
    by: By = UNTOUCHED
    author: By | None = None
    questions: str | None = None
    measure: Literal["likelihood", "accuracy"] = "likelihood"
    against: AnswerType | None = None
    probes: Annotated[int, Field(ge=1, le=1000)] = 16
    max_tokens: TokenCount = 128

    @model_validator(mode="after")
    def _agree(self) -> InContext:
        if self.questions is not None and self.author is None:
            raise ValueError(
                "drafts of questions need an author, which answers them: name a model, or leave questions out"
            )
        if self.against is not None and self.measure != "accuracy":
            raise ValueError("against says when a written answer is right: set measure: accuracy, or leave it out")
        return self

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        probes = self._probes(context)
        shown = yield from self._shown(answered_only(pool, tally), probes, context, tally)
        alone = yield from self._measured([((), probe) for probe in probes], context)
        turns = [(each.example, probe) for each in shown for probe in each.probes]
        measured = iter((yield from self._measured(turns, context)))
        without = {probe.id: value for probe, value in zip(probes, alone, strict=True)}
        rated: Pool = []
        for each in shown:
            pairs = [(next(measured), without[probe.id]) for probe in each.probes]
            gains = [one - other for one, other in pairs if one is not None and other is not None]
            if gains:
                rated.append(with_scores(each.sample, helps=sum(gains) / len(gains)))
            else:
                tally.drop("no answer to any probe", answer_of(each.sample) or "")
        known = [value for value in alone if value is not None]
        helps = [sample.meta["scores"]["helps"] for sample in rated]
        tally.facts |= {"probes": len(probes), "without_an_example": sum(known) / max(1, len(known))}
        tally.facts |= {"helps": sum(helps) / max(1, len(helps)), "that_help": sum(value > 0 for value in helps)}
        return rated

    def _probes(self, context: StepContext) -> Pool:
        known = [sample for sample in context.given if self._is_known(sample)]
        return context.rng("probes").sample(known, min(self.probes, len(known)))

    def _is_known(self, sample: Sample) -> bool:
        """Whether a prompt's right answer is known, in the form that the measure needs."""
        answers = sample.meta.get("answers")
        if self.measure == "likelihood":
            return bool(answers)
        return sample.meta.get("check") is not None or bool(answers and self.against)

    def _shown(self, samples: Pool, probes: Pool, context: StepContext, tally: Tally) -> Questions[list[Shown]]:
        """The samples as examples. A draft of a question is answered first."""
        drafts = [sample for sample in samples if self._is_question(sample)]
        asked = [new_prompt(said_by(sample).strip(), [sample], sample.writer) for sample in drafts]
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        requests = [context.request(prompt.messages, sampling, by=self.author or self.by) for prompt in asked]
        replies = yield from ask(requests)
        turns = list(zip(drafts, asked, strict=True))
        answered = {
            id(draft): with_answer(prompt, reply).messages
            for (draft, prompt), reply in complete_replies(turns, replies, tally)
        }
        reader = context.reader(self.by)
        shown = []
        for sample in samples:
            if self._is_question(sample) and id(sample) not in answered:
                continue  # its author's answer is no example, and is counted
            example = answered.get(id(sample), sample.messages)
            text = "\n".join(message["content"] for message in (*sample.messages, *example))
            ours = tuple(probe for probe in probes if prompt_of(probe) not in text)
            if not ours:
                tally.drop("all probes stand in it", answer_of(sample) or "")
            elif not all(reader.fits(self._room(example, probe), self._tokens) for probe in ours):
                tally.drop("too long to be shown", answer_of(sample) or "")
            else:
                shown.append(Shown(sample, example, ours))
        return shown

    def _is_question(self, sample: Sample) -> bool:
        return self.author is not None and self.questions in (None, sample.meta.get("task"))

    @property
    def _tokens(self) -> int:
        return self.max_tokens if self.measure == "accuracy" else 1

    def _room(self, example: Sequence[Message], probe: Sample) -> tuple[Message, ...]:
        """What must fit into the student's context, beside what it writes."""
        *before, last = _conversation(example, probe)
        right = "" if self.measure == "accuracy" else f"\n{_right(probe)}"  # read after the prompt
        return (*before, {**last, "content": last["content"] + right})

    def _measured(
        self, turns: Sequence[tuple[tuple[Message, ...], Sample]], context: StepContext
    ) -> Questions[list[float | None]]:
        """How well the student does at a probe after an example; None where it wrote nothing that can be judged."""
        if self.measure == "likelihood":
            name = "" if self.by == TEACHER else self.by
            found = yield from score(
                [ScoreRequest(_conversation(example, probe), _right(probe), name) for example, probe in turns]
            )
            return [-nats_per_token(log_prob) for log_prob in found]
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        replies = yield from ask(
            [context.request(_conversation(example, probe), sampling, by=self.by) for example, probe in turns]
        )
        return [self._is_right(probe, reply) for (_, probe), reply in zip(turns, replies, strict=True)]

    def _is_right(self, probe: Sample, reply: Sample) -> float | None:
        if ending(reply) in NOT_WRITTEN:
            return None
        return float(bool(verdict_of(with_answer(probe, reply), self.against)[0]))

    def asks(self) -> tuple[str, ...]:
        return (self.by,) if self.author in (None, self.by) else (self.by, str(self.author))

    def demands_of(self, by: str) -> frozenset[str]:
        scores = by == self.by and self.measure == "likelihood"
        return frozenset({"text"}) | (frozenset({"log_probs"}) if scores else frozenset())

    def estimate(self, samples: int) -> Estimate:
        turns = (samples + 1) * self.probes
        drafts = samples if self.author is not None else 0
        if self.measure == "likelihood":
            return replace(Estimate.of_answers(drafts, self.max_tokens), scores=turns, samples=samples)
        return replace(Estimate.of_answers(drafts + turns, self.max_tokens), samples=samples)

    def answer_tokens(self) -> float | None:
        return None

    def refuse_prompts(self, place: str, prompts: Pool) -> None:
        if not any(self._is_known(prompt) for prompt in prompts):
            needs = "an answer" if self.measure == "likelihood" else "a check"
            raise RecipeError(place, f"no prompt has {needs} beside it, by which a student's could be told: give some")


def _conversation(example: Sequence[Message], probe: Sample) -> tuple[Message, ...]:
    """An example and a prompt after it. A second system message is left out: no template has a place for one."""
    return (*example, *(message for message in prompt_messages(probe) if not example or message["role"] != "system"))


def _right(probe: Sample) -> str:
    """The right answer to a probe."""
    return str(probe.meta["answers"][0])
