"""Feedback: answers revised by their critiques, and the whole history of drafts as an answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from limbeck.config.named_models import TEACHER
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
    unjudged,
    user,
    with_answer,
    with_new_answer,
)
from limbeck.elicit.step import AskingStep, By, LocalStep, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.types import Sample, Sampling

REVISE = (
    f"Below stand a request, an answer to it, and a critique of that answer. {DATA}\n\nRequest:\n{{prompt}}\n\n"
    "Answer:\n{answer}\n\nCritique:\n{critique}\n\nWrite the answer anew, so that the critique no longer holds. Give"
    " the new answer alone, as whoever asked is to read it."
)
CRITIQUE = ("critique", "principle", "revise")  # what `critique` writes


@register("refine")
class Refine(AskingStep):
    """The model `by` revises every answer by its `critique` (the step before), and the revision is the sample's answer;
    one whose critique asks for none stays. Write `critique` and `refine` several times for several rounds. Each draft
    with its critique is kept in `drafts`. A check of the prompt is not run: put `verify` after it."""

    kind = "feedback"
    paper = "Bai et al., arXiv:2212.08073; Ye et al. 2023, SelFee"
    by: By = TEACHER
    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        reader = context.reader(self.by)
        waiting: list[tuple[int, tuple[dict[str, str], ...]]] = []
        refined: dict[int, Sample] = {}
        for place, sample in enumerate(pool):
            revise = sample.meta.get("revise")
            messages = (user(self._text(sample, reader.control)),)
            if answer_of(sample) is None or "critique" not in sample.meta:
                tally.drop("no critique of it", sample.messages[-1]["content"])
            elif revise == "unreadable":
                tally.drop("whether to revise it can't be read", answer_of(sample) or "")
            elif revise is False:
                refined[place] = unjudged(sample, *CRITIQUE)
            elif not reader.fits(messages, self.max_tokens):
                tally.drop("too long to be shown", answer_of(sample) or "")
            else:
                waiting.append((place, messages))
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        replies = yield from ask([context.request(messages, sampling, by=self.by) for _, messages in waiting])
        same = 0
        for (place, _), reply in complete_replies(waiting, replies, tally):
            sample = pool[place]
            draft = {"answer": answer_of(sample), "critique": sample.meta["critique"]}
            meta = unjudged(sample, *CRITIQUE).meta | {"drafts": [*sample.meta.get("drafts", []), draft]}
            text = said_by(reply).strip()
            whole = None if text == reply.messages[-1]["content"].strip() else text
            refined[place] = with_answer(replace(sample, meta=meta), reply, whole)
            same += text == (answer_of(sample) or "").strip()
        tally.facts["unchanged_by_revision"] = same
        return [refined[place] for place in sorted(refined)]

    @staticmethod
    def _text(sample: Sample, control: Collection[str]) -> str:
        prompt = conversation_text(prompt_messages(sample))
        critique = str(sample.meta.get("critique", ""))
        return fill_fenced(REVISE, control, prompt=prompt, answer=said_by(sample), critique=critique)

    def shows(self) -> StepPrompt | None:
        return VARIES if self.by == TEACHER else None

    def writes(self) -> frozenset[str]:
        return frozenset({"drafts"})


@register("drafts")
class DraftsAsAnswer(LocalStep):
    """Makes the whole history the answer: each draft with the feedback on it, then the last revision, so that the
    student learns to criticise and revise itself (SelFee). An answer without drafts stays as it is."""

    kind = "feedback"
    paper = "Ye et al. 2023, SelFee"

    def apply(self, pool: Pool, _: StepContext, tally: Tally) -> Pool:
        whole: Pool = []
        for sample in pool:
            drafts = sample.meta.get("drafts") or []
            if answer_of(sample) is None or not drafts:
                whole.append(sample)
                continue
            parts = [f"{draft['answer']}\n\nFeedback: {draft['critique']}\n\nRevision:" for draft in drafts]
            text = "\n".join([*parts, answer_of(sample) or ""])
            whole.append(with_new_answer(sample, text, sample.writer))
            tally.add("with_drafts")
        return whole
