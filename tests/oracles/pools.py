"""Dense float64 scores of a pool by a fit on other examples: no row of the pool in a curvature."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

import dattri_core as dattri
from dattri_core import RandomStream, Rows, Task
from dattri_core.assemble import build_part
from oracles.kronecker import ekfac, empirical, factors_of, gradients
from oracles.toy_tasks import (
    cross_entropies,
    dense_hessian,
    examples,
    flat_gradients,
    mlp,
    positions,
    states,
)
from oracles.trak import features

N, M = 17, 5
TRAIN, TEST = examples(N), examples(M, seed=300)
DAMPED = {"name": "woodbury", "damping": 0.05}
DUAL = {"inverse_hessian": {"curvature": "gauss-newton", "solver": DAMPED}}
WEIGHTS = states(2)


def pool_of(n, shared=3):
    """Return ``n`` examples, ``shared`` of them from the middle of the train set."""
    others = examples(n - shared, seed=700)
    return tuple(
        torch.cat([other[:2], own[6 : 6 + shared], other[2:]])
        for other, own in zip(others, TRAIN, strict=True)
    )


POOLS = {"fewer": pool_of(7), "more": pool_of(40)}


def task(checkpoints=1, **options):
    """Return a task of a small network with one or two checkpoints."""
    return Task(mlp(), checkpoints=WEIGHTS[:checkpoints], **options)


def method(name, **changes):
    """Return a method of `PARTS`, damped as its oracle is."""
    return PARTS[name][0](**changes)


def model_at(checkpoint):
    """Return the network of a checkpoint."""
    model = mlp()
    model.load_state_dict(WEIGHTS[checkpoint])
    return model


def dense_scores(name, pool, test=TEST, checkpoints=1):
    """Return the scores ``[n_pool, n_test]``, the mean over checkpoints."""
    found = [PARTS[name][1](at, pool, test) for at in range(checkpoints)]
    values = torch.stack([values for values, _ in found]).mean(0)
    weights = [weight for _, weight in found if weight is not None]
    return torch.stack(weights).mean(0)[:, None] * values if weights else values


def dense_self(name, pool):
    """Return the score of each example of a pool for itself, ``[n_pool]``."""
    return dense_scores(name, pool, pool).diagonal()


# --- one checkpoint: values [n_pool, n_test], and a weight [n_pool] or None ----------------------
def _rows(at, batch):
    return flat_gradients(model_at(at), cross_entropies(batch))


def _damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def _cosine(at, pool, test):
    return cosine_similarity(_rows(at, pool)[:, None], _rows(at, test)[None], dim=2), None


def _hessian(at, pool, test):
    matrix = _damped(dense_hessian(model_at(at), TRAIN), 1.0)
    return _rows(at, pool) @ torch.linalg.solve(matrix, _rows(at, test).T), None


def _moment(at, pool, test):
    own = _rows(at, TRAIN)
    matrix = _damped(own.T @ own / N, 0.05)
    return _rows(at, pool) @ torch.linalg.solve(matrix, _rows(at, test).T), None


def _relatif(at, pool, test):
    size = _moment(at, pool, pool)[0].diagonal().sqrt()
    return _moment(at, pool, test)[0] / size[:, None], None


def _theta(at, pool, test):
    own, rows = _rows(at, TRAIN), _rows(at, pool)
    matrix = _damped(own.T @ own / N, 0.05)
    size = torch.linalg.solve(matrix, rows.T).norm(dim=0)
    return _moment(at, pool, test)[0] / size[:, None], None


def _ekfac(at, pool, test):
    total = torch.zeros(len(pool[1]), len(test[1]), dtype=torch.float64)
    known = Task(model_at(at))
    for path in ("0", "2"):
        own, rows, queries = (
            factors_of(known, batch, path, empirical(known)) for batch in (TRAIN, pool, test)
        )
        matrix = _damped(ekfac(own, N), 0.1)
        total += gradients(rows) @ torch.linalg.solve(matrix, gradients(queries).T)
    return total.detach(), None


def _sketched(name, at, flats):
    """Return flat rows, in the model's order, after the projector of a method."""
    source = build_part("source", "per-example")
    space = source.bind(task(), task().checkpoints[0], dattri.take(TRAIN, slice(0, 3))).space
    made, order = method(name), positions(mlp(), space)
    stream = RandomStream(made.seed, "projector", at)
    sketch = made.projector.build(space, stream=stream, device=torch.device("cpu"))
    return [
        sketch.map(Rows.from_flat(space, flat[:, order], torch.arange(len(flat)))) for flat in flats
    ]


def _logra(at, pool, test):
    own, rows, queries = _sketched("logra", at, [_rows(at, b) for b in (TRAIN, pool, test)])
    total = torch.zeros(len(pool[1]), len(test[1]), dtype=torch.float64)
    for name in own.blocks:
        k, g, h = (some.blocks[name].flat() for some in (own, rows, queries))
        moment = k.T @ k / N
        matrix = _damped(moment, 0.1 * moment.trace() / len(moment))
        total += g @ torch.linalg.solve(matrix, h.T)
    return total, None


def _trak(at, pool, test):
    found = [features(model_at(at), *batch) for batch in (TRAIN, pool, test)]
    k, g, h = (rows.flat() for rows in _sketched("trak", at, [flat for flat, _ in found]))
    return g @ torch.linalg.solve(_damped(k.T @ k / N, 0.1), h.T), found[1][1]


def _made(name, **fixed):
    return lambda **changes: dattri.method(name, **{**fixed, **changes})


PARTS = {
    "grad-cos": (_made("grad-cos"), _cosine),
    "if-explicit": (_made("if-explicit", damping=1.0), _hessian),
    "if-ekfac": (_made("if-ekfac", fisher="empirical", damping=0.1), _ekfac),
    "dual": (lambda **changes: dattri.Method(**{**DUAL, **changes}), _moment),
    "relatif": (lambda **changes: dattri.Method(scorer="relatif", **DUAL, **changes), _relatif),
    "relatif-theta": (
        lambda **changes: dattri.Method(
            scorer={"name": "relatif", "form": "theta"}, **DUAL, **changes
        ),
        _theta,
    ),
    "logra": (_made("logra", rank=2), _logra),
    "trak": (_made("trak", dim=9, damping=0.1), _trak),
}
"""Name -> the method, and its scores at one checkpoint by dense algebra."""
