"""Debate: several answers to a prompt, each revised in the light of the others, and what most of them come to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.config.named_models import TEACHER
from limbeck.elicit.fence import DATA, fenced
from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    ask,
    ending,
    prompt_messages,
    prompt_of,
    said_by,
    unjudged,
    user,
    with_answer,
    with_scores,
)
from limbeck.elicit.rationale import IN_ONE
from limbeck.elicit.step import AskingStep, By, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.step_prompt import VARIES, StepPrompt
from limbeck.elicit.verified import AnswerType, final_answer
from limbeck.elicit.wording import PLACEHOLDER, fill
from limbeck.types import Message, Sample, Sampling

OTHERS = f"Others have answered the same question. {DATA}\n\n{{answers}}\n\n"
AGAIN = (
    "Compare these answers with your own, find out which steps are right, and answer the question once more, in the"
    " same form as before:\n\n{question}"
)
NO_MAJORITY = "no majority"
SEEDS = 1000  # what numbers of agents begin with in a round: they tell requests of one conversation apart


@dataclass(eq=False)
class Agent:
    """One of those that debate about a prompt.

    Args:
        number: its place among them.
        by: the model's name.
        talk: what has been said to it and by it.
        replies: its complete reply in each round; None where it gave none.
        is_full: its conversation has no room for another round.
    """

    sample: Sample
    number: int
    by: str
    talk: tuple[Message, ...]
    replies: list[Sample | None] = field(default_factory=list)
    is_full: bool = False

    def answer(self, round_: int = -1) -> Sample | None:
        """What it stands by at the end of a round (by default the last): its newest complete reply up to then."""
        upto = self.replies if round_ == -1 else self.replies[: round_ + 1]
        return next((reply for reply in reversed(upto) if reply is not None), None)

    def final(self, answer_type: AnswerType, round_: int = -1) -> str | None:
        """The answer that its reply ends in; None where it can't be read."""
        reply = self.answer(round_)
        return None if reply is None else final_answer(reply, answer_type)


