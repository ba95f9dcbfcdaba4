"""A recorded run taken again without some examples, against the same run by dense algebra."""

import attrs
import numpy as np
import pytest
import torch
from dattri_metrics import lds
from dattri_parts.training import leave_one_out, random_subsets
from dattri_retrain import CounterfactualStore
from dattri_unroll import RunRetraining, read_run, record
from recorded import LOSSES, N, network, run_recorded, schedule, train_step
from torch import nn

import dattri_core as dattri

SLOW = {"rates": [0.05 / (1 + 0.2 * s) for s in range(9)], "batches": schedule()[0]}
DECAYS = {"0.weight": 0.2, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0}
SHARES = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 0.0, "2.bias": 0.3}
RUNS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "decay": DECAYS},
    "nesterov, clipped": {"momentum": 0.8, "nesterov": True, "clip": 0.4, "scale": 0.7},
    "adam": {"adam": (0.9, 0.99, 1e-3, False), "decay": 0.1, **SLOW},
    "momentum, rates by group": {"momentum": 0.9, "decay": 0.1, "shares": SHARES},
    "adam, rates by group": {"adam": (0.9, 0.99, 1e-3, False), "shares": SHARES, **SLOW},
    "adamw, clipped": {"adam": (0.8, 0.95, 1e-2, True), "decay": DECAYS, "clip": 0.5, **SLOW},
}


def again(made, folder, targets=("loss",), **changes):
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=changes.get("checkpoints", read_run(folder)))
    return RunRetraining(task, changes.get("train", train), test, targets)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_run_with_weights_of_zero(name, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, **RUNS[name])
    retraining = again(made, tmp_path)
    plan = [dattri.Counterfactual(np.ones(N, dtype=bool)), *random_subsets(N, 4, fraction=0.5)]
    for counterfactual, state in zip(plan, retraining.train(plan), strict=True):
        weights = torch.from_numpy(counterfactual.mask.astype(np.float64))
        theta = run.path(weights)[-1]
        flat = torch.cat([state[n].flatten() for n, _ in made[0].named_parameters()])
        assert (flat - theta).abs().max() < 1e-11
        want = run.losses(theta, made[3]).numpy()
        assert np.abs(retraining.measure(state)["loss"] - want).max() < 1e-11


def test_a_batch_of_which_nothing_is_kept_leaves_decay_and_momentum(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=0.1, momentum=0.9)
    mask = np.ones(N, dtype=bool)
    mask[run.batches[1]] = False
    mask[run.batches[0][0]] = True
    retraining = again(made, tmp_path)
    (state,) = retraining.train([dattri.Counterfactual(mask)])
    want = run.path(torch.from_numpy(mask.astype(np.float64)))[-1]
    flat = torch.cat([state[n].flatten() for n, _ in made[0].named_parameters()])
    assert (flat - want).abs().max() < 1e-12


