"""``dattri show NAME``: what a method or a part is, its fields and their defaults."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import attrs
from attrs import frozen

from dattri_core import assemble, describe, fields
from dattri_core.cli.names import every_name, named
from dattri_core.cli.table import table
from dattri_core.entries import Entry, Recipe
from dattri_core.errors import SpecError, nearest
from dattri_core.registry import Registry, default_registry
from dattri_core.toml import write_toml


@frozen
class Show:
    """The command ``dattri show``."""

    help: str = "Show a method or a part: what it computes, its fields, defaults and source."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        parser.add_argument("name", help="a method or a part; 'kind:name' where it is not unique")

    def run(self, args: argparse.Namespace) -> int:
        """Print all that the name stands for."""
        registry = default_registry()
        found = named(registry, args.name)
        if not found:
            names = every_name(registry)
            raise SpecError(
                f"no method or part {args.name!r}; {nearest(args.name, names)}"
                f"{registry.broken_note}"
            )
        print("\n\n".join(_page(registry, entry) for entry in found))
        return 0


def _page(registry: Registry, entry: Entry | Recipe) -> str:
    lines = _recipe(entry) if isinstance(entry, Recipe) else _part(registry, entry)
    return "\n".join(lines)


def _recipe(recipe: Recipe) -> Iterator[str]:
    parts = assemble.build_slots(recipe.spec, f"method {recipe.name!r}")
    yield f"method {recipe.name}: {recipe.summary}"
    yield f"  formula   {recipe.formula}"
    yield f"  citation  {recipe.citation}"
    yield f"  from      {recipe.origin}"
    rows = [row for slot, part in parts.items() for row in _slot_rows(slot, part)]
    yield ""
    yield table(("SLOT", "PART OR VALUE", "DEFAULT", "TYPE"), rows)
    yield ""
    yield "As a spec:"
    data = {slot: _data(part) for slot, part in parts.items() if part is not None}
    yield from (f"  {line}".rstrip() for line in write_toml(data).splitlines())


def _data(part: Any) -> Any:
    if isinstance(part, tuple):
        return [_data(item) for item in part]
    return assemble.describe_part(part) if attrs.has(type(part)) else part


def _slot_rows(path: str, part: Any) -> Iterator[tuple[str, str, str, str]]:
    if isinstance(part, tuple):
        for position, item in enumerate(part):
            yield from _slot_rows(f"{path}.{position}", item)
        return
    if not attrs.has(type(part)):
        yield path, str(part), "", ""
        return
    yield path, assemble.name_of(part), "", ""
    cls: Any = type(part)
    for name, attribute in fields.public_fields(cls).items():
        value = getattr(part, attribute.name)
        annotation = fields.hints(cls).get(attribute.name, Any)
        if fields.held_kind(annotation):
            yield from _slot_rows(f"{path}.{name}", value)
        else:
            row = (_spelled(attribute, value), _default(attribute), fields.spell(annotation))
            yield (f"{path}.{name}", *row)


def _part(registry: Registry, entry: Entry) -> Iterator[str]:
    target = registry.resolve(entry.kind, entry.name)
    yield f"{entry.kind} {entry.name}: {entry.summary}".rstrip(": ")
    yield f"  target    {entry.target}"
    yield f"  from      {entry.origin}"
    document = inspect.getdoc(target) if isinstance(target, type) or callable(target) else None
    if document:
        yield ""
        yield document
    own = fields.public_fields(target) if isinstance(target, type) else {}
    if own:
        hints = fields.hints(target)
        rows = [(n, _default(a), fields.spell(hints.get(a.name, Any))) for n, a in own.items()]
        yield ""
        yield table(("FIELD", "DEFAULT", "TYPE"), rows)
    if attrs.has(type(target)) and (values := list(_value_rows(target))):
        yield ""
        yield table(("FIELD", "VALUE", "TYPE"), values)


def _value_rows(made: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the fields of a part that is registered as it is, those that text can set."""
    cls: Any = type(made)
    hints = fields.hints(cls)
    for name, attribute in fields.public_fields(cls).items():
        value = getattr(made, attribute.name)
        with suppress(TypeError):
            json.dumps(value)
            yield name, repr(value), fields.spell(hints.get(attribute.name, Any))


def _default(attribute: attrs.Attribute[Any]) -> str:
    default = describe.default_of(attribute)
    return "(none)" if default is attrs.NOTHING else _spelled(attribute, default)


def _spelled(attribute: attrs.Attribute[Any], value: Any) -> str:
    return repr(describe.spelled(attribute, value, lambda part: None))


command = Show()
