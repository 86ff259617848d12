"""The system calls that a sandbox denies, as BPF programs for ``bwrap --seccomp`` and for a process itself.

Kept to the standard library: sandboxed children import it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

ALLOW, DENY, NO_SYSCALL, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
CLONE_THREAD = 0x10000
PR_SET_DUMPABLE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GREATER, _ANSWER = 0x20, 0x15, 0x45, 0x35, 0x06


class Calls(NamedTuple):
    """Numbers of system calls on one kind of machine."""

    architecture: int
    clone: int
    clone3: int
    prlimit64: int
    forks: tuple[int, ...]
    """fork, vfork."""
    denied: tuple[int, ...]
    """ptrace, unshare, setns, mount, bpf, keyctl, perf_event_open, userfaultfd, io_uring_setup; process_vm_readv and
    process_vm_writev; and what outlives a process: shmget, semget, msgget, mq_open, add_key, request_key."""


CALLS = {
    "x86_64": Calls(
        *(0xC000003E, 56, 435, 302, (57, 58)),
        (101, 272, 308, 165, 321, 250, 298, 323, 425, 310, 311, 29, 64, 68, 240, 248, 249),
    ),
    "aarch64": Calls(
        *(0xC00000B7, 220, 435, 261, ()),
        (117, 97, 268, 40, 280, 219, 241, 282, 425, 270, 271, 194, 190, 186, 180, 217, 218),
    ),
}


def seccomp_filter(processes: bool = False) -> bytes:
    """Make the BPF program: threads may be made, processes only with ``processes``; a process limit would not bind root.

    Raises ``NotImplementedError`` on a machine whose system calls are unknown.
    """
    machine = os.uname().machine
    if machine not in CALLS:
        raise NotImplementedError(f"no system call filter for {machine}")
    calls = CALLS[machine]
    steps = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, calls.architecture), (_ANSWER, 0, 0, KILL), (_LOAD, 0, 0, 0)]
    steps += [(_JUMP_GREATER, 0, 1, 0x40000000), (_ANSWER, 0, 0, DENY)]  # The x32 calls, by other numbers.
    for number in calls.denied + (() if processes else calls.forks):
        steps += [(_JUMP_EQUAL, 0, 1, number), (_ANSWER, 0, 0, DENY)]
    steps += [(_JUMP_EQUAL, 0, 1, calls.clone3), (_ANSWER, 0, 0, NO_SYSCALL)]  # The C library falls back to clone.
    # The limits of another process: argument 0 is a process other than 0, the caller.
    steps += [(_JUMP_EQUAL, 0, 4, calls.prlimit64), (_LOAD, 0, 0, 16), (_JUMP_EQUAL, 1, 0, 0)]
    steps += [(_ANSWER, 0, 0, DENY), (_ANSWER, 0, 0, ALLOW)]
    if not processes:
        steps += [(_JUMP_EQUAL, 0, 3, calls.clone), (_LOAD, 0, 0, 16)]
        steps += [(_JUMP_SET, 1, 0, CLONE_THREAD), (_ANSWER, 0, 0, DENY)]
    steps += [(_ANSWER, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def deny_calls(program: bytes) -> None:
    """Put ``program`` over this process for good, on top of the filters it has. Raises ``OSError`` if it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    filter_ = _Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0):
        raise OSError(ctypes.get_errno(), "no system call filter")


def set_dumpable(dumpable: bool) -> None:
    """Open or close this process's memory and descriptors to other processes of the same user."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)
