"""Statistics of a study: means, paired comparisons with Holm's correction, effects, ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import frozen
from scipy import stats

from dattri_bench.studies.results import Results, Row
from dattri_bench.summary import interval_of
from dattri_core import InputError, nearest

Array = np.ndarray[Any, Any]
CONFIDENCE = 0.95
SEEDS, TESTS = "seeds", "test examples"


@frozen(eq=False)
class Mean:
    """One point by one metric over seeds.

    Args:
        setting: Of the point.
        metric: As tables call it.
        label: Of the point.
        levels: Label of the level of each factor.
        places: Place of the level among those of its factor, in the order of the study.
        seeds: That gave a number.
        value: Mean over seeds; None without one.
        low: Of the metric's own interval with one seed, else of Student's t of the mean.
        high: Upper end.
        chance: Mean over seeds.
        higher_is_better: Which way is good.
        rank: Mean rank over seeds, 1 the best of those that have all seeds; None for others.
        seconds: Mean over seeds.
        peak_bytes: Highest over seeds.
        error: Of the first seed that has none.
    """

    setting: str
    metric: str
    label: str
    levels: Mapping[str, str]
    places: Mapping[str, int]
    seeds: tuple[int, ...]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    higher_is_better: bool = True
    rank: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    error: str | None = None


@frozen
class Comparison:
    """One point against another, or one level against another, paired.

    Args:
        setting: Of both.
        metric: As tables call it.
        what: The point, or ``factor: level``.
        against: The point or level that it is compared with.
        over: What is paired: ``"seeds"`` or ``"test examples"``.
        count: How many pairs.
        difference: Mean of value minus that of ``against``.
        low: Of Student's t interval of the mean difference; None with one pair.
        high: Upper end.
        p: Of Student's paired t-test, two-sided; None with one pair.
        p_holm: Corrected for all comparisons of the same setting, metric and ``over``.
        better: Whether the difference is to the good; None where it is 0.
    """

    setting: str
    metric: str
    what: str
    against: str
    over: str
    count: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    better: bool | None


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Return rows by (setting, metric), and in each by point."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row.setting, row.metric), {}).setdefault(row.label, []).append(row)
    return found


# --- means and ranks ------------------------------------------------------------------------------
def means(results: Results) -> list[Mean]:
    """Return each point by each metric over seeds: the best first, those without a number last."""
    found: list[Mean] = []
    order = {
        factor: list(dict.fromkeys(row.levels[factor] for row in results.rows))
        for factor in results.factors
    }
    for points in groups(results.rows).values():
        ranks = mean_ranks(points)
        own = []
        for rows in points.values():
            places = {k: order[k].index(level) for k, level in rows[0].levels.items()}
            own.append(_mean(rows, places, ranks))
        found += sorted(own, key=_order)
    return found


def _order(mean: Mean) -> tuple[bool, float]:
    value = mean.value or 0.0
    return mean.value is None, -value if mean.higher_is_better else value


def _mean(rows: Sequence[Row], places: Mapping[str, int], ranks: Mapping[str, float]) -> Mean:
    one = rows[0]
    done = [row for row in rows if row.result is not None]
    error = next((row.error for row in rows if row.error), None)
    seeds = tuple(row.seed for row in done)
    place = (one.setting, one.metric, one.label, one.levels, places, seeds)
    if not done:
        return Mean(*place, error=error)
    answers = [row.result for row in done if row.result is not None]
    low, high = interval_of(answers)
    times = [row.seconds for row in done if row.seconds is not None]
    return Mean(
        *place,
        value=float(np.mean([a["value"] for a in answers])),
        low=low,
        high=high,
        chance=float(np.mean([a["chance"] for a in answers])),
        higher_is_better=answers[0]["higher_is_better"],
        rank=ranks.get(one.label),
        seconds=float(np.mean(times)) if times else None,
        peak_bytes=max((r.peak_bytes for r in done if r.peak_bytes is not None), default=None),
        error=error,
    )


def mean_ranks(points: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Return the mean rank over seeds of points that have a number for every seed, 1 the best.

    Equal values share their mean rank.
    """
    whole = {k: rows for k, rows in points.items() if all(row.result for row in rows)}
    if not whole:
        return {}
    values = np.array([[_better(row) for row in rows] for rows in whole.values()])
    ranks = stats.rankdata(-values, axis=0).mean(axis=1)
    return dict(zip(whole, map(float, ranks), strict=True))


def _better(row: Row) -> float:
    """Return the value, turned so that more is better."""
    assert row.result is not None
    value = float(row.result["value"])
    return value if row.result["higher_is_better"] else -value


