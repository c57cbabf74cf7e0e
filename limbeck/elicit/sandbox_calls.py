"""Which calls of the kernel a program in the sandbox can't make, as a filter that bubblewrap installs (seccomp).

Left out are those with which memory escapes its limit (shared segments, memory files), that reach beyond the namespaces
(sockets of other families than the internet's and local ones, whose network is empty), that make new ones, or that had
holes out of proportion to their use in a small program (io_uring, bpf, keys, tracing). Everything else is allowed. They
fail with an error; the program goes on.

Numbers: asm/unistd_64.h for x86-64, asm-generic/unistd.h for ARM64. Other processors get no filter.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

REFUSED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
}  # fmt: skip
FAMILIES = (1, 2, 10)  # of sockets: local, IPv4, IPv6
NEW_NAMESPACES = 0x7E020000  # flags of `clone`: mounts, cgroup, names, messages, users, processes, network
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of classic BPF
NUMBER, PROCESSOR, FIRST = 0, 4, 16  # where `struct seccomp_data` has them
ALLOW, FAIL = 0x7FFF0000, 0x00050000


class Processor(NamedTuple):
    """The column of its numbers above, its name in the kernel's audit, and the calls that are looked into."""

    column: int
    audit: int
    clone: int
    clone3: int
    socket: int


PROCESSORS = {
    "x86_64": Processor(0, 0xC000003E, clone=56, clone3=435, socket=41),
    "aarch64": Processor(1, 0xC00000B7, clone=220, clone3=435, socket=198),
}


def refusals() -> bytes:
    """The filter for this machine's processor; empty where its numbers are not known."""
    known = PROCESSORS.get(platform.machine())
    if known is None:
        return b""
    fail = RETURN, 0, 0, FAIL | errno.EPERM
    program = [(LOAD, 0, 0, PROCESSOR), (EQUAL, 1, 0, known.audit), fail, (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, 0x40000000), fail]  # the same calls under other numbers (x32)
    for numbers in REFUSED.values():
        program += [(EQUAL, 0, 1, numbers[known.column]), fail]
    program += [(EQUAL, 0, 1, known.clone3), (RETURN, 0, 0, FAIL | errno.ENOSYS)]  # its flags can't be read from here
    program += [(EQUAL, 0, 4, known.clone), (LOAD, 0, 0, FIRST), (ANY_BIT, 0, 1, NEW_NAMESPACES), fail]
    program += [(RETURN, 0, 0, ALLOW), (EQUAL, 1, 0, known.socket), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, FIRST)]
    for family in FAMILIES:
        program += [(EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, FAIL | errno.EAFNOSUPPORT))
    return b"".join(struct.pack("HBBI", *operation) for operation in program)
