"""Cuts of what any inverse answers, formed, as factors or in a span: those of the matrices."""

import pytest
import torch
from dattri_parts.inverse_hessians.low_rank import _gains, cut, require_shorter
from oracles.blocks import BASE, KINDS, make
from oracles.dense import ggn_of, parameters_of
from oracles.toy_tasks import (
    cross_entropies,
    examples,
    flat_gradients,
    mlp,
    normal,
    positions,
)
from torch import nn
from torch.func import functional_call

from dattri_core import Method, NumericsError, OuterBlock, SpecError, Task

DAMPING = 0.05
SIZES = (6, 5, 3)
GAUSS = {"name": "gauss-newton"}


def solved(name, curvature="ggn", **fields):
    return {"curvature": curvature, "solver": {"name": name, "damping": DAMPING, **fields}}


INNER = {
    "woodbury": solved("woodbury", GAUSS),
    "woodbury ggn": solved("woodbury"),
    "cholesky": solved("cholesky"),
    "exact": {"name": "exact", "curvature": "ggn", "damping": DAMPING},
    "cg": solved("cg", tolerance=1e-13),
    "datainf": solved("datainf", {**GAUSS, "block": True}),
    "identity": "identity",
}


def low(rank, inner):
    return {"name": "low-rank", "rank": rank, "inner": inner}


class Dense:
    """Rows, their blocks and each inner inverse as matrices, in the order of the space."""

    def __init__(self, n, m, sizes=SIZES):
        self.model = mlp(sizes, seed=2)
        self.task = Task(self.model)
        self.train, self.test = examples(n, sizes[0]), examples(m, sizes[0], seed=300)
        bound = Method().fit(self.task, self.train, progress=False)._held.chain
        self.space = bound.source.space
        self.place = positions(self.model, self.space)
        self.rows, self.queries = (
            flat_gradients(self.model, cross_entropies(batch))[:, self.place]
            for batch in (self.train, self.test)
        )

    def ggn(self):
        at = parameters_of(self.model)
        inputs = self.train[0]
        flat = ggn_of(
            lambda parameters: functional_call(self.model, parameters, (inputs,)),
            lambda out: nn.functional.cross_entropy(out, self.train[1], reduction="sum"),
            at,
        )
        return (flat / len(inputs))[self.place][:, self.place]

    def blocks(self):
        sizes = [spec.size for spec in self.space]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        return [
            (spec.shape, slice(a, a + b))
            for spec, a, b in zip(self.space, starts, sizes, strict=True)
        ]

    def solved(self, name):
        g, h = self.rows, self.queries
        if name == "identity":
            return h
        if name == "datainf":
            out = torch.zeros_like(h)
            for _, part in self.blocks():
                size = part.stop - part.start
                eye = DAMPING * torch.eye(size).double()
                each = [torch.linalg.inv(torch.outer(x, x) + eye) for x in g[:, part]]
                out[:, part] = h[:, part] @ torch.stack(each).mean(0)
            return out
        matrix = g.T @ g / len(g) if name == "woodbury" else self.ggn()
        return torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)).double(), h.T).T

    def cut(self, flat, rank):
        """Return rows with the best approximation of rank r of each matrix that gets smaller."""
        out = flat.clone()
        for shape, part in self.blocks():
            if len(shape) != 2 or rank >= min(shape) or rank * sum(shape) >= shape[0] * shape[1]:
                continue
            u, s, v = torch.linalg.svd(flat[:, part].reshape(-1, *shape), full_matrices=False)
            out[:, part] = (u[..., :rank] * s[:, None, :rank] @ v[:, :rank]).flatten(1)
        return out


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("n,m", [(25, 5), (8, 8), (1, 4), (10, 20)])
@pytest.mark.parametrize("rank", [1, 2])
def test_scores_are_those_of_the_best_approximation(name, n, m, rank):
    """Of any inner inverse, by dense algebra and singular values; as many queries as rows too."""
    dense = Dense(n, m)
    want = dense.rows @ dense.cut(dense.solved(name), rank).T
    method = Method(inverse_hessian=low(rank, INNER[name]))
    got = method.attribute(dense.task, dense.train, dense.test)
    assert (got.values - want).abs().max() < 1e-9 * want.abs().max()
    for memory in ("2MiB", "64MiB"):
        again = method.attribute(dense.task, dense.train, dense.test, memory=memory)
        assert (again.values - want).abs().max() < 1e-9 * want.abs().max()


