"""Each system call by which a process works on files, met before it is made: seccomp's notifications (Linux 5.5).

Python's own calls, those of compiled libraries and of every thread are met alike. A handler decides of each whether it
is made; one that ends the process decides what is on the disk at its end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# name: number on x86-64, number on arm64 (-1: there is none), place of the folder's descriptor, places of its paths
_PATHS = {
    "open": (2, -1, None, (0,)),
    "creat": (85, -1, None, (0,)),
    "openat": (257, 56, 0, (1,)),
    "openat2": (437, 437, 0, (1,)),
    "mkdir": (83, -1, None, (0,)),
    "mkdirat": (258, 34, 0, (1,)),
    "rmdir": (84, -1, None, (0,)),
    "unlink": (87, -1, None, (0,)),
    "unlinkat": (263, 35, 0, (1,)),
    "rename": (82, -1, None, (0, 1)),
    "renameat": (264, 38, 0, (1, 3)),
    "renameat2": (316, 276, 0, (1, 3)),
    "link": (86, -1, None, (1,)),
    "linkat": (265, 37, 2, (3,)),
    "symlink": (88, -1, None, (1,)),
    "symlinkat": (266, 36, 1, (2,)),
    "truncate": (76, 45, None, (0,)),
    "chmod": (90, -1, None, (0,)),
    "fchmodat": (268, 53, 0, (1,)),
}
_FILES = {  # whose first argument is a descriptor
    "read": (0, 63),
    "pread64": (17, 67),
    "write": (1, 64),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fchmod": (91, 52),
    "flock": (73, 32),
}
_MACHINES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}  # column, audit's number, seccomp's
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_GO_ON, _NOTIFY, _ALLOW = 1, 0x7FC00000, 0x7FFF0000
_GETFD = 438
_HERE = -100  # the current folder, as a descriptor
_libc = ctypes.CDLL(None, use_errno=True)


class Call(NamedTuple):
    """A call that a process is about to make on a file."""

    process: int
    name: str
    paths: tuple[str, ...]
    arguments: tuple[int, ...]

    @property
    def writes(self) -> bool:
        return self.name in ("write", "pwrite64", "writev")

    def make_half(self) -> None:
        """Write the first half of the bytes, as the process itself would."""
        data, file = self._data(), _descriptor(self.process, self.arguments[0])
        try:
            half = data[: len(data) // 2]
            os.pwrite(file, half, self.arguments[3]) if self.name == "pwrite64" else os.write(file, half)
        finally:
            os.close(file)

    def _data(self) -> bytes:
        _, at, count, *_ = self.arguments
        if self.name != "writev":
            return _memory(self.process, at, count)
        parts = struct.iter_unpack("=QQ", _memory(self.process, at, 16 * count))
        return b"".join(_memory(self.process, begin, size) for begin, size in parts)


Handler = Callable[[Call], int]  # an error's number, 0 to let it be made


def why_not() -> str:
    """What this machine lacks to meet calls; empty, where nothing is lacking."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return f"seccomp's notifications need Linux on {' or '.join(_MACHINES)}"
    action = ctypes.byref(ctypes.c_uint32(_NOTIFY))
    seccomp = _MACHINES[platform.machine()][2]
    return "this kernel has no seccomp notifications" if _libc.syscall(seccomp, 2, 0, action) else ""


def met(start: Callable[[], int], folder: Path, handler: Handler) -> int:
    """The status of a child that does ``start`` and exits with what that returns, minus a signal's number where one
    ended it; ``handler`` is asked before each of its calls on what is in ``folder``."""
    ours, theirs = socket.socketpair()
    if not (child := os.fork()):
        status = 1
        try:
            listener = _listen()
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            ours.close()
            theirs.close()
            status = start()
        finally:
            os._exit(status)
    theirs.close()
    _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    try:
        _answer_all(listener, child, str(folder), handler)
    finally:
        os.close(listener)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _answer_all(listener: int, child: int, folder: str, handler: Handler) -> None:
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while waiting.poll()[0][1] & select.POLLIN:
        received = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, received)
            identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(received)
            call = _call(thread, child, number, tuple(arguments))
            inside = any(path == folder or path.startswith(folder + "/") for path in call.paths)
            error = handler(call) if inside else 0
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(identity, 0, -error, 0 if error else _GO_ON))
        except FileNotFoundError:  # of a process that has been ended
            continue


def _listen() -> int:
    """Have this process ask before each of the calls; the descriptor by which it is answered."""
    column, audit, seccomp = _MACHINES[platform.machine()]
    every = [x[:2] for x in _PATHS.values()] + list(_FILES.values())
    numbers = [x[column] for x in every if x[column] != -1]
    steps = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, audit), (0x20, 0, 0, 0)]  # the machine's, then the number
    steps += [(0x15, len(numbers) - n, 0, number) for n, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _NOTIFY)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(held))
    _libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what seccomp asks of who is not root
    listener: int = _libc.syscall(seccomp, 1, 8, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


def _call(thread: int, process: int, number: int, arguments: tuple[int, ...]) -> Call:
    column = _MACHINES[platform.machine()][0]
    for name, numbers in _FILES.items():
        if numbers[column] == number:
            return Call(process, name, (_link(thread, arguments[0]),), arguments)
    name, (_, _, folder, places) = next((k, v) for k, v in _PATHS.items() if v[column] == number)
    return Call(process, name, tuple(_path(thread, folder, place, arguments) for place in places), arguments)


def _path(thread: int, folder: int | None, place: int, arguments: tuple[int, ...]) -> str:
    text = os.fsdecode(_memory(thread, arguments[place], 4096).partition(b"\0")[0])
    at = arguments[place - 1] if folder is not None else _HERE
    base = os.readlink(f"/proc/{thread}/cwd") if ctypes.c_int32(at).value == _HERE else _link(thread, at)
    return os.path.normpath(os.path.join(base, text))


def _link(thread: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{ctypes.c_int32(descriptor).value}").removesuffix(" (deleted)")
    except FileNotFoundError:
        return ""  # of no file


def _memory(thread: int, at: int, size: int) -> bytes:
    """Up to ``size`` bytes: what lies behind the end of a page may not be there."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        found = b""
        while len(found) < size:
            memory.seek(at + len(found))
            try:
                part = memory.read(min(size - len(found), 4096 - (at + len(found)) % 4096))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                break
            found += part
            if size == 4096 and b"\0" in part:  # of a path
                break
        return found


def _descriptor(process: int, descriptor: int) -> int:
    """Another process's open file, at its own place in it."""
    handle = os.pidfd_open(process)
    try:
        if (file := _libc.syscall(_GETFD, handle, ctypes.c_int(descriptor), 0)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(file)
    finally:
        os.close(handle)


def end(call: Call) -> None:
    os.kill(call.process, signal.SIGKILL)
