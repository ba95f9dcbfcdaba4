"""Every hook, protocol, kind of part, law and method has a heading in the docs and a test."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from dattri_core import capabilities, experiment, protocols, source_capabilities
from dattri_core.entries import KINDS
from dattri_core.hookspecs import HOOKS
from dattri_core.laws import KINDS as KINDS_WITH_LAWS
from dattri_core.laws import laws_of
from dattri_core.registry import default_registry

ROOT = Path(__file__).parents[2]
PROTOCOLS = {
    name: value
    for module in (protocols, capabilities, source_capabilities, experiment)
    for name, value in sorted(vars(module).items())
    if getattr(value, "_is_protocol", False) and value.__module__ == module.__name__
}
METHODS = [
    name
    for name in default_registry().names("method")
    if default_registry().recipe(name).origin.distribution == "dattri-core"
]
LAWS = sorted({law.name for kind in KINDS_WITH_LAWS for law in laws_of(kind)})


@cache
def headings(page: str) -> frozenset[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return frozenset(re.findall(r"^### `([^`]+)`$", text, flags=re.M))


@cache
def text_of_tests() -> str:
    """Return the text of all tests but those of the docs: what is tested is named there."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    own = Path(__file__).parent
    return "\n".join(f.read_text(encoding="utf-8") for f in files if own not in f.parents)


def is_named(name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text_of_tests()) is not None


def test_the_lists_are_not_empty() -> None:
    assert len(HOOKS) >= 5
    assert {"Source", "Scorer", "Fold", "Solver", "Problem", "Attributor"} <= set(PROTOCOLS)
    assert {"if-explicit", "if-cg", "grad-dot", "grad-cos", "tracin", "random"} <= set(METHODS)
    assert len(LAWS) >= 30


def test_hooks_protocols_and_kinds_have_headings_and_nothing_else_has() -> None:
    assert headings("plugins.md") == {*HOOKS, *PROTOCOLS, *KINDS}


def test_laws_have_headings() -> None:
    assert headings("laws.md") == set(LAWS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert f"\n# `{name}`\n" in page
    assert all(f"| **{note}** |" in page for note in ("Cost", "Memory", "When to use"))
    assert "\nSource: " in page


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_guide_names_every_member_of_a_protocol(name: str) -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    section = re.split(r"^##+ ", text.partition(f"\n### `{name}`\n")[2], flags=re.M)[0]
    members = {member for member in vars(PROTOCOLS[name]) if not member.startswith("_")}
    unnamed = {m for m in members if not re.search(rf"`{m}\b", section)}
    assert members
    assert not unnamed, f"the section {name!r} of plugins.md does not speak of {unnamed}"


@pytest.mark.parametrize("name", [*HOOKS, *PROTOCOLS, *METHODS])
def test_a_test_names_it(name: str) -> None:
    assert is_named(name), f"no test outside tests/docs names {name!r}"


def test_a_law_is_shown_to_bite() -> None:
    unnamed = [name for name in LAWS if not is_named(name) and not is_named(name.replace("-", "_"))]
    assert not unnamed, f"no test shows that these laws can fail: {unnamed}"


def test_is_named_sees_whole_words_only() -> None:
    assert not is_named("no-such-method-" + "anywhere")
