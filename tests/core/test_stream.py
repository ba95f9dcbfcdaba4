"""Streams: whatever the data are given as, example i is example i, in batches of any size."""

import numpy as np
import pytest
import torch
from data_forms import (
    ROWS,
    SENTENCES,
    Changing,
    Items,
    N,
    Stream,
    X,
    Y,
    batch_rows,
    expected,
    read,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dattri_core import Examples, InputError
from dattri_core.batch import batch_size


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_batches_of_any_size_and_range_hold_the_same_examples(name, data):
    make, order = ROWS[name]
    examples = Examples.of(make(), "train")
    want = expected(name, order)
    n = len(want)
    assert len(examples) == n
    size = data.draw(st.integers(1, n + 3), "size")
    start = data.draw(st.integers(0, n - 1), "start")
    stop = data.draw(st.integers(start + 1, n + 2), "stop")
    assert read(examples, size) == (list(range(n)), want)
    assert read(examples, size, start=start, stop=stop) == (
        list(range(start, min(stop, n))),
        want[start:stop],
    )


@pytest.mark.parametrize("name", ROWS)
def test_take_gives_the_asked_positions_in_the_asked_order(name):
    make, order = ROWS[name]
    examples = Examples.of(make(), "train")
    want = expected(name, order)
    asked = [2, 0, 2, len(want) - 1]
    batch = examples.take(torch.tensor(asked))
    got = words(batch) if order == "padded" else list(batch_rows(batch))
    assert got == [want[i] for i in asked]


@pytest.mark.parametrize("name", ROWS)
def test_a_sample_is_repeated_when_there_are_too_few(name):
    make, order = ROWS[name]
    examples = Examples.of(make(), "train")
    want = expected(name, order)
    count = len(want) + 2
    index, batch = examples.sampled(count)
    got = words(batch) if order == "padded" else list(batch_rows(batch))
    assert got == [want[i] for i in index.tolist()]
    assert sorted(index[: len(want)].tolist()) == list(range(len(want)))
    assert index[len(want) :].tolist() == index[:2].tolist()
    assert index[0] == 0
    assert batch_size(examples.sample(2)) == 2


@pytest.mark.parametrize("kind", ["tensors", "items"])
def test_a_sample_holds_examples_that_differ(kind):
    """The first five of a hundred are one example, and so are all others but two."""
    values = torch.zeros(100, 2)
    values[99], values[57] = 1.0, 2.0  # 57 is one of the eight evenly spaced
    examples = Examples.of(values if kind == "tensors" else list(values), "train")
    index, batch = examples.sampled(3)
    assert index.tolist() == [0, 99, 57]
    assert batch[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert examples.sampled(1)[0].tolist() == [0]
    index, batch = examples.sampled(8)
    assert len(set(index.tolist())) == 8
    assert batch[:3, 0].tolist() == [0.0, 1.0, 2.0]


def test_a_stream_that_cannot_be_indexed_is_sampled_in_front():
    index, _ = Examples.of(DataLoader(Stream(), batch_size=4), "train").sampled(3)
    assert index.tolist() == [0, 1, 2]


def test_ids_are_positions_in_the_data_set_of_the_loader():
    assert Examples.of(Items(), "train").ids == range(N)
    assert Examples.of(DataLoader(Items(), sampler=[4, 0, 10]), "train").ids == [4, 0, 10]
    loader = DataLoader(Items(), batch_sampler=[[3, 1], [0]])
    assert Examples.of(loader, "train").ids == [3, 1, 0]
    assert Examples.of(DataLoader(Stream(), batch_size=4), "train").ids == range(N)


def test_ids_are_positions_of_the_stream_when_the_loader_repeats_an_example():
    """Ids must differ, or the scores could not be made after the work is done."""
    examples = Examples.of(DataLoader(Items(), sampler=[4, 0, 4]), "train")
    assert list(examples.ids) == [0, 1, 2]
    assert read(examples, 2)[1] == [expected("x", [i])[0] for i in (4, 0, 4)]


def test_a_loader_without_automatic_batching_gives_its_batches():
    sampler = BatchSampler(SequentialSampler(TensorDataset(X, Y)), 4, False)
    loader = DataLoader(TensorDataset(X, Y), sampler=sampler, batch_size=None)
    assert read(Examples.of(loader, "train"), 3) == (list(range(N)), expected("x", range(N)))


def test_a_stream_of_examples_is_read_once_more_only_as_far_as_is_needed():
    """A range in the middle costs the batches before and in it, not those after it."""
    served = []

    class Counting(IterableDataset):
        def __iter__(self):
            for i, x in enumerate(X):
                served.append(i)
                yield x

    examples = Examples.of(DataLoader(Counting(), batch_size=2), "train")
    served.clear()
    assert read(examples, 2, start=2, stop=4)[0] == [2, 3]
    assert max(served) < 6


# --- refused ------------------------------------------------------------------------------------
class ShuffledBatches:
    """A batch sampler that draws a new order on every pass."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __len__(self):
        return 3

    def __iter__(self):
        order = self.generator.permutation(N).tolist()
        return iter([order[:4], order[4:8], order[8:]])


SHUFFLING = {
    "shuffle": lambda: DataLoader(Items(), shuffle=True),
    "seeded": lambda: DataLoader(Items(), shuffle=True, generator=torch.Generator().manual_seed(0)),
    "random sampler": lambda: DataLoader(Items(), sampler=RandomSampler(Items())),
    "one example": lambda: DataLoader(Subset(Items(), [0]), shuffle=True),
    "subset random sampler": lambda: DataLoader(
        Items(), sampler=SubsetRandomSampler([1, 2], generator=torch.Generator().manual_seed(1))
    ),
    "weighted sampler": lambda: DataLoader(
        Items(), sampler=WeightedRandomSampler([1.0] * N, num_samples=4)
    ),
    "batches of a random sampler": lambda: DataLoader(
        Items(), batch_sampler=BatchSampler(RandomSampler(Items()), 4, False)
    ),
    "batch sampler that shuffles": lambda: DataLoader(Items(), batch_sampler=ShuffledBatches(0)),
}


@pytest.mark.parametrize("name", SHUFFLING)
def test_a_shuffling_loader_is_refused(name):
    with pytest.raises(InputError, match=r"^train data: the loader shuffles .*shuffle=False"):
        Examples.of(SHUFFLING[name](), "train")


FORWARD = list(X)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (FORWARD[::-1], "differs from the one read there before"),
        (FORWARD[:-1], "gave 10 examples in this pass and 11 in the first"),
        ([*FORWARD, X[0]], "the batch at example 11 differs"),
        ([*FORWARD[:-1], X[0]], "the batch at example 10 differs"),
    ],
)
@pytest.mark.parametrize("good_passes", [1, 2])
def test_a_stream_that_changes_between_passes_is_refused(later, message, good_passes):
    loader = DataLoader(Changing(*[FORWARD] * good_passes, later), batch_size=1)

    def use():
        examples = Examples.of(loader, "test")
        return list(examples.batches(4))

    with pytest.raises(InputError, match=rf"^test data: .*{message}"):
        use()


def test_a_stream_that_changes_in_the_second_pass_is_refused_before_any_work():
    with pytest.raises(InputError, match="differs"):
        Examples.of(DataLoader(Changing(FORWARD, FORWARD[::-1]), batch_size=2), "train")


@pytest.mark.parametrize(
    "empty",
    [
        lambda: (X[:0], Y[:0]),
        list,
        lambda: TensorDataset(X[:0]),
        lambda: DataLoader(TensorDataset(X[:0]), batch_size=2),
        lambda: DataLoader(Items(), sampler=[], batch_size=2),
        lambda: DataLoader(Items(), batch_sampler=[]),
        lambda: DataLoader(Changing([]), batch_size=2),
        lambda: DataLoader(Subset(Items(), [0, 1]), batch_size=3, drop_last=True),
    ],
)
def test_empty_data_are_refused(empty):
    with pytest.raises(InputError, match=r"^train data: empty; at least one example"):
        Examples.of(empty(), "train")


class Flipped(Dataset):
    """Random flips, as a forgotten augmentation gives: every second reading is the mirror image."""

    def __init__(self, seed, chance):
        self.generator = np.random.default_rng(seed)
        self.chance = chance

    def __len__(self):
        return 50

    def __getitem__(self, i):
        image = torch.arange(4.0) + i
        return image.flip(0) if self.generator.random() < self.chance else image


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: DataLoader(d, batch_size=4)])
def test_random_augmentation_is_refused(wrap):
    for seed in range(100):  # a flip with even odds must not slip through by luck
        with pytest.raises(InputError, match=r"differs when it is read .*augmentation"):
            Examples.of(wrap(Flipped(seed, 0.5)), "train")


def test_random_augmentation_that_is_rare_is_mostly_refused():
    def refused(seed):
        try:
            Examples.of(Flipped(seed, 0.2), "train")
        except InputError:
            return True
        return False

    assert sum(refused(seed) for seed in range(50)) >= 48


@pytest.mark.parametrize("data", [3, object(), None, {"a": 1}])
def test_other_things_are_refused(data):
    with pytest.raises(InputError, match=r"^train data: got a .*; give a Dataset"):
        Examples.of(data, "train")


def test_tensors_that_disagree_on_the_number_of_examples():
    with pytest.raises(InputError, match="disagree"):
        Examples.of((X, Y[:-1]), "train")


def test_examples_that_do_not_stack_ask_for_a_collate_function():
    with pytest.raises(InputError, match=r"cannot be put into one batch.*collate_fn that pads"):
        list(Examples.of(SENTENCES, "train").batches(4))


def test_a_collate_function_that_drops_examples_is_refused():
    """Row i of the scores would be another example."""

    def drop(items):
        return torch.stack([x for x, _ in items if len(items) == 1 or x[0] != 15])

    examples = Examples.of(DataLoader(Items(), batch_size=4, collate_fn=drop), "train")
    with pytest.raises(InputError, match=r"a batch of 3 of examples 4 to 7, which are 4"):
        list(examples.batches(4))
    empty = DataLoader(Items(), collate_fn=lambda items: torch.stack([]))
    with pytest.raises(InputError, match=r"example 0 cannot.*batch of any one example"):
        Examples.of(empty, "train")


def test_what_a_data_set_raises_names_the_example():
    class Broken(Items):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("no such picture")
            return super().__getitem__(i)

    loader = DataLoader(Broken(), sampler=[0, 1, 2, 7, 3])
    with pytest.raises(InputError, match=r"example 3 cannot be read.*OSError: no such picture"):
        list(Examples.of(loader, "train").batches(2))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_an_example_passes(error):
    class Full(Items):
        def __getitem__(self, i):
            raise error

    with pytest.raises(error):
        Examples.of(Full(), "train")


def test_nested_tensors_are_refused_with_what_to_give():
    nested = torch.nested.nested_tensor([X[:2], X[:3]], layout=torch.jagged)
    for data in (nested, (nested, Y[:2]), {"x": nested, "y": Y[:2]}):
        with pytest.raises(InputError, match=r"nested tensor of 2 examples.*to_padded_tensor"):
            Examples.of(data, "train")
    loader = DataLoader(Items(), batch_size=2, collate_fn=lambda items: (nested,))
    with pytest.raises(InputError, match=r"nested tensor"):
        Examples.of(loader, "train")
