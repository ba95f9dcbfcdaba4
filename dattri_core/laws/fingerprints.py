"""Laws of the fingerprint of a setting's retraining: outcomes that differ are kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CellType, FunctionType
from typing import Any

import attrs
import numpy as np
from attrs import evolve
from torch import Tensor

from dattri_core.laws.law import law, require, require_equal
from dattri_core.laws.settings import TOLERANCE, WRONG, SettingBench, gap_of, half_of
from dattri_core.laws.untouched import contents


def _gives_it_alone(bench: SettingBench) -> str | None:
    made = getattr(bench.part, "retraining", None)
    return "it gives its retraining with a world only" if made is None else None


@law("setting", _gives_it_alone)
def retraining_alone_is_that_of_the_world(bench: SettingBench) -> None:
    """What `retraining` gives has the fingerprint, the sizes and the targets of the world's."""
    shares = (None,) if bench.world.true_labels is None else (None, WRONG)
    for wrong in shares:
        got, want = bench.retraining(wrong=wrong), bench.loaded(wrong=wrong).retraining
        for name in ("fingerprint", "n_train", "n_test", "targets"):
            one, two = getattr(got, name), getattr(want, name)
            require_equal(one, two, f"{name} of the retraining at wrong={wrong}")


@law("setting")
def fields_are_in_the_fingerprint(bench: SettingBench) -> None:
    """A number or truth value of its fields that moves outcomes moves the fingerprint."""
    part: Any = bench.part
    world, was = bench.world, bench.retraining()
    print_ = world.retraining.fingerprint
    for name, value in _changed_fields(part):
        try:
            other = SettingBench(evolve(part, **{name: value}))
            retraining = other.retraining(bench.size)
        except Exception:  # a value that it refuses, in whatever way
            continue
        if retraining.fingerprint != print_ or _said(retraining) == _said(was):
            continue
        (half,) = retraining.train([half_of(world)])
        one, two = (at.measure(half) for at in (world.retraining, retraining))
        same = one.keys() == two.keys() and all(np.allclose(one[n], two[n]) for n in one)
        require(
            same and _alike(half, bench.pair[1]),
            f"{name}={value!r} gives other outcomes than {getattr(part, name)!r} under the "
            f"same fingerprint; hash {name!r} into retraining.fingerprint",
        )


def _changed_fields(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield another value for each field that holds a number or a truth value."""
    for one in attrs.fields(type(part)) if attrs.has(type(part)) else ():
        value = getattr(part, one.name)
        if not one.init or one.name.startswith("_"):
            continue
        if isinstance(value, bool):
            yield one.name, not value
        elif isinstance(value, int):
            yield one.name, value + 1
        elif isinstance(value, float):
            yield one.name, 1.5 * value or 0.5


def _alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    shapes = [{name: t.shape for name, t in side.items()} for side in (left, right)]
    return shapes[0] == shapes[1] and gap_of(left, right) <= TOLERANCE


def _said(value: Any, deep: int = 4) -> Any:
    """Return all that a retraining is made of; functions are the same by code and what they hold.

    What says the same trains the same, so that nothing has to be trained.
    """
    if not deep:
        return contents(value)
    if isinstance(value, FunctionType):
        held = [_said(_inside(cell), deep - 1) for cell in value.__closure__ or ()]
        return (value.__code__, contents(value.__defaults__), held)
    if attrs.has(type(value)):
        given = [one.name for one in attrs.fields(type(value)) if one.init]
        return (type(value), [(n, _said(getattr(value, n), deep - 1)) for n in given])
    return contents(value)


def _inside(cell: CellType) -> Any:
    """Return what a cell of a closure holds, None before it holds anything."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
