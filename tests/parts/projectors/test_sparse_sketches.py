"""Sparse sketches of rows: `sjlt`, `mask`, `factor-mask`, `grass`, `factgrass` and chains of them.

Against their matrices written down, and their moments over seeds.
"""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch
from dattri_parts.projectors.chain import Chain, ChainMap
from dattri_parts.projectors.factgrass import FactGrass
from dattri_parts.projectors.factor_mask import FactorMask
from dattri_parts.projectors.grass import Grass
from dattri_parts.projectors.kronecker import Kronecker
from dattri_parts.projectors.mask import Mask
from dattri_parts.projectors.sjlt import SJLT
from oracles.devices import DEVICES
from oracles.sketches import matrix_of

from dattri_core import (
    BlockSpec,
    DenseBlock,
    GroupedBlock,
    Method,
    OneHot,
    OuterBlock,
    RandomStream,
    Rows,
    Space,
    SpecError,
)
from dattri_core.laws import check
from dattri_core.laws.spaces import SPACE, flat_rows, formed, toy_rows
from dattri_core.spec import from_json, from_toml, to_json, to_toml

CPU = torch.device("cpu")
SKETCHES = [
    SJLT(7),
    SJLT(6, nonzeros=3),
    SJLT(4, scope="block"),
    Mask(9),
    Mask(3, scope="block"),
    FactorMask(2),
    FactorMask(1, uncovered="sketch"),
    FactorMask(100, rank_in=2, uncovered="drop"),
    Grass(4, mask_dim=9),
    Grass(3, mask_dim=6, scope="block", nonzeros=3),
    FactGrass(3, mask_rank=2),
    FactGrass(2, mask_rank=2, uncovered="sketch", nonzeros=2),
    FactGrass(3, mask_rank=100, mask_rank_in=2, uncovered="drop"),
    Chain((Mask(9), SJLT(4), SJLT(4))),
    Chain((FactorMask(2, uncovered="drop"), Kronecker(1), Mask(2, scope="block"), SJLT(3))),
]
DIGESTS = [
    "2836b379a126",
    "fe05811c5bdb",
    "135628fc1076",
    "cc571d4bf7e2",
    "cf5f002e3a7f",
    "98953e7510dc",
    "0e681944b83b",
    "2365a3805591",
    "c9a766191a6e",
    "35ce5298aeb1",
    "be47a1306cfe",
    "c94655beb276",
    "45ba9142c40e",
    "5450cb33c833",
    "b18e9728e8ea",
]
"""Of the matrices at seed 0 and checkpoint 0, by the order of the sketches."""
ADDITIVE = [part for part in SKETCHES if getattr(part, "scope", "row") == "row"]


def build(part, space=SPACE, seed=0, checkpoint=0, device=CPU):
    stream = RandomStream(seed, "projector", checkpoint)
    return part.build(space, stream=stream, device=device)


@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_they_meet_every_law_of_projectors(part):
    report = check("projector", part)
    assert report.ok, str(report)


def test_their_matrices_are_frozen():
    """Keys, versions and places in a chain included: a seed means the same in every process."""
    # in float32, and without -0.0, so that no order of a sum shows
    found = [(matrix_of(build(part)).float() + 0.0).numpy().tobytes() for part in SKETCHES]
    assert [hashlib.sha256(held).hexdigest()[:12] for held in found] == DIGESTS


