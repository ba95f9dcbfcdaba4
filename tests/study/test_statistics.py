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
from dattri_metrics import lds
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


@pytest.mark.parametrize(
    "differences",
    [[0.0, 0.0], [0.5, 0.5], [0.1, 0.1, 0.1], [0.55 - 0.5, 0.15 - 0.1], [0.3 - 0.1, 0.2], [0.5]],
)
def test_without_spread_there_is_no_test(differences):
    for size in (0.0, 0.5):  # of the numbers themselves, where it is said
        made = paired(differences, "a", "b", "seeds", True, size)
        assert (made.p, made.low, made.high) == (None, None, None)
    assert made.difference == pytest.approx(np.mean(differences))
    assert paired([0.05, 0.0500001], "a", "b", "seeds", True, 0.5).p < 1e-5
    # of numbers of size 1e6 the same differences are rounding
    assert paired([0.05, 0.0500001], "a", "b", "seeds", True, 1e6).p is None


def test_which_way_is_better_is_said_without_a_test():
    assert paired([0.5], "a", "b", "seeds", False).better is False
    assert paired([0.5], "a", "b", "seeds", True).better is True
    assert paired([0.0], "a", "b", "seeds", True).better is None


def test_equal_methods_seldom_differ_over_two_seeds_of_few_tests():
    random = np.random.default_rng(0)
    shares = random.binomial(20, 0.9, (2000, 2, 2)) / 20
    found = [paired(list(one[0] - one[1]), "a", "b", "seeds", True, 1.0).p for one in shares]
    assert np.mean([p is not None and p < 0.05 for p in found]) <= 0.05
    assert np.mean([p is None for p in found]) > 0.1  # whose differences agree by chance


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


def made_results(values, higher=True, tests=None, retrained=()):
    """Return results from {(level of a, level of b): [value of each seed, or None]}.

    ``tests`` gives what each test example has above the value, for a point and seed.
    """
    rows = []
    for (a, b), own in values.items():
        for seed, value in enumerate(own):
            per_test = None
            if tests is not None and value is not None:
                per_test = [value + t for t in tests(f"{a} / {b}", seed)]
            result = None if value is None else answer(value, per_test, higher)
            status = "failed" if value is None else "done"
            rows.append(
                Row("w", 1, {"a": a, "b": b}, f"{a} / {b}", "m", seed, status, result, seconds=1.0)
            )
    return Results(toy_study.study(), tuple(rows), (), frozenset(retrained))


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


def noise(label, seed):
    """Return what each of some tests has above the mean: as many as a seed has, 0 in the mean."""
    drawn = np.random.default_rng([len(label), ord(label[0]), ord(label[-1]), seed])
    found = drawn.normal(size=6 + 3 * seed) * (1 + seed)
    return found - found.mean()


def test_points_are_compared_over_seeds():
    found = comparisons(made_results(GRID))
    assert {c.over for c in found} == {"seeds"}
    assert {c.against for c in found} == {"x / p"}
    assert [(c.what, c.count) for c in found] == [("x / q", 3), ("y / p", 3), ("y / q", 2)]
    want = stats.ttest_rel(GRID["y", "p"], GRID["x", "p"]).pvalue
    assert found[1].p == pytest.approx(want)
    assert [c.p_holm for c in found] == pytest.approx(brute_holm([c.p for c in found]))
    other = comparisons(made_results(GRID), "y / p")
    assert other[0].difference == pytest.approx(-found[1].difference)
    with pytest.raises(InputError, match="no point 'z / p'"):
        comparisons(made_results(GRID), "z / p")


def test_over_the_tests_of_one_world_it_is_scipys_paired_test():
    values = {k: v[1:2] for k, v in GRID.items()}
    found = [c for c in comparisons(made_results(values, tests=noise)) if c.over != "seeds"]
    assert [(c.over, c.count) for c in found] == 3 * [("test examples", 6)]
    one, other = (values[k][0] + noise(f"{k[0]} / {k[1]}", 0) for k in (("y", "p"), ("x", "p")))
    want = stats.ttest_rel(one, other)
    assert found[1].p == pytest.approx(want.pvalue)
    interval = want.confidence_interval(0.95)
    assert (found[1].low, found[1].high) == pytest.approx((interval.low, interval.high))


