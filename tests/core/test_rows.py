"""Every kind of block against formed float64 rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import BlockSpec, DenseBlock, OneHot, OuterBlock, Rows, Space, SpecError, low_rank
from dattri_core.blocks import concatenate, explain_inner

KINDS = ("dense", "outer", "one-hot", "low-rank")


def make(kind, rows, positions, outputs, inputs, generator, dtype=torch.float64):
    """Return a block and its formed float64 rows [B, O, I] by a loop over positions."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "dense":
        values = normal(rows, outputs, inputs)
        return DenseBlock(values), values.double()
    if kind == "low-rank":
        left, right = normal(rows, outputs, positions), normal(rows, positions, inputs)
        formed = torch.zeros(rows, outputs, inputs, dtype=torch.float64)
        for b, r in itertools.product(range(rows), range(positions)):
            formed[b] += torch.outer(left[b, :, r].double(), right[b, r].double())
        return low_rank(left, right), formed
    out = normal(rows, positions, outputs)
    formed = torch.zeros(rows, outputs, inputs, dtype=torch.float64)
    if kind == "one-hot":
        index = torch.randint(inputs, (rows, positions), generator=generator)
        for b, t in itertools.product(range(rows), range(positions)):
            formed[b, :, index[b, t]] += out[b, t].double()
        return OuterBlock(out, OneHot(index, inputs)), formed
    x = normal(rows, positions, inputs)
    for b, t in itertools.product(range(rows), range(positions)):
        formed[b] += torch.outer(out[b, t].double(), x[b, t].double())
    return OuterBlock(out, x), formed


def same(got, want, tolerance=1e-12):
    assert got.shape == want.shape
    scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)


sizes = st.integers(1, 5)
counts = st.integers(0, 5)
positions = st.integers(0, 4)
limits = st.sampled_from([1, 64, 400, 2**28])
pairs_of_kinds = [(a, b) for a in KINDS for b in KINDS]


@pytest.mark.parametrize(("left_kind", "right_kind"), pairs_of_kinds)
@given(
    b=counts, c=counts, t=positions, s=positions, o=sizes, i=sizes, limit=limits,
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_inner_of_every_pair_in_every_order(left_kind, right_kind, b, c, t, s, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    left, formed_left = make(left_kind, b, t, o, i, generator)
    right, formed_right = make(right_kind, c, s, o, i, generator)
    want = torch.einsum("boi,coi->bc", formed_left, formed_right)
    same(left.dense().values, formed_left)
    same(left.flat(), formed_left.reshape(b, o * i))
    same(left.inner(right, limit=limit), want)
    both = left_kind != "dense" and right_kind != "dense"
    gathers = {left_kind, right_kind} == {"one-hot", "dense"}
    for order, valid in (("form", True), ("ghost", both), ("gather", gathers)):
        if valid:
            assert explain_inner(left, right, order).order == order
            same(left.inner(right, order=order, limit=limit), want)
        else:
            with pytest.raises(SpecError, match=f"order '{order}' does not apply; valid: "):
                left.inner(right, order=order)


@pytest.mark.parametrize(("left_kind", "right_kind"), pairs_of_kinds)
@given(b=counts, t=positions, s=positions, o=sizes, i=sizes, limit=limits, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_pair_inner_of_every_pair_in_every_order(left_kind, right_kind, b, t, s, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    left, formed_left = make(left_kind, b, t, o, i, generator)
    right, formed_right = make(right_kind, b, s, o, i, generator)
    want = (formed_left * formed_right).sum((1, 2))
    same(left.pair_inner(right, limit=limit), want)
    same(left.pair_inner(right, order="form", limit=limit), want)
    if left_kind != "dense" and right_kind != "dense":
        same(left.pair_inner(right, order="ghost", limit=limit), want)
    else:
        with pytest.raises(SpecError, match="order 'ghost' does not apply"):
            left.pair_inner(right, order="ghost")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)])
def test_dense_rows_of_any_shape(shape):
    left = torch.randn(3, *shape, dtype=torch.float64)
    right = torch.randn(2, *shape, dtype=torch.float64)
    want = torch.tensor([[float((x * y).sum()) for y in right] for x in left], dtype=torch.float64)
    same(DenseBlock(left).inner(DenseBlock(right)), want)
    same(DenseBlock(left[:2]).pair_inner(DenseBlock(right)), want.diagonal())
    assert DenseBlock(left[:0]).flat().shape == (0, left[0].numel())
    if len(shape) != 2:
        with pytest.raises(SpecError, match="only blocks of shape"):
            DenseBlock(left).map(lambda x: x, lambda x: x)


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
    assert (mapped.positions is None) == (kind == "dense")  # factors stay factors
    same(mapped.dense().values, on_out @ formed @ on_in.T)
    weights = torch.randn(b, generator=generator, dtype=torch.float64)
    same(block.scale(weights).dense().values, weights[:, None, None] * formed)
    index = torch.randint(b, (7,), generator=generator) if b else torch.zeros(0, dtype=torch.long)
    same(block.take(index).dense().values, formed[index])
    same(block.take(slice(1, 3)).dense().values, formed[1:3])
    assert block.is_finite()


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=4, max_size=4),
    o=sizes, i=sizes, seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_concatenate_pads_positions_with_nothing(kinds, lengths, o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    made = [make(kind, b, t, o, i, generator) for kind, (b, t) in zip(kinds, lengths, strict=False)]
    joined = concatenate([block for block, _ in made])
    same(joined.dense().values, torch.cat([formed for _, formed in made]))
    if "dense" not in kinds:
        assert joined.positions == max(block.positions for block, _ in made)
    if set(kinds) == {"one-hot"}:
        assert isinstance(joined.inputs, OneHot)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [None, "form", "ghost", "gather"])
