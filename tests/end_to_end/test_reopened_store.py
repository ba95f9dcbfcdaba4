"""A store that has all rows: the model and the loss are known by them, and checked where not."""

from __future__ import annotations

import pytest
import torch
from dattri_parts.sources.per_example import PerExample
from oracles.toy_tasks import examples, mlp, states
from torch import nn

import dattri_core as dattri
from dattri_core import InputError, ReopenedSource, Task

N, M = 14, 5
TRAIN, TEST = examples(N), examples(M, seed=300)
METHOD = dattri.method("logra", rank=3, damping=1e-2)


def own(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def calls(monkeypatch):
    """Note how sources are made, and how often the loss is evaluated in the meantime."""
    made = []
    for name in ("bind", "reopen"):
        original = getattr(PerExample, name)

        def noted(self, *given, name=name, original=original):
            made.append(name)
            return original(self, *given)

        monkeypatch.setattr(PerExample, name, noted)
    return made


def attributed(folder, loss=own, test=TEST, **options):
    task = Task(mlp(), checkpoints=states(2), loss=loss, **options)
    return METHOD.attribute(task, TRAIN, test, store=folder)


def test_rows_that_are_there_stand_for_the_checks(tmp_path, calls):
    losses = []

    def counted(model, batch):
        losses.append(len(batch[0]))
        return own(model, batch)

    counted.__name__ = "own"
    assert isinstance(METHOD.source, ReopenedSource)
    first = attributed(tmp_path / "rows", counted)
    assert calls == ["bind", "bind"]
    calls.clear()
    losses.clear()
    again = attributed(tmp_path / "rows", counted)
    assert calls == ["reopen", "reopen"]
    assert torch.equal(first.values, again.values)
    few = len(losses)
    losses.clear()
    METHOD.attribute(Task(mlp(), checkpoints=states(2), loss=counted), TRAIN, TEST)
    assert 2 * few < len(losses)


def test_a_store_that_lacks_rows_is_no_witness(tmp_path, calls):
    first = attributed(tmp_path / "rows")
    sorted((tmp_path / "rows" / "c00001").glob("rows-*"))[0].unlink()
    calls.clear()
    again = attributed(tmp_path / "rows")
    assert calls == ["reopen", "bind"]
    assert torch.equal(first.values, again.values)


def mixing(model, batch):
    values = own(model, batch)
    return values + 0.1 * values.mean()


def random(model, batch):
    return own(model, batch) * (1 + 0.1 * torch.rand(len(batch[1])))


def short(model, batch):
    return own(model, batch)[:1]


def decayed(model, batch):
    return own(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (mixing, "mixes examples"),
        (random, "different numbers twice"),
        (short, r"returned shape \(1,\)"),
        (decayed, "outside of its module"),
    ],
)
def test_a_loss_whose_code_became_unfit_is_refused_as_ever(loss, why, tmp_path, calls, monkeypatch):
    attributed(tmp_path / "rows")
    monkeypatch.setattr(loss, "__name__", "own")
    calls.clear()
    with pytest.raises(InputError, match=why):
        attributed(tmp_path / "rows", loss)
    assert calls == ["reopen", "bind"]


def test_a_target_is_checked_though_no_row_of_it_was_kept(tmp_path):
    def target(model, batch):
        return own(model, batch)

    attributed(tmp_path / "rows", target=dattri.Target(target, higher_is_better=False))
    for wrong, why in ((mixing, "mixes examples"), (decayed, "outside of its module")):
        wrong = dattri.Target(wrong, higher_is_better=False)
        with pytest.raises(InputError, match=why):
            attributed(tmp_path / "rows", target=wrong)


class Turned(nn.Module):
    """Positions of all examples side by side: `[T B, D]` is T runs of B, which no shape shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(2, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, inputs):
        steps = inputs.reshape(len(inputs), -1, 2).transpose(0, 1)
        hidden = self.inner(steps.reshape(-1, 2)).tanh().reshape(len(steps), len(inputs), 4)
        return self.head(hidden.mean(0))


def test_a_model_that_takes_a_second_look_gets_it(tmp_path, calls):
    model = Turned()
    width = 2 * (TRAIN[0].shape[1] // 2)
    train, test = ((x[:, :width], y) for x, y in (TRAIN, TEST))
    task = Task(model, loss=own)
    want = METHOD.attribute(task, train, test)
    for made in (["bind"], ["reopen"]):
        calls.clear()
        got = METHOD.attribute(task, train, test, store=tmp_path / "rows")
        assert calls == made
        torch.testing.assert_close(got.values, want.values, rtol=1e-10, atol=1e-12)


def test_a_source_that_is_reopened_wrongly_is_bound(tmp_path, calls, monkeypatch):
    first = attributed(tmp_path / "rows")
    other = Task(mlp(), checkpoints=states(3), loss=own).checkpoints[2]
    original = PerExample.reopen
    monkeypatch.setattr(
        PerExample, "reopen", lambda self, task, _, sample: original(self, task, other, sample)
    )
    calls.clear()
    again = attributed(tmp_path / "rows")
    assert calls == ["reopen", "bind"] * 2
    assert torch.equal(first.values, again.values)
