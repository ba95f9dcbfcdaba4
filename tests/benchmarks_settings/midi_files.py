"""MIDI files made by hand: bytes of chunks, and the examples of the standard itself."""


def number(value):
    """Return a number of variable length."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def chunk(name, body):
    return name + len(body).to_bytes(4, "big") + body


def track(*messages, end=0):
    """Return a track of (ticks since the message before, bytes) pairs."""
    body = b"".join(number(delta) + bytes(message) for delta, message in messages)
    return chunk(b"MTrk", body + number(end) + b"\xff\x2f\x00")


def file(*tracks, division=100, form=1):
    header = b"".join(n.to_bytes(2, "big") for n in (form, len(tracks), division))
    return chunk(b"MThd", header) + b"".join(tracks)


def tempo(microseconds):
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


FORMAT_0 = bytes.fromhex(
    "4D546864 00000006 0000 0001 0060 4D54726B 0000003B"
    "00FF580404021808 00FF510307A120 00C005 00C12E 00C246"
    "00923060 003C60 60914340 60904C20 8140823040 003C40 00814340 00804C40 00FF2F00"
)
FORMAT_1 = bytes.fromhex(
    "4D546864 00000006 0001 0004 0060"
    "4D54726B 00000014 00FF580404021808 00FF510307A120 8300FF2F00"
    "4D54726B 00000010 00C005 8140904C20 81404C00 00FF2F00"
    "4D54726B 0000000F 00C12E 60914340 82204300 00FF2F00"
    "4D54726B 00000015 00C246 00923060 003C60 83003000 003C00 00FF2F00"
)
"""RP-001, appendix 1: the same four notes twice, with running status and releases of both kinds."""
