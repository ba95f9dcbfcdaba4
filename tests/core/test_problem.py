"""The train set as a curvature sees it: rows and products against dense algebra."""

import weakref

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.toy_parts import FlatSketch
from oracles.toy_tasks import dense_hessian, flat_gradients, positions, world

import dattri_core as dattri
from dattri_core import InputError, Loss, MemoryBudgetError, Rows, SpecError, Task
from dattri_core.assemble import build_part
from dattri_core.batch import batch_size, take
from dattri_core.laws.oracles import ggn, hessian, row_matrix
from dattri_core.laws.worlds import worlds as laws_worlds
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


# --- rows of drawn labels and of the GGN --------------------------------------------------------
def squared(parts, n):
    """Return the sum of outer products of all rows over n, ``[d, d]``."""
    flat = Rows.concatenate(list(parts)).flat()
    return flat.T @ flat / n


WORLDS = {w.name: w for w in laws_worlds()}


def problem_in(name, source, **settings):
    toy = WORLDS[name]
    task = toy.task()
    return task, toy.train, problem(task, toy.train, source=source, **settings)


@pytest.mark.parametrize("source", ["per-example", "functional"])
@pytest.mark.parametrize("name", sorted(WORLDS))
@pytest.mark.parametrize("generic", [False, True])
def test_ggn_rows_are_a_square_root_of_the_ggn(name, source, generic):
    task, train, seen = problem_in(name, source)
    if generic:
        task.loss = evolve(task.loss, factor=None)
    parts = list(seen.rows(kind="ggn"))
    n = batch_size(train)
    dense = ggn(task, seen.space, train)
    assert close(squared(parts, n), dense, 1e-10)
    index = torch.cat([part.index for part in parts])
    assert torch.equal(index, index.sort().values)  # example after example
    counted = {"regression": [2] * n, "logistic": [2] * n, "network": [2] * n}
    want = counted.get(name, [10 if i % 2 == 0 else 15 for i in range(n)])
    assert index.bincount().tolist() == want
    assert all(len(part) <= seen.batch for part in parts)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 12),
    memory=st.sampled_from([2**12, 2**14, 2**28]),
    kind=st.sampled_from(["fisher", "ggn"]),
    name=st.sampled_from(["language", "network"]),
)
def test_rows_of_any_kind_do_not_depend_on_how_they_are_read(batch, memory, kind, name):
    memory = max(memory, 2**13)  # one factor of the language model
    _, _, first = problem_in(name, "per-example", batch=5)
    _, _, second = problem_in(name, "per-example", batch=batch, memory=memory)
    want = Rows.concatenate(list(first.rows(kind=kind, draw=3)))
    got = Rows.concatenate(list(second.rows(kind=kind, draw=3)))
    assert torch.equal(got.index, want.index)
    assert close(got.flat(), want.flat(), 1e-10)
    order = torch.tensor([6, 1, 8, 1])
    some = Rows.concatenate(list(second.rows(order, kind=kind, draw=3)))
    at = torch.cat([(want.index == i).nonzero().flatten() for i in order])
    assert torch.equal(some.index, want.index[at])
    assert close(some.flat(), want.flat()[at], 1e-10)


def test_labels_are_drawn_anew_for_each_draw_seed_and_checkpoint():
    _, _, seen = problem_in("network", "per-example")

    def rows(draw=0, **key):
        seen.random = evolve(RandomStream(0, "curvature"), **key)
        return torch.cat([part.flat() for part in seen.rows(kind="fisher", draw=draw)])

    torch.manual_seed(0)
    first = rows()
    torch.manual_seed(1)
    assert torch.equal(rows(), first)
    for other in (rows(draw=1), rows(seed=1), rows(checkpoint=1)):
        assert not close(other, first, 1e-3)


def test_a_loss_that_draws_twice_gets_other_numbers_in_any_batch():
    seen = []

    def sample(outputs, batch, draw):
        seen.append(torch.cat([draw(5), draw(5)], dim=1))
        return dattri.cross_entropy.sample(outputs, batch, draw)

    for batch in (N, 2):
        task, train, _ = world(n_train=N, loss=evolve(dattri.cross_entropy, sample=sample))
        list(problem(task, train, batch=batch).rows(kind="fisher"))
    whole, parts = seen[0], torch.cat(seen[1:])
    assert torch.equal(whole, parts)
    assert len(whole.unique()) == whole.numel() == 10 * N


