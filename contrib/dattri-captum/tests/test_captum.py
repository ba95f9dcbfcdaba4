from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri

captum = pytest.importorskip(
    "captum.influence", reason="captum is not installed: pip install captum"
)

Data = tuple[Tensor, Tensor]


def data(count: int, seed: int) -> Data:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=random), torch.randint(3, (count,), generator=random)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def adapter(model: nn.Module, train: Data, method: Any = "grad-dot", **changes: Any) -> Any:
    from dattri_captum import MethodInfluence

    return MethodInfluence(dattri.Task(model), TensorDataset(*train), method, **changes)


def test_gradient_similarity_is_tracin_of_captum_at_learning_rate_one(
    model: nn.Module, tmp_path: Path
) -> None:
    train, test = data(12, 1), data(5, 2)
    torch.save(model.state_dict(), tmp_path / "one.pt")

    def load(network: nn.Module, path: str) -> float:
        network.load_state_dict(torch.load(path, weights_only=True))
        return 1.0

    theirs = captum.TracInCP(
        model,
        TensorDataset(*train),
        [str(tmp_path / "one.pt")],
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=4,
        sample_wise_grads_per_batch=True,
    )
    ours = adapter(model, train)
    torch.testing.assert_close(ours.influence(test), theirs.influence(test), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.self_influence(), theirs.self_influence(), rtol=1e-4, atol=1e-5)
    for proponents in (True, False):
        got = ours.influence(test, k=3, proponents=proponents)
        want = theirs.influence(test, k=3, proponents=proponents)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(
            got.influence_scores, want.influence_scores, rtol=1e-4, atol=1e-5
        )


def test_any_method_serves_and_loaders_too(model: nn.Module) -> None:
    train, test = data(12, 1), data(5, 2)
    made = adapter(model, train, "if-ekfac", damping=0.1)
    task = dattri.Task(model)
    want = dattri.attribute(task, train, test, method="if-ekfac", damping=0.1, progress=False)
    loader = DataLoader(TensorDataset(*test), batch_size=2)
    for inputs in (test, loader):
        torch.testing.assert_close(made.influence(inputs), torch.as_tensor(want.values).T)
    assert isinstance(made, captum.DataInfluence)
    assert made.get_name() == "MethodInfluence"


def test_what_it_cannot_do_is_said(model: nn.Module) -> None:
    train, test = data(6, 1), data(2, 2)
    with pytest.raises(dattri.SpecError, match="no method 'knn-shapley-no'"):
        adapter(model, train, "knn-shapley-no")
    with pytest.raises(dattri.SpecError, match="no method of parts"):
        adapter(model, train, "random")
    made = adapter(model, train)
    with pytest.raises(dattri.InputError, match="influence of what"):
        made.influence()
    with pytest.raises(dattri.InputError, match=r"got \['aggregate'\]"):
        made.influence(test, aggregate=True)
