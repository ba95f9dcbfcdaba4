"""The sustain pedal, moment by moment: what `dattri_benchmarks.midi.sustain` computes at once."""

LIFT_OR_PRESS, STRIKE, RELEASE = range(3)


def pedalled(notes, pedals, length):
    """Return when each note of (start, end, pitch) stops sounding; pedals are (time, down)."""
    moments = [(time, LIFT_OR_PRESS, down) for time, down in pedals]
    moments += [(start, STRIKE, k) for k, (start, _, _) in enumerate(notes)]
    moments += [(end, RELEASE, k) for k, (_, end, _) in enumerate(notes)]
    moments.sort(key=lambda moment: moment[:2])
    ends = [end for _, end, _ in notes]
    down, held = False, set()  # released, and sounding on
    for time, kind, what in moments:
        if kind == LIFT_OR_PRESS:
            down = what
            if not down:
                for k in held:
                    ends[k] = time
                held = set()
        elif kind == STRIKE:
            for k in [k for k in held if notes[k][2] == notes[what][2]]:
                ends[k] = time
                held.remove(k)
        elif down:
            held.add(what)
    for k in held:
        ends[k] = length
    return ends
