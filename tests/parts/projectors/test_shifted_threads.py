"""The block count-sketch on several threads: the same sums, whatever the number of them."""

import pytest
import torch
from dattri_parts.projectors import shifted
from dattri_parts.projectors.shifted import ShiftedKernel


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("nonzeros", [1, 2])
@pytest.mark.parametrize(("start", "size"), [(0, 4096), (5, 3001), (2**33 - 7, 2600)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_threads_do_not_show(nonzeros, start, size, rows, monkeypatch):
    monkeypatch.setattr(shifted, "SIGNS_AT_ONCE", 512)
    kernel = ShiftedKernel(7, 16, nonzeros)
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(-4, 5, (rows, size), generator=generator).float()
    want = values.double() @ kernel.matrix(start, start + size).T
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = torch.zeros(rows, 16)
        kernel.add(values, start, out)
        assert torch.equal(out.double(), want), threads
        keys = torch.randint(-4, 5, (rows, 16), generator=generator).float()
        raised = kernel.adjoint(keys, start, start + size)
        assert torch.equal(raised.double(), keys.double() @ kernel.matrix(start, start + size))


def test_an_error_of_a_thread_is_raised():
    torch.set_num_threads(2)
    kernel = ShiftedKernel(7, 16, 1)
    with pytest.raises(RuntimeError):
        kernel.add(torch.zeros(4, 4096), 0, torch.zeros(4, 8))
