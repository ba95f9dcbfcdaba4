"""Curvatures made of products with vectors, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from attrs import define
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.curvatures.product import symmetrise
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import call, flatten, ggn_of, hessian_of, parameters_of
from oracles.rows import rows_of
from torch import nn

import dattri_core as dattri
from dattri_core import BlockSpec, NumericsError, ParameterView, RandomStream, Rows, Space
from dattri_core.evaluate import Evaluator
from dattri_core.lift import to_parameters
from dattri_core.products import batch_product


@define(eq=False)
class ModelProblem:
    """The train set of a model of linear layers, in batches; optionally behind a projector."""

    model: nn.Module
    batch: tuple
    step: int = 4
    memory: int = 2**28
    sketch: torch.Tensor | None = None  # [k, d]
    passes: int = 0
    noise: float = 0.0
    device = torch.device("cpu")
    random = RandomStream(0, "curvature")

    @property
    def evaluator(self):
        task = dattri.Task(self.model)
        return Evaluator(task, task.checkpoints[0], self.batch)

    @property
    def dtype(self):
        return next(self.model.parameters()).dtype

    @property
    def n_train(self):
        return len(self.batch[0])

    @property
    def full_space(self):
        blocks = []
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear):
                o, i = layer.weight.shape
                weight = ParameterView(f"{name}.weight", (o, i), 0, i)
                bias = ParameterView(f"{name}.bias", (o,), i, i + 1)
                blocks.append(BlockSpec(name, "outer", (o, i + 1), (weight, bias)))
        return Space(tuple(blocks))

    @property
    def space(self):
        if self.sketch is None:
            return self.full_space
        return Space((BlockSpec("sketch", "dense", (len(self.sketch),)),))

    def product(self, vectors, kind):
        self.passes += 1
        lowered = vectors
        if self.sketch is not None:
            lowered = Rows.from_flat(self.full_space, vectors.flat() @ self.sketch, vectors.index)
        total = None
        for first in range(0, self.n_train, self.step):
            part = tuple(t[first : first + self.step] for t in self.batch)
            found = batch_product(self.evaluator, part, to_parameters(lowered), kind)
            total = found if total is None else {n: total[n] + v for n, v in found.items()}
        mean = {n: v / self.n_train for n, v in total.items()}
        rows = rows_of(self.full_space, mean, vectors.index)
        if self.sketch is not None:
            rows = Rows.from_flat(self.space, rows.flat() @ self.sketch.mT, vectors.index)
        if self.noise:
            flat = rows.flat()
            rows = Rows.from_flat(
                self.space, flat + self.noise * torch.randn_like(flat), rows.index
            )
        return rows


def problem(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = (torch.randn(9, 3).double(), torch.arange(9) % 3)
    return ModelProblem(model, batch, **options)


def expected(problem, curvature):
    """Return the mean curvature in the order of the space: each layer's [weight, bias] by rows."""
    at = parameters_of(problem.model)
    x, labels = problem.batch

    def loss(out):
        return nn.functional.cross_entropy(out, labels, reduction="none")

    if isinstance(curvature, GGN):
        matrix = ggn_of(lambda p: call(problem.model, p, x), loss, at)
    else:
        matrix = hessian_of(lambda p: loss(call(problem.model, p, x)).sum(), at)
    places = {n: i.reshape(p.shape) for (n, p), i in zip(at.items(), _positions(at), strict=True)}
    order = torch.cat(
        [
            torch.cat([places[f"{b.name}.weight"], places[f"{b.name}.bias"][:, None]], 1).flatten()
            for b in problem.full_space
        ]
    )
    return matrix[order[:, None], order] / problem.n_train


def _positions(at):
    return torch.arange(sum(p.numel() for p in at.values())).split([p.numel() for p in at.values()])


CURVATURES = [Hessian(), GGN()]


@pytest.mark.parametrize("curvature", CURVATURES, ids=["hessian", "ggn"])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 20_000, 2**28]))
def test_dense_and_apply_equal_the_mean_curvature(curvature, step, memory):
    world = problem(step=step, memory=memory)
    matrix = expected(world, curvature)
    operator = curvature.fit(world)
    dense = operator.dense()
    assert dense.dtype == torch.float64
    torch.testing.assert_close(dense, matrix, rtol=0, atol=1e-13)
    assert torch.equal(dense, dense.mT)
    rows = Rows.from_flat(world.space, torch.randn(3, world.space.dim).double(), torch.arange(3))
    torch.testing.assert_close(
        operator.apply(rows).flat(), rows.flat() @ matrix, atol=1e-12, rtol=0
    )


def test_memory_bounds_the_slices_of_the_identity():
    narrow, wide = problem(memory=1), problem()
    Hessian().fit(narrow).dense()
    Hessian().fit(wide).dense()
    # one pass finds the rows of zeros, then one unit vector a pass or all of them
    assert narrow.passes == 1 + narrow.space.dim
    assert wide.passes == 2


