"""What the student is held against."""

from __future__ import annotations

import pytest

from limbeck.data.batches import CHOSEN, REJECTED, Row
from limbeck.elicit.prompts import Prompt
from limbeck.training.controls import gold_samples, preferred, shuffled
from limbeck.types import UserError

ROWS = [Row(f"s{i}", (i,), (100 + i, 0), frozenset({"teacher", CHOSEN}), f"p{i}") for i in range(7)]


def test_fine_tuning_takes_the_preferred_answers_of_others():
    rows = [
        *ROWS[:2],
        Row("own", (1,), (5,), frozenset({"untouched", CHOSEN})),
        Row("worse", (1,), (6,), frozenset({"corpus", REJECTED})),
    ]
    assert preferred(rows) == ROWS[:2]


def test_shuffling_deals_every_answer_to_another_prompt():
    for seed in range(20):
        dealt = shuffled(ROWS, seed, 99)
        assert [row.prompt_ids for row in dealt] == [row.prompt_ids for row in ROWS]
        assert sorted(row.response_ids for row in dealt) == sorted(row.response_ids for row in ROWS)
        assert all(a.response_ids != b.response_ids for a, b in zip(dealt, ROWS, strict=True))
    assert shuffled(ROWS, 1, 99) == shuffled(ROWS, 1, 99) != shuffled(ROWS, 2, 99)
    long = [*ROWS, Row("long", tuple(range(8)), (1, 2, 3, 4, 0), frozenset({"teacher", CHOSEN}), "p")]
    assert all(len(row) <= 9 for row in shuffled(long, 0, 9)) and len(shuffled(long, 0, 9)) == 7
    with pytest.raises(UserError, match="at least two"):
        shuffled(ROWS[:1], 0, 99)


def test_gold_is_the_prompts_own_first_answer():
    prompts = [Prompt("a", "one?", answers=("yes", "no")), Prompt("b", "two?")]
    (sample,) = gold_samples(prompts)
    assert (
        sample.messages[-1] == {"role": "assistant", "content": "yes"}
        and sample.meta["prompt_id"] == "a"
        and sample.response_ids is None
    )
