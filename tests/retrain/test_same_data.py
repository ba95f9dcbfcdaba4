"""Methods by retraining are refused data that are not those of the retraining."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from dattri_parts.training import ModelRetraining, Recipe
from dattri_retrain import CounterfactualStore, SettingRetraining
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_retraining import M, N, Toy, toy_data

import dattri_core as dattri
from dattri_core import Examples, InputError

METHODS = ("leave-one-out", "datamodels", "shapley", "banzhaf", "data-oob")


def data():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * N, 4, generator=random)
    labels = (inputs[:, 0] > 0).long()
    return (inputs[:N], labels[:N]), (inputs[N:], labels[N:])


def linear():
    return nn.Linear(4, 2)


def retraining(**changes):
    train, test = data()
    given = {"train_data": train, "test_data": test, "targets": ("loss",), "about": {}, **changes}
    return ModelRetraining(linear, Recipe(1, 5, 0.1), "cross-entropy", **given)


def ask(folder, name, train, test, held=None, **fields):
    store = CounterfactualStore(folder, held or retraining())
    made = dattri.method(name, ground_truth=store, **fields)
    return made.attribute(dattri.Task(linear(), "cross-entropy"), train, test, dry_run=True)


def _moved(part, at):
    inputs, labels = part
    inputs = inputs.clone()
    inputs[at, 2] += 1e-3
    return inputs, labels


def _relabelled(part, at):
    inputs, labels = part
    labels = labels.clone()
    labels[at] = 1 - labels[at]
    return inputs, labels


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_other_data_and_another_order(tmp_path, name):
    train, test = data()
    held = retraining(test_data=train) if name == "data-oob" else None
    assert "models" in ask(tmp_path, name, train, test, held)
    with pytest.raises(InputError, match=rf"^{'semivalue' if name == 'shapley' else name}: train"):
        ask(tmp_path, name, tuple(part.flip(0) for part in train), test, held)
    if name != "data-oob":  # which only counts them
        with pytest.raises(InputError, match="test example 0 is not that of the retraining"):
            ask(tmp_path, name, train, tuple(part.flip(0) for part in test), held)


@pytest.mark.parametrize("change", [_moved, _relabelled])
@pytest.mark.parametrize("at", [0, N - 1])
def test_the_example_that_differs_is_named(tmp_path, change, at):
    train, test = data()
    with pytest.raises(InputError, match=rf"train example {at} is not.*retraining\.train_data"):
        ask(tmp_path, "leave-one-out", change(train, at), test)
    with pytest.raises(InputError, match=rf"test example {at} is not"):
        ask(tmp_path, "leave-one-out", train, change(test, at))


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_unit_of_the_numbers_does_not_matter(tmp_path, unit):
    train, test = ((inputs * unit, torch.zeros_like(labels)) for inputs, labels in data())
    held = retraining(train_data=train, test_data=test)
    near = train[0] * (1 + 1e-7)
    assert "models" in ask(tmp_path, "leave-one-out", (near, train[1]), test, held)
    with pytest.raises(InputError, match="train example 0 is not that of the retraining"):
        ask(tmp_path, "leave-one-out", tuple(part.flip(0) for part in train), test, held)


def test_it_is_named_where_it_lies_beyond_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("dattri_retrain.same_data.ROWS", 5)
    train, test = data()
    assert "models" in ask(tmp_path, "leave-one-out", train, test)
    with pytest.raises(InputError, match="train example 11 is not"):
        ask(tmp_path, "leave-one-out", _moved(train, 11), test)


def test_data_oob_of_models_measured_on_test_examples_says_how_to_measure_train_examples(tmp_path):
    train, test = data()
    with pytest.raises(InputError, match=r"data-oob: test example 0.*evolve\(retraining, test_d"):
        ask(tmp_path, "data-oob", train, test)


def test_data_in_another_precision_shape_or_stream_are_the_same(tmp_path):
    train, test = data()
    half = tuple(part.half() if part.is_floating_point() else part for part in train)
    loader = DataLoader(TensorDataset(*train), batch_size=5)
    for given in (
        (train[0].double(), train[1]),
        half,
        (train[0].unsqueeze(1), train[1][:, None]),
        (train[0], train[1].float()),
        {"input": train[0], "labels": train[1]},
        loader,
        Examples.of(train, "train"),
        [(x, int(y)) for x, y in zip(*train, strict=True)],
    ):
        assert "models" in ask(tmp_path, "leave-one-out", given, test)
    nan = train[0].clone()
    nan[2, 1] = np.nan
    held = retraining(train_data=(nan, train[1]))
    assert "models" in ask(tmp_path, "leave-one-out", (nan.double(), train[1]), test, held)
    with pytest.raises(InputError, match="train example 2 is not"):
        ask(tmp_path, "leave-one-out", train, test, held)


def test_data_of_other_shapes_are_refused_with_both_shapes(tmp_path):
    train, test = data()
    for given in ((train[0][:, :3], train[1]), (*train, train[1])):
        with pytest.raises(InputError, match=r"\(12, [34]\).* holds of shapes \[\(12, 4\), \(12,"):
            ask(tmp_path, "leave-one-out", given, test)


def test_a_retraining_that_shows_no_data_is_asked_as_before(tmp_path):
    (x, y), (x_test, y_test) = toy_data(N)
    train = torch.from_numpy(x) + 1, torch.from_numpy(y)
    test = torch.from_numpy(x_test), torch.from_numpy(y_test)

    @attrs.frozen(eq=False)
    class Texts(Toy):
        train_data = ("a",) * N
        test_data = None

    for held in (Toy(), Texts()):
        assert "models" in ask(tmp_path, "leave-one-out", train, test, held)


def test_the_retraining_of_a_setting_shows_the_data_of_what_it_loads(toy_setting, monkeypatch):
    made = SettingRetraining("toy", size=(N, M))
    assert (made.train_data, made.test_data) == (None, None)
    held = retraining()
    monkeypatch.setattr(SettingRetraining, "loaded", held)
    assert (made.train_data, made.test_data) == (held.train_data, held.test_data)
