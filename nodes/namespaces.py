"""Network namespaces: the calls of the Linux kernel that Python learned only in 3.12 (`os.setns`, `os.unshare`).

In and out: descriptors of namespaces, which live as long as a descriptor or a process holds them, and leave no name
behind. Refuses to know what is inside one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

# linux/sched.h, sys/mount.h
CLONE_NEWNET = 0x40000000
MS_BIND = 4096


def new_namespace() -> int:
    """Makes a network namespace. The descriptor is inherited by no child. Raises: OSError."""
    here = current_namespace()
    try:
        _call("unshare", CLONE_NEWNET)
        made = current_namespace()
        _call("setns", here, CLONE_NEWNET)
    finally:
        os.close(here)
    return made


def current_namespace() -> int:
    """A descriptor of the network namespace of this thread."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Sockets that this thread opens in the block, and processes that it starts, belong to the namespace."""
    here = current_namespace()
    try:
        _call("setns", namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", here, CLONE_NEWNET)
    finally:
        os.close(here)


def mount_proc() -> None:
    """Shows the processes of this PID namespace, and no others, under /proc. Raises: OSError."""
    _call("mount", b"proc", b"/proc", b"proc", 0, None)


def mount_file(file: Path, over: str) -> None:
    """Shows a file in place of another one, to the processes of this mount namespace. Raises: OSError."""
    _call("mount", os.fsencode(file), os.fsencode(over), None, MS_BIND, None)


def _call(name: str, *arguments: object) -> None:
    # Looked up at the call: other systems have no such functions, and importing this must do nothing there.
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
