"""Scores that are made some columns at a time, in memory or in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dattri_core import Examples, Scores, ScoresWriter

Array = np.ndarray[Any, Any]
Columns = Callable[[int, int], Array]
WORK = 2**24
"""Scores that are made at once."""


def write_columns(
    columns: Columns,
    train: Examples,
    test: Examples,
    provenance: dict[str, Any],
    out: str | Path | None,
) -> Scores:
    """Return the scores ``[n, m]``, in the dtype in which they are made.

    Args:
        columns: First test position and the one after the last to ``[n, C]``.
        train: For length and ids.
        test: The same.
        provenance: Of the scores.
        out: Folder to write to.
    """
    n_train, n_test = len(train), len(test)
    step = max(1, WORK // n_train)
    first = columns(0, min(step, n_test))
    ids = list(train.ids), list(test.ids)
    if out is None:
        values = np.empty((n_train, n_test), first.dtype)
        for start in range(0, n_test, step):
            stop = min(start + step, n_test)
            values[:, start:stop] = first if start == 0 else columns(start, stop)
        return Scores(torch.from_numpy(values), *ids, provenance)
    dtype = torch.from_numpy(first[:0]).dtype
    with ScoresWriter(out, n_train, n_test, dtype) as writer:
        for start in range(0, n_test, step):
            stop = min(start + step, n_test)
            writer.values[:, start:stop] = first if start == 0 else columns(start, stop)
            writer.release()
        return writer.finish(*ids, provenance)


def provenance_of(task: Any, method: dict[str, Any], train: Examples) -> dict[str, Any]:
    """Return what results say of themselves."""
    return {
        "method": method,
        "n_train": len(train),
        "target": {"name": task.target_name, "higher_is_better": task.sign < 0},
    }
