"""Code blocks of Markdown files: found, and run as a reader would, file by file and in order."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen

from dattri_core import DattriError, Study, spec
from dattri_core.cli import main
from dattri_core.registry import Registry, default_registry, using
from dattri_core.toml import read_toml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WRITTEN_ELSEWHERE = ("results", "notebooks")
"""Folders of tables and of notebooks, which other tests hold to what they say."""
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted(DOCS.rglob("*.md"))
        if page.relative_to(DOCS).parts[0] not in WRITTEN_ELSEWHERE
    ),
]

MODULES = {
    "pytest": ("pytest", "-p", "no:cacheprovider"),
    "torchrun": ("torch.distributed.run",),
}
"""Commands that are modules: what runs them."""
RUN = ("python", "toml", "console", "sh")
SHOWN = ("text", "mermaid")
SKIPPED_COMMANDS = ("git clone", "cd ", "python -m venv", ". .venv", "pip install .")
"""Shell lines that a test does not run. ``make`` lines are checked against the Makefile's targets,
``pip install -e .`` is played by writing the metadata that pip would write."""

FILE_NAME = re.compile(r"#\s*([\w\-./]+\.(?:py|toml))\s*$")
NEEDS = re.compile(r"#\s*needs ([\w.]+)\s*$")
RAISED = re.compile(r"(\w+(?:Error|Warning)): ")


@frozen
class BlockOfCode:
    """One fenced block."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def missing(self) -> str | None:
        """Return the package that the first line says is needed, where it is not installed."""
        found = NEEDS.fullmatch(self.code.partition("\n")[0].strip())
        return found[1] if found and importlib.util.find_spec(found[1]) is None else None

    @property
    def file_name(self) -> str | None:
        """Return the file that the block is to be saved as: its first line names it."""
        first = self.code.splitlines()[0] if self.code.strip() else ""
        found = FILE_NAME.fullmatch(first.strip())
        return found[1] if found else None


def name_of(page: Path) -> str:
    """Return how a page is called: its path from the docs, or its name."""
    return page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name


