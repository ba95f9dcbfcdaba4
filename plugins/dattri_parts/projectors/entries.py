"""Random matrices whose every entry is a pure function of a key and of its place.

The generator is Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3),
which turns a 128-bit counter and a 64-bit key into four 32-bit words. The counter of a word is made
from the row and the column of the entry that it serves, so a matrix depends on no other entry, no
batch, order, device or process, and that of a smaller rank is the top of that of a larger one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Distribution = Literal["signs", "normal"]
Words = NDArray[np.uint64]

SPAN = 512
"""Columns of one row whose signs come from four counters."""
WORDS_AT_ONCE = 2**20
"""Counters drawn at once; bounds the memory of drawing, never the numbers."""
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
NORMAL = 1
"""Third word of the counter of normal entries; 0 is that of signs."""


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, ...]:
    """Return four words of 32 bits for each counter of four words, ten rounds.

    Args:
        counter: Arrays that broadcast, each of numbers below 2^32.
        key: 64 bits.
    """
    first, second, third, fourth = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = MULTIPLIERS[0] * first, MULTIPLIERS[1] * third
        first, second, third, fourth = (
            (right >> HALF) ^ second ^ np.uint64(low),
            right & LOW,
            (left >> HALF) ^ fourth ^ np.uint64(high),
            left & LOW,
        )
        low, high = (low + INCREMENTS[0]) & 0xFFFFFFFF, (high + INCREMENTS[1]) & 0xFFFFFFFF
    return first, second, third, fourth


def random_matrix(key: int, rows: int, columns: int, distribution: Distribution) -> Tensor:
    """Return independent entries of mean 0 and variance 1, ``[rows, columns]`` in float64.

    Args:
        key: 64 bits.
        rows: k of them, the rank of a sketch.
        columns: d of them, the length of what is sketched.
        distribution: ``"signs"`` are +1 or -1 with even odds; ``"normal"`` by Box and Muller 1958,
            rounded to 24 bits, so that the last digits of a machine's logarithm do not show.
    """
    draw, serves = (_signs, 128) if distribution == "signs" else (_normals, 4)
    step = max(1, WORDS_AT_ONCE * serves // max(1, columns))
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        matrix[start:stop] = torch.from_numpy(draw(key, start, stop, columns))
    return matrix


def _signs(key: int, start: int, stop: int, columns: int) -> NDArray[np.float64]:
    """Return signs in an order that suits fused matrix kernels.

    Column d lies at e = d mod 128 of quarter j = (d // 128) mod 4 of span d // 512. Its bit is bit
    15 + 16 (e mod 2) - e // 8 of word j of the counter (4 (d // 512) + (e // 2) mod 4, row, 0, 0).
    """
    spans = -(-columns // SPAN)
    row = np.arange(start, stop, dtype=np.uint64)[:, None]
    at = np.arange(4 * spans, dtype=np.uint64)[None]
    none = np.zeros((1, 1), dtype=np.uint64)
    words = np.stack(philox((at, row, none, none), key), axis=-1)  # [rows, 4 spans, quarters]
    words = words.reshape(len(row), spans, 4, 4).transpose(0, 1, 3, 2)  # [.., quarter, counter]
    eighth = np.arange(16, dtype=np.uint64)[:, None, None]
    parity = np.arange(2, dtype=np.uint64)
    bits = (words[:, :, :, None, :, None] >> (np.uint64(15) + np.uint64(16) * parity - eighth)) & (
        np.uint64(1)
    )  # [rows, spans, quarters, 16, 4, 2]
    return 1 - 2 * bits.reshape(len(row), spans * SPAN)[:, :columns].astype(np.float64)


def _normals(key: int, start: int, stop: int, columns: int) -> NDArray[np.float64]:
    """Return normal numbers: columns 4 q to 4 q + 3 of a row from the counter (q, row, 1, 0)."""
    row = np.arange(start, stop, dtype=np.uint64)[:, None]
    quads = -(-columns // 4)
    at = np.arange(quads, dtype=np.uint64)[None]
    kind = np.full((1, 1), NORMAL, dtype=np.uint64)
    words = philox((at, row, kind, np.zeros((1, 1), dtype=np.uint64)), key)
    entries = np.empty((len(row), quads, 4))
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log((words[pair].astype(np.float64) + 0.5) / 2**32))
        angle = 2 * np.pi * words[pair + 1].astype(np.float64) / 2**32
        entries[:, :, pair] = radius * np.cos(angle)
        entries[:, :, pair + 1] = radius * np.sin(angle)
    flat = entries.reshape(len(row), quads * 4)[:, :columns]
    return flat.astype(np.float32).astype(np.float64)
