"""The system calls that a program in the sandbox may not make: a filter for bubblewrap, compiled by libseccomp.

A program of text and numbers needs none of them. They are how one reaches out (sockets), keeps memory past its bounds
(shared memory of System V, memory files), or tries what kernels have had holes in (namespaces, mounts, io_uring, BPF,
tracing). Whoever makes one gets "not permitted"; a call by another machine's numbers ends the program.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import functools
import tempfile

from limbeck.types import UserError

DENIED = """
socket
shmget shmat shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open memfd_create memfd_secret
io_uring_setup io_uring_enter io_uring_register io_setup
unshare setns chroot pivot_root mount umount umount2 mount_setattr move_mount open_tree fsopen fsmount fsconfig fspick
ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp
bpf perf_event_open userfaultfd keyctl add_key request_key personality
name_to_handle_at open_by_handle_at fanotify_init quotactl acct swapon swapoff reboot syslog
kexec_load kexec_file_load init_module finit_module delete_module settimeofday clock_settime adjtimex clock_adjtime
sethostname setdomainname iopl ioperm vhangup lookup_dcookie
""".split()
NAMESPACES = 0x7E020080  # every CLONE_NEW flag of clone
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
MASKED_EQUAL = 7


class _Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: (argument & mask) == value."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


@functools.cache
def system_call_filter() -> bytes:
    """The filter as a classic BPF program for this machine.

    Raises:
        UserError: libseccomp is missing, or can't make it.
    """
    name = ctypes.util.find_library("seccomp")
    if name is None:
        raise UserError("the sandbox filters system calls with libseccomp: install the package libseccomp2")
    library = ctypes.CDLL(name)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))
    if not context:
        raise UserError("libseccomp makes no filter on this machine, so no program is run")
    try:
        for call in DENIED:
            _deny(library, context, call, errno.EPERM)
        _deny(library, context, "clone3", errno.ENOSYS)  # its flags lie in memory; who meets this takes clone
        for bit in range(32):
            if NAMESPACES >> bit & 1:
                _deny(library, context, "clone", errno.EPERM, flag=1 << bit)
        with tempfile.TemporaryFile() as file:
            if library.seccomp_export_bpf(context, file.fileno()):
                raise UserError("libseccomp can't write its filter, so no program is run")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _deny(library: ctypes.CDLL, context: ctypes.c_void_p, call: str, error: int, flag: int = 0) -> None:
    """Let a call fail, or only where its first argument has the flag. One that this machine lacks needs no rule."""
    number = library.seccomp_syscall_resolve_name(call.encode())
    if number < 0:
        return
    conditions = (_Comparison * 1)(_Comparison(0, MASKED_EQUAL, mask=flag, value=flag))
    rule = (ctypes.c_uint32(ERRNO | error), ctypes.c_int(number), ctypes.c_uint(1 if flag else 0), conditions)
    if library.seccomp_rule_add_array(context, *rule):
        raise UserError(f"libseccomp can't filter {call}, so no program is run")
