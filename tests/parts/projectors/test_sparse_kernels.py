"""The matrices of `sjlt` and `mask` entry by entry; kernels against them at any cut and offset."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from dattri_parts.projectors import sjlt
from dattri_parts.projectors.mask import MaskKernel
from dattri_parts.projectors.philox import philox
from dattri_parts.projectors.sampling import sorted_sample
from dattri_parts.projectors.sjlt import SparseKernel
from oracles.devices import DEVICES

from dattri_core import DenseBlock, OneHot, OuterBlock, RandomStream

KEY = 0x1234_5678_9ABC_DEF0
SIZE = 2**11


def words(counter, key=KEY):
    counter = tuple(np.full(1, word, dtype=np.int64) for word in counter)
    return [int(word[0]) for word in philox(counter, key)]


def plain_column(d, rows, nonzeros):
    """Return the signs of column d by row: the definition, spelled entry by entry."""
    height, column = rows // nonzeros, {}
    for j in range(nonzeros):
        word = words((d // 4 & 0xFFFFFFFF, j, 2, d // 4 >> 32))[d % 4]
        e, span = d % 128, d // 512
        at = 4 * span + e // 2 % 4
        bits = words((at & 0xFFFFFFFF, j, 0, at >> 32))[d // 128 % 4]
        column[j * height + (word * height >> 32)] = 1 - 2 * (
            bits >> (15 + 16 * (e % 2) - e // 8) & 1
        )
    return column


@pytest.mark.parametrize(("rows", "nonzeros"), [(8, 1), (12, 3), (5, 5)])
@pytest.mark.parametrize("start", [0, 2**31 - 256, 2**33, 2**37 + 3])
def test_entries_of_sjlt_lie_where_the_definition_says(rows, nonzeros, start):
    matrix = SparseKernel(KEY, rows, nonzeros).matrix(start, start + 300)
    assert matrix.dtype == torch.float64
    for d in (0, 1, 2, 3, 127, 128, 255, 256, 299):
        want = torch.zeros(rows, dtype=torch.float64)
        for row, sign in plain_column(start + d, rows, nonzeros).items():
            want[row] = sign
        assert torch.equal(matrix[:, d], want)
    # s signs in every column, one in each part of the rows
    parts = matrix.abs().reshape(nonzeros, rows // nonzeros, 300).sum(1)
    assert torch.equal(parts, torch.ones_like(parts))


def test_entries_of_sjlt_are_frozen():
    digests = {
        (64, 1): "70639ed2b3e09dac",
        (64, 4): "3634d04987757818",
    }
    for (rows, nonzeros), digest in digests.items():
        matrix = SparseKernel(KEY, rows, nonzeros).matrix(0, 4096)
        assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16] == digest


def mask_kernel(size=SIZE, count=300, device="cpu"):
    index = sorted_sample(KEY, size, count)
    return MaskKernel(index, index.to(device), size)


def test_entries_of_mask_are_ones_at_the_sample():
    kernel = mask_kernel()
    matrix = kernel.matrix(0, SIZE)
    rows, columns = matrix.nonzero().unbind(1)
    assert torch.equal(rows, torch.arange(300))
    assert torch.equal(columns, sorted_sample(KEY, SIZE, 300))
    assert set(matrix.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(kernel.matrix(500, 900), matrix[:, 500:900])
    assert kernel.scale == math.sqrt(SIZE / 300)


KERNELS = [
    lambda: SparseKernel(KEY, 64, 1),
    lambda: SparseKernel(KEY, 60, 5),
    mask_kernel,
]


def cuts(width, total):
    """Return ranges that cover ``total``: up to fifty of one width and a rest, or random ones."""
    if width:
        edges = [*itertools.islice(range(0, total, width), 50), total]
    else:
        inner = np.random.default_rng(0).choice(np.arange(1, total), 9, replace=False)
        edges = [0, *np.sort(inner).tolist(), total]
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize(
    ("count", "width"),
    [(2, 1), (1, 7), (7, 511), (8, 512), (33, 513), (64, 0), (1, 0), (33, 512)],
)
def test_sums_of_integers_are_exact_at_any_cut_batch_and_device(make, count, width, device):
    kernel = make()
    if device != "cpu" and isinstance(kernel, MaskKernel):
        kernel = mask_kernel(device=device)
    matrix = kernel.matrix(0, SIZE)
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(-4, 5, (count, SIZE), generator=generator).float()
    want = values.double() @ matrix.T
    for dtype in (torch.float32, torch.bfloat16):
        given = values.to(device, dtype)  # integers below 2^8 are exact in both
        out = torch.zeros(count, len(matrix), device=device)
        for first, last in cuts(width, SIZE):
            kernel.add(given[:, first:last], first, out)
        assert torch.equal(out.cpu().double(), want)


@pytest.mark.parametrize("at_once", [512, 1024])
def test_how_much_is_drawn_at_once_shows_in_no_number(monkeypatch, at_once):
    kernel = SparseKernel(KEY, 64, 4)
    values = torch.randn(3, SIZE, dtype=torch.float64)
    matrix = kernel.matrix(0, SIZE)
    monkeypatch.setattr(sjlt, "COLUMNS_AT_ONCE", at_once)
    out = torch.zeros(3, 64, dtype=torch.float64)
    kernel.add(values, 0, out)
    assert (out - values @ matrix.T).abs().max() < 1e-12
    keys = torch.randn(3, 64, dtype=torch.float64)
    for start, stop in [(0, SIZE), (5, 700), (1023, 1025), (3, 3)]:
        want = keys @ matrix[:, start:stop]
        assert (kernel.adjoint(keys, start, stop) - want).abs().sum() < 1e-12


@pytest.mark.parametrize("make", KERNELS)
def test_the_adjoint_is_the_transpose_at_any_cut(make):
    kernel = make()
    matrix = kernel.matrix(0, SIZE)
    keys = torch.randn(4, len(matrix), dtype=torch.float64)
    for start, stop in [(0, SIZE), (5, 700), (511, 513), (9, 9)]:
        want = keys @ matrix[:, start:stop]
        assert (kernel.adjoint(keys, start, stop) - want).abs().sum() < 1e-12


@pytest.mark.parametrize("start", [2**31 - 256, 2**33 - 1, 2**33])
def test_rows_that_begin_far_away_are_sketched_in_place(start):
    values = torch.randint(-4, 5, (3, 600)).double()
    places = torch.tensor([0, 1, start - 7, start, start + 3, start + 255, start + 599, 2**40])
    far = MaskKernel(places, places, 2**41)
    for kernel in (SparseKernel(KEY, 64, 2), far):
        matrix = kernel.matrix(start, start + 600)
        want = values @ matrix.T
        out = torch.zeros(3, len(matrix), dtype=torch.float64)
        for first, last in [(0, 100), (100, 257), (257, 600)]:
            kernel.add(values[:, first:last], start + first, out)
        assert torch.equal(out, want)
        assert torch.equal(kernel.adjoint(want, start, start + 600), want @ matrix)
    assert int(far.matrix(start, start + 600).sum()) == 4


def test_a_mask_reads_only_its_entries_of_a_factored_block(monkeypatch):
    monkeypatch.setattr(OuterBlock, "dense", lambda self: pytest.fail("was formed"))
    monkeypatch.setattr(OneHot, "dense", lambda self, dtype: pytest.fail("was made dense"))
    kernel = mask_kernel(200 * 300, 40)
    outputs, inputs = torch.randn(3, 2, 200).double(), torch.randn(3, 2, 300).double()
    index = torch.randint(300, (3, 2))
    hot = torch.nn.functional.one_hot(index, 300).double()
    for given, dense in ((inputs, inputs), (OneHot(index, 300), hot)):
        formed = torch.einsum("bto,bti->boi", outputs, dense).flatten(1)
        out = torch.zeros(3, 40, dtype=torch.float64)
        kernel.add_block(OuterBlock(outputs, given), 0, out)
        assert (out - formed @ kernel.matrix(0, 60_000).T).abs().max() < 1e-12
        # as the part of a longer row, with chosen coordinates before and after it
        out = torch.zeros(3, 40, dtype=torch.float64)
        longer = MaskKernel(kernel.host, kernel.host, 10**6)
        part = OuterBlock(outputs[..., :50], given)
        longer.add_block(part, 30_000, out)
        want = formed[:, : 50 * 300] @ kernel.matrix(30_000, 45_000).T
        assert (out - want).abs().max() < 1e-12
        longer.add_block(DenseBlock(-formed[:, : 50 * 300]), 30_000, out)
        assert out.abs().max() < 1e-12


def test_seeds_checkpoints_and_blocks_give_unrelated_matrices():
    keys = [
        RandomStream(seed, "projector", checkpoint).key("sjlt", 1, *block)
        for seed in (0, 1, 10_000)
        for checkpoint in (0, 1, 2)
        for block in ((), ("0",), ("00",))
    ]
    matrices = torch.stack([SparseKernel(key, 16, 1).matrix(0, 4096) for key in keys])
    # <M, M'> is a sum of 4096 products, each +-1 with probability 1/16.
    flat = matrices.flatten(1)
    products = flat @ flat.T
    assert torch.equal(products.diagonal(), torch.full((27,), 4096.0, dtype=torch.float64))
    products.fill_diagonal_(0)
    assert float(products.abs().max()) < 5 * math.sqrt(4096 / 16)
    places = matrices.abs().argmax(1)  # [27, 4096]
    equal = (places[:, None] == places[None]).double().mean(-1).fill_diagonal_(1 / 16)
    assert float((equal - 1 / 16).abs().max()) < 5 * math.sqrt(15 / 256 / 4096)


def test_places_and_signs_of_sjlt_are_even_and_have_no_neighbours():
    kernel = SparseKernel(KEY, 32, 2)
    matrix = kernel.matrix(0, 2**14)
    counts = matrix.abs().sum(1)
    expected = 2**14 / 16
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 30) < 5 * math.sqrt(60)
    assert abs(float(matrix.sum())) < 5 * math.sqrt(2**15)
    for step in (1, 2, 4, 8, 128, 512, 4096):
        product = (matrix[:, step:] * matrix[:, :-step]).sum()
        together = (matrix[:, step:] * matrix[:, :-step]).abs().sum()
        assert abs(float(product)) < 5 * math.sqrt(2 * (2**14 - step) / 16)
        share = 2 * (2**14 - step) / 16
        assert abs(float(together) - share) < 5 * math.sqrt(share)
    # the two parts of the rows are independent of each other
    first, second = matrix[:16].abs().argmax(0), matrix[16:].abs().argmax(0)
    assert abs(float((first == second).double().mean()) - 1 / 16) < 5 * math.sqrt(15 / 256 / 2**14)
    signs = matrix[:16].sum(0) * matrix[16:].sum(0)
    assert abs(float(signs.mean())) < 5 / math.sqrt(2**14)
