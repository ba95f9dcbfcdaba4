"""Representations: which features, pooled how, with which labels; what is refused."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from dattri_parts.sources.representation import Representation
from oracles.toy_tasks import examples, mlp, normal, states, world
from torch import nn

import dattri_core as dattri
from dattri_core import InputError, NumericsError, SpecError, Task, take
from dattri_core.laws import check
from dattri_core.problem import collect

CPU = torch.device("cpu")
TRAIN, TEST = examples(13), examples(6, seed=300)


def rows(source, task, batch, role="train"):
    bound = source.bind(task, task.checkpoints[-1], take(batch, slice(0, 3)))
    return collect(bound, batch, torch.arange(dattri.batch_size(batch)), role, CPU)


def values(source, task, batch, role="train"):
    (block,) = rows(source, task, batch, role).blocks.values()
    assert not block.values.requires_grad
    return block.values


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


# --- which features -------------------------------------------------------------------------------
@pytest.mark.parametrize("role", ["train", "test"])
def test_by_default_they_are_what_the_last_linear_layer_is_given(role):
    task, batch, _ = world()
    got = rows(Representation(), task, batch, role)
    assert got.space.names == ("2.input",)
    same(got.blocks["2.input"].values, task.model[:2](batch[0]).detach())
    assert torch.equal(got.aux["label"], batch[1])


def test_of_several_linear_layers_the_last_one_called_counts():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.last(self.first(x))

    task = Task(Backwards().double())
    same(values(Representation(), task, TRAIN), task.model.first(TRAIN[0]).detach())


def test_the_output_of_a_module_and_the_first_tensor_of_it():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.lstm(x.reshape(len(x), 2, 2))[0][:, -1])

    task = Task(Recurrent().double())
    want = task.model.lstm(TRAIN[0].reshape(13, 2, 2))[0].detach()
    same(values(Representation(module="lstm"), task, TRAIN), want)
    same(values(Representation(module="lstm", pooling="last"), task, TRAIN), want[:, -1])
    same(values(Representation(), task, TRAIN), want[:, -1])
    logits = task.model(TRAIN[0]).detach()
    same(values(Representation(module="head"), task, TRAIN), logits)
    same(values(Representation(module=""), task, TRAIN), logits)


def test_the_input_itself_is_the_tensor_that_is_no_label():
    task, batch, _ = world()
    same(values(Representation(inputs=True), task, batch), batch[0])
    same(values(Representation(inputs=True, label="none"), task, batch), batch[0])
    numbers = normal(13, seed=9)
    regression = Task(mlp((4, 5, 1)), loss="squared-error")
    got = rows(Representation(inputs=True), regression, (batch[0], numbers[:, None]))
    same(got.blocks["inputs"].values, batch[0])
    assert torch.equal(got.aux["label"], numbers)  # [B, 1] is one number an example
    got = rows(Representation(inputs=True, label="none"), regression, (batch[0], numbers[:, None]))
    assert not got.aux


def test_a_function_in_python():
    def logits(model, batch):
        return model(batch[0]).softmax(1)

    task = Task(mlp(), checkpoints=states(2))
    source = Representation(function=logits)
    weights = mlp()
    weights.load_state_dict(states(2)[1])
    same(values(source, task, TRAIN), weights(TRAIN[0]).softmax(1).detach())
    method = dattri.Method(source=source, scorer="knn-shapley")
    spec = json.loads(json.dumps(method.to_spec()))
    assert "logits" in spec["source"]["function"]["unregistered"]
    with pytest.raises(SpecError):
        dattri.Method(**spec)
    assert method.attribute(task, TRAIN, TEST).provenance["method"] == method.to_spec()


def test_labels_by_key_and_by_position():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

    task = Task(Named(), loss=lambda model, batch: model(batch["x"]).square().sum(1))
    batch = {"x": TRAIN[0], "fine": TRAIN[1], "coarse": TRAIN[1] // 2}
    got = rows(Representation(label="coarse"), task, batch)
    assert torch.equal(got.aux["label"], TRAIN[1] // 2)
    task = Task(mlp(), loss=lambda model, batch: model(batch[0]).square().sum(1))
    got = rows(Representation(label=1), task, (*TRAIN, TRAIN[1] // 2))
    assert torch.equal(got.aux["label"], TRAIN[1])
    assert Representation(label="none").provides == frozenset()
    assert Representation().provides == {"label"}


# --- pooling --------------------------------------------------------------------------------------
class Given(nn.Module):
    """Gives its features, times a weight of one, and a logit for the loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.features = nn.Identity()

    def forward(self, x):
        return self.features(x * self.weight)


