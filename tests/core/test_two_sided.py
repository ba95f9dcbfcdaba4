"""The two-sided form: the root of the inverse Hessian on both sides, against dense algebra."""

import pytest
import torch
from dattri_parts.projectors.kronecker import Kronecker
from oracles.toy_parts import FlatSketch, Gram, inverse
from oracles.toy_tasks import cross_entropies, dense_hessian, flat_gradients, positions, world

import dattri_core as dattri
from dattri_core import CurvatureInverse, Damping, Method, NumericsError, RandomStream, SpecError
from dattri_core.capabilities import InverseRoot
from dattri_core.registry import default_registry

DAMPING = 0.1


def cholesky(damping=DAMPING):
    return {"name": "cholesky", "damping": damping}


def two_sided(curvature="ggn", damping=DAMPING):
    return {"curvature": curvature, "solver": cholesky(damping), "form": "two-sided"}


def one_sided(curvature="ggn", damping=DAMPING):
    return {"curvature": curvature, "solver": cholesky(damping)}


def scores(task, train, test, *stages, **options):
    return Method(stages=list(stages), **options).attribute(task, train, test).values


@pytest.mark.parametrize("damping", [1e-3, 0.1, {"relative": 0.5}])
def test_both_forms_give_the_same_scores(damping):
    task, train, test = world()
    one = scores(task, train, test, {"inverse_hessian": one_sided(damping=damping)})
    two = scores(task, train, test, {"inverse_hessian": two_sided(damping=damping)})
    assert (one - two).abs().max() < 1e-9 * max(1, float(one.abs().max()))


