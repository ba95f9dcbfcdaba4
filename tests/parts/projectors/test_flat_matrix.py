"""Flat projectors against their matrix written down: exact sums, adjoints, chunks, far offsets."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import attrs
import pytest
import torch
from dattri_parts.projectors import flat, hadamard, shifted, tiled
from flat_cases import (
    CASES,
    PAIRS,
    build,
    integers,
    kernel_of,
    normals,
    one_block,
    rows_of,
    sketched,
)

from dattri_core import BlockSpec, DenseBlock, GroupedBlock, OuterBlock, Rows, Space, SpecError
from dattri_core.laws import check
from dattri_core.laws.spaces import SPACE, formed, toy_rows

WIDTH = 1400
every = pytest.mark.parametrize("name", CASES)
with_backends = pytest.mark.parametrize(("name", "backend"), PAIRS)


def exact(name: str) -> bool:
    """Whether the entries of M are integers, so that sums of integers are exact in float32."""
    return name != "gaussian"


@every
@pytest.mark.parametrize("scope", ["row", "block"])
def test_it_meets_every_law_of_projectors(name: str, scope: str) -> None:
    part = attrs.evolve(CASES[name].part, dim=4, scope=scope)
    report = check("projector", part)
    assert report.ok, str(report)
    status = {finding.law: finding.status for finding in report.findings}
    assert (status["additive-is-true"], status["blockwise-is-true"]) == (
        ("passed", "skipped") if scope == "row" else ("skipped", "passed")
    )
    assert status["adjoint-is-true"] == "passed"


@with_backends
def test_the_backends_have_one_matrix(name: str, backend: str) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    matrix = kernel_of(CASES[name].part, "numpy").matrix(0, WIDTH)
    assert matrix.dtype == torch.float64
    assert torch.equal(kernel.matrix(0, WIDTH), matrix)
    assert torch.equal(kernel.matrix(701, 1399), matrix[:, 701:1399])
    unit = torch.eye(WIDTH, dtype=torch.float64)
    tolerance = 0 if exact(name) else 1e-6  # a normal number in a hundred million may differ
    assert (sketched(kernel, unit).T - matrix).abs().max() <= tolerance


@with_backends
@pytest.mark.parametrize("chunk", [1, 7, 511, 512, 513, 0])
def test_sums_of_integers_are_exact_in_any_chunks(name: str, backend: str, chunk: int) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    values = integers(7, WIDTH if chunk != 1 else 200)
    width = values.shape[1]
    want = values.double() @ kernel.matrix(0, width).T
    out = torch.zeros(7, want.shape[1])
    edges = [0, *range(chunk, width, chunk), width] if chunk else [0, 3, 66, 640, 1029, width]
    for start, stop in pairwise(edges):
        kernel.add(values[:, start:stop], start, out)
    if exact(name):
        assert torch.equal(out.double(), want)
    else:
        assert (out - want).abs().max() < 1e-5 * want.abs().max()


@with_backends
@pytest.mark.parametrize("batch", [1, 7, 8, 33, 64])
def test_no_row_sees_the_others_or_its_place(name: str, backend: str, batch: int) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    values = integers(64, 600)
    whole = values.double() @ kernel.matrix(0, 600).T
    tolerance = 0 if exact(name) else 1e-5 * float(whole.abs().max())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:batch]
    assert (sketched(kernel, values[order]) - whole[order]).abs().max() <= tolerance
    padded = torch.cat([values[:2], torch.zeros(2, 70)], 1)
    assert (sketched(kernel, padded) - whole[:2]).abs().max() <= tolerance
    assert sketched(kernel, values[:0]).shape == (0, whole.shape[1])


@with_backends
def test_memory_bounds_change_no_number(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    values, keys = integers(40, WIDTH), normals(3, 64)
    whole, raised = sketched(kernel, values), kernel.adjoint(keys, 5, WIDTH)
    monkeypatch.setattr(tiled, "TILE_BYTES", 1)
    monkeypatch.setattr(shifted, "SIGNS_AT_ONCE", 100)
    monkeypatch.setattr(shifted, "NUMBERS_A_THREAD", 100)
    monkeypatch.setattr(hadamard, "NUMBERS_AT_ONCE", 300)
    tolerance = 0 if exact(name) else 1e-5 * float(whole.abs().max())
    assert (sketched(kernel, values) - whole).abs().max() <= tolerance
    assert (kernel.adjoint(keys, 5, WIDTH) - raised).abs().max() < 1e-12


@with_backends
@pytest.mark.parametrize(("start", "stop"), [(0, WIDTH), (37, 901), (512, 513), (1399, 1400)])
def test_the_adjoint_is_the_transpose(name: str, backend: str, start: int, stop: int) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    matrix, keys = kernel.matrix(start, stop), normals(5, 64)
    want = keys @ matrix
    got = kernel.adjoint(keys, start, stop)
    assert (got.dtype, got.shape) == (torch.float64, want.shape)
    assert (got - want).abs().max() < 1e-6 if not exact(name) else 1e-12
    low = kernel.adjoint(keys.float(), start, stop)
    assert low.dtype == torch.float32
    assert (low - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))


@with_backends
@pytest.mark.parametrize("start", [2**31 - 256, 2**32 - 300, 2**33 - 1, 2**33 + 77])
def test_far_offsets_are_places_like_others(name: str, backend: str, start: int) -> None:
    kernel = kernel_of(CASES[name].part, backend)
    values = integers(3, 700)
    matrix = kernel.matrix(start, start + 700)
    want = values.double() @ matrix.T
    tolerance = 0 if exact(name) else 1e-5 * float(want.abs().max())
    assert (sketched(kernel, values, start) - want).abs().max() <= tolerance
    keys = normals(2, 64)
    assert (kernel.adjoint(keys, start, start + 700) - keys @ matrix).abs().max() < 1e-6
    halves = torch.zeros(3, 64)
    kernel.add(values[:, :299], start, halves)
    kernel.add(values[:, 299:], start + 299, halves)
    assert (halves - want).abs().max() <= tolerance
    for power in (31, 32, 33):  # not those that a counter of fewer bits would have
        if start >= 2**power:
            assert not torch.equal(matrix, kernel.matrix(start % 2**power, start % 2**power + 700))


@with_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_wide_whatever_the_dtype(name: str, backend: str, dtype: torch.dtype) -> None:
    """Numbers of half precision whose sums, or whose numbers times sqrt(K), overflow it."""
    part = attrs.evolve(CASES[name].part, backend=backend)
    values = (60_000 * torch.sign(normals(4, 900))).to(dtype)
    mapped = build(part, one_block(900)).map(rows_of(values)).flat()
    assert mapped.dtype == torch.promote_types(dtype, torch.float32)
    kernel = kernel_of(CASES[name].part)
    want = values.double() @ kernel.matrix(0, 900).T * kernel.scale
    rounding = 900 * torch.finfo(mapped.dtype).eps
    assert (mapped - want).abs().max() <= rounding * want.abs().max() + (
        0 if exact(name) else 1e-7 * want.abs().max()
    )


# --- rows of several blocks -----------------------------------------------------------------------
def matrix_of(mapped: flat.FlatMap | flat.BlockwiseFlatMap, space: Space) -> torch.Tensor:
    """Return P written down, ``[k, d]``, blocks that are kept as the identity."""
    if isinstance(mapped, flat.FlatMap):
        return mapped.kernel.matrix(0, space.dim) * mapped.kernel.scale
    parts = [
        kernel.matrix(0, spec.size) * kernel.scale
        if (kernel := mapped.kernels.get(spec.name))
        else torch.eye(spec.size, dtype=torch.float64)
        for spec in space
    ]
    return torch.block_diag(*parts)


@every
@pytest.mark.parametrize("scope", ["row", "block"])
@pytest.mark.parametrize("formed_bytes", [2**28, 1, 400])
def test_rows_as_factors_are_the_flat_rows(
    name: str, scope: str, formed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "FORMED_BYTES", formed_bytes)
    mapped = build(attrs.evolve(CASES[name].part, dim=8, scope=scope), SPACE)
    rows, matrix = toy_rows(5), matrix_of(mapped, SPACE)
    for given in (rows, formed(rows)):
        got = mapped.map(given)
        assert got.space == mapped.out_space
        assert (got.flat() - rows.flat() @ matrix.T).abs().max() < 1e-6 * (
            1e-4 if exact(name) else 1
        )
    keys = mapped.map(rows)
    assert (mapped.adjoint(keys).flat() - keys.flat() @ matrix).abs().max() < 1e-6
    if scope == "row":
        assert mapped.out_space == Space((BlockSpec("sketch", "dense", (8,)),))
        assert (mapped.blockwise, mapped.additive) == (False, True)
    else:
        kinds = [(spec.name, spec.kind, spec.shape) for spec in mapped.out_space]
        assert kinds == [
            ("linear", "dense", (8,)),
            ("embedding", "dense", (8,)),
            ("scale", "dense", (4,)),
        ]
        assert mapped.map(rows).blocks["scale"] is rows.blocks["scale"]
        assert (mapped.blockwise, mapped.additive) == (True, False)
        partial = mapped.adjoint(keys.select(["embedding"]))
        assert partial.space == SPACE.select(["embedding"])
        assert not torch.equal(
            mapped.kernels["linear"].matrix(0, 12), mapped.kernels["embedding"].matrix(0, 12)
        )


def test_a_grouped_block_is_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "FORMED_BYTES", 1)
    space = Space((BlockSpec("convolution", "grouped", (6, 5)),))
    block = GroupedBlock(normals(3, 4, 2, 3), normals(3, 4, 2, 5, seed=1))
    rows = Rows(space, {"convolution": block}, torch.arange(3))
    mapped = build(attrs.evolve(CASES["rademacher"].part, dim=8), space)
    want = block.flat() @ matrix_of(mapped, space).T
    assert (mapped.map(rows).flat() - want).abs().max() < 1e-12


def test_large_factored_rows_are_never_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "FORMED_BYTES", 4 * 2 * 50 * 3)  # three outputs of two rows
    sizes = []
    dense = OuterBlock.dense

    def watched(block: OuterBlock) -> DenseBlock:
        sizes.append(block.shape)
        return dense(block)

    monkeypatch.setattr(OuterBlock, "dense", watched)
    space = Space((BlockSpec("layer", "outer", (20, 50)),))
    factors = OuterBlock(normals(2, 3, 20).float(), normals(2, 3, 50, seed=1).float())
    rows = Rows(space, {"layer": factors}, torch.arange(2))
    build(CASES["block-count-sketch"].part, space).map(rows)
    assert sizes == [(3, 50)] * 6 + [(2, 50)]


@every
@pytest.mark.parametrize("scope", ["row", "block"])
def test_another_layout_is_refused(name: str, scope: str) -> None:
    part = attrs.evolve(CASES[name].part, dim=8, scope=scope)
    other = Space((BlockSpec("linear", "outer", (5, 3)), *SPACE.blocks[1:]))
    mapped = build(part, other)
    with pytest.raises(
        SpecError, match=f"projector '{name.removesuffix('-4')}': the spaces differ"
    ):
        mapped.map(toy_rows(2))
    with pytest.raises(SpecError, match=r"adjoint of the projector|no block"):
        mapped.adjoint(rows_of(normals(2, 8)))


# --- frozen ---------------------------------------------------------------------------------------
@every
def test_the_matrix_is_frozen(name: str) -> None:
    case = CASES[name]
    matrix = kernel_of(case.part).matrix(0, 4096)
    corner = [[int(k), float(matrix[k, d])] for d, k in matrix.T.nonzero()[:6].tolist()]
    assert corner == case.corner
    digest = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()[:16]
    assert digest == case.digest


@every
def test_columns_have_unit_length_in_the_mean(name: str) -> None:
    case = CASES[name]
    kernel = kernel_of(case.part)
    lengths = (kernel.matrix(0, 4096) * kernel.scale).square().sum(0)
    if case.unit:
        assert (lengths - 1).abs().max() < 1e-14
    else:
        assert abs(float(lengths.mean()) - 1) < 5 * math.sqrt(2 / 64 / 4096)


def test_fields_that_no_matrix_has_are_refused() -> None:
    count_sketch, srht = CASES["block-count-sketch"].part, CASES["srht"].part
    with pytest.raises(SpecError, match=r"nonzeros=3 does not divide dim=64"):
        attrs.evolve(count_sketch, nonzeros=3).out_space(SPACE)
    with pytest.raises(SpecError, match=r"dim=48 is no power of two.*dim=32 or dim=64"):
        attrs.evolve(srht, dim=48).out_space(SPACE)
    with pytest.raises(SpecError, match=r"backend='triton' cannot run here.*'cpu', not on CUDA"):
        build(attrs.evolve(CASES["rademacher"].part, backend="triton"), SPACE)
    for name, case in CASES.items():
        with pytest.raises(ValueError, match="backend"):
            attrs.evolve(case.part, backend="jax")
        with pytest.raises(ValueError, match="scope"):
            attrs.evolve(case.part, scope="layer")
        with pytest.raises(ValueError, match="dim"):
            attrs.evolve(case.part, dim=0)
        assert name
