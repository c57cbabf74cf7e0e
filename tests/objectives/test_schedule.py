"""Schedules: their values, the adaptive ones against simulations written here, and states that survive a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest

from limbeck.objectives.parameters import Range
from limbeck.objectives.schedule import Schedule, State, make_schedule
from limbeck.types import RecipeError

ANY = Range(0, 10).check


def made(**raw: object) -> Schedule:
    return make_schedule({key.rstrip("_"): value for key, value in raw.items()}, "loss[0].taid.t", ANY)


@pytest.mark.parametrize(
    ("raw", "values"),  # at progress 0, 1/4, 1/2, 3/4 and 1
    [
        ({}, [2.0, 3.0, 4.0, 5.0, 6.0]),
        ({"shape": "linear"}, [2.0, 3.0, 4.0, 5.0, 6.0]),
        ({"shape": "linear", "over": 0.5}, [2.0, 4.0, 6.0, 6.0, 6.0]),
        ({"shape": "cosine"}, [2.0, 2 + 2 * (1 - math.sqrt(0.5)), 4.0, 2 + 2 * (1 + math.sqrt(0.5)), 6.0]),
        ({"shape": "cosine", "over": 0.5}, [2.0, 4.0, 6.0, 6.0, 6.0]),
        ({"shape": "step"}, [2.0, 2.0, 6.0, 6.0, 6.0]),
        ({"shape": "step", "at": 0.75}, [2.0, 2.0, 2.0, 6.0, 6.0]),
    ],
)
def test_the_value_at_each_part_of_the_training(raw, values):
    up, down = made(from_=2, to=6, **raw), made(from_=6, to=2, **raw)
    assert [up.value(k / 4) for k in range(5)] == pytest.approx(values, rel=1e-12)
    assert [down.value(k / 4) for k in range(5)] == pytest.approx([8 - v for v in values], rel=1e-12)
    assert not up.remembers


@pytest.mark.parametrize("raw", [3, 3.0])
def test_a_number_is_a_constant(raw):
    schedule = make_schedule(raw, "x", ANY)
    assert [schedule.value(k / 4) for k in range(5)] == [3.0] * 5
    assert not schedule.remembers


@pytest.mark.parametrize(
    ("raw", "path", "words"),
    [
        ({"from": 1, "to": 2, "shape": "cosin"}, "loss[0].taid.t.shape", "cosine"),
        ({"from": 1, "to": 2, "shape": "constant"}, "loss[0].taid.t.shape", "constant"),
        ({"from": 1, "to": 2, "shape": 3}, "loss[0].taid.t.shape", "3"),
        ({"from": 1, "to": 2, "ovr": 0.5}, "loss[0].taid.t.ovr", "over"),
        ({"from": 1, "to": 2, "shape": "step", "over": 0.5}, "loss[0].taid.t.over", "no such key"),
        ({"from": 1, "to": 2, "shape": "linear", "rate": 0.5}, "loss[0].taid.t.rate", "no such key"),
        ({"from": 1, "to": 2, "shape": "adaptive", "tolerance": 0.5}, "loss[0].taid.t.tolerance", "no such key"),
        ({"to": 2}, "loss[0].taid.t", "needs `from` and `to`"),
        ({"from": 1}, "loss[0].taid.t", "needs `from` and `to`"),
        ({"from": 1, "to": 11}, "loss[0].taid.t.to", "outside [0, 10]"),
        ({"from": -1, "to": 1}, "loss[0].taid.t.from", "outside [0, 10]"),
        ({"from": "a", "to": 1}, "loss[0].taid.t.from", "not a number"),
        ({"from": 2, "to": 1, "shape": "adaptive"}, "loss[0].taid.t", "rises"),
        ({"from": 2, "to": 1, "shape": "plateau"}, "loss[0].taid.t", "rises"),
        ({"from": 1, "to": 2, "over": 0}, "loss[0].taid.t.over", "(0, 1]"),
        ({"from": 1, "to": 2, "over": 1.5}, "loss[0].taid.t.over", "(0, 1]"),
        ({"from": 1, "to": 2, "shape": "step", "at": True}, "loss[0].taid.t.at", "(0, 1]"),
        ({"from": 1, "to": 2, "shape": "step", "at": "half"}, "loss[0].taid.t.at", "(0, 1]"),
        (11, "loss[0].taid.t", "outside [0, 10]"),
        ("fast", "loss[0].taid.t", "not a number"),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_the_remedy(raw, path, words):
    with pytest.raises(RecipeError) as error:
        make_schedule(raw, "loss[0].taid.t", ANY)
    assert error.value.path == path and words in str(error.value)


# -- schedules that remember --------------------------------------------------------------------------------------------


def trace(
    schedule: Schedule, losses: Sequence[float], state: State | None = None, start: int = 0, steps: int = 0
) -> list[float]:
    """The value that each step uses, and the one after the last."""
    steps = steps or len(losses)
    values = [schedule.value(start / steps, state)]
    for step, loss in enumerate(losses, start + 1):
        state = schedule.after(state, step / steps, loss)
        values.append(schedule.value(step / steps, state))
    return values


def wobbling(steps: int) -> list[float]:
    """A loss that falls, stalls, jumps up and falls again."""
    return [
        3 * math.exp(-k / 60) + 0.4 * math.sin(k / 3) ** 2 + (2.0 if 90 <= k < 110 else 0.0) + 0.3 for k in range(steps)
    ]


def taid(losses: Sequence[float], start: float, end: float, rate: float, momentum: float) -> list[float]:
    """The rule as the sheet has it (whitebox 2.10); the first step has no step before it."""
    t, speed, before, values = start, 0.0, None, [start]
    for step, loss in enumerate(losses, 1):
        change = 0.0 if before is None else (before - loss) / (before + 1e-15)
        speed = momentum * speed + (1 - momentum) * change
        sigmoid = 1 / (1 + math.exp(-speed))
        floor = start + (end - start) * step / len(losses)
        t = min(end, max(floor, t + rate * sigmoid * (1 - t)))
        before = loss
        values.append(t)
    return values


TAID = [
    {}, {"rate": 0.02}, {"rate": 0.02, "momentum": 0.5}, {"rate": 0.2, "momentum": 0.9}, {"rate": 0.02, "to": 0.8},
    {"rate": 1.0, "from": 0.0}, {"rate": 0.01, "momentum": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("raw", TAID)
def test_taids_rule_equals_its_simulation_over_200_steps(raw):
    raw = {"from": 0.4, "to": 1.0, "shape": "adaptive"} | raw
    losses = wobbling(200)
    got = trace(make_schedule(raw, "t", ANY), losses)
    assert got == pytest.approx(
        taid(losses, raw["from"], raw["to"], raw.get("rate", 5e-4), raw.get("momentum", 0.99)), rel=1e-12
    )
    assert got[0] == raw["from"] and got[-1] == pytest.approx(raw["to"], rel=1e-12)
    for step, (before, after) in enumerate(pairwise(got), 1):
        floor = raw["from"] + (raw["to"] - raw["from"]) * step / 200
        assert before <= after <= raw["to"] and after >= floor - 1e-12


def test_taids_rule_without_a_rate_to_speak_of_is_linear():
    schedule = made(from_=0.2, to=1, shape="adaptive", rate=1e-12)
    assert trace(schedule, wobbling(50)) == pytest.approx([0.2 + 0.8 * k / 50 for k in range(51)], rel=1e-9)


def test_taids_rule_runs_ahead_of_the_line_and_further_while_the_loss_falls():
    schedule = made(from_=0.2, to=1, shape="adaptive", rate=0.1, momentum=0.5)
    falling, level, rising = (trace(schedule, [5 * f**k for k in range(60)]) for f in (0.8, 1.0, 1.25))
    assert all(
        a > b > c > 0.2 + 0.8 * k / 60
        for k, (a, b, c) in enumerate(zip(falling, level, rising, strict=True))
        if 3 <= k <= 25
    )


@pytest.mark.parametrize("losses", [[0.0] * 5, [1e-30, 1e30, 1e-30, 1e30], [1e30, 0.0, 1e30]])
def test_taids_rule_survives_absurd_losses(losses):
    for value in trace(made(from_=0.2, to=1, shape="adaptive", rate=0.5), losses):
        assert 0.2 <= value <= 1.0


def test_the_plateau_rises_only_when_the_loss_has_grown_since_it_last_rose():
    """DistiLLM's threshold; the level it compares with moves only when the threshold moves."""
    schedule = made(from_=0, to=1, shape="plateau", rise=0.25, tolerance=0.125)
    losses = [3.0, 2.0, 3.0625, 3.125, 3.1875, 2.5, 3.24, 3.25, 3.3, 3.375, 9.0, 9.5, 1.0, 99.0]
    rises = [0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert trace(schedule, losses) == [0.0, *rises]


def test_the_plateaus_defaults_are_distillms():
    schedule = made(from_=0, to=1, shape="plateau")
    assert trace(schedule, [1.0, 1.05, 1.11, 1.2, 1.25]) == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2]


