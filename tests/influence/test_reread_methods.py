"""Exact methods whose rows do not fit the memory, through the whole engine."""

from __future__ import annotations

import logging

import pytest
import torch
from oracles.networks import convolutional, solved

import dattri_core as dattri

N, M = 60, 6
SMALL, LARGE = "1MiB", "64MiB"


@pytest.fixture(scope="module")
def setting():
    """Return a convolutional network in float64 whose rows take 740 KB, and dense curvatures."""
    return convolutional(N, M)[:-1]


def close(found, want, tolerance=1e-8):
    assert float((found - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("name", ["if-explicit", "if-woodbury"])
def test_scores_are_those_of_a_dense_solve_at_any_memory(setting, name, caplog):
    task, train, test, left, right, curvatures = setting
    settings = {"largest": 100} if name == "if-explicit" else {}
    method = dattri.method(name, damping=0.05, **settings)
    want = left @ solved(curvatures["ggn"], 0.05, right).T
    for memory, held in ((SMALL, 0.0), (LARGE, 1.0)):
        plan = method.attribute(task, train, test, memory=memory, dry_run=True)
        assert ("read again: " in str(plan)) == (not held)
        assert ("rows are held" in str(plan)) == bool(held)
        size = 8 * left.shape[1] * plan.query_group
        if not held:  # answers are formed, and what is subtracted from each
            assert (plan.bytes["queries"], plan.bytes["query work"]) == (size, 2 * size)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dattri"):
            scores = method.attribute(task, train, test, memory=memory)
        close(scores.values, want)
        [stats] = scores.provenance["solver"]
        assert stats["rows_held"] == held
        assert stats["rows"] > N
        if name == "if-explicit":
            assert stats["substituted"] == 1.0
            assert "the GGN takes its place" in caplog.text
            assert ("read again: " in caplog.text) == (not held)


def test_a_ggn_of_too_many_rows_leaves_the_fisher_and_both_are_named(setting, caplog):
    task, train, test, left, right, curvatures = setting
    many = {"inverse_hessian": {"name": "exact", "damping": 0.05, "largest": 100}}
    method = dattri.Method(**many)
    train = tuple(torch.cat([part] * 3) for part in train)  # the mean is the same
    with caplog.at_level(logging.WARNING, "dattri"):
        scores = method.attribute(task, train, test, memory="2.5MiB")
    assert scores.provenance["solver"][0]["substituted"] == 2.0
    assert "the empirical Fisher takes its place" in caplog.text
    assert "not the GGN: at least" in caplog.text
    want = left @ solved(curvatures["fisher"], 0.05, right).T
    close(scores.values, torch.cat([want] * 3))


def test_sweeps_and_parts(setting):
    task, train, test, left, right, curvatures = setting
    fitted = dattri.method("if-woodbury", damping=0.05).fit(task, train, memory=SMALL)
    assert fitted.stats[0]["rows_held"] == 0.0
    for damping, scores in fitted.sweep(test, damping=[0.1, 2.0]).items():
        close(scores.values, left @ solved(curvatures["ggn"], damping, right).T)
    answers = solved(curvatures["ggn"], 0.05, right)
    parts = fitted.attribute(test, by="block")
    close(torch.stack([part.values for part in parts.values()]).sum(0), left @ answers.T)


@pytest.mark.slow
def test_self_influence(setting):
    """Every train row is inverted, by readings of all others; test_leverages.py has some of it."""
    task, train, test, left, right, curvatures = setting
    fitted = dattri.method("if-woodbury", damping=0.05).fit(task, train, memory=SMALL)
    answers = solved(curvatures["ggn"], 0.05, right)
    own = (left * solved(curvatures["ggn"], 0.05, left)).sum(1)
    close(fitted.self_influence(), own)
    relative = dattri.method("relatif-explicit", damping=0.05, largest=100)
    found = relative.attribute(task, train, test, memory=SMALL)
    assert found.provenance["solver"][0]["rows_held"] == 0.0
    close(found.values, (left @ answers.T) / own.sqrt()[:, None])


def test_a_plan_leaves_room_for_the_rows_that_an_inverse_holds(setting):
    task, train, test, *_ = setting
    method = dattri.method("if-woodbury", damping=0.05)
    fitted = method.fit(task, train, memory="4MiB")
    assert fitted.stats[0]["rows_held"] == 1.0
    held = int(fitted.stats[0]["row_bytes"] + fitted.stats[0]["factor_bytes"])
    plan = method.attribute(task, train, test, memory="4MiB", dry_run=True)
    free = dattri.method("grad-dot").attribute(task, train, test, memory="4MiB", dry_run=True)
    assert held + plan.bytes["queries"] + 2 * plan.bytes["train batch"] <= 4 * 2**20
    assert plan.train_batch < free.train_batch
