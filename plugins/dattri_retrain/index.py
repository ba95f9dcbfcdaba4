"""The index of a counterfactual store: which shard holds which row, and its numbers on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field

from dattri_retrain.facts import Facts
from dattri_retrain.shards import PATTERN, Shard, read_shard

Array = np.ndarray[Any, Any]
HELD = 256 * 2**20
"""Bytes of outcomes that stay in memory after they were read."""


@define(eq=False)
class Index:
    """What the shards of a folder hold; every shard is checked when it is first seen.

    Args:
        folder: Of the shards.
        facts: What they must belong to.
    """

    folder: Path
    facts: Facts
    _places: dict[bytes, tuple[str, int]] = field(factory=dict, init=False)
    _names: set[str] = field(factory=set, init=False)
    _held: dict[str, Shard] = field(factory=dict, init=False)

    def refresh(self) -> None:
        """Read the shards that came since; where two hold a row, the first by name counts.

        Raises:
            StoreError: A shard is truncated, damaged or foreign.
        """
        for path in sorted(self.folder.glob(PATTERN)):
            if path.name not in self._names:
                shard = read_shard(path, self.facts)
                self._hold(path.name, shard)
                self._names.add(path.name)
                for row, key in enumerate(shard.keys):
                    if key not in self._places or self._places[key][0] > path.name:
                        self._places[key] = path.name, row

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the shards that were read."""
        return frozenset(self._names)

    @property
    def keys(self) -> list[bytes]:
        """Return the keys of all rows, by seed and mask."""
        return sorted(self._places)

    def values(self, keys: Sequence[bytes], target: str) -> Array:
        """Return the outcomes of rows that are there, ``[len(keys), n_test]``."""
        found = np.empty((len(keys), self.facts.n_test))
        for name, rows, places in self._by_shard(keys):
            found[places] = self._shard(name).outcomes[target][rows]
        return found

    def _by_shard(self, keys: Sequence[bytes]) -> Iterator[tuple[str, list[int], list[int]]]:
        """Yield shards, their rows that are asked for, and where these go; each shard once."""
        wanted: dict[str, tuple[list[int], list[int]]] = {}
        for place, key in enumerate(keys):
            name, row = self._places[key]
            rows, places = wanted.setdefault(name, ([], []))
            rows.append(row)
            places.append(place)
        for name, (rows, places) in wanted.items():
            yield name, rows, places

    def _shard(self, name: str) -> Shard:
        if name not in self._held:
            self._hold(name, read_shard(self.folder / name, self.facts))
        return self._held[name]

    def _hold(self, name: str, shard: Shard) -> None:
        """Keep a shard in memory, and let the oldest go while there are too many bytes."""
        self._held[name] = shard
        total = sum(held.nbytes for held in self._held.values())
        for oldest in list(self._held)[:-1]:
            if total <= HELD:
                break
            total -= self._held.pop(oldest).nbytes
