"""Rows that the source `per-example` made while it was bound."""

import pytest
import torch
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import InputError, RehearsedSource, Task
from dattri_core.batch import take
from dattri_core.evaluate import Evaluator

TRAIN, TEST = examples(9), examples(4, seed=300)


def bound(how="bind"):
    task = Task(mlp(), checkpoints=states(1))
    source = dattri.default_registry().make("source", "per-example")
    return getattr(source, how)(task, task.checkpoints[0], take(TRAIN, slice(0, 3)))


def test_first_rows_are_those_of_the_sample_and_are_given_once():
    source, want = bound(), {}
    assert isinstance(source, RehearsedSource)
    first = source.first_rows()
    source.stream(take(TRAIN, slice(0, 3)), "train", want.__setitem__)
    assert first.keys() == want.keys() == set(source.space.names)
    for name, block in want.items():
        torch.testing.assert_close(first[name].flat(), block.flat())
    assert source.first_rows() is None


def test_first_rows_are_gone_once_others_are_made():
    source = bound()
    source.stream(take(TRAIN, slice(3, 5)), "train", lambda name, block: None)
    assert source.first_rows() is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_fit_makes_no_rows_of_the_first_examples_again(stored, tmp_path, monkeypatch):
    seen = []
    original = Evaluator.total_of

    def total_of(self, model, batch, role, *rest):
        seen.append(len(batch[0]))
        return original(self, model, batch, role, *rest)

    method = dattri.Method(projector={"name": "rademacher", "dim": 8})
    task = Task(mlp(), checkpoints=states(1))
    store = tmp_path / "rows" if stored else None
    method.attribute(task, TRAIN, TEST, store=store)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "total_of", total_of)
        bound("reopen" if stored else "bind")
        bind = len(seen)
        seen.clear()
        method.attribute(task, TRAIN, TEST, store=store)
    # What one example keeps, a test example tried where rows must be made, and the test set; and
    # all train examples where they are not on disk.
    assert seen[bind:] == ([1, 4] if stored else [1, 1, 4, 9])


def test_a_bad_test_set_is_refused_before_rows_are_stored(tmp_path):
    task = Task(mlp(), checkpoints=states(1))
    method = dattri.Method(projector={"name": "rademacher", "dim": 8})
    labels = torch.full_like(TEST[1], 99)
    with pytest.raises((InputError, IndexError)):
        method.attribute(task, TRAIN, (TEST[0], labels), store=tmp_path / "rows")
    assert not list((tmp_path / "rows").rglob("rows-*"))
