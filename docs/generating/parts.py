"""``parts.md``, and a page for each kind of part: what its docstring says, fields and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from dattri_core.registry import Registry, default_registry
from generating.fields_of import field_rows
from generating.markdown import DISTRIBUTION, page, prose, spell, table
from generating.notes import note_rows

KINDS = {
    "source": "Where rows come from: gradients of each example, or features.",
    "projector": "A sketch of both sides: fewer numbers, nearly the same inner products.",
    "inverse_hessian": "(H + λI)⁻¹ on test rows, or its root on both sides.",
    "curvature": "What H is.",
    "solver": "How (H + λI)⁻¹ is applied; it owns the damping λ.",
    "scorer": "How two rows become one number.",
    "fold": "How checkpoints become one score.",
    "attributor": "A whole method that is not made of rows.",
}


def parts_pages() -> dict[str, str]:
    """Return the pages by their path."""
    registry = default_registry()
    pages = {"parts.md": page(_index(registry))}
    for kind in KINDS:
        pages[f"parts/{kind}.md"] = page(_kind(registry, kind))
    return pages


def shipped(registry: Registry, kind: str) -> list[Any]:
    """Return the entries of a kind that come with dattri-core."""
    entries = [registry.entry(kind, name) for name in registry.names(kind)]
    return [entry for entry in entries if entry.origin.distribution == DISTRIBUTION]


def summary_of(registry: Registry, kind: str, name: str) -> str:
    """Return the first sentence of a part's docstring."""
    document = inspect.getdoc(registry.resolve(kind, name)) or ""
    return " ".join(prose(document.partition("\n\n")[0]))


def _index(registry: Registry) -> Iterator[str]:
    yield "# Parts"
    yield ""
    yield "What methods are made of; see [composing](composing.md) for how. `dattri parts` lists"
    yield "what is installed, `dattri show NAME` prints one."
    for kind, about in KINDS.items():
        yield ""
        yield f"## [{spell(kind).capitalize().replace('hessian', 'Hessian')}](parts/{kind}.md)"
        yield ""
        yield about
        yield ""
        rows = []
        for entry in shipped(registry, kind):
            link = f"[`{entry.name}`](parts/{kind}.md#{entry.name})"
            rows.append((link, summary_of(registry, kind, entry.name)))
        yield from table(("name", "what it is"), rows)


def _kind(registry: Registry, kind: str) -> Iterator[str]:
    yield f"# Parts: {spell(kind)}"
    yield ""
    yield f"{KINDS[kind]} All kinds: [parts](../parts.md)."
    for entry in shipped(registry, kind):
        cls = registry.resolve(kind, entry.name)
        yield ""
        yield f"## `{entry.name}`"
        yield ""
        yield from prose(inspect.getdoc(cls) or "")
        notes = note_rows(kind, entry.name)
        if notes:
            yield ""
            yield from table(("Notes", ""), notes)
        rows = list(field_rows(cls))
        if rows:
            yield ""
            yield from table(("field", "default", "type"), rows)
        methods = [
            f"[`{recipe.name}`](../methods/{recipe.name}.md)"
            for name in registry.names("method")
            if (recipe := registry.recipe(name)).origin.distribution == DISTRIBUTION
            and _has(recipe.spec, kind, entry.name)
        ]
        if methods:
            yield ""
            yield f"Used by {', '.join(methods)}."


def _has(spec: Any, kind: str, name: str) -> bool:
    """Return whether a spec names a part of a kind, at any depth."""
    for slot, value in spec.items():
        named = value.get("name") if hasattr(value, "get") else value
        if slot == kind and named == name:
            return True
        if hasattr(value, "items") and _has(value, kind, name):
            return True
    return False
