"""K-FAC: each layer's block of the Fisher matrix as one Kronecker product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, Operator, Outlook, Problem, Space, kept, summed
from dattri_parts.curvatures.factors import FactorReader, decompose_all
from dattri_parts.curvatures.fisher import FISHERS, NEEDS, Fisher, check_draws, read_blocks
from dattri_parts.curvatures.sides import (
    eigenvalues_of,
    named_eigenvalues,
    sides_of,
    tensors_of,
)
from dattri_parts.curvatures.spectrum import KroneckerBasis, KroneckerSpectrum
from dattri_parts.curvatures.squares import Squares
from dattri_parts.curvatures.uncovered import (
    UNCOVERED,
    Cover,
    Uncovered,
    require_room,
    uncovered_eigenvalues,
    without_unit,
)

Approximation = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[Approximation, ...] = ("expand", "reduce")


@frozen
class KFAC:
    """H_l = 1/(n M) (sum e e^T) (x) (sum x x^T): Kronecker-factored Fisher matrix of each layer.

    A layer's gradient of example b is sum_t e_bt x_bt^T, with x its input and e the gradient at its
    output. The sums run over the M positions (b, t) whose e x^T is not zero, so that padding and
    masks do not count; with one position an example H is the mean of e e^T times the mean of x x^T.
    H approximates the mean over *examples* of g g^T, as everywhere, so that a damping means the
    same as in EK-FAC. The factor of an embedding's inputs is the diagonal of token counts. A module
    that is used several times, or a tied weight, has the positions of all its uses. With
    ``fisher="ggn"`` a position counts once for every column that reaches it.

    Exact where e e^T and x x^T are independent over the data, as for linear regression with
    ``fisher="ggn"``. Source: Martens and Grosse 2015 (arXiv 1503.05671, section 3); Grosse and
    Martens 2016 (arXiv 1602.01407, convolutions); Eschenhagen et al. 2023 (arXiv 2311.00636).

    Args:
        fisher: Which rows give e: of the loss at labels ``"sampled"`` from the model (the Fisher
            matrix), at the labels of the data (``"empirical"``), or the columns of the factor of
            the ``"ggn"`` (a backward pass for each output; nothing is drawn).
        draws: Labels drawn for each example.
        uncovered: Blocks without factors (norms): ``"diagonal"`` of the same Fisher matrix,
            ``"identity"``: H = I, ``"drop"``: held fixed, they give nothing to the scores, or
            ``"error"``.
        approximation: Several positions of an example count each (``"expand"``), or as one with the
            sum of e and the mean of x over the positions that count, those where e x^T is not zero
            (``"reduce"``): not padding. Embeddings always expand.
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
        Cover.of(space, "kfac")
        require_room(space, "kfac")
        return frozenset({"apply", "dense", "spectral"})

    def fit(self, problem: Problem) -> Operator:
        """Add up the factors in one pass over the train set, and decompose them in float64."""
        cover = Cover.of(problem.space, "kfac")
        cover.report("kfac", self.uncovered)
        found = kept(problem, "kfac", self, lambda: self._decompose(problem, cover))
        dropped = frozenset(cover.rest if self.uncovered == "drop" else ())
        basis = KroneckerBasis(problem.space, sides_of(cover.factored, found), dropped)
        values = eigenvalues_of(problem.space.names, found)
        dtype = torch.promote_types(problem.dtype, torch.float32)
        return KroneckerSpectrum(basis, values, dtype, problem.memory)

    def _decompose(self, problem: Problem, cover: Cover) -> dict[str, Tensor]:
        average = self.approximation == "reduce"
        weight = 1 / (problem.n_train * self.draws)

        def read(part: Problem) -> dict[str, Tensor]:
            factors = FactorReader(frozenset(cover.factored), average, "kfac", problem.memory)
            squares = Squares(frozenset(cover.rest if self.uncovered == "diagonal" else ()))

            def add(name: str, block: Block) -> None:
                factors.add(name, block)
                squares.add(name, block)

            read_blocks(part, self.fisher, self.draws, add)
            return factors.sums() | squares.times(weight)

        sums = dict(summed(problem, read))
        dtype = torch.promote_types(problem.dtype, torch.float32)
        eigen = decompose_all(cover.factored, sums, problem.device)
        values = {name: each.product(weight).to(dtype) for name, each in eigen.items()}
        values |= uncovered_eigenvalues(problem, cover, self.uncovered, sums)
        sides = {name: each.sides for name, each in eigen.items()}
        return tensors_of(sides) | named_eigenvalues(values)
