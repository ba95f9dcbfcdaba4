"""Method: a value made of named parts; checked without a tensor, fitted once, used many times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

from attrs import field, frozen

from dattri_core import assemble
from dattri_core.capabilities import WeighingScorer
from dattri_core.errors import InputError, SpecError
from dattri_core.fitted import FittedMethod
from dattri_core.loop import By
from dattri_core.plans import Plan
from dattri_core.protocols import MEASURED, Fold, InverseHessian, Projector, Scorer, Source
from dattri_core.row_kinds import KIND_OF_NEED, require_kind
from dattri_core.scores import Scores
from dattri_core.source_capabilities import sides_differ, source_needs
from dattri_core.space import Space
from dattri_core.stages import Stage, check_stages, example_space, is_two_sided
from dattri_core.store import Store
from dattri_core.task import Task


def _source(value: Any) -> Source:
    made: Source = assemble.build_part("source", value)
    return made


def _projector(value: Any) -> Projector:
    made: Projector = assemble.build_part("projector", value)
    return made


def _inverse_hessian(value: Any) -> InverseHessian:
    made: InverseHessian = assemble.build_inverse_hessian(value)
    return made


def _scorer(value: Any) -> Scorer:
    made: Scorer = assemble.build_part("scorer", value)
    return made


def _fold(value: Any) -> Fold:
    made: Fold = assemble.build_part("fold", value)
    return made


def _stages(value: Any) -> tuple[Stage, ...] | None:
    return None if value is None else tuple(assemble.build_stages(value))


def _named_default(name: str) -> Any:
    return name


@frozen
class Method:
    """A method is its parts: S_ij = fold over checkpoints of scorer(<A phi_i, B psi_j>).

    Every field takes a part, its name, or a mapping ``{"name": ..., fields}``; a new method is a
    changed field: ``attrs.evolve(method, scorer="cosine")``.

    Args:
        source: Gives one row per example.
        projector: Sketches rows of both sides; comes before the inverse Hessian.
        inverse_hessian: Applied to test rows, or ``{"curvature": ..., "solver": ...}``.
        scorer: Pairs train rows with test rows.
        fold: Reduces the checkpoints.
        stages: Projectors and inverse Hessians in any other order, as a list of
            ``{"projector": ...}`` and ``{"inverse_hessian": ...}``; replaces both slots.
        seed: Of every random number that projectors, curvatures and solvers draw; a source that
            draws, such as ``dropout-ensemble``, has a seed of its own.

    Raises:
        SpecError: The parts do not fit each other; each message lists what would.
    """

    source: Source = field(default=_named_default("per-example"), converter=_source)
    projector: Projector = field(default=_named_default("identity"), converter=_projector)
    inverse_hessian: InverseHessian = field(
        default=_named_default("identity"), converter=_inverse_hessian
    )
    scorer: Scorer = field(default=_named_default("dot"), converter=_scorer)
    fold: Fold = field(default=_named_default("mean"), converter=_fold)
    stages: tuple[Stage, ...] | None = field(default=None, converter=_stages)
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        self.check()

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Return the stages in the order in which rows pass them."""
        return (self.projector, self.inverse_hessian) if self.stages is None else self.stages

    def check(self, space: Space | None = None, task: Task | None = None) -> None:
        """Type-check the method without a tensor, on its own or against a space and a task.

        Raises:
            SpecError: A part needs what the others do not give; says which, and what would.
        """
        if self.stages is not None:
            identities = (
                assemble.build_part("projector", "identity"),
                assemble.build_inverse_hessian("identity"),
            )
            if (self.projector, self.inverse_hessian) != identities:
                raise SpecError(
                    "method: give either stages=[...] or the slots projector and inverse_hessian, "
                    "not both"
                )
        missing = self.scorer.needs - MEASURED - self.source.provides
        if missing:
            raise SpecError(
                f"method: the scorer {assemble.name_of(self.scorer)!r} needs {sorted(missing)} "
                f"with every row; the source {assemble.name_of(self.source)!r} provides "
                f"{sorted(self.source.provides) or 'nothing'}; "
                f"{assemble.who_provides('source', missing)}"
            )
        if "inverse-norm" in self.scorer.needs and any(map(is_two_sided, self.chain)):
            raise SpecError(
                f"method: the scorer {assemble.name_of(self.scorer)!r} needs the norm of "
                "(H + damping I)^-1 g, and an inverse Hessian of form 'two-sided' leaves the test "
                "side with its root only; use form='one-sided', or the scorer 'relatif' with "
                "form='l', which both forms serve"
            )
        if self.scorer.needs & {"self-influence", "inverse-norm"}:
            self._check_sides(f"the scorer {assemble.name_of(self.scorer)!r}")
        self._check_weight()
        check_stages(self.chain, space or example_space())
        if task is not None:
            self._check_task(task)

    def check_checkpoints(self, task: Task) -> None:
        """Compare the checkpoints of a task with its model: names and shapes, before any work.

        Raises:
            InputError, StoreError: Weights, or moments that the source needs, do not fit it.
        """
        updated = task.parameter_names if "optimiser" in source_needs(self.source) else ()
        for checkpoint in task.checkpoints:
            checkpoint.check(task.model, updated)

    def check_self_influence(self) -> None:
        """Raise `SpecError` where no score of an example for itself can be read off train rows."""
        if self.scorer.locality != "tile":
            raise SpecError(
                f"self-influence: the scorer {assemble.name_of(self.scorer)!r} sees a whole "
                "column of train rows at once and gives no score of an example for itself"
            )
        self._check_sides("self-influence")

    def _check_sides(self, what: str) -> None:
        if sides_differ(self.source):
            raise SpecError(
                f"method: {what} takes train rows for queries, and those of the source "
                f"{assemble.name_of(self.source)!r} are of another kind than its test rows; give "
                "the train examples as test examples, attribute(train).values.diagonal(), or use "
                "the scorer 'cosine'"
            )

    def _check_weight(self) -> None:
        weighs = isinstance(self.scorer, WeighingScorer) and self.scorer.weighs
        needs = "weight" in self.fold.needs
        if weighs == needs:
            return
        scorer, fold = assemble.name_of(self.scorer), assemble.name_of(self.fold)
        if needs:
            raise SpecError(
                f"method: the fold {fold!r} needs a weight per train row, which the scorer "
                f"{scorer!r} does not give; use the scorer 'trak', or another fold such as 'mean'"
            )
        raise SpecError(
            f"method: the scorer {scorer!r} gives a weight per train row, which the fold {fold!r} "
            "would drop; use the fold 'trak', or another scorer such as 'dot'"
        )

    def _check_task(self, task: Any) -> None:
        if not isinstance(task, Task):
            raise InputError(
                f"method: the first argument is a {type(task).__name__}, expected a dattri.Task; "
                "give dattri.Task(model, loss=..., checkpoints=...)"
            )
        if "learning-rate" in self.fold.needs:
            lacking = [c.name for c in task.checkpoints if c.learning_rate is None]
            if lacking:
                raise SpecError(
                    f"method: the fold {assemble.name_of(self.fold)!r} weighs checkpoints by their "
                    f"learning rates, and {lacking} have none; give "
                    "Task(..., checkpoints=[...], learning_rates=[...]), or the fold 'mean'"
                )
            grouped = [c.name for c in task.checkpoints if c.step is not None and c.step.rates]
            if grouped:
                raise SpecError(
                    f"method: the fold {assemble.name_of(self.fold)!r} weighs checkpoints by one "
                    f"learning rate, and at {grouped[0]!r} groups of parameters have different "
                    "ones; use 'magic' or 'dvemb', which follow the steps, the fold 'mean', or "
                    "give the weights alone, Task(..., checkpoints=[paths], learning_rates=[...])"
                )
        if "optimiser" in source_needs(self.source):
            lacking = [c.name for c in task.checkpoints if c.optimiser is None]
            if lacking:
                raise SpecError(
                    f"method: the rows of the source {assemble.name_of(self.source)!r} are made "
                    f"with the state of the optimiser, and {lacking} have none; give Task(..., "
                    "checkpoints=[...], optimisers=[...]), an AdamState.of(optimizer, model) or "
                    "the path of a file for each, or use the source 'per-example'"
                )
        needs = {need for s in self.chain if not isinstance(s, Projector) for need in s.needs}
        if "ggn-product" in needs and not task.splits_loss:
            raise SpecError(
                f"method: a GGN needs the model's outputs and the criterion apart, and the loss "
                f"{task.loss_name!r} gives neither; give dattri.Loss(forward=..., criterion=...) "
                "or a shipped loss by name, or use the curvature 'hessian'"
            )
        if "reference-rows" in needs and task.reference is None:
            raise SpecError(
                "method: its curvature mixes the rows of the train set with those of examples like "
                "the ones that will be asked, and the task has none; give Task(..., "
                "reference=examples), the test set or others of its kind"
            )
        for need in sorted(needs & KIND_OF_NEED.keys()):
            require_kind(KIND_OF_NEED[need], task)

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        memory: str | int | None = None,
        store: str | Path | Store | None = None,
        fits: str | Path | None = None,
        progress: bool | None = None,
    ) -> FittedMethod:
        """Fit on the train set: everything that does not depend on the test examples.

        Args:
            task: Model, loss, target and checkpoints.
            train: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            memory: Budget such as ``"16GiB"``; default half of what is free.
            store: Folder for train rows, see `Store`: after the projectors that the method begins
                with they are written once, and read by every method that begins in the same way. A
                build that was stopped goes on where it was.
            fits: Folder for what curvatures and solvers compute from the train set, such as the
                eigenvectors of 'ekfac': a fit of the same numbers reads them, at any damping and
                in any process. One folder serves any methods, tasks and checkpoints.
            progress: Show a bar; default only on a terminal.

        Raises:
            SpecError, InputError, NumericsError: Before any long work, where that can be known.
        """
        self.check(task=task)
        return FittedMethod.fit(
            self, task, train, memory=memory, progress=progress, store=store, fits=fits
        )

    @overload
    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        dry_run: Literal[True],
        by: By | None = None,
        group: bool = False,
        memory: str | int | None = None,
        out: str | Path | None = None,
        store: str | Path | Store | None = None,
        fits: str | Path | None = None,
        progress: bool | None = None,
    ) -> Plan: ...

    @overload
    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        by: By,
        dry_run: Literal[False] = False,
        group: bool = False,
        memory: str | int | None = None,
        out: str | Path | None = None,
        store: str | Path | Store | None = None,
        fits: str | Path | None = None,
        progress: bool | None = None,
    ) -> dict[str, Scores]: ...

    @overload
    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        by: None = None,
        dry_run: Literal[False] = False,
        group: bool = False,
        memory: str | int | None = None,
        out: str | Path | None = None,
        store: str | Path | Store | None = None,
        fits: str | Path | None = None,
        progress: bool | None = None,
    ) -> Scores: ...

    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        dry_run: bool = False,
        by: By | None = None,
        group: bool = False,
        memory: str | int | None = None,
        out: str | Path | None = None,
        store: str | Path | Store | None = None,
        fits: str | Path | None = None,
        progress: bool | None = None,
    ) -> Scores | dict[str, Scores] | Plan:
        """Return the scores ``[n_train, n_test]`` of every train example for every test example.

        Args:
            task: Model, loss, target and checkpoints.
            train: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            test: The same for the test set.
            dry_run: Only say how the work would be cut to fit the memory, and what it costs.
            by: Tell apart what each ``"block"`` or ``"checkpoint"`` contributes; see
                `FittedMethod.attribute`.
            group: One column, for the sum over the test set, at the cost of one query.
            memory: Budget such as ``"16GiB"``; default half of what is free.
            out: Folder for scores that do not fit in memory, and to resume a run that was stopped.
            store: Folder for train rows; see `fit`. Of further test sets, or of another scorer,
                curvature or damping, no train example is evaluated again.
            fits: Folder for what a fit computes; see `fit`.
            progress: Show a bar; default only on a terminal.
        """
        self.check(task=task)
        if dry_run:
            return FittedMethod.plan(
                self, task, train, test, memory=memory, out=out, by=by, group=group, store=store
            )
        fitted = FittedMethod.fit(
            self, task, train, memory=memory, progress=progress, store=store, fits=fits, lazy=True
        )
        if by is None:
            return fitted.attribute(test, group=group, out=out)
        return fitted.attribute(test, by=by, group=group, out=out)

    def to_spec(self) -> dict[str, Any]:
        """Return the method as plain data; ``Method(**spec)`` gives it back."""
        spec: dict[str, Any] = assemble.describe_method(self)
        return spec


