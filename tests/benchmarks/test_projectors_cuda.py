"""Fused flat projectors on a CUDA device against what the device can do at most.

Goals: the dense sketch takes at most 1/0.6 of the time of its products at the measured rate of a
large product in bfloat16, or of reading the rows once where that takes longer, and at most half the
time of fast_jl; the block count-sketch reads rows at 0.6 of the measured rate of a copy or more.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from table import Table, Theme
from torch import Tensor

import dattri_core as dattri

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
THEME = Theme(
    "projectors_cuda",
    "Sketches of flat rows on a GPU",
    "Rows of normal numbers, 64 of them. Times are medians of calls between two CUDA events, after "
    "one call that compiles. The floor of the dense sketch is 2 B D K at the measured rate of a "
    "product of 8192 x 8192 matrices in bfloat16 (three times as much for float32 rows, which are "
    "sums of three parts), or B D numbers at the measured rate of a copy, whichever is longer. "
    "Rows of 1,000,000,000 numbers are ten calls on one buffer of 100,000,000 columns, each at its "
    "own coordinates. fast_jl gets rows in half precision, 32 at a time, and as many tiles as the "
    "device has multiprocessors; its time for 1,000,000,000 numbers is ten times that for "
    "100,000,000. The share of bandwidth is the bytes of the rows, read once, over the time, "
    "against those of a copy of 8 GB, read and written. Run it with `-m cuda --benchmark-only`.",
)
BATCH = 64
COLUMNS = 100_000_000
SIZES, DIMS = (10_000_000, COLUMNS, 10 * COLUMNS), (512, 2048, 8192)
GOAL, GOAL_AGAINST_FAST_JL = 0.6, 2.0
LONG = 500.0
"""Milliseconds; what takes longer is repeated twice, and anything else nine times."""


class Ceilings(NamedTuple):
    """What the device does in a second: bytes of a copy, operations of a product."""

    copied: float
    multiplied: float


def milliseconds(work: Callable[[], Any]) -> float:
    """Return the median time of some calls on the device, after a first one."""
    times: list[float] = []
    wanted = 1
    while len(times) < wanted + 1:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
        if len(times) == 2:
            wanted = 2 if times[1] > LONG else 9
    return statistics.median(times[1:])


def measured(benchmark: Any, work: Callable[[], Any]) -> float:
    """Return `milliseconds`, as the one round of a benchmark."""
    found: float = benchmark.pedantic(milliseconds, (work,), rounds=1)
    return found


def copy_rate(size: int = 2**33) -> float:
    """Return how many bytes of a copy are read and written in a second."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source)) * 1e3


def product_rate(size: int = 8192) -> float:
    """Return how many operations of a product in bfloat16 are done in a second."""
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: left @ right) * 1e3


