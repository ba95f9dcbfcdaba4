"""Laws of scorers: what a tile of scores may depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.blocks import DenseBlock
from dattri_core.capabilities import BilinearScorer, WeighingScorer
from dattri_core.laws.law import law, require, require_close, require_equal, require_identical
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.spaces import formed, toy_rows
from dattri_core.laws.untouched import contents, require_frozen, require_rows_untouched
from dattri_core.laws.worlds import random
from dattri_core.protocols import MEASURED, Scored, Scorer, Side
from dattri_core.rows import Rows


class Watched(Mapping[str, Tensor]):
    """Auxiliary numbers that remember which were read; any name has numbers."""

    def __init__(self, count: int, seed: int) -> None:
        self.read: set[str] = set()
        self._count, self._seed = count, seed

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        numbers = random(self._count, seed=self._seed + sum(key.encode())).abs() + 0.1
        return (3 * numbers).long() if key == "label" else numbers / (1 + numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.read))

    def __len__(self) -> int:
        return len(self.read)


@frozen(eq=False)
class ScorerBench:
    """A scorer with toy rows on both sides."""

    part: Scorer

    def side(self, rows: Rows, seed: int) -> Side:
        """Return what the scorer may read of rows: the aux and the norm that it declares.

        A label is that of the rows, the same on both sides.
        """
        needs, aux = self.part.needs, Watched(1000, seed)
        read = {
            name: rows.aux[name] if name in rows.aux else aux[name][rows.index - 100]
            for name in needs - MEASURED
        }
        square = rows.pair_inner(rows)
        numbers = {"norm": square.sqrt(), "self-influence": square, "inverse-norm": square.sqrt()}
        measured = {name: numbers[name] if name in needs else None for name in sorted(MEASURED)}
        return Side(
            rows.index,
            read,
            measured["norm"],
            self_influence=measured["self-influence"],
            inverse_norm=measured["inverse-norm"],
        )

    def total(self, train: Rows, test: Rows) -> Tensor:
        """Return the sum of the parts of all blocks, ``[B, C]``."""
        parts = [self.part.pair(train.blocks[n], test.blocks[n]) for n in train.space.names]
        return torch.stack(parts).sum(0)

    def scored(self, train: Rows, test: Rows) -> Scored:
        """Return the scores of a tile."""
        total = self.total(train, test)
        return self.part.finish(total, self.side(train, 1), self.side(test, 2))


def _tile(bench: ScorerBench) -> str | None:
    if bench.part.locality == "tile":
        return None
    return f"locality {bench.part.locality!r}: it sees a whole column of train rows"


@law("scorer")
def part_is_frozen(bench: ScorerBench) -> None:
    """No field can be set; after other rows were scored, scores and the part are the same."""

    def use(some: ScorerBench, other: bool) -> Tensor:
        train, test = toy_rows(4), toy_rows(3, seed=9)
        seven = torch.full((4,), 7.0)
        return some.scored(train.scale(seven) if other else train, test).values

    require_frozen(bench, use)


@law("scorer")
def facts_are_declared(bench: ScorerBench) -> None:
    """Locality is "tile" or "column"; scores are [B, C], a weight [B] if it weighs, all finite."""
    require(bench.part.locality in ("tile", "column"), f"locality is {bench.part.locality!r}")
    scored = bench.scored(toy_rows(4), toy_rows(3, seed=9))
    require_equal(tuple(scored.values.shape), (4, 3), "shape of the scores")
    require(bool(torch.isfinite(scored.values).all()), "the scores are not finite")
    weighs = isinstance(bench.part, WeighingScorer) and bench.part.weighs
    require_equal(scored.weight is not None, weighs, "whether it gives a weight")
    if scored.weight is not None:
        require_equal(tuple(scored.weight.shape), (4,), "shape of the weight")


@law("scorer")
def needs_are_all_it_reads(bench: ScorerBench) -> None:
    """Finish reads only the aux and the measured numbers that `needs` names."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    sides, watched = [], []
    for rows, seed in ((train, 1), (test, 2)):
        aux = Watched(len(rows), seed)
        sides.append(evolve(bench.side(rows, seed), aux=aux))
        watched.append(aux)
    try:
        bench.part.finish(bench.total(train, test), *sides)
    except (TypeError, AttributeError, AssertionError) as error:
        unneeded = sorted(MEASURED - bench.part.needs)
        reason = f"reads one of {unneeded} without needing it" if unneeded else "fails"
        require(False, f"finish {reason}: {type(error).__name__}: {error}")
    read = watched[0].read | watched[1].read
    require(read <= bench.part.needs, f"finish reads {sorted(read - bench.part.needs)}, undeclared")


