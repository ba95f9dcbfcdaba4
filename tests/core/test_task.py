"""Task: selection of parameters, and what is refused."""

import pytest
import torch
from torch import nn

import dattri_core as dattri
from dattri_core import InputError, Task


def model():
    net = nn.Sequential()
    net.fc1, net.fc2, net.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2)
    return net


ALL = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "norm.weight", "norm.bias")


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        ("*", ALL),
        ("fc*", ALL[:4]),
        ("*.weight", ALL[::2]),
        (["fc1.*", "norm.bias"], (*ALL[:2], "norm.bias")),
        (["norm.bias", "fc1.*"], (*ALL[:2], "norm.bias")),  # in the model's order
        ("!norm*", ALL[:4]),
        (["fc*", "!*.bias"], ("fc1.weight", "fc2.weight")),
    ],
)
def test_patterns(patterns, want):
    assert Task(model(), parameters=patterns).parameter_names == want


@pytest.mark.parametrize("patterns", [None, 3, [], [None], ["fc*", 2]])
def test_patterns_that_are_none(patterns):
    with pytest.raises(InputError, match=r"^parameters: got .*; give one or more patterns"):
        Task(model(), parameters=patterns)


def test_frozen_parameters_never_take_part():
    net = model()
    net.fc1.requires_grad_(False)
    assert Task(net).parameter_names == ALL[2:]
    with pytest.raises(InputError, match=r"'fc1\*' matches only frozen parameters \(fc1.weight"):
        Task(net, parameters="fc1*")
    net.requires_grad_(False)
    with pytest.raises(InputError, match=r"frozen|nothing to attribute"):
        Task(net)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("conv*", r"'conv\*' matches none of fc1.weight, fc1.bias"),
        (["fc*", "!conv*"], r"'!conv\*' matches none"),
        (["fc*", "!fc*"], "leave none of 6 parameters"),
        ([], "give one or more patterns"),
        ([3], "give one or more patterns"),
    ],
)
def test_bad_patterns(patterns, message):
    with pytest.raises(InputError, match=message):
        Task(model(), parameters=patterns)


def test_sign_and_names():
    assert Task(model()).sign == 1
    assert Task(model()).target_name == "cross-entropy"
    task = Task(model(), target="margin")
    assert (task.sign, task.loss_name, task.target_name) == (-1, "cross-entropy", "margin")
    lower = dattri.Target(lambda m, b: m(b[0]).sum(1), higher_is_better=False)
    assert Task(model(), target=lower).sign == 1

    def my_loss(net, batch):
        return net(batch[0]).sum(1)

    assert Task(model(), my_loss).loss_name == "my_loss"
    assert Task(model(), dattri.functional(lambda p, b: b)).loss_name == "<lambda>"


def test_refusals():
    with pytest.raises(InputError, match=r"model is a function, expected a torch.nn.Module"):
        Task(lambda x: x)
    with torch.device("meta"):
        net = model()
    with pytest.raises(InputError, match="device 'meta'"):
        Task(net)
    with pytest.raises(InputError, match="nothing to attribute through"):
        Task(nn.ReLU())
    with pytest.raises(InputError, match="got 1 for 2 checkpoints"):
        Task(model(), checkpoints=[None, None], learning_rates=[0.1])


def test_making_a_task_changes_nothing():
    net = model().train()
    net.fc1.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    Task(net, target="logit", parameters="fc*", checkpoints=model().state_dict())
    assert net.training
    assert not net.fc1.bias.requires_grad
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_parameters_without_a_shape_are_refused():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(dattri.InputError, match=r"0.weight, 0.bias of a lazy module.*on a batch"):
        dattri.Task(model)
    model(torch.zeros(1, 4))
    assert len(dattri.Task(model).parameter_names) == 4


def test_complex_parameters_are_refused_where_they_are_chosen():
    model = nn.Linear(3, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(dattri.InputError, match=r"phase are complex.*parameters='!phase'"):
        dattri.Task(model)
    assert dattri.Task(model, parameters="!phase").parameter_names == ("weight", "bias")
