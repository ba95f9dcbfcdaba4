"""Plans of a study against enumeration: which points there are, and in which order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dattri_core as dattri
from dattri_core import SpecError, Study
from dattri_core.factors import combinations, factors_of
from dattri_core.spec import read_data

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
PLAIN = {"name": "s", "setting": "digits", "metrics": ["lds"]}


def factors(sizes):
    return factors_of({f"f{at}": [f"v{k}" for k in range(n)] for at, n in enumerate(sizes)})


def labels(points):
    return [tuple(level.label for level in point.values()) for point in points]


@given(SIZES)
def test_a_grid_is_the_product(sizes):
    want = list(itertools.product(*([f"v{k}" for k in range(n)] for n in sizes)))
    assert labels(combinations("grid", factors(sizes), None, 0)) == want


@given(st.integers(1, 5), st.integers(1, 4))
def test_zip_takes_the_levels_together(n, width):
    want = [(f"v{k}",) * width for k in range(n)]
    assert labels(combinations("zip", factors([n] * width), None, 0)) == want


@given(SIZES)
def test_one_at_a_time_are_the_points_that_differ_from_the_base_in_one_factor_at_most(sizes):
    base = ("v0",) * len(sizes)
    grid = itertools.product(*([f"v{k}" for k in range(n)] for n in sizes))
    want = {p for p in grid if sum(a != b for a, b in zip(p, base, strict=True)) <= 1}
    got = labels(combinations("one-at-a-time", factors(sizes), None, 0))
    assert got[0] == base
    assert len(got) == len(set(got)) == 1 + sum(n - 1 for n in sizes)
    assert set(got) == want


@given(SIZES, st.integers(1, 40), st.integers(0, 5))
def test_random_points_are_of_the_grid_each_once_and_more_begin_with_fewer(sizes, samples, draw):
    grid = labels(combinations("grid", factors(sizes), None, 0))
    got = labels(combinations("random", factors(sizes), samples, draw))
    assert len(got) == len(set(got)) == min(samples, len(grid))
    assert set(got) <= set(grid)
    assert labels(combinations("random", factors(sizes), samples + 3, draw))[: len(got)] == got


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_ranges_are_drawn_inside_and_once(samples, draw, log):
    given_ = {"damping": {"low": 1e-4, "high": 1.0, "log": log}, "scorer": ["dot", "cosine"]}
    points = combinations("random", factors_of(given_), samples, draw)
    values = [point["damping"].value for point in points]
    assert len(set(labels(points))) == samples
    assert all(1e-4 <= value <= 1 for value in values)
    more = combinations("random", factors_of(given_), samples + 2, draw)
    assert labels(more)[:samples] == labels(points)


def test_a_log_range_spreads_over_magnitudes():
    given_ = {"x": {"low": 1e-4, "high": 1.0, "log": True}}
    values = [p["x"].value for p in combinations("random", factors_of(given_), 200, 0)]
    assert 60 < sum(value < 1e-2 for value in values) < 140


@given(SIZES, st.integers(1, 3), st.integers(1, 3))
def test_cells_are_points_by_metrics_by_seeds(sizes, metrics, seeds):
    study = Study(
        "s", "digits", [f"m{k}" for k in range(metrics)], factors(sizes), seeds=list(range(seeds))
    )
    cells = study.cells()
    keys = {(c.point.label, c.metric.label, c.seed) for c in cells}
    grid = itertools.product(*([f"v{k}" for k in range(n)] for n in sizes))
    want = itertools.product(
        (" / ".join(p) for p in grid), (f"m{k}" for k in range(metrics)), range(seeds)
    )
    assert len(cells) == len(keys)
    assert keys == set(want)


# --- what points are ------------------------------------------------------------------------------
def test_leave_one_part_out_puts_the_plainest_part_in_place_of_each():
    points = Study(**PLAIN, base={"name": "logra", "scorer": "cosine"}, plan="leave-one-part-out")
    made = [point.made() for point in points.points()]
    base = dattri.method("logra", scorer="cosine")
    assert made == [
        base,
        dattri.method("logra", scorer="cosine", projector="identity"),
        dattri.method("logra", scorer="cosine", inverse_hessian="identity"),
        dattri.method("logra"),
    ]
    named = Study(**PLAIN, base="logra", plan="leave-one-part-out", factors={"damping": [0.0]})
    assert [p.levels["damping"] for p in named.points()] == ["base", "0.0"]


def test_points_are_what_method_makes():
    study = dattri.Study(
        **PLAIN,
        base={"name": "if-ekfac", "damping": 0.5},
        factors={"scorer": ["dot", "cosine"], "inverse_hessian.damping": [0.1, 0.2]},
    )
    want = [
        dattri.method("if-ekfac", scorer=scorer, damping=damping)
        for scorer in ("dot", "cosine")
        for damping in (0.1, 0.2)
    ]
    assert [point.made() for point in study.points()] == want
    assert [point.label for point in study.points()][:2] == ["dot / 0.1", "dot / 0.2"]


def test_methods_settings_and_checkpoints_are_factors_too():
    study = Study(
        **PLAIN,
        factors={
            "method": ["grad-dot", {"name": "if-ekfac", "damping": 0.1}],
            "setting": ["digits", "mnist-lr"],
            "checkpoints": [1, 5],
        },
    )
    points = study.points()
    assert len(points) == 8
    assert points[0].made() == dattri.method("grad-dot")
    assert points[-1].made() == dattri.method("if-ekfac", damping=0.1)
    assert {(p.setting, p.checkpoints) for p in points} == {
        (s, c) for s in ("digits", "mnist-lr") for c in (1, 5)
    }


def test_what_is_no_method_says_why():
    study = Study(**PLAIN, factors={"projector": ["rademacher"], "inverse_hessian": ["ekfac"]})
    assert "no inverse hessian 'ekfac'" in study.points()[0].problem
    factored = {"curvature": "kfac", "solver": "spectral"}
    study = Study(**PLAIN, factors={"projector": ["sjlt"], "inverse_hessian": [factored]})
    assert "needs blocks that keep the factors" in study.points()[0].problem
    study = Study(**PLAIN, base="if-ekfac", factors={"inverse_hessian.dampling": [1.0]})
    assert "inverse_hessian.solver.damping" in study.points()[0].problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "gird"}, "no plan 'gird'.*grid"),
        ({"plan": "zip", "factors": {"a": [1], "b": [1, 2]}}, "k-th levels together"),
        ({"plan": "random", "factors": {"a": [1]}}, "samples"),
        ({"samples": 3}, "samples"),
        ({"factors": {"a": {"low": 1, "high": 2}}}, "ranges need plan 'random'"),
        ({"factors": {"a": {"low": 2, "high": 1}}}, "low < high"),
        ({"factors": {"a": {"low": 0, "high": 1, "log": True}}}, "low > 0"),
        ({"factors": {"a": []}}, "has no levels"),
        ({"factors": {"a": ["x", "x"]}}, "'x' twice"),
        ({"factors": {"a": "x"}}, "expected a list"),
        ({"factors": {"projector": {"name": "sjlt", "dim": 8}}}, "is one part"),
        ({"factors": ["a"]}, "names and the levels"),
        ({"seeds": [0, 0]}, "each once"),
        ({"seeds": [-1]}, "0 or more"),
        ({"seeds": []}, "0 or more"),
        ({"metrics": []}, "one or more"),
        ({"metrics": [3]}, "name"),
        ({"size": [3]}, "size"),
        ({"wrong": 1.5}, "between 0 and 1"),
        ({"checkpoints": 0}, "1 or more"),
        ({"factors": {"checkpoints": [0]}}, "trained models"),
        ({"factors": {"setting": [3]}}, "give names"),
        ({"subsets": 1}, "2 or more"),
        ({"name": ""}, "give a name"),
        ({"plan": "leave-one-part-out"}, "no part to be left out"),
        ({"plan": "leave-one-part-out", "factors": {"a": [1, 2]}}, "its absence"),
        ({"seds": [1]}, "no key 'seds'.*seeds"),
    ],
)
def test_a_study_that_is_none_is_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        Study.of(PLAIN | changes)


def test_a_file_says_the_same_as_python(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'setting = "digits"\nmetrics = ["lds", {name = "mislabel-auroc", by = "scores"}]\n'
        'seeds = [1, 2]\n[factors]\nscorer = ["dot"]\n'
        'projector.none = "identity"\nprojector.small = {name = "sjlt", dim = 8}\n'
    )
    study = Study.read(path)
    assert study.name == "mine"
    assert [m.label for m in study.metrics] == ["lds", "mislabel-auroc (by=scores)"]
    assert [p.label for p in study.points()] == ["dot / none", "dot / small"]
    same = Study.of({"name": "mine", **read_data(path)})
    assert [p.made() for p in same.points()] == [p.made() for p in study.points()]
    with pytest.raises(SpecError, match="has no 'setting', 'metrics'"):
        Study.of({"name": "x"})
