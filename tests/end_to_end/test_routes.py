"""Whatever route the test rows take to the train rows, the scores are the same."""

import warnings

import pytest
import torch
from oracles.routes import MANY, SMALL, costs_seen, taking
from oracles.toy_parts import FlatSketch, Gram, inverse
from oracles.toy_tasks import mlp, normal

import dattri_core as dattri
from dattri_core import BilinearScorer, Method, Task
from dattri_core.testing import PeakMemory, language, network

EKFAC = {"curvature": "ekfac", "solver": {"name": "spectral", "damping": 0.1}}
METHODS = {
    "grad-dot": lambda: dattri.method("grad-dot"),
    "grad-cos": lambda: dattri.method("grad-cos"),
    "ekfac": lambda: dattri.method("if-ekfac", damping=0.1),
    "ekfac, relative": lambda: dattri.method("if-ekfac", damping={"relative": 0.3}),
    "ekfac, cosine": lambda: dattri.method("if-ekfac", damping=0.1, scorer="cosine"),
    "ekfac, relatif": lambda: dattri.method("if-ekfac", damping=0.1, scorer="relatif"),
    "kfac, drop": lambda: dattri.method("if-kfac", damping=0.1, uncovered="drop", scorer="cosine"),
    "diagonal": lambda: dattri.method("if-diagonal", damping=0.1),
    "ekfac, sketch": lambda: Method(stages=[{"inverse_hessian": EKFAC}, FlatSketch(9)]),
    "gram, ekfac": lambda: Method(stages=[inverse(Gram(), 0.1), {"inverse_hessian": EKFAC}]),
    "sketch, block": lambda: Method(
        projector=FlatSketch(9),
        inverse_hessian={
            "curvature": "gauss-newton",
            "solver": {"name": "spectral", "damping": 0.1},
        },
    ),
    "ekfac, distance": lambda: Method(inverse_hessian=EKFAC, scorer="negative-distance"),
    "two-sided": lambda: Method(inverse_hessian={**EKFAC, "form": "two-sided"}),
    "block woodbury": lambda: Method(
        inverse_hessian={
            "curvature": {"name": "gauss-newton", "block": True},
            "solver": {"name": "woodbury", "damping": 0.1},
        }
    ),
}
BY_NAME = pytest.mark.parametrize("name", METHODS)
WORLDS = {"network": network(), "language": language()}


