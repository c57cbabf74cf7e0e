"""Every way of `tests/server_ways.py` comes out as its table says, from `check` to the rows that a student is trained on."""

from __future__ import annotations

import json

import pytest

from limbeck.config.server import Served
from limbeck.data.batches import make_rows
from limbeck.elicit.engine import elicit
from limbeck.elicit.flow import StepContext, user
from limbeck.models.api import ApiTeacher
from limbeck.storage.store import Store
from limbeck.types import Sampling, UserError
from tests.scripted_server import Handler, Scripted
from tests.server_ways import OUTCOMES, WAYS


class Listing(Handler):
    def do_GET(self):
        self.reply(self.server.listed[0], json.dumps(self.server.listed[1]).encode())


async def no_wait(seconds):
    pass


def outcome(way, folder):
    """(the outcome by name, how many rows of tokens)"""
    with Scripted(way.reply) as server, Store(folder / "store.sqlite") as store:
        server.listed, server.RequestHandlerClass = way.listed, Listing
        teacher = ApiTeacher(Served(url=server.url, name="toy", concurrency=1), no_wait)
        try:
            scene = StepContext(teacher.identity, 7, "0/x")
        except UserError:
            return "checked", 0
        requests = [scene.request((user(f"question {n}"),), Sampling(max_tokens=16)) for n in range(30)]
        try:
            samples = elicit(requests, store, lambda: teacher)
        except UserError as error:
            return ("bad" if "tolerate" in str(error) else "refused"), 0
        if not any(sample.teaches for sample in samples):
            return "left out", 0
        rows = make_rows(samples, lambda _: [1], lambda sample: [2], 100)
        text = samples[0].messages[-1]["content"]
        assert "fine" in text and len({sample.messages[-1]["content"] for sample in samples}) == 1
        if samples[0].meta["finish"] == "length":
            return "cut off", len(rows)
        return ("thought" if text.startswith("<think>\nhm\n</think>") else "answer"), len(rows)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.title)
@pytest.mark.promise("R11")
def test_a_way_comes_out_as_the_table_says(way, tmp_path):
    assert way.outcome in OUTCOMES
    name, rows = outcome(way, tmp_path)
    assert (name, rows) == (way.outcome, 30 if way.outcome in ("answer", "thought", "cut off") else 0)


def test_every_outcome_is_in_the_table():
    assert {way.outcome for way in WAYS} == set(OUTCOMES)
