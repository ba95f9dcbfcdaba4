"""`magic`: against runs of SGD and Adam that are differentiated whole."""

import attrs
import pytest
import torch
from dattri_unroll import read_run
from oracles.unrolled import differentiated
from recorded import N, linear, network, run_recorded, schedule

import dattri_core as dattri

ADAMS = {
    "adam": (0.9, 0.99, 1e-3, False),
    "adamw": (0.8, 0.95, 1e-2, True),
    "no first moment": (0.0, 0.9, 1e-3, True),
}
SLOW = {"rates": [0.05 / (1 + 0.2 * s) for s in range(9)], "batches": schedule()[0]}


def scores_of(world, folder, *, method="magic", task=None, **changes):
    model, loss, train, test = world
    task = dattri.Task(model, loss, checkpoints=read_run(folder), **(task or {}))
    return dattri.attribute(task, train, test, method=method, progress=False, **changes)


def close(got, want, tolerance=1e-8):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


DECAYS = {"0.weight": 0.2, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1, DECAYS], ids=["none", "one", "groups"])
@pytest.mark.parametrize("adam", ADAMS)
def test_of_adam_it_is_the_derivative_of_the_whole_run(adam, decay, clip, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, adam=ADAMS[adam], decay=decay, clip=clip, **SLOW)
    got = scores_of(made, tmp_path, tolerance=1e-9)  # each step is as expected
    want = differentiated(run, made[3])
    close(got.removal_effect(), want)
    close(got.values, N * want)


SHARES = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 0.3}


@pytest.mark.parametrize("decay", [0.0, DECAYS], ids=["none", "groups"])
@pytest.mark.parametrize(
    "optimiser",
    [
        {},
        {"momentum": 0.9, "dampening": 0.2},
        {"momentum": 0.8, "nesterov": True, "clip": 0.4},
        {"adam": ADAMS["adam"], **SLOW},
        {"adam": ADAMS["adamw"], "clip": 0.5, **SLOW},
    ],
)
def test_of_groups_with_learning_rates_of_their_own(optimiser, decay, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=decay, shares=SHARES, **optimiser)
    got = scores_of(made, tmp_path, tolerance=1e-9)
    want = differentiated(run, made[3])
    close(got.removal_effect(), want)
    one = [attrs.evolve(c, step=attrs.evolve(c.step, rates={})) for c in read_run(tmp_path)]
    with pytest.raises(dattri.InputError, match="is not that of"):
        attributed(made, one)


@pytest.mark.parametrize("adam", [None, "adamw"])
def test_of_a_group_that_waits(adam, tmp_path):
    made = network()
    momentum = {"momentum": 0.9} if adam is None else {}
    shares = {**SHARES, "0.weight": 0.0}
    run = run_recorded(
        made, tmp_path, adam=ADAMS.get(adam), decay=0.1, shares=shares, **momentum, **SLOW
    )
    got = scores_of(made, tmp_path, tolerance=1e-9)
    close(got.removal_effect(), differentiated(run, made[3]))


def test_learning_rates_by_group_are_refused_where_one_is_meant(tmp_path):
    made = network()
    run_recorded(made, tmp_path, shares=SHARES)
    run = read_run(tmp_path)
    with pytest.raises(dattri.SpecError, match="or of different learning rates, and segments"):
        attributed(made, run, "source")
    with pytest.raises(dattri.SpecError, match="'weighted' weighs checkpoints by one learning"):
        attributed(made, run, "tracin")
    sketch = dattri.default_registry().make("projector", "rademacher", dim=6)
    with pytest.raises(dattri.SpecError, match=r"different learning rates or .* have 6 entries"):
        attributed(made, run, projector=sketch)


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}])
@pytest.mark.parametrize("decay", [0.1, DECAYS], ids=["one", "groups"])
def test_of_clipped_gradient_descent_too(momentum, decay, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=decay, clip=0.4, **momentum)
    got = scores_of(made, tmp_path, tolerance=1e-9)
    want = differentiated(run, made[3])
    close(got.removal_effect(), want)
    loose = differentiated(attrs.evolve(run, clip=None), made[3])
    assert (want - loose).abs().max() > 0.05 * want.abs().max()  # some steps were clipped


@pytest.mark.parametrize("adam", [None, "adamw"])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_of_a_loss_that_is_no_mean_over_the_batch(adam, clip, tmp_path):
    made = network()
    settings = SLOW if adam else {}
    run = run_recorded(
        made, tmp_path, adam=ADAMS.get(adam), decay=0.1, clip=clip, scale=0.3, **settings
    )
    got = scores_of(made, tmp_path, tolerance=1e-9)
    close(got.removal_effect(), differentiated(run, made[3]))
    unscaled = [attrs.evolve(c, step=attrs.evolve(c.step, scale=1.0)) for c in read_run(tmp_path)]
    if clip is None:
        with pytest.raises(dattri.InputError, match="else record its scale"):
            attributed(made, unscaled)


