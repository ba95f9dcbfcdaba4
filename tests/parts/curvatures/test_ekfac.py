"""EK-FAC against its formula in dense float64 algebra, where it is exact, and how near it is."""

import math

import pytest
import torch
from dattri_benchmarks.digits import read_digits
from dattri_parts.curvatures.diagonal import Diagonal
from dattri_parts.curvatures.ekfac import EKFAC
from dattri_parts.curvatures.factors import Factors, decompose
from dattri_parts.curvatures.kfac import KFAC
from dattri_parts.curvatures.spectrum import Kronecker
from dattri_parts.solvers.spectral import Spectral
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.kronecker import (
    block_diagonal,
    block_name,
    block_of,
    ekfac,
    empirical,
    factors_of,
    fisher,
    kfac,
    problem_of,
    rows_of_group,
    softmax_ggn,
)
from oracles.kronecker_nets import LAYERS, NETS, N, conv, labels, mlp, numbers, seeded
from oracles.toy_parts import FlatSketch
from oracles.toy_tasks import normal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dattri_core as dattri
from dattri_core import (
    CurvatureInverse,
    MemoryBudgetError,
    Method,
    NumericsError,
    OuterBlock,
    Rows,
    SpecError,
    Task,
)
from dattri_core.contract import contraction_limit
from dattri_core.testing import PeakMemory

NET_NAMES = sorted(NETS)


def dense(curvature, task, train, **options):
    problem = problem_of(task, train, **options)
    return curvature.fit(problem).dense(), problem.space


def near(got, want, tolerance=1e-11):
    gap = float((got - want).abs().max())
    assert gap <= tolerance * float(want.abs().max()), f"off by {gap:.3e}"


def exact_blocks(problem, kind="loss"):
    """Return the block diagonal of 1/n sum r r^T over the rows of a kind."""
    flat = torch.cat([rows.flat() for rows in problem.rows(kind=kind)])
    return block_diagonal(flat.T @ flat / problem.n_train, problem.space)


# --- the formula --------------------------------------------------------------------------------
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("net", NET_NAMES)
def test_eigenvalues_are_mean_squares_along_the_eigenvectors_of_the_factors(net, approximation):
    task, train = NETS[net]()
    curvature = EKFAC(fisher="empirical", approximation=approximation)
    matrix, space = dense(curvature, task, train)
    near(matrix, block_diagonal(matrix, space), 0)
    for layer in LAYERS[net]:
        if (layer, approximation) == ("first", "reduce"):
            continue  # two taps of its kernel see the same mean: a null space, any basis will do
        rows = factors_of(task, train, layer, empirical(task))
        reduce = approximation == "reduce" and layer != "embedding"
        near(block_of(matrix, space, layer), ekfac(rows, N, reduce=reduce), 1e-10)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_ggn_draws_nothing_and_sums_over_the_columns_of_the_criterion(net):
    task, train = NETS[net]()
    matrix, space = dense(EKFAC(fisher="ggn"), task, train)
    for layer in LAYERS[net]:
        rows = factors_of(task, train, layer, softmax_ggn(task))
        near(block_of(matrix, space, layer), ekfac(rows, N), 1e-10)


def test_many_draws_of_labels_come_to_the_ggn():
    task, train = mlp()
    want, _ = dense(EKFAC(fisher="ggn"), task, train)
    got, _ = dense(EKFAC(draws=64), task, train)
    one, _ = dense(EKFAC(), task, train)
    assert float((got - want).norm() / want.norm()) < 0.1
    assert float((one - want).norm() / want.norm()) > 0.1


@pytest.mark.parametrize("limit", [1, 2**28])
def test_slices_do_not_show(limit):
    task, train = conv()
    want, _ = dense(EKFAC(fisher="empirical"), task, train)
    with contraction_limit(limit):
        got, _ = dense(EKFAC(fisher="empirical"), task, train)
    near(got, want, 1e-12)