def test_over_the_tests_of_two_worlds_it_is_welchs_test():
    values = {k: v[1:] for k, v in GRID.items()}
    found = [c for c in comparisons(made_results(values, tests=noise)) if c.over != "seeds"]
    assert [c.count for c in found] == [6 + 9] * 3
    gains = [
        values["y", "p"][seed]
        - values["x", "p"][seed]
        + noise("y / p", seed)
        - noise("x / p", seed)
        for seed in (0, 1)
    ]
    # the sum of two means is the difference of one and the other turned
    want = stats.ttest_ind(gains[0], -gains[1], equal_var=False)
    assert found[1].p == pytest.approx(want.pvalue)
    assert found[1].difference == pytest.approx((gains[0].mean() + gains[1].mean()) / 2)


def lds_of_noise(random, subsets, tests, common):
    """Return the LDS of scores that know nothing of what is predicted, twice on the same models."""
    masks = np.stack([random.permutation(60) < 30 for _ in range(subsets)])

    def drawn():
        parts = random.normal(size=(60, 1)), random.normal(size=(60, tests))
        return np.sqrt(common) * parts[0] + np.sqrt(1 - common) * parts[1]

    truth = masks @ drawn()
    return [lds(drawn(), masks, truth, higher_is_better=True) for _ in range(2)]


def test_methods_without_information_seldom_differ_by_lds():
    random = np.random.default_rng(0)
    found = {True: [], False: []}
    for _ in range(80):
        pairs = [lds_of_noise(random, 12, 20, 0.5) for _ in range(3)]
        rows = [
            Row("w", 1, {"a": name}, name, "lds", seed, "done",
                answer(pair[at].value, list(pair[at].per_test)))
            for at, name in enumerate("xy")
            for seed, pair in enumerate(pairs)
        ]  # fmt: skip
        for told in found:
            retrained = frozenset({"lds"} if told else ())
            made = comparisons(Results(toy_study.study(), tuple(rows), (), retrained))
            found[told].append(min(c.p for c in made))
    assert np.mean(np.array(found[True]) < 0.05) < 0.13  # 0.05, and 3 standard errors of 80
    assert np.mean(np.array(found[False]) < 0.05) > 0.25  # what over test examples it would be


def test_comparisons_without_a_test_count_in_holms_correction():
    values = {("x", "p"): [0.1, 0.2], ("x", "q"): [0.2, 0.3], ("y", "p"): [0.4, 0.4]}
    same, other = comparisons(made_results(values))
    assert (same.p, same.p_holm) == (None, None)
    assert other.p_holm == pytest.approx(min(1.0, 2 * other.p))


def test_points_that_lack_seeds_come_last_and_are_marked():
    values = {("x", "p"): [0.1, 0.2], ("x", "q"): [0.9, None], ("y", "p"): [None, None]}
    found = means(made_results(values))
    assert [(m.label, m.failed) for m in found] == [("x / p", 0), ("x / q", 1), ("y / p", 2)]
    _, head, lines = tables_of(found, [], [])[0]
    assert head[-1] == "seeds"
    assert [line[-1] for line in lines] == ["2", "1 of 2", "0 of 2"]
    full = tables_of(means(made_results({("x", "p"): [0.1, 0.2]})), [], [])
    assert "seeds" not in full[0][1]


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
    # wider than what the intervals of the seeds give, 0.1 / sqrt(3)
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
    assert f"y / p & {text} & 1.0 & 1.00 & - & 3 \\\\" in latex
    assert f"| y / p | {text} | 1.0 | 1.00 | - | 3 |" in page
    assert "| - | 1.00 | - | 2 of 3 |" in page
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert text in as_text(tables[0])
    assert escape("a_b & 5 % {x} ^2 < 0.1") == r"a\_b \& 5 \% \{x\} \textasciicircum{}2 $<$ 0.1"
