"""Loss, gradient norm and self-influence: against a loop over examples."""

import numpy as np
import pytest
import torch
from dattri_baselines.self_influence import SelfInfluence
from oracles.toy_tasks import examples, mlp
from torch import nn

import dattri_core as dattri
from dattri_core.laws.oracles import row_matrix

TRAIN, TEST = examples(13, seed=1), examples(4, seed=5)
STATES = [mlp(seed=0).state_dict(), mlp(seed=30).state_dict()]


def two_checkpoints(**options):
    return dattri.Task(mlp(), checkpoints=STATES, **options)


def at(state):
    model = mlp()
    model.load_state_dict(state)
    return model


def values(name, task, **settings):
    return dattri.attribute(task, TRAIN, TEST, method=name, progress=False, **settings).values


def losses(model):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(TRAIN[0]), TRAIN[1], reduction="none")


def gradients(model):
    task = dattri.Task(model)
    space = dattri.method("grad-dot").fit(task, TRAIN, progress=False)
    return row_matrix(task, next(iter(space.train_rows())).space, TRAIN)


def constant_columns(scores):
    assert scores.shape == (13, 4)
    assert all(torch.equal(scores[:, 0], scores[:, j]) for j in range(4))
    return scores[:, 0]


def test_loss_is_the_mean_over_checkpoints():
    got = constant_columns(values("loss", two_checkpoints()))
    want = (losses(at(STATES[0])) + losses(at(STATES[1]))) / 2
    assert (got - want).abs().max() < 1e-14


def test_loss_may_be_negative_and_ignores_the_target():
    shifted = dattri.Loss(
        dattri.cross_entropy.forward, lambda o, b: dattri.cross_entropy.criterion(o, b) - 5
    )
    task = dattri.Task(at(STATES[0]), shifted, target="logit")
    got = constant_columns(values("loss", task))
    assert (got - (losses(at(STATES[0])) - 5)).abs().max() < 1e-14
    assert (got < 0).all()


def test_grad_norm_is_the_mean_norm_over_checkpoints():
    got = constant_columns(values("grad-norm", two_checkpoints()))
    norms = [gradients(at(state)).norm(dim=1) for state in STATES]
    want = (norms[0] + norms[1]) / 2
    assert (got - want).abs().max() < 1e-12
    squares = (norms[0].square() + norms[1].square()).div(2).sqrt()
    assert (got - squares).abs().max() > 1e-4  # the mean of norms, not the root of a mean


def test_self_influence_of_gradients_is_the_mean_square():
    got = constant_columns(values("self-influence", two_checkpoints()))
    want = sum(gradients(at(state)).square().sum(1) for state in STATES) / 2
    assert (got - want).abs().max() < 1e-12


def test_self_influence_of_any_method():
    task = dattri.Task(mlp())
    parts = {"inverse_hessian": {"curvature": "ggn", "solver": "cholesky"}}
    fitted = dattri.Method(**parts).fit(task, TRAIN, progress=False)
    want = torch.as_tensor(fitted.self_influence())
    for method in (parts, dattri.Method(**parts)):
        made = dattri.method("self-influence", method=method)
        got = made.attribute(task, TRAIN, TEST, progress=False)
        assert torch.equal(constant_columns(got.values), want)
        assert got.provenance["method"]["name"] == "self-influence"
        assert got.provenance["method"]["method"] == dattri.Method(**parts).to_spec()
    got = dattri.method("self-influence", method="grad-cos").attribute(task, TRAIN, TEST)
    assert (got.values - 1).abs().max() < 1e-12


def test_self_influence_on_disk_and_dry(tmp_path):
    task = dattri.Task(mlp())
    want = values("self-influence", task)
    dattri.attribute(task, TRAIN, TEST, method="self-influence", out=tmp_path / "s")
    assert np.array_equal(dattri.Scores.load(tmp_path / "s").values, want.numpy())
    plan = dattri.attribute(task, TRAIN, TEST, method="self-influence", dry_run=True)
    assert isinstance(plan, dattri.Plan)


def test_a_method_without_rows_has_no_self_influence():
    with pytest.raises(dattri.SpecError, match="'random' is a Random and not made of parts"):
        SelfInfluence("random").attribute(dattri.Task(mlp()), TRAIN, TEST)


def test_large_is_suspicious_for_all_three():
    """A wrong label among blobs that a model fits stands out by each of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = nn.functional.one_hot(labels, 4).double() * 3
    inputs = inputs + 0.3 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4, dtype=torch.float64)[:3])
        model.bias.zero_()
    labels[17] = (labels[17] + 1) % 3
    for name in ("loss", "grad-norm", "self-influence"):
        scores = dattri.attribute(
            dattri.Task(model), (inputs, labels), TEST, method=name, progress=False
        )
        assert int(scores.values[:, 0].argmax()) == 17
