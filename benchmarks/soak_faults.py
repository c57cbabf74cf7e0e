"""What `make soak` does to runs: lives as forks, signals, full disks, flipped bits, torn lines, a faulty server."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from soak_recipes import reply

from limbeck.cli import main as command_line
from limbeck.storage.files import write_json, write_text
from tests.scripted_server import Scripted

POINTS = (
    "train.after_step elicit.before_record elicit.after_record rollout.after_text rollout.after_write"
    " directory.before_rename checkpoint.before_part checkpoint.before_tensors checkpoint.before_manifest"
    " checkpoint.before_prune"
).split()
WEIGHTS = {"kill": 8, "point": 6, "SIGTERM": 2, "SIGINT": 1, "full disk": 3, "flipped bit": 2, "torn line": 1}


@dataclass(frozen=True)
class Fault:
    """What a life meets: a signal after some seconds, an end at a named point, or a disk that takes so many writes;
    and the statuses that it may end with."""

    name: str
    expected: tuple[int, ...] = ()
    signal: int = 0
    after_s: float = 0.0
    point: str = ""
    writes: int = 0


def draw(noise: random.Random, took: float) -> Fault:
    """A fault of a recipe whose undisturbed run took so many seconds."""
    name = noise.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    after_s = took * noise.uniform(0.02, 0.7)
    if name == "kill":
        return Fault(name, (0, 2, -signal.SIGKILL), signal.SIGKILL, after_s)
    if name in ("SIGTERM", "SIGINT"):
        number = signal.Signals[name]
        return Fault(name, (0, 2, -number), number, after_s)  # before the command listens, the system's own end
    if name == "point":
        return Fault(name, (0, 137), point=f"{noise.choice(POINTS)}:{noise.choice((1, 1, 2, 3, 5, 8))}")
    if name == "full disk":
        return Fault(name, (0, 2), writes=int(2 ** noise.uniform(0, 7)))
    return Fault(name)


def flip(out: Path, noise: random.Random) -> bool:
    """Change a bit of a file of the newest checkpoint, once in a run, where the one before it is there."""
    damaged = out.with_name("damaged")
    both = [steps for place in out.rglob("checkpoints") if len(steps := sorted(place.glob("step-*"))) > 1]
    files = sorted(file for file in both[-1][-1].rglob("*") if file.is_file() and file.stat().st_size) if both else []
    if not files or damaged.exists():
        return False
    damaged.touch()
    file = noise.choice(files)
    content = bytearray(file.read_bytes())
    content[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
    file.write_bytes(content)
    return True


def tear(out: Path, noise: random.Random) -> bool:
    """Leave half a line at the end of the metrics of a training that is not finished, as a power cut does."""
    logs = [
        log
        for log in out.rglob("metrics.jsonl")
        if list(log.parent.glob("checkpoints/step-*")) and not (log.parent / "student").exists()
    ]
    if not logs:
        return False
    with noise.choice(sorted(logs)).open("a") as log:
        log.write('{"step": 99, "lo')
    return True


BETWEEN: dict[str, Callable[[Path, random.Random], bool]] = {"flipped bit": flip, "torn line": tear}


def fork(work: Callable[[], int], log: Path) -> int:
    """Do `work` in a fork that leads a group of its own and writes into `log`; its process number."""
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        with log.open("ab") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):  # it did so itself, or is gone
        os.setpgid(pid, pid)
    return pid


def limbeck(arguments: list[str], fault: Fault | None) -> int:
    """The status of a command, which meets the fault."""
    torch.set_num_threads(1)
    if fault is not None and fault.point:
        os.environ["LIMBECK_CRASH_AT"] = fault.point
    if fault is not None and fault.writes:
        full_disk(fault.writes)
    sys.argv = ["limbeck", *arguments]
    try:
        command_line()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 (the log is read for it)
        traceback.print_exc()
        return 1
    return 0


def full_disk(writes: int) -> None:
    """From now on the disk takes so many writes more; the store's own are not among them."""
    sync, left = os.fsync, iter(range(writes))

    def fsync(number: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    os.fsync = fsync


@contextmanager
def played(folder: Path, seed: str) -> Iterator[str]:
    """The URL of a server in a process of its own, faulty while `folder`/faults is there; it leaves server.json."""
    noise, faults = random.Random(f"{seed}/server"), Counter[str]()  # noqa: S311
    port = folder / "port"

    def script(_: int, body: dict[str, Any]) -> Any:
        fault = noise.choices(["none", "busy", "cut", "hang"], [12, 3, 1, 1])[0]
        if fault == "none" or not (folder / "faults").exists():
            return reply(body)
        faults[fault] += 1
        return {"busy": ("status", 503), "cut": ("cut", 20), "hang": ("hang", 3.0)}[fault]

    def serve() -> int:
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        with Scripted(script) as server:
            write_text(port, server.url)
            ended.wait()
            bodies = {json.dumps(body, sort_keys=True) for _, body, _ in server.seen}
            facts = {"bills": sum(server.bills.values()), "unique": len(bodies), "faults": faults}
            if bodies:
                write_json(folder / "server.json", facts)
        return 0

    pid = fork(serve, folder / "server.log")
    while not port.exists():
        time.sleep(0.002)
    try:
        yield port.read_text()
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
