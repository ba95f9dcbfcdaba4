"""The Kronecker sketch of LoGra: a small matrix on each side of a layer's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import (
    LinearMap,
    Problem,
    RandomStream,
    Space,
    SpecError,
    kept,
)
from dattri_parts.projectors.entries import Distribution, random_matrix
from dattri_parts.projectors.principal import principal_directions
from dattri_parts.projectors.sides import (
    UNCOVERED,
    KroneckerMap,
    MatrixSide,
    SideRanks,
    Uncovered,
    failures_of,
)

VERSION = 1
"""Of the rule that makes random entries; a key holds it, so that another rule is another sketch."""


@frozen
class Kronecker:
    """P = P_out (x) P_in for each layer: a row G ``[O, I]`` becomes P_out G P_in^T.

    A row that is a sum of outer products e x^T over positions keeps its factors, P_out e and
    P_in x, so no gradient is formed and a position costs r_out + r_in numbers instead of O + I. An
    embedding's inputs, indices of words, pick columns of P_in. Source: Choe et al. 2024, What is
    Your Data Worth to GPT? (LoGra), section 3 (arXiv 2405.13954).

    ``"random"``: independent entries with E[P^T P] = I on each side, so that inner products are
    unbiased. Those of two rows of one position, e x^T and e' x'^T, have the variance
    (a^2 + V_in)(b^2 + V_out) - a^2 b^2 with a = <x, x'> and b = <e, e'>, where vectors u and v of a
    side have V = (|u|^2 |v|^2 + <u, v>^2 - 2 sum_i u_i^2 v_i^2) / r with signs, and no last term
    with normal entries. An entry is a function of seed, checkpoint, block, side and place alone.

    ``"pca"``: the rows of P_in and P_out are the eigenvectors of the largest eigenvalues of the
    second moments sum x x^T of a layer's inputs and sum e e^T of the gradients of the train loss at
    its outputs, over all positions of the train set. Inner products within the two subspaces are
    kept, what is orthogonal to them is lost.

    Args:
        rank: r on both sides. A side of at most that length is left as it is, so that a large rank
            is no sketch at all.
        rank_in: r on the side of the inputs (the bias counts as one more), instead of ``rank``.
        rank_out: r on the side of the outputs, instead of ``rank``.
        initialisation: Where P_in and P_out come from.
        distribution: Of random entries: ``"signs"`` have the smaller variance.
        uncovered: What to do with rows that come without factors, those of norms and of modules
            without a layer rule: ``"keep"`` them, ``"drop"`` them from all inner products, or
            ``"sketch"`` their matrix view of O rows, from both sides like a layer's.
    """

    rank: int = field(default=64, validator=validators.ge(1))
    rank_in: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    rank_out: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    initialisation: Literal["random", "pca"] = field(
        default="random", validator=validators.in_(("random", "pca"))
    )
    distribution: Distribution = field(
        default="signs", validator=validators.in_(("signs", "normal"))
    )
    uncovered: Uncovered = field(default="keep", validator=validators.in_(UNCOVERED))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint", "keeps-factors"})

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws do not hold, and why."""
        return failures_of(self.uncovered)

    @property
    def needs(self) -> frozenset[str]:
        """Return what `fit` asks of the problem: the train rows, or nothing when random."""
        return frozenset({"rows"} if self.initialisation == "pca" else ())

    @property
    def ranks(self) -> SideRanks:
        """Return what is left of each side."""
        outputs, inputs = (
            self.rank if own is None else own for own in (self.rank_out, self.rank_in)
        )
        return SideRanks("kronecker", outputs, inputs, self.uncovered)

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows; a block that is left as it is keeps its parameters.

        Raises:
            SpecError: No block is left.
        """
        return self.ranks.out_space(space)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the random map.

        Raises:
            SpecError: The initialisation needs data: it is made by `fit`.
        """
        if self.needs:
            raise SpecError(
                "projector 'kronecker': initialisation='pca' is fitted on the train set, not built "
                "from random numbers; use it in a Method, or fit(problem)"
            )
        matrices = {
            (spec.name, side): self._random(stream, spec.name, side, rank, size).to(device)
            for spec, side, rank, size in self.ranks.sides(space)
        }
        return self._map(space, matrices)

    def fit(self, problem: Problem) -> LinearMap:
        """Return the map onto principal directions of the train set, or the random one.

        Raises:
            SpecError: A block whose space promises factors came formed.
            MemoryBudgetError: The second moments of a side do not fit the problem's memory.
        """
        if not self.needs:
            return self.build(problem.space, stream=problem.random, device=problem.device)
        wanted = {
            (spec.name, side): rank for spec, side, rank, _ in self.ranks.sides(problem.space)
        }
        places = {f"{side} of {name}": (name, side) for name, side in wanted}
        ranks = {place: wanted[key] for place, key in places.items()}

        def make() -> dict[str, Tensor]:
            found = principal_directions(problem, wanted)
            return {place: found[key] for place, key in places.items()}

        directions = kept(problem, "principal-directions", ranks, make)
        return self._map(problem.space, {key: directions[place] for place, key in places.items()})

    def _random(self, stream: RandomStream, name: str, side: str, rank: int, size: int) -> Tensor:
        key = stream.key("kronecker", VERSION, self.distribution, name, side)
        return random_matrix(key, rank, size, self.distribution) / math.sqrt(rank)

    def _map(self, space: Space, matrices: Mapping[tuple[str, str], Tensor]) -> LinearMap:
        sides = {key: MatrixSide(matrix) for key, matrix in matrices.items()}
        return KroneckerMap("kronecker", space, self.out_space(space), sides)
