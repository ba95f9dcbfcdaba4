"""Data Value Embedding: influence of the examples of each step through all later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.projectors.identity import Identity
from dattri_parts.sources.per_example import PerExample

from dattri_core import (
    Curvature,
    Projector,
    Scores,
    Source,
    Task,
    exactly,
)
from dattri_unroll.backward import Backward
from dattri_unroll.points import Points
from dattri_unroll.steps import Steps
from dattri_unroll.walk import epochs_of, scores_of


@frozen
class DataValueEmbedding:
    """S_ij = n sum_{s: i in B_s} (eta_s / |B_s|) <g_i(theta_s), psi_sj>, psi from the end back.

    A run of gradient descent took the steps theta_(s+1) = theta_s - eta_s (1/|B_s| sum_{i in B_s}
    g_i(theta_s) + weight_decay theta_s). Without example i in step s the weights would end, to
    first order, prod_{k > s} ((1 - eta_k weight_decay) I - eta_k H_k) (eta_s / |B_s|) g_i(theta_s)
    from where they did, H_k the curvature of the step's own batch. The product is taken from the
    left: psi_(T-1)j = h_j(theta_T), psi_(s-1)j = ((1 - eta_s weight_decay) I - eta_s H_s) psi_sj,
    so that no matrix is formed, and only the rows of the batch are evaluated at each step. Of a run
    with momentum, Nesterov's too, the velocity is carried back beside psi, of Adam both moments,
    and clipped gradients are followed: see `Backward`.

    ``removal_effect()``, S / n, is the predicted change of the test loss of this one run, its order
    and its batches, were i left out wherever it occurred and the sums still divided by |B_s|. An
    example that no step saw scores 0. Not the effect on another run.

    Source: Wang et al. 2024, Capturing the Temporal Dependence of Training Data Influence (arXiv
    2412.09538), who approximate H_k by the outer products of the batch's gradients, the default;
    with the curvature ``"hessian"``, the method ``"magic"``, it is exact unrolled differentiation
    of the run (Hara et al. 2019, Data Cleansing for Models Trained with SGD, arXiv 1906.08473;
    Ilyas and Engstrom 2025, MAGIC, arXiv 2504.16430).

    Args:
        source: Gives the gradients.
        projector: Sketches rows of all steps by one map; the recursion then runs in the sketch.
        curvature: H_k, fitted on the batch of step k.
        tolerance: By how much, relative to its length, a recorded step may differ from the one that
            the mean gradient of the loss gives, before the run is refused.
        seed: Of the projector, and of labels that a curvature draws.
    """

    reads: ClassVar[str] = "steps"
    source: Source = field(factory=PerExample)
    projector: Projector = field(factory=Identity)
    curvature: Curvature = field(factory=GaussNewton)
    tolerance: float = 0.01
    seed: int = 0

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
            task: Its checkpoints are a recorded run, ``dattri_unroll.read_run(folder)``.
            train: The train set, in the order in which the positions of the run count.
            test: The test set.
            memory: Budget such as ``"16GiB"``; default half of what is free. Test examples that do
                not fit at once cost another pass over the run.
            out: Folder to write the scores to as they are made.
            progress: Show a bar; default only on a terminal.
            dry_run: Only say, as text, how often the run is gone through.

        Raises:
            SpecError: Parts do not fit each other, or the checkpoints are no recorded run.
            InputError: A recorded step is not that of its optimiser on its batch.
            NumericsError: The carried rows grow beyond all numbers.
        """
        walk = self._walk(task, train, test, memory)
        return scores_of(self, walk, out, progress, dry_run=dry_run)

    @exactly
    def by_epoch(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        memory: str | int | None = None,
        progress: bool | None = None,
    ) -> dict[int, Scores]:
        """Return what the steps of each recorded epoch contribute; the sum is `attribute`.

        The arguments and errors are those of `attribute`.

        Returns:
            By epoch, in order, scores ``[n_train, n_test]``.
        """
        walk = self._walk(task, train, test, memory)
        return epochs_of(self, walk, walk.steps.epochs, progress)

    def _walk(self, task: Task, train: Any, test: Any, memory: str | int | None) -> Backward:
        points = Points.of(self, "dvemb", "apply", task, train, test, memory)
        return Backward(Steps(points, self.tolerance))