def test_a_measured_number_is_the_measurement_of_the_step_before():
    schedule = Schedule(0.5, 0.5, "measured")
    assert trace(schedule, [3.0, 1.0, 2.0]) == [0.5, 3.0, 1.0, 2.0]


@pytest.mark.parametrize("shape", ["adaptive", "plateau"])
@pytest.mark.parametrize("cut", [1, 2, 37, 99])
def test_a_resumed_schedule_goes_on_with_the_same_numbers(shape, cut):
    extra = {"rate": 0.02} if shape == "adaptive" else {"tolerance": 0.2, "rise": 0.07}
    schedule, losses = made(from_=0.1, to=1, shape=shape, **extra), wobbling(100)
    state = None
    for step in range(1, cut + 1):
        state = schedule.after(state, step / 100, losses[step - 1])
    restored = json.loads(json.dumps(state))
    assert restored == state and all(type(value) is float for value in restored.values())
    assert trace(schedule, losses)[cut:] == trace(schedule, losses[cut:], restored, cut, 100)


def test_a_state_is_never_changed_in_place():
    for schedule in (made(from_=0, to=1, shape="adaptive"), made(from_=0, to=1, shape="plateau")):
        first = schedule.after(None, 0.1, 1.0)
        kept = dict(first)
        second = schedule.after(first, 0.2, 1.01)
        assert first == kept and second is not first
