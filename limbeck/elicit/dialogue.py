"""Conversations of several turns that a model has with itself, in one piece or turn by turn."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from limbeck.config.sections import Section
from limbeck.elicit.answer import ANSWER_SHARE, Temperature, Tokens, TopP
from limbeck.elicit.flow import Asking, Bill, Kind, Pool, Scene, Tally, answer_of, ask, finished, prompt_of, user
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


class SelfChat(Section):
    """A model talks with itself about each prompt of the pool. `two_roles` (UltraChat): the prompt is the first turn,
    the writer answers as an assistant and then, shown the conversation, speaks as the user, for `turns` answers.
    `one_call` (Baize): the writer puts down the whole conversation about the prompt, which is read out of its text. The
    sample ends with an assistant's turn; `turns` trains on every one."""

    kind: ClassVar[Kind] = "curate"
    paper: ClassVar[str] = "Ding et al., arXiv:2305.14233; one call: Xu et al., arXiv:2304.01196"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    how: Literal["two_roles", "one_call"] = "two_roles"
    turns: Annotated[int, Field(ge=1, le=20)] = 3
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    user_tokens: Tokens = 64
    max_tokens: Tokens = 192

    def run(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        return (
            yield from (
                self._one_call(pool, scene, tally) if self.how == "one_call" else self._two_roles(pool, scene, tally)
            )
        )

    def _two_roles(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        talks = [replace(sample, messages=(user(prompt_of(sample)),), parents=(sample.id,)) for sample in pool]
        done: Pool = []
        for turn in range(1, self.turns + 1):
            replies = yield from ask(
                [scene.request(talk.messages, self._sampling(self.max_tokens), turn) for talk in talks]
            )
            talks, over = _went_on(talks, replies, tally, "assistant")
            done += over
            if turn < self.turns:
                asked = [
                    scene.request(
                        (user(fill(PLAYED, talk=_told(talk.messages))),), self._sampling(self.user_tokens), turn
                    )
                    for talk in talks
                ]
                talks, over = _went_on(talks, (yield from ask(asked)), tally, "user")
                done += over
        return [*done, *talks]

    def _one_call(self, pool: Pool, scene: Scene, tally: Tally) -> Asking[Pool]:
        sampling = self._sampling(self.turns * (self.user_tokens + self.max_tokens))
        replies = yield from ask(
            [scene.request((user(fill(TRANSCRIPT, topic=prompt_of(sample))),), sampling) for sample in pool]
        )
        found: Pool = []
        for sample, reply in zip(pool, replies, strict=True):
            text = answer_of(reply) or ""
            messages = read_transcript(text if ROLE.match(text.lstrip()) else f"[Human] {text}", self.turns)
            if reply.meta.get("finish") not in ("ok", "length"):
                tally.drop(f"answer: {reply.meta.get('finish')}", text)
            elif reply.meta.get("finish") == "length" and len(messages) <= 2:
                tally.drop("answer: length", text)
            elif len(messages) < 2:
                tally.drop("no conversation", text)
            else:
                # the last answer was cut off
                kept = messages[:-2] if reply.meta.get("finish") == "length" else messages
                meta = {key: sample.meta[key] for key in ("prompt_id", "kind", "weight") if key in sample.meta}
                found.append(Sample(tuple(kept), reply.writer, None, (sample.id, reply.id), meta | {"finish": "ok"}))
        return found

    def _sampling(self, tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, tokens)

    def bill(self, taken: int) -> Bill:
        asked = taken if self.how == "one_call" else taken * (2 * self.turns - 1)
        tokens = taken * (self.turns * self.max_tokens + (self.turns - 1) * self.user_tokens)
        return Bill(asked, int(tokens * ANSWER_SHARE), given=taken)


def _went_on(talks: Pool, replies: list[Sample], tally: Tally, role: str) -> tuple[Pool, Pool]:
    """(conversations with one more turn, those that are over before it but whole)."""
    further = []
    over = []
    for talk, reply, whole in zip(talks, replies, finished(replies, tally), strict=True):
        text = (answer_of(reply) or "").strip().strip('"').strip()
        said = {message["content"].casefold() for message in talk.messages}
        if whole and OUT_OF_ROLE.search(text) and role == "user":
            tally.drop("the user falls out of the role", text)
            whole = False
        elif whole and text.casefold() in said:
            tally.drop("a turn is repeated", text)
            whole = False
        if whole:
            message = {"role": role, "content": text if role == "user" else answer_of(reply) or ""}
            ids = reply.response_ids if role == "assistant" else None
            further.append(
                replace(
                    talk,
                    messages=(*talk.messages, message),
                    writer=reply.writer,
                    response_ids=ids,
                    parents=(*talk.parents, reply.id),
                    meta=talk.meta | {"finish": "ok"},
                )
            )
        elif talk.messages[-1]["role"] == "assistant":
            over.append(talk)
            tally.add("ended_early")
    return further, over


def _told(messages: tuple[Message, ...]) -> str:
    return "\n\n".join(f"{'User' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)


def read_transcript(text: str, turns: int) -> list[Message]:
    """The messages of a transcript, as far as human and AI take turns, at most so many pairs, ending with the AI."""
    found: list[Message] = []
    for mark, between in spans(ROLE, text):
        role = "user" if mark[1].lower() == "human" else "assistant"
        said = between.strip()
        wanted = "assistant" if found and found[-1]["role"] == "user" else "user"
        if role != wanted or not said or len(found) == 2 * turns:
            break
        found.append({"role": role, "content": said})
    return found if not found or found[-1]["role"] == "assistant" else found[:-1]


STEPS: dict[str, type[Section]] = {"self_chat": SelfChat}
