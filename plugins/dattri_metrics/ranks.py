"""Ranks of columns, ties in the middle, and sums over what ranks above."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Ranks:
    """Each column of a matrix ``[n, m]`` in ascending order.

    Args:
        order: ``[n, m]``, positions of the entries in ascending order.
        first: ``[n, m]``, in that order: where the group of equal entries begins.
        last: Where it ends, inclusive.
    """

    order: Array
    first: Array
    last: Array

    @classmethod
    def of(cls, columns: Array) -> Ranks:
        """Sort the columns of ``[n, m]``."""
        order = np.argsort(columns, axis=0, kind="stable")
        ascending = np.take_along_axis(columns, order, axis=0)
        starts = np.ones(columns.shape, dtype=bool)
        starts[1:] = ascending[1:] != ascending[:-1]
        ends = np.ones(columns.shape, dtype=bool)
        ends[:-1] = starts[1:]
        n = len(columns)
        place = np.arange(n)[:, None]
        first = np.maximum.accumulate(np.where(starts, place, 0), axis=0)
        last = np.minimum.accumulate(np.where(ends, place, n - 1)[::-1], axis=0)[::-1]
        return cls(order, first, last)

    def scatter(self, ascending: Array) -> Array:
        """Return values that are given in ascending order at the places of their entries."""
        out = np.empty(ascending.shape, dtype=ascending.dtype)
        np.put_along_axis(out, self.order, ascending, axis=0)
        return out

    def gather(self, values: Array) -> Array:
        """Return values in ascending order of the entries."""
        return np.take_along_axis(np.broadcast_to(values, self.order.shape), self.order, axis=0)

    @property
    def centred(self) -> Array:
        """Return (rank - (n + 1) / 2) / n, equal entries sharing the mean of their ranks."""
        n = len(self.order)
        return self.scatter(((self.first + self.last) / 2 - (n - 1) / 2) / n)

    def above(self, values: Array) -> Array:
        """Return (1 / n) sum over i of h(x_i - x_s) values_i, h = 1 above, 1/2 at, 0 below zero."""
        sums = running(self.gather(values))
        to_first = np.take_along_axis(sums, self.first, axis=0)
        to_last = np.take_along_axis(sums, self.last + 1, axis=0)
        return self.scatter(sums[-1] - (to_first + to_last) / 2) / len(self.order)


def running(values: Array) -> Array:
    """Return sums of the first 0, 1, ... n rows, ``[n + 1, m]``."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=sums[1:])
    return sums
