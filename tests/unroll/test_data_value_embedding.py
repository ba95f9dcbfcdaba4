"""`dvemb`: against a run that is differentiated whole, dense recursions, and runs without i."""

import warnings

import attrs
import pytest
import torch
from dattri_parts.sources.per_example import PerExample
from dattri_unroll import read_run
from oracles.unrolled import carried_back, differentiated
from recorded import LOSSES, N, linear, network, run_recorded, schedule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core import MovableSource
from dattri_core.laws import check


def scores_of(world, folder, *, train=None, test=None, **changes):
    model, loss, given_train, given_test = world
    settings = {k: changes.pop(k) for k in ("memory", "out") if k in changes}
    task = dattri.Task(model, loss, checkpoints=read_run(folder), **changes.pop("task", {}))
    method = dattri.method("dvemb", **changes)
    return method.attribute(
        task, train or given_train, test or given_test, progress=False, **settings
    )


def doubled(model, batch):
    return 2 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("world", [linear, network])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_the_hessian_it_is_the_derivative_of_the_whole_run(world, decay, tmp_path):
    made = world()
    run = run_recorded(made, tmp_path, decay=decay)
    got = scores_of(made, tmp_path, curvature="hessian")
    want = differentiated(run, made[3])
    close(got.removal_effect(), want, 1e-8)
    close(got.values, N * want, 1e-8)


MOMENTA = [
    {"momentum": 0.9},
    {"momentum": 0.7, "dampening": 0.4},
    {"momentum": 0.8, "nesterov": True},
]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("world", [linear, network])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_momentum_it_is_the_derivative_of_the_whole_run_too(world, decay, momentum, tmp_path):
    made = world()
    run = run_recorded(made, tmp_path, decay=decay, **momentum)
    got = scores_of(made, tmp_path, curvature="hessian", tolerance=1e-9)  # each step is as expected
    want = differentiated(run, made[3])
    close(got.removal_effect(), want, 1e-8)
    plain = attrs.evolve(run, momentum=0.0, dampening=0.0, nesterov=False)
    assert (want - differentiated(plain, made[3])).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("momentum", MOMENTA)
def test_epochs_of_a_run_with_momentum_add_up(momentum, tmp_path):
    made = network()
    run_recorded(made, tmp_path, **momentum)
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    method = dattri.method("dvemb")
    epochs = method.by_epoch(task, train, test, progress=False)
    whole = method.attribute(task, train, test, progress=False).values
    close(torch.stack([s.values for s in epochs.values()]).sum(0), whole, 1e-12)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("wrong", ["momentum", "batch"])
def test_steps_with_another_momentum_or_batch_are_refused(momentum, wrong, tmp_path):
    made = network()
    run_recorded(made, tmp_path, **momentum)
    model, loss, train, test = made
    checkpoints = list(read_run(tmp_path))
    at = 4 if wrong == "batch" else slice(None)
    changes = {"batch": torch.tensor([0, 0, 0, 1])} if wrong == "batch" else {"momentum": 0.5}
    for place in [at] if wrong == "batch" else range(len(checkpoints)):
        step = attrs.evolve(checkpoints[place].step, **changes)
        checkpoints[place] = attrs.evolve(checkpoints[place], step=step)
    task = dattri.Task(model, loss, checkpoints=checkpoints)
    with pytest.raises(dattri.InputError, match="not that of gradient descent"):
        dattri.attribute(task, train, test, method="dvemb", progress=False)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_step_after_one_of_rate_zero_is_not_looked_at(momentum, tmp_path):
    made = network()
    batches, rates = schedule()
    rates[3] = 0.0
    run = run_recorded(made, tmp_path, batches=batches, rates=rates, **momentum)
    got = scores_of(made, tmp_path, curvature="hessian")
    close(got.removal_effect(), differentiated(run, made[3]), 1e-8)


def test_on_a_quadratic_problem_the_ggn_is_exact_too(tmp_path):
    made = linear()
    run = run_recorded(made, tmp_path, decay=0.1)
    got = scores_of(made, tmp_path, curvature="ggn").removal_effect()
    close(got, differentiated(run, made[3]), 1e-8)


