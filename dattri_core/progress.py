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


@define
class Passes:
    """Counts train examples as they are read where nobody knows how often they will be.

    By a fit, and, after it, by an inverse that reads them whenever it is applied.
    """

    size: int
    stream: TextIO | None
    label: str = "fit"
    done: int = 0
    _start: float | None = None
    _drawn: float = 0.0

    @staticmethod
    def over(size: int, show: bool | None) -> Passes:
        """Return a counter over a train set; by default it shows on a terminal alone."""
        return Passes(size, sys.stderr if _visible(show) else None)

    def advance(self, count: int) -> None:
        """Count examples as read."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        self.done += count
        if self.stream is not None and now - self._drawn > 0.1:
            self._drawn = now
            passes = self.done / max(1, self.size)
            self.stream.write(
                f"\r{self.label}: {passes:.1f} passes over {self.size} train examples, "
                f"{now - self._start:.0f}s \x1b[K"
            )
            self.stream.flush()

    @contextmanager
    def until(self, following: str) -> Iterator[None]:
        """Clear the line when the block ends, and count anew under another label."""
        try:
            yield
        finally:
            _clear(self.stream)
            self.label, self.done, self._start = following, 0, None


@contextmanager
def bar(label: str, total: int, show: bool | None) -> Iterator[Bar]:
    """Show a bar while the block runs; by default only when standard error is a terminal."""
    shown = Bar(label, total, sys.stderr if _visible(show) else None)
    try:
        yield shown
    finally:
        _clear(shown.stream)


def _visible(show: bool | None) -> bool:
    return sys.stderr.isatty() if show is None else show


def _clear(stream: TextIO | None) -> None:
    if stream is not None:
        stream.write("\r\x1b[K")
        stream.flush()
