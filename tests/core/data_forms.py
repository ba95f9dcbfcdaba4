"""All forms in which the same few examples can be given, and how to read them back."""

from collections import namedtuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from dattri_core.batch import batch_size, tensors_of

N = 11
X = torch.arange(N * 3, dtype=torch.float64).reshape(N, 3)
Y = torch.arange(N) * 7 % 5
SENTENCES = [torch.arange(1, 2 + i % 4) + 10 * i for i in range(N)]
Pair = namedtuple("Pair", ["inputs", "labels"])


class Items(Dataset):
    """A map-style data set of (x, y) without tensors of its own."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        if not 0 <= i < N:
            raise IndexError(i)
        return X[i], int(Y[i])


class Stream(IterableDataset):
    """Examples that can only be read from the start."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def pad(items):
    longest = max(len(words) for words in items)
    return {
        "tokens": torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for w in items]),
        "length": torch.tensor([len(w) for w in items]),
    }


def plain():
    return X, Y


FORMS = {
    "tuple": (plain, range(N)),
    "tensor": (lambda: X, range(N)),
    "array": (lambda: X.numpy(), range(N)),
    "dict": (lambda: {"x": X, "labels": Y}, range(N)),
    "nest": (lambda: ({"a": X, "b": (X + 1, X + 2)}, Y), range(N)),
    "named tuple": (lambda: Pair(X, Y), range(N)),
    "tensor data set": (lambda: TensorDataset(X, Y), range(N)),
    "data set": (Items, range(N)),
    "list": (lambda: list(zip(X, Y, strict=True)), range(N)),
    "list of dicts": (lambda: [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)], range(N)),
    "loader": (lambda: DataLoader(Items(), batch_size=4), range(N)),
    "loader, workers": (lambda: DataLoader(Items(), batch_size=4, num_workers=1), range(N)),
    "loader, last batch dropped": (
        lambda: DataLoader(Items(), batch_size=4, drop_last=True),
        range(8),
    ),
    "loader of a subset": (
        lambda: DataLoader(Subset(Items(), [5, 2, 9]), batch_size=2),
        [5, 2, 9],
    ),
    "loader, fixed sampler": (
        lambda: DataLoader(Items(), batch_size=3, sampler=[4, 0, 10, 7]),
        [4, 0, 10, 7],
    ),
    "loader, fixed batch sampler": (
        lambda: DataLoader(Items(), batch_sampler=[[3, 1], [0], [8, 6, 2]]),
        [3, 1, 0, 8, 6, 2],
    ),
    "loader, sampler of batches": (
        lambda: DataLoader(
            Items(), sampler=BatchSampler(SequentialSampler(Items()), 4, False), batch_size=None
        ),
        None,
    ),
    "stream": (Stream, range(N)),
    "loader of a stream": (lambda: DataLoader(Stream(), batch_size=4), range(N)),
    "loader that pads": (lambda: DataLoader(SENTENCES, batch_size=3, collate_fn=pad), "padded"),
}
ROWS = {name: form for name, form in FORMS.items() if form[1] is not None}


def first_tensor(batch):
    return tensors_of(batch)[0]


def words(batch):
    return [
        row[:length].tolist() for row, length in zip(batch["tokens"], batch["length"], strict=True)
    ]


def read(examples, size, **span):
    """Return what each position holds, in the order read, and check the sizes of batches."""
    positions, content = [], []
    for index, batch in examples.batches(size, **span):
        assert 0 < len(index) == batch_size(batch) <= size
        positions += index.tolist()
        content += (
            words(batch)
            if isinstance(batch, dict) and "tokens" in batch
            else list(batch_rows(batch))
        )
    return positions, content


def batch_rows(batch):
    return zip(
        *(t.flatten(1).tolist() if t.dim() > 1 else t.tolist() for t in tensors_of(batch)),
        strict=True,
    )


def expected(name, order):
    if order == "padded":
        return [sentence.tolist() for sentence in SENTENCES]
    forms = {
        "tensor": (X,),
        "array": (X,),
        "nest": (X, X + 1, X + 2, Y),
    }
    parts = forms.get(name, (X, Y))
    return [tuple(t[i].tolist() for t in parts) for i in order]


class Changing(IterableDataset):
    """A stream whose passes differ: `passes[k]` is what the k-th pass gives, the last one stays."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])