def _measures(bench: ScorerBench) -> str | None:
    needed = bench.part.needs & MEASURED
    return None if needed else f"it needs none of {sorted(MEASURED)}"


@law("scorer", _measures)
def what_is_measured_is_read(bench: ScorerBench) -> None:
    """A measured number of train rows that `needs` names, times 4, 1, 3, 2, changes the scores."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    total, sides = bench.total(train, test), (bench.side(train, 1), bench.side(test, 2))
    before = bench.part.finish(total, *sides).values
    factors = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64)  # a rank sees no common one
    for name in sorted(bench.part.needs & MEASURED):
        field = name.replace("-", "_")
        changed: Any = {field: factors * getattr(sides[0], field)}
        after = bench.part.finish(total, evolve(sides[0], **changed), sides[1]).values
        require(not torch.equal(after, before), f"{name!r} is needed, which costs, but not read")


def _reads_aux(bench: ScorerBench) -> str | None:
    return None if bench.part.needs - MEASURED else "it needs no auxiliary number"


@law("scorer", _reads_aux)
def needed_aux_is_read(bench: ScorerBench) -> None:
    """Finish reads each auxiliary number that `needs` names, of train or of test rows."""
    # A source that does not attach it is refused.
    train, test = toy_rows(4), toy_rows(3, seed=9)
    sides = [
        evolve(bench.side(rows, seed), aux=_Reading(bench.side(rows, seed).aux))
        for rows, seed in ((train, 1), (test, 2))
    ]
    bench.part.finish(bench.total(train, test), *sides)
    read = {name for side in sides if isinstance(side.aux, _Reading) for name in side.aux.read}
    unread = sorted(bench.part.needs - MEASURED - read)
    require(not unread, f"needs name {unread}, which finish does not read; take them out of needs")


class _Reading(Mapping[str, Tensor]):
    """Numbers by name that remember which were read."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.read: set[str] = set()
        self._held = held

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@law("scorer")
def pair_adds_up_over_blocks(bench: ScorerBench) -> None:
    """Pair of a block = the sum of pair over the pieces that it is cut into."""
    left, right = random(4, 6, seed=1), random(3, 6, seed=2)
    whole = bench.part.pair(DenseBlock(left), DenseBlock(right))
    pieces = [
        bench.part.pair(DenseBlock(left[:, cut]), DenseBlock(right[:, cut]))
        for cut in (slice(0, 2), slice(2, 6))
    ]
    require_close(torch.stack(pieces).sum(0), whole, "pair summed over pieces")


def _bilinear(bench: ScorerBench) -> str | None:
    part = bench.part
    bilinear = isinstance(part, BilinearScorer) and part.bilinear
    return None if bilinear else "it does not say that its parts are inner products"


@law("scorer", _bilinear)
def parts_are_inner_products(bench: ScorerBench) -> None:
    """Where it says so, pair of two blocks = all inner products of their rows."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    for name in train.space.names:
        left, right = train.blocks[name], test.blocks[name]
        want = left.flat() @ right.flat().T
        require_close(bench.part.pair(left, right), want, f"pair of the block {name!r}")


@law("scorer")
def scores_are_of_the_rows(bench: ScorerBench) -> None:
    """Scores of rows kept as factors = scores of the same rows formed."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    want = bench.scored(formed(train), formed(test)).values
    require_close(bench.scored(train, test).values, want, "scores of factored rows")


