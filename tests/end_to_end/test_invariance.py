"""No result depends on how the work is cut, and every method commutes with what it should."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.toy_parts import FlatSketch, Gram, inverse
from oracles.toy_tasks import examples, mlp, states
from torch.utils.data import DataLoader, TensorDataset

import dattri_core as dattri
from dattri_core import Method, Task
from dattri_core import run_plan as engine

N, M = 17, 7
RATES = [0.5, 0.25]
TIGHT = {torch.float64: 1e-9, torch.float32: 2e-3}


METHODS = {
    "grad-dot": lambda: dattri.method("grad-dot"),
    "grad-cos": lambda: dattri.method("grad-cos"),
    "tracin": lambda: dattri.method("tracin"),
    "if-explicit": lambda: dattri.method("if-explicit", damping=1.0),
    "if-cg": lambda: dattri.method("if-cg", damping=1.0),
    "ggn": lambda: dattri.method("if-explicit", curvature="ggn", damping=0.1),
    "functional": lambda: Method(source="functional"),
    "trak": lambda: dattri.method("trak", dim=9, damping=0.1),
    "sketch, gram": lambda: Method(projector=FlatSketch(9), inverse_hessian=inverse(Gram(), 0.1)),
    "gram, sketch": lambda: Method(stages=[inverse(Gram(), 0.1), FlatSketch(9)], scorer="cosine"),
}
BY_NAME = pytest.mark.parametrize("name", METHODS)


def task_of(dtype=torch.float64, weights=None, rates=RATES, **options):
    weights = states(2, dtype=dtype) if weights is None else weights
    return Task(mlp(dtype=dtype), checkpoints=weights, learning_rates=rates, **options)


TRAIN, TEST = examples(N), examples(M, seed=300)
_reference = {}


def reference(name, dtype=torch.float64):
    """Return the scores of a run that takes everything at once."""
    if (name, dtype) not in _reference:
        scores = METHODS[name]().attribute(task_of(dtype), *data(dtype), memory="1GiB")
        _reference[name, dtype] = scores.values
    return _reference[name, dtype]


def data(dtype):
    return examples(N, dtype=dtype), examples(M, seed=300, dtype=dtype)


def close(left, right, tolerance=1e-9):
    return (left - right).abs().max() <= tolerance * right.abs().max()


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=4, deadline=None)
@given(
    train_batch=st.integers(1, N),
    test_batch=st.integers(1, M),
    query_group=st.integers(1, M),
    shard=st.integers(1, N),
)
def test_batches_query_groups_and_shards_do_not_show(
    name, dtype, train_batch, test_batch, query_group, shard
):
    with pytest.MonkeyPatch.context() as patch:
        original = engine.make_plan

        def plan(*arguments, **named):
            made = original(*arguments, **named)
            return attrs.evolve(
                made,
                train_batch=train_batch,
                test_batch=test_batch,
                query_group=query_group,
                groups=-(-made.n_test // query_group),
                shard=shard,
            )

        patch.setattr(engine, "make_plan", plan)
        got = METHODS[name]().attribute(task_of(dtype), *data(dtype)).values
    assert got.dtype == dtype
    assert close(got, reference(name, dtype), TIGHT[dtype])
    assert close(got.double(), reference(name), TIGHT[dtype])


@BY_NAME
@pytest.mark.parametrize("memory", ["1MiB", "1.5MiB", "8MiB", "4GiB", None])
def test_the_memory_budget_does_not_show(name, memory):
    got = METHODS[name]().attribute(task_of(), TRAIN, TEST, memory=memory).values
    assert close(got, reference(name))


@BY_NAME
@pytest.mark.parametrize("size", [1, 3, N + 5])
def test_the_batches_of_a_loader_do_not_show(name, size):
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=size)
    test = DataLoader(TensorDataset(*TEST), batch_size=size)
    assert close(METHODS[name]().attribute(task_of(), loader, test).values, reference(name))


@BY_NAME
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_permuted_examples_permute_the_scores(name, data):
    rows = torch.tensor(data.draw(st.permutations(range(N))))
    columns = torch.tensor(data.draw(st.permutations(range(M))))
    train = tuple(t[rows] for t in TRAIN)
    test = tuple(t[columns] for t in TEST)
    got = METHODS[name]().attribute(task_of(), train, test).values
    assert close(got, reference(name)[rows][:, columns])


@BY_NAME
def test_a_test_example_does_not_see_the_others(name):
    for column in (0, M - 1):
        test = tuple(t[column : column + 1] for t in TEST)
        got = METHODS[name]().attribute(task_of(), TRAIN, test).values
        assert close(got, reference(name)[:, column : column + 1])


@BY_NAME
def test_copies_of_an_example_score_alike(name):
    """Each example twice: the same mean curvature, so the same scores, twice."""
    train = tuple(torch.cat([t, t]) for t in TRAIN)
    test = tuple(torch.cat([t, t]) for t in TEST)
    got = METHODS[name]().attribute(task_of(), train, test).values
    assert close(got, reference(name).repeat(2, 2), 1e-8)


@BY_NAME
def test_a_run_is_the_same_bit_for_bit_when_it_is_repeated(name):
    for memory in ("1MiB", "1GiB"):
        runs = [
            METHODS[name]().attribute(task_of(), TRAIN, TEST, memory=memory).values
            for _ in range(2)
        ]
        assert torch.equal(*runs)


# --- checkpoints ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [name for name in METHODS if "sketch" not in name and name != "trak"]
)
def test_several_checkpoints_are_folded_from_single_ones(name):
    """The mean, or for TracIn the sum of the learning rates times the single scores."""
    singles = [
        METHODS[name]().attribute(task_of(weights=[w], rates=[rate]), TRAIN, TEST).values
        for w, rate in zip(states(2), RATES, strict=True)
    ]
    folded = sum(singles) if name == "tracin" else sum(singles) / 2
    assert close(folded, reference(name))


def test_tracin_is_linear_in_the_learning_rates():
    once = reference("tracin")
    doubled = dattri.attribute(task_of(rates=[1.0, 0.5]), TRAIN, TEST, method="tracin").values
    assert close(doubled, 2 * once)
    first = dattri.attribute(task_of(rates=[0.5, 0.0]), TRAIN, TEST, method="tracin").values
    alone = dattri.attribute(
        task_of(weights=states(2)[:1], rates=[0.5]), TRAIN, TEST, method="tracin"
    ).values
    assert close(first, alone)


def test_checkpoints_from_files_equal_those_from_memory(tmp_path):
    from safetensors.torch import save_file

    for position, state in enumerate(states(2)):
        save_file(state, str(tmp_path / f"step-{9 + position}.safetensors"))
    task = task_of(weights=str(tmp_path / "*.safetensors"))
    got = dattri.attribute(task, TRAIN, TEST, method="tracin")
    assert torch.equal(got.values, reference("tracin"))
    assert got.provenance["checkpoints"] == ["step-9.safetensors", "step-10.safetensors"]


# --- parameters -----------------------------------------------------------------------------------
@pytest.mark.parametrize("patterns", [["0.*"], ["2.weight"], ["!*.bias"], ["0.bias", "2.*"]])
@pytest.mark.parametrize("source", ["per-example", "functional"])
def test_gradient_scores_of_subsets_of_the_parameters_add_up(patterns, source):
    method = Method(source)
    chosen = task_of(parameters=patterns)
    names = set(chosen.parameter_names)
    assert 0 < len(names) < 4
    rest = [name for name in task_of().parameter_names if name not in names]
    total = sum(
        method.attribute(task_of(parameters=part), TRAIN, TEST).values for part in (patterns, rest)
    )
    assert close(total, reference("grad-dot"))


@BY_NAME
def test_a_frozen_parameter_is_as_one_that_was_not_chosen(name):
    model = mlp()
    model[0].weight.requires_grad_(False)
    frozen = Task(model, checkpoints=states(2), learning_rates=RATES)
    chosen = task_of(parameters="!0.weight")
    assert frozen.parameter_names == chosen.parameter_names
    left, right = (METHODS[name]().attribute(t, TRAIN, TEST).values for t in (frozen, chosen))
    assert torch.equal(left, right)
    assert not model[0].weight.requires_grad


@BY_NAME
def test_the_model_is_left_as_it_was(name):
    model = mlp().train()
    model[1].eval()
    model[2].bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = Task(model, checkpoints=states(2), learning_rates=RATES)
    METHODS[name]().attribute(task, TRAIN, TEST)
    METHODS[name]().fit(task, TRAIN).self_influence()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )
