"""`AdditiveMap`s that a method begins with take rows block by block, wherever rows are made."""

import attrs
import pytest
import torch
from dattri_parts.projectors.flat import FlatMap
from dattri_parts.projectors.gaussian import Gaussian
from dattri_parts.sources.per_example import PerExample
from oracles.toy_tasks import examples, flat_gradients, mlp, states
from torch import nn

import dattri_core as dattri
from dattri_core import (
    AdditiveMap,
    DenseBlock,
    MemoryBudgetError,
    Method,
    RandomStream,
    Rows,
    SpecError,
    Task,
    snapshot,
    stream,
)
from dattri_core.checkpoint import Checkpoint
from dattri_core.evaluate import Evaluator
from dattri_core.plans import Costs, Route, Work, make_plan
from dattri_core.projected import Projected, pass_blocks

TRAIN, TEST = examples(11), examples(4, seed=300)
GAUSS_NEWTON = {"curvature": "gauss-newton", "solver": "cholesky", "damping": 1e-2}
SKETCHES = {
    "gaussian": {"name": "gaussian", "dim": 7},
    "rademacher": {"name": "rademacher", "dim": 7},
    "block-count-sketch": {"name": "block-count-sketch", "dim": 8},
    "srht": {"name": "srht", "dim": 8},
}


def gradients(model, data):
    return flat_gradients(
        model, lambda m: nn.functional.cross_entropy(m(data[0]), data[1], reduction="none")
    )


def matrix(projector, task, seed=0):
    """Return P of the first checkpoint in the order of the source's space, ``[k, d]``."""
    bound = PerExample().bind(task, task.checkpoints[0], tuple(part[:3] for part in TRAIN))
    stream = RandomStream(seed, "projector", 0)
    built = projector.build(bound.space, stream=stream, device=torch.device("cpu"))
    eye = torch.eye(bound.space.dim, dtype=torch.float64)
    return built.map(Rows.from_flat(bound.space, eye, torch.arange(len(eye)))).flat().T, bound


def rows_of(bound, data, role):
    """Return whole rows in the order of the space, ``[n, d]``."""
    blocks = {}
    bound.stream(data, role, blocks.__setitem__)
    return Rows(bound.space, blocks, torch.arange(len(data[1]))).flat()


@pytest.fixture
def spy(monkeypatch):
    """Record the blocks that a whole-row sketch is given at once."""
    seen = []
    original = FlatMap.map

    def spied(self, rows):
        seen.append(rows.space.names)
        return original(self, rows)

    monkeypatch.setattr(FlatMap, "map", spied)
    return seen


@pytest.mark.parametrize("name", SKETCHES)
def test_scores_in_a_whole_row_sketch_are_those_of_its_matrix(name, spy):
    method = Method(projector=SKETCHES[name], inverse_hessian=GAUSS_NEWTON)
    task = Task(mlp())
    p, bound = matrix(method.projector, task)
    g, h = (rows_of(bound, data, role) @ p.T for data, role in ((TRAIN, "train"), (TEST, "test")))
    curvature = g.T @ g / len(g) + 1e-2 * torch.eye(p.shape[0], dtype=torch.float64)
    want = g @ torch.linalg.solve(curvature, h.T)
    spy.clear()
    got = method.attribute(task, TRAIN, TEST).values
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    own = method.fit(task, TRAIN).self_influence()
    diagonal = (g * torch.linalg.solve(curvature, g.T).T).sum(1)
    torch.testing.assert_close(own, diagonal, rtol=1e-9, atol=1e-11)
    assert {len(names) for names in spy} == {1}  # one block at a time, on every way
    assert g.abs().max() > 0


def test_rows_of_the_oracle_are_gradients():
    task = Task(mlp())
    _, bound = matrix(Gaussian(dim=7), task)
    mine = rows_of(bound, TRAIN, "train").norm(dim=1)
    torch.testing.assert_close(mine, gradients(mlp(), TRAIN).norm(dim=1))


def test_each_checkpoint_has_its_own_sketch():
    method = Method(projector=SKETCHES["rademacher"])
    one = states(1)
    apart = method.attribute(Task(mlp(), checkpoints=one * 2), TRAIN, TEST, by="checkpoint")
    first, second = (scores.values for scores in apart.values())
    assert (first - second).abs().max() > 1e-3
    alone = method.attribute(Task(mlp(), checkpoints=one), TRAIN, TEST)
    torch.testing.assert_close(2 * first, alone.values)


def test_a_product_with_the_curvature_is_lifted_through_the_sketch():
    task = Task(mlp())
    solver = {"curvature": "ggn", "damping": 1e-1}
    tight = {**solver, "solver": {"name": "cg", "tolerance": 1e-12, "maximum_iterations": 200}}
    dense = {**solver, "solver": "cholesky"}
    scores = [
        Method(projector=SKETCHES["gaussian"], inverse_hessian=inverse)
        .attribute(task, TRAIN, TEST)
        .values
        for inverse in (tight, dense)
    ]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-10)


