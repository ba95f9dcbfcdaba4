"""Arrays that are handed in: made float64 and checked, each by the name that the user knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dattri_core import InputError, Scores

Array = np.ndarray[Any, Any]


def numbers(metric: str, name: str, value: Any, axes: tuple[str, ...]) -> Array:
    """Return finite float64 numbers with the given axes.

    Args:
        metric: Who asks, for the message.
        name: Of the argument.
        value: A tensor, an array, nested lists, or `Scores`.
        axes: Letters or names of the axes, ``("n_train", "n_test")``.

    Raises:
        InputError: Another number of axes, an empty one, or a number that is not finite.
    """
    array = np.asarray(_plain(value))
    if array.ndim != len(axes) or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(
            f"{metric}: {name} is {array.dtype} of shape {array.shape}; expected numbers "
            f"[{', '.join(axes)}], at least one along each axis"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"{metric}: {name}[{', '.join(map(str, first))}] is {array[first]}; "
            "expected finite numbers"
        )
    return array


def truths(metric: str, name: str, value: Any, axes: tuple[str, ...]) -> Array:
    """Return truth values with the given axes; 0 and 1 count as such.

    Raises:
        InputError: Another number of axes, an empty one, or another value.
    """
    try:
        array = np.asarray(_plain(value))
    except ValueError as error:  # rows of different lengths
        raise InputError(
            f"{metric}: {name} has rows of different lengths; expected truth values "
            f"[{', '.join(axes)}]{_of_positions(axes)}"
        ) from error
    if array.ndim != len(axes) or array.size == 0:
        raise InputError(
            f"{metric}: {name} has shape {array.shape}; expected truth values [{', '.join(axes)}]"
            f"{_of_positions(axes)}"
        )
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError(
            f"{metric}: {name} holds other values than true and false, "
            f"{array[~np.isin(array, (0, 1))][0]!r} say{_of_positions(axes)}"
        )
    return array.astype(bool)


def flag(metric: str, name: str, value: Any) -> bool:
    """Return a truth value; None and texts are none.

    Raises:
        InputError: It is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{metric}: {name} is {value!r}; give True or False")
    return bool(value)


def labels(metric: str, name: str, value: Any, count: int) -> Array:
    """Return one label for each of ``count`` examples: integers, texts or truth values.

    Raises:
        InputError: Another shape or number of examples, or numbers that are no labels.
    """
    array = np.asarray(_plain(value))
    if array.shape != (count,) or array.dtype.kind not in "biuUS":
        raise InputError(
            f"{metric}: {name} is {array.dtype} of shape {array.shape}; expected one integer or "
            f"text for each of {count} examples, [{count}]"
        )
    return array


def same_kind(metric: str, name: str, train: Array, test: Array) -> None:
    """Refuse labels that cannot be compared, so that none would ever be equal.

    Args:
        metric: Who asks, for the message.
        name: Of both: ``"labels"`` for ``train_labels`` and ``test_labels``.
        train: ``[n_train]``, from `labels`.
        test: ``[n_test]``.

    Raises:
        InputError: Numbers on one side and texts on the other, or no test example has a label of
            the train set.
    """
    kinds = [{"U": "texts", "S": "bytes"}.get(x.dtype.kind, "numbers") for x in (train, test)]
    shown = (
        f"train_{name} are {kinds[0]} ({train[0].item()!r} first), test_{name} {kinds[1]} "
        f"({test[0].item()!r} first)"
    )
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{metric}: {shown}; they are never equal, give the same kind on both sides"
        )
    if not np.isin(test, train).any():
        raise InputError(
            f"{metric}: {shown}; no test example has one that occurs in the train set, give the "
            "same names on both sides"
        )


def same_shape(metric: str, **arrays: Array) -> None:
    """Refuse arrays of different shapes.

    Raises:
        InputError: Two shapes differ; all are named.
    """
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InputError(f"{metric}: shapes differ: {shapes}; expected the same")


def _of_positions(axes: tuple[str, ...]) -> str:
    masks = f"numpy.isin(numpy.arange({axes[-1]}), positions)"
    if len(axes) > 1:
        masks = f"numpy.stack([{masks} for positions in ...])"
    return f"; positions become truth values by {masks}"


def _plain(value: Any) -> Any:
    value = value.values if isinstance(value, Scores) else value
    if isinstance(value, (list, tuple)) and any(isinstance(x, Scores) for x in value):
        return np.stack([np.asarray(_plain(x)) for x in value])
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double().numpy() if value.is_floating_point() else value.numpy()
