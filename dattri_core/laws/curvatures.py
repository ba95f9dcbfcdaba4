"""Laws of curvatures: a symmetric mean over the whole train set, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.blocks import DenseBlock
from dattri_core.capabilities import EachOperator
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
from dattri_core.laws.parted import PartedProblem
from dattri_core.laws.pretended import accelerator
from dattri_core.laws.problems import DenseProblem, curvature_worlds, problem_of
from dattri_core.laws.spaces import block_diagonal, flat_rows, formed, labelled
from dattri_core.laws.spy import Operations
from dattri_core.laws.untouched import require_dtype, require_frozen, require_rows_untouched
from dattri_core.laws.worlds import N_TRAIN, World
from dattri_core.protocols import Curvature, CurvatureKind, Operator
from dattri_core.rows import Rows

ANSWERS = {
    "apply": ("apply",),
    "dense": ("dense",),
    "spectral": ("basis", "eigenvalues", "complete"),
    "rows": ("rows", "weight", "blockwise"),
    "sampled": ("apply_on", "n_train", "random"),
}
"""What `Curvature.gives` says -> the members of the operator that answer it."""

NAMES: dict[str, CurvatureKind] = {
    "hessian-product": "hessian",
    "ggn-product": "ggn",
    "ggn-rows": "ggn",
}
"""The curvature that each word of `Curvature.needs` is enough for; other words name none."""
FLOAT32 = 1e-3
"""Largest relative difference of a matrix that is fitted in float32."""


@frozen(eq=False)
class CurvatureBench:
    """A curvature on the toy worlds whose space it takes."""

    part: Curvature

    def places(self) -> Iterator[tuple[World, DenseProblem]]:
        """Yield the worlds that the curvature takes; a `SpecError` leaves one out."""
        refused = []
        for world in curvature_worlds():
            problem = problem_of(world)
            try:
                self.part.gives(problem.space)
            except SpecError as error:
                refused.append(f"{world.name}: {error}")
                continue
            yield world, problem
        if len(refused) == len(curvature_worlds()):
            raise NotApplicable(f"it takes none of the toy worlds: {'; '.join(refused)}")

    def matrix(self, problem: DenseProblem) -> Tensor:
        """Return the fitted operator as a matrix, however it answers, ``[d, d]``."""
        operator: Any = self.part.fit(problem)
        given = self.part.gives(problem.space)
        if "apply" in given:
            return applied(operator, problem)
        if "dense" in given:
            return cast("Tensor", operator.dense())
        raise NotApplicable(f"it gives {sorted(given)}, of which no matrix can be read")


def applied(operator: Operator, problem: DenseProblem) -> Tensor:
    """Return H by applying it to every unit vector, ``[d, d]``."""
    size = problem.space.dim
    eye = torch.eye(size, dtype=torch.float64, device=problem.device)
    units = Rows.from_flat(problem.space, eye, torch.arange(size))
    return operator.apply(units).flat()


def _gives(*capabilities: str) -> Any:
    def condition(bench: CurvatureBench) -> str | None:
        _, problem = next(bench.places())
        missing = set(capabilities) - bench.part.gives(problem.space)
        return f"it does not give {sorted(missing)}" if missing else None

    return condition


def _exact(bench: CurvatureBench) -> str | None:
    if not bench.part.exact:
        return "it declares that it is not exact"
    return None if _named(bench) else f"needs {sorted(bench.part.needs)} name no dense oracle"


def _named(bench: CurvatureBench) -> str | None:
    found = {"rows" if need == "rows" else NAMES.get(need) for need in bench.part.needs}
    return found.pop() if len(found) == 1 else None


def _oracle(problem: DenseProblem, name: str) -> Tensor:
    """Return the curvature of a name: of `NAMES`, or of needs ``"rows"`` the mean of g g^T."""
    if name != "rows":
        return problem.matrices[cast("CurvatureKind", name)]
    flat = problem.train_rows.flat()
    return flat.T @ flat / len(flat)


def _of_squares(bench: CurvatureBench) -> str | None:
    if "hessian-product" in bench.part.needs:
        return "it is made from Hessian products, which may be indefinite"
    return None


@law("curvature")
def part_is_frozen(bench: CurvatureBench) -> None:
    """No field can be set; fitted on other data before, H is the same and so is the part."""

    def use(some: CurvatureBench, other: bool) -> Tensor:
        world, problem = next(some.places())
        return some.matrix(problem_of(world, (3, 8, 1)) if other else problem)

    require_frozen(bench, use)


@law("curvature")
def gives_is_pure(bench: CurvatureBench) -> None:
    """gives(space) runs no operation on tensors, and `fit` answers what it says."""
    for world, problem in bench.places():
        with Operations() as seen:
            given = bench.part.gives(problem.space)
        require(not seen.names, f"gives ran {sorted(set(seen.names))}")
        unknown = given - set(ANSWERS)
        require(not unknown, f"gives says {sorted(unknown)}, which no solver knows")
        operator = bench.part.fit(problem)
        for word in given & set(ANSWERS):
            for name in ANSWERS[word]:
                require(hasattr(operator, name), f"gives says {word!r}; the operator has no {name}")
        same = operator.space.fingerprint
        require_equal(same, problem.space.fingerprint, f"space of the operator in {world.name}")


@law("curvature")
def operator_is_symmetric(bench: CurvatureBench) -> None:
    """<H g, k> = <g, H k>."""
    for world, problem in bench.places():
        matrix = bench.matrix(problem)
        require_close(matrix, matrix.T, f"H against its transpose in {world.name}")


@law("curvature", _exact)
def operator_is_the_named_one(bench: CurvatureBench) -> None:
    """H = the dense float64 oracle of what it needs: the Hessian, the GGN, the mean of g g^T."""
    name = _named(bench)
    assert name is not None
    for world, problem in bench.places():
        want = _oracle(problem, name)
        require_close(bench.matrix(problem), want, f"the curvature of the {name} in {world.name}")


@law("curvature")
def operator_is_a_mean(bench: CurvatureBench) -> None:
    """H of the data twice over = H of the data."""
    for world, problem in bench.places():
        twice = bench.matrix(problem_of(world, copies=2))
        require_close(twice, bench.matrix(problem), f"H of doubled data in {world.name}")


@law("curvature")
def operator_ignores_order(bench: CurvatureBench) -> None:
    """H of the data in another order = H of the data."""
    order = (3, 8, 1, 0, 6, 2, 7, 5, 4)
    assert len(order) == N_TRAIN
    for world, problem in bench.places():
        other = bench.matrix(problem_of(world, order))
        require_close(other, bench.matrix(problem), f"H of reordered data in {world.name}")


@law("curvature")
def operator_ignores_batches(bench: CurvatureBench) -> None:
    """H fitted in batches of 1, 2 or n rows = H fitted in batches of 4."""
    for world, problem in bench.places():
        want = bench.matrix(problem)
        for size in (1, 2, N_TRAIN):
            got = bench.matrix(evolve(problem, batch=size))
            require_close(got, want, f"H in batches of {size} in {world.name}")


@law("curvature")
def parts_add_up(bench: CurvatureBench) -> None:
    """H fitted on a train set that is read in parts and summed, one part empty, = H."""
    for world, problem in bench.places():
        parted = cast("DenseProblem", PartedProblem(problem))
        require_close(bench.matrix(parted), bench.matrix(problem), f"H of parts in {world.name}")


@law("curvature", _gives("apply"))
def operator_is_linear(bench: CurvatureBench) -> None:
    """H(2 g - 3 h) = 2 H g - 3 H h."""
    for world, problem in bench.places():
        operator = bench.part.fit(problem)
        left, right = flat_rows(problem.space, 3), flat_rows(problem.space, 3, seed=9)
        mixed = Rows.from_flat(problem.space, 2 * left.flat() - 3 * right.flat(), left.index)
        want = 2 * operator.apply(left).flat() - 3 * operator.apply(right).flat()
        require_close(operator.apply(mixed).flat(), want, f"H of a combination in {world.name}")


@law("curvature", _gives("apply"))
def apply_is_of_single_rows(bench: CurvatureBench) -> None:
    """(H rows)_b = H row_b, with its index and aux, factored or formed."""
    for world, problem in bench.places():
        operator, rows = bench.part.fit(problem), labelled(problem.train_rows)
        whole = operator.apply(rows)
        one = operator.apply(rows.take(slice(2, 3)))
        require_close(one.flat(), whole.flat()[2:3], f"H of a row alone in {world.name}")
        made = operator.apply(formed(rows))
        require_close(made.flat(), whole.flat(), f"H of formed rows in {world.name}")
        require_identical(whole.index, rows.index, f"index in {world.name}")
        require_same_aux(whole.aux, rows.aux, f"aux in {world.name}")


@law("curvature", _gives("apply"))
def inputs_are_untouched(bench: CurvatureBench) -> None:
    """apply leaves the rows that it is given, factored or formed, as they were."""
    for _, problem in bench.places():
        operator, rows = bench.part.fit(problem), labelled(problem.train_rows)
        require_rows_untouched(rows, operator.apply, "apply")
        require_rows_untouched(formed(rows), operator.apply, "apply")


@law("curvature")
def float32_operator_is_close(bench: CurvatureBench) -> None:
    """H fitted on rows in float32 = H, to the tolerance of float32, and H g is of g's dtype."""
    for world, problem in bench.places():
        rows, given = flat_rows(problem.space, 3), bench.part.gives(problem.space)
        high: Any = bench.part.fit(problem)
        low: Any = bench.part.fit(problem.low)
        if "dense" in given:
            what = f"dense() in float32 in {world.name}"
            require_close(low.dense(), high.dense(), what, FLOAT32)
        if "apply" not in given:
            continue
        want = high.apply(rows).flat()
        for operator, name in ((low, "float32"), (high, "float64")):
            for dtype in (torch.float32, torch.float64):
                got = operator.apply(rows.to(dtype=dtype))
                what = f"H g, fitted in {name}, in {world.name}"
                require_dtype(got.dtype, dtype, what)
                require_close(got.flat().double(), want, what, FLOAT32)


