"""Performance events: an example by hand, and that encoding loses nothing but below the grid."""

import numpy as np
import pytest
from dattri_benchmarks.midi import Notes
from dattri_benchmarks.performance import (
    EVENTS,
    OFF,
    ON,
    SHIFT,
    VELOCITY,
    Steps,
    decode,
    encode,
    quantise,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core.errors import InputError


def notes_of(*rows):
    start, end, pitch, velocity = np.array(rows, float).reshape(-1, 4).T
    return Notes(start, end, pitch.astype(int), velocity.astype(int), np.zeros(len(start), int))


def rows(steps):
    return np.stack([steps.start, steps.end, steps.pitch, steps.level], 1).tolist()


@st.composite
def any_notes(draw):
    """Return notes of a few pitches on half steps, so that they meet, overlap and last nothing."""
    note = st.tuples(
        st.integers(0, 900), st.integers(1, 600), st.sampled_from([0, 60, 127]), st.integers(1, 127)
    )
    found = draw(st.lists(note, max_size=20))
    return notes_of(*((s / 200, (s + length) / 200, p, v) for s, length, p, v in found))


def test_an_example_by_hand():
    steps = quantise(
        notes_of(
            (0.5, 3.014, 60, 1),  # steps 50 to 301
            (0.504, 0.506, 64, 4),  # 50 to 51, the same level
            (0.5, 0.514, 62, 127),  # 50 to 51
            (3.014, 3.5, 60, 5),  # 301 to 350
            (3.014, 3.5, 61, 6),  # the same, and the same level
        )
    )
    assert rows(steps) == [
        *([50, 301, 60, 0], [50, 51, 62, 31], [50, 51, 64, 0]),
        *([301, 350, 60, 1], [301, 350, 61, 1]),
    ]
    assert encode(steps).tolist() == [
        *(SHIFT + 49, VELOCITY + 0, ON + 60, VELOCITY + 31, ON + 62, VELOCITY + 0, ON + 64),
        *(SHIFT + 0, OFF + 62, OFF + 64),
        *(SHIFT + 99, SHIFT + 99, SHIFT + 49),  # 250 steps
        *(OFF + 60, VELOCITY + 1, ON + 60, ON + 61),  # a release comes before a strike
        *(SHIFT + 48, OFF + 60, OFF + 61),
    ]
    assert (ON, OFF, SHIFT, VELOCITY, EVENTS) == (0, 128, 256, 356, 388)


def test_the_levels_hold_four_velocities_each():
    steps = quantise(notes_of(*((v, v + 0.5, 60, v) for v in range(1, 128))))
    counts = np.bincount(steps.level)
    assert (counts[:31] == 4).all()
    assert (len(counts), counts[31]) == (32, 3)  # velocities end at 127


def test_notes_of_a_pitch_that_meet_in_the_grid():
    # of one step the longest stays; a longer overlap ends at the second strike
    steps = quantise(notes_of((1.001, 1.2, 60, 9), (1.004, 1.3, 60, 99), (1.1, 1.4, 60, 9)))
    assert rows(steps) == [[100, 110, 60, 24], [110, 140, 60, 2]]


@settings(max_examples=200, deadline=None)
@given(any_notes())
def test_decoding_gives_the_notes_back(notes):
    steps = quantise(notes)
    events = encode(steps)
    assert rows(decode(events)) == rows(steps)
    assert events.dtype == np.uint16
    shifts = events[(events >= SHIFT) & (events < VELOCITY)].astype(int) - SHIFT + 1
    assert shifts.sum() == max(steps.end, default=0)
    assert np.array_equal(encode(decode(events)), events)


@settings(max_examples=200, deadline=None)
@given(any_notes())
def test_the_grid_keeps_pitches_apart_and_is_near(notes):
    steps = quantise(notes)
    assert (steps.end > steps.start).all()
    for pitch in np.unique(steps.pitch):
        own = steps.pitch == pitch
        assert (steps.start[own][1:] >= steps.end[own][:-1]).all()
        wanted = set(np.floor(notes.start[notes.pitch == pitch] * 100 + 0.5).astype(int))
        assert set(steps.start[own]) == wanted


@given(st.lists(st.integers(0, EVENTS - 1), max_size=60))
def test_any_events_are_a_performance(events):
    """Also those that a model makes up; what they say twice is said once when encoded again."""
    steps = decode(np.array(events, np.uint16))
    assert (steps.end > steps.start).all()
    assert rows(decode(encode(steps))) == rows(steps)


def test_a_sequence_cut_out_of_a_longer_one():
    steps = decode(np.array([OFF + 3, SHIFT + 9, ON + 60, SHIFT + 4], np.uint16))
    assert rows(steps) == [[10, 15, 60, 16]]
    with pytest.raises(InputError, match="388"):
        decode(np.array([388], np.uint16))


def test_no_notes():
    none = Steps(*(np.zeros(0, int) for _ in range(4)))
    assert encode(none).shape == (0,)
    assert rows(decode(encode(none))) == []
