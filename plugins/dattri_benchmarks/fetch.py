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
    """A gzip file on the web.

    Args:
        name: Its name, also below the folder of data.
        urls: Where it lies; the next is tried when one fails.
        sha256: Of the decompressed content.
    """

    name: str
    urls: Sequence[str]
    sha256: str


def data_folder() -> Path:
    """Return the folder of data sets: the variable DATTRI_DATA, else one in the user's cache."""
    named = os.environ.get("DATTRI_DATA")
    if named:
        return Path(named).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "dattri"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dattri"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "dattri"


def fetch(download: Download, folder: Path) -> bytes:
    """Return the decompressed content of a file, downloading it when the folder lacks it.

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
            handle.write(packed)
        return content
    raise InputError(
        f"data file {download.name!r}: not in {str(folder)!r} and not downloaded "
        f"({'; '.join(failures)}); without a network, put the file there, or set DATTRI_DATA "
        f"to the folder that holds {folder.name}/"
    )


def _checked(packed: bytes, download: Download) -> bytes:
    """Return the content; raise ValueError when it is not the expected one."""
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"is not a whole gzip file ({error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != download.sha256:
        raise ValueError(f"its content has the SHA-256 {found}, expected {download.sha256}")
    return content
