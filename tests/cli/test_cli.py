"""The command line: what it prints, exit statuses, one clean line for an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import frozen

from dattri_core import cli
from dattri_core.cli.run import _fields_beside_load
from dattri_core.discovery import Origin, Plugin
from dattri_core.entries import KINDS
from dattri_core.registry import Registry, default_registry, using


@frozen
class Shout:
    """A command as a plugin adds it."""

    help: ClassVar[str] = "Say something loudly."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--times", type=int, default=1)

    def run(self, args: Any) -> int:
        print("HEY " * args.times)
        return 5


@frozen
class Broken:
    help: ClassVar[str] = "Fail."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("how")

    def run(self, args: Any) -> int:
        raise {"bug": KeyError("x\ny"), "stop": KeyboardInterrupt(), "file": OSError(2, "gone")}[
            args.how
        ]


@pytest.fixture
def commands() -> Any:
    registry = Registry()
    registry.part("command", "shout", f"{__name__}:Shout", "Say something")
    registry.part("command", "fail", f"{__name__}:Broken", "Fail")
    with using(registry):
        yield registry


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_no_command_prints_all_commands(capsys: Any) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    for name in (*cli.BUILT_IN, *default_registry().names("command")):
        assert f"  {name} " in out


def test_methods_lists_every_method_with_its_summary(capsys: Any) -> None:
    status, out, _ = run(capsys, "methods")
    assert status == 0
    for recipe in default_registry().recipes():
        (line,) = [line for line in out.splitlines() if line.split()[0] == recipe.name]
        assert recipe.summary in line
        assert recipe.origin.distribution in line


def test_parts_lists_every_part_or_one_kind(capsys: Any) -> None:
    _, out, _ = run(capsys, "parts")
    shown = {tuple(line.split()[:2]) for line in out.splitlines()[1:]}
    entries = [e for e in default_registry().entries() if e.kind in KINDS and e.kind != "command"]
    assert shown == {(entry.kind, entry.name) for entry in entries}
    _, out, _ = run(capsys, "parts", "scorer")
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"scorer"}
    status, _, err = run(capsys, "parts", "scorrer")
    assert status == 2
    assert "did you mean 'scorer'" in err


def test_plugins_lists_each_with_distribution_and_counts(capsys: Any) -> None:
    _, out, err = run(capsys, "plugins")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    for plugin in default_registry().plugins:
        assert plugin.origin.distribution in lines[plugin.origin.plugin]
        assert plugin.status in lines[plugin.origin.plugin]
    assert err == ""


def test_plugins_names_what_each_registered_and_hears(capsys: Any) -> None:
    registry = Registry.discovered()
    registry._plugins.append(
        Plugin(Origin("ears", "dattri-ears", "2"), "ears", "loaded", listeners={"run_finished": id})
    )
    with using(registry):
        _, out, _ = run(capsys, "plugins", "-v")
    assert "0 parts, 0 methods, hears run_finished" in out
    below = out.split("\n\n")[1:]
    told = {
        (block.split("'")[1], kind, name)
        for block in below
        for kind, names in (line.strip().split(": ") for line in block.splitlines()[1:])
        for name in names.split(", ")
    }
    assert told == {(e.origin.plugin, e.kind, e.name) for e in registry.entries()}


def test_show_prints_formula_citation_fields_and_a_spec_that_reads_back(capsys: Any) -> None:
    from dattri_core import spec

    for recipe in default_registry().recipes():
        status, out, _ = run(capsys, "show", f"method:{recipe.name}")
        assert status == 0
        assert recipe.formula in out
        assert recipe.citation in out
        text = textwrap.dedent(out.split("As a spec:\n")[1])
        assert spec.from_toml(text) == spec.method_of(recipe.name)
    _, out, _ = run(capsys, "show", "if-cg")
    (line,) = [
        x for x in out.splitlines() if x.strip().startswith("inverse_hessian.solver.damping")
    ]
    assert "0.001" in line


def test_show_of_a_part_prints_its_document_fields_and_defaults(capsys: Any) -> None:
    _, out, _ = run(capsys, "show", "solver:cg")
    assert "dattri_parts.solvers.cg:CG" in out
    assert "FIELD" in out
    assert "damping" in out
    _, out, _ = run(capsys, "show", "identity")
    assert "projector identity" in out
    assert "inverse_hessian identity" in out
    status, _, err = run(capsys, "show", "cosin")
    assert (status, err.count("\n")) == (2, 1)
    assert "did you mean 'cosine'" in err


def test_a_plugins_command_is_found_and_its_status_returned(commands: Any, capsys: Any) -> None:
    status, out, _ = run(capsys, "shout", "--times", "2")
    assert (status, out) == (5, "HEY HEY \n")
    assert "shout    Say something" in run(capsys)[1]
    status, _, err = run(capsys, "shoot")
    assert status == 2
    assert "no command 'shoot'; did you mean 'shout'" in err


def test_an_error_is_one_line_and_traceback_shows_where(commands: Any, capsys: Any) -> None:
    status, out, err = run(capsys, "fail", "file")
    assert (status, out, err) == (2, "", "dattri: [Errno 2] gone\n")
    status, _, err = run(capsys, "fail", "bug")
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("dattri: unexpected KeyError")
    assert "--traceback" in err
    for arguments in (("--traceback", "fail", "bug"), ("fail", "bug", "--traceback")):
        _, _, err = run(capsys, *arguments)
        assert "Traceback" in err
        assert "raise {" in err


def test_ctrl_c_exits_with_130(commands: Any, capsys: Any) -> None:
    status, _, err = run(capsys, "fail", "stop")
    assert (status, err) == (130, "dattri: interrupted\n")


def test_clashes_and_broken_plugins_are_shown(capsys: Any) -> None:
    registry = Registry()
    for distribution in ("first", "second"):
        own = Registry(Origin(distribution, distribution, "1"))
        own.part("scorer", "same", "m:A")
        registry.merge(own)
    with using(registry):
        status, _, err = run(capsys, "plugins")
    assert status == 0
    assert "scorer 'same' is claimed by first 1 (plugin 'first') and by second 1" in err


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **settings
    )


@pytest.mark.parametrize("command", ["methods", "parts", "plugins", ""])
def test_listing_imports_no_torch(command: str) -> None:
    code = (
        "import sys; from dattri_core.cli import main\n"
        f"status = main({command.split()!r}); assert status == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'safetensors', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_module_and_version(capsys: Any) -> None:
    done = python("-m", "dattri_core", "--version")
    assert done.stdout.startswith("dattri-core 0.")
    done = python("-m", "dattri_core", "show", "nothing-like-it")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from dattri_core.cli import main; sys.exit(main(['parts']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


TOY = """
import time
import torch
import dattri_core as d

