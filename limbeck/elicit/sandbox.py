"""Runs a program that a model wrote, on its unit tests, where it can do little harm: bubblewrap, limits, another user.

Off unless LIMBECK_RUN_CODE=1 stands in the environment of whoever runs Limbeck: a recipe can't turn it on. Refuses
where bubblewrap is missing or its self-test fails; there is no way to run without it.

The program sees its own namespaces only (processes, network without any interface, mounts, users), no variable of our
environment, a read-only Python with nothing but the standard library, and 16 MiB of its own in /tmp. It has no /proc
and no device but null, zero and urandom. It is bound in seconds, processor seconds, memory, processes, file size and
what it may print. Started by root, it runs under a user number that nobody has, drawn for it alone; started by another
user, as that user in a user namespace where it is nobody.

What this does not do: it does not filter system calls, so a hole in the kernel is open to it (run hostile code in a
virtual machine); and a program that wants to can forge its verdict, since its tests run in its own process. It can't by
leaving early, printing, or
raising: only a program that reached the end of its tests knows the word that says so.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from limbeck.types import UserError

ALLOW = "LIMBECK_RUN_CODE"
NOBODY = 65534
FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
# Runs inside, and is what the program and its tests are executed by. The limits are set here, where only the program's
# own processes
# count, because its user or its user namespace is new. Hard ones: they can't be raised again.
INSIDE = """
import json, os, resource, sys
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
scope = {"__name__": "__program__"}
exec(compile(job["program"], "<program>", "exec"), scope)
exec(compile(job["tests"], "<tests>", "exec"), scope)
sys.stdout.flush()
os.write(1, ("\\n" + job["word"]).encode())
os._exit(0)
"""
# No network: the kernel has no way to anywhere, so that this fails at once and sends nothing.
PROBE = """
import os, socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
except OSError:
    pass
else:
    raise SystemError("there is a network")
"""
OWN = "/tmp"  # noqa: S108 (inside, where nothing else is)


@dataclass(frozen=True)
class Limits:
    """Bounds of one program; `memory` and `file` in MiB, `memory` for each of its processes."""

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
    """`passed`: the tests ran to their end. `why` not: "timeout", or the last line of what it said, cut short."""

    passed: bool
    why: str = ""


def refusal() -> str | None:
    """Why no program may run here, with the cure; None where one may."""
    if os.environ.get(ALLOW) != "1":
        return f"unit tests would run programs that a model wrote; set {ALLOW}=1 to allow it, in a sandbox"
    return _missing()


def require(place: str = "") -> None:
    """UserError where no program may run."""
    if why := refusal():
        raise UserError(f"{place}: {why}" if place else why)


@functools.cache
def _missing() -> str | None:
    """Why the sandbox doesn't work on this machine: asked once."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        return "the sandbox needs bubblewrap (Linux): install the package bubblewrap, version 0.8 or newer"
    outcome = _run(PROBE, "assert not os.path.exists('/proc/1') and 'PATH' not in os.environ", Limits())
    if outcome.passed:
        return None
    return (
        f"the sandbox does not work here, so that no program is run ({outcome.why}): are user namespaces allowed, is"
        " bubblewrap 0.8?"
    )


def program_in(answer: str) -> str:
    """The program of an answer: its first fenced block of Python, or the whole of it."""
    found = FENCED.search(answer)
    return found[1] if found else answer


def passes(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Run the program, then the tests in the same scope, in a new sandbox. They pass when nothing is raised and they
    end in time."""
    require()
    return _run(program, tests, limits or Limits())


def _run(program: str, tests: str, limits: Limits) -> Outcome:
    word = secrets.token_hex(16)
    user = 1 << 30 | secrets.randbits(29) if os.geteuid() == 0 else None
    job = json.dumps({"program": program, "tests": tests, "word": word, "limits": limits.as_rlimits(), "user": user})
    with tempfile.TemporaryFile() as said:  # a file, so that the bound on files bounds it
        process = subprocess.Popen(  # noqa: S603 (the command is ours; the program goes in by a pipe)
            _command(limits, user), stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env={}, cwd="/"
        )
        try:
            process.communicate(job.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # its whole process namespace goes with it
            process.wait()
            return Outcome(False, "timeout")
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
        tail = said.read().decode(errors="replace")
    if process.returncode == 0 and tail.endswith("\n" + word):
        return Outcome(True)
    lines = [line.strip() for line in tail.replace(word, "").splitlines() if line.strip()]
    return Outcome(False, (lines[-1] if lines else f"ended early with status {process.returncode}")[:200])


def _command(limits: Limits, user: int | None) -> list[str]:
    """bubblewrap's command line: what is not named here is not there."""
    binary = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    places = [Path("/usr"), Path(sys.base_prefix).resolve(), *map(Path, ("/lib", "/lib64", "/etc/ld.so.cache"))]
    there = [place for place in places if place.exists()]
    parents = dict.fromkeys(
        parent for place in (*there, Path("/dev/null")) for parent in reversed(place.parents) if parent != Path("/")
    )
    folders = [part for parent in parents for part in ("--perms", "0755", "--dir", str(parent))]
    binds = [part for place in there for part in ("--ro-bind", str(place), str(place))]
    devices = [part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if user is None:
        people = ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
    else:  # the interpreter may be root's own, so that root opens it, and then becomes the other user
        people = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [
        shutil.which("bwrap") or "bwrap",
        *namespaces,
        *people,
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
        OWN,
        "--remount-ro",
        "/",
        "--chdir",
        OWN,
        "--setenv",
        "HOME",
        OWN,
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
