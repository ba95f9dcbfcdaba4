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
ROUNDING = 1e-12
"""Of a number; a spread of differences that is smaller is none."""


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
        low: Lower end of the interval, see `interval_of`.
        high: Upper end.
        chance: Mean over seeds.
        higher_is_better: Which way is good.
        rank: Mean rank over seeds, 1 the best of those that have all seeds; None for others.
        seconds: Mean over seeds.
        peak_bytes: Highest over seeds.
        error: Of the first seed that has none.
        failed: How many seeds gave no number.
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
    failed: int = 0


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
        low: Of Student's t interval of the mean difference; None with one pair, or where the
            differences do not differ among themselves.
        high: Upper end.
        p: Of Student's paired t-test, two-sided; None where there is no interval.
        p_holm: Corrected for all comparisons of the same setting, metric and ``over``, those
            without a p-value counted.
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
    """Return each point by each metric over seeds: the best first, those without a number last.

    Those that lack seeds come after those that have all.
    """
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


def _order(mean: Mean) -> tuple[bool, bool, float]:
    value = mean.value or 0.0
    return mean.value is None, mean.failed > 0, -value if mean.higher_is_better else value


def _mean(rows: Sequence[Row], places: Mapping[str, int], ranks: Mapping[str, float]) -> Mean:
    one = rows[0]
    done = [row for row in rows if row.result is not None]
    error = next((row.error for row in rows if row.error), None)
    seeds = tuple(row.seed for row in done)
    place = (one.setting, one.metric, one.label, one.levels, places, seeds)
    if not done:
        return Mean(*place, error=error, failed=len(rows))
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
        failed=len(rows) - len(done),
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
    """Return every point compared with one: over seeds, and over test examples where that is right.

    Test examples of one world share its trained model: what is said over them is said of these
    models, over seeds of such models in general.

    Where a metric trains models on other train sets (`Results.retrained`), as LDS does, its tests
    share these too: what chance made of the subsets is in the number of every test alike, and a
    test over test examples takes it for a difference of methods. By LDS on 50 subsets, two methods
    without information, half of whose scores are common to 40 tests, differed over test examples
    at p < 0.05 in 58 % of 150 simulations, and over three seeds in 4 %. These metrics are compared
    over seeds alone, each of which draws its own subsets.

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
        for compared in (_over_seeds, _over_tests):
            if compared is _over_tests and metric in results.retrained:
                continue
            own = [
                made
                for label, rows in points.items()
                if label != reference
                and (made := compared(rows, points.get(reference, []))) is not None
            ]
            found += _corrected([attrs.evolve(c, setting=setting, metric=metric) for c in own])
    return found


def _over_seeds(rows: Sequence[Row], others: Sequence[Row]) -> Comparison | None:
    """Return one point against another over seeds, or None with fewer than two."""
    pairs = _pairs(rows, others)
    if len(pairs) < 2:
        return None
    values = np.array([(a["value"], b["value"]) for a, b in pairs], dtype=np.float64)
    higher = bool(pairs[0][0]["higher_is_better"])
    differences = list(values[:, 0] - values[:, 1])
    size = float(np.abs(values).max())
    return paired(differences, rows[0].label, others[0].label, SEEDS, higher, size)


def _over_tests(rows: Sequence[Row], others: Sequence[Row]) -> Comparison | None:
    """Return one point against another over the test examples of the worlds that there are.

        mean over seeds of the mean difference over tests, with variance sum_k s_k^2 / m_k / S^2

    and Satterthwaite's degrees of freedom: worlds are given, so what differs between them is no
    error. With one seed it is Student's paired t-test.
    """
    pairs = _pairs(rows, others)
    kept = [(a.get("per_test"), b.get("per_test")) for a, b in pairs]
    worlds = [np.array([a, b], np.float64) for a, b in kept if a and b and len(a) == len(b) > 1]
    if not worlds:
        return None
    differences = [ours - theirs for ours, theirs in worlds]
    means_ = [float(d.mean()) for d in differences]
    variances = np.array([d.var(ddof=1) / len(d) for d in differences]) / len(worlds) ** 2
    parts = [v**2 / (len(d) - 1) for v, d in zip(variances, differences, strict=True)]
    freedom = float(variances.sum() ** 2 / sum(parts)) if sum(parts) > 0 else 1.0
    size = max(float(np.abs(world).max()) for world in worlds)
    error, count = math.sqrt(variances.sum()), sum(map(len, differences))
    higher = bool(pairs[0][0]["higher_is_better"])
    made = _tested(float(np.mean(means_)), error, freedom, size, count, higher)
    return attrs.evolve(made, what=rows[0].label, against=others[0].label, over=TESTS)


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
    differences: Sequence[float],
    what: str,
    against: str,
    over: str,
    higher_is_better: bool,
    size: float = 0.0,
) -> Comparison:
    """Return the mean of paired differences with Student's t interval and two-sided test.

    Args:
        differences: Independent of each other.
        what: The one.
        against: The other.
        over: What is paired.
        higher_is_better: Which way is good.
        size: Of the largest number that was subtracted, which says how differences are rounded.
    """
    values = np.asarray(differences, dtype=np.float64)
    n, size = len(values), max(size, float(np.abs(values).max()))
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    made = _tested(float(values.mean()), error, n - 1, size, n, higher_is_better)
    return attrs.evolve(made, what=what, against=against, over=over)


def _tested(
    mean: float, error: float, freedom: float, size: float, count: int, higher: bool
) -> Comparison:
    """Return a mean difference with its interval and test; neither where nothing differs.

    Differences that agree up to the rounding of numbers of this size say nothing of how far such
    means are from what more of them would give: the statistic is infinite, or 0 / 0.
    """
    low = high = p = None
    if error > ROUNDING * size:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
        low, high = mean - half, mean + half
        p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    better = None if mean == 0 else (mean > 0) == higher
    return Comparison("", "", "", "", "", count, mean, low, high, p, None, better)


def _corrected(own: Sequence[Comparison]) -> list[Comparison]:
    # whether there is a p-value is chance too: a comparison without one counts, as never rejected
    fixed = holm([1.0 if c.p is None else c.p for c in own])
    return [
        attrs.evolve(c, p_holm=None if c.p is None else p) for c, p in zip(own, fixed, strict=True)
    ]


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
    higher, size = True, 0.0
    for rows in points.values():
        if rows[0].levels[factor] != level:
            continue
        other = by_levels.get(tuple(sorted({**rows[0].levels, factor: first}.items())), [])
        known = {row.seed: row.result for row in other if row.result is not None}
        for row in rows:
            if row.result is not None and row.seed in known:
                one, two = float(row.result["value"]), float(known[row.seed]["value"])
                by_seed.setdefault(row.seed, []).append(one - two)
                size = max(size, abs(one), abs(two))
                higher = row.result["higher_is_better"]
    if not by_seed:
        return None
    differences = [float(np.mean(own)) for own in by_seed.values()]
    return paired(differences, f"{factor}: {level}", first, SEEDS, higher, size)
