"""KNN-Shapley from end to end: enumeration, ties, batches, memory, folds, large train sets."""

from __future__ import annotations

import threading

import attrs
import numpy as np
import pytest
import torch
from dattri_knn.classification import KNNShapley
from dattri_knn.columns import SERIAL, column_parts, nearest_first, solve_columns
from dattri_knn.regression import KNNShapleyRegression
from dattri_knn.values import additive_values, equal_values, mean_values, squared_values
from oracles import knn_games as games
from oracles.toy_tasks import examples, mlp, normal, states, world
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core import Scores, Side, SpecError, Task
from dattri_core.contract import contraction_limit
from dattri_core.laws import check

METHODS = (
    "knn-shapley",
    "knn-shapley-weighted",
    "knn-shapley-regression",
    "knn-shapley-soft-label",
    "knn-shapley-threshold",
)


def features(task, side):
    return task.model[:2](side[0]).detach().numpy()


def utility_of(name, far, labels, label):
    if name == "knn-shapley-threshold":
        return games.threshold(far, labels, label, 0.5)
    if name == "knn-shapley-weighted":
        weights = np.exp(-((far / np.sort(far)[2]) ** 2) / 2)
        return games.classification(far, labels, label, 3, weights)
    game = {"knn-shapley": games.classification, "knn-shapley-regression": games.regression}
    return game.get(name, games.soft_label)(far, labels, label, 3)


@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_enumeration_on_the_features_of_a_network(name):
    task, train, test = world(n_train=9, n_test=3)
    changes = {} if name == "knn-shapley-threshold" else {"neighbours": 3}
    got = dattri.attribute(task, train, test, name, **changes).values.numpy()
    left, right = features(task, train), features(task, test)
    labels = train[1].tolist()
    for j, point in enumerate(right):
        far = np.linalg.norm(left - point, axis=1)
        if name == "knn-shapley-threshold":
            far = 1 - left @ point / np.linalg.norm(left, axis=1) / np.linalg.norm(point)
        utility = utility_of(name, far, labels, int(test[1][j]))
        assert np.abs(got[:, j] - games.shapley(utility, 9)).max() <= 1e-12


def test_the_mean_over_tests_is_the_value_of_the_mean_utility():
    task, train, test = world(n_train=8, n_test=4)
    scores = dattri.attribute(task, train, test, "knn-shapley", neighbours=2)
    left, right = features(task, train), features(task, test)
    parts = [
        games.classification(
            np.linalg.norm(left - point, axis=1), train[1].tolist(), int(test[1][j]), 2
        )
        for j, point in enumerate(right)
    ]
    want = games.shapley(lambda rows: sum(part(rows) for part in parts) / 4, 8)
    assert np.abs(scores.values.mean(1).numpy() - want).max() <= 1e-12


# --- ties, batches, memory ------------------------------------------------------------------------
def copies(kind, count, seed, dtype):
    """Return points far from the origin, each several times, and labels of their own."""
    generator = torch.Generator().manual_seed(seed)
    points = normal(60, 4, seed=5)
    if kind == "grid":  # of which many are equally far without being equal
        points = torch.randint(-1, 2, (60, 4), generator=generator)
    points = points + torch.tensor([50.0, 7.0, -9.0, 0.0])
    chosen = torch.randint(60, (count,), generator=generator)
    return points[chosen].to(dtype), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["grid", "drawn"])
