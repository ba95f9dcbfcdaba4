"""Laws of what is kept: a fit that is read back is the fit, at any damping."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import define, frozen
from torch import Tensor

from dattri_core import assemble, describe
from dattri_core.laws.curvatures import CurvatureBench
from dattri_core.laws.forwarding import standing_before
from dattri_core.laws.law import law, require_close
from dattri_core.laws.solvers import DAMPING, POSITIVE, SolverBench
from dattri_core.laws.spaces import GIVEN, toy_rows
from dattri_core.protocols import Damping

OTHER = Damping(0.4)


@define(eq=False)
class Keeper:
    """Keeps in memory what `kept` keeps on disk: by name and by what the part says of itself."""

    held: dict[str, dict[str, Tensor]] = attrs.field(factory=dict)

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return copies, as a file gives them."""
        key = json.dumps([name, describe.plain(part, assemble.describe_nested)], sort_keys=True)
        if key not in self.held:
            self.held[key] = {at: t.detach().contiguous().clone() for at, t in make().items()}
        return {at: t.clone() for at, t in self.held[key].items()}


@frozen(eq=False)
class Keeping:
    """A problem or an operator whose fits are kept; all else is that of the inner one."""

    inner: Any
    keeper: Keeper

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return what a part computes, from the keeper."""
        return self.keeper.kept(name, part, make)

    def __new__(cls, inner: Any, keeper: Keeper) -> Keeping:
        """Return one that shows all members of the inner one."""
        return standing_before(cls, inner, "inner")


@law("curvature")
def kept_fit_is_the_fit(bench: CurvatureBench) -> None:
    """H from what `kept` gives back = H of the fit that kept it = H without keeping."""
    for world, problem in bench.places():
        keeping: Any = Keeping(problem, Keeper())
        first, again = bench.matrix(keeping), bench.matrix(keeping)
        require_close(first, bench.matrix(problem), f"H of a fit that is kept in {world.name}")
        require_close(again, first, f"H of a kept fit that is read in {world.name}")


def _needs_given(bench: SolverBench) -> str | None:
    missing = bench.part.needs - GIVEN
    return f"needs {sorted(missing)}, which no toy operator gives" if missing else None


@law("solver", _needs_given)
def kept_solve_is_the_solve(bench: SolverBench) -> None:
    """apply from what `kept` gives back = apply without keeping, at this and another damping."""
    keeping: Any = Keeping(POSITIVE, Keeper())
    rows = toy_rows(4)
    for damping in (DAMPING, DAMPING, OTHER, Damping(0.2, relative=True)):
        got = bench.inverse(keeping, damping).apply(rows).flat()
        want = bench.inverse(POSITIVE, damping).apply(rows).flat()
        require_close(got, want, f"apply of a kept solve at {damping}")
