"""Laws of whole inverse Hessians: fitted on a train set, applied to test rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeGuard

import attrs
import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.capabilities import (
    InverseRoot,
    LeverageInverse,
    SpectralInverse,
    SplitInverse,
)
from dattri_core.errors import SpecError
from dattri_core.laws.law import (
    NotApplicable,
    law,
    require,
    require_close,
    require_equal,
    require_identical,
    require_same_aux,
)
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.problems import DenseProblem, curvature_worlds, problem_of
from dattri_core.laws.spaces import formed, labelled
from dattri_core.laws.untouched import require_frozen, require_rows_untouched
from dattri_core.laws.worlds import N_TRAIN, World
from dattri_core.protocols import Damping, Inverse, InverseHessian
from dattri_core.rows import Rows

STEPS = 50
"""Of an iteration, as many as most laws need: what they say holds at any number."""


@frozen(eq=False, slots=False)
class InverseBench:
    """An inverse Hessian on the toy worlds whose space it takes.

    One that has a field ``depth``, or a part with one, is run with 50 steps at most, and as it is
    only where it breaks a law so, and in one world for the law of stats.

    Args:
        part: The inverse Hessian.
        whole: Run it as it is.
    """

    part: InverseHessian
    whole: bool = False

    @cached_property
    def brief(self) -> InverseHessian:
        """Return the part with few steps; itself where it has no more."""
        brief: InverseHessian = self.part if self.whole else shortened(self.part)
        return brief

    @property
    def longer(self) -> InverseBench | None:
        """Return the bench that runs the part as it is, None where this one does."""
        return None if self.brief is self.part else evolve(self, whole=True)

    def places(self) -> Iterator[tuple[World, DenseProblem]]:
        """Yield the worlds that the part takes; a `SpecError` leaves one out."""
        refused = []
        for world in curvature_worlds():
            problem = problem_of(world)
            try:
                self.part.check(problem.space)
            except SpecError as error:
                refused.append(f"{world.name}: {error}")
                continue
            yield world, problem
        if len(refused) == len(curvature_worlds()):
            raise NotApplicable(f"it takes none of the toy worlds: {'; '.join(refused)}")

    def applied(self, problem: DenseProblem, rows: Rows) -> Tensor:
        """Return the fitted inverse applied to rows, ``[B, d]``."""
        return self.brief.fit(problem).apply(rows).flat()


def shortened(part: Any) -> Any:
    """Return a part, and all that it is made of, with a depth of `STEPS` at most."""
    changes = {}
    for field in attrs.fields(type(part)) if attrs.has(type(part)) else ():
        held = getattr(part, field.name)
        deep = field.name == "depth" and isinstance(held, int) and held > STEPS
        found = STEPS if deep else shortened(held)
        if found is not held:
            changes[field.alias] = found
    return attrs.evolve(part, **changes) if changes else part


@law("inverse_hessian")
def part_is_frozen(bench: InverseBench) -> None:
    """No field can be set; fitted on other data before, A is the same and so is the part."""

    def use(some: InverseBench, other: bool) -> Tensor:
        world, problem = next(some.places())
        return some.applied(problem_of(world, (3, 8, 1)) if other else problem, problem.train_rows)

    require_frozen(evolve(bench, part=bench.brief), use)


@law("inverse_hessian")
def inverse_is_linear(bench: InverseBench) -> None:
    """A(2 g - 3 h) = 2 A g - 3 A h."""
    for world, problem in bench.places():
        rows = formed(problem.train_rows)
        left, right = rows.take(slice(0, 4)), rows.take(slice(4, 8))
        mixed = Rows.from_flat(problem.space, 2 * left.flat() - 3 * right.flat(), left.index)
        inverse = bench.brief.fit(problem)
        want = 2 * inverse.apply(left).flat() - 3 * inverse.apply(right).flat()
        require_close(
            inverse.apply(mixed).flat(), want, f"A of a combination in {world.name}", 1e-5
        )


@law("inverse_hessian")
def apply_is_of_single_rows(bench: InverseBench) -> None:
    """(A rows)_b = A row_b, with its space, index and aux."""
    for world, problem in bench.places():
        inverse, rows = bench.brief.fit(problem), labelled(problem.train_rows)
        whole = inverse.apply(rows)
        one = inverse.apply(rows.take(slice(3, 4))).flat()
        require_close(one, whole.flat()[3:4], f"A of a row alone in {world.name}", 1e-5)
        require_equal(whole.space.fingerprint, rows.space.fingerprint, "space after A")
        require_identical(whole.index, rows.index, "index after A")
        require_same_aux(whole.aux, rows.aux, "aux after A")


@law("inverse_hessian")
def inputs_are_untouched(bench: InverseBench) -> None:
    """apply leaves the rows that it is given, factored or formed, as they were."""
    for _, problem in bench.places():
        inverse, rows = bench.brief.fit(problem), labelled(problem.train_rows)
        require_rows_untouched(rows, inverse.apply, "apply")
        require_rows_untouched(formed(rows), inverse.apply, "apply")


def _blockwise(bench: InverseBench) -> str | None:
    inverses = [bench.brief.fit(problem) for _, problem in bench.places()]
    return None if any(i.blockwise for i in inverses) else "its inverse is not blockwise"


@law("inverse_hessian", _blockwise)
def blockwise_is_true(bench: InverseBench) -> None:
    """Block k of A g needs block k of g only: A of a part is that part of A g."""
    for world, problem in bench.places():
        inverse = bench.brief.fit(problem)
        if inverse.blockwise:
            require_blockwise(inverse, problem.train_rows, f"A in {world.name}")


def require_blockwise(inverse: Inverse, rows: Rows, what: str) -> None:
    """Raise `LawBroken` unless apply of any block alone, and of all but one, is that part of all.

    Args:
        inverse: Declares that it is blockwise.
        rows: Of the space that it was fitted on.
        what: How messages call it.
    """
    whole, names = inverse.apply(rows), rows.space.names
    parts: list[tuple[str, ...]] = [(name,) for name in names]
    if len(names) > 1:
        parts += [tuple(n for n in names if n != name) for name in names]
    for part in parts:
        got, want = inverse.apply(rows.select(part)), whole.select(part)
        require_equal(got.space.names, want.space.names, f"{what}: blocks of a part")
        require_close(got.flat(), want.flat(), f"{what} of the blocks {part} alone", 1e-7)


def _splits(bench: InverseBench) -> str | None:
    inverses = [bench.brief.fit(problem) for _, problem in bench.places()]
    return None if any(map(splits, inverses)) else "its inverse cannot be split"


@law("inverse_hessian", _splits)
def split_is_true(bench: InverseBench) -> None:
    """<Q^T g, M Q^T h> = <g, A h> and |Q^T g| = |g|, block by block, Q the same at any damping."""
    for world, problem in bench.places():
        inverse = bench.brief.fit(problem)
        if splits(inverse):
            rows = problem.train_rows
            left, right = rows.take(slice(0, 4)), rows.take(slice(4, 8))
            require_split(inverse, left, right, f"Q in {world.name}")


def splits(inverse: Inverse) -> TypeGuard[SplitInverse]:
    """Return whether an inverse can be left to both sides."""
    return isinstance(inverse, SplitInverse) and inverse.basis is not None


def require_split(inverse: SplitInverse, left: Rows, right: Rows, what: str) -> None:
    """Raise `LawBroken` unless the halves of an inverse make the whole.

    Args:
        inverse: One that can be split.
        left: Rows of the space that it was fitted on.
        right: The same, other rows.
        what: How messages call it.
    """
    basis = inverse.basis
    assert basis is not None
    require(basis.blockwise and inverse.blockwise, f"{what}: an inverse of whole rows is split")
    ahead, turned = basis.map(left), basis.map(right)
    behind = inverse.in_basis(turned)
    want = left.flat() @ inverse.apply(right).flat().T
    require_close(ahead.flat() @ behind.flat().T, want, f"{what}: <Q^T g, M Q^T h>", 1e-7)
    lengths = ahead.flat().norm(dim=1)
    require_close(lengths, left.flat().norm(dim=1), f"{what}: |Q^T g| against |g|", 1e-7)
    for name in right.space.names:
        part = inverse.in_basis(basis.map(right.select([name]))).blocks[name]
        require_close(part.flat(), behind.blocks[name].flat(), f"{what}: M of {name!r} alone", 1e-7)
    moved: Any = inverse.with_damping(Damping(0.7))
    require_identical(moved.basis.map(left).flat(), ahead.flat(), f"{what}, at another damping")
    for one in (inverse, moved):
        if isinstance(one, SpectralInverse) and one.spectrum is not None:
            behind = one.in_basis(turned)
            for name, (values, damping) in one.spectrum.items():
                want = turned.blocks[name].dense().values / (values + damping)
                found = behind.blocks[name].dense().values
                require_close(
                    found, want.to(found), f"{what}: M of {name!r} from its spectrum", 1e-7
                )


def _knows(bench: InverseBench) -> str | None:
    inverses = [bench.brief.fit(problem) for _, problem in bench.places()]
    return None if any(map(knows, inverses)) else "it does not know what train rows are"


@law("inverse_hessian", _knows)
def leverages_are_self_influences(bench: InverseBench) -> None:
    """The self-influence known from the fit = <g, A g> of every train row, at any damping."""
    for world, problem in bench.places():
        if not knows(bench.brief.fit(problem)):
            continue
        turned = problem_of(world, order=tuple(reversed(range(problem.n_train))))
        for given, order in ((problem, "the order"), (turned, "another order")):
            fitted, rows = bench.brief.fit(given), given.train_rows
            for inverse in (fitted, fitted.with_damping(Damping(0.7)), fitted):
                require(knows(inverse), "at another damping it does not know the train rows")
                assert isinstance(inverse, LeverageInverse)
                want = (rows.flat() * inverse.apply(rows).flat()).sum(1)
                what = f"<g, A g> of train rows in {order} of {world.name}"
                require_close(inverse.self_influence(), want, what, 1e-7)


def knows(inverse: Inverse) -> bool:
    """Return whether an inverse knows what train rows are to themselves."""
    return isinstance(inverse, LeverageInverse) and inverse.leverages


def _two_sided(bench: InverseBench) -> str | None:
    inverses = [bench.brief.fit(problem) for _, problem in bench.places()]
    return None if any(isinstance(i, InverseRoot) for i in inverses) else "it is one-sided"


@law("inverse_hessian", _two_sided)
def two_sides_are_the_inverse(bench: InverseBench) -> None:
    """<R g, R k> = <g, A k> and <R g, k> = <g, R^T k>, with R the map of both sides."""
    for world, problem in bench.places():
        root = bench.brief.fit(problem)
        if not isinstance(root, InverseRoot):
            continue
        left, right = problem.train_rows.take(slice(0, 4)), problem.train_rows.take(slice(4, 8))
        want = left.flat() @ root.apply(right).flat().T
        got = root.map(left).flat() @ root.map(right).flat().T
        require_close(got, want, f"<R g, R k> in {world.name}", 1e-7)
        keys = Rows.from_flat(root.out_space, root.map(right).flat(), right.index)
        moved = left.flat() @ root.adjoint(keys).flat().T
        require_close(moved, got, f"<g, R^T R k> in {world.name}", 1e-7)


@law("inverse_hessian")
def inverse_is_of_a_mean(bench: InverseBench) -> None:
    """A fitted on the data twice over = A fitted on the data."""
    for world, problem in bench.places():
        rows = problem.train_rows
        twice = bench.applied(problem_of(world, copies=2), rows)
        require_close(
            twice, bench.applied(problem, rows), f"A of doubled data in {world.name}", 1e-5
        )


@law("inverse_hessian")
def inverse_ignores_batches(bench: InverseBench) -> None:
    """A fitted in batches of 1 or n rows = A fitted in batches of 4."""
    for world, problem in bench.places():
        rows = problem.train_rows
        want = bench.applied(problem, rows)
        for size in (1, N_TRAIN):
            got = bench.applied(evolve(problem, batch=size), rows)
            require_close(got, want, f"A in batches of {size} in {world.name}", 1e-5)


@law("inverse_hessian")
def inverse_is_positive_where_the_loss_is_convex(bench: InverseBench) -> None:
    """<g, A g> >= 0 on a convex world."""
    convex = [(world, problem) for world, problem in bench.places() if world.convex]
    if not convex:
        raise NotApplicable("it takes no world with a convex loss")
    for world, problem in convex:
        rows = problem.train_rows
        products = (rows.flat() * bench.applied(problem, rows)).sum(1)
        require(bool((products >= 0).all()), f"<g, A g> in {world.name}: {products.tolist()}")


@law("inverse_hessian")
def fit_is_repeatable(bench: InverseBench) -> None:
    """A fitted twice is the same, bit for bit, whatever the global random state."""
    for world, problem in bench.places():
        rows = problem.train_rows
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = bench.applied(problem, rows)
            torch.manual_seed(2)
            require_identical(bench.applied(problem, rows), first, f"A twice in {world.name}")


@law("inverse_hessian")
def device_does_not_show(bench: InverseBench) -> None:
    """A g, fitted on an accelerator, pretended where there is none, = A g fitted on the CPU."""
    device, damping = accelerator(), Damping(0.7)
    for world, problem in bench.places():
        rows, what = problem.train_rows, f"A on {device} in {world.name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            near, far = bench.brief.fit(problem), bench.brief.fit(problem.on(device))
            pairs = [(near, far), (near.with_damping(damping), far.with_damping(damping))]
            for inverse, other in pairs:
                got = other.apply(rows.to(device)).flat()
                require_close(got.cpu(), inverse.apply(rows).flat(), what, 1e-6)
