"""Shards: rows of a counterfactual store in files whose names are the digests of their content.

A shard is an ``.npz`` of masks (packed bits), seeds, the outcomes of every target, and a line of
JSON that says what they belong to. It is written under another name and renamed, so it is whole or
not there; its name tells whether its content is what was written; and files of several machines can
be copied into one folder, since no two that differ share a name.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from dattri_core import Counterfactual, StoreError, atomic_file
from dattri_retrain.facts import Facts, versions

Array = np.ndarray[Any, Any]
FORMAT = "dattri-counterfactuals"
VERSION = 1
PATTERN = "rows-*.npz"
STALE = 3600.0
"""Seconds after which an unfinished file is taken to belong to a writer that was killed."""


@frozen(eq=False)
class OutcomeRows:
    """What models gave: one row for each train set.

    Args:
        masks: ``[k, n_train]`` truth values, what each was trained on.
        seeds: ``[k]``, of each training.
        outcomes: By target, ``[k, n_test]``, float64.
    """

    masks: Array
    seeds: Array
    outcomes: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.seeds)


def write_shard(
    folder: Path,
    facts: Facts,
    counterfactuals: Sequence[Counterfactual],
    outcomes: Sequence[Mapping[str, Array]],
) -> str:
    """Write rows as one shard and return its name.

    Args:
        folder: Of all shards of one retraining.
        facts: What the rows belong to.
        counterfactuals: Of the rows.
        outcomes: Of each row, every target ``[n_test]``.
    """
    about = {"format": FORMAT, "version": VERSION, "facts": facts.plain(), "versions": versions()}
    arrays = {
        "about": np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8),
        "masks": np.stack([np.packbits(c.mask, bitorder="little") for c in counterfactuals]),
        "seeds": np.array([c.seed for c in counterfactuals], np.uint32),
    }
    for position, target in enumerate(facts.targets):
        arrays[f"outcome.{position}"] = np.stack([row[target] for row in outcomes])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numbers only, so nothing is pickled
    data = buffer.getvalue()
    name = f"rows-{_digest(data)}.npz"
    with atomic_file(folder / name) as handle:
        handle.write(data)
    return name


@frozen(eq=False)
class Shard:
    """A shard that was read and checked.

    Args:
        keys: ``[k]`` keys of its counterfactuals.
        outcomes: By target, ``[k, n_test]``.
    """

    keys: tuple[bytes, ...]
    outcomes: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Return the bytes that its numbers take."""
        return sum(values.nbytes for values in self.outcomes.values())


def read_shard(path: Path, facts: Facts) -> Shard:
    """Return the rows of a shard.

    Raises:
        StoreError: The file is truncated or damaged, no shard, or belongs to another retraining.
    """
    data = path.read_bytes()
    if path.name != f"rows-{_digest(data)}.npz":
        raise StoreError(
            f"counterfactual store: the shard {str(path)!r} ({len(data)} bytes) is truncated or "
            "damaged: its content has another digest than its name; delete it, and its rows are "
            "trained again"
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        about = json.loads(arrays["about"].tobytes())
        held = about["format"], about["version"]
        theirs = Facts.of_plain(about["facts"])
    except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"counterfactual store: {str(path)!r} is no shard of this store "
            f"({type(error).__name__}: {error}); move it away"
        ) from error
    if held != (FORMAT, VERSION):
        raise StoreError(
            f"counterfactual store: the shard {str(path)!r} is {held[0]} version {held[1]}, "
            f"expected {FORMAT} version {VERSION}; use the dattri-core that wrote it"
        )
    facts.require(theirs, f"the shard {str(path)!r}")
    return _checked(path, facts, arrays)


def _checked(path: Path, facts: Facts, arrays: Mapping[str, Array]) -> Shard:
    masks, seeds = arrays.get("masks"), arrays.get("seeds")
    outcomes = {t: arrays.get(f"outcome.{p}") for p, t in enumerate(facts.targets)}
    sound = (
        masks is not None
        and seeds is not None
        and masks.dtype == np.uint8
        and seeds.dtype == np.uint32
        and masks.shape == (len(seeds), -(-facts.n_train // 8))
    )
    whole: dict[str, Array] = {}
    for target, values in outcomes.items():
        if (
            not sound
            or values is None
            or values.dtype != np.float64
            or seeds is None
            or values.shape != (len(seeds), facts.n_test)
        ):
            raise StoreError(
                f"counterfactual store: the shard {str(path)!r} has no rows of {target!r} for "
                f"{facts.n_train} train and {facts.n_test} test examples; move it away"
            )
        whole[target] = values
    assert masks is not None
    assert seeds is not None
    keys = tuple(
        int(seed).to_bytes(4, "little") + mask.tobytes()
        for seed, mask in zip(seeds, masks, strict=True)
    )
    return Shard(keys, whole)


def discard_stale(folder: Path) -> None:
    """Remove unfinished files of writers that were killed; those of the last hour may be alive."""
    for left in folder.glob(".*.partial-*"):
        with suppress(FileNotFoundError):  # its writer, or another process, was faster
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
