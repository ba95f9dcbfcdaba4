"""SOURCE: influence along a run from a few of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen, validators
from dattri_parts.curvatures.ekfac import EKFAC
from dattri_parts.projectors.identity import Identity
from dattri_parts.sources.per_example import PerExample

from dattri_core import Curvature, Projector, Source, Task, exactly
from dattri_unroll.points import Points
from dattri_unroll.segments import Segments
from dattri_unroll.walk import scores_of


@frozen
class ApproximateUnrolling:
    """S_ij = sum_l <mean_c g_i, (I - exp(-t_l A_l)) A_l^-1 psi_l>, psi_(l-1) = exp(-t_l A_l) psi_l.

    A run of gradient descent is cut into segments l = 1..L in which curvature and gradients are
    taken as constant: A_l = H_l + weight_decay I with H_l the mean over the checkpoints c of the
    segment, as is g_i, and t_l the sum of the learning rates of its steps. psi_L = h_j at the last
    checkpoint. As t grows over one segment this is the influence function (A^-1); for short
    segments, and t small, TracIn. ``removal_effect()`` is S / n.

    Checkpoints stand for equal shares of the run. The last one is its end, where test rows are
    taken. Batches are not needed: every train example is taken to have been seen as often.

    Source: Bae et al. 2024, Training Data Attribution via Approximate Unrolled Differentiation
    (arXiv 2405.12186); EK-FAC of the checkpoints of a segment together, as there. With momentum m a
    learning rate is eta / (1 - m), which a recorded run says by itself.

    Args:
        source: Gives the gradients.
        projector: Sketches rows of all checkpoints by one map.
        curvature: H_l, one that knows its eigenvectors.
        segments: L.
        iterations: Steps of the whole run; None: of a recorded run, one for each checkpoint.
        weight_decay: Of the run; None: as recorded, 0 where nothing was.
        seed: Of the projector, and of labels that the curvature draws.
    """

    reads: ClassVar[str] = "trajectory"
    source: Source = field(factory=PerExample)
    projector: Projector = field(factory=Identity)
    curvature: Curvature = field(factory=EKFAC)
    segments: int = field(default=1, validator=validators.ge(1))
    iterations: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    weight_decay: float | None = field(
        default=None, validator=validators.optional(validators.ge(0))
    )
    seed: int = 0

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws do not hold, and why."""
        if "fisher-rows" not in self.curvature.needs:
            return {}
        law = "permuted-train-rows-permute-scores"
        return {law: "the labels of its curvature are drawn by the place of an example"}

    @exactly
    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        memory: str | int | None = None,
        out: str | Path | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
    ) -> Any:
        """Return the scores ``[n_train, n_test]``.

        Args:
            task: Its checkpoints, with learning rates, are points of the run in order.
            train: The train set.
            test: The test set.
            memory: Budget such as ``"16GiB"``; default half of what is free. Test examples that do
                not fit at once cost another pass over the run.
            out: Folder to write the scores to as they are made.
            progress: Show a bar; default only on a terminal.
            dry_run: Only say, as text, how often the run is gone through.

        Raises:
            SpecError: Parts do not fit each other, or the run is not known well enough.
            NumericsError: The carried rows grow beyond all numbers.
        """
        points = Points.of(self, "source", "spectral", task, train, test, memory)
        walk = Segments(points, self.segments, self.iterations, self.weight_decay)
        return scores_of(self, walk, out, progress, dry_run=dry_run)