@pytest.mark.parametrize("world", [linear, network])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_by_default_it_is_the_recursion_with_the_outer_products_of_each_batch(
    world, decay, tmp_path
):
    made = world()
    run = run_recorded(made, tmp_path, decay=decay)
    got = scores_of(made, tmp_path).removal_effect()
    want, _ = carried_back(run, made[3])
    close(got, want, 1e-10)
    exact = differentiated(run, made[3])
    assert (want - exact).abs().max() > 1e-3 * exact.abs().max()  # the two can be told apart


def test_a_sketch_is_the_same_at_every_step(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=0.1)
    model, loss, train, _ = made
    projector = dattri.default_registry().make("projector", "rademacher", dim=6)
    got = scores_of(made, tmp_path, projector=projector, seed=3).removal_effect()
    task = dattri.Task(model, loss)
    source = dattri.default_registry().make("source", "per-example")
    space = source.bind(task, task.checkpoints[0], train).space
    assert space.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    stream = dattri.RandomStream(3, "projector")
    sketch = projector.build(space, stream=stream, device=torch.device("cpu"))
    # A row of the space holds weight and bias side by side; the oracle's has one after the other.
    units = torch.eye(space.dim, dtype=torch.float64)
    order = torch.cat([in_space(*shape, start) for *shape, start in ((5, 3, 0), (3, 5, 20))])
    rows = dattri.Rows.from_flat(space, units[:, order], torch.arange(space.dim))
    want, _ = carried_back(run, made[3], sketch.map(rows).flat().double().T)
    close(got, want, 1e-6)


def in_space(outputs, inputs, start):
    """Return where each entry of a block [O, I + 1] stands in (weight, bias) laid out flat."""
    weight = start + torch.arange(outputs * inputs).reshape(outputs, inputs)
    bias = start + outputs * inputs + torch.arange(outputs)[:, None]
    return torch.cat([weight, bias], 1).flatten()


def test_examples_drawn_more_than_once_count_as_often(tmp_path):
    made = network()
    batches = [[0, 0, 3], [3, 5, 3], [1, 2, 0]]
    run = run_recorded(made, tmp_path, batches=batches, rates=[0.2, 0.1, 0.3])
    close(scores_of(made, tmp_path).removal_effect(), carried_back(run, made[3])[0], 1e-10)
    exact = scores_of(made, tmp_path, curvature="hessian").removal_effect()
    close(exact, differentiated(run, made[3]), 1e-8)
    assert (exact[[4, 6, 7, 8, 9, 10, 11]] == 0).all()  # no step saw them


def test_a_step_on_the_whole_train_set(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, batches=[list(range(N))] * 3, rates=[0.2] * 3)
    checkpoints = [
        attrs.evolve(c, step=attrs.evolve(c.step, batch=None)) if c.learning_rate else c
        for c in read_run(tmp_path)
    ]
    task = dattri.Task(made[0], made[1], checkpoints=checkpoints)
    got = dattri.attribute(task, made[2], made[3], method="dvemb", progress=False)
    close(got.removal_effect(), carried_back(run, made[3])[0], 1e-10)


def test_a_target_turns_its_sign(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path)
    got = scores_of(made, tmp_path, curvature="hessian", task={"target": "logit"})
    logits = attrs.evolve(
        run, loss=lambda outputs, labels: outputs.gather(1, labels[:, None])[:, 0]
    )
    ones = torch.ones(N, dtype=torch.float64)
    slope = torch.func.jacrev(lambda w: logits.losses(run.path(w)[-1], made[3]))(ones).T
    close(got.removal_effect(), -slope, 1e-8)
    close(got.values, N * slope, 1e-8)  # raises the logit: helps


def test_a_part_of_the_parameters_is_a_run_of_its_own(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path)
    got = scores_of(made, tmp_path, task={"parameters": "2.*"}).removal_effect()
    keep = torch.zeros(38, dtype=torch.float64)
    keep[20:] = 1
    close(got, carried_back(run, made[3], torch.diag(keep))[0], 1e-10)


