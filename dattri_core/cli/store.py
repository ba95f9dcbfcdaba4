"""``dattri store inspect|verify FOLDER``: what a gradient store holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attrs import frozen

from dattri_core.cli.table import table
from dattri_core.errors import StoreError, format_bytes
from dattri_core.progress import bar
from dattri_core.store import OpenStore


@frozen
class StoreCommand:
    """The command ``dattri store``."""

    help: str = "Show what a gradient store holds, or check every number in it."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        parser.add_argument("action", choices=("inspect", "verify"))
        parser.add_argument("folder", help="the store")

    def run(self, args: argparse.Namespace) -> int:
        """Print; `verify` ends with status 1 where a shard is bad."""
        store = OpenStore.read(Path(args.folder))
        return _verify(store) if args.action == "verify" else _inspect(store)


def _inspect(store: OpenStore) -> int:
    layout = store.layout
    print(f"rows         {layout.rows} of {layout.dim} numbers, {layout.dtype}")
    print(f"checkpoint   {format_bytes(layout.nbytes)} in shards of {layout.shard} rows")
    for name, value in store.facts.items():
        print(f"{name:<12} {value if isinstance(value, str) else json.dumps(value)}")
    listed = []
    for position in store.checkpoints:
        held = store.held(position)
        there = len(layout.starts) - len(held.missing)
        listed.append(
            (str(position), held.name, held.weights[:12], f"{there}/{len(layout.starts)}")
        )
    if listed:
        print(table(("checkpoint", "name", "weights", "shards"), listed))
    return 0


def _verify(store: OpenStore) -> int:
    """Read every shard; all that is bad is told, not the first alone."""
    bad = 0
    for position in store.checkpoints:
        held = store.held(position)
        starts = [start for start in store.layout.starts if start not in set(held.missing)]
        with bar(f"checkpoint {position}", len(starts), None) as shown:
            for start in starts:
                try:
                    held.verify(start)
                except StoreError as error:
                    bad += 1
                    print(f"bad: {error}")
                shown.advance()
        print(
            f"checkpoint {position} ({held.name}): {len(starts)} shards read, "
            f"{len(held.missing)} not there yet"
        )
    print("whole" if not bad else f"{bad} bad shards")
    return 1 if bad else 0


command = StoreCommand()