@register("debate")
class Debate(AskingStep):
    """Debate of several agents: the models `by`, each `n` times, answer a prompt; in every further one of `rounds` each
    is shown the others' answers and answers again. The last answers vote by what they end in (a `number`, a `choice` or
    `exact` text). A majority is more than half of all agents, one whose answer can't be read included; without one the
    prompt has no answer (`no majority`) and is dropped. Keeps of each agent that agrees with the majority the `last`
    answer, or the `first` one, if that agrees already (multi-agent fine-tuning's generators), or of all of them the one
    of the first agent (`one`). The student is shown the question alone. `critics` (of multi-agent fine-tuning, too)
    keeps the conversation of each agent that ends with the majority, and its last answer is learnt in sight of the
    others': all that began with another answer, and every second, drawn at random, of those that did not. Scores:
    `agreement`, the share of agents for the majority. The paper's code has 3 agents and 2 rounds; the wording is
    ours."""

    kind = "verify"
    paper = "Du et al., arXiv:2305.14325; fine-tuning on it: Subramaniam et al., arXiv:2501.05707"
    scores = frozenset({"agreement"})
    by: By | Annotated[list[By], Field(min_length=1)] = TEACHER
    n: Annotated[int, Field(ge=1, le=100)] = 3
    rounds: Annotated[int, Field(ge=1, le=20)] = 2
    vote: AnswerType = "number"
    keep: Literal["last", "first", "one", "critics"] = "last"
    question: str = IN_ONE
    temperature: Temperature = 1.0
    top_p: TopP = 0.9
    max_tokens: TokenCount = 256

    @field_validator("question")
    @classmethod
    def _names_the_prompt(cls, question: str) -> str:
        if PLACEHOLDER.findall(question) != ["prompt"]:
            raise ValueError("question must hold {prompt} once, and nothing else in braces")
        return question

    @model_validator(mode="after")
    def _criticises_something(self) -> Debate:
        if self.keep == "critics" and self.rounds == 1:
            raise ValueError("critics answer in sight of the others: that takes 2 rounds or more")
        return self

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        names = [by for by in self.asks() for _ in range(self.n)]
        debates = [[Agent(sample, number, by, ()) for number, by in enumerate(names)] for sample in pool]
        for round_ in range(self.rounds):
            turns = [
                (agent, message)
                for agents in debates
                for agent in agents
                if (message := self._message(agent, agents, round_, context.reader(agent.by).control)) is not None
            ]
            yield from self._speak(turns, context, round_, tally)
            for agent in (agent for agents in debates for agent in agents if len(agent.replies) == round_):
                agent.replies.append(None)
        kept: Pool = []
        outcomes = [self._outcome(agents) for agents in debates]
        for agents, (winner, share) in zip(debates, outcomes, strict=True):
            if winner is None:
                tally.drop(NO_MAJORITY, prompt_of(agents[0].sample))
            else:
                kept += self._kept(agents, winner, share, tally, draws=context.rng(agents[0].sample.id))
        self._account(debates, outcomes, tally)
        return kept

    def _message(self, agent: Agent, agents: Sequence[Agent], round_: int, control: Collection[str]) -> Message | None:
        """What an agent is told in a round; None where it has nothing new to think about."""
        question = fill(self.question, prompt=prompt_of(agent.sample))
        if round_ == 0:
            return user(question)
        others = [said_by(answer) for other in agents if other is not agent and (answer := other.answer(round_ - 1))]
        if not others or agent.is_full:
            return None
        shown = "\n\n".join(f"Answer {number}:\n{fenced(text, control)}" for number, text in enumerate(others, 1))
        told = fill(OTHERS, answers=shown)
        return user(told + (fill(AGAIN, question=question) if agent.answer() is not None else question))

    def _speak(
        self, turns: Sequence[tuple[Agent, Message]], context: StepContext, round_: int, tally: Tally
    ) -> Questions[None]:
        """Let the agents answer. One that can't be shown so much, or whose reply is not complete, stands by what it
        said before."""
        fit: list[tuple[Agent, tuple[Message, ...]]] = []
        for agent, message in turns:
            *before, _ = prompt_messages(agent.sample)
            messages = (*(agent.talk or before), message)
            if round_ == 0 or context.reader(agent.by).fits(messages, self.max_tokens):
                fit.append((agent, messages))
            else:
                agent.is_full = True
                tally.add("too_long_to_be_shown")
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        numbers = [agent.number + SEEDS * round_ for agent, _ in fit]
        requests = [
            context.request(messages, sampling, number, by=agent.by)
            for (agent, messages), number in zip(fit, numbers, strict=True)
        ]
        replies = yield from ask(requests)
        spoken = {id(agent): (messages, reply) for (agent, messages), reply in zip(fit, replies, strict=True)}
        for agent, _ in turns:
            messages, reply = spoken.get(id(agent), ((), None))
            whole = reply is not None and ending(reply) == "ok"
            if reply is not None and whole:
                agent.talk = (*messages, {"role": "assistant", "content": said_by(reply)})
            elif reply is not None:
                tally.add(f"incomplete_in_round_{round_ + 1}")
            agent.replies.append(reply if whole else None)

    def _outcome(self, agents: Sequence[Agent], round_: int = -1) -> tuple[str | None, float]:
        """(what more than half of the agents end in, or None; the share of agents for the most frequent ending)"""
        finals = [final for agent in agents if (final := agent.final(self.vote, round_)) is not None]
        if not finals:
            return None, 0.0
        winner, votes = Counter(finals).most_common(1)[0]
        return (winner if 2 * votes > len(agents) else None), votes / len(agents)

    def _kept(self, agents: Sequence[Agent], winner: str, share: float, tally: Tally, draws: random.Random) -> Pool:
        """The answers to one prompt that the student learns."""
        kept: Pool = []
        for agent in agents:
            answer = agent.answer(0) if self.keep == "first" else agent.answer()
            if answer is None:
                tally.drop("no complete answer", prompt_of(agent.sample))
            elif final_answer(answer, self.vote) != winner:
                tally.drop("not what the majority says", answer_of(answer) or "")
            elif self.keep == "one" and kept:
                tally.drop("agrees with one that is kept", answer_of(answer) or "")
            elif self.keep == "critics" and (reason := self._no_critic(agent, winner, draws)):
                tally.drop(reason, answer_of(answer) or "")
            else:
                asked = unjudged(agent.sample)
                if self.keep == "critics":
                    asked = replace(asked, messages=agent.talk[:-1])
                whole = with_answer(asked, answer, by=agent.by, agent=agent.number)
                parents = (whole.parents[0], *(reply.id for reply in agent.replies if reply is not None))
                kept.append(with_scores(replace(whole, parents=tuple(dict.fromkeys(parents))), agreement=share))
        return kept

    def _no_critic(self, agent: Agent, winner: str, draws: random.Random) -> str:
        """Why an agent that ends with the majority teaches no critic; empty if it does."""
        if agent.replies[0] is None or agent.answer() is agent.replies[0]:
            return "did not answer in sight of the others"
        return (
            "was right at first, and not drawn" if agent.final(self.vote, 0) == winner and draws.random() < 0.5 else ""
        )

    def _account(
        self, debates: Sequence[Sequence[Agent]], outcomes: Sequence[tuple[str | None, float]], tally: Tally
    ) -> None:
        """How far they agree at first and at last, and how often an agent changed its mind."""
        prompts = max(1, len(debates))
        agents = [agent for of_prompt in debates for agent in of_prompt]
        first = [self._outcome(of_prompt, 0) for of_prompt in debates]
        tally.facts["majority_at_first"] = sum(winner is not None for winner, _ in first) / prompts
        tally.facts["majority"] = sum(winner is not None for winner, _ in outcomes) / prompts
        tally.facts["agreement_at_first"] = sum(share for _, share in first) / prompts
        tally.facts["agreement"] = sum(share for _, share in outcomes) / prompts
        finals = [(agent.final(self.vote, 0), agent.final(self.vote)) for agent in agents]
        tally.facts["changed_their_mind"] = sum(was != now for was, now in finals) / max(1, len(finals))
        if unread := sum(now is None for _, now in finals):
            tally.facts["unreadable"] = unread

    def estimate(self, samples: int) -> Estimate:
        agents = samples * self.n * len(self.asks())
        asked = Estimate.of_answers(agents * self.rounds, self.max_tokens)
        return replace(asked, samples=samples if self.keep == "one" else agents)

    def shows(self) -> StepPrompt | None:
        return VARIES if TEACHER in self.asks() else None

    def writes(self) -> frozenset[str]:
        return frozenset({"by", "agent"})
