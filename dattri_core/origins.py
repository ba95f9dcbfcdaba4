"""Where the parts of a value come from: results of one release are not those of the next."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from dattri_core.discovery import find_candidates
from dattri_core.registry import default_registry

OWN = "dattri-core"
"""The distribution whose version stands by itself wherever results are kept."""


def origins_of(value: Any) -> dict[str, str]:
    """Return the origin of every part inside a value that did not come with dattri-core.

    A specification names a part and its fields; what the part computes is in its code. Results that
    are kept, such as tiles of scores or cells of a benchmark, hold this beside the specification,
    so that those of another release are not taken for this one's.

    Args:
        value: A method, an attributor, a part, or a nest of them.

    Returns:
        ``{"module:Class": "distribution version, sha256 of the file"}``; empty where all parts came
        with dattri-core. A class whose file cannot be read, as one typed into an interpreter, has
        no hash.
    """
    own = _own_packages()
    found = {}
    for cls in {type(part) for part in _values(value)}:
        if cls.__module__.partition(".")[0] not in own:
            found[f"{cls.__module__}:{cls.__qualname__}"] = _origin(cls)
    return dict(sorted(found.items()))


@cache
def _own_packages() -> frozenset[str]:
    """Return the packages that came with dattri-core, by its entry points."""
    found = [c.entry_point.value for c in find_candidates() if c.origin.distribution == OWN]
    return frozenset({"dattri_core", *(target.partition(".")[0] for target in found)})


def _values(value: Any) -> Iterator[Any]:
    """Yield every attrs value in a nest, itself included."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _values(item)
    elif isinstance(value, Mapping):
        yield from _values(list(value.values()))
    elif attrs.has(type(value)):
        yield value
        for attribute in attrs.fields(type(value)):
            yield from _values(getattr(value, attribute.name, None))


def _origin(cls: type) -> str:
    registry = default_registry()
    named = registry.name_of(cls)
    origin = registry.entry(*named).origin if named is not None else None
    words = [] if origin is None else [f"{origin.distribution} {origin.version}".strip()]
    try:
        path = Path(inspect.getfile(cls))
        words.append(hashlib.sha256(path.read_bytes()).hexdigest()[:12])
    except (OSError, TypeError):
        pass
    return ", ".join(word for word in words if word)