def test_equal_rows_tie_in_the_order_of_the_train_set_whatever_the_batch(dtype, kind):
    count = 3000
    train, test = copies(kind, count, 1, dtype), copies(kind, 9, 2, dtype)
    task = Task(mlp().to(dtype))
    method = dattri.method("knn-shapley", inputs=True, neighbours=4)
    whole = method.attribute(task, train, test).values
    left, right = (side[0].double().numpy() for side in (train, test))
    squares = ((left[:, None] - right) ** 2).sum(2)
    far = np.sqrt(squares.astype(train[0].numpy().dtype)).astype(np.float32)
    assert len(np.unique(far[:, 0])) < 100
    want = torch.empty(count, 9, dtype=torch.float64)
    for j in range(9):
        order = np.lexsort((np.arange(count), far[:, j]))
        gains = (train[1][order] == test[1][j]).double()[None]
        want[order, j] = additive_values(gains, 4)[0]
    assert (whole.double() - want).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-7)
    for size in (1, 7, 64):
        loader = DataLoader(TensorDataset(*train), batch_size=size)
        assert torch.equal(method.attribute(task, loader, test).values, whole)
    assert method.attribute(task, train, test, memory="1MiB", dry_run=True).groups > 1
    assert torch.equal(method.attribute(task, train, test, memory="1MiB").values, whole)


def test_a_duplicate_of_a_test_row_is_at_distance_zero():
    x, labels = normal(40, 6, seed=4) + 1e4, torch.arange(40) % 3
    task = Task(mlp((6, 5, 3)))
    method = dattri.method("knn-shapley", inputs=True, neighbours=1)
    twice = torch.cat([x, x]), torch.cat([(labels + 1) % 3, labels])
    scores = method.attribute(task, twice, (x, labels))
    # Both copies are at distance 0; that with the wrong label comes first, so it is the nearest.
    wrong, right = scores.values[:40].diagonal(), scores.values[40:].diagonal()
    torch.testing.assert_close(right - wrong, torch.ones(40, dtype=torch.float64))
    got = dattri.attribute(
        task,
        (x, labels),
        (x, labels),
        "knn-shapley-threshold",
        inputs=True,
        distance="l2",
        threshold=0.0,
    )
    torch.testing.assert_close(got.values, torch.eye(40, dtype=torch.float64) * 2 / 3)


def test_nearest_first_sorts_negative_numbers_and_zeros_and_keeps_ties():
    far = torch.tensor([[0.0, -2.0, 3.5, -0.0, -2.0, torch.inf, 1e-40, -1e-3, 0.0]])
    assert nearest_first(far).tolist() == [[1, 4, 7, 0, 3, 8, 6, 2, 5]]
    close = torch.tensor([[1.0, 1.0 + 1e-9, 1.0 - 1e-9]], dtype=torch.float64)
    assert nearest_first(close).tolist() == [[0, 1, 2]]  # equal in float32


def test_columns_are_solved_in_parts_of_the_memory():
    distances, labels = normal(200, 31, seed=3).abs(), torch.arange(200) % 3
    train = Side(torch.arange(200), {"label": labels}, None)
    test = Side(torch.arange(31), {"label": torch.arange(31) % 3}, None)
    seen = []

    def game(column):
        seen.append(len(column.labels))
        return additive_values((column.labels == column.label).double(), 5)

    want = solve_columns(game, distances, train, test, "l1")
    with contraction_limit(200 * 64 * 4):
        assert len(column_parts(distances)) == 8
        seen.clear()
        assert torch.equal(solve_columns(game, distances, train, test, "l1"), want)
        assert seen == [4] * 7 + [3]
    turned = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    moved = Side(turned, {"label": labels[turned]}, None)
    assert torch.equal(solve_columns(game, distances[turned], moved, test, "l1"), want[turned])


def test_only_a_processor_keeps_to_what_its_caches_hold():
    here, elsewhere = (torch.empty(9000, 500, device=device) for device in ("cpu", "meta"))
    assert [len(range(500)[part]) for part in column_parts(here)] == [112] * 4 + [52]
    with contraction_limit(9000 * 500 * 64):
        assert column_parts(elsewhere) == [slice(0, 496), slice(496, 992)]
        assert len(column_parts(here)) == 5


