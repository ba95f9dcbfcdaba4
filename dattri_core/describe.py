"""Descriptions: attrs values to plain data that TOML and JSON hold; the way back is `fields`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from dattri_core.fields import convert, public_fields

UNREGISTERED = "unregistered"
"""Key that marks, in a description, a value that cannot be read back."""

Describe = Callable[[Any], Any]


def changed(value: Any) -> dict[str, Any]:
    """Return the fields of an attrs value that differ from their defaults."""
    found = {}
    for name, attribute in public_fields(type(value)).items():
        current = getattr(value, attribute.name)
        if current != default_of(attribute):
            found[name] = current
    return found


def default_of(attribute: attrs.Attribute[Any]) -> Any:
    """Return the default of a field, converted, or ``attrs.NOTHING`` where it has none."""
    default: Any = attribute.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        if default.takes_self:
            return attrs.NOTHING
        default = default.factory()
    return default if default is attrs.NOTHING else convert(attribute, default)


def plain(value: Any, describe: Describe) -> Any:
    """Return a value as plain data that TOML and JSON hold.

    Args:
        value: Of a field.
        describe: Returns the description of a registered part, or None for anything else.

    Returns:
        Data that `admit` turns back; a mapping with the key ``"unregistered"`` for what it cannot.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    described = describe(value)
    if described is not None:
        return described
    if isinstance(value, (list, tuple)):
        return [plain(item, describe) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item, describe) for item in sorted(value, key=repr)]
    if isinstance(value, Mapping):
        return {str(key): plain(item, describe) for key, item in value.items()}
    if attrs.has(type(value)):
        return plain_fields(value, describe)
    name = getattr(value, "__qualname__", None)
    return {UNREGISTERED: f"{value.__module__}:{name}" if name else repr(value)}


def plain_fields(value: Any, describe: Describe) -> dict[str, Any]:
    """Return the changed fields of an attrs value as plain data."""
    fields = public_fields(type(value))
    return {
        name: spelled(fields[name], current, describe) for name, current in changed(value).items()
    }


def spelled(attribute: attrs.Attribute[Any], value: Any, describe: Describe) -> Any:
    """Return the value of a field as plain data, in the shortest form that the field takes back.

    A nested value of one entry is that entry, where the field's converter makes the value from it:
    ``damping = 0.001`` for ``{"value": 0.001}``.
    """
    data = plain(value, describe)
    if attribute.converter is None or not isinstance(data, dict) or len(data) != 1:
        return data
    (entry,) = data.values()
    try:
        return entry if convert(attribute, entry) == value else data
    except (TypeError, ValueError):
        return data
