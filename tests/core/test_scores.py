"""Scores against a full sort, plain NumPy indexing and a trained model's own numbers."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dattri_core as dattri
import dattri_core.scores as scores_module
from dattri_core.errors import InputError, NumericsError
from dattri_core.scores import Scores

LOSS = {"target": {"name": "cross-entropy", "higher_is_better": False}}
LOGIT = {"target": {"name": "logit", "higher_is_better": True}}


@st.composite
def matrices(draw, maximum=12):
    n, m = draw(st.integers(1, maximum)), draw(st.integers(1, 5))
    few = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])  # many ties
    cells = draw(st.lists(few, min_size=n * m, max_size=n * m))
    return np.array(cells, dtype=np.float32).reshape(n, m)


def sorted_column(column, k, largest):
    """The oracle: sort by (value, position), everything."""
    order = sorted(range(len(column)), key=lambda i: (-column[i] if largest else column[i], i))
    return order[:k]


@settings(max_examples=150, deadline=None)
@given(matrices(), st.integers(1, 15), st.booleans(), st.integers(1, 5))
def test_top_and_bottom_equal_a_full_sort(matrix, k, largest, rows):
    monkey = pytest.MonkeyPatch()
    monkey.setattr(scores_module, "CHUNK", rows * matrix.shape[1] * 8)  # any cut of the rows
    ids = [f"row {i}" for i in range(len(matrix))]
    scores = Scores(matrix, train_ids=ids)
    every = scores.top(k) if largest else scores.bottom(k)
    for j in range(matrix.shape[1]):
        want = sorted_column(matrix[:, j].tolist(), k, largest)
        one = scores.top(k, test=j) if largest else scores.bottom(k, test=j)
        assert list(one.ids) == [ids[i] for i in want]
        assert one.values.tolist() == [matrix[i, j] for i in want]
        assert every.ids[:, j].tolist() == [ids[i] for i in want]
        assert every.values[:, j].tolist() == [matrix[i, j] for i in want]
    monkey.undo()


def test_top_of_many_distinct_values():
    matrix = torch.randn(5000, 7, generator=torch.Generator().manual_seed(0))
    found = Scores(matrix).top(20)
    want = matrix.argsort(dim=0, descending=True, stable=True)[:20]
    assert torch.equal(torch.from_numpy(found.ids), want)


def test_test_is_an_id_not_a_position():
    scores = Scores(torch.tensor([[1.0, 5.0], [2.0, 4.0]]), test_ids=[1, 0])
    assert scores.top(1, test=0) == ((0,), torch.tensor([5.0]))
    assert scores.top(1, test=1).ids == (1,)
    with pytest.raises(InputError, match="no test example has the id 7"):
        scores.top(1, test=7)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_k_is_a_positive_whole_number(k):
    with pytest.raises(InputError, match="k is"):
        Scores(torch.zeros(2, 2)).top(k)


def test_top_keeps_ids_of_mixed_kinds():
    scores = Scores(torch.tensor([[1.0], [3.0], [2.0]]), train_ids=["a", 7, "c"])
    assert scores.top(3).ids[:, 0].tolist() == [7, "c", "a"]
    assert scores.top(2, test=0).ids == (7, "c")


# --- slicing ------------------------------------------------------------------------------------
def selections(count):
    position = st.integers(-count, count - 1)
    end = st.one_of(st.none(), st.integers(-count - 2, count + 2))
    return st.one_of(
        position,
        st.builds(slice, end, end, st.sampled_from([None, 1, 2, -1, -3])),
        st.lists(position, max_size=6),
        st.lists(position, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.long)),
        st.lists(st.booleans(), min_size=count, max_size=count).map(np.array),
    )


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_slicing_equals_numpy_on_each_axis_and_keeps_ids(data, mapped):
    n, m = 6, 5
    matrix = np.arange(n * m, dtype=np.float64).reshape(n, m)
    train_ids, test_ids = [f"a{i}" for i in range(n)], [10 * j for j in range(m)]
    scores = Scores(matrix, train_ids, test_ids, LOSS)
    rows, columns = data.draw(selections(n)), data.draw(selections(m))
    want_rows = (
        np.atleast_1d(np.arange(n)[np.asarray(rows) if not isinstance(rows, slice) else rows])
        if not (isinstance(rows, list) and not rows)
        else np.array([], int)
    )
    want_columns = (
        np.atleast_1d(
            np.arange(m)[np.asarray(columns) if not isinstance(columns, slice) else columns]
        )
        if not (isinstance(columns, list) and not columns)
        else np.array([], int)
    )
    want_rows, want_columns = want_rows.astype(int), want_columns.astype(int)
    if len(set(want_rows)) < len(want_rows) or len(set(want_columns)) < len(want_columns):
        with pytest.raises(InputError, match="names two examples"):
            scores[rows, columns]
        return
    part = scores[rows, columns]
    np.testing.assert_array_equal(part.values.numpy(), matrix[np.ix_(want_rows, want_columns)])
    assert list(part.train_ids) == [train_ids[i] for i in want_rows]
    assert list(part.test_ids) == [test_ids[j] for j in want_columns]


def test_one_index_takes_rows():
    scores = Scores(torch.arange(6.0).reshape(3, 2))
    assert scores[1].values.tolist() == [[2.0, 3.0]]
    assert scores[1].shape == (1, 2)
    assert list(scores[1].train_ids) == [1]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (9, "position 9 lies outside"),
        (-4, "position -4 lies outside"),
        ([True, False], "mask has shape"),
        ([0.5], "positions are whole numbers"),
        ("a", "use .select"),
        ([[0, 1]], "give one axis"),
    ],
)
def test_bad_positions_are_named(key, message):
    with pytest.raises(InputError, match=message):
        Scores(torch.zeros(3, 2))[key]


def test_select_by_id_keeps_the_given_order():
    scores = Scores(torch.arange(6.0).reshape(3, 2), ["a", "b", "c"], ["x", "y"])
    part = scores.select(train_ids=["c", "a"], test_ids=["y"])
    assert part.values.tolist() == [[5.0], [1.0]]
    assert part.train_ids == ("c", "a")
    assert scores.select(test_ids=["y"]).shape == (3, 1)
    with pytest.raises(InputError, match="no train example has the id 'z'"):
        scores.select(train_ids=["z"])


def test_shape_len_repr():
    scores = Scores(torch.zeros(3, 2), provenance={"method": {"name": "if-cg"}})
    assert scores.shape == (3, 2)
    assert len(scores) == 3
    assert repr(scores) == "Scores[3 train x 2 test](float32 on cpu by if-cg; positive helps)"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tracin", "per-example, dot, weighted"),
        ("if-ekfac", "per-example, ekfac, spectral, dot"),
        ("trak", "margin, block-count-sketch, gauss-newton, cholesky, trak, trak"),
        ("logra", "per-example, kronecker, gauss-newton, woodbury, dot"),
        ("trackstar", "per-example, kronecker, mixed, spectral, cosine"),
    ],
)
def test_a_composed_method_is_called_by_its_parts(name, parts):
    values = torch.zeros(1, 1)
    spec = dattri.method(name).to_spec()
    assert f"on cpu by {parts};" in repr(Scores(values, provenance={"method": spec}))
    bare = Scores(values, provenance={"method": {"seed": 0}})
    assert "by a composed method;" in repr(bare)


# --- scale --------------------------------------------------------------------------------------
@pytest.mark.parametrize("higher_is_better", [False, True])
def test_removal_effect_predicts_a_retrained_mean(higher_is_better):
    """Mean estimation: loss (w - x_i)^2 / 2, w = mean x; a closed form to compare with.

    H = 1, g_i = w - x_i, target f(w): tau_i = g_i df/dw for a loss; the exact change when i goes
    is f((n w - x_i)/(n - 1)) - f(w), equal to first order in 1/n.
    """
    x = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n, w = len(x), x.mean()
    without = (n * w - x) / (n - 1)
    slope = -3.0 if higher_is_better else 3.0  # f(w) = slope * w
    tau = (w - x) * slope * (-1 if higher_is_better else 1)
    scores = Scores(tau[:, None], provenance=LOGIT if higher_is_better else LOSS)
    want = slope * without - slope * w
    torch.testing.assert_close(scores.removal_effect()[:, 0], want, rtol=1e-3, atol=0)


def test_removal_effect_keeps_the_size_of_the_train_set_when_sliced():
    scores = Scores(torch.full((8, 2), 4.0), provenance=LOSS)
    assert scores[:2].removal_effect().tolist() == [[0.5, 0.5]] * 2
    assert Scores(torch.ones(2, 1), provenance={**LOGIT, "n_train": 10}).removal_effect()[0] == -0.1


def test_removal_effect_refuses_to_guess_the_direction():
    with pytest.raises(InputError, match="higher_is_better"):
        Scores(torch.zeros(2, 2)).removal_effect()


def test_mean_over_tests(monkeypatch):
    matrix = torch.randn(50, 9, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(scores_module, "CHUNK", 8 * 9 * 7)
    torch.testing.assert_close(Scores(matrix).mean_over_tests(), matrix.double().mean(1).float())


# --- construction -------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_named(bad, monkeypatch):
    monkeypatch.setattr(scores_module, "CHUNK", 8 * 3 * 4)  # four rows at a time
    matrix = torch.zeros(20, 3)
    matrix[11, 2] = bad
    matrix[17, 0] = bad
    with pytest.raises(NumericsError, match=r"train position 11 \(id 'r11'\), test position 2"):
        Scores(matrix, train_ids=[f"r{i}" for i in range(20)])


def test_large_finite_values_are_not_taken_for_infinite_ones():
    big = torch.full((4, 4), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert Scores(big).shape == (4, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64"),
        (np.zeros((2, 2), dtype=object), "object"),
        ([[1.0]], "list"),
    ],
)
def test_values_are_a_floating_point_matrix(values, message):
    with pytest.raises(InputError, match=message):
        Scores(values)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a"], "1 ids for 2"),
        (["a", "a"], "'a' names two"),
        ([1.5, 2.5], "is a float"),
        ([True, False], "is a bool"),
        ("ab", "sequence of 2"),
    ],
)
def test_ids_are_different_ints_or_strings(ids, message):
    with pytest.raises(InputError, match=message):
        Scores(torch.zeros(2, 2), train_ids=ids)


def test_ids_from_arrays_become_plain():
    scores = Scores(torch.zeros(2, 2), np.array([5, 6]), torch.tensor([7, 8]))
    assert scores.train_ids == (5, 6)
    assert {type(i) for i in (*scores.train_ids, *scores.test_ids)} == {int}


def test_provenance_is_a_frozen_json_copy():
    given_ = {"rates": (0.1, 0.2), "residual": np.float32(0.5), "worst": float("inf")}
    scores = Scores(torch.zeros(2, 2), provenance=given_)
    assert dict(scores.provenance) == {
        "rates": [0.1, 0.2], "residual": 0.5, "worst": "inf", "n_train": 2
    }  # fmt: skip
    given_["rates"] = ()
    assert scores.provenance["rates"] == [0.1, 0.2]
    with pytest.raises(TypeError):
        scores.provenance["n_train"] = 1


def test_scores_are_detached_and_frozen():
    values = torch.zeros(2, 2, requires_grad=True)
    scores = Scores(values)
    assert not scores.values.requires_grad
    with pytest.raises(AttributeError):
        scores.values = values


# --- tables -------------------------------------------------------------------------------------
def test_to_pandas():
    pytest.importorskip("pandas")
    frame = Scores(torch.arange(4.0).reshape(2, 2), ["a", "b"], [8, 9]).to_pandas()
    assert frame.loc["b", 8] == 2.0
    assert (frame.index.name, frame.columns.name) == ("train", "test")


def test_to_xarray():
    pytest.importorskip("xarray")
    array = Scores(torch.arange(4.0).reshape(2, 2), ["a", "b"], [8, 9], LOSS).to_xarray()
    assert float(array.sel(train="b", test=9)) == 3.0
    assert array.dims == ("train", "test")


@pytest.mark.parametrize("name", ["pandas", "xarray"])
def test_a_missing_table_library_is_named_with_its_extra(name, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"dattri-core\[table\]"):
        getattr(Scores(torch.zeros(1, 1)), f"to_{name}")()


def test_nothing_is_imported_until_a_table_is_asked_for(monkeypatch):
    real = builtins.__import__

    def guard(name, *args, **kwargs):
        assert name.split(".")[0] not in ("pandas", "xarray")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guard)
    Scores(torch.zeros(2, 2)).top(1)
