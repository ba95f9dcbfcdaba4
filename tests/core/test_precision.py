"""What surrounds a call does not round what is computed in it."""

import warnings

import pytest
import torch
from oracles.toy_tasks import examples, mlp

import dattri_core as dattri

TRAIN, TEST = examples(20), examples(4, seed=300)


def single(data):
    return data[0].float(), data[1]


@pytest.mark.parametrize("method", ["grad-dot", "if-woodbury", "logra", "source"])
def test_an_autocast_around_the_call_changes_no_bit(method):
    model = mlp().float()
    task = dattri.Task(model, checkpoints=[model.state_dict()], learning_rates=[0.1])
    data = single(TRAIN), single(TEST)
    method = dattri.method(method, iterations=10) if method == "source" else method
    want = dattri.attribute(task, *data, method=method).values
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.warns(RuntimeWarning, match=r"called inside torch\.autocast, which is left out"),
    ):
        got = dattri.attribute(task, *data, method=method).values
    assert torch.equal(got, want)


def test_every_way_of_asking_is_outside_of_it():
    task = dattri.Task(mlp().float())
    train, test = single(TRAIN), single(TEST)

    def asked():
        fitted = dattri.method("if-explicit", curvature="ggn").fit(task, train)
        yield fitted.attribute(test).values
        yield fitted.extremes(test, 2).top.values
        yield fitted.self_influence()
        yield fitted.sweep(test, damping=[1e-2])[1e-2].values
        yield list(fitted.train_rows())
        yield list(fitted.test_rows(test))

    def formed(found):
        return [f if torch.is_tensor(f) else torch.cat([r.flat() for r in f]) for f in found]

    want = formed(asked())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = list(asked())
            assert torch.is_autocast_enabled("cpu")
    assert [torch.equal(a, b) for a, b in zip(formed(found), want, strict=True)] == [True] * 6


def test_an_autocast_inside_of_the_loss_is_the_users():
    model = mlp().float()

    def half(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(batch[0])
        return torch.nn.functional.cross_entropy(outputs.float(), batch[1], reduction="none")

    data = single(TRAIN), single(TEST)
    exact = dattri.attribute(dattri.Task(model), *data, method="grad-dot").values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded = dattri.attribute(dattri.Task(model, half), *data, method="grad-dot").values
    gap = float((exact - rounded).abs().max() / exact.abs().max())
    assert 1e-5 < gap < 5e-2