# --- paired comparisons ---------------------------------------------------------------------------
def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for many comparisons: the step-down procedure of Holm (1979).

        p'_(k) = max over j <= k of min(1, (m - j + 1) p_(j))

    with p_(1) <= ... <= p_(m): the chance that any true null hypothesis is rejected stays below the
    level, whatever depends on what.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.array(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(x) for x in corrected]


def comparisons(results: Results, against: str | None = None) -> list[Comparison]:
    """Return every point compared with one: over seeds, and over test examples where they are kept.

    Test examples of one world share its trained model: what is said over them is said of these
    models, over seeds of such models in general.

    Args:
        results: Of the study.
        against: Label of a point; the first that is a valid method by default.

    Raises:
        InputError: No such point.
    """
    labels = list(dict.fromkeys(row.label for row in results.rows))
    valid = [row.label for row in results.rows if row.status != "invalid"]
    reference = valid[0] if against is None else against
    if reference not in labels:
        raise InputError(f"study: no point {reference!r}; {nearest(reference, labels)}")
    found = []
    for (setting, metric), points in groups(results.rows).items():
        for over in (SEEDS, TESTS):
            own = [
                made
                for label, rows in points.items()
                if label != reference
                and (made := _compared(rows, points.get(reference, []), over)) is not None
            ]
            found += _corrected([attrs.evolve(c, setting=setting, metric=metric) for c in own])
    return found


def _compared(rows: Sequence[Row], others: Sequence[Row], over: str) -> Comparison | None:
    """Return one point against another, or None where nothing can be paired."""
    pairs = _pairs(rows, others)
    if over == SEEDS:
        differences = [float(a["value"] - b["value"]) for a, b in pairs]
    else:
        both = [(a.get("per_test"), b.get("per_test")) for a, b in pairs]
        kept = [(a, b) for a, b in both if a and b and len(a) == len(b)]
        differences = [x - y for a, b in kept for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return None
    higher = bool(pairs[0][0]["higher_is_better"])
    return paired(differences, rows[0].label, others[0].label, over, higher)


def _pairs(
    rows: Sequence[Row], others: Sequence[Row]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the results of two points in the worlds that both have a number for."""
    known = {row.seed: row.result for row in others if row.result is not None}
    return [
        (row.result, known[row.seed])
        for row in rows
        if row.result is not None and row.seed in known
    ]


def paired(
    differences: Sequence[float], what: str, against: str, over: str, higher_is_better: bool
) -> Comparison:
    """Return the mean of paired differences with Student's t interval and two-sided test."""
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    low = high = p = None
    if n > 1:
        error = float(values.std(ddof=1)) / math.sqrt(n)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        low, high = mean - half, mean + half
        # without spread the statistic is 0 / 0, or infinite
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    better = None if mean == 0 else (mean > 0) == higher_is_better
    return Comparison("", "", what, against, over, n, mean, low, high, p, None, better)


def _corrected(own: Sequence[Comparison]) -> list[Comparison]:
    tested = [c for c in own if c.p is not None]
    fixed = dict(zip(map(id, tested), holm([c.p for c in tested if c.p is not None]), strict=True))
    return [attrs.evolve(c, p_holm=fixed.get(id(c))) for c in own]


# --- effects --------------------------------------------------------------------------------------
def effects(results: Results) -> list[Comparison]:
    """Return what each level does, against the first of its factor, all else equal.

    For a seed: the mean difference over all pairs of points that differ in this factor alone and
    both have a number. Over seeds: the mean with Student's t interval; ``count`` is of seeds.
    """
    found = []
    for (setting, metric), points in groups(results.rows).items():
        own = []
        for factor in results.factors:
            levels = list(dict.fromkeys(row.levels[factor] for row in results.rows))
            for level in levels[1:]:
                made = _effect(points, factor, level, levels[0])
                if made is not None:
                    own.append(attrs.evolve(made, setting=setting, metric=metric))
        found += _corrected(own)
    return found


def _effect(
    points: Mapping[str, Sequence[Row]], factor: str, level: str, first: str
) -> Comparison | None:
    by_levels = {tuple(sorted(rows[0].levels.items())): rows for rows in points.values()}
    by_seed: dict[int, list[float]] = {}
    higher = True
    for rows in points.values():
        if rows[0].levels[factor] != level:
            continue
        other = by_levels.get(tuple(sorted({**rows[0].levels, factor: first}.items())), [])
        known = {row.seed: row.result for row in other if row.result is not None}
        for row in rows:
            if row.result is not None and row.seed in known:
                difference = row.result["value"] - known[row.seed]["value"]
                by_seed.setdefault(row.seed, []).append(difference)
                higher = row.result["higher_is_better"]
    if not by_seed:
        return None
    differences = [float(np.mean(own)) for own in by_seed.values()]
    return paired(differences, f"{factor}: {level}", first, SEEDS, higher)
