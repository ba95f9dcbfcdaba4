"""Stages: projectors and inverse Hessians in any order, as pairs of maps (train side, test side).

For train row g_i and test row g_j a chain of stages computes ``<A g_i, B g_j>``. A projector P adds
(P, P) to (A, B); an inverse Hessian adds (1, (H + damping I)^-1), or its symmetric root to both
sides, or, where it is of low rank V D V^T and reduces rows, (V^T, D V^T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeGuard, cast

import attrs
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core.capabilities import (
    ByUse,
    DataProjector,
    InverseRoot,
    LeverageInverse,
    Outlook,
    PreconditionedSolver,
    ReducedInverse,
    ReducingSolver,
    RootSolver,
    SplitInverse,
)
from dattri_core.errors import SpecError
from dattri_core.protocols import (
    BoundSource,
    Curvature,
    Damping,
    Inverse,
    InverseHessian,
    LinearMap,
    Operator,
    Problem,
    Projector,
    Solver,
)
from dattri_core.row_kinds import KIND_OF_NEED, require_outputs
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space

Stage = Projector | InverseHessian
Step = LinearMap | Inverse


@frozen
class CurvatureInverse:
    """The standard inverse Hessian, composed: (H + damping I)^-1 with H a curvature's operator.

    The two forms give the same inner products: <g, (H + damping I)^-1 h> = <R g, R h> with
    R = (H + damping I)^-1/2. In the two-sided form a sketch may follow and stays unbiased for them;
    it needs H + damping I to be positive definite.

    Args:
        curvature: What H is.
        solver: How its damped inverse is applied; owns the damping.
        preconditioner: Another inverse Hessian, fitted on the same train set and handed to an
            iterative solver: fewer iterations to the same answer. Its damping is its own.
        form: ``"one-sided"``: the inverse of test rows. ``"two-sided"``: its root of both sides.
    """

    curvature: Curvature
    solver: Solver
    preconditioner: InverseHessian | None = None
    form: Literal["one-sided", "two-sided"] = field(
        default="one-sided", validator=validators.in_(("one-sided", "two-sided"))
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return what the curvature and the preconditioner ask of the problem."""
        more = self.preconditioner.needs if self.preconditioner is not None else frozenset()
        asked = self.curvature.needs
        if isinstance(self.curvature, ByUse):
            asked = self.curvature.needs_for(self.solver.needs)
        return asked | more

    @property
    def exact(self) -> bool:
        """Return whether it is the exact inverse of the curvature that it is named after."""
        return self.curvature.exact and self.solver.exact

    def out_space(self, space: Space) -> Space:
        """Return the space of rows after it: another one for a solver that reduces them."""
        return self.solver.out_space(space) if isinstance(self.solver, ReducingSolver) else space

    def outlook(self, space: Space) -> Outlook:
        """Return what is known of the inverse before the fit.

        A curvature that is block diagonal may say so, by an ``outlook(space, asked)`` of its own;
        it holds for solvers that take the curvature as it is, by its spectrum or its rows. A solver
        whose answers are not formed may say so by ``forms``.
        """
        told = Outlook()
        if self._takes_all and hasattr(self.curvature, "outlook"):
            told = self.curvature.outlook(space, self.solver.needs)
        return self._through_solver(told)

    def foresee(self, problem: Problem) -> Outlook:
        """Return what is known of the inverse before the fit, some train rows read.

        As `outlook`, or as the curvature says by ``foresee(problem, asked)`` in its place; and as
        the solver says by ``foresee(operator, outlook)``; then the curvature must be one that does
        its work when its operator is used, as those of rows do.
        """
        told = self.outlook(problem.space)
        if self._takes_all and hasattr(self.curvature, "foresee"):
            told = self._through_solver(self.curvature.foresee(problem, self.solver.needs))
        if not hasattr(self.solver, "foresee"):
            return told
        foreseen: Outlook = self.solver.foresee(self.curvature.fit(problem), told)
        return foreseen

    @property
    def _takes_all(self) -> bool:
        """Return whether the solver takes the curvature as it is, by its spectrum or its rows."""
        return self.solver.needs <= {"spectral", "rows"}

    def _through_solver(self, told: Outlook) -> Outlook:
        """Return what is known of the inverse from what the curvature says of it."""
        splits = told.splits and "spectral" in self.solver.needs
        forms = getattr(self.solver, "forms", True)
        return attrs.evolve(told, splits=splits, spectral=splits, forms=forms)

    def check(self, space: Space) -> None:
        """Raise `SpecError` when the solver asks for what the curvature does not give."""
        given = self.curvature.gives(space)
        missing = self.solver.needs - given
        if missing:
            raise SpecError(
                f"inverse Hessian: the solver {_name(self.solver)} needs {sorted(missing)}, which "
                f"the curvature {_name(self.curvature)} does not give (it gives {sorted(given)}); "
                "choose another solver or curvature: see 'dattri parts'"
            )
        self.solver.check(space)
        if self.form == "two-sided":
            self._check_root()
        if self.preconditioner is None:
            return
        if not isinstance(self.solver, PreconditionedSolver):
            raise SpecError(
                f"inverse Hessian: the solver {_name(self.solver)} takes no preconditioner; use "
                "the solver 'cg' or 'lissa', or leave preconditioner= out"
            )
        self.preconditioner.check(space)
        if space_after(self.preconditioner, space) != space:
            raise SpecError(
                f"inverse Hessian: the preconditioner {_name(self.preconditioner)} leaves fewer "
                "numbers of a row; a preconditioner gives whole rows"
            )

    def _check_root(self) -> None:
        if self.preconditioner is not None or not isinstance(self.solver, RootSolver):
            lacking = "does not give" if self.preconditioner is None else "gives unpreconditioned"
            raise SpecError(
                f"inverse Hessian: form 'two-sided' needs (H + damping I)^-1/2, which the solver "
                f"{_name(self.solver)} {lacking}; use a solver that decomposes the curvature and "
                "has root_for, such as 'cholesky' or 'spectral', or form='one-sided'"
            )

    def fit(self, problem: Problem) -> Inverse:
        """Fit the curvature on the whole train set and hand its operator to the solver.

        Raises:
            NumericsError: The form is two-sided and H + damping I is not positive definite.
        """
        operator = self.curvature.fit(problem)
        if not isinstance(operator, Operator):
            raise SpecError(
                f"curvature {_name(self.curvature)}: fit gives a {type(operator).__name__}, "
                "expected what answers dattri_core.Operator"
            )
        if self.form == "two-sided":
            assert isinstance(self.solver, RootSolver)
            return TwoSided(self.solver.root_for(operator, problem.device), problem.space)
        if self.preconditioner is None:
            return self.solver.solve_for(operator, problem.device)
        assert isinstance(self.solver, PreconditionedSolver)
        inverse = self.preconditioner.fit(problem)
        return self.solver.precondition(operator, problem.device, inverse)


