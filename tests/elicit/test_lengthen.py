"""Self-Lengthen: what is expanded, what may stand, and what the extender learns."""

from __future__ import annotations

import pytest

from limbeck.elicit.flow import Reader
from limbeck.elicit.lengthen import EXTENDER, Lengthen, first_half
from tests.flow_driver import answers, drive, prompts, texts

SHORT = "One two three. Four five six."
EXPANDED = "It begins so.\n\nThen it goes further on.\n\nAnd it ends here."
REST = "There is more to say of four, five and six."


def told(request):
    return request.messages[-1]["content"]


def play(expanded=EXPANDED, rest=REST):
    return lambda request, _: rest if "Beginning of the longer answer" in told(request) else expanded


def test_the_first_half_is_expanded_and_two_thirds_of_that_are_gone_on_from():
    pool, tally, asked = drive(Lengthen(), answers(("why", SHORT)), play())
    beginning = "It begins so.\n\nThen it goes further on."
    assert texts(pool) == [("why", f"{beginning}\n\n{REST}")]
    assert "First part:\n| One two three.\n\n" in told(asked[0]) and "Four" not in told(asked[0])
    assert "| It begins so.\n| \n| Then it goes further on.\n\nGo on" in told(asked[1])
    assert f"Short answer:\n| {SHORT}" in told(asked[1])
    assert pool[0].meta["scores"]["lengthened"] == pytest.approx(18 / 6) and len(pool[0].parents) == 3
    assert tally.facts == {"grown_in_pass_1": 1, "mean_lengthened": 3.0}


def test_halves_are_of_paragraphs_or_of_sentences():
    halves = {
        "a b c. d e f. g h.": "a b c.", "a b. c d. e f g. h.": "a b. c d.", "One sentence alone": "One sentence alone",
        "a b\n\nc d\n\ne f": "a b\n\nc d", "あい。うえ。": "あい。", "a.\n\n b c d e f": "a.", "a b c d e\n\nf": "a b c d e",
    }  # fmt: skip
    assert {text: first_half(text) for text in halves} == halves


@pytest.mark.parametrize(
    ("expanded", "rest", "reason"),
    [
        ("Two words.", "And three.", "not longer"),
        (EXPANDED, "It just stops", "ends within a sentence"),
        (EXPANDED, f"{' '.join('abcdefghijklm')}. {' '.join('abcdefghijklm')}.", "repeats itself"),
        (EXPANDED, (REST, "length"), "answer: length"),
        (("One that never ends", "length"), REST, "answer: length"),
        (("", "refused"), REST, "answer: refused"),
    ],
)
def test_what_may_not_stand_is_tried_again_and_dropped(expanded, rest, reason):
    pool, tally, asked = drive(Lengthen(tries=3), answers(("why", SHORT)), play(expanded, rest))
    assert pool == [] and tally.dropped == {reason: 1}
    begun = isinstance(expanded, str)
    assert len(asked) == len({request.key for request in asked}) == (6 if begun else 3)


def test_a_further_try_and_further_passes():
    said = iter(
        [EXPANDED, "It just stops", EXPANDED, REST, EXPANDED + "\n\nYes.", REST + " " + REST.replace("four", "six")]
    )
    pool, tally, asked = drive(Lengthen(tries=2, passes=2, ratio=1.1), answers(("why", SHORT)), lambda *_: next(said))
    assert tally.facts["grown_in_pass_1"] == tally.facts["grown_in_pass_2"] == 1 and len(asked) == 6
    assert "First part:\n| It begins so.\n| \n| Then it goes further on.\n\n" in told(asked[4]), "the longer one grows"
    assert len(pool) == 1 and pool[0].meta["scores"]["lengthened"] > 3 and len(pool[0].parents) == 5
    once, tally, _ = drive(Lengthen(tries=1, passes=3), answers(("why", SHORT)), play())
    assert len(once) == 1 and tally.facts["grown_in_pass_2"] == tally.facts["grown_in_pass_3"] == 0
    assert once[0].meta["scores"]["lengthened"] == 3.0, "one that grows no further stands as it is"


def test_a_part_that_was_cut_off_loses_its_last_piece():
    cut = "A whole one here.\n\nAnother whole one.\n\nOne that stops he"
    pool, _, _ = drive(Lengthen(), answers(("why", SHORT)), play((cut, "length")))
    assert texts(pool)[0][1] == f"A whole one here.\n\n{REST}"
    again = "It begins so.\n\nThen it goes further on.\n\n" + REST
    pool, _, _ = drive(Lengthen(), answers(("why", SHORT)), play(rest=again))
    assert texts(pool)[0][1] == again, "a beginning that is said again stands once"


def test_what_made_it_longer_teaches_to_lengthen():
    pool, _, asked = drive(Lengthen(extender=True), answers(("why", SHORT), kind="k", check={"type": "x"}), play())
    assert [sample.meta.get("task") for sample in pool] == [None, EXTENDER, EXTENDER]
    assert texts(pool)[1:] == [(told(asked[0]), EXPANDED), (told(asked[1]), REST)], "as it was asked"
    assert len({sample.meta["prompt_id"] for sample in pool}) == 3 and "check" not in pool[1].meta
    cut, _, _ = drive(Lengthen(extender=True), answers(("why", SHORT)), play((EXPANDED, "length")))
    assert len(cut) == 2, "a reply that was cut off teaches nothing"
    assert Lengthen(extender=True, passes=2).estimate(10).samples == 50 and Lengthen().estimate(10).requests == 20


def test_what_has_no_answer_or_no_room_is_dropped():
    pool, tally, asked = drive(Lengthen(), prompts("why"))
    assert pool == [] and tally.dropped == {"no answer": 1} and not asked
    pool, tally, asked = drive(Lengthen(), answers(("why", SHORT)), reader=Reader(fits=lambda *_: False))
    assert tally.dropped == {"too long to be shown": 1} and not asked
    _, _, asked = drive(Lengthen(by="strong"), answers(("why", SHORT)), play())
    assert [request.model for request in asked] == ["strong@1"] * 2
