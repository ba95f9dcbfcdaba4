"""Methods: values made of parts, refused without a tensor when the parts do not fit."""

import attrs
import pytest
import torch
from oracles.toy_parts import (
    ColumnRank,
    Factored,
    FlatSketch,
    GGNColumns,
    Gram,
    GramOf,
    HessianColumns,
    LastOnly,
    OneWaySketch,
    ResidualDot,
    SpectralSolve,
    inverse,
)
from oracles.toy_tasks import examples, mlp, states, world

import dattri_core as dattri
from dattri_core import CurvatureInverse, Loss, Method, SpecError, Task
from dattri_core.assemble import build_part


@pytest.fixture
def no_tensors(monkeypatch):
    """Fail when a model is evaluated or data are read."""

    def refuse(*_, **__):
        raise AssertionError("work was done before the method was checked")

    monkeypatch.setattr("dattri_core.evaluate.Evaluator.__init__", refuse)
    monkeypatch.setattr("dattri_core.stream.Examples.of", refuse)


# --- refused when it is made ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"source": "per-exmple"}, r"per-exmple.*did you mean 'per-example'"),
        ({"scorer": "cosin"}, r"cosin.*did you mean 'cosine'"),
        ({"fold": "men"}, r"did you mean 'mean'"),
        ({"projector": "identiy"}, r"did you mean 'identity'"),
        ({"inverse_hessian": {"curvature": "hesian", "solver": "cg"}}, r"'hessian'"),
        ({"inverse_hessian": {"curvature": "hessian", "solver": "cgs"}}, r"'cg'"),
        (
            {"inverse_hessian": {"curvature": "hessian", "solver": "cg", "dampng": 1e-3}},
            r"dampng.*'?solver\.damping|did you mean 'damping'",
        ),
        ({"scorer": {"name": "dot", "scale": 2}}, r"scale"),
        ({"scorer": {"scale": 2}}, r"has no name"),
        ({"source": torch.nn.Linear(1, 1)}, r"source: got Linear.*has no bind"),
        ({"scorer": ResidualDot}, r"got the class ResidualDot.*call it"),
        ({"stages": "identity"}, r"expected a list"),
        ({"stages": [{"scorer": "dot"}]}, r"item 0 .*'projector' or 'inverse_hessian'"),
    ],
)
def test_unknown_names_and_fields_are_refused_with_the_nearest(no_tensors, slots, message):
    with pytest.raises(SpecError, match=rf"(?s){message}"):
        Method(**slots)


@pytest.mark.parametrize("overrides", [{"dampin": 1.0}, {"solver.dampin": 1.0}, {"scorr": "dot"}])
def test_a_misspelt_override_is_refused_with_the_valid_ones(no_tensors, overrides):
    with pytest.raises(
        SpecError, match=r"(?s)did you mean '(damping|solver\.damping|scorer|.*damping)'"
    ):
        dattri.method("if-cg", **overrides)


def test_an_unknown_method_is_refused_with_the_nearest(no_tensors):
    with pytest.raises(SpecError, match=r"did you mean 'if-cg'"):
        dattri.method("if-cgg")


def test_a_scorer_that_reads_what_the_source_does_not_give_is_refused(no_tensors):
    with pytest.raises(
        SpecError, match=r"scorer 'ResidualDot' needs \['residual'\].*'per-example'"
    ):
        Method(scorer=ResidualDot())


def test_a_solver_that_asks_for_what_the_curvature_does_not_give_is_refused(no_tensors):
    with pytest.raises(SpecError, match=r"SpectralSolve needs \['spectral'\].*Gram does not give"):
        Method(inverse_hessian=CurvatureInverse(Gram(), SpectralSolve()))


def test_both_spellings_of_the_stages_at_once_are_refused(no_tensors):
    with pytest.raises(SpecError, match=r"either stages=\[...\] or the slots"):
        Method(projector=FlatSketch(), stages=[FlatSketch()])


def test_a_curvature_of_factors_after_a_flat_sketch_is_refused_and_before_it_is_not(no_tensors):
    factored = inverse(Factored())
    with pytest.raises(SpecError, match=r"no factors left; put it before.*stages="):
        Method(projector=FlatSketch(), inverse_hessian=factored)
    with pytest.raises(SpecError, match="no factors left"):
        Method(stages=[FlatSketch(), factored])
    Method(inverse_hessian=factored)
    Method(stages=[factored, FlatSketch()])


