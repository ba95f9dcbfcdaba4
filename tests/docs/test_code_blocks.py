"""Every code block of the README and of the docs runs, and shows what it gives."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from doc_blocks import PAGES, RUN, BlockOfCode, Reader, alike, blocks_of, name_of


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of(page) if block.language in RUN]
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
        reader = Reader(page, tmp_path, stack)
        reader.follow()
    assert reader.left_out == [block for block in blocks if block.missing is not None]
    assert reader.ran == [block.language for block in blocks if block.missing is None]


def test_the_readme_and_the_guides_have_blocks() -> None:
    counts = {name_of(p): sum(b.language in RUN for b in blocks_of(p)) for p in PAGES}
    least_of = {"README.md": 10, "composing.md": 5, "plugins.md": 4, "recipes.md": 8}
    for name, least in {**least_of, "methods/if-cg.md": 1}.items():
        assert counts[name] >= least, counts


def _reader_of(text: str, folder: Path, stack: contextlib.ExitStack) -> Reader:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return Reader(page, folder, stack)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint('one')\n```\n\n```text\ntwo\n```\n",
        "```python\nx = 1\n```\n\n```text\nInputError: nothing\n```\n",
        "```python\nimport dattri_core as d\nd.Task(1)\n```\n\n```text\nInputError: b\n```\n",
        "```toml\nscorer = 'dto'\n```\n",
        "```console\n$ dattri no-such-command\n```\n",
        "```sh\nrm file\n```\n",
        "```yaml\na: 1\n```\n",
        "```python\n# needs no_such_package\nfrom dattri_core import NoSuchName\n```\n",
        "```python\n# needs no_such_package\nif\n```\n",
    ],
    ids=[
        "output",
        "no error",
        "other error",
        "toml",
        "exit status",
        "unknown",
        "language",
        "left out, wrong name",
        "left out, no Python",
    ],
)
def test_a_wrong_page_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack, pytest.raises((AssertionError, ValueError, SyntaxError)):
        _reader_of(text, tmp_path, stack).follow()


def test_what_needs_an_absent_package_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "```python\n# needs {}\nfrom dattri_core import Task\nprint(1)\n```\n"
    readers = {}
    for package in ("no_such_package", "torch"):
        with contextlib.ExitStack() as stack:
            readers[package] = _reader_of(text.format(package), tmp_path, stack)
            readers[package].follow()
    absent, there = readers.values()
    assert [str(block) for block in absent.left_out] == ["page.md:2"] and absent.ran == []
    assert there.left_out == [] and there.ran == ["python"]


def test_blocks_keep_their_line_and_indentation(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n- item\n\n  ```python\n  if True:\n      x = 1\n  ```\n")
    assert blocks_of(page) == [BlockOfCode(page, 6, "python", "if True:\n    x = 1\n")]


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("a b", "a\n  b\n", True),
        ("a ... d", "a b c d", True),
        ("a ...", "a", True),
        ("a b", "a c", False),
        ("a ... d", "a b c", False),
        ("a.c", "abc", False),
    ],
)
def test_alike(expected: str, got: str, same: bool) -> None:
    assert alike(expected, got) is same
