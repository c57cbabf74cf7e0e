"""Bodies of servers: each becomes an answer whose words the body holds, a bad answer, or a message."""

from __future__ import annotations

import json
import re

from limbeck.config.server import Served
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.models.replies import has_control_token
from limbeck.types import Sampling, UserError
from tests.fuzzing.mutations import MORE_STRANGE, STRANGE, strange_bytes, strange_data
from tests.fuzzing.trial import Trial
from tests.models.test_server_fuzz import REPLIES, no_wait
from tests.scripted_server import MODEL, Scripted

SURROGATE = re.compile("[\ud800-\udfff]")
MARKS = ("<think>", "</think>")  # what thinking that stands apart is put between


class Servers:
    """Replies of every protocol."""

    name = "server bodies"

    def __init__(self, home, model):
        self.body = b""
        self.server = Scripted(lambda number, body: ("bytes", self.body))

    def trial(self, rng, place):
        kind = rng.choice(list(REPLIES))
        data = strange_data(REPLIES[kind], rng, STRANGE + MORE_STRANGE)
        body = json.dumps(data).encode(errors="surrogatepass")
        if rng.random() < 0.4:
            body = strange_bytes(body, rng)
        found = []

        def call():
            self.body = body
            teacher = ApiTeacher(Served(url=self.server.url, name=MODEL, kind=kind, retries=0), no_wait)
            request = StepContext("served:toy", 7, "0/x").request(
                (user(f"question {rng.random()}"),), Sampling(1.0, 1.0, 16)
            )
            ((_, one),) = teacher.answers([request])
            one.text.encode()
            if one.finish not in ("ok", "length"):
                raise UserError(f"the answer is {one.finish}")
            found.append(one.text)
            return 0, one.text

        def silent(said):
            if has_control_token(said):
                return f"control tokens are an answer: {said!r:.80}"
            try:
                words = list(_strings(json.loads(body)))
            except ValueError:
                return f"an answer of a body that is no JSON: {said!r:.80}"
            left = said
            known = {SURROGATE.sub("\ufffd", word) for word in (*words, *MARKS)} - {""}
            for word in sorted(known, key=len, reverse=True):
                left = left.replace(word, "").replace(word.strip() or word, "")
            return f"an answer that is not in the body: {said!r:.80}" if left.strip() else None

        return Trial(kind, call, silent)


def _strings(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value
