"""What latency costs on one target, for one network: the table filled as needed, calibrated, and whole timings.

Prices are on the quiet device that the table's rows are told for. Whole networks are timed next to the original, in
interleaved rounds, and told as its share: on a noisy machine ratios hold where milliseconds drift.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from edgeprune.deploy.export import to_onnx
from edgeprune.device.connect import connect
from edgeprune.device.target import Target
from edgeprune.errors import TableError
from edgeprune.graph.fold import fold
from edgeprune.graph.network import Network
from edgeprune.latency.calibrate import calibrate
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.layout import device_fusion
from edgeprune.latency.networks import Timings, measure_networks
from edgeprune.latency.predict import LatencyModel
from edgeprune.latency.stairs import lattice, line_rows
from edgeprune.latency.sweep import SweepStats, profile
from edgeprune.latency.table import StairsRow, now, open_table
from edgeprune.pipeline.apply import apply_plan
from edgeprune.pipeline.problem import Widths, attainable, group_candidates, needed_kernels
from edgeprune.pipeline.spans import Anatomy
from edgeprune.plan.problem import Plan

Callback = Callable[[float, float, str], None]

CALIBRATIONS = 8  # random networks of the same kind, timed whole
SETTLING = 4  # new rows can move an edge of the stairs; then its neighbours are measured too
FULL_GRID = 40  # a two-axis span with this many combinations or fewer is measured whole


@dataclass(slots=True)
class Tally:
    """What one ``Pricing`` measured: kernels, whole networks."""

    measured: int = 0
    failed: int = 0
    networks: int = 0

    def add(self, stats: SweepStats) -> None:
        self.measured += stats.measured
        self.failed += stats.failed


class Pricing:
    """Use as a context manager. ``start`` with the original before timing anything else whole."""

    def __init__(self, target: Target, progress: Callback):
        self.target, self.tally = target, Tally()
        self.device = connect(target, lambda text: progress(0.0, 0.0, text))
        self.progress = _both(progress, self.device.show)
        try:
            self.table = open_table(self.device.fingerprint)
            self.fusion = device_fusion(self.device)
        except BaseException:
            self.device.close()
            raise
        self.model = LatencyModel(self.table, self.fusion)
        self.block = self.fusion.block or 1
        self.original: bytes | None = None
        self.original_ms = 0.0
        self._candidates: dict[tuple[object, ...], dict[str, Widths]] = {}  # by the networks' input shapes

    def __enter__(self) -> Pricing:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()

    @property
    def fingerprint(self) -> dict[str, object]:
        return asdict(self.device.fingerprint)

    def start(self, original: bytes) -> float:
        """Take ``original`` as what other networks are timed against; its latency in ms."""
        self.original = original
        timing = self.compare({"original": original}).networks["original"]
        self.original_ms = timing.median_ms
        return self.original_ms

    def complete_table(self, anatomy: Anatomy) -> None:
        """Measure all that planning ``anatomy`` needs, calibrate, and write down its candidates, so that neither this
        nor ``prepare`` measures anything for it again."""
        key = _key(anatomy)
        if key in self.table.stairs:
            return
        self._calibrate(anatomy, self.prepare(anatomy))
        self._candidates.clear()
        self.prepare(anatomy)  # once more, with the rows that calibration added
        self.table.append([StairsRow(key, self._candidates[anatomy.network.input_shapes], now())])

    def prepare(self, anatomy: Anatomy) -> Sequence[Widths]:
        """Measure what planning ``anatomy`` lacks; the candidate widths of its groups.

        The first network prepared at an input shape decides the candidates, where its measured stairs end; networks
        cut from it keep those that still fit.
        """
        self.model.place([span.site.kernel for span in anatomy.spans])
        if (shapes := anatomy.network.input_shapes) not in self._candidates:
            self._candidates[shapes] = self._decided(anatomy) or self._decide(anatomy)
        candidates = self._fitting(anatomy)
        self._fill(anatomy, candidates)
        return candidates

    def renew(self, anatomy: Anatomy) -> None:
        """Let the next network prepared at this one's input shape decide the candidates, whatever was before."""
        self._candidates.pop(anatomy.network.input_shapes, None)

    def _decided(self, anatomy: Anatomy) -> dict[str, Widths]:
        row = self.table.stairs.get(_key(anatomy))
        return {} if row is None else {name: tuple(widths) for name, widths in row.widths.items()}

    def _decide(self, anatomy: Anatomy) -> dict[str, Widths]:
        self._measure(line_rows(anatomy.spans, self.block), "measuring stairs")
        names = [g.name for g in anatomy.channels.groups]
        for _ in range(SETTLING):
            found = dict(zip(names, group_candidates(anatomy, self._known_ms), strict=True))
            if not self._fill(anatomy, list(found.values())):
                break
        return found

    def _fitting(self, anatomy: Anatomy) -> Sequence[Widths]:
        known = self._candidates[anatomy.network.input_shapes]
        groups = anatomy.channels.groups
        return [tuple(sorted({w for w in known.get(g.name, ()) if w < g.size} | {g.size})) for g in groups]

    def _fill(self, anatomy: Anatomy, candidates: Sequence[Widths]) -> int:
        """Measure what plans over these candidates need; how many kernels that were."""
        before = self.tally.measured + self.tally.failed
        self._measure(self._lattices(anatomy, candidates), "measuring kernels")
        self.complete(list(needed_kernels(anatomy, candidates).values()))
        return self.tally.measured + self.tally.failed - before

    def _calibrate(self, anatomy: Anatomy, candidates: Sequence[Widths]) -> None:
        """Time the network and random plans of it whole, once for each network, so that sums of kernels come out
        right. The same networks are drawn every time, so that a sweep that was interrupted goes on."""
        drawn = [anatomy.folded, *(random_network(anatomy, candidates, seed) for seed in range(CALIBRATIONS))]
        models: dict[str, bytes] = {}
        kernels: dict[str, list[str]] = {}
        for number, network in enumerate(drawn):
            self.progress(number, 2 * len(drawn), "calibrating")
            model = to_onnx(network)
            parts = sites(model, self.fusion)
            self.complete([s.kernel for s in parts])
            kernels[str(number)] = [s.kernel.key() for s in parts]
            models[str(number)] = model.SerializeToString()
        known = {row.keys for row in self.table.networks.values()}
        missing = {n: k for n, k in kernels.items() if tuple(k) not in known}
        if missing:
            self._measure([Kernel.from_key(key) for keys in missing.values() for key in keys], "measuring kernels")
            calibrate(self.device, self.table, {n: models[n] for n in missing}, missing)
            self.tally.networks += len(missing)

    def complete(self, kernels: Sequence[Kernel]) -> None:
        """Measure those of the kernels that the table can neither look up nor interpolate."""
        self._measure(self.model.missing(kernels), "measuring kernels")

    def measure_as_it_is(self, anatomy: Anatomy) -> None:
        """Measure the kernels of the network itself, and nothing for planning."""
        self.model.place([span.site.kernel for span in anatomy.spans])
        self._measure([span.site.kernel for span in anatomy.spans], "measuring kernels")

    def stand_in(self, anatomy: Anatomy, kernels: Sequence[Kernel]) -> None:
        """Measure what is missing of these kernels, and tell prices as they are in this network."""
        self.model.place([span.site.kernel for span in anatomy.spans])
        self.complete(kernels)

    def kernel_ms(self, kernel: Kernel) -> float:
        """A kernel's part of a network's latency. Raises TableError naming it when the table cannot price it."""
        return self.model.price(kernel)

    def constant_ms(self) -> float:
        return self.model.constant_ms

    def predict(self, model: onnx.ModelProto) -> float:
        """Calibrated latency in ms of a whole network from the table alone."""
        return self.model.network(model)

    def clock(self, network: Network) -> float:
        """Milliseconds of a network as it would ship, timed whole: its measured share of the original's."""
        if self.original is None:
            raise TableError("nothing to time against; start the pricing with the original network first")
        onnx_bytes = to_onnx(fold(network)).SerializeToString()
        timings = self.compare({"original": self.original, "candidate": onnx_bytes})
        return timings.ratio("candidate", "original").value * self.original_ms

    def compare(self, models: Mapping[str, bytes], rounds: int | None = None) -> Timings:
        """Time serialised ONNX models against each other, interleaved."""
        self.tally.networks += len(models)
        return measure_networks(self.device, models, rounds)

    def _measure(self, kernels: Sequence[Kernel], what: str) -> None:
        if kernels:
            stats = profile(self.device, self.table, kernels, lambda done, total: self.progress(done, total, what))
            self.tally.add(stats)

    def _known_ms(self, kernel: Kernel) -> float | None:
        try:
            return self.model.predict(kernel).ms
        except TableError:
            return None

    def _lattices(self, anatomy: Anatomy, candidates: Sequence[Widths]) -> list[Kernel]:
        """For every span the combinations of its candidate counts, thinned where there are many."""
        rows: dict[Kernel, None] = {}
        for span in anatomy.spans:
            counts = [attainable(axis, candidates) for axis in span.variables]
            if len(counts) == 2 and len(counts[0]) * len(counts[1]) > FULL_GRID:
                counts = [tuple(lattice(c, block=self.block)) for c in counts]
            for combination in itertools.product(*counts):
                rows[span.at(combination)] = None
        return list(rows)


def _both(first: Callback, second: Callback) -> Callback:
    def both(done: float, total: float, what: str) -> None:
        first(done, total, what)
        second(done, total, what)

    return both


def _key(anatomy: Anatomy) -> str:
    """Of everything that its candidates follow from."""
    parts = (
        [(g.name, g.size) for g in anatomy.channels.groups],
        [(s.site.kernel.key(), s.variables) for s in anatomy.spans],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def random_network(anatomy: Anatomy, candidates: Sequence[Widths], seed: int) -> Network:
    """A folded network with random candidate widths and up to half of its blocks removed."""
    rng = np.random.default_rng((seed, 5))
    groups = anatomy.channels.groups
    keep = {}
    for group, widths in zip(groups, candidates, strict=True):
        width = int(rng.choice(widths))
        keep[group.name] = tuple(range(width))
    share = rng.uniform(0, 0.5)
    removed = tuple(b.name for b in anatomy.blocks if rng.random() < share)
    return fold(apply_plan(anatomy.network, Plan({}, removed=removed, keep=keep)))
