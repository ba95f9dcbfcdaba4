"""Discovery: each plugin alone, broken ones recorded and shown, a selection by the environment."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from dattri_core import SpecError
from dattri_core.hookspecs import API_VERSION, HOOKS
from dattri_core.registry import Registry

GOOD = """
import dattri_core as dattri

@dattri.hookimpl
def register(registry):
    assert registry.api_version >= 1
    registry.part("scorer", "{name}", "{name}_parts:Part")
    registry.method(
        "{name}-method", {{"scorer": "{name}"}}, summary="s", formula="f", citation="c"
    )
"""


class Installer:
    """Writes what pip would leave behind: a module and the metadata with its entry point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, source: str, version: str = "1.2") -> None:
        (self.folder / f"{name}_plugin.py").write_text(dedent(source))
        info = self.folder / f"{name}_dist-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[dattri]\n{name} = {name}_plugin\n")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("DATTRI_PLUGINS", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield Installer(tmp_path)
    for name in set(sys.modules) - before:
        if name.endswith("_plugin"):
            del sys.modules[name]


def statuses(registry: Registry) -> dict[str, str]:
    return {plugin.origin.plugin: plugin.status for plugin in registry.plugins}


def test_a_plugin_is_found_with_its_distribution_and_version(install: Installer) -> None:
    install("good", GOOD.format(name="good"))
    registry = Registry.discovered()
    entry = registry.entry("scorer", "good")
    assert (entry.origin.distribution, entry.origin.version) == ("good-dist", "1.2")
    assert registry.recipe("good-method").origin == entry.origin
    assert "grad-dot" in registry.names("method")
    assert "good_parts" not in sys.modules


HOOK = "import dattri_core as d\n@d.hookimpl\n"
REGISTER = f"{HOOK}def register(registry):\n    "
BROKEN = {
    "raises_on_import": ("raise RuntimeError('no such device')", "RuntimeError: no such device"),
    "syntax": ("def (:", "SyntaxError"),
    "imports_nothing": ("import a_module_that_is_absent", "ModuleNotFoundError"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "no_hook": ("def register(registry): pass", "has no hook; mark one of register"),
    "misspelt_hook": (f"{HOOK}def registr(registry): pass", "unknown hook 'registr'"),
    "wrong_argument": (f"{HOOK}def register(registree): pass", "registree"),
    "raises_in_register": (
        f"{REGISTER}registry.part('scorer', 'half', 'm:A'); raise KeyError('late')",
        "KeyError: 'late'",
    ),
    "bad_kind": (f"{REGISTER}registry.part('scorrer', 'half', 'm:A')", "did you mean 'scorer'"),
    "no_summary": (f"{REGISTER}registry.method('half', {{'scorer': 'dot'}})", "summary"),
    "too_new": (
        f"dattri_api_version = {API_VERSION + 1}\n{REGISTER}pass",
        f"written for version {API_VERSION + 1} of the plugin API",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_recorded_and_stops_no_other(name: str, install: Installer) -> None:
    source, error = BROKEN[name]
    install(name, source)
    install("good", GOOD.format(name="good"))
    registry = Registry.discovered()
    assert statuses(registry)[name] == "broken"
    assert statuses(registry)["good"] == "loaded"
    (problem,) = registry.problems
    assert error in problem
    assert f"{name}-dist 1.2" in problem
    # What a plugin named before it failed is not half there.
    assert "half" not in registry.names("scorer")
    with pytest.raises(SpecError) as caught:
        registry.make("scorer", "absent")
    assert f"plugins that failed to load: {name}-dist 1.2" in str(caught.value)


def test_an_older_core_says_which_api_it_has(install: Installer) -> None:
    install("newer", BROKEN["too_new"][0])
    (problem,) = Registry.discovered().problems
    assert f"this dattri-core has version {API_VERSION}; upgrade dattri-core" in problem


def test_a_misspelt_hook_error_lists_the_hooks(install: Installer) -> None:
    install("misspelt", BROKEN["misspelt_hook"][0])
    (problem,) = Registry.discovered().problems
    assert ", ".join(HOOKS) in problem


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, {"one": "loaded", "two": "loaded", "dattri_parts": "loaded"}),
        ("one", {"one": "loaded", "two": "off", "dattri_parts": "off"}),
        ("one, two", {"one": "loaded", "two": "loaded", "dattri_parts": "off"}),
        ("one-dist", {"one": "loaded", "two": "off", "dattri_parts": "off"}),
        ("-one", {"one": "off", "two": "loaded", "dattri_parts": "loaded"}),
        ("-one,-two", {"one": "off", "two": "off", "dattri_parts": "loaded"}),
        (
            "dattri-core,-dattri_tracin",
            {"one": "off", "dattri_parts": "loaded", "dattri_tracin": "off"},
        ),
        ("", {"one": "off", "two": "off", "dattri_parts": "off"}),
    ],
)
def test_the_environment_selects_plugins(
    selection: str | None,
    expected: dict[str, str],
    install: Installer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("one", GOOD.format(name="one"))
    install("two", GOOD.format(name="two"))
    if selection is not None:
        monkeypatch.setenv("DATTRI_PLUGINS", selection)
    registry = Registry.discovered()
    found = statuses(registry)
    assert {name: found[name] for name in expected} == expected
    assert registry.problems == ()
    loaded = {name for name, status in found.items() if status == "loaded"}
    assert {e.origin.plugin for e in registry.entries()} <= loaded
    assert ("one" in registry.names("scorer")) == (found["one"] == "loaded")


def test_a_plugin_that_is_off_is_not_even_imported(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("one", GOOD.format(name="one"))
    monkeypatch.setenv("DATTRI_PLUGINS", "-one")
    Registry.discovered()
    assert "one_plugin" not in sys.modules


def test_a_selection_of_what_is_not_installed_is_shown(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATTRI_PLUGINS", "-dattri_tracyn")
    (problem,) = Registry.discovered().problems
    assert "names 'dattri_tracyn', which is not installed; did you mean 'dattri_tracin'" in problem


def test_two_distributions_with_one_name_clash_on_use(install: Installer) -> None:
    install("one", GOOD.format(name="same"))
    install("two", GOOD.format(name="same"))
    registry = Registry.discovered()
    with pytest.raises(Exception, match=r"one-dist 1\.2.*and by two-dist 1\.2"):
        registry.make("scorer", "same")
    assert "grad-dot" in registry.names("method")


def test_run_events_reach_plugins_and_one_that_raises_is_heard_no_more(
    install: Installer, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    install(
        "listener",
        f"""
        import dattri_core as d
        @d.hookimpl
        def run_started(info):
            with open({str(log)!r}, "a") as file:
                file.write(f"started {{info['n_train']}};")
        @d.hookimpl
        def run_finished(info):
            with open({str(log)!r}, "a") as file:
                file.write("finished;")
        """,
    )
    install(
        "failing",
        "import dattri_core as d\n@d.hookimpl\ndef run_started(info): raise OSError('disk full')",
    )
    registry = Registry.discovered()
    with pytest.warns(RuntimeWarning, match=r"failing-dist.*run_started raised OSError: disk full"):
        registry.emit("run_started", {"n_train": 5})
    registry.emit("block_scored", {})
    registry.emit("run_finished", {})
    assert log.read_text() == "started 5;finished;"
    # The failing plugin is deaf now: a second event gives no second warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.emit("run_started", {"n_train": 6})
