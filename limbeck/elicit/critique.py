"""Feedback: a model says in words what is wrong with an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from limbeck.config.named_models import TEACHER
from limbeck.elicit.decision import decision
from limbeck.elicit.fence import DATA, conversation_text, fill_fenced
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    complete_replies,
    prompt_messages,
    said_by,
    user,
)
from limbeck.elicit.merit import answered_only
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.types import Sampling

PRINCIPLES = {
    "harmless": (
        "Does the answer help anybody to do something illegal, violent or dangerous?",
        "Does the answer insult, demean or stereotype people, or treat groups of people unequally?",
        "Could the answer harm whoever follows it, in body, mind or money, or harm somebody else?",
        "Does the answer deceive, manipulate, or state as certain what is not?",
        "Does the answer give away what should stay private about a person?",
        "Would a thoughtful and kind person object to the answer, and if so to what?",
    ),
    "helpful": (
        "Does the answer do all that the request asks, and only that?",
        "Is anything in the answer wrong, unsupported, or in contradiction to the request or to itself?",
        "Is the answer clear, well ordered, and as short as it can be without leaving out what matters?",
        "What would whoever asked still have to find out by themselves after this answer?",
    ),
}
HEAD = f"You review an answer to a request. Below stand both. {DATA}\n\nRequest:\n{{prompt}}\n\nAnswer:\n{{answer}}\n\n"
SAY = " Name what is wrong, and where, in a few sentences. Don't write a new answer."
DECIDE = (
    " Then end with one line that says whether the answer should be revised, and holds nothing else:\n"
    "REVISE: YES\nor\nREVISE: NO"
)


@register("critique")
class Critique(AskingStep):
    """The model `by` says what is wrong with each answer, by a principle that is drawn: of `harmless` ones
    (Constitutional AI), `helpful` ones (SelFee), or of your own. Writes `critique` and `principle`, which `refine`
    reads. With `decides`, the critique ends by saying whether a revision is needed; where that can't be read, `refine`
    drops the sample. The answer stays as it is. The wording of the principles is ours."""

    kind = "feedback"
    paper = "Bai et al., arXiv:2212.08073; Ye et al. 2023, SelFee"
    by: By = TEACHER
    principles: Literal["harmless", "helpful"] | Annotated[list[str], Field(min_length=1)] = "helpful"
    decides: bool = False
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        known = PRINCIPLES[self.principles] if isinstance(self.principles, str) else self.principles
        reader = context.reader(self.by)
        turns = []
        for sample in answered_only(pool, tally):
            principle = context.rng("principle", sample.id).choice(list(known))
            prompt = conversation_text(prompt_messages(sample))
            text = fill_fenced(HEAD, reader.control, prompt=prompt, answer=said_by(sample)) + principle + SAY
            messages = (user(text + (DECIDE if self.decides else "")),)
            if reader.fits(messages, self.max_tokens):
                turns.append((sample, principle, messages))
            else:
                tally.drop("too long to be shown", answer_of(sample) or "")
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request(messages, sampling, by=self.by) for *_, messages in turns])
        reviewed = []
        for (sample, principle, _), reply in complete_replies(turns, replies, tally):
            text, revise = decision(said_by(reply)) if self.decides else (said_by(reply).strip(), True)
            tally.add("unreadable", revise is None)
            tally.add("good_as_they_are", revise is False)
            meta = {"critique": text, "principle": principle, "revise": "unreadable" if revise is None else revise}
            reviewed.append(replace(sample, parents=(*sample.parents, reply.id), meta=sample.meta | meta))
        return reviewed

    def estimate(self, samples: int) -> Estimate:
        return Estimate.of_answers(samples, self.max_tokens)

    def answer_tokens(self) -> float | None:
        return None

    def writes(self) -> frozenset[str]:
        return frozenset({"critique", "principle", "revise"})
