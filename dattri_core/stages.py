"""Stages: projectors and inverse Hessians in any order, as pairs of maps (train side, test side).

For train row g_i and test row g_j a chain of stages computes ``<A g_i, B g_j>``. A projector P adds
(P, P) to (A, B); an inverse Hessian adds (1, (H + damping I)^-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from attrs import frozen

from dattri_core.blocks import Block
from dattri_core.errors import SpecError
from dattri_core.protocols import (
    BoundSource,
    Curvature,
    Damping,
    Inverse,
    InverseHessian,
    LinearMap,
    Outlook,
    Problem,
    Projector,
    Solver,
    SplitInverse,
)
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space

Stage = Projector | InverseHessian
Step = LinearMap | Inverse


@frozen
class CurvatureInverse:
    """The standard inverse Hessian, composed: (H + damping I)^-1 with H a curvature's operator.

    Args:
        curvature: What H is.
        solver: How its damped inverse is applied; owns the damping.
    """

    curvature: Curvature
    solver: Solver

    @property
    def needs(self) -> frozenset[str]:
        """Return what the curvature asks of the problem."""
        return self.curvature.needs

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

    def fit(self, problem: Problem) -> Inverse:
        """Fit the curvature on the whole train set and hand its operator to the solver."""
        return self.solver.solve_for(self.curvature.fit(problem), problem.device)


@frozen(eq=False)
class Middle:
    """What a split inverse leaves for the test side alone, as a step."""

    inverse: SplitInverse

    @property
    def blockwise(self) -> bool:
        """Return whether the two sides meet block by block."""
        return _train_map(self.inverse).blockwise

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what the inverse reports."""
        return self.inverse.stats

    def apply(self, rows: Rows) -> Rows:
        """Return M k for rows of the train map's space."""
        return self.inverse.middle(rows)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the middle of the inverse at another damping."""
        inverse = self.inverse.with_damping(damping)
        assert isinstance(inverse, SplitInverse)
        return Middle(inverse)


@frozen(eq=False)
class Chain:
    """The stages of one checkpoint, built and fitted.

    With ``split`` the last step, a `SplitInverse`, is carried by both sides.
    """

    source: BoundSource
    steps: tuple[Step, ...] = ()
    split: bool = False

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """Return the projectors."""
        return tuple(step for step in self.steps if isinstance(step, LinearMap))

    @property
    def inverses(self) -> tuple[Inverse, ...]:
        """Return the inverse Hessians."""
        return tuple(step for step in self.steps if not isinstance(step, LinearMap))

    @property
    def train_steps(self) -> tuple[LinearMap, ...]:
        """Return the steps of the train side."""
        last = self._split_step()
        return self.maps if last is None else (*self.maps, _train_map(last))

    @property
    def test_steps(self) -> tuple[Step, ...]:
        """Return the steps of the test side."""
        last = self._split_step()
        return self.steps if last is None else (*self.steps[:-1], _train_map(last), Middle(last))

    def _split_step(self) -> SplitInverse | None:
        if not self.split:
            return None
        last = self.steps[-1]
        assert isinstance(last, SplitInverse)
        return last

    @property
    def space(self) -> Space:
        """Return the space of rows after all steps."""
        maps = self.train_steps
        return maps[-1].out_space if maps else self.source.space

    @property
    def blockwise(self) -> bool:
        """Return whether train rows can pass block by block."""
        return all(step.blockwise for step in self.train_steps)

    def train(self, rows: Rows) -> Rows:
        """Return A g for train rows, whole or (when `blockwise`) in parts."""
        for step in self.train_steps:
            rows = step.map(rows)
        return rows

    def train_block(self, name: str, block: Block, index: Any) -> Rows:
        """Return A g for one block of train rows; only when `blockwise`."""
        return self.train(Rows(self.source.space.select([name]), {name: block}, index))

    def test(self, rows: Rows) -> Rows:
        """Return B g for test rows."""
        return pass_steps(self.test_steps, rows)

    def with_damping(self, dampings: Sequence[Damping | None]) -> Chain:
        """Return the chain with some steps at another damping, without a new fit.

        Args:
            dampings: One entry a step; None leaves it as it is.
        """
        steps: list[Any] = list(self.steps)
        for at, damping in enumerate(dampings):
            if damping is not None:
                steps[at] = steps[at].with_damping(damping)
        return attrs.evolve(self, steps=tuple(steps))


def _train_map(inverse: SplitInverse) -> LinearMap:
    made = inverse.train_map
    assert made is not None
    return made


def outlook_of(stage: Stage, step: Step) -> LinearMap | Outlook:
    """Return a fitted map as it is, and what is known of a fitted inverse."""
    if isinstance(step, LinearMap) or isinstance(stage, Projector):
        assert isinstance(step, LinearMap)
        return step
    train_map = step.train_map if isinstance(step, SplitInverse) else None
    whole = train_map is not None and not train_map.blockwise
    return Outlook(
        blockwise=step.blockwise,
        forms=bool(stage.needs),
        rank=getattr(step, "rank", None),
        splits=train_map is not None,
        size=train_map.out_space.dim if train_map is not None and whole else None,
    )


def outlook_before_fit(stage: InverseHessian) -> Outlook:
    """Return what an inverse Hessian says of its inverse before it is fitted.

    One that says nothing is taken to need whole rows and to form them, the most that it can cost.
    """
    told: Outlook = getattr(stage, "outlook", Outlook(blockwise=not stage.needs))
    return attrs.evolve(told, forms=bool(stage.needs))


def pass_steps(steps: Sequence[Step], rows: Rows) -> Rows:
    """Return rows after some steps of the test side."""
    for step in steps:
        rows = step.map(rows) if isinstance(step, LinearMap) else step.apply(rows)
    return rows


def check_stages(stages: Sequence[Stage], space: Space) -> Space:
    """Walk a space through stages without a tensor and return the space at the end.

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
        products = sorted(need for need in stage.needs if need.endswith("-product"))
        if products and lacking:
            raise SpecError(
                f"inverse Hessian {_name(stage)}: needs a {products[0]} lifted through "
                f"{', '.join(lacking)}, which has no adjoint; put the inverse Hessian first "
                "(stages=[{inverse_hessian=...}, {projector=...}]), or use a projector that gives "
                "'adjoint' or a curvature made from rows"
            )
        stage.check(space)
    return space


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
