"""The refitted last layer against closed forms and dense algebra in float64."""

import warnings

import pytest
import torch
from dattri_parts.sources.dropout_ensemble import DropoutEnsemble
from dattri_rps import source
from dattri_rps.source import LastLayer
from oracles.toy_tasks import examples, mlp, normal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core.laws.worlds import language, minimise_logistic

L2, TIGHT = 0.01, 1e-11
TRAIN, TEST = examples(41, seed=1), examples(7, seed=5)


def method(**changes):
    return dattri.method("rps-l2", **{"l2": L2, "gradient_norm": TIGHT, **changes})


def values(task, train=TRAIN, test=TEST, **changes):
    return method(**changes).attribute(task, train, test, progress=False).values


def features(model, inputs):
    """Return f = (x, 1), x the inputs of the last layer."""
    hidden = model[:-1](inputs).detach().double()
    return torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)


def newton(model, train=TRAIN, l2=L2):
    """Return the layer by Newton's method; l2 is not halved there as it is here."""
    weights = torch.full((len(train[0]),), 1 / len(train[0]), dtype=torch.float64)
    return minimise_logistic((model[:-1](train[0]).detach(), train[1]), weights, 2 * l2)


def dense(model, column, train=TRAIN, test=TEST, l2=L2):
    """Return alpha_ic f_i^T f_j from the definition, ``[n, m]``."""
    weight, f, q = newton(model, train, l2), features(model, train[0]), features(model, test[0])
    slope = (f @ weight.T).softmax(1) - nn.functional.one_hot(train[1], 3)
    alpha = -slope / (2 * l2 * len(f))
    return alpha[:, column] * (f @ q.T)


def fit(task, train=TRAIN, memory=2**28, **changes):
    data = dattri.Examples.of(train, "train")
    return LastLayer(**{"l2": L2, "gradient_norm": TIGHT, **changes}).fit(
        task, task.checkpoints[0], data, memory
    )


# --- numbers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", [0, 2, "label"])
def test_softmax_scores_equal_dense_algebra(column):
    model = mlp()
    got = values(dattri.Task(model), target=column)
    which = TEST[1] if column == "label" else torch.full((len(TEST[1]),), column)
    want = dense(model, which)
    assert got.dtype == torch.float64
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert got.abs().max() > 1e-3