def test_dampings_of_later_stages_keep_their_places():
    method = Method(projector=SKETCHES["gaussian"], inverse_hessian=GAUSS_NEWTON)
    fitted = method.fit(Task(mlp()), TRAIN)
    swept = fitted.sweep(TEST, damping=[1e-2, 1.0])
    want = attrs.evolve(method, inverse_hessian={**GAUSS_NEWTON, "damping": 1.0})
    torch.testing.assert_close(swept[1.0].values, want.attribute(Task(mlp()), TRAIN, TEST).values)
    torch.testing.assert_close(fitted.with_(damping=1.0).attribute(TEST).values, swept[1.0].values)


def test_scores_of_blocks_are_refused_after_a_sketch_that_mixes_them():
    method = Method(projector=SKETCHES["gaussian"])
    with pytest.raises(SpecError, match="mixes them"):
        method.attribute(Task(mlp()), TRAIN, TEST, by="block")


def test_batches_do_not_show():
    method = Method(projector=SKETCHES["block-count-sketch"], scorer="cosine")
    wide = method.attribute(Task(mlp()), TRAIN, TEST)
    for size in (1, 4):
        data = torch.utils.data.TensorDataset(*TRAIN)
        loader = torch.utils.data.DataLoader(data, batch_size=size)
        got = method.attribute(Task(mlp()), loader, TEST)
        torch.testing.assert_close(got.values, wide.values, rtol=1e-12, atol=1e-14)


def test_a_store_holds_the_sketch(tmp_path, spy):
    method = Method(projector=SKETCHES["rademacher"], inverse_hessian=GAUSS_NEWTON)
    want = method.attribute(Task(mlp()), TRAIN, TEST)
    got = method.attribute(Task(mlp()), TRAIN, TEST, store=tmp_path / "rows")
    torch.testing.assert_close(got.values, want.values, rtol=1e-10, atol=1e-12)
    assert {len(names) for names in spy} == {1}


def test_maps_before_and_after_a_sketch_are_taken_in_order():
    """A blockwise map, an additive one, and one that takes its numbers whole."""
    stages = [
        {"projector": {"name": "kronecker", "rank": 3}},
        {"projector": SKETCHES["gaussian"]},
        {"projector": {"name": "gaussian", "dim": 3}},
        {"inverse_hessian": GAUSS_NEWTON},
    ]
    method, task = Method(stages=stages), Task(mlp())
    _, bound = matrix(Gaussian(dim=7), task)
    maps, space = [], bound.space
    for at, stage in enumerate(method.chain[:3]):
        stream = RandomStream(0, f"projector {at}" if at else "projector", 0)
        maps.append(stage.build(space, stream=stream, device=torch.device("cpu")))
        space = maps[-1].out_space

    def down(data, role):
        blocks = {}
        bound.stream(data, role, blocks.__setitem__)
        rows = Rows(bound.space, blocks, torch.arange(len(data[1])))
        for step in maps:
            rows = step.map(rows)
        return rows.flat()

    g, h = down(TRAIN, "train"), down(TEST, "test")
    assert g.shape == (11, 3)
    curvature = g.T @ g / len(g) + 1e-2 * torch.eye(3, dtype=torch.float64)
    want = g @ torch.linalg.solve(curvature, h.T)
    got = method.attribute(task, TRAIN, TEST).values
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_source_that_leaves_a_block_out_is_an_error():
    task = Task(mlp())
    _, bound = matrix(Gaussian(dim=7), task)
    stream = RandomStream(0, "projector", 0)
    built = Gaussian(dim=7).build(bound.space, stream=stream, device=torch.device("cpu"))
    assert isinstance(built, AdditiveMap)
    name = bound.space.names[0]

    def half(sink):
        sink(name, DenseBlock(torch.zeros(2, *bound.space[name].shape)))
        return {}

    with pytest.raises(SpecError, match="each block once"):
        pass_blocks(bound.space, (built,), half, lambda *_: None)
    whole = Projected(bound, (built,))
    assert whole.space == built.out_space
    assert whole.evaluator is bound.evaluator
    assert isinstance(task.checkpoints[0], Checkpoint)


def test_a_scorer_that_measures_train_rows_on_the_test_side():
    sketch = {"projector": SKETCHES["gaussian"], "inverse_hessian": GAUSS_NEWTON}
    task = Task(mlp())
    method = Method(**sketch, scorer="relatif")
    p, bound = matrix(method.projector, task)
    g, h = (rows_of(bound, data, role) @ p.T for data, role in ((TRAIN, "train"), (TEST, "test")))
    curvature = g.T @ g / len(g) + 1e-2 * torch.eye(7, dtype=torch.float64)
    own = (g * torch.linalg.solve(curvature, g.T).T).sum(1).sqrt()
    want = g @ torch.linalg.solve(curvature, h.T) / own[:, None]
    got = method.attribute(task, TRAIN, TEST).values
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_group_is_added_up_in_the_sketch():
    method = Method(projector=SKETCHES["gaussian"], inverse_hessian=GAUSS_NEWTON)
    task = Task(mlp())
    one = dattri.attribute(task, TRAIN, TEST, method=method, group=True)
    every = dattri.attribute(task, TRAIN, TEST, method=method)
    torch.testing.assert_close(one.values[:, 0], every.values.sum(1), rtol=1e-9, atol=1e-11)