# --- grouped convolutions -------------------------------------------------------------------------
@pytest.mark.parametrize("fisher_kind", ["empirical", "ggn"])
@pytest.mark.parametrize(
    ("curvature", "oracle", "approximation"),
    [(EKFAC, ekfac, "expand"), (KFAC, kfac, "expand"), (KFAC, kfac, "reduce")],
)
@pytest.mark.parametrize("groups", [2, 4])
def test_each_group_of_a_convolution_has_its_own_factors(
    groups, curvature, oracle, approximation, fisher_kind
):
    task, train = conv(groups)
    part = curvature(fisher=fisher_kind, approximation=approximation)
    matrix, space = dense(part, task, train)
    functions = (empirical if fisher_kind == "empirical" else softmax_ggn)(task)
    reduce = {"reduce": True} if approximation == "reduce" else {}
    for layer, parts, bias in (("first", 2, True), ("second", groups, False)):
        assert space[block_name(space, layer)].kind == "grouped"
        rows = factors_of(task, train, layer, functions)
        each = [
            oracle(rows_of_group(rows, group, parts, bias), N, **reduce) for group in range(parts)
        ]
        near(block_of(matrix, space, layer), torch.block_diag(*each), 1e-10)


def test_scores_with_grouped_convolutions_are_those_of_the_dense_matrix():
    task, train = conv(4)
    options = {"fisher": "empirical", "damping": 0.1}
    scores = dattri.attribute(task, train, train, method="if-ekfac", **options).values
    problem = problem_of(task, train)
    matrix = EKFAC(fisher="empirical").fit(problem).dense()
    flat = torch.cat([rows.flat() for rows in problem.rows()])
    damped = matrix + 0.1 * torch.eye(len(matrix)).double()
    near(scores, flat @ torch.linalg.solve(damped, flat.T), 1e-10)


# --- where it is exact --------------------------------------------------------------------------
def test_exact_for_one_linear_layer_with_the_gaussian_fisher():
    """C_b = I for every b, so that the Fisher matrix is I (x) mean of x x^T."""
    task = Task(seeded(lambda: nn.Linear(4, 3)), loss="squared-error")
    train = (numbers(N, 4, seed=7), numbers(N, 3, seed=8))
    problem = problem_of(task, train)
    x = torch.cat([train[0], torch.ones(N, 1).double()], 1)
    want = torch.kron(torch.eye(3).double(), x.T @ x / N)
    curvature = EKFAC(fisher="ggn")
    near(curvature.fit(problem).dense(), want, 1e-12)
    inverse = CurvatureInverse(curvature, Spectral(damping=1e-2)).fit(problem)
    rows = next(iter(problem.rows()))
    damped = want + 1e-2 * torch.eye(15).double()
    near(inverse.apply(rows).flat(), torch.linalg.solve(damped, rows.flat().T).T, 1e-12)


def test_exact_where_the_block_is_a_kronecker_product():
    """Every input meets every residual: the Fisher matrix is mean e e^T (x) mean x x^T."""
    x, residual = numbers(5, 4, seed=1), numbers(4, 3, seed=2)
    task = Task(seeded(lambda: nn.Linear(4, 3)), loss="squared-error")
    inputs = x.repeat_interleave(4, 0)
    with torch.no_grad():
        targets = task.model(inputs) - residual.repeat(5, 1)
    matrix, _ = dense(EKFAC(fisher="empirical"), task, (inputs, targets))
    rows = factors_of(task, (inputs, targets), "", empirical(task))
    near(matrix, fisher(rows, 20), 1e-12)


def test_the_trace_is_that_of_the_block_exactly():
    for net in NET_NAMES:
        task, train = NETS[net]()
        problem = problem_of(task, train)
        matrix = EKFAC(fisher="empirical").fit(problem).dense()
        want = exact_blocks(problem)
        for offset, spec in zip(problem.space.offsets.values(), problem.space, strict=True):
            where = slice(offset, offset + spec.size)
            assert float(matrix[where, where].trace()) == pytest.approx(
                float(want[where, where].trace()), rel=1e-10
            )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_no_block_is_further_from_the_fisher_matrix_than_that_of_kfac(seed):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), seed)
    train = (numbers(N, 4, seed=seed), labels(3, N, seed=seed + 1))
    problem = problem_of(Task(model), train)
    want = exact_blocks(problem)
    for path in ("0", "2"):
        exact = block_of(want, problem.space, path)
        corrected = block_of(EKFAC(fisher="empirical").fit(problem).dense(), problem.space, path)
        plain = block_of(KFAC(fisher="empirical").fit(problem).dense(), problem.space, path)
        assert (corrected - exact).norm() <= (plain - exact).norm() * (1 + 1e-12)