def given(**options):
    return Task(Given(), loss=lambda model, batch: model(batch["x"]).flatten(1).sum(1), **options)


@pytest.mark.parametrize(
    ("pooling", "want"),
    [
        ("none", lambda t: t),
        ("mean", lambda t: t.mean(1)),
        ("first", lambda t: t[:, 0]),
        ("last", lambda t: t[:, -1]),
        ("max", lambda t: t.amax(1)),
    ],
)
def test_pooling_over_the_positions(pooling, want):
    sequences, images = normal(7, 5, 3, seed=1), normal(7, 4, 3, 2, seed=2)
    flat = images.movedim(1, -1).flatten(1, 2)  # [B, positions, channels]
    source = Representation(module="features", pooling=pooling, label="none")
    same(values(source, given(), {"x": sequences}), want(sequences))
    got = values(source, given(), {"x": images})
    same(got, images if pooling == "none" else want(flat))
    turned = attrs.evolve(source, channels="first")
    want_turned = sequences if pooling == "none" else want(sequences.mT)
    same(values(turned, given(), {"x": sequences}), want_turned)
    turned = attrs.evolve(source, channels="last")
    got = values(turned, given(), {"x": images.movedim(1, -1)})
    same(got, images.movedim(1, -1) if pooling == "none" else want(flat))


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "max"])
def test_padding_does_not_show(pooling):
    x, lengths = normal(6, 5, 3, seed=3) - 4, [5, 2, 3, 1, 5, 4]
    source = Representation(module="features", pooling=pooling, label="none")

    def padded(front, back):
        total = front + 5 + back
        inputs = torch.full((6, total, 3), 7.0, dtype=torch.float64)
        mask = torch.zeros(6, total, dtype=torch.long)
        for b, length in enumerate(lengths):
            inputs[b, front : front + length] = x[b, :length]
            mask[b, front : front + length] = 1
        return {"x": inputs, "attention_mask": mask}

    pools = {
        "mean": lambda t: t.mean(0),
        "first": lambda t: t[0],
        "last": lambda t: t[-1],
        "max": lambda t: t.amax(0),
    }
    want = torch.stack([pools[pooling](x[b, :length]) for b, length in enumerate(lengths)])
    for front, back in ((0, 0), (0, 3), (2, 0)):
        same(values(source, given(), padded(front, back)), want)
    batch = padded(0, 0)
    batch["attention_mask"][4] = 0
    with pytest.raises(InputError, match=r"nothing to pool of the examples \[4\]"):
        values(source, given(), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": True},
        {"label": "none"},
        {"label": "none", "inputs": True},
        {"label": "none", "pooling": "mean"},
        {"label": "none", "pooling": "last"},
        {"label": "none", "pooling": "max"},
        {"module": "conv", "pooling": "mean", "channels": "first"},
        {"module": "hidden"},
        {"function": lambda model, batch: dattri.labels_of(batch)[..., None] * torch.ones(2)},
    ],
    # The address of a lambda in an id would differ between processes that share the tests.
    ids=lambda changes: "-".join(f"{key}={changes[key]}" for key in changes if key != "function"),
)
def test_other_settings_meet_the_laws(changes):
    if "function" in changes:
        changes = {"function": _logits, "label": "none"}
    report = check("source", Representation(**changes))
    assert report.ok, str(report)
    assert report.run >= 7


def _logits(model, batch):
    batch = batch["input_ids"] if isinstance(batch, dict) else batch[0]
    return model(batch)


# --- refusals -------------------------------------------------------------------------------------
def refused(source, task, batch, match, error=SpecError):
    with pytest.raises(error, match=match):
        rows(source, task, batch)


