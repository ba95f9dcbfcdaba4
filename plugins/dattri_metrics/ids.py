"""Ids that `Scores` carry: rows and columns meet those of the other arguments, or are refused.

Arrays have no ids and are taken in their order. `Scores` of the default ids, their positions, are
too. Other ids say that rows or columns were chosen, moved or named, and nothing says whether the
other arguments went along.
"""

from __future__ import annotations

from typing import Any

from dattri_core import InputError, Scores, World

SIDES = ("train_ids", "test_ids")


def ordered(
    metric: str, scores: Any, what: str, train_ids: Any = None, test_ids: Any = None
) -> Any:
    """Return scores in the order of the other arguments.

    Args:
        metric: Who asks, for the message.
        scores: `Scores`, or an array, which is returned as it is.
        what: Names the other arguments, for the message.
        train_ids: Those of the other arguments; rows are chosen by them. None: they are in the
            order of positions.
        test_ids: The same for columns.

    Raises:
        InputError: The scores have ids that are not their positions and none are given, ids are
            given for an array, or one that is given has no scores.
    """
    given = dict(zip(SIDES, (train_ids, test_ids), strict=True))
    chosen = {side: ids for side, ids in given.items() if ids is not None}
    if not isinstance(scores, Scores):
        if chosen:
            raise InputError(
                f"{metric}: {' and '.join(chosen)} given, but the scores are a "
                f"{type(scores).__name__} without ids; give Scores, or no ids"
            )
        return scores
    for side in SIDES:
        if given[side] is None:
            _only_positions(metric, scores, "scores", what, side, f"{side}=, those of {what}, or, ")
    return scores.select(**chosen) if chosen else scores


def ordered_with(metric: str, what: str, one: Any, two: Any) -> None:
    """Refuse two matrices of scores whose ids do not say that they are in the same order.

    Args:
        metric: Who asks, for the message.
        what: Name of the second.
        one: `Scores` or an array.
        two: `Scores` or an array.

    Raises:
        InputError: Both have ids, and they differ; or one has ids that are not its positions, and
            the other none.
    """
    for side in SIDES:
        if isinstance(one, Scores) and isinstance(two, Scores):
            mine, theirs = getattr(one, side), getattr(two, side)
            if tuple(mine) != tuple(theirs):
                raise InputError(
                    f"{metric}: the scores have {side} {_shown(mine)}, {what} {_shown(theirs)}; "
                    f"give the second .select({side}=...) as the first has them, or, where the "
                    "order is the same, the values of both"
                )
        else:
            _only_positions(metric, one, "scores", what, side)
            _only_positions(metric, two, what, "scores", side)


def _only_positions(
    metric: str, scores: Any, name: str, what: str, side: str, fix: str = ""
) -> None:
    own = getattr(scores, side) if isinstance(scores, Scores) else ()
    if not _are_positions(own):
        raise InputError(
            f"{metric}: the {side} of {name} are {_shown(own)}, not their positions, and {what} "
            f"have none; give {fix}where the order is the same, the .values of {name}"
        )


def of_world(metric: str, scores: Any, world: World) -> Any:
    """Return scores in the order of the world's examples.

    Raises:
        InputError: They have ids that are neither positions nor those of the world.
    """
    if not isinstance(scores, Scores):
        return scores
    chosen = {}
    for side in SIDES:
        own, wanted = getattr(scores, side), getattr(world, side)
        if _are_positions(own) or tuple(own) == tuple(wanted):
            continue
        if set(own) != set(wanted):
            raise InputError(
                f"{metric}: the scores have {len(own)} {side} {_shown(own)}, the world "
                f"{len(wanted)}, {_shown(wanted)}; give scores of the world's examples, or "
                "scores.values, where the order is the same"
            )
        chosen[side] = wanted
    return scores.select(**chosen) if chosen else scores


def _are_positions(ids: Any) -> bool:
    return tuple(ids) == tuple(range(len(ids)))  # a selection names them one by one


def _shown(ids: Any) -> str:
    return ", ".join(repr(i) for i in ids[:3]) + (", ..." if len(ids) > 3 else "")
