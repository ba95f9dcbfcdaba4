"""The mean over checkpoints."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import FoldState, Scored, Snapshot


@frozen
class Mean:
    """S_ij = (1 / M) sum_c S_ij^c over M checkpoints: an ensemble of equal members."""

    order: ClassVar[Literal["forward", "reverse"]] = "forward"
    needs: ClassVar[frozenset[str]] = frozenset()

    def update(self, state: FoldState | None, scored: Scored, snapshot: Snapshot) -> FoldState:
        """Add one checkpoint's share."""
        share = scored.values if snapshot.count == 1 else scored.values / snapshot.count
        return {"sum": share if state is None else state["sum"] + share}

    def finish(self, state: FoldState) -> Tensor:
        """Return the mean ``[B, C]``."""
        return state["sum"]
