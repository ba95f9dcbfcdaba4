"""Progress: a bar on a terminal, silence elsewhere, and an event for plugins."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from attrs import define, field


@define
class Bar:
    """Counts work done against a total and redraws at most ten times a second."""

    label: str
    total: int
    stream: TextIO | None
    done: int = 0
    _start: float = field(factory=time.monotonic)
    _drawn: float = 0.0

    def advance(self, count: int = 1) -> None:
        """Count work as done."""
        self.done += count
        now = time.monotonic()
        if self.stream is not None and now - self._drawn > 0.1:
            self._drawn = now
            self._draw(now - self._start)

    def _draw(self, elapsed: float) -> None:
        assert self.stream is not None
        share = min(1.0, self.done / max(1, self.total))
        left = elapsed / share - elapsed if share > 0 else 0.0
        filled = int(24 * share)
        self.stream.write(
            f"\r{self.label} [{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} "
            f"{elapsed:.0f}s, {left:.0f}s left \x1b[K"
        )
        self.stream.flush()


@contextmanager
def bar(label: str, total: int, show: bool | None) -> Iterator[Bar]:
    """Show a bar while the block runs; by default only when standard error is a terminal."""
    visible = sys.stderr.isatty() if show is None else show
    shown = Bar(label, total, sys.stderr if visible else None)
    try:
        yield shown
    finally:
        if shown.stream is not None:
            shown.stream.write("\r\x1b[K")
            shown.stream.flush()
