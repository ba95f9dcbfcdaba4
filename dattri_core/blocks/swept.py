"""Rows at several dampings: the same rows in an eigenbasis, divided by eigenvalues + damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks.block import Block, LinearFunction, item_of, require_alike
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.inputs import accumulate, held_by, is_one_hot
from dattri_core.blocks.outer import OuterBlock
from dattri_core.contract import WARM, Order, Shape, limit_now
from dattri_core.errors import SpecError
from dattri_core.interpolate import Piece, Pieces, pieces_of

TERMS = 64
"""Functions that are gathered before they are added to every damping."""
FARTHEST = 100
"""Power of two by which a row is made larger or smaller at most."""
Entries = Callable[[Tensor], Tensor]


@frozen(eq=False)
class SweptBlock:
    """C rows at V dampings: row v C + c is ``rows_c / (eigenvalues + dampings_v)``, entrywise.

    Inner products with other rows are sums over entries of products times 1 / (eigenvalue +
    damping), which is interpolated in the eigenvalue: entries are sorted by theirs and cut in
    pieces, in each of which all dampings take one to about three products instead of V
    (`interpolate`). They are exact to a few roundings of the sums; formed rows are exact.

    Args:
        rows: In the eigenbasis.
        eigenvalues: Of the shape of one row.
        dampings: ``[V]``.
    """

    rows: Block
    eigenvalues: Tensor
    dampings: Tensor

    def __attrs_post_init__(self) -> None:
        if tuple(self.eigenvalues.shape) != self.rows.shape or self.dampings.dim() != 1:
            raise SpecError(
                f"swept block: eigenvalues {tuple(self.eigenvalues.shape)} and dampings "
                f"{tuple(self.dampings.shape)} must be {self.rows.shape}, the shape of a row, and "
                "[V]"
            )

    def __len__(self) -> int:
        return len(self.dampings) * len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        return self.rows.shape

    @property
    def positions(self) -> int | None:
        """Return None: it is met as it is."""
        return None

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        shape = self.shape
        return Shape(len(self), None, shape[0] if shape else 1, math.prod(shape[1:]))

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes held; eigenvalues belong to the inverse."""
        return self.rows.nbytes

    def dense(self) -> DenseBlock:
        """Form the rows."""
        return self.take(slice(None))

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[V C, d]``."""
        return self.dense().flat()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, *shape]``."""
        return self.dense().combine(coefficients)

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[V C, B]`` with the rows of ``other``."""
        if order is not None or isinstance(other, SweptBlock):
            return self.dense().inner(other, order=order, limit=limit)
        require_alike(self, other, "inner")
        limit = limit_now() if limit is None else limit
        mine, theirs = _slices(self.rows, limit), _slices(other, limit)
        dtype = torch.promote_types(self.dtype, torch.float32)
        shape = (len(self.dampings), len(self.rows), len(other))
        total = torch.zeros(shape, dtype=dtype, device=self.device)
        for columns in theirs:
            entries, grown = _entries(other.take(columns))
            for rows in mine:
                own, scale = _entries(self.rows.take(rows))
                into = total[:, rows, columns]
                met = self._met(own, entries, into.shape, limit)
                into += met.div_(scale[:, None]).div_(grown)
        return total.flatten(0, 1)

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        return self.dense().pair_inner(other, order=order, limit=limit)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> DenseBlock:
        """Apply linear functions of the last axis to inputs and outputs; None leaves a side."""
        return self.dense().map(on_inputs, on_outputs)

    def scale(self, weights: Tensor) -> DenseBlock:
        """Multiply row b by ``weights[b]``."""
        return self.dense().scale(weights)

    def take(self, index: Tensor | slice) -> DenseBlock:
        """Return the chosen rows, formed."""
        chosen = torch.arange(len(self), device=self.device)[index]
        count = max(1, len(self.rows))
        values = self.rows.take(chosen % count).dense().values
        used, which = torch.unique(chosen // count, return_inverse=True)
        dampings = self.dampings.to(self.device)[used]
        weights = 1 / (self.eigenvalues + dampings.reshape(-1, *([1] * len(self.shape))))
        weights = weights.to(values)
        return DenseBlock(values * (weights if len(used) == 1 else weights[which]))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> SweptBlock:
        """Return the rows on another device or in another dtype."""
        rows = self.rows.to(device, dtype)
        if rows is self.rows:
            return self
        return SweptBlock(rows, self.eigenvalues.to(device), self.dampings.to(device))

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return self.rows.is_finite()

    @cached_property
    def _sorted(self) -> tuple[Tensor, Pieces]:
        """Return the order of the entries, and the pieces that they are cut in."""
        flat, order = self.eigenvalues.double().flatten().sort()
        dtype = torch.promote_types(self.dtype, torch.float32)
        return order, pieces_of(flat, self.dampings.to(flat), dtype)

    def _met(self, mine: Entries, theirs: Entries, shape: Sequence[int], limit: int) -> Tensor:
        """Return the products ``[V, C, B]`` of some rows with others, given both by entries."""
        order, pieces = self._sorted
        dampings, columns, count = shape
        dtype = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros(dampings, columns * count, dtype=dtype, device=self.device)
        met = total.new_empty(TERMS, columns * count)  # of functions, until it is full
        held: list[Tensor] = []  # what they are worth at each damping

        def give() -> None:
            if held:
                worth = torch.cat(held, dim=1).to(total)
                total.addmm_(worth, met[: worth.shape[1]])
                held.clear()

        for piece in pieces.pieces:
            into = total
            if piece.coefficients is not None:
                done = sum(worth.shape[1] for worth in held)
                if done + piece.terms > TERMS:
                    give()
                    done = 0
                held.append(piece.coefficients)
                into = met[done : done + piece.terms].zero_()
            into = into.view(piece.terms * columns, count)
            each = (piece.terms + 1) * columns + count
            step = max(1, min(limit, WARM) // max(1, each * total.element_size()))
            for start in range(piece.start, piece.stop, step):
                stop = min(start + step, piece.stop)
                some = order[start:stop]
                into.addmm_(self._weighted(piece, pieces, mine(some), start, stop), theirs(some))
        give()
        return total.view(dampings, columns, count)

    def _weighted(
        self, piece: Piece, pieces: Pieces, entries: Tensor, start: int, stop: int
    ) -> Tensor:
        """Return some entries ``[n, C]`` of the rows times each function, ``[terms C, n]``."""
        if piece.terms == 1 and piece.coefficients is not None:
            return entries.mT
        functions = pieces.functions(piece, start, stop).to(entries).mT  # [n, terms]
        return (functions.unsqueeze(2) * entries.unsqueeze(1)).flatten(1).mT


def _entries(block: Block) -> tuple[Entries, Tensor]:
    """Return what gives some entries of all rows, ``[n, B]``, and the powers of two in them, [B].

    Of rows of one position, from their factors. Every row is taken to a size of about 1, since its
    entries where the curvature has none are rounding, and those of a row that the model is sure of
    are small: a product below what float32 has in full takes a processor a hundred times as long.
    """
    if _from_factors(block):
        assert isinstance(block, OuterBlock)
        inputs = accumulate(held_by(block.own_inputs))[:, 0].mT.contiguous()
        outputs, width = accumulate(block.outputs)[:, 0].mT.contiguous(), block.shape[1]
        scale = _powers(_largest(outputs, 0) * _largest(inputs, 0)).to(outputs)
        outputs = outputs * scale
        return lambda index: outputs[index // width] * inputs[index % width], scale
    formed = accumulate(block.flat())
    scale = _powers(_largest(formed, 1)).to(formed)
    formed = formed * scale[:, None]
    return lambda index: formed.index_select(1, index).mT, scale


def _largest(values: Tensor, axis: int) -> Tensor:
    """Return the largest size along an axis, in float64, which holds products of them."""
    if not values.numel():
        return values.new_zeros(values.shape[1 - axis], dtype=torch.float64)
    largest: Tensor = torch.linalg.vector_norm(values, math.inf, dim=axis)
    return largest.double()


def _powers(sizes: Tensor) -> Tensor:
    """Return the power of two that takes each size near 1, as far as float32 has its inverse."""
    powers = torch.where(sizes > 0, sizes, 1.0).log2().round()
    found: Tensor = (-powers.clamp(-FARTHEST, FARTHEST)).exp2()
    return found


def _from_factors(block: Block) -> bool:
    one = isinstance(block, OuterBlock) and block.positions == 1
    return one and isinstance(block, OuterBlock) and not is_one_hot(block.inputs)


def _slices(block: Block, limit: int) -> list[slice]:
    """Return even runs of rows, those that one contraction may form at once."""
    size = sum(block.shape) if _from_factors(block) else 2 * math.prod(block.shape)
    most = max(1, limit // max(1, 2 * size * item_of(block)))
    step = max(1, -(-len(block) // max(1, -(-len(block) // most))))
    return [slice(start, start + step) for start in range(0, max(1, len(block)), step)]
