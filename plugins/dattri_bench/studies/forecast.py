"""A forecast: what a run of a study would do, from specs and records alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

from dattri_bench.cells import Cell
from dattri_bench.engine import WorldCells
from dattri_bench.studies.asked import Asked, parts_of
from dattri_bench.studies.results import INVALID, MISSING, Results, results_of
from dattri_bench.studies.sharing import fit_of, front_of
from dattri_core import Method


@frozen(eq=False)
class Forecast:
    """What a run would do.

    Args:
        results: What is on record; its rows are the cells.
        worlds: Worlds that would be made, each with a trained model.
        retrained: Models on other train sets that metrics ask for, where they say how many; those
            that are in the store already are not trained again.
        passes: Over the train set, about: each cell alone, and with what is shared.
        parts: Jobs that the work can be cut into.
        seconds: Of attributions, about; None before a cell of this study is on record.
    """

    results: Results
    worlds: int
    retrained: int
    passes: tuple[float, float]
    parts: int
    seconds: float | None

    def lines(self) -> list[str]:
        """Return it as text: cells, invalid points with their reason, shared work, estimate."""
        rows = self.results.rows
        study = self.results.study
        count = {s: sum(row.status == s for row in rows) for s in {row.status for row in rows}}
        points = len(rows) // len(study.seeds) // len(study.metrics)
        found = [
            (
                f"{points} points x {len(study.metrics)} metrics x {len(study.seeds)} seeds = "
                f"{len(rows)} cells: {', '.join(f'{n} {s}' for s, n in sorted(count.items()))}"
            )
        ]
        step = len(study.seeds) * len(study.metrics)
        width = max(len(row.label) for row in rows)
        for row in rows[::step]:
            same = [r.status for r in rows if r.levels is row.levels]
            told = row.error if row.status == INVALID else _spell(same)
            found.append(f"  {row.label:<{width}}  {told}")
        alone, shared = self.passes
        found += [
            f"to make: {self.worlds} worlds, each with a trained model",
            f"to train: up to {self.retrained} models on other train sets",
            (
                f"to compute: about {shared:g} passes over the train set; {alone:g} if each cell "
                "were alone"
            ),
            f"to share: {self.parts} jobs at most run at once",
            "estimate: "
            + (
                "unknown before the first cells are done"
                if self.seconds is None
                else f"{self.seconds:.0f} s of attribution in one process, without training"
            ),
        ]
        return found


def _spell(statuses: list[str]) -> str:
    counts = {s: statuses.count(s) for s in dict.fromkeys(statuses)}
    return ", ".join(f"{n} {s}" for s, n in counts.items())


def forecast(asked: Asked) -> Forecast:
    """Return what a run of a study would do."""
    results = results_of(asked)
    worlds = retrained = parts = 0
    alone = shared = 0.0
    attributions: set[tuple[int, int, float]] = set()
    for cells in asked.worlds(lambda line: None):
        missing = cells.missing(cells.planned())
        if not missing:
            continue
        worlds += 1
        retrained += _models(cells, missing)
        parts += sum(bool(cells.missing(part)) for part in parts_of(cells))
        found = _passes(missing)
        alone, shared = alone + found[0], shared + found[1]
        attributions |= {(id(c.entrant), c.seed, cells.wrong) for c in missing}
    known = [row.seconds for row in results.rows if row.seconds is not None]
    seconds = float(np.mean(known)) * len(attributions) if known else None
    left = any(row.status == MISSING for row in results.rows)
    return Forecast(results, worlds, retrained, (alone, shared), parts, seconds if left else 0.0)


def _models(cells: WorldCells, missing: list[Cell]) -> int:
    asking = {id(c.measure): c.measure for c in missing if "retraining" in c.measure.metric.needs}
    return sum(measure.subsets or 0 for measure in asking.values())


def _passes(missing: list[Cell]) -> tuple[float, float]:
    """Return passes over the train set, each cell alone and with what is shared, about.

    A fit that asks something of the train set counts one, an attribution one; of sketched rows from
    a store both together one. Of several models one is fitted at a time, so their fits are not
    shared.
    """
    alone = 0.0
    shared: dict[Any, float] = {}
    for cell in missing:
        made = cell.entrant.made(None, cell.seed)
        front = front_of(made)
        if not isinstance(made, Method):
            continue
        models = max(1, cell.entrant.models) * getattr(made.source, "members", 1)
        if front is not None:
            alone += models
            shared[front, models] = models
            continue
        fits = any(getattr(stage, "needs", ()) for stage in made.chain)
        alone += models * (1 + fits)
        shared[id(cell.entrant), "scores"] = models
        if fits:
            shared[fit_of(made) if models == 1 else id(cell.entrant), "fit"] = models
    return alone, sum(shared.values())
