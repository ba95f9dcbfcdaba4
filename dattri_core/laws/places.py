"""Where a part failed: the world that a law was in, and the line of the part's own code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from dattri_core.laws.worlds import World

OURS = "dattri_core"


def where(error: Exception, part: Any) -> str:
    """Return the world and the innermost line of the part's own code, ready to follow a message."""
    frames = list(traceback.walk_tb(error.__traceback__))
    told = []
    worlds = [frame.f_locals["world"] for frame, _ in frames if "world" in frame.f_locals]
    names = [world.name for world in worlds if isinstance(world, World)]
    if names:
        told.append(f"in the world {names[-1]!r}")
    own = set(_packages(part))
    lines = [
        f"{Path(frame.f_code.co_filename).name}:{line}, in {frame.f_code.co_name}"
        for frame, line in frames
        if str(frame.f_globals.get("__name__")).partition(".")[0] in own
    ]
    if lines:
        told.append(f"at {lines[-1]}")
    return f" ({'; '.join(told)})" if told else ""


def _packages(part: Any) -> Iterator[str]:
    """Yield the packages that a part, and the parts that it is made of, come from."""
    package = type(part).__module__.partition(".")[0]
    if package not in (OURS, "builtins"):
        yield package
    for field in attrs.fields(type(part)) if attrs.has(type(part)) else ():
        yield from _packages(getattr(part, field.name))