def test_two_projectors_of_one_kind_are_two_matrices():
    """A square sketch of signs twice is not its own square."""
    twice = {"name": "gaussian", "dim": 5}
    same = Method(stages=[{"projector": twice}, {"projector": twice}])
    task = Task(mlp())
    p, bound = matrix(Gaussian(dim=5), task)
    space = Gaussian(dim=5).out_space(bound.space)
    second = Gaussian(dim=5).build(
        space, stream=RandomStream(0, "projector 1", 0), device=torch.device("cpu")
    )
    g, h = (rows_of(bound, data, role) @ p.T for data, role in ((TRAIN, "train"), (TEST, "test")))
    down = [second.map(Rows.from_flat(space, x, torch.arange(len(x)))).flat() for x in (g, h)]
    got = same.attribute(task, TRAIN, TEST).values
    torch.testing.assert_close(got, down[0] @ down[1].T, rtol=1e-9, atol=1e-11)
    first = Gaussian(dim=5).build(
        space, stream=RandomStream(0, "projector", 0), device=torch.device("cpu")
    )
    again = first.map(Rows.from_flat(space, g, torch.arange(len(g)))).flat()
    assert (again - down[0]).abs().max() > 1e-3


def test_a_sketch_of_each_block_is_planned_block_by_block():
    """What a method of block sketches needs does not grow with the number of layers."""
    method = Method(projector={"name": "gaussian", "dim": 8, "scope": "block"})
    sizes = []
    for layers in (2, 12):
        model = mlp((64, *([64] * layers), 3))
        data = examples(20, inputs=64)
        plan = method.attribute(Task(model), data, data, memory="64MiB", dry_run=True)
        sizes.append(plan.bytes["train batch"] // plan.train_batch)
    activations = 10 * 64 * 8 * 4
    assert sizes[1] - sizes[0] < activations + 10 * 8 * 8


# --- rows that are computed once ------------------------------------------------------------------
@pytest.fixture
def passes(monkeypatch):
    """Count the train examples, without the three of the sample, that are differentiated."""
    seen = []
    original = Evaluator.total_of
    monkeypatch.setattr(snapshot, "LOOK", 3)
    monkeypatch.setattr(stream, "CANDIDATES", 3)
    others = [at for at in range(len(TRAIN[1])) if at not in (0, 5, 10)]

    def total_of(self, model, batch, role, *rest):
        seen.append(int((batch[0].detach()[:, None] == TRAIN[0][None, others]).all(-1).sum()))
        return original(self, model, batch, role, *rest)

    monkeypatch.setattr(Evaluator, "total_of", total_of)
    return seen


def test_sketched_rows_that_fit_are_computed_once_for_the_fit_and_the_scores(passes):
    method = Method(projector=SKETCHES["gaussian"], inverse_hessian=GAUSS_NEWTON)
    fitted = method.fit(Task(mlp(), checkpoints=states(1)), TRAIN)
    first = fitted.attribute(TEST)
    assert sum(passes) == len(TRAIN[1]) - 3
    fitted.attribute(examples(4, seed=400))
    fitted.with_(damping=1.0).attribute(TEST)
    fitted.self_influence()
    assert sum(passes) == len(TRAIN[1]) - 3
    assert first.values.abs().max() > 0


def test_rows_that_do_not_fit_are_computed_again_and_give_the_same_scores(passes, monkeypatch):
    method = Method(projector=SKETCHES["gaussian"], inverse_hessian=GAUSS_NEWTON)
    task = Task(mlp(), checkpoints=states(2))
    want = method.attribute(task, TRAIN, TEST)
    passes.clear()
    monkeypatch.setattr(snapshot, "HELD_SHARE", 2**40)
    got = method.attribute(task, TRAIN, TEST)
    assert sum(passes) == 2 * 2 * (len(TRAIN[1]) - 3)
    torch.testing.assert_close(got.values, want.values, rtol=1e-10, atol=1e-12)


def test_a_plan_tells_of_rows_that_are_kept_and_counts_their_bytes():
    method = Method(projector=SKETCHES["gaussian"], inverse_hessian=GAUSS_NEWTON)
    plan = method.attribute(Task(mlp()), TRAIN, TEST, dry_run=True)
    assert f"{11 * 7 * 8} B after the sketch, computed once" in str(plan)
    work = Work(n_train=11, n_test=4)
    route = Route(deferred=False, cut=0, train_row=8, test_row=8, kept=8)
    costs = Costs(8, 8, (route,))
    least = next(b for b in range(1, 10**6) if _fits(b, costs, work))
    assert _fits(least + 4096, costs, attrs.evolve(work, held=4096))
    assert not _fits(least + 4095, costs, attrs.evolve(work, held=4096))


def _fits(budget, costs, work):
    try:
        make_plan(budget, costs, work)
    except MemoryBudgetError:
        return False
    return True
