"""Methods whose answers are combinations of rows, through the whole engine."""

from __future__ import annotations

import pytest
import torch
from oracles.networks import (
    dense_ggn,
    dense_second_moment,
    diagonal_blocks,
    network,
    problem_of,
    solved,
)

import dattri_core as dattri
from dattri_core.laws.oracles import row_matrix

N, M = 14, 6
DAMPINGS = [0.05, 0.7, 3.0]


def setting(name="reader"):
    task, train = network(name, N)
    _, test = network(name, M, 5)
    space = problem_of(task, train).space
    rows = row_matrix(task, space, train), row_matrix(task, space, test, "test")
    return task, train, test, space, rows


def close(found, want, tolerance=1e-9):
    assert float((found - want).abs().max()) <= tolerance * float(want.abs().max())


def blockwise(solver):
    curvature = {"name": "gauss-newton", "block": True}
    return dattri.Method(inverse_hessian={"curvature": curvature, "solver": solver})


@pytest.mark.parametrize("name", ["perceptron", "images", "reader"])
def test_if_woodbury_is_the_exact_inverse_of_the_ggn(name):
    task, train, test, space, (left, right) = setting(name)
    matrix = dense_ggn(task, space, train)
    fitted = dattri.method("if-woodbury", damping=0.05).fit(task, train)
    close(fitted.attribute(test).values, left @ solved(matrix, 0.05, right).T)
    own = (left * solved(matrix, 0.05, left)).sum(1)
    close(fitted.self_influence(), own)


@pytest.mark.parametrize("memory", ["2MiB", "64MiB"])
def test_a_sweep_reads_the_train_set_once_and_equals_fresh_runs(memory):
    task, train, test, space, (left, right) = setting()
    matrix = dense_ggn(task, space, train)
    fitted = dattri.method("if-woodbury").fit(task, train, memory=memory)
    for damping, scores in fitted.sweep(test, damping=DAMPINGS).items():
        close(scores.values, left @ solved(matrix, damping, right).T)
        assert scores.provenance["solver"][0]["damping"] == damping
    close(fitted.with_(damping=0.3).attribute(test).values, left @ solved(matrix, 0.3, right).T)


@pytest.mark.parametrize("memory", ["1MiB", "64MiB"])
def test_blocks_are_inverted_apart_resident_or_deferred(memory):
    task, train, test, space, (left, right) = setting()
    matrix = diagonal_blocks(dense_second_moment(task, space, train), space)
    method = blockwise({"name": "woodbury", "damping": 0.1})
    fitted = method.fit(task, train, memory=memory)
    close(fitted.attribute(test).values, left @ solved(matrix, 0.1, right).T)
    swept = fitted.sweep(test, damping=DAMPINGS)
    for damping, scores in swept.items():
        close(scores.values, left @ solved(matrix, damping, right).T)
    parts = fitted.attribute(test, by="block")
    for spec in space:
        at = slice(space.offsets[spec.name], space.offsets[spec.name] + spec.size)
        want = left[:, at] @ solved(matrix[at, at], 0.1, right[:, at]).T
        close(parts[spec.name].values, want)


@pytest.mark.parametrize("memory", ["1MiB", "64MiB"])
def test_if_datainf_is_its_formula_at_any_memory(memory):
    task, train, test, space, (left, right) = setting()
    want = torch.zeros(N, M, dtype=torch.float64)
    for spec in space:
        at = slice(space.offsets[spec.name], space.offsets[spec.name] + spec.size)
        g, h = left[:, at], right[:, at]
        damping = 0.1 * float(g.square().sum()) / g.numel()
        inverses = [
            torch.linalg.solve(torch.outer(r, r) + damping * torch.eye(spec.size).double(), h.T)
            for r in g
        ]
        want += g @ torch.stack(inverses).mean(0)
    scores = dattri.attribute(task, train, test, method="if-datainf", memory=memory)
    close(scores.values, want)
    swept = dattri.method("if-datainf").fit(task, train, memory=memory).sweep(test, damping=[1e6])
    close(1e6 * swept[1e6].values, left @ right.T, 1e-3)


def test_if_datainf_reads_the_train_set_once_for_all_blocks_and_dampings():
    """Rows that do not stay: once to fit, once for the queries of all dampings, once to score."""
    task, train = network("reader", 300)
    _, test = network("reader", M, 5)
    method = dattri.method("if-datainf")
    fitted = method.fit(task, train, memory="1MiB", progress=False)
    assert fitted.stats[0]["rows_held"] == 0
    looks = 30  # at a few examples, to plan
    assert fitted.train.reads <= 300 + looks
    before = fitted.train.reads
    plan = method.attribute(task, train, test, memory="1MiB", dry_run=True)
    assert plan.groups == 1
    swept = fitted.sweep(test, damping=DAMPINGS)
    assert fitted.train.reads - before <= 600 + looks
    for damping, scores in swept.items():
        fresh = method.fit(task, train, progress=False).with_(damping=damping).attribute(test)
        close(scores.values, fresh.values)