@frozen(eq=False)
class InBasis:
    """What a split or a reduced inverse leaves to the test side alone, as a step."""

    inverse: SplitInverse | ReducedInverse

    @property
    def blockwise(self) -> bool:
        """Return True: inverses of blocks are split, and reduced rows have one block."""
        return True

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what the inverse reports."""
        return self.inverse.stats

    def apply(self, rows: Rows) -> Rows:
        """Return M k for rows k in the basis."""
        return self.inverse.in_basis(rows)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the same of the inverse at another damping."""
        inverse = self.inverse.with_damping(damping)
        assert isinstance(inverse, (SplitInverse, ReducedInverse))
        return InBasis(inverse)


@frozen(eq=False)
class TwoSided:
    """R = (H + damping I)^-1/2, symmetric, as a map of the rows of both sides.

    Args:
        root: Its ``apply`` is R g.
        out_space: That of the rows, which R keeps.
    """

    root: Inverse
    out_space: Space

    @property
    def blockwise(self) -> bool:
        """Return whether block k of R g needs block k of g only."""
        return self.root.blockwise

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what the solver reported."""
        return self.root.stats

    @property
    def held(self) -> int:
        """Return the bytes that the root keeps."""
        return getattr(self.root, "held", 0)

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g = R R g for every row g."""
        return self.root.apply(self.root.apply(rows))

    def map(self, rows: Rows) -> Rows:
        """Return R g for every row g."""
        return self.root.apply(rows)

    def adjoint(self, rows: Rows) -> Rows:
        """Return R^T k = R k for every row k."""
        return self.root.apply(rows)

    def with_damping(self, damping: Damping) -> TwoSided:
        """Return the root at another damping, without another pass over the data if possible."""
        return TwoSided(self.root.with_damping(damping), self.out_space)