@law("curvature", _gives("apply", "dense"))
def dense_is_apply(bench: CurvatureBench) -> None:
    """dense() e_k = apply(e_k), in float64, in the order of the space."""
    for world, problem in bench.places():
        operator: Any = bench.part.fit(problem)
        dense = operator.dense()
        require_equal(dense.dtype, torch.float64, "dtype of dense()")
        require_close(dense, applied(operator, problem), f"dense() in {world.name}")


@law("curvature", _gives("apply", "sampled"))
def samples_are_means(bench: CurvatureBench) -> None:
    """H of the examples i, i, k is (2 H_i + H_k) / 3, and H of each once is H."""
    for world, problem in bench.places():
        operator: Any = bench.part.fit(problem)
        require_equal(operator.n_train, problem.n_train, f"n_train in {world.name}")
        rows = flat_rows(problem.space, 3)
        each = [operator.apply_on(rows, torch.tensor([i])).flat() for i in range(problem.n_train)]
        drawn = operator.apply_on(rows, torch.tensor([5, 1, 5]))
        require_close(drawn.flat(), (2 * each[5] + each[1]) / 3, f"H of a sample in {world.name}")
        require_identical(drawn.index, rows.index, f"index in {world.name}")
        mean = torch.stack(each).mean(0)
        require_close(mean, operator.apply(rows).flat(), f"mean of all H_i in {world.name}")