def scores(name, world, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = METHODS[name]().attribute(
            world.task(), world.train, world.test, progress=False, **settings
        )
    return found.values


def close(left, right, tolerance=1e-9):
    return (left - right).abs().max() <= tolerance * right.abs().max()


@BY_NAME
@pytest.mark.parametrize("world", WORLDS)
def test_no_route_shows(name, world):
    """Resident, deferred, in the basis of the inverse, off the device; whole and in pieces."""
    world = WORLDS[world]
    want = scores(name, world)
    count = len(costs_seen(lambda: scores(name, world)).choices)
    for choice in range(1, count + 1):
        for slab, sizes in ((2**20, {}), (1, SMALL), (2**20, MANY)):
            with taking(choice, slab, **sizes) as taken:
                got = scores(name, world)
            assert taken
            assert close(got, want), (taken[0], sizes)


def test_only_inner_products_let_either_side_take_a_step():
    """A distance does not: the routes above hold it to rows after all stages."""
    make = dattri.default_registry().make
    inner, distance = make("scorer", "dot"), make("scorer", "negative-distance")
    assert isinstance(inner, BilinearScorer)
    assert inner.bilinear
    assert not isinstance(distance, BilinearScorer)


def test_the_routes_that_there_are():
    """Blockwise test sides can wait, spectra can be split; a flat sketch leaves no block behind."""

    def routes(name, world="network"):
        costs = costs_seen(lambda: scores(name, WORLDS[world]))
        return {(route.deferred, route.split) for route in costs.routes}

    every = {(False, False), (True, False), (False, True), (True, True)}
    assert routes("ekfac") == routes("diagonal") == every
    assert routes("gram, ekfac") == {(False, False), (False, True)}
    assert routes("kfac, drop") == {(False, False), (True, False)}
    assert routes("ekfac, sketch") == {(False, False)}
    assert routes("sketch, block") == {(False, False), (False, True)}
    assert routes("two-sided") == {(False, False), (True, False)}
    # Factors of four tokens are larger than the layers of the tiny language model.
    assert routes("ekfac", "language") == {(False, False), (False, True)}


# --- memory ---------------------------------------------------------------------------------------
MIB = 2**20
WIDTH, DEPTH, QUERIES = 96, 8, 64


def deep_task():
    return Task(mlp((WIDTH,) * DEPTH + (10,), dtype=torch.float32))


def wide(count, seed):
    return normal(count, WIDTH, seed=seed).float(), torch.arange(count) % 10


LAYER = QUERIES * WIDTH * (WIDTH + 1) * 4  # the queries of one layer, formed: 2.4 MB


def peak_of_scoring(method, choice, slab):
    """Return the bytes alive at most while fitted queries are made and meet the train rows."""
    fitted = method.fit(deep_task(), wide(128, 1), memory="1GiB", progress=False)
    sizes = {"train_batch": 16, "test_batch": 16, "query_group": QUERIES, "groups": 1}
    with taking(choice, slab, **sizes) as taken, PeakMemory() as tracked:
        fitted.attribute(wide(QUERIES, 2))
    return taken[0], tracked.peak


@pytest.mark.parametrize("scorer", ["dot", "cosine", "relatif"])
@pytest.mark.parametrize("choice", [2, 4])
def test_deferred_queries_never_hold_more_than_one_layer_of_formed_queries(choice, scorer):
    method = dattri.method("if-ekfac", damping=0.1, scorer=scorer)
    route, peak = peak_of_scoring(method, choice, slab=4 * LAYER)
    assert route.deferred
    factors = QUERIES * DEPTH * 2 * WIDTH * 4
    assert peak < factors + 4 * LAYER + 2 * MIB
    _, formed = peak_of_scoring(method, 1, slab=4 * LAYER)
    assert formed > DEPTH * 0.9 * LAYER  # what is saved


def test_a_slab_bounds_what_is_expanded_within_a_layer():
    method = dattri.method("if-ekfac", damping=0.1)
    _, large = peak_of_scoring(method, 2, slab=4 * LAYER)
    _, small = peak_of_scoring(method, 2, slab=LAYER // 4)
    assert small < LAYER < large


@pytest.mark.parametrize("memory", [4, 6, 16])
@pytest.mark.parametrize("method", ["if-ekfac", "grad-dot", "grad-cos"])
def test_many_queries_keep_to_the_budget(method, memory):
    """300 queries of 560 kB each are 170 MB when all are formed."""
    made = dattri.method(method)
    fitted = made.fit(deep_task(), wide(60, 1), memory=f"{memory}MiB", progress=False)
    with PeakMemory() as tracked:
        fitted.attribute(wide(300, 2))
    assert tracked.peak < memory * MIB


class Tokens(torch.nn.Module):
    """An embedding and two layers over 16 positions: some products gather, some are formed."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(128, 96)
        self.hidden = torch.nn.Linear(96, 288)
        self.head = torch.nn.Linear(288, 128)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.hidden(self.words(input_ids))))


@pytest.mark.parametrize("method", ["if-ekfac", "grad-dot"])
def test_many_queries_of_sequences_keep_to_the_budget(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens()

    def sequences(count, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(128, (count, 16), generator=generator)
        return {"input_ids": tokens, "labels": tokens}

    task = Task(model, loss="causal-lm")
    fitted = dattri.method(method).fit(task, sequences(20, 1), memory="24MiB", progress=False)
    with PeakMemory() as tracked:
        fitted.attribute(sequences(200, 2))
    assert tracked.peak < 24 * MIB


def test_many_queries_are_deferred_and_few_are_not():
    method = dattri.method("if-ekfac", damping=0.1)

    def plan(queries, train):
        return method.attribute(
            deep_task(), wide(train, 1), wide(queries, 2), memory="16MiB", dry_run=True
        )

    few, many = plan(5, 60), plan(500, 600)
    assert not few.route.deferred
    assert many.route.deferred
    assert "deferred, expanded a block at a time" in str(many)
    assert many.groups < 4
