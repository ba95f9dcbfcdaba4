"""Random entries: the generator's known answers, frozen corners, and independence of places."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from dattri_parts.projectors import entries
from dattri_parts.projectors.entries import random_integers, random_matrix
from dattri_parts.projectors.philox import philox
from oracles.devices import DEVICES

from dattri_core import RandomStream

KINDS = ("signs", "normal")
KEY = 0x1234_5678_9ABC_DEF0


def words(counter, key):
    counter = tuple(np.full(1, word, dtype=np.uint64) for word in counter)
    return [int(word[0]) for word in philox(counter, key)]


def test_the_generator_gives_the_published_answers():
    """The known-answer vectors of Random123 for Philox4x32-10."""
    full = 0xFFFFFFFF
    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((full,) * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = 0xA4093822 | 0x299F31D0 << 32
    assert words(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_numpy_and_torch_draw_the_same_words():
    """The whole range of every word, the largest products included."""
    generator = np.random.default_rng(0)
    counter = generator.integers(0, 2**32, (4, 1000), dtype=np.int64)
    counter[:, :2] = [[0, 2**32 - 1]] * 4
    for key in (0, KEY, 2**64 - 1):
        want = philox(tuple(counter.astype(np.uint64)), key)
        for words in (philox(tuple(counter), key), philox(tuple(torch.from_numpy(counter)), key)):
            for got, expected in zip(words, want, strict=True):
                assert torch.equal(
                    torch.as_tensor(got), torch.from_numpy(expected.astype(np.int64))
                )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 511, 2**31 - 3, 2**33 + 5, 2**38 - 7])
def test_numpy_and_torch_draw_the_same_entries(kind, start, device):
    place = (KEY, (2, 5), (start, start + 1030), kind)
    drawn = entries.entries(*place, None)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (3, 1030)
    got = entries.entries(*place, torch.device(device)).cpu()
    if kind == "signs":
        assert torch.equal(got, drawn)
    else:  # a logarithm may be rounded another way
        assert (got - drawn).abs().max() <= 2e-7 * drawn.abs().max()
        assert (got != drawn).float().mean() < 1e-3


def test_far_signs_lie_where_the_documented_order_says():
    for d in (2**31 + 77, 2**33 + 5, 2**38 + 130, 2**39 + 3, 2**40 + 513):
        drawn = entries.entries(KEY, (3, 4), (d, d + 2), "signs", None)
        assert drawn[0].tolist() == [plain_sign(KEY, 3, d), plain_sign(KEY, 3, d + 1)]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_integers_lie_where_the_documented_order_says(device):
    for row, start, below in [(0, 0, 7), (3, 5, 2048), (1, 2**33 + 2, 2**31 - 1)]:
        drawn = random_integers(KEY, row, start, start + 9, below, device)
        want = [
            (words((j // 4 % 2**32, row, 2, j // 4 >> 32), KEY)[j % 4] * below) >> 32
            for j in range(start, start + 9)
        ]
        assert drawn.tolist() == want
    many = torch.as_tensor(random_integers(KEY, 0, 0, 7000, 7, device))
    assert (many.bincount(minlength=7) - 1000).abs().max() < 5 * 1000**0.5
    assert len(random_integers(KEY, 0, 5, 5, 7, device)) == 0


@pytest.mark.parametrize(
    ("kind", "digest", "corner"),
    [
        ("signs", "d0cfd22ce7c69d0a", [[-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]]),
        (
            "normal",
            "0f15554ebb5bff24",
            [
                [0.9974865317344666, 1.415177345275879, -0.6149394512176514],
                [0.5238140225410461, -0.6875348687171936, 0.6979890465736389],
            ],
        ),
    ],
)
def test_entries_are_frozen(kind, digest, corner):
    matrix = random_matrix(KEY, 8, 600, kind)
    assert matrix.dtype == torch.float64
    assert matrix[:2, :3].tolist() == corner
    assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16] == digest


def plain_sign(key, k, d):
    """The order of the signs, spelled entry by entry."""
    span, quarter, e = d // 512, d // 128 % 4, d % 128
    eighth, counter, parity = e // 8, e // 2 % 4, e % 2
    at = 4 * span + counter
    word = words((at % 2**32, k, 0, at >> 32), key)[quarter]
    return 1 - 2 * (word >> (15 + 16 * parity - eighth) & 1)


def test_signs_lie_where_the_documented_order_says():
    matrix = random_matrix(KEY, 3, 1100, "signs")
    for k, d in [(0, 0), (0, 1), (1, 7), (2, 8), (1, 127), (0, 128), (2, 511), (1, 512), (2, 1099)]:
        assert float(matrix[k, d]) == plain_sign(KEY, k, d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_an_entry_depends_on_its_place_alone(monkeypatch, kind, at_once):
    whole = random_matrix(KEY, 9, 1300, kind)
    monkeypatch.setattr(entries, "WORDS_AT_ONCE", at_once)
    for rows, columns in [(9, 1300), (4, 1300), (9, 3), (1, 513), (9, 512)]:
        assert torch.equal(random_matrix(KEY, rows, columns, kind), whole[:rows, :columns])
    assert random_matrix(KEY, 0, 5, kind).shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_mean_zero_and_variance_one_and_no_neighbours(kind):
    matrix = random_matrix(KEY, 64, 4096, kind)
    bound = 5 / matrix.numel() ** 0.5
    assert abs(float(matrix.mean())) < bound
    fourth = 1 if kind == "signs" else 3
    assert abs(float(matrix.square().mean()) - 1) <= bound * (fourth - 1) ** 0.5
    assert abs(float(matrix.pow(4).mean()) - fourth) <= bound * (96**0.5 if fourth == 3 else 0)
    for rows, columns in [(0, 1), (1, 0), (0, 2), (0, 8), (0, 128), (0, 512), (1, 1), (4, 0)]:
        left = matrix[rows:, columns:]
        right = matrix[: 64 - rows, : 4096 - columns]
        assert abs(float((left * right).mean())) < 5 / left.numel() ** 0.5, (rows, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_checkpoints_and_names_give_unrelated_matrices(kind):
    keys = [
        RandomStream(seed, "projector", checkpoint).key("kronecker", 1, kind, block, side)
        for seed in (0, 1, 10_000)
        for checkpoint in (0, 1, 2)
        for block in ("0", "00")
        for side in ("inputs", "outputs")
    ]
    matrices = torch.stack([random_matrix(key, 32, 1024, kind) for key in keys]).flatten(1)
    correlation = matrices @ matrices.T / matrices.shape[1]
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / matrices.shape[1] ** 0.5
    columns = torch.cat([random_matrix(key, 64, 512, kind).T for key in keys])
    assert len(torch.unique(columns, dim=0)) == len(columns)
