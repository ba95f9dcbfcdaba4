"""The sources adam-update and second-moment-normalised against real steps of torch's Adam."""

import copy

import attrs
import pytest
import torch
from dattri_parts.sources.adam_update import AdamUpdate
from dattri_parts.sources.second_moment_normalised import SecondMomentNormalised
from oracles.adam import (
    flat,
    go_on,
    gradients_of,
    laid_out,
    mean_loss,
    sequences,
    steps_of,
    tied,
    trained,
)
from torch import nn

import dattri_core as dattri
from dattri_core import (
    AdamState,
    HoldingSource,
    ParameterMoments,
    SidedSource,
    SpecError,
    StatefulSource,
    Task,
    sides_differ,
    source_needs,
)
from dattri_core.laws import check
from dattri_core.laws.sources import flat_of

TRAIN, TEST = sequences(12, 1), sequences(5, 2)
EXACT = 1e-10


def setting(kind=torch.optim.AdamW, **options):
    """Return a model after some steps, its optimiser and their task."""
    model = tied()
    optimizer = trained(model, TRAIN, kind)
    task = Task(
        model,
        checkpoints=[model.state_dict()],
        learning_rates=[0.5],
        optimisers=AdamState.of(optimizer, model),
        **options,
    )
    return model, optimizer, task


def bound(source, task):
    return source.bind(task, task.checkpoints[0], tuple(x[:3] for x in TRAIN))


def of_two():
    """Return a task of two checkpoints of a run, and each model with its optimiser."""
    model = tied()
    optimizer = trained(model, TRAIN)
    kept = []
    for _ in range(2):
        kept.append(copy.deepcopy((model, optimizer)))
        go_on(model, optimizer, TRAIN)
    states = [at.state_dict() for at, _ in kept]
    moments = [AdamState.of(its, at) for at, its in kept]
    task = Task(tied(), checkpoints=states, learning_rates=[0.3, 0.1], optimisers=moments)
    return task, kept


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("inner", ["per-example", "functional"])
def test_train_rows_are_the_steps_of_adam_on_each_example_alone(kind, inner):
    model, optimizer, task = setting(kind)
    source = AdamUpdate(dattri.default_registry().make("source", inner))
    there = bound(source, task)
    want = laid_out(there, steps_of(model, optimizer, TRAIN))
    assert (flat_of(there, TRAIN) - want).abs().max() <= EXACT
    assert want.std() > 0.05
    assert set(there.inner.space.parameter_names) == {n for n, _ in model.named_parameters()}


def test_test_rows_are_gradients_of_the_target_still():
    model, _, task = setting()
    there = bound(AdamUpdate(), task)
    want = laid_out(there, gradients_of(model, TEST))
    assert (flat_of(there, TEST, "test") - want).abs().max() <= EXACT
    task = setting(target=dattri.Target(lambda m, b: m(b[0])[:, 0], higher_is_better=True))[2]
    first = gradients_of(model, TEST, lambda m, b: -m(b[0])[:, 0].sum())
    got = flat_of(bound(AdamUpdate(), task), TEST, "test")
    assert (got - laid_out(there, first)).abs().max() <= EXACT


def test_scores_of_less_are_cosines_of_steps_and_gradients_times_rates():
    task, kept = of_two()
    scores = dattri.attribute(task, TRAIN, TEST, method="less", projector="identity")
    want = torch.zeros(12, 5, dtype=torch.float64)
    for rate, (model, optimizer) in zip((0.3, 0.1), kept, strict=True):
        steps, asked = flat(steps_of(model, optimizer, TRAIN)), flat(gradients_of(model, TEST))
        cosines = nn.functional.cosine_similarity(steps[:, None], asked[None], dim=2)
        want += rate * cosines
    assert (scores.values - want).abs().max() <= EXACT
    assert want.std() > 0.01
    plain = dattri.attribute(task, TRAIN, TEST, method="less", source="per-example")
    assert (scores.values - plain.values).abs().max() > 0.01


def test_the_sketch_of_less_is_near_to_no_sketch():
    task, _ = of_two()
    exact = dattri.attribute(task, TRAIN, TEST, method="less", projector="identity").values
    assert (dattri.attribute(task, TRAIN, TEST, method="less").values - exact).abs().max() < 0.02
    assert dattri.method("less").projector.dim == 8192


