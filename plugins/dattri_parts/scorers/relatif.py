"""Influence relative to how much a train example changes the model at all."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, NumericsError, Scored, Side


@frozen
class RelatIF:
    """S_ij = <A g_i, B h_j> / size of the step that train row i takes by itself; 0 for a zero row.

    With B = (H + damping I)^-1: form ``"l"`` divides by sqrt(g_i^T B g_i), the root of the train
    example's influence on itself, which is the size of the change of the model's predictions; form
    ``"theta"`` by |B g_i|, the size of the change of the parameters. Outliers, which move the model
    for every test example alike, come down. Without an inverse Hessian both divide by |g_i|.
    The denominators are those of the train loss whatever the target is. Source: Barshan, Brunet and
    Dziugaite 2020, RelatIF: Identifying Explanatory Training Examples via Relative Influence (arXiv
    2003.11630).

    Every train row passes the stages of the test side too: one application of the inverse Hessian
    for each train example and checkpoint.

    Args:
        form: ``"l"`` or ``"theta"``.
    """

    form: Literal["l", "theta"] = field(default="l", validator=validators.in_(("l", "theta")))
    locality: ClassVar[Literal["tile", "column"]] = "tile"
    bilinear: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Return which number of the train rows it divides by."""
        return frozenset({"self-influence" if self.form == "l" else "inverse-norm"})

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Divide by the size of each train row.

        Raises:
            NumericsError: A self-influence is negative: the damped curvature is indefinite.
        """
        size = train.inverse_norm if self.form == "theta" else _root(train)
        assert size is not None
        size = size.unsqueeze(1)
        scores = total / size.where(size > 0, size.new_ones(()))
        return Scored(scores.where(size > 0, scores.new_zeros(())))


def _root(train: Side) -> Tensor:
    own = train.self_influence
    assert own is not None
    if bool((own < 0).any()):
        worst = int(own.argmin())
        raise NumericsError(
            f"scorer 'relatif': the self-influence g^T (H + damping I)^-1 g of train example "
            f"{int(train.index[worst])} is {float(own[worst]):.3g}, which has no root: the damped "
            "curvature is indefinite, or a sketch after it is too small; give more damping or the "
            "curvature 'ggn', more rank, or form='theta'"
        )
    return torch.sqrt(own)
