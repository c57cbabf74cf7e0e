"""Many wrong inputs of a kind, one after the other, each with a seed of its own."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field

from limbeck.models import fingerprint
from tests.conftest import make_net, make_tokenizer
from tests.fuzzing.folders import Models, Runs
from tests.fuzzing.servers import Servers
from tests.fuzzing.texts import Prompts, Recipes
from tests.fuzzing.tokens import Tokens
from tests.fuzzing.watched import watched

KINDS = {kind.name: kind for kind in (Recipes, Prompts, Models, Servers, Runs, Tokens)}
SEED = int(os.environ.get("LIMBECK_FUZZ_SEED", "20261130"))
RIGHT = ("accepted", "refused")


@dataclass
class Tally:
    """What became of the inputs of a kind, and a line for each that was treated wrongly."""

    name: str
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    mib: float = 0.0

    @property
    def row(self):
        ends = self.ends
        counts = (
            sum(ends.values()),
            ends["refused"],
            ends["accepted"],
            ends["traceback"],
            ends["hang"],
            ends["memory"],
            ends["silent"],
            ends["unprintable"],
        )
        return " | ".join(
            [f"{self.name:<25}", *(f"{count:>6}" for count in counts), f"{self.seconds:6.1f} s", f"{self.mib:6.0f} MiB"]
        )


HEADER = "kind                      | inputs | refused | accepted | tracebacks | hangs | over 1 GB | silent | unprintable | longest | most memory"


def model_in(home):
    """The tiny model of all kinds, in a folder."""
    folder = home / "model"
    tokenizer = make_tokenizer()
    make_net(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fuzzed(name, numbers, home, model):
    """Try the inputs of these numbers; `home` is an empty folder."""
    kind, tally = KINDS[name](home, model), Tally(name)
    for number in numbers:
        place = home / f"input-{number}"
        place.mkdir()
        trial = kind.trial(random.Random(f"{SEED}/{name}/{number}"), place)
        fingerprint.NAMING.by_edges = False
        outcome = watched(trial.call, trial.silence)
        tally.ends[outcome.ended] += 1
        tally.seconds, tally.mib = max(tally.seconds, outcome.seconds), max(tally.mib, outcome.mib)
        if outcome.ended not in RIGHT:
            tally.wrong.append(f"{name} {number}: {outcome.ended} by {trial.what}: {outcome.said.strip()[-700:]}")
        shutil.rmtree(place, ignore_errors=True)
    return tally
