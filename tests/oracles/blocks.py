"""Every kind of block, with its formed float64 rows made by loops."""

from __future__ import annotations

import itertools

import torch

from dattri_core import DenseBlock, OneHot, OuterBlock, low_rank
from dattri_core.blocks import GroupedBlock, Shared, SpanBlock, SumBlock

FORMED = ("dense", "grouped")
FACTORED = ("outer", "one-hot", "low-rank", "shared", "shared one-hot")
COMBINED = ("span of dense", "span of outer", "span of shared one-hot", "span of span", "sum")
KINDS = (*FORMED, *FACTORED, *COMBINED)
BASE = 4


def make(kind, rows, positions, outputs, inputs, generator, dtype=torch.float64):
    """Return a block and its formed float64 rows [B, O, I]."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes = (positions, outputs, inputs, generator, dtype)
    if kind == "dense":
        values = normal(rows, outputs, inputs)
        return DenseBlock(values), values.double()
    if kind == "grouped":  # as many groups as divide the outputs, but not all of them
        groups = next((g for g in (2, 3) if outputs % g == 0), 1)
        shape = (rows, positions, groups)
        left, right = normal(*shape, outputs // groups), normal(*shape, inputs)
        formed = torch.zeros(rows, outputs, inputs, dtype=torch.float64)
        for b, t, o in itertools.product(range(rows), range(positions), range(outputs)):
            group, place = divmod(o, outputs // groups)
            formed[b, o] += left[b, t, group, place].double() * right[b, t, group].double()
        return GroupedBlock(left, right), formed
    if kind == "low-rank":
        left, right = normal(rows, outputs, positions), normal(rows, positions, inputs)
        formed = torch.zeros(rows, outputs, inputs, dtype=torch.float64)
        for b, r in itertools.product(range(rows), range(positions)):
            formed[b] += torch.outer(left[b, :, r].double(), right[b, r].double())
        return low_rank(left, right), formed
    if kind.startswith("span of "):
        base, formed = make(kind.removeprefix("span of "), BASE, *sizes)
        return _span(base, formed, normal(rows, BASE))
    if kind == "span":  # the base of a span of a span
        base, formed = make("outer", BASE, *sizes)
        return _span(base, formed, normal(rows, BASE))
    if kind == "sum":
        parts = [make(part, rows, *sizes) for part in ("outer", "span of outer", "dense")]
        return SumBlock(tuple(block for block, _ in parts)), sum(formed for _, formed in parts)
    out = normal(rows, positions, outputs)
    kept = rows if not kind.startswith("shared") else max(1, rows // 2)
    place = torch.arange(rows)
    if kept != rows or kind.startswith("shared"):
        place = torch.randint(kept, (rows,), generator=generator)
    formed = torch.zeros(rows, outputs, inputs, dtype=torch.float64)
    if kind.endswith("one-hot"):
        index = torch.randint(inputs, (kept, positions), generator=generator)
        for b, t in itertools.product(range(rows), range(positions)):
            formed[b, :, index[place[b], t]] += out[b, t].double()
        held = OneHot(index, inputs)
    else:
        held = normal(kept, positions, inputs)
        for b, t in itertools.product(range(rows), range(positions)):
            formed[b] += torch.outer(out[b, t].double(), held[place[b], t].double())
    return OuterBlock(out, Shared(held, place) if kind.startswith("shared") else held), formed


def _span(base, formed, coefficients):
    rows = torch.zeros(len(coefficients), *formed.shape[1:], dtype=torch.float64)
    for c, k in itertools.product(range(len(coefficients)), range(len(formed))):
        rows[c] += coefficients[c, k].double() * formed[k]
    return SpanBlock(coefficients, base), rows


def same(got, want, tolerance=1e-12):
    """Check shape and numbers, relative to the largest."""
    assert got.shape == want.shape
    scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)
