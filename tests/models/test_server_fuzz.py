"""Mutated replies and lists of models of every protocol: each becomes an answer, a bad answer or a message; nothing else."""

from __future__ import annotations

import json
import random

import pytest

from limbeck.config.server import Served
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.models.replies import has_control_token
from limbeck.types import ANSWER_ENDS, Sampling, UserError
from tests.fuzzing.mutations import strange_bytes, strange_data
from tests.models.test_engines import SAYS, claude, gemini
from tests.scripted_server import MODEL, Handler, Scripted, answer

REPLIES = {
    "openai-compatible": answer([{"type": "text", "text": "fine"}], reasoning_content="hm", refusal=None),
    "anthropic": claude(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fine"}]),
    "gemini": gemini({"text": "hm", "thought": True}, {"text": "fine"}),
}


def mutated(data, rng):
    """The data with some values changed, and sometimes some of its bytes."""
    body = json.dumps(strange_data(data, rng)).encode()
    return strange_bytes(body, rng) if rng.random() < 0.2 else body


async def no_wait(seconds):
    pass


@pytest.mark.parametrize("kind", REPLIES)
@pytest.mark.promise("R11")
def test_mutated_replies(kind):
    rng = random.Random(f"replies {kind}")
    bodies = [mutated(REPLIES[kind], rng) for _ in range(120)]
    ends = []
    with Scripted(lambda number, body: ("bytes", current)) as server:
        for place, current in enumerate(bodies):
            teacher = ApiTeacher(Served(url=server.url, name=MODEL, kind=kind, retries=0), no_wait)
            request = StepContext("served:toy", 7, "0/x").request((user(f"question {place}"),), Sampling(1.0, 1.0, 16))
            try:
                ((_, one),) = teacher.answers([request])
            except UserError as error:
                assert "answers: set teacher.server.name" in str(error), current
                ends.append("named")
                continue
            assert one.finish in ANSWER_ENDS and isinstance(one.text, str), current
            one.text.encode()
            if one.finish in ("ok", "length"):
                assert not has_control_token(one.text), current
            ends.append(one.finish)
    assert len(set(ends)) >= 3 and ends.count("ok") < len(ends), ends


class Listing(Handler):
    def do_GET(self):
        says = self.server.says.get(self.path, self.server.listed)
        self.reply(200, says if isinstance(says, bytes) else json.dumps(says).encode())


@pytest.mark.parametrize("kind", REPLIES)
def test_mutated_lists_of_models(kind):
    rng = random.Random(f"lists {kind}")
    plain = next(
        (says for path, says in SAYS.get(kind, {}).items() if "models" in path),
        {"data": [{"id": MODEL, "meta": {"n_params": 7}}]},
    )
    with Scripted() as server:
        server.RequestHandlerClass, server.says = Listing, {}
        named = 0
        for _ in range(60):
            server.listed = mutated(plain, rng)
            try:
                named += ApiTeacher(Served(url=server.url, name=MODEL, kind=kind)).identity.startswith("served:toy-")
            except UserError as error:
                assert "teacher.server.name" in str(error), server.listed
    assert 0 < named < 60
