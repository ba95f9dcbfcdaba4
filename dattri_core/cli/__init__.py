"""The command line. Each command is imported when it is called; plugins add their own."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import cast

from typing_extensions import Protocol

from dattri_core import __version__
from dattri_core.entries import load_target
from dattri_core.errors import DattriError, SpecError, nearest
from dattri_core.registry import Registry, default_registry

BUILT_IN = {
    "methods": ("dattri_core.cli.listing:methods", "List the methods"),
    "parts": ("dattri_core.cli.listing:parts", "List the parts that methods are made of"),
    "plugins": ("dattri_core.cli.listing:plugins", "List the plugins, broken ones too"),
    "show": ("dattri_core.cli.show:command", "Show a method or a part: fields, formula, citation"),
    "run": ("dattri_core.cli.run:command", "Run what a TOML file spells"),
    "store": ("dattri_core.cli.store:command", "Look at a gradient store, or verify it"),
    "check": ("dattri_core.cli.check:command", "Run the conformance laws of a part or plugin"),
}
USAGE_ERROR = 2
BUG = 1
INTERRUPTED = 130


class Command(Protocol):
    """What a command answers; a plugin registers one under the kind ``"command"``."""

    @property
    def help(self) -> str:
        """Return what the command does."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit status."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C.

    An error is one line on standard error; ``--traceback`` shows where it came from.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show = "--traceback" in given
    try:
        return _dispatch([word for word in given if word != "--traceback"])
    except KeyboardInterrupt:
        print("dattri: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as in "dattri parts | head": nothing more to say, and no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DattriError, OSError) as error:
        return _report(error, f"dattri: {_one_line(error)}", USAGE_ERROR, show)
    except Exception as error:
        message = f"dattri: unexpected {type(error).__name__}: {_one_line(error)}"
        hint = "" if show else "; run again with --traceback to see where"
        return _report(error, message + hint, BUG, show)


def _report(error: BaseException, message: str, status: int, show: bool) -> int:
    if show:
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(given: list[str]) -> int:
    registry = default_registry()
    parser = argparse.ArgumentParser(
        prog="dattri",
        description="Training-data attribution from interchangeable parts.",
        epilog=_overview(registry),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dattri-core {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from, with any command"
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    outer = parser.parse_args(given)
    if outer.command is None:
        parser.print_help()
        return 0
    command = _find(outer.command, registry)
    inner = argparse.ArgumentParser(prog=f"dattri {outer.command}", description=command.help)
    command.add_arguments(inner)
    return int(command.run(inner.parse_args(outer.arguments)))


def _find(name: str, registry: Registry) -> Command:
    if name in BUILT_IN:
        return cast("Command", load_target(BUILT_IN[name][0]))
    if name not in registry.names("command"):
        valid = {*BUILT_IN, *registry.names("command")}
        raise SpecError(f"no command {name!r}; {nearest(name, valid)}{registry.broken_note}")
    return cast("Command", registry.make("command", name))


def _overview(registry: Registry) -> str:
    lines = {name: summary for name, (_, summary) in BUILT_IN.items()}
    lines |= {entry.name: entry.summary for entry in registry.entries_of("command")}
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:{width}}  {lines[name]}" for name in sorted(lines))
    return f"commands:\n{listed}\n\n'dattri COMMAND --help' explains one."
