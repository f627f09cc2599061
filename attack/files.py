"""Writing results so that a reader sees the old file or the whole new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Writes beside `path` and renames over it; makes the folder where it is missing.

    Args:
        durable: returns only once a power failure would not take it either.

    Raises: OSError, naming `path`: a full disk's own does not say where.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where the content of `path` is until it is whole; a process that is killed leaves it there."""
    return path.with_name(f".{path.name}.part")


def _sync_folder(folder: Path) -> None:
    """A file's name is a part of its folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
