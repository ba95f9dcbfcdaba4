"""Laws of folds: checkpoints reduced tile by tile, from a state that can be stored."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from attrs import evolve, frozen
from safetensors.torch import load, save
from torch import Tensor

from dattri_core.errors import DattriError
from dattri_core.laws.law import law, require, require_close, require_equal, require_identical
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.untouched import require_frozen
from dattri_core.laws.worlds import random
from dattri_core.protocols import Fold, FoldState, Scored, Snapshot

TILE = (4, 3)
COUNT = 3
RATES = [1.0, 0.5, 0.25]
RATE = "learning-rate"


@frozen(eq=False)
class FoldBench:
    """A fold with toy tiles of scores."""

    part: Fold

    def snapshot(self, position: int, count: int, rate: float = 1.0) -> Snapshot:
        """Return a snapshot with a learning rate, where the fold needs one."""
        weight = rate if RATE in self.part.needs else None
        return Snapshot(position, count, f"checkpoint {position}", weight)

    def run(self, tiles: Iterable[Scored], rates: Iterable[float] = ()) -> Tensor:
        """Return the fold of tiles of consecutive checkpoints."""
        tiles = list(tiles)
        rates = list(rates) or [0.5**position for position in range(len(tiles))]
        snapshots = [self.snapshot(k, len(tiles), rate) for k, rate in enumerate(rates)]
        return self.folded(tiles, snapshots)

    def folded(self, tiles: Sequence[Scored], snapshots: Sequence[Snapshot]) -> Tensor:
        """Return the fold of tiles, each at its snapshot."""
        state: FoldState | None = None
        for position in self.order(len(tiles)):
            state = self.part.update(state, tiles[position], snapshots[position])
        assert state is not None
        return self.part.finish(state)

    def order(self, count: int) -> list[int]:
        """Return the positions of checkpoints in the order that the fold asks for."""
        positions = list(range(count))
        return positions if self.part.order == "forward" else positions[::-1]


def tiles(count: int, dtype: torch.dtype = torch.float64) -> list[Scored]:
    """Return tiles of scores with weights, one a checkpoint."""
    return [
        Scored(
            random(*TILE, seed=k).to(dtype), (random(TILE[0], seed=50 + k).abs() + 0.5).to(dtype)
        )
        for k in range(count)
    ]


def part(scored: Scored, rows: slice, columns: slice = slice(None)) -> Scored:
    """Return some rows and columns of a tile."""
    weight = None if scored.weight is None else scored.weight[rows]
    return Scored(scored.values[rows, columns], weight)


@law("fold")
def part_is_frozen(bench: FoldBench) -> None:
    """No field can be set; after a fold of other tiles, the fold and the part are the same."""

    def use(some: FoldBench, other: bool) -> Tensor:
        return some.run(tiles(COUNT + 2)[::-1] if other else tiles(COUNT))

    require_frozen(bench, use)


@law("fold")
def facts_are_declared(bench: FoldBench) -> None:
    """Order is "forward" or "reverse"; needs name nothing but learning rates and weights."""
    require(bench.part.order in ("forward", "reverse"), f"order is {bench.part.order!r}")
    unknown = bench.part.needs - {RATE, "weight"}
    require(not unknown, f"needs name {sorted(unknown)}")


@law("fold")
def needs_are_all_it_reads(bench: FoldBench) -> None:
    """The fold is the same with and without learning rates and weights that it does not need."""
    needs = bench.part.needs
    told = [Snapshot(k, COUNT, f"checkpoint {k}", 0.5**k) for k in range(COUNT)]
    want = bench.folded(tiles(COUNT), told)
    if RATE not in needs:
        untold = [evolve(snapshot, learning_rate=None) for snapshot in told]
        _require_unread(bench, tiles(COUNT), untold, want, "learning rates", RATE)
    if "weight" not in needs:
        bare = [Scored(tile.values) for tile in tiles(COUNT)]
        snapshots = [bench.snapshot(k, COUNT, 0.5**k) for k in range(COUNT)]
        _require_unread(bench, bare, snapshots, want, "weights", "weight")


def _require_unread(
    bench: FoldBench,
    given: Sequence[Scored],
    snapshots: Sequence[Snapshot],
    want: Tensor,
    what: str,
    word: str,
) -> None:
    fix = f"it reads what it does not ask for: add {word!r} to needs"
    try:
        got = bench.folded(given, snapshots)
    except (TypeError, AttributeError, ValueError, DattriError) as error:
        require(False, f"without {what} it raises {error!r}; {fix}")
    gap = float((got - want).abs().max())
    require(gap < 1e-9, f"without {what} the fold differs by {gap:.3e}, expected 0; {fix}")


def _rated(bench: FoldBench) -> str | None:
    return None if RATE in bench.part.needs else "it needs no learning rate"


@law("fold", _rated)
def learning_rates_are_read(bench: FoldBench) -> None:
    """The fold at rates 1, 1/2, 1/4 is another than at 1/4, 1, 1/2, where it needs them."""
    # Users have to give rates to a fold that needs them.
    first, second = (bench.run(tiles(COUNT), rates) for rates in (RATES, RATES[-1:] + RATES[:-1]))
    require(
        not torch.equal(first, second),
        f"the fold at learning rates {RATES} is that at {RATES[-1:] + RATES[:-1]}, expected "
        f"another; read snapshot.learning_rate in update, or take {RATE!r} out of needs",
    )


@law("fold", _rated)
def rates_keep_their_unit(bench: FoldBench) -> None:
    """The fold at 3 times the learning rates is 3 times the fold, or, as of a mean, the same."""
    want = bench.run(tiles(COUNT), RATES)
    got = bench.run(tiles(COUNT), [3 * rate for rate in RATES])
    gaps = [float((got - factor * want).abs().max()) for factor in (3, 1)]
    require(
        min(gaps) <= 1e-9 * float(want.abs().max()),
        f"the fold at 3 times the learning rates differs by {gaps[0]:.3e} from 3 times the fold, "
        f"and by {gaps[1]:.3e} from the fold; expected one of them, 0: scores are summed times "
        "their rate, or averaged by it",
    )


@law("fold")
def names_do_not_show(bench: FoldBench) -> None:
    """The fold is the same when checkpoints have other names: their place is their position."""
    named = [bench.snapshot(k, COUNT, 0.5**k) for k in range(COUNT)]
    other = [evolve(one, name=f"runs/b/step_{90 - 10 * k}.pt") for k, one in enumerate(named)]
    got, want = (bench.folded(tiles(COUNT), snapshots) for snapshots in (other, named))
    require_close(got, want, "the fold of checkpoints of other names")


@law("fold")
def one_checkpoint_is_itself(bench: FoldBench) -> None:
    """fold of one checkpoint, with learning rate 1 and weights 1, is the identity."""
    values = random(*TILE, seed=0)
    one = Scored(values, torch.ones(TILE[0], dtype=torch.float64))
    require_close(bench.run([one], [1.0]), values, "the fold of one checkpoint")


@law("fold")
def tiles_are_their_own(bench: FoldBench) -> None:
    """The fold of some train rows, or of some test columns, = that part of the fold."""
    whole, all_rows = bench.run(tiles(COUNT)), slice(0, TILE[0])
    for rows, columns in (
        (slice(0, 1), slice(None)),
        (slice(1, 4), slice(None)),
        (all_rows, slice(0, 1)),
        (all_rows, slice(1, 3)),
    ):
        got = bench.run(part(tile, rows, columns) for tile in tiles(COUNT))
        which = "train rows" if rows != all_rows else "test columns"
        require_close(got, whole[rows, columns], f"the fold of a tile of fewer {which}")


@law("fold")
def state_is_all_it_keeps(bench: FoldBench) -> None:
    """A state is tensors; stored, read again and mixed with other tiles, it gives the same bits."""
    made, other = tiles(COUNT), [Scored(-t.values, t.weight) for t in tiles(COUNT)]
    want = bench.run(tiles(COUNT))
    state: FoldState | None = None
    for position in bench.order(COUNT):
        snapshot = bench.snapshot(position, COUNT, 0.5**position)
        state = _stored(bench.part.update(state, made[position], snapshot))
        bench.part.update(None, other[position], snapshot)
    assert state is not None
    require_identical(bench.part.finish(state), want, "the fold of a stored state")


def _stored(state: FoldState) -> Mapping[str, Tensor]:
    for key, value in state.items():
        require(isinstance(key, str), f"the state has a key {key!r}")
        require(isinstance(value, Tensor), f"state[{key!r}] is a {type(value).__name__}")
    written = io.BytesIO(save({key: value.contiguous() for key, value in state.items()}))
    return load(written.getvalue())


@law("fold")
def fold_is_homogeneous(bench: FoldBench) -> None:
    """fold of a S = a fold of S for a = 3, -3, 1e-6 and 0; so units and signs survive."""
    want = bench.run(tiles(COUNT))
    for factor in (3.0, -3.0, 1e-6, 0.0):
        got = bench.run(Scored(factor * t.values, t.weight) for t in tiles(COUNT))
        require_close(got, factor * want, f"the fold of {factor:g} times the scores")


def _weighted(bench: FoldBench) -> str | None:
    return None if "weight" in bench.part.needs else "it needs no weight of train rows"


@law("fold", _weighted)
def equal_weights_scale_the_rows(bench: FoldBench) -> None:
    """The fold at weights w_i >= 0, equal at all checkpoints, is w_i times that at weights 1."""
    made = tiles(COUNT)
    weight = random(TILE[0], seed=50).abs() + 0.5
    weight[1] = 0.0  # as that of an example that the model is sure of
    got = bench.run(Scored(tile.values, weight) for tile in made)
    plain = bench.run(Scored(tile.values, torch.ones_like(weight)) for tile in made)
    require_close(got, weight.unsqueeze(1) * plain, "the fold at equal weights")


@law("fold")
def equal_checkpoints_keep_the_sign(bench: FoldBench) -> None:
    """The fold of equal checkpoints is the scores times a positive number: signs survive."""
    one = tiles(1)[0]
    even = Scored(one.values, torch.ones(TILE[0], dtype=torch.float64))
    folded = bench.run([even] * COUNT, [1.0] * COUNT)
    ratio = folded / one.values
    require(bool((ratio > 0).all()), "scores of equal checkpoints change their sign")
    require_close(ratio, ratio[0, 0].expand(TILE), "ratio of the fold to the scores")


@law("fold")
def counts_are_alike(bench: FoldBench) -> None:
    """The fold of c equal checkpoints is r_c S, with r_1, r_2, ... all equal, rising or falling."""
    one = tiles(1)[0]
    even = Scored(one.values, torch.ones(TILE[0], dtype=torch.float64))
    ratios = []
    for count in range(1, 7):
        ratio = bench.run([even] * count, [1.0] * count) / one.values
        require_close(ratio, ratio[0, 0].expand(TILE), f"ratio of the fold at {count} checkpoints")
        ratios.append(float(ratio[0, 0]))
    steps = [after - before for before, after in pairwise(ratios)]
    same = all(abs(step) <= 1e-9 * abs(ratios[0]) for step in steps)
    turns = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    require(same or turns, f"the fold of equal checkpoints by their count: {ratios}")


@law("fold")
def inputs_are_untouched(bench: FoldBench) -> None:
    """Update leaves the scores and weights that it is given as they are."""
    made = tiles(COUNT)
    bench.run(made)
    for got, want in zip(made, tiles(COUNT), strict=True):
        require_identical(got.values, want.values, "scores after update")
        assert got.weight is not None
        assert want.weight is not None
        require_identical(got.weight, want.weight, "weights after update")


@law("fold")
def fold_is_repeatable(bench: FoldBench) -> None:
    """The same tiles fold to the same bits, whatever the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = bench.run(tiles(COUNT))
        torch.manual_seed(2)
        require_identical(bench.run(tiles(COUNT)), first, "the fold, run again")


@law("fold")
def float32_fold_is_close(bench: FoldBench) -> None:
    """The fold in float32 = the fold in float64, and has the shape of a tile."""
    low = bench.run(tiles(COUNT, torch.float32)).double()
    require_equal(tuple(low.shape), TILE, "shape of the fold")
    require_close(low, bench.run(tiles(COUNT)), "float32 fold", 2e-5)


@law("fold")
def device_does_not_show(bench: FoldBench) -> None:
    """The fold of tiles on an accelerator, pretended where there is none, = that on the CPU."""
    device = accelerator()
    moved = []
    for tile in tiles(COUNT):
        assert tile.weight is not None
        moved.append(Scored(tile.values.to(device), tile.weight.to(device)))
    require_close(bench.run(moved).cpu(), bench.run(tiles(COUNT)), f"the fold on {device}")