def test_the_layer_is_the_minimum():
    model = mlp()
    bound = fit(dattri.Task(model))
    want = newton(model)
    assert (bound.head.weight - want).abs().max() < 1e-9 * want.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_regression_has_a_closed_form(bias):
    """W = Y^T F (F^T F + 2 l2 n I)^-1 for losses |W f - y|^2 / 2, and S_ij from its residuals."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=bias)).double()
    n, train = 30, (normal(30, 4, seed=1), normal(30, 2, seed=2))
    test = normal(6, 4, seed=3), normal(6, 2, seed=4)
    f, q = (features(model, side[0])[:, : 5 + bias] for side in (train, test))
    ridge = torch.eye(f.shape[1], dtype=torch.float64) * 2 * L2 * n
    weight = torch.linalg.solve(f.T @ f + ridge, f.T @ train[1]).T
    task = dattri.Task(model, "squared-error")
    assert (fit(task, train, target=1).head.weight - weight).abs().max() < 1e-11
    assert fit(task, train, target=1).stats["iterations"] == 1  # the preconditioner is the inverse
    for column in (0, 1):
        alpha = (train[1] - f @ weight.T)[:, column] / (2 * L2 * n)
        got = values(task, train, test, target=column)
        assert (got - alpha[:, None] * (f @ q.T)).abs().max() < 1e-10
        assert (got.sum(0) - (q @ weight.T)[:, column]).abs().max() < 1e-10


@pytest.mark.parametrize("power", [1, 4])
def test_criteria_of_any_smoothness_are_fitted(power):
    """Linear in the outputs, with no curvature at all, or steeper than a square."""

    def criterion(outputs, batch):
        return (outputs - batch[-1]).pow(power).sum(1)

    loss = dattri.Loss(lambda m, b: m(b[0]), criterion, "power")
    model, n = nn.Linear(4, 2).double(), 25
    train = normal(n, 4, seed=1), normal(n, 2, seed=2)
    bound = fit(dattri.Task(model, loss), train, target=0)
    f = torch.cat([train[0], torch.ones(n, 1, dtype=torch.float64)], 1)
    slope = power * (f @ bound.head.weight.T - train[1]).pow(power - 1)
    want = -(slope.T @ f) / (2 * L2 * n)
    assert (bound.head.weight - want).abs().max() < 1e-9 * want.abs().max()


def test_a_single_output_needs_no_number():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    train = normal(20, 4, seed=1), normal(20, 1, seed=2)
    task = dattri.Task(model, "squared-error")
    assert torch.equal(values(task, train, train), values(task, train, train, target=0))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_representer_values_add_up_to_the_prediction(dtype, allowed, l2):
    model = mlp(dtype=dtype)
    train, test = examples(200, seed=1, dtype=dtype), examples(9, seed=5, dtype=dtype)
    task = dattri.Task(model)
    weight = fit(task, train, l2=l2).head.weight
    outputs = features(model, test[0]) @ weight.T
    for column in range(3):
        got = values(task, train, test, target=column, l2=l2)
        gap = (got.sum(0) - outputs[:, column]).abs().max()
        assert gap < allowed * outputs.abs().max()


def test_the_gap_is_reported_and_true():
    task = dattri.Task(mlp())
    loose = {"gradient_norm": 1e-3, "target": 1}
    scores = method(**loose).attribute(task, TRAIN, TRAIN, progress=False)
    (said,) = scores.provenance["source"]
    assert said["checkpoint"] == "current weights"
    assert 0 < said["gradient_norm"] <= 1e-3
    weight = fit(task, gradient_norm=1e-3).head.weight
    outputs = features(task.model, TRAIN[0]) @ weight.T
    gaps = [
        values(task, TRAIN, TRAIN, gradient_norm=1e-3, target=c).sum(0) - outputs[:, c]
        for c in range(3)
    ]
    want = torch.stack(gaps).abs().max() / outputs.abs().max()
    assert said["representer_gap"] == pytest.approx(float(want), rel=1e-6)
    assert want > 1e-8  # so that it is no rounding that was compared


def test_the_stated_gradient_norm_is_reached():
    model = mlp()
    for norm in (1e-2, 1e-6, 1e-11):
        bound = fit(dattri.Task(model), gradient_norm=norm)
        weight = bound.head.weight.requires_grad_()
        f = features(model, TRAIN[0])
        objective = nn.functional.cross_entropy(f @ weight.T, TRAIN[1]) + L2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(objective, weight)
        reached = float(gradient.norm() / (2 * L2 * weight.detach().norm()))
        assert reached <= norm * (1 + 1e-3) + 1e-14
        assert bound.stats["gradient_norm"] == pytest.approx(reached, rel=1e-3, abs=1e-14)


def test_a_layer_that_was_not_reached_is_told():
    with pytest.warns(dattri.ConvergenceWarning, match="after 2 steps of L-BFGS, expected at most"):
        bound = fit(dattri.Task(mlp()), iterations=2)
    assert bound.stats["iterations"] == 2
    assert bound.stats["gradient_norm"] > 1e-10


def test_it_converges_on_features_of_very_different_sizes():
    scales = torch.tensor([1e-4, 1.0, 30.0, 1e3], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    train = TRAIN[0] * scales, TRAIN[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = fit(dattri.Task(model), train)
    want = newton(model, train)
    assert (bound.head.weight - want).abs().max() < 1e-8 * want.abs().max()


# --- what it is not sensitive to ------------------------------------------------------------------
def test_batches_and_order_do_not_show(monkeypatch):
    task, want = dattri.Task(mlp()), values(dattri.Task(mlp()))
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=7)
    assert (values(task, loader) - want).abs().max() < 1e-9 * want.abs().max()
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    turned = values(task, tuple(side[order] for side in TRAIN))
    assert (turned - want[order]).abs().max() < 1e-9 * want.abs().max()
    monkeypatch.setattr(source, "FEATURES_AT_ONCE", 6)
    assert (values(task) - want).abs().max() < 1e-9 * want.abs().max()


def test_what_the_last_layer_was_before_does_not_show():
    model, want = mlp(), values(dattri.Task(mlp()))
    with torch.no_grad():
        model[-1].weight.mul_(-3)
        model[-1].bias.add_(2)
    assert torch.equal(values(dattri.Task(model)), want)


def test_the_model_is_left_as_it_was():
    model = mlp().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values(dattri.Task(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_under_inference_mode_it_is_the_same():
    want = values(dattri.Task(mlp()))
    with torch.inference_mode():
        assert torch.equal(values(dattri.Task(mlp())), want)


def test_it_is_at_its_checkpoint():
    other = mlp(seed=30)
    task = dattri.Task(mlp(), checkpoints=[other.state_dict()])
    assert torch.equal(values(task), values(dattri.Task(other)))


# --- as a part ------------------------------------------------------------------------------------
def test_a_target_of_the_task_comes_first():
    model = mlp()
    third = dattri.Target(lambda m, batch: m(batch[0])[:, 2], higher_is_better=True)
    got = values(dattri.Task(model, target=third), target=0)
    assert torch.equal(got, values(dattri.Task(model), target=2))
    of_the_loss = values(
        dattri.Task(model, target=dattri.Target(dattri.cross_entropy, higher_is_better=False))
    )
    weight, q = newton(model), features(model, TEST[0])
    slope = (q @ weight.T).softmax(1) - nn.functional.one_hot(TEST[1], 3)
    want = -sum(slope[:, c] * dense(model, torch.full((7,), c)) for c in range(3))
    assert (of_the_loss - want).abs().max() < 1e-9 * want.abs().max()
    assert torch.equal(values(dattri.Task(model, target="loss")), of_the_loss)


def test_the_target_is_named_in_the_results():
    scores = method(target=1).attribute(dattri.Task(mlp()), TRAIN, TEST, progress=False)
    assert scores.provenance["target"] == {"name": "output 1", "higher_is_better": True}


def test_several_outputs_at_once_are_positions():
    """A language model: rows are sums over tokens of slope times features."""
    world = language()
    target = dattri.Target(lambda m, b: m(b["input_ids"])[:, :, 1].sum(1), higher_is_better=True)
    task = world.task(target=target)
    got = values(task, world.train, world.test)
    weight = fit(task, world.train).head.weight
    hidden = {}
    model = task.model
    handle = model.head.register_forward_pre_hook(lambda m, args: hidden.update(x=args[0]))
    model(world.test["input_ids"])
    handle.remove()
    outputs = (hidden["x"].detach() @ weight.T)[:, :, 1].sum(1)
    assert (got.sum(0) - outputs).abs().max() < 1e-10 * outputs.abs().max()


def test_curvatures_of_its_rows_can_follow():
    """The GGN of the refitted layer, in dense algebra, for a model in either dtype."""
    for dtype, allowed in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        model = mlp(dtype=dtype)
        train, test = (
            tuple(t.to(dtype) if t.is_floating_point() else t for t in s) for s in (TRAIN, TEST)
        )
        for kind in ("empirical", "ggn"):
            got = (
                dattri.method(
                    "rps-l2",
                    l2=L2,
                    target=0,
                    scorer="dot",
                    inverse_hessian={
                        "curvature": "gauss-newton" if kind == "empirical" else "ggn",
                        "solver": {"name": "woodbury", "damping": 0.1},
                    },
                )
                .attribute(dattri.Task(model), train, test, progress=False)
                .values
            )
            weight, f, q = newton(mlp()), features(model, train[0]), features(model, test[0])
            p = (f @ weight.T).softmax(1)
            slope = p - nn.functional.one_hot(train[1], 3)
            rows = torch.einsum("no,ni->noi", slope, f).flatten(1)
            if kind == "empirical":
                curvature = rows.T @ rows / len(f)
            else:
                each = torch.diag_embed(p) - p[:, :, None] * p[:, None]
                curvature = torch.einsum("nop,ni,nj->oipj", each, f, f).reshape(18, 18) / len(f)
            query = torch.zeros(len(q), 3, 6, dtype=torch.float64)
            query[:, 0] = -q
            want = rows @ torch.linalg.solve(curvature + 0.1 * torch.eye(18), query.flatten(1).T)
            assert (got - want).abs().max() < allowed * want.abs().max(), (dtype, kind)


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_a_model_in_float32_are_of_the_fitted_layer(tmp_path, sketched, kept):
    """In float64, and so is what is made of them: solvers agree to its rounding."""
    model = mlp().float()
    train, test = ((inputs.float(), labels) for inputs, labels in (TRAIN, TEST))
    names = ["cholesky", "woodbury"] + ["cg"] * (not sketched)
    found = []
    for name in names:
        solver = {"name": name, "damping": 0.1}
        solver |= {"tolerance": 1e-12} if name == "cg" else {}
        made = dattri.Method(
            source="last-layer",
            projector={"name": "gaussian", "dim": 7} if sketched else "identity",
            inverse_hessian={"curvature": "gauss-newton", "solver": solver},
            scorer="dot",
        )
        store = dattri.Store(tmp_path / name) if kept and sketched else None
        found.append(made.attribute(dattri.Task(model), train, test, store=store).values)
    for other in found:
        assert other.dtype == torch.float64
        assert (other - found[0]).abs().max() < 1e-11 * found[0].abs().max()


def test_the_protocols_are_met():
    assert isinstance(LastLayer(), dattri.DataSource)
    bound = fit(dattri.Task(mlp()))
    assert isinstance(bound, dattri.ReportingSource)
    assert isinstance(bound, dattri.OutputSource)
    assert not bound.space.covers_parameters  # products of a curvature would be at other weights


def test_scores_on_disk_report_the_fit_too(tmp_path):
    scores = method().attribute(dattri.Task(mlp()), TRAIN, TEST, out=tmp_path / "s", progress=False)
    (said,) = dattri.Scores.load(tmp_path / "s").provenance["source"]
    assert said == scores.provenance["source"][0]
    assert said["representer_gap"] < 1e-10


def test_fitted_once_and_used_again():
    fitted = method().fit(dattri.Task(mlp()), TRAIN, progress=False)
    assert torch.equal(fitted.attribute(TEST).values, values(dattri.Task(mlp())))
    plan = method().attribute(dattri.Task(mlp()), TRAIN, TEST, dry_run=True)
    assert "41" in str(plan)


# --- what is refused ------------------------------------------------------------------------------
def test_a_source_around_it_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    around = dattri.Method(source=DropoutEnsemble(LastLayer()), scorer="representer")
    with pytest.raises(dattri.SpecError, match="fitted on the whole train set"):
        around.attribute(dattri.Task(model), TRAIN, TEST, progress=False)


def test_the_scorer_asks_for_the_source():
    with pytest.raises(dattri.SpecError, match="'representer' needs"):
        dattri.method("rps-l2", source="per-example")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            lambda: dattri.Task(mlp(), lambda m, b: m(b[0]).square().sum(1)),
            "does not tell the outputs",
        ),
        (
            lambda: dattri.Task(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)).double()),
            "are those of none of the linear layers",
        ),
    ],
)
def test_what_has_no_last_layer_is_refused(task, words):
    with pytest.raises(dattri.SpecError, match=words):
        fit(task())


def test_targets_that_are_none_are_refused():
    with pytest.raises(dattri.SpecError, match="target is 3, and the layer has 3 outputs"):
        fit(dattri.Task(mlp()), target=3)
    with pytest.raises(dattri.SpecError, match="target is 'logit'"):
        LastLayer(target="logit")
    task = dattri.Task(nn.Linear(4, 2).double(), "squared-error")
    with pytest.raises(dattri.SpecError, match="labels are no classes of 2 outputs"):
        fit(task, (normal(9, 4, seed=1), normal(9, 2, seed=2)))


def test_features_that_do_not_fit_are_refused_with_their_size():
    with pytest.raises(
        dattri.MemoryBudgetError, match=r"features of 41 train examples take 1\.9 KiB"
    ):
        fit(dattri.Task(mlp()), memory=1000)
    wide = nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 3)).double()
    with pytest.raises(dattri.MemoryBudgetError, match="second moment of 101 features"):
        fit(dattri.Task(wide), memory=60_000)


def test_features_that_are_not_finite_are_refused():
    train = TRAIN[0].clone(), TRAIN[1]
    train[0][20, 1] = float("inf")
    model = nn.Sequential(nn.Linear(4, 3)).double()
    with pytest.raises(dattri.NumericsError, match="features of the train set are not finite"):
        fit(dattri.Task(model), train)
