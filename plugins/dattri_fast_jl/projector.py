"""The Rademacher sketch of fast_jl, the CUDA extension of TRAK's authors."""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar

import torch
from attrs import evolve, field, frozen, validators

from dattri_core import BlockSpec, DenseBlock, LinearMap, RandomStream, Rows, Space, SpecError

VERSION = 1
"""Of the rule that makes the seed; the matrix itself is fast_jl's."""
GRANULE = 512
"""fast_jl makes so many numbers of the sketch at once."""
BATCH = 32
"""Rows of its largest kernel; fewer are filled up with rows of zeros."""
LARGEST = 2**32
"""fast_jl counts the numbers of a batch in 32 bits."""
INSTALL = (
    "download its source distribution from PyPI, unpack it and run there: "
    "TORCH_EXTENSIONS_DIR=$PWD/built "
    'TORCH_CUDA_ARCH_LIST=9.0 python -c "from torch.utils.cpp_extension import load; '
    "load('fast_jl', ['fast_jl.cu'], extra_cuda_cflags=['-O3'])\" with the compute capability of "
    "your GPU and nvcc of torch's CUDA version, then put built/fast_jl on PYTHONPATH; with CUDA 12 "
    "or older, 'pip install --no-build-isolation fast_jl' builds it too"
)


@frozen
class FastJL:
    """P = R / sqrt(K) with the signs R of fast_jl: E[P^T P] = I.

    For comparisons with features of TRAK's own library. The matrix depends on the number of
    multiprocessors of the GPU and on the length of a row, so that sketches of two kinds of GPU do
    not fit each other; rows are multiplied in half precision. There is no adjoint. The projector
    'rademacher' has none of these limits. Source: Park et al. 2023, TRAK (arXiv 2303.14186).

    Args:
        dim: K, the numbers that are left, a multiple of 512.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    gives: ClassVar[frozenset[str]] = frozenset()

    def out_space(self, space: Space) -> Space:
        """Return the space of one block of K numbers.

        Raises:
            SpecError: K is no multiple of 512, or rows are longer than fast_jl can count.
        """
        if self.dim % GRANULE:
            raise SpecError(
                f"projector 'fast-jl': dim={self.dim} is no multiple of {GRANULE}; give "
                f"dim={GRANULE * math.ceil(self.dim / GRANULE)}, or use 'rademacher'"
            )
        if space.dim * BATCH >= LARGEST:
            raise SpecError(
                f"projector 'fast-jl': rows of {space.dim} numbers are longer than the "
                f"{LARGEST // BATCH - 1} that it can count; use 'rademacher' or "
                "'block-count-sketch', or attribute fewer parameters (parameters=...)"
            )
        return Space((BlockSpec("sketch", "dense", (self.dim,)),))

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map.

        Raises:
            SpecError: See `out_space`; or fast_jl cannot be imported, or the device is not CUDA.
        """
        after = self.out_space(space)
        try:
            library = importlib.import_module("fast_jl")
        except ImportError as error:
            raise SpecError(
                f"projector 'fast-jl': cannot import fast_jl ({error}); {INSTALL}. Or use "
                "'rademacher', which needs nothing"
            ) from error
        if device.type != "cuda":
            raise SpecError(
                f"projector 'fast-jl': the rows are on the device {str(device)!r}, and fast_jl "
                "runs on CUDA; use 'rademacher'"
            )
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        seed = stream.key("fast-jl", VERSION) % 2**31
        return FastJLMap(space, after, library.project_rademacher_32, seed, processors)


@frozen(eq=False)
class FastJLMap:
    """P g for whole rows, 32 rows at a time."""

    in_space: Space
    out_space: Space
    project: Any
    seed: int
    processors: int
    blockwise: ClassVar[bool] = False

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g, in float32.

        Rows are scaled to a largest number of 1 before they are rounded to half precision, and
        back, so that none overflows.
        """
        self.in_space.require_same(rows.space, "projector 'fast-jl'")
        flat, size = rows.flat().float(), self.out_space.dim
        largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        half = (flat / largest).half()
        parts = [flat.new_zeros(0, size)]
        for start in range(0, len(half), BATCH):
            part = half[start : start + BATCH]
            full = torch.nn.functional.pad(part, (0, 0, 0, BATCH - len(part))).contiguous()
            parts.append(self.project(full, size, self.seed, self.processors)[: len(part)].float())
        values = torch.cat(parts) * (largest / math.sqrt(size))
        return evolve(rows, space=self.out_space, blocks={"sketch": DenseBlock(values)})

    def adjoint(self, rows: Rows) -> Rows:
        """Refuse: fast_jl has none."""
        raise SpecError("projector 'fast-jl': it has no adjoint; use 'rademacher'")
