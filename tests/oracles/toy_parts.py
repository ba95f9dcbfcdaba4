"""Parts that exist for tests: dense, obvious, and counting their own work."""

from collections import Counter
from typing import ClassVar

import torch
from attrs import evolve, field, frozen
from dattri_parts.sources.per_example import PerExample

from dattri_core import (
    BlockSpec,
    CurvatureInverse,
    Damping,
    Rows,
    Scored,
    Space,
    SpecError,
    batch_size,
)


def as_damping(value):
    return value if isinstance(value, Damping) else Damping(value)


# --- sources ------------------------------------------------------------------------------------
@frozen
class CountingSource:
    """The per-example source; counts binds and rows by role."""

    provides: ClassVar[frozenset[str]] = PerExample().provides
    counts: Counter = field(factory=Counter, eq=False)

    def bind(self, task, checkpoint, sample):
        self.counts["bind"] += 1
        return _CountingBound(PerExample().bind(task, checkpoint, sample), self.counts)


@frozen(eq=False)
class _CountingBound:
    inner: object
    counts: Counter

    @property
    def space(self):
        return self.inner.space

    @property
    def evaluator(self):
        return self.inner.evaluator

    def stream(self, batch, role, sink):
        self.counts[role] += batch_size(batch)
        return self.inner.stream(batch, role, sink)


# --- projectors ---------------------------------------------------------------------------------
@frozen
class FlatSketch:
    """P: a dense normal matrix [k, d] of the flat row; forgets blocks and factors."""

    size: int = 5
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space):
        return Space((BlockSpec("sketch", "dense", (self.size,)),))

    def build(self, space, *, stream, device):
        matrix = torch.randn(
            self.size, space.dim, generator=stream.generator("flat"), dtype=torch.float64
        )
        return _Flat(space, self.out_space(space), matrix)


@frozen
class OneWaySketch(FlatSketch):
    """The same sketch without an adjoint."""

    gives: ClassVar[frozenset[str]] = frozenset()


@frozen(eq=False)
class _Flat:
    space: Space
    out_space: Space
    matrix: torch.Tensor
    blockwise: ClassVar[bool] = False

    def map(self, rows):
        flat = rows.flat()
        return Rows.from_flat(
            self.out_space, flat @ self.matrix.to(flat.dtype).T, rows.index, rows.aux
        )

    def adjoint(self, rows):
        flat = rows.flat()
        return Rows.from_flat(self.space, flat @ self.matrix.to(flat.dtype), rows.index, rows.aux)


# --- curvatures and solvers ---------------------------------------------------------------------
@frozen
class Gram:
    """H = (1/n) sum_i g_i g_i^T, dense in float64."""

    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = True
    counts: Counter = field(factory=Counter, eq=False)

    def gives(self, space):
        return frozenset({"dense", "apply"})

    def fit(self, problem):
        self.counts["fit"] += 1
        total = torch.zeros(problem.space.dim, problem.space.dim, dtype=torch.float64)
        for rows in problem.rows():
            flat = rows.flat().double()
            total += flat.T @ flat
        return _Dense(problem.space, total / problem.n_train)


@frozen
class GramOf:
    """H = (1/n) sum r r^T over rows of another kind, dense in float64."""

    kind: str
    exact: ClassVar[bool] = False

    @property
    def needs(self):
        return frozenset({f"{self.kind}-rows"})

    def gives(self, space):
        return frozenset({"dense"})

    def fit(self, problem):
        total = torch.zeros(problem.space.dim, problem.space.dim, dtype=torch.float64)
        for rows in problem.rows(kind=self.kind):
            flat = rows.flat().double()
            total += flat.T @ flat
        return _Dense(problem.space, total / problem.n_train)


@frozen
class Factored:
    """Stands for K-FAC: takes nothing but blocks that have factors."""

    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = False

    def gives(self, space):
        flat = [block.name for block in space if block.kind != "outer" and block.name == "sketch"]
        if flat:
            raise SpecError(
                f"curvature factored: the blocks {flat} have no factors left; put it before the "
                "sketch: stages=[{inverse_hessian=...}, {projector=...}]"
            )
        return frozenset({"dense", "apply"})

    def fit(self, problem):
        return Gram().fit(problem)


