"""Inverse-Fisher-vector products from per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import frozen
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.datainf import DataInf
from torch import Tensor

from dattri_core import Block, Damping, DenseBlock, InputError, Rows, Solver, Space, free_bytes
from dattri_influence.functions.inverse import SHARE, InverseProduct
from dattri_influence.functions.layout import Layout

WHAT = "per-example gradients"


def ifvp_explicit(gradients: Any, *, damping: Damping | float) -> InverseProduct:
    """Return ``product(vectors)``: (F + damping I)^-1 v, F = (1/n) sum_i g_i g_i^T.

    F of d numbers is written down in float64 and factorised once, by the solver ``"cholesky"``, in
    16 d^2 bytes. With gradients of a negative log-likelihood F is the empirical Fisher matrix, and
    the true one, up to the draws, where labels are drawn from the model.

    Args:
        gradients: One of each example: a tensor ``[n, *shape]``, or a nest of them (a dict of
            parameters, as `torch.func.vmap` of `torch.func.grad` gives it).
        damping: lambda, absolute, or a `Damping`.

    Raises:
        NumericsError: F + damping I is singular to the precision of the numbers.
        MemoryBudgetError: F does not fit half of the memory that is free.
    """
    return _invert(GaussNewton(), Cholesky(damping=damping), gradients)


def ifvp_datainf(
    gradients: Any, *, damping: Damping | float | None = None, block: bool = True
) -> InverseProduct:
    """Return ``product(vectors)``: (1/n) sum_i (g_i g_i^T + damping I)^-1 v, by ``"datainf"``.

    The mean of inverses in place of the inverse of the mean, in closed form and O(n d). Source:
    Kwon et al. 2024 (arXiv 2310.00902), equation 5.

    Args:
        gradients: As in `ifvp_explicit`.
        damping: lambda, absolute, or a `Damping`; None for the paper's, a tenth of the mean
            eigenvalue of each tensor.
        block: Take each tensor by itself, as published, or all of them as one row.
    """
    solver = DataInf() if damping is None else DataInf(damping=damping)
    return _invert(GaussNewton(block=block), solver, gradients)


def _invert(curvature: GaussNewton, solver: Solver, gradients: Any) -> InverseProduct:
    problem: Any = _GivenRows.of(gradients)
    return InverseProduct(problem.layout, solver.solve_for(curvature.fit(problem), problem.device))


@frozen(eq=False)
class _GivenRows:
    """What a second moment asks of a `Problem`, for rows that are given."""

    layout: Layout
    held: Rows

    @staticmethod
    def of(gradients: Any) -> _GivenRows:
        layout = Layout.of(gradients, WHAT, axes=1)
        tensors = [tensor.detach() for tensor in layout.tensors]
        counts = {len(tensor) for tensor in tensors}
        if len(counts) != 1 or counts == {0}:
            raise InputError(
                f"{WHAT}: the tensors hold {sorted(counts)} gradients; expected one for each "
                "example in every tensor, [n, *shape]"
            )
        blocks = {s.name: DenseBlock(t) for s, t in zip(layout.space, tensors, strict=True)}
        return _GivenRows(layout, Rows(layout.space, blocks, torch.arange(len(tensors[0]))))

    @property
    def space(self) -> Space:
        return self.layout.space

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def memory(self) -> int:
        return free_bytes(self.device) // SHARE

    @property
    def n_train(self) -> int:
        return len(self.held)

    def rows(self, index: Tensor | None = None, **_: Any) -> Iterator[Rows]:
        yield self.held if index is None else self.held.take(index)

    def stream(
        self, sink: Callable[[str, Block, Tensor], None], *, index: Tensor | None = None, **_: Any
    ) -> None:
        for rows in self.rows(index):
            for name, block in rows.blocks.items():
                sink(name, block, rows.index)
