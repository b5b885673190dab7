"""The form in which layer factors are learnt: what a layer's factor gives up, its shortcut takes over.

``y = lam * BN(conv(x)) + (1 - lam) * m * x`` in place of ``lam * BN(conv(x)) + m * x``. At lam = 1 this is the plain
layer whatever m is, at lam = 0 the shortcut alone, and in between lam says which share of the signal is the layer's. In
the form with m alone it says nothing in a plain network: a batch norm further on divides out what all factors have in
common, and a penalty takes them down together at no loss.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edgeprune.graph.affine import dirac, of_batch_norm
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.network import BATCH_NORMS, CONVS, Network
from edgeprune.graph.resconv import Factor, factors

aten = torch.ops.aten

SMALLEST = 1e-2  # scale of a batch norm's channel relative to its mean, below which rounding would grow too much


def carried(network: Network, batches: Iterable[Tensor]) -> dict[str, float]:
    """Block name -> the m at which its shortcut carries as much as its layer gives (root mean square, in evaluation
    mode), of every factor that has an m. batches: (n, ...) inputs."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    blocks = {b.name: b for b in find_blocks(network)}
    pairs = {
        f.block: (_value(nodes[blocks[f.block].branch]), _value(nodes[blocks[f.block].shortcut]))
        for f in factors(network)
        if f.m is not None
    }
    meter = _Meter(network.module, {node for pair in pairs.values() for node in pair})
    training = network.module.training
    network.module.eval()
    try:
        with torch.no_grad():
            for x in batches:
                meter.run(x)
    finally:
        network.module.train(training)
    energy = {
        name: (meter.energy.get(value, 0.0), meter.energy.get(source, 0.0)) for name, (value, source) in pairs.items()
    }
    return {name: (gives / takes) ** 0.5 if takes > 0 else 0.0 for name, (gives, takes) in energy.items()}


class _Meter(fx.Interpreter):
    """Sums the squares of some nodes' values."""

    def __init__(self, module: fx.GraphModule, watched: set[fx.Node]):
        super().__init__(module)
        self.watched = watched
        self.energy: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watched:
            self.energy[n] = self.energy.get(n, 0.0) + float(value.double().square().sum())
        return value


def mix(network: Network, scales: Mapping[str, float]) -> Network:
    """A copy whose shortcuts carry ``(1 - lam) * m * x``, m starting at ``scales[block]``. Where lam is 1 and m was 0,
    outputs stay the same."""
    new = network.copy()
    graph = new.module.graph
    for factor, shortcut in _shortcuts(new):
        with graph.inserting_before(shortcut):
            rest = graph.call_function(aten.rsub.Scalar, (graph.get_attr(factor.lam), 1))
            share = graph.call_function(aten.mul.Tensor, (rest, graph.get_attr(str(factor.m))))
        shortcut.args = (_value(shortcut), share)
        with torch.no_grad():
            _parameter(new, str(factor.m)).fill_(scales[factor.block])
    return _cleaned(new)


def unmix(mixed: Network, network: Network) -> Network:
    """The network that ``mixed``, trained since, computes in evaluation mode, in the form of ``network``, which it was
    made of.

    A shortcut then carries m * x whatever its lam is, as it would have to without the layer, and the layer's kernel has
    the rest: ``lam * BN(conv(x)) + (1 - lam) * m * x == lam * BN(conv(x) - (m / s) * x) + m * x``, s the scale of the
    batch norm. Where s all but vanishes, m becomes (1 - lam) * m instead.
    """
    new = network.copy()
    new.module.load_state_dict(mixed.module.state_dict())
    nodes = {n.name: n for n in new.module.graph.nodes}
    blocks = {b.name: b for b in find_blocks(new)}
    for factor, _ in _shortcuts(new):
        lam, m = _parameter(new, factor.lam), _parameter(new, str(factor.m))
        with torch.no_grad():
            if lam.item() != 0.0 and not _hand_over(new, _value(nodes[blocks[factor.block].branch]), m.item()):
                m.mul_(1 - lam)
    return new


def _hand_over(network: Network, value: fx.Node, m: float) -> bool:
    """Take m * x out of what a convolution, or a convolution and its batch norm, gives of x; whether that was done."""
    scale = torch.ones((), dtype=torch.float64)
    leaf: Any = network.module.get_submodule(str(value.target))
    if isinstance(leaf, BATCH_NORMS):
        scale = of_batch_norm(leaf).scale
        while not isinstance(leaf, CONVS):  # dropouts in between are idle
            value = value.all_input_nodes[0]
            leaf = network.module.get_submodule(str(value.target))
    if bool((scale.abs() < SMALLEST * scale.abs().mean()).any()):
        return False
    taken = dirac(leaf, (m / scale).expand(leaf.out_channels))
    leaf.weight.copy_(leaf.weight.double() - taken)
    return True


def _shortcuts(network: Network) -> list[tuple[Factor, fx.Node]]:
    nodes = {n.name: n for n in network.module.graph.nodes}
    blocks = {b.name: b for b in find_blocks(network)}
    return [(f, nodes[blocks[f.block].shortcut]) for f in factors(network) if f.m is not None]


def _value(scaled: fx.Node) -> fx.Node:
    """What a node multiplies with a parameter."""
    return next(n for n in scaled.all_input_nodes if n.op != "get_attr")


def _parameter(network: Network, path: str) -> Tensor:
    found: Tensor = operator.attrgetter(path)(network.module)
    return found


def _cleaned(network: Network) -> Network:
    network.module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    network.module.recompile()
    return network
