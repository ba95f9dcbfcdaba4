"""Flat projectors over seeds: unbiased inner products, their variance, tails, unrelated draws."""

from __future__ import annotations

from functools import cache

import attrs
import numpy as np
import pytest
import torch
from flat_cases import CASES, CPU, build, kernel_of, normals, one_block, sketched
from torch import Tensor

SEEDS, SIZE = 256, 640
every = pytest.mark.parametrize("name", CASES)


def pair_of(kind: str) -> tuple[Tensor, Tensor]:
    """Return two vectors of length ``SIZE``."""
    u, v = normals(2, SIZE, seed=5)
    place = torch.arange(SIZE)
    if kind == "same":
        v = u
    elif kind == "orthogonal":
        v = v - u * (u @ v) / (u @ u)
    elif kind == "unit":
        u = v = (place == 77).double()
    elif kind == "periodic":  # of the length of the sketch: whole blocks agree
        u, v = u[:64].repeat(SIZE // 64), v[:64].repeat(SIZE // 64)
    elif kind == "one block":
        u, v = u * (place < 64), v * (place < 64)
    elif kind == "sparse":
        u, v = u * (place % 10 == 3), v * (place % 10 == 3)
    elif kind == "band":  # a few neighbours in each of several blocks
        u, v = u * (place % 128 < 6), v * (place % 128 < 6)
    return u, v


KINDS = ("dense", "same", "orthogonal", "unit", "periodic", "one block", "sparse", "band")


@cache
def products(name: str) -> Tensor:
    """Return <P u, P v> of the pair of every kind for every seed, ``[seeds, kinds]``."""
    values = torch.stack([vector for kind in KINDS for vector in pair_of(kind)])
    found = torch.empty(SEEDS, len(KINDS), dtype=torch.float64)
    for seed in range(SEEDS):
        kernel = kernel_of(CASES[name].part, seed=seed)
        mapped = (sketched(kernel, values) * kernel.scale).reshape(len(KINDS), 2, -1)
        found[seed] = (mapped[:, 0] * mapped[:, 1]).sum(1)
    return found


@every
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_the_stated_variance(name: str, kind: str) -> None:
    """z of the mean under 5, and the variance over seeds within its own sampling error."""
    case, (u, v) = CASES[name], pair_of(kind)
    found = products(name)[:, KINDS.index(kind)]
    want, variance = float(u @ v), case.variance(u, v)
    if variance < 1e-9 * float((u @ u) * (v @ v)):  # nothing meets: exact
        assert (found - want).abs().max() < 1e-9 * float(u.norm() * v.norm())
        return
    z = (float(found.mean()) - want) / (variance / SEEDS) ** 0.5
    assert abs(z) < 5
    # The sampling error of a variance grows with the fourth moment.
    kurtosis = float((found - want).pow(4).mean()) / variance**2
    spread = 4 * ((max(kurtosis, 3.0) - 1) / SEEDS) ** 0.5
    assert 1 - min(spread, 0.6) < float((found - want).square().mean()) / variance < 1 + spread


@every
def test_the_stated_variance_is_at_most_that_of_a_dense_sketch(name: str) -> None:
    for kind in KINDS:
        u, v = pair_of(kind)
        dense = float(((u @ u) * (v @ v) + (u @ v) ** 2) / 64)
        assert CASES[name].variance(u, v) <= dense * (1 + 1e-12)


@every
def test_distances_of_many_vectors_are_kept(name: str) -> None:
    """4950 differences of 100 vectors, K = 2048: sqrt(2/K) = 0.031, and all within 0.23."""
    vectors = normals(100, 2500, seed=3).float()
    kernel = kernel_of(CASES[name].many)
    mapped = (sketched(kernel, vectors) * kernel.scale).double()
    first, second = torch.triu_indices(100, 100, 1)
    before = (vectors[first] - vectors[second]).double().square().sum(1)
    after = (mapped[first] - mapped[second]).square().sum(1)
    error = (after / before - 1).abs()
    assert float(error.max()) < 0.23
    assert float(error.quantile(0.999)) < 5 * (2 / 2048) ** 0.5
    assert 0.2 < float(error.square().mean()) / (2 / 2048) < 1.5  # less where rows have few blocks


@every
def test_seeds_and_checkpoints_give_unrelated_matrices(name: str) -> None:
    part = CASES[name].part
    streams = [(0, 0), (1, 0), (2, 0), (10_000, 0), (0, 1), (0, 2), (0, 3), (1, 1)]
    tables = torch.stack([kernel_of(part, "auto", *stream).matrix(0, 4096) for stream in streams])
    flat = tables.flatten(1)
    correlation = flat @ flat.T
    correlation /= correlation.diagonal().sqrt().outer(correlation.diagonal().sqrt())
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / flat.shape[1] ** 0.5
    rows = tables.flatten(0, 1)
    assert len(torch.unique(rows, dim=0)) == len(rows)


@every
def test_entries_have_mean_zero_and_unrelated_neighbours(name: str) -> None:
    kernel = kernel_of(CASES[name].part)
    matrix = kernel.matrix(0, 8192)
    power = float(matrix.square().sum())
    assert abs(float(matrix.sum())) < 5 * power**0.5
    shifts = [(0, 1), (1, 0), (0, 2), (0, 64), (0, 128), (0, 512), (1, 1), (8, 0)]
    for rows, columns in shifts:
        left = matrix[rows:, columns:]
        right = matrix[: 64 - rows, : 8192 - columns]
        products = left * right
        assert abs(float(products.sum())) < 5 * float(products.square().sum()) ** 0.5 + 1e-9
    for far in (2**31, 2**32, 2**33):
        products = matrix * kernel.matrix(far, far + 8192)
        assert abs(float(products.sum())) < 5 * float(products.square().sum()) ** 0.5


@pytest.mark.parametrize("name", ["rademacher", "gaussian"])
def test_no_two_of_many_projections_are_one(name: str) -> None:
    """20,480 rows of each of four checkpoints: keys that are sums with multiples repeat some."""
    part = attrs.evolve(CASES[name].part, dim=20_480)
    kernels = [kernel_of(part, checkpoint=checkpoint) for checkpoint in range(4)]
    rows = torch.cat([kernel.columns(0, 96, CPU) for kernel in kernels])
    assert len(np.unique(rows.numpy().view(np.dtype((np.void, 96 * 4))))) == 4 * 20_480


def test_a_larger_sketch_holds_the_smaller_one() -> None:
    for name in ("rademacher", "gaussian"):
        small, large = (
            kernel_of(attrs.evolve(CASES[name].part, dim=dim)).matrix(0, 300) for dim in (5, 9)
        )
        assert torch.equal(large[:5], small)


@every
def test_names_of_projectors_and_blocks_are_in_the_key(name: str) -> None:
    """Two kinds, or a row and its first block, have unrelated signs."""
    digests = set()
    for other in CASES.values():
        kernel = kernel_of(other.part)
        digests.add(tuple(kernel.matrix(0, 640).sign().sum(0).tolist()))
    assert len(digests) == len(CASES)
    part = attrs.evolve(CASES[name].part, scope="block")
    of_block = build(part, one_block(640)).kernels["flat"].matrix(0, 640)
    assert not torch.equal(of_block, kernel_of(CASES[name].part).matrix(0, 640))
