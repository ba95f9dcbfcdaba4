"""A pool: examples scored by a checkpoint that was fitted on other ones."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from dattri_core import assemble
from dattri_core.activations import measured_sizes, tensors_made, total_bytes
from dattri_core.capabilities import Outlook, TermScorer
from dattri_core.errors import SpecError
from dattri_core.evaluate import Evaluator
from dattri_core.projected import Projected
from dattri_core.protocols import BoundSource
from dattri_core.routes import gradient_work
from dattri_core.snapshot import Fitted, passing, sampled_rows
from dattri_core.stored import Stored
from dattri_core.stream import Examples


def require_poolable(method: Any) -> None:
    """Raise `SpecError` where no example but those of the fit has a score."""
    scorer = method.scorer
    if isinstance(scorer, TermScorer) and scorer.terms:
        raise SpecError(
            f"over: the scores of the scorer {assemble.name_of(scorer)!r} are the terms of a sum "
            "over the train set that was fitted on, and no other example has one; fit the method "
            "on the pool, or give another scorer first: fitted.with_(scorer='dot').over(pool)"
        )


def of_pool(fitted: Fitted, pool: Examples, device: torch.device) -> Fitted:
    """Return a fitted checkpoint with a pool in the place of its train set.

    Maps and inverses are those of the fit. Rows of the pool are computed, since those that are kept
    are of the fit's own examples, and so are numbers that an inverse knows of each of its rows.

    Args:
        fitted: Of its own train set.
        pool: The examples to be scored.
        device: Of the task.

    Raises:
        InputError: The source or the loss does not take examples of the pool.
    """
    source: BoundSource = fitted.chain.source
    source = source.projected if isinstance(source, Stored) else source
    bound = source.source if isinstance(source, Projected) else source
    sample, raw = sampled_rows(bound, pool, device)
    evaluator = getattr(bound, "evaluator", None)
    sizes = measured_sizes(evaluator, sample) if isinstance(evaluator, Evaluator) else ()
    kept = total_bytes(sizes) if isinstance(evaluator, Evaluator) else 0
    rows = source.mapped(raw) if isinstance(source, Projected) else raw
    activations = passing(source, raw, kept)
    outline = fitted.outline
    told = f"pool              {len(pool)} examples in place of the train set, rows computed"
    return attrs.evolve(
        fitted,
        chain=attrs.evolve(fitted.chain, source=source, own=False),
        outline=attrs.evolve(
            outline,
            steps=tuple(
                attrs.evolve(step, leverages=False) if isinstance(step, Outlook) else step
                for step in outline.steps
            ),
            row=rows.take(slice(0, 1)),
            activations=max(activations, outline.activations),
            work=gradient_work(raw),
            tensors=tensors_made(raw, sizes),
            said=(told, *outline.said),
        ),
        train=pool,
    )
