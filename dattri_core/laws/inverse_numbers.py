"""Laws of whole inverse Hessians: symmetry, damping, scale, and what they report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from dattri_core.capabilities import ReducedInverse
from dattri_core.dampings import damping_path, redamped
from dattri_core.laws.curvatures import NAMES
from dattri_core.laws.inverses import InverseBench
from dattri_core.laws.law import law, require, require_close
from dattri_core.laws.problems import DenseProblem
from dattri_core.laws.untouched import require_dtype
from dattri_core.laws.worlds import World
from dattri_core.protocols import Damping, Inverse

LARGE = 1e8
"""A damping beside which the curvature of the toy worlds is nothing."""
CLOSE = 1e-4
"""Largest relative difference of an exact inverse, iterative ones at their own tolerance."""
FLOAT32 = 2e-2
"""Largest relative difference of an inverse that is fitted in float32."""


def fitted(bench: InverseBench) -> str | None:
    """Return why there is no curvature to invert, None where there is."""
    return None if bench.part.needs else "it is fitted on nothing: it inverts no curvature"


def damped(bench: InverseBench) -> str | None:
    """Return why a part cannot be made at another damping, None where it can."""
    return None if damping_path(bench.part) else "it has no field that is a Damping"


def _exact(bench: InverseBench) -> str | None:
    part: Any = bench.part
    if not getattr(part, "exact", False):
        return "it does not declare that it is exact"
    return None if _named(part) else f"needs {sorted(part.needs)} name no dense oracle"


def _named(part: Any) -> str | None:
    found = {"rows" if need == "rows" else NAMES.get(need) for need in part.needs}
    return found.pop() if len(found) == 1 else None


def _of_whole_data(bench: InverseBench) -> str | None:
    if any("sampled" in getattr(part, "needs", ()) for part in _parts(bench.part)):
        return "it samples train examples: symmetric in the mean over samples only"
    return None


def _parts(part: Any) -> Iterator[Any]:
    """Yield a part and all parts that it is made of."""
    yield part
    for field in attrs.fields(type(part)) if attrs.has(type(part)) else ():
        yield from _parts(getattr(part, field.name))


def wholes(bench: InverseBench) -> Iterator[tuple[World, DenseProblem, Inverse]]:
    """Yield the worlds where an inverse gives whole rows, with the inverse."""
    for world, problem in bench.places():
        inverse = bench.brief.fit(problem)
        if not isinstance(inverse, ReducedInverse) or inverse.train_map is None:
            yield world, problem, inverse


def at_damping(bench: InverseBench, problem: DenseProblem, damping: Damping) -> Inverse:
    """Return the part fitted at another damping, from the start where it has a field for it."""
    if damping_path(bench.part) is None:
        return bench.brief.fit(problem).with_damping(damping)
    (part,) = redamped([bench.brief], damping)
    assert isinstance(part, type(bench.part))
    return part.fit(problem)


@law("inverse_hessian", _of_whole_data)
def inverse_is_symmetric(bench: InverseBench) -> None:
    """<A g, k> = <g, A k>."""
    for world, problem, inverse in wholes(bench):
        rows = problem.train_rows
        left, right = rows.take(slice(0, 4)), rows.take(slice(4, 8))
        one = inverse.apply(left).flat() @ right.flat().T
        other = left.flat() @ inverse.apply(right).flat().T
        require_close(other, one, f"<g, A k> in {world.name}", 1e-5)


@law("inverse_hessian", fitted, _exact)
def inverse_is_exact(bench: InverseBench) -> None:
    """(H + damping I) A g = g where it is exact: H the Hessian, the GGN, or the mean of g g^T."""
    name = _named(bench.part)
    for world, problem, inverse in wholes(bench):
        rows, flat = problem.train_rows, problem.train_rows.flat()
        matrix = flat.T @ flat / len(flat)
        for kind in ("hessian", "ggn"):
            matrix = problem.matrices[kind] if kind == name else matrix
        damping = 0.7 + max(0.0, -float(torch.linalg.eigvalsh(matrix)[0]))
        damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
        want = torch.linalg.solve(damped, flat.T).T
        got = inverse.with_damping(Damping(damping)).apply(rows).flat()
        require_close(got, want, f"A g against a dense solve in {world.name}", CLOSE)


@law("inverse_hessian", fitted, damped)
def damping_can_change(bench: InverseBench) -> None:
    """with_damping(d).apply = apply of a fresh fit at d."""
    for world, problem in bench.places():
        rows = problem.train_rows
        for damping in (Damping(0.7), Damping(20.0)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = bench.brief.fit(problem).with_damping(damping).apply(rows).flat()
                want = at_damping(bench, problem, damping).apply(rows).flat()
            require_close(got, want, f"A at {damping} in {world.name}", CLOSE)


@law("inverse_hessian", fitted)
def damping_wins_in_the_end(bench: InverseBench) -> None:
    """damping A g -> g as damping -> infinity."""
    for world, problem, _ in wholes(bench):
        rows = problem.train_rows
        got = LARGE * at_damping(bench, problem, Damping(LARGE)).apply(rows).flat()
        require_close(got, rows.flat(), f"damping times A g in {world.name}", CLOSE)


@law("inverse_hessian")
def zero_stays_zero(bench: InverseBench) -> None:
    """A 0 = 0, beside rows that are not 0."""
    for world, problem in bench.places():
        weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        rows = problem.train_rows.take(slice(0, 3)).scale(weights)
        got: Tensor = bench.brief.fit(problem).apply(rows).flat()
        require(
            bool(torch.isfinite(got).all()), f"A of rows beside a 0 in {world.name}: not finite"
        )
        largest = float(got[1].abs().max())
        require(largest == 0, f"A of a row that is 0 in {world.name}: {largest:.3e}")


@law("inverse_hessian")
def stats_are_finite(bench: InverseBench) -> None:
    """stats are finite numbers, after a fit and after apply."""
    for place, (world, problem) in enumerate(bench.places()):
        inverse = (bench.brief if place else bench.part).fit(problem)
        told = [dict(inverse.stats)]
        inverse.apply(problem.train_rows)
        for stats in (*told, inverse.stats):
            for key, number in stats.items():
                what = f"stats[{key!r}] in {world.name}"
                require(isinstance(number, (int, float)), f"{what} is a {type(number).__name__}")
                require(math.isfinite(number), f"{what} is {number}")


@law("inverse_hessian")
def float32_apply_is_close(bench: InverseBench) -> None:
    """A g fitted on rows in float32 = A g to the tolerance of float32, and is of g's dtype."""
    for world, problem in bench.places():
        damping = Damping(0.7)
        high, low = (bench.brief.fit(p).with_damping(damping) for p in (problem, problem.low))
        want = high.apply(problem.train_rows).flat()
        for inverse, name in ((low, "float32"), (high, "float64")):
            for dtype in (torch.float32, torch.float64):
                got = inverse.apply(problem.train_rows.to(dtype=dtype))
                what = f"A g, fitted in {name}, in {world.name}"
                require_dtype(got.dtype, dtype, what)
                require_close(got.flat().double(), want, what, FLOAT32)
