"""The Kronecker sketch of LoGra: a small matrix on each side of a layer's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from attrs import define, evolve, field, frozen, validators
from torch import Tensor

from dattri_core import (
    Block,
    BlockSpec,
    DenseBlock,
    LinearMap,
    Problem,
    RandomStream,
    Rows,
    Space,
    SpecError,
)
from dattri_parts.projectors.entries import Distribution, random_matrix
from dattri_parts.projectors.principal import principal_directions

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
    uncovered: Literal["keep", "sketch", "drop"] = field(
        default="keep", validator=validators.in_(("keep", "sketch", "drop"))
    )
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint", "keeps-factors"})

    @property
    def needs(self) -> frozenset[str]:
        """Return what `fit` asks of the problem: the train rows, or nothing when random."""
        return frozenset({"rows"} if self.initialisation == "pca" else ())

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows; a block that is left as it is keeps its parameters.

        Raises:
            SpecError: No block is left.
        """
        kept = tuple(self._sketched(spec) for spec in space if not self._drops(spec))
        if not kept:
            raise SpecError(
                f"projector 'kronecker': none of the blocks {', '.join(space.names)} has factors, "
                "and uncovered='drop' leaves nothing; give uncovered='sketch' or 'keep', or the "
                "source 'per-example', which gives factors"
            )
        return Space(kept)

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
            for spec, side, rank, size in self._sides(space)
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
        wanted = {(spec.name, side): rank for spec, side, rank, _ in self._sides(problem.space)}
        return self._map(problem.space, principal_directions(problem, wanted))

    def _sides(self, space: Space) -> Iterable[tuple[BlockSpec, str, int, int]]:
        """Yield block, side, rank and length of every side that is shortened."""
        for spec in space:
            if self._drops(spec) or (spec.kind == "dense" and self.uncovered == "keep"):
                continue
            for side, size in zip(("outputs", "inputs"), spec.matrix_shape, strict=True):
                own = self.rank_out if side == "outputs" else self.rank_in
                rank = self.rank if own is None else own
                if rank < size:
                    yield spec, side, rank, size

    def _drops(self, spec: BlockSpec) -> bool:
        return spec.kind == "dense" and self.uncovered == "drop"

    def _sketched(self, spec: BlockSpec) -> BlockSpec:
        ranks = {side: rank for _, side, rank, _ in self._sides(Space((spec,)))}
        if not ranks:
            return spec
        outputs, inputs = spec.matrix_shape
        shape = (ranks.get("outputs", outputs), ranks.get("inputs", inputs))
        return BlockSpec(spec.name, "outer" if spec.kind == "outer" else "dense", shape)

    def _random(self, stream: RandomStream, name: str, side: str, rank: int, size: int) -> Tensor:
        key = stream.key("kronecker", VERSION, self.distribution, name, side)
        return random_matrix(key, rank, size, self.distribution) / math.sqrt(rank)

    def _map(self, space: Space, matrices: Mapping[tuple[str, str], Tensor]) -> LinearMap:
        return KroneckerMap(
            space, self.out_space(space), {key: Side(matrix) for key, matrix in matrices.items()}
        )


@define(eq=False)
class Side:
    """A matrix ``[r, size]``; None where a side is left as it is.

    The copy in the dtype of the rows is kept, so that it is made once and not for each batch.
    """

    matrix: Tensor
    _cast: Tensor | None = None

    def at(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in the dtype in which rows of ``dtype`` are added up."""
        wide = torch.promote_types(dtype, torch.float32)
        if self._cast is None or self._cast.dtype != wide:
            self._cast = self.matrix.to(wide)
        return self._cast


@frozen(eq=False)
class KroneckerMap:
    """P_out G P_in^T for every row and block, with its adjoint P_out^T K P_in."""

    in_space: Space
    out_space: Space
    sides: Mapping[tuple[str, str], Side]
    blockwise: ClassVar[bool] = True

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g, whole or in parts."""
        self.in_space.select(rows.space.names).require_same(rows.space, "projector 'kronecker'")
        kept = [name for name in rows.space.names if name in self.out_space]
        space = self.out_space.select(kept)
        blocks = {spec.name: self._down(spec, rows.blocks[spec.name]) for spec in space}
        return evolve(rows, space=space, blocks=blocks)

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k; blocks that were dropped are zero."""
        self.out_space.require_same(rows.space, "adjoint of the projector 'kronecker'")
        blocks: dict[str, Block] = {}
        for spec in self.in_space:
            if spec.name in rows.blocks:
                blocks[spec.name] = self._up(spec, rows.blocks[spec.name])
            else:
                zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
                blocks[spec.name] = DenseBlock(zero.expand(len(rows), *spec.shape))
        return evolve(rows, space=self.in_space, blocks=blocks)

    def _down(self, spec: BlockSpec, block: Block) -> Block:
        inputs, outputs = (self._at(spec.name, side, block) for side in ("inputs", "outputs"))
        if inputs is None and outputs is None:
            return block
        if spec.kind == "dense":  # its matrix view; a layer's block is one already
            shape = self.in_space[spec.name].matrix_shape
            block = DenseBlock(block.flat().reshape(len(block), *shape))
        return block.map(inputs, outputs)

    def _up(self, spec: BlockSpec, block: Block) -> Block:
        inputs, outputs = (self._at(spec.name, side, block) for side in ("inputs", "outputs"))
        if inputs is None and outputs is None:
            return block
        raised = block.map(
            None if inputs is None else inputs.mT, None if outputs is None else outputs.mT
        )
        if spec.kind == "dense":
            return DenseBlock(raised.flat().reshape(len(block), *spec.shape))
        return raised

    def _at(self, name: str, side: str, block: Block) -> Tensor | None:
        held = self.sides.get((name, side))
        return None if held is None else held.at(block.dtype)