@pytest.mark.parametrize("curvature", ["diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("damping", [0.1, {"relative": 0.1}])
def test_a_spectrum_gives_both_forms_layer_by_layer(curvature, damping):
    """<R g, R h> = <g, H^-1 h>; a full-rank sketch after it changes nothing, a small one does."""
    task, train, test = world()
    inverse = {"curvature": curvature, "solver": {"name": "spectral", "damping": damping}}
    root = {"inverse_hessian": {**inverse, "form": "two-sided"}}
    one = scores(task, train, test, {"inverse_hessian": inverse})
    two = scores(task, train, test, root)
    scale = float(one.abs().max())
    assert (one - two).abs().max() < 1e-9 * scale
    sketched = scores(task, train, test, root, {"projector": Kronecker(100)})
    assert (one - sketched).abs().max() < 1e-9 * scale
    assert (one - scores(task, train, test, root, {"projector": Kronecker(2)})).abs().max() > 1e-3
    fitted = Method(stages=[root, {"projector": Kronecker(2)}]).fit(task, train)
    assert fitted._held.chain.blockwise  # train rows pass a layer at a time
    own = fitted.self_influence()
    assert (own - fitted.attribute(train).values.diagonal()).abs().max() < 1e-9 * scale
    swept = fitted.with_(damping=0.7)
    assert swept._held.chain.inverses[0].stats["damping"] == pytest.approx(0.7)


def test_each_side_is_multiplied_by_the_symmetric_root():
    task, train, _ = world()
    curvature = Gram()
    fitted = Method(
        inverse_hessian=CurvatureInverse(
            curvature, default_registry().make("solver", "cholesky"), form="two-sided"
        )
    ).fit(task, train)
    chain = fitted._held.chain
    (root,) = chain.inverses
    assert isinstance(root, InverseRoot)
    assert chain.maps[-1] is root
    assert not chain.blockwise
    order = positions(task.model, chain.space)
    g = flat_gradients(task.model, cross_entropies(train))[:, order]
    values, basis = torch.linalg.eigh(g.T @ g / len(g))
    dense = basis * (values + 1e-3).rsqrt() @ basis.T
    rows = dattri.Rows.from_flat(chain.space, g, torch.arange(len(g)))
    for side in (chain.train, chain.test, root.map, root.adjoint):
        assert (side(rows).flat() - g @ dense).abs().max() < 1e-9
    assert (root.apply(rows).flat() - g @ dense @ dense).abs().max() < 1e-8


@pytest.mark.parametrize("sketch", [Kronecker(100), "identity"])
def test_a_full_rank_sketch_after_it_changes_nothing(sketch):
    task, train, test = world()
    one = scores(task, train, test, {"inverse_hessian": one_sided()})
    two = scores(task, train, test, {"inverse_hessian": two_sided()}, {"projector": sketch})
    assert (one - two).abs().max() < 1e-9


@pytest.mark.parametrize("sketch", [FlatSketch(9), Kronecker(2)])
def test_a_sketch_after_it_sees_rows_of_both_sides_multiplied(sketch):
    """S = <P R g, P R h> with R = (G + damping I)^-1/2."""
    task, train, test = world()
    got = scores(task, train, test, {"inverse_hessian": two_sided()}, {"projector": sketch}, seed=5)
    source = Method().source.bind(task, task.checkpoints[0], train)
    built = sketch.build(
        source.space, stream=RandomStream(5, "projector", 0), device=torch.device("cpu")
    )
    order = positions(task.model, source.space)
    ggn = dense_ggn(task, train)[order][:, order]
    values, basis = torch.linalg.eigh(ggn)
    root = basis * (values + DAMPING).rsqrt() @ basis.T
    g, h = (flat_gradients(task.model, cross_entropies(b))[:, order] @ root for b in (train, test))
    sides = [
        built.map(dattri.Rows.from_flat(source.space, x, torch.arange(len(x)))).flat()
        for x in (g, h)
    ]
    assert (got - sides[0] @ sides[1].T).abs().max() < 1e-9


def dense_ggn(task, train):
    from dattri_core.laws.oracles import ggn

    space = Method().source.bind(task, task.checkpoints[0], train).space
    order = positions(task.model, space)
    matrix = torch.empty(space.dim, space.dim, dtype=torch.float64)
    matrix[order[:, None], order] = ggn(task, space, train)
    return matrix


def test_a_curvature_after_it_is_lifted_through_it():
    """H after R is R H R, for products and in dense form: <R g, (R H R + 2)^-1 R h>."""
    task, train, test = world()
    found = [
        scores(
            task,
            train,
            test,
            {"inverse_hessian": two_sided("ggn", 1.0)},
            {"inverse_hessian": {"curvature": "hessian", "solver": solver}},
        )
        for solver in (
            cholesky(2.0),
            {"name": "cg", "damping": 2.0, "tolerance": 1e-14, "maximum_iterations": 300},
        )
    ]
    values, basis = torch.linalg.eigh(dense_ggn(task, train))
    root = basis * (values + 1.0).rsqrt() @ basis.T
    g, h = (flat_gradients(task.model, cross_entropies(b)) @ root for b in (train, test))
    inside = root @ dense_hessian(task.model, train) @ root
    inside += 2 * torch.eye(len(inside), dtype=torch.float64)
    want = g @ torch.linalg.solve(inside, h.T)
    for got in found:
        assert (got - want).abs().max() < 1e-9


def test_another_damping_reuses_the_fit_and_stats_are_kept():
    gram = Gram()
    solver = default_registry().make("solver", "cholesky")
    task, train, test = world()
    method = Method(stages=[CurvatureInverse(gram, solver, form="two-sided"), Kronecker(2)], seed=2)
    fitted = method.fit(task, train)
    assert fitted.stats[0]["damping"] == 1e-3
    assert fitted.stats[0]["negative_eigenvalues"] == 0
    changed = fitted.with_(damping=0.5)
    got = changed.attribute(test)
    assert gram.counts["fit"] == 1
    assert changed.stats[0]["damping"] == 0.5
    assert got.provenance["solver"][0]["damping"] == 0.5
    fresh = scores(
        task,
        train,
        test,
        {"inverse_hessian": CurvatureInverse(Gram(), type(solver)(0.5), form="two-sided")},
        {"projector": Kronecker(2)},
        seed=2,
    )
    assert (got.values - fresh).abs().max() < 1e-12
    assert gram.counts["fit"] == 1


def test_another_form_is_fitted_anew():
    task, train, test = world()
    fitted = Method(inverse_hessian=one_sided()).fit(task, train)
    turned = fitted.with_(form="two-sided")
    assert turned._held is None
    gap = turned.attribute(test).values - fitted.attribute(test).values
    assert gap.abs().max() < 1e-9


def test_self_influence_is_the_squared_norm_of_the_multiplied_rows():
    task, train, _ = world()
    for sketch in ([], [{"projector": Kronecker(2)}]):
        method = Method(stages=[{"inverse_hessian": two_sided()}, *sketch])
        own = method.fit(task, train).self_influence()
        want = method.attribute(task, train, train).values.diagonal()
        assert (own - want).abs().max() < 1e-10
        assert bool((own > 0).all())


def test_a_form_is_spelled_only_where_it_differs():
    plain, turned = Method(inverse_hessian=one_sided()), Method(inverse_hessian=two_sided())
    assert "form" not in plain.to_spec()["inverse_hessian"]
    assert turned.to_spec()["inverse_hessian"]["form"] == "two-sided"
    assert Method(**turned.to_spec()) == turned != plain
    with pytest.raises(SpecError, match="one of 'one-sided', 'two-sided'"):
        Method(inverse_hessian={**one_sided(), "form": "both"})


# --- refused --------------------------------------------------------------------------------------
def test_a_solver_without_a_root_is_refused_when_the_method_is_made():
    with pytest.raises(SpecError, match=r"solver CG does not give.*'cholesky'.*form='one-sided'"):
        Method(inverse_hessian={"curvature": "ggn", "solver": "cg", "form": "two-sided"})
    with pytest.raises(SpecError, match="solver DenseSolve does not give"):
        Method(inverse_hessian=CurvatureInverse(Gram(), inverse(Gram()).solver, form="two-sided"))


def test_an_indefinite_curvature_has_no_root():
    task, train, test = world()
    least = float(torch.linalg.eigvalsh(dense_hessian(task.model, train))[0])
    assert least < -1e-3
    method = Method(inverse_hessian=two_sided("hessian", 1e-3))
    with pytest.raises(NumericsError, match=r"\^-1/2 does not exist.*give a damping above"):
        method.attribute(task, train, test)
    enough = Method(inverse_hessian=two_sided("hessian", -least + 0.1)).fit(task, train)
    with pytest.raises(NumericsError, match="does not exist"):
        enough.with_(damping=Damping(1e-3))