def test_columns_are_the_same_on_several_threads(monkeypatch):
    rows, columns = 9000, 35
    assert rows * columns > SERIAL
    far = normal(rows, columns, seed=3).abs().float().double()  # ties are those of float32
    labels = torch.arange(rows) % 3
    turned = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    train = Side(turned, {"label": labels[turned]}, None)
    test = Side(torch.arange(columns), {"label": torch.arange(columns) % 3}, None)
    found, seen = [], set()

    def game(column):
        seen.add(threading.get_ident())
        return additive_values((column.labels == column.label).double() * column.distances, 5)

    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        seen.clear()
        found.append(solve_columns(game, far[turned], train, test, "l1"))
        assert (threading.get_ident() in seen) == (count == 1)
    assert torch.equal(*found)
    order = far[:, 7].sort(stable=True).indices
    gains = (labels[order] == 1).double() * far[order, 7]
    want = torch.empty(rows, dtype=torch.float64)
    want[order] = additive_values(gains[None], 5)[0]
    torch.testing.assert_close(found[0][:, 7].double(), want[turned], rtol=1e-12, atol=1e-16)


def test_scores_of_a_column_go_to_disk_and_are_resumed(tmp_path):
    task, train, test = world(n_train=3000, n_test=9)
    method = dattri.method("knn-shapley", neighbours=2)
    want = method.attribute(task, train, test).values
    plan = method.attribute(task, train, test, dry_run=True, memory="1MiB", out=tmp_path / "s")
    assert plan.groups > 1
    method.attribute(task, train, test, memory="1MiB", out=tmp_path / "s")
    assert torch.equal(torch.as_tensor(np.array(Scores.load(tmp_path / "s").values)), want)


# --- large train sets -----------------------------------------------------------------------------
@pytest.mark.parametrize("neighbours", [1, 10, 3000])
def test_large_train_sets_lose_no_digits(neighbours):
    """Against sums in exact fractions; the values of far rows are of the size 1 / n^2."""
    from fractions import Fraction

    count = 2000
    gains = (normal(1, count, seed=8) > 0.4).double()
    want, value = [], Fraction(0)
    marks = [int(g) for g in gains[0]] + [0]
    for rank in range(count, 0, -1):
        step = marks[rank - 1] - marks[rank]
        value += Fraction(step * min(neighbours, rank), neighbours * rank)
        want.append(float(value))
    want = torch.tensor(want[::-1], dtype=torch.float64)
    got = additive_values(gains, neighbours)[0]
    assert ((got - want).abs() <= 1e-11 * want.abs() + 1e-18).all()


@pytest.mark.parametrize("neighbours", [1, 10, 200_001])
def test_a_column_of_many_rows_adds_up_to_its_utility(neighbours):
    count = 200_000
    gains = (normal(2, count, seed=8) > 0.4).double()
    near = gains[:, :neighbours]
    full = near.sum(1) / neighbours
    assert (additive_values(gains, neighbours).sum(1) - full).abs().max() <= 1e-12
    answer = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    values = squared_values(gains, answer, neighbours)
    assert (values.sum(1) - answer[:, 0] ** 2 + (full - answer[:, 0]) ** 2).abs().max() <= 1e-11
    values = mean_values(gains, 0.5, neighbours)
    assert (values.sum(1) - near.mean(1) + 0.5).abs().max() <= 1e-11
    inside = normal(count, 2, seed=9) > -1
    mean = (gains.T * inside).sum(0) / inside.sum(0)
    values = equal_values(gains.T, inside, 0.5)
    assert (values.sum(0) - mean + 0.5).abs().max() <= 1e-11


# --- with the rest --------------------------------------------------------------------------------
def test_checkpoints_are_averaged():
    weights = states(2)
    train, test = examples(13), examples(4, seed=300)
    parts = [
        dattri.attribute(Task(mlp(), checkpoints=[w]), train, test, "knn-shapley") for w in weights
    ]
    got = dattri.attribute(Task(mlp(), checkpoints=weights), train, test, "knn-shapley")
    torch.testing.assert_close(got.values, (parts[0].values + parts[1].values) / 2)


