"""What is measured of a method: its task, its damping, its scores and self-influence."""

import numpy as np
import pytest
import torch
from attrs import frozen
from dattri_parts.measuring.attribution import (
    ITERATIVE,
    NOT_OFFERED,
    attribute,
    damped,
    follows_run,
    is_iterative,
    referenced,
    retrains,
    self_influence,
    takes_damping,
    task_of,
)
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Task


@frozen(eq=False)
class Place:
    """What a world gives."""

    task: Task
    trajectory: Task
    train: tuple
    test: tuple
    train_ids: range = range(12)
    test_ids: range = range(4)


@pytest.fixture
def world():
    model = mlp(dtype=torch.float32)
    run = Task(model, checkpoints=states(2, dtype=torch.float32), learning_rates=[0.5, 0.1])
    train, test = (examples(n, seed=n, dtype=torch.float32) for n in (12, 4))
    return Place(Task(model), run, train, test)


def run(name, world, **fields):
    made = dattri.method(name, **fields)
    task = task_of(made, world)
    return made, task, attribute(made, task, world)


@pytest.mark.parametrize("name", ["grad-dot", "tracin", "if-ekfac", "random"])
def test_scores_are_those_of_the_method(world, name):
    made, task, found = run(name, world)
    want = made.attribute(task, world.train, world.test)
    assert torch.equal(found.scores.values, want.values)
    assert found.scores.train_ids == world.train_ids
    assert found.seconds > 0


def test_self_influence_is_the_diagonal_where_there_is_one(world):
    for name in ("grad-dot", "self-influence"):
        made, task, found = run(name, world)
        own = self_influence(made, found.fitted, task, world)
        square = dattri.attribute(task, world.train, world.train, "grad-dot").values
        assert np.allclose(own.values, square.diagonal().numpy(), rtol=1e-4), name
    for name, note in (("random", NOT_OFFERED), ("if-cg", ITERATIVE)):
        made, task, found = run(name, world)
        own = self_influence(made, found.fitted, task, world)
        assert (own.values, own.note) == (None, note)


@pytest.mark.parametrize(("name", "solves"), [("if-arnoldi", False), ("if-cg", True)])
def test_self_influence_of_an_inverse_by_products(world, name, solves):
    """Arnoldi has its basis once it is fitted; CG solves for every row, where it is asked to."""
    fields = {"curvature": "ggn", "damping": 0.1}
    fields |= {"rank": 500, "iterations": 500} if name == "if-arnoldi" else {"tolerance": 1e-6}
    made, task, found = run(name, world, **fields)
    assert is_iterative(made) == solves
    own = self_influence(made, found.fitted, task, world, solves=solves)
    exact = dattri.method("if-explicit", curvature="ggn", damping=0.1)
    square = exact.attribute(task, world.train, world.train).values
    assert np.allclose(own.values, square.diagonal().numpy(), rtol=1e-3)


def test_a_damping_is_given_where_one_is_taken():
    for name in ("if-ekfac", "if-explicit", "if-cg", "trak", "relatif-explicit"):
        made = dattri.method(name)
        assert takes_damping(made), name
        assert damped(name, 0.125, {}) == dattri.method(name, damping=0.125) != made
        assert damped(name, 0.125, {"damping": 0.5}) == dattri.method(name, damping=0.5)
    for name in ("grad-dot", "random", "knn-shapley", "tracin"):
        assert not takes_damping(dattri.method(name)), name
        assert damped(name, 0.125, {}) == dattri.method(name)
    twice = dattri.Method(
        stages=[
            {"inverse_hessian": {"curvature": c, "solver": "spectral"}} for c in ("ekfac", "kfac")
        ]
    )
    assert not takes_damping(twice)  # which of the two is meant is not known


def test_methods_that_follow_training_get_the_run(world):
    assert task_of(dattri.method("tracin"), world) is world.trajectory
    assert task_of(dattri.method("grad-dot"), world) is world.task
    assert all(follows_run(dattri.method(name)) for name in ("tracin", "dvemb", "source"))
    assert not follows_run(dattri.method("random"))


def test_reference_examples_are_the_test_set_unless_there_are_some(world):
    made = dattri.method("trackstar")
    asked = task_of(made, world)
    assert asked.reference is world.test
    assert world.task.reference is None  # the world's own is as it was
    own = Task(world.task.model, reference=world.train)
    assert referenced(made, own, world) is own
    assert referenced(dattri.method("grad-dot"), world.task, world) is world.task


def test_what_retrains_says_so():
    assert retrains(dattri.method("leave-one-out"))
    assert not retrains(dattri.method("grad-dot"))
