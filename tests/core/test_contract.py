"""The planner against multiplications counted while they run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dattri_core import DenseBlock, OneHot, OuterBlock, SpecError
from dattri_core.blocks import Shared, SpanBlock, SumBlock, explain_inner
from dattri_core.contract import Shape, plan_inner, plan_pair, rows_per_slice


def counted(work):
    """Return the multiply-adds of the matrix products that ``work`` runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def outer(b, t, o, i):
    return OuterBlock(torch.ones(b, t, o), torch.ones(b, t, i))


dims = st.sampled_from([1, 2, 7, 40])


@given(b=dims, c=dims, t=dims, s=dims, o=dims, i=dims)
@settings(max_examples=60, deadline=None)
def test_planned_multiply_adds_are_those_that_run(b, c, t, s, o, i):
    left, right = outer(b, t, o, i), outer(c, s, o, i)
    ghost, form = (explain_inner(left, right, order) for order in ("ghost", "form"))
    matmuls = counted(lambda: left.inner(right, order="ghost"))
    elementwise = 2 * b * c * t * s  # the product of the two gram matrices, and its sum
    assert ghost.multiply_adds == matmuls + elementwise
    assert form.multiply_adds == counted(lambda: left.inner(right, order="form"))
    chosen = explain_inner(left, right)
    assert chosen.multiply_adds == min(ghost.multiply_adds, form.multiply_adds)
    auto = counted(lambda: left.inner(right))
    assert auto + (elementwise if chosen.order == "ghost" else 0) == chosen.multiply_adds


@given(b=dims, c=dims, m=dims, t=dims, o=dims, i=dims, shared=st.booleans())
@settings(max_examples=60, deadline=None)
def test_planned_multiply_adds_of_spans_are_those_that_run(b, c, m, t, o, i, shared):
    left, base = outer(b, 1, o, i), outer(m, t, o, i)
    if shared:
        base = OuterBlock(base.outputs, Shared(torch.ones(1, t, i), torch.zeros(m).long()))
    span = SpanBlock(torch.ones(c, m), base)
    through = explain_inner(base, left)
    elementwise = 2 * b * m * t if through.order == "ghost" else 0
    want = explain_inner(left, span, "span").multiply_adds - elementwise
    assert want == counted(lambda: left.inner(span, order="span"))
    kept = 1 if shared else m
    weighed = c * m * t * o  # each output times its coefficient
    weighing, forming = c * kept * t * o * i, (m * t + c * m) * o * i
    if forming < weighed + weighing:  # the rows of the base are formed first
        weighing, weighed = forming, 0
    formed = explain_inner(left, span, "form").multiply_adds
    assert formed == counted(lambda: span.dense()) + weighed + b * o * i + b * c * o * i
    assert counted(lambda: span.dense()) == weighing
    total = SumBlock((span, outer(c, 1, o, i)))
    parts = explain_inner(left, total, "parts").multiply_adds
    each = [explain_inner(part, left).multiply_adds for part in total.parts]
    assert parts == sum(each)
    least = min(parts, explain_inner(left, total, "form").multiply_adds)
    assert explain_inner(left, total).multiply_adds == least


@given(b=dims, t=dims, o=dims, i=dims)
@settings(max_examples=40, deadline=None)
def test_planned_pair_multiply_adds_are_those_that_run(b, t, o, i):
    block = outer(b, t, o, i)
    shape = Shape(b, t, o, i)
    ghost, form = (plan_pair(shape, order=order) for order in ("ghost", "form"))
    assert ghost.multiply_adds == counted(lambda: block.pair_inner(block, order="ghost")) + (
        b * t * t
    )
    assert form.multiply_adds == counted(lambda: block.pair_inner(block, order="form")) + b * o * i
    assert plan_pair(shape).multiply_adds == min(ghost.multiply_adds, form.multiply_adds)


def test_known_choices():
    # One position: ghost costs O + I a pair, forming O I.
    assert explain_inner(outer(100, 1, 512, 512), outer(100, 1, 512, 512)).order == "ghost"
    # Many positions of a small layer: T S (O + I) a pair against O I.
    assert explain_inner(outer(100, 64, 8, 9), outer(100, 64, 8, 9)).order == "form"
    # An embedding against formed rows picks columns and never forms its [O, I] rows.
    hot = OuterBlock(torch.ones(50, 4, 16), OneHot(torch.zeros(50, 4, dtype=torch.long), 1000))
    assert explain_inner(hot, DenseBlock(torch.ones(20, 16, 1000))).order == "gather"
    assert explain_inner(DenseBlock(torch.ones(20, 16, 1000)), hot).order == "gather"
    assert explain_inner(hot, hot).order == "ghost"


def test_an_order_that_does_not_exist_is_refused():
    formed, factored = Shape(2, None, 3, 4), Shape(2, 5, 3, 4)
    for order in ("ghost", "gather"):
        with pytest.raises(SpecError, match=rf"order '{order}' does not apply; valid: \['form'\]"):
            plan_inner(formed, factored, order=order)
    with pytest.raises(SpecError, match="valid"):
        plan_pair(formed, order="ghost")


@given(rows=st.integers(1, 500), positions=dims, limit=st.integers(1, 10**6))
@settings(max_examples=60, deadline=None)
def test_slices_keep_under_the_limit(rows, positions, limit):
    plan = plan_inner(Shape(rows, positions, 9, 9), Shape(30, positions, 9, 9), order="ghost")
    step = rows_per_slice(plan, rows, limit)
    assert 1 <= step <= rows
    per_row = plan.bytes / rows
    assert step == 1 or step * (plan.bytes // rows) <= limit
    assert step == rows or (step + 1) * per_row > limit  # no smaller than it need be


def test_no_intermediate_exceeds_the_limit():
    from dattri_core.testing import PeakMemory

    left, right = outer(64, 16, 20, 20), outer(32, 16, 20, 20)
    whole = explain_inner(left, right, "ghost").bytes
    limit = whole // 8
    with PeakMemory() as small:
        left.inner(right, order="ghost", limit=limit)
    with PeakMemory() as large:
        left.inner(right, order="ghost", limit=10 * whole)
    assert large.peak >= whole
    # Products of the pair: two gram matrices, their product, and the result [64, 32].
    assert small.peak <= 1.6 * limit + 2 * 64 * 32 * 4


@pytest.mark.parametrize("order", ["span", "form"])
def test_products_through_a_span_keep_under_the_limit(order):
    from dattri_core.testing import PeakMemory

    left = outer(40, 1, 30, 50)
    span = SpanBlock(torch.ones(8, 2000), outer(2000, 1, 30, 50))
    limit = 64 * 1024
    with PeakMemory() as small:
        found = left.inner(span, order=order, limit=limit)
    # A slice of [m, 40] products, the gram matrices it is made of, and the result twice.
    weighed = 8 * 2000 * 30 * 4 if order == "form" else 0  # outputs times coefficients
    assert small.peak <= 3 * limit + 2 * 40 * 8 * 4 + 2 * weighed
    assert torch.equal(found, torch.full((40, 8), 2000.0 * 30 * 50))


def test_known_choices_of_spans():
    base = outer(9000, 1, 128, 785)
    span = SpanBlock(torch.ones(100, 9000), base)
    # Through the base a train row costs 9000 (128 + 785); forming each query costs 9000 128 785.
    assert explain_inner(outer(1000, 1, 128, 785), span).order == "span"
    # Rows of a small space are formed once.
    small = SpanBlock(torch.ones(10, 9000), DenseBlock(torch.ones(9000, 20)))
    assert explain_inner(DenseBlock(torch.ones(10_000, 20)), small).order == "form"