@pytest.mark.parametrize("part", SKETCHES, ids=repr)
@pytest.mark.parametrize("seed", [0, 5])
def test_map_and_adjoint_are_the_matrix(part, seed):
    mapped = build(part, seed=seed)
    matrix = matrix_of(mapped)
    for count in (0, 1, 4):
        rows = toy_rows(count, seed=seed)
        want = rows.flat() @ matrix.T
        for given in (rows, formed(rows)):
            assert (mapped.map(given).flat() - want).abs().sum() < 1e-11
        keys = flat_rows(mapped.out_space, count, seed=seed)
        assert (mapped.adjoint(keys).flat() - keys.flat() @ matrix).abs().sum() < 1e-11


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_they_are_the_same_in_every_batch_order_dtype_and_device(part, dtype, device):
    rows = toy_rows(6).to(device, dtype)
    mapped = build(part, device=torch.device(device))
    whole = mapped.map(rows).flat().cpu()
    rounding = 60 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for size in (1, 2, 5):
        parts = [mapped.map(rows.take(slice(b, b + size))).flat().cpu() for b in range(0, 6, size)]
        assert (torch.cat(parts) - whole).abs().max() <= rounding
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    turned = mapped.map(rows.take(order.to(device))).flat().cpu()
    assert (turned - whole[order]).abs().max() <= rounding
    want = rows.to("cpu", torch.float64).flat() @ matrix_of(build(part)).T
    assert (whole.double() - want).abs().max() <= rounding
    for other in (build(part, seed=1), build(part, checkpoint=1)):
        assert (other.map(rows.to("cpu")).flat() - whole).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "part", [SJLT(64, nonzeros=4), Mask(512), Grass(64, mask_dim=512, nonzeros=4)], ids=repr
)
def test_integer_rows_are_sketched_exactly_whatever_their_blocks(part, dtype):
    """The scales are 2 or 1/2 here, so that every number is an integer or its half."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(-4, 5, (33, 2048), generator=generator)
    spaces = [
        Space((BlockSpec("all", "dense", (2048,)),)),
        Space(tuple(BlockSpec(str(k), "dense", (n,)) for k, n in enumerate((1, 700, 811, 536)))),
    ]
    want = flat.double() @ matrix_of(build(part, spaces[0])).T
    for space in spaces:
        mapped = build(part, space)
        for size in (1, 7, 8, 33):
            for first in range(0, 33, size):
                index = torch.arange(first, min(first + size, 33))
                got = mapped.map(Rows.from_flat(space, flat[index].to(dtype), index)).flat()
                assert got.dtype == torch.float32
                assert torch.equal(got.double(), want[index])


@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_half_precision_does_not_overflow(part):
    rows = toy_rows(2)
    large = Rows.from_flat(SPACE, torch.full_like(rows.flat(), 6e4).half(), rows.index)
    assert bool(torch.isfinite(build(part).map(large).flat()).all())


@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_additive_maps_take_a_row_in_parts(part):
    mapped, rows = build(part), toy_rows(4)
    assert (part in ADDITIVE and not mapped.blockwise) == getattr(mapped, "additive", False)
    if not getattr(mapped, "additive", False):
        assert mapped.blockwise
        return
    whole = mapped.map(rows).flat()
    parts = [mapped.map(rows.select([name])) for name in SPACE.names]
    assert all(one.space == mapped.out_space for one in parts)
    assert (sum(one.flat() for one in parts) - whole).abs().max() < 1e-12


def test_a_rank_above_every_size_is_no_sketch():
    rows = toy_rows(3)
    for part in (
        SJLT(15, scope="block"),
        Mask(15, scope="block"),
        FactorMask(6),
        Grass(15, mask_dim=15, scope="block"),
        FactGrass(15, mask_rank=6),
        Chain((FactorMask(6), SJLT(15, scope="block"))),
    ):
        mapped = build(part)
        assert part.out_space(SPACE) == SPACE  # parameters and all
        assert all(mapped.map(rows).blocks[n] is rows.blocks[n] for n in SPACE.names)
    mapped = build(Mask(1000))
    assert mapped.out_space.dim == SPACE.dim
    assert torch.equal(mapped.map(rows).flat(), rows.flat())


def test_grass_and_factgrass_are_their_chains():
    rows = toy_rows(4)
    for scope in ("row", "block"):
        one = build(Grass(3, mask_dim=6, scope=scope))
        other = build(Chain((Mask(6, scope), SJLT(3, scope=scope))))
        assert torch.equal(one.map(rows).flat(), other.map(rows).flat())
    for uncovered in ("sketch", "drop"):
        one = build(FactGrass(3, mask_rank=2, uncovered=uncovered))
        chained = (FactorMask(2, uncovered=uncovered), SJLT(3, scope="block"))
        other = build(Chain(chained))
        assert one.out_space == other.out_space
        assert torch.equal(one.map(rows).flat(), other.map(rows).flat())
    kept = build(FactGrass(3, mask_rank=2))
    assert kept.map(rows).blocks["scale"] is rows.blocks["scale"]
    assert kept.out_space["linear"].shape == (3,)


def test_every_place_of_a_chain_has_its_own_numbers():
    space = Space((BlockSpec("sketch", "dense", (64,)),))
    inner = Chain((SJLT(64), SJLT(64)))
    chain = build(Chain((inner, SJLT(64), inner)), space)
    assert isinstance(chain, ChainMap)
    first, second, third = chain.maps
    matrices = [matrix_of(m) for m in (*first.maps, second, *third.maps)]
    assert len(matrices) == 5
    for j, one in enumerate(matrices):
        for other in matrices[:j]:  # 64 places each, one in 64 shared by chance
            assert (one * other).abs().sum() < 8


def test_factors_are_never_formed_before_the_masks(monkeypatch):
    monkeypatch.setattr(OneHot, "dense", lambda self, dtype: pytest.fail("was made dense"))
    space = Space((BlockSpec("words", "outer", (300, 5000)),))
    index = torch.randint(5000, (2, 40))
    outputs = torch.randn(2, 40, 300, dtype=torch.float64)
    rows = Rows(space, {"words": OuterBlock(outputs, OneHot(index, 5000))}, torch.arange(2))
    seen = []
    form = OuterBlock.dense
    monkeypatch.setattr(OuterBlock, "dense", lambda self: seen.append(self.shape) or form(self))
    part = FactGrass(16, mask_rank_in=50, mask_rank_out=20)
    mapped = build(part, space)
    got = mapped.map(rows).flat()
    assert set(seen) == {(20, 50)}
    small = mapped.maps[0].map(rows).blocks["words"]
    assert small.positions == 40
    chosen = {side: mapped.maps[0].sides["words", side].selection for side in ("outputs", "inputs")}
    picked = rows.flat().reshape(2, 300, 5000)[:, chosen["outputs"].index][
        :, :, chosen["inputs"].index
    ] * math.sqrt(15 * 100)
    assert (small.dense().values - picked).abs().max() < 1e-12
    want = picked.flatten(1) @ matrix_of(mapped.maps[1]).T
    assert (got - want).abs().max() < 1e-11


@pytest.mark.parametrize(
    "part",
    [Mask(9), Mask(4, scope="block"), FactorMask(3), FactGrass(4, mask_rank=3), SJLT(5)],
    ids=repr,
)
def test_grouped_blocks_are_sketched_like_their_formed_rows(part):
    space = Space((BlockSpec("convolution", "grouped", (6, 5)), *SPACE.blocks[2:]))
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = (
        torch.randn(3, 4, 2, size, generator=generator, dtype=torch.float64) for size in (3, 5)
    )
    blocks = {"convolution": GroupedBlock(outputs, inputs), "scale": toy_rows(3).blocks["scale"]}
    rows = Rows(space, blocks, torch.arange(3))
    mapped = build(part, space)
    assert (mapped.map(rows).flat() - rows.flat() @ matrix_of(mapped).T).abs().max() < 1e-12
    keys = flat_rows(mapped.out_space, 3)
    assert (mapped.adjoint(keys).flat() - keys.flat() @ matrix_of(mapped)).abs().max() < 1e-12


def test_a_mask_of_factors_needs_some():
    for part in (FactorMask(2, uncovered="drop"), FactGrass(2, uncovered="drop")):
        with pytest.raises(SpecError, match=r"'factor-mask': none of the blocks scale has factors"):
            part.out_space(SPACE.select(["scale"]))


# --- moments over seeds ---------------------------------------------------------------------------
LENGTH, SEEDS = 40, 256


def vectors(kind):
    """Return u and v."""
    generator = torch.Generator().manual_seed(8)
    u, v = torch.randn(2, LENGTH, generator=generator, dtype=torch.float64)
    if kind == "same":
        v = u
    if kind == "orthogonal":
        v = v - u * (u @ v) / (u @ u)
    if kind == "sparse":
        u, v = ((w * (torch.arange(LENGTH) % 9 == 0)) for w in (u, v))
    if kind == "unit":
        u = v = torch.eye(LENGTH, dtype=torch.float64)[7]
    return u, v


def signs_variance(u, v, rank):
    square = (u @ u) * (v @ v) + (u @ v) ** 2 - 2 * (u * u * v * v).sum()
    return float(square / rank)


def mask_variance(u, v, kept):
    size, square = len(u), float((u * u * v * v).sum())
    return (size - kept) / (kept * (size - 1)) * (size * square - float(u @ v) ** 2)


def grass_variance(u, v, kept, rank):
    """The variance of the mask, and the mean over masks of that of the sketch after it."""
    size, square = len(u), float((u * u * v * v).sum())
    lengths, product = float(u @ u) * float(v @ v), float(u @ v)
    pair = kept * (kept - 1) / (size * (size - 1))
    both = (size / kept) ** 2 * (kept / size * square + pair * (lengths - square))
    of_mask = mask_variance(u, v, kept)
    after = both + (of_mask + product**2) - 2 * (size / kept) * square
    return of_mask + after / rank


def products(part, rows, seeds=SEEDS):
    """Return <P g, P h> of each pair of rows g, h that follow each other, for each seed."""
    found = torch.empty(len(rows) // 2, seeds, dtype=torch.float64)
    for seed in range(seeds):
        mapped = build(part, rows.space, seed).map(rows).flat()
        found[:, seed] = (mapped[::2] * mapped[1::2]).sum(1)
    return found


KINDS = ("dense", "same", "orthogonal", "sparse", "unit")


@functools.cache
def products_of_kinds(part):
    """Return those of u and v of each kind: a sketch of each seed is built once."""
    space = Space((BlockSpec("row", "dense", (LENGTH,)),))
    flat = torch.stack([w for kind in KINDS for w in vectors(kind)])
    return dict(
        zip(
            KINDS, products(part, Rows.from_flat(space, flat, torch.arange(len(flat)))), strict=True
        )
    )


CASES = [
    (SJLT(8), lambda u, v: signs_variance(u, v, 8)),
    (SJLT(8, nonzeros=4), lambda u, v: signs_variance(u, v, 8)),
    (Mask(10), lambda u, v: mask_variance(u, v, 10)),
    (Grass(8, mask_dim=20), lambda u, v: grass_variance(u, v, 20, 8)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "variance"), CASES, ids=lambda x: repr(x)[:20])
def test_inner_products_are_unbiased_with_the_stated_variance(part, variance, kind):
    """z of the mean under 5, and the variance over seeds within its own sampling error."""
    u, v = vectors(kind)
    found, want = products_of_kinds(part)[kind], variance(u, v)
    if abs(want) < 1e-12:  # |P e_i| = 1 exactly
        assert (found - u @ v).abs().max() < 1e-12
        assert isinstance(part, SJLT)
        return
    z = (float(found.mean()) - float(u @ v)) / (want / SEEDS) ** 0.5
    assert abs(z) < 5
    # that of a variance is sqrt((kurtosis - 1) / n): long tails where few numbers count
    centred = (found - found.mean()).double()
    kurtosis = float(centred.pow(4).mean() / centred.square().mean() ** 2)
    assert abs(float(found.var()) / want - 1) < 5 * math.sqrt((kurtosis - 1) / SEEDS)


def test_a_mask_of_both_sides_is_unbiased_with_the_variance_of_a_product():
    u, v = vectors("dense")
    e, f = u[:12], v[:12]
    space = Space((BlockSpec("layer", "outer", (12, LENGTH)),))
    block = OuterBlock(torch.stack([e, f]).unsqueeze(1), torch.stack([u, v]).unsqueeze(1))
    rows = Rows(space, {"layer": block}, torch.arange(2))
    (found,) = products(FactorMask(rank_in=16, rank_out=6), rows, 400)
    a, b = float(u @ v), float(e @ f)
    variance = (a * a + mask_variance(u, v, 16)) * (b * b + mask_variance(e, f, 6)) - (a * b) ** 2
    assert abs(float(found.mean()) - a * b) < 5 * (variance / 400) ** 0.5
    assert 0.6 < float(found.var()) / variance < 1.6


@pytest.mark.parametrize(
    "part",
    [
        FactGrass(3, mask_rank=2, uncovered="sketch"),
        Grass(3, mask_dim=5, scope="block"),
        SJLT(3, scope="block"),
        Chain((FactorMask(2, uncovered="sketch"), SJLT(4))),
    ],
    ids=repr,
)
def test_rows_of_many_positions_are_unbiased_too(part):
    rows = toy_rows(2)
    want = float(rows.take(slice(0, 1)).inner(rows.take(slice(1, 2))))
    (found,) = products(part, rows, 300)
    assert abs(float(found.mean()) - want) < 5 * float(found.std()) / len(found) ** 0.5


# --- specs and refusals ---------------------------------------------------------------------------
@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_a_sketch_is_its_spec(part):
    method = Method(projector=part)
    assert Method(**method.to_spec()) == method
    assert from_json(to_json(method)) == method
    assert from_toml(to_toml(method)) == method


def test_a_chain_is_spelled_by_its_parts_and_their_fields_are_overridden():
    spec = {"name": "chain", "parts": ["mask", {"name": "sjlt", "dim": 512}]}
    method = Method(projector=spec)
    assert method.projector == Chain((Mask(), SJLT(512)))
    assert method.to_spec()["projector"] == spec
    made = Method(projector={**spec, "parts.0.dim": 99, "nonzeros": 4}).projector
    assert made == Chain((Mask(99), SJLT(512, nonzeros=4)))


@pytest.mark.parametrize("part", SKETCHES, ids=repr)
def test_rows_of_another_space_are_refused(part):
    mapped = build(part)
    other = Space(tuple(BlockSpec(s.name, "dense", (s.size,)) for s in SPACE))
    rows = Rows.from_flat(other, toy_rows(2).flat(), torch.arange(2))
    with pytest.raises(SpecError, match="projector"):
        mapped.map(rows)
    with pytest.raises(SpecError, match=r"adjoint of the projector|space"):
        mapped.adjoint(rows)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "sjlt", "dim": 0}, "dim"),
        ({"name": "sjlt", "dim": 10, "nonzeros": 3}, r"dim=10 is no multiple of nonzeros=3.*12"),
        ({"name": "sjlt", "scope": "layer"}, "'row', 'block'"),
        ({"name": "mask", "dim": 2.5}, "expected int"),
        ({"name": "grass", "mask_dim": 4}, "mask_dim=4 leaves fewer numbers than dim=2048"),
        ({"name": "factgrass", "nonzeros": 3}, "dim=4096 is no multiple of nonzeros=3"),
        ({"name": "factor-mask", "uncovered": "no"}, "'keep', 'sketch', 'drop'"),
        ({"name": "chain"}, "needs a value for 'parts'"),
        ({"name": "chain", "parts": []}, "parts"),
        ({"name": "chain", "parts": "mask"}, "'parts' got 'mask'.*expected list of Projector"),
        ({"name": "chain", "parts": ["musk"]}, "no projector 'musk'; did you mean 'mask'"),
        ({"name": "chain", "parts": ["mask", {"name": "sjlt", "dims": 2}]}, "'dim'"),
        (
            {"name": "chain", "parts": ["mask", {"name": "kronecker", "initialisation": "pca"}]},
            r"part 1 \(Kronecker\) is fitted on the train set.*stages=",
        ),
        ({"name": "chain", "parts": ["mask", "sjlt"], "dim": 2}, r"'parts\.0\.dim'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_tensor(spec, message):
    with pytest.raises(SpecError, match=message):
        Method(projector=spec)


def test_a_chain_that_loses_factors_is_refused_by_what_needs_them():
    with pytest.raises(SpecError, match="factors"):
        Method(
            projector={"name": "chain", "parts": [{"name": "factor-mask", "rank": 4}, "sjlt"]},
            inverse_hessian={"curvature": "ekfac", "solver": "spectral"},
        )
    kept = Chain((FactorMask(4), Kronecker(2)))
    assert kept.gives == {"adjoint", "keeps-factors"}
    assert Chain((FactorMask(4), SJLT(2))).gives == {"adjoint"}
    Method(projector=kept, inverse_hessian={"curvature": "ekfac", "solver": "spectral"})


def test_blocks_that_a_part_drops_add_nothing():
    part = Chain((FactorMask(2, uncovered="drop"), SJLT(3)))
    mapped, rows = build(part), toy_rows(2, dtype=torch.float32).to(dtype=torch.bfloat16)
    alone = mapped.map(rows.select(["scale"]))
    assert (alone.dtype, float(alone.flat().abs().max())) == (torch.float32, 0.0)
    assert isinstance(alone.blocks["sketch"], DenseBlock)
