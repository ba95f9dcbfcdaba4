"""The gradient store: projected train rows on disk, a few files for each checkpoint.

A folder with ``store.json``, which says what the rows are made of, and for each checkpoint a folder
``c00000`` with ``checkpoint.json`` and the rows in shards, ``rows-000000000.safetensors``. Every
file appears by one rename, holds the digest of its numbers and of what they belong to, and is
checked when it is first read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen, validators
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dattri_core.atomic import (
    atomic_file,
    discard_leftovers,
    disk_errors,
    require_room,
    write_text,
)
from dattri_core.batch import digest
from dattri_core.errors import StoreError
from dattri_core.tensor_file import tensor_file

FORMAT = "dattri-store"
VERSION = 1
MANIFEST = "store.json"
EXAMPLES = "train set"
"""The fact that is a hash of all train examples; left out where only some are compared."""
CHECKPOINT = "checkpoint.json"
ROWS = "dattri-rows"
VALUES = "values"
AUX = "aux."
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SHARD_BYTES = 64 * 2**20
"""Of the rows of one shard, at most; a build that is stopped loses less than one."""
BATCHES = 4
"""Batches of one shard, at most: one is written while the next is computed."""


@frozen
class Store:
    """Where projected train rows are kept, so that they are computed once.

    Args:
        folder: Made when it does not exist.
        dtype: Of the numbers on disk: ``"float32"``, ``"float64"``, or half as large and rounded,
            ``"float16"`` or ``"bfloat16"``; None: that of the rows, at least float32.
        check: How the train set is compared with the one that the rows were made of:
            ``"whole"`` hashes every example, by one pass over the data without the model each time
            a store is opened; ``"sample"`` its length and 64 examples, for data that are so slow to
            read that you rather vouch for the rest. Tensors, a `TensorDataset` and a stream are
            hashed whole either way.
    """

    folder: Path = field(converter=Path)
    dtype: str | None = field(
        default=None, validator=validators.optional(validators.in_(tuple(DTYPES)))
    )
    check: str = field(default="whole", validator=validators.in_(("whole", "sample")))

    @staticmethod
    def of(given: Any) -> Store | None:
        """Return a store given as a path, as it is, or as None."""
        return given if given is None or isinstance(given, Store) else Store(given)


@frozen
class Layout:
    """How rows are cut; a build that is resumed keeps it, so that not a bit differs.

    Args:
        rows: Of one checkpoint.
        dim: Numbers of a row.
        shard: Rows of one file.
        batch: Rows computed at once; boundaries count from the beginning of a shard.
        dtype: Of the numbers.
    """

    rows: int
    dim: int
    shard: int
    batch: int
    dtype: str = field(validator=validators.in_(tuple(DTYPES)))

    @property
    def nbytes(self) -> int:
        """Return the bytes of the rows of one checkpoint."""
        return self.rows * self.dim * DTYPES[self.dtype].itemsize

    @property
    def starts(self) -> range:
        """Return the first row of each shard."""
        return range(0, self.rows, self.shard)

    def stop(self, start: int) -> int:
        """Return the end of the shard that begins at a row."""
        return min(start + self.shard, self.rows)


def plan_layout(rows: int, dim: int, batch: int, dtype: str) -> Layout:
    """Return a layout for rows that are computed some at a time."""
    most = max(1, SHARD_BYTES // max(1, dim * DTYPES[dtype].itemsize))
    batch = min(batch, most, rows)
    return Layout(rows, dim, batch * min(BATCHES, max(1, most // batch)), batch, dtype)


@define(eq=False)
class OpenStore:
    """A store whose manifest was read or written.

    Args:
        folder: Where it is.
        facts: What decides the numbers of all checkpoints, JSON-ready.
        layout: How they are cut.
    """

    folder: Path
    facts: Mapping[str, Any]
    layout: Layout

    @staticmethod
    def open(folder: Path, facts: Mapping[str, Any], layout: Layout) -> OpenStore:
        """Begin a store, or open one of the same facts; its own layout counts then.

        Raises:
            StoreError: The folder holds a store of other facts, of another dtype, or something
                else.
        """
        facts = dict(json.loads(json.dumps(facts)))
        discard_leftovers(folder / MANIFEST)
        if not (folder / MANIFEST).exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise StoreError(
                    f"store {str(folder)!r}: it is not empty and has no {MANIFEST}; give a new "
                    "folder, or empty this one"
                )
            with disk_errors(f"store {str(folder)!r}"):
                folder.mkdir(parents=True, exist_ok=True)
            require_room(
                folder,
                layout.nbytes,
                f"store {str(folder)!r}: the rows of a checkpoint ({layout.rows} rows of "
                f"{layout.dim} numbers)",
                "use a projector of a smaller rank, dattri.Store(folder, dtype='float16'), or "
                "another disk",
            )
            manifest = {"format": FORMAT, "version": VERSION, "facts": facts}
            manifest |= {"layout": {name: getattr(layout, name) for name in _LAYOUT}}
            with disk_errors(f"store {str(folder)!r}"):
                write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
            return OpenStore(folder, facts, layout)
        held = OpenStore.read(folder)
        if EXAMPLES not in facts and EXAMPLES in held.facts:
            facts[EXAMPLES] = held.facts[EXAMPLES]
        elif EXAMPLES in facts and EXAMPLES not in held.facts:
            raise StoreError(
                f"store {str(folder)!r}: it was begun without a hash of all train examples; give "
                "dattri.Store(folder, check='sample') again, or another store="
            )
        changed = [
            name for name in {**facts, **held.facts} if facts.get(name) != held.facts.get(name)
        ]
        if changed:
            shown = "; ".join(_difference(name, held.facts, facts) for name in changed)
            others = " and another ".join(changed)
            raise StoreError(
                f"store {str(folder)!r}: its rows were made with another {others} ({shown}); give "
                "another store=, or delete this one"
            )
        if (held.layout.rows, held.layout.dim) != (layout.rows, layout.dim):
            raise StoreError(
                f"store {str(folder)!r}: it holds {held.layout.rows} rows of {held.layout.dim} "
                f"numbers, these are {layout.rows} of {layout.dim}; give another store="
            )
        if held.layout.dtype != layout.dtype:
            raise StoreError(
                f"store {str(folder)!r}: its numbers are {held.layout.dtype}, asked for were "
                f"{layout.dtype}; give dattri.Store(folder, dtype={held.layout.dtype!r})"
            )
        return held

    @staticmethod
    def read(folder: Path) -> OpenStore:
        """Open a store for what it holds.

        Raises:
            StoreError: The folder is no store, or its manifest is damaged.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
            layout = Layout(**{name: found["layout"][name] for name in _LAYOUT})
            if min(layout.rows, layout.dim, layout.shard, layout.batch) < 1:
                raise ValueError(f"layout {found['layout']}")
            return OpenStore(folder, dict(found["facts"]), layout)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"store {str(folder)!r}: {MANIFEST} is missing, truncated or foreign ({error!r}); "
                "give the folder of a store, or delete it to begin anew"
            ) from error

    @property
    def checkpoints(self) -> list[int]:
        """Return the positions of the checkpoints of which there is something."""
        found = self.folder.glob("c[0-9]*/" + CHECKPOINT)
        return sorted(int(path.parent.name[1:]) for path in found)

    def checkpoint(self, position: int, name: str, weights: str) -> StoredCheckpoint:
        """Begin or open the rows of one checkpoint.

        Raises:
            StoreError: Its rows are those of other weights.
        """
        folder = self._folder(position)
        discard_leftovers(folder / CHECKPOINT)
        if (folder / CHECKPOINT).exists():
            held = self.held(position)
            if held.weights != weights:
                raise StoreError(
                    f"store {str(self.folder)!r}: checkpoint {position} ({name!r}) has other "
                    f"weights than those its rows were made with ({held.name!r}); give another "
                    f"store=, or delete {str(folder)!r} to compute it anew"
                )
            return held
        with disk_errors(f"store {str(self.folder)!r}"):
            folder.mkdir(exist_ok=True)
            text = json.dumps({"name": name, "weights": weights}, indent=1)
            write_text(folder / CHECKPOINT, text)
        return self.held(position)

    def held(self, position: int) -> StoredCheckpoint:
        """Open the rows of one checkpoint, whatever its weights."""
        path = self._folder(position) / CHECKPOINT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            name, weights = str(found["name"]), str(found["weights"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"store {str(self.folder)!r}: {str(path)!r} is truncated or foreign ({error!r}); "
                f"delete {str(path.parent)!r} to compute this checkpoint anew"
            ) from error
        text = json.dumps([self.facts, position, weights], sort_keys=True)
        owner = hashlib.sha256(text.encode()).hexdigest()
        return StoredCheckpoint(path.parent, self.layout, name, weights, owner)

    def _folder(self, position: int) -> Path:
        return self.folder / f"c{position:05d}"


_LAYOUT = ("rows", "dim", "shard", "batch", "dtype")


@define(eq=False)
class StoredCheckpoint:
    """The rows of one checkpoint.

    Args:
        folder: Where its shards are.
        layout: Of the store.
        name: Of the checkpoint.
        weights: Their fingerprint.
        owner: A hash of all that the rows belong to; each shard carries it.
    """

    folder: Path
    layout: Layout
    name: str
    weights: str
    owner: str
    _shard: tuple[int, dict[str, Tensor]] | None = None
    _checked: set[int] = field(factory=set)

    @property
    def missing(self) -> list[int]:
        """Return the first row of each shard that is not there yet."""
        return [start for start in self.layout.starts if not self._path(start).exists()]

    def write(self, start: int, values: Tensor, aux: Mapping[str, Tensor]) -> None:
        """Write one shard: values ``[m, k]`` and auxiliary numbers, each ``[m]``."""
        path, stop = self._path(start), self.layout.stop(start)
        tensors = {VALUES: values, **{AUX + name: aux[name] for name in sorted(aux)}}
        held = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        assert values.shape == (stop - start, self.layout.dim)
        facts = {"owner": self.owner, "start": start, "digest": _digest(held)}
        discard_leftovers(path)
        with disk_errors(f"store: the shard {str(path)!r}"), atomic_file(path) as handle:
            for piece in tensor_file(held, {ROWS: json.dumps(facts)}):
                handle.write(piece)

    def read(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return values ``[B, k]`` and auxiliary numbers, each ``[B]``, of rows at any positions.

        Raises:
            StoreError: A shard is missing, damaged, or belongs elsewhere.
        """
        index = index.to("cpu")
        shards = torch.unique_consecutive(index // self.layout.shard * self.layout.shard).tolist()
        if len(shards) == 1:
            return self._of_shard(shards[0], index)
        values = torch.empty(len(index), self.layout.dim, dtype=DTYPES[self.layout.dtype])
        aux: dict[str, Tensor] = {}
        for start in sorted(set(shards)):
            here = index // self.layout.shard * self.layout.shard == start
            values[here], part = self._of_shard(start, index[here])
            for name, numbers in part.items():
                aux.setdefault(name, numbers.new_empty(len(index)))[here] = numbers
        return values, aux

    def verify(self, start: int) -> None:
        """Read one shard again and check every number of it.

        Raises:
            StoreError: It is missing, damaged, or belongs elsewhere.
        """
        self._checked.discard(start)
        self._load(start)

    def _of_shard(self, start: int, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self._shard is None or self._shard[0] != start:
            self._shard = None
            self._shard = start, self._load(start)
        tensors, at = self._shard[1], index - start
        aux = {n.removeprefix(AUX): t[at] for n, t in tensors.items() if n != VALUES}
        return tensors[VALUES][at], aux

    def _load(self, start: int) -> dict[str, Tensor]:
        path, stop = self._path(start), self.layout.stop(start)
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(ROWS, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise self._bad(path, f"cannot be read ({error})") from error
        if facts.get("owner") != self.owner:
            raise self._bad(path, "holds rows of another checkpoint or another store")
        if facts.get("start") != start:
            raise self._bad(path, f"holds the rows from {facts.get('start')}, not from {start}")
        wanted = ((stop - start, self.layout.dim), DTYPES[self.layout.dtype])
        values = tensors.get(VALUES)
        if values is None or (tuple(values.shape), values.dtype) != wanted:
            raise self._bad(path, f"holds no {wanted[1]} values of shape {wanted[0]}")
        if start not in self._checked:
            if facts.get("digest") != _digest(tensors):
                raise self._bad(path, "holds numbers that are not those that were written")
            self._checked.add(start)
        return tensors

    def _bad(self, path: Path, why: str) -> StoreError:
        return StoreError(
            f"store: the shard {str(path)!r} {why}; delete this file and run again to compute its "
            "rows anew"
        )

    def _path(self, start: int) -> Path:
        return self.folder / f"rows-{start:09d}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return hashlib.sha256(f"{names}{digest([tensors[n] for n in names])}".encode()).hexdigest()


def _difference(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    shown = [json.dumps(of.get(name))[:120] for of in (then, now)]
    return f"{name}: {shown[0]} then, {shown[1]} now"
