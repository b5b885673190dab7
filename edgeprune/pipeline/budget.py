"""A latency budget as people write it: ``10ms``, ``800us``, ``0.01s``, ``60%`` of the original, ``1.7x`` faster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeprune.errors import UsageError

_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(ms|us|µs|s|%|x)\s*")
_MS_PER_UNIT = {"ms": 1.0, "us": 1e-3, "µs": 1e-3, "s": 1e3}


@dataclass(frozen=True, slots=True)
class Budget:
    """``text`` as given, and one of ``absolute_ms`` (milliseconds) and ``share`` (of the original latency)."""

    text: str
    absolute_ms: float | None = None
    share: float | None = None

    def ms(self, original_ms: float) -> float:
        """The budget in milliseconds for a network that takes ``original_ms``."""
        return self.absolute_ms if self.absolute_ms is not None else float(self.share or 0) * original_ms


def parse_budget(text: str) -> Budget:
    """Raises UsageError when the text is no latency, or asks for nothing (100 % and more, 1x and less)."""
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if not match or not 0 < float(match[1]) < 1e9:
        raise UsageError(f"--latency {text!r} is not a latency; expected one like 10ms, 800us, 60% or 1.7x")
    value, unit = float(match[1]), match[2]
    if unit in _MS_PER_UNIT:
        return Budget(text.strip(), absolute_ms=value * _MS_PER_UNIT[unit])
    share = value / 100 if unit == "%" else 1 / value
    if share >= 1:
        raise UsageError(f"--latency {text!r} allows the original latency; expected less than 100% or more than 1x")
    return Budget(text.strip(), share=share)