def test_fisher_rows_are_gradients_at_labels_of_the_model():
    task, train, seen = problem_in("network", "per-example")
    space = seen.space
    every = torch.stack(
        [row_matrix(task, space, (train[0], torch.full_like(train[1], k))) for k in range(3)]
    )  # [label, example, d]
    p = task.model(train[0]).softmax(1).detach()
    exact = torch.einsum("nk,kni,knj->ij", p, every, every) / len(p)
    assert close(exact, ggn(task, space, train), 1e-10)  # the expectation is the GGN
    counts = torch.zeros_like(p)
    draws = 300
    for draw in range(draws):
        rows = torch.cat([part.flat() for part in seen.rows(kind="fisher", draw=draw)])
        off = (rows - every).abs().amax(2)  # [label, example]
        assert off.amin(0).max() < 1e-12  # one of the labels, nothing else
        counts[torch.arange(len(p)), off.argmin(0)] += 1
    spread = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 4.5 * spread).all()


@pytest.mark.parametrize("name", ["regression", "logistic", "language"])
def test_many_fisher_rows_average_to_the_ggn(name):
    task, train, seen = problem_in(name, "functional", batch=9)
    draws = 400
    total, square = 0.0, 0.0
    for draw in range(draws):
        one = squared(seen.rows(kind="fisher", draw=draw), batch_size(train))
        total, square = total + one / draws, square + one.square() / draws
    error = (square - total.square()).clamp_min(0).sqrt() / draws**0.5
    off = (total - ggn(task, seen.space, train)).abs()
    assert (off <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("kind", ["loss", "fisher", "ggn"])
@pytest.mark.parametrize("sketches", [[], [FlatSketch()]])
def test_a_stream_gives_the_same_rows_block_by_block(kind, sketches):
    _, _, seen = problem_in("network", "per-example", sketches=sketches)
    index = torch.tensor([3, 0, 8, 5, 7, 3])
    parts, names = {}, []

    def sink(name, block, positions):
        names.append(name)
        parts.setdefault(name, []).append((block.flat(), positions))

    seen.stream(sink, kind=kind, draw=2, index=index)
    want = Rows.concatenate(list(seen.rows(index, kind=kind, draw=2)))
    assert set(parts) == set(seen.space.names)
    for name, found in parts.items():
        assert torch.equal(torch.cat([positions for _, positions in found]), want.index)
        assert close(torch.cat([flat for flat, _ in found]), want.blocks[name].flat())
    if not sketches:
        assert names[: len(parts)] != list(seen.space.names)  # in the order of the backward pass


def test_a_stream_holds_one_block_at_a_time():
    _, _, seen = problem_in("network", "per-example")
    alive = []

    def sink(name, block, index):
        assert not [r for r in alive if r() is not None]
        alive.append(weakref.ref(block))

    seen.stream(sink, kind="fisher")
    assert len(alive) == 3 * len(seen.space)


def test_the_ggn_of_chosen_examples_has_their_rows_only():
    task, train, seen = problem_in("logistic", "per-example")
    index = torch.tensor([4, 4, 1])
    dense = ggn(task, seen.space, take(train, index))
    assert close(squared(seen.rows(index, kind="ggn"), 3), dense, 1e-10)
    assert list(seen.rows(index[:0], kind="ggn")) == []


def test_an_example_whose_labels_are_all_ignored_has_no_ggn_row():
    toy = WORLDS["language"]
    labels = toy.train["labels"].clone()
    labels[2] = -100
    seen = problem(toy.task(), {**toy.train, "labels": labels})
    index = torch.cat([part.index for part in seen.rows(kind="ggn")])
    assert 2 not in index
    rows = Rows.concatenate(list(seen.rows(kind="fisher"))).flat()
    assert not rows[2].any()
    assert rows[1].any()


def test_kinds_that_the_loss_cannot_give_are_refused_before_anything_is_read():
    task, train, _ = world(loss=lambda model, batch: model(batch[0]).square().sum(1))
    seen = problem(task, train)
    for kind in ("fisher", "ggn"):
        with pytest.raises(SpecError, match=rf"kind '{kind}'.*apart.*dattri.Loss\("):
            seen.rows(kind=kind)
    task, train, _ = world(loss=evolve(dattri.cross_entropy, sample=None))
    with pytest.raises(SpecError, match=r"how a label is drawn.*sample="):
        problem(task, train).stream(None, kind="fisher")
    with pytest.raises(SpecError, match=r"no kind 'fischer'.*'fisher'"):
        problem(task, train).rows(kind="fischer")


def test_a_source_without_pull_gives_rows_of_the_loss_only():
    task, train, _ = world()
    seen = problem(task, train)
    bound = seen.source

    class Plain:
        space, evaluator, stream = bound.space, bound.evaluator, bound.stream

    seen.source = Plain()
    assert len(list(seen.rows())) == 4
    with pytest.raises(SpecError, match=r"the source Plain gives rows of the loss only; use"):
        seen.rows(kind="ggn")


def test_a_factor_that_exceeds_the_budget_is_refused():
    _, _, seen = problem_in("language", "per-example", memory=4000)
    with pytest.raises(MemoryBudgetError, match=r"24 outputs.*4\.5 KiB.*'fisher' rows"):
        next(seen.rows(kind="ggn"))


def test_a_factor_or_sample_of_another_shape_is_refused():
    short = evolve(dattri.cross_entropy, factor=lambda out, _: out[:, :1], sample=lambda *_: 0)
    task, train, _ = world(loss=short)
    with pytest.raises(InputError, match=r"factor of the loss.*expected \[K, \*outputs.shape\]"):
        next(problem(task, train).rows(kind="ggn"))
    task, train, _ = world(loss=evolve(short, sample=lambda out, *_: out[:, :1]))
    with pytest.raises(InputError, match=r"sample of the loss.*\(4, 1\).*\(4, 3\)"):
        next(problem(task, train).rows(kind="fisher"))


# --- products -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("batch", [1, 2, 13])
def test_products_of_chosen_examples_are_their_mean(kind, batch):
    task, train, _ = world(n_train=N)
    index = torch.tensor([7, 0, 7, 12, 3])
    seen = problem(task, train, batch=batch, sketches=[FlatSketch(9)])
    p = seen.maps[0].matrix
    dense = {"hessian": hessian, "ggn": ggn}[kind](task, seen.source.space, take(train, index))
    given_vectors = vectors(seen.space, 3)
    got = seen.product(given_vectors, kind, index).flat()
    assert close(got, given_vectors.flat() @ (p @ dense @ p.T), 1e-10)
    with pytest.raises(SpecError, match="index names no example"):
        seen.product(given_vectors, kind, index[:0])


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
@pytest.mark.parametrize(("memory", "reads"), [(2**28, 1), (2**10, 3)])
def test_products_with_one_vector_read_the_data_once_where_their_graphs_fit(
    monkeypatch, kind, memory, reads
):
    task, train, _ = world(n_train=N)
    seen = problem(task, train, batch=5, memory=memory)
    dense = {"hessian": hessian, "ggn": ggn}[kind](task, seen.space, train)
    read, whole = [], Examples.batches
    monkeypatch.setattr(Examples, "batches", lambda *given: read.append(1) or whole(*given))
    for seed in range(3):
        vector = vectors(seen.space, 1, seed)
        assert close(seen.product(vector, kind).flat(), vector.flat() @ dense, 1e-10)
    assert len(read) == 1 + reads  # the first reads an example, to see its size


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
@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_that_runs_out_of_memory_is_halved(kind, most, count):
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100)
    task = hungry.task(plain.model)
    seen = problem(task, train, batch=N)
    hungry.most = most
    want = problem(plain, train).product(vectors(seen.space, count), kind).flat()
    got = seen.product(vectors(seen.space, count), kind).flat()
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


