"""A few wrong inputs of each cheap kind; `tests/long/test_fuzz.py` tries thousands of all six."""

from __future__ import annotations

import pytest

from tests.fuzzing.run import KINDS, fuzzed, model_in


@pytest.mark.parametrize("name", [name for name in KINDS if name != "run folders"])
def test_wrong_inputs(name, tmp_path):
    tally = fuzzed(name, range(10**6, 10**6 + 12), tmp_path, model_in(tmp_path))
    assert not tally.wrong and tally.ends["refused"]


def test_what_is_looked_for_is_found():
    """Each wrong end, of a call that is made to end so."""
    import time

    from limbeck.types import UserError
    from tests.fuzzing import watched as limits
    from tests.fuzzing.watched import watched

    def raises(error):
        raise error

    def slow():
        until = time.process_time() + 5
        while time.process_time() < until:
            pass

    ends = {
        "accepted": lambda: (0, ""),
        "refused": lambda: (2, "limbeck: no"),
        "silent": lambda: (2, ""),
        "unprintable": lambda: (2, "limbeck: \x1b[31m"),
        "traceback": lambda: raises(KeyError("x")),
        "memory": lambda: raises(MemoryError()),
        "hang": slow,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CPU_SECONDS", 0.05)
        for end, call in ends.items():
            assert watched(call, lambda said: None).ended == end
    assert watched(lambda: (0, ""), lambda said: "lost").ended == "silent"
    assert watched(lambda: (0, ""), lambda said: raises(UserError("no"))).ended == "refused"
