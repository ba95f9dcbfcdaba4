"""Fields of parts and their values, as a spec would spell them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattri_core import describe, fields

Row = tuple[str, ...]


def field_rows(cls: type) -> Iterator[Row]:
    """Yield name, default and type of each field of a part."""
    for name, attribute in fields.public_fields(cls).items():
        hint = fields.hints(cls).get(attribute.name, Any)
        yield f"`{name}`", _default(attribute), fields.spell(hint)


def value_rows(path: str, part: Any) -> Iterator[Row]:
    """Yield path and value of each field of a part that is no part itself, defaults included."""
    if isinstance(part, tuple):
        for position, item in enumerate(part):
            yield from value_rows(f"{path}.{position}", item)
        return
    cls = type(part)
    for name, attribute in fields.public_fields(cls).items():
        value = getattr(part, attribute.name)
        if value is not None and fields.held_kind(fields.hints(cls).get(attribute.name)):
            yield from value_rows(f"{path}.{name}", value)
        else:
            yield f"`{path}.{name}`", f"`{_plain(attribute, value)!r}`"


def _default(attribute: Any) -> str:
    default = describe.default_of(attribute)
    if default is describe.attrs.NOTHING:
        return "(none)"
    return f"`{_plain(attribute, default)!r}`"


def _plain(attribute: Any, value: Any) -> Any:
    """Return a value as a spec would spell it: a number for a damping."""
    data = describe.plain(value, lambda part: None)
    if isinstance(data, dict) and len(data) == 1:
        (entry,) = data.values()
        if fields.convert(attribute, entry) == value:
            return entry
    return data
