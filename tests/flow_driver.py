"""Runs a step of elicitation by itself: the test plays the writer."""

from __future__ import annotations

from limbeck.elicit.flow import Reader, ScoreRequest, StepContext, Tally
from limbeck.types import LogProb, Request, Sample


def prompts(*texts, **meta):
    """A pool of prompts."""
    return [
        Sample(({"role": "user", "content": text},), "corpus", meta={"prompt_id": f"p{n}", **meta})
        for n, text in enumerate(texts)
    ]


def answers(*pairs, **meta):
    """A pool of answered samples."""
    return [
        Sample(
            ({"role": "user", "content": text}, {"role": "assistant", "content": answer}),
            "writer",
            meta={"prompt_id": f"p{n}", **meta},
        )
        for n, (text, answer) in enumerate(pairs)
    ]


def drive(step, pool, reply=None, score=None, seed=0, header="<|user|>", reader=Reader(), given=()):  # noqa: B008 (frozen)
    """(pool, tally, requests asked). `reply(request, n)` is the n-th answer's text, or (text, finish); `score(question)` its nats."""
    tally, asked = Tally("step", taken=len(pool)), []
    context = StepContext(
        "writer", seed, "0/step", header, named=lambda name: f"{name}@1", reader=lambda name: reader, given=given
    )
    plan = step.run(pool, context, tally)
    sent = None
    while True:
        try:
            questions = plan.send(sent)
        except StopIteration as end:
            tally.given = len(end.value)
            return end.value, tally, asked
        sent = []
        for question in questions:
            if isinstance(question, ScoreRequest):
                found = score(question)
                sent.append(
                    found if isinstance(found, LogProb) else LogProb(found, max(1, len(question.answer.split())))
                )
                continue
            assert isinstance(question, Request)
            text = reply(question, len(asked))
            text, finish = text if isinstance(text, tuple) else (text, "ok")
            asked.append(question)
            sent.append(
                Sample(
                    (*question.messages, {"role": "assistant", "content": text}),
                    question.model,
                    (1, 2),
                    meta={"finish": finish},
                )
            )


def texts(pool):
    """(prompt, answer) of every sample."""
    return [
        (
            next(m["content"] for m in reversed(s.messages) if m["role"] == "user"),
            s.messages[-1]["content"] if s.messages[-1]["role"] == "assistant" else None,
        )
        for s in pool
    ]
