"""Records: JSON files by the hash of what they are the answer to; whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from dattri_core import Scores, StoreError, atomic_file, discard_leftovers, write_text

Array = np.ndarray[Any, Any]
LARGEST_SCORES = 64 * 2**20
"""Bytes of scores that are kept on disk; larger ones are computed again for a further metric."""


def address_of(identity: Mapping[str, Any]) -> str:
    """Return the address of what an identity describes: the start of the hash of its JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@frozen
class Records:
    """What was computed, in one folder.

    ``worlds``, ``tuning``, ``attributions`` and ``cells`` hold ``ADDRESS.json``; ``scores`` holds
    folders of `Scores`, and ``self-influence`` arrays ``[n_train]``.
    """

    folder: Path

    def read(self, kind: str, address: str) -> dict[str, Any] | None:
        """Return a record, or None where there is none.

        Raises:
            StoreError: The file is damaged.
        """
        path = self._path(kind, address)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise StoreError(
                f"bench: {str(path)!r} is no JSON ({error}); remove it, and what it held is "
                "computed again"
            ) from error
        if not isinstance(record, dict):
            raise StoreError(f"bench: {str(path)!r} holds no record; remove it")
        return record

    def write(self, kind: str, address: str, record: Mapping[str, Any]) -> None:
        """Write a record; the one before is replaced."""
        path = self._path(kind, address)
        discard_leftovers(path)
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def keep_scores(self, address: str, scores: Scores) -> None:
        """Keep scores for further metrics, unless they are large."""
        rows, columns = scores.shape
        if rows * columns * scores.values.dtype.itemsize <= LARGEST_SCORES:
            scores.save(self._scores(address))

    def scores(self, address: str) -> Scores | None:
        """Return scores that were kept, or None."""
        folder = self._scores(address)
        return Scores.load(folder, mmap=False) if folder.is_dir() else None

    def keep_self_influence(self, address: str, values: Array) -> None:
        """Keep the self-influence of a method, ``[n_train]``."""
        with atomic_file(self._own(address)) as handle:
            np.save(handle, values, allow_pickle=False)

    def self_influence(self, address: str) -> Array | None:
        """Return the self-influence that was kept, or None."""
        path = self._own(address)
        if not path.exists():
            return None
        values: Array = np.load(path, allow_pickle=False)
        return values

    def _path(self, kind: str, address: str) -> Path:
        return self.folder / kind / f"{address}.json"

    def _scores(self, address: str) -> Path:
        return self.folder / "scores" / address

    def _own(self, address: str) -> Path:
        return self.folder / "self-influence" / f"{address}.npy"