def test_half_precision_accumulates_in_float32(dtype, kind, order):
    # 600 ones: a float16/bfloat16 accumulator of squares stalls, and 600*... overflows float16.
    generator = torch.Generator().manual_seed(0)
    left, formed_left = make(kind, 3, 40, 24, 30, generator, dtype)
    other = "dense" if order == "gather" else kind
    right, formed_right = make(other, 2, 40, 24, 30, generator, dtype)
    valid = {"form": True, "ghost": kind != "dense", "gather": kind == "one-hot", None: True}
    if not valid[order]:
        pytest.skip(f"{order} does not apply to {kind}")
    got = left.inner(right, order=order)
    assert got.dtype == torch.float32
    assert left.pair_inner(left).dtype == torch.float32
    same(got, torch.einsum("boi,coi->bc", formed_left, formed_right), 1e-5)
    same(left.pair_inner(left), formed_left.square().sum((1, 2)), 1e-5)


def test_half_precision_does_not_overflow():
    block = DenseBlock(torch.full((1, 1000, 1), 100.0, dtype=torch.float16))  # 1e7 > 65504
    assert float(block.inner(block)) == 1e7
    factors = OuterBlock(
        torch.full((1, 1000, 1), 10.0, dtype=torch.float16),
        torch.full((1, 1000, 1), 10.0, dtype=torch.float16),
    )
    assert float(factors.inner(factors, order="ghost")) == 1e10
    assert float(factors.inner(factors, order="form")) == 1e10


def test_shapes_that_do_not_meet_are_refused():
    generator = torch.Generator().manual_seed(0)
    left, _ = make("outer", 2, 3, 4, 5, generator)
    right, _ = make("outer", 2, 3, 5, 4, generator)
    with pytest.raises(SpecError, match=r"\(4, 5\) meet rows of \(5, 4\)"):
        left.inner(right)
    three, _ = make("dense", 3, 0, 4, 5, generator)
    with pytest.raises(SpecError, match="2 rows meet 3"):
        left.pair_inner(three)
    with pytest.raises(SpecError, match="equal B and T"):
        OuterBlock(torch.zeros(2, 3, 4), torch.zeros(2, 2, 5))