# --- how near it is elsewhere -------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    """An MLP 64-16-10, 60 steps of Adam on 400 digits (loss about 0.1), and 60 test digits."""
    images, targets = read_digits()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(images).double().flatten(1)[order] / 16
    y = torch.as_tensor(targets).long()[order]
    train, test = (x[:400], y[:400]), (x[400:460], y[400:460])
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    problem = problem_of(Task(model), train, batch=100)
    blocks = {}
    problem.source.stream(test, "test", blocks.__setitem__)
    queries = Rows(problem.space, blocks, torch.arange(60))
    return problem, queries


def correlation(left, right):
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def test_scores_are_close_to_those_of_the_exact_blocks(digits):
    """The GGN's blocks, damping 0.1: at least 0.97; the identity has less than 0.92."""
    problem, queries = digits
    train = torch.cat([rows.flat() for rows in problem.rows()])
    exact = exact_blocks(problem, "ggn")
    found = {}
    for damping in (0.1, 0.01):
        damped = exact + damping * torch.eye(len(exact)).double()
        want = train @ torch.linalg.solve(damped, queries.flat().T)
        for curvature in (EKFAC, KFAC, Diagonal):
            operator = curvature(fisher="ggn").fit(problem)
            inverse = Spectral(damping=damping).solve_for(operator, problem.device)
            got = train @ inverse.apply(queries).flat().T
            found[curvature, damping] = correlation(got, want)
        found["identity", damping] = correlation(train @ queries.flat().T, want)
    assert found[EKFAC, 0.1] >= 0.97
    assert found["identity", 0.1] < 0.92
    assert found[EKFAC, 0.01] >= 0.9
    assert found["identity", 0.01] < 0.75
    for damping in (0.1, 0.01):
        assert found[EKFAC, damping] > found[KFAC, damping] > found[Diagonal, damping]


# --- invariance ---------------------------------------------------------------------------------
@pytest.mark.parametrize("fisher_kind", ["sampled", "empirical", "ggn"])
@pytest.mark.parametrize("net", NET_NAMES)
def test_neither_batches_nor_order_show(net, fisher_kind):
    task, train = NETS[net]()
    want, _ = dense(EKFAC(fisher=fisher_kind), task, train, batch=N)
    for batch in (1, 4):
        near(dense(EKFAC(fisher=fisher_kind), task, train, batch=batch)[0], want, 1e-9)
    if fisher_kind != "sampled":  # labels are drawn by the place of an example in the data
        turned = dattri.take(train, torch.arange(N).flip(0))
        near(dense(EKFAC(fisher=fisher_kind), task, turned)[0], want, 1e-9)


def test_scores_do_not_depend_on_memory():
    task, train = conv()
    options = {"method": "if-ekfac", "progress": False}
    wide = dattri.attribute(task, train, train, memory="1GiB", **options)
    narrow = dattri.attribute(task, train, train, memory="1MiB", **options)
    near(narrow.values, wide.values, 1e-9)


def test_float32_is_close_to_float64():
    task, train = mlp()
    want, _ = dense(EKFAC(fisher="empirical"), task, train)
    model = seeded(lambda: NETS["mlp"]()[0].model).float()
    problem = problem_of(Task(model), (train[0].float(), train[1]))
    operator = EKFAC(fisher="empirical").fit(problem)
    assert operator.dtype == torch.float32
    assert all(values.dtype == torch.float32 for values in operator.eigenvalues.values())
    near(operator.dense(), want, 1e-5)


