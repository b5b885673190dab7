"""Progress for people: one line with the time left on a terminal, nothing at all elsewhere.

Work functions take a callback ``progress(done, total, what)`` and know nothing of terminals; ``Progress`` makes one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Callback = Callable[[float, float, str], None]


def silent(done: float, total: float, what: str) -> None:
    """The callback that shows nothing."""


class Progress:
    """Shows stages on ``stream``, from two seconds after the first on; how much of one is done, and what is left, from
    two seconds after it began."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream = stream or sys.stderr
        self.enabled = self.stream.isatty()
        self.clock = clock
        self._stage, self._begun, self._start, self._shown, self._width = "", clock(), 0.0, 0.0, 0

    def __call__(self, done: float, total: float, what: str) -> None:
        """Report that ``done`` of ``total`` units of the stage ``what`` are finished."""
        if not self.enabled:
            return
        now = self.clock()
        if what != self._stage:
            self.clear()
            self._stage, self._start, self._shown = what, now, 0.0
            if now - self._begun >= 2.0:
                self._write(f"  {what}")
        elapsed = now - self._start
        if elapsed < 2.0 or now - self._shown < 0.2:
            return
        self._shown = now
        left = elapsed * (total - done) / done if done > 0 else None
        share = f"{100 * done / total:3.0f} %" if total else ""
        self._write(f"  {what}  {share}  {duration(left) + ' left' if left is not None else ''}")

    def clear(self) -> None:
        """Take the progress line away."""
        if self.enabled and self._width:
            self._write("")
            self.stream.write("\r")
            self.stream.flush()
            self._width = 0

    def _write(self, text: str) -> None:
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)


def duration(seconds: float) -> str:
    """4 s, 3 min 20 s, 1 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
