"""Choices of embeddings: sparse gradients, a limit on lengths, gradients scaled by counts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dattri_core as dattri
from dattri_core import InputError, Task

WORDS, WIDTH, DAMPING = 5, 2, 4.0


class Words(nn.Module):
    """The mean of some words, and a linear layer."""

    def __init__(self, kind, **choices):
        super().__init__()
        torch.manual_seed(0)
        self.words = kind(WORDS, WIDTH, **choices)
        self.out = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, index):
        found = self.words(index)
        return self.out(torch.tanh(found if found.dim() == 2 else found.mean(1)))


def world():
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(WORDS, (12, 4), generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    return (index[:8], labels[:8]), (index[8:], labels[8:])


def gradients(model, batch, *, create_graph=False):
    """Return the gradient of each example's loss by a pass of its own, ``[n, d]``."""
    parameters = list(model.parameters())
    rows = []
    for at in range(len(batch[0])):
        value = cross_entropy(model(batch[0][at : at + 1]), batch[1][at : at + 1])
        found = torch.autograd.grad(value, parameters, create_graph=create_graph)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def hessian(model, batch):
    """Return the Hessian of the mean loss by two backward passes."""
    mean = gradients(model, batch, create_graph=True).mean(0)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in mean]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_rows_of_sparse_gradients_are_gradients(kind, source):
    model, (train, test) = Words(kind, sparse=True), world()
    found = dattri.attribute(Task(model), train, test, method="grad-dot", source=source).values
    dense = Words(kind)
    torch.testing.assert_close(found, gradients(dense, train) @ gradients(dense, test).T)


@pytest.mark.parametrize("method", ["if-cg", "if-explicit"])
def test_products_of_sparse_gradients_are_those_of_the_hessian(method):
    model, (train, test) = Words(nn.Embedding, sparse=True), world()
    options = {"tolerance": 1e-12} if method == "if-cg" else {}
    found = dattri.attribute(
        Task(model), train, test, method=method, curvature="hessian", damping=DAMPING, **options
    ).values
    dense = Words(nn.Embedding)
    damped = hessian(dense, train) + DAMPING * torch.eye(WORDS * WIDTH + 9, dtype=torch.float64)
    expected = gradients(dense, train) @ torch.linalg.solve(damped, gradients(dense, test).T)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert model.words.sparse


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("given", [True, False])
def test_words_that_a_forward_pass_would_shorten_are_refused(kind, given):
    """The weights, of the model or of a state that is given, are those that were there before."""
    model, (train, test) = Words(kind, max_norm=0.5), world()
    model.words.weight.requires_grad_(kind is nn.EmbeddingBag)  # of trained ones a layer rule says
    before = copy.deepcopy(model.state_dict())
    task = Task(model, checkpoints=[model.state_dict()] if given else None)
    with pytest.raises(InputError, match=r"longer than its max_norm=0.5.*embedding_renorm_"):
        dattri.attribute(task, train, test, method="grad-dot")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    with torch.no_grad():
        torch.embedding_renorm_(model.words.weight, torch.arange(WORDS), 0.5, 2.0)
    before = copy.deepcopy(model.state_dict())
    dense = Words(kind)
    dense.load_state_dict(before)
    scores = dattri.attribute(Task(model, parameters="out.*"), train, test, method="grad-dot")
    rows = [gradients(dense, batch)[:, WORDS * WIDTH :] for batch in (train, test)]
    torch.testing.assert_close(scores.values, rows[0] @ rows[1].T)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_that_a_batch_scales_have_no_products():
    model, (train, test) = Words(nn.Embedding, scale_grad_by_freq=True), world()
    options = {"method": "if-cg", "curvature": "ggn", "damping": 0.1}
    with pytest.raises(InputError, match=r"'words' has scale_grad_by_freq=True"):
        dattri.attribute(Task(model), train, test, **options)
    dattri.attribute(Task(model, parameters="out.*"), train, test, **options)