# --- invariance -----------------------------------------------------------------------------------
def test_batches_memory_and_disk_do_not_show(tmp_path):
    made = network()
    run_recorded(made, tmp_path / "run")
    want = scores_of(made, tmp_path / "run").values
    sides = {
        side: DataLoader(TensorDataset(*data), batch_size=size)
        for side, data, size in (("train", made[2], 5), ("test", made[3], 3))
    }
    close(scores_of(made, tmp_path / "run", **sides).values, want, 1e-12)
    stored = scores_of(made, tmp_path / "run", out=tmp_path / "scores")
    assert torch.equal(torch.from_numpy(stored.values.copy()), want)
    one = (made[3][0][2:3], made[3][1][2:3])
    close(scores_of(made, tmp_path / "run", test=one).values, want[:, 2:3], 1e-12)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_test_examples_that_do_not_fit_at_once_cost_passes_and_change_nothing(
    curvature, tmp_path, monkeypatch
):
    import dattri_unroll.points as module

    made = network()
    run_recorded(made, tmp_path)
    want = scores_of(made, tmp_path, curvature=curvature).values
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    method = dattri.method("dvemb", curvature=curvature)
    assert "1 passes" in method.attribute(task, train, test, dry_run=True)
    monkeypatch.setattr(module, "COPIES", 2**19 // 38 // 8 // 3)  # three columns fill half of 1 MiB
    monkeypatch.setattr(module, "LARGEST_BATCH", 3)
    text = method.attribute(task, train, test, dry_run=True, memory=2**20)
    assert (
        text
        == "dvemb: 12 x 4 scores; 2 passes backwards over 10 checkpoints, 36 train rows in each"
    )
    close(scores_of(made, tmp_path, curvature=curvature, memory=2**20).values, want, 1e-12)


def test_rows_that_are_not_kept_are_read_again(tmp_path, monkeypatch):
    from dattri_unroll.step_problem import StepProblem

    made = network()
    run_recorded(made, tmp_path)
    want = scores_of(made, tmp_path).values
    made_with = StepProblem.__init__
    monkeypatch.setattr(
        StepProblem,
        "__init__",
        lambda self, problem, batch, limit: made_with(self, problem, batch, 0),
    )
    close(scores_of(made, tmp_path).values, want, 1e-12)


@pytest.mark.parametrize("curvature", ["ekfac", {"name": "gauss-newton", "block": True}, "fisher"])
def test_any_curvature_that_multiplies_rows_can_be_that_of_a_step(curvature, tmp_path):
    if curvature == "fisher":
        curvature = {"name": "kfac", "fisher": "ggn"}
    made = network()
    run_recorded(made, tmp_path)
    got = scores_of(made, tmp_path, curvature=curvature).values
    plain = scores_of(made, tmp_path).values
    assert torch.isfinite(got).all()
    assert (got - plain).abs().max() > 1e-6 * plain.abs().max()


@attrs.define(eq=False)
class BoundAnew:
    """Per-example gradients of a source that is bound to every checkpoint."""

    inner: object = attrs.field(factory=PerExample)
    places: list = attrs.field(factory=list)
    provides = frozenset()

    def bind(self, task, checkpoint, sample):
        self.places.append(checkpoint.position)
        return self.inner.bind(task, checkpoint, sample)


@attrs.define(eq=False)
class Moved(BoundAnew):
    """The same of one that is moved from step to step."""

    def move(self, bound, checkpoint):
        return self.inner.move(bound, checkpoint)


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}])
def test_a_source_is_bound_at_a_few_steps_and_moved_to_the_others(momentum, tmp_path):
    made = network()
    batches, rates = schedule(steps=40)
    run_recorded(made, tmp_path, batches=batches, rates=rates, **momentum)
    assert isinstance(Moved(), MovableSource)
    assert isinstance(PerExample(), MovableSource)
    assert not isinstance(BoundAnew(), MovableSource)
    anew, moved = BoundAnew(), Moved()
    want = scores_of(made, tmp_path, source=anew)
    got = scores_of(made, tmp_path, source=moved)
    assert torch.equal(got.values, want.values)
    assert set(anew.places) == set(range(41))
    assert len(moved.places) <= 11
    assert {0, 5, 11, 16, 22, 27, 33, 39} <= set(moved.places)  # those that are looked at


