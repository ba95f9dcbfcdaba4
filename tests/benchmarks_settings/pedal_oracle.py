"""The sustain pedal, moment by moment: what `dattri_benchmarks.midi.sustain` computes at once."""

LIFT_OR_PRESS, STRIKE, RELEASE = range(3)


def pedalled(notes, pedals, length):
    """Return when each note of (start, end, pitch) stops sounding; pedals are (time, down)."""
    moments = [(time, LIFT_OR_PRESS, down) for time, down in pedals]
    moments += [(start, STRIKE, k) for k, (start, _, _) in enumerate(notes)]
    moments += [(end, RELEASE, k) for k, (_, end, _) in enumerate(notes)]
    moments.sort(key=lambda moment: moment[:2])
    ends = [end for _, end, _ in notes]
    down, active = False, []  # struck, and neither silent nor ended
    for time, kind, what in moments:
        if kind == LIFT_OR_PRESS:
            down = what
            if not down:
                silent = [k for k in active if notes[k][1] < time]
                for k in silent:
                    ends[k] = time
                active = [k for k in active if k not in silent]
        elif kind == STRIKE:
            if down:
                again = [k for k in active if notes[k][2] == notes[what][2]]
                for k in again:
                    ends[k] = time
                active = [k for k in active if k not in again]
            active.append(what)
        elif not down and what in active:
            active.remove(what)
    for k in active:
        ends[k] = max(ends[k], length)
    return ends
