"""The source ``margin``: whose margin, what is refused, and exactness where p is 0 or 1."""

import math

import pytest
import torch
from oracles.toy_tasks import examples, mlp
from torch import nn

import dattri_core as dattri
from dattri_core import Loss, SpecError, Target, Task

TRAIN, TEST = examples(20), examples(4, seed=300)


def trak(**changes):
    return dattri.method("trak", projector="identity", damping=1e-2, **changes)


def residuals(task, batch=TRAIN):
    bound = trak().source.bind(task, task.checkpoints[0], tuple(x[:3] for x in batch))
    return bound.stream(batch, "train", lambda name, block: None)["residual"]


class Logits(nn.Module):
    """Give the inputs times a weight of one."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, inputs):
        return inputs * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margin_and_residual_are_exact_where_p_rounds_to_one(dtype):
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 0])
    margins = dattri.cross_entropy.margin(logits, (logits, labels))
    assert margins.tolist() == pytest.approx([60 - math.log(2), -60.0], rel=1e-6)
    rest = dattri.cross_entropy.residual(logits, (logits, labels))
    assert rest.tolist() == pytest.approx([2 * math.exp(-60), 1.0], rel=1e-5)
    got = residuals(Task(Logits(dtype)), (logits, labels))
    assert torch.equal(got, rest)


def test_an_ignored_label_has_no_margin_and_nothing_left_to_learn():
    inputs, labels = TRAIN
    marked = labels.clone()
    marked[::3] = -100
    task = Task(mlp())
    got, plain = residuals(task, (inputs, marked)), residuals(task)
    assert torch.equal(got, plain.where(marked != -100, 0))
    scores = trak().attribute(task, (inputs, marked), TEST)
    assert not scores.values[::3].any()
    assert scores.values[1::3].any()


def test_a_sequence_without_a_label_has_no_residual():
    tokens = torch.randint(5, (3, 4))
    labels = tokens.clone()
    labels[1] = -100
    batch = {"input_ids": tokens, "labels": labels}
    outputs = torch.randn(3, 4, 5)
    assert dattri.causal_lm.residual(outputs, batch)[1] == 0
    assert dattri.causal_lm.margin(outputs, batch)[1] == 0
    assert (dattri.causal_lm.residual(outputs, batch)[[0, 2]] > 0).all()


def binary(**options):
    """Return a logistic loss of one logit, with labels -1 and 1."""

    def signed(outputs, batch):
        return outputs.squeeze(1) * batch[1]

    return Loss(
        lambda model, batch: model(batch[0]),
        lambda outputs, batch: nn.functional.softplus(-signed(outputs, batch)),
        "binary",
        margin=signed,
        **options,
    )


def test_a_loss_may_bring_its_own_margin_whose_residual_is_one_minus_p():
    model = mlp((4, 3, 1))
    inputs, labels = TRAIN[0], 2.0 * (TRAIN[1] > 0) - 1
    task = Task(model, binary())
    got = residuals(task, (inputs, labels))
    with torch.no_grad():
        want = 1 - (model(inputs).squeeze(1) * labels).sigmoid()
    assert (got - want).abs().max() <= 1e-12
    # The same as the two logits (f, 0) of a softmax would give.
    wide = mlp((4, 3, 2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            dict(wide.named_parameters())[name][: len(weight)] = weight
        wide[-1].weight[1], wide[-1].bias[1] = 0, 0
    classes = ((labels < 0).long(), (2.0 * (TEST[1] > 0) - 1 < 0).long())
    task_of_two = Task(wide, parameters="0.*")
    want = trak().attribute(task_of_two, (inputs, classes[0]), (TEST[0], classes[1]))
    task = Task(model, binary(), parameters="0.*")
    got = trak().attribute(task, (inputs, labels), (TEST[0], 1 - 2.0 * classes[1]))
    assert (got.values - want.values).abs().max() <= 1e-10


def test_a_residual_of_its_own_may_be_given():
    task = Task(mlp((4, 3, 1)), binary(residual=lambda outputs, batch: batch[1] / 4))
    labels = 2.0 * (TRAIN[1] > 0) - 1
    assert torch.equal(residuals(task, (TRAIN[0], labels)).double(), labels.double() / 4)


def test_a_target_of_the_task_takes_the_test_side_alone():
    def first(model, batch):
        return model(batch[0])[:, 0]

    margin = trak().attribute(Task(mlp()), TRAIN, TEST).values
    same = trak().attribute(Task(mlp(), target="margin"), TRAIN, TEST)
    assert (same.values - margin).abs().max() <= 1e-12
    up = Task(mlp(), target=Target(first, higher_is_better=True, name="first"))
    scores = trak().attribute(up, TRAIN, TEST)
    assert scores.provenance["target"] == {"name": "first", "higher_is_better": True}
    down = Task(mlp(), target=Target(first, higher_is_better=False))
    other = trak().attribute(down, TRAIN, TEST)
    assert (scores.values + other.values).abs().max() <= 1e-12
    assert torch.equal(residuals(up), residuals(down))


def test_the_loss_is_a_target_where_it_is_named():
    scores = trak().attribute(Task(mlp(), target="loss"), TRAIN, TEST)
    assert scores.provenance["target"] == {"name": "cross-entropy", "higher_is_better": False}
    asked = Task(mlp(), target=Target(dattri.cross_entropy, higher_is_better=False))
    assert (scores.values - trak().attribute(asked, TRAIN, TEST).values).abs().max() <= 1e-12
    margin = trak().attribute(Task(mlp()), TRAIN, TEST).values
    # d loss = -(1 - p) d margin, and less of the loss is better: a column is the margin's, shrunk.
    shrunk = residuals(Task(mlp()), TEST) * margin
    assert (scores.values - shrunk).abs().max() <= 1e-10 * margin.abs().max()


def test_the_task_keeps_its_loss_and_target():
    task = Task(mlp())
    trak().attribute(task, TRAIN, TEST)
    assert task.loss is dattri.cross_entropy
    assert task.target is None
    changed = task.with_(loss=dattri.squared_error, target=dattri.logit)
    assert (changed.loss_name, changed.target_name, changed.sign) == ("squared-error", "logit", -1)
    assert changed.model is task.model
    assert changed.checkpoints is task.checkpoints
    assert task.loss is dattri.cross_entropy


@pytest.mark.parametrize(
    "loss", ["squared-error", lambda model, batch: model(batch[0]).square().sum(1)]
)
def test_a_loss_without_a_margin_is_refused(loss):
    train = (TRAIN[0], torch.randn(20, 3, dtype=torch.float64))
    with pytest.raises(SpecError, match="has no margin; use the loss 'cross-entropy'"):
        trak().attribute(Task(mlp(), loss), train, train)


def test_shares_of_classes_are_refused():
    train = (TRAIN[0], nn.functional.one_hot(TRAIN[1], 3).double())
    with pytest.raises(dattri.InputError, match="shares of the classes"):
        trak().attribute(Task(mlp()), train, train)


def test_a_source_of_no_gradients_is_refused():
    class Features:
        provides = frozenset()

        def bind(self, task, checkpoint, sample):
            return self

    method = trak(source={"name": "margin", "source": Features()})
    with pytest.raises(SpecError, match="rows of Features are not gradients"):
        method.attribute(Task(mlp()), TRAIN, TEST)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_a_curvature_of_a_likelihood_is_refused(curvature):
    method = trak(curvature=curvature)
    with pytest.raises(dattri.DattriError, match=r"[mM]argin"):
        method.attribute(Task(mlp()), TRAIN, TEST)
