"""Losses that mix examples, of data whose first examples are alike."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import dattri_core as dattri
from dattri_core import InputError, Task


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, left, right):
        return normalize(self.left(left)) @ normalize(self.right(right)).T


def contrastive(model, batch):
    """All other examples of the batch are negatives."""
    scores = model(*batch)
    return cross_entropy(scores, torch.arange(len(scores)), reduction="none")


@pytest.mark.parametrize("source", ["per-example", "functional"])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("alike", [3, 12])
def test_negatives_from_the_batch_are_refused(count, alike, source):
    torch.manual_seed(0)
    data = torch.randn(count, 3), torch.randn(count, 4)
    for values in data:
        values[:alike] = values[0].clone()
    with pytest.raises(InputError, match="mixes examples"):
        dattri.attribute(
            Task(Pairs(), loss=contrastive), data, data, method="grad-dot", source=source
        )


def test_a_sum_over_the_others_is_found_past_examples_that_are_alike():
    """Of copies of one example it is the same, however many."""

    def loss(model, batch):
        outputs = model(batch)[:, 0]
        return outputs + (outputs - outputs.mean()).square()

    data = torch.randn(12, 3)
    data[:3] = data[0].clone()
    with pytest.raises(InputError, match="mixes examples"):
        dattri.attribute(Task(nn.Linear(3, 1), loss=loss), data, data, method="grad-dot")


def plain_rows(model, loss, data):
    found = []
    for at in range(len(data[0])):
        value = loss(model, tuple(part[at : at + 1] for part in data)).sum()
        parts = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def with_a_bank(model, batch):
    bank = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4).sin()
    scores = torch.cat([model(*batch).diagonal()[:, None], model(batch[0], bank)], 1)
    return -scores.log_softmax(1)[:, 0]


def denoising(model, batch):
    clean, times, noise = batch  # [B, D], [B, K], [B, K, D]
    share = times.unsqueeze(-1)
    noisy = (1 - share) * clean.unsqueeze(1) + share * noise
    return (model(torch.cat([noisy, share], -1)) - noise).square().mean((1, 2))


def draws(count):
    return [torch.randn(count, *shape, dtype=torch.float64) for shape in ((3,), (6,), (6, 3))]


@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_numbers_that_a_loss_would_draw_are_in_the_batch(source):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).double()
    train, test = tuple(draws(7)), tuple(draws(3))
    got = dattri.attribute(
        Task(model, loss=denoising), train, test, method="grad-dot", source=source
    )
    want = plain_rows(model, denoising, train) @ plain_rows(model, denoising, test).T
    torch.testing.assert_close(got.values, want)


def test_negatives_from_a_bank():
    torch.manual_seed(0)
    model = Pairs().double()
    data = torch.randn(9, 3).double(), torch.randn(9, 4).double()
    train, test = (tuple(part[at] for part in data) for at in (slice(0, 6), slice(6, 9)))
    task = Task(model, loss=with_a_bank)
    got = dattri.attribute(task, train, test, method="grad-dot", source="functional")
    want = plain_rows(model, with_a_bank, train) @ plain_rows(model, with_a_bank, test).T
    torch.testing.assert_close(got.values, want)
    with pytest.raises(InputError, match="source 'functional'"):
        dattri.attribute(task, train, test, method="grad-dot")
