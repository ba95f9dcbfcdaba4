"""A method fitted on a train set: attribute, sweep and self-influence without fitting again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import attrs
import torch
from attrs import define, field

from dattri_core import assemble
from dattri_core.atomic import check_replaceable
from dattri_core.checkpoint import Checkpoint
from dattri_core.contract import contraction_limit
from dattri_core.dampings import dampings_between, method_at
from dattri_core.errors import SpecError, format_bytes
from dattri_core.kept_fits import KeptFits
from dattri_core.loop import By, Run, self_influence
from dattri_core.members import expand_checkpoints
from dattri_core.memory import parse_bytes
from dattri_core.pairing import WHOLE
from dattri_core.plans import Plan
from dattri_core.pool import of_pool, require_poolable
from dattri_core.precision import exactly, without_autocast
from dattri_core.problem import collect
from dattri_core.processes import failing_together, leads, of_first, processes_now
from dattri_core.progress import Passes, bar
from dattri_core.protocols import Role, as_damping
from dattri_core.provenance import facts_of_fits, facts_of_rows, provenance_of
from dattri_core.requests import Request
from dattri_core.rows import Rows
from dattri_core.run_plan import plan_run
from dattri_core.runner import Runner, contractions, require_streams, run_folder
from dattri_core.scores import Scores, parts_of
from dattri_core.scores_file import is_scores_folder
from dattri_core.snapshot import Fitted, fit_checkpoint
from dattri_core.stages import Chain
from dattri_core.store import Store
from dattri_core.stored import Keeping
from dattri_core.stream import Examples
from dattri_core.task import Task
from dattri_core.tiles import budget_of
from dattri_core.top import Extremes, checked_count

FIT_SHARE = 2  # a fit may use one part in two of the budget; the rest holds queries and batches


@define(eq=False)
class FittedMethod:
    """A `Method` with its task and train set; made by `Method.fit`.

    With several checkpoints one is fitted at a time and the last stays; with one, it stays fitted.
    ``train`` are the examples that are scored, ``fitted_on`` those of the fit; they are the same
    but for what `over` gives.
    """

    method: Any
    task: Task
    train: Examples
    fitted_on: Examples
    budget: int
    progress: bool | None
    checkpoints: tuple[Checkpoint, ...]
    store: Store | None = None
    fits: Path | None = None
    reference: Examples | None = None
    _held: Fitted | None = None
    _of_pool: Fitted | None = field(default=None, init=False)

    def __repr__(self) -> str:
        parts = ", ".join(parts_of(self.method.to_spec()))
        by = "" if self._pool is None else f" by a fit on {len(self.fitted_on)}"
        counts = f"{len(self.train)} train examples{by}, checkpoints: {len(self.checkpoints)}"
        return f"FittedMethod({parts}; {counts}; memory {format_bytes(self.budget)})"

    @staticmethod
    @failing_together
    @exactly
    def fit(
        method: Any,
        task: Task,
        train: Any,
        *,
        memory: str | int | None,
        progress: bool | None,
        store: Any = None,
        fits: str | Path | None = None,
        lazy: bool = False,
    ) -> FittedMethod:
        """Check everything that can be checked, then fit the first checkpoint (unless ``lazy``)."""
        examples = Examples.of(train, "train")
        method.check_checkpoints(task)
        given = task.reference
        budget = parse_bytes(memory, task.device)
        if (processes := processes_now()) is not None:  # one plan, and one bar
            budget = min(processes.gathered(budget))
            progress = progress if leads() else False
        fitted = FittedMethod(
            method=method,
            task=task,
            train=examples,
            fitted_on=examples,
            budget=budget,
            progress=progress,
            store=Store.of(store),
            fits=None if fits is None else Path(fits),
            reference=None if given is None else Examples.of(given, "reference"),
            checkpoints=expand_checkpoints(method.source, task.checkpoints),
        )
        if not lazy:
            fitted._fit(fitted._first())
        return fitted

    @staticmethod
    @exactly
    def plan(
        method: Any,
        task: Task,
        train: Any,
        test: Any,
        *,
        memory: str | int | None,
        out: str | Path | None,
        by: By | None = None,
        group: bool = False,
        store: Any = None,
    ) -> Plan:
        """Return how the work would be cut to fit the memory; only a few examples are evaluated."""
        request = Request((method,), by, group)
        request.check(task, out)
        fitted = FittedMethod.fit(
            method, task, train, memory=memory, progress=False, store=store, lazy=True
        )
        return fitted._plan(fitted._probe(), Examples.of(test, "test"), request, out)

    @property
    def stats(self) -> list[Mapping[str, float]]:
        """Return what each inverse Hessian of the fitted checkpoint reports."""
        return [] if self._held is None else [dict(i.stats) for i in self._held.chain.inverses]

    @overload
    def attribute(
        self, test: Any, *, by: None = None, group: bool = False, out: str | Path | None = None
    ) -> Scores: ...

    @overload
    def attribute(
        self, test: Any, *, by: By, group: bool = False, out: str | Path | None = None
    ) -> dict[str, Scores]: ...

    @failing_together
    @exactly
    def attribute(
        self,
        test: Any,
        *,
        by: By | None = None,
        group: bool = False,
        out: str | Path | None = None,
    ) -> Scores | dict[str, Scores]:
        """Return the scores ``[n_train, n_test]`` for a test set.

        Args:
            test: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            by: Tell apart what each ``"block"`` (a module's parameters) or each ``"checkpoint"``
                contributes: a mapping from their names, in order, to scores that add up to the
                whole. The part of a block is what the scorer makes of that block's inner products
                and of the whole rows' norms; that of a checkpoint what the fold makes of it while
                all others score zero.
            group: One column, of id ``"sum"``, for the sum over the test set: their rows are added
                up before the inverse Hessian, which is then applied to one.
            out: Folder for the scores. They are then written to disk tile by tile, the same call
                goes on with a run that was stopped, and `Scores.load` reads the result.

        Raises:
            InputError: The test set does not fit the task, or the weights changed since the fit.
            NumericsError: A number is not finite; checkpoint and examples are named.
            SpecError: The scores cannot be told apart in that way.
        """
        found = self._scores(test, Request((self.method,), by, group), out)
        return found[WHOLE] if by is None else found

    @failing_together
    @exactly
    def sweep(self, test: Any, *, damping: Iterable[Any]) -> dict[Any, Scores]:
        """Return the scores at each of several dampings, from one pass over the train set.

        Train rows are computed once and meet the queries of every damping; each result is that of
        ``with_(damping=d).attribute(test)`` up to rounding, its provenance included.

        Args:
            test: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            damping: Numbers, `Damping` values, or ``{"relative": x}``; these are the keys of the
                result, the last as the `Damping` that it means.

        Raises:
            SpecError: The method has no damping, or one that cannot change without a new fit.
        """
        keys = [as_damping(d) if isinstance(d, Mapping) else d for d in damping]
        if not keys or len(set(keys)) < len(keys):
            raise SpecError(f"sweep: damping got {keys!r}; give one or more, each once")
        methods = tuple(method_at(self.method, as_damping(key)) for key in keys)
        for method in methods:
            method.check(task=self.task)
        found = self._scores(test, Request(methods), None)
        return dict(zip(keys, found.values(), strict=True))

    @failing_together
    @exactly
    def extremes(self, test: Any, k: int, *, group: bool = False) -> Extremes:
        """Return the k most helpful and most harmful train examples of every test example.

        They are those of ``attribute(test).top(k)`` and ``.bottom(k)``, from one pass over the
        train set for both, and without the matrix ``[n_train, n_test]``: scores of a train batch
        are reduced to k numbers for each test example before the next batch is read. With several
        checkpoints the scores of a batch wait for the last one; where these do not fit the memory
        all at once, the train set is gone through in parts.

        Args:
            test: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            k: How many; fewer come when there are fewer train examples.
            group: As in `attribute`: one column, for the sum over the test set.

        Returns:
            ``Extremes(top, bottom, test_ids, provenance)``, ids and values ``[k, n_test]`` each.

        Raises:
            MemoryBudgetError: The scores of several checkpoints cannot wait, and parts of the train
                set would need another fit of each, or the scorer sees the whole train set at once.
        """
        k = checked_count(k, "extremes")
        request = Request((self.method,), None, group)
        runner = self._runner(Examples.of(test, "test"), request, None, k)
        require_streams(runner.run, self.method.chain)
        return runner.announced(lambda: runner.to_extremes(k), lambda found: found.provenance)

    @failing_together
    @exactly
    def self_influence(self) -> torch.Tensor:
        """Return the score of each train example for its own loss, ``[n_train]``, in O(n).

        For a gradient method this is ``<A g_i, B g_i>``; large values mark examples that only they
        themselves explain, such as wrong labels (Koh and Liang 2017, section 5.4).
        """
        self.method.check_self_influence()
        first = self._fit(self._first())
        first.require_same_weights()
        train, batch = first.train, first.batch(self.budget)
        del first
        with (
            contraction_limit(contractions(self.budget, self.task.device)),
            bar("self-influence", len(self.train) * len(self.checkpoints), self.progress) as shown,
        ):
            return self_influence(
                self._fit,
                self.checkpoints,
                self.method.scorer,
                self.method.fold,
                train,
                batch,
                shown.advance,
            )

    def train_rows(self) -> Iterator[Rows]:
        """Yield the rows A g of the train set after all stages, a few at a time and in order.

        With those of `test_rows`, S_ij = <A g_i, B h_j> before the scorer: what a nearest-neighbour
        index stores. Of one checkpoint only.
        """
        return self._rows(None, "train", Chain.train)

    def test_rows(self, test: Any) -> Iterator[Rows]:
        """Yield the rows B h of a test set after all stages; see `train_rows`."""
        return self._rows(Examples.of(test, "test"), "test", Chain.test)

    def _rows(
        self, examples: Examples | None, role: Role, pass_: Callable[[Chain, Rows], Rows]
    ) -> Iterator[Rows]:
        if len(self.checkpoints) > 1:
            raise SpecError(
                f"{role} rows: the method has {len(self.checkpoints)} checkpoints, and rows of one "
                "do not meet those of another; give a task with one checkpoint"
            )
        fitted = self._fit(self._first())
        fitted.require_same_weights()
        given = fitted.train if examples is None else examples
        for index, batch in given.batches(fitted.batch(self.budget)):
            with without_autocast():
                rows = collect(fitted.chain.source, batch, index, role, fitted.device)
                passed = pass_(fitted.chain, rows)
            yield passed

    @exactly
    def over(self, train: Any) -> FittedMethod:
        """Return the method with other examples to be scored; what was fitted is used again.

        The scores are S_ij = <A g_i, B h_j> for every example i of ``train``, A and B being those
        of the fit: curvature, projectors and damping know ``fitted_on`` alone, and so do further
        fits, of the next checkpoint or after `with_`. A scorer of whole columns, such as
        KNN-Shapley, sees these examples alone. Their rows are computed in each pass: a ``store``
        holds those of the train set of the fit, and another one is not needed.

        Args:
            train: A Dataset, a DataLoader in a fixed order, or a nest of tensors.

        Raises:
            SpecError: The scores are terms of a sum over the train set, as representer values are.
            InputError: The examples do not fit the task.
        """
        require_poolable(self.method)
        pooled = attrs.evolve(self, train=Examples.of(train, "pool"))
        if pooled._held is not None:
            pooled._scored(pooled._held)
        return pooled

    def with_(self, **overrides: Any) -> FittedMethod:
        """Return the method with some parts or fields replaced; what was fitted is used again.

        Another damping reuses the fitted curvature; another scorer or fold reuses all stages;
        other changes are fitted anew when they are used.

        Args:
            overrides: As those of `dattri.method`: ``damping=1e-2``, ``scorer="cosine"``.
        """
        changed = type(self.method)(**assemble.override(assemble.slots_of(self.method), overrides))
        changed.check(task=self.task)
        if self._pool is not None:
            require_poolable(changed)
        checkpoints = self.checkpoints  # the same objects, so that what is held is known again
        if changed.source != self.method.source:
            checkpoints = expand_checkpoints(changed.source, self.task.checkpoints)
        held = self._reusable(changed)
        return attrs.evolve(self, method=changed, checkpoints=checkpoints, held=held)

    # --- fitting --------------------------------------------------------------------------------
    def _first(self) -> Checkpoint:
        return self.checkpoints[0 if self.method.fold.order == "forward" else -1]

    @property
    def _pool(self) -> Examples | None:
        """Return the examples that are scored, where they are not those of the fit."""
        return None if self.train is self.fitted_on else self.train

    def _fit(self, checkpoint: Checkpoint, test: Examples | None = None) -> Fitted:
        """Return a checkpoint that is fitted, with the examples that are scored."""
        if self._held is None or self._held.checkpoint is not checkpoint:
            self._held = self._of_pool = None  # the one before goes first: two never live at once
            show = False if self.store is None else self.progress
            read = Passes.over(len(self.fitted_on), self.progress)
            limit = contractions(self.budget, self.task.device)
            with (
                bar("store", len(self.fitted_on), show) as shown,
                read.until("solve"),
                contraction_limit(limit),
            ):
                self._held = fit_checkpoint(
                    self.method.source,
                    self.method.chain,
                    self.method.seed,
                    self.task,
                    checkpoint,
                    self.fitted_on,
                    self.budget // FIT_SHARE,
                    test,
                    read.advance,
                    keeping=self._keeping(checkpoint, shown.advance),
                    reference=self.reference,
                    fits=self._kept(),
                    pool=self._pool,
                )
        return self._scored(self._held)

    def _probe(self) -> Fitted:
        """Return the first checkpoint without a fit, from a few examples: its costs and space."""
        return fit_checkpoint(
            self.method.source,
            self.method.chain,
            self.method.seed,
            self.task,
            self._first(),
            self.train,
            self.budget // FIT_SHARE,
            plan_only=True,
            keeping=self._keeping(self._first()),
            reference=self.reference,
        )

    def _scored(self, held: Fitted) -> Fitted:
        """Return what is fitted, with the pool in place of its train set where there is one."""
        if self._pool is None:
            return held
        if self._of_pool is None:
            self._of_pool = of_pool(held, self._pool, self.task.device)
        return self._of_pool

    def _keeping(
        self, checkpoint: Checkpoint, advance: Callable[[int], None] = lambda count: None
    ) -> Keeping | None:
        """Return the store with what decides the numbers in it."""
        if self.store is None:
            return None
        facts = facts_of_rows(self.method, self.task, self.fitted_on)
        return Keeping(self.store, checkpoint, facts, advance)

    def _kept(self) -> KeptFits | None:
        """Return where fits are kept, with what decides the numbers in it."""
        if self.fits is None:
            return None
        given = (self.method, self.task, self.fitted_on, self.reference, self.store)
        return KeptFits(self.fits, facts_of_fits(*given))

    def _reusable(self, changed: Any) -> Fitted | None:
        """Return what is fitted as a changed method needs it, where no new fit is needed."""
        held, mine = self._held, self.method
        if held is None or (mine.source, mine.seed) != (changed.source, changed.seed):
            return None
        dampings = dampings_between(mine.chain, changed.chain)
        return None if dampings is None else held.at_dampings(dampings)

    # --- running --------------------------------------------------------------------------------
    def _scores(self, test: Any, request: Request, out: str | Path | None) -> dict[str, Scores]:
        """Return what is asked for, by name."""
        request.check(self.task, out)
        examples = Examples.of(test, "test")
        if out is not None:
            check_replaceable(Path(out), is_scores_folder)
            if self._held is None:  # sums run as they did, so that not a bit differs
                run = run_folder(Path(out))
                self.budget = of_first(budget_of(run, self.budget) if leads() else 0)
                if (there := self._finished(examples, request, Path(out))) is not None:
                    return there
        runner = self._runner(examples, request, out)

        def work() -> dict[str, Scores]:
            if out is None:  # no name holds the first fit, or it outlives the fit of the second
                return runner.to_memory(request.names(self._fit(self._first()), self.checkpoints))
            return {WHOLE: runner.to_folder(Path(out), *self._fit(self._first()).layout)}

        return runner.announced(work, lambda found: next(iter(found.values())).provenance)

    def _finished(self, test: Examples, request: Request, out: Path) -> dict[str, Scores] | None:
        """Return the finished scores of this very call, where they are there: none is fitted."""
        if processes_now() is not None or run_folder(out).exists() or not out.is_dir():
            return None
        runner = self._runner(test, request, out, probe=self._probe())
        there = runner.finished(out)
        if there is None:
            return None
        return runner.announced(lambda: {WHOLE: there}, lambda found: found[WHOLE].provenance)

    def _runner(
        self,
        test: Examples,
        request: Request,
        out: str | Path | None,
        k: int | None = None,
        probe: Fitted | None = None,
    ) -> Runner:
        """Return what computes the scores, or the ``k`` extremes of each query; fits if needed."""
        first = self._fit(self._first(), test) if probe is None else probe
        first.require_same_weights()
        plan = self._plan(first, test, request, out, k)
        sides = (self.method, self.task, self.checkpoints, first, self.train, test)
        provenance = provenance_of(*sides, self.reference, request, self.store, self.fitted_on)
        dampings = [dampings_between(self.method.chain, m.chain) for m in request.methods]
        run = Run(
            checkpoints=self.checkpoints,
            scorer=self.method.scorer,
            fold=self.method.fold,
            train=first.train,
            test=test,
            plan=plan,
            dampings=tuple(changes or () for changes in dampings),
            by=request.by,
            blocks=request.blocks(first),
            summed=request.group,
        )
        return Runner(
            run,
            request,
            provenance,
            self._fit,
            self.progress,
            self.task.device,
            self.fitted_on,
        )

    def _plan(
        self,
        fitted: Fitted,
        test: Examples,
        request: Request,
        out: str | Path | None,
        k: int | None = None,
    ) -> Plan:
        sizes = (self.checkpoints, self.budget, self.task.device, len(self.train))
        return plan_run(fitted, self.method.scorer, request, test, *sizes, out, k)
