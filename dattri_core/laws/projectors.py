"""Laws of projectors: linear maps of single rows, with a true space and a true adjoint."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.capabilities import DataProjector
from dattri_core.laws.law import (
    law,
    require,
    require_close,
    require_equal,
    require_identical,
    require_same_aux,
)
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.spaces import SPACE, ToyProblem, flat_rows, formed, toy_rows
from dattri_core.laws.spy import Operations
from dattri_core.laws.untouched import require_dtype, require_frozen, require_rows_untouched
from dattri_core.protocols import LinearMap, Projector, RandomStream
from dattri_core.rows import Rows
from dattri_core.stages import needs_data

CPU = torch.device("cpu")
STREAMS = 40
"""Of random numbers, over which the mean of |P g|^2 is taken."""
DEVIATIONS = 5.0
"""Standard errors by which that mean may differ."""


@frozen(eq=False)
class ProjectorBench:
    """A projector, built on a space with every kind of block, or fitted on rows of it."""

    part: Projector

    def build(self, seed: int = 0, device: torch.device = CPU) -> LinearMap:
        """Return the map for one seed, on a device."""
        if needs_data(self.part):
            return self.fit(toy_rows(9, seed=20).to(device), seed)
        return self.part.build(SPACE, stream=RandomStream(seed, "law"), device=device)

    def fit(self, rows: Rows, seed: int = 0, batch: int = 4) -> LinearMap:
        """Return the map fitted on a train set of rows."""
        assert isinstance(self.part, DataProjector)
        return self.part.fit(ToyProblem(rows, batch, seed))


def _gives(capability: str) -> Any:
    def condition(bench: ProjectorBench) -> str | None:
        return None if capability in bench.part.gives else f"it does not give {capability!r}"

    return condition


def _additive(bench: ProjectorBench) -> str | None:
    additive = getattr(bench.build(), "additive", False)
    return None if additive else "its map is not additive"


def _blockwise(bench: ProjectorBench) -> str | None:
    return None if bench.build().blockwise else "its map is not blockwise"


@law("projector")
def part_is_frozen(bench: ProjectorBench) -> None:
    """No field can be set; after it was built for another stream, P and the part are the same."""

    def use(some: ProjectorBench, other: bool) -> Tensor:
        rows = toy_rows(2, seed=3) if other else toy_rows(4)
        return some.build(seed=int(other)).map(rows).flat()

    require_frozen(bench, use)


@law("projector")
def out_space_is_true(bench: ProjectorBench) -> None:
    """out_space(space) is the space of P g, and of the map."""
    told = bench.part.out_space(SPACE)
    require_equal(bench.build().out_space.fingerprint, told.fingerprint, "out_space of the map")
    mapped = bench.build().map(toy_rows(3))
    require_equal(mapped.space.fingerprint, told.fingerprint, "space of mapped rows")


@law("projector")
def out_space_is_pure(bench: ProjectorBench) -> None:
    """out_space(space) runs no operation on tensors and answers the same twice."""
    with Operations() as seen:
        first = bench.part.out_space(SPACE)
        again = bench.part.out_space(SPACE)
    require(not seen.names, f"out_space ran {sorted(set(seen.names))}")
    require_equal(again.fingerprint, first.fingerprint, "out_space, asked twice")


@law("projector")
def map_is_linear(bench: ProjectorBench) -> None:
    """P(2 g - 3 h) = 2 P g - 3 P h."""
    built = bench.build()
    left, right = formed(toy_rows(3)), formed(toy_rows(3, seed=9))
    mixed = Rows.from_flat(SPACE, 2 * left.flat() - 3 * right.flat(), left.index)
    want = 2 * built.map(left).flat() - 3 * built.map(right).flat()
    require_close(built.map(mixed).flat(), want, "map of a combination")


@law("projector")
def map_is_of_single_rows(bench: ProjectorBench) -> None:
    """(P rows)_b = P row_b: no row sees the others."""
    built, rows = bench.build(), toy_rows(4)
    whole = built.map(rows).flat()
    for b in (0, 3):
        one = built.map(rows.take(slice(b, b + 1))).flat()
        require_close(one, whole[b : b + 1], "map of a row alone")


@law("projector")
def map_is_of_the_row(bench: ProjectorBench) -> None:
    """P of a row kept as factors = P of the same row formed."""
    built, rows = bench.build(), toy_rows(4)
    require_close(built.map(rows).flat(), built.map(formed(rows)).flat(), "map of factored rows")


@law("projector")
def map_keeps_index_and_aux(bench: ProjectorBench) -> None:
    """index(P g) = index(g), aux(P g) = aux(g)."""
    rows = toy_rows(4)
    mapped = bench.build().map(rows)
    require_identical(mapped.index, rows.index, "index of mapped rows")
    require_same_aux(mapped.aux, rows.aux, "aux of mapped rows")


@law("projector")
def inputs_are_untouched(bench: ProjectorBench) -> None:
    """P leaves the rows that it is given, factored or formed, as they were; so does P^T."""
    built, rows = bench.build(), toy_rows(4)
    require_rows_untouched(rows, built.map, "map")
    require_rows_untouched(formed(rows), built.map, "map")
    if "adjoint" in bench.part.gives:
        require_rows_untouched(flat_rows(built.out_space, 3, seed=5), built.adjoint, "adjoint")


@law("projector")
def map_is_of_its_stream(bench: ProjectorBench) -> None:
    """The map is a function of the space and the random stream: built twice, the same bits."""
    rows = toy_rows(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = bench.build().map(rows).flat()
        torch.manual_seed(2)
        require_identical(bench.build().map(rows).flat(), first, "the map built twice")


def _fitted(bench: ProjectorBench) -> str | None:
    return None if needs_data(bench.part) else "it is not fitted on data"


def _drawn(bench: ProjectorBench) -> str | None:
    return "it is fitted on data, not drawn" if needs_data(bench.part) else None


@law("projector", _drawn)
def norms_are_kept_in_the_mean(bench: ProjectorBench) -> None:
    """E |P g|^2 = |g|^2 over the streams of random numbers, to 5 standard errors."""
    # Of random rows; of a row of ones, where numbers that are added up without a sign show most;
    # and in the mean over unit rows, where a wrong scale does.
    flat = torch.cat([toy_rows(3).flat(), torch.ones(1, SPACE.dim).double()])
    flat = torch.cat([flat, torch.eye(SPACE.dim, dtype=torch.float64)])
    rows = Rows.from_flat(SPACE, flat, torch.arange(len(flat)) + 100)
    ratios = torch.stack([_ratios(bench.build(seed), rows) for seed in _seeds()])
    found = torch.cat([ratios[:, :4], ratios[:, 4:].mean(1, keepdim=True)], 1)
    error = DEVIATIONS * found.std(0) / len(found) ** 0.5 + 1e-9
    gap = (found.mean(0) - 1).abs()
    said = f"mean |P g|^2 / |g|^2 over {len(found)} streams, of three random rows, a row of ones "
    said += f"and unit rows: {found.mean(0).tolist()}"
    require(bool((gap <= error).all()), f"{said}, expected 1 to {error.tolist()}")


def _ratios(built: LinearMap, rows: Rows) -> Tensor:
    """Return |P g|^2 / |g|^2 of every row, ``[B]``."""
    return built.map(rows).flat().double().square().sum(1) / rows.flat().square().sum(1)


def _seeds() -> range:
    return range(100, 100 + STREAMS)


@law("projector", _fitted)
def fit_is_of_the_train_set(bench: ProjectorBench) -> None:
    """The map fitted in batches of 1 or n, or on the rows in another order, is the same map."""
    rows, given = toy_rows(9, seed=20), toy_rows(4)
    order = torch.tensor([3, 8, 1, 0, 6, 2, 7, 5, 4])
    want = bench.fit(rows).map(given).flat()
    for size in (1, 9):
        got = bench.fit(rows, batch=size).map(given).flat()
        require_close(got, want, f"the map fitted in batches of {size}", 1e-7)
    turned = bench.fit(rows.take(order)).map(given).flat()
    require_close(turned, want, "the map fitted on the rows in another order", 1e-7)


@law("projector")
def float32_map_is_close(bench: ProjectorBench) -> None:
    """P g of float32 is float32, = P g in float64 to the tolerance of float32; so for P^T k."""
    built, rows = bench.build(), toy_rows(4)
    low, high = built.map(rows.to(dtype=torch.float32)), built.map(rows)
    require_close(low.flat().double(), high.flat(), "float32 map", 2e-5)
    require_dtype(low.dtype, torch.float32, "map")
    require_dtype(high.dtype, torch.float64, "map")
    if "adjoint" in bench.part.gives:
        keys = flat_rows(built.out_space, 3, seed=5)
        low, high = built.adjoint(keys.to(dtype=torch.float32)), built.adjoint(keys)
        require_close(low.flat().double(), high.flat(), "float32 adjoint", 2e-5)
        require_dtype(low.dtype, torch.float32, "adjoint")
        require_dtype(high.dtype, torch.float64, "adjoint")


@law("projector")
def device_does_not_show(bench: ProjectorBench) -> None:
    """P g on an accelerator, pretended where there is none, = P g on the CPU; so for P^T k."""
    device, rows = accelerator(), toy_rows(4)
    near, far = bench.build(), bench.build(device=device)
    got = far.map(rows.to(device)).flat()
    require_close(got.cpu(), near.map(rows).flat(), f"map on {device}")
    if "adjoint" in bench.part.gives:
        keys = flat_rows(near.out_space, 3, seed=5)
        raised = far.adjoint(keys.to(device)).flat()
        require_close(raised.cpu(), near.adjoint(keys).flat(), f"adjoint on {device}")


@law("projector", _gives("adjoint"))
def adjoint_is_true(bench: ProjectorBench) -> None:
    """<P g, k> = <g, P^T k>."""
    built, rows = bench.build(), toy_rows(4)
    keys = flat_rows(built.out_space, 3, seed=5)
    left = built.map(rows).flat() @ keys.flat().T
    raised = built.adjoint(keys)
    require_equal(raised.space.fingerprint, SPACE.fingerprint, "space of the adjoint")
    require_identical(raised.index, keys.index, "index of the adjoint")
    require_close(rows.flat() @ raised.flat().T, left, "<g, P^T k> against <P g, k>")


@law("projector", _gives("keeps-factors"))
def factors_are_kept(bench: ProjectorBench) -> None:
    """A block of factors is mapped to a block of factors."""
    rows = toy_rows(4)
    mapped = bench.build().map(rows)
    for spec in mapped.space:
        if spec.kind == "outer":
            require(
                mapped.blocks[spec.name].positions is not None,
                f"block {spec.name!r} is an outer block, but its rows came formed",
            )
    kinds = [spec.kind for spec in mapped.space]
    require_equal(kinds.count("outer"), 2, "outer blocks after the map, of 2 before")


@law("projector", _blockwise)
def blockwise_is_true(bench: ProjectorBench) -> None:
    """Block k of P g needs block k of g only: the map of a part is that part of the map."""
    built, rows = bench.build(), toy_rows(4)
    whole = built.map(rows)
    for name in SPACE.names:
        part = Rows(SPACE.select([name]), {name: rows.blocks[name]}, rows.index, rows.aux)
        mapped = built.map(part)
        for key, block in mapped.blocks.items():
            require(key in whole.blocks, f"the part {name!r} gave the block {key!r}")
            require_close(block.flat(), whole.blocks[key].flat(), f"map of block {name!r} alone")


@law("projector", _additive)
def additive_is_true(bench: ProjectorBench) -> None:
    """The maps of the parts of a row, each in the whole out_space, add up to P g."""
    built, rows = bench.build(), toy_rows(4)
    whole = built.map(rows)
    for names in ([[n] for n in SPACE.names], [SPACE.names[:2], SPACE.names[2:]]):
        parts = [built.map(rows.select(part)) for part in names]
        for mapped in parts:
            require_equal(
                mapped.space.fingerprint, whole.space.fingerprint, "space of a part's map"
            )
            require_identical(mapped.index, rows.index, "index of a part's map")
        total = torch.stack([mapped.flat() for mapped in parts]).sum(0)
        require_close(total, whole.flat(), f"sum of the maps of the parts {names}")