def test_distances_after_a_two_sided_inverse_are_those_of_mahalanobis():
    task, train, test = world(n_train=9, n_test=2)
    stage = {
        "curvature": "gauss-newton",
        "solver": {"name": "cholesky", "damping": 0.2},
        "form": "two-sided",
    }
    method = dattri.Method(
        source="representation",
        inverse_hessian=stage,
        scorer={"name": "knn-shapley", "neighbours": 2},
    )
    got = method.attribute(task, train, test).values.numpy()
    left, right = features(task, train), features(task, test)
    inverse = np.linalg.inv(left.T @ left / 9 + 0.2 * np.eye(5))
    for j, point in enumerate(right):
        apart = left - point
        far = np.einsum("nd,de,ne->n", apart, inverse, apart)
        utility = games.classification(far, train[1].tolist(), int(test[1][j]), 2)
        assert np.abs(got[:, j] - games.shapley(utility, 9)).max() <= 1e-12


def test_what_a_column_cannot_answer_is_refused():
    task, train, test = world()
    method = dattri.method("knn-shapley")
    with pytest.raises(SpecError, match=r"take the mean of the scores instead: scores.values.mean"):
        method.attribute(task, train, test, group=True)
    with pytest.raises(SpecError, match="sees whole columns at once"):
        method.attribute(task, train, test, by="block")
    with pytest.raises(SpecError, match="sees a whole column"):
        method.fit(task, train).self_influence()
    with pytest.raises(SpecError, match="weights='gaussian' are of a distance, and 'dot' is none"):
        dattri.attribute(task, train, test, "knn-shapley-weighted", distance="dot")
    with pytest.raises(SpecError, match="label"):
        dattri.Method(source="per-example", scorer="knn-shapley").check(task=task)
    with pytest.raises(SpecError, match="label"):
        dattri.method("knn-shapley", label="none").check(task=task)
    for bad in ({"neighbours": 0}, {"distance": "far"}, {"bandwidth": 0.0}):
        with pytest.raises((SpecError, ValueError)):
            dattri.method("knn-shapley", **bad)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("knn-shapley", {"neighbours": 2}),
        ("knn-shapley", {"neighbours": 1, "distance": "cosine"}),
        ("knn-shapley", {"neighbours": 2, "distance": "dot"}),
        ("knn-shapley", {"neighbours": 2, "distance": "l1", "weights": "inverse"}),
        ("knn-shapley", {"neighbours": 2, "distance": "cosine", "weights": "gaussian"}),
        ("knn-shapley-regression", {"neighbours": 1, "weights": "gaussian"}),
        ("knn-shapley-soft-label", {"neighbours": 1}),
        ("knn-shapley-threshold", {"distance": "l2", "threshold": 2.0}),
    ],
)
def test_other_settings_of_the_scorers_meet_the_laws(name, changes):
    part = attrs.evolve(dattri.default_registry().make("scorer", name), **changes)
    report = check("scorer", part)
    assert report.ok, str(report)


@pytest.mark.cuda
def test_columns_are_the_same_on_a_device():
    distances, labels = normal(2000, 31, seed=3).abs(), torch.arange(2000) % 3
    distances[1000:] = distances[:1000]  # ties
    for scorer in (KNNShapley(), KNNShapleyRegression()):
        sides = [
            [Side(torch.arange(n, device=d), {"label": labels[:n].to(d)}, None) for n in (2000, 31)]
            for d in ("cpu", "cuda")
        ]
        want = scorer.finish(distances.square(), *sides[0]).values
        got = scorer.finish(distances.square().cuda(), *sides[1]).values
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", ["inverse", "gaussian"])
def test_rows_of_the_direction_of_a_query_are_at_distance_zero(weights):
    """In float32 as in float64: the bandwidth is the distance of the next row, not a rounding."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 33, generator=random)
    rows[15:], labels = 3 * rows[:15], torch.arange(30) % 3
    scorer = {"name": "knn-shapley", "neighbours": 1, "weights": weights, "distance": "cosine"}
    method = dattri.method(
        "knn-shapley", scorer=scorer, source={"name": "representation", "inputs": True}
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        data = rows.to(dtype), labels
        task = dattri.Task(torch.nn.Linear(33, 3).to(dtype))
        found.append(method.attribute(task, data, data, progress=False).values.double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
