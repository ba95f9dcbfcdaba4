"""What surrounds a call does not round what is computed in it."""

import copy
import warnings

import pytest
import torch
from oracles.toy_tasks import examples, mlp
from torch import nn

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


class _OfTwoDtypes(nn.Module):
    """Two layers, one of them in float64."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).to(first), nn.Linear(4, 3).to(second)

    def forward(self, inputs):
        hidden = self.first(inputs.to(self.first.weight.dtype)).tanh()
        return self.second(hidden.to(self.second.weight.dtype))


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("solver", [{"name": "cg", "tolerance": 1e-7}, "cholesky", "woodbury"])
def test_layers_in_two_dtypes_have_one_inverse(dtypes, solver):
    """Against the Gauss-Newton matrix of the same weights in float64, example by example."""
    model = _OfTwoDtypes(*(getattr(torch, name) for name in dtypes))
    inputs, labels = torch.randn(14, 3), torch.randint(3, (14,))
    train, test = (inputs[:10], labels[:10]), (inputs[10:], labels[10:])
    options = {"curvature": "ggn", "solver": solver, "damping": 0.1}
    fitted = dattri.method("if-cg", **options).fit(dattri.Task(model), train)

    wide = copy.deepcopy(model).double()
    names, weights = zip(*wide.named_parameters(), strict=True)

    def logits(values, example):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(wide, given, (example.double(),))

    def flat(jacobian):
        return torch.cat([part.flatten(1) for part in jacobian], 1)

    slopes = [flat(torch.func.jacrev(logits)(weights, example)) for example in inputs]
    shares = [logits(weights, example).softmax(0).detach() for example in inputs]
    matrix = 0.1 * torch.eye(slopes[0].shape[1], dtype=torch.float64)
    for slope, share in zip(slopes[:10], shares[:10], strict=True):
        matrix += slope.T @ (share.diag() - torch.outer(share, share)) @ slope / 10
    targets = torch.nn.functional.one_hot(labels, 3)
    rows = torch.stack([(p - y) @ j for p, y, j in zip(shares, targets, slopes, strict=True)])
    solved = torch.linalg.solve(matrix, rows.T).detach()
    rows = rows.detach()
    found = fitted.attribute(test).values.double()
    torch.testing.assert_close(found, rows[:10] @ solved[:, 10:], rtol=1e-4, atol=1e-5)
    own = (rows[:10] * solved[:, :10].T).sum(1)
    torch.testing.assert_close(fitted.self_influence().double(), own, rtol=1e-4, atol=1e-5)
