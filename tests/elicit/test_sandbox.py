"""Programs that a model wrote: refused unless allowed, and kept in. Each escape is a program that would tell us of its success."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from limbeck.elicit import sandbox, system_calls
from limbeck.elicit.sandbox import Outcome, SandboxLimits, run_tests
from limbeck.elicit.verify import parse_check, verify
from limbeck.types import UserError

WORKS = sandbox._missing() is None
needs_sandbox = pytest.mark.skipif(not WORKS, reason="the sandbox refuses to work on this machine, and says so")
QUICK = SandboxLimits(seconds=5, cpu_seconds=2)


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(sandbox.ALLOW, "1")


@pytest.fixture
def untried(monkeypatch):
    """As if neither the sandbox nor its filter had been tried yet; forgotten afterwards."""
    forget = sandbox._missing.cache_clear, system_calls.system_call_filter.cache_clear
    for each in forget:
        each()
    yield
    monkeypatch.undo()
    for each in forget:
        each()


@pytest.mark.promise("S7")
def test_no_program_runs_unless_allowed(monkeypatch, tmp_path):
    monkeypatch.delenv(sandbox.ALLOW, raising=False)
    with pytest.raises(UserError, match="LIMBECK_RUN_CODE=1"):
        run_tests(f"open({str(tmp_path / 'ran')!r}, 'w')", "")
    with pytest.raises(UserError, match="LIMBECK_RUN_CODE=1"):
        parse_check({"type": "unit_tests", "tests": "assert True"}, "items.jsonl, line 1")
    assert not (tmp_path / "ran").exists()


def test_without_bubblewrap_it_refuses(monkeypatch, untried, allowed):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install the package bubblewrap"):
        run_tests("", "")


@pytest.mark.promise("S7")
def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch, untried, allowed):
    """A bubblewrap that passes everything through fails the self-test."""
    monkeypatch.setattr(sandbox, "_command", lambda limits, user, calls: ["/bin/sh", "-c", "exit 0"])
    with pytest.raises(UserError, match="does not work here"):
        run_tests("", "")


@needs_sandbox
def test_what_passes_and_what_does_not(allowed):
    program = "def add(a, b):\n    return a + b\n"
    assert run_tests(program, "assert add(1, 2) == 3") == Outcome(True)
    assert run_tests(program, "assert add(1, 2) == 4, 'wrong sum'") == Outcome(False, "AssertionError: wrong sum")
    assert "SyntaxError" in run_tests("def add(:", "").why
    assert "NameError" in run_tests("", "add(1, 2)").why
    assert run_tests("print('x' * 100)", "assert True").passed
    assert run_tests(
        "import math, json, re, collections, itertools, heapq, dataclasses, typing, decimal, datetime, random", ""
    ).passed
    assert "No module named" in run_tests("import torch", "").why  # nothing but the standard library


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "raise SystemExit(0)",
        "quit()",
        "print('0' * 32); import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "raise BaseException('no')",
        "f = lambda n: f(n + 1)\nf(0)",
    ],
)
def test_leaving_early_is_not_passing(allowed, program):
    assert not run_tests(program, "assert False", QUICK).passed


ESCAPES = {
    "environment": "import os\nassert set(os.environ) <= set('HOME LANG LC_CTYPE PWD'.split()), os.environ",
    "environment of others": "import glob\nassert not glob.glob('/proc/*')",
    "home and data": "import os\nfor path in {home!r}, {repository!r}, '/etc/passwd', '/etc/shadow', '/var', '/run', '/sys', '/boot':\n"
    "    try:\n        found = os.listdir(path) if os.path.isdir(path) else open(path).read()\n    except OSError:\n        found = []\n"
    "    assert not [name for name in found if name not in ('.pyenv', 'main')], (path, found)",
    "our temporary files": "import os\nassert os.listdir('/tmp') == [], os.listdir('/tmp')",
    "a link out": "import os\nos.symlink('{secret}', '/tmp/link')\ntry:\n    open('/tmp/link').read()\nexcept OSError:\n    pass\nelse:\n    raise ValueError('read')",
    "writing": "import os\nfor place in '/', '/usr', '/usr/lib', '/dev', '/lib', '/etc', os.path.dirname(os.__file__):\n    try:\n        open(place + '/x', 'w')\n"
    "    except OSError:\n        continue\n    raise ValueError(place)",
    "network": "import socket\nfor host in '127.0.0.1', '1.1.1.1':\n    try:\n        socket.create_connection((host, {port}), 1)\n    except OSError:\n        continue\n"
    "    raise ValueError(host)",
    "names": "import socket\ntry:\n    socket.getaddrinfo('example.org', 80)\nexcept OSError:\n    pass\nelse:\n    raise ValueError",
    "abstract sockets": "import socket\ntry:\n    socket.socket(socket.AF_UNIX).connect('\\0{name}')\nexcept OSError:\n    pass\nelse:\n    raise ValueError",
    "open files": "import os\nfor number in range(3, 64):\n    try:\n        os.fstat(number)\n    except OSError:\n        continue\n    raise ValueError(number)",
    "becoming root": "import os\nfor call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot('/tmp')):\n    try:\n        call()\n"
    "    except OSError:\n        continue\n    raise ValueError",
    "mounting": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) != 0\nassert libc.umount2(b'/usr', 2) != 0",
    "devices": "import os\nfor name in 'mem', 'kmsg', 'vda', 'tty', 'shm', 'fuse', 'kvm':\n    assert not os.path.exists('/dev/' + name)\ntry:\n    os.mknod('/tmp/d', 0o60600, 0x800)\n"
    "except OSError:\n    pass\nelse:\n    raise ValueError",
    "higher limits": "import resource\nfor name in resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE:\n    try:\n        resource.setrlimit(name, (1 << 40, 1 << 40))\n"
    "    except (OSError, ValueError):\n        continue\n    raise RuntimeError(name)",
    "killing others": "import os\nfor number in {pid}, 2, 3:\n    try:\n        os.kill(number, 0)\n    except OSError:\n        continue\n    if number != os.getpid():\n        raise ValueError(number)",
    "memory": "try:\n    held = bytearray(10 << 30)\nexcept MemoryError:\n    pass\nelse:\n    raise ValueError",
    "a large file": "try:\n    with open('/tmp/large', 'wb') as file:\n        for _ in range(10_000):\n            file.write(bytes(1 << 20))\nexcept OSError:\n    pass\nelse:\n    raise ValueError",
    "many files": "written = 0\ntry:\n    for number in range(1000):\n        with open(f'/tmp/{{number}}', 'wb') as file:\n            written += file.write(bytes(1 << 20))\nexcept OSError:\n    pass\n"
    "assert written <= 17 << 20, written",
    "shared memory": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.shmget(0, 1 << 20, 0o1600) == -1 and ctypes.get_errno() == 1\n"
    "for make in lambda: os.memfd_create('x'), lambda: libc.memfd_create(b'x', 0) + 1 or 1 / 0:\n    try:\n        make()\n    except (OSError, ZeroDivisionError):\n        continue\n    raise ValueError",
    "sockets of any kind": "import socket\nfor family in 1, 2, 10, 16, 17, 38, 40, 44:\n    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW:\n        try:\n            socket.socket(family, kind)\n"
    "        except PermissionError:\n            continue\n        raise ValueError(family)\nsocket.socketpair()[0].close()",
    "namespaces": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor flag in 0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000, 0x4000000, 0x2000000, 0x80:\n"
    "    assert libc.unshare(flag) == -1 and ctypes.get_errno() == 1, hex(flag)\n    assert libc.syscall({clone}, flag | 17, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, hex(flag)",
    "the kernel's corners": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor number in 425, 426, 427, 428, 430, 438, 447, {bpf}, {ptrace}:  # io_uring, mounts, pidfd_getfd, memfd_secret\n"
    "    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, number",
    "packages": "import os, sys\nfor root in sys.base_prefix, '/usr', '/usr/local':\n    for folder, _, names in os.walk(root):\n        assert not names or 'packages' not in folder, folder\n"
    "for path in '/usr/share', '/usr/bin', '/usr/sbin', '/usr/local/bin', '/usr/include', '/opt':\n    assert not os.path.isdir(path) or not os.listdir(path), path",
    "input": "import sys\nassert sys.stdin.read() == ''",
}  # fmt: skip


@pytest.fixture
def escape(tmp_path, monkeypatch):
    """A program by its name, filled with what there is to be found outside: a secret's file, open and inheritable, a server, our number."""
    monkeypatch.setenv("LIMBECK_CANARY_KEY", "sk-canary")
    secret = tmp_path / "secret"
    secret.write_text("sk-canary")
    with (
        secret.open() as held,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        os.set_inheritable(held.fileno(), True)
        name = f"limbeck-test-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        machine = os.uname().machine
        clone, bpf, ptrace = {"x86_64": (56, 321, 101), "aarch64": (220, 280, 117)}[machine]
        facts = {"clone": clone, "bpf": bpf, "ptrace": ptrace}
        facts |= {"secret": secret, "port": server.getsockname()[1], "pid": os.getpid(), "name": name}
        yield lambda which: ESCAPES[which].format(
            **facts, home=str(Path.home()), repository=str(Path(__file__).parent.parent.parent)
        )


@needs_sandbox
@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.promise("S7")
def test_it_stays_in(allowed, escape, name):
    assert run_tests(escape(name), "", SandboxLimits(seconds=20, cpu_seconds=10)) == Outcome(True)


OUTSIDE = [
    "environment",
    "environment of others",
    "home and data",
    "a link out",
    "network",
    "abstract sockets",
    "open files",
    "devices",
    "shared memory",
    "sockets of any kind",
    "packages",
]


@pytest.mark.long
@pytest.mark.parametrize("name", OUTSIDE)
def test_the_same_program_gets_out_where_there_is_no_sandbox(escape, name):
    """So that a test above can fail."""
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", escape(name)], capture_output=True, close_fds=False, stdin=subprocess.DEVNULL
    )
    assert found.returncode == 1 and b"Error" in found.stderr


