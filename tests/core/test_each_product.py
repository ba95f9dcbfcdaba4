"""The curvature of each example times one vector, against dense Hessians of single examples."""

import logging

import pytest
import torch
from oracles.dense import flatten, ggn_of, hessian_of
from torch import nn
from torch.func import functional_call

import dattri_core as dattri
from dattri_core.batch import take
from dattri_core.each_product import each_product
from dattri_core.evaluate import Evaluator
from dattri_core.second_order import differentiable_kernels

KINDS = ("hessian", "ggn")


def seeded(model, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model().double()


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.head(hidden + self.attend(hidden, hidden, hidden, need_weights=False)[0])


class Branching(nn.Module):
    """Looks at a value, which a vmap over examples refuses."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x) * (2.0 if float(x.abs().max()) >= 0 else 1.0)


def numbers(seed=1, count=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def words():
    ids = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


WORLDS = {
    "mlp": (mlp, "cross-entropy", numbers),
    "branching": (Branching, "cross-entropy", numbers),
    "language": (Attention, "causal-lm", words),
}


def place(world):
    model, loss, data = WORLDS[world]
    task, batch = dattri.Task(seeded(model), loss), data()
    return Evaluator(task, task.checkpoints[0], batch), batch


def dense(evaluator, example, kind):
    """Return the Hessian or the GGN of one example, ``[d, d]``."""
    loss, model, at = evaluator.task.loss, evaluator.task.model, dict(evaluator.selected)

    def outputs(parameters):
        return functional_call(Forward(model, loss), named(parameters), (example,))

    with evaluator.session(), differentiable_kernels(model):
        if kind == "ggn":
            return ggn_of(outputs, lambda out: loss.criterion(out, example), at)
        return hessian_of(lambda p: loss.criterion(outputs(p), example).sum(), at)


def named(parameters):
    return {f"model.{name}": value for name, value in parameters.items()}


class Forward(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, example):
        return self.loss.forward(self.model, example)


def vector_of(evaluator, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in evaluator.selected.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("limit", [1, 2**25])
def test_it_is_the_product_with_each_dense_matrix(kind, world, limit):
    evaluator, batch = place(world)
    vector = vector_of(evaluator)
    found = each_product(evaluator, batch, vector, kind, limit=limit)
    count = len(next(iter(found.values())))
    flat = torch.cat([value.reshape(count, -1) for value in found.values()], 1)
    for b in range(count):
        want = dense(evaluator, take(batch, slice(b, b + 1)), kind) @ flatten(vector)
        assert (flat[b] - want).abs().max() <= 1e-10 * want.abs().max()


def test_what_refuses_vmap_is_taken_in_turn_and_that_is_said_once(caplog):
    evaluator, batch = place("branching")
    with caplog.at_level(logging.INFO, "dattri"):
        for _ in range(2):
            each_product(evaluator, batch, vector_of(evaluator), "hessian")
    assert sum("one after another" in r.message for r in caplog.records) == 1
    plain, data = place("mlp")
    caplog.clear()
    each_product(plain, data, vector_of(plain), "hessian")
    assert "one after another" not in caplog.text


# --- as a problem ---------------------------------------------------------------------------------
def problem_of(projector="identity", memory=2**28, batch=2):
    task, data = dattri.Task(seeded(mlp)), numbers(count=7)
    registry = dattri.default_registry()
    bound = registry.make("source", "per-example").bind(task, task.checkpoints[0], data)
    stream, device = dattri.RandomStream(0, "test"), torch.device("cpu")
    built = registry.make("projector", projector, **({} if projector == "identity" else {"dim": 6}))
    maps = (built.build(bound.space, stream=stream, device=device),)
    examples = dattri.Examples.of(data, "train")
    return dattri.TrainProblem(bound, examples, maps, batch, stream, memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projector", ["identity", "rademacher"])
def test_a_problem_gives_the_product_of_each_named_example(kind, projector):
    problem = problem_of(projector)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(1, problem.space.dim, generator=generator, dtype=torch.float64)
    vector = dattri.Rows.from_flat(problem.space, flat, torch.zeros(1, dtype=torch.long))
    index = torch.tensor([6, 0, 3, 0, 5])
    found = problem.product_each(vector, kind, index)
    assert torch.equal(found.index, index)
    want = torch.cat([problem.product(vector, kind, at.unsqueeze(0)).flat() for at in index])
    torch.testing.assert_close(found.flat(), want, rtol=1e-9, atol=1e-11)
    operator = dattri.default_registry().make("curvature", kind).fit(problem)
    assert isinstance(operator, dattri.EachOperator)
    assert torch.equal(operator.apply_each(vector, index).flat(), found.flat())


def test_several_vectors_or_no_example_are_refused():
    problem = problem_of()
    two = torch.ones(2, problem.space.dim, dtype=torch.float64)
    rows = dattri.Rows.from_flat(problem.space, two, torch.arange(2))
    with pytest.raises(dattri.SpecError, match="got 2 vectors, expected one"):
        problem.product_each(rows, "hessian", torch.arange(3))
    with pytest.raises(dattri.SpecError, match="names no example"):
        problem.product_each(rows.take(slice(0, 1)), "hessian", torch.arange(0))


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    import dattri_core.problem as problem_module

    problem, sizes = problem_of(batch=7), []

    def scarce(evaluator, batch, *given, **settings):
        sizes.append(len(batch[0]))
        if len(batch[0]) > 2:
            raise MemoryError("no room")
        return each_product(evaluator, batch, *given, **settings)

    flat = torch.ones(1, problem.space.dim, dtype=torch.float64)
    vector = dattri.Rows.from_flat(problem.space, flat, torch.zeros(1, dtype=torch.long))
    want = problem.product_each(vector, "hessian", torch.arange(7))
    monkeypatch.setattr(problem_module, "each_product", scarce)
    found = problem.product_each(vector, "hessian", torch.arange(7))
    torch.testing.assert_close(found.flat(), want.flat(), rtol=1e-12, atol=1e-12)
    assert sizes[0] == 7 and torch.equal(found.index, want.index)
