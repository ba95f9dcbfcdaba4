"""Streams: whatever the data are given as, example i is example i, in batches of any size."""

from collections import namedtuple

import numpy as np
import pytest
import torch
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


class Changing(IterableDataset):
    """A stream whose passes differ: `passes[k]` is what the k-th pass gives, the last one stays."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0) if len(self.passes) > 1 else self.passes[0])


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


# --- fingerprints -------------------------------------------------------------------------------
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
