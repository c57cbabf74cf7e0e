"""The store keeps every acknowledged answer, asks for none twice, and tells what is not its own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from limbeck.elicit.engine import elicit
from limbeck.storage.files import on_network
from limbeck.storage.store import Store
from limbeck.types import AnswerForm, Evidence, Generated, Request, Sample, Sampling, UserError


def request(text="q", seed=0, **meta):
    return Request("model@1", ({"role": "user", "content": text},), Sampling(0.5, 0.9, 10), seed, meta)


class Counting:
    """Answers in reverse order and counts its bill."""

    identity = "model@1"

    def __init__(self, give_up_after=None):
        self.bill, self.give_up_after = [], give_up_after

    def answers(self, requests, stop=lambda: False):
        for asked in reversed(requests):
            if stop():
                return
            if self.give_up_after is not None and len(self.bill) >= self.give_up_after:
                raise ConnectionError("gone")
            self.bill.append(asked.key)
            yield asked, Generated((1, 2), f"to {asked.messages[0]['content']}", "ok")


@pytest.mark.promise("R7")
def test_answers_come_in_the_order_asked_and_are_asked_once(tmp_path):
    requests = [request(str(number), prompt_id=f"p{number}") for number in range(7)]
    answerer = Counting()
    with Store(tmp_path / "s.sqlite") as store:
        first = elicit([*requests, requests[0]], store, lambda: answerer)
        assert [sample.messages[-1]["content"] for sample in first] == [f"to {n}" for n in (*range(7), 0)]
        again = elicit(requests, store, lambda: pytest.fail("the teacher was loaded for nothing"))
    assert again == first[:7] and again[3].meta == {"prompt_id": "p3", "finish": "ok"}
    assert len(answerer.bill) == 7


def test_after_a_failure_only_the_rest_is_asked(tmp_path):
    requests = [request(str(number)) for number in range(9)]
    first, second = Counting(give_up_after=4), Counting()
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(ConnectionError):
        elicit(requests, store, lambda: first)
    with Store(tmp_path / "s.sqlite") as store:
        assert len(elicit(requests, store, lambda: second)) == 9
        assert Store.count(store.path) == {"ok": 9}
    assert len(first.bill) == 4 and len(second.bill) == 5 and not set(first.bill) & set(second.bill)


def test_stopping_returns_what_is_there(tmp_path):
    done = []
    with Store(tmp_path / "s.sqlite") as store:
        got = elicit(
            [request(str(n)) for n in range(5)], store, Counting, lambda d, t, n: done.append(d), lambda: len(done) > 2
        )
    assert len(got) == 2


def test_answers_whose_tokens_were_not_counted_are_told_from_the_others(tmp_path):
    asked = [request(str(number)) for number in range(4)]
    with Store(tmp_path / "s.sqlite") as store:
        for one, usage, reused in zip(asked, ((5, 3), (0, 0), (7, 1), (0, 0)), (False, False, True, True), strict=True):
            answer = Sample((*one.messages, {"role": "assistant", "content": one.key}), one.model)
            store.record(one, answer, "ok", usage=usage, reused=reused)
        assert store.bill("model@1") == (2, 5, 3) and store.unmetered("model@1") == 1
        assert store.usage_of([one.key for one in (*asked, asked[0], request("not asked"))]) == (2, 12, 4)
        assert store.usage_of([]) == (0, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        request("q2"),
        request(seed=1),
        Request("model@2", request().messages, request().sampling, 0),
        Request("model@1", request().messages, Sampling(0.5, 0.9, 11), 0),
    ],
)
@pytest.mark.promise("R12")
def test_any_change_of_the_question_changes_its_key(other):
    assert other.key != request().key


@pytest.mark.promise("R7", "R19")
def test_keys_are_golden():
    """A changed key would make every stored answer unfindable."""
    assert (
        request().key
        == request(anything="else").key
        == "be80e08660f79c5500d25ab0ddf4944c0d2416b5192025fe985f3eb06ea2438e"
    )


USER = ({"role": "user", "content": "q"},)
GOLDEN = {
    "35f48917cab6a3b6e2e9086648fe6a8acf61d58cf4da794354cd81c828335f09": {"raw": "<|user|>"},
    "8472157205a7ccef38fc5e5cb5c1aa43ca74c771e8161a052fca41106eae234c": {"against": USER, "contrast": 0.5},
    "8d57229b06594e0a7d187d9f70fba69e83b1198fc7a5638615263f98477b9444": {"form": AnswerForm(labels=("a", "b"))},
    "3f600c1ac8698a2a4634624ebd6c1e1277f18b937ed805ed14a7235d6cfe02ec": {"shown": USER},
    "3891dfcda49ef2796340c842b5da76900450a9777fc28c6203321a8a63393f1a": {
        "sampling": Sampling(0.5, 0.9, 10, stop=("\n",))
    },
}


@pytest.mark.parametrize("key", GOLDEN)
def test_keys_of_requests_with_more_fields_are_golden_too(key):
    assert replace(request(), **GOLDEN[key]).key == key


@pytest.mark.promise("S15")
def test_a_stored_sample_names_its_writer_and_what_it_was_made_from(tmp_path):
    messages = (*request().messages, {"role": "assistant", "content": "x"})
    ours, theirs = (Sample(messages, writer, (1,), parents=("earlier",)) for writer in ("model@1", "model@2"))
    assert ours.id != theirs.id, "the same words of another writer are another sample"
    with Store(tmp_path / "s.sqlite") as store:
        store.record(request(), ours, "ok")
        found = store.answered(request())
    assert (found.id, found.writer, found.parents) == (ours.id, "model@1", ("earlier",))


@pytest.mark.promise("S15")
def test_ids_of_samples_are_golden():
    sample = Sample((*USER, {"role": "assistant", "content": "x"}), "model@1", (1,), ("a",), {"k": 1})
    assert sample.id == "18f12ea1457e62979611c01e407f928f8b06fbfa25b6f34cca5ede564d1eda46"


def test_evidence_round_trip(tmp_path):
    asked = request()
    sample = Sample((*asked.messages, {"role": "assistant", "content": "x"}), "model@1", (1,))
    with Store(tmp_path / "s.sqlite") as store:
        store.record(asked, sample, "ok")
        store.write_evidence(Evidence(sample.id, "verdict", "number", True))
        store.write_evidence(Evidence(sample.id, "verdict", "number", False))
        assert list(store.evidence("verdict")) == [Evidence(sample.id, "verdict", "number", False)]
        assert list(store.evidence("score")) == []


@pytest.mark.promise("R13")
def test_a_full_disk_is_named_and_keeps_what_was_stored(tmp_path):
    import sqlite3

    stored = 0
    with Store(tmp_path / "s.sqlite") as store:
        store._db.execute("pragma max_page_count = 20")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            for number in range(1000):
                asked = request(f"{number} " + "x" * 500)
                store.record(
                    asked, Sample((*asked.messages, {"role": "assistant", "content": "y" * 500}), "m", (1,)), "ok"
                )
                stored += 1
    with Store(tmp_path / "s.sqlite") as store:
        assert 0 < stored == Store.count(store.path)["ok"]


def test_another_file_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "s.sqlite"
    file.write_bytes(b"something else entirely" * 50)
    with pytest.raises(UserError, match="not a store"):
        Store(file)
    assert file.read_bytes().startswith(b"something else")


def stored(folder):
    """A store with one answer, and its request."""
    asked = request(prompt_id="p1")
    sample = Sample((*asked.messages, {"role": "assistant", "content": "yes"}), "model@1", (5, 6), ("a",), {"k": 1})
    with Store(folder / "s.sqlite") as store:
        store.record(asked, sample, "ok")
    return asked, sample


DAMAGES = {
    "text": "update samples set body = replace(body, 'yes', 'yet')",
    "ids": "update samples set body = replace(body, '[5,6]', '[5,7]')",
    "what is not in its id": """update samples set body = replace(body, '"k":1', '"k":3')""",
    "no JSON": "update samples set body = substr(body, 2)",
    "end": "update answers set finish = 'length'",
    "no end": "update answers set finish = 'og'",
    "question": """update answers set request = replace(request, '"seed":0', '"seed":8')""",
    "link": "update answers set sample_id = 'x'",
    "gone": "delete from samples",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.promise("R12")
def test_a_row_that_is_not_what_was_stored_is_told(tmp_path, damage):
    asked, sample = stored(tmp_path)
    with Store(tmp_path / "s.sqlite") as store:
        assert store.answered(asked) == sample
        store._db.execute("pragma foreign_keys = off")
        store._db.execute(DAMAGES[damage])
        with pytest.raises(UserError, match=r"is not what was stored.*delete from answers") as refusal:
            store.answered(asked)
        if damage != "end":  # the text is what was stored
            assert list(store.answers_of("model@1")) == []
        store._db.executescript(str(refusal.value).rpartition("sqlite3")[2].split('"')[1])
        assert store.answered(asked) is None
        store.record(asked, sample, "ok")
        assert store.answered(asked) == sample and len(list(store.answers_of("model@1"))) == 1


@pytest.mark.parametrize("damage", ["text", "ids", "no JSON", "no end", "link"])
def test_a_store_of_an_older_version_is_read_and_its_texts_are_checked(tmp_path, damage):
    asked, sample = stored(tmp_path)
    with Store(tmp_path / "s.sqlite") as store:
        store._db.execute("drop table sums")
    with Store(tmp_path / "s.sqlite") as store:
        assert store.answered(asked) == sample
        store._db.execute("pragma foreign_keys = off")
        store._db.execute(DAMAGES[damage])
        with pytest.raises(UserError, match="is not what was stored"):
            store.answered(asked)


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs"])
def test_on_a_network_file_system_several_machines_read_one_store(tmp_path, monkeypatch, kind):
    """A write-ahead log would need memory that they share."""
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr("limbeck.storage.files.psutil.disk_partitions", lambda all: mounts)
    file = tmp_path / "run" / "store.sqlite"
    assert on_network(file) and not on_network(tmp_path.parent / "other")
    with Store(file) as ours, Store(file) as theirs, Store(file, read_only=True) as third:
        for n in range(3):
            elicit([request(f"q{n}")], ours if n % 2 else theirs, Counting)
            assert Store.count(file) == {"ok": n + 1} and len(list(third.answers_of("model@1"))) == n + 1
        assert {path.name for path in file.parent.iterdir()} == {"store.sqlite"}


def test_a_store_that_moves_to_a_network_file_system_loses_its_log(tmp_path, monkeypatch):
    file = tmp_path / "store.sqlite"
    with Store(file) as store:
        elicit([request()], store, Counting)
        assert (tmp_path / "store.sqlite-wal").exists()
    monkeypatch.setattr("limbeck.storage.store.on_network", lambda path: True)
    with Store(file) as store:
        assert elicit([request()], store, lambda: pytest.fail("asked again"))
        assert not (tmp_path / "store.sqlite-wal").exists()
