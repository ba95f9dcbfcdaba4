"""The adapter of fast_jl against a stand-in with its interface: batches, scale, refusals."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import attrs
import pytest
import torch
from dattri_fast_jl.projector import FastJL, FastJLMap

import dattri_core as dattri
from dattri_core import BlockSpec, DenseBlock, RandomStream, Rows, Space, SpecError
from dattri_core.laws.spaces import SPACE, toy_rows

STREAM = RandomStream(0, "projector")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def signs(size: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size, dim), generator=generator).double() * 2 - 1


def project(values: torch.Tensor, dim: int, seed: int, processors: int) -> torch.Tensor:
    """Answer like fast_jl: 32 rows of half precision, no scale, sums in float32."""
    assert values.dtype == torch.float16
    assert values.is_contiguous()
    assert (len(values), processors) == (32, 7)
    return (values.double() @ signs(values.shape[1], dim, seed)).float()


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("size", [1.0, 1e6, 1e-9])
def test_rows_are_multiplied_by_its_signs(count: int, size: float) -> None:
    rows = toy_rows(count).scale(torch.full((count,), size, dtype=torch.float64))
    mapped = FastJLMap(SPACE, FastJL(512).out_space(SPACE), project, 3, 7).map(rows)
    want = rows.flat() @ signs(SPACE.dim, 512, 3) / 512**0.5
    assert mapped.flat().dtype == torch.float32
    assert mapped.space == Space((BlockSpec("sketch", "dense", (512,)),))
    assert torch.equal(mapped.index, rows.index)
    largest = float(want.abs().max()) if count else 0.0
    assert (mapped.flat() - want).abs().sum() <= 1e-3 * largest * want.numel()


def test_many_rows_come_in_parts_of_32() -> None:
    space = Space((BlockSpec("flat", "dense", (50,)),))
    values = torch.randint(-4, 5, (70, 50), generator=torch.Generator().manual_seed(0)).float()
    values[:, 0] = 4
    rows = Rows(space, {"flat": DenseBlock(values)}, torch.arange(70))
    mapped = FastJLMap(space, FastJL(1024).out_space(space), project, 3, 7).map(rows).flat()
    want = (values.double() @ signs(50, 1024, 3)).float() / 32
    assert (mapped - want).abs().max() < 1e-6 * want.abs().max()


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"dim=700 is no multiple of 512; give dim=1024"):
        FastJL(700).out_space(SPACE)
    long = Space((BlockSpec("flat", "dense", (2**27,)),))
    with pytest.raises(SpecError, match=r"rows of 134217728 numbers are longer than"):
        FastJL().out_space(long)
    monkeypatch.setitem(sys.modules, "fast_jl", None)
    with pytest.raises(SpecError, match=r"cannot import fast_jl.*TORCH_CUDA_ARCH_LIST=9.0 python"):
        FastJL().build(SPACE, stream=STREAM, device=CUDA)
    stand_in = SimpleNamespace(project_rademacher_32=project)
    monkeypatch.setitem(sys.modules, "fast_jl", stand_in)
    with pytest.raises(SpecError, match=r"the device 'cpu', and fast_jl runs on CUDA"):
        FastJL().build(SPACE, stream=STREAM, device=CPU)
    with pytest.raises(SpecError, match="no adjoint"):
        FastJLMap(SPACE, SPACE, project, 3, 7).adjoint(toy_rows(1))
    with pytest.raises(ValueError, match="dim"):
        attrs.evolve(FastJL(), dim=0)


def test_it_is_named_and_never_chosen_for_another() -> None:
    made = dattri.Method(projector={"name": "fast-jl", "dim": 512})
    assert made.projector == FastJL(512)
    assert made.to_spec()["projector"] == {"name": "fast-jl", "dim": 512}


@pytest.mark.cuda
def test_its_matrix_is_one_of_signs() -> None:
    pytest.importorskip("fast_jl")
    space = Space((BlockSpec("flat", "dense", (600,)),))
    mapped = FastJL(512).build(space, stream=STREAM, device=CUDA)
    unit = Rows(space, {"flat": DenseBlock(torch.eye(600, device="cuda"))}, torch.arange(600))
    matrix = mapped.map(unit).flat() * 512**0.5
    assert torch.equal(matrix.abs().round(decimals=3), torch.ones_like(matrix))
    assert abs(float(matrix.mean())) < 5 / matrix.numel() ** 0.5
