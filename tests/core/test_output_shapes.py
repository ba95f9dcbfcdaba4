"""Models that give one number an example, `[B]`, or several tensors, to a GGN."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dattri_core as dattri
from dattri_core import SpecError, Task

GGN = {
    "woodbury": {"method": "if-woodbury"},
    "explicit": {"method": "if-explicit", "curvature": "ggn"},
    "leading": {"method": "if-woodbury", "curvature": "leading-ggn"},
    "kfac": {"method": "if-kfac", "fisher": "ggn"},
    "ekfac": {"method": "if-ekfac", "fisher": "ggn"},
    "cg": {"method": "if-cg", "curvature": "ggn", "tolerance": 1e-12},
}
CRITERIA = {
    "binary": lambda o, y: F.binary_cross_entropy_with_logits(o, (y > 0).to(o), reduction="none"),
    "poisson": lambda o, y: F.poisson_nll_loss(o, y.abs(), reduction="none"),
}


def world():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs, values = torch.randn(12, 3).double(), torch.randn(12).double()
    return model, (inputs[:9], values[:9]), (inputs[9:], values[9:])


def split(criterion, *, flat):
    """Return a loss whose outputs are `[B]`, or `[B, 1]`."""
    if flat:
        return dattri.Loss(
            lambda model, batch: model(batch[0]).squeeze(-1),
            lambda outputs, batch: criterion(outputs, batch[1]),
        )
    return dattri.Loss(
        lambda model, batch: model(batch[0]),
        lambda outputs, batch: criterion(outputs.squeeze(-1), batch[1]),
    )


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", GGN)
@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_one_number_an_example_is_one_output(source, name, criterion):
    if source == "functional" and "fac" in name:
        pytest.skip("factors need a source of factors")
    model, train, test = world()
    options = {"damping": 0.1, "progress": False, "source": source, **GGN[name]}
    flat, column = (
        dattri.attribute(
            Task(model, loss=split(CRITERIA[criterion], flat=f)), train, test, **options
        )
        for f in (True, False)
    )
    torch.testing.assert_close(flat.values, column.values, rtol=1e-9, atol=1e-12)
    if name in ("woodbury", "explicit", "cg", "leading"):
        want = dense_scores(model, train, test, CRITERIA[criterion])
        torch.testing.assert_close(flat.values, want, rtol=1e-6, atol=1e-9)


def dense_scores(model, train, test, criterion):
    """g (G + 0.1)^-1 h with G = 1/n sum J^T H J of plain autograd."""
    parameters = list(model.parameters())

    def flat(value):
        parts = torch.autograd.grad(value, parameters)
        return torch.cat([part.flatten() for part in parts])

    def gradients(data):
        pairs = zip(*data, strict=True)
        return torch.stack([flat(criterion(model(x)[0], y)) for x, y in pairs])

    ggn = 0
    for x, y in zip(*train, strict=True):
        slope = flat(model(x)[0])
        point = model(x)[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(criterion(point, y), point, create_graph=True)
        (second,) = torch.autograd.grad(first, point)
        ggn = ggn + second * torch.outer(slope, slope) / len(train[0])
    damped = ggn + 0.1 * torch.eye(len(ggn), dtype=ggn.dtype)
    return gradients(train) @ torch.linalg.solve(damped, gradients(test).T)


def test_squared_error_takes_one_number_an_example():
    model, train, test = world()
    flat = nn.Sequential(*model, nn.Flatten(0))
    for name in ("grad-dot", "if-woodbury", "if-ekfac"):
        got, want = (
            dattri.attribute(
                Task(m, loss="squared-error"), train, test, method=name, progress=False
            ).values
            for m in (flat, model)
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("options", [{"method": "if-woodbury"}, {"method": "if-cg"}], ids=str)
def test_outputs_of_several_tensors_are_refused_with_the_cure(kind, options):
    model, train, test = world()
    keys = ("first", "second") if kind is dict else (0, 1)

    def forward(model, batch):
        found = (model(batch[0]), model(-batch[0]))
        return found if kind is tuple else dict(zip(keys, found, strict=True))

    loss = dattri.Loss(forward, lambda o, batch: (o[keys[0]] - o[keys[1]])[:, 0].square())
    if options["method"] == "if-cg":
        options = {**options, "curvature": "ggn"}
    with pytest.raises(SpecError, match=rf"forward returned a {kind.__name__}.*torch\.cat"):
        dattri.attribute(Task(model, loss=loss), train, test, progress=False, **options)
    # No GGN, no matter.
    dattri.attribute(Task(model, loss=loss), train, test, method="grad-dot", progress=False)


def by_token(outputs, labels):
    """Return the sum over tokens of -log p, of outputs `[B, T, V]`."""
    return F.cross_entropy(outputs.mT, labels, reduction="none").sum(1)


UNUSUAL = {
    "time first": dattri.Loss(
        lambda model, batch: model(batch[0]).transpose(0, 1),
        lambda outputs, batch: by_token(outputs.transpose(0, 1), batch[1]),
    ),
    "flattened": dattri.Loss(
        lambda model, batch: model(batch[0]).flatten(0, 1),
        lambda outputs, batch: by_token(outputs.unflatten(0, batch[1].shape), batch[1]),
    ),
    "squeezed": dattri.Loss(
        lambda model, batch: model(batch[0]).squeeze(),
        lambda outputs, batch: by_token(outputs.reshape(*batch[1].shape, -1), batch[1]),
    ),
}


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("shape", UNUSUAL)
def test_rows_of_outputs_whose_first_axis_counts_no_examples_are_refused(shape, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    train = torch.randint(5, (8, tokens)), torch.randint(4, (8, tokens))
    test = torch.randint(5, (3, tokens)), torch.randint(4, (3, tokens))
    task = Task(model, loss=UNUSUAL[shape])
    plain = Task(model, loss="token-cross-entropy")
    for name in ("woodbury", "leading", "kfac", "cg"):
        options = {"damping": 0.1, "progress": False, **GGN[name]}
        if name == "cg" or (shape, tokens) == ("flattened", 1):  # one token: an example each
            found = dattri.attribute(task, train, test, **options).values
            expected = dattri.attribute(plain, train, test, **options).values
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            continue
        with pytest.raises(dattri.InputError, match=r"shape \(.*expected \[\d+, \.\.\.\], example"):
            dattri.attribute(task, train, test, **options)
