"""Running the loop for one request: into memory, into a folder, or down to the extremes."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from attrs import define, field

from dattri_core import assemble
from dattri_core.atomic import discard_leftovers, require_room
from dattri_core.checkpoint import Checkpoint
from dattri_core.contract import DEFAULT_LIMIT, DEVICE_LIMIT, contraction_limit
from dattri_core.errors import MemoryBudgetError, NumericsError, StoreError, format_bytes
from dattri_core.ids import id_array
from dattri_core.locks import sole_writer
from dattri_core.loop import Run, Whole, finish_tile, finished, fold_tiles
from dattri_core.pairing import WHOLE
from dattri_core.plans import Route
from dattri_core.processes import Processes, anywhere, leads, of_first, processes_now
from dattri_core.progress import bar
from dattri_core.protocols import Projector
from dattri_core.queries import Branch
from dattri_core.registry import default_registry
from dattri_core.requests import Request
from dattri_core.scores import Scores
from dattri_core.scores_file import is_scores_folder
from dattri_core.scores_writer import ScoresWriter
from dattri_core.shelf import Shelf
from dattri_core.snapshot import Fitted
from dattri_core.stages import Stage, needs_data
from dattri_core.stream import Examples
from dattri_core.tiles import FolderTiles, MemoryTiles, Tiles, open_tiles, shards
from dattri_core.top import Extreme, ExtremeRows, Extremes

T = TypeVar("T")
LAYOUT = (
    "shard",
    "query_group",
    "groups",
    "train_batch",
    "test_batch",
    "slab",
    "budget",
    "choice",
)
"""What a resumed run keeps of the plan that it began with."""


@define(eq=False)
class Runner:
    """One pass of the loop, and what the inverse Hessians reported on it.

    Args:
        run: What is computed.
        request: What was asked.
        provenance: Of the whole run, JSON-ready.
        fit: Gives a fitted checkpoint; one is alive at a time.
        progress: Show a bar; None: on a terminal.
        device: Where rows are multiplied.
        fitted_on: The train set of the fit.
    """

    run: Run
    request: Request
    provenance: dict[str, Any]
    fit: Callable[[Checkpoint], Fitted]
    progress: bool | None
    device: torch.device
    fitted_on: Examples
    _reports: list[tuple[int, dict[str, Any]]] = field(factory=list)
    _sources: dict[str, dict[str, Any]] = field(factory=dict)

    def announced(self, work: Callable[[], T], provenance_of: Callable[[T], Any]) -> T:
        """Return what the work gives; listeners hear of its beginning and its end."""
        events, facts = default_registry(), self.provenance
        names = ("method", "n_train", "n_test", "checkpoints")
        events.emit("run_started", {name: facts[name] for name in names})
        started = time.monotonic()
        found = work()
        seconds, said = time.monotonic() - started, provenance_of(found)
        events.emit(
            "run_finished", {"method": facts["method"], "seconds": seconds, "provenance": said}
        )
        return found

    def to_memory(self, names: Sequence[str]) -> dict[str, Scores]:
        """Return the scores of each reading, by its name."""
        run, tiles = self.run, MemoryTiles()
        first, last = span = self._span()
        self._fold(tiles, (span,))
        shape = (last - first, run.plan.n_test)
        whole: list[torch.Tensor] = []
        for rows, columns, values in finished(run, tiles, span):
            if values[0].shape == shape:
                whole = values
                break
            if not whole:
                whole = [torch.empty(shape, dtype=tile.dtype) for tile in values]
            for held, tile in zip(whole, values, strict=True):
                held[rows, columns] = tile
        whole = self._of_all(whole)
        train_ids, test_ids = run.train.ids, self.request.test_ids(run.test)
        return {
            name: Scores(values, train_ids, test_ids, self._facts(at, name))
            for at, (name, values) in enumerate(zip(names, whole, strict=True))
        }

    @property
    def _processes(self) -> Processes | None:
        """Return the processes that score a part of the train rows each."""
        return None if self.run.scorer.locality == "column" else processes_now()

    def _span(self, whole: int = 1) -> tuple[int, int]:
        """Return which train rows this process scores, in pieces of ``whole`` that stay whole.

        Tiles on disk are the same for any number of processes, so that any number goes on with
        them.
        """
        count = len(self.run.train)
        if self._processes is None:
            return 0, count
        first, last = self._processes.part(-(-count // whole))
        return min(first * whole, count), min(last * whole, count)

    def _of_all(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return values of this process's train rows with those of the others."""
        if self._processes is None:
            return values
        named = {f"{at:06}": value for at, value in enumerate(values)}
        joined = self._processes.joined(named, len(self.run.train), torch.device("cpu"))
        return [joined[name] for name in sorted(joined)]

    def to_folder(self, out: Path, routes: tuple[Route, ...], dtype: torch.dtype) -> Scores:
        """Return the scores on disk; a run of the same facts that was stopped goes on.

        Args:
            out: Their folder.
            routes: Of queries to train rows, as the plan counts them; see `Fitted.layout`.
            dtype: Of the scores.

        Raises:
            StoreError: Another process writes them, the disk has no room, or an unfinished run of
                other facts is there.
        """
        if out.is_dir() and not os.access(out.parent, os.W_OK):
            self._know_contents()  # nobody writes there, so that no lock is needed to read
            if (held := _finished_before(out, self.provenance)) is not None:
                return held
        lock = sole_writer(run_folder(out), f"scores {str(out)!r}") if leads() else nullcontext()
        with lock:
            self._know_contents()
            return self._to_folder(out, routes, dtype)

    def finished(self, out: Path) -> Scores | None:
        """Return the finished scores of the same call, where they are there.

        Raises:
            StoreError: Another process writes them.
        """
        alone = os.access(out.parent, os.W_OK)  # else nobody writes there, and no lock is needed
        lock = sole_writer(run_folder(out), f"scores {str(out)!r}") if alone else nullcontext()
        with lock:
            self._know_contents()
            for path in (out, run_folder(out)) if alone else ():
                discard_leftovers(path)
            if run_folder(out).exists():
                return None
            return _finished_before(out, self.provenance, tell=False)

    def _know_contents(self) -> None:
        contents: dict[str, Any] = {
            "train": self.run.train.content,
            "test": self.run.test.content,
        }
        if (own := self.provenance["fitted_on"]) is not None:
            contents["fitted_on"] = {**own, "train": self.fitted_on.content}
        self.provenance = {**self.provenance, **contents}

    def _to_folder(self, out: Path, routes: tuple[Route, ...], dtype: torch.dtype) -> Scores:
        sizes: dict[str, int] | None = None
        folder = run_folder(out)
        if leads():
            for path in (out, folder):
                discard_leftovers(path)
            held = None if folder.exists() else _finished_before(out, self.provenance)
            sizes = None if held is not None else self._begun(out, dtype)
        sizes = of_first(sizes)
        if sizes is None:
            return Scores.load(out)
        shared = leads() or self._processes is not None
        tiles: Tiles = FolderTiles(folder) if shared else MemoryTiles()
        resumed: dict[str, Any] = dict(sizes)
        route = routes[sizes["choice"] - 1]
        self.run = run = attrs.evolve(
            self.run,
            plan=attrs.evolve(self.run.plan, route=route, **resumed),
            shelf=Shelf(folder),
        )
        self._fold(tiles, (self._span(run.shard),))
        anywhere(True)  # from here on all tiles are there
        scores = self._written(out, tiles, dtype) if leads() else None
        anywhere(True)  # and from here on the scores
        return Scores.load(out) if scores is None else scores

    def _begun(self, out: Path, dtype: torch.dtype) -> dict[str, int]:
        """Begin or resume the run in its folder, and return the sizes that it is cut by."""
        sizes = {name: getattr(self.run.plan, name) for name in LAYOUT}
        self._require_room(out, dtype)
        return open_tiles(run_folder(out), self.provenance, sizes)[1]

    def _written(self, out: Path, tiles: Tiles, dtype: torch.dtype) -> Scores:
        """Write the scores from tiles that are all there, and remove these."""
        run = self.run
        with ScoresWriter(out, len(run.train), run.plan.n_test, dtype) as writer:
            for rows, columns, (tile,) in finished(run, tiles):
                writer.values[rows, columns] = tile.numpy()
                writer.release()
            test_ids = self.request.test_ids(run.test)
            scores = writer.finish(run.train.ids, test_ids, self._facts(0, WHOLE))
        tiles.close()
        return scores

    def _require_room(self, out: Path, dtype: torch.dtype) -> None:
        """Raise unless the disk has room for the tiles and for the scores, both in full."""
        folder = run_folder(out)
        shape = (len(self.run.train), self.run.plan.n_test)
        size = shape[0] * shape[1] * dtype.itemsize
        there = sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else 0
        require_room(
            out,
            2 * size - min(size, there),
            f"scores {str(out)!r}: {shape[0]} x {shape[1]} numbers, twice until they are whole,",
            "give out= on another disk, or fitted.extremes(test, k) where the largest are enough",
        )

    def to_extremes(self, k: int) -> Extremes:
        """Return the k largest and smallest scores of each query; no tile outlives its batch.

        A tile is finished once it holds every checkpoint. With one, that is as soon as its batch is
        scored; with several, tiles of as many train rows wait as the plan has room for.
        """
        run, tiles = self.run, MemoryTiles()
        first, last = self._span()
        at_once = run.plan.shard if len(run.checkpoints) > 1 else max(1, last - first)
        batch = min(run.plan.shard, run.plan.train_batch)
        self.run = run = attrs.evolve(run, plan=attrs.evolve(run.plan, shard=batch))
        kept = [
            (ExtremeRows(k, largest=True), ExtremeRows(k, largest=False))
            for _ in range(run.plan.groups)
        ]

        def whole(group: int, start: int, stop: int) -> None:
            (values,) = finish_tile(run, tiles, group, start, stop)
            _require_finite(values, start, run.columns(group).start)
            for side in kept[group]:
                side.add(start, values)

        parts = [(first + a, first + b) for a, b in shards(last - first, max(at_once, run.shard))]
        if self._processes is not None:  # as many for each, since they exchange words for each
            most = max(self._processes.gathered(len(parts)))
            parts += [(last, last)] * (most - len(parts))
        self._fold(tiles, parts, whole)
        if self._processes is not None:
            of_groups = zip(*self._processes.gathered(kept), strict=True)
            kept = [
                (ExtremeRows.joined(best), ExtremeRows.joined(worst))
                for best, worst in (zip(*sides, strict=True) for sides in of_groups)
            ]
        top, bottom = (
            Extreme(
                id_array(run.train.ids, torch.cat([side.positions for side in sides], 1)),
                torch.cat([side.values for side in sides], 1),
            )
            for sides in zip(*kept, strict=True)
        )
        return Extremes(top, bottom, self.request.test_ids(run.test), self._facts(0, WHOLE))

    def _fold(
        self,
        tiles: Tiles,
        spans: Sequence[tuple[int, int] | None] = (None,),
        whole: Whole | None = None,
    ) -> None:
        events, plan = default_registry(), self.run.plan
        total = plan.train_passes * len(self.run.train)
        with (
            contraction_limit(contractions(plan.budget, self.device)),
            bar("attribute", total, self.progress) as shown,
        ):

            def advance(count: int) -> None:
                shown.advance(count)
                events.emit("block_scored", {"done": shown.done, "total": shown.total})

            for span in spans:
                fold_tiles(self.run, self.fit, tiles, advance, self._report, span, whole)

    def _report(self, fitted: Fitted, branches: Sequence[Branch], group: int) -> None:
        name = fitted.checkpoint.name
        place = {"checkpoint": name, "group": group}
        if fitted.reported:
            self._sources[name] = {"checkpoint": name, **fitted.reported}
        for branch in branches:
            for variant, reports in branch.stats.items():
                self._reports += [(variant, {**place, **stats}) for stats in reports]

    def _facts(self, at: int, name: str) -> dict[str, Any]:
        """Return the provenance of one reading."""
        variant = at if len(self.run.dampings) > 1 else 0
        said = [stats for of, stats in self._reports if of == variant]
        facts = {**self.provenance, **self.request.facts(at, name), "solver": said}
        return {**facts, "source": list(self._sources.values())} if self._sources else facts


