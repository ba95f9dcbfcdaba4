"""The parts of ``mkdocs.yml`` that list generated pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from generating.markdown import fill, heading
from generating.results import FOLDER as RESULTS
from generating.results import tables, title_of

INDENT = "      "


def navigation(text: str, pages: Mapping[str, str]) -> str:
    """Return ``mkdocs.yml`` with every generated page in its navigation.

    Args:
        text: The file as it is.
        pages: The generated pages by their path.
    """
    for name in ("methods", "parts", "reference", "notebooks"):
        mine = sorted(path for path in pages if path.startswith(f"{name}/"))
        text = fill(text, name, [_entry(path, pages[path]) for path in mine])
    return fill(text, "results", _results())


def _entry(path: str, text: str) -> str:
    title = heading(text).removeprefix("Parts: ").removeprefix("Reference: ")
    if not path.startswith("methods/") and "_" not in title:
        title = title[0].upper() + title[1:]
    return f"{INDENT}- {title}: {path}"


def _results() -> Iterator[str]:
    for path in tables():
        yield f'{INDENT}- "{title_of(path)}": {path.relative_to(RESULTS.parent).as_posix()}'
