"""Gradients that were clipped to a norm, and the transpose of the derivative of that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from dattri_parts.solvers.rowwise import Named
from torch import Tensor

SLACK = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm."""


@frozen(eq=False)
class Clipping:
    """g min(1, limit / (|g| + 1e-6)), as `torch.nn.utils.clip_grad_norm_` has it.

    Args:
        norm: |g|, of all parameters.
        limit: Largest norm.
    """

    norm: float
    limit: float

    @staticmethod
    def of(gradient: Mapping[str, Tensor], limit: float) -> Clipping:
        """Return the clipping of a gradient, given by parameter."""
        squares = [float(values.double().square().sum()) for values in gradient.values()]
        return Clipping(sum(squares) ** 0.5, limit)

    @property
    def share(self) -> float:
        """Return min(1, limit / (|g| + 1e-6))."""
        return min(1.0, self.limit / (self.norm + SLACK))

    def back(self, rows: Named, gradient: Named) -> Named:
        """Return J^T u of rows u, J the derivative of the clipped gradient in g.

        With s the share below 1: J^T u = s u - s <g, u> / (|g| (|g| + 1e-6)) g.

        Args:
            rows: u, ``[C, ...]`` by block.
            gradient: g, ``[1, ...]`` by block.

        Returns:
            New tensors, or the rows themselves where nothing was clipped.
        """
        if self.share >= 1:
            return rows
        along = torch.stack(
            [values.flatten(1) @ gradient[name].flatten() for name, values in rows.items()]
        ).sum(0)
        along = along * (self.share / (self.norm * (self.norm + SLACK)))
        return {
            name: torch.sub(
                self.share * values, along.reshape(-1, *[1] * (values.dim() - 1)) * gradient[name]
            )
            for name, values in rows.items()
        }
