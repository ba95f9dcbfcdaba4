"""Self-influences that the inverse of a matrix of train rows knows, so that none meets it again."""

from __future__ import annotations

import attrs
import pytest
import torch
from dattri_parts.solvers import kernel, woodbury
from oracles.networks import (
    convolutional,
    diagonal_blocks,
    problem_of,
    solved,
)
from torch import nn

import dattri_core as dattri
from dattri_core.laws.oracles import row_matrix

N, M = 110, 6
SMALL, LARGE = "1MiB", "64MiB"  # rows of 1.3 MB are read again, and held
DAMPING = 0.05


@pytest.fixture(scope="module")
def setting():
    """Return a convolutional network in float64 with its rows, and its dense curvatures."""
    return convolutional(N, M)


@pytest.fixture
def inverted(monkeypatch):
    """Return a list that gets the number of rows of each application of an inverse."""
    counts = []
    apply = woodbury._WoodburyInverse.apply
    monkeypatch.setattr(
        woodbury._WoodburyInverse,
        "apply",
        lambda self, rows: counts.append(len(rows)) or apply(self, rows),
    )
    return counts


def method(curvature="gauss-newton", scorer="relatif", **slots):
    solver = {"name": "woodbury", "damping": DAMPING}
    inverse = {"curvature": curvature, "solver": solver}
    return dattri.Method(inverse_hessian=inverse, scorer=scorer, **slots)


