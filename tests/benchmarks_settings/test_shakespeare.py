"""Tiny Shakespeare from a folder, the web, or nowhere."""

import gzip
import hashlib
import io
import os
import urllib.request
from pathlib import Path

import attrs
import numpy as np
import pytest
from dattri_benchmarks import fetch as fetching
from dattri_benchmarks import shakespeare

from dattri_core.errors import InputError

REAL = Path(os.environ.get("DATTRI_DATA", fetching.data_folder())) / "tinyshakespeare"
TEXT = b"to be, or not to be: that is the question. " * 5


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A short text, served plain, as the real one is."""
    file = attrs.evolve(shakespeare.FILE, sha256=hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(shakespeare, "FILE", file)
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(TEXT))
    return tmp_path / "tinyshakespeare" / "input.txt.gz"


def test_a_plain_file_is_downloaded_and_kept_as_gzip(small, monkeypatch):
    codes, alphabet = shakespeare.read_shakespeare()
    assert "".join(alphabet[c] for c in codes).encode() == TEXT
    assert list(alphabet) == sorted(set(alphabet))
    assert gzip.decompress(small.read_bytes()) == TEXT
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert np.array_equal(shakespeare.read_shakespeare()[0], codes)


def test_sequences_cover_the_text_in_order_and_keep_its_parts_apart(small):
    codes, _ = shakespeare.read_shakespeare()
    train, test = shakespeare.read_sequences(10)
    border = int(0.9 * len(TEXT))
    assert np.array_equal(train.ravel(), codes[: 10 * (border // 10)])
    assert np.array_equal(test.ravel(), codes[border : border + 10 * ((len(TEXT) - border) // 10)])
    for length in (1, len(TEXT)):
        with pytest.raises(InputError, match="length from 2 to"):
            shakespeare.read_sequences(length)


def test_the_real_text():
    if not (REAL / "input.txt.gz").exists():
        pytest.skip("no tinyshakespeare/ in the folder that DATTRI_DATA names")
    codes, alphabet = shakespeare.read_shakespeare()
    assert (len(codes), len(alphabet)) == (1_115_394, 65)
    assert "".join(alphabet[c] for c in codes[:14]) == "First Citizen:"
    train, test = shakespeare.read_sequences(256)
    assert (train.shape, test.shape) == ((3921, 256), (435, 256))