@pytest.fixture(scope="module")
def ceilings(table: Table) -> Ceilings:
    """Return what the device can do, measured here."""
    copied, multiplied = copy_rate(), product_rate()
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    put(table, f"copy of 8 GB on {name}", measured=f"{copied / 1e12:.2f} TB/s")
    put(table, f"product in bfloat16 on {name}", measured=f"{multiplied / 1e12:.0f} TFLOP/s")
    return Ceilings(copied, multiplied)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def rows(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """Return random rows, each drawn on its own so that nothing large lies beside them."""
    values = torch.empty(BATCH, COLUMNS, dtype=request.param, device="cuda")
    for row in values:
        row.normal_()
    yield values
    del values
    torch.cuda.empty_cache()


def kernel(name: str, backend: str, **fields: Any) -> Any:
    """Return the random matrix of a projector."""
    part = dattri.default_registry().make("projector", name, backend=backend, **fields)
    space = dattri.Space((dattri.BlockSpec("flat", "dense", (10 * COLUMNS,)),))
    stream = dattri.RandomStream(0, "projector")
    return part.build(space, stream=stream, device=torch.device("cuda")).kernel


def sketch(built: Any, dim: int, values: Tensor, starts: tuple[int, ...] = (0,)) -> Tensor:
    """Return the sum of the sketches of the same rows at some coordinates."""
    out = torch.zeros(len(values), dim, device=values.device)
    for start in starts:
        built.add(values, start, out)
    return out


def put(table: Table, what: str, **cells: Any) -> None:
    """Add a row to the table, and say it."""
    print(f"{what}: " + ", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
    table.put(what, **cells)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("rademacher", {}), ("block-count-sketch", {}), ("block-count-sketch", {"nonzeros": 4})],
    ids=["rademacher", "block-count-sketch", "block-count-sketch-4"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_those_of_torch(
    benchmark: Any, table: Table, name: str, fields: dict[str, int], dtype: torch.dtype
) -> None:
    """Sums of integers are exact; those of normal numbers are compared with float64."""
    dim, size = 2048, 200_003
    fused = kernel(name, "triton", dim=dim, **fields)
    plain = kernel(name, "torch", dim=dim, **fields)
    whole = torch.randint(-4, 5, (BATCH, size), device="cuda")
    for start in (0, 8, 2**33 + 5):
        for width in (size - 3, size):
            values = whole[:, :width].to(dtype)
            got = sketch(fused, dim, values, (start,))
            assert torch.equal(got, sketch(plain, dim, values, (start,))), (start, width)
    values = torch.randn(BATCH, size, device="cuda").to(dtype)
    got = benchmark.pedantic(sketch, (fused, dim, values), rounds=1)
    assert torch.equal(got, sketch(fused, dim, values))
    want = torch.zeros(BATCH, dim, dtype=torch.float64, device="cuda")
    plain.add(values.double(), 0, want)
    error = float((got - want).norm() / want.norm())
    what = ", ".join([name, *(f"{key}={value}" for key, value in fields.items()), label(dtype)])
    put(table, f"error of {what}", measured=f"{error:.1e}", goal="<= 1e-5", met=error <= 1e-5)
    assert error <= 1e-5


def label(dtype: torch.dtype) -> str:
    """Return the name of a dtype."""
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", SIZES)
def test_dense_sketch(
    benchmark: Any, table: Table, ceilings: Ceilings, rows: Tensor, size: int, dim: int
) -> None:
    """Multiplies rows at the rate of the tensor cores."""
    wide = rows.dtype == torch.float32
    if wide and (size, dim) != (SIZES[0], 2048):
        pytest.skip("float32 rows are measured at one size")
    built, values = kernel("rademacher", "triton", dim=dim), rows[:, :size]
    starts = tuple(range(0, size, values.shape[1]))
    time = measured(benchmark, lambda: sketch(built, dim, values, starts))
    operations = 2 * BATCH * size * dim * (3 if wide else 1)
    read = BATCH * size * rows.element_size() / ceilings.copied
    floor = 1e3 * max(operations / ceilings.multiplied, read)
    cells: dict[str, Any] = {"ms": f"{time:.2f}", "floor, ms": f"{floor:.2f}"}
    cells["of floor"] = f"{floor / time:.2f}"
    met, goal = floor / time >= GOAL, f"{GOAL} of floor"
    if not wide and (other := time_of_fast_jl(min(size, COLUMNS), dim)) is not None:
        ratio = other * (size // min(size, COLUMNS)) / time
        cells |= {"fast_jl, ms": f"{ratio * time:.2f}", "x fast_jl": f"{ratio:.2f}"}
        met, goal = met and ratio >= GOAL_AGAINST_FAST_JL, f"{goal}, {GOAL_AGAINST_FAST_JL} x"
    elif not wide:
        cells["fast_jl, ms"] = "not built"
    what = f"rademacher, D = {size:,}, K = {dim}, {label(rows.dtype)}"
    put(table, what, **cells, goal=goal, met=met)


@functools.cache
def time_of_fast_jl(columns: int, dim: int) -> float | None:
    """Return the milliseconds of fast_jl, or None where it is not built."""
    try:
        library = importlib.import_module("fast_jl")
    except ImportError:
        return None
    halves = torch.empty(BATCH, columns, dtype=torch.float16, device="cuda")
    for row in halves:
        row.normal_()
    tiles = torch.cuda.get_device_properties("cuda").multi_processor_count

    def work() -> None:
        for part in halves.split(32):
            library.project_rademacher_32(part, dim, 0, tiles)

    return milliseconds(work)


def test_dense_sketch_of_torch(benchmark: Any, table: Table, ceilings: Ceilings) -> None:
    """What writing signs to memory costs; no goal."""
    size, part, dim = SIZES[0], 1_000_000, 2048
    built = kernel("rademacher", "torch", dim=dim)
    values = torch.randn(BATCH, part, device="cuda").bfloat16()
    sketch(built, dim, values[:, :10_000])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def work() -> None:
        begin.record()
        sketch(built, dim, values)
        end.record()
        end.synchronize()

    benchmark.pedantic(work, rounds=1)
    time = begin.elapsed_time(end) * (size / part)
    floor = 1e3 * 2 * BATCH * size * dim / ceilings.multiplied
    cells = {"ms": f"{time:.0f}", "floor, ms": f"{floor:.2f}", "of floor": f"{floor / time:.4f}"}
    what = f"rademacher by torch, D = {size:,} (10 x {part:,}), K = {dim}, bfloat16"
    put(table, what, **cells, goal="", met="")


@pytest.mark.parametrize("nonzeros", [1, 4])
def test_block_count_sketch(
    benchmark: Any, table: Table, ceilings: Ceilings, rows: Tensor, nonzeros: int
) -> None:
    """Reads rows at the rate of memory."""
    dim = 2048
    built = kernel("block-count-sketch", "triton", dim=dim, nonzeros=nonzeros)
    time = measured(benchmark, lambda: sketch(built, dim, rows))
    plain = milliseconds(lambda: rows.sum(1))
    rate = rows.numel() * rows.element_size() / time * 1e3
    put(
        table,
        f"block-count-sketch, s = {nonzeros}, D = {COLUMNS:,}, K = {dim}, {label(rows.dtype)}",
        ms=f"{time:.2f}",
        **{"GB/s": f"{rate / 1e9:.0f}", "of copy": f"{rate / ceilings.copied:.2f}"},
        **{"values.sum(1), ms": f"{plain:.2f}"},
        goal=f"{GOAL} of copy",
        met=rate / ceilings.copied >= GOAL,
    )
