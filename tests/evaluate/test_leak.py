"""Planted leaks of every kind are found, near misses are not, and the time is linear."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from limbeck.elicit.prompts import Prompt
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.leak import COMMON, WORDING_LEAST, WORDING_SHARE, Leak, find_leaks
from limbeck.evaluate.tasks import tasks_of
from limbeck.types import Sample, UserError

STORY = "A farmer sells 12 baskets of apples on Monday and 30 baskets on Tuesday, then gives away 5. How many baskets has the farmer handed out?"
QUESTION = "Which planet of our solar system has the most moons today?"  # 11 words
SHORT = "Name a primary colour."  # 4 words
LONG = " ".join(f"word{letter} follows" for letter in "abcdefghijklmnopqrst".upper())  # 40 words


def kinds(training: str, item: str, **sizes: int) -> list[tuple[str, float]]:
    return [(leak.kind, round(leak.share, 3)) for leak in find_leaks([("t", training)], [("i", item)], **sizes)]


@pytest.mark.parametrize("item", [STORY, QUESTION, SHORT, "Yes!", "\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17"])
def test_an_exact_copy_ignores_case_punctuation_and_space(item):
    assert kinds(item, item) == [("exact", 1.0)]
    shouted = "  " + item.upper().replace(" ", "\n").rstrip("?.!") + " ..."
    assert kinds(shouted, item) == [("exact", 1.0)]


def test_spellings_of_one_number_and_width_forms_are_the_same():
    assert kinds("it costs 1000 euros and \uff12\uff15 cents", "It costs 1,000 euros and 25 cents.") == [("exact", 1.0)]
    assert kinds("it costs 5km now", "it costs 5 km now") == [("exact", 1.0)]


@pytest.mark.parametrize("item", [STORY, QUESTION, SHORT])
def test_a_whole_item_inside_a_longer_text(item):
    (leak,) = find_leaks([("doc", f"Before it. {item} And after it.")], [("q", item)])
    assert (leak.item, leak.training, leak.kind, leak.share) == ("q", "doc", "contained", 1.0)
    assert leak.excerpt.startswith("before") is False and leak.excerpt.split()[0] == item.split()[0].lower()


def test_word_boundaries_and_the_least_length():
    assert kinds("Surname a primary colour", SHORT) == []
    assert kinds("Name a primary colourful thing", SHORT) == []
    assert kinds("Please name a colour.", "Name a colour.") == [], "three words inside a text are chance"
    assert kinds("Name a colour.", "Name a colour.") == [("exact", 1.0)]


def test_thirteen_words_overlap_and_twelve_do_not():
    run = LONG.split()
    assert kinds("x " + " ".join(run[5:18]) + " y", LONG) == [("overlap", round(13 / 40, 3))]
    assert kinds("x " + " ".join(run[5:17]) + " y", LONG) == []
    assert kinds(" ".join(run[5:17]), LONG, n=12) == [("overlap", round(12 / 40, 3))]
    (leak,) = find_leaks([("t", "x " + " ".join(run[5:20]) + " y")], [("i", LONG)])
    assert leak.excerpt == " ".join(run[5:20]).lower()


def test_a_longer_text_s_excerpt_is_cut():
    item = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr")
    (leak,) = find_leaks([("t", item)], [("i", item)])
    assert leak.kind == "exact" and leak.excerpt == " ".join(item.split()[:40])


def test_middling_items_need_eight_words_and_short_ones_all():
    assert kinds("Which planet of our solar system has the best weather?", QUESTION) == [("overlap", round(8 / 11, 3))]
    assert kinds("Which planet of our solar system has rings?", QUESTION) == []
    assert kinds("name a primary thing", SHORT) == []


def test_both_halves_with_a_gap_are_an_overlap_and_not_the_whole():
    run = LONG.split()
    assert kinds(" ".join([*run[:20], "gap", *run[20:]]), LONG) == [("overlap", 1.0)]


def test_other_numbers():
    changed = STORY.replace("12", "7").replace("away 5", "away 2.5").replace("30", "1,450")
    leaks = find_leaks([("other", "Try: " + changed)], [("q", STORY)])
    (weak,) = [leak for leak in leaks if leak.kind == "same_but_for_numbers"]
    assert (weak.item, weak.training, weak.share) == ("q", "other", 23 / 26)
    assert weak.excerpt.startswith("a farmer sells 7 baskets") and "1450" in weak.excerpt
    assert kinds("Was ist 3 plus 4 hier?", "Was ist 5 plus 6 hier?") == [("same_but_for_numbers", round(4 / 6, 3))]


@pytest.mark.parametrize(
    ("training", "item"),
    [
        ("What is 3 plus 4?", "What is 5 plus 6?"),
        ("1 2 3 4 5", "6 7 8 9 1"),
        (STORY.replace("apples", "pears"), STORY.replace("12", "13")),
        ("Name 3 primary colours now please.", "Name 3 secondary colours now please."),
        ("Name a primary colour of 7.", "Name a primary colour of light."),
    ],
    ids=["too few words", "numbers only", "another word", "same number", "number for a word"],
)
def test_near_misses_of_the_skeleton(training, item):
    assert "same_but_for_numbers" not in dict(kinds(training, item))
    assert not {"exact", "contained"} & set(dict(kinds(training, item)))


def test_the_weak_kind_is_told_once_and_not_beside_a_strong_one():
    training = [("a", STORY.replace("12", "1")), ("b", STORY.replace("12", "2")), ("c", STORY.replace("12", "3"))]
    items = [("q", STORY), ("p", STORY.replace("12", "2"))]
    found = [(leak.item, leak.training, leak.kind) for leak in find_leaks(training, items) if leak.kind != "overlap"]
    assert found == [("q", "a", "same_but_for_numbers"), ("p", "b", "exact")]


def test_a_template_of_many_items_is_no_overlap_but_their_whole_is_found():
    frame = "Read the short text below and then answer with one single word from this list of six topics: {} is it."
    items = [(f"i{place}", frame.format(f"topic{chr(97 + place)}")) for place in range(COMMON + 1)]
    training = [("other", frame.format("elsewhere")), ("leak", "Well. " + items[3][1] + " Ok?")]
    assert [(leak.item, leak.training, leak.kind) for leak in find_leaks(training, items)] == [
        ("i3", "leak", "contained")
    ]
    few = find_leaks(training[:1], items[:COMMON])
    assert {leak.kind for leak in few} == {"overlap"} and len(few) == COMMON


def test_an_item_that_is_all_template_is_found_as_a_whole():
    """Each run of these items is common, since all begin with the same 30 words."""
    frame = "if you are asked for help by a friend who lives far away and can not travel this year then please tell us what you would do first of all"
    items = [(f"i{place}", frame + f" {chr(97 + place)}" * (place > 0)) for place in range(COMMON + 2)]
    assert [(leak.item, leak.kind) for leak in find_leaks([("t", frame)], items)] == [("i0", "exact")]


INSTRUCTION = "You are a careful support agent. Read the customer message below and answer with exactly one of the labels billing, shipping or other."
NOUNS = "apple river stone cloud tiger bread lamp chair ocean candle forest bridge silver garden violin rocket pepper window marble castle".split()


def instructed(count: int, seed: int = 0) -> list[tuple[str, str]]:
    noise = np.random.default_rng(seed)
    return [
        (f"t{place}", f"{INSTRUCTION}\n\nMessage: {' '.join(noise.permutation(NOUNS)[:9])}") for place in range(count)
    ]


@pytest.mark.parametrize("count", [WORDING_LEAST, 54, 500])
def test_an_instruction_that_the_prompts_share_is_no_leak(count):
    training = instructed(count)
    items = [(name.replace("t", "i"), text) for name, text in instructed(12, seed=1)]
    assert find_leaks(training, items, prompts=training) == []
    assert {leak.kind for leak in find_leaks(training, items)} == {"overlap"}, "they do share more than 13 words"


def test_a_question_copied_behind_a_shared_instruction_is_found():
    training = instructed(60)
    question = training[7][1].partition("Message: ")[2]
    copied, elsewhere = ("i", training[7][1].upper()), ("i", f"{INSTRUCTION} Message: {question}")
    assert [(leak.training, leak.kind) for leak in find_leaks(training, [copied], prompts=training)] == [
        ("t7", "exact")
    ]
    others = [*training[:7], *training[8:]]
    planted = [
        *others,
        ("bare", f"Somebody wrote: {question}, and more"),
        ("cut", "Sort: " + question.rpartition(" ")[0]),
    ]
    found = find_leaks(planted, [elsewhere], prompts=others)
    assert [(leak.training, leak.kind) for leak in found] == [("bare", "overlap"), ("cut", "overlap")]
    words = len(elsewhere[1].split())
    assert [leak.share for leak in found] == [pytest.approx(9 / words), pytest.approx(8 / words)]
    assert found[0].excerpt == question


def test_an_item_behind_an_instruction_with_other_numbers_is_the_same_but_for_them():
    training = [(f"t{place}", f"{INSTRUCTION} {' '.join(NOUNS[place : place + 6])}") for place in range(12)]
    training.append(("near", f"{INSTRUCTION} I ordered 3 lamps and got 5 chairs"))
    items = [("i", f"{INSTRUCTION} I ordered 4 lamps and got 7 chairs")]
    assert [(leak.training, leak.kind) for leak in find_leaks(training, items, prompts=training)] == [
        ("near", "same_but_for_numbers")
    ]


def test_wording_needs_a_share_of_the_prompts_and_five_different_ones():
    shared = instructed(WORDING_LEAST - 1)
    item = [("i", instructed(1, seed=3)[0][1])]
    assert len(find_leaks(shared, item, prompts=shared)) == WORDING_LEAST - 1, "too few to be wording"
    again = [(f"u{place}", shared[0][1]) for place in range(20)]
    assert len(find_leaks(shared, item, prompts=[*shared, *again])) == WORDING_LEAST - 1, "copies count once"
    rest = [(f"r{place}", f"number {place} of the {NOUNS[place % 20]}") for place in range(400)]
    rare = instructed(int(WORDING_SHARE * 400))
    assert len(find_leaks(rare, item, prompts=[*rare, *rest])) == len(rare), "a small part of the prompts"


def test_copies_of_a_question_are_rarely_taken_for_wording():
    """With one copy of a question among the prompts on average, the number of copies is binomial."""
    for prompts in (20, 100, 1000):
        least = max(WORDING_LEAST, math.floor(WORDING_SHARE * prompts) + 1)
        hit = 1 / prompts
        fewer = sum(math.comb(prompts, k) * hit**k * (1 - hit) ** (prompts - k) for k in range(least))
        assert 1 - fewer < 0.005


def test_equal_items_and_equal_texts_all_get_their_names():
    training, items = [("a", STORY), ("b", STORY)], [("x", STORY), ("y", STORY.upper())]
    assert [(leak.item, leak.training) for leak in find_leaks(training, items)] == [
        ("x", "a"),
        ("x", "b"),
        ("y", "a"),
        ("y", "b"),
    ]


def test_runs_do_not_cross_from_one_text_to_the_next():
    half = LONG.split()
    assert find_leaks([("a", " ".join(half[:7])), ("b", " ".join(half[7:14]))], [("i", " ".join(half[:12]))]) == []
    assert find_leaks([("a", "name a primary"), ("b", "colour and more")], [("i", SHORT)]) == []


def test_nothing_leaks_from_or_into_nothing():
    assert find_leaks([], [("i", STORY)]) == [] and find_leaks([("t", STORY)], []) == []
    assert find_leaks([("t", "?!"), ("e", "")], [("i", "..."), ("j", "")]) == []
    with pytest.raises(UserError, match="small_n"):
        find_leaks([], [], n=5, small_n=8)


def test_blocks_agree_with_a_plain_search_of_every_pair(monkeypatch):
    """Random texts over few words, so that runs of every length occur, against a search that compares all stretches."""
    monkeypatch.setattr("limbeck.evaluate.leak.BLOCK", 7)
    monkeypatch.setattr("limbeck.evaluate.leak.COMMON", 10**9)
    noise = np.random.default_rng(0)
    texts = [[f"{'abc'[word]}" for word in noise.integers(0, 3, noise.integers(0, 14))] for _ in range(120)]
    training = [(f"t{place}", " ".join(words)) for place, words in enumerate(texts[:80])]
    items = [(f"i{place}", " ".join(words)) for place, words in enumerate(texts[80:])]

    def stretches(words: list[str], width: int) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + width]) for at in range(len(words) - width + 1)}

    expected = {}
    for item, own in ((name, text.split()) for name, text in items):
        width = 6 if len(own) >= 6 else 5
        for name, words in ((name, text.split()) for name, text in training):
            if own and words == own:
                expected[item, name] = "exact"
            elif len(own) >= 4 and tuple(own) in stretches(words, len(own)):
                expected[item, name] = "contained"
            elif len(own) >= 5 and stretches(own, width) & stretches(words, width):
                expected[item, name] = "overlap"
    got = {(leak.item, leak.training): leak.kind for leak in find_leaks(training, items, n=6, small_n=5)}
    assert got == expected and set(got.values()) == {"exact", "contained", "overlap"}


def test_twenty_thousand_texts_take_seconds():
    noise = np.random.default_rng(1)
    vocabulary = [f"v{''.join('abcdefghij'[int(digit)] for digit in str(word))}" for word in range(3000)]
    draws = noise.zipf(1.3, (20_000, 40)) % 3000
    training = [(f"t{place}", " ".join(vocabulary[word] for word in row)) for place, row in enumerate(draws)]
    items = [
        (f"i{place}", " ".join(vocabulary[word] for word in row))
        for place, row in enumerate(noise.zipf(1.3, (400, 30)) % 3000)
    ]
    training[12_345] = ("planted", "so " + items[77][1] + " it is")
    start = time.perf_counter()
    leaks = find_leaks(training, items)
    assert time.perf_counter() - start < 20
    assert Leak("i77", "planted", "contained", 1.0, items[77][1]) in leaks


# What a run leaves out


def text_of(*said):
    """A training text with these prompts, and a held-out prompt that has an answer."""
    answer = Sample(
        ({"role": "user", "content": "h"}, {"role": "assistant", "content": "h"}), "t", meta={"finish": "ok"}
    )
    prompts = (
        [Prompt(f"t{number}", one) for number, one in enumerate(said)],
        [Prompt("h1", "held out and asked of all")],
    )
    return SimpleNamespace(prompts=prompts, given_prompts=prompts, training=list, held_out=lambda: [answer])


def asked(tmp_path, tiny, items, *texts, how=("",), limit=None):
    """The ids of the items that are asked of each task, in the order of `how`, after these texts of a run."""
    folder = tmp_path / "mail"
    folder.mkdir()
    (folder / "task.yaml").write_text("{name: mail, version: 1, kind: generation, description: d, test: test.jsonl}")
    lines = [
        {"id": ident, "prompt": prompt, "check": {"type": "exact", "answer": "a"}} for ident, prompt in items.items()
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tasks_of(["fidelity", *(f"{folder}{way}" for way in how)], {} if limit is None else {str(folder): limit})
    recipe = SimpleNamespace(evaluate=SimpleNamespace(controls=[], max_tokens=8, own_prompts=None), text_seed=0)
    questions = evaluation.Questions(recipe, tasks, texts[0], None, others=texts[1:])
    bench = evaluation.bench(questions, tmp_path / "out", teacher=None, reader=tiny, rows=(), progress=lambda *_: None)
    return [[item.id.removeprefix("mail/") for item in task.items] for task in bench.protocol.tasks]


ITEMS = {
    f"i{n}": f"Which label has the message number {word} that came from the office?" for n, word in enumerate("abc")
}


def test_items_asked_in_another_way_are_left_out_where_the_plain_ones_are_given_away(tmp_path, tiny):
    found = asked(tmp_path, tiny, ITEMS, text_of(ITEMS["i0"], ITEMS["i2"]), how=("", "@typos"), limit=1)
    assert found == [[], ["i1@typos"]], "the plain task's limit is none of the other's"


def test_an_id_with_an_at_is_its_own(tmp_path, tiny):
    ids = ["user0@example.com", "user1@example.com", "a", "a@2"]
    items = dict(zip(ids, [*ITEMS.values(), "Where is the letter of last week now?"], strict=True))
    text = text_of(items["user0@example.com"], items["a"])
    assert asked(tmp_path, tiny, items, text, how=("", "@typos")) == [
        ["user1@example.com", "a@2"],
        ["user1@example.com@typos", "a@2@typos"],
    ]


def test_the_text_of_every_method_is_searched(tmp_path, tiny):
    assert asked(tmp_path, tiny, ITEMS, text_of("nothing of it"), text_of(ITEMS["i1"])) == [["i0", "i2"]]