def _knows_each(bench: CurvatureBench) -> str | None:
    _, problem = next(bench.places())
    knows = isinstance(bench.part.fit(problem), EachOperator)
    return None if knows else "its operator does not multiply by the curvature of each example"


@law("curvature", _gives("apply", "sampled"), _knows_each)
def each_is_a_sample_of_one(bench: CurvatureBench) -> None:
    """apply_each(g, (i, k)) = the rows H_i g and H_k g, whose index is i, k."""
    for world, problem in bench.places():
        operator: Any = bench.part.fit(problem)
        row, index = flat_rows(problem.space, 1), torch.tensor([5, 1, 1])
        found = operator.apply_each(row, index)
        ones = [operator.apply_on(row, index[i : i + 1]).flat() for i in range(len(index))]
        require_close(found.flat(), torch.cat(ones), f"H_i g of each example in {world.name}")
        require_identical(found.index, index, f"index in {world.name}")


@law("curvature", _gives("apply", "spectral"))
def spectrum_is_of_the_operator(bench: CurvatureBench) -> None:
    """Q^T Q = 1 and Q diag(L) Q^T g = H g; a blockwise Q takes blocks one at a time."""
    for world, problem in bench.places():
        if "spectral" not in bench.part.gives(problem.space):
            continue
        operator: Any = bench.part.fit(problem)
        basis, values = operator.basis, operator.eigenvalues
        want = applied(operator, problem)
        rows = flat_rows(problem.space, 3)
        turned = basis.map(rows)
        require_equal(turned.space.fingerprint, basis.out_space.fingerprint, "space of Q^T g")
        scaled = turned.map_blocks(
            lambda name, block, values=values: DenseBlock(block.dense().values * values[name])
        )
        got = basis.adjoint(scaled).flat()
        require_close(got, rows.flat() @ want, f"Q diag(L) Q^T g in {world.name}")
        back = basis.map(basis.adjoint(turned)).flat()
        require_close(back, turned.flat(), f"Q^T Q Q^T g in {world.name}")
        for spec in problem.space if basis.blockwise else ():
            one = basis.map(rows.select([spec.name])).flat()
            require_close(one, turned.blocks[spec.name].flat(), f"Q^T g of {spec.name} alone")


