"""The memory budget: how it is read, and what running out of memory looks like."""

import re

import pytest
import torch

from dattri_core import InputError, MemoryBudgetError
from dattri_core.memory import (
    DEFAULT_SHARE,
    free_bytes,
    is_out_of_memory,
    parse_bytes,
)

CPU = torch.device("cpu")
KIB, MIB, GIB = 2**10, 2**20, 2**30


# --- reading a budget ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16GiB", 16 * GIB),
        ("16 gib", 16 * GIB),
        ("16G", 16 * GIB),
        ("16GB", 16 * 10**9),
        ("1.5MiB", 3 * MIB // 2),
        (" 2048 KiB ", 2 * MIB),
        ("2097152", 2 * MIB),
        ("2097152b", 2 * MIB),
        (".5TiB", GIB * 512),
        ("1tb", 10**12),
        (3 * MIB, 3 * MIB),
        (3.0 * MIB, 3 * MIB),
    ],
)
def test_a_budget_is_a_number_with_a_unit(text, count):
    assert parse_bytes(text, CPU) == count


@pytest.mark.parametrize(
    "text", ["", "lots", "16 XiB", "GiB", "1.2.3GiB", ".", ".GiB", "-1GiB", "1e9", "16GiB!", "nan"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match=rf"^memory: {re.escape(repr(text))} is not a number"):
        parse_bytes(text, CPU)


@pytest.mark.parametrize("count", [0, -1, -(2**40), 1023, MIB - 1, "1023KiB", "0"])
def test_too_little_is_refused(count):
    with pytest.raises(InputError, match=r"too little to work in; give 1 MiB or more"):
        parse_bytes(count, CPU)


@pytest.mark.parametrize("count", [float("nan"), float("inf"), True, [16]])
def test_numbers_that_are_no_bytes_are_refused(count):
    with pytest.raises(InputError, match=r"^memory: .* is not a number of bytes"):
        parse_bytes(count, CPU)


def test_the_default_is_a_share_of_what_is_free():
    free, budget = free_bytes(CPU), parse_bytes(None, CPU)
    assert 0 < free < 2**50
    # Other processes come and go between the two readings.
    assert 0.5 * free * DEFAULT_SHARE <= budget <= 2 * free * DEFAULT_SHARE


# --- running out ----------------------------------------------------------------------------------
def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)  # what torch's CPU allocator says
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(MemoryBudgetError("already halved down to one"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
