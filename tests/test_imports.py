"""Who may import whom: the rules of the architecture, checked on the syntax tree of every file."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "dattri_core"
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())
DEPENDENCIES = {
    *("torch", "pluggy", "attrs", "numpy", "scipy", "safetensors", "tomli", "tomllib"),
    "typing_extensions",
}
SHARED = "dattri_parts"
LONGEST = 500

# From the bottom to the top: a module imports those above it in this list, never one below.
ORDER = [
    "errors",
    "processes",
    "toml",
    "atomic",
    "locks",
    "progress",
    "top",
    "hookspecs",
    "discovery",
    "entries",
    "fields",
    "describe",
    "registry",
    "origins",
    "words",
    "ids",
    "scores_file",
    "scores",
    "scores_writer",
    "memory",
    "pages",
    "plans",
    "interpolate",
    "contract",
    "precision",
    "space",
    "blocks.finite",
    "blocks.block",
    "blocks.inputs",
    "blocks.dense",
    "blocks.grouped",
    "blocks.tiled",
    "blocks.outer",
    "blocks.swept",
    "blocks.tensors",
    "blocks.pick",
    "blocks.span",
    "blocks",
    "moments",
    "rows",
    "protocols",
    "capabilities",
    "source_capabilities",
    "measures",
    "batch",
    "contents",
    "criteria",
    "losses",
    "forward",
    "shipped_losses",
    "state_files",
    "tied",
    "adapters",
    "optimiser_files",
    "adam_state",
    "checkpoint",
    "task",
    "experiment",
    "dispatched",
    "rounding",
    "halving",
    "stream",
    "members",
    "evaluate",
    "row_kinds",
    "activations",
    "lift",
    "batched",
    "second_order",
    "recording",
    "symmetry",
    "products",
    "each_product",
    "projected",
    "problem",
    "padding",
    "assemble",
    "answers",
    "stages",
    "dampings",
    "outlook",
    "routes",
    "tiles",
    "tensor_file",
    "kept_fits",
    "store",
    "stored",
    "first_look",
    "snapshot",
    "pool",
    "shelf",
    "queries",
    "pairing",
    "making",
    "loop",
    "requests",
    "provenance",
    "runner",
    "run_plan",
    "fitted",
    "methods",
    "spec",
    "factors",
    "study",
    "cli.table",
    "cli.names",
    "cli.listing",
    "cli.show",
    "cli.run",
    "cli.check",
    "cli.store",
    "cli",
    "__main__",
]
# May import all of the core; nothing in the core imports them.
OUTSIDE = ("laws", "testing")


@functools.cache  # each module is a test of its own
def core_modules() -> dict[str, str]:
    return {module_name(path, CORE): path.read_text() for path in sorted(CORE.rglob("*.py"))}


def module_name(path: Path, root: Path) -> str:
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else ""


def imports(source: str) -> Iterator[tuple[str, str, bool, bool]]:
    """Yield (module, name, is for type checkers only, is inside a function) of every import."""

    def walk(
        node: ast.AST, typing_only: bool, inside: bool
    ) -> Iterator[tuple[str, str, bool, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", typing_only, inside
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level
            for alias in node.names:
                yield prefix + (node.module or ""), alias.name, typing_only, inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for name, field in ast.iter_fields(node):
            guarded = isinstance(node, ast.If) and name == "body" and is_guard(node.test)
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST):
                    yield from walk(child, typing_only or guarded, inside)

    yield from walk(ast.parse(source), False, False)


def is_guard(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def own_module(module: str, name: str, known: set[str]) -> str | None:
    """Return which module of the core an import means: "" for the package's own names."""
    if module != "dattri_core" and not module.startswith("dattri_core."):
        return None
    inner = module.removeprefix("dattri_core").removeprefix(".")
    longer = f"{inner}.{name}".strip(".")
    return longer if longer in known else inner


