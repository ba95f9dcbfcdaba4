"""Relative influence against dense algebra: every train row through the inverse Hessian too."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import attrs
import pytest
import torch
from attrs import field, frozen
from dattri_parts.projectors.kronecker import Kronecker
from dattri_parts.scorers.relatif import RelatIF
from oracles.toy_parts import FlatSketch
from oracles.toy_tasks import (
    cross_entropies,
    dense_hessian,
    flat_gradients,
    mlp,
    positions,
    states,
    world,
)

import dattri_core as dattri
from dattri_core import Damping, DenseBlock, Method, NumericsError, Rows, Side, SpecError, Task
from dattri_core.laws import check

DAMPING = 2.0  # above the most negative eigenvalue of the Hessian of the toy world
FORMS = ("l", "theta")
SLACK = 8  # rows that a query group may send through an inverse besides its own
CG = {"name": "cg", "damping": DAMPING, "tolerance": 1e-14, "maximum_iterations": 200}
CHOLESKY = {"name": "cholesky", "damping": DAMPING}


def relative(influence, train, inverted, form):
    """Return S / sqrt(<A g, B g>) or S / |B g| for rows A g and B g, written down."""
    size = (train * inverted).sum(1).sqrt() if form == "l" else inverted.norm(dim=1)
    return influence / size.unsqueeze(1)


def dense_inverse(task, train):
    hessian = dense_hessian(task.model, train)
    return torch.linalg.inv(hessian + DAMPING * torch.eye(len(hessian), dtype=hessian.dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", [CHOLESKY, CG])
@pytest.mark.parametrize("memory", ["1MiB", None])
def test_scores_are_influences_over_the_size_of_each_train_row(form, solver, memory):
    task, train, test = world()
    g, h = (flat_gradients(task.model, cross_entropies(b)) for b in (train, test))
    inverse = dense_inverse(task, train)
    method = Method(
        inverse_hessian={"curvature": "hessian", "solver": solver},
        scorer={"name": "relatif", "form": form},
    )
    got = method.attribute(task, train, test, memory=memory).values
    want = relative(g @ inverse @ h.T, g, g @ inverse, form)
    assert (got - want).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_without_an_inverse_both_forms_divide_by_the_norm(form):
    task, train, test = world()
    g, h = (flat_gradients(task.model, cross_entropies(b)) for b in (train, test))
    got = Method(scorer=RelatIF(form)).attribute(task, train, test).values
    assert (got - g @ h.T / g.norm(dim=1, keepdim=True)).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["sketch", "inverse"])
@pytest.mark.parametrize("sketch", [FlatSketch(9), Kronecker(2)])
def test_sizes_are_those_of_the_rows_after_all_stages(form, first, sketch):
    """P before: <P g, (P G P^T + damping)^-1 P g>. P after: <P g, P (G + damping)^-1 g>."""
    task, train, test = world()
    stages = [
        {"projector": sketch},
        {"inverse_hessian": {"curvature": "ggn", "solver": CHOLESKY}},
    ]
    ordered = stages if first == "sketch" else stages[::-1]
    plain = Method(stages=ordered, seed=3)
    fitted = plain.fit(task, train)
    chain = fitted._held.chain
    # A sketch that leaves no factors is taken by the source.
    space = getattr(chain.source, "source", chain.source).space
    order = positions(task.model, space)
    g = flat_gradients(task.model, cross_entropies(train))[:, order]
    eye = torch.eye(space.dim, dtype=torch.float64)
    units = Rows.from_flat(space, eye, torch.arange(len(eye)))
    for step in getattr(chain.source, "maps", ()):
        units = step.map(units)
    a, b = chain.train(units).flat().T, chain.test(units).flat().T  # as matrices [k, d]
    influence = fitted.attribute(test).values
    own = (g @ a.T * (g @ b.T)).sum(1)
    method = Method(stages=ordered, scorer=RelatIF(form), seed=3)
    if form == "l" and bool((own < 0).any()):
        with pytest.raises(NumericsError, match=f"train example {int(own.argmin())} is -"):
            method.attribute(task, train, test)
        return
    got = method.attribute(task, train, test).values
    assert (got - relative(influence, g @ a.T, g @ b.T, form)).abs().max() < 1e-9


def test_a_two_sided_inverse_serves_the_form_l_and_not_the_form_theta():
    task, train, test = world()
    one = {"curvature": "ggn", "solver": CHOLESKY}
    two = {**one, "form": "two-sided"}
    scores = [
        Method(inverse_hessian=inverse, scorer="relatif").attribute(task, train, test).values
        for inverse in (one, two)
    ]
    assert (scores[0] - scores[1]).abs().max() < 1e-10
    with pytest.raises(SpecError, match=r"'two-sided' leaves.*use form='one-sided'"):
        Method(inverse_hessian=two, scorer=RelatIF("theta"))


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_divided_one_by_one(form):
    _, train, test = world()
    weights = states(3)
    method = Method(
        inverse_hessian={"curvature": "ggn", "solver": CHOLESKY}, scorer=RelatIF(form), fold="mean"
    )
    whole = method.attribute(Task(mlp(), checkpoints=weights), train, test).values
    single = [method.attribute(Task(mlp(), checkpoints=[w]), train, test).values for w in weights]
    assert (whole - torch.stack(single).mean(0)).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [None, "margin"])
def test_self_influence_and_another_damping(form, target):
    """S_ii = <g, B g> / size: its root for form l, whatever the target."""
    task, train, test = world(target=target)
    plain, *_ = world()
    method = Method(
        inverse_hessian={"curvature": "hessian", "solver": CHOLESKY}, scorer=RelatIF(form)
    )
    fitted = method.fit(task, train)
    g = flat_gradients(task.model, cross_entropies(train))
    for damping in (DAMPING, 3.0):
        swept = fitted.with_(damping=damping)
        hessian = dense_hessian(task.model, train)
        inverse = torch.linalg.inv(hessian + damping * torch.eye(len(hessian)).double())
        own = (g @ inverse * g).sum(1)
        want = own.sqrt() if form == "l" else own / (g @ inverse).norm(dim=1)
        assert (swept.self_influence() - want).abs().max() < 1e-10
        fresh = Method(
            inverse_hessian={
                "curvature": "hessian",
                "solver": {"name": "cholesky", "damping": damping},
            },
            scorer=RelatIF(form),
        )
        got = swept.attribute(test).values
        assert (got - fresh.attribute(task, train, test).values).abs().max() < 1e-12
        own_target = fresh.attribute(plain, train, train).values.diagonal()
        assert (own_target - want).abs().max() < 1e-10


def test_a_changed_scorer_reuses_the_fit():
    task, train, test = world()
    fitted = Method(inverse_hessian={"curvature": "ggn", "solver": CHOLESKY}).fit(task, train)
    relatif = fitted.with_(scorer="relatif")
    assert relatif._held is fitted._held
    own = fitted.self_influence().sqrt().unsqueeze(1)
    want = fitted.attribute(test).values / own
    assert (relatif.attribute(test).values - want).abs().max() < 1e-12


# --- block by block -------------------------------------------------------------------------------
@frozen
class Halves:
    """A blockwise inverse, g / (1 + position of the block); notes the blocks it was given."""

    blockwise: bool
    seen: Counter = field(factory=Counter, eq=False)
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})

    def check(self, space):
        pass

    def fit(self, problem):
        return _Halved(self, problem.space, Damping(0.0))


@frozen(eq=False)
class _Halved:
    part: Halves
    space: dattri.Space
    damping: Damping
    stats: ClassVar[dict] = {}

    @property
    def blockwise(self):
        return self.part.blockwise

    def with_damping(self, damping):
        return self

    def apply(self, rows):
        self.part.seen[len(rows.space)] += len(rows)
        scale = {name: 1 + at for at, name in enumerate(self.space.names)}
        return rows.map_blocks(lambda name, block: DenseBlock(block.dense().values / scale[name]))


@pytest.mark.parametrize("form", FORMS)
def test_a_blockwise_inverse_never_sees_whole_train_rows(form):
    task, train, test = world()
    found = {}
    for blockwise in (True, False):
        part = Halves(blockwise)
        method = Method(inverse_hessian=part, scorer=RelatIF(form))
        fitted = method.fit(task, train)
        part.seen.clear()
        found[blockwise] = fitted.attribute(test).values
        if blockwise:  # queries may come whole, train rows may not
            assert part.seen[1] >= 2
        else:
            assert set(part.seen) == {2}
    assert (found[True] - found[False]).abs().max() < 1e-12
    order = positions(task.model, Method().source.bind(task, task.checkpoints[0], train).space)
    g, h = (flat_gradients(task.model, cross_entropies(b))[:, order] for b in (train, test))
    scale = torch.cat([torch.full((25,), 1.0), torch.full((18,), 2.0)]).double()
    want = relative((g / scale) @ h.T, g, g / scale, form)
    assert (found[True] - want).abs().max() < 1e-12


@pytest.mark.parametrize("blockwise", [True, False])
def test_train_rows_pass_the_inverse_once_however_many_query_groups(blockwise):
    task, train, test = world(50, 400)
    part = Halves(blockwise)
    method = Method(inverse_hessian=part, scorer="relatif")
    fitted = method.fit(task, train, memory="1MiB")
    plan = method.attribute(task, train, test, memory="1MiB", dry_run=True)
    assert plan.groups >= 2
    part.seen.clear()
    got = fitted.attribute(test).values
    blocks = 2 if blockwise else 1
    assert sum(part.seen.values()) <= blocks * (50 + 400 + SLACK * plan.groups)
    assert (got - method.attribute(task, train, test, memory="1GiB").values).abs().max() < 1e-10


@pytest.mark.parametrize("scorer", ["dot", "cosine", "relatif"])
def test_self_influence_of_a_blockwise_inverse_never_makes_whole_rows(scorer):
    task, train, _ = world()
    found = {}
    for blockwise in (True, False):
        part = Halves(blockwise)
        fitted = Method(inverse_hessian=part, scorer=scorer).fit(task, train)
        part.seen.clear()
        found[blockwise] = fitted.self_influence()
        assert part.seen == ({1: 2 * len(train[1])} if blockwise else {2: len(train[1])})
        want = fitted.attribute(train).values.diagonal()
        assert (found[blockwise] - want).abs().max() < 1e-12


def test_a_plan_holds_train_rows_on_both_sides():
    """Whole rows and their inverse where the inverse wants them whole; else a block and its."""
    task, train, test = world(200, 40)
    rows = {}
    for name, inverse in (
        ("whole", {"curvature": "ggn", "solver": CHOLESKY}),
        ("blocks", {"curvature": "ekfac", "solver": "spectral"}),
    ):
        for scorer in ("dot", "relatif"):
            method = Method(inverse_hessian=inverse, scorer=scorer)
            plan = method.attribute(task, train, test, dry_run=True)
            rows[name, scorer] = plan.bytes["train batch"] / plan.train_batch
    dim, item, largest = 43, 8, 25
    assert rows["whole", "relatif"] - rows["whole", "dot"] >= 6 * dim * item
    assert rows["blocks", "relatif"] - rows["blocks", "dot"] == 4 * largest * item


@pytest.mark.parametrize("name", ["relatif-explicit", "relatif-ekfac"])
def test_a_stopped_run_on_disk_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    task, train, test = world(60, 900)
    run = {"memory": "1MiB", "progress": False}
    whole = dattri.attribute(task, train, test, name, out=tmp_path / "whole", **run)
    finish, tiles = RelatIF.finish, Counter()

    def stopping(self, *sides):
        tiles["done"] += 1
        if tiles["done"] == 2:
            raise KeyboardInterrupt
        return finish(self, *sides)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RelatIF, "finish", stopping)
        dattri.attribute(task, train, test, name, out=tmp_path / "stopped", **run)
    again = dattri.attribute(task, train, test, name, out=tmp_path / "stopped", **run)
    assert bool((again.values == whole.values).all())


EKFAC = {"curvature": "ekfac", "solver": {"name": "spectral", "damping": 0.1}}
CHAINS = {
    "inverse": [{"inverse_hessian": EKFAC}],
    "sketch first": [{"projector": Kronecker(2)}, {"inverse_hessian": EKFAC}],
    "sketch last": [{"inverse_hessian": EKFAC}, {"projector": Kronecker(3)}],
    "two-sided": [{"inverse_hessian": {**EKFAC, "form": "two-sided"}}, {"projector": Kronecker(3)}],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chain", CHAINS)
def test_every_route_and_a_sweep_give_the_same_scores(monkeypatch, form, chain):
    from dattri_core.snapshot import Outline

    if form == "theta" and chain == "two-sided":
        pytest.skip("refused")
    task, train, test = world(20, 6)
    # A sketch after the inverse estimates self-influence, and may come out below zero.
    scorer = RelatIF("theta" if chain == "sketch last" else form)
    fitted = Method(stages=CHAINS[chain], scorer=scorer).fit(task, train)
    want = fitted.attribute(test).values
    costs = Outline.costs
    routes = len(fitted._held.outline.costs(measured=True).routes)
    for k in range(routes):
        with monkeypatch.context() as patch:

            def only(self, k=k, **kinds):
                found = costs(self, **kinds)
                return attrs.evolve(found, routes=(found.routes[k],))

            patch.setattr(Outline, "costs", only)
            got = fitted.attribute(test).values
        assert (got - want).abs().max() < 1e-9 * want.abs().max(), k
    dampings = (0.1, 0.5)
    swept = fitted.sweep(test, damping=dampings)
    for damping in dampings:
        alone = fitted.with_(damping=damping).attribute(test).values
        assert (swept[damping].values - alone).abs().max() < 1e-9 * alone.abs().max()


# --- the scorer itself ----------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_it_meets_every_law_of_scorers(form):
    report = check("scorer", RelatIF(form))
    assert report.ok, str(report)
    skipped = [finding.law for finding in report.findings if finding.status == "skipped"]
    assert skipped == ["needed-aux-is-read"]  # it needs none


@pytest.mark.parametrize("form", FORMS)
def test_a_row_times_a_number_has_the_same_relative_influence(form):
    task, train, test = world()
    g, h = (flat_gradients(task.model, cross_entropies(b)) for b in (train, test))
    scorer = RelatIF(form)
    weights = torch.linspace(0.5, 3, len(g), dtype=torch.float64)

    def scores(rows):
        numbers = {
            "self_influence": rows.square().sum(1),
            "inverse_norm": rows.norm(dim=1),
        }
        side = Side(torch.arange(len(rows)), {}, None, **numbers)
        return scorer.finish(rows @ h.T, side, side).values

    assert (scores(weights[:, None] * g) - scores(g)).abs().max() < 1e-12


def test_zero_rows_score_zero_and_a_negative_self_influence_is_refused():
    total = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    own = torch.tensor([4.0, 0.0])
    side = Side(torch.tensor([7, 8]), {}, None, own, own)
    assert RelatIF("l").finish(total, side, side).values.tolist() == [[0.5, 1.0], [0.0, 0.0]]
    assert RelatIF("theta").finish(total, side, side).values.tolist() == [[0.25, 0.5], [0.0, 0.0]]
    bad = Side(torch.tensor([7, 8]), {}, None, torch.tensor([4.0, -1e-3]))
    with pytest.raises(NumericsError, match=r"train example 8 is -0\.001"):
        RelatIF("l").finish(total, bad, bad)
    with pytest.raises(SpecError, match="one of 'l', 'theta'"):
        Method(scorer={"name": "relatif", "form": "L"})
