"""Random matrices whose every entry is a pure function of a key and of its place.

The counter of `philox` is made from the row and the column of the entries that its words serve, so
a matrix depends on no other entry, no batch, order, device or process, and that of a smaller rank
is the top of that of a larger one. Signs are the same bits everywhere; normal numbers are the same
after their rounding to 24 bits, but for one in a hundred million whose logarithm or cosine, of
another machine, lies across a rounding border.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dattri_parts.projectors.philox import LOW, Words, counting, philox

Distribution = Literal["signs", "normal"]

SPAN = 512
"""Columns of one row whose signs come from four counters."""
WORDS_AT_ONCE = 2**20
"""Counters drawn at once; bounds the memory of drawing, never the numbers."""
SIGNS, NORMAL, INTEGERS = 0, 1, 2
"""Third word of the counter: what its words serve."""
ONE_BITS, SIGN_BIT = 0x3F800000, -(2**31)
"""Of 1.0 in float32, and of its sign in an integer of 32 bits."""


def random_matrix(key: int, rows: int, columns: int, distribution: Distribution) -> Tensor:
    """Return independent entries of mean 0 and variance 1, ``[rows, columns]`` in float64.

    Args:
        key: 64 bits.
        rows: k of them, the rank of a sketch.
        columns: d of them, the length of what is sketched.
        distribution: ``"signs"`` are +1 or -1 with even odds; ``"normal"`` by Box and Muller 1958,
            rounded to 24 bits, so that the last digits of a machine's logarithm do not show.
    """
    serves = 128 if distribution == "signs" else 4
    step = max(1, WORDS_AT_ONCE * serves // max(1, columns))
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        matrix[start:stop] = entries(key, (start, stop), (0, columns), distribution, None)
    return matrix


def entries(
    key: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    distribution: Distribution,
    device: torch.device | None,
) -> Tensor:
    """Return the entries of some rows and columns in float32, ``[rows, columns]``.

    Args:
        key: 64 bits.
        rows: First, and one past the last.
        columns: First, and one past the last; below 2^39 for signs, 2^63 for normal numbers.
        distribution: See `random_matrix`.
        device: Where torch draws them; None: NumPy draws them on the host.
    """
    draw, granule = (_signs, SPAN) if distribution == "signs" else (_normals, 4)
    first, last = columns[0] // granule, -(-columns[1] // granule)
    found = draw(key, rows, (first, last), device)
    tile = torch.from_numpy(found) if device is None else found
    return tile[:, columns[0] - first * granule : columns[1] - first * granule]


def random_integers(
    key: int, row: int, start: int, stop: int, below: int, device: torch.device | None
) -> Words:
    """Return integers at the places ``start`` to ``stop`` of a row, ``[stop-start]``.

    Place j has word j mod 4 of the counter (j // 4, row, 2, 0), times ``below`` over 2^32.

    Args:
        key: 64 bits.
        row: Which series.
        start: First place, below 2^34.
        stop: One past the last.
        below: One more than the largest integer; less than 2^31.
        device: Where torch draws them; None: NumPy does.
    """
    first, last = start // 4, -(-stop // 4)
    words = _words(key, (row, row + 1), (first, last), INTEGERS, device)
    flat = _library(device).stack(words, -1).reshape(-1)[start - 4 * first : stop - 4 * first]
    return (flat * below) >> 32


def _words(
    key: int,
    rows: tuple[int, int],
    counters: tuple[int, int],
    serves: int,
    device: torch.device | None,
) -> tuple[Words, ...]:
    """Return the four words of the counters (c mod 2^32, row, serves, c // 2^32), ``[rows, c]``."""
    row = counting(*rows, device)[:, None]
    at = counting(*counters, device)[None]
    return philox((at & LOW, row, row * 0 + serves, at >> 32), key)


def _signs(
    key: int, rows: tuple[int, int], spans: tuple[int, int], device: torch.device | None
) -> Any:
    """Return signs in an order that suits fused matrix kernels, ``[rows, 512 spans]``.

    Column d lies at e = d mod 128 of quarter j = (d // 128) mod 4 of span d // 512. Its bit is bit
    15 + 16 (e mod 2) - e // 8 of word j of the counter (4 (d // 512) + (e // 2) mod 4, row, 0, 0).
    The bit becomes the sign of 1.0.
    """
    words = _words(key, rows, (4 * spans[0], 4 * spans[1]), SIGNS, device)
    count = rows[1] - rows[0]
    library, length = _library(device), spans[1] - spans[0]
    stacked = _int32(library.stack(words, -1)).reshape(count, length, 4, 4).swapaxes(-1, -2)
    # Odd columns have the upper half of a word, even ones the lower half, moved up.
    halves = library.stack((stacked << 16, stacked), -1).reshape(count, length, 4, 1, 8)
    bits = halves << _int32(counting(0, 16, device))[:, None]
    bits &= SIGN_BIT  # [rows, spans, quarters, eighths, counters and parities]
    bits |= ONE_BITS
    return bits.reshape(count, length * SPAN).view(library.float32)


def _normals(
    key: int, rows: tuple[int, int], quads: tuple[int, int], device: torch.device | None
) -> Any:
    """Return normal numbers: columns 4 q to 4 q + 3 of a row from the counter (q, row, 1, 0)."""
    library = _library(device)
    words = _words(key, rows, quads, NORMAL, device)
    found = []
    for pair in (0, 2):
        radius = library.sqrt(-2 * library.log((_float64(words[pair]) + 0.5) / 2**32))
        angle = 2 * math.pi * _float64(words[pair + 1]) / 2**32
        found += [radius * library.cos(angle), radius * library.sin(angle)]
    return _float32(library.stack(found, -1)).reshape(rows[1] - rows[0], 4 * (quads[1] - quads[0]))


def _library(device: torch.device | None) -> Any:
    return np if device is None else torch


def _int32(words: Words) -> Words:
    return words.to(torch.int32) if isinstance(words, Tensor) else words.astype(np.int32)


def _float64(words: Words) -> Any:
    return words.to(torch.float64) if isinstance(words, Tensor) else words.astype(np.float64)


def _float32(values: Any) -> Any:
    return values.to(torch.float32) if isinstance(values, Tensor) else values.astype(np.float32)