@pytest.mark.parametrize("curvature", [HessianColumns(), GGNColumns()])
def test_products_need_the_adjoint_of_the_projectors_before_them(no_tensors, curvature):
    need = next(iter(curvature.needs))
    message = (
        rf"needs a {need} lifted through OneWaySketch, which has no adjoint; put the inverse "
        r"Hessian first .*stages=\[.*or a curvature made from rows"
    )
    with pytest.raises(SpecError, match=message):
        Method(projector=OneWaySketch(), inverse_hessian=inverse(curvature))
    with pytest.raises(SpecError, match=message):
        Method(stages=[FlatSketch(), OneWaySketch(), inverse(curvature)])
    Method(projector=OneWaySketch(), inverse_hessian=inverse(Gram()))
    Method(projector=FlatSketch(), inverse_hessian=inverse(curvature))
    Method(stages=[inverse(curvature), OneWaySketch()])


# --- refused when it meets a task ---------------------------------------------------------------
def plain_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


CALLS = [
    lambda method, task: method.fit(task, examples(3)),
    lambda method, task: method.attribute(task, examples(3), examples(2)),
    lambda method, task: method.attribute(task, examples(3), examples(2), dry_run=True),
    lambda method, task: dattri.attribute(task, examples(3), examples(2), method=method),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_fold_by_learning_rates_needs_them(no_tensors, call):
    task = Task(mlp(), checkpoints=states(2))
    with pytest.raises(SpecError, match=r"'weighted'.*\['state 0', 'state 1'\].*learning_rates="):
        call(Method(fold="weighted"), task)


@pytest.mark.parametrize("call", CALLS)
def test_a_ggn_needs_outputs_and_criterion_apart(no_tensors, call):
    method = Method(inverse_hessian=inverse(GGNColumns()))
    with pytest.raises(SpecError, match=r"loss 'plain_loss'.*dattri\.Loss\(forward="):
        call(method, Task(mlp(), plain_loss))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["fisher", "ggn"])
def test_rows_of_outputs_need_outputs_and_criterion_apart(no_tensors, call, kind):
    method = Method(inverse_hessian=inverse(GramOf(kind)))
    with pytest.raises(SpecError, match=rf"kind '{kind}'.*loss 'plain_loss'.*dattri\.Loss\("):
        call(method, Task(mlp(), plain_loss))


@pytest.mark.parametrize("call", CALLS)
def test_rows_of_drawn_labels_need_a_loss_that_draws(no_tensors, call):
    loss = Loss(lambda m, b: m(b[0]), lambda o, b: o.square().sum(1))
    method = Method(inverse_hessian=inverse(GramOf("fisher")))
    with pytest.raises(SpecError, match=r"how a label is drawn.*sample=.*kind 'ggn'"):
        call(method, Task(mlp(), loss))


def test_rows_of_outputs_need_a_source_that_pulls():
    """Known once the source is bound: before any pass over the train set."""

    @attrs.frozen
    class Plain:
        provides = frozenset()

        def bind(self, task, checkpoint, sample):
            bound = build_part("source", "per-example").bind(task, checkpoint, sample)
            return BoundPlain(bound.space, bound.evaluator, bound.stream)

    @attrs.frozen
    class BoundPlain:
        space: object
        evaluator: object
        stream: object

    task, train, test = world()
    gram = Gram()
    Method(source=Plain(), inverse_hessian=inverse(gram)).attribute(task, train, test)
    method = Method(source=Plain(), stages=[inverse(gram), inverse(GramOf("ggn"))])
    with pytest.raises(SpecError, match=r"source BoundPlain gives rows of the loss only"):
        method.attribute(task, train, test)
    assert gram.counts["fit"] == 1


@pytest.mark.parametrize("sketches", [[], [FlatSketch(9)]])
def test_a_curvature_of_ggn_rows_gives_the_scores_of_ggn_products(sketches):
    task, train, test = world()
    made = [
        Method(stages=[*sketches, inverse(curvature)]).attribute(task, train, test)
        for curvature in (GramOf("ggn"), GGNColumns())
    ]
    one, two = (torch.as_tensor(scores.values) for scores in made)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_a_hessian_takes_a_plain_loss_and_a_ggn_a_split_one():
    data = examples(6), examples(2)
    plain = Task(mlp(), plain_loss)
    split = Task(mlp(), Loss(lambda m, b: m(b[0]), lambda o, b: o.square().sum(1)))
    Method(inverse_hessian=inverse(HessianColumns())).attribute(plain, *data)
    Method(inverse_hessian=inverse(GGNColumns())).attribute(split, *data)