def world(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    space = Space(
        (
            BlockSpec("a", "outer", (3, 4)),
            BlockSpec("b", "dense", (5,)),
            BlockSpec("c", "outer", (2, 6)),
        )
    )
    outer, formed_outer = make("outer", rows, 2, 3, 4, generator)
    hot, formed_hot = make("one-hot", rows, 3, 2, 6, generator)
    vector = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    flat = torch.cat([formed_outer.flatten(1), vector, formed_hot.flatten(1)], 1)
    aux = {"label": torch.arange(rows) * 10}
    blocks = {"c": hot, "a": outer, "b": DenseBlock(vector)}
    return Rows(space, blocks, torch.arange(rows) + 100, aux), flat


@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_rows_are_their_flat_rows(seed):
    left, flat_left = world(seed, 5)
    right, flat_right = world(seed + 1, 4)
    same(left.flat(), flat_left)  # in the order of the space, not of the mapping
    same(left.inner(right), flat_left @ flat_right.T)
    same(left.inner(right.take(slice(0, 0))), torch.zeros(5, 0, dtype=torch.float64))
    same(left.pair_inner(left), flat_left.square().sum(1))
    again = Rows.from_flat(left.space, flat_left, left.index, left.aux)
    for name in left.space.names:
        same(again.blocks[name].dense().values, left.blocks[name].dense().values)
    picked = left.take(torch.tensor([3, 0]))
    same(picked.flat(), flat_left[[3, 0]])
    assert picked.index.tolist() == [103, 100]
    assert picked.aux["label"].tolist() == [30, 0]
    part = left.select(["c", "a"])
    assert part.space.names == ("a", "c")
    same(part.flat(), torch.cat([flat_left[:, :12], flat_left[:, 17:]], 1))
    assert part.index is left.index
    assert part.aux is left.aux
    joined = Rows.concatenate([left, right])
    same(joined.flat(), torch.cat([flat_left, flat_right]))
    assert joined.index.tolist() == [*range(100, 105), *range(100, 104)]
    assert left.to(dtype=torch.float32).dtype == torch.float32
    same(left.scale(torch.arange(5.0)).flat(), torch.arange(5.0).double()[:, None] * flat_left)
    assert left.nbytes == 8 * (5 * 2 * (3 + 4) + 5 * 5 + 5 * 3 * (2 + 1))


def test_rows_refuse_what_does_not_fit():
    rows, flat = world(0, 3)
    with pytest.raises(SpecError, match="do not match the space"):
        Rows(rows.space, {"a": rows.blocks["a"]}, rows.index)
    with pytest.raises(SpecError, match="index 2 rows"):
        Rows(rows.space, rows.blocks, rows.index[:2])
    with pytest.raises(SpecError, match=r"aux \['label'\]"):
        Rows(rows.space, rows.blocks, rows.index, {"label": torch.zeros(2)})
    with pytest.raises(SpecError, match=r"needs \[B, 29\]"):
        Rows.from_flat(rows.space, flat[:, :-1], rows.index)
    other = Rows.from_flat(Space((BlockSpec("z", "dense", (29,)),)), flat, rows.index)
    for meet in (lambda: rows.inner(other), lambda: rows.pair_inner(other)):
        with pytest.raises(SpecError, match="differ at block 'a'"):
            meet()
    with pytest.raises(SpecError, match="concatenate rows"):
        Rows.concatenate([rows, other])
    with pytest.raises(SpecError, match=r"no block \['z'\]"):
        rows.select(["a", "z"])


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_numbers_are_seen(kind):
    block, _ = make(kind, 2, 3, 2, 2, torch.Generator().manual_seed(0))
    assert block.is_finite()
    held = block.values if kind == "dense" else block.outputs
    held[0, 0, 0] = float("nan")
    assert not block.is_finite()
    if kind == "outer":
        block, _ = make(kind, 2, 3, 2, 2, torch.Generator().manual_seed(0))
        block.inputs[1, 1, 1] = float("inf")
        assert not block.is_finite()
