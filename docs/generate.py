"""Writes the pages that are made from the code and from results: ``python docs/generate.py``.

With ``--check`` nothing is written and the exit status says whether the files are fresh. Only what
dattri-core itself registers is listed, so that an installed plugin does not change the pages. With
``--notebooks`` the notebooks are run first, and hold what they print.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from generating import notebooks
from generating.laws import laws_page
from generating.markdown import fill
from generating.methods import methods_pages
from generating.navigation import navigation
from generating.parts import parts_pages
from generating.reference import reference_pages
from generating.results import choosing_lines, results_page

DOCS = Path(__file__).parent
FOLDER = DOCS
"""Where pages are written, and the configuration of the site one above."""
OWNED = ("methods", "parts", "reference")
"""Folders that hold generated pages alone: what is no page any more is removed."""
CONFIGURATION = "../mkdocs.yml"


def pages() -> dict[str, str]:
    """Return every page that has generated text, by its path below ``docs``."""
    found = {
        "laws.md": laws_page(),
        **methods_pages(),
        **parts_pages(),
        **reference_pages(),
        **notebooks.notebook_pages(),
        "results/index.md": results_page(),
    }
    choosing = (DOCS / "choosing.md").read_text(encoding="utf-8")
    found["choosing.md"] = fill(choosing, "benchmarks", choosing_lines())
    site = (DOCS / CONFIGURATION).read_text(encoding="utf-8")
    found[CONFIGURATION] = navigation(site, found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    parser.add_argument("--notebooks", action="store_true", help="run the notebooks first")
    given = parser.parse_args(arguments)
    if given.notebooks:
        for path in sorted(notebooks.FOLDER.glob("*.ipynb")):
            notebooks.write(path, notebooks.filled(notebooks.read(path)))
            print(f"ran {path.name}")
    wanted = pages()
    stale = [name for name, text in wanted.items() if _read(name) != text]
    for name in stale:
        if given.check:
            print(f"docs/{name} is stale; run python docs/generate.py", file=sys.stderr)
        else:
            path = FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
            print(f"wrote docs/{name}")
    gone = [path for path in owned() if path.relative_to(FOLDER).as_posix() not in wanted]
    for path in gone:
        name = path.relative_to(FOLDER).as_posix()
        if given.check:
            print(f"docs/{name} has no source; run python docs/generate.py", file=sys.stderr)
        else:
            path.unlink()
            print(f"removed docs/{name}")
    return 1 if given.check and (stale or gone) else 0


def owned() -> list[Path]:
    """Return the pages that are there in folders of generated pages alone."""
    return sorted(path for folder in OWNED for path in (FOLDER / folder).glob("*.md"))


def _read(name: str) -> str:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