@pytest.mark.parametrize("kind", ["loss", "fisher", "ggn"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_of_rows_that_runs_out_of_memory_is_halved(kind, streamed):
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100)
    loss = evolve(dattri.cross_entropy, forward=hungry)
    seen = problem(Task(plain.model, loss), train, batch=8)
    want = Rows.concatenate(list(seen.rows(kind=kind)))
    hungry.most = 3 if kind != "ggn" else 4  # 4 examples: what is read at once for their columns
    seen.memory, hungry.sizes = (2**14 if kind != "ggn" else 4 * 9 * 8 * 8), []
    if streamed:
        parts = {}
        seen.stream(lambda n, b, _: parts.setdefault(n, []).append(b.flat()), kind=kind)
        got = torch.cat([torch.cat(parts[name]) for name in seen.space.names], 1)
    else:
        got = Rows.concatenate(list(seen.rows(kind=kind))).flat()
    assert close(got, want.flat(), 1e-12)
    assert max(hungry.sizes) == 8
    hungry.most = 0
    with pytest.raises(MemoryBudgetError, match=r"train rows: out of memory with a single"):
        list(seen.rows(kind="fisher"))


def test_a_stream_that_runs_out_of_memory_half_way_says_so():
    task, train, _ = world(n_train=N)
    seen = problem(task, train)

    def sink(name, block, index):
        if name != "2":
            raise MemoryError("no more")

    with pytest.raises(MemoryBudgetError, match=r"after the blocks .*'2'.* of 4 rows were handed"):
        seen.stream(sink)


def test_other_errors_pass_through_unchanged():
    plain, train, _ = world(n_train=N)
    hungry = Hungry(100, ZeroDivisionError)
    seen = problem(hungry.task(plain.model), train)
    hungry.most = 3
    with pytest.raises(ZeroDivisionError):
        seen.product(vectors(seen.space, 2), "hessian")


def test_products_of_one_vector_are_passes_on_one_graph_of_all_examples():
    task, train, _ = world(n_train=N)
    made = problem(task, train, batch=3)
    one, dense = vectors(made.space, 1), hessian(task, made.space, train)
    assert close(made.product(one, "hessian").flat(), one.flat() @ dense, 1e-10)
    assert [len(graphs) for graphs in made._recordings.values()] == [1]
