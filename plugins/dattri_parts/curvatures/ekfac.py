"""EK-FAC: K-FAC's eigenvectors with eigenvalues that are measured along them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Operator, Outlook, Problem, Space, kept, summed
from dattri_parts.curvatures.factors import FactorReader, decompose_all
from dattri_parts.curvatures.fisher import FISHERS, NEEDS, Fisher, check_draws, read_blocks
from dattri_parts.curvatures.kfac import APPROXIMATIONS, Approximation
from dattri_parts.curvatures.sides import (
    eigenvalues_of,
    named_eigenvalues,
    sides_of,
    tensors_of,
)
from dattri_parts.curvatures.spectrum import Kronecker, KroneckerBasis, KroneckerSpectrum
from dattri_parts.curvatures.squares import Squares
from dattri_parts.curvatures.uncovered import (
    UNCOVERED,
    Cover,
    Uncovered,
    require_room,
    uncovered_eigenvalues,
    without_unit,
)


@frozen
class EKFAC:
    """H_l = Q diag(L) Q^T with Q = Q_S (x) Q_A and L = 1/n sum_b (Q_S^T G_b Q_A)^2, entry by entry.

    Q_S and Q_A are the eigenvectors of K-FAC's factors, and G_b is the gradient of example b. No
    other L is nearer to the block of the Fisher matrix in these coordinates (Frobenius norm), and
    its trace is that of the block exactly. Two passes over the train set; the rows are turned as
    factors and formed only where that is less work. For an embedding Q_A = I.

    Exact where the block of the Fisher matrix has these eigenvectors, as where it is a Kronecker
    product. Source: George et al. 2018 (arXiv 1806.03884, section 3); for influence functions
    Grosse et al. 2023 (arXiv 2308.03296, section 3).

    Args:
        fisher: Which rows, as in K-FAC: ``"sampled"``, ``"empirical"`` or ``"ggn"``.
        draws: Labels drawn for each example; both passes see the same ones.
        uncovered: Blocks without factors: ``"diagonal"``, ``"identity"``, ``"drop"`` or
            ``"error"``.
        approximation: Of the factors, ``"expand"`` or ``"reduce"`` as in K-FAC, the mean of x over
            the positions where e x^T is not zero; the eigenvalues are measured on whole rows
            either way. With "reduce" and fewer examples than a layer has inputs, the
            eigenvectors of the factor's null space are arbitrary, and rows have a part there.
    """

    fisher: Fisher = field(default="sampled", validator=validators.in_(FISHERS))
    draws: int = field(default=1, validator=validators.ge(1))
    uncovered: Uncovered = field(default="diagonal", validator=validators.in_(UNCOVERED))
    approximation: Approximation = field(default="expand", validator=validators.in_(APPROXIMATIONS))
    exact: ClassVar[bool] = False

    def __attrs_post_init__(self) -> None:
        check_draws(self.fisher, self.draws)

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws do not hold, and why."""
        return without_unit(self.uncovered)

    @property
    def needs(self) -> frozenset[str]:
        """Return the kind of rows that it reads."""
        return frozenset({NEEDS[self.fisher]})

    def outlook(self, space: Space, asked: frozenset[str]) -> Outlook:
        """Return what an inverse made from its spectrum will be."""
        dropped = self.uncovered == "drop" and any(spec.kind != "outer" for spec in space)
        return Outlook(blockwise=True, splits=not dropped)

    def gives(self, space: Space) -> frozenset[str]:
        """Return that its operator can be applied, written down, and knows its eigenvectors.

        Raises:
            SpecError: No block keeps factors.
            MemoryBudgetError: The factors surely do not fit.
        """
        Cover.of(space, "ekfac")
        require_room(space, "ekfac")
        return frozenset({"apply", "dense", "spectral"})

    def fit(self, problem: Problem) -> Operator:
        """Decompose the factors of one pass, and measure the eigenvalues in a second one."""
        space = problem.space
        cover = Cover.of(space, "ekfac")
        cover.report("ekfac", self.uncovered)
        found = kept(problem, "ekfac-vectors", self, lambda: self._vectors(problem, cover))
        sides = sides_of(cover.factored, found)
        values = kept(problem, "ekfac-values", self, lambda: self._values(problem, cover, sides))
        dropped = frozenset(cover.rest if self.uncovered == "drop" else ())
        return KroneckerSpectrum(
            KroneckerBasis(space, sides, dropped),
            eigenvalues_of(space.names, values),
            torch.promote_types(problem.dtype, torch.float32),
            problem.memory,
        )

    def _vectors(self, problem: Problem, cover: Cover) -> dict[str, Tensor]:
        average = self.approximation == "reduce"

        def read(part: Problem) -> dict[str, Tensor]:
            factors = FactorReader(frozenset(cover.factored), average, "ekfac", problem.memory)
            read_blocks(part, self.fisher, self.draws, factors.add)
            return factors.sums()

        found = decompose_all(cover.factored, dict(summed(problem, read)), problem.device)
        return tensors_of({name: each.sides for name, each in found.items()})

    def _values(
        self, problem: Problem, cover: Cover, sides: Mapping[str, Kronecker]
    ) -> dict[str, Tensor]:
        rest = cover.rest if self.uncovered == "diagonal" else ()

        def read(part: Problem) -> dict[str, Tensor]:
            squares = Squares(frozenset((*cover.factored, *rest)), sides)
            read_blocks(part, self.fisher, self.draws, squares.add)
            return squares.times(1 / (problem.n_train * self.draws))

        values = dict(summed(problem, read))
        values |= uncovered_eigenvalues(problem, cover, self.uncovered, values)
        return named_eigenvalues(values)
