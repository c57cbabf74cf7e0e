"""Conversations of several turns that a model has with itself, in one reply or turn by turn."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from limbeck.elicit.flow import (
    Pool,
    Questions,
    StepContext,
    Tally,
    answer_of,
    are_complete,
    ask,
    inherited,
    prompt_of,
    said_by,
    user,
)
from limbeck.elicit.step import ANSWER_SHARE, AskingStep, Estimate, Temperature, TokenCount, TopP, register
from limbeck.elicit.wording import fill, spans
from limbeck.types import Message, Sample, Sampling

TRANSCRIPT = (
    "Write a conversation between a human and an AI assistant about the topic below. The human speaks first and asks"
    " new things in each turn; the assistant answers helpfully. Begin every line of the human with [Human] and every"
    " line of the AI with [AI].\n\nTopic: {topic}\n\n[Human]"
)
PLAYED = (
    "Here is a conversation of a user with an assistant. You are the user. Write what you say next: a short question or"
    " wish that goes on from the last answer. Write only that.\n\n{talk}\n\nUser:"
)
ROLE = re.compile(r"\[\s*(human|ai)\s*\]:?", re.IGNORECASE)
OUT_OF_ROLE = re.compile(
    r"^(?:assistant|ai|user|human)\s*:|as an ai|language model|how (?:can|may) i (?:help|assist)|\[(?:human|ai)\]",
    re.IGNORECASE,
)


@register("self_chat")
class SelfChat(AskingStep):
    """The model talks with itself about each prompt in the pool. `two_roles` (UltraChat): the prompt is the first turn;
    the model answers as the assistant and then, shown the conversation, writes the user's next turn, for `turns`
    answers. `one_call` (Baize): the model writes the whole conversation about the prompt in one reply. Samples end with
    an assistant's turn; the step `turns` trains on every one."""

    kind = "curate"
    paper = "Ding et al., arXiv:2305.14233; one call: Xu et al., arXiv:2304.01196"
    how: Literal["two_roles", "one_call"] = "two_roles"
    turns: Annotated[int, Field(ge=1, le=20)] = 3
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    user_tokens: TokenCount = 64
    max_tokens: TokenCount = 192

    def run(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        chat = self._one_call if self.how == "one_call" else self._two_roles
        return (yield from chat(pool, context, tally))

    def _two_roles(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        chats = [replace(sample, messages=(user(prompt_of(sample)),), parents=(sample.id,)) for sample in pool]
        done: Pool = []
        for turn in range(1, self.turns + 1):
            replies = yield from ask(
                [context.request(chat.messages, self._sampling(self.max_tokens), turn) for chat in chats]
            )
            chats, ended = _add_turn(chats, replies, tally, "assistant")
            done += ended
            if turn < self.turns:
                sampling = self._sampling(self.user_tokens)
                questions = [fill(PLAYED, talk=_as_text(chat.messages)) for chat in chats]
                replies = yield from ask([context.request((user(text),), sampling, turn) for text in questions])
                chats, ended = _add_turn(chats, replies, tally, "user")
                done += ended
        return [*done, *chats]

    def _one_call(self, pool: Pool, context: StepContext, tally: Tally) -> Questions[Pool]:
        sampling = self._sampling(self.turns * (self.user_tokens + self.max_tokens))
        replies = yield from ask(
            [context.request((user(fill(TRANSCRIPT, topic=prompt_of(sample))),), sampling) for sample in pool]
        )
        chats: Pool = []
        for sample, reply in zip(pool, replies, strict=True):
            text = said_by(reply)
            finish = reply.meta.get("finish")
            messages = read_transcript(text if ROLE.match(text.lstrip()) else f"[Human] {text}", self.turns)
            if finish not in ("ok", "length"):
                tally.drop(f"answer: {finish}", text)
            elif finish == "length" and len(messages) <= 2:
                tally.drop("answer: length", text)
            elif len(messages) < 2:
                tally.drop("no conversation", text)
            else:
                complete = messages[:-2] if finish == "length" else messages  # the last answer was cut off
                meta = inherited(sample, "prompt_id", "kind", "weight") | {"finish": "ok"}
                chats.append(Sample(tuple(complete), reply.writer, parents=(sample.id, reply.id), meta=meta))
        return chats

    def _sampling(self, max_tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, max_tokens)

    def estimate(self, samples: int) -> Estimate:
        requests = samples if self.how == "one_call" else samples * (2 * self.turns - 1)
        tokens = samples * (self.turns * self.max_tokens + (self.turns - 1) * self.user_tokens)
        return Estimate(requests, int(tokens * ANSWER_SHARE), samples=samples)


def _add_turn(chats: Pool, replies: list[Sample], tally: Tally, role: str) -> tuple[Pool, Pool]:
    """(conversations with this turn added, those that end before it but are whole)"""
    longer: Pool = []
    ended: Pool = []
    for chat, reply, complete in zip(chats, replies, are_complete(replies, tally), strict=True):
        text = said_by(reply).strip().strip('"').strip()
        if complete and OUT_OF_ROLE.search(text) and role == "user":
            tally.drop("the user falls out of the role", text)
            complete = False
        elif complete and text.casefold() in {message["content"].casefold() for message in chat.messages}:
            tally.drop("a turn is repeated", text)
            complete = False
        if complete:
            message = {"role": role, "content": text if role == "user" else answer_of(reply) or ""}
            longer.append(
                replace(
                    chat,
                    messages=(*chat.messages, message),
                    writer=reply.writer,
                    response_ids=reply.response_ids if role == "assistant" else None,
                    parents=(*chat.parents, reply.id),
                    meta=chat.meta | {"finish": "ok"},
                )
            )
        elif chat.messages[-1]["role"] == "assistant":
            ended.append(chat)
            tally.add("ended_early")
    return longer, ended


def _as_text(messages: tuple[Message, ...]) -> str:
    return "\n\n".join(f"{'User' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)


def read_transcript(text: str, turns: int) -> list[Message]:
    """The messages of a transcript, as long as human and AI alternate, at most `turns` pairs, ending with the AI."""
    messages: list[Message] = []
    for mark, between in spans(ROLE, text):
        role = "user" if mark[1].lower() == "human" else "assistant"
        content = between.strip()
        expected = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role != expected or not content or len(messages) == 2 * turns:
            break
        messages.append({"role": role, "content": content})
    return messages if not messages or messages[-1]["role"] == "assistant" else messages[:-1]
