"""Standard MIDI Files: their notes in seconds, as struck and as the sustain pedal holds them.

Source: Standard MIDI Files 1.0, RP-001, MIDI Manufacturers Association 1996.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve, frozen

from dattri_core import StoreError

Array = np.ndarray[Any, Any]
Message = tuple[int, int, int, int]
"""Tick, status with its channel, first and second data byte."""

NOTE_OFF, NOTE_ON, CONTROL = 0x80, 0x90, 0xB0
ONE_BYTE = (0xC0, 0xD0)  # messages of one data byte: program, channel pressure
SUSTAIN, DOWN = 64, 64
"""The controller of the sustain pedal, and the least value at which it is down."""
SYSTEM, META = (0xF0, 0xF7), 0xFF
TEMPO, END = 0x51, 0x2F
QUARTER = 500_000
"""Microseconds of a quarter note where a file has set no tempo."""


@frozen(eq=False)
class Notes:
    """Notes by start, then pitch; each array ``[n]``.

    Args:
        start: Seconds from the beginning of the file.
        end: Seconds; after the start.
        pitch: MIDI numbers, 60 is middle C.
        velocity: 1 to 127.
        channel: 0 to 15.
    """

    start: Array
    end: Array
    pitch: Array
    velocity: Array
    channel: Array


@frozen(eq=False)
class Score:
    """A file: the notes and pedals of all its tracks.

    Args:
        notes: From their strike to their release.
        pedals: By channel, the seconds ``[p]`` of its messages and whether it is down from then on.
        length: Seconds to the end of the longest track.
    """

    notes: Notes
    pedals: dict[int, tuple[Array, Array]]
    length: float


def read_midi(content: bytes) -> Score:
    """Return the score of a file of format 0 or 1.

    A release ends every note of its channel and pitch that was struck before its tick. A note that
    is never released is left out.

    Raises:
        StoreError: The file is truncated, or is no such file.
    """
    division, tracks = _chunks(content)
    messages: list[Message] = []
    tempos: list[tuple[int, int]] = []
    last = 0
    for track in tracks:
        last = max(last, _Track(track).read(messages, tempos))
    messages.sort(key=lambda message: message[0])  # stable: one tick keeps the order of its track
    clock = _Clock(division, tempos)
    struck: dict[tuple[int, int], list[tuple[int, int]]] = {}
    found: list[tuple[int, int, int, int, int]] = []
    pedals: dict[int, list[tuple[int, int]]] = {}
    for tick, status, first, second in messages:
        kind, channel = status & 0xF0, status & 0x0F
        if kind == CONTROL:
            pedals.setdefault(channel, []).append((tick, second))
        elif kind == NOTE_ON and second:
            struck.setdefault((channel, first), []).append((tick, second))
        else:  # a note-on of velocity 0 is a release
            open_notes = struck.pop((channel, first), [])
            found += [(t, tick, first, v, channel) for t, v in open_notes if t < tick]
            if still := [(t, v) for t, v in open_notes if t == tick]:
                struck[channel, first] = still
    table = np.array(sorted(found, key=lambda note: (note[0], note[2])), np.int64).reshape(-1, 5)
    notes = Notes(clock(table[:, 0]), clock(table[:, 1]), *table[:, 2:].T)
    held = {
        channel: (clock(np.array([t for t, _ in its])), np.array([v >= DOWN for _, v in its]))
        for channel, its in pedals.items()
    }
    return Score(notes, held, float(clock(np.array([last]))[0]))


def sustain(score: Score) -> Notes:
    """Return the notes of a score as they are heard: a pedal that is down holds them.

    A note that is released while the pedal of its channel is down ends when the pedal goes up or
    its key is struck again, at the latest where the file ends. At one moment pedals come before
    releases.

    Source: Oore et al. 2018, arXiv 1808.03715, section 2.2.
    """
    notes = score.notes
    end = notes.end.copy()
    for channel, (times, down) in score.pedals.items():
        own = np.flatnonzero(notes.channel == channel)
        released = notes.end[own]
        place = np.searchsorted(times, released, side="right")  # messages up to the release
        held = np.append(False, down)[place]
        lifts = np.append(times[~down], np.inf)
        until = lifts[np.searchsorted(lifts, released, side="right")]
        for pitch in np.unique(notes.pitch[own]):
            its = notes.pitch[own] == pitch
            strikes = np.append(notes.start[own][its], np.inf)
            again = strikes[np.searchsorted(strikes, released[its], side="left")]
            until[its] = np.minimum(until[its], again)
        until = np.maximum(np.minimum(until, score.length), released)
        end[own] = np.where(held, until, released)
    return evolve(notes, end=end)


class _Clock:
    """Turns ticks, ``[n]``, into seconds."""

    def __init__(self, division: int, tempos: list[tuple[int, int]]) -> None:
        if division & 0x8000:  # frames a second, negative, and ticks a frame; no tempo matters
            frames = 256 - (division >> 8)
            rate = 30_000 / 1001 if frames == 29 else frames
            changes = [(0, 1 / (rate * (division & 0xFF)))]
        else:
            ordered = sorted(tempos, key=lambda tempo: tempo[0])
            changes = [(tick, tempo * 1e-6 / division) for tick, tempo in [(0, QUARTER), *ordered]]
        self.ticks = np.array([tick for tick, _ in changes])
        self.seconds_a_tick = np.array([seconds for _, seconds in changes])
        passed = np.diff(self.ticks) * self.seconds_a_tick[:-1]
        self.seconds = np.append(0.0, np.cumsum(passed))

    def __call__(self, ticks: Array) -> Array:
        place = np.searchsorted(self.ticks, ticks, side="right") - 1
        since: Array = (ticks - self.ticks[place]) * self.seconds_a_tick[place]
        return self.seconds[place] + since


def _chunks(content: bytes) -> tuple[int, list[bytes]]:
    """Return the division of time and the content of every track."""
    if content[:4] != b"MThd" or len(content) < 14:
        raise StoreError(f"MIDI file: begins with {content[:4]!r}, expected a header 'MThd'")
    form, count, division = (int.from_bytes(content[at : at + 2], "big") for at in (8, 10, 12))
    if form not in (0, 1):
        raise StoreError(f"MIDI file: format {form}, expected 0 or 1, whose tracks sound together")
    if division == 0 or (division & 0x8000 and not division & 0xFF):
        raise StoreError("MIDI file: a time division of 0 ticks")
    place = 8 + int.from_bytes(content[4:8], "big")
    tracks: list[bytes] = []
    while len(tracks) < count:
        head = content[place : place + 8]
        size = int.from_bytes(head[4:], "big")
        body = content[place + 8 : place + 8 + size]
        if len(head) < 8 or len(body) < size:
            raise StoreError(
                f"MIDI file: truncated: {len(tracks)} whole tracks of {count} in {len(content)} "
                "bytes"
            )
        if head[:4] == b"MTrk":  # other chunks are for other programs
            tracks.append(body)
        place += 8 + size
    return division, tracks


class _Track:
    """Reads the messages of one track, byte by byte."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def read(self, messages: list[Message], tempos: list[tuple[int, int]]) -> int:
        """Add strikes, releases, sustain pedals and tempos; return the last tick."""
        content, tick, status = self.content, 0, 0
        try:
            while self.place < len(content):
                tick += self._number()
                byte = content[self.place]
                if byte >= 0x80:
                    status = byte
                    self.place += 1
                if status == META:
                    kind, value = content[self.place], self._block(self.place + 1)
                    if kind == TEMPO:
                        tempos.append((tick, int.from_bytes(value, "big")))
                    elif kind == END:
                        break
                    status = 0  # ends the running status
                elif status in SYSTEM:
                    self._block(self.place)
                    status = 0
                elif not 0x80 <= status < 0xF0:
                    raise StoreError(
                        f"MIDI file: byte {byte:#04x} at {self.place} of a track has no status"
                    )
                elif status & 0xF0 in ONE_BYTE:
                    self.place += 1
                else:
                    first, second = content[self.place], content[self.place + 1]
                    self.place += 2
                    kind = status & 0xF0
                    if kind in (NOTE_OFF, NOTE_ON) or (kind == CONTROL and first == SUSTAIN):
                        messages.append((tick, status, first, second))
        except IndexError as error:
            raise StoreError(f"MIDI file: a track of {len(content)} bytes is truncated") from error
        return tick

    def _number(self) -> int:
        """Return a number of variable length: seven bits a byte, the last one below 0x80."""
        value = 0
        while True:
            byte = self.content[self.place]
            self.place += 1
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value

    def _block(self, place: int) -> bytes:
        """Return the bytes of a block that begins with its length."""
        self.place = place
        size = self._number()
        block = self.content[self.place : self.place + size]
        if len(block) < size:
            raise IndexError
        self.place += size
        return block
