"""Files that a user names or a run leaves: read where they are files, whole or not there, on the disk when said to."""

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
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write what a user asks for: a file whole or not at all, to a device directly, behind a link. Raises OSError."""
    place = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    if place.exists() and not is_file(place):
        place.write_bytes(data)
    else:
        put(place, data)


def takes(path: Path) -> bool:
    """Whether :func:`write` may put something there; to open a pipe would wait for ever."""
    try:
        place = Path(os.path.realpath(path))
        if place.exists():
            return (place.is_file() or place.is_char_device()) and os.access(place, os.W_OK)
        return (
            bool(place.name)
            and place.parent.is_dir()
            and os.access(place.parent, os.W_OK)
            and not os.path.islink(place)
        )
    except (OSError, ValueError):  # of a name that no file has, of a current folder that is gone
        return False


def read(path: Path) -> str:
    """A file's text. Raises OSError, or ValueError where it is no file or no UTF-8."""
    if path.exists() and not is_file(path):
        raise ValueError("it is no file")
    return path.read_text(encoding="utf-8")


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


def is_folder(path: Path) -> bool:
    """Into which files can be put."""
    try:
        return path.is_dir() and os.access(path, os.W_OK)
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