@frozen(eq=False)
class Chain:
    """The stages of one checkpoint, built and fitted.

    Args:
        source: At the checkpoint.
        steps: In the order in which rows pass them.
        split: Whether the last step, a `SplitInverse`, is carried by both sides.
        absorbed: How many stages before those of the steps the source takes by itself.
        own: Whether the train rows that pass are those that the steps were fitted on.
    """

    source: BoundSource
    steps: tuple[Step, ...] = ()
    split: bool = False
    absorbed: int = 0
    own: bool = True

    @cached_property
    def maps(self) -> tuple[LinearMap, ...]:
        """Return the steps of the train side."""
        return tuple(step for step in map(_train_map, self.steps) if step is not None)

    @cached_property
    def inverses(self) -> tuple[Inverse, ...]:
        """Return the inverse Hessians, of either form."""
        return tuple(step for step in self.steps if is_inverse(step))

    @cached_property
    def train_steps(self) -> tuple[LinearMap, ...]:
        """Return the steps of the train side."""
        return (*self.maps, self._basis) if self.split else self.maps

    @cached_property
    def test_steps(self) -> tuple[Step, ...]:
        """Return the steps of the test side; an inverse of two sides takes two."""
        steps = [half for step in self.steps for half in _halves(step)]
        if not self.split:
            return tuple(steps)
        last = self.steps[-1]
        assert isinstance(last, SplitInverse)
        return (*steps[:-1], self._basis, InBasis(last))

    @property
    def _basis(self) -> LinearMap:
        last = self.steps[-1]
        assert isinstance(last, SplitInverse)
        assert last.basis is not None
        return last.basis

    @property
    def space(self) -> Space:
        """Return the space of rows after all steps."""
        maps = self.train_steps
        return maps[-1].out_space if maps else self.source.space

    def self_influence(self) -> Tensor | None:
        """Return <A g, B g>, ``[n_train]``, of the rows g of the fit, where an inverse knows it."""
        # One at the end, after maps alone: it knows rows as they came to it, by their positions.
        last = self.steps[-1] if self.steps and self.own else None
        if not isinstance(last, LeverageInverse) or not last.leverages:
            return None
        return None if any(map(is_inverse, self.steps[:-1])) else last.self_influence()

    @property
    def blockwise(self) -> bool:
        """Return whether train rows can pass block by block."""
        return all(step.blockwise for step in self.train_steps)

    @property
    def test_blockwise(self) -> bool:
        """Return whether rows can pass the stages of the test side block by block."""
        return all(step.blockwise for step in self.test_steps)

    def train(self, rows: Rows) -> Rows:
        """Return A g for train rows, whole or (when `blockwise`) in parts."""
        for step in self.train_steps:
            rows = step.map(rows)
        return rows

    def test(self, rows: Rows) -> Rows:
        """Return B g for test rows."""
        return pass_steps(self.test_steps, rows)

    def both(self, rows: Rows) -> tuple[Rows, Rows]:
        """Return A g and B g for rows g; steps that both sides begin with are taken once."""
        train = test = rows
        for step in self.test_steps:
            across, shared = _train_map(step), train is test
            if across is not None:
                train = across.map(train)
            if not isinstance(step, LinearMap):
                test = step.apply(test)
            else:
                test = train if shared else step.map(test)
        return train, test

    def with_damping(self, dampings: Sequence[Damping | None]) -> Chain:
        """Return the chain with some steps at another damping, without a new fit.

        ``dampings`` has an entry for each stage; None leaves it as it is.
        """
        steps: list[Any] = list(self.steps)
        for at, damping in enumerate(dampings[self.absorbed :]):
            if damping is not None:
                steps[at] = steps[at].with_damping(damping)
        return attrs.evolve(self, steps=tuple(steps))


def taken(step: Step, rows: Rows) -> Rows:
    """Return rows after one step of the test side.

    Raises:
        SpecError: The step gives something that is no rows.
    """
    if isinstance(step, LinearMap):
        verb, after = "map", cast("Any", step.map(rows))
    else:
        verb, after = "apply", step.apply(rows)
    if not isinstance(after, Rows):
        raise SpecError(
            f"stage {type(step).__name__}: {verb} gives a {type(after).__name__}, expected "
            "dattri_core.Rows: Rows(space, {name: DenseBlock(values)}, rows.index, rows.aux)"
        )
    return after


