"""Test rows cut to a low rank after an inverse Hessian."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define, evolve, field, frozen, validators
from torch import Tensor

from dattri_core import (
    Block,
    Damping,
    DenseBlock,
    Inverse,
    InverseHessian,
    InverseRoot,
    LinearMap,
    NumericsError,
    OneHot,
    OuterBlock,
    Outlook,
    Problem,
    RandomStream,
    Rows,
    Space,
    SpecError,
    SplitInverse,
    low_rank,
)
from dattri_parts.inverse_hessians.identity import Identity

OVERSAMPLING = 8
"""Columns of the range finder beyond the rank."""
POWERS = 2
"""Products with G G^T that sharpen its range."""
WIDTH = 4
"""Blocks alive while one is cut: formed, its products, and the factors of the cut."""


@frozen
class LowRank:
    """Layer by layer, the best approximation of rank r of (H + damping I)^-1 h, a matrix [O, I].

    A test row is then kept as r (O + I) numbers instead of O I for each layer. What is lost are the
    smallest singular values; those of gradients of sequences fall off fast. An approximation of
    test rows only, and not linear: rows of rank r or less, and blocks that a rank r would not make
    smaller, stay as they are. The range is found from products with r + 8 random vectors, the same
    for every row, never from the matrix.

    Source: Grosse et al. 2023, Studying Large Language Model Generalization with Influence
    Functions, section 3.2.2 (arXiv 2308.03296), with r = 32; Halko, Martinsson and Tropp 2011,
    algorithm 4.4 (arXiv 0909.4061).

    Args:
        rank: r.
        inner: The inverse Hessian before the cut.
        seed: Of the random vectors.
    """

    rank: int = field(default=32, validator=validators.ge(1))
    inner: InverseHessian = field(factory=Identity)
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Return what the inner part needs."""
        return self.inner.needs

    def outlook(self, space: Space) -> Outlook:
        """Return what is known before the fit: as of the inner part, of rank r at most."""
        told = Outlook(blockwise=not self.inner.needs)
        if hasattr(self.inner, "outlook"):
            told = self.inner.outlook(space)
        return self._after(told)

    def foresee(self, problem: Problem) -> Outlook:
        """Return the same with what the inner part decides by the train set."""
        if not hasattr(self.inner, "foresee"):
            return self.outlook(problem.space)
        return self._after(self.inner.foresee(problem))

    def _after(self, told: Outlook) -> Outlook:
        """Return what is known of the inner part's answers, once they are cut: not combinations."""
        forms = bool(self.inner.needs)
        return evolve(told, rank=self.rank, forms=forms, base=0, spectral=False, leverages=False)

    def check(self, space: Space) -> None:
        """Raise `SpecError` when the inner part does not fit, or does not give whole rows."""
        self.inner.check(space)
        after = self.inner.out_space(space) if hasattr(self.inner, "out_space") else space
        if after != space or getattr(self.inner, "form", "one-sided") != "one-sided":
            raise SpecError(
                f"inverse Hessian 'low-rank': {type(self.inner).__name__} acts on train rows too, "
                "or leaves a few numbers of each row; give a one-sided inverse of whole rows"
            )

    def fit(self, problem: Problem) -> Inverse:
        """Fit the inner part."""
        fitted = self.inner.fit(problem)
        assert not isinstance(fitted, InverseRoot)
        return _LowRankInverse(
            fitted, self.rank, RandomStream(self.seed, "low-rank"), problem.memory
        )


