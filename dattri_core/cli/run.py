"""``dattri run SPEC.toml``: one attribution, spelled in a file."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from dattri_core.entries import load_target
from dattri_core.errors import SpecError, nearest
from dattri_core.fields import public_fields
from dattri_core.registry import default_registry
from dattri_core.spec import Run, method_of, read_run

EXAMPLE = """\
method = "if-cg"          # or a table: name and overrides, or the slots spelled out
setting = "digits"        # or "module:function", which returns task, train, test
output = "scores"         # folder for the scores
memory = "4GiB"
store = "rows"            # optional: folder for train rows, read again by later runs
fits = "fits"             # optional: folder for factors and eigenvectors, likewise
"""


@frozen
class RunCommand:
    """The command ``dattri run``."""

    help: str = "Run the method and setting that a TOML (or JSON) file spells."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = f"example:\n\n{EXAMPLE}\nA module is sought beside the file first."
        parser.add_argument("spec", help="the file")
        parser.add_argument("--output", help="folder for the scores, instead of the file's")
        parser.add_argument(
            "--dry-run", action="store_true", help="only print the plan: batches, bytes, cost"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Attribute, save, and say where the scores are."""
        run = read_run(args.spec)
        method = method_of(run.method)
        output = args.output or run.output
        if output is None and not args.dry_run:
            raise SpecError(
                f'run {args.spec!r}: names no output; write output = "scores" or give --output'
            )
        task, train, test = _inputs(run, method, _world(run, Path(args.spec).parent))
        # Written as they are made: a run that is stopped resumes, and an output that cannot be
        # used is refused before long work.
        kept = {"store": run.store, "fits": run.fits}
        settings = {name: folder for name, folder in kept.items() if folder is not None}
        made = method.attribute(
            task, train, test, memory=run.memory, out=output, dry_run=args.dry_run, **settings
        )
        print(made)
        if not args.dry_run:
            print(f"saved to {output}")
        return 0


def _world(run: Run, folder: Path) -> Any:
    """Return what the setting gives: task, train and test, by name or in this order."""
    given, own = dict(run.setting_fields), []
    if ":" in run.setting:
        # The user's own module lies beside the spec more often than on the path.
        sys.path.insert(0, str(folder.resolve()))
        try:
            load = load_target(run.setting)
        except (ImportError, AttributeError) as error:
            raise SpecError(f"run: setting {run.setting!r} cannot be imported ({error})") from error
    else:
        own = _fields_beside_load(default_registry().make("setting", run.setting))
        changed = {name: given.pop(name) for name in own if name in given}
        load = default_registry().make("setting", run.setting, **changed).load
    taken = inspect.signature(load).parameters
    for name in given:
        if name not in taken:
            hint = nearest(name, [*taken, *own])
            raise SpecError(f"run: setting {run.setting!r} takes no {name!r}; {hint}")
    return load(**given)


def _fields_beside_load(setting: Any) -> list[str]:
    """Return the fields of a setting that are no arguments of its `load`, which come first."""
    if not attrs.has(type(setting)):
        return []
    taken = inspect.signature(setting.load).parameters
    return [name for name in public_fields(type(setting)) if name not in taken]


def _inputs(run: Run, method: Any, world: Any) -> tuple[Any, Any, Any]:
    if isinstance(world, tuple) and len(world) == 3:
        return world
    if not all(hasattr(world, name) for name in ("task", "train", "test")):
        raise SpecError(
            f"run: setting {run.setting!r} gave a {type(world).__name__}, expected "
            "(task, train, test) or an object with these attributes"
        )
    fold = getattr(method, "fold", None)
    along = fold is not None and "learning-rate" in fold.needs
    # A setting may hold two tasks: the end of training, and the checkpoints along it.
    task = world.trajectory if along and hasattr(world, "trajectory") else world.task
    return task, world.train, world.test


command = RunCommand()