def test_epochs_add_up(tmp_path):
    made = network()
    run = run_recorded(made, tmp_path)
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    method = dattri.method("dvemb")
    epochs = method.by_epoch(task, train, test, progress=False)
    assert list(epochs) == [0, 1, 2]
    _, steps = carried_back(run, test)
    for epoch, scores in epochs.items():
        want = torch.stack(steps[3 * epoch : 3 * epoch + 3]).sum(0)
        close(scores.removal_effect(), want, 1e-10)
        assert scores.provenance["epoch"] == epoch
    whole = method.attribute(task, train, test, progress=False).values
    close(torch.stack([s.values for s in epochs.values()]).sum(0), whole, 1e-12)


def test_it_meets_the_laws_of_attributors():
    for curvature in ("gauss-newton", "hessian"):
        report = check("attributor", dattri.method("dvemb", curvature=curvature))
        assert report.ok, str(report)
        assert report.run >= 12


def test_rows_that_grow_on_the_way_back_are_told(tmp_path):
    model, loss, train, test = linear()
    made = model, loss, (train[0], 6 * train[1]), test  # residuals make outer products large
    run_recorded(made, tmp_path)
    with pytest.warns(RuntimeWarning, match="times its length at the end.*use the curvature 'ggn'"):
        scores_of(made, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores_of(made, tmp_path, curvature="ggn")


# --- what is refused ------------------------------------------------------------------------------
def test_a_task_without_recorded_steps_is_refused():
    model, loss, train, test = network()
    with pytest.raises(dattri.SpecError, match="not known which step was taken from"):
        dattri.attribute(dattri.Task(model, loss), train, test, method="dvemb")


@pytest.mark.parametrize("how", ["order", "labels", "loss", "sum", "clipped", "dropout"])
def test_a_run_of_another_train_set_loss_or_step_is_refused(how, tmp_path):
    made = network()
    model, loss, train, test = made
    if how in ("sum", "clipped", "dropout"):
        from dattri_unroll import record

        if how == "dropout":
            model = nn.Sequential(*model[:2], nn.Dropout(0.5), model[2]).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(model, optimizer, tmp_path) as run:
            for indices in schedule()[0]:
                optimizer.zero_grad()
                values = LOSSES[loss](model(train[0][indices]), train[1][indices])
                (values.sum() if how == "sum" else values.mean()).backward()
                if how == "clipped":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                run.step(indices)
                optimizer.step()
    else:
        run_recorded(made, tmp_path)
    if how == "order":
        train = tuple(t.flip(0) for t in train)
    if how == "labels":
        train = (train[0], (train[1] + 1) % 3)
    if how == "loss":
        loss = doubled
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    with pytest.raises(dattri.InputError, match="not that of gradient descent on its batch of 4"):
        dattri.attribute(task, train, test, method="dvemb", progress=False)
    method = dattri.method("dvemb", tolerance=100.0)
    assert torch.isfinite(method.attribute(task, train, test, progress=False).values).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projector": {"name": "kronecker", "rank": 2, "initialisation": "pca"}},
            "fitted on data",
        ),
        ({"source": {"name": "dropout-ensemble"}}, "several networks"),
        ({"curvature": "mixed"}, "mixes in reference examples"),
    ],
)
def test_parts_that_cannot_be_carried_are_refused(changes, message, tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    with pytest.raises(dattri.SpecError, match=message):
        scores_of(made, tmp_path, **changes)


def test_a_smaller_train_set_is_refused(tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    few = tuple(t[:5] for t in made[2])
    with pytest.raises(dattri.SpecError, match="saw the train example 9, and the train set has 5"):
        scores_of(made, tmp_path, train=few)


def test_a_curvature_that_makes_the_recursion_diverge_is_named(tmp_path):
    model, loss, train, test = linear()
    train = (train[0] * 1e90, train[1])
    run_recorded((model, loss, train, test), tmp_path, batches=[[0], [1]] * 2, rates=[1e-200] * 4)
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    with pytest.raises(dattri.NumericsError, match="not finite; the learning rate"):
        dattri.attribute(task, train, test, method="dvemb", tolerance=1e9, progress=False)
