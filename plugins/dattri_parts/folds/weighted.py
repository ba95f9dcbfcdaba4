"""The sum over checkpoints, each weighed by its learning rate."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import FoldState, InputError, Scored, Snapshot


@frozen
class Weighted:
    """S_ij = sum_c eta_c S_ij^c with eta_c the learning rate at checkpoint c.

    TracInCP (Pruthi et al. 2020, arXiv 2002.08484, section 3.3, equation 3).
    """

    order: ClassVar[Literal["forward", "reverse"]] = "forward"
    needs: ClassVar[frozenset[str]] = frozenset({"learning-rate"})

    def update(self, state: FoldState | None, scored: Scored, snapshot: Snapshot) -> FoldState:
        """Add one checkpoint times its learning rate."""
        if snapshot.learning_rate is None:
            raise InputError(
                f"fold weighted: checkpoint {snapshot.name!r} has no learning rate; give "
                "Task(..., learning_rates=[...])"
            )
        part = scored.values * snapshot.learning_rate
        return {"sum": part if state is None else state["sum"] + part}

    def finish(self, state: FoldState) -> Tensor:
        """Return the weighted sum ``[B, C]``."""
        return state["sum"]
