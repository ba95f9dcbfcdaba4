"""The site: its navigation has every page once, nothing leads out of it, and it builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from doc_blocks import DOCS, ROOT, name_of
from test_links import EVERY, LINK, prose_of

CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
SITE = [page for page in EVERY if page.is_relative_to(DOCS)]
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def in_navigation() -> list[str]:
    """Return the pages that the navigation lists."""
    listed = CONFIGURATION.partition("\nnav:\n")[2]
    return re.findall(r"^ +- (?:.*: )?([\w./-]+\.md)$", listed, flags=re.M)


def test_the_navigation_has_every_page_once() -> None:
    counts = Counter(in_navigation())
    assert {name for name, count in counts.items() if count > 1} == set()
    assert set(counts) == {name_of(page) for page in SITE}


def test_a_warning_stops_the_build_and_nothing_comes_from_elsewhere() -> None:
    assert re.search(r"^strict: true$", CONFIGURATION, flags=re.M)
    assert re.search(r"^  font: false$", CONFIGURATION, flags=re.M)
    assert "://" not in CONFIGURATION


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_links_stay_within_the_site(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(prose_of(page))]
    inside = [link for link in links if link and not re.match(r"\w+:", link)]
    out = [link for link in inside if not (page.parent / link).resolve().is_relative_to(DOCS)]
    assert out == [], "pages of the site link to pages of the site; name other files in code"


@pytest.mark.parametrize("page", [ROOT / "README.md", *SITE], ids=name_of)
def test_pictures_are_there_and_are_told(page: Path) -> None:
    for told, link in IMAGE.findall(prose_of(page)):
        assert (page.parent / link).is_file(), link
        assert len(told) > 10, f"{link}: say what it shows"


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """GitHub takes a list that follows its paragraph at once for a list; the site does not."""
    lines = prose_of(page).splitlines()
    joined = [
        line
        for before, line in pairwise(lines)
        if re.match(r"(- |\d+\. )", line)
        and before.strip()
        and not re.match(r"(- |\d+\. |  )", before)
    ]
    assert joined == []


def test_the_picture_is_well_formed_and_loads_nothing() -> None:
    from xml.etree import ElementTree

    for path in sorted((DOCS / "pictures").glob("*.svg")):
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("mkdocs-material is not installed; it comes with the extra 'docs'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "methods/if-cg/index.html", "results/speed/index.html"} <= pages
    loaded = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)")
    for page in ("index.html", "methods/if-cg/index.html"):
        found = loaded.findall((tmp_path / page).read_text(encoding="utf-8"))
        assert found == [], "the site works offline"
