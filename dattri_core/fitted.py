"""A method fitted on a train set: attribute, sweep and self-influence without fitting again."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field

from dattri_core import __version__, assemble
from dattri_core.atomic import check_replaceable, discard_leftovers
from dattri_core.checkpoint import Checkpoint
from dattri_core.contract import DEFAULT_LIMIT, contraction_limit
from dattri_core.errors import InputError, SpecError
from dattri_core.loop import finished, fold_tiles, self_influence
from dattri_core.memory import Plan, make_plan, parse_bytes
from dattri_core.progress import bar
from dattri_core.protocols import Damping, Projector
from dattri_core.registry import default_registry
from dattri_core.scores import Scores
from dattri_core.scores_file import is_scores_folder
from dattri_core.scores_writer import ScoresWriter
from dattri_core.snapshot import Fitted, fit_checkpoint, weights_of
from dattri_core.stages import CurvatureInverse
from dattri_core.stream import Examples
from dattri_core.task import Task
from dattri_core.tiles import MemoryTiles, Tiles, budget_of, open_tiles

FIT_SHARE = 2  # a fit may use one part in two of the budget; the rest holds queries and batches
LAYOUT = ("shard", "query_group", "groups", "train_batch", "test_batch", "budget")
SHARD_BATCHES = 16  # a run on disk loses at most so many batches when it is stopped


@define(eq=False)
class FittedMethod:
    """A `Method` with its task and train set; made by `Method.fit`.

    With several checkpoints one is fitted at a time and the last stays; with one, it stays fitted.
    """

    method: Any
    task: Task
    train: Examples
    budget: int
    progress: bool | None
    _held: Fitted | None = None
    _reports: list[dict[str, Any]] = field(factory=list)

    @staticmethod
    def fit(
        method: Any,
        task: Task,
        train: Any,
        *,
        memory: str | int | None,
        progress: bool | None,
        lazy: bool = False,
    ) -> FittedMethod:
        """Check everything that can be checked, then fit the first checkpoint (unless ``lazy``)."""
        examples = Examples.of(train, "train")
        for checkpoint in task.checkpoints:
            checkpoint.check(task.model)
        fitted = FittedMethod(method, task, examples, parse_bytes(memory, task.device), progress)
        if not lazy:
            fitted._fit(fitted._first())
        return fitted

    @staticmethod
    def plan(
        method: Any,
        task: Task,
        train: Any,
        test: Any,
        *,
        memory: str | int | None,
        out: str | Path | None,
    ) -> Plan:
        """Return how the work would be cut to fit the memory; only a few examples are evaluated."""
        fitted = FittedMethod.fit(method, task, train, memory=memory, progress=False, lazy=True)
        probe = fit_checkpoint(
            method.source,
            method.chain,
            method.seed,
            task,
            fitted._first(),
            fitted.train,
            fitted.budget,
            plan_only=True,
        )
        return fitted._plan(probe, Examples.of(test, "test"), out)

    @property
    def stats(self) -> list[Mapping[str, float]]:
        """Return what each inverse Hessian of the fitted checkpoint reports."""
        return [] if self._held is None else [dict(i.stats) for i in self._held.chain.inverses]

    def attribute(self, test: Any, *, out: str | Path | None = None) -> Scores:
        """Return the scores ``[n_train, n_test]`` for a test set.

        Args:
            test: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            out: Folder for the scores. They are then written to disk tile by tile, the same call
                goes on with a run that was stopped, and `Scores.load` reads the result.

        Raises:
            InputError: The test set does not fit the task, or the weights changed since the fit.
            NumericsError: A number is not finite; checkpoint and examples are named.
        """
        examples = Examples.of(test, "test")
        if out is not None:
            check_replaceable(Path(out), is_scores_folder)
            if self._held is None:  # sums run as they did, so that not a bit differs
                self.budget = budget_of(_run_folder(Path(out)), self.budget)
        first = self._fit(self._first(), examples)
        self._require_same_weights(first)
        plan = self._plan(first, examples, out)
        self._reports.clear()
        provenance = self._provenance(first, examples)
        events = default_registry()
        names = ("method", "n_train", "n_test", "checkpoints")
        events.emit("run_started", {name: provenance[name] for name in names})
        started = time.monotonic()
        if out is None:
            scores = self._to_memory(plan, examples, provenance)
        else:
            scores = self._to_folder(Path(out), plan, examples, provenance, first.dtype)
        seconds = time.monotonic() - started
        events.emit(
            "run_finished",
            {
                "method": provenance["method"],
                "seconds": seconds,
                "provenance": scores.provenance,
            },
        )
        return scores

    def self_influence(self) -> torch.Tensor:
        """Return the score of each train example for its own loss, ``[n_train]``, in O(n).

        For a gradient method this is ``<A g_i, B g_i>``; large values mark examples that only they
        themselves explain, such as wrong labels (Koh and Liang 2017, section 5.4).
        """
        if self.method.scorer.locality != "tile":
            raise SpecError(
                f"self-influence: the scorer {assemble.name_of(self.method.scorer)!r} sees a whole "
                "column of train rows at once and gives no score of an example for itself"
            )
        first = self._fit(self._first())
        self._require_same_weights(first)
        costs = first.costs
        per_row = costs.activations + 2 * costs.query + costs.query_work + costs.train_row
        batch = max(1, min(len(self.train), 1024, self.budget // 2 // max(1, per_row)))
        total = len(self.train) * len(self.task.checkpoints)
        with (
            contraction_limit(_contractions(self.budget)),
            bar("self-influence", total, self.progress) as shown,
        ):
            return self_influence(
                self._fit,
                self.task.checkpoints,
                self.method.scorer,
                self.method.fold,
                self.train,
                batch,
                shown.advance,
            )

    def with_(self, **overrides: Any) -> FittedMethod:
        """Return the method with some parts or fields replaced; what was fitted is used again.

        Another damping reuses the fitted curvature; another scorer or fold reuses all stages;
        other changes are fitted anew when they are used.

        Args:
            overrides: As those of `dattri.method`: ``damping=1e-2``, ``scorer="cosine"``.
        """
        changed = type(self.method)(**assemble.override(assemble.slots_of(self.method), overrides))
        changed.check(task=self.task)
        return attrs.evolve(self, method=changed, held=self._reusable(changed), reports=[])

    # --- fitting --------------------------------------------------------------------------------
    def _first(self) -> Checkpoint:
        checkpoints = self.task.checkpoints
        return checkpoints[0] if self.method.fold.order == "forward" else checkpoints[-1]

    def _fit(self, checkpoint: Checkpoint, test: Examples | None = None) -> Fitted:
        if self._held is None or self._held.checkpoint is not checkpoint:
            self._held = None  # the one before goes first: two never live at once
            self._held = fit_checkpoint(
                self.method.source,
                self.method.chain,
                self.method.seed,
                self.task,
                checkpoint,
                self.train,
                self.budget // FIT_SHARE,
                test,
            )
        return self._held

    def _reusable(self, changed: Any) -> Fitted | None:
        mine, theirs = self.method, changed
        if self._held is None or (mine.source, mine.seed) != (theirs.source, theirs.seed):
            return None
        if mine.chain == theirs.chain:
            return self._held
        if len(mine.chain) != len(theirs.chain):
            return None
        dampings = []
        for old, new in zip(mine.chain, theirs.chain, strict=True):
            if isinstance(old, CurvatureInverse) and isinstance(new, CurvatureInverse):
                solver: Any = new.solver
                as_old = attrs.evolve(solver, damping=old.solver.damping)
                if old != attrs.evolve(new, solver=as_old):
                    return None
                dampings.append(new.solver.damping)
            elif old != new:
                return None
            elif not isinstance(old, Projector):
                dampings.append(Damping(0.0))  # an inverse without damping stays as it is
        return attrs.evolve(self._held, chain=self._held.chain.with_damping(dampings))

    def _require_same_weights(self, fitted: Fitted) -> None:
        if fitted.checkpoint.source is not None or fitted.weights is None:
            return
        if weights_of(fitted.chain.source) != fitted.weights:
            raise InputError(
                "attribute: the model's weights changed since the method was fitted on them; fit "
                "again, or give checkpoints=model.state_dict() to keep a copy"
            )

    # --- running --------------------------------------------------------------------------------
    def _plan(self, fitted: Fitted, test: Examples, out: str | Path | None) -> Plan:
        n_train, n_test = len(self.train), len(test)
        plan = make_plan(
            self.budget,
            fitted.costs,
            n_train=n_train,
            n_test=n_test,
            checkpoints=len(self.task.checkpoints),
            # The tiles, and the matrix that they are put together into.
            result_bytes=0 if out is not None else 2 * n_train * n_test * fitted.dtype.itemsize,
            notes=fitted.notes,
        )
        if out is None:
            return plan
        return attrs.evolve(plan, shard=min(plan.shard, SHARD_BATCHES * plan.train_batch))

    def _fold(self, plan: Plan, test: Examples, tiles: Tiles) -> None:
        events = default_registry()
        total = plan.train_passes * len(self.train)
        with (
            contraction_limit(_contractions(plan.budget)),
            bar("attribute", total, self.progress) as shown,
        ):

            def advance(count: int) -> None:
                shown.advance(count)
                events.emit("block_scored", {"done": shown.done, "total": shown.total})

            fold_tiles(
                self._fit,
                self.task.checkpoints,
                self.method.scorer,
                self.method.fold,
                self.train,
                test,
                plan,
                tiles,
                advance,
                self._report,
            )

    def _report(self, fitted: Fitted, group: int) -> None:
        for inverse in fitted.chain.inverses:
            if inverse.stats:
                self._reports.append(
                    {"checkpoint": fitted.checkpoint.name, "group": group, **inverse.stats}
                )

    def _to_memory(self, plan: Plan, test: Examples, provenance: dict[str, Any]) -> Scores:
        tiles = MemoryTiles()
        self._fold(plan, test, tiles)
        values: torch.Tensor | None = None
        for rows, columns, tile in finished(
            self.method.fold, self.method.scorer, len(self.train), len(test), plan, tiles
        ):
            if tile.shape == (len(self.train), len(test)):
                values = tile
                break
            if values is None:
                values = torch.empty(len(self.train), len(test), dtype=tile.dtype)
            values[rows, columns] = tile
        assert values is not None
        return Scores(values, self.train.ids, test.ids, {**provenance, "solver": self._reports})

    def _to_folder(
        self,
        out: Path,
        plan: Plan,
        test: Examples,
        provenance: dict[str, Any],
        dtype: torch.dtype,
    ) -> Scores:
        sizes = {name: getattr(plan, name) for name in LAYOUT}
        folder = _run_folder(out)
        for path in (out, folder):
            discard_leftovers(path)
        tiles, sizes = open_tiles(folder, provenance, sizes)
        resumed: dict[str, Any] = dict(sizes)
        plan = attrs.evolve(plan, **resumed)
        self._fold(plan, test, tiles)
        with ScoresWriter(out, len(self.train), len(test), dtype) as writer:
            for rows, columns, tile in finished(
                self.method.fold, self.method.scorer, len(self.train), len(test), plan, tiles
            ):
                writer.values[rows, columns] = tile.numpy()
                writer.release()
            scores = writer.finish(
                self.train.ids, test.ids, {**provenance, "solver": self._reports}
            )
        tiles.close()
        return scores

    def _provenance(self, fitted: Fitted, test: Examples) -> dict[str, Any]:
        target = self.task.target
        return {
            "method": self.method.to_spec(),
            "n_train": len(self.train),
            "n_test": len(test),
            "loss": self.task.loss_name,
            "target": {
                "name": self.task.target_name,
                "higher_is_better": bool(target is not None and target.higher_is_better),
            },
            "checkpoints": [c.name for c in self.task.checkpoints],
            "learning_rates": [c.learning_rate for c in self.task.checkpoints],
            "parameters": list(self.task.parameter_names),
            "weights": [c.fingerprint(self.task.model) for c in self.task.checkpoints],
            "space": fitted.chain.source.space.fingerprint,
            "train": self.train.fingerprint,
            "test": test.fingerprint,
            "versions": {
                "dattri-core": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _contractions(budget: int) -> int:
    # Four intermediates of that size may live at once: a quarter of the budget for all of them.
    return min(DEFAULT_LIMIT, budget // 16)


def _run_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")
