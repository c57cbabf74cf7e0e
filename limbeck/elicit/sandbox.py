"""Runs the unit tests of a program that a model wrote where it can do little harm: bubblewrap, limits, another user.

Off unless the environment has LIMBECK_RUN_CODE=1; a recipe can't turn it on. Refuses to run if bubblewrap is missing or
its self-test fails; there is no way to run without it.

The program gets namespaces of its own (processes, mounts, users, a network without any interface), none of our
environment variables, a read-only Python with only the standard library and the system's libraries, and 16 MiB in /tmp.
It has no /proc, and no devices but null, zero and urandom. Time, processor time, memory, processes, file size and
output are limited, and so is the memory of all its processes together. A filter takes away the system calls that it
has no use for (see `system_calls`). Started by root, it runs under a random user number that nobody else has; started
by another user, it runs as that user in a user namespace where it is nobody.

What this does not do: a hole in a system call that is left is open to the program (run hostile code in a virtual
machine); its memory is added up ten times a second, so for a tenth of a second several processes can have more. And a
malicious program can forge its verdict, since its tests run in its own process; but not by exiting early, printing or
raising, because the word that reports success is printed only after the last test.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from limbeck.elicit.system_calls import system_call_filter
from limbeck.types import UserError

ALLOW = "LIMBECK_RUN_CODE"
NOBODY = 65534
FENCE = re.compile(r"(?P<indent>[\s>]*+)(?P<mark>`{3,}+|~{3,}+)[ \t]*+[{.]{0,2}+(?P<language>[\w+#-]*+)[^`]*+$")
TAGGED = re.compile(r"\[(?:PYTHON|BEGIN)\](.*?)(?:\[/PYTHON\]|\[DONE\]|\Z)", re.DOTALL)  # Code Llama's
# Runs inside the sandbox and executes the program and its tests. The limits are set here, where only the program's own
# processes count, because its user or its user namespace is new. They are hard limits, which can't be raised again.
INSIDE = """
import json, os, resource, sys, types
job = json.load(sys.stdin)
if job["user"] is not None:
    os.setgroups([])
    os.setgid(job["user"])
    os.setuid(job["user"])
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
null = os.open("/dev/null", os.O_RDONLY)
os.dup2(null, 0)
os.close(null)
module = sys.modules["__program__"] = types.ModuleType("__program__")
scope = vars(module)  # in a module, which dataclasses and pickle look up by its name
exec(compile(job["program"], "<program>", "exec"), scope)
exec(compile(job["tests"], "<tests>", "exec"), scope)
sys.stdout.flush()
os.write(1, ("\\n" + job["word"]).encode())
os._exit(0)
"""
PROBE = """
import os, socket
for family in socket.AF_INET, socket.AF_UNIX:
    try:
        socket.socket(family)
    except PermissionError:
        continue
    raise SystemError("system calls are not filtered")
"""
POLL_S = 0.1  # between two looks at the memory of all processes
HOME = "/tmp"  # noqa: S108 (inside the sandbox, where nothing else is)


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program. `memory` (the addresses of each process, and what all have in use together), `file` (size
    of a file) and `room` (in /tmp) are in MiB; `files` is the number of open ones."""

    seconds: float = 20.0
    cpu_seconds: int = 10
    memory: int = 512
    processes: int = 8
    file: int = 8
    files: int = 64
    room: int = 16

    def as_rlimits(self) -> dict[str, int]:
        mib = 1024 * 1024
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory * mib,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file * mib,
            "RLIMIT_NOFILE": self.files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """Whether the tests ran to their end, and if not, `why`: "timeout", "memory", or the last line of output,
    shortened."""

    passed: bool
    why: str = ""


def refusal() -> str | None:
    """Why no program can run here, with the remedy; None if one can."""
    if os.environ.get(ALLOW) != "1":
        return f"unit tests would run programs that a model wrote; set {ALLOW}=1 to allow it, in a sandbox"
    return _missing()


def require(place: str = "") -> None:
    """Raise UserError if no program can run here."""
    if why := refusal():
        raise UserError(f"{place}: {why}" if place else why)


@functools.cache
def _missing() -> str | None:
    """Why the sandbox doesn't work on this machine, None if it does; tried once."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        return "the sandbox needs bubblewrap (Linux): install the package bubblewrap, version 0.8 or newer"
    try:
        outcome = _run(PROBE, "assert not os.path.exists('/proc/1') and 'PATH' not in os.environ", SandboxLimits())
    except UserError as error:
        return str(error)
    if outcome.passed:
        return None
    return (
        f"the sandbox does not work here, so no program is run ({outcome.why}): are user namespaces allowed, and is"
        " bubblewrap 0.8 or newer?"
    )


def program_in(answer: str) -> str:
    """The program in an answer: its first block of Python, its first without a language, or the whole answer."""
    blocks = _blocks(answer.replace("\r\n", "\n"))
    for languages in (("python", "python3", "py", "py3"), ("",)):
        for language, block in blocks:
            if language in languages:
                return block
    tagged = TAGGED.search(answer)
    return tagged[1] if tagged else answer


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, also in lists and quotations; one that is not closed goes to the end. A
    fence that is indented further than the block's own is part of it, as in a docstring."""
    blocks: list[tuple[str, list[str]]] = []
    opened = None
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if opened is None:
            if mark:
                opened = mark
                blocks.append((mark["language"].lower(), []))
        elif mark and _closes(mark, opened):
            opened = None
        else:
            indent = opened["indent"]
            inside = line.lstrip(" \t>") if not line.strip(" \t>") else line
            blocks[-1][1].append(line[len(indent) :] if line.startswith(indent) else inside)
    texts = [(language, "\n".join(lines)) for language, lines in blocks]
    return [(name, textwrap.dedent(code) if code.lstrip("\n")[:1].isspace() else code) for name, code in texts]


