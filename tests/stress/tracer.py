"""Stop a process at the system calls with which it writes files, and kill it there: `ptrace` and a seccomp filter, Linux only.

The process runs unchanged code. Before each of the calls in `CALLS` the kernel stops it and tells us (`Stop`: which
call, on which path); `Traced.follow` hands each stop to a function that answers what is to happen:

    GO          let it go on
    KILL        SIGKILL now: the call does not happen
    AFTER       let the call happen, then SIGKILL before the process sees its result
    n (bytes)   let a write put no more than its first n bytes into the file, then SIGKILL

Calls that are not in `CALLS` are not slowed down. Works as root, or where `kernel.yama.ptrace_scope` lets a parent
trace its child.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

GO, KILL, AFTER = None, "kill", "after"

# Number of each call, the register of its third argument (bytes of a write) in what PTRACE_GETREGSET gives, and the
# audit name.
_X86 = {
    "open": 2, "write": 1, "ftruncate": 77, "fsync": 74, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87,
    "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "renameat2": 316,
}  # fmt: skip
_ARM = {
    "write": 64, "ftruncate": 46, "fsync": 82, "openat": 56, "mkdirat": 34, "unlinkat": 35, "renameat": 38, "renameat2": 276,
}  # fmt: skip
_MACHINES = {"x86_64": (_X86, 12, 27), "aarch64": (_ARM, 2, 34)}  # calls, the length's register, registers in all
CALLS = {number: name for name, number in _MACHINES.get(platform.machine(), ({}, 0, 0))[0].items()}

_TRACEME, _CONT, _SYSCALL, _SETOPTIONS, _GETREGSET, _SETREGSET, _SYSCALL_INFO = 0, 7, 24, 0x4200, 0x4204, 0x4205, 0x420E
_PRSTATUS = 1
_EVENT_SECCOMP = 7
_WALL = 0x40000000
# TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, TRACESECCOMP, EXITKILL
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@dataclasses.dataclass
class Stop:
    """A system call that is about to happen. ``path``: what it opens, writes, flushes, makes, renames or removes."""

    call: str
    path: str
    creates: bool = False
    """Of an open: whether it makes the file or opens it for writing."""
    target: str = ""
    """Of a rename: the new name."""
    size_bytes: int = 0
    """Of a write."""


class Traced:
    """A forked child that runs ``body`` (its result is the exit code) under our eyes."""

    def __init__(self, body: Callable[[], int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _ptrace(_TRACEME, 0, 0, 0)
                os.kill(os.getpid(), signal.SIGSTOP)
                _filter_calls()
                code = body()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.waitpid(self.pid, _WALL)
        _ptrace(_SETOPTIONS, self.pid, 0, _OPTIONS)
        _ptrace(_CONT, self.pid, 0, 0)

    def kill(self) -> None:
        """SIGKILL, wherever it is."""
        os.kill(self.pid, signal.SIGKILL)

    def follow(self, decide: Callable[[Stop], Any]) -> int:
        """Until its end: the exit code, or minus the signal that killed it."""
        after: set[int] = set()
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                if pid == self.pid:
                    return os.waitstatus_to_exitcode(status)
                continue
            # a process that somebody kills meanwhile is gone from under these calls; the next wait tells of it
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                self._stopped(pid, status, decide, after)

    def _stopped(self, pid: int, status: int, decide: Callable[[Stop], Any], after: set[int]) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        request, passed = _CONT, 0
        if event == _EVENT_SECCOMP:
            answer = decide(_stop(pid))
            if answer == KILL:
                self.kill()
            elif answer is not GO:
                if answer != AFTER:
                    _set_length(pid, answer)
                after.add(pid)
                request = _SYSCALL  # and stop again when the call has happened
        elif number == signal.SIGTRAP | 0x80 and pid in after:
            self.kill()
        elif event == 0 and number not in (signal.SIGTRAP, signal.SIGSTOP):  # SIGSTOP: how a new thread begins
            passed = number
        _ptrace(request, pid, 0, passed)


def possible() -> str | None:
    """Why a process can't be traced here; None where it can."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"no tracing on {sys.platform} {platform.machine()}"
    try:
        seen: list[Stop] = []
        child = Traced(lambda: int(os.path.exists(os.devnull)) and os.write(os.open(os.devnull, os.O_WRONLY), b"12345"))

        def note(stop: Stop) -> int | None:
            seen.append(stop)
            return 2 if stop.call == "write" else GO

        code = child.follow(note)
    except OSError as error:
        return f"a child can't be traced ({error.strerror})"
    wrong = code != -signal.SIGKILL or not any(stop.size_bytes == 5 for stop in seen)
    return "a traced child was not stopped at its writes (a sandbox?)" if wrong else None