@pytest.mark.parametrize("name", [name for name in INNER if name != "identity"])
def test_what_is_captured_is_the_share_of_the_squared_lengths(name):
    """Over all blocks that were cut, from singular values."""
    dense = Dense(8, 8)
    flat = dense.solved(name)
    whole = kept = 0.0
    for shape, part in dense.blocks():
        if len(shape) == 2 and sum(shape) < shape[0] * shape[1]:
            whole += float(flat[:, part].square().sum())
            kept += float(dense.cut(flat, 1)[:, part].square().sum())
    method = Method(inverse_hessian=low(1, INNER[name]))
    scores = method.attribute(dense.task, dense.train, dense.test)
    share = scores.provenance["solver"][0]["captured"]
    assert abs(share - kept / whole) < 1e-9
    assert share < 1


@pytest.mark.parametrize("name", ["woodbury", "woodbury ggn", "exact", "datainf", "cg"])
@pytest.mark.parametrize("form", ["dot", "relatif", "relatif theta"])
def test_self_influence_is_that_of_cut_rows(name, form):
    dense = Dense(9, 1)
    dense.queries = dense.rows
    answers = dense.cut(dense.solved(name), 2)
    want = (dense.rows * answers).sum(1)
    scorer = "dot"
    if form == "relatif":
        want, scorer = want / want.sqrt(), "relatif"
    if form == "relatif theta":
        want, scorer = want / answers.norm(dim=1), {"name": "relatif", "form": "theta"}
    method = Method(scorer=scorer, inverse_hessian=low(2, INNER[name]))
    got = method.fit(dense.task, dense.train, progress=False).self_influence()
    assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_another_damping_of_an_inverse_in_a_span():
    dense = Dense(8, 8)
    fitted = Method(inverse_hessian=low(1, INNER["woodbury"])).fit(dense.task, dense.train)
    matrix = dense.rows.T @ dense.rows / 8
    swept = fitted.sweep(dense.test, damping=[0.3, 2.0])
    for damping, scores in zip((0.3, 2.0), swept.values(), strict=True):
        eye = damping * torch.eye(len(matrix)).double()
        answers = torch.linalg.solve(matrix + eye, dense.queries.T).T
        want = dense.rows @ dense.cut(answers, 1).T
        assert (scores.values - want).abs().max() < 1e-9 * want.abs().max()


def test_a_plan_before_the_fit_knows_that_cut_rows_are_no_combination():
    from oracles.routes import costs_seen

    dense = Dense(25, 5, (40, 48, 3))
    method = Method(inverse_hessian=low(2, INNER["woodbury"]))
    plan = method.attribute(dense.task, dense.train, dense.test, memory="8MiB", dry_run=True)
    fitted = method.fit(dense.task, dense.train, memory="8MiB", progress=False)
    assert plan.route in costs_seen(lambda: fitted.attribute(dense.test)).routes


# --- the cut of each kind of block ----------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, BASE, 7])
@pytest.mark.parametrize("t", [1, 4])
def test_any_block_is_cut_as_the_matrices_that_it_stands_for(kind, rows, t):
    """Each row meets matrices of its own: not those of a base, nor of inputs that rows share."""
    block, formed = make(kind, rows, t, 6, 8, torch.Generator().manual_seed(rows))
    left, right = cut(block, normal(8, 6, seed=7), 2)
    u, s, v = torch.linalg.svd(formed, full_matrices=False)
    want = u[..., :2] * s[:, None, :2] @ v[:, :2]
    assert (left @ right - want).abs().max() < 1e-10 * formed.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_of_known_low_rank_are_left_as_they_are(kind):
    """What is called positions of a span, a sum or a stack of factors is no bound on its rank."""
    block, formed = make(kind, 3, 1, 6, 8, torch.Generator().manual_seed(1))
    left = not _gains(block, 1)
    assert left == isinstance(block, OuterBlock)
    if left:
        assert int(torch.linalg.matrix_rank(formed).max()) == 1


def test_cut_rows_that_are_longer_than_rows_are_refused():
    require_shorter(1 + 1e-9, 1.0, "0", torch.float64)
    require_shorter(1 + 1e-4, 1.0, "0", torch.float32)
    require_shorter(0.0, 0.0, "0", torch.float32)
    for kept, whole, dtype in (
        (1 + 1e-7, 1.0, torch.float64),
        (1.001, 1.0, torch.float32),
        (1e-9, 0.0, torch.float32),
    ):
        with pytest.raises(NumericsError, match="'low-rank': the cut of '0' keeps"):
            require_shorter(kept, whole, "0", dtype)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shared one-hot"])
def test_a_matrix_for_each_row_is_no_map_of_a_block(kind):
    block, _ = make(kind, BASE, 2, 6, 8, torch.Generator().manual_seed(0))
    with pytest.raises(SpecError, match="no matrix"):
        block.map(normal(BASE, 3, 8, seed=1), None)
    with pytest.raises(SpecError, match="no matrix"):
        block.map(None, normal(BASE, 3, 6, seed=1))