# --- rows keep their factors --------------------------------------------------------------------
def test_the_basis_keeps_factors_and_its_adjoint_is_its_inverse():
    task, train = NETS["language"]()
    problem = problem_of(task, train)
    basis = EKFAC().fit(problem).basis
    rows = next(iter(problem.rows()))
    turned = basis.map(rows)
    assert turned.blocks["embedding.weight"].positions == rows.blocks["embedding.weight"].positions
    assert turned.blocks["embedding.weight"].inputs is rows.blocks["embedding.weight"].inputs
    near(basis.adjoint(turned).flat(), rows.flat(), 1e-12)
    near(turned.inner(turned), rows.inner(rows), 1e-12)
    assert turned.space != rows.space
    with pytest.raises(SpecError, match="eigenbasis: the spaces differ"):
        basis.map(turned)


@pytest.mark.parametrize("positions", [1, 2, 8, 12, 40, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 12), (12, 8), (3, 30)])
def test_rows_of_many_positions_are_formed_before_they_are_turned(positions, outputs, inputs):
    """Turned and formed in the fewest multiply-adds of the two orders, and then in fewer bytes."""
    left, right = normal(5, positions, outputs, seed=1), normal(5, positions, inputs, seed=2)
    block = OuterBlock(left, right)
    q_out, q_in = (torch.linalg.qr(normal(n, n, seed=n))[0] for n in (outputs, inputs))
    sides = Kronecker(q_out, q_in)

    def counted(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() // 2

    ways = [
        counted(lambda: OuterBlock(left @ q_out, right @ q_in).dense()),
        counted(lambda: block.dense().map(q_in.mT, q_out.mT)),
    ]
    assert counted(lambda: sides.turn(block).dense()) == min(ways)
    turned = sides.turn(block)
    near(turned.dense().values, q_out.mT @ block.dense().values @ q_in, 1e-12)
    near(sides.back(turned).dense().values, block.dense().values, 1e-12)
    assert turned.nbytes <= block.nbytes


# --- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_after_a_flat_sketch_it_is_refused_with_what_would_do(name):
    with pytest.raises(SpecError) as caught:
        Method(
            projector=FlatSketch(),
            inverse_hessian={"curvature": name, "solver": "spectral"},
        )
    message = str(caught.value)
    assert f"curvature {name!r}: needs blocks that keep the factors" in message
    assert "['sketch']" in message
    assert "stages=[{'inverse_hessian': ...}, {'projector': ...}]" in message
    assert "'keeps-factors'" in message
    assert "'diagonal'" in message
    # What the message offers does type-check.
    inverse = {"curvature": name, "solver": "spectral"}
    Method(stages=[{"inverse_hessian": inverse}, {"projector": FlatSketch()}])
    Method(projector=FlatSketch(), inverse_hessian={"curvature": "diagonal", "solver": "spectral"})


def test_rows_of_a_source_without_factors_are_refused_with_the_source_that_has_them():
    task, train = mlp()
    method = dattri.method("if-ekfac", source="functional")
    with pytest.raises(SpecError, match="take the source 'per-example'"):
        method.fit(task, train)


def test_ekfac_before_a_flat_sketch_is_a_method():
    """<P g, P (H + damping)^-1 h> against dense algebra."""
    task, train = mlp()
    method = Method(
        stages=[
            {
                "inverse_hessian": {
                    "curvature": {"name": "ekfac", "fisher": "empirical"},
                    "solver": {"name": "spectral", "damping": 0.1},
                }
            },
            {"projector": FlatSketch(7)},
        ]
    )
    scores = method.attribute(task, train, train)
    problem = problem_of(task, train)
    matrix = EKFAC(fisher="empirical").fit(problem).dense()
    flat = torch.cat([rows.flat() for rows in problem.rows()])
    stream = dattri.RandomStream(0, "projector", 0)
    sketch = FlatSketch(7).build(problem.space, stream=stream, device=problem.device).matrix
    solved = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix)).double(), flat.T).T
    near(scores.values, (flat @ sketch.T) @ (solved @ sketch.T).T, 1e-10)