@pytest.mark.parametrize("epsilon", [None, 0.01])
@pytest.mark.parametrize("role", ["train", "test"])
def test_normalised_rows_are_gradients_over_the_roots_of_second_moments(role, epsilon):
    model, optimizer, task = setting()
    names = {id(p): name for name, p in model.named_parameters()}
    roots = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            corrected = optimizer.state[p]["exp_avg_sq"] / (1 - group["betas"][1] ** 3)
            roots[names[id(p)]] = corrected.sqrt() + (group["eps"] if epsilon is None else epsilon)
    want = {name: g / roots[name] for name, g in gradients_of(model, TRAIN).items()}
    there = bound(SecondMomentNormalised(epsilon=epsilon), task)
    want = laid_out(there, want)
    assert (flat_of(there, TRAIN, role) - want).abs().max() <= EXACT * want.abs().max()


@pytest.mark.parametrize("method", ["less", "trackstar"])
def test_neither_batches_nor_memory_show(method):
    task, _ = of_two()
    task.reference = TEST
    parts = {"source": "second-moment-normalised"} if method == "trackstar" else {}
    made = dattri.method(method, **{"projector": "identity", **parts})
    whole = made.attribute(task, TRAIN, TEST).values
    many = tuple(torch.cat([x] * 60) for x in TRAIN)
    plan = made.attribute(task, many, TEST, memory="1MiB", dry_run=True)
    assert plan.train_batch < len(many[0]) // 3
    small = made.attribute(task, many, TEST, memory="1MiB").values
    assert torch.allclose(small[-12:], whole, rtol=0, atol=1e-9)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*TRAIN), batch_size=5)
    assert torch.allclose(made.attribute(task, loader, TEST).values, whole, rtol=0, atol=1e-9)


def test_trackstar_takes_normalised_rows_by_one_word():
    _, _, task = setting(reference=TEST)
    made = dattri.method("trackstar", source="second-moment-normalised", damping=1e-2, weight=0.6)
    got = made.attribute(task, TRAIN, TEST).values
    there = bound(SecondMomentNormalised(), task)
    rows, asked = flat_of(there, TRAIN), flat_of(there, TEST, "test")
    ahead, behind = [], []
    for spec in there.space:  # a rank of 64 is no sketch of these layers
        at = there.space.offsets[spec.name]
        g, h = rows[:, at : at + spec.size], asked[:, at : at + spec.size]
        mixed = 0.6 * h.T @ h / len(h) + 0.4 * g.T @ g / len(g)
        values, vectors = torch.linalg.eigh(mixed)
        root = vectors @ torch.diag((values.clamp_min(0) + 1e-2) ** -0.5) @ vectors.T
        ahead.append(g @ root)
        behind.append(h @ root)
    ahead, behind = torch.cat(ahead, 1), torch.cat(behind, 1)
    want = nn.functional.cosine_similarity(ahead[:, None], behind[None], dim=2)
    assert (got - want).abs().max() <= 1e-8


@pytest.mark.parametrize("inner", ["per-example", "functional"])
def test_squares_that_half_precision_does_not_hold_are_held(inner):
    inner = dattri.default_registry().make("source", inner)
    model = nn.Linear(3, 2).half()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    moments = {
        name: ParameterMoments(
            torch.full(p.shape, 1e-5), torch.full(p.shape, 1e-11), 5, (0.9, 0.99), 1e-8
        )
        for name, p in model.named_parameters()
    }
    inputs = torch.tensor([[1e-4, -2e-4, 9e-5], [3e-4, 1e-4, -1e-4]])
    batch = (inputs.half(), torch.tensor([0, 1]))
    rows = {}
    for dtype in (torch.float16, torch.float64):
        task = Task(model.to(dtype), optimisers=AdamState(moments), parameters="weight")
        there = tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)
        for source in (AdamUpdate(inner), SecondMomentNormalised(inner)):
            rows[dtype, type(source)] = flat_of(
                source.bind(task, task.checkpoints[0], there), there
            )
    for source in (AdamUpdate, SecondMomentNormalised):
        exact = rows[torch.float64, source]
        assert (rows[torch.float16, source] - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_members_of_a_dropout_ensemble_step_too():
    task, _ = of_two()
    spec = {"name": "dropout-ensemble", "source": "adam-update", "members": 2, "rate": 0.5}
    made = dattri.method("less", source={**spec, "outputs": ["hidden"]}, projector="identity")
    assert made.source.needs == {"optimiser"}
    assert made.source.sides_differ
    assert torch.isfinite(made.attribute(task, TRAIN, TEST).values).all()
    with pytest.raises(SpecError, match="self-influence takes train rows for queries"):
        made.fit(task, TRAIN).self_influence()


def test_other_moments_are_other_rows_to_all_that_keeps_them(tmp_path):
    model, _, task = setting()
    made = dattri.method("less", dim=64)
    before = made.attribute(task, TRAIN, TEST, store=tmp_path / "rows")
    states = dict(task.checkpoints[0].optimiser.source)
    name = "hidden.weight"
    states[name] = attrs.evolve(states[name], second=1.5 * states[name].second)
    other = Task(
        model,
        checkpoints=[model.state_dict()],
        learning_rates=[0.5],
        optimisers=AdamState(states),
    )
    after = made.attribute(other, TRAIN, TEST)
    assert before.provenance["weights"] != after.provenance["weights"]
    assert not torch.allclose(before.values, after.values)
    with pytest.raises(dattri.StoreError, match="weights"):
        made.attribute(other, TRAIN, TEST, store=tmp_path / "rows")
    plain = Task(model, checkpoints=[model.state_dict()])
    assert before.provenance["weights"] != [plain.checkpoints[0].fingerprint(model)]


def test_a_plan_counts_the_moments():
    _, _, task = setting()
    made = dattri.method("less", projector="identity")
    plan = made.attribute(task, TRAIN, TEST, dry_run=True)
    size = sum(p.numel() for p in task.model.parameters())
    there = bound(AdamUpdate(), task)
    assert there.held == 2 * 8 * size
    assert f"source            {dattri.format_bytes(there.held)} kept beside the model" in str(plan)
    assert "kept" not in str(
        attrs.evolve(made, source="per-example").attribute(task, TRAIN, TEST, dry_run=True)
    ).replace("kept on", "")


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["adam-update", "second-moment-normalised"])
@pytest.mark.parametrize(
    ("inverse", "message"),
    [
        ({"curvature": "hessian", "solver": "cg"}, "not gradients with respect to parameters"),
        ({"curvature": "ggn", "solver": "cg"}, "not gradients with respect to parameters"),
        ({"curvature": "ekfac", "solver": "spectral"}, "loss only|factors"),
        ({"curvature": "fisher", "solver": "cholesky"}, "gives rows of the loss only"),
    ],
)
def test_curvatures_of_the_parameters_are_refused(source, inverse, message):
    _, _, task = setting()
    made = dattri.Method(source=source, inverse_hessian=inverse)
    with pytest.raises(SpecError, match=message):
        made.attribute(task, TRAIN, TEST)