@law("curvature", _gives("apply", "rows"))
def rows_are_of_the_operator(bench: CurvatureBench) -> None:
    """weight sum r r^T = H, its diagonal blocks where H is blockwise; the same rows each time."""
    for world, problem in bench.places():
        operator: Any = bench.part.fit(problem)
        parts = [part.flat().double() for part in operator.rows()]
        flat = torch.cat([*parts, torch.zeros(0, problem.space.dim, dtype=torch.float64)])
        matrix = operator.weight * flat.T @ flat
        if operator.blockwise:
            matrix = block_diagonal(matrix, problem.space)
        require_close(matrix, applied(operator, problem), f"sum of squared rows in {world.name}")
        again = torch.cat([part.flat().double() for part in operator.rows()])
        require_identical(again, flat, f"rows of {world.name}, read again")


@law("curvature")
def fit_is_repeatable(bench: CurvatureBench) -> None:
    """H fitted twice is the same, bit for bit, whatever the global random state."""
    for world, problem in bench.places():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = bench.matrix(problem)
            torch.manual_seed(2)
            require_identical(bench.matrix(problem), first, f"H fitted twice in {world.name}")


@law("curvature", _of_squares)
def operator_is_positive(bench: CurvatureBench) -> None:
    """<g, H g> >= 0 where H is made from GGN products or from rows, not from Hessian products."""
    for world, problem in bench.places():
        matrix = bench.matrix(problem)
        low = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
        high = float(matrix.abs().max())
        require(low >= -1e-9 * high, f"smallest eigenvalue in {world.name}: {low:.3e}")


@law("curvature")
def device_does_not_show(bench: CurvatureBench) -> None:
    """H fitted and applied on an accelerator, pretended where there is none, = H on the CPU."""
    device = accelerator()
    for world, problem in bench.places():
        got = bench.matrix(problem.on(device))
        require_close(got.cpu(), bench.matrix(problem), f"H on {device} in {world.name}")