def test_what_says_too_much_or_nothing_is_refused():
    task, batch, _ = world()
    refused(Representation(module="0", inputs=True), task, batch, "module and inputs each say")
    refused(Representation(module="one"), task, batch, "no module 'one'; it has")
    refused(Representation(module="0", pooling="mean"), task, batch, "no axis of positions")
    refused(Representation(), given(), {"x": normal(5, 3, seed=1)}, "calls no torch.nn.Linear")
    twice = Task(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    twice.model.append(twice.model[0])
    refused(Representation(module="0"), twice, batch, "called 2 times")


def test_labels_that_are_none_or_many_are_refused():
    task = given()
    x = {"x": normal(5, 3, seed=1)}
    refused(Representation(module="features"), task, x, "labels: the batch has keys")
    refused(Representation(module="features", label="y"), task, x, "label='y' is in no place")
    many = {**x, "label": torch.zeros(5, 4)}
    refused(Representation(module="features"), task, many, r"labels of shape \(3, 4\)")


def test_features_that_are_no_rows_are_refused():
    task, batch, _ = world()
    refused(Representation(inputs=True, label=0), task, batch, "one floating point tensor")
    for function, match in (
        (lambda model, batch: batch[1][:, None], "torch.int64"),
        (lambda model, batch: batch[0].T, "features are"),
        (lambda model, batch: batch[0].sum(1), "features are"),
        (lambda model, batch: None, "features are NoneType"),
        (lambda batch: batch[0], r"fails .*TypeError.*called with the task's model and a batch"),
        (lambda model, batch: batch["x"], r"fails .*encoder\(batch\[0\]\)"),
    ):
        refused(Representation(function=function), task, batch, match)
    mixed = Representation(function=lambda model, batch: batch[0] - batch[0].mean(0))
    refused(mixed, task, batch, "mix examples", InputError)


def test_features_that_change_their_shape_or_are_not_finite_are_named():
    source = Representation(module="features", label="none")
    bound = source.bind(given(), given().checkpoints[0], {"x": normal(3, 5, 2, seed=1)})
    with pytest.raises(InputError, match=r"shape \(4, 2\), those of the first .* have \(5, 2"):
        bound.stream({"x": normal(3, 4, 2, seed=1)}, "train", lambda name, block: None)
    bad = normal(3, 5, 2, seed=1)
    bad[1, 2] = torch.inf
    with pytest.raises(NumericsError, match=r"'features' are not finite .* examples \[1\]"):
        bound.stream({"x": bad}, "train", lambda name, block: None)


# --- with the rest --------------------------------------------------------------------------------
def test_curvatures_of_rows_whiten_features_and_products_are_refused():
    task, train, test = world()
    stage = {"curvature": "gauss-newton", "solver": {"name": "cholesky", "damping": 0.3}}
    method = dattri.Method(source="representation", inverse_hessian=stage, scorer="dot")
    left, right = (task.model[:2](side[0]).detach() for side in (train, test))
    second = left.T @ left / len(left) + 0.3 * torch.eye(5, dtype=torch.float64)
    want = left @ torch.linalg.solve(second, right.T)
    torch.testing.assert_close(method.attribute(task, train, test).values, want)
    for curvature in ("hessian", "ggn"):
        made = dattri.Method(
            source="representation",
            inverse_hessian={"curvature": curvature, "solver": {"name": "cg", "damping": 0.1}},
            scorer="dot",
        )
        with pytest.raises(SpecError):
            made.attribute(task, train, test)


def test_rows_are_read_from_a_store_with_their_labels(tmp_path):
    calls = []

    def features(model, batch):
        calls.append(len(batch[0]))
        return model[:2](batch[0])

    task = Task(mlp(), checkpoints=states(2))
    method = dattri.method("knn-shapley", neighbours=2, function=features)
    want = method.attribute(task, TRAIN, TEST)
    got = method.attribute(task, TRAIN, TEST, store=tmp_path / "rows")
    assert torch.equal(got.values, want.values)
    calls.clear()
    other = dattri.method("knn-shapley-soft-label", neighbours=2, function=features)
    got = other.attribute(task, TRAIN, TEST, store=tmp_path / "rows")
    assert max(calls) <= len(TEST[0])  # tries of a few examples, and the test set
    assert torch.equal(got.values, other.attribute(task, TRAIN, TEST).values)


def test_the_embeddings_of_two_sets_are_compared_by_any_scorer():
    task, train, test = world()
    method = dattri.Method(source={"name": "representation", "label": "none"}, scorer="cosine")
    left, right = (task.model[:2](side[0]).detach() for side in (train, test))
    want = nn.functional.cosine_similarity(left[:, None], right[None], dim=2)
    torch.testing.assert_close(method.attribute(task, train, test).values, want)