def test_a_curvature_of_the_rows_is_their_second_moment():
    _, _, task = setting()
    made = dattri.Method(
        source="adam-update",
        inverse_hessian={
            "curvature": "gauss-newton",
            "solver": {"name": "cholesky", "damping": 0.1},
        },
    )
    there = bound(AdamUpdate(), task)
    steps, asked = flat_of(there, TRAIN), flat_of(there, TEST, "test")
    moment = steps.T @ steps / len(steps) + 0.1 * torch.eye(steps.shape[1], dtype=torch.float64)
    want = steps @ torch.linalg.solve(moment, asked.T)
    got = made.attribute(task, TRAIN, TEST).values
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_train_rows_that_are_steps_are_no_queries():
    _, _, task = setting()
    with pytest.raises(SpecError, match=r"self-influence takes train rows for queries.*diagonal"):
        dattri.method("less").fit(task, TRAIN).self_influence()
    with pytest.raises(SpecError, match="scorer 'relatif' takes train rows for queries"):
        dattri.Method(source="adam-update", scorer="relatif")
    dattri.Method(source="second-moment-normalised", scorer="relatif")
    own = dattri.method("grad-dot", source="second-moment-normalised").fit(task, TRAIN)
    assert (own.self_influence() > 0).all()


def test_checkpoints_without_an_optimiser_are_refused_before_any_work():
    model, _, task = setting()
    plain = Task(model, checkpoints=[model.state_dict()], learning_rates=[0.5])
    with pytest.raises(SpecError, match=r"'adam-update' are made.*\['state 0'\] have none.*optimi"):
        dattri.method("less").attribute(plain, TRAIN, TEST)
    with pytest.raises(SpecError, match="'state 0' has no state of the optimiser"):
        bound(AdamUpdate(), plain)
    with pytest.raises(dattri.InputError, match="optimisers: got 2 for 1 checkpoints"):
        Task(model, optimisers=[task.checkpoints[0].optimiser] * 2)


@pytest.mark.parametrize("method", ["less", "trackstar"])
def test_a_parameter_that_was_never_updated_is_refused_by_name(method):
    model = tied()
    model.gain.requires_grad_(False)
    optimizer = trained(model, TRAIN)
    state = AdamState.of(optimizer, model)
    frozen = Task(model, learning_rates=[1.0], optimisers=state, reference=TEST)
    made = dattri.method(method, projector="identity")
    if method == "trackstar":
        made = attrs.evolve(made, source="second-moment-normalised")
    assert torch.isfinite(made.attribute(frozen, TRAIN, TEST).values).all()
    model.gain.requires_grad_(True)
    task = Task(model, learning_rates=[1.0], optimisers=state, reference=TEST)
    with pytest.raises(dattri.InputError, match=r"no moments of \['gain'\].*parameters='!gain'"):
        made.attribute(task, TRAIN, TEST)
    source = AdamUpdate() if method == "less" else SecondMomentNormalised()
    with pytest.raises(dattri.InputError, match=r"no moments of \['gain'\]"):
        bound(source, task)
    left = Task(model, learning_rates=[1.0], optimisers=state, reference=TEST, parameters="!gain")
    assert torch.isfinite(made.attribute(left, TRAIN, TEST).values).all()


