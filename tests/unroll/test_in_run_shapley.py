"""`in-run-shapley`: against all subsets of the players of each step, and against their sum."""

from types import SimpleNamespace

import attrs
import pytest
import torch
from dattri_unroll import read_run
from oracles.in_run import enumerated, fallen, moves
from recorded import N, linear, network, run_recorded, schedule
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core.laws import check

SHORT = {"batches": [[0, 5, 3], [7, 1, 5], [2, 3, 11]], "rates": [0.5, 0.4, 0.6]}
ORDERS = {1: None, 2: "hessian"}
MOMENTA = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.7, "dampening": 0.4},
    {"momentum": 0.8, "nesterov": True},
]


def scores_of(world, folder, *, train=None, test=None, **changes):
    model, loss, given_train, given_test = world
    settings = {k: changes.pop(k) for k in ("memory", "out", "dry_run") if k in changes}
    task = dattri.Task(model, loss, checkpoints=read_run(folder), **changes.pop("task", {}))
    method = dattri.method("in-run-shapley", **changes)
    return method.attribute(
        task, train or given_train, test or given_test, progress=False, **settings
    )


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# --- the game -------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_it_is_the_shapley_value_over_all_subsets_of_each_step(momentum, decay, order, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, decay=decay, **SHORT, **momentum)
    got = scores_of(made, tmp_path, curvature=ORDERS[order], tolerance=1e-9).values
    want, rest = enumerated(run, made[3], order)
    close(got, want, 1e-10)
    close(got.sum(0) + rest, fallen(run, made[3], order), 1e-10)  # nothing is left over
    assert (rest.abs().max() > 1e-6) == bool(decay)
    assert (got[[4, 6, 8, 9, 10]] == 0).all()  # no step saw them


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_groups_move_at_learning_rates_of_their_own(momentum, order, tmp_path):
    made = network()
    shares = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 0.0}
    run = run_recorded(made, tmp_path, shares=shares, **SHORT, **momentum)
    got = scores_of(made, tmp_path, curvature=ORDERS[order], tolerance=1e-9).values
    close(got, enumerated(run, made[3], order)[0], 1e-10)
    model, loss, train, test = made
    if not momentum:  # the last steps are known without the weights after them
        task = dattri.Task(model, loss, checkpoints=read_run(tmp_path)[:-1])
        method = dattri.method("in-run-shapley", curvature=ORDERS[order])
        close(method.attribute(task, train, test, progress=False).values, got, 1e-10)


def test_the_second_order_differs_from_the_first(tmp_path):
    made = network()
    run_recorded(made, tmp_path, **SHORT)
    first = scores_of(made, tmp_path).values
    second = scores_of(made, tmp_path, curvature="hessian").values
    assert (second - first).abs().max() > 1e-2 * first.abs().max()


def test_on_a_quadratic_problem_it_is_a_formula_and_adds_up_to_the_fall_of_the_loss(tmp_path):
    made = linear()
    run = run_recorded(made, tmp_path)
    (x, y), (test_x, test_y) = made[2], made[3]
    path = run.path(torch.ones(N, dtype=torch.float64))
    want = torch.zeros(N, len(test_x), dtype=torch.float64)
    for step, (rate, batch) in enumerate(zip(run.rates, run.batches, strict=True)):
        # At the middle of a step the residual of a test example is the mean of those at its ends.
        ends = [at[:6].reshape(2, 3) @ test_x.T + at[6:, None] for at in path[step : step + 2]]
        residual = (ends[0] + ends[1]) / 2 - test_y.T
        own = path[step][:6].reshape(2, 3) @ x.T + path[step][6:, None] - y.T
        for i in batch:
            met = (own[:, i] @ residual) * (test_x @ x[i] + 1)
            want[i] += rate / len(batch) * met
    got = scores_of(made, tmp_path, curvature="hessian").values
    close(got, want, 1e-10)
    before, after = (run.losses(path[at], made[3]) for at in (0, -1))
    close(got.sum(0), before - after, 1e-10)
    close(scores_of(made, tmp_path, curvature="ggn").values, want, 1e-10)


