"""One method in one world: its scores, its self-influence, and what they took."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
from attrs import frozen
from torch import Tensor

from dattri_core import (
    ConvergenceWarning,
    Damping,
    FittedMethod,
    Method,
    PreconditionedSolver,
    Scores,
    SpecError,
    Task,
    method,
    sides_differ,
)
from dattri_parts.measuring.peak import PeakMemory

Array = np.ndarray[Any, Any]
ITERATIVE = (
    "each train example would need an iterative solve over the whole train set, which a metric "
    "with by='self-influence' asks for"
)
WHOLE_COLUMNS = "the scorer sees all train examples at once and gives none a score for itself"
TWO_KINDS = "train rows are of another kind than test rows, and none is its own query"
NOT_OFFERED = "the method gives no score of an example for itself"
TRAJECTORY, STEPS = "trajectory", "steps"
"""What an attributor's ``reads`` says where it follows a training run, or every step of one."""


@frozen
class Passes:
    """How often train examples went through the model, in passes over the whole train set.

    Args:
        alone: Of the method by itself.
        done: That were made for it; fewer where it used what others had computed.
    """

    alone: float
    done: float


@frozen(eq=False)
class Attribution:
    """The scores of a method and what they took.

    Args:
        scores: ``[n_train, n_test]``, with the ids of the world.
        seconds: To fit and to attribute.
        peak: Bytes, see `PeakMemory`; None where it cannot be measured.
        notes: Warnings, such as a solver that did not converge.
        fitted: The method on its train set; None for those that are not made of parts.
        passes: None for methods that are not made of parts.
    """

    scores: Scores
    seconds: float
    peak: int | None
    notes: tuple[str, ...]
    fitted: FittedMethod | None
    passes: Passes | None = None


@frozen(eq=False)
class SelfInfluence:
    """The score of each train example for its own loss, where a method has one.

    Args:
        values: ``[n_train]``; None where the method has none.
        seconds: To compute them.
        note: Why there are none.
        notes: Warnings.
    """

    values: Array | None
    seconds: float = 0.0
    note: str = ""
    notes: tuple[str, ...] = ()


def attribute(made: Any, task: Task, world: Any) -> Attribution:
    """Attribute the test set of a world to its train set, measured.

    Args:
        made: A method.
        task: Of the world; see `task_of`.
        world: A `dattri_core.World`.
    """
    fitted = passes = None
    with heard() as notes, PeakMemory(task.device) as peak:
        started = time.perf_counter()
        if isinstance(made, Method):
            fitted = made.fit(task, world.train, progress=False)
            scores = fitted.attribute(world.test)
        else:
            scores = made.attribute(task, world.train, world.test, progress=False)
        seconds = time.perf_counter() - started
    if fitted is not None:
        count = fitted.train.reads / len(fitted.train)
        passes = Passes(count, count)
    return Attribution(named(scores, world), seconds, peak.bytes, tuple(notes), fitted, passes)


def named(scores: Scores, world: Any) -> Scores:
    """Return scores with the ids of the world."""
    return Scores(
        scores.values, world.train_ids, world.test_ids, scores.provenance, known_finite=True
    )


def self_influence(
    made: Any, fitted: FittedMethod | None, task: Task, world: Any, *, solves: bool = False
) -> SelfInfluence:
    """Return the self-influence of a method, or why it has none.

    Args:
        made: A method; one that is not made of parts may answer ``self_influence(task, train)``.
        fitted: The same on its train set, where it is made of parts.
        task: What it was asked about.
        world: Its train set.
        solves: Also where each train example takes an iterative solve over the whole train set.
    """
    if fitted is None:
        if not hasattr(made, "self_influence"):
            return SelfInfluence(None, note=NOT_OFFERED)
        return _timed(lambda: made.self_influence(task, world.train, progress=False))
    if made.scorer.locality == "column":
        return SelfInfluence(None, note=WHOLE_COLUMNS)
    if sides_differ(made.source):
        return SelfInfluence(None, note=TWO_KINDS)
    if is_iterative(made) and not solves:
        return SelfInfluence(None, note=ITERATIVE)
    return _timed(fitted.self_influence)