@law("scorer")
def scores_follow_the_rows(bench: ScorerBench) -> None:
    """Permuted train rows permute the scores, and so do permuted test rows."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    want = bench.scored(train, test)
    order, turn = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    got = bench.scored(train.take(order), test.take(turn))
    require_close(got.values, want.values[order][:, turn], "scores of permuted rows")
    if want.weight is not None and got.weight is not None:
        require_close(got.weight, want.weight[order], "weights of permuted rows")


@law("scorer", _tile)
def tiles_are_their_own(bench: ScorerBench) -> None:
    """The scores and weights of a part of the train rows = that part of those of all."""
    train, test = toy_rows(5), toy_rows(3, seed=9)
    want, got = bench.scored(train, test), bench.scored(train.take(slice(1, 3)), test)
    require_close(got.values, want.values[1:3], "scores of a smaller tile")
    if want.weight is not None and got.weight is not None:
        require_close(got.weight, want.weight[1:3], "weights of a smaller tile")


@law("scorer")
def queries_are_their_own(bench: ScorerBench) -> None:
    """The scores for a part of the test rows = those columns; a weight is of the train row."""
    train, test = toy_rows(5), toy_rows(4, seed=9)
    want, got = bench.scored(train, test), bench.scored(train, test.take(slice(1, 2)))
    require_close(got.values, want.values[:, 1:2], "scores of one test row")
    if want.weight is not None and got.weight is not None:
        require_close(got.weight, want.weight, "weights beside one test row")


@law("scorer")
def an_example_helps_itself(bench: ScorerBench) -> None:
    """score(g, g) >= 0, -g never helps g more than g does, nor all g as much; no weight < 0."""
    rows = toy_rows(4)
    scored = bench.scored(rows, rows)
    own = scored.values.diagonal()
    require(bool((own >= 0).all()), f"scores of rows for themselves: {own.tolist()}")
    if scored.weight is not None:
        turns = bool((scored.weight < 0).any())
        require(not turns, f"weights {scored.weight.tolist()}, expected none below 0")
    against = bench.scored(rows.scale(torch.full((4,), -1.0)), rows).values.diagonal()
    require(bool((against <= own).all()), f"-g helps g more than g: {against.tolist()}")
    # Scores of the train row alone have no sign to lose, and of neighbours there may be too few.
    of_pairs = _tile(bench) is None and bool((scored.values != scored.values[:, :1]).any())
    of_pairs = of_pairs and bool(own.any() or against.any())
    require(
        not of_pairs or bool((against < own).any()),
        f"-g helps every g as much as g does, {own.tolist()}: the sign of the pair is lost",
    )


@law("scorer")
def zero_rows_have_finite_scores(bench: ScorerBench) -> None:
    """Scores are finite where a train row, a test row, or both are 0."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    none = torch.tensor([1.0, 0.0, 1.0, 1.0])
    for left, right in ((train.scale(none), test), (train, test.scale(none[:3]))):
        _require_finite(bench.scored(left, right), "of a zero row")
    _require_finite(bench.scored(train.scale(none), test.scale(none[:3])), "of two zero rows")


def _require_finite(scored: Scored, what: str) -> None:
    require(bool(torch.isfinite(scored.values).all()), f"scores {what}: {scored.values.tolist()}")
    if scored.weight is not None:
        require(bool(torch.isfinite(scored.weight).all()), f"the weights {what} are not finite")


