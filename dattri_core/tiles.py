"""Tiles: the state of each (train shard, query group) while checkpoints are folded into it.

In memory, or as one file a tile in a folder, so that a run that was stopped computes none twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from typing_extensions import Protocol

from dattri_core.atomic import atomic_file, disk_errors, remove_folder, write_text
from dattri_core.errors import StoreError
from dattri_core.locks import require_free
from dattri_core.protocols import FoldState

FORMAT = "dattri-run"
MANIFEST = "run.json"
TILE = re.compile(r"g(\d+)_s(\d+)_c(\d+)\.safetensors")
PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]+")  # what a kill leaves of an atomic file


class Tiles(Protocol):
    """Where the states are kept; ``done`` counts the checkpoints that are folded in."""

    def done(self, group: int, start: int) -> int:
        """Return how many checkpoints the tile holds."""
        ...

    def get(self, group: int, start: int) -> FoldState | None:
        """Return the state of a tile, or None before its first checkpoint."""
        ...

    def put(self, group: int, start: int, done: int, state: FoldState) -> None:
        """Keep a state in place of the one before."""
        ...

    def drop(self, group: int, start: int) -> None:
        """Forget a tile's memory once it is finished."""
        ...

    def close(self) -> None:
        """Forget everything: the run is complete."""
        ...


@frozen(eq=False)
class MemoryTiles:
    """Tiles in memory."""

    _states: dict[tuple[int, int], tuple[int, FoldState]] = field(factory=dict)

    def done(self, group: int, start: int) -> int:
        """Return how many checkpoints the tile holds."""
        return self._states.get((group, start), (0, {}))[0]

    def get(self, group: int, start: int) -> FoldState | None:
        """Return the state of a tile, or None before its first checkpoint."""
        held = self._states.get((group, start))
        return None if held is None else held[1]

    def put(self, group: int, start: int, done: int, state: FoldState) -> None:
        """Keep a state in place of the one before."""
        self._states[group, start] = (done, state)

    def drop(self, group: int, start: int) -> None:
        """Forget a tile."""
        self._states.pop((group, start), None)

    def close(self) -> None:
        """Forget everything."""
        self._states.clear()


@frozen(eq=False)
class FolderTiles:
    """Tiles in a folder: a tile is replaced by one rename, so no moment leaves it half-done."""

    folder: Path

    def done(self, group: int, start: int) -> int:
        """Return how many checkpoints the tile holds."""
        return max((count for count, _ in self._files(group, start)), default=0)

    def get(self, group: int, start: int) -> FoldState | None:
        """Return the state of a tile, or None before its first checkpoint."""
        files = self._files(group, start)
        if not files:
            return None
        path = max(files)[1]
        try:
            return load_file(str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise StoreError(
                f"run {str(path)!r}: the tile cannot be read ({error}); delete this file and run "
                "again to compute it anew"
            ) from error

    def put(self, group: int, start: int, done: int, state: FoldState) -> None:
        """Write the new state, then remove the one before."""
        before = self._files(group, start)
        path = self.folder / f"g{group:05d}_s{start:09d}_c{done:05d}.safetensors"
        with disk_errors(f"run {str(path)!r}: the tile"):
            with atomic_file(path) as handle:
                handle.write(save(_contiguous(state)))
            for _, old in before:
                if old != path:
                    old.unlink(missing_ok=True)

    def drop(self, group: int, start: int) -> None:
        """Keep the file: the folder goes as a whole when the scores are safely written."""

    def close(self) -> None:
        """Remove the folder, all of it at once: a kill leaves no part of it to be resumed."""
        remove_folder(self.folder)

    def _files(self, group: int, start: int) -> list[tuple[int, Path]]:
        found = self.folder.glob(f"g{group:05d}_s{start:09d}_c*.safetensors")
        matched = ((TILE.fullmatch(path.name), path) for path in found)
        return [(int(match[3]), path) for match, path in matched if match is not None]


def open_tiles(
    folder: Path, facts: Mapping[str, Any], layout: dict[str, int]
) -> tuple[FolderTiles, dict[str, int]]:
    """Begin or resume a run in a folder; return its tiles and the layout they were cut by.

    Args:
        folder: Where the tiles lie.
        facts: Everything that decides the numbers, JSON-ready: method, weights, data, versions.
        layout: Shard and group sizes of a new run; a resumed one keeps those it began with.

    Raises:
        StoreError: The folder holds another run, or something else.
    """
    manifest = folder / MANIFEST
    facts = json.loads(json.dumps(facts))
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"run folder {str(folder)!r}: a file has this name; remove it")
    if manifest.exists():
        found = _read_manifest(manifest)
        changed = [key for key in facts if found["facts"].get(key) != facts[key]]
        if changed:
            others = " and another ".join(changed)
            raise StoreError(
                f"run folder {str(folder)!r}: it holds an unfinished run with another {others} "
                f"({_differences(found['facts'], facts, changed)}); "
                "delete it to begin anew, or give another out="
            )
        return FolderTiles(folder), {key: int(found["layout"][key]) for key in layout}
    if folder.exists() and not all(PARTIAL.fullmatch(file.name) for file in folder.iterdir()):
        raise StoreError(
            f"run folder {str(folder)!r}: it is not empty and has no {MANIFEST}; give another out="
        )
    with disk_errors(f"run folder {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(
            manifest,
            json.dumps({"format": FORMAT, "layout": layout, "facts": facts}, indent=1),
        )
    return FolderTiles(folder), layout


def budget_of(folder: Path, default: int) -> int:
    """Return the memory budget of an unfinished run, or the default where there is none.

    Raises:
        StoreError: Another process is at work on the run: known before a long fit.
    """
    require_free(folder, f"scores in {str(folder)!r}")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return default
    return int(_read_manifest(manifest)["layout"].get("budget", default))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not isinstance(found["facts"], dict):
            raise KeyError("format")
        for name, size in found["layout"].items():
            if not isinstance(size, int) or size < (0 if name == "slab" else 1):
                raise ValueError(f"{name} is {size!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"run folder {str(path.parent)!r}: {MANIFEST} is truncated or foreign ({error!r}); "
            "delete the folder to begin anew"
        ) from error
    return dict(found)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], names: list[str]) -> str:
    shown = [f"{name}: {_brief(then.get(name))} then, {_brief(now[name])} now" for name in names]
    return "; ".join(shown)


def _brief(value: Any, length: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _contiguous(state: FoldState) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", copy=False).contiguous() for name, value in state.items()
    }


def shards(n: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges of at most ``size`` that cover n."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]
