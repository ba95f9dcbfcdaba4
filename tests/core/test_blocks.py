"""Every kind of block against formed float64 rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.blocks import COMBINED, FACTORED, FORMED, KINDS, make, same

from dattri_core import DenseBlock, OneHot, OuterBlock, SpecError
from dattri_core.blocks import (
    Shared,
    SpanBlock,
    SumBlock,
    compact,
    concatenate,
    explain_inner,
    joins,
    share,
)
from dattri_core.blocks.finite import all_finite
from dattri_core.contract import contraction_limit

sizes = st.integers(1, 5)
counts = st.integers(0, 5)
positions = st.integers(0, 4)
limits = st.sampled_from([1, 64, 400, 2**28])
pairs_of_kinds = [(a, b) for a in KINDS for b in KINDS]


def orders(left, right, *, pair=False):
    """Return for each order whether it exists for two kinds."""
    kinds = {left, right}
    combined = kinds & set(COMBINED)
    hot = {kind for kind in kinds if kind.endswith("one-hot")} - combined
    return {
        "form": True,
        "ghost": not kinds & {*FORMED, *COMBINED},
        "gather": not pair and not combined and bool(hot) and bool(kinds & set(FORMED)),
        "span": bool(combined) and "sum" not in kinds,
        "parts": "sum" in kinds,
    }


@pytest.mark.parametrize(("left_kind", "right_kind"), pairs_of_kinds)
@given(
    b=counts, c=counts, t=positions, s=positions, o=sizes, i=sizes, limit=limits,
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_inner_of_every_pair_in_every_order(left_kind, right_kind, b, c, t, s, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    left, formed_left = make(left_kind, b, t, o, i, generator)
    right, formed_right = make(right_kind, c, s, o, i, generator)
    want = torch.einsum("boi,coi->bc", formed_left, formed_right)
    same(left.dense().values, formed_left)
    same(left.flat(), formed_left.reshape(b, o * i))
    same(left.inner(right, limit=limit), want)
    for order, valid in orders(left_kind, right_kind).items():
        if valid:
            assert explain_inner(left, right, order).order == order
            same(left.inner(right, order=order, limit=limit), want)
        else:
            with pytest.raises(SpecError, match=f"order '{order}' does not apply; valid: "):
                left.inner(right, order=order)


@pytest.mark.parametrize(("left_kind", "right_kind"), pairs_of_kinds)
@given(b=counts, t=positions, s=positions, o=sizes, i=sizes, limit=limits, seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_pair_inner_of_every_pair_in_every_order(left_kind, right_kind, b, t, s, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    left, formed_left = make(left_kind, b, t, o, i, generator)
    right, formed_right = make(right_kind, b, s, o, i, generator)
    want = (formed_left * formed_right).sum((1, 2))
    same(left.pair_inner(right, limit=limit), want)
    for order, valid in orders(left_kind, right_kind, pair=True).items():
        if valid:
            same(left.pair_inner(right, order=order, limit=limit), want)
        else:
            with pytest.raises(SpecError, match=f"order '{order}' does not apply"):
                left.pair_inner(right, order=order)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)])
def test_dense_rows_of_any_shape(shape):
    left = torch.randn(3, *shape, dtype=torch.float64)
    right = torch.randn(2, *shape, dtype=torch.float64)
    want = torch.tensor([[float((x * y).sum()) for y in right] for x in left], dtype=torch.float64)
    same(DenseBlock(left).inner(DenseBlock(right)), want)
    same(DenseBlock(left[:2]).pair_inner(DenseBlock(right)), want.diagonal())
    assert DenseBlock(left[:0]).flat().shape == (0, left[0].numel())
    weights = torch.randn(2, 3, dtype=torch.float64)
    span = SpanBlock(weights, DenseBlock(left))
    same(span.dense().flat(), weights @ left.reshape(3, left[0].numel()))
    same(span.inner(DenseBlock(right)), weights @ want)
    if len(shape) != 2:
        with pytest.raises(SpecError, match="only blocks of shape"):
            DenseBlock(left).map(lambda x: x, lambda x: x)


@pytest.mark.parametrize("kind", KINDS)
@given(b=counts, c=counts, t=positions, o=sizes, i=sizes, limit=limits, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_combinations_are_formed_in_slices(kind, b, c, t, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    block, formed = make(kind, b, t, o, i, generator)
    mixing = torch.randn(c, b, generator=generator, dtype=torch.float64)
    with contraction_limit(limit):
        same(block.combine(mixing), torch.einsum("cb,boi->coi", mixing, formed))


@pytest.mark.parametrize("kind", KINDS)
@given(b=counts, t=positions, o=sizes, i=sizes, k=sizes, r=sizes, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_map_scale_take(kind, b, t, o, i, k, r, seed):
    generator = torch.Generator().manual_seed(seed)
    block, formed = make(kind, b, t, o, i, generator)
    on_in = torch.randn(k, i, generator=generator, dtype=torch.float64)
    on_out = torch.randn(r, o, generator=generator, dtype=torch.float64)
    mapped = block.map(lambda x: x @ on_in.T, lambda y: y @ on_out.T)
    assert mapped.shape == (r, k)
    assert (mapped.positions is None) == (kind in FORMED)  # factors stay factors
    same(mapped.dense().values, on_out @ formed @ on_in.T)
    weights = torch.randn(b, generator=generator, dtype=torch.float64)
    same(block.scale(weights).dense().values, weights[:, None, None] * formed)
    index = torch.randint(b, (7,), generator=generator) if b else torch.zeros(0, dtype=torch.long)
    same(block.take(index).dense().values, formed[index])
    same(block.take(slice(1, 3)).dense().values, formed[1:3])
    assert block.is_finite()
    assert block.nbytes >= 0
    assert compact(block).nbytes <= block.nbytes
    same(compact(block).dense().values, formed)


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype_and_back(kind):
    block, formed = make(kind, 4, 2, 3, 5, torch.Generator().manual_seed(0))
    narrow = block.to(None, torch.float32)
    assert narrow.dtype == torch.float32
    assert block.dtype == torch.float64
    same(narrow.dense().values, formed, 1e-6)
    same(block.to("cpu", torch.float64).inner(block), formed.flatten(1) @ formed.flatten(1).T)
    if kind.startswith("span"):  # nothing to move: the base is still the one that others hold
        assert block.to("cpu", torch.float64).base is block.base


def test_joins_says_whether_blocks_stay_what_they_are():
    torch.manual_seed(0)
    base = OuterBlock(torch.randn(4, 1, 3), torch.randn(4, 1, 2))
    other = OuterBlock(torch.randn(4, 1, 3), torch.randn(4, 1, 2))
    dense = DenseBlock(torch.randn(2, 3, 2))
    span, alien = (SpanBlock(torch.randn(2, 4), of) for of in (base, other))
    total = SumBlock((dense, span))
    for alike in ([dense, dense], [base, other], [span, span], [total, total], [dense]):
        assert joins(alike)
        assert type(concatenate(alike)) is type(alike[0])
    for unlike in (
        [dense, base],
        [span, alien],
        [total, SumBlock((dense, alien))],
        [total, SumBlock((dense,))],
        [base, OuterBlock(torch.randn(4, 2, 3), torch.randn(4, 2, 2))],
    ):
        assert not joins(unlike)


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=4, max_size=4),
    o=sizes, i=sizes, seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_concatenate_pads_positions_with_nothing(kinds, lengths, o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    made = [make(kind, b, t, o, i, generator) for kind, (b, t) in zip(kinds, lengths, strict=False)]
    joined = concatenate([block for block, _ in made])
    same(joined.dense().values, torch.cat([formed for _, formed in made]))
    if not set(kinds) & {*FORMED, *COMBINED}:
        assert joined.positions == max(block.positions for block, _ in made)
    if set(kinds) == {"one-hot"}:
        assert isinstance(joined.inputs, OneHot)
    if set(kinds) == {"shared one-hot"}:
        assert isinstance(joined.inputs.values, OneHot)


def test_spans_of_one_base_and_sums_of_them_stay_spans_and_sums():
    generator = torch.Generator().manual_seed(0)
    span, formed_span = make("span of outer", 3, 2, 4, 5, generator)
    own, formed_own = make("outer", 3, 2, 4, 5, generator)
    joined = concatenate([span, span.take(slice(0, 1)), span.scale(torch.ones(3))])
    assert isinstance(joined, SpanBlock)
    assert joined.base is span.base
    same(joined.dense().values, formed_span[[0, 1, 2, 0, 0, 1, 2]])
    total = SumBlock((own, span))
    twice = concatenate([total, total.take(slice(1, 2))])
    assert isinstance(twice, SumBlock)
    assert twice.parts[1].base is span.base
    assert isinstance(twice.parts[0], OuterBlock)
    same(twice.dense().values, (formed_own + formed_span)[[0, 1, 2, 1]])


@pytest.mark.parametrize("kind", KINDS)
@given(b=counts, t=positions, k=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_share_keeps_the_rows_whatever_they_have_in_common(kind, b, t, k, seed):
    generator = torch.Generator().manual_seed(seed)
    block, formed = make(kind, b, t, 3, 4, generator)
    group = torch.randint(2, (b,), generator=generator)
    same(share(block, group).dense().values, formed)
    if kind in FACTORED and b:
        place = torch.arange(b).repeat_interleave(k)[torch.randperm(b * k, generator=generator)]
        outputs = torch.randn(b * k, t, 3, generator=generator, dtype=torch.float64)
        apart = OuterBlock(outputs, OuterBlock(outputs, block.take(place).own_inputs).inputs)
        joined = share(apart, place + 7)
        same(joined.dense().values, apart.dense().values)
        if k > 1:
            assert isinstance(joined.inputs, Shared)
            assert joined.nbytes <= apart.nbytes


def test_inputs_are_shared_up_to_the_rounding_of_a_product_and_no_further():
    outputs, inputs = torch.randn(6, 1, 3), torch.randn(3, 1, 4).repeat_interleave(2, 0)
    place = torch.tensor([0, 0, 1, 1, 2, 2])
    eps = torch.finfo(torch.float32).eps * float(inputs.abs().max())
    nudge = torch.zeros(6, 1, 4)
    nudge[1, 0, 0] = 4 * eps
    assert isinstance(share(OuterBlock(outputs, inputs + nudge), place).inputs, Shared)
    assert share(OuterBlock(outputs, inputs + 100 * nudge), place).inputs is not None
    assert isinstance(share(OuterBlock(outputs, inputs + 100 * nudge), place).inputs, torch.Tensor)


def test_shared_inputs_are_kept_and_multiplied_once():
    values, index = torch.randn(50, 1, 30), torch.arange(50).repeat_interleave(6)
    shared = OuterBlock(torch.randn(300, 1, 20), Shared(values, index))
    apart = OuterBlock(shared.outputs, values[index])
    assert shared.nbytes == 4 * (300 * 20 + 50 * 30)
    few, many = (explain_inner(block, block, "ghost") for block in (shared, apart))
    assert many.multiply_adds - few.multiply_adds == 300**2 * 30 - 50**2 * 30
    taken = shared.take(slice(6, 12))  # the six rows of one example
    assert len(taken.inputs.values) == 1
    assert taken.inputs.values.data_ptr() == values[1:].data_ptr()  # a view
    assert len(shared.take(torch.tensor([7, 299, 8])).inputs.values) == 2


def test_a_base_is_not_copied():
    base, _ = make("outer", 40, 1, 6, 7, torch.Generator().manual_seed(0))
    span = SpanBlock(torch.randn(9, 40, dtype=torch.float64), base)
    for made in (span.take(slice(0, 2)), span.scale(torch.ones(9)), concatenate([span, span])):
        assert made.base is base
    assert span.nbytes == 9 * 40 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [None, "form", "ghost", "gather", "span", "parts"])
def test_half_precision_accumulates_in_float32(dtype, kind, order):
    # 600 ones: a float16/bfloat16 accumulator of squares stalls, and 600*... overflows float16.
    generator = torch.Generator().manual_seed(0)
    left, formed_left = make(kind, 3, 40, 24, 30, generator, dtype)
    other = "dense" if order == "gather" else kind
    right, formed_right = make(other, 2, 40, 24, 30, generator, dtype)
    if order is not None and not orders(kind, other)[order]:
        pytest.skip(f"{order} does not apply to {kind}")
    got = left.inner(right, order=order)
    assert got.dtype == torch.float32
    assert left.pair_inner(left).dtype == torch.float32
    same(got, torch.einsum("boi,coi->bc", formed_left, formed_right), 1e-5)
    same(left.pair_inner(left), formed_left.square().sum((1, 2)), 1e-5)
    assert left.combine(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float32


def test_half_precision_does_not_overflow():
    block = DenseBlock(torch.full((1, 1000, 1), 100.0, dtype=torch.float16))  # 1e7 > 65504
    assert float(block.inner(block)) == 1e7
    factors = OuterBlock(
        torch.full((1, 1000, 1), 10.0, dtype=torch.float16),
        torch.full((1, 1000, 1), 10.0, dtype=torch.float16),
    )
    assert float(factors.inner(factors, order="ghost")) == 1e10
    assert float(factors.inner(factors, order="form")) == 1e10


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_meet_are_refused(kind):
    generator = torch.Generator().manual_seed(0)
    left, _ = make(kind, 2, 3, 4, 5, generator)
    right, _ = make("outer", 2, 3, 5, 4, generator)
    with pytest.raises(SpecError, match=r"\((4, 5|5, 4)\) meet rows of \((4, 5|5, 4)\)"):
        left.inner(right)
    three, _ = make("dense", 3, 0, 4, 5, generator)
    with pytest.raises(SpecError, match="2 rows meet 3"):
        left.pair_inner(three)


def test_blocks_that_do_not_fit_together_are_refused():
    with pytest.raises(SpecError, match="equal B and T"):
        OuterBlock(torch.zeros(2, 3, 4), torch.zeros(2, 2, 5))
    base = DenseBlock(torch.zeros(3, 4))
    with pytest.raises(SpecError, match="one column for each of the 3 rows"):
        SpanBlock(torch.zeros(2, 4), base)
    with pytest.raises(SpecError, match="cannot be added"):
        SumBlock((base, DenseBlock(torch.zeros(2, 4))))


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_numbers_are_seen(kind):
    block, _ = make(kind, 2, 3, 2, 2, torch.Generator().manual_seed(0))
    assert block.is_finite()
    _first_number(block)[...] = float("nan")
    assert not block.is_finite()
    if kind == "outer":
        block, _ = make(kind, 2, 3, 2, 2, torch.Generator().manual_seed(0))
        block.inputs[1, 1, 1] = float("inf")
        assert not block.is_finite()


def _first_number(block):
    for name in ("values", "outputs", "coefficients"):
        if hasattr(block, name):
            return getattr(block, name)[0, 0]
    return _first_number(block.parts[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_all_finite_finds_what_is_not_and_bears_sums_that_overflow(dtype, bad):
    values = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert torch.isinf(values.sum())
    assert all_finite(values)
    assert all_finite(values[:0])
    assert not all_finite(values.index_fill(1, torch.tensor([3]), bad))
    both = torch.zeros(4, dtype=dtype)
    both[0], both[2] = bad, -bad
    assert not all_finite(both)


def test_formed_rows_lie_as_rows_after_a_map():
    """Those of queries are read for every train batch; turned ones would be copied each time."""
    values, left, right = (
        torch.randn(*size, dtype=torch.float64) for size in ((3, 4, 5), (6, 4), (7, 5))
    )
    made = DenseBlock(values).map(right, left).values
    torch.testing.assert_close(made, torch.einsum("boi,po,qi->bpq", values, left, right))
    assert made.is_contiguous()
    turned = DenseBlock(values).map(None, lambda given: given @ left.mT).values
    torch.testing.assert_close(turned, torch.einsum("boi,po->bpi", values, left))
