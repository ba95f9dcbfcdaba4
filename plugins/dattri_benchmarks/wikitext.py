"""WikiText-2 (Merity et al. 2016): 720 articles of Wikipedia as words, 33,277 distinct.

Licence: CC BY-SA 3.0. Nothing of it comes with the package.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_core import InputError, StoreError

Array = np.ndarray[Any, Any]
Part = Literal["train", "valid", "test"]
ARCHIVE = Download(
    "wikitext-2-v1.zip",
    (
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
    ),
    "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    unpack=False,
)
DIGESTS = {
    "train": "4ffe3d9efec78b3956d82aa28aa7f56df0b70ddf3740ef9f59b7bff3d63a0b66",
    "valid": "c48e834ca5e98ab2017c9540e48405fdbcd584b371a0d9ede961b1b2bf5367af",
    "test": "2ae111888bb10b9eb455c117fd621e783b2cac81f8aa9708135029b5e9d74302",
}
"""Of the articles of a part, whatever their order: see `_digest`."""
UNKNOWN, END = "<unk>", "<eos>"
WORDS = 33_278
"""Distinct ones in the train articles, with the end of a line."""
HEADING = re.compile(r"\n \n = ([^=\n](?:[^\n]*[^=\n])?) = \n \n")
"""The title of an article: a line of its own with one ``=`` on either side."""


def read_articles(part: Part) -> list[str]:
    """Return the articles of a part in alphabetical order: 600, 60 and 60.

    Lines hold words between blanks, and none is empty. Read from ``wikitext-2/`` below the folder
    of data (see `data_folder`): from ``wiki.PART.tokens`` or ``wiki.PART.tokens.xz`` when one is
    there, which may hold the articles in any order, else from the official archive, downloaded
    when missing (4 MB). The order is the alphabet's because copies in another order than the
    official one are around: all give the same.

    Raises:
        StoreError: A file is truncated or holds something else.
        InputError: Nothing is there, and the archive cannot be downloaded.
    """
    folder = data_folder() / "wikitext-2"
    for name in (f"wiki.{part}.tokens", f"wiki.{part}.tokens.xz"):
        path = folder / name
        if path.exists():
            try:
                content = path.read_bytes()
                text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
            except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
                raise StoreError(
                    f"data file {str(path)!r}: cannot be read ({error}); delete it to have the "
                    "official archive read instead"
                ) from error
            articles = _articles(text)
            found = _digest(articles)
            if found != DIGESTS[part]:
                raise StoreError(
                    f"data file {str(path)!r}: its {len(articles)} articles have the SHA-256 "
                    f"{found}, expected {DIGESTS[part]}; delete it to have the official archive "
                    "read instead"
                )
            return articles
    with zipfile.ZipFile(io.BytesIO(fetch(ARCHIVE, folder))) as archive:
        return _articles(archive.read(f"wikitext-2/wiki.{part}.tokens").decode())


def read_word_sequences(length: int, words: int | None = None) -> tuple[Array, Array, list[str]]:
    """Return train and test sequences of word numbers, ``[n, length]`` each, and the vocabulary.

    Articles follow one another in their order, with ``<eos>`` at the end of every line, and are
    cut into sequences; an end that does not fill one is left out. The vocabulary is that of the
    train articles, the most frequent first, 33,278 words. Length 512 gives 4054 and 476.

    Args:
        length: Words of a sequence.
        words: Size of the vocabulary; all by default. Words beyond are ``<unk>``.
    """
    train, test = (_stream(read_articles(part)) for part in ("train", "test"))
    # Words as frequent as one another stand in the order of the alphabet.
    ranked = sorted(Counter(train).items(), key=lambda item: (-item[1], item[0]))
    if words is not None and not 2 <= words <= len(ranked):
        raise InputError(
            f"wikitext-2: a vocabulary of {words} words; give a number from 2 to {len(ranked)}"
        )
    vocabulary = [word for word, _ in ranked[:words]]
    if UNKNOWN not in vocabulary:
        vocabulary[-1] = UNKNOWN
    if not 2 <= length <= len(test):
        raise InputError(
            f"wikitext-2: sequences of {length} words; give a length from 2 to {len(test)}"
        )
    numbers = {word: number for number, word in enumerate(vocabulary)}
    return _cut(train, numbers, length), _cut(test, numbers, length), vocabulary


def _stream(articles: Sequence[str]) -> list[str]:
    lines = (line for article in articles for line in article.split("\n"))
    return [word for line in lines for word in [*line.split(), END]]


def _cut(words: Sequence[str], numbers: dict[str, int], length: int) -> Array:
    unknown = numbers[UNKNOWN]
    count = len(words) // length
    codes = np.fromiter(
        (numbers.get(word, unknown) for word in words[: count * length]), np.int32, count * length
    )
    return codes.reshape(count, length)


def _articles(text: str) -> list[str]:
    """Return the articles of a file, sorted, without empty lines."""
    pieces = HEADING.split("\n" + text)[1:]
    found = []
    for title, body in zip(pieces[::2], pieces[1::2], strict=True):
        lines = [f"= {title} =", *body.split("\n")]
        found.append("\n".join(line.strip() for line in lines if line.strip()))
    return sorted(found)


def _digest(articles: Sequence[str]) -> str:
    return hashlib.sha256("\n\n".join(articles).encode()).hexdigest()
