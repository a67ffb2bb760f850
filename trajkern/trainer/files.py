"""Files that are whole or not there, and reach the disk when they are said to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PARTIAL = ".part"  # what is written before it takes its place ends with it


def put(path: Path, data: bytes) -> None:
    """Write a file in the place of an older one: a reader sees that or this. What is no file is not written into."""
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    partial.write_bytes(data)
    os.replace(partial, path)


def remove(path: Path) -> None:
    """A folder, or the file or link that somebody has put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_file(path: Path) -> bool:
    """A regular one: to open a pipe would wait for ever."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # of a name that no file has
        return False


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