def _ptrace(request: int, pid: int, address: int, data: Any) -> int:
    ctypes.set_errno(0)
    result = _libc.ptrace(request, pid, address, data)
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _filter_calls() -> None:
    """Let the kernel stop this process, and its threads to come, before `CALLS` and no others."""
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    trace, allow = 0x7FF00000, 0x7FFF0000
    code = struct.pack("HBBI", load, 0, 0, 0)
    for at, number in enumerate(CALLS):
        code += struct.pack("HBBI", equal, len(CALLS) - at, 0, number)
    code += struct.pack("HBBI", answer, 0, 0, allow) + struct.pack("HBBI", answer, 0, 0, trace)
    program = _Program(len(code) // 8, code)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    for arguments in ((no_new_privileges, 1, 0, 0, 0), (set_seccomp, mode_filter, ctypes.byref(program), 0, 0)):
        if _libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def _stop(pid: int) -> Stop:
    buffer = ctypes.create_string_buffer(
        88
    )  # struct ptrace_syscall_info: op, arch, ..., at 24 the number and six arguments
    _ptrace(_SYSCALL_INFO, pid, len(buffer), ctypes.addressof(buffer))
    number, *arguments = struct.unpack_from("7Q", buffer, 24)
    call = CALLS[number]
    if call in ("write", "ftruncate", "fsync"):
        return Stop(call, _descriptor(pid, arguments[0]), size_bytes=arguments[2] if call == "write" else 0)
    if call.endswith(("at", "at2")):
        path = _path(pid, arguments[0], arguments[1])
        target = _path(pid, arguments[2], arguments[3]) if call.startswith("rename") else ""
        flags = arguments[2]
        call = call.removesuffix("2").removesuffix("at")
    else:
        path, target, flags = _path(pid, None, arguments[0]), "", arguments[1]
        target = _path(pid, None, arguments[1]) if call == "rename" else ""
    return Stop(call, path, call == "open" and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)), target)


def _descriptor(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number & 0xFFFFFFFF}")
    except OSError:
        return ""


def _path(pid: int, directory: int | None, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        text = b""
        while b"\0" not in text and len(text) < 4096:
            page = 4096 - (address + len(text)) % 4096  # the next one may not be there
            text += os.pread(memory.fileno(), page, address + len(text))
    name = os.fsdecode(text.split(b"\0")[0])
    if os.path.isabs(name):
        return name
    at_working_directory = directory is None or directory & 0xFFFFFFFF == 2**32 - 100  # AT_FDCWD
    where = os.readlink(f"/proc/{pid}/cwd") if at_working_directory else _descriptor(pid, directory or 0)
    return os.path.join(where, name)


def _set_length(pid: int, size_bytes: int) -> None:
    _, register, count = _MACHINES[platform.machine()]
    registers = (ctypes.c_uint64 * count)()
    pair = (ctypes.c_uint64 * 2)(ctypes.addressof(registers), ctypes.sizeof(registers))  # struct iovec
    _ptrace(_GETREGSET, pid, _PRSTATUS, ctypes.addressof(pair))
    registers[register] = size_bytes
    _ptrace(_SETREGSET, pid, _PRSTATUS, ctypes.addressof(pair))
