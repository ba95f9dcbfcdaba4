"""The shelf: rows that wait in files, mapped and not read, so that memory holds what is in use."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core.batch import raw_bytes
from dattri_core.blocks import map_tensors
from dattri_core.errors import StoreError, format_bytes
from dattri_core.rows import Rows

ALIGNED = 64
"""Bytes at multiples of which a tensor lies in its file."""


@frozen(eq=False)
class Shelf:
    """A folder for rows that are too many for memory and are read again and again.

    A file has no name once it is made (on Windows: it goes when it is closed), so that nothing is
    left of a run that is killed, and its room is free again when its rows are gone.

    Args:
        folder: Of the files; None: the system's for temporary ones.
    """

    folder: Path | None = None
    _maps: WeakSet[mmap.mmap] = field(factory=WeakSet, init=False)

    def put(self, rows: Rows) -> Rows:
        """Return the rows as they lie in a file; they are not to be written to.

        Raises:
            StoreError: The disk does not take them.
        """
        places: list[tuple[torch.dtype, torch.Size, int]] = []
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:

                def write(tensor: Tensor) -> Tensor:
                    file.write(bytes(-file.tell() % ALIGNED))
                    places.append((tensor.dtype, tensor.shape, file.tell()))
                    file.write(raw_bytes(tensor))
                    return tensor

                rows.map_blocks(lambda _, block: map_tensors(block, write))
                file.write(bytes(ALIGNED))  # an empty file cannot be mapped
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise StoreError(
                f"queries on disk: {format_bytes(rows.nbytes)} of {len(rows)} queries could not be "
                f"written to {str(self.folder or tempfile.gettempdir())!r} ({error}); free room "
                "there, or give more memory= so that queries wait in memory"
            ) from error
        self._maps.add(mapped)
        read = _views(torch.frombuffer(mapped, dtype=torch.uint8), places)
        return rows.map_blocks(lambda _, block: map_tensors(block, lambda _: next(read)))

    def release(self) -> None:
        """Stop counting what was read so far as memory of this process; nothing is lost."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def _views(values: Tensor, places: list[tuple[torch.dtype, torch.Size, int]]) -> Iterator[Tensor]:
    for dtype, shape, start in places:
        found = values[start : start + shape.numel() * dtype.itemsize]
        yield found.view(dtype).reshape(shape)


def free_on_disk(path: Path) -> int:
    """Return the bytes free where a folder is, or will be."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