def require_streams(run: Run, stages: Sequence[Stage]) -> None:
    """Raise unless the tiles of several checkpoints can be finished one after another.

    Raises:
        MemoryBudgetError: Not all of them fit at once, and a part of the train set is not enough
            for the scorer, or would have the stages fitted again.
    """
    plan, several = run.plan, len(run.checkpoints)
    if several == 1 or plan.shard >= plan.n_train:
        return
    if run.scorer.locality == "column":
        reason = f"the scorer {assemble.name_of(run.scorer)!r} sees all train rows at once"
    elif any(needs_data(s) if isinstance(s, Projector) else bool(s.needs) for s in stages):
        reason = "parts of the train set would need another fit of every checkpoint for each"
    else:
        return
    raise MemoryBudgetError(
        f"extremes: the scores of {plan.n_train} x {plan.n_test} examples wait for the last of "
        f"{several} checkpoints, about {format_bytes(8 * plan.n_train * plan.n_test)}, and the "
        f"budget of {format_bytes(plan.budget)} has room for {plan.shard} train rows of them; "
        f"{reason}; give more memory=, or use attribute(test, out=...).top(k)"
    )


def _require_finite(values: torch.Tensor, row: int, column: int) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        at, query = bad[0].tolist()
        raise NumericsError(
            f"extremes: the value {values[at, query].item()} at train position {row + at}, test "
            f"position {column + query} is not finite; look for a diverged checkpoint, or a "
            "singular curvature with damping 0"
        )


