"""Prompt tuning: outputs of virtual tokens, which have no labels of the user's."""

import pytest
import torch
from torch import nn

import dattri_core as dattri


class Prompted(nn.Module):
    """Embeddings that are trained before those of the inputs; all else is frozen."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.prompt, self.words = nn.Embedding(3, 6), nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9)
        self.words.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, input_ids):
        before = self.prompt.weight.repeat(len(input_ids), 1, 1)
        hidden = torch.cat([before, self.words(input_ids)], 1)
        return self.head(torch.tanh(hidden.cumsum(1)))


def data(count, seed):
    return torch.randint(9, (count, 5), generator=torch.Generator().manual_seed(seed))


def test_labels_without_those_of_virtual_tokens_are_refused_with_the_cure():
    ids = data(4, 1)
    with pytest.raises(dattri.InputError, match=r"3 virtual tokens .* give 3 labels of -100"):
        dattri.attribute(
            dattri.Task(Prompted().eval(), "causal-lm"), (ids, ids), (ids, ids), method="grad-dot"
        )


def test_with_the_cure_scores_are_those_of_single_backward_passes():
    model, rows, sides = Prompted().eval(), [], []
    for ids in (data(4, 1), data(2, 2)):
        labels = torch.cat([torch.full((len(ids), 3), -100), ids], 1)
        sides.append((ids, labels))
        grads = []
        for one in ids:
            # the last virtual token predicts the first word, and so on
            logits = model(one[None])[0, 2:-1]
            loss = nn.functional.cross_entropy(logits, one, reduction="sum")
            grads.append(torch.autograd.grad(loss, model.prompt.weight)[0].flatten())
        rows.append(torch.stack(grads))
    found = dattri.attribute(dattri.Task(model, "causal-lm"), *sides, method="grad-dot")
    torch.testing.assert_close(torch.as_tensor(found.values), rows[0] @ rows[1].T)
