"""The train set as a curvature sees it: rows and products against dense algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.toy_parts import FlatSketch
from oracles.toy_tasks import dense_hessian, flat_gradients, positions, world

import dattri_core as dattri
from dattri_core import Loss, MemoryBudgetError, Rows, SpecError, Task
from dattri_core.assemble import build_part
from dattri_core.laws.oracles import ggn, hessian, row_matrix
from dattri_core.problem import TrainProblem
from dattri_core.protocols import RandomStream
from dattri_core.stream import Examples

N = 13


def problem(task, train, *, sketches=(), batch=4, memory=2**26, source="per-example", advance=None):
    examples = Examples.of(train, "train")
    bound = build_part("source", source).bind(task, task.checkpoints[0], examples.sample(3))
    stream = RandomStream(0, "projector")
    maps = ()
    for sketch in sketches:
        space = maps[-1].out_space if maps else bound.space
        maps = (*maps, sketch.build(space, stream=stream, device=torch.device("cpu")))
    return TrainProblem(
        source=bound,
        examples=examples,
        maps=maps,
        batch=batch,
        random=RandomStream(0, "curvature"),
        memory=memory,
        advance=advance,
    )


def vectors(space, count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(count, space.dim, generator=generator, dtype=torch.float64)
    return Rows.from_flat(space, flat, torch.arange(count))


def close(left, right, tolerance=1e-12):
    return (left - right).abs().max() <= tolerance * right.abs().max()


# --- rows ---------------------------------------------------------------------------------------
@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, N + 2))
def test_rows_are_the_gradients_of_the_train_loss_in_order_whatever_the_batch(batch):
    task, train, _ = world(n_train=N, target="margin")
    seen = problem(task, train, batch=batch)
    parts = list(seen.rows())
    assert all(len(part) <= batch for part in parts)
    rows = Rows.concatenate(parts)
    assert rows.index.tolist() == list(range(N))
    assert close(rows.flat(), row_matrix(task, seen.space, train))
    assert seen.n_train == N
    assert (seen.dtype, seen.device) == (torch.float64, torch.device("cpu"))


def test_rows_of_chosen_examples_come_in_the_order_asked():
    task, train, _ = world(n_train=N)
    seen = problem(task, train, batch=2)
    index = torch.tensor([7, 0, 7, 12, 3])
    rows = Rows.concatenate(list(seen.rows(index)))
    assert rows.index.tolist() == index.tolist()
    assert close(rows.flat(), row_matrix(task, seen.space, train)[index])


def test_rows_pass_the_projectors():
    task, train, _ = world(n_train=N)
    seen = problem(task, train, sketches=[FlatSketch()])
    rows = Rows.concatenate(list(seen.rows()))
    matrix = seen.maps[0].matrix
    assert close(rows.flat(), row_matrix(task, seen.source.space, train) @ matrix.T)
    assert seen.space.dim == 5


# --- products -----------------------------------------------------------------------------------
def test_two_dense_oracles_agree():
    """The oracle of these tests, against torch.autograd.functional.hessian."""
    task, train, _ = world(n_train=N)
    space = problem(task, train).space
    order = positions(task.model, space)
    want = dense_hessian(task.model, train)[order][:, order]
    assert close(hessian(task, space, train), want, 1e-10)
    flat = flat_gradients(
        task.model,
        lambda model: torch.nn.functional.cross_entropy(
            model(train[0]), train[1], reduction="none"
        ),
    )
    assert close(row_matrix(task, space, train), flat[:, order])


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("source", ["per-example", "functional"])
@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, N + 1),
    memory=st.sampled_from([2**10, 2**14, 2**16, 2**28]),
    count=st.integers(1, 4),
)
def test_products_are_those_of_the_mean_curvature_however_the_work_is_cut(
    kind, source, batch, memory, count
):
    task, train, _ = world(n_train=N)
    seen = problem(task, train, source=source, batch=batch, memory=memory)
    dense = {"hessian": hessian, "ggn": ggn}[kind](task, seen.space, train)
    given_vectors = vectors(seen.space, count)
    got = seen.product(given_vectors, kind)
    assert got.space == seen.space
    assert close(got.flat(), given_vectors.flat() @ dense, 1e-10)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("sizes", [[5], [9, 5], [20, 11, 4]])
def test_after_projectors_the_curvature_is_lifted_through_their_adjoints(kind, sizes):
    task, train, _ = world(n_train=N)
    seen = problem(task, train, sketches=[FlatSketch(size) for size in sizes])
    dense = {"hessian": hessian, "ggn": ggn}[kind](task, seen.source.space, train)
    p = torch.linalg.multi_dot([m.matrix for m in reversed(seen.maps)] + [torch.eye(43).double()])
    given_vectors = vectors(seen.space, 3)
    got = seen.product(given_vectors, kind).flat()
    assert close(got, given_vectors.flat() @ (p @ dense @ p.T), 1e-10)


def test_products_of_a_subset_of_the_parameters_are_a_block_of_the_hessian():
    task, train, _ = world(n_train=N, parameters=["0.*", "!*.bias"])
    seen = problem(task, train)
    whole = dense_hessian(task.model, train)[:20, :20]
    given_vectors = vectors(seen.space, 3)
    assert seen.space.parameter_names == ("0.weight",)
    assert close(seen.product(given_vectors, "hessian").flat(), given_vectors.flat() @ whole, 1e-10)


def test_products_report_every_example_once():
    seen = []
    task, train, _ = world(n_train=N)
    made = problem(task, train, batch=5, advance=seen.append)
    made.product(vectors(made.space, 2), "hessian")
    assert seen == [5, 5, 3]


def test_vectors_of_another_space_are_refused():
    task, train, _ = world(n_train=N)
    other = problem(*world(parameters="0.*")[:2])
    with pytest.raises(SpecError, match="curvature product: the spaces"):
        problem(task, train).product(vectors(other.space, 1), "hessian")


# --- running out of memory ----------------------------------------------------------------------
class Hungry:
    """A forward pass that runs out of memory on more than `most` examples."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, model, batch):
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > self.most:
            raise self.error("CUDA out of memory")
        return model(batch[0])

    def task(self, model):
        return Task(model, Loss(self, dattri.cross_entropy.criterion))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("most", [3, 1])
def test_a_batch_that_runs_out_of_memory_is_halved(kind, most):
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100)
    task = hungry.task(plain.model)
    seen = problem(task, train, batch=N)
    hungry.most = most
    want = problem(plain, train).product(vectors(seen.space, 2), kind).flat()
    got = seen.product(vectors(seen.space, 2), kind).flat()
    assert close(got, want, 1e-12)
    assert N in hungry.sizes


def test_one_example_that_runs_out_of_memory_is_an_error_with_a_way_out():
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100, MemoryError)
    seen = problem(hungry.task(plain.model), train)
    hungry.most = 0
    with pytest.raises(
        MemoryBudgetError, match=r"with one example and one of 2 vectors.*smaller memory="
    ):
        seen.product(vectors(seen.space, 2), "hessian")


def test_other_errors_pass_through_unchanged():
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100, ZeroDivisionError)
    seen = problem(hungry.task(plain.model), train)
    hungry.most = 3
    with pytest.raises(ZeroDivisionError):
        seen.product(vectors(seen.space, 2), "hessian")