def make(n=6, slow=False):
    random = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(3, 2)
    x = torch.randn(n, 3, generator=random)
    y = torch.arange(n) % 2
    if slow:
        print("ready", flush=True)
        time.sleep(60)
    return d.Task(model, "cross-entropy"), (x, y), (x[:2], y[:2])
"""


def write_run(folder: Path, text: str) -> str:
    (folder / "toy_setting.py").write_text(TOY)
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def no_trace() -> Any:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("toy_setting", None)


def test_run_attributes_and_saves(tmp_path: Path, capsys: Any, no_trace: Any) -> None:
    import dattri_core as dattri

    output = tmp_path / "scores"
    path = write_run(
        tmp_path,
        f'method = "grad-dot"\noutput = {str(output)!r}\n[setting]\n'
        'name = "toy_setting:make"\nn = 5\n',
    )
    status, out, err = run(capsys, "run", path)
    assert status == 0, err
    assert f"saved to {output}" in out
    scores = dattri.Scores.load(output)
    assert tuple(scores.values.shape) == (5, 2)
    method = scores.provenance["method"]
    assert method["scorer"] == "dot"
    # The same from Python: the file adds nothing and hides nothing.
    import toy_setting

    task, train, test = toy_setting.make(5)
    assert dattri.method("grad-dot").attribute(task, train, test).values.shape == (5, 2)


def test_what_load_takes_is_no_field_to_set() -> None:
    """A setting whose `load` has an argument of the name of a field is called with it."""

    @frozen
    class Both:
        """A setting."""

        seed: int = 0
        order: str = "own"

        def load(self, seed: int = 1) -> None:
            """Take a seed."""

    assert _fields_beside_load(Both()) == ["order"]
    assert _fields_beside_load(object()) == []


def test_show_lists_the_fields_of_a_setting_that_text_can_set(capsys: Any) -> None:
    """With their values; those that hold functions are left out."""
    status, out, err = run(capsys, "show", "mnist-mlp")
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["order", "'own'", "one", "of", "'own',", "'shared'"] in lines
    assert ["length", "'epochs'", "one", "of", "'epochs',", "'steps'"] in lines
    assert not any(line[:1] == ["network"] for line in lines)


def test_a_run_sets_fields_of_a_registered_setting(tmp_path: Path, capsys: Any) -> None:
    """What `load` takes and what the setting has of its own, in one table."""
    output = tmp_path / "scores"
    spec = (
        f'method = "grad-dot"\noutput = {str(output)!r}\n[setting]\n'
        'name = "digits"\nseed = 1\nsizes = {full = [30, 20]}\nlength = "steps"\n'
    )
    status, _, err = run(capsys, "run", write_run(tmp_path, spec))
    assert status == 0, err
    import dattri_core as dattri

    assert dattri.Scores.load(output).shape == (30, 20)
    wrong = spec.replace('"steps"', '"hours"')
    status, _, err = run(capsys, "run", write_run(tmp_path, wrong))
    assert status == 2
    assert "field 'length'" in err
    assert "'hours'" in err


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: Any, no_trace: Any
) -> None:
    path = write_run(tmp_path, 'method = "grad-dot"\nsetting = "toy_setting:make"\n')
    status, out, err = run(capsys, "run", path, "--dry-run")
    assert status == 0, err
    assert "B" in out
    assert {p.name for p in tmp_path.iterdir()} <= {"run.toml", "toy_setting.py", "__pycache__"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "grad-dott"\nsetting = "digits"\noutput = "o"', "did you mean 'grad-dot'"),
        ('method = "grad-dot"\nsetting = "digitz"\noutput = "o"', "did you mean 'digits'"),
        ('method = "grad-dot"\nsetting = "digits"', "names no output"),
        (
            'method = "grad-dot"\noutput = "o"\n[setting]\nname = "digits"\nsed = 1',
            "takes no 'sed'; did you mean 'seed'",
        ),
        (
            'method = "grad-dot"\noutput = "o"\n[setting]\nname = "digits"\nordr = "own"',
            "takes no 'ordr'; did you mean 'order'",
        ),
        ('method = "grad-dot"\nsetting = "no_module:x"\noutput = "o"', "cannot be imported"),
        ('method = "grad-dot"\nsetting = "toy_setting:absent"\noutput = "o"', "cannot be imported"),
        ('method = "grad-dot"\nsetting = "os:getcwd"\noutput = "o"', "gave a str, expected"),
        ('method = "grad-dot', "is truncated"),
    ],
)
def test_a_run_that_cannot_be_says_why(
    text: str, message: str, tmp_path: Path, capsys: Any, no_trace: Any
) -> None:
    status, out, err = run(capsys, "run", write_run(tmp_path, text))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_in_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        f'method = "grad-dot"\noutput = {str(tmp_path / "scores")!r}\n[setting]\n'
        'name = "toy_setting:make"\nslow = true\n',
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dattri_core", "run", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with this signal ignored; children keep that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "dattri: interrupted"
    assert {p.name for p in tmp_path.iterdir()} <= {"run.toml", "toy_setting.py", "__pycache__"}


def test_check_names_what_is_not_there(capsys: Any) -> None:
    status, _, err = run(capsys, "check", "cosin")
    assert status == 2
    assert "no method, part or plugin 'cosin'; did you mean 'cosine'" in err
    status, _, err = run(capsys, "check", "bench")
    assert status == 2
    assert "no laws for the kind 'command'" in err


def test_check_goes_on_past_a_plugin_of_a_distribution_that_is_broken(capsys: Any) -> None:
    registry = Registry(Origin("good", "dattri-half"))
    registry.part("fold", "average", "dattri_parts.folds.mean:Mean")
    loaded = Plugin(Origin("good", "dattri-half"), "good", "loaded")
    lost = Plugin(Origin("lost", "dattri-half"), "lost", "broken", "ImportError: no such module")
    registry._plugins += [loaded, lost]
    with using(registry):
        status, out, _ = run(capsys, "check", "dattri-half")
        assert status == 1
        assert "ImportError: no such module" in out
        assert "fold average:" in out
        assert out.endswith("dattri check dattri-half: FAILED\n")
        status, _, err = run(capsys, "check", "lost")
    assert status == 2
    assert "plugin dattri-half (plugin 'lost') is broken: ImportError: no such module" in err


def test_check_reports_and_fails_with_its_laws(capsys: Any) -> None:
    status, out, _ = run(capsys, "check", "scorer:dot")
    assert status == 0
    assert "scorer dot:" in out
    assert out.endswith("dattri check scorer:dot: passed\n")
    registry = Registry()
    registry.part("scorer", "wrong", f"{__name__}:WrongScorer")
    with using(registry):
        status, out, _ = run(capsys, "check", "wrong")
    assert status == 1
    assert "FAILED" in out


@frozen
class WrongScorer:
    """Adds the position of the train row in its tile, so scores depend on the tile."""

    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[str] = "tile"

    def pair(self, train: Any, test: Any) -> Any:
        return train.inner(test)

    def finish(self, total: Any, train: Any, test: Any) -> Any:
        import torch

        from dattri_core import Scored

        return Scored(total + torch.arange(len(total), dtype=total.dtype)[:, None])
