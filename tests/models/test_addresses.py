"""One model at several addresses: balanced, failing over, and refused where they are not the same model."""

from __future__ import annotations

import threading

import pytest

from limbeck.config.recipe import parse
from limbeck.config.server import Served
from limbeck.elicit.flow import StepContext, user
from limbeck.models.addresses import LONGEST_REST, Addresses
from limbeck.models.api import ApiTeacher
from limbeck.runs.fit import prepared
from limbeck.runs.servers import examine_servers
from limbeck.types import Sampling, UserError
from tests.scripted_server import MODEL, Scripted, answer


def teacher(*servers, notes=None, **settings):
    urls = [server if isinstance(server, str) else server.url for server in servers]
    api = ApiTeacher(Served(**{"url": urls, "name": MODEL, "concurrency": 2} | settings))
    api.tell((notes if notes is not None else []).append)
    return api


def requests(count):
    scene = StepContext("toy", 7, "0/x")
    return [scene.request((user(f"question {n}"),), Sampling(max_tokens=9)) for n in range(count)]


def slow(seconds=0.02):
    return lambda number, body: ("slow", seconds, answer(body["messages"][-1]["content"]))


def texts(api, asked):
    return {request.key: said.text for request, said in api.answers(asked)}


def expected(asked):
    return {request.key: request.messages[-1]["content"] for request in asked}


@pytest.mark.promise("R17")
def test_requests_are_balanced_and_concurrency_is_that_of_an_address(monkeypatch):
    asked, under_way, take = requests(48), [], Addresses._take

    def watched(self):
        address = take(self)
        under_way.append([one.under_way for one in self.all])
        return address

    monkeypatch.setattr(Addresses, "_take", watched)
    with Scripted(slow()) as a, Scripted(slow()) as b, Scripted(slow(0.2)) as c:
        assert texts(teacher(a, b, c), asked) == expected(asked)
        counts = [len(server.seen) for server in (a, b, c)]
        assert sum(counts) == 48 and min(counts[:2]) > counts[2] >= 2, counts  # the slow one gets less
    assert max(max(counts) for counts in under_way) == 2 and max(map(sum, under_way)) == 6


def test_one_that_dies_costs_nothing_but_its_requests_in_flight():
    asked, notes = requests(40), []
    with Scripted(slow()) as a, Scripted(slow()) as b:

        def dying(number, body):
            if number == 5:
                threading.Thread(target=lambda: (c.shutdown(), c.server_close())).start()
            return slow()(number, body) if number < 5 else ("cut", 20)

        c = Scripted(dying)
        api = teacher(a, b, c, notes=notes)
        assert texts(api, asked) == expected(asked)
        assert [note for note in notes if c.url in note and "fails" in note] == notes and len(notes) == 1
        assert len(c.seen) < 12 and api.lost == [c.url]
        bills = a.bills + b.bills + c.bills
    assert set(bills) == {request.key for request in asked}, "every request has the key that it has at one address"


def test_one_that_fails_is_left_alone_and_told_once():
    asked, notes = requests(30), []
    with Scripted(slow()) as a, Scripted(lambda number, body: ("status", 500)) as b:
        assert texts(teacher(a, b, notes=notes), asked) == expected(asked)
        assert len(b.seen) <= 4 and len(a.seen) == 30
    assert len(notes) == 1 and "500" in notes[0] and b.url in notes[0]


def test_where_all_fail_the_run_ends():
    with Scripted(lambda number, body: ("status", 500)) as a, Scripted(lambda number, body: ("status", 500)) as b:
        api = teacher(a, b, retries=1)
        assert {said.finish for _, said in api.answers(requests(2))} == {"error"}


@pytest.mark.parametrize(
    ("models", "words"),
    [(({"id": "other"},), "serves other, not 'toy'"), (({"id": MODEL, "root": "elsewhere"},), "serve the same model")],
)
def test_another_model_is_refused_before_anything_is_asked(models, words):
    with Scripted() as a, Scripted(models=models) as b:
        with pytest.raises(UserError, match=words):
            _ = teacher(a, b).identity
        assert not a.seen and not b.seen


