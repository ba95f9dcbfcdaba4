"""``dattri new-plugin``: a distribution with a part, a method and their tests, ready to install."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from dattri_core import InputError, SpecError, default_registry, nearest
from dattri_scaffold.names import names_of
from dattri_scaffold.templates import KINDS, written

GUIDE = "docs/plugins.md"


@frozen
class NewPlugin:
    """The command ``dattri new-plugin``."""

    help: str = (
        "Write an installable plugin: a part that works, a method that uses it where methods are "
        "made of such parts, tests against a closed form, the conformance laws, CI, a README and "
        "a licence. All of it passes as it is written; change the part, and the tests tell."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        kinds = "\n".join(f"  {kind:10} {does}" for kind, does in KINDS.items())
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = f"kinds, and what the part does as it is written:\n{kinds}"
        parser.add_argument("name", help="such as soft-cosine; it becomes dattri-soft-cosine")
        parser.add_argument("--kind", default="scorer", help="see below; default scorer")
        parser.add_argument("--into", default=".", metavar="FOLDER", help="default: this folder")

    def run(self, args: argparse.Namespace) -> int:
        """Write the files, all or none, and say what to do next."""
        registry = default_registry()
        if args.kind not in KINDS:
            raise SpecError(
                f"new-plugin: no template for the kind {args.kind!r}; "
                f"{nearest(args.kind, KINDS)}. Parts of every other kind are registered in the "
                f"same way: begin with one of these, and see the protocol in {GUIDE}"
            )
        names = names_of(args.name, args.kind, registry)
        folder = Path(args.into) / names.distribution
        texts = written(names)
        write_folder(folder, texts)
        print(f"wrote {folder}:")
        for path in texts:
            print(f"  {path}")
        print(
            f"\nnext:\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n"
            f"  dattri check {names.distribution}"
        )
        return 0


def write_folder(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files of a folder that is not there yet, all or none.

    Raises:
        InputError: The folder exists, or the one that it is to lie in is none.
    """
    if folder.exists():
        raise InputError(
            f"new-plugin: {str(folder)!r} exists; delete it, or choose another name or --into"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for path, text in texts.items():
            place = unfinished / "whole" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        (unfinished / "whole").rename(folder)
    finally:
        shutil.rmtree(unfinished)


command = NewPlugin()