def test_ekfac_on_both_sides_before_a_flat_sketch_is_a_method():
    """<P R g, P R h>, R = (H + damping)^-1/2, against dense algebra."""
    task, train = mlp()
    inverse = {
        "curvature": {"name": "ekfac", "fisher": "empirical"},
        "solver": {"name": "spectral", "damping": 0.1},
        "form": "two-sided",
    }
    method = Method(stages=[{"inverse_hessian": inverse}, {"projector": FlatSketch(7)}])
    scores = method.attribute(task, train, train)
    problem = problem_of(task, train)
    matrix = EKFAC(fisher="empirical").fit(problem).dense()
    values, vectors = torch.linalg.eigh(matrix + 0.1 * torch.eye(len(matrix)).double())
    root = (vectors * values.rsqrt()) @ vectors.T
    stream = dattri.RandomStream(0, "projector", 0)
    sketch = FlatSketch(7).build(problem.space, stream=stream, device=problem.device).matrix
    flat = torch.cat([rows.flat() for rows in problem.rows()]) @ root @ sketch.T
    near(scores.values, flat @ flat.T, 1e-10)


def test_factors_that_do_not_fit_are_refused_by_bytes_before_the_pass(monkeypatch):
    task, train = mlp()
    # Factors of 4 x 4 and 6 x 6, 3 x 3 and 5 x 5, eigenvalues of 4 x 6 and 3 x 5, in float64.
    with pytest.raises(
        MemoryBudgetError, match=r"'ekfac': factors and eigenvalues need 1000 B.*999 B may be used"
    ):
        EKFAC().fit(problem_of(task, train, memory=999))
    # To decompose the one of 6 x 6: a copy, its eigenvectors and LAPACK's workspace of 2 n^2,
    # within twice the memory, since there are no queries yet.
    need = 1000 + 4 * 8 * 6**2
    EKFAC().fit(problem_of(task, train, memory=need // 2))
    with pytest.raises(
        MemoryBudgetError, match=r"the decomposition of the largest factor need 2.1 KiB.*used"
    ):
        EKFAC().fit(problem_of(task, train, memory=need // 2 - 1))
    monkeypatch.setattr("dattri_parts.curvatures.uncovered.free_bytes", lambda device: 400)
    with pytest.raises(MemoryBudgetError, match=r"'0' 30\d B.*400 B are free.*Task\(parameters"):
        EKFAC().gives(problem_of(task, train).space)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.full((3, 3), math.nan), "output factor of block 'fc': not finite"),
        (torch.tensor([[1.0, 0.5], [0.1, 1.0]]), "output factor of block 'fc': not symmetric"),
        (torch.diag(torch.tensor([1.0, -0.5])), "smallest eigenvalue is -0.5"),
    ],
)
def test_a_factor_that_cannot_be_decomposed_names_its_block(factor, message):
    good = torch.eye(4)
    with pytest.raises(NumericsError, match=message):
        decompose(Factors(factor, good, 5), "fc")
    with pytest.raises(NumericsError, match=message.replace("output", "input")):
        decompose(Factors(good, factor, 5), "fc")


def test_a_decomposition_holds_two_matrices():
    size = 1500
    factor = torch.randn(size, size)
    factor = factor @ factor.T
    with PeakMemory() as tracked:
        vectors = decompose(Factors(factor, torch.ones(3), 5), "fc").sides.outputs
    # In float64, as it is read and as eigenvectors; what LAPACK takes for itself does not show.
    assert tracked.peak < 2 * 8 * size**2 + 20_000
    turned = vectors.double().T @ factor.double() @ vectors.double()
    values = torch.linalg.eigvalsh(factor.double())
    near(turned, torch.diag(values), 1e-5)


def test_a_failed_decomposition_names_its_block(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(NumericsError, match=r"output factor of block 'fc': its eigenvectors, 4 x"):
        decompose(Factors(torch.eye(4), torch.ones(3), 5), "fc")


def test_singular_factors_and_dead_layers_are_no_error():
    """Fewer examples than inputs, and a layer that the loss does not reach."""

    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(30, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    task = Task(seeded(Dead))
    train = (numbers(N, 30, seed=1), labels(3, N, seed=2))
    scores = dattri.attribute(task, train, train, method="if-ekfac")
    assert bool(torch.isfinite(scores.values).all())
    only = Task(task.model, parameters="used.*")
    near(scores.values, dattri.attribute(only, train, train, method="if-ekfac").values, 1e-10)