def processes() -> set[str]:
    """Command lines of all processes of this machine that run a sandboxed program."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if b"__program__" in command:
            found.add(place.name)
    return found


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    {
        "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "thread bomb": "import threading, time\nwhile True:\n    try:\n        threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError:\n        pass",
        "loop": "while True: pass",
        "sleep": "import time; time.sleep(99)",
        "deaf": "import signal, time\nfor n in range(1, 64):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\ntime.sleep(99)",
        "talker": "while True: print('x' * 4096)",
        "pattern": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    }.values(),
    ids=["fork bomb", "thread bomb", "loop", "sleep", "deaf", "talker", "pattern"],
)
@pytest.mark.promise("S7", "S14")
def test_it_ends(allowed, program):
    before, started = processes(), time.monotonic()
    assert not run_tests(program, "", SandboxLimits(seconds=4, cpu_seconds=2)).passed
    assert time.monotonic() - started < 12
    deadline = time.monotonic() + 5
    while (left := processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@needs_sandbox
@pytest.mark.promise("S7")
@pytest.mark.parametrize(
    "memory", ["bytearray(300 << 20)", "mmap.mmap(-1, 300 << 20)"], ids=["of each", "shared with its children"]
)
def test_the_memory_of_all_processes_is_bounded(allowed, memory):
    """Each process is within its bound, and together they are not; those that are stay."""
    program = f"import mmap, os, time\nfor _ in range({{count}}):\n    if os.fork() == 0:\n        held = {memory}\n        held[::4096] = bytes(len(held) // 4096)\n        time.sleep(3)\n        os._exit(0)\ntime.sleep(1)"
    limits = SandboxLimits(seconds=15)
    assert run_tests(program.format(count=4), "", limits) == Outcome(False, "memory")
    assert run_tests(program.format(count=1), "", limits) == Outcome(True)


def test_without_libseccomp_it_refuses(monkeypatch, untried, allowed):
    monkeypatch.setattr(system_calls.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="install the package"):
        run_tests("", "")


@needs_sandbox
def test_what_small_programs_do_is_allowed(allowed):
    """Threads, processes, pipes, files and pairs of sockets, under the filter of system calls."""
    program = (
        "import multiprocessing, os, socket, subprocess, sys, tempfile, threading\n"
        "thread = threading.Thread(target=print)\nthread.start()\nthread.join()\n"
        "assert subprocess.run([sys.executable, '-I', '-S', '-c', 'print(1)'], capture_output=True, check=True).stdout == b'1\\n'\n"
        "process = multiprocessing.get_context('fork').Process(target=print)\nprocess.start()\nprocess.join()\n"
        "assert process.exitcode == 0\none, other = socket.socketpair()\none.send(b'x')\nassert other.recv(1) == b'x'\n"
        "with tempfile.TemporaryFile() as file:\n    file.write(b'x')\n"
        "import asyncio, concurrent.futures\nassert asyncio.run(asyncio.sleep(0, 1)) == 1\n"
        "assert list(concurrent.futures.ThreadPoolExecutor(2).map(abs, [-1, 2])) == [1, 2]\n"
    )
    assert run_tests(program, "assert 1 + 1 == 2", QUICK) == Outcome(True)


@needs_sandbox
@pytest.mark.promise("S7")
def test_no_grandchild_outlives_it(allowed, tmp_path):
    """A grandchild in a session of its own is gone when the program has ended."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)"
    before = processes()
    assert run_tests(program, "", QUICK).passed
    deadline = time.monotonic() + 5
    while (left := processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@needs_sandbox
def test_two_at_once_do_not_share_their_bounds(allowed):
    """A program's processes count for it alone."""
    found: list[Outcome] = []
    bomb = "import os, time\nfor _ in range(50):\n    try:\n        if os.fork() == 0:\n            time.sleep(3)\n            os._exit(0)\n    except OSError:\n        pass\ntime.sleep(2)"
    other = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)"
    beside = threading.Thread(target=lambda: found.append(run_tests(bomb, "", SandboxLimits(seconds=10))))
    beside.start()
    time.sleep(0.7)
    assert run_tests(other, "").passed
    beside.join()


@needs_sandbox
def test_a_check_reads_the_program_out_of_the_answer(allowed):
    check = parse_check({"type": "unit_tests", "tests": "assert double(4) == 8"}, "here")
    assert verify(check, "Here it is:\n```python\ndef double(n):\n    return 2 * n\n```\nIt doubles.") is True
    assert verify(check, "def double(n): return 2 * n") is True
    assert verify(check, "```\ndef double(n):\n    return n\n```") is False
    assert verify(check, "I can't do that.") is False


def test_the_tests_of_a_check_must_be_text(allowed):
    with pytest.raises(UserError, match="'tests'"):
        parse_check({"type": "unit_tests", "tests": ["assert True"]}, "here")


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.promise("S7")
def test_root_is_not_who_runs_it(allowed):
    assert run_tests(
        "import os\nassert os.getuid() >= 1 << 30 and os.getgid() >= 1 << 30 and os.getgroups() == []", ""
    ).passed
    assert subprocess.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip() == "0"