def test_of_a_linear_model_by_adam(tmp_path):
    made = linear()
    run = run_recorded(made, tmp_path, adam=ADAMS["adam"], decay=0.1, **SLOW)
    close(scores_of(made, tmp_path).removal_effect(), differentiated(run, made[3]))


def adam_run(folder, **changes):
    """Record a run of Adam and return its world, checkpoints and oracle."""
    made = network()
    run = run_recorded(made, folder, adam=ADAMS["adamw"], decay=0.1, **{**SLOW, **changes})
    return made, list(read_run(folder)), run


def attributed(made, checkpoints, method="magic", *, task=None, **changes):
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=checkpoints, **(task or {}))
    return dattri.attribute(task, train, test, method=method, progress=False, **changes)


def test_it_is_dvemb_with_the_hessian(tmp_path):
    made, checkpoints, _ = adam_run(tmp_path)
    exact = attributed(made, checkpoints).values
    assert torch.equal(exact, attributed(made, checkpoints, "dvemb", curvature="hessian").values)
    near = attributed(made, checkpoints, "dvemb", curvature="ggn").values
    assert 1e-3 < (near - exact).norm() / exact.norm() < 1  # another curvature, told apart


def test_groups_of_test_examples_and_epochs_change_nothing(tmp_path, monkeypatch):
    import dattri_unroll.points as module

    made, checkpoints, _ = adam_run(tmp_path, clip=0.5)
    model, loss, train, test = made
    whole = attributed(made, checkpoints).values
    task = dattri.Task(model, loss, checkpoints=checkpoints)
    method = dattri.method("magic")
    with monkeypatch.context() as patch:
        patch.setattr(module, "COPIES", 2**19 // 38 // 8 // 3 - module.OF_ADAM)  # three columns
        assert "2 passes" in method.attribute(task, train, test, memory=2**20, dry_run=True)
        close(attributed(made, checkpoints, memory=2**20).values, whole, 1e-12)
    epochs = method.by_epoch(task, train, test, progress=False)
    assert len(epochs) == 3
    close(torch.stack([s.values for s in epochs.values()]).sum(0), whole, 1e-12)


def test_single_precision(tmp_path):
    made, checkpoints, run = adam_run(tmp_path, clip=0.5)
    want = differentiated(run, made[3])
    model, loss, (x, y), (q, r) = made
    single = model.float(), loss, (x.float(), y), (q.float(), r)
    checkpoints = [
        attrs.evolve(c, source={n: t.float() for n, t in c.load(model.double()).items()})
        for c in checkpoints
    ]
    model.float()
    got = attributed(single, checkpoints).removal_effect()
    assert got.dtype == torch.float32
    close(got.double(), want, 1e-4)


def test_a_part_of_the_parameters_is_a_run_of_its_own(tmp_path):
    made = network()
    for name, parameter in made[0].named_parameters():
        parameter.requires_grad_(name.startswith("2."))
    run = run_recorded(
        made, tmp_path, adam=ADAMS["adam"], decay={**DECAYS, "0.weight": 0.0}, **SLOW
    )
    got = attributed(made, read_run(tmp_path)).removal_effect()
    still = attrs.evolve(run, frozen=("0.weight", "0.bias"))
    close(got, differentiated(still, made[3]))


BENT = {
    "gradient that its first moments show": lambda m: attrs.evolve(m, first=m.first * 1.05),
    "second moments are": lambda m: attrs.evolve(m, second=m.second * 1.05),
}


@pytest.mark.parametrize("what", BENT)
def test_moments_of_another_training_are_refused(what, tmp_path):
    made, checkpoints, _ = adam_run(tmp_path)
    moments = checkpoints[4].optimiser.load(made[0])
    bent = {name: BENT[what](own) for name, own in moments.items()}
    checkpoints[4] = attrs.evolve(checkpoints[4], optimiser=dattri.AdamState(bent))
    with pytest.raises(dattri.InputError, match=f"not that of Adam on its batch: the {what}"):
        attributed(made, checkpoints)
    attributed(made, checkpoints, tolerance=10.0)


@pytest.mark.parametrize("change", [{"decoupled": False}, {"epsilon": 0.1}])
def test_weights_that_went_elsewhere_are_refused(change, tmp_path):
    made, checkpoints, _ = adam_run(tmp_path)
    for at, checkpoint in enumerate(checkpoints):
        rule = attrs.evolve(checkpoint.step.adam, **change)
        checkpoints[at] = attrs.evolve(checkpoint, step=attrs.evolve(checkpoint.step, adam=rule))
    with pytest.raises(dattri.InputError, match="not that of Adam on its batch: the"):
        attributed(made, checkpoints)


def test_another_batch_or_clipping_is_refused(tmp_path):
    made, checkpoints, _ = adam_run(tmp_path, clip=0.5)
    for change in ({"batch": torch.tensor([0, 0, 0, 1])}, {"clip": None}, {"clip": 0.4}):
        other = [attrs.evolve(c, step=attrs.evolve(c.step, **change)) for c in checkpoints[:-1]]
        with pytest.raises(dattri.InputError, match="not that of Adam on its batch"):
            attributed(made, [*other, checkpoints[-1]])


def test_a_parameter_that_sat_a_step_out_is_refused(tmp_path):
    made, checkpoints, _ = adam_run(tmp_path)
    moments = dict(checkpoints[4].optimiser.load(made[0]))
    moments["2.bias"] = attrs.evolve(moments["2.bias"], step=3)
    checkpoints[4] = attrs.evolve(checkpoints[4], optimiser=dattri.AdamState(moments))
    with pytest.raises(dattri.InputError, match=r"'2\.bias', expected one more; every parameter"):
        attributed(made, checkpoints)


def test_what_cannot_be_known_is_refused_at_once(tmp_path):
    made, checkpoints, _ = adam_run(tmp_path, clip=0.5)
    bare = [attrs.evolve(c, optimiser=None) for c in checkpoints]
    with pytest.raises(dattri.SpecError, match="is one of Adam, and the moments after it"):
        attributed(made, bare)
    mixed = [attrs.evolve(c, step=attrs.evolve(c.step, adam=None)) for c in checkpoints[:3]]
    with pytest.raises(dattri.SpecError, match="some steps of the run are those of Adam and some"):
        attributed(made, [*mixed, *checkpoints[3:]])
    with pytest.raises(dattri.SpecError, match=r"the last checkpoint, .* has a step of Adam"):
        attributed(made, checkpoints[:-1])
    with pytest.raises(dattri.SpecError, match=r"\['0.bias', '0.weight'\] are not attributed"):
        attributed(made, checkpoints, task={"parameters": "2.*"})
    sketch = dattri.default_registry().make("projector", "rademacher", dim=6)
    with pytest.raises(dattri.SpecError, match="entry by entry, and the rows have 6 entries"):
        attributed(made, checkpoints, projector=sketch)


@pytest.mark.parametrize("method", ["in-run-shapley", "source"])
def test_methods_of_gradient_descent_alone_refuse_adam(method, tmp_path):
    made, checkpoints, _ = adam_run(tmp_path)
    with pytest.raises(dattri.SpecError, match=r"one of Adam(,| or) of a clipped gradient"):
        attributed(made, checkpoints, method)
    clipped = network()
    run_recorded(clipped, tmp_path / "sgd", clip=0.4)
    with pytest.raises(dattri.SpecError, match=r"one of Adam(,| or) of a clipped gradient"):
        attributed(clipped, read_run(tmp_path / "sgd"), method)


def test_source_asks_for_one_weight_decay(tmp_path):
    made = network()
    run_recorded(made, tmp_path, decay=DECAYS)
    with pytest.raises(dattri.SpecError, match=r"different weight decays, \[0.0, 0.1, 0.2\]"):
        attributed(made, read_run(tmp_path), "source")
    attributed(made, read_run(tmp_path), "source", weight_decay=0.1)


def test_a_chaotic_run_is_warned_of(tmp_path):
    made = network()
    run_recorded(made, tmp_path, batches=schedule()[0], rates=[6.0] * 9)
    with pytest.warns(RuntimeWarning, match="the run itself was unstable"):
        scores_of(made, tmp_path)


@pytest.mark.parametrize(("method", "changes"), [("in-run-shapley", {}), ("dvemb", {})])
def test_scores_are_in_the_unit_of_what_was_minimised(method, changes, tmp_path):
    """Gradients count by the scale; what a curvature says of a longer step is another thing."""
    made = network()
    run_recorded(made, tmp_path, batches=schedule()[0][:1], rates=[0.1], scale=0.3)
    run = read_run(tmp_path)
    plain = [attrs.evolve(c, step=attrs.evolve(c.step, scale=1.0)) for c in run]
    got = attributed(made, run, method, **changes).values
    want = attributed(made, plain, method, tolerance=10.0, **changes).values
    close(got, 0.3 * want, 1e-12)
    assert float(got.abs().max()) > 0


def test_source_goes_as_far_as_the_scale_says(tmp_path):
    made = network()
    run_recorded(made, tmp_path, scale=0.3)
    run = read_run(tmp_path)
    other = [
        attrs.evolve(c, learning_rate=0.3 * c.learning_rate, step=attrs.evolve(c.step, scale=1.0))
        for c in run
    ]
    close(attributed(made, run, "source").values, attributed(made, other, "source").values, 1e-12)
