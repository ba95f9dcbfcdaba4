"""Scores on disk: a folder with ``values.npy`` and ``scores.json``, read without a pickle.

``scores.json`` holds the format and its version, shape, dtype, the SHA-256 of ``values.npy``, the
ids and the provenance. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dattri_core.atomic import atomic_folder, write_text
from dattri_core.errors import StoreError

FORMAT = "dattri-scores"
VERSION = 1
VALUES = "values.npy"
MANIFEST = "scores.json"
DTYPES = ("float16", "float32", "float64")

Array = np.ndarray[Any, Any]


def is_scores_folder(folder: Path) -> bool:
    """Return whether a folder holds saved scores and nothing else, so that it may be replaced."""
    if {file.name for file in folder.iterdir()} != {VALUES, MANIFEST}:
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


class FolderWriter:
    """A scores folder being written: a memmap to fill, then `commit`.

    Leaving the ``with`` block without `commit`, by an error or Ctrl-C, leaves nothing behind.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, int], dtype: str) -> None:
        self.folder = Path(folder)
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(atomic_folder(self.folder, is_scores_folder))
        path = self._temporary / VALUES
        try:
            self.values: Array = _create(path, shape, self.dtype)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind or _NotCommittedError, error or _NotCommittedError(), trace)

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest beside the values and give the folder its name."""
        if isinstance(self.values, np.memmap):
            self.values.flush()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "sha256": sha256_of(self._temporary / VALUES),
            **facts,
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)
        write_text(self._temporary / MANIFEST, text)
        self._stack.close()


class _NotCommittedError(Exception):
    """Rolls the temporary folder back."""


def _create(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    if 0 in shape:  # a file of no numbers cannot be mapped
        empty = np.zeros(shape, dtype)
        np.save(path, empty, allow_pickle=False)
        return empty
    made: Array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return made


def read_folder(
    folder: str | Path, *, map_file: bool, verify: bool
) -> tuple[Array, dict[str, Any]]:
    """Return the values and the manifest of a scores folder.

    Raises:
        StoreError: A file is missing, truncated, foreign, from a later version, holds Python
            objects, or does not match its checksum, shape or dtype.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    path = folder / VALUES
    if not path.is_file():
        raise _refuse(path, "there is no such file", "the folder is incomplete; save again")
    shape, dtype, offset = _read_header(path)
    if list(shape) != manifest["shape"] or dtype.name != manifest["dtype"]:
        raise _refuse(
            path,
            f"it holds {dtype.name} of shape {shape}, {MANIFEST} says {manifest['dtype']} "
            f"of shape {tuple(manifest['shape'])}",
            "the two files come from different results",
        )
    expected = offset + int(np.prod(shape)) * dtype.itemsize
    if path.stat().st_size != expected:
        raise _refuse(
            path, f"it has {path.stat().st_size} bytes, expected {expected}", "it is truncated"
        )
    if verify and sha256_of(path) != manifest["sha256"]:
        raise _refuse(
            path,
            f"its SHA-256 differs from the one in {MANIFEST}",
            "the file was changed or damaged",
        )
    if map_file and 0 not in shape:
        return np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset), manifest
    return np.load(path, allow_pickle=False), manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise _refuse(folder, "there is no such folder", "give the folder that Scores.save wrote")
    if not path.is_file():
        raise _refuse(folder, f"it has no {MANIFEST}", "give the folder that Scores.save wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refuse(path, f"it is not JSON ({error})", "it is truncated or was edited") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _refuse(path, f"its format is not {FORMAT!r}", "it was written by something else")
    if found.get("version") != VERSION:
        raise _refuse(
            path,
            f"its version is {found.get('version')!r}, this release reads {VERSION}",
            "load it with the release that wrote it",
        )
    shape = found.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(map(_is_count, shape))
        or found.get("dtype") not in DTYPES
    ):
        raise _refuse(
            path,
            f"shape is {shape!r} and dtype {found.get('dtype')!r}",
            f"expected two counts and one of {', '.join(DTYPES)}",
        )
    if not isinstance(found.get("sha256"), str) or not isinstance(found.get("provenance"), dict):
        raise _refuse(path, "sha256 or provenance is missing", "it was edited or damaged")
    for axis, count in (("train_ids", shape[0]), ("test_ids", shape[1])):
        ids = found.get(axis)
        if ids is not None and not (
            isinstance(ids, list)
            and len(ids) == count
            and all(type(i) in (int, str) for i in ids)
            and len(set(ids)) == count
        ):
            raise _refuse(
                path, f"{axis} is not a list of {count} different ids", "it was edited or damaged"
            )
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    try:
        with path.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(handle)
            else:
                raise ValueError(f"npy version {version}")
            offset = handle.tell()
    except (ValueError, OSError, EOFError) as error:
        raise _refuse(
            path, f"it is not a .npy file ({error})", "it is truncated or foreign"
        ) from error
    if dtype.hasobject:
        raise _refuse(
            path,
            "it holds pickled Python objects",
            "loading it could run code; scores are plain numbers",
        )
    if fortran:
        raise _refuse(path, "it is stored column by column", "it was written by something else")
    return shape, dtype, offset


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece."""
    state = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(4 * 2**20):
            state.update(piece)
    return state.hexdigest()


def release_pages(values: Array) -> None:
    """Let the system forget the pages of a mapped file that were read or written.

    They stay in the file (and its cache); they only stop counting as memory of this process.
    """
    if getattr(values, "mode", None) not in ("r", "r+", "w+"):
        return  # not a mapped file, or a private copy of one, whose changes would be lost
    owner: Any = values
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def _refuse(path: Path, reason: str, meaning: str) -> StoreError:
    return StoreError(f"scores {str(path)!r}: {reason}; {meaning}")
