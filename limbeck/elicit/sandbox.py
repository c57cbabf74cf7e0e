"""Runs the unit tests of a program that a model wrote where it can do little harm: bubblewrap, limits, another user.

Off unless the environment has LIMBECK_RUN_CODE=1; a recipe can't turn it on. Refuses to run if bubblewrap is missing or
its self-test fails; there is no way to run without it.

The program gets namespaces of its own (processes, mounts, users, a network without any interface), none of our
environment variables, a read-only Python with only the standard library, and 16 MiB in /tmp. It has no /proc, and no
devices but null, zero and urandom. Time, processor time, memory, processes, file size and output are limited. Started
by root, it runs under a random user number that nobody else has; started by another user, it runs as that user in a
user namespace where it is nobody.

Calls of the kernel that lead around these limits are refused (`sandbox_calls.py`).

What this does not do: a hole in the kernel is open to the program (run hostile code in a virtual machine), /usr can be
read, and the memory of several processes adds up. And a malicious program can forge its verdict, since its tests run in
its own process; but not by exiting early, printing or raising, because the word that reports success is printed only
after the last test.
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
import textwrap
from dataclasses import dataclass
from pathlib import Path

from limbeck.elicit.sandbox_calls import refusals
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
# Without a network the kernel has no route, so this fails at once and sends nothing.
PROBE = """
import os, socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
except OSError:
    pass
else:
    raise SystemError("there is a network")
"""
HOME = "/tmp"  # noqa: S108 (inside the sandbox, where nothing else is)


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program. `memory` (of each process), `file` (size of a file) and `room` (in /tmp) are in MiB;
    `files` is the number of open ones."""

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
    """Whether the tests ran to their end, and if not, `why`: "timeout", or the last line of output, shortened."""

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
    outcome = _run(PROBE, "assert not os.path.exists('/proc/1') and 'PATH' not in os.environ", SandboxLimits())
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
    # the output goes into a file, so that the limit on file sizes holds
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as refused:
        refused.write(refusals())
        refused.seek(0)
        process = subprocess.Popen(  # noqa: S603 (the command is ours; the program goes in by a pipe)
            _command(limits, user, refused.fileno()), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            env={}, cwd="/", pass_fds=[refused.fileno()],
        )  # fmt: skip
        try:
            process.communicate(job.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # kills its whole process namespace
            process.wait()
            return Outcome(False, "timeout")
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
        tail = output.read().decode(errors="replace")
    if process.returncode == 0 and tail.endswith("\n" + word):
        return Outcome(True)
    lines = [line.strip() for line in tail.replace(word, "").splitlines() if line.strip()]
    return Outcome(False, (lines[-1] if lines else f"ended early with status {process.returncode}")[:200])


def _command(limits: SandboxLimits, user: int | None, refused: int) -> list[str]:
    """bubblewrap's command line: what is not named here does not exist inside. `refused` is the number of the open file
    that holds the filter of calls."""
    binary = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    places = [Path("/usr"), Path(sys.base_prefix).resolve(), *map(Path, ("/lib", "/lib64", "/etc/ld.so.cache"))]
    mounts = [place for place in places if place.exists()]
    parents = dict.fromkeys(
        parent for place in (*mounts, Path("/dev/null")) for parent in reversed(place.parents) if parent != Path("/")
    )
    folders = [part for parent in parents for part in ("--perms", "0755", "--dir", str(parent))]
    binds = [part for place in mounts for part in ("--ro-bind", str(place), str(place))]
    devices = [part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if user is None:
        nobody = ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        identity = ["--unshare-user", "--disable-userns", *nobody, "--cap-drop", "ALL"]
    else:  # the interpreter may be readable by root only: root opens it, and then becomes the other user
        identity = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    calls = ["--seccomp", str(refused)] if refusals() else []
    return [
        shutil.which("bwrap") or "bwrap",
        *calls,
        *namespaces,
        *identity,
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
