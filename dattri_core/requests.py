"""What is asked of a fitted method: which test sides, and what the scores are told apart by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import SpecError
from dattri_core.ids import Id
from dattri_core.loop import By
from dattri_core.pairing import WHOLE
from dattri_core.snapshot import Fitted
from dattri_core.stream import Examples
from dattri_core.task import Task

SUM = ("sum",)
"""The id of the one column of a sum over the test set."""
NAMES: tuple[By, ...] = ("block", "checkpoint")


@frozen
class Request:
    """One call of `FittedMethod.attribute` or `sweep`.

    Args:
        methods: The method; or those of a sweep, which differ in one damping.
        by: What the scores are told apart by.
        group: Whether there is one column, for the sum over the test set.
    """

    methods: tuple[Any, ...]
    by: By | None = None
    group: bool = field(default=False)

    @group.validator
    def _is_one_or_none(self, attribute: Any, value: Any) -> None:
        if not isinstance(value, bool):
            raise SpecError(
                f"attribute: group={value!r}; expected True, for one column that is the sum over "
                "the test set, or False; for a column each of several groups, add up the scores: "
                "torch.stack([scores.values[:, group == g].sum(1) for g in labels], 1), which is "
                "the same for a scorer that is a plain inner product"
            )

    def check(self, task: Task, out: str | Path | None) -> None:
        """Raise `SpecError` for what cannot be answered, before any work."""
        if self.group and self.methods[0].scorer.locality == "column":
            raise SpecError(
                "attribute: group=True adds up the rows of the test set, and what the scorer "
                f"{type(self.methods[0].scorer).__name__} makes of a whole column is no sum over "
                "them; take the mean of the scores instead: scores.values.mean(1)"
            )
        if self.by is None:
            return
        if self.by not in NAMES:
            raise SpecError(f"attribute: by={self.by!r}; expected one of {list(NAMES)}, or None")
        if out is not None:
            raise SpecError(
                f"attribute: by={self.by!r} keeps its scores in memory; leave out= away and save "
                "each: for name, scores in parts.items(): scores.save(folder / name)"
            )
        if self.by == "block" and self.methods[0].scorer.locality == "column":
            raise SpecError(
                "attribute: by='block' needs scores that add up over blocks, and the scorer "
                f"{type(self.methods[0].scorer).__name__} sees whole columns at once; use 'dot' or "
                "'cosine'"
            )

    def blocks(self, fitted: Fitted) -> tuple[str, ...]:
        """Return the names of the blocks that scores are told apart by, none where they are not.

        Raises:
            SpecError: A stage mixes the blocks of train rows.
        """
        if self.by != "block":
            return ()
        row = fitted.outline.after
        if row is None:
            raise SpecError(
                "attribute: by='block' needs rows that keep their blocks, and a stage of this "
                "method mixes them (a flat sketch, or an inverse that leaves a few numbers of each "
                "row); leave that stage out, or use one that acts block by block"
            )
        return row.space.names

    def counts(self, fitted: Fitted, checkpoints: Sequence[Checkpoint]) -> tuple[int, int]:
        """Return how many test sides there are, and how many totals of a pair of rows are kept."""
        variants = len(self.methods)
        by = {"block": len(self.blocks(fitted)), "checkpoint": len(checkpoints), None: 1}
        return variants, variants * by[self.by]

    def names(self, fitted: Fitted, checkpoints: Sequence[Checkpoint]) -> Sequence[str]:
        """Return a name for each result, in order."""
        if self.by == "block":
            return self.blocks(fitted)
        if self.by == "checkpoint":
            names = [checkpoint.name for checkpoint in checkpoints]
            twice = {name for name in names if names.count(name) > 1}
            return [f"{n} ({at})" if n in twice else n for at, n in enumerate(names)]
        return (WHOLE,) if len(self.methods) == 1 else [str(at) for at in range(len(self.methods))]

    def test_ids(self, test: Examples) -> Sequence[Id]:
        """Return an id for each column."""
        return SUM if self.group else test.ids

    def facts(self, at: int, name: str) -> dict[str, Any]:
        """Return what the provenance of one result says besides that of the run."""
        if self.by is not None:
            return {"by": {self.by: name}}
        return {"method": self.methods[at].to_spec()}
