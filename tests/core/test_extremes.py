"""Extremes of every query from one pass, against the whole matrix of scores."""

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

import dattri_core as dattri
from dattri_core import fitted as fitted_module
from dattri_core import plans
from dattri_core.tiles import MemoryTiles


def exact_task(count=1):
    """Return least squares at whole weights: scores of whole numbers are exact, with many ties."""
    model = nn.Linear(2, 1, bias=False).double()
    states = [{"weight": torch.full((1, 2), float(c), dtype=torch.float64)} for c in range(count)]
    rates = [2.0**-c for c in range(count)]
    return dattri.Task(model, "squared-error", checkpoints=states, learning_rates=rates)


def exact_data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, 2), generator=generator).double()
    return x, torch.randint(-1, 2, (n, 1), generator=generator).double()


def require_same(found, scores, k):
    for got, want in ((found.top, scores.top(k)), (found.bottom, scores.bottom(k))):
        assert torch.equal(got.values, want.values)
        assert np.array_equal(got.ids, want.ids)
    assert list(found.test_ids) == list(scores.test_ids)


@settings(deadline=None, max_examples=60)
@given(
    n_train=st.integers(1, 40),
    n_test=st.integers(1, 6),
    k=st.integers(1, 45),
    batch=st.integers(1, 50),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
    fold=st.sampled_from(["mean", "weighted"]),
)
def test_they_are_those_of_the_whole_matrix(n_train, n_test, k, batch, count, seed, fold):
    task, train, test = exact_task(count), exact_data(n_train, seed), exact_data(n_test, seed + 1)
    fitted = dattri.Method(fold=fold).fit(task, train, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "MAXIMUM_BATCH", batch)
        found = fitted.extremes(test, k)
    require_same(found, fitted.attribute(test), k)
    assert found.top.values.shape == (min(k, n_train), n_test)


@pytest.mark.parametrize("name", ["if-explicit", "if-ekfac", "grad-cos", "if-cg"])
def test_they_are_those_of_any_method(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    train = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    test = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    overrides = {"curvature": "ggn"} if name in ("if-explicit", "if-cg") else {}
    fitted = dattri.method(name, **overrides).fit(dattri.Task(model), train, progress=False)
    found, scores = fitted.extremes(test, 4), fitted.attribute(test)
    for got, want in ((found.top, scores.top(4)), (found.bottom, scores.bottom(4))):
        assert np.array_equal(got.ids, want.ids)
        torch.testing.assert_close(got.values, want.values, rtol=1e-9, atol=1e-12)
    same = {k: v for k, v in scores.provenance.items() if k != "solver"}
    assert {k: v for k, v in found.provenance.items() if k != "solver"} == same
    summed, column = fitted.extremes(test, 4, group=True), fitted.attribute(test, group=True)
    assert np.array_equal(summed.top.ids, column.top(4).ids)
    assert list(summed.test_ids) == ["sum"]


def test_several_query_groups_and_parts_of_the_train_set(monkeypatch, tmp_path):
    train, test, method = exact_data(3000, 1), exact_data(800, 2), dattri.Method(fold="weighted")
    whole = method.attribute(exact_task(3), train, test, memory="1GiB", progress=False)
    monkeypatch.setattr(plans, "MAXIMUM_BATCH", 100)
    monkeypatch.setattr(plans, "_held", lambda route, work: 2000)  # queries that need groups
    out = tmp_path / "scores"  # no result is held
    plan = method.attribute(exact_task(3), train, test, memory="2MiB", out=out, dry_run=True)
    fitted = method.fit(exact_task(3), train, memory="2MiB", progress=False)
    fits = []
    fit = fitted_module.fit_checkpoint

    def count(*args, **settings):
        fits.append(args[4].name)
        return fit(*args, **settings)

    monkeypatch.setattr(fitted_module, "fit_checkpoint", count)
    found = fitted.extremes(test, 7)
    assert plan.groups > 1
    assert len(fits) > 2 * 3  # several parts of the train set, every checkpoint for each
    require_same(found, whole, 7)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen = max(self.seen, *sizes, 0) if sizes else self.seen
        return result


def test_no_tensor_is_near_the_size_of_the_matrix(monkeypatch):
    monkeypatch.setattr(plans, "MAXIMUM_BATCH", 50)
    n_train, n_test, k = 2000, 200, 3
    train, test = exact_data(n_train, 1), exact_data(n_test, 2)
    fitted = dattri.Method().fit(exact_task(), train, progress=False)
    held = []

    def put(tiles, group, start, done, state):
        tiles._states[group, start] = (done, state)
        numbers = sum(v.numel() for _, s in tiles._states.values() for v in s.values())
        held.append((len(tiles._states), numbers))

    monkeypatch.setattr(MemoryTiles, "put", put)
    with Largest() as whole:
        scores = fitted.attribute(test)
    assert whole.seen >= n_train * n_test  # the spy would see it
    held.clear()
    with Largest() as streamed:
        found = fitted.extremes(test, k)
    assert streamed.seen <= max(50 * n_test, 16 * n_train)  # bytes of the inputs, as hashed
    assert len(held) == n_train // 50
    assert max(held) == (1, 50 * n_test)
    require_same(found, scores, k)


class Counted(Dataset):
    """Examples that count how often they are read."""

    def __init__(self, data):
        self.data, self.reads = data, 0

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, at):
        self.reads += 1
        return tuple(part[at] for part in self.data)