def contractions(budget: int, device: torch.device) -> int:
    """Return the bytes that one contraction may use.

    Four intermediates of that size may live at once: a quarter of the budget for all of them.
    """
    return min(DEFAULT_LIMIT if device.type == "cpu" else DEVICE_LIMIT, budget // 16)


def _finished_before(out: Path, facts: Mapping[str, Any], *, tell: bool = True) -> Scores | None:
    """Return the finished scores of the same call, where they are there; else tell of others.

    The fingerprints cover weights, data and method, not the code of the model and of the loss, so
    what is returned is said.
    """
    if not (out.is_dir() and is_scores_folder(out)):
        return None
    try:
        held = Scores.load(out)
    except StoreError:
        return None  # damaged: replaced as a whole
    now = json.loads(json.dumps(facts))
    changed = [name for name in now if held.provenance.get(name) != now[name]]
    if changed:
        if tell:
            warnings.warn(
                f"attribute: out={str(out)!r} holds finished scores with another "
                f"{' and another '.join(changed)}; they are replaced once the new ones are whole",
                stacklevel=2,
            )
        return None
    warnings.warn(
        f"attribute: out={str(out)!r} holds the finished scores of this very call, which are "
        "returned; delete it where the code of the model or of the loss changed, which no hash "
        "sees",
        stacklevel=2,
    )
    return held


def run_folder(out: Path) -> Path:
    """Return where a run keeps its tiles until its scores are written."""
    return out.with_name(f"{out.name}.run")