def core_violations(name: str, source: str, order: list[str]) -> list[str]:
    """Return what a module of the core does that it must not."""
    found = []
    outside = name.split(".")[0] in OUTSIDE
    if not outside and name not in order and name:
        found.append(f"{name} has no place in ORDER")
    for module, item, typing_only, inside in imports(source):
        top = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{name} imports relatively: {module}")
        elif top != "dattri_core":
            if top not in DEPENDENCIES | set(sys.stdlib_module_names):
                found.append(f"{name} imports {module}, which is no dependency of the core")
            continue
        target = own_module(module, item, {*order, *OUTSIDE})
        if target is None:
            continue
        if inside:
            found.append(f"{name} imports {target} inside a function")
        if typing_only or outside or target == "":
            continue
        if target.split(".")[0] in OUTSIDE:
            found.append(f"{name} imports {target}, which stands outside of the core")
        elif name in order and target in order and order.index(target) >= order.index(name):
            found.append(f"{name} imports {target}, which is above it")
    found += [f"{name} names the plugin {p}" for p in PLUGINS if names_plugin(source, p)]
    return found


def names_plugin(source: str, plugin: str) -> bool:
    """Whether code or a string that is no docstring names a plugin package."""
    return any(plugin in text for text in names_in(source))


@functools.cache
def names_in(source: str) -> tuple[str, ...]:
    """Return the strings that are no docstrings, and the imports."""
    tree = ast.parse(source)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documents:
                found.append(node.value)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(ast.unparse(node))
    return tuple(found)


def plugin_violations(package: str, file: str, source: str) -> list[str]:
    """Return what a module of a plugin does that it must not."""
    found = []
    allowed = {package, SHARED} & set(PLUGINS)
    for module, _, _, _ in imports(source):
        top = module.split(".")[0]
        if module.startswith("dattri_core."):
            found.append(f"{package}/{file} imports {module}; plugins use the top-level names")
        if top in PLUGINS and top not in allowed:
            found.append(f"{package}/{file} imports another plugin: {module}")
        if module.startswith("."):
            found.append(f"{package}/{file} imports relatively: {module}")
        if file == "plugin.py" and module not in ("dattri_core", "__future__"):
            found.append(f"{package}/plugin.py imports {module}; it may import dattri_core only")
    return found


@pytest.mark.parametrize("name", core_modules())
def test_the_core_keeps_its_order_and_names_no_plugin(name: str) -> None:
    assert core_violations(name, core_modules()[name], ORDER) == []


def test_the_order_lists_what_exists() -> None:
    known = {name for name in core_modules() if name}
    inner = {name for name in known if name.split(".")[0] not in OUTSIDE}
    assert set(ORDER) == inner
    assert len(ORDER) == len(set(ORDER))


def test_the_order_is_that_of_the_design() -> None:
    chain = ["space", "rows", "protocols", "task", "stages", "methods", "spec", "cli"]
    assert sorted(chain, key=ORDER.index) == chain
    assert ORDER.index("protocols") < ORDER.index("stream") < ORDER.index("stages")


@pytest.mark.parametrize("package", PLUGINS)
def test_plugins_import_the_top_level_names_and_never_one_another(package: str) -> None:
    found = []
    folder = ROOT / "plugins" / package
    files = sorted(folder.rglob("*.py"))
    assert folder / "plugin.py" in files
    for path in files:
        found += plugin_violations(package, str(path.relative_to(folder)), path.read_text())
    assert found == []


def test_every_plugin_that_there_is_was_found() -> None:
    assert SHARED in PLUGINS
    assert len(PLUGINS) >= 7


