"""Tiny Shakespeare: 1,115,394 characters of plays, 65 distinct (Karpathy 2015; public domain)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_core import InputError

Array = np.ndarray[Any, Any]
FILE = Download(
    "input.txt.gz",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
TRAIN = 0.9
"""Share of the characters, from the beginning, that is the train text."""


def read_shakespeare() -> tuple[Array, str]:
    """Return the codes of the characters, bytes ``[1115394]``, and the alphabet, sorted.

    Read from ``tinyshakespeare/`` below the folder of data (see `data_folder`), downloaded when
    missing.
    """
    content = np.frombuffer(fetch(FILE, data_folder() / "tinyshakespeare"), np.uint8)
    alphabet, codes = np.unique(content, return_inverse=True)
    return codes.astype(np.uint8), alphabet.tobytes().decode("ascii")


def read_sequences(length: int) -> tuple[Array, Array]:
    """Return train and test sequences of codes, ``[n, length]`` each, one after another.

    The first nine tenths of the text are cut into train sequences, the rest into test sequences; an
    end that does not fill one is left out. Length 256 gives 3921 and 435.
    """
    codes, _ = read_shakespeare()
    border = int(TRAIN * len(codes))
    longest = len(codes) - border
    if not 2 <= length <= longest:
        raise InputError(
            f"shakespeare: sequences of {length} characters; give a length from 2 to {longest}"
        )
    train, test = codes[:border], codes[border:]
    return _cut(train, length), _cut(test, length)


def _cut(codes: Array, length: int) -> Array:
    count = len(codes) // length
    return codes[: count * length].reshape(count, length)
