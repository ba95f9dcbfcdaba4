"""Random scores: the baseline that every table needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from attrs import frozen
from scipy.special import ndtri

from dattri_core import Examples, RandomStream, Scores, ScoresWriter, format_bytes

Array = np.ndarray[Any, Any]
WORK = 2**20  # numbers made at once


@frozen
class Random:
    """Standard normal scores, independent of model and data: S_ij = z(seed, i, j).

    z is a pure function of the seed and the two positions, so a subset of the examples gets the
    numbers it has in the whole, whatever the batches.

    Args:
        seed: Of the numbers.
    """

    seed: int = 0
    expected_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "permuted-train-rows-permute-scores",
            "permuted-test-rows-permute-scores",
            "queries-are-their-own",
            "equal-examples-score-equal",
            "an-example-helps-itself",
        ),
        "scores depend on positions alone, not on the examples",
    )

    def attribute(
        self,
        task: Any,
        train: Any,
        test: Any,
        *,
        out: str | Path | None = None,
        dry_run: bool = False,
        **settings: Any,
    ) -> Any:
        """Return random scores ``[n_train, n_test]``, float32.

        Args:
            task: Only named in the provenance.
            train: Counted, not read.
            test: Counted, not read.
            out: Folder to write the scores to as they are made.
            dry_run: Only say, as text, what would be made.
            settings: Memory and progress of other methods; nothing to set here.
        """
        examples = Examples.of(train, "train"), Examples.of(test, "test")
        n_train, n_test = map(len, examples)
        if dry_run:
            size = format_bytes(4 * n_train * n_test)
            return f"random: {n_train} x {n_test} scores, {size}; no pass over the data"
        provenance = {
            "method": {"name": "random", "seed": self.seed},
            "n_train": n_train,
            "target": {"name": task.target_name, "higher_is_better": task.sign < 0},
        }
        train_ids, test_ids = (list(side.ids) for side in examples)
        if out is None:
            values = np.empty((n_train, n_test), np.float32)
            self._fill(values)
            return Scores(
                torch.from_numpy(values), train_ids, test_ids, provenance, known_finite=True
            )
        with ScoresWriter(out, n_train, n_test) as writer:
            self._fill(writer.values, writer.release)
            return writer.finish(train_ids, test_ids, provenance)

    def _fill(self, values: Array, release: Any = None) -> None:
        n_train, n_test = values.shape
        rows = max(1, WORK // n_test)
        for start in range(0, n_train, rows):
            stop = min(start + rows, n_train)
            values[start:stop] = normal(self.seed, np.arange(start, stop), np.arange(n_test))
            if release is not None:
                release()


def normal(seed: int, train: Array, test: Array) -> Array:
    """Return z(seed, i, j) for all pairs of positions ``[B]`` and ``[C]``, ``[B, C]`` in float64.

    A counter-based generator: two rounds of the SplitMix64 finaliser (Steele, Lea and Flood 2014)
    on the key and the two counters give 53 random bits, of which the normal quantile is taken.
    """
    key = np.uint64(RandomStream(seed, "random scores").key())
    with np.errstate(over="ignore"):
        rows = _mix(key + _GOLDEN * (train.astype(np.uint64) + np.uint64(1)))
        bits = _mix(rows[:, None] + _GOLDEN * (test.astype(np.uint64)[None] + np.uint64(1)))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(ndtri(uniform))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: Array) -> Array:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))