def test_short_steps_add_up_to_the_fall_of_the_loss_of_a_network_too(tmp_path):
    made = network()
    batches, rates = schedule(steps=30)
    run = run_recorded(made, tmp_path, batches=batches, rates=[rate / 4 for rate in rates])
    path = run.path(torch.ones(N, dtype=torch.float64))
    fall = run.losses(path[0], made[3]) - run.losses(path[-1], made[3])
    gaps = {
        order: float((scores_of(made, tmp_path, curvature=c).values.sum(0) - fall).abs().max())
        for order, c in ORDERS.items()
    }
    assert gaps[2] < 0.05 * gaps[1] < 0.05 * float(fall.abs().max())


@pytest.mark.parametrize("order", [1, 2])
def test_a_target_that_is_better_when_higher_turns_its_sign(order, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, **SHORT)
    got = scores_of(made, tmp_path, curvature=ORDERS[order], task={"target": "logit"}).values
    logits = attrs.evolve(
        run, loss=lambda outputs, labels: outputs.gather(1, labels[:, None])[:, 0]
    )
    want = torch.zeros(N, 4, dtype=torch.float64)
    for theta, players, way in moves(run):
        slope = logits.gradients(theta, made[3])
        curve = torch.func.hessian(lambda t: logits.losses(t, made[3]))(theta)
        bent = slope - (curve @ way.sum(0)) / 2 if order == 2 else slope
        for player, move in zip(players, way, strict=True):
            if player >= 0:
                want[player] -= bent @ move
    close(got, want, 1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_parameters_that_are_left_out_move_nothing(order, tmp_path):
    made = network()
    run = run_recorded(made, tmp_path, **SHORT)
    got = scores_of(made, tmp_path, curvature=ORDERS[order], task={"parameters": "2.*"}).values
    keep = torch.zeros(38, dtype=torch.float64)
    keep[20:] = 1
    want = torch.zeros(N, 4, dtype=torch.float64)
    for theta, players, way in moves(run):
        slope = run.gradients(theta, made[3])
        curve = torch.func.hessian(lambda t: run.losses(t, made[3]))(theta)
        move = way.sum(0) * keep
        bent = slope - (curve @ move) / 2 if order == 2 else slope
        for player, own in zip(players, way * keep, strict=True):
            if player >= 0:
                want[player] += bent @ own
    close(got, want, 1e-10)


def test_a_sketch_that_keeps_all_directions_changes_nothing_on_average(tmp_path):
    made = network()
    run_recorded(made, tmp_path, **SHORT)
    for curvature in ORDERS.values():
        want = scores_of(made, tmp_path, curvature=curvature).values
        sketched = torch.stack(
            [
                scores_of(
                    made, tmp_path, curvature=curvature, seed=seed, projector="rademacher", dim=2048
                ).values
                for seed in range(4)
            ]
        ).mean(0)
        close(sketched, want, 0.1)


# --- invariance -----------------------------------------------------------------------------------
@pytest.mark.parametrize("curvature", ORDERS.values())
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9, "nesterov": True}])
def test_batches_memory_and_disk_do_not_show(curvature, momentum, tmp_path, monkeypatch):
    import dattri_unroll.points as module

    made = network()
    run_recorded(made, tmp_path / "run", **momentum)
    want = scores_of(made, tmp_path / "run", curvature=curvature).values
    sides = {
        side: DataLoader(TensorDataset(*data), batch_size=size)
        for side, data, size in (("train", made[2], 5), ("test", made[3], 3))
    }
    close(scores_of(made, tmp_path / "run", curvature=curvature, **sides).values, want, 1e-12)
    stored = scores_of(made, tmp_path / "run", curvature=curvature, out=tmp_path / "scores")
    assert torch.equal(torch.from_numpy(stored.values.copy()), want)
    one = (made[3][0][2:3], made[3][1][2:3])
    alone = scores_of(made, tmp_path / "run", curvature=curvature, test=one).values
    close(alone, want[:, 2:3], 1e-12)
    monkeypatch.setattr(module, "COPIES", 2**19 // 38 // 8 // 3)  # three columns fill half of 1 MiB
    monkeypatch.setattr(module, "LARGEST_BATCH", 3)
    few = scores_of(made, tmp_path / "run", curvature=curvature, memory=2**20)
    close(few.values, want, 1e-12)
    text = scores_of(made, tmp_path / "run", memory=2**20, dry_run=True)
    assert text.startswith("in-run-shapley: 12 x 4 scores; 2 passes backwards")


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("curvature", ORDERS.values())
def test_epochs_add_up(curvature, momentum, tmp_path):
    made = network()
    run_recorded(made, tmp_path, **momentum)
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path))
    method = dattri.method("in-run-shapley", curvature=curvature)
    epochs = method.by_epoch(task, train, test, progress=False)
    assert list(epochs) == [0, 1, 2]
    whole = method.attribute(task, train, test, progress=False).values
    close(torch.stack([s.values for s in epochs.values()]).sum(0), whole, 1e-12)


