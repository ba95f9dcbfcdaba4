"""Second moments of rows: every order of multiplication against formed float64 rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dattri_core import DenseBlock, OneHot, OuterBlock, SpecError, factor_sums, square_sum
from dattri_core.contract import Shape, plan_squares
from dattri_core.moments import LONG_ROW, factor_entries
from dattri_core.testing import PeakMemory

SIZES = st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def times(matrix):
    return None if matrix is None else lambda x: x @ matrix


def formed(block, on_inputs, on_outputs):
    rows = block.dense().values
    if on_inputs is not None:
        rows = rows @ on_inputs
    if on_outputs is not None:
        rows = (rows.mT @ on_outputs).mT
    return rows


@settings(max_examples=80, deadline=None)
@given(SIZES, st.booleans(), st.booleans(), st.sampled_from([None, 1, 700]), st.integers(0, 99))
def test_square_sums_are_those_of_formed_rows_in_every_order(sizes, left, right, limit, seed):
    torch.manual_seed(seed)
    b, t, o, i = sizes
    on_inputs = normal(i, i) if right else None
    on_outputs = normal(o, o) if left else None
    outer = OuterBlock(normal(b, t, o), normal(b, t, i))
    hot = OuterBlock(normal(b, t, o), OneHot(torch.randint(i, (b, t)), i))
    for block in (outer, hot, outer.dense()):
        want = formed(block, on_inputs, on_outputs).square().sum(0)
        orders = [None, "form"]
        if block.positions is not None:
            orders += ["form-first"] * (left or right)
            orders.append("gather" if block is hot and not right else "ghost")
        for order in orders:
            got = square_sum(block, times(on_inputs), times(on_outputs), order=order, limit=limit)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_rows_of_one_dimension_and_long_rows():
    for shape in ((3, 7), (5, 1), (2, LONG_ROW)):
        values = normal(*shape)
        torch.testing.assert_close(square_sum(DenseBlock(values)), values.square().sum(0))


def test_half_precision_is_summed_in_float32():
    ones = torch.full((4096, 1, 2), 1.0, dtype=torch.bfloat16)
    total = square_sum(OuterBlock(ones, ones))
    assert total.dtype == torch.float32
    assert bool((total == 4096).all())  # bfloat16 stops at 256
    sums = factor_sums(OuterBlock(ones, ones))
    assert sums.inputs.dtype == torch.float32
    assert bool((sums.inputs == 4096).all())


def test_an_order_that_does_not_exist_is_refused():
    block = OuterBlock(normal(2, 3, 4), normal(2, 3, 5))
    with pytest.raises(SpecError, match=r"squares of.*order 'gather' does not apply; valid"):
        square_sum(block, order="gather")
    with pytest.raises(SpecError, match="'form-first' does not apply"):
        square_sum(block, order="form-first")  # nothing is mapped


@pytest.mark.parametrize(
    ("shape", "mapped", "order"),
    [
        (Shape(9, 1, 64, 64), True, "ghost"),  # squares of the factors
        (Shape(9, 2, 64, 64), True, "ghost"),  # three products of two positions
        (Shape(9, 8, 64, 64), True, "form"),
        (Shape(9, 1024, 16, 28), True, "form-first"),  # a convolution on a large image
        (Shape(9, 1024, 16, 28), False, "form"),
        (Shape(9, None, 16, 28), True, "form"),
        (Shape(9, 32, 16, 50_000, one_hot=True), False, "gather"),
    ],
)
def test_the_planner_takes_the_cheapest_order(shape, mapped, order):
    hot = shape.one_hot
    assert plan_squares(shape, on_inputs=mapped and not hot, on_outputs=mapped).order == order


@pytest.mark.parametrize("order", ["ghost", "form", "form-first"])
@pytest.mark.parametrize("positions", [1, 2, 7])
def test_planned_multiply_adds_are_those_that_run(order, positions):
    block = OuterBlock(normal(6, positions, 4), normal(6, positions, 5))
    plan = plan_squares(
        Shape(6, positions, 4, 5), on_inputs=True, on_outputs=True, order=order, item=8
    )
    with FlopCounterMode(display=False) as counter:
        square_sum(block, times(normal(5, 5)), times(normal(4, 4)), order=order)
    squares = 0 if order == "ghost" else 2 * 6 * 4 * 5  # elementwise: squared and added
    assert counter.get_total_flops() // 2 + squares == plan.multiply_adds


def test_squares_of_one_position_form_no_row():
    block = OuterBlock(torch.randn(64, 1, 100), torch.randn(64, 1, 100))
    with PeakMemory() as memory:
        square_sum(block, lambda x: x @ torch.eye(100), lambda e: e @ torch.eye(100))
    assert memory.peak < 64 * 100 * 100 * 4 / 4


def test_slices_stay_under_the_limit():
    block = OuterBlock(torch.randn(256, 8, 64), torch.randn(256, 8, 64))
    with PeakMemory() as memory:
        square_sum(block, limit=2**20)
    assert memory.peak < 2 * 2**20  # formed, all rows take 4 MiB


# --- factors ------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_factor_sums_count_positions_with_a_gradient(sizes, seed):
    torch.manual_seed(seed)
    b, t, o, i = sizes
    outputs, inputs = normal(b, t, o), normal(b, t, i)
    index = torch.randint(i, (b, t))
    dead, silent = torch.rand(2, b, t) < 0.3
    outputs[dead] = 0
    sums = factor_sums(OuterBlock(outputs, inputs.masked_fill(silent.unsqueeze(2), 0)))
    places = [(x, y) for x in range(b) for y in range(t) if not dead[x, y]]
    live = [place for place in places if not silent[place]]
    want_outputs, want_inputs, tokens = normal(o, o) * 0, normal(i, i) * 0, normal(i) * 0
    for place in live:
        want_outputs += torch.outer(outputs[place], outputs[place])
        want_inputs += torch.outer(inputs[place], inputs[place])
    for place in places:
        tokens[index[place]] += 1
    assert sums.positions == len(live)
    torch.testing.assert_close(sums.outputs, want_outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.inputs, want_inputs, rtol=1e-12, atol=1e-12)
    hot = OuterBlock(outputs, OneHot(index, i))
    torch.testing.assert_close(factor_sums(hot).inputs, tokens)
    assert factor_entries(hot) == o * o + i
    assert factor_entries(OuterBlock(outputs, inputs)) == o * o + i * i


def test_reduced_factors_are_of_the_sum_and_the_mean():
    outputs, inputs = normal(6, 4, 3), normal(6, 4, 5)
    outputs[1, 2:] = 0
    outputs[4] = 0
    sums = factor_sums(OuterBlock(outputs, inputs), average=True)
    means = torch.stack([inputs[b, :2].mean(0) if b == 1 else inputs[b].mean(0) for b in range(6)])
    kept = [0, 1, 2, 3, 5]
    torch.testing.assert_close(sums.inputs, means[kept].mT @ means[kept])
    torch.testing.assert_close(sums.outputs, outputs.sum(1).mT @ outputs.sum(1))
    assert sums.positions == 5


def test_formed_rows_have_no_factors():
    with pytest.raises(SpecError, match="are formed and have no factors"):
        factor_sums(DenseBlock(normal(2, 3, 4)))
