"""Test rows cut to a low rank: the best one for each layer, and scores that hardly change."""

import pytest
import torch
from dattri_parts.inverse_hessians.low_rank import LowRank, cut
from oracles.toy_tasks import examples, mlp, normal, world
from scipy.stats import spearmanr
from torch import nn

import dattri_core as dattri
from dattri_core import DenseBlock, Method, OuterBlock, SpecError, Task
from dattri_core.testing import PeakMemory, network

EKFAC = {"curvature": "ekfac", "solver": {"name": "spectral", "damping": {"relative": 0.1}}}


def low(rank, inner="identity", **fields):
    return {"name": "low-rank", "rank": rank, "inner": inner, **fields}


def decaying(count, outputs, inputs, rate=0.7, seed=0):
    """Return matrices with singular values rate^k."""
    left, _ = torch.linalg.qr(normal(count, outputs, min(outputs, inputs), seed=seed))
    right, _ = torch.linalg.qr(normal(count, inputs, min(outputs, inputs), seed=seed + 1))
    values = rate ** torch.arange(left.shape[-1]).double()
    return left * values @ right.mT


def random_vectors(inputs, rank):
    return normal(inputs, rank + 8, seed=7)


# --- the cut itself -------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (64, 24)])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_cut_is_as_near_as_the_best_of_its_rank(shape, rank):
    """|G - cut| against the singular values that any matrix of rank r must leave."""
    matrices = decaying(5, *shape)
    left, right = cut(DenseBlock(matrices), random_vectors(shape[1], rank), rank)
    assert left.shape == (5, shape[0], rank)
    assert right.shape == (5, rank, shape[1])
    gap = torch.linalg.matrix_norm(matrices - left @ right)
    best = torch.linalg.svdvals(matrices)[:, rank:].norm(dim=1)
    assert (gap <= 1.0001 * best).all()
    assert (gap >= 0.9999 * best).all()


@pytest.mark.parametrize("rank", [2, 6])
def test_rows_of_a_rank_are_found_exactly(rank):
    matrices = normal(4, 20, rank, seed=1) @ normal(4, rank, 30, seed=2)
    left, right = cut(DenseBlock(matrices), random_vectors(30, rank), rank)
    assert (left @ right - matrices).abs().max() < 1e-12


def test_factors_are_cut_as_the_row_that_they_make():
    factored = OuterBlock(normal(4, 15, 20, seed=1), normal(4, 15, 30, seed=2))
    vectors = random_vectors(30, 5)
    one, other = (
        left @ right
        for left, right in (cut(factored, vectors, 5), cut(factored.dense(), vectors, 5))
    )
    assert (one - other).abs().max() < 1e-10
    best = torch.linalg.svdvals(factored.dense().values)[:, 5:].norm(dim=1)
    assert (torch.linalg.matrix_norm(one - factored.dense().values) <= 1.02 * best).all()


def test_a_row_of_zeros_stays_one():
    left, right = cut(DenseBlock(torch.zeros(2, 20, 30).double()), random_vectors(30, 3), 3)
    assert not (left @ right).any()


# --- in a method ----------------------------------------------------------------------------------
def wide_world(n=12, m=6):
    task = Task(mlp((40, 48, 3)))
    return task, examples(n, inputs=40), examples(m, inputs=40, seed=300)


def test_what_a_cut_would_not_make_smaller_stays_as_it_is():
    """Rows of one position, layers as narrow as the rank, and blocks that are no matrices."""
    task, train, test = wide_world()
    want = dattri.attribute(task, train, test, method="grad-dot").values
    got = Method(inverse_hessian=low(1)).attribute(task, train, test).values
    assert torch.equal(got, want)
    made = network()
    for inner in ("identity", EKFAC):
        want = Method(inverse_hessian=inner).attribute(made.task(), made.train, made.test)
        got = Method(inverse_hessian=low(5, inner)).attribute(made.task(), made.train, made.test)
        assert (got.values - want.values).abs().max() < 1e-12 * want.values.abs().max()


def test_a_cut_of_inverted_rows_is_that_of_their_matrices():
    """<g, sum over layers of the best approximation of rank r of A h> by dense algebra."""
    from oracles.toy_parts import Gram, inverse

    task, train, test = wide_world()
    whole = Method(inverse_hessian=inverse(Gram(), 0.1)).fit(task, train, progress=False)
    rows = {}
    chain = whole._held.chain
    for role, batch in (("train", train), ("test", test)):
        blocks = {}
        chain.source.stream(batch, role, blocks.__setitem__)
        rows[role] = dattri.Rows(chain.source.space, blocks, torch.arange(len(batch[1])))
    solved = chain.test(rows["test"])
    want = torch.zeros(len(train[1]), len(test[1]), dtype=torch.float64)
    for name, block in solved.blocks.items():
        matrices = block.dense().values
        if min(matrices.shape[1:]) > 4:
            u, s, v = torch.linalg.svd(matrices, full_matrices=False)
            matrices = u[..., :4] * s[:, None, :4] @ v[:, :4]
        want += rows["train"].blocks[name].flat() @ matrices.flatten(1).T
    got = Method(inverse_hessian=low(4, inverse(Gram(), 0.1))).attribute(task, train, test)
    assert (got.values - want).abs().max() < 1e-3 * want.abs().max()
    share = got.provenance["solver"][0]["captured"]
    assert 0.5 < share < 1