def test_it_meets_the_laws_of_attributors():
    for curvature in ("hessian", None):
        report = check("attributor", dattri.method("in-run-shapley", curvature=curvature))
        assert report.ok, str(report)
        assert report.run >= 12


@attrs.frozen
class Plain:
    """The Hessian, by an operator that knows the mean alone."""

    needs = frozenset({"hessian-product"})
    exact = True

    def gives(self, space):
        return frozenset({"apply"})

    def fit(self, problem):
        return SimpleNamespace(
            space=problem.space,
            dtype=problem.dtype,
            memory=problem.memory,
            apply=lambda rows: problem.product(rows, "hessian"),
        )


@pytest.mark.parametrize("target", ["loss", "logit"])
def test_a_curvature_that_does_not_know_each_example_is_fitted_on_each(target, tmp_path):
    made = network()
    run_recorded(made, tmp_path, **SHORT)
    task = {"target": target}
    want = scores_of(made, tmp_path, curvature="hessian", task=task).values
    close(scores_of(made, tmp_path, curvature=Plain(), task=task).values, want, 1e-12)


def test_it_is_data():
    method = dattri.method("in-run-shapley", curvature="hessian")
    assert dattri.method("in-run-shapley").curvature is None
    assert dattri.describe_part(method)["curvature"] == "hessian"


# --- what is refused ------------------------------------------------------------------------------
def test_a_task_without_recorded_steps_is_refused():
    model, loss, train, test = network()
    with pytest.raises(dattri.SpecError, match="in-run-shapley: it is not known which step"):
        dattri.attribute(dattri.Task(model, loss), train, test, method="in-run-shapley")


def test_a_run_of_another_train_set_is_refused(tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    turned = tuple(t.flip(0) for t in made[2])
    with pytest.raises(dattri.InputError, match="in-run-shapley: the step recorded at"):
        scores_of(made, tmp_path, train=turned)
    with pytest.raises(dattri.SpecError, match=r"in-run-shapley: the step at .* saw the train"):
        scores_of(made, tmp_path, train=tuple(t[:5] for t in made[2]))


def test_a_run_with_momentum_whose_end_is_not_known_has_no_second_order(tmp_path):
    made = network()
    run_recorded(made, tmp_path, momentum=0.9)
    model, loss, train, test = made
    task = dattri.Task(model, loss, checkpoints=list(read_run(tmp_path))[:-1])
    with pytest.raises(dattri.SpecError, match=r"weights after the step at .* are not known"):
        dattri.attribute(
            task, train, test, method="in-run-shapley", curvature="hessian", progress=False
        )
    dattri.attribute(task, train, test, method="in-run-shapley", progress=False)


@pytest.mark.parametrize("curvature", ["gauss-newton", "ekfac", "mixed"])
def test_a_curvature_that_is_made_of_gradients_is_refused(curvature, tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    with pytest.raises(dattri.SpecError, match="in-run-shapley"):
        scores_of(made, tmp_path, curvature=curvature)


def test_a_curvature_of_outputs_needs_a_target_whose_outputs_are_known(tmp_path):
    made = network()
    run_recorded(made, tmp_path)
    with pytest.raises(dattri.SpecError, match=r"GGN.*of the target 'logit'.*use 'hessian'"):
        scores_of(made, tmp_path, curvature="ggn", task={"target": "logit"})
    assert scores_of(made, tmp_path, curvature="ggn", task={"target": "loss"}).shape == (N, 4)