def test_a_space_that_a_stage_cannot_take_is_refused_before_the_fit():
    """What only the real space shows comes before any pass over the data."""
    gram = Gram()

    @attrs.frozen
    class Narrow(FlatSketch):
        def out_space(self, space):
            if space.dim > 40 and "layer" not in space:
                raise SpecError(f"sketch: {space.dim} columns are more than 40")
            return super().out_space(space)

    method = Method(stages=[inverse(gram), Narrow()])
    task, train, test = world()
    with pytest.raises(SpecError, match="43 columns are more than 40"):
        method.attribute(task, train, test)
    assert gram.counts["fit"] == 0


# --- values -------------------------------------------------------------------------------------
def test_a_method_is_a_value():
    assert Method() == Method(source="per-example", scorer="dot")
    assert hash(Method()) == hash(Method(fold="mean"))
    assert Method() != Method(scorer="cosine")
    changed = attrs.evolve(Method(), scorer="cosine")
    assert changed == Method(scorer="cosine")
    assert attrs.evolve(changed, scorer="dot") == Method()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        changed.seed = 3


@pytest.mark.parametrize(
    "slots",
    [
        {},
        {"scorer": "cosine", "fold": "weighted", "seed": 3},
        {"inverse_hessian": {"curvature": "hessian", "solver": {"name": "cg", "damping": 0.5}}},
        {"stages": [{"inverse_hessian": {"curvature": "ggn", "solver": "cholesky"}}]},
    ],
)
def test_a_spec_gives_the_method_back(slots):
    method = Method(**slots)
    assert Method(**method.to_spec()) == method


def test_evolve_checks_again(no_tensors):
    with pytest.raises(SpecError, match="no factors left"):
        attrs.evolve(Method(projector=FlatSketch()), inverse_hessian=inverse(Factored()))


def test_overrides_reach_the_one_part_with_the_field():
    made = dattri.method("if-cg", damping=0.25, scorer="cosine")
    assert made.inverse_hessian.solver.damping.value == 0.25
    assert made.scorer == Method(scorer="cosine").scorer
    assert dattri.method("if-cg", **{"solver.damping": 0.25, "scorer": "cosine"}) == made
    assert dattri.method("if-cg", solver="cholesky").inverse_hessian.curvature == (
        made.inverse_hessian.curvature
    )


def test_attribute_takes_a_name_a_method_or_an_attributor():
    task, train, test = world()
    named = dattri.attribute(task, train, test, method="grad-cos").values
    method = dattri.method("grad-cos")
    assert torch.equal(dattri.attribute(task, train, test, method=method).values, named)
    assert torch.equal(
        dattri.attribute(task, train, test, method=Method(), scorer="cosine").values, named
    )
    random = dattri.method("random")
    assert dattri.attribute(task, train, test, method=random).shape == (13, 6)
    with pytest.raises(SpecError, match=r"overrides \['scorer'\] go with the name of a method"):
        dattri.attribute(task, train, test, method=random, scorer="dot")


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_fold_gets_checkpoints_in_the_order_it_wants(order):
    train, test = examples(5), examples(3, seed=7)
    weights = states(3)
    got = Method(fold=LastOnly(order)).attribute(Task(mlp(), checkpoints=weights), train, test)
    last = weights[-1] if order == "forward" else weights[0]
    want = Method().attribute(Task(mlp(), checkpoints=last), train, test)
    assert torch.equal(got.values, want.values)


def test_a_column_scorer_sees_all_train_rows_whatever_the_batches():
    task, train, test = world(n_train=40)
    dots = Method().attribute(task, train, test).values
    want = dots.argsort(0).argsort(0).double()
    for memory in ("1GiB", "1MiB"):
        got = Method(scorer=ColumnRank()).attribute(task, train, test, memory=memory).values
        assert torch.equal(got, want)
    with pytest.raises(SpecError, match="self-influence: the scorer 'ColumnRank' sees a whole"):
        Method(scorer=ColumnRank()).fit(task, train).self_influence()