def test_the_eigenbasis_of_the_inverse_does_not_show():
    """A rotation changes no singular value: both sides may be in the basis."""
    from oracles.routes import costs_seen, taking

    task, train, test = wide_world()
    method = Method(inverse_hessian=low(4, EKFAC))

    def scores():
        return method.attribute(task, train, test, progress=False).values

    want = scores()
    routes = costs_seen(scores).choices
    assert {route.split for route in routes} == {False, True}
    for choice in range(1, len(routes) + 1):
        with taking(choice, 1, query_group=2, groups=3, train_batch=5, test_batch=1):
            assert (scores() - want).abs().max() < 1e-6 * want.abs().max()


class Attention(nn.Module):
    """One block of a decoder, pre-norm."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, words=32, width=32, length=24, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(layers)))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1])
        return self.head(self.blocks(self.tokens(input_ids) + self.places(places)))


def sequences(count, seed, words=32, length=24):
    """Return sequences of a fixed Markov chain, so that there is something to learn."""
    chain = torch.softmax(2 * normal(words, words, seed=5), -1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (count, 1), generator=generator)
    for _ in range(length - 1):
        step = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, step], 1)
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer()
    train = sequences(60, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        logits = model(train["input_ids"])[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, train["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Task(model, loss="causal-lm"), train, sequences(20, 3)


def test_scores_of_a_transformer_hardly_change_at_half_its_positions(trained):
    """24 positions, rank 16: Spearman's correlation with the exact scores of each query."""
    task, train, test = trained
    exact = Method(inverse_hessian=EKFAC).attribute(task, train, test, progress=False)
    ranks = {}
    for rank in (2, 16):
        method = Method(inverse_hessian=low(rank, EKFAC))
        got = method.attribute(task, train, test, progress=False)
        pairs = zip(got.values.T, exact.values.T, strict=True)
        ranks[rank] = [float(spearmanr(left, right)[0]) for left, right in pairs]
        captured = got.provenance["solver"][0]["captured"]
        assert captured > (0.9 if rank == 16 else 0.2)
    assert sum(ranks[16]) / 20 > 0.98
    assert sum(ranks[2]) < sum(ranks[16]) - 1


def test_batches_and_budgets_do_not_show(trained):
    task, train, test = trained
    method = Method(inverse_hessian=low(8, EKFAC))
    want = method.attribute(task, train, test, progress=False).values
    for memory in ("4MiB", "64MiB"):
        got = method.attribute(task, train, test, memory=memory, progress=False).values
        assert (got - want).abs().max() < 2e-3 * want.abs().max()


def test_queries_are_kept_as_factors(trained):
    task, train, test = trained
    plain = Method(inverse_hessian=EKFAC).fit(task, train, progress=False)
    thin = Method(inverse_hessian=low(2, EKFAC)).fit(task, train, progress=False)
    kept = [fitted._held.outline.costs().routes[0].kept for fitted in (plain, thin)]
    space = plain._held.chain.space
    assert kept[0] == 4 * space.dim
    want = sum(2 * sum(spec.shape) if spec.kind == "outer" else spec.size for spec in space)
    assert kept[1] == 4 * want
    peaks = []
    for fitted in (plain, thin):
        with PeakMemory() as tracked:
            fitted.attribute(test)
        peaks.append(tracked.peak)
    assert peaks[1] < peaks[0]


def test_a_plan_before_the_fit_is_that_of_the_run(trained):
    task, train, test = trained
    method = Method(inverse_hessian=low(4, EKFAC))
    plan = method.attribute(task, train, test, memory="8MiB", dry_run=True)
    fitted = method.fit(task, train, memory="8MiB", progress=False)
    from oracles.routes import costs_seen

    costs = costs_seen(lambda: fitted.attribute(test))
    assert plan.route in costs.routes


def test_another_damping_or_scorer_reuses_the_fit_and_another_rank_does_not(trained):
    task, train, test = trained
    fitted = Method(inverse_hessian=low(8, EKFAC)).fit(task, train, progress=False)
    assert fitted.with_(damping=0.1)._held is not None
    assert fitted.with_(scorer="cosine")._held is not None
    assert fitted.with_(rank=4)._held is None
    swept = fitted.sweep(test, damping=[0.01, {"relative": 0.1}])
    want = fitted.attribute(test).values
    last = list(swept.values())[-1].values
    assert (last - want).abs().max() < 1e-3 * want.abs().max()


def test_a_rank_of_none_and_an_inverse_of_both_sides_are_refused():
    with pytest.raises((SpecError, ValueError)):
        LowRank(rank=0)
    for inner in (
        {**EKFAC, "form": "two-sided"},
        {"curvature": "ggn", "solver": {"name": "arnoldi", "reduced": True}},
    ):
        with pytest.raises(SpecError, match="acts on train rows too, or leaves a few numbers"):
            Method(inverse_hessian=low(4, inner))


def test_a_spec_says_what_was_cut():
    method = Method(inverse_hessian=low(4, EKFAC))
    spec = method.to_spec()["inverse_hessian"]
    assert spec["name"] == "low-rank"
    assert spec["rank"] == 4
    assert spec["inner"]["curvature"] == "ekfac"
    assert Method(**method.to_spec()) == method
    task, train, test = world(9, 5)
    assert method.attribute(task, train, test).provenance["method"]["inverse_hessian"] == spec
