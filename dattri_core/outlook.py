"""What is known of an inverse before it is applied, and of an inverse Hessian before the fit."""

from __future__ import annotations

import attrs

from dattri_core.capabilities import (
    InverseRoot,
    LeverageInverse,
    Outlook,
    SpectralInverse,
    SplitInverse,
)
from dattri_core.protocols import Inverse, InverseHessian, LinearMap, Problem
from dattri_core.space import Space
from dattri_core.stages import Stage, Step, is_inverse, is_two_sided, space_after


def outlook_of(stage: Stage, step: Step, space: Space) -> LinearMap | Outlook:
    """Return a fitted map as it is, and what is known of a fitted inverse.

    Args:
        stage: Whose step it is.
        step: Fitted.
        space: Before it.
    """
    if not is_inverse(step):
        assert isinstance(step, LinearMap)
        return step
    assert isinstance(stage, InverseHessian)
    return Outlook(
        blockwise=step.blockwise,
        damped=bool(stage.needs),
        forms=bool(stage.needs) and getattr(step, "forms", True),
        rank=getattr(step, "row_rank", None),
        splits=_splits(step, space),
        spectral=isinstance(step, SpectralInverse) and step.spectrum is not None,
        reduced=_reduced(stage, space),
        two_sided=isinstance(step, InverseRoot),
        base=getattr(step, "base", 0),
        beside=getattr(step, "beside", 3),
        held=getattr(step, "held", 0),
        leverages=isinstance(step, LeverageInverse) and step.leverages,
    )


def outlook_before_fit(stage: InverseHessian, space: Space, problem: Problem) -> Outlook:
    """Return what an inverse Hessian says of its inverse, ``stage.foresee(problem)``, if it does.

    Or ``stage.outlook(space)``, where nothing depends on the train set. One that says nothing is
    taken to need whole rows and to form them: the most that it can cost.
    """
    told = Outlook(blockwise=not stage.needs)
    if hasattr(stage, "foresee"):
        told = stage.foresee(problem)
    elif hasattr(stage, "outlook"):
        told = stage.outlook(space)
    return attrs.evolve(
        told,
        damped=bool(stage.needs),
        forms=bool(stage.needs) and told.forms,
        reduced=_reduced(stage, space),
        two_sided=is_two_sided(stage),
    )


def _splits(step: Inverse, space: Space) -> bool:
    """Whether both sides may carry half of an inverse, and rows are no larger in its basis."""
    basis = step.basis if isinstance(step, SplitInverse) else None
    if basis is None:
        return False
    pairs = zip(space, basis.out_space, strict=True)
    return all((a.kind, a.size) == (b.kind, b.size) for a, b in pairs)


def _reduced(stage: InverseHessian, space: Space) -> Space | None:
    after = space_after(stage, space)
    return None if after == space else after
