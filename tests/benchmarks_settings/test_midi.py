"""Reading MIDI: the standard's own examples, bytes by hand, the pedal against a simulation."""

import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from dattri_benchmarks import fetch as fetching
from dattri_benchmarks import maestro
from dattri_benchmarks.midi import Notes, Score, read_midi, sustain
from hypothesis import given, settings
from hypothesis import strategies as st
from midi_files import FORMAT_0, FORMAT_1, chunk, file, tempo, track
from pedal_oracle import pedalled

from dattri_core.errors import StoreError


def rows(notes):
    parts = (notes.start, notes.end, notes.pitch, notes.velocity, notes.channel)
    return [tuple(row) for row in np.stack(parts, 1).tolist()]


@pytest.mark.parametrize("content", [FORMAT_0, FORMAT_1])
def test_the_examples_of_the_standard(content):
    score = read_midi(content)
    assert rows(score.notes) == [
        (0.0, 2.0, 48, 96, 2),
        (0.0, 2.0, 60, 96, 2),
        (0.5, 2.0, 67, 64, 1),
        (1.0, 2.0, 76, 32, 0),
    ]
    assert score.length == 2.0
    assert not score.pedals


@pytest.mark.parametrize("content", [FORMAT_0, FORMAT_1])
def test_a_truncated_file_is_refused_wherever_it_ends(content):
    for size in range(len(content)):
        with pytest.raises(StoreError, match="MIDI file"):
            read_midi(content[:size])


def test_tempos_of_any_track_hold_for_all():
    # 100 ticks a quarter: 0.5 s a quarter up to tick 100, then 1 s, then 0.25 s from tick 300
    content = file(
        track((0, [0x90, 60, 1]), (400, [0x80, 60, 0]), (100, [0x90, 62, 2]), (1, [0x80, 62, 0])),
        track((100, tempo(1_000_000)), (200, tempo(250_000))),
    )
    expected = [(0.0, 2.75, 60, 1, 0), (3.0, 3.0025, 62, 2, 0)]
    np.testing.assert_allclose(rows(read_midi(content).notes), expected, rtol=1e-15)


@pytest.mark.parametrize(("division", "seconds"), [(0xE728, 0.001), (0xE350, 1001 / 30_000 / 80)])
def test_time_in_frames_knows_no_tempo(division, seconds):
    # -25 frames a second of 40 ticks; -29 is 29.97 frames, here of 80 ticks
    content = file(
        track((0, tempo(1)), (500, [0x90, 60, 64]), (250, [0x90, 60, 0])), division=division
    )
    notes = read_midi(content).notes
    np.testing.assert_allclose([notes.start[0], notes.end[0]], [500 * seconds, 750 * seconds])


def test_everything_but_notes_tempos_and_the_pedal_is_skipped():
    content = file(
        track(
            (0, b"\xff\x03\x05piano"),  # a name
            (0, b"\xf0\x03\x01\x02\xf7"),  # system exclusive
            (0, b"\xf7\x02\x01\x02"),  # an escape
            (0, [0xC0, 5]),
            (0, [0xB0, 67, 127]),  # another pedal
            (0, [0xD0, 9]),
            (0, [0xE0, 1, 2]),
            (0, [0xA0, 60, 2]),
            (0, [0x90, 60, 64]),
            (100, [60, 0]),
            end=100,
        ),
        chunk(b"XFIH", b"of another program"),
    )
    content = content[:10] + b"\x00\x01" + content[12:]  # the header counts tracks
    score = read_midi(content)
    assert rows(score.notes) == [(0.0, 0.5, 60, 64, 0)]
    assert (score.length, score.pedals) == (1.0, {})


def test_what_follows_the_end_of_a_track_is_not_read():
    body = b"\x00\x90\x3c\x40\x64\x80\x3c\x00\x00\xff\x2f\x00"
    assert len(rows(read_midi(file(chunk(b"MTrk", body + b"\x01\x02\x03"))).notes)) == 1