@pytest.mark.parametrize("curvature", CURVATURES, ids=["hessian", "ggn"])
def test_rows_of_zeros_cost_no_pass(curvature):
    dark = problem(memory=1)
    dark.batch[0][:, 1] = 0.0  # an input that is always zero: four rows of H are zero
    matrix = curvature.fit(dark).dense()
    torch.testing.assert_close(matrix, expected(dark, curvature), rtol=0, atol=1e-11)
    assert (matrix == 0).all(1).sum() == 4
    assert dark.passes == 1 + dark.space.dim - 4
    live, part = curvature.fit(dark).live_dense()
    assert torch.equal(live, (matrix != 0).any(1).nonzero()[:, 0])
    assert torch.equal(part, matrix[live[:, None], live])


@pytest.mark.parametrize("curvature", CURVATURES, ids=["hessian", "ggn"])
def test_behind_a_projector_it_is_p_h_pt(curvature):
    plain = problem()
    sketch = torch.randn(5, plain.space.dim, dtype=torch.float64)
    matrix = sketch @ expected(plain, curvature) @ sketch.mT
    dense = curvature.fit(problem(sketch=sketch)).dense()
    torch.testing.assert_close(dense, matrix, rtol=0, atol=1e-11)


def test_the_two_curvatures_differ_and_only_one_is_positive():
    world = problem()
    hessian, ggn = Hessian().fit(world).dense(), GGN().fit(world).dense()
    assert torch.linalg.eigvalsh(ggn)[0] > -1e-14
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-3


def test_single_precision_is_symmetric_to_rounding_and_near():
    world = problem()
    matrix = expected(world, Hessian())
    single = ModelProblem(world.model.float(), (world.batch[0].float(), world.batch[1]))
    operator = Hessian().fit(single)
    dense = operator.dense()
    assert (operator.dtype, dense.dtype) == (torch.float32, torch.float64)
    assert 0 < float((dense - matrix).abs().max()) < 1e-6


def test_products_that_are_not_symmetric_are_refused():
    with pytest.raises(NumericsError, match=r"curvature 'hessian'.*not symmetric.*model.double"):
        Hessian().fit(problem(noise=1e-4)).dense()


@pytest.mark.parametrize("tile", [2, 3, 100])
def test_symmetrise_averages_every_pair_of_entries(tile, monkeypatch):
    monkeypatch.setattr("dattri_parts.curvatures.product.TILE", tile)
    base = torch.randn(7, 7, dtype=torch.float64)
    matrix = base + base.mT + 1e-13 * torch.randn(7, 7, dtype=torch.float64)
    expected_matrix = (matrix + matrix.mT) / 2
    symmetrise(matrix, 2e-16, "m")
    assert torch.equal(matrix, expected_matrix)
    with pytest.raises(NumericsError, match="not symmetric"):
        symmetrise(expected_matrix.clone(), 2e-16, "m", stray=1e-6)
    matrix[6, 0] += 1e-6
    with pytest.raises(NumericsError, match="not symmetric"):
        symmetrise(matrix, 2e-16, "m")


@pytest.mark.parametrize(("curvature", "kind"), [(Hessian(), "hessian"), (GGN(), "ggn")])
def test_declared_facts(curvature, kind):
    space = Space((BlockSpec("any", "dense", (3,)),))
    assert curvature.gives(space) - {"rows"} == {"apply", "dense", "sampled"}
    assert ("rows" in curvature.gives(space)) == (kind == "ggn")  # the Hessian is no sum of squares
    assert curvature.needs == {f"{kind}-product"}
    assert curvature.exact
    world = problem()
    operator = curvature.fit(world)
    assert operator.memory == world.memory
    assert operator.space == world.space
    assert flatten(parameters_of(world.model)).numel() == operator.space.dim


class NormalisedInSingle(nn.Module):
    """An RMSNorm as those of Llama and Qwen, which compute in float32 whatever the model is in."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x).float()
        scale = hidden.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return self.last((hidden * scale).to(x.dtype).tanh())


def test_a_double_model_that_normalises_in_single_is_symmetric_to_single():
    torch.manual_seed(0)
    model, train = NormalisedInSingle().double(), (torch.randn(9, 3).double(), torch.arange(9) % 3)
    task = dattri.Task(model)
    damping = 5.0
    scores = dattri.attribute(task, train, train, method="if-explicit", damping=damping)
    at = parameters_of(model)

    def losses(p):
        return nn.functional.cross_entropy(call(model, p, train[0]), train[1], reduction="none")

    matrix = hessian_of(lambda p: losses(p).sum(), at) / 9
    rows = torch.autograd.functional.jacobian(
        lambda *values: losses(dict(zip(at, values, strict=True))), tuple(at.values())
    )
    rows = torch.cat([row.flatten(1) for row in rows], 1)
    want = rows @ torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), rows.T)
    torch.testing.assert_close(torch.as_tensor(scores.values), want, rtol=1e-4, atol=1e-6)
