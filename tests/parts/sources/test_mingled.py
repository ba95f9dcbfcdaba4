"""Forward passes that put the examples of a batch in an order of their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dattri_core as dattri
from dattri_core import Examples, InputError, Task


class Sorting(nn.Module):
    """Sorts the batch by a key, as code for packed sequences does, and back at the end.

    The embedding of a position is added to what is sorted already: alone its outputs show nothing.
    """

    def __init__(self):
        super().__init__()
        self.words, self.place, self.out = nn.Linear(4, 6), nn.Embedding(1, 6), nn.Linear(6, 3)

    def forward(self, inputs, key):
        order = key.argsort(descending=True, stable=True)
        place = self.place(torch.zeros(len(key), dtype=torch.long))
        hidden = torch.tanh(self.words(inputs[order]) + place)
        return self.out(hidden[order.argsort()])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.net, self.out = nn.Linear(4, 4), nn.GRU(4, 5, batch_first=True), None
        self.out = nn.Linear(5, 3)

    def forward(self, inputs, key):
        lengths, order = key.sort(descending=True)
        hidden = self.words(inputs.unsqueeze(1).expand(-1, 9, -1)[order]).tanh()
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True)
        return self.out(self.net(packed)[1][-1][order.argsort()])


class Routed(nn.Module):
    """Each expert is called on the examples that are routed to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.out = nn.Linear(4, 3)

    def forward(self, inputs, key):
        mixed = torch.zeros_like(inputs)
        for at, expert in enumerate(self.experts):
            here = (key % 2 == at).nonzero()[:, 0]
            if len(here):
                mixed = mixed.index_add(0, here, expert(inputs[here]))
        return self.out(mixed.tanh())


def data(keys, seed=0):
    random = torch.Generator().manual_seed(seed)
    keys = torch.as_tensor(keys)
    return {
        "inputs": torch.randn(len(keys), 4, generator=random, dtype=torch.float64),
        "key": keys,
        "labels": torch.randint(3, (len(keys),), generator=random),
    }


def rows(model, batch):
    """Plain autograd, one example after another."""
    found = []
    for at in range(len(batch["labels"])):
        one = {name: value[at : at + 1] for name, value in batch.items()}
        loss = F.cross_entropy(model(one["inputs"], one["key"]), one["labels"])
        parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


ONE_EXPERT = [2, 1, 6, 1, 2, 3, 4, 5, 7, 4, 1, 8]  # of the first, the last, and that at 9
KEYS = {
    "one expert": ONE_EXPERT,
    "the first are sorted": [9, 8, 7, 1, 2, 9, 3, 6, 5, 4, 2, 8],
    "the first are alike": [5, 5, 5, 5, 9, 8, 2, 1, 7, 3, 6, 4],
    "all but one are alike": [5] * 11 + [6],
    "three": [9, 8, 7],
    "two": [9, 8],
}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("kind", [Sorting, Packed, Routed])
def test_rows_follow_their_examples(kind, keys):
    torch.manual_seed(0)
    model = kind().double()
    train, test = data(KEYS[keys]), data([3, 9, 4, 7, 1], seed=1)
    got = dattri.attribute(Task(model), train, test, method="grad-dot", progress=False)
    want = rows(model, train) @ rows(model, test).T
    torch.testing.assert_close(got.values, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["logra", "if-datainf", "if-woodbury", "grass", "factgrass"])
def test_experts_are_left_to_the_module_around_them(method):
    """Those whose calls are learned go to one expert, which is called as if on all examples."""
    torch.manual_seed(0)
    model = Routed().double()
    train, test = data(ONE_EXPERT), data([3, 2, 4, 7, 1], seed=1)
    loss = dattri.Loss(
        lambda model, batch: model(batch["inputs"], batch["key"]),
        lambda outputs, batch: F.cross_entropy(outputs, batch["labels"], reduction="none"),
    )
    task = Task(model, loss=loss)
    got = dattri.attribute(task, train, test, method=method, progress=False)
    assert torch.isfinite(got.values).all()
    if method == "if-woodbury":
        want = dattri.attribute(
            task, train, test, method=method, source="functional", progress=False
        )
        torch.testing.assert_close(got.values, want.values, rtol=1e-8, atol=1e-10)


def test_where_no_module_around_tells_examples_apart_the_refusal_names_the_rows():
    """The loss permutes, so that no module is around it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()

    def loss(model, batch):
        order = batch["key"].argsort(descending=True)
        outputs = model(batch["inputs"][order])[order.argsort()]
        return F.cross_entropy(outputs, batch["labels"], reduction="none")

    train = data(KEYS["the first are sorted"])
    with pytest.raises(InputError, match=r"rows of 'weight'.*another order.*source 'functional'"):
        dattri.attribute(Task(model, loss=loss), train, train, method="grad-dot", progress=False)


def test_the_sample_of_a_source_is_spread():
    """Else all examples that are looked at have one key."""
    train = data([1] * 10 + [2] * 2)
    assert 2 in Examples.of(train, "train").sample(8)["key"]


def test_a_model_whose_activations_are_large_is_looked_at_on_fewer_examples():
    """Nine at once may not fit where batches of four, halved as they are, do."""

    class Large(nn.Linear):
        def forward(self, inputs):
            if len(inputs) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(inputs)

    torch.manual_seed(0)
    inputs, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    large, plain = Large(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(large.state_dict())
    train, test = (inputs, labels), (inputs[:2], labels[:2])
    got, want = (
        dattri.attribute(Task(model), train, test, method="grad-dot", progress=False).values
        for model in (large, plain)
    )
    torch.testing.assert_close(got, want)
