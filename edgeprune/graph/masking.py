"""The oracle of every cut: the original network with the cut channels held at zero.

After every node the cut positions of its output are zeroed, so that no consumer depends on what a sigmoid or a shift
makes of a zero. Norms over channels take their statistics over the kept ones. A cut network must give the same outputs
to rounding; every run reports how close it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgeprune.graph.channels import Channels
from edgeprune.graph.network import Network
from edgeprune.graph.ops import arguments, name_of


def masked_outputs(
    network: Network, channels: Channels, keep: Mapping[str, Sequence[int]], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Outputs of the *original* network with all channels outside ``keep`` masked.

    keep:   group name -> unit indices that stay; groups that are not named keep everything
    inputs: one (batch, ...) tensor per network input
    Raises UsageError for a bad ``keep`` (see Channels.removed).
    """
    module = network.module
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            result = _Masked(module, channels, channels.removed(keep)).run(*inputs)
    finally:
        module.train(training)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class _Masked(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, channels: Channels, removed: np.ndarray):
        super().__init__(module)
        self.channels = channels
        self.removed = removed

    def _stays(self, node: fx.Node) -> tuple[int, torch.Tensor] | None:
        """(axis, bool per position), None where nothing is cut."""
        found = self.channels.vector(node.name)
        if found is None:
            return None
        stays = ~self.removed[found[1]]
        return None if stays.all() else (found[0], torch.from_numpy(stays))

    def run_node(self, n: fx.Node) -> Any:
        stays = self._stays(n)
        if stays is None:
            return super().run_node(n)
        axis, mask = stays
        if n.op == "call_function" and name_of(n.target) in ("layer_norm", "rms_norm", "group_norm"):
            return self._norm(n, axis, mask)
        result = super().run_node(n)
        gone = (~mask).nonzero().ravel().to(result.device)
        return result.index_fill(axis, gone, 0)

    def _norm(self, n: fx.Node, axis: int, mask: torch.Tensor) -> torch.Tensor:
        """Gather the kept channels, normalise them, put them back among zeros."""
        args: dict[str, Any] = {k: self.map_nodes_to_values(v, n) for k, v in arguments(n).items()}
        key = "input" if "input" in args else "self"
        x = args[key]
        index = mask.nonzero().ravel().to(x.device)
        kept = x.index_select(axis, index)
        if "normalized_shape" in args:
            dims = len(args["normalized_shape"])
            own = axis - (x.dim() - dims)
            args["normalized_shape"] = list(kept.shape[x.dim() - dims :])
        else:
            own = 0
            if args["num_groups"] == x.shape[1]:
                args["num_groups"] = len(index)
        for name in ("weight", "bias"):
            if args.get(name) is not None and own >= 0:
                args[name] = args[name].index_select(own, index)
        args[key] = kept
        return torch.zeros_like(x).index_copy(axis, index, n.target(**args))  # type: ignore[operator]
