"""Summary: one row for each method by metric, over all seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen
from scipy.stats import t as student

from dattri_bench.cells import Finished
from dattri_bench.tuning import spell_damping

ONE_SEED = "the metric's own interval"
SEVERAL_SEEDS = (
    "Student's t interval of the mean over seeds, no narrower than the metric's own intervals of "
    "the seeds give it, and within the values that the metric can have"
)
PARTIAL = (
    "Rows that lack seeds come last and are not to be ranked with the others: their mean is over "
    "fewer worlds. With one seed left their interval is " + ONE_SEED + "."
)


@frozen
class Row:
    """What one method gave by one metric.

    Args:
        metric: As tables call it.
        method: As tables call it.
        models: Trained models that the method was asked about; 0: checkpoints along the run.
        seeds: Of the worlds that gave a number.
        value: Mean over seeds; None where no seed gave a number.
        low: Lower end of the interval, see `interval_of`.
        high: Upper end.
        confidence: Of the interval.
        chance: What scores without information give, mean over seeds.
        ceiling: What the best scores could give, mean over seeds; None where nothing bounds them.
        higher_is_better: Which way is good.
        seconds: To fit and attribute, mean over seeds.
        peak_bytes: Highest over seeds.
        notes: Dampings that were chosen, warnings, and why seeds failed.
        error: Why there is no number.
        failed: Seeds that gave no number, of a row that has one.
    """

    metric: str
    method: str
    models: int
    seeds: tuple[int, ...] = ()
    value: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    chance: float | None = None
    ceiling: float | None = None
    higher_is_better: bool = True
    seconds: float | None = None
    peak_bytes: int | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    failed: tuple[int, ...] = ()

    @property
    def counted(self) -> str:
        """Return how many seeds gave a number, as text: ``3``, or ``2 of 3``."""
        return spell_seeds(len(self.seeds), len(self.failed))

    def plain(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        found = asdict(self)
        lists = {name: list(found[name]) for name in ("seeds", "notes", "failed")}
        return {**found, **lists}


def spell_seeds(done: int, failed: int) -> str:
    """Return how many seeds gave a number, as text: ``3``, or ``2 of 3``."""
    return f"{done} of {done + failed}" if failed else str(done)


def rows_of(finished: Sequence[Finished]) -> list[Row]:
    """Return the rows: metrics in their order, in each the best method first.

    Those that lack seeds come after those that have all, and those without a number last.
    """
    groups: dict[tuple[str, str], list[Finished]] = {}
    for one in finished:
        key = (one.cell.measure.label, one.cell.entrant.label)
        groups.setdefault(key, []).append(one)
    rows = [_row(metric, method, cells) for (metric, method), cells in groups.items()]
    order = list(dict.fromkeys(row.metric for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.metric), *_rank(row)))


def _rank(row: Row) -> tuple[bool, bool, float]:
    value = 0.0 if row.value is None else row.value
    return row.value is None, bool(row.failed), -value if row.higher_is_better else value


def _row(metric: str, method: str, cells: Sequence[Finished]) -> Row:
    done = [one for one in cells if one.record["result"] is not None]
    failed = [one for one in cells if one.record["result"] is None]
    models = cells[0].cell.entrant.models
    if not done:
        return Row(metric, method, models, error=str(failed[0].record["error"]))
    results = [one.record["result"] for one in done]
    low, high = interval_of(results)
    ceilings = [r["ceiling"] for r in results if r["ceiling"] is not None]
    runs = [one.record["attribution"] for one in done]
    peaks = [run["peak_bytes"] for run in runs if run.get("peak_bytes") is not None]
    times = [run["seconds"] for run in runs if "seconds" in run]
    return Row(
        metric=metric,
        method=method,
        models=models,
        seeds=tuple(one.cell.seed for one in done),
        value=_mean([r["value"] for r in results]),
        low=low,
        high=high,
        confidence=results[0]["confidence"],
        chance=_mean([r["chance"] for r in results]),
        ceiling=_mean(ceilings) if ceilings else None,
        higher_is_better=results[0]["higher_is_better"],
        seconds=_mean(times) if times else None,
        peak_bytes=max(peaks, default=None),
        notes=_notes(done, failed),
        failed=tuple(one.cell.seed for one in failed),
    )


def interval_of(results: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the interval of one result, or that of the mean of several.

        mean -+ max(t_(S-1) s / sqrt(S), sqrt(sum_k half_k^2) / S),  within the metric's bounds

    with s the standard deviation over S seeds, in which all is that differs between worlds: data,
    training, subsets and tests. half_k is the half-width of the metric's own interval at seed k:
    the second term is the interval of a mean of S independent numbers with these intervals, which
    is what is left where worlds themselves do not differ. Two seeds that agree by chance, as a
    share of few tests does often, have s = 0, and are still not known better than that.

    Args:
        results: One for each seed: ``value``, ``low``, ``high``, ``confidence``, and ``bounds``
            where the metric says them.
    """
    if len(results) == 1:
        return float(results[0]["low"]), float(results[0]["high"])
    values = np.array([r["value"] for r in results])
    count, mean = len(values), float(values.mean())
    quantile = student.ppf((1 + results[0]["confidence"]) / 2, count - 1)
    between = float(quantile * values.std(ddof=1)) / math.sqrt(count)
    own = [max(r["value"] - r["low"], r["high"] - r["value"]) for r in results]
    half = max(between, math.hypot(*own) / count)
    least, most = _bounds(results)
    # the mean stays inside, whatever is said of bounds
    return min(max(mean - half, least), mean), max(min(mean + half, most), mean)


def _bounds(results: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return what no result can leave; records of earlier releases do not say it."""
    said = [r.get("bounds") or (None, None) for r in results]
    least = [-math.inf if low is None else float(low) for low, _ in said]
    most = [math.inf if high is None else float(high) for _, high in said]
    return min(least), max(most)


def _notes(done: Sequence[Finished], failed: Sequence[Finished]) -> tuple[str, ...]:
    notes = []
    for one in done:
        tuning = one.record.get("tuning")
        if tuning is not None:
            notes.append(f"seed {one.cell.seed}: damping {spell_damping(tuning['chosen'])}")
        run = one.record["attribution"]
        notes += run.get("notes", [])
        own = run.get("self_influence") or {}
        if own.get("note") and one.cell.measure.needs_wrong_labels:
            notes.append(f"no self-influence: {own['note']}")
    notes += [f"seed {one.cell.seed} gave none: {one.record['error']}" for one in failed]
    return tuple(dict.fromkeys(notes))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
