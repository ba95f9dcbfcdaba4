"""Products of half precision: exact terms, sums in float32, also where tensor cores make them."""

from __future__ import annotations

import pytest
import torch

from dattri_core.blocks import OuterBlock
from dattri_core.blocks.inputs import aligned, product
from dattri_core.moments import factor_sums, square_sum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((7, 40), (40, 9)), ((3, 7, 40), (3, 40, 9)), ((0, 4), (4, 2))])
def test_products_are_those_of_float32(device, dtype, shapes) -> None:
    left, right = (
        drawn(*shape, seed=k, dtype=dtype, device=device) for k, shape in enumerate(shapes)
    )
    found = product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_half_precision_are_summed_in_float32(device, dtype) -> None:
    outputs = drawn(5, 300, 6, seed=0, dtype=dtype, device=device)
    inputs = drawn(5, 300, 8, seed=1, dtype=dtype, device=device)
    block, wide = OuterBlock(outputs, inputs), OuterBlock(outputs.double(), inputs.double())
    sums, want = factor_sums(block), factor_sums(wide)
    loose = 1e-5 if device == "cpu" else 3e-5  # sums in half precision are off by 1e-3
    for got, exact in (
        (block.dense().values, wide.dense().values),
        (block.inner(block), wide.inner(wide)),
        (block.pair_inner(block), wide.pair_inner(wide)),
        (sums.outputs, want.outputs),
        (sums.inputs, want.inputs),
        (square_sum(block), square_sum(wide)),
    ):
        assert got.dtype == torch.float32
        scale = float(exact.abs().max())
        # Tensor cores cut sums off where float32 rounds them.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=loose * scale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("rows", [8, 9])
@pytest.mark.parametrize("inner", [16, 13])
@pytest.mark.parametrize("columns", [24, 25])
@pytest.mark.parametrize("by_rows", [(True, True), (True, False), (False, True), (False, False)])
def test_aligned_factors_have_the_same_product(dtype, rows, inner, columns, by_rows) -> None:
    left, right = (
        drawn(*shape, seed=k, dtype=dtype, device="cpu")
        for k, shape in enumerate(((3, rows, inner), (3, inner, columns)))
    )
    left, right = (
        side if straight else side.mT.contiguous().mT
        for side, straight in zip((left, right), by_rows, strict=True)
    )
    wide_left, wide_right = aligned(left, right)
    found = (wide_left.double() @ wide_right.double())[:, :rows, :columns]
    torch.testing.assert_close(found, left.double() @ right.double(), rtol=0, atol=1e-12)
    for side in (wide_left, wide_right):
        line = side.shape[-1] if side.stride(-1) == 1 else side.shape[-2]
        assert line * side.element_size() % 16 == 0
