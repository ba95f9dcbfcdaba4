from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from dattri_faiss import TrainIndex
from torch import Tensor, nn

import dattri_core as dattri

Data = tuple[Tensor, Tensor]


def data(count: int, seed: int) -> Data:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=random, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=random)


def fitted_of(name: str, train: Data, **overrides: object) -> dattri.FittedMethod:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return dattri.method(name, **overrides).fit(dattri.Task(model), train, progress=False)


@pytest.fixture
def faiss() -> object:
    return pytest.importorskip("faiss", reason="FAISS is not installed: pip install faiss-cpu")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("grad-dot", {}),
        ("grad-cos", {}),
        ("logra", {"rank": 3}),
        ("logra", {"rank": 3, "scorer": "cosine"}),
        ("if-explicit", {"curvature": "ggn", "damping": 0.1}),
        ("if-ekfac", {"scorer": "cosine"}),
    ],
)
def test_a_flat_index_finds_what_the_scores_say(
    faiss: object, name: str, overrides: dict[str, object]
) -> None:
    train, test = data(200, 1), data(7, 2)
    fitted = fitted_of(name, train, **overrides)
    found, scores = TrainIndex.build(fitted).search(test, 5), fitted.attribute(test)
    want = scores.top(5)
    np.testing.assert_allclose(found.values.numpy(), want.values.numpy(), rtol=1e-4, atol=1e-6)
    assert np.array_equal(found.ids, want.ids)
    assert found.ids.shape == (5, 7)
    assert TrainIndex.build(fitted).search(test, 500).ids.shape == (200, 7)


def test_an_index_that_is_trained_finds_most(faiss: object) -> None:
    train, test = data(2000, 1), data(20, 2)
    fitted = fitted_of("logra", train, rank=3)
    index = TrainIndex.build(fitted, factory="IVF16,Flat")
    index.index.nprobe = 16  # all of them: exact again
    assert np.array_equal(index.search(test, 5).ids, fitted.extremes(test, 5).top.ids)
    index.index.nprobe = 1
    with pytest.raises(dattri.InputError, match="found fewer than k=1900"):
        index.search(test, 1900)


@pytest.mark.parametrize("k", [0, True, 2.0])
def test_k_is_a_number_of_examples(faiss: object, k: object) -> None:
    index = TrainIndex.build(fitted_of("grad-dot", data(10, 1)))
    with pytest.raises(dattri.InputError, match="k is"):
        index.search(data(2, 2), k)  # type: ignore[arg-type]


def test_what_is_no_inner_product_is_refused(faiss: object) -> None:
    with pytest.raises(dattri.SpecError, match="'relatif'"):
        TrainIndex.build(fitted_of("relatif-explicit", data(10, 1), curvature="ggn"))
    model = nn.Linear(5, 3).double()
    task = dattri.Task(model, checkpoints=[model.state_dict()] * 2)
    fitted = dattri.method("grad-dot").fit(task, data(10, 1), progress=False)
    with pytest.raises(dattri.SpecError, match="2 checkpoints"):
        TrainIndex.build(fitted)


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(dattri.InputError, match="pip install faiss-cpu"):
        TrainIndex.build(fitted_of("grad-dot", data(10, 1)))
