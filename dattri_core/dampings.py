"""The damping of stages: where it is written, and whether two methods differ in it alone.

A part holds its damping in a field that is a `Damping`, its own or one of a part inside it. Where
there are several, the outermost counts: the others belong to helpers such as a preconditioner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from dattri_core import assemble
from dattri_core.errors import SpecError
from dattri_core.protocols import Damping
from dattri_core.stages import Stage

Path = tuple[str, ...]


def damping_path(part: Any) -> Path | None:
    """Return the names of the fields that lead to a part's damping, or None where it has none."""
    found = sorted(_paths(part), key=lambda path: (len(path), path))
    return found[0] if found else None


def redamped(stages: Sequence[Stage], damping: Damping) -> tuple[Stage, ...]:
    """Return stages at another damping.

    Raises:
        SpecError: None of them has a damping, or several have.
    """
    paths = [damping_path(stage) for stage in stages]
    damped = [at for at, path in enumerate(paths) if path is not None]
    if len(damped) != 1:
        names = ", ".join(type(stages[at]).__name__ for at in damped)
        found = f"{len(damped)} stages have a damping ({names})" if names else "no stage has one"
        raise SpecError(
            f"sweep over dampings: {found}; sweep a method with one, such as 'if-cg', or use "
            "with_() for each value"
        )
    return tuple(
        stage if path is None else _replaced(stage, path, damping)
        for stage, path in zip(stages, paths, strict=True)
    )


def method_at(method: Any, damping: Damping) -> Any:
    """Return a method at another damping.

    Raises:
        SpecError: It has none, or several.
    """
    slots = assemble.slots_of(method)
    stages = redamped(method.chain, damping)
    if slots["stages"] is None:
        slots["projector"], slots["inverse_hessian"] = stages
    else:
        slots["stages"] = stages
    return type(method)(**slots)


def dampings_between(
    old: Sequence[Stage], new: Sequence[Stage]
) -> tuple[Damping | None, ...] | None:
    """Return the damping of each new stage that differs in it, None where it is as it was.

    Returns:
        One entry a stage, or None altogether where the stages differ in anything else.
    """
    if len(old) != len(new):
        return None
    changes: list[Damping | None] = []
    for before, after in zip(old, new, strict=True):
        path = damping_path(before)
        if before == after:
            changes.append(None)
        elif path is None or path != damping_path(after):
            return None
        else:
            changes.append(_at(after, path))
            if _replaced(after, path, _at(before, path)) != before:
                return None
    return tuple(changes)


def _paths(part: Any) -> Iterator[Path]:
    if not attrs.has(type(part)):
        return
    for field in attrs.fields(type(part)):
        value = getattr(part, field.name)
        if isinstance(value, Damping):
            yield (field.name,)
        else:
            yield from ((field.name, *rest) for rest in _paths(value))


def _at(part: Any, path: Path) -> Any:
    for name in path:
        part = getattr(part, name)
    return part


def _replaced(part: Any, path: Path, value: Any) -> Any:
    name, rest = path[0], path[1:]
    inner = _replaced(getattr(part, name), rest, value) if rest else value
    return attrs.evolve(part, **{name.lstrip("_"): inner})
