"""The law of pools: a fitted method scores other examples as it scores its own."""

from __future__ import annotations

import warnings

import torch

from dattri_core.batch import take
from dattri_core.capabilities import TermScorer
from dattri_core.errors import ConvergenceWarning
from dattri_core.laws.law import NotApplicable, law, require_close
from dattri_core.laws.methods import ITERATIVE, MethodBench, tensor


def _pools(bench: MethodBench) -> str | None:
    if not hasattr(bench.part, "fit"):
        return "it cannot be fitted apart from a test set"
    scorer = bench.part.scorer
    terms = isinstance(scorer, TermScorer) and scorer.terms
    return "its scores are the terms of a sum over the train set" if terms else None


@law("method", _pools)
def a_pool_is_scored_by_the_fit(bench: MethodBench) -> None:
    """S of fit(train).over(pool) = S of fit(train), in the rows of the pool."""
    order = torch.tensor([7, 2, 3, 2])
    for world in bench.worlds():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = bench.tight.fit(bench.task(world), world.train, progress=False)
            if not hasattr(fitted, "over"):
                raise NotApplicable("what its fit gives has no over(pool)")
            want = tensor(fitted.attribute(world.test))
            got = tensor(fitted.over(world.train).attribute(world.test))
            require_close(got, want, f"scores over the train set in {world.name}", ITERATIVE)
            if bench.part.scorer.locality == "column":  # fewer examples are another game
                continue
            some = fitted.over(take(world.train, order)).attribute(world.test)
            require_close(tensor(some), want[order], f"over some of it in {world.name}", ITERATIVE)
