"""Streams: hashes of the data, of a few examples and of all."""

import pytest
import torch
from data_forms import ROWS, SENTENCES, Changing, X
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)

from dattri_core import Examples


@pytest.mark.parametrize("name", ROWS)
def test_the_fingerprint_is_that_of_the_content(name):
    make, _ = ROWS[name]
    assert Examples.of(make(), "train").fingerprint == Examples.of(make(), "test").fingerprint


def test_the_fingerprint_changes_with_a_number_the_order_and_the_length():
    changed = X.clone()
    changed[-1, -1] += 1e-9
    for wrap in (lambda x: x, list, lambda x: DataLoader(Changing(list(x)), batch_size=3)):
        prints = {
            Examples.of(wrap(x), "train").fingerprint for x in (X, changed, X[:-1], X.flip(0))
        }
        assert len(prints) == 4


class Many(Dataset):
    """More examples than are sampled, one of which may be another."""

    def __init__(self, n=300, changed=None, what="number"):
        self.n, self.changed, self.what = n, changed, what

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x, text = torch.tensor([float(i), 1.0]), f"text {i}"
        if i == self.changed and self.what == "number":
            x = x + 1e-3
        if i == self.changed and self.what == "text":
            text += "!"
        return {"x": x, "text": text}


def contents(make, ns=(0, 1, 150, 151, 299)):
    return [Examples.of(make(), "train").content] + [
        Examples.of(make(changed=at), "train").content for at in ns
    ]


@pytest.mark.parametrize("what", ["number", "text"])
@pytest.mark.parametrize(
    "wrap",
    [lambda d: d, lambda d: DataLoader(d, batch_size=7), lambda d: [d[i] for i in range(300)]],
)
def test_the_content_is_a_hash_of_every_example(wrap, what):
    found = contents(lambda changed=None: wrap(Many(changed=changed, what=what)))
    assert len(set(found)) == 6
    assert contents(lambda changed=None: wrap(Many(changed=changed, what=what)), ()) == found[:1]


def test_a_fingerprint_says_whether_it_is_of_some_examples_only():
    few, many = Examples.of(Many(64), "train"), Examples.of(Many(65), "train")
    assert many.fingerprint.startswith("sampled-")
    assert not few.fingerprint.startswith("sampled-")
    assert Examples.of(Many(300, changed=150), "train").fingerprint == (
        Examples.of(Many(300), "train").fingerprint
    )


def test_tensors_and_streams_are_hashed_whole_without_a_pass():
    x = torch.arange(600.0).reshape(300, 2)
    for wrap in (
        lambda x: x,
        lambda x: (x,),
        lambda x: {"x": x},
        TensorDataset,
        lambda x: DataLoader(TensorDataset(x), batch_size=8),
        lambda x: DataLoader(TensorDataset(x), batch_size=8, sampler=list(range(299, -1, -1))),
        lambda x: DataLoader(Changing(list(x)), batch_size=8),
    ):
        examples = Examples.of(wrap(x), "train")
        read = examples.reads
        assert examples.known_whole
        assert examples.content == examples.fingerprint
        assert examples.reads == read
        other = x.clone()
        other[150, 1] += 1
        assert Examples.of(wrap(other), "train").content != examples.content


def test_orders_keys_and_collate_functions_are_part_of_the_content():
    x = torch.arange(600.0).reshape(300, 2)

    class Named(TensorDataset):
        """A data set that gives something else than its tensors."""

        def __getitem__(self, i):
            return (super().__getitem__(i)[0] + shift,)

    shift = 1.0
    data = TensorDataset(x)
    makes = [
        lambda: data,
        lambda: DataLoader(data, sampler=[1, 0, *range(2, 300)]),
        lambda: DataLoader(data, sampler=list(range(299))),
        lambda: DataLoader(
            data, collate_fn=lambda items: (torch.stack([i[0] for i in items]) * 2,)
        ),
        lambda: Named(x),
        lambda: {"x": x, "y": x + 1},
        lambda: {"y": x, "x": x + 1},
    ]
    assert len({Examples.of(make(), "train").content for make in makes}) == len(makes)


def test_the_content_is_read_once_and_that_of_positions_is_that_of_the_examples():
    examples = Examples.of(Many(), "train")
    whole = examples.positions()
    before = examples.reads
    assert whole.content == examples.content == whole.content
    assert examples.reads == before + 300
    assert whole.ids == examples.ids
    assert torch.equal(whole.take(torch.tensor([5, 2])), torch.tensor([5, 2]))


def test_examples_that_make_no_batch_together_are_hashed_one_by_one():
    other = [s.clone() for s in SENTENCES]
    other[6][0] += 1
    first, second = (Examples.of(data, "train").content for data in (SENTENCES, other))
    assert first != second
