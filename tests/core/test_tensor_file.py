"""Files of tensors: the bytes that the library safetensors writes."""

import pytest
import torch
from safetensors.torch import load, save

from dattri_core.tensor_file import NAMES, tensor_file


def written(tensors, metadata):
    return b"".join(bytes(part) for part in tensor_file(tensors, metadata))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_the_bytes_are_those_of_the_library(dtype):
    tensors = {
        "values": torch.arange(12).reshape(3, 4).to(dtype),
        "aux.b": torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64),
        "aux.a": torch.arange(3),
        "one": torch.tensor([[True]]),
        **{name: torch.zeros(1, dtype=dtype) for dtype, name in NAMES.items()},
    }
    got = written(tensors, {"facts": '{"a": 1}'})
    assert got == save(tensors, metadata={"facts": '{"a": 1}'})
    assert all(torch.equal(value, tensors[name]) for name, value in load(got).items())


def test_views_of_larger_tensors_and_no_rows():
    tensors = {"a": torch.arange(20.0).reshape(4, 5)[1:3, ::2], "b": torch.zeros(0, 3)}
    found = load(written(tensors, {"k": "é"}))
    assert torch.equal(found["a"], tensors["a"])
    assert found["b"].shape == (0, 3)
