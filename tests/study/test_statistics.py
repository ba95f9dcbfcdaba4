"""Holm's correction, paired tests, effects and ranks against formulas and scipy."""

import numpy as np
import pytest
import toy_study
from dattri_bench.studies.figures import front
from dattri_bench.studies.results import Results, Row
from dattri_bench.studies.statistics import (
    comparisons,
    effects,
    holm,
    mean_ranks,
    means,
    paired,
)
from dattri_bench.studies.tables import as_latex, as_markdown, as_text, escape, tables_of
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dattri_core import InputError


def brute_holm(p):
    """Return Holm's adjusted p-values by their definition, one hypothesis at a time."""
    order, m = sorted(range(len(p)), key=lambda k: p[k]), len(p)
    found = [0.0] * m
    for rank, k in enumerate(order):
        found[k] = max(min(1.0, (m - j) * p[order[j]]) for j in range(rank + 1))
    return found


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_its_definition(p):
    assert holm(p) == pytest.approx(brute_holm(p))


def test_holm_of_a_known_case():
    # statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20, unique=True), st.integers(0, 9))
def test_a_paired_test_is_scipys(one, seed):
    other = np.random.default_rng(seed).normal(size=len(one))
    differences = np.array(one) - other
    made = paired(list(differences), "a", "b", "seeds", True)
    want = stats.ttest_rel(one, other)
    interval = want.confidence_interval(0.95)
    assert made.p == pytest.approx(want.pvalue, rel=1e-6, abs=1e-12)
    assert (made.low, made.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert made.better is (made.difference > 0)


def test_differences_without_spread_are_told_apart():
    assert paired([0.0, 0.0], "a", "b", "seeds", True).p == 1
    assert paired([0.5, 0.5], "a", "b", "seeds", True).p == 0
    assert paired([0.5], "a", "b", "seeds", False).p is None
    assert paired([0.5], "a", "b", "seeds", False).better is False


# --- on results -----------------------------------------------------------------------------------
def answer(value, per_test=None, higher=True):
    return {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "chance": 0.0,
        "ceiling": None,
        "confidence": 0.95,
        "higher_is_better": higher,
        "per_test": per_test,
    }


def made_results(values, higher=True, tests=None):
    """Return results from {(level of a, level of b): [value of each seed, or None]}."""
    rows = []
    for (a, b), own in values.items():
        for seed, value in enumerate(own):
            per_test = None if tests is None or value is None else [value + t for t in tests]
            result = None if value is None else answer(value, per_test, higher)
            status = "failed" if value is None else "done"
            rows.append(
                Row("w", 1, {"a": a, "b": b}, f"{a} / {b}", "m", seed, status, result, seconds=1.0)
            )
    return Results(toy_study.study(), tuple(rows), ())


GRID = {
    ("x", "p"): [0.1, 0.2, 0.4],
    ("x", "q"): [0.3, 0.1, 0.5],
    ("y", "p"): [0.5, 0.9, 0.6],
    ("y", "q"): [None, 0.8, 0.9],
}


def test_effects_are_mean_differences_of_what_is_else_equal():
    (of_y, of_q) = effects(made_results(GRID))
    by_seed = [0.4, (0.7 + 0.7) / 2, (0.2 + 0.4) / 2]  # seed 0 lacks a pair
    assert (of_y.what, of_y.against, of_y.count) == ("a: y", "x", 3)
    assert of_y.difference == pytest.approx(np.mean(by_seed))
    assert of_y.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    q = [0.2, (-0.1 - 0.1) / 2, (0.1 + 0.3) / 2]
    assert of_q.difference == pytest.approx(np.mean(q))
    assert [of_y.p_holm, of_q.p_holm] == pytest.approx(holm([of_y.p, of_q.p]))
    assert all(effect.better for effect in effects(made_results(GRID)))
    assert not effects(made_results(GRID, higher=False))[0].better


def test_points_are_compared_over_seeds_and_over_test_examples():
    found = comparisons(made_results(GRID, tests=[-0.1, 0.0, 0.2]))
    over_seeds = [c for c in found if c.over == "seeds"]
    assert [c.what for c in over_seeds] == ["x / q", "y / p", "y / q"]
    assert {c.against for c in found} == {"x / p"}
    assert [c.count for c in over_seeds] == [3, 3, 2]
    want = stats.ttest_rel(GRID["y", "p"], GRID["x", "p"]).pvalue
    assert over_seeds[1].p == pytest.approx(want)
    assert [c.p_holm for c in over_seeds] == pytest.approx(brute_holm([c.p for c in over_seeds]))
    over_tests = [c for c in found if c.over == "test examples"]
    assert [c.count for c in over_tests] == [9, 9, 6]
    d = np.repeat(np.subtract(GRID["y", "p"], GRID["x", "p"]), 3)
    assert over_tests[1].p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    other = comparisons(made_results(GRID), "y / p")
    assert other[0].difference == pytest.approx(-over_seeds[1].difference)
    with pytest.raises(InputError, match="no point 'z / p'"):
        comparisons(made_results(GRID), "z / p")


def test_ranks_are_means_over_seeds_of_points_that_have_all():
    results = made_results({**GRID, ("y", "q"): [0.5, 0.8, 0.9]})
    ranks = {mean.label: mean.rank for mean in means(results)}
    values = np.array([[0.1, 0.2, 0.4], [0.3, 0.1, 0.5], [0.5, 0.9, 0.6], [0.5, 0.8, 0.9]])
    want = stats.rankdata(-values, axis=0).mean(axis=1)
    assert ranks == pytest.approx(
        dict(zip(("x / p", "x / q", "y / p", "y / q"), want, strict=True))
    )
    assert {m.label: m.rank for m in means(made_results(GRID))}["y / q"] is None
    lower = made_results({("x", "p"): [0.1], ("y", "p"): [0.5]}, higher=False)
    assert [(m.label, m.rank) for m in means(lower)] == [("x / p", 1.0), ("y / p", 2.0)]
    assert mean_ranks({}) == {}


def test_means_have_students_interval():
    mean = next(m for m in means(made_results(GRID)) if m.label == "x / p")
    low, high = stats.t.interval(0.95, 2, np.mean([0.1, 0.2, 0.4]), stats.sem([0.1, 0.2, 0.4]))
    assert (mean.low, mean.high) == pytest.approx((low, high))


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 0.2), (2.0, 0.1), (3.0, 0.5), (3.0, 0.4), (9.0, 0.5)]
    assert front(points, higher=True) == [(1.0, 0.2), (3.0, 0.5)]
    assert front(points, higher=False) == [(1.0, 0.2), (2.0, 0.1)]
    assert front([], higher=True) == []


# --- tables ---------------------------------------------------------------------------------------
def test_tables_say_what_the_numbers_are():
    results = made_results(GRID)
    tables = tables_of(means(results), effects(results), comparisons(results))
    assert [title for title, *_ in tables] == [
        "m, w",
        "m, w: what each level does, all else equal",
        "m, w: paired comparisons",
    ]
    latex, page = "".join(map(as_latex, tables)), "".join(map(as_markdown, tables))
    first = means(results)[0]
    text = f"{first.value:.3f} [{first.low:.3f}, {first.high:.3f}]"
    assert f"y / q & {text} & - & 1.00 & - \\\\" in latex
    assert f"| y / q | {text} | - | 1.00 | - |" in page
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert text in as_text(tables[0])
    assert escape("a_b & 5 % {x} ^2 < 0.1") == r"a\_b \& 5 \% \{x\} \textasciicircum{}2 $<$ 0.1"
