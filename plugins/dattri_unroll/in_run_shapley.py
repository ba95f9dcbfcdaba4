"""In-Run Data Shapley: how the change of a target over a run is shared by what its steps saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen
from dattri_parts.projectors.identity import Identity
from dattri_parts.sources.per_example import PerExample

from dattri_core import Curvature, Projector, Scores, Source, Task, exactly
from dattri_unroll.in_run import InRun
from dattri_unroll.points import Points
from dattri_unroll.steps import Steps
from dattri_unroll.walk import epochs_of, scores_of


@frozen
class InRunShapley:
    """S_ij = sum_{s: i in B_s} (eta_s / |B_s|) <g_i(theta_s), h_sj - H_sj delta_s / 2>.

    Step s of a run of gradient descent moved the weights by -delta_s, delta_s = theta_s -
    theta_(s+1) = (eta_s / |B_s|) sum_{i in B_s} g_i(theta_s). To second order that lowered the loss
    of test example j by <h_sj, delta_s> - delta_s^T H_sj delta_s / 2, h_sj and H_sj its gradient
    and curvature at theta_s. Had a part of the batch alone moved the weights, delta_s would be the
    sum over that part. This is a game of the examples of the batch, and S_ij the sum over all steps
    of the Shapley values in it, in closed form: the cross terms of two gradients are shared by
    halves. The default is the first order, without H.

    Scores are values, in the unit of the target: those of all train examples add up to what the
    Taylor expansion says the run lowered the loss by. They are no effects of a removal
    (`Scores.removal_effect`): that later steps would have been others does not count, which
    ``dvemb`` follows. An example that no step saw scores 0.

    The published method is that of plain SGD. With weight decay, which moved the weights too, the
    decay is one more player in each step; its value is the rest of the sum. With momentum a
    gradient is in the velocity of later steps, and is a player in each of them, with its weight in
    that step: S_ij = sum_{s: i in B_s} <g_i(theta_s), sum_{t >= s} (w_st / |B_s|) c_tj>, c_tj =
    h_tj - H_tj delta_t / 2, delta_t = sum_{s <= t} w_st (1/|B_s| sum_{i in B_s} g_i(theta_s) +
    weight_decay theta_s).

    Source: Wang et al. 2024, Data Shapley in One Training Run (arXiv 2406.11011), whose utility is
    the change of the loss, so that S is minus theirs.

    Args:
        source: Gives the gradients.
        projector: Sketches rows of all steps by one map; the game is then played in the sketch.
        curvature: H_sj, of the target of one test example: ``"hessian"``, the second order as
            published, or ``"ggn"``. None: the first order.
        tolerance: By how much, relative to its length, a recorded step may differ from the one that
            the mean gradient of the loss gives, before the run is refused.
        seed: Of the projector.
    """

    reads: ClassVar[str] = "steps"
    source: Source = field(factory=PerExample)
    projector: Projector = field(factory=Identity)
    curvature: Curvature | None = None
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
            InputError: A recorded step is not that of gradient descent on its batch.
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
        """Return the scores of what was seen in each recorded epoch; the sum is `attribute`.

        The arguments and errors are those of `attribute`.

        Returns:
            By epoch, in order, scores ``[n_train, n_test]``.
        """
        walk = self._walk(task, train, test, memory)
        return epochs_of(self, walk, walk.steps.epochs, progress)

    def _walk(self, task: Task, train: Any, test: Any, memory: str | int | None) -> InRun:
        points = Points.of(self, "in-run-shapley", "apply", task, train, test, memory)
        return InRun(Steps(points, self.tolerance))