def test_moments_of_the_last_checkpoint_are_looked_at_before_the_first_is():
    task, kept = of_two()
    calls = []

    def counted(model, batch):
        calls.append(1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    whole = AdamState.of(kept[1][1], kept[1][0]).load(kept[1][0])
    short = AdamState({name: own for name, own in whole.items() if name != "gain"})
    states = [task.checkpoints[0].optimiser, short]
    wrong = Task(
        tied(),
        counted,
        checkpoints=[model.state_dict() for model, _ in kept],
        learning_rates=[0.3, 0.1],
        optimisers=states,
    )
    with pytest.raises(dattri.InputError, match=r"no moments of \['gain'\]"):
        dattri.method("less").attribute(wrong, TRAIN, TEST)
    assert not calls


@pytest.mark.parametrize("source", ["adam-update", "second-moment-normalised"])
@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"name": "dropout-ensemble"}, "source is an ensemble, which goes around it"),
        ({"name": "last-layer"}, "source is fitted on the train set"),
    ],
)
def test_sources_that_have_no_such_moments_are_refused(source, inner, message):
    with pytest.raises(SpecError, match=message):
        dattri.Method(source={"name": source, "source": inner})


def test_sources_whose_rows_are_no_gradients_of_the_loss_are_refused():
    _, _, task = setting()
    with pytest.raises(SpecError, match="source gives rows of a margin"):
        dattri.Method(source={"name": "adam-update", "source": "margin"})
    for inner in ("representation", "adam-update", "second-moment-normalised"):
        for source in ("adam-update", "second-moment-normalised"):
            made = dattri.Method(source={"name": source, "source": inner})
            with pytest.raises(SpecError, match="are not gradients of parameters"):
                made.attribute(task, TRAIN, TEST)
    made = dattri.Method(source={"name": "margin", "source": "adam-update"})
    with pytest.raises(SpecError, match="source 'margin': the rows of AdamUpdate are not grad"):
        made.attribute(task, TRAIN, TEST)


def test_rows_are_not_divided_by_zero():
    model, _, task = setting()
    state = dict(task.checkpoints[0].optimiser.source)
    own = state["gain"]
    state["gain"] = attrs.evolve(own, second=torch.zeros_like(own.second), epsilon=0.0)
    task = Task(model, optimisers=AdamState(state), learning_rates=[1.0])
    for source in (AdamUpdate(), SecondMomentNormalised()):
        with pytest.raises(dattri.NumericsError, match=r"second moments of \['gain'\] are zero"):
            bound(source, task)
    assert torch.isfinite(flat_of(bound(SecondMomentNormalised(epsilon=1e-3), task), TRAIN)).all()


@pytest.mark.parametrize("source", [AdamUpdate(), SecondMomentNormalised()])
def test_the_laws_are_met(source):
    report = check("source", source)
    assert report.ok, str(report)
    status = {f.law: f.status for f in report.findings}
    kind = isinstance(source, AdamUpdate)
    assert status["sides-that-differ-show"] == ("passed" if kind else "skipped")
    assert status["both-sides-are-one-source"] == ("skipped" if kind else "passed")


@pytest.mark.parametrize(
    ("name", "needs", "differ"),
    [
        ("adam-update", {"optimiser"}, True),
        ("second-moment-normalised", {"optimiser"}, False),
        ("dropout-ensemble", set(), False),
        ("per-example", set(), False),
    ],
)
def test_sources_say_what_they_need_and_whether_their_sides_differ(name, needs, differ):
    source = dattri.default_registry().make("source", name)
    assert source_needs(source) == needs
    assert sides_differ(source) is differ
    assert isinstance(source, StatefulSource) or not needs
    assert isinstance(source, SidedSource) or not differ
    if needs:
        there = bound(source, setting()[2])
        assert isinstance(there, HoldingSource)
        assert (there.held > 0, there.beside > 0) == (True, True)


def test_mean_loss_is_the_loss_of_the_task():
    model, _, task = setting()
    values = task.loss.criterion(model(TRAIN[0]), TRAIN)
    assert (mean_loss(model, TRAIN) - values.mean()).abs() <= EXACT
