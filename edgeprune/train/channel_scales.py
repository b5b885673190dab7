"""Learning which channels a network can do without: scales under a group penalty that latency prices.

Source: network slimming (Liu et al., 2017), an L1 penalty on the weights of batch norms, here as a group lasso (Yuan
and Lin, 2006) over all that scales one unit of a channel group: the weights w of every batch norm that lies on it, and
the filters of producers that no batch norm follows. ``price * ||w|| / r`` for each unit, r the root mean square of
``||w||`` over the group at the start; its proximal step is ``w <- w * max(1 - lr * price / r / ||w||, 0)``. What a
batch norm adds shrinks by the same factor, so that nothing is left of a unit whose scale is zero.
Shapes: a group's factors and norms are (units,).

Deviations
    The price of a unit is what each of the group's units saves on average from the full to the narrowest candidate
    width: the latency's stairs would price most units at nothing and a few at everything.
    Growing weights could make up for a shrinking scale at no loss. So, while there is a penalty, what makes and what
    reads a unit keeps, unit by unit, at most the norm it had at the start, and so do all scales of a group together.
    That is enough only where batch norms keep their running statistics: those of a batch divide out what all scales of
    a group have in common.
    A unit whose scale is zero is read no more, and stays so. As many as the narrowest candidate width always live, and
    of many that would die in one step only the weakest do.
    Groups that a norm over channels runs through, and groups that nothing scales, are left whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgeprune.graph.channels import ChannelGroup, Channels, analyse
from edgeprune.graph.network import BATCH_NORMS, Network
from edgeprune.graph.ops import name_of
from edgeprune.graph.unit_weights import UnitWeights
from edgeprune.train.learner import Price

TINY = 1e-12
AT_ONCE = 32  # of a group's units this share at most dies in one step, so that no more do than the budget asks for


class Units:
    """The units of one group.

    scales: what the penalty shrinks; start: the same in ``network``
    makers, readers: what else makes or reads the units
    saved_ms: by one unit
    """

    def __init__(self, group: ChannelGroup, floor: int, saved_ms: float, network: Network, student: Network) -> None:
        self.name, self.size, self.floor, self.saved_ms = group.name, group.size, floor, saved_ms
        places = _places(network, group)
        self.scales, self.makers, self.readers = (_weights(student, group, places, kind) for kind in _KINDS)
        self.start = _weights(network, group, places, "scales")
        self.alive = torch.ones(group.size, dtype=torch.bool)
        self.price = 1.0
        self.reference = float(_norms(self.start).square().mean().sqrt()) if self.start else 0.0
        self.limits: list[Tensor] = []

    def hold(self) -> None:
        for weights, limit in zip((*self.makers, *self.readers), self.limits, strict=True):
            weights.multiply((limit / weights.energy().sqrt().clamp_min(TINY)).clamp_max(1.0))
        whole = float(_norms(self.scales).square().mean().sqrt())
        if whole > self.reference:
            for weights in self.scales:
                weights.multiply(torch.full((self.size,), self.reference / whole))

    def shrink(self, pull: float) -> bool:
        """The proximal step of ``pull * price * sum ||w_u|| / reference``; whether units died."""
        norms = _norms(self.scales).cpu()
        factors = shrinking(norms, pull * self.price / self.reference)
        dying = (self.alive & (factors == 0)).nonzero()[:, 0]
        most = min(max(1, self.size // AT_ONCE), int(self.alive.sum()) - self.floor)
        weakest = dying[norms[dying].argsort(stable=True)]
        factors[weakest[most:]] = 1.0
        self.alive[weakest[:most]] = False
        for weights in self.scales:
            weights.multiply(factors)
            weights.multiply_bias(factors)
        return most > 0 and len(dying) > 0

    def silence(self) -> None:
        """Hold dead units at zero, whatever momentum or an average makes of them."""
        if not self.alive.all():
            factors = self.alive.float()
            for weights in (*self.scales, *self.readers):
                weights.multiply(factors)
                weights.multiply_bias(factors)


class ChannelScales:
    """The scales of a student's groups. One without a narrower candidate width is only held.

    network: what the student was made of, with the same layers; it stays as it is
    widths, latency_ms: as in ``Lesson``
    """

    def __init__(
        self, network: Network, student: Network, widths: Mapping[str, tuple[int, ...]], latency_ms: Price
    ) -> None:
        channels, full_ms = analyse(network), latency_ms({}, ())
        mixed = _normalised_over(network, channels)
        self.groups: list[Units] = []
        for group in channels.groups:
            floor = group.size if group.name in mixed else min(widths.get(group.name, (group.size,)))
            cut_ms = full_ms - latency_ms({group.name: floor}, ()) if floor < group.size else 0.0
            saved_ms = max(cut_ms, 0.0) / max(group.size - floor, 1)
            self.groups.append(Units(group, floor, saved_ms, network, student))
        self.groups = [group for group in self.groups if group.reference > 0]
        self.rate = 1.0  # at which the scales learn, relative to other weights

    def weights(self) -> list[Tensor]:
        """All tensors that hold scales."""
        found: list[Any] = [weights.leaf.weight for group in self.groups for weights in group.scales]
        return list({id(weight): weight for weight in found}.values())

    def start(self) -> None:
        for group in self.groups:
            group.limits = [weights.energy().sqrt() for weights in (*group.makers, *group.readers)]

    def hold(self) -> None:
        for group in self.groups:
            group.hold()

    def shrink(self, pull: float) -> bool:
        """One proximal step; whether units died."""
        died = [group.shrink(self.rate * pull) for group in self.groups]
        self.silence()
        return any(died)

    def silence(self) -> None:
        for group in self.groups:
            group.silence()

    @torch.no_grad()
    def wake(self) -> None:
        """Give dead units their scales from before. Nobody reads them; but further training may, where the latency's
        stairs leave room for some of them."""
        for group in self.groups:
            for weights, start in zip(group.scales, group.start, strict=True):
                weights.copy(start, ~group.alive)

    def widths(self) -> dict[str, int]:
        return {group.name: int(group.alive.sum()) for group in self.groups}

    def alive(self) -> dict[str, np.ndarray]:
        """Group name -> (units,) bool."""
        return {group.name: group.alive.numpy() for group in self.groups}

    def state(self) -> dict[str, Any]:
        return {
            group.name: {
                "alive": group.alive.clone(),
                "price": group.price,
                "floor": group.floor,
                "limits": [limit.clone() for limit in group.limits],
            }
            for group in self.groups
        }

    def load(self, state: dict[str, Any]) -> None:
        for group in self.groups:
            own = state[group.name]
            group.alive, group.price, group.floor = own["alive"].clone().cpu(), own["price"], own["floor"]
            held = (*group.makers, *group.readers)  # limits are none before the start
            group.limits = [limit.to(w.leaf.weight) for limit, w in zip(own["limits"], held, strict=False)]


def shrinking(norms: Tensor, threshold: float) -> Tensor:
    """What the proximal step of ``threshold * ||w||`` multiplies vectors of these norms with."""
    return (1 - threshold / norms.clamp_min(TINY)).clamp_min(0.0)


def _norms(scales: list[UnitWeights]) -> Tensor:
    """(units,)"""
    return torch.stack([weights.energy() for weights in scales]).sum(0).sqrt()


_KINDS = ("scales", "makers", "readers")


def _places(network: Network, group: ChannelGroup) -> list[tuple[str, str, np.ndarray]]:
    """(kind, path, index); a tensor that several layers share counts once."""
    calls = network.modules_called()
    found, seen = [], set()
    for slot in group.slots:
        if slot.role == "param":
            continue
        leaf: Any = network.module.get_submodule(slot.target)
        if isinstance(leaf, BATCH_NORMS):
            kind = "scales"
        elif slot.role == "in":
            kind = "readers"
        else:
            normed = slot.role == "channel" or all(_has_norm(network, node) for node in calls[slot.target])
            kind = "makers" if normed else "scales"
        if leaf.weight is not None and (key := (id(leaf.weight), kind == "readers")) not in seen:
            seen.add(key)
            found.append((kind, slot.target, slot.index))
    return found


def _weights(
    network: Network, group: ChannelGroup, places: list[tuple[str, str, np.ndarray]], kind: str
) -> list[UnitWeights]:
    return [
        UnitWeights(network.module.get_submodule(path), kind == "readers", index)
        for found, path, index in places
        if found == kind
    ]


def _has_norm(network: Network, node: fx.Node) -> bool:
    """Whether a batch norm follows, and nothing else."""
    return len(node.users) == 1 and all(
        user.op == "call_module" and isinstance(network.module.get_submodule(str(user.target)), BATCH_NORMS)
        for user in node.users
    )


def _normalised_over(network: Network, channels: Channels) -> set[str]:
    """Groups whose units a norm over channels brings together: there a unit at zero is not the same as none."""
    ends = np.cumsum([group.size for group in channels.groups])
    found = set()
    for node in network.module.graph.nodes:
        if node.op == "call_function" and name_of(node.target) in ("layer_norm", "rms_norm", "group_norm"):
            vector = channels.vector(node.name)
            ids = np.empty(0, np.int64) if vector is None else vector[1]
            found |= {channels.groups[g].name for g in np.unique(np.searchsorted(ends, ids[ids >= 0], side="right"))}
    return found