def method(name: str, **overrides: Any) -> Any:
    """Return a registered method by name, some of its parts or their fields replaced.

    Args:
        name: Such as ``"if-cg"``; ``dattri methods`` lists them.
        overrides: A slot (``scorer="cosine"``), a field that one part has (``damping=1e-2``), or
            ``**{"solver.damping": 1e-2}`` where several have it.

    Returns:
        A `Method`, or another `Attributor` for methods that are not made of parts.

    Raises:
        SpecError: No such method, part or field; the nearest names are offered.
    """
    spec = assemble.method_spec(name, overrides)
    if "attributor" in spec:
        return assemble.build_part("attributor", spec["attributor"])
    return Method(**spec)


def attribute(
    task: Task,
    train: Any,
    test: Any,
    method: str | Any,
    *,
    dry_run: bool = False,
    by: By | None = None,
    group: bool = False,
    memory: str | int | None = None,
    out: str | Path | None = None,
    store: str | Path | Store | None = None,
    fits: str | Path | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> Any:
    """Attribute in one call: ``dattri.attribute(task, train, test, method="if-cg", damping=1e-3)``.

    See `Method.attribute` for the settings and `method` for the overrides.
    """
    made = _named(method, overrides)
    settings: dict[str, Any] = {}
    for name, folder in (("store", store), ("fits", fits)):
        if folder is None:
            continue
        if not isinstance(made, Method):
            raise SpecError(
                f"attribute: {name}= keeps the {'rows' if name == 'store' else 'fits'} of a "
                f"method, and a {type(made).__name__} is not made of parts and has none"
            )
        settings[name] = folder
    if by is not None or group:
        if not isinstance(made, Method):
            raise SpecError(
                f"attribute: by= and group= take the rows of a method apart or add them up, and a "
                f"{type(made).__name__} is not made of parts and has none"
            )
        settings |= {"by": by, "group": group}
    return made.attribute(
        task, train, test, dry_run=dry_run, memory=memory, out=out, progress=progress, **settings
    )


def _named(given: Any, overrides: Mapping[str, Any]) -> Any:
    if isinstance(given, str):
        return method(given, **overrides)
    if not overrides:
        return given
    if not isinstance(given, Method):
        raise SpecError(
            f"attribute: overrides {sorted(overrides)} go with the name of a method or with a "
            f"Method, not with a {type(given).__name__}"
        )
    return Method(**assemble.override(assemble.slots_of(given), overrides))