def test_identities_are_those_of_one_address():
    with Scripted() as a, Scripted() as b:
        assert teacher(a, b).identity == teacher(b, a).identity == teacher(a).identity


def test_one_that_is_away_at_first_is_looked_at_when_it_comes():
    with Scripted(slow()) as a:
        gone = Scripted(slow())
        gone.shutdown()
        gone.server_close()
        for models, refused in ((({"id": MODEL},), False), (({"id": MODEL, "root": "elsewhere"},), True)):
            notes = []
            api = teacher(a, gone, notes=notes)
            assert api.identity == teacher(a).identity and api.lost == [gone.url] and len(notes) == 1
            for address in api.endpoint.addresses.all:
                address.rests_until = 0.0  # a while later
            with Scripted(slow(), models, port=gone.server_port) as back:
                if refused:
                    with pytest.raises(UserError, match="came back with another model"):
                        texts(api, requests(20))
                else:
                    assert texts(api, requests(20)) == expected(requests(20)) and back.seen
                    assert [note for note in notes if "answers again" in note] == notes[1:] and len(notes) == 2


def test_rests_grow_and_end():
    now, notes = [0.0], []
    addresses = Addresses(["a", "b"], most=1, clock=lambda: now[0])
    addresses.note = notes.append
    a, b = addresses.all

    def next_one():
        address = addresses._take()
        if address is not None:
            address.under_way -= 1
        return address and address.url

    b.under_way = 1
    assert next_one() == "a"
    a.under_way = 1
    assert next_one() is None, "no address has more than its share"
    a.under_way = b.under_way = 0
    rests = []
    for _ in range(8):
        addresses.learn(a, 0, "timeout")
        rests.append(a.rests_until - now[0])
        assert next_one() == "b"
        b.under_way = 1
        assert next_one() is None, "and gets no more because another fails"
        b.under_way = 0
        now[0] = a.rests_until
        assert next_one() == "a"
    assert rests == sorted(rests) and rests[0] == 2 and rests[-1] == LONGEST_REST
    addresses.learn(b, 503, "503", 7.0)
    assert b.rests_until == now[0] + 7 and addresses.lost() == ["a"]
    addresses.learn(a, 500, "500")
    assert next_one() == "b", "all rest: whose rest ends first is asked"
    addresses.learn(a, 200, "200")
    assert addresses.lost() == [] and next_one() == "a"
    assert [note.split(" ")[1] for note in notes] == ["fails", "answers"]
    addresses.learn(b, 500, "500")
    failures, rest = b.failures, b.rests_until
    for status in (500, 200):  # sent before that failure: no second one, and no recovery
        addresses.learn(b, status, "late", began=now[0] - 1)
        assert (b.failures, b.rests_until) == (failures, rest)


def test_a_recipe_with_more_addresses_is_the_same_text_and_training(recipe_data, tiny_folder):
    def recipe(url):
        server = {"url": url, "name": MODEL}
        start = {"start": {"pretrained": str(tiny_folder)}}
        return parse({**recipe_data, "teacher": {"server": server}, "student": start, "loss": ["cross_entropy"]})

    one, two = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"
    assert recipe([one]).hash == recipe(one).hash
    assert recipe([one, two]).training_hash == recipe(one).training_hash != recipe(two).training_hash
    for wrong in ([], [one, one], [one, one + "/"]):
        with pytest.raises(UserError, match=r"teacher.server.*several different ones"):
            recipe(wrong)
    with pytest.raises(ValueError, match="batches are files of one provider"):
        ApiTeacher(Served(url=[one, two], name=MODEL, batch=True))


def test_check_says_how_many_answer(recipe_data, tiny_folder):
    with Scripted() as a:
        server = {"url": [a.url, "http://127.0.0.1:1/v1"], "name": MODEL}
        start = {"start": {"pretrained": str(tiny_folder)}}
        data = {**recipe_data, "teacher": {"server": server}, "student": start, "loss": ["cross_entropy"]}
        (finding,) = examine_servers(prepared(parse(data)))
    assert "at 1 of 2 addresses (not http://127.0.0.1:1/v1)" in finding.seen and not finding.fault