def pass_steps(steps: Sequence[Step], rows: Rows) -> Rows:
    """Return rows after some steps of the test side."""
    for step in steps:
        rows = taken(step, rows)
    return rows


def check_stages(stages: Sequence[Stage], space: Space, source: BoundSource | None = None) -> Space:
    """Walk a space through stages without a tensor and return the space at the end.

    Args:
        stages: In the order in which rows pass them.
        space: Of the source.
        source: The source itself, once it is bound, for what it must be able to do.

    Raises:
        SpecError: A stage cannot take what the stages before it give; says which and why.
    """
    lacking: list[str] = []
    for stage in stages:
        if isinstance(stage, Projector):
            space = stage.out_space(space)
            if "adjoint" not in stage.gives:
                lacking.append(_name(stage))
            continue
        for need in sorted(stage.needs & KIND_OF_NEED.keys()):
            if source is not None:
                require_outputs(KIND_OF_NEED[need], source)
        products = sorted(need for need in stage.needs if need.endswith("-product"))
        if products and source is not None and not source.space.covers_parameters:
            raise SpecError(
                f"inverse Hessian {_name(stage)}: needs a {products[0]}, and the rows of "
                f"{type(source).__name__} are not gradients with respect to parameters; use the "
                "source 'per-example' or 'functional', or a curvature made from rows"
            )
        if products and lacking:
            raise SpecError(
                f"inverse Hessian {_name(stage)}: needs a {products[0]} lifted through "
                f"{', '.join(lacking)}, which has no adjoint; put the inverse Hessian first "
                "(stages=[{inverse_hessian=...}, {projector=...}]), or use a projector that gives "
                "'adjoint' or a curvature made from rows"
            )
        stage.check(space)
        space = space_after(stage, space)
    return space


def space_after(stage: Stage, space: Space) -> Space:
    """Return the space of rows after one stage."""
    after: Space = stage.out_space(space) if hasattr(stage, "out_space") else space
    return after


def all_blockwise(stages: Sequence[Stage], space: Space) -> bool:
    """Return whether train rows of a space certainly pass all stages block by block."""
    for stage in stages:
        after = space_after(stage, space)
        if isinstance(stage, Projector) and "keeps-factors" not in stage.gives:
            return False
        if not isinstance(stage, Projector) and (after != space or is_two_sided(stage)):
            return False
        space = after
    return True


def needs_data(projector: Projector) -> TypeGuard[DataProjector]:
    """Return whether a projector is fitted on the train set, instead of built."""
    return isinstance(projector, DataProjector) and bool(projector.needs)


def is_two_sided(stage: Stage) -> bool:
    """Return whether a stage multiplies the rows of both sides by the root of an inverse."""
    return isinstance(stage, CurvatureInverse) and stage.form == "two-sided"


def is_inverse(step: Step) -> TypeGuard[Inverse]:
    """Return whether a step is a fitted inverse Hessian, of either form."""
    return isinstance(step, InverseRoot) or not isinstance(step, LinearMap)


def _train_map(step: Step) -> LinearMap | None:
    if isinstance(step, LinearMap):
        return step
    return step.train_map if isinstance(step, ReducedInverse) else None


def _halves(step: Step) -> tuple[Step, ...]:
    across = _train_map(step)
    if across is None or across is step:
        return (step,)
    assert isinstance(step, ReducedInverse)
    return across, InBasis(step)


def example_space() -> Space:
    """Return a small space with both kinds of block, to check a method that has no task yet."""
    weight = ParameterView("layer.weight", (32, 24), 0, 24)
    bias = ParameterView("layer.bias", (32,), 24, 25)
    scale = ParameterView("norm.weight", (32,), 0, 1)
    shift = ParameterView("norm.bias", (32,), 1, 2)
    return Space(
        (
            BlockSpec("layer", "outer", (32, 25), (weight, bias)),
            BlockSpec("norm", "dense", (32, 2), (scale, shift)),
        )
    )


def _name(part: object) -> str:
    return type(part).__name__
