"""What every fold must keep: node by node the same values, and a canonical network."""

from __future__ import annotations

import torch
from support import randomise_norms, relative_error
from torch import fx, nn

from edgeprune.graph.fold import fold
from edgeprune.graph.lift import lift
from edgeprune.graph.network import BATCH_NORMS, DROPOUTS, Network, check


class _Recorder(fx.Interpreter):
    def __init__(self, module):
        super().__init__(module)
        self.values = {}

    def run_node(self, n):
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def values(network: Network, batch: int = 2) -> dict[str, torch.Tensor]:
    recorder = _Recorder(network.module)
    with torch.no_grad():
        recorder.run(*network.random_inputs(batch))
    return {name: v for name, v in recorder.values.items() if isinstance(v, torch.Tensor)}


def assert_folds(network: Network, tolerance: float = 1e-5) -> Network:
    """The folded network is canonical, without norms and dropouts; every node that kept its name kept its value."""
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    folded = fold(network)
    check(folded)
    assert not [m for m in folded.module.modules() if isinstance(m, (*BATCH_NORMS, *DROPOUTS))]
    old, new = values(network), values(folded)
    inputs = {n.name for n in folded.module.graph.nodes if n.op in ("placeholder", "get_attr")}
    computed = [name for name in new if name in old and name not in inputs]
    assert "output" in computed or isinstance(folded.module.graph.output_node().args[0], tuple)
    for name in computed:
        assert relative_error(new[name], old[name]) <= tolerance, name
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())
    return folded


def calls(network: Network) -> list[object]:
    return [n.target for n in network.module.graph.nodes if n.op.startswith("call")]


def kinds(network: Network) -> list[str]:
    """What is called, by class or operator name."""
    return [
        type(network.module.get_submodule(t)).__name__ if isinstance(t, str) else t.__name__ for t in calls(network)
    ]


def network(module: nn.Module, *shape: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    return lift(randomise_norms(module, seed).eval(), [(1, *shape)])
