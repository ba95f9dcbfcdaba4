"""Toy spaces, rows and operators for parts that never see a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.blocks import Block, DenseBlock, OneHot, OuterBlock
from dattri_core.errors import NumericsError, SpecError
from dattri_core.laws.worlds import integers, random
from dattri_core.protocols import CurvatureKind, RandomStream, RowKind
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space

SPACE = Space(
    (
        BlockSpec(
            "linear",
            "outer",
            (3, 5),
            (
                ParameterView("linear.weight", (3, 4), 0, 4),
                ParameterView("linear.bias", (3,), 4, 5),
            ),
        ),
        BlockSpec(
            "embedding", "outer", (2, 6), (ParameterView("embedding.weight", (6, 2), 0, 6, True),)
        ),
        BlockSpec("scale", "dense", (4,), (ParameterView("scale", (4,), 0, 1),)),
    )
)


def toy_rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Rows:
    """Return rows of `SPACE`: factors, an embedding's indices, and a dense block."""
    blocks: dict[str, Block] = {
        "linear": OuterBlock(random(count, 2, 3, seed=seed), random(count, 2, 5, seed=seed + 1)),
        "embedding": OuterBlock(
            random(count, 3, 2, seed=seed + 2), OneHot(integers(6, count, 3, seed=seed + 3), 6)
        ),
        "scale": DenseBlock(random(count, 4, seed=seed + 4)),
    }
    aux = {"label": integers(3, count, seed=seed + 5)}
    return Rows(SPACE, blocks, torch.arange(count) + 100, aux).to(dtype=dtype)


def formed(rows: Rows) -> Rows:
    """Return the same rows without factors."""
    return rows.map_blocks(lambda _, block: block.dense())


def labelled(rows: Rows) -> Rows:
    """Return the same rows with auxiliary numbers, none of them alike."""
    return evolve(rows, aux={**rows.aux, "label": 3 + 2 * torch.arange(len(rows))})


def flat_rows(space: Space, count: int, seed: int = 0) -> Rows:
    """Return formed random rows of any space."""
    return Rows.from_flat(space, random(count, space.dim, seed=seed), torch.arange(count) + 100)


def symmetric(size: int, low: float, high: float, zeros: int = 0, seed: int = 77) -> Tensor:
    """Return a dense symmetric float64 matrix with eigenvalues from ``low`` to ``high``.

    So many of its eigenvalues are ``zeros``, to rounding.
    """
    basis, _ = torch.linalg.qr(random(size, size, seed=seed))
    values = torch.linspace(low, high, size, dtype=torch.float64)
    values[:zeros] = 0
    matrix: Tensor = (basis * values) @ basis.T
    return matrix


def block_diagonal(matrix: Tensor, space: Space = SPACE) -> Tensor:
    """Return the matrix with zeros where two blocks of a space meet."""
    kept = torch.zeros_like(matrix)
    for where in places(space).values():
        kept[where, where] = matrix[where, where]
    return kept


def places(space: Space) -> dict[str, slice]:
    """Return where each block lies in a flat row."""
    offsets = space.offsets
    return {spec.name: slice(offsets[spec.name], offsets[spec.name] + spec.size) for spec in space}


