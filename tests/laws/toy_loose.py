"""Toy parts whose fields can be set: what a part must not be."""

from __future__ import annotations


def loose(cls, *args, **values):
    """Return a part of a frozen class with the frost taken off."""
    body = {"__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    made = type(f"Loose{cls.__name__}", (cls,), body)
    return made(*args, **values)


def emptied(rows):
    """Set the auxiliary numbers of rows to zero, in place."""
    for numbers in rows.aux.values():
        numbers.zero_()
