"""A batch that runs out of memory is halved and nothing is lost; a run keeps to its budget."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from oracles.toy_parts import FlatSketch
from oracles.toy_tasks import examples, mlp, normal, states

import dattri_core as dattri
from dattri_core import Loss, MemoryBudgetError, Task
from dattri_core.testing import PeakMemory

N, M = 40, 11
TRAIN, TEST = examples(N), examples(M, seed=300)
METHODS = {
    "grad-dot": {},
    "grad-cos": {},
    "tracin": {},
    "if-explicit": {"damping": 1.0},
    "if-cg": {"damping": 1.0},
}


class Hungry:
    """A forward pass that runs out of memory on more than `most` examples."""

    def __init__(self, most, error):
        self.most, self.error, self.seen = most, error, Counter()

    def __call__(self, model, batch):
        count = len(batch[0])
        self.seen[count > self.most] += 1
        if count > self.most:
            raise self.error("CUDA out of memory")
        return model(batch[0])


def task(forward=None):
    loss = (
        dattri.cross_entropy if forward is None else Loss(forward, dattri.cross_entropy.criterion)
    )
    return Task(mlp(), loss, checkpoints=states(2), learning_rates=[0.5, 0.25])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [9, 11])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_batches_are_halved_and_nothing_is_lost(method, most, error):
    hungry = Hungry(most, error)
    got = dattri.attribute(task(hungry), TRAIN, TEST, method=method, **METHODS[method])
    assert hungry.seen[True] > 0
    want = dattri.attribute(task(), TRAIN, TEST, method=method, **METHODS[method])
    assert (got.values - want.values).abs().max() < 1e-9 * want.values.abs().max()


def test_self_influence_is_halved_too():
    hungry = Hungry(9, torch.OutOfMemoryError)
    got = dattri.method("grad-dot").fit(task(hungry), TRAIN).self_influence()
    assert hungry.seen[True] > 0
    want = dattri.method("grad-dot").fit(task(), TRAIN).self_influence()
    assert (got - want).abs().max() < 1e-12


class Late(Hungry):
    """Runs out of memory only once gradients of many examples are asked for."""

    def __call__(self, model, batch):
        if len(batch[0]) <= 9:  # the sample on which a run is planned
            return model(batch[0])
        raise self.error("CUDA out of memory")


def test_one_example_that_is_too_much_is_an_error_with_a_way_out():
    hungry = Hungry(100, torch.OutOfMemoryError)
    fitted = dattri.method("grad-dot").fit(task(hungry), TRAIN)
    hungry.most = 0
    with pytest.raises(
        MemoryBudgetError, match=r"out of memory with a single example .*smaller memory="
    ):
        fitted.attribute(TEST)


def test_other_errors_are_not_taken_for_lack_of_memory():
    calls = []

    def forward(model, batch):
        if len(batch[0]) > 4:
            calls.append(len(batch[0]))
            raise RuntimeError("broken kernel")
        return model(batch[0])

    with pytest.raises(RuntimeError, match="broken kernel"):
        dattri.attribute(task(forward), TRAIN, TEST, method="grad-dot")
    assert len(calls) == 1


def test_lack_of_memory_is_not_taken_for_a_fault_of_the_test_set():
    def target(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    asked = dattri.Task(
        task(lambda model, batch: model(batch[0])).model,
        target=dattri.Target(target, higher_is_better=True),
    )
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        dattri.attribute(asked, TRAIN, TEST, method="grad-dot")
    assert not isinstance(caught.value, dattri.InputError)


# --- peak memory ----------------------------------------------------------------------------------
MIB = 2**20
WIDTH = 64


def deep(layers):
    return mlp((WIDTH,) * layers + (10,), dtype=torch.float32)


def wide_data(n, seed):
    x = normal(n, WIDTH, seed=seed).float()
    return x, torch.arange(n) % 10


def peak(method, layers=3, n_train=256, n_test=32, memory="8MiB", **options):
    made = Task(deep(layers))
    train, test = wide_data(n_train, 1), wide_data(n_test, 2)
    with PeakMemory() as tracked:
        dattri.attribute(made, train, test, method=method, memory=memory, **options)
    return tracked.peak


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos"])
def test_gradient_products_keep_to_their_budget_whatever_the_depth(method):
    """The rows of one layer are alive at a time, and the queries in as many groups as fit."""
    for layers in (3, 12, 24):
        assert peak(method, layers) < 8 * MIB


def test_rows_of_one_layer_are_alive_at_a_time():
    """With the same batches, eight times the layers add activations and queries, never rows."""
    import attrs

    from dattri_core import run_plan as engine

    def run(layers):
        with pytest.MonkeyPatch.context() as patch:
            original = engine.make_plan

            def plan(*arguments, **named):
                made = original(*arguments, **named)
                return attrs.evolve(made, train_batch=256, test_batch=1, query_group=1, groups=1)

            patch.setattr(engine, "make_plan", plan)
            return peak("grad-cos", layers, n_train=256, n_test=1, memory="1GiB")

    few, many = run(3), run(24)
    # A layer's rows as factors: 256 x (64 + 65) floats, 132 kB; its tanh and input: 131 kB.
    per_layer = (many - few) / 21
    assert per_layer < 2.5 * 256 * WIDTH * 4
    assert many < 256 * WIDTH * WIDTH * 4 * 24 / 10  # formed rows of all layers: 100 MB


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos", "tracin"])
def test_scores_on_disk_do_not_add_to_the_memory(method, tmp_path):
    """Four times the train set: 24 MB of scores, and no more memory than before."""

    def run(n_train):
        made = Task(deep(3), checkpoints=deep(3).state_dict(), learning_rates=[0.1])
        train, test = wide_data(n_train, 1), wide_data(500, 2)
        with PeakMemory() as tracked:
            scores = dattri.attribute(
                made, train, test, method=method, memory="8MiB", out=tmp_path / f"{n_train}"
            )
        assert scores.shape == (n_train, 500)
        return tracked.peak

    small, large = run(3000), run(12_000)
    assert large < 1.05 * small
    assert large < 8 * MIB


@pytest.mark.parametrize(
    ("method", "options", "memory"),
    [
        ("grad-dot", {}, 4),
        ("grad-dot", {}, 16),
        ("grad-cos", {}, 4),
        ("grad-cos", {}, 16),
        ("if-explicit", {"parameters": "4.*"}, 32),
        ("if-explicit", {"parameters": "4.*"}, 64),
        ("if-cg", {"maximum_iterations": 2}, 8),
        ("if-cg", {"maximum_iterations": 2}, 32),
    ],
)
def test_a_run_keeps_to_its_budget(method, options, memory):
    options = {"damping": 0.1, **options} if method.startswith("if") else {}
    made = Task(deep(3), parameters=options.pop("parameters", "*"))
    train, test = wide_data(400, 1), wide_data(60, 2)
    with PeakMemory() as tracked, pytest.warns() if method == "if-cg" else nullcontext():
        dattri.attribute(made, train, test, method=method, memory=f"{memory}MiB", **options)
    assert tracked.peak < memory * MIB


@pytest.mark.parametrize("memory", [16, 32])
def test_a_sketch_that_forms_whole_rows_keeps_to_the_budget(memory):
    """200 rows of 12 layers are 39 MB when they are formed at once; the sketch's matrix is 3 MB."""
    train, test = wide_data(200, 1), wide_data(20, 2)
    method = dattri.Method(projector=FlatSketch(5))
    made = Task(deep(12))
    with PeakMemory() as tracked:
        method.attribute(made, train, test, memory=f"{memory}MiB")
    assert tracked.peak < memory * MIB


def test_a_budget_that_holds_nothing_is_refused_with_what_would_do():
    made = Task(mlp((400, 400, 10), dtype=torch.float32))
    data = normal(20, 400, seed=1).float(), torch.arange(20) % 10
    with pytest.raises(MemoryBudgetError, match=r"budget of 1\.0 MiB does not hold.*give at least"):
        dattri.attribute(made, data, data, method="if-cg", memory="1MiB")
