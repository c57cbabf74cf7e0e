"""Feedback: how much a judge prefers one answer to another, by its own probabilities of saying so."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from limbeck.config.named_models import TEACHER
from limbeck.elicit.fence import DATA, conversation_text, fill_fenced
from limbeck.elicit.flow import (
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    ask,
    by_conversation,
    ending,
    prompt_messages,
    said_by,
    score,
    user,
    with_scores,
)
from limbeck.elicit.merit import answered_only, normalised, tell_own_answers
from limbeck.elicit.step import AskingStep, By, Estimate, TokenCount, register
from limbeck.elicit.two_orders import PREFER
from limbeck.types import Message, Sampling

LABELS = ("1", "2")
HEAD = f"You compare two answers to one request. Below stand the request and the answers 1 and 2. {DATA}\n\n"
SHOWN = "\n\nRequest:\n{prompt}\n\nAnswer 1:\n{one}\n\nAnswer 2:\n{two}\n\n"
WEIGH = "Think about both answers, one after the other, in a few sentences: which is better, and why?"
CHOOSE = "Which answer is better? Answer with 1 or 2 alone."


@register("soft_preference")
class SoftPreference(AskingStep):
    """The model `by` is shown every two answers to a prompt in both orders; the preference is the probability that it
    gives the label of the one rather than the other, averaged over the orders (RLAIF). With `reasons` it first writes
    what speaks for each. Each answer gets the score `preference`: the mean over its comparisons, between 0 and 1. Of
    the judge it tells how often both orders prefer the same answer, and its mean probability of the one shown first.
    Needs log-probabilities, so weights that are here. The paper trains a reward model on the soft labels;
    `pairs` makes hard ones of them, with a `margin` where wanted."""

    kind = "feedback"
    paper = "Lee et al., arXiv:2309.00267"
    needs = frozenset({"text", "log_probs"})
    scores = frozenset({"preference"})
    by: By = TEACHER
    prefer: str = PREFER
    reasons: bool = False
    max_tokens: TokenCount = 256

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        samples = answered_only(pool, tally)
        tell_own_answers(samples, context.identity(self.by), tally)
        reader = context.reader(self.by)
        places = {id(sample): place for place, sample in enumerate(samples)}
        pairs = [
            (places[id(one)], places[id(other)])
            for group in by_conversation(samples)
            for one, other in combinations(group, 2)
        ]
        shown = {}  # the question by (first, second) answer as they stand
        for pair in pairs:
            for one, two in (pair, pair[::-1]):
                prompt = conversation_text(prompt_messages(samples[one]))
                texts = fill_fenced(
                    SHOWN, reader.control, prompt=prompt, one=said_by(samples[one]), two=said_by(samples[two])
                )
                shown[one, two] = HEAD + self.prefer + texts
        room = self.max_tokens + 64 if self.reasons else 8
        fit = [
            pair
            for pair in pairs
            if all(reader.fits((user(shown[order] + WEIGH),), room) for order in (pair, pair[::-1]))
        ]
        orders = [order for pair in fit for order in (pair, pair[::-1])]
        asked = yield from self._asked(context, tally, [shown[order] for order in orders])
        told = [messages for messages in asked if messages is not None]
        model = "" if self.by == TEACHER else self.by
        log_probs = yield from score([ScoreRequest(messages, label, model) for messages in told for label in LABELS])
        chances = iter(
            normalised([one.nats, two.nats])[0] for one, two in zip(log_probs[0::2], log_probs[1::2], strict=True)
        )
        found = {
            order: next(chances) for order, messages in zip(orders, asked, strict=True) if messages is not None
        }  # of the one that is shown first
        return self._judged(samples, pairs, found, tally)

    def _asked(
        self, context: StepContext, tally: Tally, questions: list[str]
    ) -> Questions[list[tuple[Message, ...] | None]]:
        """The conversations after which the label is said; None where the reasons did not come to their end."""
        if not self.reasons:
            return [(user(question + CHOOSE),) for question in questions]
        first = [(user(question + WEIGH),) for question in questions]
        sampling = Sampling(0.0, 1.0, self.max_tokens)
        replies = yield from ask([context.request(messages, sampling, by=self.by) for messages in first])
        asked: list[tuple[Message, ...] | None] = []
        for messages, reply in zip(first, replies, strict=True):
            whole = ending(reply) == "ok"
            tally.add("reasons_cut_off", not whole)
            said = {"role": "assistant", "content": said_by(reply)}
            asked.append((*messages, said, user(CHOOSE)) if whole else None)
        return asked

    def _judged(
        self, samples: Pool, pairs: list[tuple[int, int]], found: dict[tuple[int, int], float], tally: Tally
    ) -> Pool:
        """The samples with their mean preference; a pair of which either order is missing says nothing."""
        chances: dict[int, list[float]] = {}
        agreed, in_front = [], []
        for one, two in pairs:
            if (one, two) not in found or (two, one) not in found:
                tally.add("unreadable")
                continue
            forward, backward = found[one, two], 1 - found[two, one]  # both of the first answer
            preference = (forward + backward) / 2
            chances.setdefault(one, []).append(preference)
            chances.setdefault(two, []).append(1 - preference)
            agreed.append((forward > 0.5) == (backward > 0.5))
            in_front += [found[one, two], found[two, one]]
        tally.facts["pairs"] = len(pairs)
        if agreed:
            tally.facts["swap_consistency"] = sum(agreed) / len(agreed)
            tally.facts["first_position_probability"] = sum(in_front) / len(in_front)
        return [
            with_scores(
                replace(sample, meta=sample.meta | {"compared_by": self.by}),
                **({"preference": sum(chances[place]) / len(chances[place])} if place in chances else {}),
            )
            for place, sample in enumerate(samples)
        ]

    def estimate(self, samples: int) -> Estimate:
        return self.estimate_of(samples, max(1, samples // 2))

    def estimate_of(self, samples: int, prompts: int) -> Estimate:
        orders = round(samples * max(0.0, samples / max(1, prompts) - 1))
        written = Estimate.of_answers(orders, self.max_tokens) if self.reasons else Estimate()
        return replace(written, scores=orders, samples=samples)  # both labels are read off one pass

    def answer_tokens(self) -> float | None:
        return None

    def writes(self) -> frozenset[str]:
        return frozenset({"compared_by"})
