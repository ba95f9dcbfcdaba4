"""The generated pages are what the code and the results say now."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from generating import markdown, navigation, notes, parts, reference, results

from dattri_core.registry import default_registry

DOCS = Path(__file__).parents[2] / "docs"
REGISTRY = default_registry()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_fresh(generate: ModuleType) -> None:
    pages = generate.pages()
    stale = [name for name, page in pages.items() if (DOCS / name).read_text("utf-8") != page]
    assert stale == [], "stale; run python docs/generate.py"
    assert {path.relative_to(DOCS).as_posix() for path in generate.owned()} <= set(pages)


def test_check_finds_stale_pages_and_a_run_mends_them(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "docs"
    (folder / "methods").mkdir(parents=True)
    monkeypatch.setattr(generate, "FOLDER", folder)
    monkeypatch.setattr(generate, "pages", lambda: {"laws.md": "new\n", "methods/a.md": "a\n"})
    (folder / "laws.md").write_text("old\n", encoding="utf-8")
    (folder / "methods" / "gone.md").write_text("gone\n", encoding="utf-8")
    assert generate.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "docs/laws.md is stale" in said
    assert "docs/methods/gone.md has no source" in said
    assert (folder / "laws.md").read_text(encoding="utf-8") == "old\n"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert (folder / "laws.md").read_text(encoding="utf-8") == "new\n"
    assert not (folder / "methods" / "gone.md").exists()


def test_a_new_method_is_listed_and_a_foreign_one_is_not() -> None:
    from generating.methods import methods_pages

    from dattri_core.discovery import Origin
    from dattri_core.registry import Registry, using

    registry = Registry()
    registry.merge(REGISTRY)
    for distribution, name in (("dattri-core", "ours"), ("somebody-else", "theirs")):
        own = Registry(Origin("p", distribution, "1"))
        own.method(name, {"scorer": "cosine"}, summary="S", formula="F < G", citation="C")
        registry.merge(own)
    with using(registry):
        pages = methods_pages()
    assert "[`ours`](methods/ours.md)" in pages["methods.md"]
    page = pages["methods/ours.md"]
    assert page.splitlines()[1] == "# `ours`"
    assert "```text\nF < G\n```" in page
    assert "[`cosine`](../parts/scorer.md#cosine)" in page
    assert "theirs" not in pages["methods.md"] and "methods/theirs.md" not in pages


def test_every_method_and_part_has_notes_and_nothing_else_has() -> None:
    shipped = {
        "method": {
            name
            for name in REGISTRY.names("method")
            if REGISTRY.recipe(name).origin.distribution == "dattri-core"
        },
        **{kind: {e.name for e in parts.shipped(REGISTRY, kind)} for kind in parts.KINDS},
    }
    noted = {kind: set(entries) for kind, entries in notes.notes().items()}
    assert noted == shipped, "docs/generating/notes.toml: cost, memory and use of each"
    for kind, entries in notes.notes().items():
        for name, note in entries.items():
            wanted = {"cost", "memory", "use"} if kind == "method" else {"cost", "use"}
            assert wanted <= set(note) <= {"cost", "memory", "use"}, f"{kind} {name}"
            assert all(text.endswith((".", "!")) for text in note.values()), f"{kind} {name}"


def test_every_public_name_has_one_entry(generate: ModuleType) -> None:
    import dattri_core

    pages = reference.reference_pages()
    entries = [
        line.removeprefix("## `").removesuffix("`")
        for name, page in pages.items()
        if not Path(name).stem.startswith("dattri_")
        for line in page.splitlines()
        if line.startswith("## ")
    ]
    assert sorted(entries) == dattri_core.__all__


def test_a_page_of_the_reference_shows_signature_and_sections() -> None:
    page = reference.reference_pages()["reference/attribution.md"]
    assert "```text\nmethod(name: str, **overrides: Any) -> Any\n```" in page
    assert "### `Scores.top`" in page
    assert "Arguments:\n\n- `model`: The module." in page
    assert " object at 0x" not in page


BENCH = {
    "setting": "digits",
    "size": [10, 5],
    "seeds": [0],
    "rows": [
        {"metric": "lds", "method": "b", "models": 1, "value": 0.5, "low": 0.4, "high": 0.6,
         "seconds": 1.0},
        {"metric": "lds", "method": "a x10", "models": 10, "value": 0.25, "low": 0.2, "high": 0.3,
         "seconds": None},
        {"metric": "lds", "method": "c", "models": 1, "value": None, "error": "no"},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one benchmark and of one theme."""
    (tmp_path / "bench_digits.json").write_text(json.dumps(BENCH))
    (tmp_path / "bench_digits.md").write_text("# Digits\n\nReal images. More.\n\n## lds\n")
    theme = {"a, LR": {"time": "2 s", "peak": "3 MiB"}, "ab, LR": {"time": "9 s"}}
    (tmp_path / "speed.json").write_text(json.dumps(theme))
    (tmp_path / "speed.md").write_text("# Speed\n\nCommand: `x`\n\nHow fast it is. And so on.\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(navigation, "RESULTS", tmp_path / "results")
    for cached in (results.benchmarks, results._themes):
        cached.cache_clear()
    yield tmp_path
    for cached in (results.benchmarks, results._themes):
        cached.cache_clear()


def test_results_are_read_from_their_files(folder: Path) -> None:
    assert list(results.benchmark_rows("a")) == [
        ("[digits](../results/bench_digits.md), 10 models", "lds", "0.250 [0.200, 0.300]",
         "2 of 2", "0.00"),
    ]  # fmt: skip
    assert list(results.measured_rows("a")) == [
        ("[Speed](../results/speed.md)", "a, LR", "2 s", "3 MiB")
    ]
    lines = list(results.choosing_lines())
    assert "| `b` | 0.500 [0.400, 0.600] | 1.00 |" in lines and lines[-1] == ""
    assert not any("`c`" in line for line in lines)
    page = results.results_page()
    assert "| [Digits](bench_digits.md) | Real images. |" in page
    assert "| [Speed](speed.md) | How fast it is. |" in page


def test_no_results_are_said_to_be_none(folder: Path) -> None:
    (folder / "bench_digits.json").unlink()
    assert "No table of `dattri bench` is there yet." in list(results.choosing_lines())
    assert list(results.benchmark_rows("a")) == []


def test_a_region_is_filled_and_has_to_be_there() -> None:
    text = "a\n  # generated: x\nold\n\n  # end: x\nb\n<!-- generated: y -->\n<!-- end: y -->\n"
    filled = markdown.fill(markdown.fill(text, "x", ["1", "2"]), "y", ["3"])
    assert filled == (
        "a\n  # generated: x\n1\n2\n  # end: x\nb\n<!-- generated: y -->\n3\n<!-- end: y -->\n"
    )
    with pytest.raises(ValueError, match="'z' and found 0"):
        markdown.fill(text, "z", [])


def test_prose_keeps_code_and_emphasis_and_escapes_the_rest() -> None:
    given = (
        "A <b> c * d ``e < f`` **bold.** x\n\n    a < b * c\n\nArgs:\n    x: One\n        <two>."
    )
    assert list(markdown.prose(given)) == [
        r"A &lt;b> c \* d `e < f` **bold.** x",
        "",
        "    a < b * c",
        "",
        "Fields:",
        "",
        "- `x`: One",
        "  &lt;two>.",
    ]
