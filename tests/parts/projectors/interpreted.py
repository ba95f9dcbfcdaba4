"""Runs the Triton kernels in Triton's interpreter, on the CPU; exits with 0 where sums are exact.

In a process of its own, because Triton is told to interpret before it is imported.
"""

from __future__ import annotations

import contextlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from dattri_parts.projectors.entries import entries
from dattri_parts.projectors.shifted import ShiftedKernel
from dattri_parts.projectors.triton_shifted import summed_shifted
from dattri_parts.projectors.triton_signs import summed_signs
from triton.runtime import interpreter

KEY = 0x1234_5678_9ABC_DEF0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """Return bfloat16, which NumPy does not have and the interpreter keeps as bits, as float32."""
    assert handle.dtype.scalar == tl.bfloat16
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def integers(batch: int, columns: int) -> torch.Tensor:
    """Return integers whose sums are exact."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-4, 5, (batch, columns), generator=generator).float()


def main() -> None:
    """Compare both kernels with torch, for partial spans and blocks and far offsets."""
    create_dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    for start, columns, batch, rows in [(37, 600, 17, 130), (2**33 + 5, 520, 2, 8)]:
        values = integers(batch, columns)
        want = values @ entries(KEY, (0, rows), (start, start + columns), "signs", None).T
        for dtype in DTYPES:
            assert torch.equal(summed_signs(values.to(dtype), start, KEY, rows), want), dtype
        fine = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        want = fine @ entries(KEY, (0, rows), (start, start + columns), "signs", None).T
        got = summed_signs(fine, start, KEY, rows)
        assert (got - want).abs().max() < 2e-6 * want.abs().max()
    for start, columns, batch, rows, nonzeros in [
        (0, 1100, 3, 64, 1),
        (37, 600, 5, 96, 4),
        (2**33 + 5, 520, 2, 8, 2),
        (0, 1500, 2, 700, 1),
    ]:
        kernel, values = ShiftedKernel(KEY, rows, nonzeros), integers(batch, columns)
        want = torch.zeros(batch, rows)
        kernel.add(values, start, want)
        for dtype in DTYPES:
            assert torch.equal(summed_shifted(values.to(dtype), start, kernel), want), dtype


if __name__ == "__main__":
    main()
