"""Performances as events: keys go down and up, time passes, the dynamics change; 388 in all.

Source: Oore et al. 2018, arXiv 1808.03715, section 3.2; the events of the Music Transformer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

from dattri_benchmarks.midi import Notes
from dattri_core import InputError

Array = np.ndarray[Any, Any]
STEPS = 100
"""In a second, and the most that one event of passing time holds."""
LOUDNESS = 32
"""Levels of velocity: four velocities each."""
ON, OFF, SHIFT, VELOCITY = 0, 128, 256, 256 + STEPS
"""Of a pitch p, ``ON + p`` and ``OFF + p``; of n steps, ``SHIFT + n - 1``; of a level, the last."""
EVENTS = VELOCITY + LOUDNESS


@frozen(eq=False)
class Steps:
    """Notes on a grid of ten milliseconds by start, then pitch; no two of a pitch overlap.

    Args:
        start: Steps from the beginning, ``[n]``.
        end: Steps, after the start.
        pitch: 0 to 127.
        level: Of velocity, 0 to 31.
    """

    start: Array
    end: Array
    pitch: Array
    level: Array


def quantise(notes: Notes) -> Steps:
    """Return the notes on the grid: the nearest step, at least one long, and (velocity - 1) // 4.

    Where two notes of a pitch meet in the grid the first one ends at the strike of the second; of
    those that are struck in the same step the longest stays.
    """
    start = np.floor(notes.start * STEPS + 0.5).astype(np.int64)
    end = np.maximum(np.floor(notes.end * STEPS + 0.5).astype(np.int64), start + 1)
    level = np.maximum(notes.velocity - 1, 0) * LOUDNESS // 128
    order = np.lexsort([end, start, notes.pitch])  # by pitch, then start
    start, end, pitch, level = (a[order] for a in (start, end, notes.pitch, level))
    follows = np.append(pitch[1:] == pitch[:-1], False)
    end = np.where(follows, np.minimum(end, np.append(start[1:], 0)), end)
    chosen = np.flatnonzero(end > start)
    chosen = chosen[np.lexsort([pitch[chosen], start[chosen]])]
    return Steps(start[chosen], end[chosen], pitch[chosen], level[chosen])


def encode(steps: Steps) -> Array:
    """Return the events of notes, ``[n]`` below 388, 16 bits each.

    At one step releases come before strikes, both by pitch. A level of velocity stands before the
    first strike that has it, passing time before what it leads to.
    """
    events: list[int] = []
    now, level = 0, -1
    start, end, pitches, levels = (
        column.tolist() for column in (steps.start, steps.end, steps.pitch, steps.level)
    )
    moments = [
        *((at, False, pitch, level) for at, pitch in zip(end, pitches, strict=True)),
        *((at, True, *what) for at, *what in zip(start, pitches, levels, strict=True)),
    ]
    for at, strike, pitch, loud in sorted(moments):
        whole, rest = divmod(at - now, STEPS)
        events += [SHIFT + STEPS - 1] * whole + ([SHIFT + rest - 1] if rest else [])
        now = at
        if strike and loud != level:
            level = loud
            events.append(VELOCITY + level)
        events.append((ON if strike else OFF) + pitch)
    return np.array(events, np.uint16)


def decode(events: Array) -> Steps:
    """Return the notes of events; what is still sounding at their end ends there.

    A strike before any level of velocity has the middle one; a release of a silent key says
    nothing, as at the beginning of a sequence that was cut out of a longer one.

    Raises:
        InputError: An event is not below 388.
    """
    if len(events) and not 0 <= int(events.min()) <= int(events.max()) < EVENTS:
        raise InputError(
            f"events from {events.min()} to {events.max()}, expected 0 to {EVENTS - 1}"
        )
    now, level = 0, LOUDNESS // 2
    sounding: dict[int, tuple[int, int]] = {}
    found: list[tuple[int, int, int, int]] = []

    def release(pitch: int) -> None:
        start, loud = sounding.pop(pitch, (now, 0))
        if start < now:
            found.append((start, pitch, now, loud))

    for event in events.tolist():
        if event >= VELOCITY:
            level = event - VELOCITY
        elif event >= SHIFT:
            now += event - SHIFT + 1
        elif event >= OFF:
            release(event - OFF)
        else:
            release(event - ON)
            sounding[event - ON] = (now, level)
    for pitch in list(sounding):
        release(pitch)
    table = np.array(sorted(found), np.int64).reshape(-1, 4)
    return Steps(table[:, 0], table[:, 2], table[:, 1], table[:, 3])
