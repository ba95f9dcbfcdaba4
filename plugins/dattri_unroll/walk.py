"""Scores from a walk along a run, group of test examples by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Protocol

from dattri_core import Scores, ScoresWriter, bar, describe_part
from dattri_unroll.points import Points

Add = Callable[[int, Tensor, slice, Tensor], None]
"""Takes epoch, positions of train examples ``[B]``, columns, and their scores ``[B, C]``."""


class Walk(Protocol):
    """Goes through a run and gives scores as it comes by."""

    @property
    def points(self) -> Points:
        """Return the points of the run."""
        ...

    @property
    def work(self) -> int:
        """Return how many rows of train examples one walk scores."""
        ...

    def run(self, columns: slice, add: Add, advance: Callable[[int], None]) -> None:
        """Walk once, for some of the test examples."""
        ...


def scores_of(
    part: Any, walk: Walk, out: str | Path | None, progress: bool | None, *, dry_run: bool
) -> Any:
    """Return the scores ``[n_train, n_test]`` of a walk, or what it would cost as text."""
    points = walk.points
    n_train, n_test = len(points.train), len(points.test)
    if dry_run:
        return (
            f"{points.name}: {n_train} x {n_test} scores; {len(points.columns())} passes backwards "
            f"over {len(points.task.checkpoints)} checkpoints, {walk.work} train rows in each"
        )
    ids = list(points.train.ids), list(points.test.ids)
    if out is None:
        values = torch.zeros(n_train, n_test, dtype=points.dtype)
        fill(walk, lambda epoch: values, progress)
        return Scores(values, *ids, provenance_of(part, points))
    with ScoresWriter(out, n_train, n_test, points.dtype) as writer:
        on_disk = torch.from_numpy(np.asarray(writer.values))
        fill(walk, lambda epoch: on_disk, progress)
        return writer.finish(*ids, provenance_of(part, points))


def epochs_of(
    part: Any, walk: Walk, epochs: Sequence[int], progress: bool | None
) -> dict[int, Scores]:
    """Return the scores ``[n_train, n_test]`` of a walk by epoch; their sum is `scores_of`."""
    points = walk.points
    shape = len(points.train), len(points.test)
    parts = {epoch: torch.zeros(shape, dtype=points.dtype) for epoch in epochs}
    fill(walk, parts.__getitem__, progress)
    ids = list(points.train.ids), list(points.test.ids)
    provenance = provenance_of(part, points)
    return {e: Scores(v, *ids, {**provenance, "epoch": e}) for e, v in parts.items()}


def fill(walk: Walk, values: Callable[[int], Tensor], progress: bool | None) -> None:
    """Add all scores of a walk into the matrix of their epoch, ``[n_train, n_test]``."""

    def add(epoch: int, index: Tensor, columns: slice, scores: Tensor) -> None:
        into = values(epoch)[:, columns]
        into.index_add_(0, index.cpu(), scores.to(device="cpu", dtype=into.dtype))

    groups = walk.points.columns()
    with bar(walk.points.name, walk.work * len(groups), progress) as shown:
        for columns in groups:
            walk.run(columns, add, shown.advance)


def provenance_of(part: Any, points: Points) -> dict[str, Any]:
    """Return where the scores of a part come from."""
    task, spec = points.task, describe_part(part)
    return {
        "method": {"name": spec} if isinstance(spec, str) else spec,
        "n_train": len(points.train),
        "target": {"name": task.target_name, "higher_is_better": task.sign < 0},
        "checkpoints": [checkpoint.name for checkpoint in task.checkpoints],
    }
