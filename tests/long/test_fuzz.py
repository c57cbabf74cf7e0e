"""Wrong inputs of all six kinds: none may end in a traceback, a hang, more than 1 GiB, or be taken without a word.

`LIMBECK_FUZZ=2000` says how many in all, `LIMBECK_FUZZ_SEED` the seed, `LIMBECK_FUZZ_FIRST` the first number.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzzing.run import HEADER, KINDS, SEED, fuzzed, model_in

COUNT = int(os.environ.get("LIMBECK_FUZZ", "300"))
FIRST = int(os.environ.get("LIMBECK_FUZZ_FIRST", "0"))
SHARES = {
    "recipes": 0.25,
    "prompt files": 0.2,
    "model folders": 0.15,
    "server bodies": 0.1,
    "run folders": 0.15,
    "cache, packing, alignment": 0.15,
}


@pytest.mark.parametrize("name", KINDS)
def test_wrong_inputs(name, tmp_path, capsys):
    tally = fuzzed(name, range(FIRST, FIRST + round(COUNT * SHARES[name])), tmp_path, model_in(tmp_path))
    with capsys.disabled():
        print(f"\nseed {SEED}\n{HEADER}\n{tally.row}", *tally.wrong, sep="\n", flush=True)
    assert not tally.wrong
