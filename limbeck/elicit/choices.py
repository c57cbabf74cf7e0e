"""Multiple-choice questions on a topic, with the writer's probability of every choice as a soft label."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.answer import ANSWER_SHARE, Temperature, Tokens, TopP
from limbeck.elicit.flow import (
    Asking,
    Bill,
    Kind,
    Pool,
    Scene,
    Score,
    Tally,
    answer_of,
    ask,
    finished,
    prompt_of,
    score,
    user,
)
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


class FewShotChoices(Section):
    """Quiz questions like the pool's (`shown` of them in each request): in one piece as JSON (`direct`), or by steps,
    the question, its right answer, three wrong ones (`decomposed`). The writer's probability of each choice's letter,
    normalised over the four, stands in `probabilities`; the sample's answer is the likeliest letter, and its weight
    that probability. The paper trains an encoder on the soft labels; a decoder gets the letter, weighted."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Sutanto et al., arXiv:2412.09807 (number recalled, not confirmed)"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "log_probs"})
    count: Annotated[int, Field(ge=1)] = 100
    how: Literal["direct", "decomposed"] = "decomposed"
    shown: Annotated[int, Field(ge=1)] = 5
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: Tokens = 160

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        shown = [scene.draw("shown", n).sample(pool, min(self.shown, len(pool))) for n in range(self.count)]
        made = yield from (
            self._direct(shown, scene, tally) if self.how == "direct" else self._decomposed(shown, scene, tally)
        )
        texts = [
            f"{question}\n\n" + "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, choices, strict=True))
            for question, choices, _, _ in made
        ]
        asked = [f"{text}\n\nAnswer with the letter of the right choice." for text in texts]
        scores = yield from score([Score((user(text),), letter) for text in asked for letter in LETTERS])
        found: Pool = []
        for number, (text, (_, _, right, parents)) in enumerate(zip(asked, made, strict=True)):
            weights = _normalised([one.nats for one in scores[4 * number : 4 * number + 4]])
            best = weights.index(max(weights))
            tally.add("likeliest_is_the_one_named", best == right)
            meta = {
                "kind": "choices",
                "probabilities": weights,
                "weight": max(weights[best], 1e-3),
                "finish": "ok",
                "prompt_id": f"choices-{number}",
                "check": {"type": "choice", "labels": list(LETTERS), "answer": LETTERS[right]},
            }
            found.append(
                Sample((user(text), {"role": "assistant", "content": LETTERS[best]}), scene.model, None, parents, meta)
            )
        return found

    def _direct(
        self, shown: list[Pool], scene: Scene, tally: Tally
    ) -> Asking[list[tuple[str, list[str], int, tuple[str, ...]]]]:
        questions = [AS_JSON.replace("{examples}", _examples(group)) for group in shown]
        replies = yield from ask(
            [scene.request((user(text),), self._sampling(), n) for n, text in enumerate(questions)]
        )
        found = []
        for group, reply, whole in zip(shown, replies, finished(replies, tally), strict=True):
            read = read_question(answer_of(reply) or "") if whole else None
            if read is not None:
                found.append((*read, tuple(sample.id for sample in (*group, reply))))
            elif whole:
                tally.drop("no question with four choices", answer_of(reply) or "")
        return found

    def _decomposed(
        self, shown: list[Pool], scene: Scene, tally: Tally
    ) -> Asking[list[tuple[str, list[str], int, tuple[str, ...]]]]:
        asked = [
            scene.request((user(fill(QUESTION, examples=_examples(group))),), self._sampling(), n)
            for n, group in enumerate(shown)
        ]
        first = yield from ask(asked)
        whole = finished(first, tally)
        questions = [
            ((answer_of(r) or "").strip(), group, r) for group, r, good in zip(shown, first, whole, strict=True) if good
        ]
        short = Sampling(0.0, 1.0, 24)
        right = yield from ask([scene.request((user(fill(RIGHT, question=q)),), short) for q, _, _ in questions])
        answers = [
            (q, (answer_of(r) or "").strip().rstrip("."), group, one)
            for (q, group, one), r in zip(questions, right, strict=True)
        ]
        wrong = yield from ask(
            [scene.request((user(fill(WRONG, question=q, answer=a)),), self._sampling()) for q, a, _, _ in answers]
        )
        found = []
        for (question, answer, group, one), reply in zip(answers, wrong, strict=True):
            listed = [
                text.splitlines()[0].rstrip(".")
                for _, text in items(f"1. {(answer_of(reply) or '').lstrip('1. ')}")
                if text
            ]
            others = [text for text in dict.fromkeys(listed) if text.casefold() != answer.casefold()][:3]
            if not answer or len(others) < 3:
                tally.drop("fewer than three wrong answers", answer_of(reply) or "")
                continue
            place = scene.draw("place", question).randrange(4)
            choices = [*others[:place], answer, *others[place:]]
            found.append((question, choices, place, tuple(sample.id for sample in (*group, one, reply))))
        return found

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_tokens)

    def bill(self, _: int) -> Bill:
        asked = self.count * (1 if self.how == "direct" else 3)
        return Bill(asked, int(asked * self.max_tokens * ANSWER_SHARE), 4 * self.count, self.count)


def _examples(group: Pool) -> str:
    return numbered([prompt_of(sample) for sample in group])


def _normalised(log_probs: list[float]) -> list[float]:
    highest = max(log_probs)
    weights = [math.exp(nats - highest) for nats in log_probs]
    return [weight / sum(weights) for weight in weights]


def read_question(text: str) -> tuple[str, list[str], int] | None:
    """(question, four different choices, the place of the right one) out of an answer's first JSON object; None where
    it holds none."""
    start = re.search(r"\{", text)
    try:
        found = json.JSONDecoder().raw_decode(text[start.start() :])[0] if start else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    question = found.get("question")
    choices = found.get("choices")
    right = found.get("answer")
    if not isinstance(question, str) or not question.strip() or not isinstance(choices, list) or len(choices) != 4:
        return None
    if (
        not all(isinstance(choice, str) and choice.strip() for choice in choices)
        or len({c.casefold().strip() for c in choices}) < 4
    ):
        return None
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < 4:
        return None
    return question.strip(), [choice.strip() for choice in choices], right


STEPS: dict[str, type[Section]] = {"few_shot_choices": FewShotChoices}