@frozen
class HessianColumns:
    """H by one product with each unit vector; counts products."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian-product"})
    exact: ClassVar[bool] = True
    kind: str = "hessian"
    counts: Counter = field(factory=Counter, eq=False)

    def gives(self, space):
        return frozenset({"dense", "apply"})

    def fit(self, problem):
        dim = problem.space.dim
        self.counts["fit"] += 1
        self.counts["vectors"] += dim
        unit = Rows.from_flat(problem.space, torch.eye(dim, dtype=problem.dtype), torch.arange(dim))
        return _Dense(problem.space, problem.product(unit, self.kind).flat().double())


@frozen
class GGNColumns(HessianColumns):
    """The GGN by one product with each unit vector."""

    needs: ClassVar[frozenset[str]] = frozenset({"ggn-product"})
    kind: str = "ggn"


@frozen(eq=False)
class _Dense:
    space: Space
    matrix: torch.Tensor
    dtype: ClassVar[torch.dtype] = torch.float64
    memory: ClassVar[int] = 2**28

    def apply(self, rows):
        flat = rows.flat()
        return Rows.from_flat(self.space, flat @ self.matrix.to(flat.dtype), rows.index, rows.aux)

    def dense(self):
        return self.matrix


@frozen
class DenseSolve:
    """(H + damping I)^-1 g by a dense solve in float64."""

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    exact: ClassVar[bool] = True

    def check(self, space):
        pass

    def solve_for(self, operator, device):
        return _Solved(operator, self.damping)


@frozen
class SpectralSolve(DenseSolve):
    """Asks for a spectrum that no toy curvature gives."""

    needs: ClassVar[frozenset[str]] = frozenset({"spectral"})


@frozen(eq=False)
class _Solved:
    operator: _Dense
    damping: Damping
    blockwise: ClassVar[bool] = False

    @property
    def stats(self):
        return {"damping": self.damping.value}

    def apply(self, rows):
        matrix = self.operator.matrix
        damped = matrix + self.damping.value * torch.eye(len(matrix), dtype=matrix.dtype)
        flat = rows.flat()
        solved = torch.linalg.solve(damped, flat.double().T).T.to(flat.dtype)
        return Rows.from_flat(rows.space, solved, rows.index, rows.aux)

    def with_damping(self, damping):
        return evolve(self, damping=damping)


def inverse(curvature, damping=1e-2):
    """Return the composed inverse Hessian of a toy curvature and the dense solver."""
    return CurvatureInverse(curvature, DenseSolve(damping))


# --- scorers and folds --------------------------------------------------------------------------
@frozen
class ResidualDot:
    """Inner product that asks for an aux which the per-example source does not attach."""

    needs: ClassVar[frozenset[str]] = frozenset({"residual"})
    locality: ClassVar[str] = "tile"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return Scored(total * train.aux["residual"].unsqueeze(1))


@frozen
class ColumnRank:
    """The rank of each train row in its column: no tile can know it alone."""

    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[str] = "column"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return Scored(total.argsort(0).argsort(0).to(total.dtype))


@frozen
class LastOnly:
    """Keeps the last checkpoint that it was given: shows the order in which they come."""

    order: str = "forward"
    needs: ClassVar[frozenset[str]] = frozenset()

    def update(self, state, scored, snapshot):
        return {"last": scored.values}

    def finish(self, state):
        return state["last"]


@frozen
class Overflows:
    """Inner products, infinite for one train example."""

    position: int
    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[str] = "tile"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return Scored(total / (train.index != self.position).to(total.dtype).unsqueeze(1))


@frozen
class DividesByZero:
    """An inverse whose rows are not finite."""

    needs: ClassVar[frozenset[str]] = frozenset()
    stats: ClassVar[dict] = {}
    blockwise: ClassVar[bool] = True

    def check(self, space):
        pass

    def fit(self, problem):
        return self

    def apply(self, rows):
        return rows.scale(torch.full((len(rows),), float("inf")))

    def with_damping(self, damping):
        return self
