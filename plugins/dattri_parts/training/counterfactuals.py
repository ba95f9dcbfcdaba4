"""Train sets that are asked for again and again: all but one example or group, random subsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dattri_core import Counterfactual, InputError, RandomStream

SEEDS = 2**32


def leave_one_out(
    n: int, *, seed: int = 0, indices: Sequence[int] | None = None
) -> list[Counterfactual]:
    """Return a train set without example i, for each i of ``indices``.

    Args:
        n: Examples of the whole train set, 2 or more.
        seed: Of the training, one for all, so that two models differ by their train sets only.
        indices: Positions of the examples to leave out; all by default.

    Raises:
        InputError: There are under two examples, or a position is outside of 0 to n - 1.
    """
    if n < 2:
        raise InputError(f"leave one out: of {n} examples none can be left out; give 2 or more")
    chosen = [int(i) for i in (range(n) if indices is None else indices)]
    wrong = [i for i in chosen if not 0 <= i < n]
    if wrong:
        raise InputError(
            f"leave one out: positions {wrong[:8]} of {n} examples; expected 0 to {n - 1}"
        )
    masks = []
    for i in chosen:
        mask = np.ones(n, dtype=bool)
        mask[i] = False
        masks.append(mask)
    return [Counterfactual(mask, seed) for mask in masks]


def leave_groups_out(n: int, groups: Sequence[Any], *, seed: int = 0) -> list[Counterfactual]:
    """Return a train set without the examples of a group, for each of ``groups``.

    Args:
        n: Examples of the whole train set.
        groups: Each a sequence of positions, or ``[n]`` truth values of which examples are in it.
            They may overlap. ``[labels == c for c in range(10)]`` are those of classes.
        seed: Of the training, one for all, so that two models differ by their train sets only.

    Raises:
        InputError: A group is empty, holds all examples, or is no group of positions 0 to n - 1.
    """
    masks = []
    for number, group in enumerate(groups):
        mask = ~_members(n, group, number)
        if mask.all() or not mask.any():
            held = "no example" if mask.all() else f"all {n} examples"
            raise InputError(
                f"leave groups out: group {number} holds {held}; give groups that leave some and "
                "take some"
            )
        masks.append(mask)
    if not masks:
        raise InputError("leave groups out: got no groups; give one or more")
    return [Counterfactual(mask, seed) for mask in masks]


def _members(n: int, group: Any, number: int) -> np.ndarray[Any, Any]:
    """Return which examples are in a group, ``[n]``."""
    given = np.asarray(group)
    if given.dtype == np.bool_ and given.shape == (n,):
        return given
    mask = np.zeros(n, dtype=bool)
    if given.size == 0:
        return mask
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise InputError(
            f"leave groups out: group {number} is {given.dtype} of shape {given.shape}; expected "
            f"positions [k], or truth values [{n}]"
        )
    wrong = given[(given < 0) | (given >= n)]
    if len(wrong):
        raise InputError(
            f"leave groups out: group {number} has positions {wrong[:8].tolist()} of {n} examples; "
            f"expected 0 to {n - 1}"
        )
    if given.shape == (n,) and n > 2 and given.max() <= 1:
        raise InputError(
            f"leave groups out: group {number} is {n} zeros and ones, which would be the positions "
            "0 and 1; give truth values (dtype bool), or each position once"
        )
    mask[given] = True
    return mask


def random_subsets(
    n: int, count: int, *, fraction: float = 0.5, seed: int = 0
) -> list[Counterfactual]:
    """Return random train sets of round(fraction n) examples, each with its own seed.

    Set k and its seed depend on (n, fraction, seed, k) alone, so that more can be asked for later.

    Args:
        n: Examples of the whole train set.
        count: Train sets.
        fraction: Of the examples that each holds, in (0, 1].
        seed: Of the masks and of the seeds.

    Raises:
        InputError: The fraction is outside of (0, 1] or leaves no example, or count is below 1.
    """
    size = round(fraction * n)
    if not 0 < fraction <= 1 or size < 1:
        raise InputError(
            f"random subsets: fraction {fraction} of {n} examples; give one in (0, 1] that keeps "
            "at least one example"
        )
    if count < 1:
        raise InputError(f"random subsets: count is {count}; give 1 or more")
    subsets = []
    for k in range(count):
        stream = RandomStream(seed, "random-subsets", k)
        mask = np.zeros(n, dtype=bool)
        random = np.random.Generator(np.random.PCG64(stream.key("mask")))
        mask[random.permutation(n)[:size]] = True
        subsets.append(Counterfactual(mask, stream.key("training") % SEEDS))
    return subsets
