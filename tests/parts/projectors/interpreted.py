"""Runs the Triton kernels in Triton's interpreter, on the CPU; exits with 0 where sums are exact.

In a process of its own, because Triton is told to interpret before it is imported.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from dattri_parts.projectors import triton_shifted, triton_signs
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
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        """Let arrays of one number bound loops, which NumPy 2.4 refuses to the interpreter."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda _: (9, 0)
    multiplied_signs()
    added_shifts()


def multiplied_signs() -> None:
    """Read rows in place, from multiples of 8 on in bfloat16, and all others by a copy."""
    triton_signs.PARTS_BYTES = 2**17  # so that some copies are in several ranges of columns
    for start, columns, batch, rows in [
        (37, 600, 17, 130),
        (2**33 + 5, 520, 2, 8),
        (40, 1304, 70, 8),
        (2**33 + 512, 96, 1, 300),
    ]:
        values = integers(batch, columns)
        want = values @ entries(KEY, (0, rows), (start, start + columns), "signs", None).T
        for dtype in DTYPES:
            assert torch.equal(summed_signs(values.to(dtype), start, KEY, rows), want), dtype
        fine = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
        want = fine @ entries(KEY, (0, rows), (start, start + columns), "signs", None).T
        got = summed_signs(fine, start, KEY, rows)
        assert (got - want).abs().max() < 2e-6 * want.abs().max()


def added_shifts() -> None:
    """Read numbers of 16 bits in pairs, from even coordinates on, and others one by one."""
    triton_shifted.LEAST_GROUPS = 2  # so that there are several ranges of blocks
    triton_shifted.SIGNS_AT_ONCE = 1024  # and of columns
    for start, columns, batch, rows, nonzeros in [
        (0, 1100, 3, 128, 1),
        (37, 300, 5, 192, 4),
        (2**33 + 5, 70, 2, 16, 2),
        (2**33 + 6, 70, 20, 16, 2),
        (0, 1500, 2, 700, 1),
        (10, 150, 3, 63, 3),
        (10, 301, 1, 64, 1),
    ]:
        kernel, values = ShiftedKernel(KEY, rows, nonzeros), integers(batch, columns)
        want = torch.zeros(batch, rows)
        kernel.add(values, start, want)
        for dtype in DTYPES:
            assert torch.equal(summed_shifted(values.to(dtype), start, kernel), want), dtype


if __name__ == "__main__":
    main()