def test_a_release_ends_what_was_struck_before_it():
    twice = track(
        (0, [0x90, 60, 10]),
        (100, [0x90, 60, 20]),
        (0, [0x80, 60, 0]),  # the second one has just been struck
        (100, [0x80, 60, 0]),
        (0, [0x80, 60, 0]),  # of a silent key
        (0, [0x91, 60, 30]),  # another channel
        (100, [0x80, 60, 0]),
        (0, [0x90, 61, 40]),  # never released
    )
    assert rows(read_midi(file(twice)).notes) == [(0.0, 0.5, 60, 10, 0), (0.5, 1.0, 60, 20, 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF" + bytes(20), "RIFF"),
        (file(track(), form=2), "format 2"),
        (file(track(), division=0), "0 ticks"),
        (file(track(), division=0x8000), "0 ticks"),
        (file(track((0, [60, 64]))), "no status"),
        # a meta event ends the running status
        (file(track((0, [0x90, 60, 64]), (0, b"\xff\x01\x00"), (9, [60, 0]))), "no status"),
        (file(track((0, [0xF8]))), "no status"),
        (file(chunk(b"MTrk", b"\x00\x90\x3c")), "truncated"),
        (file(chunk(b"MTrk", b"\x00\xff\x01\x09abc")), "truncated"),
        (file(chunk(b"MTrk", b"\x81")), "truncated"),
    ],
)
def test_what_is_no_file_of_notes_is_refused(content, message):
    with pytest.raises(StoreError, match=message):
        read_midi(content)


def test_a_pedal_holds_until_it_is_lifted_or_the_key_is_struck_again():
    content = file(
        track(
            (0, [0x90, 60, 64]),  # released while the pedal is down: lasts until it goes up
            (0, [0x90, 62, 64]),  # struck again before
            (0, [0x90, 64, 64]),  # released before the pedal goes down
            (0, [0x91, 65, 64]),  # a channel without pedal
            (0, [0x90, 67, 64]),  # released after the pedal has gone up
            (100, [0x80, 64, 0]),
            (100, [0xB0, 64, 64]),
            (100, [0x80, 60, 0]),
            (0, [0x80, 62, 0]),
            (0, [0x81, 65, 0]),
            (100, [0x90, 62, 64]),
            (100, [0xB0, 64, 127]),
            (100, [0xB0, 64, 63]),
            (100, [0x80, 62, 0]),
            (0, [0x80, 67, 0]),
            (100, [0xB0, 64, 127]),
            (0, [0x90, 70, 64]),
            (100, [0x80, 70, 0]),  # held to the end of the file
            end=300,
        )
    )
    score = read_midi(content)
    heard = sustain(score)
    ends = {(row[2], row[0]): row[1] for row in rows(heard)}
    assert ends == {
        (60, 0.0): 3.0,
        (62, 0.0): 2.0,
        (64, 0.0): 0.5,
        (65, 0.0): 1.5,
        (67, 0.0): 3.5,
        (62, 2.0): 3.5,
        (70, 4.0): 6.0,
    }
    assert np.array_equal(heard.start, score.notes.start)


@st.composite
def scores(draw):
    """Return notes that do not overlap in a pitch, and pedals, on a coarse grid: many ties."""
    found = []
    for pitch in range(3):
        times = sorted(draw(st.lists(st.integers(0, 30), max_size=8, unique=True)))
        # notes may follow one another without a gap
        found += [(a, b, pitch) for a, b in pairwise(times) if draw(st.booleans())]
    found.sort(key=lambda note: (note[0], note[2]))
    start, end, pitch = np.array(found, float).reshape(-1, 3).T
    ones = np.ones(len(start), int)
    notes = Notes(start, end, pitch.astype(int), 64 * ones, 0 * ones)
    moments = sorted(draw(st.lists(st.integers(0, 30), max_size=10, unique=True)))
    down = [draw(st.booleans()) for _ in moments]
    pedals = {0: (np.array(moments, float), np.array(down, bool))} if moments else {}
    return Score(notes, pedals, 40.0)


@settings(max_examples=200, deadline=None)
@given(scores())
def test_the_pedal_equals_a_simulation_moment_by_moment(score):
    notes = score.notes
    given_notes = list(zip(notes.start, notes.end, notes.pitch, strict=True))
    times, down = score.pedals.get(0, ((), ()))
    expected = pedalled(given_notes, list(zip(times, down, strict=True)), score.length)
    assert sustain(score).end.tolist() == expected


@pytest.mark.peers
def test_notes_equal_those_of_pretty_midi():
    pretty_midi = pytest.importorskip("pretty_midi")
    folder = Path(os.environ.get("DATTRI_DATA", fetching.data_folder())) / "maestro"
    if not any((folder / a.name).exists() for a in (maestro.ARCHIVE, maestro.SUBSET)):
        pytest.skip("no maestro/ in the folder that DATTRI_DATA names")
    read = maestro.read_maestro()
    for name in read.splits["test"][:10]:
        theirs = pretty_midi.PrettyMIDI(io.BytesIO(read.files[name]))
        expected = sorted(
            (n.start, n.end, n.pitch, n.velocity) for i in theirs.instruments for n in i.notes
        )
        ours = sorted(row[:4] for row in rows(read_midi(read.files[name]).notes))
        assert len(ours) == len(expected)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