def close(found, want, tolerance=1e-9):
    assert float((found - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("memory", [SMALL, LARGE])
@pytest.mark.parametrize("curvature", ["gauss-newton", {"name": "fisher", "kind": "empirical"}])
def test_train_rows_of_the_curvature_are_not_inverted(setting, inverted, memory, curvature):
    task, train, test, left, right, curvatures, _ = setting
    fitted = method(curvature).fit(task, train, memory=memory)
    assert fitted.stats[0]["rows_held"] == float(memory == LARGE)
    assert isinstance(fitted._held.chain.inverses[0], dattri.LeverageInverse)
    own = (left * solved(curvatures["fisher"], DAMPING, left)).sum(1)
    scores = left @ solved(curvatures["fisher"], DAMPING, right).T
    close(fitted.attribute(test).values, scores / own.sqrt()[:, None])
    assert sum(inverted) == M
    close(fitted.self_influence(), own.sqrt())
    assert sum(inverted) == M


@pytest.mark.parametrize("memory", ["2MiB", LARGE])
@pytest.mark.parametrize(
    ("curvature", "scorer", "of"),
    [
        ("ggn", "relatif", "ggn"),
        ("gauss-newton", {"name": "relatif", "form": "theta"}, "fisher"),
    ],
)
def test_others_are(setting, inverted, memory, curvature, scorer, of):
    task, train, test, left, right, curvatures, _ = setting
    answers = solved(curvatures[of], DAMPING, left)
    own = (left * answers).sum(1).sqrt() if scorer == "relatif" else answers.norm(dim=1)
    found = method(curvature, scorer).attribute(task, train, test, memory=memory)
    close(found.values, left @ solved(curvatures[of], DAMPING, right).T / own[:, None], 1e-8)
    assert sum(inverted) == M + N


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_at_every_damping_of_a_sweep(setting, memory):
    task, train, test, left, right, curvatures, _ = setting
    fitted = method().fit(task, train, memory=memory)
    for damping, found in fitted.sweep(test, damping=[0.01, 0.3, 5.0]).items():
        own = (left * solved(curvatures["fisher"], damping, left)).sum(1)
        want = left @ solved(curvatures["fisher"], damping, right).T / own.sqrt()[:, None]
        close(found.values, want, 1e-8)
    other = fitted.with_(damping=0.3).self_influence()
    close(other, (left * solved(curvatures["fisher"], 0.3, left)).sum(1).sqrt())


def test_of_a_block_diagonal_matrix_it_is_the_sum_over_blocks(setting, inverted):
    task, train, _, left, _, curvatures, space = setting
    matrix = diagonal_blocks(curvatures["fisher"], space)
    fitted = method({"name": "gauss-newton", "block": True}, "dot").fit(task, train)
    few = [spec.size for spec in space if 1.5 * spec.size <= N]
    assert not few  # each block has fewer rows than numbers
    close(fitted.self_influence(), (left * solved(matrix, DAMPING, left)).sum(1))
    assert not inverted


def test_of_a_sketch_it_is_that_of_the_sketched_rows(setting, inverted):
    task, train, *_ = setting
    sketched = method(projector={"name": "kronecker", "rank": 8}).fit(task, train)
    left = torch.cat([rows.flat() for rows in sketched.train_rows()])
    moment = left.T @ left / N
    want = (left * solved(moment, DAMPING, left)).sum(1).sqrt()
    inverted.clear()
    close(sketched.self_influence(), want)
    assert not inverted


def test_a_map_after_the_inverse_asks_for_the_rows(setting, inverted):
    task, train, _, left, _, curvatures, _ = setting
    solver = {"name": "woodbury", "damping": DAMPING}
    inverse = {"curvature": "gauss-newton", "solver": solver}
    mask = {"name": "mask", "dim": left.shape[1]}  # every number stays, in its place
    made = dattri.Method(stages=[{"inverse_hessian": inverse}, {"projector": mask}])
    own = (left * solved(curvatures["fisher"], DAMPING, left)).sum(1)
    close(made.fit(task, train).self_influence(), own)
    assert sum(inverted) == N


def test_where_a_row_was_left_out_all_are_measured(inverted):
    model = nn.Linear(30, 2).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    labels = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    labels[4] = model(inputs[4]).detach()  # fits: its gradient is zero
    task = dattri.Task(model, loss="squared-error")
    fitted = method(scorer="dot").fit(task, (inputs, labels))
    assert fitted.stats[0]["negligible_rows"] == 1.0
    left = row_matrix(task, problem_of(task, (inputs, labels)).space, (inputs, labels))
    want = (left * solved(left.T @ left / 9, DAMPING, left)).sum(1)
    close(fitted.self_influence(), want)
    assert float(want[4]) == 0.0
    assert sum(inverted) == 9


def test_columns_of_the_inverse_are_computed_a_few_at_a_time(setting, monkeypatch):
    task, train, _, left, _, curvatures, _ = setting
    want = (left * solved(curvatures["fisher"], DAMPING, left)).sum(1)
    for few in (1, 7, N):
        monkeypatch.setattr(kernel, "COLUMNS", few)
        close(method(scorer="dot").fit(task, train).self_influence(), want)


def test_a_plan_knows_that_train_rows_are_not_inverted(setting):
    task, train, test, *_ = setting
    plans = {
        form: method(scorer={"name": "relatif", "form": form}).attribute(
            task, train, test, memory=SMALL, dry_run=True
        )
        for form in ("l", "theta")
    }
    assert plans["l"].train_batch > plans["theta"].train_batch


def test_only_rows_of_the_train_side_are_the_train_sets_own(setting):
    task, train, *_ = setting
    problem = problem_of(task, train)
    make = dattri.default_registry().make
    moment = make("curvature", "gauss-newton")
    assert moment.fit(problem).own
    assert not make("curvature", "leading-ggn").fit(problem).own
    problem.role = "test"  # of reference examples
    assert not moment.fit(problem).own


@pytest.mark.parametrize(("n", "memory", "known"), [(110, 800_000, True), (180, 1_300_000, False)])
def test_what_is_foreseen_of_rows_that_are_read_again_is_what_is_known(n, memory, known):
    # 180 rows are more than 1.5 times the numbers of the first layer, which is inverted as a matrix
    task, train, *_ = convolutional(n, 2)
    problem = problem_of(task, train, memory=memory)
    make = dattri.default_registry().make
    moment = attrs.evolve(make("curvature", "gauss-newton"), block=True)
    stage = dattri.CurvatureInverse(moment, make("solver", "woodbury"))
    inverse = stage.fit(problem)
    assert inverse.stats["rows_held"] == 0.0
    assert stage.foresee(problem).leverages == inverse.leverages == known
