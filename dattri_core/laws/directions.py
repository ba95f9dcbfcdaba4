"""Laws of directions: what is fitted on a train set feels where its rows point, not how long."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

from torch import Tensor

from dattri_core.capabilities import ReducedInverse
from dattri_core.errors import SpecError
from dattri_core.laws.curvatures import CurvatureBench
from dattri_core.laws.inverse_numbers import at_damping, fitted
from dattri_core.laws.inverses import InverseBench
from dattri_core.laws.law import NotApplicable, law, require
from dattri_core.laws.problems import DenseProblem, problem_of
from dattri_core.laws.worlds import APART, apart
from dattri_core.protocols import Damping
from dattri_core.rows import Rows

SHARE = 0.3
"""The damping, in mean squared entries of a row."""
LEAST = 0.1
"""How far below 1 a ratio has to be: the coarsest sound parts are at 0.7, exact ones at 0.02."""


@cache
def halves() -> tuple[DenseProblem, DenseProblem]:
    """Return two train sets, rows of which lie in one of two layers each."""
    world, middle = apart(), APART // 2
    one, two = tuple(range(middle)), tuple(range(middle, APART))
    return problem_of(world, one), problem_of(world, two)


def _sums(measured: Callable[[DenseProblem, Rows], Tensor]) -> list[list[float]]:
    """Return F_ab, sums over the rows of train set b of what is fitted on train set a."""
    sides = halves()
    return [[float(measured(one, two.train_rows).sum()) for two in sides] for one in sides]


def _require_felt(found: list[list[float]], of: str) -> None:
    """Raise `LawBroken` unless F feels the rows that it is fitted on otherwise than the others.

    Args:
        found: F_ab.
        of: What F is of: A, which is small along the train set, or H, which is large there.
    """
    (own, other), (another, its) = found
    above, below, name = own * its, other * another, "F_11 F_22 / (F_12 F_21)"
    if of == "H":
        above, below, name = below, above, "F_12 F_21 / (F_11 F_22)"
    ratio = above / below if below else 1.0
    numbers = "; ".join(", ".join(f"{number:.4g}" for number in row) for row in found)
    require(
        ratio < 1 - LEAST,
        f"{name} is {ratio:.4f}, expected less than {1 - LEAST}, for F = [{numbers}], sums of "
        f"<g, {of} g> by the train set of {of} and that of g: it is 1 for any multiple of one "
        "matrix, such as the identity, however long the rows are; fit where the rows point",
    )


@law("inverse_hessian", fitted)
def inverse_is_of_the_train_set(bench: InverseBench) -> None:
    """F_11 F_22 < F_12 F_21 for F_ab = sum <g, A g>, A fitted on train set a, g the rows of b."""
    try:
        bench.part.check(halves()[0].space)
    except SpecError as error:
        raise NotApplicable(f"it does not take the world of two layers: {error}") from None

    def measured(problem: DenseProblem, rows: Rows) -> Tensor:
        size = float(problem.train_rows.flat().square().mean())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inverse = at_damping(bench, problem, Damping(SHARE * size))
            turned = inverse.apply(rows).flat()
            sides = inverse.train_map if isinstance(inverse, ReducedInverse) else None
        return (turned * (rows if sides is None else sides.map(rows)).flat()).sum(1)

    _require_felt(_sums(measured), "A")


@law("curvature")
def operator_is_of_the_train_set(bench: CurvatureBench) -> None:
    """F_11 F_22 > F_12 F_21 for F_ab = sum <g, H g>, H fitted on train set a, g the rows of b."""
    try:
        bench.part.gives(halves()[0].space)
    except SpecError as error:
        raise NotApplicable(f"it does not take the world of two layers: {error}") from None

    def measured(problem: DenseProblem, rows: Rows) -> Tensor:
        flat = rows.flat()
        return (flat @ bench.matrix(problem) * flat).sum(1)

    _require_felt(_sums(measured), "H")