def source_files() -> list[Path]:
    folders = ("dattri_core", "plugins", "tests", "contrib")
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long_and_none_is_a_drawer_of_odds_and_ends() -> None:
    long = {str(p.relative_to(ROOT)): n for p in source_files() if (n := lines(p)) > LONGEST}
    assert long == {}
    names = {"utils", "util", "helpers", "misc", "common"}
    assert [str(p) for p in source_files() if p.stem in names] == []
    assert lines(CORE / "hookspecs.py") < 60


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_public_names_import_and_are_sorted_out() -> None:
    import dattri_core

    for name in dattri_core.__all__:
        assert getattr(dattri_core, name) is not None, name
    assert set(dattri_core.__all__) <= set(dir(dattri_core))
    with pytest.raises(AttributeError, match="no attribute 'Methode'"):
        dattri_core.Methode


# --- the rules bite -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("rows", "from dattri_core.methods import Method", "rows imports methods, which is above"),
        ("rows", "from dattri_core import methods", "rows imports methods, which is above"),
        ("rows", "import dattri_core.methods", "rows imports methods, which is above"),
        ("rows", "from dattri_core.rows import Rows", "rows imports rows, which is above"),
        ("spec", "from dattri_core.cli import main", "spec imports cli, which is above"),
        ("methods", "from dattri_core.laws import check", "stands outside of the core"),
        ("methods", "from dattri_core import testing", "stands outside of the core"),
        ("spec", "def f():\n    from dattri_core.rows import Rows", "inside a function"),
        (
            "spec",
            "class A:\n    def f(self):\n        import dattri_core.rows",
            "inside a function",
        ),
        ("rows", "import pandas", "no dependency of the core"),
        ("rows", "from dattri_parts.scorers.dot import Dot", "names the plugin dattri_parts"),
        ("rows", "import dattri_core\nX = 'dattri_parts:Dot'", "names the plugin dattri_parts"),
        ("rows", "from .space import Space", "imports relatively"),
        ("surprise", "", "has no place in ORDER"),
    ],
)
def test_a_violation_in_the_core_is_caught(name: str, source: str, message: str) -> None:
    found = core_violations(name, source, ORDER)
    assert any(message in violation for violation in found), found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("methods", "from dattri_core.rows import Rows\nimport torch, attrs, json"),
        ("rows", "if TYPE_CHECKING:\n    from dattri_core.methods import Method"),
        ("laws.x", "from dattri_core.methods import Method\nfrom dattri_core.laws.law import law"),
        ("cli", "from dattri_core import __version__"),
    ],
)
def test_what_is_allowed_in_the_core_passes(name: str, source: str) -> None:
    assert core_violations(name, source, ORDER) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("a.py", "from dattri_core.rows import Rows", "plugins use the top-level names"),
        ("a.py", "import dattri_core.rows", "plugins use the top-level names"),
        ("a.py", "from dattri_influence.x import y", "imports another plugin"),
        ("a.py", "def f():\n    import dattri_influence", "imports another plugin"),
        ("a.py", "from . import b", "imports relatively"),
        ("plugin.py", "import torch", "may import dattri_core only"),
        ("plugin.py", "from dattri_tracin.b import B", "may import dattri_core only"),
    ],
)
def test_a_violation_in_a_plugin_is_caught(file: str, source: str, message: str) -> None:
    found = plugin_violations("dattri_tracin", file, source)
    assert any(message in violation for violation in found), found


def test_what_is_allowed_in_a_plugin_passes() -> None:
    source = "import torch\nfrom dattri_core import Rows\nimport dattri_core as dattri\n"
    source += "from dattri_parts.scorers.dot import Dot\nfrom dattri_tracin.b import B\n"
    assert plugin_violations("dattri_tracin", "a.py", source) == []
    assert plugin_violations("dattri_tracin", "plugin.py", "import dattri_core as dattri") == []


@pytest.mark.parametrize("package", ["dattri_core", *PLUGINS])
def test_no_public_name_is_hidden_by_a_module(package: str) -> None:
    """An imported submodule takes the place of a lazy export of its name."""
    exports = getattr(importlib.import_module(package), "_EXPORTS", {})
    folder = CORE if package == "dattri_core" else ROOT / "plugins" / package
    assert not set(exports) & {path.stem for path in folder.iterdir()}
