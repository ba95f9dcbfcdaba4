"""The generated pages are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["laws.md", "methods.md"])
def test_page_is_fresh(generate: ModuleType, name: str) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == generate.PAGES[name](), "stale; run python docs/generate.py"


def test_check_finds_a_stale_page_and_a_run_mends_it(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    (tmp_path / "laws.md").write_text("old\n", encoding="utf-8")
    assert generate.main(["--check"]) == 1
    assert "docs/laws.md is stale" in capsys.readouterr().err
    assert (tmp_path / "laws.md").read_text(encoding="utf-8") == "old\n"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert (tmp_path / "laws.md").read_text(encoding="utf-8") == generate.laws_page()


def test_a_new_method_is_listed_and_a_foreign_one_is_not(generate: ModuleType) -> None:
    from dattri_core.discovery import Origin
    from dattri_core.registry import Registry, default_registry, using

    registry = Registry()
    registry.merge(default_registry())
    for distribution, name in (("dattri-core", "ours"), ("somebody-else", "theirs")):
        own = Registry(Origin("p", distribution, "1"))
        own.method(name, {"scorer": "cosine"}, summary="S", formula="F", citation="C")
        registry.merge(own)
    with using(registry):
        page = generate.methods_page()
    assert "### `ours`" in page
    assert "### `theirs`" not in page