def test_the_model_is_left_as_it_was(tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    made[0].train()
    before = {n: t.clone() for n, t in made[0].state_dict().items()}
    list(again(made, tmp_path).train(random_subsets(N, 2)))
    assert made[0].training
    assert all(torch.equal(before[n], t) for n, t in made[0].state_dict().items())


def test_moments_at_the_start_are_those_of_the_run(tmp_path):
    """A training that begins with a warm optimiser, as one that goes on with another one."""
    made = network()
    model, loss, train, _ = made
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    for indices in schedule()[0][:3]:
        train_step(model, optimizer, LOSSES[loss], train, indices)
        optimizer.step()
    with record(model, optimizer, tmp_path) as run:
        for indices in schedule()[0][3:]:
            train_step(model, optimizer, LOSSES[loss], train, indices)
            run.step(indices)
            optimizer.step()
    (state,) = again(made, tmp_path).train([dattri.Counterfactual(np.ones(N, dtype=bool))])
    assert all((state[n] - p).abs().max() < 1e-12 for n, p in model.named_parameters())
    without = [np.arange(N) != i for i in range(N)]
    # By single weights of w_i, the derivative of the warm run, of finite differences.
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    effect = dattri.attribute(task, train, made[3], method="magic", progress=False).removal_effect()
    ends = again(made, tmp_path).train([dattri.Counterfactual(mask) for mask in without])
    base = again(made, tmp_path).measure(state)["loss"]
    change = np.stack([again(made, tmp_path).measure(end)["loss"] - base for end in ends])
    assert np.corrcoef(change.ravel(), effect.numpy().ravel())[0, 1] > 0.97


def test_magic_predicts_what_the_run_ends_in(tmp_path):
    made = network()
    run_recorded(made, tmp_path / "run", **RUNS["adamw, clipped"])
    store = CounterfactualStore(tmp_path / "bank", again(made, tmp_path / "run"))
    plan = leave_one_out(N)
    losses = store.outcomes(plan, "loss")
    task = dattri.Task(made[0], made[1], checkpoints=read_run(tmp_path / "run"))
    exact = dattri.attribute(task, made[2], made[3], method="magic", progress=False)
    near = dattri.attribute(task, made[2], made[3], method="grad-dot", progress=False)
    masks = [c.mask for c in plan]
    found = [lds(s, masks, losses, higher_is_better=False).value for s in (exact, near)]
    assert found[0] > 0.95 > found[1]
    assert (
        len(CounterfactualStore(tmp_path / "bank", again(made, tmp_path / "run")).missing(plan))
        == 0
    )


def test_what_outcomes_depend_on_is_in_the_fingerprint(tmp_path):
    made = network()
    run_recorded(made, tmp_path, **RUNS["adam"])
    base = again(made, tmp_path).fingerprint
    assert base == again(made, tmp_path).fingerprint
    run = list(read_run(tmp_path))

    def changed(at=3, **step):
        made_anew = attrs.evolve(run[at], step=attrs.evolve(run[at].step, **step))
        return [*run[:at], made_anew, *run[at + 1 :]]

    other = made[2][0].clone()
    other[0, 0] += 1e-9
    others = [
        again(made, tmp_path, targets=("loss", "margin")),
        again(made, tmp_path, train=(other, made[2][1])),
        again(made, tmp_path, checkpoints=changed(batch=torch.tensor([1, 2]))),
        again(made, tmp_path, checkpoints=changed(weight_decay=0.2)),
        again(made, tmp_path, checkpoints=changed(clip=1.0)),
        again(made, tmp_path, checkpoints=changed(scale=2.0)),
        again(made, tmp_path, checkpoints=changed(adam=dattri.AdamRule((0.9, 0.99), 1e-4, False))),
        again(
            made,
            tmp_path,
            checkpoints=[*run[:2], attrs.evolve(run[2], learning_rate=0.3), *run[3:]],
        ),
        again((made[0], "token-cross-entropy", *made[2:]), tmp_path),
        again((nn.Sequential(*made[0], nn.Identity()), *made[1:]), tmp_path),
    ]
    assert len({base, *(one.fingerprint for one in others)}) == len(others) + 1


def test_what_is_no_run_or_another_training_is_refused(tmp_path):
    made = network()
    run_recorded(made, tmp_path, **RUNS["adam"])
    run = list(read_run(tmp_path))
    with pytest.raises(dattri.SpecError, match="has 1 checkpoints, and it is not known which"):
        again(made, tmp_path, checkpoints=None)
    with pytest.raises(dattri.SpecError, match="saw 0 examples"):
        again(made, tmp_path, checkpoints=[*run, run[0]])
    short = tuple(part[:5] for part in made[2])
    with pytest.raises(dattri.SpecError, match="the train set has 5"):
        again(made, tmp_path, train=short)
    flipped = tuple(part.flip(0) for part in made[2])
    with pytest.raises(dattri.InputError, match="the first step, taken again with all examples"):
        again(made, tmp_path, train=flipped).train(random_subsets(N, 1))
    with pytest.raises(dattri.InputError, match="has 5 truth values, and there are 12"):
        again(made, tmp_path).train(random_subsets(5, 1))
    with pytest.raises(dattri.InputError, match="no target named 'odds'"):
        again(made, tmp_path, targets=("odds",))


def test_a_run_that_diverges_without_some_examples_is_an_error(tmp_path):
    made = network()
    batches, _ = schedule()
    run_recorded(made, tmp_path, batches=batches, rates=[0.2] * 9)
    run = [
        attrs.evolve(c, learning_rate=np.inf if c.position > 1 else 0.2) for c in read_run(tmp_path)
    ]
    with pytest.raises(dattri.NumericsError, match="at the end of the run with 6 of 12 examples"):
        list(again(made, tmp_path, checkpoints=run).train(random_subsets(N, 1)))
