"""Images as PNG data addresses, so that a report is one file."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GREY, COLOUR = 0, 2
"""Types of PNG images."""


def png(image: Array) -> bytes:
    """Return an image of bytes as an 8-bit PNG file (ISO 15948).

    Args:
        image: ``[height, width]`` in grey, ``[height, width, 3]`` in colour.
    """
    height, width = image.shape[:2]
    flat = image.reshape(height, -1)
    rows = np.zeros((height, flat.shape[1] + 1), np.uint8)  # each begins with its filter, 0: none
    rows[:, 1:] = flat
    kind = COLOUR if image.ndim == 3 else GREY
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def data_address(image: Array) -> str:
    """Return ``data:image/png;base64,...``; grey images as dark ink on a light ground."""
    shown = image if image.ndim == 3 else 255 - image
    return "data:image/png;base64," + base64.b64encode(png(shown)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
