"""What is known of an inverse before it is applied, and of an inverse Hessian before the fit."""

from __future__ import annotations

import attrs
from attrs import frozen

from dattri_core.capabilities import InverseRoot, SplitInverse
from dattri_core.protocols import InverseHessian, LinearMap
from dattri_core.space import Space
from dattri_core.stages import CurvatureInverse, Stage, Step, is_inverse, space_after


@frozen
class Outlook:
    """What a plan may know of the inverse in a chain, without applying it.

    Args:
        blockwise: See `Inverse.blockwise`.
        forms: Whether rows come out formed, and not as the factors that they were.
        rank: Largest number of outer products of a row that comes out, where it is bounded.
        splits: Whether it is a `SplitInverse` that can be split.
        reduced: The space of rows after it, where it leaves a few numbers of each.
        two_sided: Whether train rows pass it too, as its root.
    """

    blockwise: bool = False
    forms: bool = True
    rank: int | None = None
    splits: bool = False
    reduced: Space | None = None
    two_sided: bool = False


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
        forms=bool(stage.needs),
        rank=getattr(step, "rank", None),
        splits=isinstance(step, SplitInverse) and step.basis is not None,
        reduced=_reduced(stage, space),
        two_sided=isinstance(step, InverseRoot),
    )


def outlook_before_fit(stage: InverseHessian, space: Space) -> Outlook:
    """Return what an inverse Hessian says of its inverse, ``stage.outlook``, where it says it.

    One that says nothing is taken to need whole rows and to form them: the most that it can cost.
    """
    told: Outlook = getattr(stage, "outlook", Outlook(blockwise=not stage.needs))
    two_sided = isinstance(stage, CurvatureInverse) and stage.form == "two-sided"
    return attrs.evolve(
        told, forms=bool(stage.needs), reduced=_reduced(stage, space), two_sided=two_sided
    )


def _reduced(stage: InverseHessian, space: Space) -> Space | None:
    after = space_after(stage, space)
    return None if after == space else after
