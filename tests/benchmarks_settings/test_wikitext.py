"""WikiText-2 from the official archive or from files of any order, the same articles."""

import hashlib
import io
import lzma
import os
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest
from dattri_benchmarks import fetch as fetching
from dattri_benchmarks import wikitext

from dattri_core.errors import InputError, StoreError

REAL = Path(os.environ.get("DATTRI_DATA", fetching.data_folder())) / "wikitext-2"
ARTICLES = [
    (
        " \n = Robert Boulter = \n \n He is an <unk> actor . \n"
        " \n = = Career = = \n \n He had a role . \n"
    ),
    " \n = 1 : 2 = \n \n Played , W \n = 7 / 2 = \n , D \n",  # the third line is no title
    " \n = Élan = \n \n The <unk> of the a a a a . \n",
]
LINES = [
    ["= 1 : 2 =", "Played , W", "= 7 / 2 =", ", D"],
    ["= Robert Boulter =", "He is an <unk> actor .", "= = Career = =", "He had a role ."],
    ["= Élan =", "The <unk> of the a a a a ."],
]
TEXTS = {"train": ARTICLES, "valid": ARTICLES[1:], "test": ARTICLES[::2]}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Three articles, an archive of the official form, a fake network that serves it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for part, texts in TEXTS.items():
            archive.writestr(f"wikitext-2/wiki.{part}.tokens", "".join([*texts, " \n"]))
    web = {wikitext.ARCHIVE.urls[1]: packed.getvalue()}  # the first mirror is gone

    def urlopen(url, timeout):
        if url not in web:
            raise urllib.error.URLError("no route")
        return io.BytesIO(web[url])

    sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
    monkeypatch.setattr(wikitext, "ARCHIVE", attrs.evolve(wikitext.ARCHIVE, sha256=sha256))
    joined = "\n\n".join("\n".join(lines) for lines in LINES)
    digest = hashlib.sha256(joined.encode()).hexdigest()
    monkeypatch.setattr(wikitext, "DIGESTS", {"train": digest})
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return tmp_path / "wikitext-2", web


def test_the_archive_is_downloaded_once_and_its_articles_sorted(small):
    folder, web = small
    assert wikitext.read_articles("train") == ["\n".join(lines) for lines in LINES]
    web.clear()
    assert wikitext.read_articles("test") == ["\n".join(lines) for lines in LINES[1:]]
    assert [p.name for p in folder.iterdir()] == ["wikitext-2-v1.zip"]


@pytest.mark.parametrize("pack", [bytes, lzma.compress])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_file_with_the_articles_in_any_order_is_preferred_and_checked(small, pack, order):
    folder, web = small
    web.clear()
    folder.mkdir()
    path = folder / ("wiki.train.tokens" + (".xz" if pack is lzma.compress else ""))
    text = "".join(ARTICLES[k] for k in order) + " \n"
    path.write_bytes(pack(text.encode()))
    assert wikitext.read_articles("train") == ["\n".join(lines) for lines in LINES]
    path.write_bytes(pack(text.replace("actor", "singer").encode()))
    with pytest.raises(StoreError, match=r"wiki\.train.*3 articles.*SHA-256.*delete it"):
        wikitext.read_articles("train")
    path.write_bytes(pack(text.encode())[:-9] if pack is lzma.compress else b"\xff\xfe")
    with pytest.raises(StoreError, match=r"wiki\.train.*cannot be read"):
        wikitext.read_articles("train")


def test_without_either_the_error_says_what_to_do(small):
    small[1].clear()
    with pytest.raises(InputError, match="DATTRI_DATA"):
        wikitext.read_articles("train")


def test_sequences_are_the_words_in_order_with_an_end_of_every_line(small):
    train, test, words = wikitext.read_word_sequences(4)
    stream = [w for lines in LINES for line in lines for w in [*line.split(), "<eos>"]]
    assert [words[k] for k in train.ravel()] == stream[: len(stream) // 4 * 4]
    counts = Counter(stream)
    assert words == sorted(counts, key=lambda word: (-counts[word], word))
    known = set(words)
    rest = [w for lines in LINES[1:] for line in lines for w in [*line.split(), "<eos>"]]
    assert [words[k] for k in test.ravel()] == rest[: len(rest) // 4 * 4]
    assert known >= set(rest)


def test_a_smaller_vocabulary_keeps_the_most_frequent_words(small):
    full, _, words = wikitext.read_word_sequences(4)
    train, _, few = wikitext.read_word_sequences(4, 3)
    assert (few[:2], few[2]) == (words[:2], "<unk>")
    assert train.max() == 2
    for whole, part in zip(full.ravel(), train.ravel(), strict=True):
        assert few[part] == (words[whole] if words[whole] in few else "<unk>")
    for count in (1, len(words) + 1):
        with pytest.raises(InputError, match="vocabulary of"):
            wikitext.read_word_sequences(4, count)
    for length in (1, 1000):
        with pytest.raises(InputError, match="length from 2 to"):
            wikitext.read_word_sequences(length)


def test_the_real_articles():
    if not any(REAL.glob("w*")):
        pytest.skip("no wikitext-2/ in the folder that DATTRI_DATA names")
    counts = {"valid": (60, 213_886), "test": (60, 241_211), "train": (600, 2_051_910)}
    for part, (articles, words) in counts.items():
        found = wikitext.read_articles(part)
        assert len(found) == articles
        assert sum(len(text.split()) for text in found) == words
        assert wikitext._digest(found) == wikitext.DIGESTS[part]
    train, test, vocabulary = wikitext.read_word_sequences(512)
    assert (train.shape, test.shape) == ((4054, 512), (476, 512))
    assert len(vocabulary) == wikitext.WORDS == 33_278
    assert np.unique(train).size > 33_000