@law("scorer")
def positions_do_not_show(bench: ScorerBench) -> None:
    """Scores are of the rows, not of their positions: other indices, the same scores."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    total = bench.total(train, test)
    want = bench.part.finish(total, bench.side(train, 1), bench.side(test, 2))
    for by in ((7, 7), (7, 11)):  # where positions of both sides agree, and where they do not
        sides = (bench.side(train, 1), bench.side(test, 2))
        moved = [evolve(one, index=k * one.index % 1009) for one, k in zip(sides, by, strict=True)]
        got = bench.part.finish(total, *moved)
        require_close(got.values, want.values, "scores of the same rows at other positions")
        if want.weight is not None and got.weight is not None:
            require_close(got.weight, want.weight, "weights of the same rows at other positions")


@law("scorer")
def inputs_are_untouched(bench: ScorerBench) -> None:
    """pair and finish leave rows, their sum over blocks, and what is told of both sides."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    for left, right in ((train, test), (formed(train), formed(test))):
        require_rows_untouched(left, lambda rows, r=right: bench.total(rows, r), "pair")  # type: ignore[misc]
        require_rows_untouched(right, lambda rows, r=left: bench.total(r, rows), "pair")  # type: ignore[misc]
    total, sides = bench.total(train, test), (bench.side(train, 1), bench.side(test, 2))
    before, kept = contents(sides), total.clone()
    bench.part.finish(total, *sides)
    require_identical(total, kept, "the sum over blocks, after finish")
    require(contents(sides) == before, "finish changed what it was told of a side")


@law("scorer")
def scale_keeps_order_and_sign(bench: ScorerBench) -> None:
    """All rows times 3, or 2^-20, leaves signs, and the order of train rows for each test row."""
    train, test = toy_rows(6), toy_rows(4, seed=9)
    before = bench.scored(train, test).values
    factors = [3.0]
    if bench.part.locality == "tile":  # neighbours may be those within a radius
        factors.append(2.0**-20)  # a floor that is larger than small rows shows
    for factor in factors:
        scale = torch.full((6,), factor)
        after = bench.scored(train.scale(scale), test.scale(scale[:4])).values
        what = f"scores of rows times {factor:g}"
        require_identical(after.sign(), before.sign(), f"signs of {what}")
        require_identical(after.argsort(0), before.argsort(0), f"order of {what}")


@law("scorer")
def scores_are_repeatable(bench: ScorerBench) -> None:
    """The same tile has the same scores, bit for bit, whatever the global random state."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    total = bench.total(train, test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = bench.part.finish(total, bench.side(train, 1), bench.side(test, 2)).values.clone()
        torch.manual_seed(2)
        again = bench.part.finish(total, bench.side(train, 1), bench.side(test, 2)).values
    require_identical(again, first, "scores, asked again")


@law("scorer")
def float32_scores_are_close(bench: ScorerBench) -> None:
    """Scores and weights in float32 = those in float64, to the tolerance of float32."""
    train, test = toy_rows(4), toy_rows(3, seed=9)
    low = bench.scored(train.to(dtype=torch.float32), test.to(dtype=torch.float32))
    want = bench.scored(train, test)
    require_close(low.values.double(), want.values, "float32 scores", 2e-5)
    if want.weight is not None and low.weight is not None:
        require_close(low.weight.double(), want.weight, "float32 weights", 2e-5)


@law("scorer")
def device_does_not_show(bench: ScorerBench) -> None:
    """Scores of rows on an accelerator, pretended where there is none, = those on the CPU."""
    device = accelerator()
    train, test = toy_rows(6), toy_rows(4, seed=9)
    sides = [_on(bench.side(rows, seed), device) for rows, seed in ((train, 1), (test, 2))]
    got = bench.part.finish(bench.total(train.to(device), test.to(device)), *sides)
    want = bench.scored(train, test)
    require_close(got.values.cpu(), want.values, f"scores on {device}")
    if got.weight is not None and want.weight is not None:
        require_close(got.weight.cpu(), want.weight, f"weights on {device}")


def _on(side: Side, device: torch.device) -> Side:
    """Return a side with its numbers on a device; positions stay where they are."""

    def moved(numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.to(device)

    return evolve(
        side,
        aux={name: numbers.to(device) for name, numbers in side.aux.items()},
        norm=moved(side.norm),
        self_influence=moved(side.self_influence),
        inverse_norm=moved(side.inverse_norm),
    )