def blocks_of(page: Path) -> list[BlockOfCode]:
    """Return the fenced blocks of a Markdown file in order."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    position = 0
    while position < len(lines):
        opening = re.match(r"^(\s*)(```+)(\S*)", lines[position])
        position += 1
        if opening is None:
            continue
        start = position
        while lines[position].strip() != opening[2]:
            position += 1
        indent = len(opening[1])
        code = "\n".join(line[indent:] for line in lines[start:position]) + "\n"
        found.append(BlockOfCode(page, start + 1, opening[3], code))
        position += 1
    return found


def alike(expected: str, got: str) -> bool:
    """Compare texts word by word; ``...`` stands for any text."""
    pattern = r".*".join(
        r"\s+".join(re.escape(word) for word in part.split()) for part in expected.split("...")
    )
    squeezed = re.sub(r"\s*\.\*\s*", ".*", pattern)
    return re.fullmatch(squeezed, " ".join(got.split()), re.DOTALL) is not None


@define
class Reader:
    """Someone who follows one page from top to bottom in an empty folder.

    Args:
        page: The Markdown file.
        folder: The empty folder, already the working folder.
    """

    page: Path
    folder: Path
    stack: contextlib.ExitStack
    ran: list[str] = field(factory=list)  # languages of the blocks that were run
    left_out: list[BlockOfCode] = field(factory=list)  # what they need is not installed
    module: types.ModuleType = field(init=False)

    def __attrs_post_init__(self) -> None:
        path, modules = list(sys.path), set(sys.modules)
        self.stack.callback(self._restore, path, modules)
        # Classes of a page look their annotations up in their module.
        self.module = types.ModuleType(f"page_{self.page.stem.lower()}")
        sys.modules[self.module.__name__] = self.module
        self.stack.callback(sys.modules.pop, self.module.__name__)

    def follow(self) -> None:
        """Run every block; what a block shows below itself must be what it gives."""
        blocks = blocks_of(self.page)
        for block, after in zip(blocks, [*blocks, None][1:], strict=True):
            shown = after.code if after is not None and after.language == "text" else None
            if block.language == "python" and block.missing is not None:
                self.leave_out(block)
                continue
            if block.language == "python":
                self.python(block, shown)
            elif block.language == "toml":
                self.toml(block)
            elif block.language in ("console", "sh"):
                self.shell(block)
            elif block.language not in SHOWN:
                raise AssertionError(
                    f"{block}: language {block.language!r} is neither run nor shown"
                )
            if block.language in RUN:
                self.ran.append(block.language)

    def leave_out(self, block: BlockOfCode) -> None:
        """Check what can be checked of Python that does not run: syntax, and names of our own."""
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dattri_"):
                module = importlib.import_module(str(node.module))
                gone = [one.name for one in node.names if not hasattr(module, one.name)]
                assert not gone, f"{block}: {node.module} has no {gone}"
        self.left_out.append(block)

    def python(self, block: BlockOfCode, shown: str | None) -> None:
        """Run Python, or save it when it names a file; compare what it gives with what is shown."""
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
        if block.file_name is not None:
            path = self.folder / block.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
            return
        output = io.StringIO()
        expected = RAISED.match(shown) if shown else None
        try:
            with contextlib.redirect_stdout(output):
                exec(code, self.module.__dict__)
        except DattriError as error:
            if expected is None:
                raise
            said = f"{type(error).__name__}: {error}"
            assert alike(shown or "", said), f"{block} shows\n{shown}\nand raised\n{said}"
            return
        assert expected is None, f"{block} shows {expected[1]} and raised nothing"
        self.tests_of(block)
        if shown is not None:
            assert alike(shown, output.getvalue()), (
                f"{block} shows\n{shown}\nand printed\n{output.getvalue()}"
            )

    def tests_of(self, block: BlockOfCode) -> None:
        """Run the tests that a block defines, once for each of their parameters."""
        for name in re.findall(r"^def (test_\w+)", block.code, flags=re.M):
            test = self.module.__dict__[name]
            (mark,) = test.pytestmark
            argument, values = mark.args
            assert values, f"{block}: {name} has no parameters"
            for value in values:
                with contextlib.suppress(pytest.skip.Exception):
                    test(**{argument: value})

    def toml(self, block: BlockOfCode) -> None:
        """Load TOML as the run, study or method that it spells; save it when it names a file."""
        data = read_toml(block.code)
        if block.file_name is not None:
            path = self.folder / block.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
        if path_name(block) == "pyproject.toml":
            assert data["project"]["entry-points"]["dattri"], f"{block}: no entry point"
        elif "metrics" in data:
            assert Study.of({"name": "page", **data}).cells()
        elif "setting" in data:
            run = spec.run_of(data)
            assert spec.method_of(run.method) is not None
            if ":" not in run.setting:
                assert hasattr(default_registry().make("setting", run.setting), "load")
        else:
            assert spec.method_of(data) is not None

    def shell(self, block: BlockOfCode) -> None:
        """Run the commands; in a ``console`` block the lines below one are what it prints."""
        for command, shown in commands_of(block):
            if command.startswith("dattri "):
                status, printed = self.dattri(shlex.split(command)[1:])
                assert status == 0, f"{block}: {command!r} ended with {status}: {printed}"
                if shown.strip():
                    assert alike(shown, printed), f"{block} shows\n{shown}\nand printed\n{printed}"
            elif command.startswith(tuple(MODULES)):
                name, *arguments = shlex.split(command)
                printed = self.run_module(MODULES[name], arguments)
                assert alike(shown, printed), f"{block} shows\n{shown}\nand printed\n{printed}"
            elif command.startswith("make "):
                target = command.split()[1]
                makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert re.search(rf"^{target}:", makefile, re.M), f"{block}: no target {target!r}"
            elif command.startswith("pip install -e"):
                self.install(self.folder / command.split()[-1])
            else:
                assert command.startswith(SKIPPED_COMMANDS), f"{block}: {command!r} is not run"

    def dattri(self, arguments: list[str]) -> tuple[int, str]:
        """Run the command line and return its exit status and what it printed."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(arguments)
        return status, output.getvalue()

    def run_module(self, words: tuple[str, ...], arguments: list[str]) -> str:
        """Run a module in a process of its own and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", *words, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={
                "OMP_NUM_THREADS": "1",  # torchrun prints a warning where nobody has set it
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        return done.stdout + done.stderr

    def install(self, project: Path) -> None:
        """Make a plugin findable as pip does: its metadata on the path, entry points included."""
        data = read_toml((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        metadata = project / f"{data['name'].replace('-', '_')}-{data['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n"
        )
        lines: list[str] = []
        for group, points in data["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
        sys.path.insert(0, str(project))
        importlib.invalidate_caches()
        self.stack.enter_context(using(Registry.discovered()))

    def _restore(self, path: list[str], modules: set[str]) -> None:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if is_under(sys.modules[name], self.folder):
                del sys.modules[name]


def is_under(module: Any, folder: Path) -> bool:
    """Return whether a module was imported from a folder."""
    origin = getattr(module, "__file__", None)
    return origin is not None and folder in Path(origin).parents


def path_name(block: BlockOfCode) -> str:
    """Return the last part of the file name that a block gives itself."""
    return Path(block.file_name).name if block.file_name else ""


def commands_of(block: BlockOfCode) -> Iterator[tuple[str, str]]:
    """Yield each command of a shell block with what is shown below it."""
    if block.language == "sh":
        for line in block.code.splitlines():
            command = line.partition(" #")[0].strip()
            if command and not command.startswith("#"):
                yield command, ""
        return
    for part in re.split(r"^\$ ", block.code, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command.partition(" #")[0].strip(), shown
