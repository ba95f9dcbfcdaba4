"""The product of two means over checkpoints."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import FoldState, Scored, Snapshot, SpecError


@frozen
class TrakFold:
    """S_ij = soft([1/M sum_c Q_i^c] [1/M sum_c S_ij^c]), soft(t) = sign(t) max(|t| - l, 0).

    The two means are taken apart and then multiplied: Q_i^c, the weight of train row i at
    checkpoint c, and S_ij^c = <phi_i, (E[phi phi^T] + damping I)^-1 psi_j>. The curvature is a
    mean over n examples, not a sum, so that S is n times the number of the paper, and so is l.

    Source: Park et al. 2023, TRAK: Attributing Model Behavior at Scale, section 3.2, steps 4 and 5
    (arXiv 2303.14186).

    Args:
        threshold: l, in the unit of the scores; 0 keeps all.
    """

    threshold: float = field(default=0.0, validator=validators.ge(0))
    order: ClassVar[Literal["forward", "reverse"]] = "forward"
    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def update(self, state: FoldState | None, scored: Scored, snapshot: Snapshot) -> FoldState:
        """Add one checkpoint's share to both means."""
        if scored.weight is None:
            raise SpecError("fold 'trak': the scorer gives no weight; use the scorer 'trak'")
        values, weight = scored.values / snapshot.count, scored.weight / snapshot.count
        if state is None:
            return {"sum": values, "weight": weight}
        return {"sum": state["sum"] + values, "weight": state["weight"] + weight}

    def finish(self, state: FoldState) -> Tensor:
        """Return the product of the means ``[B, C]``, thresholded."""
        product = state["weight"].unsqueeze(1) * state["sum"]
        if not self.threshold:
            return product
        return product.sign() * (product.abs() - self.threshold).clamp_min(0)