def _closes(mark: re.Match[str], opened: re.Match[str]) -> bool:
    bare = mark["mark"].startswith(opened["mark"]) and mark.string.rstrip().endswith(mark["mark"])
    return bare and len(mark["indent"]) <= len(opened["indent"]) + 3


def run_tests(program: str, tests: str, limits: SandboxLimits | None = None) -> Outcome:
    """Run the program, then its tests in the same scope, in a new sandbox. They pass if nothing is raised and they end
    in time.

    Raises:
        UserError: no program can run here.
    """
    require()
    return _run(program, tests, limits or SandboxLimits())


def _run(program: str, tests: str, limits: SandboxLimits) -> Outcome:
    word = secrets.token_hex(16)
    user = 1 << 30 | secrets.randbits(29) if os.geteuid() == 0 else None
    job = json.dumps({"program": program, "tests": tests, "word": word, "limits": limits.as_rlimits(), "user": user})
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as calls, tempfile.TemporaryFile() as output:
        for file, content in ((given, job.encode()), (calls, system_call_filter())):
            file.write(content)
            file.seek(0)
        process = subprocess.Popen(  # noqa: S603 (the command is ours; the program goes in as a file)
            _command(limits, user, calls.fileno()),
            stdin=given,
            stdout=output,  # a file, so that the limit on file sizes holds
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=[calls.fileno()],
        )
        if why := _wait(process, limits):
            return Outcome(False, why)
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
        tail = output.read().decode(errors="replace")
    if process.returncode == 0 and tail.endswith("\n" + word):
        return Outcome(True)
    lines = [line.strip() for line in tail.replace(word, "").splitlines() if line.strip()]
    return Outcome(False, (lines[-1] if lines else f"ended early with status {process.returncode}")[:200])


def _wait(process: subprocess.Popen[bytes], limits: SandboxLimits) -> str:
    """Wait for the program; why it was ended, empty if it ended by itself."""
    ends = time.monotonic() + limits.seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return ""
        late = time.monotonic() > ends
        if late or _memory_in_use(process.pid) > limits.memory * 1024 * 1024:
            process.kill()  # kills its whole process namespace
            process.wait()
            return "timeout" if late else "memory"


def _memory_in_use(root: int) -> int:
    """Bytes in memory of all processes that come from `root`; pages that they share count for each."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_bytes()
                parents[int(entry.name)] = int(stat[stat.rindex(b")") + 2 :].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    pages = 0
    for pid in family:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    return pages * resource.getpagesize()


def _mounts(binary: Path) -> list[Path]:
    """What Python needs: itself, its standard library, and the system's libraries."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    library = [Path(sysconfig.get_path(name, vars=bases)) for name in ("stdlib", "platstdlib")]
    library += Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib").glob("libpython*.so*")
    machine = sysconfig.get_config_var("MULTIARCH")  # None where libraries lie in lib64
    system = [Path(root, machine) for root in ("/lib", "/usr/lib") if machine]
    system += map(Path, ("/lib64", "/usr/lib64", "/etc/ld.so.cache"))
    return [place for place in dict.fromkeys((binary, *library, *system)) if place.exists()]


def _command(limits: SandboxLimits, user: int | None, calls: int) -> list[str]:
    """bubblewrap's command line: what is not named here does not exist inside.

    Args:
        calls: an open file of the filter of system calls.
    """
    binary = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    mounts = _mounts(binary)
    parents = dict.fromkeys(
        parent for place in (*mounts, Path("/dev/null")) for parent in reversed(place.parents) if parent != Path("/")
    )
    folders = [part for parent in parents for part in ("--perms", "0755", "--dir", str(parent))]
    binds = [part for place in mounts for part in ("--ro-bind", str(place), str(place))]
    for packages in (place / name for place in mounts for name in ("site-packages", "dist-packages")):
        if packages.is_dir():
            binds += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    devices = [part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    return [
        shutil.which("bwrap") or "bwrap",
        *namespaces,
        *_identity(user),
        "--seccomp",
        str(calls),
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        *folders,
        *binds,
        *devices,
        "--perms",
        "1777",
        "--size",
        str(limits.room * 1024 * 1024),
        "--tmpfs",
        HOME,
        "--remount-ro",
        "/",
        "--chdir",
        HOME,
        "--setenv",
        "HOME",
        HOME,
        "--setenv",
        "LANG",
        "C.UTF-8",
        "--",
        str(binary),
        "-I",
        "-S",
        "-c",
        INSIDE,
    ]


def _identity(user: int | None) -> list[str]:
    """Who the program is: nobody in a user namespace, or, for root, another user."""
    if user is None:
        nobody = ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        return ["--unshare-user", "--disable-userns", *nobody, "--cap-drop", "ALL"]
    # the interpreter may be readable by root only: root opens it, and then becomes the other user
    return ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