def _timed(work: Callable[[], Tensor]) -> SelfInfluence:
    with heard() as notes:
        started = time.perf_counter()
        values = work().double().cpu().numpy()
        seconds = time.perf_counter() - started
    return SelfInfluence(values, seconds, notes=tuple(notes))


def task_of(made: Any, world: Any) -> Task:
    """Return what a method is asked about: the end of training, or checkpoints along the run.

    Raises:
        SpecError: It reads every step, and those of the world are not known.
    """
    if getattr(made, "reads", None) == STEPS:
        if world.steps is None:
            raise SpecError(
                f"{type(made).__name__} reads every step of a run, and this setting does not give "
                "them; take one that does, such as 'mnist-mlp', or a run of your own "
                "(dattri_unroll.record)"
            )
        return referenced(made, world.steps(), world)
    return referenced(made, world.trajectory if follows_run(made) else world.task, world)


def referenced(made: Any, task: Task, world: Any) -> Task:
    """Return a task with the test set as its reference examples, where a curvature mixes them in.

    A task that has its own keeps them.
    """
    if task.reference is not None or not _mixes(made):
        return task
    changed = copy.copy(task)
    changed.reference = world.test
    return changed


def follows_run(made: Any) -> bool:
    """Return whether a method reads checkpoints along one training run."""
    if isinstance(made, Method):
        return "learning-rate" in made.fold.needs
    return getattr(made, "reads", None) in (TRAJECTORY, STEPS)


def retrains(made: Any) -> bool:
    """Return whether a method is made of models that it has trained, and lacks what trains them."""
    return hasattr(made, "ground_truth") and made.ground_truth is None


def damped(name: str, damping: float, fields: Mapping[str, Any]) -> Any:
    """Return a registered method with fields set, at a damping where it takes one.

    Args:
        name: Of the method.
        damping: Absolute; not used where ``fields`` set one.
        fields: As `dattri_core.method` takes them.
    """
    made = method(name, **fields)
    if sets_damping(fields) or not takes_damping(made):
        return made
    return method(name, **fields, damping=damping)


def sets_damping(fields: Mapping[str, Any]) -> bool:
    """Return whether fields of a method, or of parts that they spell, set a damping.

    A part that is given as a value has its own.
    """
    return any(
        str(key).split(".")[-1] == "damping"
        or (isinstance(value, Mapping) and sets_damping(value))
        or _has_damping(value)
        for key, value in fields.items()
    )


def takes_damping(made: Any) -> bool:
    """Return whether one inverse Hessian of a method, and no more, has a damping."""
    stages = made.chain if isinstance(made, Method) else ()
    return sum(map(_has_damping, stages)) == 1


def _has_damping(part: Any) -> bool:
    if not attrs.has(type(part)):
        return False
    held = [getattr(part, each.name) for each in attrs.fields(type(part))]
    return any(isinstance(value, Damping) or _has_damping(value) for value in held)


def is_iterative(made: Any) -> bool:
    """Return whether an inverse Hessian passes over the train set again for every row.

    Those of CG and LiSSA do. Arnoldi takes products with H when it is fitted, and no more.
    """
    return any(isinstance(solver, PreconditionedSolver) for solver in _solvers(made))


def _mixes(made: Any) -> bool:
    stages = made.chain if isinstance(made, Method) else ()
    return any("reference-rows" in getattr(stage, "needs", ()) for stage in stages)


def _solvers(made: Any) -> list[Any]:
    """Return the solvers of the inverse Hessians that are made of a curvature and a solver."""
    if not isinstance(made, Method):
        return []
    found = [getattr(stage, "solver", None) for stage in made.chain]
    return [solver for solver in found if solver is not None]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Yield a list that holds, once the block has ended, what solvers warned of."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        yield notes
    notes += dict.fromkeys(" ".join(str(w.message).split()) for w in caught)


def spell_error(error: Exception) -> str:
    """Return an error in one line: its class and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
