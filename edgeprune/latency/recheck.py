"""Whether a latency table is still true: some of its kernels measured again, apart from it.

The new rows go into a table of their own, with references of their own. What plans live on are the kernels' times
relative to each other, so that is what is judged; how fast the whole device is now is told beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.device.device import Device
from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.sweep import profile
from edgeprune.latency.table import LatencyTable

KERNELS = 24
MIDDLE, EACH = 0.05, 0.20  # how far the median, and nine kernels of ten, may be off


@dataclass(frozen=True, slots=True)
class Recheck:
    """
    table:   the file
    kernels: how many were measured again
    speed:   the reference kernel's time now over that in the table
    middle:  median of the kernels' times now over those in the table, each relative to its reference
    low, high: nine of ten kernels lie between them
    furthest: (kernel, ms in the table, ms now as the table would tell it) of the three that moved most
    holds:   whether plans made from the table are still right
    """

    table: str
    kernels: int
    speed: float
    middle: float
    low: float
    high: float
    furthest: tuple[tuple[str, float, float], ...]
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [
            f"{self.kernels} kernels of {self.table} measured again",
            f"relative to each other: median {self.middle:.3f} of the table's, nine of ten "
            f"{self.low:.3f}..{self.high:.3f}",
            f"the device itself: {self.speed:.3f} of the time it took",
        ]
        if self.holds:
            return "\n".join([*lines, "the table is still true"])
        lines += [f"  {key}: {before:.4g} ms, now {after:.4g} ms" for key, before, after in self.furthest]
        return "\n".join([
            *lines,
            "the table is no longer true, or the device was busy just now: check again, and if it stays so, move "
            "the file away and run `edgeprune profile`",
        ])  # fmt: skip


def recheck(
    device: Device,
    table: LatencyTable,
    kernels: int = KERNELS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Recheck:
    """Measure ``kernels`` of the table's kernels again, spread over its cheap and dear ones.

    Raises TableError when the table has no kernels, or nothing could be measured, and what the device raises.
    """
    timed = sorted((table.ms(key), key) for key, row in table.rows.items() if row.nodes and not row.error)
    if not timed:
        raise TableError(
            f"{table.path}: no kernels to measure again; fill it with `edgeprune profile --target "
            f"{table.fingerprint.target} --model MODEL`"
        )
    rng = np.random.default_rng(seed)
    strata = np.array_split(np.arange(len(timed)), min(kernels, len(timed)))
    chosen = [timed[int(rng.choice(part))] for part in strata]
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        fresh = LatencyTable(Path(folder) / "table.jsonl", table.fingerprint)
        profile(device, fresh, [Kernel.from_key(key) for _, key in chosen], progress)
        pairs = [(key, before, fresh.ms(key)) for before, key in chosen if not fresh.rows[key].error]
        if not pairs:
            raise TableError(f"{table.path}: none of its kernels could be measured again")
        speed = fresh.reference_ms / table.reference_ms
    found = [(key, before, after / speed) for key, before, after in pairs]
    shares = np.array([after / before for _, before, after in found])
    low, middle, high = (float(q) for q in np.quantile(shares, [0.05, 0.5, 0.95]))
    moved = sorted(found, key=lambda row: -abs(np.log(row[2] / row[1])))
    holds = abs(middle - 1) <= MIDDLE and low >= 1 - EACH and high <= 1 + EACH
    return Recheck(str(table.path), len(found), speed, middle, low, high, tuple(moved[:3]), bool(holds))
