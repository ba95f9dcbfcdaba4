"""Several readings of one pass: dampings, blocks, checkpoints, and the sum over the test set."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.routes import SMALL, costs_seen, taking
from oracles.toy_parts import ColumnRank, CountingSource, FlatSketch, Gram, ResidualDot, inverse
from oracles.toy_tasks import (
    cross_entropies,
    examples,
    flat_gradients,
    mlp,
    positions,
    states,
    world,
)

import dattri_core as dattri
from dattri_core import Damping, InputError, Method, SpecError, Task
from dattri_core.testing import network

N, M = 9, 5
RATES = [0.5, 2.0]
DAMPINGS = [0.05, 1.0, {"relative": 0.3}]
EKFAC = {"curvature": "ekfac", "solver": {"name": "spectral", "damping": 0.1}}


def close(left, right, tolerance=1e-9):
    return (left - right).abs().max() <= tolerance * right.abs().max()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dattri.ConvergenceWarning)
        yield


# --- sweeps ---------------------------------------------------------------------------------------
SWEPT = {
    "ekfac": lambda: dattri.method("if-ekfac"),
    "ekfac, cosine": lambda: dattri.method("if-ekfac", scorer="cosine"),
    "ekfac, relatif": lambda: dattri.method("if-ekfac", scorer="relatif"),
    "diagonal": lambda: dattri.method("if-diagonal"),
    "explicit ggn": lambda: dattri.method("if-explicit", curvature="ggn"),
    "cg ggn": lambda: dattri.method("if-cg", curvature="ggn", tolerance=1e-12),
    "sketch, gauss-newton": lambda: Method(
        projector=FlatSketch(9),
        inverse_hessian={"curvature": "gauss-newton", "solver": "woodbury"},
    ),
    "two-sided, sketch": lambda: Method(
        stages=[{"inverse_hessian": {**EKFAC, "form": "two-sided"}}, FlatSketch(9)]
    ),
    "reduced": lambda: Method(
        inverse_hessian={
            "curvature": "ggn",
            "solver": {"name": "arnoldi", "rank": 6, "iterations": 12, "reduced": True},
        }
    ),
}


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_sweep_equals_one_run_at_each_damping(name, checkpoints):
    train, test = examples(N), examples(M, seed=300)
    task = Task(mlp(), checkpoints=states(checkpoints), learning_rates=RATES[:checkpoints])
    fitted = SWEPT[name]().fit(task, train, progress=False)
    swept = fitted.sweep(test, damping=DAMPINGS)
    assert list(swept) == [0.05, 1.0, Damping(0.3, relative=True)]
    for damping, got in swept.items():
        want = fitted.with_(damping=damping).attribute(test)
        assert close(got.values, want.values, 1e-8)
        assert got.provenance["method"] == want.provenance["method"]
        used = [[s["damping"] for s in one.provenance["solver"]] for one in (got, want)]
        assert used[0] == pytest.approx(used[1])
        assert len(used[0]) == checkpoints
    assert not close(swept[0.05].values, swept[1.0].values, 1e-2)


@pytest.mark.parametrize("name", ["ekfac", "ekfac, relatif", "cg ggn", "two-sided, sketch"])
def test_no_route_shows_in_a_sweep(name):
    made = network()
    fitted = SWEPT[name]().fit(made.task(), made.train, progress=False)

    def sweep():
        return [s.values for s in fitted.sweep(made.test, damping=DAMPINGS).values()]

    want = sweep()
    for choice in range(1, 1 + len(costs_seen(sweep).choices)):
        for slab, sizes in ((2**20, {}), (1, SMALL)):
            with taking(choice, slab, **sizes) as taken:
                got = sweep()
            for left, right in zip(got, want, strict=True):
                assert close(left, right, 1e-8), taken


@settings(max_examples=12, deadline=None)
@given(
    exponents=st.lists(st.integers(-20, 30), min_size=4, max_size=20, unique=True),
    relative=st.booleans(),
    double=st.booleans(),
    name=st.sampled_from(["ekfac", "ekfac, cosine", "diagonal", "logra"]),
    memory=st.sampled_from(["64MiB", "4MiB"]),
)
def test_many_dampings_share_their_products_and_no_number_changes(
    exponents, relative, double, name, memory
):
    """Any dampings, of any number: within a few roundings of the largest score.

    A damping far below the eigenvalues costs as many digits, in a sweep or out of it.
    """
    dtype = torch.float64 if double else torch.float32
    train, test = (examples(n, inputs=20, seed=100 + n, dtype=dtype) for n in (N, M))
    method = dattri.method("logra", rank=4) if name == "logra" else SWEPT[name]()
    fitted = method.fit(Task(mlp((20, 24, 3), dtype=dtype)), train, memory=memory, progress=False)
    dampings = [Damping(10 ** (k / 10 - double), relative=relative) for k in exponents]
    swept = fitted.sweep(test, damping=dampings)
    for damping, got in swept.items():
        want = fitted.with_(damping=damping).attribute(test)
        lost = max(1.0, 1e-2 / (damping.value * (1e-2 if relative else 1.0)))
        assert close(got.values, want.values, 2e3 * torch.finfo(dtype).eps * lost)


def test_a_sweep_in_a_basis_holds_its_queries_once_and_says_that_it_interpolates():
    train, test = examples(N), examples(M, seed=300)
    fitted = dattri.method("if-ekfac").fit(Task(mlp()), train, progress=False)
    dampings = [0.1 * k for k in range(1, 21)]
    one, all_of_them = dampings[:1], dampings
    plans = [
        costs_seen(lambda chosen=chosen: fitted.sweep(test, damping=chosen))
        for chosen in (one, all_of_them)
    ]
    assert [any(route.swept for route in plan.routes) for plan in plans] == [False, True]
    (swept,) = (route for route in plans[1].routes if route.swept)
    assert "dampings interpolated" in str(swept)


def test_a_sweep_takes_the_map_of_a_reduced_inverse_once_on_either_side(monkeypatch):
    task, train, test = world(N, M)
    fitted = SWEPT["reduced"]().fit(task, train, progress=False)
    fitted.attribute(test)
    sides, seen = type(fitted._held.chain.inverses[0].train_map), []
    plain = sides.map
    monkeypatch.setattr(
        sides, "map", lambda self, rows: seen.append(len(rows)) or plain(self, rows)
    )
    fitted.sweep(test, damping=[0.05, 1.0, 2.0])
    assert sum(seen) == N + M


@pytest.mark.parametrize("name", ["reduced", "sketch, gauss-newton"])
def test_train_rows_meet_the_queries_of_all_dampings_in_one_product(name, monkeypatch):
    task, train, test = world(N, M)
    fitted = SWEPT[name]().fit(task, train, progress=False)
    kind, met = type(fitted.method.scorer), []
    plain = kind.pair

    def pair(self, ahead, behind):
        met.append(len(behind))
        return plain(self, ahead, behind)

    monkeypatch.setattr(kind, "pair", pair)
    swept = fitted.sweep(test, damping=[0.05, 1.0, 2.0])
    assert met == [3 * M]
    assert all(scores.shape == (N, M) for scores in swept.values())


def test_a_sweep_computes_train_and_test_rows_once():
    train, test = examples(40), examples(M, seed=300)
    source = CountingSource()
    method = Method(source, inverse_hessian=inverse(Gram(), 1.0))
    fitted = method.fit(Task(mlp()), train, progress=False)
    source.counts.clear()
    fitted.sweep(test, damping=[0.1 * k for k in range(1, 21)])
    assert source.counts["train"] == 40
    assert source.counts["test"] <= M + 1  # and one that shows whether the data fit
    assert source.counts["bind"] == 0


def test_a_damping_that_means_the_same_twice_is_refused_and_so_is_none_at_all():
    task, train, test = world(N, M)
    fitted = dattri.method("if-explicit", curvature="ggn").fit(task, train, progress=False)
    for wrong in ([], [0.1, 0.1]):
        with pytest.raises(SpecError, match=r"sweep: damping got .*give one or more, each once"):
            fitted.sweep(test, damping=wrong)
    with pytest.raises(SpecError, match="damping: got 'low'"):
        fitted.sweep(test, damping=["low"])


def test_a_method_without_a_damping_or_with_two_cannot_be_swept():
    task, train, test = world(N, M)
    with pytest.raises(SpecError, match="no stage has one"):
        dattri.method("grad-dot").fit(task, train, progress=False).sweep(test, damping=[0.1])
    both = Method(stages=[inverse(Gram(), 1.0), inverse(Gram(), 1.0)])
    with pytest.raises(SpecError, match="2 stages have a damping"):
        both.fit(task, train, progress=False).sweep(test, damping=[0.1])


# --- by block -------------------------------------------------------------------------------------
def test_the_part_of_a_block_is_what_its_parameters_alone_would_score():
    """Of Grad-Dot: <g_k, h_k> for the parameters of each layer k."""
    task, train, test = world(N, M)
    parts = dattri.attribute(task, train, test, method="grad-dot", by="block")
    assert list(parts) == ["0", "2"]
    g, h = (flat_gradients(task.model, cross_entropies(batch)) for batch in (train, test))
    sizes = [sum(p.numel() for p in task.model[k].parameters()) for k in (0, 2)]
    for name, left, right in zip(parts, g.split(sizes, 1), h.split(sizes, 1), strict=True):
        assert close(parts[name].values, left @ right.T)
        assert parts[name].provenance["by"] == {"block": name}


def test_the_part_of_a_block_through_a_full_inverse_is_that_of_its_train_gradient():
    """<g_k, (A h)_k> with A = (C + I)^-1 of all layers."""
    task, train, test = world(N, M)
    parts = Method(inverse_hessian=inverse(Gram(), 1.0)).attribute(task, train, test, by="block")
    space = task_space(task, train)
    order = positions(task.model, space)
    g, h = (flat_gradients(task.model, cross_entropies(b))[:, order] for b in (train, test))
    solved = torch.linalg.solve(g.T @ g / N + torch.eye(g.shape[1]).double(), h.T).T
    for spec in space:
        where = slice(space.offsets[spec.name], space.offsets[spec.name] + spec.size)
        assert close(parts[spec.name].values, g[:, where] @ solved[:, where].T)


def task_space(task, train):
    from dattri_core.assemble import build_part

    return build_part("source", "per-example").bind(task, task.checkpoints[0], train).space


ADDITIVE = {
    "grad-dot": lambda: dattri.method("grad-dot"),
    "grad-cos": lambda: dattri.method("grad-cos"),
    "tracin": lambda: dattri.method("tracin"),
    "if-explicit": lambda: dattri.method("if-explicit", curvature="ggn", damping=0.1),
    "if-ekfac": lambda: dattri.method("if-ekfac", damping=0.1),
    "relatif": lambda: dattri.method("if-ekfac", damping=0.1, scorer="relatif"),
}


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("by", ["block", "checkpoint"])
@pytest.mark.parametrize("memory", ["2MiB", None])
def test_the_parts_add_up_to_the_whole(name, by, memory):
    train, test = examples(N), examples(M, seed=300)
    task = Task(mlp((4, 6, 5, 3)), checkpoints=states(2, sizes=(4, 6, 5, 3)), learning_rates=RATES)
    method = ADDITIVE[name]()
    whole = method.attribute(task, train, test).values
    parts = method.attribute(task, train, test, by=by, memory=memory)
    assert list(parts) == (["0", "2", "4"] if by == "block" else ["state 0", "state 1"])
    assert close(sum(part.values for part in parts.values()), whole)
    assert all(part.values.abs().max() > 1e-3 * whole.abs().max() for part in parts.values())


@pytest.mark.parametrize("choice", [1, 2, 3, 4])
def test_no_route_shows_in_the_parts(choice):
    made = network()
    method = dattri.method("if-ekfac", damping=0.1, scorer="cosine")
    want = method.attribute(made.task(), made.train, made.test, by="block")
    with taking(choice, 1, **SMALL) as taken:
        got = method.attribute(made.task(), made.train, made.test, by="block")
    assert taken
    for name in want:
        assert close(got[name].values, want[name].values)


def test_the_part_of_a_checkpoint_is_what_it_adds_to_the_fold():
    train, test = examples(N), examples(M, seed=300)
    weights = states(2)
    singles = [
        dattri.attribute(Task(mlp(), checkpoints=[w]), train, test, method="grad-dot").values
        for w in weights
    ]
    task = Task(mlp(), checkpoints=weights, learning_rates=RATES)
    mean = dattri.attribute(task, train, test, method="grad-dot", by="checkpoint")
    summed = dattri.attribute(task, train, test, method="tracin", by="checkpoint")
    for position, single in enumerate(singles):
        name = f"state {position}"
        assert close(mean[name].values, single / 2)
        assert close(summed[name].values, RATES[position] * single)
        assert mean[name].provenance["by"] == {"checkpoint": name}


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    from safetensors.torch import save_file

    paths = [tmp_path / run / "final.safetensors" for run in ("a", "b")]
    for path, state in zip(paths, states(2), strict=True):
        path.parent.mkdir()
        save_file(state, str(path))
    task = Task(mlp(), checkpoints=paths)
    parts = dattri.attribute(task, examples(N), examples(M), method="grad-dot", by="checkpoint")
    assert list(parts) == ["final.safetensors (0)", "final.safetensors (1)"]


class Squares(ResidualDot):
    """The square of the inner product: no sum over blocks."""

    needs = frozenset()

    def finish(self, total, train, test):
        return dattri.Scored(total**2)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Method(scorer=Squares()), r"Squares is not additive over blocks"),
        (lambda: Method(scorer=ColumnRank()), r"ColumnRank sees whole columns at once"),
        (lambda: Method(projector=FlatSketch(5)), r"a stage of this method mixes them"),
    ],
)
def test_what_has_no_parts_by_block_is_refused(method, message):
    task, train, test = world(N, M)
    with pytest.raises(SpecError, match=message):
        method().attribute(task, train, test, by="block")


def test_a_wrong_word_and_a_folder_are_refused(tmp_path):
    task, train, test = world(N, M)
    with pytest.raises(SpecError, match=r"by='layer'; expected one of \['block', 'checkpoint'\]"):
        dattri.attribute(task, train, test, method="grad-dot", by="layer")
    with pytest.raises(SpecError, match="keeps its scores in memory"):
        dattri.attribute(task, train, test, method="grad-dot", by="block", out=tmp_path / "s")
    with pytest.raises(SpecError, match="not made of parts"):
        dattri.attribute(task, train, test, method="random", by="block")
    with pytest.raises(SpecError, match="not made of parts"):
        dattri.attribute(task, train, test, method="random", group=True)
    assert not list(tmp_path.iterdir())


# --- the sum over the test set --------------------------------------------------------------------
@pytest.mark.parametrize("name", ["grad-dot", "tracin", "if-explicit", "if-ekfac"])
@pytest.mark.parametrize("memory", ["2MiB", None])
def test_the_score_for_a_sum_is_the_sum_of_the_scores(name, memory):
    train, test = examples(N), examples(M, seed=300)
    task = Task(mlp(), checkpoints=states(2), learning_rates=RATES, target="margin")
    method = ADDITIVE[name]()
    whole = method.attribute(task, train, test).values
    got = method.attribute(task, train, test, group=True, memory=memory)
    assert got.shape == (N, 1)
    assert list(got.test_ids) == ["sum"]
    assert got.provenance["group"] == "sum"
    assert got.provenance["n_test"] == M
    assert close(got.values, whole.sum(1, keepdim=True))


def test_the_cosine_with_a_sum_is_that_of_the_summed_gradient():
    task, train, test = world(N, M)
    got = dattri.attribute(task, train, test, method="grad-cos", group=True).values[:, 0]
    g, h = (flat_gradients(task.model, cross_entropies(batch)) for batch in (train, test))
    want = torch.nn.functional.cosine_similarity(g, h.sum(0, keepdim=True))
    assert close(got, want)


@pytest.mark.parametrize("choice", [1, 2, 3, 4])
def test_a_sum_in_pieces_is_the_sum(choice):
    made = network()
    method = dattri.method("if-ekfac", damping=0.1)
    want = method.attribute(made.task(), made.train, made.test).values.sum(1, keepdim=True)
    with taking(choice, 1, test_batch=2, train_batch=4):
        got = method.attribute(made.task(), made.train, made.test, group=True).values
    assert close(got, want)


def test_a_sum_is_solved_for_once():
    task, train, test = world(N, 30)
    fitted = dattri.method("if-cg", curvature="ggn").fit(task, train, progress=False)
    assert fitted.attribute(test).provenance["solver"][0]["rows"] == 30
    assert fitted.attribute(test, group=True).provenance["solver"][0]["rows"] == 1


def test_a_batch_of_a_sum_that_runs_out_of_memory_is_halved_and_counted_once():
    task, train, test = world(N, M)
    want = dattri.attribute(task, train, test, method="grad-dot", group=True).values

    class Hungry:
        def __call__(self, model, batch):
            if len(batch[0]) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(batch[0])

    loss = dattri.Loss(Hungry(), dattri.cross_entropy.criterion)
    task = Task(mlp(), loss)
    got = dattri.attribute(task, train, test, method="grad-dot", group=True).values
    assert close(got, want)


class ReadsTheLabel(ResidualDot):
    """Asks a test row for what only single examples have."""

    needs = frozenset()

    def finish(self, total, train, test):
        return dattri.Scored(total * test.aux["label"])


def test_a_scorer_that_asks_a_sum_for_an_auxiliary_number_is_refused():
    task, train, test = world(N, M)
    with pytest.raises(SpecError, match=r"reads 'label' of a test row, and a sum of rows has none"):
        Method(scorer=ReadsTheLabel()).attribute(task, train, test, group=True)


def test_sums_by_block_and_on_disk(tmp_path):
    task, train, test = world(N, M)
    method = dattri.method("grad-dot")
    whole = method.attribute(task, train, test, group=True)
    parts = method.attribute(task, train, test, group=True, by="block")
    assert close(sum(part.values for part in parts.values()), whole.values)
    written = method.attribute(task, train, test, group=True, out=tmp_path / "sum")
    assert torch.equal(torch.from_numpy(written.values.copy()), whole.values)
    assert list(dattri.Scores.load(tmp_path / "sum").test_ids) == ["sum"]


def test_a_run_for_a_sum_is_not_gone_on_with_as_another(tmp_path):
    task, train, test = world(N, M)
    out = tmp_path / "scores"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dattri_core.runner.ScoresWriter", stop)
        with pytest.raises(KeyboardInterrupt):
            dattri.attribute(task, train, test, method="grad-dot", group=True, out=out)
    with pytest.raises(dattri.StoreError, match="another group"):
        dattri.attribute(task, train, test, method="grad-dot", out=out)


def test_a_dry_run_tells_of_the_readings():
    task, train, test = world(200, 40)
    method = dattri.method("grad-dot")
    plain = method.attribute(task, train, test, dry_run=True)
    parts = method.attribute(task, train, test, dry_run=True, by="block")
    summed = method.attribute(task, train, test, dry_run=True, group=True)
    assert parts.bytes["scores"] == 2 * plain.bytes["scores"]
    assert summed.n_test == 1
    assert summed.test_batch > 1
    with pytest.raises(SpecError, match="expected one of"):
        method.attribute(task, train, test, dry_run=True, by="layer")


def test_weights_that_changed_are_refused_in_a_sweep_too():
    task, train, test = world(N, M)
    fitted = Method(inverse_hessian=inverse(Gram())).fit(task, train, progress=False)
    with torch.no_grad():
        task.model[0].bias[0] += 1e-9
    with pytest.raises(InputError, match="weights changed"):
        fitted.sweep(test, damping=[0.1])


@pytest.mark.parametrize("group", [[0, 0, 1], "mean", 1, None])
def test_a_group_that_is_neither_true_nor_false_is_refused(group):
    task, train, test = world(N, M)
    method = dattri.method("grad-dot")
    for work in (
        lambda: method.attribute(task, train, test, group=group),
        lambda: method.attribute(task, train, test, group=group, dry_run=True),
        lambda: method.fit(task, train).extremes(test, 2, group=group),
    ):
        with pytest.raises(SpecError, match=r"group=.*; expected True, for one column"):
            work()


def test_columns_of_groups_are_added_up_as_the_message_says():
    task, train, test = world(N, M)
    labels, columns = [0, 1], torch.arange(M) % 2
    values = dattri.attribute(task, train, test, method="grad-dot").values
    got = torch.stack([values[:, columns == g].sum(1) for g in labels], 1)
    for g in labels:
        chosen = dattri.take(test, columns == g)
        want = dattri.attribute(task, train, chosen, method="grad-dot", group=True).values[:, 0]
        assert close(got[:, g], want)
