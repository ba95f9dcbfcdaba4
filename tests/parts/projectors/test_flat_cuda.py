"""Flat projectors on CUDA: the matrix is that of the CPU, and Triton's is that of torch."""

from __future__ import annotations

import attrs
import pytest
import torch
from flat_cases import CASES, build, integers, normals, one_block, rows_of, sketched

pytestmark = pytest.mark.cuda
every = pytest.mark.parametrize("name", CASES)
with_triton = pytest.mark.parametrize(
    "name", ["rademacher", "block-count-sketch", "block-count-sketch-4"]
)


def kernel_on(name: str, device: str, backend: str = "torch", **changes):
    """Return the random matrix of a projector on a device."""
    part = attrs.evolve(CASES[name].part, backend=backend, **changes)
    return build(part, one_block(1), device=device).kernel


@every
def test_the_matrix_is_that_of_the_cpu(name: str) -> None:
    kernel, other = kernel_on(name, "cuda"), kernel_on(name, "cpu")
    values, keys = integers(7, 3000), normals(3, 64)
    for start in (0, 77, 2**33 + 5):
        got, want = sketched(kernel, values.cuda(), start).cpu(), sketched(other, values, start)
        tolerance = 0 if name != "gaussian" else 1e-5 * float(want.abs().max())
        assert (got - want).abs().max() <= tolerance
        raised = kernel.adjoint(keys.cuda(), start, start + 900).cpu()
        assert (raised - other.adjoint(keys, start, start + 900)).abs().max() < 1e-6


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("batch", "dim"), [(1, 64), (33, 96), (70, 2048), (8, 12)])
def test_fused_sums_of_integers_are_exact(
    name: str, dtype: torch.dtype, batch: int, dim: int
) -> None:
    fused, other = kernel_on(name, "cuda", "triton", dim=dim), kernel_on(name, "cpu", dim=dim)
    values = integers(batch, 5000).to(dtype)
    # Tiles are read in place from multiples of 8 on, pairs from even coordinates on.
    for start in (0, 1, 8, 513, 2**33 + 5, 2**33 + 8):
        got = sketched(fused, values.cuda(), start).cpu()
        assert torch.equal(got, sketched(other, values, start)), start
    part = values[:, 3:4001]  # of rows that begin at no multiple of 16 bytes
    assert torch.equal(sketched(fused, values.cuda()[:, 3:4001], 6).cpu(), sketched(other, part, 6))
    got = sketched(fused, values.cuda()[:, ::2]).cpu()  # not contiguous
    assert torch.equal(got, sketched(other, values[:, ::2]))
    assert sketched(fused, values.cuda()[:0]).shape == (0, dim)


@with_triton
def test_fused_sums_are_those_of_float32_and_the_same_in_every_run(name: str) -> None:
    fused, other = kernel_on(name, "cuda", "triton"), kernel_on(name, "cpu")
    values = normals(64, 300_000).float()
    got, want = sketched(fused, values.cuda()), sketched(other, values.double())
    assert (got.cpu() - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(sketched(fused, values.cuda()), got)
    halves = torch.zeros_like(got)
    fused.add(values.cuda()[:, :100_001], 0, halves)
    fused.add(values.cuda()[:, 100_001:], 100_001, halves)
    assert (halves - got).abs().max() < 1e-5 * want.abs().max()


@with_triton
def test_triton_is_the_default_on_cuda(name: str) -> None:
    rows = rows_of(integers(5, 900)).to("cuda")
    space = one_block(900)
    chosen = build(CASES[name].part, space, device="cuda")
    assert type(chosen.kernel).__name__.startswith("Triton")
    torch_map = build(attrs.evolve(CASES[name].part, backend="torch"), space, device="cuda")
    assert torch.equal(chosen.map(rows).flat(), torch_map.map(rows).flat())
    keys = chosen.map(rows)
    assert torch.equal(chosen.adjoint(keys).flat(), torch_map.adjoint(keys).flat())
