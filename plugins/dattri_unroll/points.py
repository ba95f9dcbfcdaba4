"""The points of a run: its checkpoints as problems of one space, and test rows at its end."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve, field, frozen
from typing_extensions import Protocol

from dattri_core import (
    BoundSource,
    Checkpoint,
    Curvature,
    Evaluator,
    Examples,
    LinearMap,
    MovableSource,
    Operator,
    Problem,
    Projector,
    RandomStream,
    Rows,
    Source,
    Space,
    SpecError,
    Task,
    TrainProblem,
    map_tensors,
    parse_bytes,
)

COPIES = 6
"""Of the carried test rows that are alive at once: two of them, a product, what they become."""
OF_ADAM = 3
"""Further ones of a run of Adam: of both moments, and what comes of them."""
LARGEST_BATCH = 4096
SAMPLE = 3


class Unrolled(Protocol):
    """A method along a run: the parts that are the same at all of its points."""

    @property
    def source(self) -> Source:
        """Return what gives the gradients."""
        ...

    @property
    def projector(self) -> Projector:
        """Return what sketches them."""
        ...

    @property
    def curvature(self) -> Curvature | None:
        """Return what is fitted along the run, if anything."""
        ...

    @property
    def seed(self) -> int:
        """Return that of the projector and of what the curvature draws."""
        ...


@frozen(eq=False)
class Points:
    """What is evaluated at each checkpoint of a run.

    Args:
        name: Of the method, for errors.
        source: Of the rows.
        projector: The same map at every checkpoint.
        curvature: Fitted along the run; None: nothing is.
        asked: What the method asks of the curvature's operator.
        seed: Of the projector, and of what a curvature draws.
        task: Its checkpoints are the run.
        train: The train set.
        test: The test set.
        memory: Bytes to work in.
    """

    name: str
    source: Source
    projector: Projector
    curvature: Curvature | None
    asked: str
    seed: int
    task: Task
    train: Examples
    test: Examples
    memory: int
    _maps: dict[Space, LinearMap] = field(factory=dict, init=False)
    _bound: list[BoundSource] = field(factory=list, init=False)  # the last one that was bound

    @classmethod
    def of(
        cls,
        part: Unrolled,
        name: str,
        asked: str,
        task: Task,
        train: Any,
        test: Any,
        memory: str | int | None,
    ) -> Points:
        """Return the points of a run for a method and data sets as users give them."""
        return cls(
            name,
            part.source,
            part.projector,
            part.curvature,
            asked,
            part.seed,
            task,
            Examples.of(train, "train"),
            Examples.of(test, "test"),
            parse_bytes(memory, task.device),
        )

    def __attrs_post_init__(self) -> None:
        self._require_fitting_parts()

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scores."""
        parameters = dict(self.task.model.named_parameters())
        first = parameters[self.task.parameter_names[0]]
        return torch.promote_types(first.dtype, torch.float32)

    def columns(self) -> list[slice]:
        """Return the test examples that are carried at once, group by group."""
        adam = any(c.step is not None and c.step.adam for c in self.task.checkpoints)
        copies = COPIES + OF_ADAM if adam else COPIES
        each = copies * self.problem(-1).space.dim * self.dtype.itemsize
        size, count = max(1, self.memory // 2 // each), len(self.test)
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def problem(self, position: int, *, along: bool = False) -> TrainProblem:
        """Return the train set at a checkpoint, after the projector.

        Args:
            position: Of the checkpoint; -1 for the last one.
            along: Whether a source that was bound before may be moved there, as there are many
                steps in a run and one model.

        Raises:
            SpecError: The source gives no gradients, or the curvature not what is asked.
        """
        checkpoint, device = self.task.checkpoints[position], self.task.device
        bound = self._bind(checkpoint, along=along)
        if not isinstance(getattr(bound, "evaluator", None), Evaluator):
            raise SpecError(
                f"{self.name}: the rows of {type(self.source).__name__} are not gradients of "
                "parameters, which steps of gradient descent are made of; use the source "
                "'per-example' or 'functional'"
            )
        if bound.space not in self._maps:
            # One sketch for the whole run: the carried rows stay in its space.
            stream = RandomStream(self.seed, "projector")
            made = self.projector.build(bound.space, stream=stream, device=device)
            self._maps[bound.space] = made
        each = bound.space.dim * self.dtype.itemsize
        size = max(1, min(LARGEST_BATCH, self.memory // 8 // each))
        random = RandomStream(self.seed, "curvature", checkpoint.position)
        maps = (self._maps[bound.space],)
        problem = TrainProblem(bound, self.train, maps, size, random, self.memory // 4)
        gives = None if self.curvature is None else self.curvature.gives(problem.space)
        if gives is not None and self.asked not in gives:
            raise SpecError(
                f"{self.name}: needs {self.asked!r} of its curvature, and "
                f"{type(self.curvature).__name__} gives {sorted(gives)} on these rows; see the "
                f"curvatures that give {self.asked!r} with: dattri parts"
            )
        return problem

    def fit(self, problem: Problem) -> Operator:
        """Return the curvature of a problem, of a method that has one."""
        assert self.curvature is not None
        return self.curvature.fit(problem)

    def _bind(self, checkpoint: Checkpoint, *, along: bool) -> BoundSource:
        if along and self._bound and isinstance(self.source, MovableSource):
            return self.source.move(self._bound[-1], checkpoint)
        sample = map_tensors(lambda t: t.to(self.task.device), self.train.sample(SAMPLE))
        bound = self.source.bind(self.task, checkpoint, sample)
        self._bound[:] = [bound]
        return bound

    def test_rows(self, problem: TrainProblem, columns: slice) -> Rows:
        """Return rows of some test examples, formed, in float32 or better."""
        asked = evolve(problem, examples=self.test, role="test")
        index = torch.arange(columns.start, columns.stop)
        flat = torch.cat([part.flat().to(self.dtype) for part in asked.rows(index)])
        return Rows.from_flat(problem.space, flat, index)

    def _require_fitting_parts(self) -> None:
        """Raise `SpecError` when parts cannot be carried along a run together."""
        if hasattr(self.source, "members"):
            raise SpecError(
                f"{self.name}: the source {type(self.source).__name__} makes several networks of a "
                "checkpoint, and a run is the steps of one; use 'per-example' or 'functional'"
            )
        if getattr(self.projector, "needs", frozenset()):
            raise SpecError(
                f"{self.name}: the projector {type(self.projector).__name__} is fitted on data and "
                "would be another one at each checkpoint, but rows are carried from one to the "
                "next in one space; use a random projector"
            )
        if self.curvature is None:
            return
        products = {"hessian-product", "ggn-product"} & self.curvature.needs
        if products and "adjoint" not in self.projector.gives:
            raise SpecError(
                f"{self.name}: the curvature {type(self.curvature).__name__} needs products with "
                f"parameters, and the projector {type(self.projector).__name__} has no adjoint to "
                "lead back to them; use the curvature 'gauss-newton', or a projector that gives "
                "'adjoint'"
            )
        if "reference-rows" in self.curvature.needs:
            raise SpecError(
                f"{self.name}: the curvature {type(self.curvature).__name__} mixes in reference "
                "examples, and that of a run is of its train examples; use 'gauss-newton', 'ggn' "
                "or 'hessian'"
            )
