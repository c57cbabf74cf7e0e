"""Starts a command once for every rank, by torch's own launcher, and has one rank speak for all."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from limbeck.commands import console
from limbeck.config import ranks
from limbeck.types import UserError

GRACE_SECONDS = 10  # for the other ranks, once one has ended
PATIENT = 2  # signals that leave it to the ranks to end
IN_WORDS = (1, console.USER_ERROR)  # the rank itself has said why


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Have the first rank that fails tell the user, and the others end without a word."""
    try:
        yield
    except BaseException as error:
        if ranks.world_size() > 1:
            from limbeck.training import distributed

            console.err.quiet = not distributed.fail(error)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all now; the message goes out first
        raise


def one_process(command: str, asked: int | None = None) -> None:
    """Refuse a command that works on one process.

    Raises:
        UserError: torchrun has started several, or several are `asked` for.
    """
    if max(ranks.world_size(), asked or 1) > 1:
        raise UserError(f"limbeck {command} works on one process: start it without torchrun and --ranks")


def start(arguments: Sequence[str], count: int) -> NoReturn:
    """Run `limbeck ARGUMENTS` on `count` ranks of this machine, and exit with their status.

    Raises:
        UserError: ranks in ranks.
    """
    if ranks.is_launched():
        raise UserError("torchrun has started the ranks already: leave out --ranks")
    raise SystemExit(_launch(without_ranks(arguments), count))


def without_ranks(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without `--ranks N`."""
    left: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--ranks":
            next(given, None)
        elif not argument.startswith("--ranks="):
            left.append(argument)
    return left


def _launch(arguments: Sequence[str], count: int) -> int:
    """Run the ranks to their end; returns the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--standalone", f"--nproc_per_node={count}", "-m", "limbeck", *arguments]
    options: Any = run.parse_args(words)
    if not hasattr(options, "signals_to_handle"):
        raise UserError("--ranks needs a newer torch, whose launcher leaves signals to the ranks; use torchrun")
    options.signals_to_handle = "SIGUSR1"  # Ctrl-C and SIGTERM are passed on below, without torch's 30 s
    options.shutdown_timeout = GRACE_SECONDS
    os.environ[ranks.BY_COMMAND] = str(count)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("torch.distributed.elastic", "torch.distributed.run"):  # one message, and it is ours
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
    with _passing_signals_on():
        try:
            run.run(options)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            spoken = error.get_first_failure()[1].exitcode in IN_WORDS  # torch ended the others after it
            if not spoken:
                return _status(codes)
            return 1 if 1 in codes.values() else console.USER_ERROR
    return 0


def _status(codes: dict[int, int]) -> int:
    """The exit status for those of failed ranks; says which was ended from outside."""
    killed = {rank: code for rank, code in codes.items() if code not in IN_WORDS}
    for rank, code in list(killed.items())[:1]:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        console.err.print("[bold red]limbeck:[/bold red] ", end="")
        console.err.print(
            f"rank {rank} ended with {how}, so all ranks ended; finished work is kept, run it again to go on",
            markup=False,
        )
    return 1 if 1 in codes.values() and not killed else console.USER_ERROR


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the ranks, as Ctrl-C: they stop after the step, at the second one at once, and the
    launcher waits for them. At the third they are killed: a rank that waits for another does not see a signal. SIGTERM
    is what torch's launcher ends the ranks by where one has died."""
    received = itertools.count(1)

    def on_signal(*_: object) -> None:
        passed_on = signal.SIGKILL if next(received) > PATIENT else signal.SIGINT
        for process in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, passed_on)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """The process ids of this process's children."""
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    return [child.pid for child in psutil.Process(os.getpid()).children()]
