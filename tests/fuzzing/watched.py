"""One call, watched: what it ended with, its time and its memory, with the rights of an ordinary user."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from limbeck.types import UserError

CPU_SECONDS = 10
WALL_SECONDS = 90  # a machine that is busy with other work is not a hang
MOST_MIB = 1024
READ_ANYTHING = 1 << 1 | 1 << 2  # the capabilities by which root reads what nobody may


class Hang(BaseException):
    """Past the limit of time."""


@dataclass(frozen=True)
class Outcome:
    """What became of an input: `ended` is accepted, refused, traceback, hang, memory or silent."""

    ended: str
    said: str
    seconds: float
    mib: float


def watched(call: Callable[[], tuple[int, str]], silence: Callable[[str], str | None]) -> Outcome:
    """Run a call that gives (exit status, what was printed), and if it accepted its input, ask whether it may.

    `silence` gives the complaint, None if there is none; UserError in it is a refusal.
    """
    status, said, ended = 0, "", ""
    before = _peak(reset=True)
    began = time.process_time()
    try:
        with _alarm(), _ordinary_user():
            status, said = call()
            if status == 0:
                complaint = silence(said)
                ended, said = ("silent", complaint) if complaint else ("accepted", said)
    except UserError as error:
        status, said = 2, f"limbeck: {error}"
    except Hang:
        ended = "hang"
    except MemoryError as error:
        ended, said = "memory", str(error)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
        ended, said = "traceback", _where(error)
    seconds, mib = time.process_time() - began, (_peak() - before) / 1024
    if mib > MOST_MIB:
        ended = "memory"
    elif seconds > CPU_SECONDS:
        ended = "hang"
    return Outcome(ended or _refusal(status, said), said, seconds, mib)


def _refusal(status: int, said: str) -> str:
    """Whether a refusal is one: an exit status of 1 or 2, and one line that can be shown."""
    if status not in (1, 2) or "Traceback" in said or "unexpected error" in said.lower():
        return "traceback"
    lines = [line for line in said.strip().splitlines() if line.startswith("limbeck: ") or "Error" in line]
    if not lines:
        return "silent"
    return "refused" if all(letter.isprintable() or letter in "\n\t" for letter in said) else "unprintable"


def _where(error: BaseException) -> str:
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]} at {' '.join(places[-6:])}"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    old = [(number, signal.signal(number, ring)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old:
            signal.signal(number, handler)


def _peak(reset: bool = False) -> int:
    """The most memory of this process in KiB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def _ordinary_user() -> Iterator[None]:
    """Without root's right to read what nobody may, where this is root."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Sets * 2)()
    libc.capget(ctypes.byref(header), sets)
    whole = sets[0].effective
    sets[0].effective &= ~READ_ANYTHING
    libc.capset(ctypes.byref(header), sets)
    try:
        yield
    finally:
        sets[0].effective = whole
        libc.capset(ctypes.byref(header), sets)
