"""Which of several processes this one is, as torch's launcher (`torchrun`, or `limbeck run --ranks N`) tells it.

Other launchers' variables are not read: a cluster sets RANK and WORLD_SIZE for programs that don't know of them.
"""

from __future__ import annotations

import os

BY_COMMAND = "LIMBECK_RANKS"  # set by `--ranks`, which tells the user itself how a rank ended


def is_launched() -> bool:
    """Whether torch's launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """The number of processes that share this work."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def rank() -> int:
    """This process's number; 0 leads."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """This process's number among those on this machine, which is that of its device."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_world_size() -> int:
    """The number of these processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1
