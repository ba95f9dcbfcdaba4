"""Data files: found in a folder, else downloaded once and checked against a checksum."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from dattri_core import InputError, StoreError, atomic_file

SECONDS = 30  # without an answer


@frozen
class Download:
    """A file on the web.

    Args:
        name: Its name below the folder of data.
        urls: Where it lies, plain or as gzip; the next is tried when one fails.
        sha256: Of what `fetch` returns.
        unpack: Whether the content is what a gzip file holds, kept as gzip in the folder; False
            for an archive, which is returned and kept as it is.
    """

    name: str
    urls: Sequence[str]
    sha256: str
    unpack: bool = True


def data_folder() -> Path:
    """Return the folder of data sets: the variable DATTRI_DATA, else one in the user's cache."""
    named = os.environ.get("DATTRI_DATA")
    return Path(named).expanduser() if named else cache_folder()


def cache_folder() -> Path:
    """Return the folder in the user's cache, for what can be had again."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "dattri"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dattri"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "dattri"


def fetch(download: Download, folder: Path) -> bytes:
    """Return the content of a file, downloading it when the folder lacks it.

    Raises:
        StoreError: The file in the folder is truncated or another one.
        InputError: It is not there and cannot be downloaded.
    """
    path = folder / download.name
    if path.exists():
        try:
            return _checked(path.read_bytes(), download)
        except ValueError as error:
            raise StoreError(
                f"data file {str(path)!r}: {error}; delete it to have it downloaded again"
            ) from error
    failures = []
    for url in download.urls:
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # https addresses only
                packed = answer.read()
            content = _checked(packed, download)
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {error}")
            continue
        with atomic_file(path) as handle:
            handle.write(packed if not download.unpack or _is_gzip(packed) else _pack(content))
        return content
    raise InputError(
        f"data file {download.name!r}: not in {str(folder)!r} and not downloaded "
        f"({'; '.join(failures)}); without a network, put the file there, or set DATTRI_DATA "
        f"to the folder that holds {folder.name}/"
    )


def _checked(packed: bytes, download: Download) -> bytes:
    """Return the content; raise ValueError when it is not the expected one."""
    content = packed
    if download.unpack and _is_gzip(packed):
        try:
            content = gzip.decompress(packed)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"is not a whole gzip file ({error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != download.sha256:
        raise ValueError(f"its content has the SHA-256 {found}, expected {download.sha256}")
    return content


def _is_gzip(packed: bytes) -> bool:
    return packed.startswith(b"\x1f\x8b")


def _pack(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)
