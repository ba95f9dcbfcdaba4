"""Every relative link of the docs leads to a file, and to a heading where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_blocks import DOCS, PAGES, ROOT, name_of

EVERY = [
    ROOT / "README.md",
    *sorted(DOCS.rglob("*.md")),
    *(p for name in ("CHANGELOG.md", "CONTRIBUTING.md") if (p := ROOT / name).exists()),
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def prose_of(page: Path) -> str:
    """Return a page without its code."""
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+\s+(.+?)\s*$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", EVERY, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose_of(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        missing = not target.exists()
        if missing or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(prose_of(page))]
        waiting += [
            (page.parent / link).resolve()
            for link in links
            if link.endswith(".md") and not re.match(r"\w+:", link)
        ]
    everything = {*PAGES, *DOCS.rglob("*.md")}
    assert sorted(name_of(page) for page in everything - reached) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](#a-b) `[no](code.md)` [y](gone.md)\n\n```text\n[z](code.md)\n```\n")
    assert LINK.findall(prose_of(page)) == ["#a-b", "gone.md"]
    assert anchors_of(page) == {"a-b"}
