"""What scorers and folds answer: types, shapes, and numbers that were not asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dattri_core import assemble
from dattri_core.errors import SpecError
from dattri_core.protocols import MEASURED, Fold, FoldState, Scored, Scorer, Side, Snapshot


def finish(scorer: Scorer, total: Tensor, train: Side, test: Side) -> Scored:
    """Return the scores of a tile as the scorer gives them, of the right type and shape.

    Raises:
        SpecError: They are not, or the scorer reads a number that it does not need.
    """
    name = f"scorer {assemble.name_of(scorer)!r}: finish"
    try:
        scored = scorer.finish(total, train, test)
    except (TypeError, AttributeError, KeyError) as error:
        unread = sorted(MEASURED - scorer.needs)
        undeclared = isinstance(error, KeyError) or "NoneType" in str(error)
        if not unread or not undeclared:
            raise
        raise SpecError(
            f"{name} fails ({type(error).__name__}: {error}); of the numbers of a side it needs "
            f"{sorted(scorer.needs)}: {', '.join(unread)} are not measured, so None, and aux has "
            f"{sorted(train.aux)}; name what it reads in needs = frozenset({{...}})"
        ) from error
    if not isinstance(scored, Scored):
        raise SpecError(
            f"{name} gives a {type(scored).__name__}, expected dattri_core.Scored(values, weight)"
        )
    require_shape(name, scored.values, (len(train.index), len(test.index)))
    if scored.weight is not None:
        require_shape(f"{name}, weight", scored.weight, (len(train.index),))
    return scored


def update(fold: Fold, before: FoldState | None, scored: Scored, snapshot: Snapshot) -> FoldState:
    """Return the state of a tile after one more checkpoint, a mapping of tensors.

    Raises:
        SpecError: The fold gives something else.
    """
    state: Any = fold.update(before, scored, snapshot)
    if isinstance(state, Mapping):
        strays = [type(value).__name__ for value in state.values() if not isinstance(value, Tensor)]
        if not strays:
            return state
        got = f"a {type(state).__name__} that holds a {strays[0]}"
    else:
        got = f"a {type(state).__name__}"
    raise SpecError(
        f"fold {assemble.name_of(fold)!r}: update gives {got}, expected tensors by name, such as "
        '{"sum": scored.values}, so that a run can be stopped and resumed'
    )


def require_shape(what: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse numbers of another shape, which broadcasting would spread over the scores.

    Raises:
        SpecError: They are no tensor, or have another shape.
    """
    if not isinstance(values, Tensor):
        raise SpecError(f"{what} gives a {type(values).__name__}, expected a tensor {list(shape)}")
    if tuple(values.shape) != shape:
        raise SpecError(f"{what} gives {list(values.shape)}, expected {list(shape)}, [train, test]")
