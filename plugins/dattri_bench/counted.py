"""How many models a metric asks for, and how many of them had to be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import define

from dattri_core import Counterfactual, Evidence, Outcomes

Array = np.ndarray[Any, Any]


@define(eq=False)
class _Counted:
    """Outcomes that count what is asked of them."""

    inner: Outcomes
    asked: int = 0
    trained: int | None = 0

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return what these models give."""
        self.asked += len(counterfactuals)
        missing = getattr(self.inner, "missing", None)  # of stores that can tell
        if missing is None:
            self.trained = None
        elif self.trained is not None:
            self.trained += len(missing(counterfactuals))
        return self.inner.outcomes(counterfactuals, target)


def counted(evidence: Evidence) -> tuple[Evidence, Callable[[], dict[str, int | None] | None]]:
    """Return evidence whose outcomes count, and what they counted so far: asked and trained.

    ``trained`` is None where the store cannot tell; the whole is None where there are no outcomes.
    """
    if evidence.outcomes is None:
        return evidence, lambda: None
    counting = _Counted(evidence.outcomes)
    return (
        attrs.evolve(evidence, outcomes=counting),
        lambda: {"asked": counting.asked, "trained": counting.trained},
    )
