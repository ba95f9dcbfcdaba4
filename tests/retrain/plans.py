"""Train sets to ask for, and rows to compare."""

from __future__ import annotations

import numpy as np
from toys import N

from dattri_core import Counterfactual


def subsets(count, n=N, seed=0):
    """Return train sets that begin with the same ones whatever the count; the seeds are 0 to 2."""
    random = np.random.default_rng(seed)
    masks = random.random((count, n)) < 0.5
    masks[:, 0] = True
    return [Counterfactual(mask, k % 3) for k, mask in enumerate(masks)]


def same(left, right):
    """Return whether two stores hold the same rows, bit for bit."""
    return (
        np.array_equal(left.masks, right.masks)
        and np.array_equal(left.seeds, right.seeds)
        and all(np.array_equal(left.outcomes[t], right.outcomes[t]) for t in right.outcomes)
    )
