"""Laws of solvers: the damped inverse of an operator, as the solver declares it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from attrs import frozen
from torch import Tensor

from dattri_core.capabilities import ReducedInverse, ReducingSolver, RootSolver
from dattri_core.laws.inverses import require_blockwise, require_split, splits
from dattri_core.laws.law import (
    law,
    require,
    require_close,
    require_equal,
    require_identical,
    require_same_aux,
)
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.spaces import (
    GIVEN,
    SPACE,
    ToyOperator,
    block_diagonal,
    formed,
    places,
    symmetric,
    toy_rows,
)
from dattri_core.laws.untouched import require_dtype, require_frozen, require_rows_untouched
from dattri_core.protocols import (
    Damping,
    Inverse,
    LinearMap,
    Solver,
)
from dattri_core.rows import Rows

CPU = torch.device("cpu")
DAMPING = Damping(0.1)
POSITIVE = ToyOperator(SPACE, symmetric(SPACE.dim, 0.1, 3.0))
SADDLE = ToyOperator(SPACE, symmetric(SPACE.dim, -1.03, 3.0))
BLOCKS = ToyOperator(SPACE, block_diagonal(POSITIVE.matrix))
NULL = ToyOperator(SPACE, symmetric(SPACE.dim, 0.1, 3.0, zeros=SPACE.dim // 2))
NULL_BLOCKS = ToyOperator(SPACE, block_diagonal(POSITIVE.matrix))
for _where in places(SPACE).values():
    _size = _where.stop - _where.start
    NULL_BLOCKS.matrix[_where, _where] = symmetric(_size, 0.1, 3.0, zeros=_size // 2)
TIGHT = 1e-12
STRONG = 1e3
"""A damping at which an inverse is its series in H to the first order."""
FELT = 0.1
"""Largest relative difference of that order; one that samples examples is off by their noise."""


@frozen(eq=False)
class SolverBench:
    """A solver on toy operators; one with a field ``tolerance`` is run at 1e-12."""

    part: Any

    def solver(self, damping: Damping = DAMPING) -> Solver:
        """Return the solver at a damping."""
        changes: dict[str, Any] = {"damping": damping}
        if any(a.name == "tolerance" for a in attrs.fields(type(self.part))):
            changes["tolerance"] = TIGHT
        made: Solver = attrs.evolve(self.part, **changes)
        return made

    def inverse(self, operator: ToyOperator = POSITIVE, damping: Damping = DAMPING) -> Inverse:
        """Return the inverse of an operator, on whole rows also where it reduces them."""
        return _whole(self.solver(damping).solve_for(operator, operator.matrix.device))

    def root(self, operator: ToyOperator = POSITIVE, damping: Damping = DAMPING) -> Inverse:
        """Return the root of the inverse of an operator, where the solver gives one."""
        solver = self.solver(damping)
        assert isinstance(solver, RootSolver)
        return solver.root_for(operator, operator.matrix.device)


def _whole(inverse: Inverse) -> Inverse:
    sides = inverse.train_map if isinstance(inverse, ReducedInverse) else None
    return inverse if sides is None else _Whole(inverse, sides)


@frozen(eq=False)
class _Whole:
    """P^T D h, the whole row of an inverse with the sides P g and D h."""

    inverse: Inverse
    sides: LinearMap
    blockwise: ClassVar[bool] = False

    @property
    def stats(self) -> Mapping[str, float]:
        return self.inverse.stats

    def apply(self, rows: Rows) -> Rows:
        return self.sides.adjoint(self.inverse.apply(rows))

    def with_damping(self, damping: Damping) -> Inverse:
        return _whole(self.inverse.with_damping(damping))


def exact_inverse(operator: ToyOperator, damping: float, flat: Tensor) -> Tensor:
    """Return (H + damping I)^-1 g by a dense solve in float64."""
    eye = torch.eye(SPACE.dim, dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(operator.matrix + damping * eye, flat.T).T
    return solution


def _needs_given(bench: SolverBench) -> str | None:
    missing = bench.part.needs - GIVEN
    return f"needs {sorted(missing)}, which no toy operator gives" if missing else None


def _exact(bench: SolverBench) -> str | None:
    return None if bench.part.exact else "it declares that it is not exact"


@law("solver", _needs_given)
def part_is_frozen(bench: SolverBench) -> None:
    """No field can be set; after a solve of another H, apply is the same and so is the part."""

    def use(some: SolverBench, other: bool) -> Tensor:
        operator, rows = (BLOCKS, toy_rows(2, seed=3)) if other else (POSITIVE, toy_rows(4))
        return some.inverse(operator, Damping(0.4) if other else DAMPING).apply(rows).flat()

    require_frozen(bench, use)


@law("solver", _needs_given, _exact)
def inverse_is_exact(bench: SolverBench) -> None:
    """(H + damping I) apply(g) = g, for H with eigenvalues in [0.1, 3] and damping 0.1."""
    rows = toy_rows(5)
    got = bench.inverse().apply(rows).flat()
    require_close(got, exact_inverse(POSITIVE, 0.1, rows.flat()), "apply against a dense solve")


@law("solver", _needs_given, _exact)
def null_space_is_damped(bench: SolverBench) -> None:
    """(H + damping I) apply(g) = g, where half of the eigenvalues of H are zero."""
    rows = toy_rows(5)
    for operator, name in ((NULL, "H"), (NULL_BLOCKS, "block diagonal H")):
        got = bench.inverse(operator).apply(rows).flat()
        want = exact_inverse(operator, 0.1, rows.flat())
        require_close(got, want, f"apply on a singular {name} against a dense solve")


@law("solver", _needs_given, _exact)
def saddle_is_not_hidden(bench: SolverBench) -> None:
    """On an indefinite H the answer is exact, or stats count rows unsolved, or it is refused."""
    rows = toy_rows(5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inverse = bench.inverse(SADDLE)
            got = inverse.apply(rows).flat()
    except ArithmeticError:
        return
    if inverse.stats.get("converged", len(rows)) < len(rows):
        return
    want = exact_inverse(SADDLE, 0.1, rows.flat())
    require_close(got, want, "apply on an indefinite H, said to have converged", 1e-7)


@law("solver", _needs_given)
def inverse_is_linear(bench: SolverBench) -> None:
    """apply(2 g - 3 h) = 2 apply(g) - 3 apply(h)."""
    inverse, left, right = bench.inverse(), formed(toy_rows(3)), formed(toy_rows(3, seed=9))
    mixed = Rows.from_flat(SPACE, 2 * left.flat() - 3 * right.flat(), left.index)
    want = 2 * inverse.apply(left).flat() - 3 * inverse.apply(right).flat()
    require_close(inverse.apply(mixed).flat(), want, "apply of a combination")


def _of_whole_data(bench: SolverBench) -> str | None:
    if "sampled" in bench.part.needs:
        return "it samples train examples: symmetric in the mean over samples only"
    return None


@law("solver", _needs_given, _of_whole_data)
def inverse_is_symmetric(bench: SolverBench) -> None:
    """<apply(g), k> = <g, apply(k)>."""
    inverse, left, right = bench.inverse(), toy_rows(4), toy_rows(3, seed=9)
    one = inverse.apply(left).flat() @ right.flat().T
    require_close(left.flat() @ inverse.apply(right).flat().T, one, "<g, apply(k)>")


@law("solver", _needs_given)
def apply_is_of_single_rows(bench: SolverBench) -> None:
    """apply(rows)_b = apply(row_b): no row waits for, or leans on, another."""
    inverse, rows = bench.inverse(), toy_rows(4)
    rows = rows.scale(torch.tensor([1.0, 1e-3, 1e3, 1.0]).double())
    whole = inverse.apply(rows).flat()
    for b in range(4):
        one = inverse.apply(rows.take(slice(b, b + 1))).flat()
        require_close(one, whole[b : b + 1], f"apply of row {b} alone")


@law("solver", _needs_given)
def apply_is_of_the_row(bench: SolverBench) -> None:
    """apply of a row kept as factors = apply of the row formed, with its space, index and aux."""
    inverse, rows = bench.inverse(), toy_rows(4)
    got = inverse.apply(rows)
    require_close(got.flat(), inverse.apply(formed(rows)).flat(), "apply of factored rows")
    require_equal(got.space.fingerprint, rows.space.fingerprint, "space after apply")
    require_identical(got.index, rows.index, "index after apply")
    require_same_aux(got.aux, rows.aux, "aux after apply")


@law("solver", _needs_given)
def inputs_are_untouched(bench: SolverBench) -> None:
    """apply leaves the rows that it is given, factored or formed, as they were."""
    inverse, rows = bench.inverse(), toy_rows(4)
    require_rows_untouched(rows, inverse.apply, "apply")
    require_rows_untouched(formed(rows), inverse.apply, "apply")


def _reduces(bench: SolverBench) -> str | None:
    solver = bench.part
    reduces = isinstance(solver, ReducingSolver) and solver.out_space(SPACE) != SPACE
    return None if reduces else "it leaves rows whole"


@law("solver", _needs_given, _reduces)
def reduced_sides_are_true(bench: SolverBench) -> None:
    """A reduced inverse is M P on the test side, P of any rows at any damping, as declared."""
    rows, space = toy_rows(4), bench.part.out_space(SPACE)
    inverse: Any = bench.solver().solve_for(POSITIVE, CPU)
    sides = inverse.train_map
    small = sides.map(rows)
    for what, got in (("P g", small.space), ("apply(h)", inverse.apply(rows).space)):
        require_equal(got.fingerprint, space.fingerprint, f"space of {what}")
    require_equal(sides.out_space.fingerprint, space.fingerprint, "space of the train map")
    require_close(sides.map(formed(rows)).flat(), small.flat(), "P of formed rows")
    require_identical(small.index, rows.index, "index after P")
    require_same_aux(small.aux, rows.aux, "aux after P")
    halves = inverse.in_basis(small)
    require_equal(halves.space.fingerprint, space.fingerprint, "space of M k")
    require_close(halves.flat(), inverse.apply(rows).flat(), "M P h against apply(h)")
    back = sides.adjoint(small).flat() @ rows.flat().T
    require_close(back, small.flat() @ small.flat().T, "<P^T P g, h> against <P g, P h>")
    moved: Any = inverse.with_damping(Damping(0.7))
    require_identical(moved.train_map.map(rows).flat(), small.flat(), "P at another damping")


def _blockwise(bench: SolverBench) -> str | None:
    return None if bench.inverse(BLOCKS).blockwise else "its inverse is not blockwise"


@law("solver", _needs_given, _blockwise)
def blockwise_is_true(bench: SolverBench) -> None:
    """Block k of apply(g) needs block k of g only: apply of a part is that part of apply(g)."""
    require_blockwise(bench.inverse(BLOCKS), toy_rows(4), "apply on a block diagonal H")


def _splits(bench: SolverBench) -> str | None:
    return None if splits(bench.inverse(BLOCKS)) else "its inverse cannot be split"


@law("solver", _needs_given, _splits)
def split_is_true(bench: SolverBench) -> None:
    """<Q^T g, M Q^T h> = <g, apply(h)> and |Q^T g| = |g|, Q the same at any damping."""
    inverse = bench.inverse(BLOCKS)
    assert splits(inverse)
    require_split(inverse, toy_rows(4), toy_rows(3, seed=9), "Q")


def _rooted(bench: SolverBench) -> str | None:
    return None if isinstance(bench.part, RootSolver) else "it gives no root of its inverse"


@law("solver", _needs_given, _rooted)
def root_squared_is_the_inverse(bench: SolverBench) -> None:
    """<R g, R k> = <g, apply(k)> for R = root_for(H), with its space, index and aux."""
    left, right = toy_rows(4), toy_rows(3, seed=9)
    for damping in (DAMPING, Damping(1.0), Damping(0.3, relative=True)):
        root, inverse = bench.root().with_damping(damping), bench.inverse(damping=damping)
        got = root.apply(left).flat() @ root.apply(right).flat().T
        want = left.flat() @ inverse.apply(right).flat().T
        require_close(got, want, f"<R g, R k> at {damping}", 1e-8)
    mapped = root.apply(left)
    require_equal(mapped.space.fingerprint, left.space.fingerprint, "space after R")
    require_identical(mapped.index, left.index, "index after R")
    require_same_aux(mapped.aux, left.aux, "aux after R")


@law("solver", _needs_given, _rooted)
def root_is_symmetric(bench: SolverBench) -> None:
    """<R g, k> = <g, R k>."""
    root, left, right = bench.root(), toy_rows(4), toy_rows(3, seed=9)
    one = root.apply(left).flat() @ right.flat().T
    require_close(left.flat() @ root.apply(right).flat().T, one, "<g, R k>")


@law("solver", _needs_given, _rooted)
def indefinite_has_no_root(bench: SolverBench) -> None:
    """A root of an H + damping I with an eigenvalue below zero is refused with a NumericsError."""
    try:
        bench.root(SADDLE).apply(toy_rows(2))
    except ArithmeticError:
        return
    require(False, "the root of the inverse of an indefinite H was given without an error")


@law("solver", _needs_given)
def zero_stays_zero(bench: SolverBench) -> None:
    """apply(0) = 0."""
    rows = toy_rows(3).scale(torch.tensor([1.0, 0.0, 1.0]).double())
    got = bench.inverse().apply(rows).flat()
    require(bool(torch.isfinite(got).all()), "apply of rows with a zero among them: not finite")
    require(bool((got[1] == 0).all()), f"apply of a zero row: {float(got[1].abs().max()):.3e}")


@law("solver", _needs_given)
def damping_can_change(bench: SolverBench) -> None:
    """with_damping(d).apply = solve_for at d, for absolute and relative d."""
    rows = toy_rows(4)
    for damping in (Damping(1.0), Damping(0.3, relative=True), Damping(0.02)):
        changed = bench.inverse().with_damping(damping).apply(rows).flat()
        fresh = bench.inverse(damping=damping).apply(rows).flat()
        require_close(changed, fresh, f"with_damping({damping})", 1e-8)


@law("solver", _needs_given)
def damping_wins_in_the_end(bench: SolverBench) -> None:
    """damping apply(g) -> g as damping -> infinity."""
    rows = toy_rows(4)
    got = 1e8 * bench.inverse(damping=Damping(1e8)).apply(rows).flat()
    require_close(got, rows.flat(), "damping times apply at damping 1e8", 1e-6)


@law("solver", _needs_given)
def curvature_is_felt(bench: SolverBench) -> None:
    """damping (g - damping apply(g)) -> H g as damping -> infinity, at 10^3 to 10 %."""
    rows = toy_rows(4)
    found = bench.inverse(BLOCKS, Damping(STRONG)).apply(rows).flat()
    got = STRONG * (rows.flat() - STRONG * found)
    require_close(got, rows.flat() @ BLOCKS.matrix, "H g read off apply, H block diagonal", FELT)


@law("solver", _needs_given)
def relative_damping_is_of_the_mean_eigenvalue(bench: SolverBench) -> None:
    """Damping(v, relative) = Damping(v trace(H) / d), to 20 % where products estimate it."""
    rows = toy_rows(4)
    mean = float(POSITIVE.matrix.trace()) / SPACE.dim

    def applied(damping: Damping) -> Tensor:
        return bench.inverse(damping=damping).apply(rows).flat()

    got = applied(Damping(0.3, relative=True))
    if not bench.part.needs <= {"apply", "sampled"}:
        require_close(got, applied(Damping(0.3 * mean)), "relative against absolute damping", 1e-8)
        return
    size, most, least = (
        x.norm(dim=1) for x in (got, applied(Damping(0.24 * mean)), applied(Damping(0.36 * mean)))
    )
    within = bool(((least <= size) & (size <= most)).all())
    require(within, f"|apply(g)| is {size.tolist()}, not from {least.tolist()} to {most.tolist()}")


@law("solver", _needs_given, _exact, _blockwise)
def relative_damping_is_of_the_block(bench: SolverBench) -> None:
    """Damping(v, relative) = v trace(H_k) / d_k in block k, where the inverse is blockwise."""
    rows = toy_rows(4)
    got = bench.inverse(BLOCKS, Damping(0.3, relative=True)).apply(rows)
    for name, where in places(SPACE).items():
        matrix = BLOCKS.matrix[where, where]
        damping = 0.3 * float(matrix.trace()) / len(matrix)
        damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
        want = torch.linalg.solve(damped, rows.blocks[name].flat().T).T
        require_close(got.blocks[name].flat(), want, f"apply in block {name!r}", 1e-8)


@law("solver", _needs_given)
def apply_is_repeatable(bench: SolverBench) -> None:
    """apply(g) = apply(g), bit for bit, whatever was asked before and the global random state."""
    rows = toy_rows(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inverse = bench.inverse()
        first = inverse.apply(rows).flat()
        torch.manual_seed(2)
        inverse.apply(toy_rows(2, seed=3))
        require_identical(inverse.apply(rows).flat(), first, "apply, asked again")
        require_identical(bench.inverse().apply(rows).flat(), first, "apply of a second fit")


@law("solver", _needs_given)
def stats_are_true(bench: SolverBench) -> None:
    """stats are finite; the residual is that of the answer, converged the number of rows solved."""
    rows = toy_rows(4)
    inverse = bench.inverse()
    got = inverse.apply(rows).flat()
    for key, number in inverse.stats.items():
        require(isinstance(number, (int, float)), f"stats[{key!r}] is a {type(number).__name__}")
        require(math.isfinite(number), f"stats[{key!r}] is {number}")
    solved = inverse.stats.get("converged", len(rows))
    require(solved == len(rows), f"{solved} of {len(rows)} rows converged on a simple H")
    if "residual" in inverse.stats or "converged" in inverse.stats:
        eye = torch.eye(SPACE.dim, dtype=torch.float64)
        left = got @ (POSITIVE.matrix + 0.1 * eye) - rows.flat()
        worst = float((left.norm(dim=1) / rows.flat().norm(dim=1)).max())
        told = float(inverse.stats.get("residual", TIGHT))
        require(worst <= 2 * told + 1e-11, f"the residual is {worst:.3e}, stats say {told:.3e}")


@law("solver", _needs_given)
def float32_apply_is_close(bench: SolverBench) -> None:
    """apply of rows in float32 is float32, = apply in float64 to the tolerance of float32."""
    rows = toy_rows(4)
    tolerance = {"tolerance": 1e-5} if hasattr(bench.part, "tolerance") else {}
    solver: Any = attrs.evolve(bench.part, damping=DAMPING, **tolerance)
    inverse = _whole(solver.solve_for(POSITIVE, CPU))
    low, high = inverse.apply(rows.to(dtype=torch.float32)), bench.inverse().apply(rows)
    require_close(low.flat().double(), high.flat(), "float32 apply", 2e-3)
    require_dtype(low.dtype, torch.float32, "apply")
    require_dtype(high.dtype, torch.float64, "apply")


@law("solver", _needs_given)
def device_does_not_show(bench: SolverBench) -> None:
    """A g on an accelerator, pretended where there is none, = A g on the CPU."""
    device, rows = accelerator(), toy_rows(4)
    for operator in (POSITIVE, BLOCKS):
        far = ToyOperator(SPACE, operator.matrix.to(device))
        got = bench.inverse(far).apply(rows.to(device)).flat()
        require_close(got.cpu(), bench.inverse(operator).apply(rows).flat(), f"A on {device}", 1e-6)
