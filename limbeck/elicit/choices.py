"""Multiple-choice questions on a topic, with the model's probability of every choice as a soft label."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    ScoreRequest,
    StepContext,
    Tally,
    are_complete,
    ask,
    complete_replies,
    ending,
    prompt_of,
    said_by,
    score,
    user,
)
from limbeck.elicit.json_in import objects_in
from limbeck.elicit.merit import normalised
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.wording import fill, items, numbered
from limbeck.types import Sample, Sampling

AS_JSON = (
    "Here are questions of a quiz:\n\n{examples}\n\nWrite one new question of this kind with four choices, as JSON and"
    ' nothing else, in this form: {"question": "...", "choices": ["...", "...", "...", "..."], "answer": 0} where'
    " answer is the place of the right choice, from 0 to 3."
)
QUESTION = (
    "Here are questions of a quiz:\n\n{examples}\n\nWrite one new question of this kind. Write the question and nothing"
    " else."
)
RIGHT = "Answer in a few words and nothing else.\n\nQuestion: {question}\nAnswer:"
WRONG = (
    "Write three wrong but plausible answers to the question, as a numbered list, each in a few words.\n\nQuestion:"
    " {question}\nRight answer: {answer}\n\nWrong answers:\n1."
)
LETTERS = "ABCD"
FIRST = re.compile(r"\A\s*1[.)](?!\d)\s*")


@dataclass(frozen=True)
class QuizQuestion:
    """A question with four choices, the place of the right one, and the ids of the samples that it came from."""

    text: str
    choices: list[str]
    right: int
    parents: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text}\n\n{choices}\n\nAnswer with the letter of the right choice."


@register("few_shot_choices")
class FewShotChoices(AskingStep):
    """Asks for quiz questions like those in the pool, `shown` of them in each request: as one JSON object (`direct`),
    or in parts, the question, its right answer, and three wrong ones (`decomposed`). The sample's answer is the letter
    that the model finds likeliest; its weight is that probability, and `probabilities` holds those of all four letters.
    The paper trains an encoder on these soft labels; a decoder gets the letter, weighted."""

    kind = "curate"
    paper = "Sutanto et al., arXiv:2412.09807 (number recalled, not confirmed)"
    needs = frozenset({"text", "log_probs"})
    count: Annotated[int, Field(ge=1)] = 100
    how: Literal["direct", "decomposed"] = "decomposed"
    shown: Annotated[int, Field(ge=1)] = 5
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: TokenCount = 160

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        groups = [context.rng("shown", n).sample(pool, min(self.shown, len(pool))) for n in range(self.count)]
        write = self._direct if self.how == "direct" else self._decomposed
        questions = yield from write(groups, context, tally)
        scores = yield from score(
            [ScoreRequest((user(question.prompt),), letter) for question in questions for letter in LETTERS]
        )
        samples: Pool = []
        for number, question in enumerate(questions):
            probabilities = normalised([log_prob.nats for log_prob in scores[4 * number : 4 * number + 4]])
            best = probabilities.index(max(probabilities))
            tally.add("likeliest_is_the_one_named", best == question.right)
            meta = {
                "kind": "choices",
                "probabilities": probabilities,
                "weight": max(probabilities[best], 1e-3),
                "finish": "ok",
                "prompt_id": f"choices-{number}",
                "check": {"type": "choice", "labels": list(LETTERS), "answer": LETTERS[question.right]},
            }
            messages = (user(question.prompt), {"role": "assistant", "content": LETTERS[best]})
            samples.append(Sample(messages, context.model, parents=question.parents, meta=meta))
        return samples

    def _direct(self, groups: list[Pool], context: StepContext, tally: Tally) -> Questions[list[QuizQuestion]]:
        texts = [AS_JSON.replace("{examples}", _examples(group)) for group in groups]
        replies = yield from ask([context.request((user(text),), self._sampling(), n) for n, text in enumerate(texts)])
        questions = []
        for group, reply in complete_replies(groups, replies, tally):
            read = read_question(said_by(reply))
            if read is None:
                tally.drop("no question with four choices", said_by(reply))
            else:
                questions.append(QuizQuestion(*read, parents=tuple(sample.id for sample in (*group, reply))))
        return questions

    def _decomposed(self, groups: list[Pool], context: StepContext, tally: Tally) -> Questions[list[QuizQuestion]]:
        texts = [fill(QUESTION, examples=_examples(group)) for group in groups]
        replies = yield from ask([context.request((user(text),), self._sampling(), n) for n, text in enumerate(texts)])
        complete = are_complete(replies, tally)
        drafts = [  # (question, the samples that it came from)
            (said_by(reply).strip(), [*group, reply])
            for group, reply, whole in zip(groups, replies, complete, strict=True)
            if whole
        ]
        texts = [fill(RIGHT, question=question) for question, _ in drafts]
        right = yield from ask([context.request((user(text),), Sampling(0.0, 1.0, 24)) for text in texts])
        answered = complete_replies(drafts, right, tally)
        drafts = [draft for draft, _ in answered]
        answers = [said_by(reply).strip().rstrip(".") for _, reply in answered]
        texts = [
            fill(WRONG, question=question, answer=answer) for (question, _), answer in zip(drafts, answers, strict=True)
        ]
        wrong = yield from ask([context.request((user(text),), self._sampling()) for text in texts])
        questions = []
        for (question, parents), answer, reply in zip(drafts, answers, wrong, strict=True):
            if (finish := ending(reply)) not in ("ok", "length"):
                tally.drop(f"answer: {finish}", said_by(reply))
                continue
            others = _wrong_answers(said_by(reply), answer, finish == "length")
            if not answer or len(others) < 3:
                tally.drop("fewer than three wrong answers", said_by(reply))
                continue
            place = context.rng("place", question).randrange(4)
            choices = [*others[:place], answer, *others[place:]]
            ids = tuple(sample.id for sample in (*parents, reply))
            questions.append(QuizQuestion(question, choices, place, parents=ids))
        return questions

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def estimate(self, _: int) -> Estimate:
        requests = self.count * (1 if self.how == "direct" else 3)
        tokens = int(requests * self.max_tokens * ANSWER_SHARE)
        return Estimate(requests, tokens, scores=4 * self.count, samples=self.count)


def _examples(group: Pool) -> str:
    return numbered([prompt_of(sample) for sample in group])


def _wrong_answers(text: str, right: str, cut: bool) -> list[str]:
    """Up to three different entries of a numbered list that are not the right answer, without the last of one that was
    cut off."""
    listed = [entry.splitlines()[0].rstrip(".") for _, entry in items(f"1. {FIRST.sub('', text, 1)}") if entry]
    listed = listed[:-1] if cut else listed
    return [entry for entry in dict.fromkeys(listed) if entry.casefold() != right.casefold()][:3]


def read_question(text: str) -> tuple[str, list[str], int] | None:
    """(question, four different choices, the place of the right one) from the first JSON object in a reply; None if it
    holds no such question."""
    data = next(iter(objects_in(text)), None)
    if data is None:
        return None
    question = data.get("question")
    choices = data.get("choices")
    right = data.get("answer")
    if not isinstance(question, str) or not question.strip() or not isinstance(choices, list) or len(choices) != 4:
        return None
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return None
    if len({choice.casefold().strip() for choice in choices}) < 4:
        return None
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < 4:
        return None
    return question.strip(), [choice.strip() for choice in choices], right
