"""MAESTRO from its archive, from the subset for tests, or nowhere."""

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import attrs
import numpy as np
import pytest
from dattri_benchmarks import fetch as fetching
from dattri_benchmarks import maestro
from dattri_benchmarks.midi import read_midi
from dattri_benchmarks.performance import EVENTS, SHIFT, VELOCITY, decode
from midi_files import file, track

from dattri_core.errors import InputError, StoreError

REAL = Path(os.environ.get("DATTRI_DATA", fetching.data_folder())) / "maestro"
HEADER = "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration"


def performance(pitch, notes):
    """Return a file of so many notes of one pitch; three events each, and a velocity."""
    beats = [(0, [0x90, pitch, 64]), (50, [0x80, pitch, 0]), (50, [0x90, pitch, 64])]
    return file(track(*beats[:2], *(beats[2], beats[1]) * (notes - 1)))


def files_of(prefix, table):
    """Return two test performances and three train ones, of 4, 8 and 12 notes."""
    rows = [HEADER]
    files = {}
    for k, (split, notes) in enumerate(
        [("test", 4), ("train", 4), ("train", 8), ("test", 8), ("train", 12)]
    ):
        name = f"2004/{k}.midi"
        rows.append(f'Anon,"Piece {k}, slow",{split},2004,{name},{k}.wav,{notes}.5')
        files[prefix + name] = performance(60 + k, notes)
    return {prefix + table: "\n".join(rows).encode(), **files}


def zip_of(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("maestro-v2.0.0/", b"")  # a folder
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def known(monkeypatch, name, content):
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(maestro, name, attrs.evolve(getattr(maestro, name), sha256=sha256))


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A small archive of the official form, and a fake network that serves it."""
    packed = zip_of(files_of("maestro-v2.0.0/", "maestro-v2.0.0.csv"))
    served = {maestro.ARCHIVE.urls[0]: packed}

    def urlopen(url, timeout):
        if url not in served:
            raise urllib.error.URLError("no route")
        return io.BytesIO(served[url])

    known(monkeypatch, "ARCHIVE", packed)
    monkeypatch.setenv("DATTRI_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return served


def test_the_official_archive_is_downloaded_once(web, tmp_path):
    found = maestro.read_maestro()
    web.clear()
    again = maestro.read_maestro()
    assert [p.name for p in (tmp_path / "maestro").iterdir()] == [maestro.ARCHIVE.name]
    assert again.source == found.source == maestro.ARCHIVE.name
    assert again.files == found.files
    assert found.splits == {
        "train": ("2004/1.midi", "2004/2.midi", "2004/4.midi"),
        "validation": (),
        "test": ("2004/0.midi", "2004/3.midi"),
    }
    assert found.seconds["2004/4.midi"] == 12.5


def test_the_subset_serves_where_the_official_archive_is_not(web, tmp_path, monkeypatch):
    folder = tmp_path / "maestro"
    folder.mkdir()
    packed = tar_of(files_of("", "subset.csv"))
    known(monkeypatch, "SUBSET", packed)
    (folder / maestro.SUBSET.name).write_bytes(packed)
    found = maestro.read_maestro()
    assert found.source == maestro.SUBSET.name
    assert not (folder / maestro.ARCHIVE.name).exists()  # nothing was downloaded
    (folder / maestro.ARCHIVE.name).write_bytes(next(iter(web.values())))
    assert maestro.read_maestro().source == maestro.ARCHIVE.name
    assert maestro.read_maestro().files == found.files


def test_what_is_another_file_is_refused(web, tmp_path, monkeypatch):
    folder = tmp_path / "maestro"
    folder.mkdir()
    (folder / maestro.SUBSET.name).write_bytes(b"something else")
    with pytest.raises(StoreError, match="SHA-256"):
        maestro.read_maestro()
    known(monkeypatch, "SUBSET", b"something else")
    with pytest.raises(StoreError, match="cannot be unpacked"):
        maestro.read_maestro()
    packed = tar_of({"subset.csv": f"{HEADER}\na,b,test,2004,lost.midi,c,1".encode()})
    known(monkeypatch, "SUBSET", packed)
    (folder / maestro.SUBSET.name).write_bytes(packed)
    with pytest.raises(StoreError, match=r"lost\.midi"):
        maestro.read_maestro()


def test_a_performance_that_is_no_midi_file_is_named(web):
    found = maestro.read_maestro()
    broken = attrs.evolve(found, files={"2004/0.midi": b"MThd"})
    with pytest.raises(StoreError, match=r"2004/0\.midi.*MIDI file"):
        broken.events("2004/0.midi")


def test_without_any_the_error_says_what_to_do(web):
    web.clear()
    with pytest.raises(InputError, match="DATTRI_DATA"):
        maestro.read_maestro()


def test_sequences_are_pieces_of_performances_taken_in_turn(web):
    # 8 notes: velocity, then on, shift, off, shift in turn: 32 events, so 5 sequences of 6
    read = maestro.read_maestro()
    sizes = {name: len(read.events(name)) // 6 for name in read.splits["train"]}
    assert sizes == {"2004/1.midi": 2, "2004/2.midi": 5, "2004/4.midi": 8}
    found, names, source = maestro.read_event_sequences("train", 6, 15, seed=3)
    assert (found.shape, source, len(set(names))) == ((15, 6), maestro.ARCHIVE.name, 15)
    for row, name in zip(found, names, strict=True):
        performance, _, place = name.partition("#")
        start = 6 * int(place)
        assert row.tolist() == read.events(performance)[start : start + 6].tolist()
    pieces = [name.partition("#")[0] for name in names]
    assert len(set(pieces[:3])) == 3
    assert len(set(pieces[3:6])) == 3
    fewer, few_names, _ = maestro.read_event_sequences("train", 6, 7, seed=3)
    assert few_names == names[:7]
    assert np.array_equal(fewer, found[:7])
    assert maestro.read_event_sequences("train", 6, 15, seed=4)[1] != names
    with pytest.raises(InputError, match=r"16 train sequences of 6 events.* 15"):
        maestro.read_event_sequences("train", 6, 16, seed=3)


@pytest.fixture(scope="module")
def real():
    if not any((REAL / a.name).exists() for a in (maestro.ARCHIVE, maestro.SUBSET)):
        pytest.skip("no maestro/ in the folder that DATTRI_DATA names")
    return maestro.read_maestro()


def test_real_performances_last_as_long_as_their_table_says(real):
    """The table's durations are of the recordings, which end with the last note."""
    expected = {
        maestro.ARCHIVE.name: {"train": 967, "validation": 137, "test": 178},
        maestro.SUBSET.name: {"train": 100, "validation": 20, "test": 20},
    }
    assert {split: len(names) for split, names in real.splits.items()} == expected[real.source]
    for name in real.splits["validation"][:8]:
        last = read_midi(real.files[name]).notes.end.max()
        assert abs(last - real.seconds[name]) < 0.2


def test_real_events(real):
    for name in real.splits["test"][:3]:
        events = real.events(name)
        steps = decode(events)
        assert (events.max() < EVENTS, len(steps.start) > 300) == (True, True)
        waited = events[(events >= SHIFT) & (events < VELOCITY)].astype(int) - SHIFT + 1
        assert waited.sum() == steps.end.max()
        assert abs(steps.start.max() / 100 - read_midi(real.files[name]).notes.start.max()) < 0.006
