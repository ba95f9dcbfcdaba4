"""The diagonal of the Fisher matrix of the train loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Operator, Outlook, Problem, Space, kept, summed
from dattri_parts.curvatures.fisher import FISHERS, NEEDS, Fisher, check_draws, read_blocks
from dattri_parts.curvatures.spectrum import KroneckerBasis, KroneckerSpectrum
from dattri_parts.curvatures.squares import Squares


@frozen
class Diagonal:
    """H = diag(1/n sum_b g_b^2): the diagonal of the Fisher matrix of the mean train loss.

    No layer needs a rule and no row is formed where its factors give the squares: for a layer with
    one position the sum over b of (e_b x_b^T)^2 is the product of the squared factors.

    Args:
        fisher: Which rows g: ``"sampled"``, of the loss at labels drawn from the model (the Fisher
            matrix itself, in expectation); ``"empirical"``, of the loss at the labels of the data;
            ``"ggn"``, the columns of the generalised Gauss-Newton matrix's factor, so that H is its
            diagonal exactly, at the cost of a backward pass for each output.
        draws: Labels drawn for each example.
    """

    fisher: Fisher = field(default="sampled", validator=validators.in_(FISHERS))
    draws: int = field(default=1, validator=validators.ge(1))
    exact: ClassVar[bool] = False

    def __attrs_post_init__(self) -> None:
        check_draws(self.fisher, self.draws)

    @property
    def needs(self) -> frozenset[str]:
        """Return the kind of rows that it reads."""
        return frozenset({NEEDS[self.fisher]})

    def outlook(self, space: Space, asked: frozenset[str]) -> Outlook:
        """Return what an inverse made from its spectrum will be."""
        return Outlook(blockwise=True, splits=True)

    def gives(self, space: Space) -> frozenset[str]:
        """Return that its operator can be applied, written down, and knows its eigenvectors."""
        return frozenset({"apply", "dense", "spectral"})

    def fit(self, problem: Problem) -> Operator:
        """Add up the squares of all rows, a block at a time."""
        space = problem.space
        found = kept(problem, "diagonal", self, lambda: self._squares(problem))
        return KroneckerSpectrum(
            KroneckerBasis(space, {}),
            {name: found[name] for name in space.names},
            torch.promote_types(problem.dtype, torch.float32),
            problem.memory,
        )

    def _squares(self, problem: Problem) -> Mapping[str, Tensor]:
        return summed(problem, self._squares_of)

    def _squares_of(self, problem: Problem) -> dict[str, Tensor]:
        squares = Squares(frozenset(problem.space.names))
        read_blocks(problem, self.fisher, self.draws, squares.add)
        return squares.times(1 / (problem.n_train * self.draws))
