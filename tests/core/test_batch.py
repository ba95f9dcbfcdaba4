"""Batches of any nest."""

from collections import OrderedDict, namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import InputError
from dattri_core.batch import batch_size, digest, join, map_tensors, move, take, tensors_of

Pair = namedtuple("Pair", "x y")


@st.composite
def nests(draw, count):
    """Any nest of tensors with ``count`` examples, and other leaves."""

    def leaf():
        shape = draw(st.lists(st.integers(1, 3), max_size=2))
        seed = draw(st.integers(0, 99))
        kind = draw(st.sampled_from(["float", "long", "bool", "numpy", "bfloat16"]))
        values = torch.randint(9, (count, *shape), generator=torch.Generator().manual_seed(seed))
        if kind == "numpy":
            return values.double().numpy()
        kinds = {"float": torch.float, "long": torch.long, "bool": torch.bool}
        return values.to(kinds.get(kind, torch.bfloat16))

    def nest(depth):
        kind = (
            draw(st.sampled_from(["leaf", "tuple", "list", "dict", "named"])) if depth else "leaf"
        )
        if kind == "leaf":
            return leaf()
        if kind == "named":
            return Pair(nest(depth - 1), nest(depth - 1))
        parts = [nest(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        if kind == "dict":
            return {f"k{i}": part for i, part in enumerate(parts)} | {"note": "a string", "n": None}
        return tuple(parts) if kind == "tuple" else parts

    return nest(3)


def same(left, right):
    left, right = tensors_of(left), tensors_of(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@given(st.data(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_cutting_and_joining_gives_the_batch_back(data, count):
    batch = data.draw(nests(count))
    assert batch_size(batch) == count
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    edges = [0, *cuts, count]
    pieces = [take(batch, slice(a, b)) for a, b in pairwise(edges)]
    assert sum(batch_size(piece) for piece in pieces) == count
    same(join(pieces), batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    same(take(take(batch, order), order.argsort()), batch)
    for whole, one in zip(tensors_of(batch), tensors_of(take(batch, order[:1])), strict=True):
        assert torch.equal(one[0], whole[order[0]])
    same(move(batch, torch.device("cpu")), batch)


@given(st.data(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_digest_tells_batches_apart(data, count):
    batch = data.draw(nests(count))
    first = digest(batch)
    assert first == digest(map_tensors(torch.clone, batch))
    tensors = [t.clone() for t in tensors_of(batch)]
    assert digest(tensors) == first
    at = data.draw(st.integers(0, len(tensors) - 1))
    flat = tensors[at].view(-1)
    entry = data.draw(st.integers(0, flat.numel() - 1))
    flat[entry] = ~flat[entry] if flat.dtype == torch.bool else flat[entry] + 1
    assert digest(tensors) != first


def test_a_digest_sees_shape_and_dtype():
    values = torch.zeros(4, 3)
    others = [torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3, 1)]
    assert len({digest(v) for v in (values, *others)}) == 4
    assert digest(torch.zeros(3, 4).T) == digest(values)  # strides are no content


def test_types_of_a_nest_are_kept():
    batch = Pair(torch.zeros(2), [np.zeros(2), (torch.ones(2), "text")])
    mapped = map_tensors(lambda t: t + 1, batch)
    assert isinstance(mapped, Pair)
    assert isinstance(mapped.y, list)
    assert mapped.y[1][1] == "text"
    assert isinstance(mapped.y[0], torch.Tensor)
    assert list(map_tensors(lambda t: t, OrderedDict(b=torch.zeros(1), a=torch.ones(1)))) == [
        "b",
        "a",
    ]


def test_a_hugging_face_batch_is_a_mapping():
    from collections import UserDict

    encoding = UserDict(input_ids=torch.zeros(3, 4), labels=torch.arange(3))
    assert batch_size(encoding) == 3
    assert take(encoding, slice(1, 3))["labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), r"disagree on the number of examples; .*\(3,\), \(4,\)"),
        ({"x": torch.tensor(1.0)}, "no axis of examples"),
        ("text", "no tensor in a str"),
        ([], "no tensor in a list"),
    ],
)
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        batch_size(batch)


def test_a_batch_on_meta_is_refused():
    with pytest.raises(InputError, match="on the device 'meta'"):
        move((torch.zeros(3, device="meta"),), torch.device("cpu"))


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_a_copy_to_the_host_is_waited_for(device, waits, monkeypatch):
    """What does not wait would be read before it has arrived."""
    asked = []
    copy = torch.Tensor.to

    def seen(self, *args, non_blocking=False, **kwargs):
        asked.append(non_blocking)
        return copy(self, *args, non_blocking=non_blocking, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", seen)
    move((torch.ones(2),), torch.device(device))
    assert asked == [not waits]
