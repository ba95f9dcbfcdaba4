"""Examples of unequal length: what depends on how far they are padded is refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dattri_core as dattri
from dattri_core import InputError, Task


class Mean(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.words, self.out, self.how = nn.Embedding(11, 5), nn.Linear(5, 3), how

    def forward(self, words):
        hidden, there = self.words(words), (words > 0).unsqueeze(-1)
        if self.how == "masked":
            hidden = (hidden * there).sum(1) / there.sum(1)
        elif self.how == "padded":
            hidden = hidden.mean(1)
        else:  # a value that padding leaves alone, and a gradient that it does not
            right = (hidden * there).sum(1) / there.sum(1)
            hidden = right.detach() + hidden.mean(1) - hidden.mean(1).detach()
        return self.out(hidden)


def loader(lengths, most=0):
    torch.manual_seed(1)
    items = [(torch.randint(1, 11, (length,)), torch.tensor(length % 3)) for length in lengths]

    def pad(some):
        words = nn.utils.rnn.pad_sequence([words for words, _ in some], batch_first=True)
        words = nn.functional.pad(words, (0, max(0, most - words.shape[1])))
        return words, torch.stack([label for _, label in some])

    return DataLoader(items, batch_size=4, collate_fn=pad)


UNEQUAL, EQUAL = [4, 4, 4, 4, 7, 2, 4, 9, 4, 6], [5] * 10
FAR = [31, 17, 2, 9, 5, 23, 40, 3, 14, 11]


def attribute(how, train, test):
    torch.manual_seed(0)
    task = Task(Mean(how).double())
    return dattri.attribute(task, train, test, method="grad-dot", progress=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("padded", r"'cross-entropy': depends on padding: train example \d has .* alone and"),
        ("gradient", r"gradient depends on padding: the row of train example \d alone differs"),
    ],
)
def test_what_depends_on_padding_is_refused(how, message):
    with pytest.raises(InputError, match=message + ".*mask"):
        attribute(how, loader(UNEQUAL), loader(EQUAL))


def test_the_test_set_is_looked_at_too():
    with pytest.raises(InputError, match=r"depends on padding: test example \d has"):
        attribute("padded", loader(EQUAL), loader(UNEQUAL))


@pytest.mark.parametrize(
    ("how", "train"),
    [
        ("masked", loader(UNEQUAL)),
        ("padded", loader(EQUAL)),
        ("padded", loader(UNEQUAL, most=12)),  # to one length, whatever the batch
    ],
    ids=["masked", "equal", "to one length"],
)
def test_what_does_not_is_taken(how, train):
    assert attribute(how, train, loader(EQUAL)).values.shape == (10, 10)


class Narrow(nn.Module):
    """Mean over the tokens that are there, of a transformer in half precision."""

    def __init__(self, how, masked=True):
        super().__init__()
        self.how, self.masked = how, masked
        self.words, self.out = nn.Embedding(11, 32), nn.Linear(32, 3)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.deep = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        with torch.no_grad():
            self.out.weight.mul_(30)
        if how != "autocast":
            self.to(how)

    def forward(self, words):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            there = (words > 0).unsqueeze(-1)
            mask = words == 0 if self.masked else None
            hidden = self.deep(self.words(words), src_key_padding_mask=mask)
            return self.out((hidden * there).sum(1) / there.sum(1)).float()


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_under_a_loss_in_float32_is_taken(how, seed):
    """The loss has the digits of the logits, not those of its own dtype."""
    torch.manual_seed(seed)
    task = Task(Narrow(how))
    found = dattri.attribute(task, loader(FAR), loader(EQUAL), method="grad-dot")
    assert found.values.shape == (10, 10)


@pytest.mark.parametrize("how", [torch.bfloat16, "autocast"], ids=str)
def test_padding_that_counts_is_refused_in_half_precision_too(how):
    torch.manual_seed(0)
    with pytest.raises(InputError, match="depends on padding"):
        dattri.attribute(
            Task(Narrow(how, masked=False)), loader(UNEQUAL), loader(EQUAL), method="grad-dot"
        )


class Positions(nn.Module):
    """Words and learned positions, counted from the left end unless they are given."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 4), nn.Embedding(12, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        hidden = (self.words(input_ids) * self.positions(position_ids)).tanh()
        return self.head((hidden * attention_mask.unsqueeze(-1)).sum(1))


def left_padded(items, *, with_positions):
    most = max(len(words) for words, _ in items)
    ids = torch.stack([nn.functional.pad(words, (most - len(words), 0)) for words, _ in items])
    mask = (ids > 0).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if with_positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {**batch, "labels": torch.stack([label for _, label in items])}


def test_padding_on_the_left_needs_positions_and_is_then_none():
    torch.manual_seed(0)
    items = [(torch.randint(1, 11, (n,)), torch.tensor(n % 3)) for n in [4, 4, 7, 2, 4, 9, 4, 6]]
    task = Task(Positions().double())

    def scores(collate):
        given = DataLoader(items, batch_size=4, collate_fn=collate)
        return dattri.attribute(task, given, given, method="grad-dot", progress=False).values

    with pytest.raises(InputError, match=r"depends on padding.*position_ids where padding comes"):
        scores(lambda some: left_padded(some, with_positions=False))
    rows = []
    for item in items:
        batch = left_padded([item], with_positions=False)
        loss = dattri.cross_entropy(task.model, batch).sum()
        found = torch.autograd.grad(loss, list(task.model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    want = torch.stack(rows) @ torch.stack(rows).T
    got = scores(lambda some: left_padded(some, with_positions=True))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