@define(eq=False)
class _LowRankInverse:
    """``stats["captured"]`` is the share of the squared length of all rows that the cuts kept."""

    inner: Inverse
    row_rank: int
    random: RandomStream
    memory: int
    _kept: float = 0.0
    _all: float = 0.0

    @property
    def blockwise(self) -> bool:
        """Return whether the inner inverse is: the cut is."""
        return self.inner.blockwise

    @property
    def stats(self) -> Mapping[str, float]:
        """Return those of the inner inverse, and how much of the rows is kept."""
        share = min(1.0, self._kept / self._all) if self._all else 1.0  # 1 + rounding at most
        return {**self.inner.stats, "captured": share}

    @property
    def held(self) -> int:
        """Return the bytes that the inner inverse keeps."""
        return getattr(self.inner, "held", 0)

    @property
    def beside(self) -> int:
        """Return how many formed rows are alive beside an answer of the inner inverse."""
        return getattr(self.inner, "beside", 3)

    @property
    def basis(self) -> LinearMap | None:
        """Return the eigenvectors of the inner inverse: a rotation changes no singular value."""
        return self.inner.basis if isinstance(self.inner, SplitInverse) else None

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, cut."""
        return self._cut(self.inner.apply(rows))

    def in_basis(self, rows: Rows) -> Rows:
        """Return the same in the eigenbasis of the inner inverse."""
        assert isinstance(self.inner, SplitInverse)
        return self._cut(self.inner.in_basis(rows))

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the cut of the inner inverse at another damping."""
        inner = self.inner.with_damping(damping)
        return _LowRankInverse(inner, self.row_rank, self.random, self.memory)

    def _cut(self, rows: Rows) -> Rows:
        blocks = {spec.name: rows.blocks[spec.name] for spec in rows.space}
        for spec in rows.space:
            block = blocks[spec.name]
            if spec.kind == "outer" and _gains(block, self.row_rank):
                blocks[spec.name] = self._cut_block(spec.name, block)
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def _cut_block(self, name: str, block: Block) -> Block:
        outputs, inputs = block.shape
        columns = min(self.row_rank + OVERSAMPLING, outputs, inputs)
        normal = torch.randn(inputs, columns, generator=self.random.generator(name))
        normal = normal.to(block.device, torch.promote_types(block.dtype, torch.float32))
        each = WIDTH * outputs * inputs * normal.element_size()
        step = max(1, self.memory // max(1, each))
        parts = [
            cut(block.take(slice(start, start + step)), normal, self.row_rank)
            for start in range(0, len(block), step)
        ]
        if not parts:
            return block
        left, right = (torch.cat(side) for side in zip(*parts, strict=True))
        made = low_rank(left.to(block.dtype), right.to(block.dtype))
        whole, kept = (float(rows.pair_inner(rows).double().sum()) for rows in (block, made))
        require_shorter(kept, whole, name, block.dtype)
        self._all += whole
        self._kept += kept
        return made


def require_shorter(kept: float, whole: float, name: str, dtype: torch.dtype) -> None:
    """Raise `NumericsError` where cut rows are longer than rows: a projection makes none longer.

    Args:
        kept: Sum of the squared lengths of the cut rows.
        whole: The same of the rows.
        name: Of the block.
        dtype: Of the rows; the root of its precision is what rounding may add.
    """
    if kept > whole * (1 + torch.finfo(dtype).eps ** 0.5):
        raise NumericsError(
            f"inverse Hessian 'low-rank': the cut of {name!r} keeps {kept / max(whole, 5e-324):.6g}"
            " of the squared length of its rows, which can be 1 at most: a block of the inner "
            "inverse is not the rows that it stands for; report it, and use the inner inverse "
            "without 'low-rank'"
        )


def cut(block: Block, normal: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation of rank r in the range that random vectors find.

    Args:
        block: Rows G, ``[C, O, I]``, formed or as factors.
        normal: Random vectors, ``[I, k]``.
        rank: r, at most k.

    Returns:
        Left ``[C, O, r]`` and right ``[C, r, I]``.
    """
    rows = _factors(block)
    image = _image(rows, normal)  # [C, O, k]
    for _ in range(POWERS):
        columns = _orthonormal(_coimage(rows, _orthonormal(image)).mT)
        image = _image(rows, columns)
    basis = _orthonormal(image)
    small = _coimage(rows, basis)  # [C, k, I]
    gram = small.double() @ small.double().mT
    turns = torch.linalg.eigh(gram).eigenvectors[..., -rank:].to(small.dtype)  # [C, k, r]
    return basis @ turns, turns.mT @ small


def _factors(block: Block) -> OuterBlock | DenseBlock:
    """Return rows as factors or formed: each can meet a matrix of its own.

    `Block.map` takes one function for all rows, since what it is applied to may be the base of a
    span, or inputs that rows share.
    """
    return block if isinstance(block, OuterBlock) else block.dense()


def _image(rows: OuterBlock | DenseBlock, columns: Tensor) -> Tensor:
    """Return G_c times columns ``[I, k]`` or ``[C, I, k]``, ``[C, O, k]``; through the factors."""
    if isinstance(rows, DenseBlock):
        return rows.values.to(columns.dtype) @ columns
    inputs, each = rows.own_inputs, columns.expand(len(rows), *columns.shape[-2:])
    if isinstance(inputs, OneHot):
        index = inputs.index.unsqueeze(-1).expand(-1, -1, columns.shape[-1])
        met = each.gather(1, index)  # [C, T, k]
    else:
        met = inputs.to(columns.dtype) @ each
    return rows.outputs.to(columns.dtype).mT @ met


def _coimage(rows: OuterBlock | DenseBlock, basis: Tensor) -> Tensor:
    """Return the transpose of basis ``[C, O, k]`` times G, ``[C, k, I]``; through the factors."""
    if isinstance(rows, DenseBlock):
        return basis.mT @ rows.values.to(basis.dtype)
    return OuterBlock(rows.outputs.to(basis.dtype) @ basis, rows.inputs).dense().values


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _gains(block: Block, rank: int) -> bool:
    """Whether a cut makes rows smaller: no factors of that rank or less, and no small matrix.

    Only of plain factors are positions a bound on the rank: spans and sums have formed rows too.
    """
    outputs, inputs = block.shape
    if isinstance(block, OuterBlock) and (block.positions or 0) <= rank:
        return False
    return rank < min(outputs, inputs) and rank * (outputs + inputs) < outputs * inputs
