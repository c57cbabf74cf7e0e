"""The order of the text: every row once an epoch, no padding waste, the same whatever step one begins at."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.config.sections import Train
from limbeck.data.batches import FixedText, Row, make_batch, make_rows, steps_of_epoch
from limbeck.training.job import total_steps
from limbeck.types import Finish, Sample, UserError


def make(count: int, seed: int) -> list[Row]:
    noise = random.Random(seed)
    return [Row(f"s{i}", tuple(range(noise.randint(1, 60))), tuple(range(noise.randint(1, 90)))) for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 150), seed=st.integers(0, 99), epoch=st.integers(0, 3), tokens=st.integers(1, 3000))
@pytest.mark.promise("R4")
def test_every_row_comes_exactly_once_an_epoch(count, seed, epoch, tokens):
    rows = make(count, seed)
    steps = steps_of_epoch(rows, seed, epoch, tokens)
    assert sorted(index for step in steps for micro in step for index in micro) == list(range(count))
    assert all(step and all(step) for step in steps)


@pytest.mark.promise("R4")
def test_order_is_a_function_of_seed_and_epoch_and_of_nothing_else():
    rows = make(100, 0)
    random.seed(1)
    first = steps_of_epoch(rows, 7, 0, 512)
    random.seed(2)
    assert steps_of_epoch(rows, 7, 0, 512) == first
    assert steps_of_epoch(rows, 7, 1, 512) != first and steps_of_epoch(rows, 8, 0, 512) != first


@pytest.mark.parametrize("start", [0, 1, 5, 11, 17])
def test_beginning_late_gives_the_same_steps(start):
    rows = make(60, 1)
    early, late = FixedText(rows, 3, 400), FixedText(rows, 3, 400)
    assert [early.step(number) for number in range(20)][start:] == [late.step(number) for number in range(start, 20)]
    assert late.step(0) == early.step(0)


def test_steps_are_of_nearly_equal_weight_and_hardly_padded():
    rows = make(400, 2)
    steps = steps_of_epoch(rows, 0, 0, 1024)
    weights = [sum(len(rows[i].response_ids) for micro in step for i in micro) for step in steps]
    assert min(weights) > 0.5 * 1024 and max(weights) < 1.5 * 1024
    padded = sum(max(len(rows[i]) for i in micro) * len(micro) for step in steps for micro in step)
    assert padded < 1.10 * sum(map(len, rows))


def test_batch_marks_response_tokens_and_the_positions_that_predict_them():
    rows = [Row("a", (1, 2), (3, 4, 5)), Row("b", (6,), (7,))]
    batch = make_batch(rows, (1, 0), pad_id=9)
    assert batch.tokens_BT.tolist() == [[6, 7, 9, 9, 9], [1, 2, 3, 4, 5]]
    assert batch.mask_BT.tolist() == [[False, True, False, False, False], [False, False, True, True, True]]
    rows_n, positions_n = batch.response_positions()
    assert list(zip(rows_n.tolist(), positions_n.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2), (1, 3)]


def sample(answer: str) -> Sample:
    return Sample(({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}), "w")


def test_empty_answers_are_left_out_and_nothing_left_is_an_error():
    ended = [replace(sample("x"), meta={"finish": finish}) for finish in get_args(Finish)]
    rows = make_rows([sample("x"), sample("  "), *ended], lambda _: [1], lambda s: [2], 100)
    assert len(rows) == 3, "those that ended, and those that were cut off"
    with pytest.raises(UserError, match=r"of 1 answers none can be used \(1 empty\)"):
        make_rows([sample("")], lambda _: [1], lambda s: [2], 100)


def test_an_answer_to_nothing_is_refused():
    with pytest.raises(UserError, match="has no token, so nothing predicts"):
        make_rows([sample("x")], lambda _: [], lambda s: [2, 3], 9)
    with pytest.raises(UserError, match="empty prompt"):
        make_batch([Row("a", (), (5, 6))])


def test_beside_the_student_s_answers_an_epoch_is_every_prompt_once():
    rows = make(60, 3)
    rows = [replace(row, prompt_ids=(1,), response_ids=row.response_ids[:20], group=row.sample_id) for row in rows]
    settings = Train(epochs=1, tokens_per_step=120, seed=3)
    text = FixedText(rows, 3, 60, together=True)
    steps = total_steps(rows, settings, row_tokens=60)
    read = [row.sample_id for step in range(steps) for micro in text.step(step) for row in micro]
    assert sorted(read) == sorted(row.sample_id for row in rows)
    assert steps > 1.5 * total_steps(rows, settings)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="context of 5"):
        make_rows([sample("x")], lambda _: [1] * 4, lambda s: [2, 3], 5)
