"""Maps of rows from the space of the parameters to itself, which the space does not show."""

import pytest
import torch
from attrs import field, frozen
from dattri_parts.curvatures.gauss_newton import GaussNewton
from oracles.toy_tasks import normal, world

import dattri_core as dattri
from dattri_core import Examples, Rows, SpecError
from dattri_core.assemble import build_part
from dattri_core.problem import TrainProblem
from dattri_core.protocols import RandomStream


def problem(task, train, projectors):
    examples = Examples.of(train, "train")
    bound = build_part("source", "per-example").bind(task, task.checkpoints[0], examples.sample(3))
    stream = RandomStream(0, "projector")
    maps = tuple(
        p.build(bound.space, stream=stream, device=torch.device("cpu")) for p in projectors
    )
    return TrainProblem(bound, examples, maps, 4, RandomStream(0, "curvature"), 2**26)


class Reversed:
    """Every row backwards, in the space that it has: no gradient of these parameters."""

    gives = frozenset({"adjoint"})
    blockwise = False

    def out_space(self, space):
        return space

    def build(self, space, *, stream, device):
        self.in_space = space
        return _ReversedMap(space)


class _ReversedMap:
    blockwise = False

    def __init__(self, space):
        self.out_space = space

    def map(self, rows):
        return Rows.from_flat(self.out_space, rows.flat().flip(1), rows.index, rows.aux)

    adjoint = map


def test_a_map_of_the_same_size_is_lifted_through_and_hides_the_examples():
    """The space alone does not show that its rows are no gradients any more."""
    task, train, _ = world()
    one, plain = problem(task, train, [Reversed()]), problem(task, train, [])
    assert one.space.covers_parameters
    flat = normal(4, one.space.dim, seed=5)
    eye = Rows.from_flat(one.space, torch.eye(one.space.dim).double(), torch.arange(one.space.dim))
    dense = plain.product(eye, "hessian").flat()
    probes = Rows.from_flat(one.space, flat, torch.arange(len(flat)))
    got, want = one.product(probes, "hessian").flat(), flat @ dense.flip(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    with pytest.raises(SpecError, match="have passed _ReversedMap and are no gradients"):
        one.batches()


@frozen
class Watching(GaussNewton):
    """Keeps the examples that it is shown."""

    seen: list = field(factory=list)

    def fit(self, problem):
        self.seen.append(torch.cat([inputs for inputs, _ in problem.batches()]))
        return super().fit(problem)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "projector",
    [
        "identity",
        {"name": "kronecker", "rank": 1000},
        {"name": "mask", "dim": 10**6, "scope": "block"},
    ],
    ids=["identity", "kronecker", "mask"],
)
def test_behind_maps_that_change_nothing_examples_are_those_of_the_task(
    projector, stored, tmp_path
):
    """Rows that are kept are read by positions, which are no examples of the model."""
    task, train, test = world()
    watching = Watching()
    made = dattri.Method(
        source="per-example",
        projector=projector,
        inverse_hessian={"curvature": watching, "solver": {"name": "cholesky", "damping": 0.1}},
        scorer="dot",
    )
    store = dattri.Store(tmp_path) if stored else None
    made.attribute(task, train, test, store=store, progress=False)
    assert all(torch.equal(seen, train[0]) for seen in watching.seen)
