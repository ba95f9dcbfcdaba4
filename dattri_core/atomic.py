"""Atomic writing: a file or a folder appears whole under its name, or not at all."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dattri_core.errors import StoreError, format_bytes


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file open for writing that takes the name ``path`` when the block ends well.

    It is written under a temporary name in the same folder, flushed to the disk and renamed; after
    an error or Ctrl-C the temporary file is gone and what ``path`` held before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "partial")
    try:
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn what the system says of a disk (full, read-only, gone) into a `StoreError`.

    Args:
        what: What is written, with its path, for the message.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{what}: cannot be written ({error.strerror or error}); free room there, see that the "
            "folder may be written to, or give another one"
        ) from error


def require_room(folder: Path, needed: int, what: str, fix: str) -> None:
    """Raise `StoreError` where a disk has not as many bytes free as are going to be written.

    Args:
        folder: On that disk; it, or the nearest folder above it that exists, is asked.
        needed: Bytes.
        what: What takes them, for the message.
        fix: What can be done.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StoreError(
            f"{what} take {format_bytes(needed)}, and {format_bytes(free)} are free; {fix}"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


@contextmanager
def atomic_folder(path: str | Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder that takes the name ``path`` when the block ends well.

    Args:
        path: Name of the folder. What is there already is replaced as a whole.
        replaces: Whether an existing, non-empty folder may be replaced; asked before the block runs
            and again after it.

    Raises:
        StoreError: ``path`` is a file, or a folder that may not be replaced.
    """
    path = Path(path)
    check_replaceable(path, replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "partial")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        check_replaceable(path, replaces)
        _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_replaceable(path: Path, replaces: Callable[[Path], bool]) -> None:
    """Raise `StoreError` when ``path`` is a file, or a folder that may not be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreError(f"write folder {str(path)!r}: a file has this name; give another")
    if any(path.iterdir()) and not replaces(path):
        raise StoreError(
            f"write folder {str(path)!r}: it exists and holds other files, which would be lost; "
            "give a new folder, or empty this one"
        )


def _swap(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; a full folder there moves aside first."""
    if not path.exists():
        new.rename(path)
        return
    old = _beside(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Remove a folder so that it is whole under its name, or gone from it."""
    path = Path(path)
    old = _beside(path, "old")
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def discard_leftovers(path: str | Path) -> None:
    """Remove what earlier writers of ``path`` left beside it when they were killed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        if re.fullmatch(r"\.(partial|old)-[0-9a-f]{8}", left.name.removeprefix(f".{path.name}")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with suppress(OSError), file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{secrets.token_hex(4)}")
