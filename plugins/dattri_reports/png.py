"""Grey images as PNG data addresses, so that a report is one file."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def png(image: Array) -> bytes:
    """Return a grey image ``[height, width]`` of bytes as an 8-bit PNG file (ISO 15948)."""
    height, width = image.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, 0 for none
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def data_address(image: Array) -> str:
    """Return ``data:image/png;base64,...`` of an image, dark ink on a light ground."""
    return "data:image/png;base64," + base64.b64encode(png(255 - image)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