@frozen(eq=False)
class ToyProblem:
    """A train set that is its rows of `SPACE`, for parts that ask for rows and no model.

    Args:
        train_rows: The rows of the loss.
        batch: Rows at a time.
        seed: Of the fit.
    """

    train_rows: Rows
    batch: int = 4
    seed: int = 0
    memory: ClassVar[int] = 2**28

    @property
    def device(self) -> torch.device:
        """Return where the rows are."""
        return self.train_rows.device

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.train_rows.space

    @property
    def n_train(self) -> int:
        """Return the number of rows."""
        return len(self.train_rows)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.train_rows.dtype

    @property
    def random(self) -> RandomStream:
        """Return the stream of the seed."""
        return RandomStream(self.seed, "law")

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows, all in order or those at the given positions; of the loss only."""
        self._require_loss(kind)
        chosen = torch.arange(self.n_train) if index is None else index
        for start in range(0, len(chosen), self.batch):
            yield self.train_rows.take(chosen[start : start + self.batch])

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` over block by block, the last block first."""
        for rows in self.rows(index, kind=kind, draw=draw):
            for name in reversed(rows.space.names):
                sink(name, rows.blocks[name], rows.index)

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Refuse: there is no model."""
        raise SpecError(f"toy problem: its rows have no curvature {kind!r}")

    def _require_loss(self, kind: RowKind) -> None:
        if kind != "loss":
            raise SpecError(f"toy problem: has rows of the loss, not of kind {kind!r}")


@cache
def _parts(size: int) -> Tensor:
    """Return E, -E, F, -F: what each example of a `ToyOperator` adds, ``[4, size, size]``."""
    one, other = (symmetric(size, -0.04, 0.04, seed=seed) for seed in (78, 79))
    return torch.stack([one, -one, other, -other])


@frozen(eq=False)
class ToyOperator:
    """An operator that is a matrix: it answers all of `GIVEN`.

    As a mean over examples it is that of the matrices H + E, H - E, H + F, H - F. The spectrum is
    taken block by block when the matrix is block diagonal, and without the eigenvalues that are
    zero. Its rows are eigenvectors times the roots of their eigenvalues; where the matrix is block
    diagonal, one row has an eigenvector of each block, so that blocks of ``sum r r^T`` that are off
    the diagonal are not zero.
    """

    space: Space
    matrix: Tensor
    dtype: torch.dtype = torch.float64
    memory: int = 2**28
    n_train: ClassVar[int] = 4
    random: ClassVar[RandomStream] = RandomStream(0, "law")
    weight: ClassVar[float] = 0.25

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g."""
        flat = rows.flat()
        return Rows.from_flat(self.space, flat @ self.matrix.to(flat.dtype), rows.index, rows.aux)

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return H g for every row g, H the mean over some examples."""
        flat = rows.flat()
        matrix = self.matrix + _parts(self.space.dim)[index].mean(0).to(self.matrix.device)
        return Rows.from_flat(self.space, flat @ matrix.to(flat.dtype), rows.index, rows.aux)

    def dense(self) -> Tensor:
        """Return the matrix."""
        return self.matrix

    @property
    def basis(self) -> ToyBasis:
        """Return the eigenvectors of eigenvalues that are not zero."""
        return ToyBasis(self.space, {name: q for name, (_, q) in self._spectra().items()})

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """Return the eigenvalues that are not zero."""
        return {name: values for name, (values, _) in self._spectra().items()}

    @property
    def complete(self) -> bool:
        """Return whether no eigenvalue is zero."""
        return sum(len(values) for values in self.eigenvalues.values()) == self.space.dim

    @property
    def blockwise(self) -> bool:
        """Return whether the matrix is block diagonal."""
        return torch.equal(self.matrix, block_diagonal(self.matrix, self.space))

    def rows(self) -> Iterator[Rows]:
        """Read rows r with H = weight sum r r^T, seven at a time, the first block as factors."""
        spectra = list(self._spectra().values())
        if any(bool((values < 0).any()) for values, _ in spectra):
            raise NumericsError("an indefinite matrix is no sum of squares")
        most, columns = max(len(values) for values, _ in spectra), []
        for values, vectors in spectra:
            rooted = vectors * (values / self.weight).sqrt()
            columns.append(torch.nn.functional.pad(rooted, (0, most - len(values))))
        flat = torch.cat(columns).T
        whole = Rows.from_flat(self.space, flat, torch.arange(len(flat)))
        for start in range(0, len(flat), 7):
            part = whole.take(slice(start, start + 7))
            first = self.space.blocks[0]
            inputs = torch.eye(first.shape[1]).to(flat).expand(len(part), -1, -1)
            factors = OuterBlock(part.blocks[first.name].dense().values.mT, inputs)
            yield evolve(part, blocks={**part.blocks, first.name: factors})

    def _spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        parts = places(self.space) if self.blockwise else {"all": slice(0, self.space.dim)}
        found = {}
        for name, where in parts.items():
            values, vectors = torch.linalg.eigh(self.matrix[where, where])
            kept = values.abs() > 1e-12 * self.matrix.abs().max()
            found[name] = (values[kept], vectors[:, kept])
        return found


@frozen(eq=False)
class ToyBasis:
    """Orthonormal columns ``[d, r]`` of the whole row, named "all", or of each block."""

    space: Space
    columns: dict[str, Tensor]

    @property
    def blockwise(self) -> bool:
        """Return whether the columns are those of blocks."""
        return set(self.columns) == set(self.space.names)

    @property
    def out_space(self) -> Space:
        """Return a dense block of coefficients for each set of columns."""
        return Space(tuple(BlockSpec(n, "dense", (q.shape[1],)) for n, q in self.columns.items()))

    def map(self, rows: Rows) -> Rows:
        """Return Q^T g, of some blocks when blockwise."""
        names = rows.space.names if self.blockwise else tuple(self.columns)
        parts = {n: rows.blocks[n].flat() if self.blockwise else rows.flat() for n in names}
        blocks: dict[str, Block] = {
            n: DenseBlock(part @ self.columns[n].to(part.dtype)) for n, part in parts.items()
        }
        return Rows(self.out_space.select(names), blocks, rows.index, rows.aux)

    def adjoint(self, rows: Rows) -> Rows:
        """Return Q k, of some blocks when blockwise."""
        names = rows.space.names
        flat = [rows.blocks[n].flat() @ self.columns[n].to(rows.dtype).mT for n in names]
        space = self.space.select(names) if self.blockwise else self.space
        return Rows.from_flat(space, torch.cat(flat, 1), rows.index, rows.aux)


GIVEN = frozenset({"apply", "dense", "rows", "sampled", "spectral"})
"""What `ToyOperator` answers."""
