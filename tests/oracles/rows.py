"""Rows made of parameters, entry by entry."""

from __future__ import annotations

from dattri_core.lift import empty_rows, to_parameters


def rows_of(space, values, index):
    """Return rows whose `to_parameters` are ``values``, by name ``[C, *parameter shape]``."""
    rows = empty_rows(space, values, index)
    for name, view in to_parameters(rows).items():
        view.copy_(values[name])
    return rows
