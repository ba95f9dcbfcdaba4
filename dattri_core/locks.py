"""One writer at a time: a lock beside a folder, which goes with the process that holds it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dattri_core.atomic import disk_errors
from dattri_core.errors import StoreError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WAIT = 0.2
"""Seconds between two tries of a lock that is waited for."""
BYTE = 2**30
"""The byte that Windows locks: one that nobody reads, since a locked one cannot be read."""
TRIES = 100
"""Openings of a lock whose file is another one by the time that it is locked."""
UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What a file system says that has no locks."""

_log = logging.getLogger("dattri")
_held: set[BinaryIO] = set()


def _let_go() -> None:
    """Close what a fork has copied: the lock is that of the parent, and goes when it goes."""
    for handle in _held:
        handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole_writer(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Let no other process, and no other thread, write to a folder while the block runs.

    The system holds the lock for the open file, not for its name: it is free as soon as the process
    is gone, however it ended, and what a kill leaves of the file does not matter.

    Args:
        folder: It need not exist; the lock lies beside it.
        what: What is written and where, for messages.
        wait: Wait for the other writer instead of raising.

    Raises:
        StoreError: Another writer is at work, or the file cannot be made.
    """
    path = lock_path(folder)
    with disk_errors(f"lock {str(path)!r}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _take(path)
        tries = 0
        while held is None:
            time.sleep(WAIT)
            held, tries = _take(path), tries + 1
            if not wait:
                break  # tried twice, since `require_free` takes the lock for a moment
            if held is None and tries == 1:
                _log.warning("%s: %s is writing them; waiting until it is done", what, _who(path))
    if held is None:
        raise _busy(path, what)
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)
        if held.closed:  # in a child that was forked inside of the block: not its lock
            pass
        elif sys.platform != "win32":
            path.unlink(missing_ok=True)  # while it is held: nobody else can hold this name
        held.close()  # which frees it
        if sys.platform == "win32":  # where an open file cannot be removed
            with suppress(OSError):
                path.unlink(missing_ok=True)


def require_free(folder: Path, what: str) -> None:
    """Raise `StoreError` where another writer is at work in a folder; takes no lock."""
    path = lock_path(folder)
    try:
        handle = path.open("r+b")
    except OSError:
        return
    with handle:
        if not _lock(handle):
            raise _busy(path, what)
        _unlock(handle)


def lock_path(folder: Path) -> Path:
    """Return where the lock of a folder lies."""
    return folder.with_name(f".{folder.name}.lock")


def _take(path: Path) -> BinaryIO | None:
    """Return the lock's open file, or None where another holds it."""
    for attempt in range(TRIES):
        handle = path.open("a+b")
        if not _lock(handle):
            handle.close()
            return None
        if _is_at(handle, path) or attempt == TRIES - 1:  # some systems number no files
            handle.truncate(0)
            handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            handle.flush()
            return handle
        handle.close()  # removed by its writer between the opening and the lock: again
    return None


def _is_at(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: BinaryIO) -> bool:
    """Return whether the lock was free, and is ours now."""
    try:
        if sys.platform == "win32":
            handle.seek(BYTE)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNKNOWN:
            warnings.warn(
                f"lock {handle.name!r}: this file system has no locks ({error}); take care that "
                "no two processes write to one folder",
                stacklevel=2,
            )
            return True
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _unlock(handle: BinaryIO) -> None:
    with suppress(OSError):
        if sys.platform == "win32":
            handle.seek(BYTE)
            msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_UN)


def _busy(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{what}: {_who(path)} is writing them; wait until it is done and run again, or give "
        "another folder"
    )


def _who(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # one that is just beginning, or ending
