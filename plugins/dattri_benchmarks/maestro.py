"""MAESTRO v2.0.0 (Hawthorne et al. 2019): piano performances of a competition, as MIDI.

Licence: CC BY-NC-SA 4.0. Nothing of it comes with the package.
"""

from __future__ import annotations

import csv
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from attrs import frozen

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_benchmarks.midi import read_midi, sustain
from dattri_benchmarks.performance import encode, quantise
from dattri_core import InputError, StoreError, bar

Array = np.ndarray[Any, Any]
Split = Literal["train", "validation", "test"]
ARCHIVE = Download(
    "maestro-v2.0.0-midi.zip",
    ("https://storage.googleapis.com/magentadata/datasets/maestro/v2.0.0/maestro-v2.0.0-midi.zip",),
    "ec2cc9d94886c6b376db1eaa2b8ad1ce62ff9f0a28b3744782b13163295dadf3",
    unpack=False,
)
"""1282 performances, 59,243,107 bytes; by the checksum that other loaders of it publish (MusPy)."""
SUBSET = Download(
    "maestro-v2.0.0-subset140.tar.xz",
    (),
    "822b53b9521deb086e078a4a8fdea69093be9eeb4d9c62224c6f6a60d36ff029",
    unpack=False,
)
"""140 of them, 100 of the train split and 20 of each other one: an archive for tests."""


@frozen(eq=False)
class Maestro:
    """The performances of an archive.

    Args:
        source: Name of the archive.
        splits: Names of the performances of each split, in the order of its table.
        seconds: How long each one lasts, as the table says.
        files: The MIDI file of each.
    """

    source: str
    splits: Mapping[str, tuple[str, ...]]
    seconds: Mapping[str, float]
    files: Mapping[str, bytes]

    def events(self, name: str) -> Array:
        """Return a performance as events, see `dattri_benchmarks.performance`.

        Raises:
            StoreError: Its file is none of MIDI.
        """
        try:
            return encode(quantise(sustain(read_midi(self.files[name]))))
        except StoreError as error:
            raise StoreError(f"performance {name!r} of {self.source!r}: {error}") from error


def read_maestro() -> Maestro:
    """Return the performances.

    Read from ``maestro/`` below the folder of data (see `data_folder`): from the official archive,
    else from the subset for tests when that is there, else the official archive is downloaded.

    Raises:
        StoreError: A file is truncated or holds something else.
        InputError: Neither is there, and the archive cannot be downloaded.
    """
    folder = data_folder() / "maestro"
    if (folder / SUBSET.name).exists() and not (folder / ARCHIVE.name).exists():
        return _maestro(SUBSET.name, _from_tar(fetch(SUBSET, folder)), "subset.csv", "")
    with zipfile.ZipFile(io.BytesIO(fetch(ARCHIVE, folder))) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    return _maestro(ARCHIVE.name, files, "maestro-v2.0.0/maestro-v2.0.0.csv", "maestro-v2.0.0/")


def read_event_sequences(
    split: Split, length: int, count: int, seed: int
) -> tuple[Array, list[str], str]:
    """Return sequences of events ``[count, length]``, their names, and the archive's name.

    Performances are cut into sequences one after another; an end that does not fill one is left
    out. The seed orders the performances and the sequences of each; then the first sequence of
    every performance is taken before the second one of any, so that few come from one performance.

    Raises:
        InputError: There are not so many.
    """
    maestro = read_maestro()
    number = ("train", "validation", "test").index(split)
    names = maestro.splits[split]
    order = np.random.default_rng([seed, 4, number]).permutation(len(names))
    queues: list[list[tuple[str, Array]]] = []
    with bar(f"events of {split} performances", min(count, len(names)), None) as shown:
        for place in order[:count]:
            events = maestro.events(names[place])
            cut = events[: len(events) // length * length].reshape(-1, length)
            turn = np.random.default_rng([seed, 5, number, int(place)]).permutation(len(cut))
            queues.append([(f"{names[place]}#{k}", cut[k]) for k in turn])
            shown.advance()
    chosen = list(_in_turn(queues))[:count]
    if len(chosen) < count:
        raise InputError(
            f"maestro: {count} {split} sequences of {length} events, and {maestro.source!r} has "
            f"{len(chosen)}; ask for fewer"
            + ("" if maestro.source == ARCHIVE.name else f", or put {ARCHIVE.name!r} beside it")
        )
    return np.stack([events for _, events in chosen]), [name for name, _ in chosen], maestro.source


def _in_turn(queues: list[list[tuple[str, Array]]]) -> Iterator[tuple[str, Array]]:
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            yield from queue[turn : turn + 1]


def _maestro(source: str, files: Mapping[str, bytes], table: str, prefix: str) -> Maestro:
    try:
        rows = list(csv.DictReader(io.StringIO(files[table].decode())))
        splits = {
            split: tuple(row["midi_filename"] for row in rows if row["split"] == split)
            for split in ("train", "validation", "test")
        }
        names = [name for split in splits.values() for name in split]
        return Maestro(
            source,
            splits,
            {row["midi_filename"]: float(row["duration"]) for row in rows},
            {name: files[prefix + name] for name in names},
        )
    except KeyError as error:
        raise StoreError(f"data file {source!r}: has no {error}") from error


def _from_tar(content: bytes) -> dict[str, bytes]:
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
            handles = {member.name: archive.extractfile(member) for member in archive}
            return {name: handle.read() for name, handle in handles.items() if handle is not None}
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise StoreError(f"data file {SUBSET.name!r}: cannot be unpacked ({error})") from error
