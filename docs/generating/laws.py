"""``laws.md``: every law of every kind, as its docstring states it."""

from __future__ import annotations

from collections.abc import Iterator

from dattri_core.laws import KINDS, laws_of
from generating.markdown import code, page, spell


def laws_page() -> str:
    """Return the page."""
    return page(_lines())


def _lines() -> Iterator[str]:
    yield "# Laws"
    yield ""
    yield "What every part and every method must obey, built-in or not. A law applies where the"
    yield "facts that a part declares say so; it is never chosen by class. `dattri check NAME` runs"
    yield "those of one part; see [plugins](plugins.md#conformance) for your own tests."
    for kind in KINDS:
        yield ""
        yield f"## Laws: {spell(kind)}"
        for law in laws_of(kind):
            yield ""
            yield f"### `{law.name}`"
            yield ""
            yield from code(law.statement)