def test_one_pass_over_the_train_set_gives_both_ends(monkeypatch):
    monkeypatch.setattr(plans, "MAXIMUM_BATCH", 8)
    train, test = Counted(exact_data(100, 1)), exact_data(5, 2)
    fitted = dattri.Method().fit(exact_task(), train, progress=False)
    train.reads = 0
    fitted.train.fingerprint
    beside, train.reads = train.reads, 0
    fitted.extremes(test, 3)
    assert train.reads == 100 + beside


@attrs.frozen
class Costly:
    """An inverse Hessian that is fitted on the train set, to the identity."""

    needs = frozenset({"rows"})

    def check(self, space):
        pass

    def fit(self, problem):
        return dattri.default_registry().make("inverse_hessian", "identity").fit(problem)


@attrs.frozen
class Column:
    """The inner product, of whole columns."""

    needs = frozenset()
    locality = "column"

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return dattri.Scored(total)


def test_what_cannot_wait_for_the_last_checkpoint_is_refused():
    train, test = exact_data(3000, 1), exact_data(300, 2)
    for fields, reason in (
        ({"inverse_hessian": Costly()}, "another fit of every checkpoint"),
        ({"scorer": Column()}, "'Column' sees all train rows at once"),
    ):
        method = dattri.Method(**fields)
        small = method.fit(exact_task(2), train, memory="1MiB", progress=False)
        with pytest.raises(
            dattri.MemoryBudgetError, match=rf"3000 x 300 .* 2 checkpoints.*{reason}"
        ):
            small.extremes(test, 2)
        large = method.fit(exact_task(2), train, memory="1GiB", progress=False)
        require_same(large.extremes(test, 2), large.attribute(test), 2)
        single = method.fit(exact_task(1), train, memory="32MiB", progress=False)
        require_same(single.extremes(test, 2), single.attribute(test), 2)
    plain = dattri.Method().fit(exact_task(2), train, memory="1MiB", progress=False)
    whole = dattri.Method().fit(exact_task(2), train, memory="1GiB", progress=False)
    require_same(plain.extremes(test, 2), whole.attribute(test), 2)


def test_ids_are_those_of_the_loader():
    train = list(zip(*exact_data(9, 1), strict=True))
    loader = DataLoader(train, batch_size=2, sampler=[8, 3, 5, 0])
    fitted = dattri.Method().fit(exact_task(), loader, progress=False)
    found = fitted.extremes(exact_data(2, 2), 4)
    assert sorted(found.top.ids[:, 0].tolist()) == [0, 3, 5, 8]
    require_same(found, fitted.attribute(exact_data(2, 2)), 4)


def test_members_of_an_ensemble_are_folded_before_they_are_ranked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    train = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    method = dattri.method("grad-dot", source={"name": "dropout-ensemble", "members": 4})
    fitted = method.fit(dattri.Task(model), train, progress=False)
    found, scores = fitted.extremes(train, 3), fitted.attribute(train)
    assert np.array_equal(found.top.ids, scores.top(3).ids)
    torch.testing.assert_close(found.top.values, scores.top(3).values)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_k_is_a_number_of_examples(k):
    fitted = dattri.Method().fit(exact_task(), exact_data(5, 1), progress=False)
    with pytest.raises(dattri.InputError, match="extremes: k is"):
        fitted.extremes(exact_data(2, 2), k)


def test_a_fold_that_overflows_is_an_error():
    @attrs.frozen
    class Overflowing:
        order = "forward"
        needs = frozenset()

        def update(self, state, scored, snapshot):
            return {"values": scored.values}

        def finish(self, state):
            return torch.full_like(state["values"], float("inf"))

    fitted = dattri.Method(fold=Overflowing()).fit(exact_task(), exact_data(5, 1), progress=False)
    with pytest.raises(dattri.NumericsError, match=r"inf at train position 0, test position 0"):
        fitted.extremes(exact_data(2, 2), 1)


def test_events_are_those_of_a_run(monkeypatch):
    heard = []
    monkeypatch.setattr(
        type(dattri.default_registry()), "emit", lambda self, name, info: heard.append((name, info))
    )
    fitted = dattri.Method().fit(exact_task(), exact_data(5, 1), progress=False)
    fitted.extremes(exact_data(2, 2), 1)
    names = [name for name, _ in heard]
    assert names[0] == "run_started"
    assert names[-1] == "run_finished"
    assert heard[-2][1] == {"done": 5, "total": 5}
