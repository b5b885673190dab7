"""A convolution as thinner ones: 1x1 -> KxK -> 1x1, nothing between them.

Source: low-rank wrapping of Purohit et al. (TMLR 2024) and the LRF framework it builds on: filters j that are
combinations ``f_j ~ sum_l lambda_jl f_l`` of kept ones go, and a 1x1 behind mixes the kept ones' outputs; input slices
that are combinations of kept ones go, and a 1x1 in front adds their inputs to those of the kept ones.

    output side  KxK (n -> r), 1x1 (r -> m) with out[j, l] = lambda_jl
    input side   1x1 (n -> r) with into[l, j] = lambda_jl, KxK (r -> m)

Shapes: weights (m, n, *K); into (r_in, n); out (m, r_out).
Deviations: factors are made where they are wanted, not from identities around every layer. Stride, padding and dilation
stay with the KxK, the bias goes to the last of the chain: the 1x1 in front has none, so zeros that are padded behind it
are the zeros that were padded before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeprune.errors import UsageError
from edgeprune.graph.lift import place
from edgeprune.graph.network import CONVS, Network
from edgeprune.graph.surgery import rebuilt
from edgeprune.plan.problem import Factoring


@dataclass(frozen=True, slots=True)
class Triple:
    """core (r_out or m, r_in or n, *K); into (r_in, n) or None; out (m, r_out) or None; bias (m,) or None."""

    core: Tensor
    into: Tensor | None = None
    out: Tensor | None = None
    bias: Tensor | None = None

    def composed(self) -> Tensor:
        """(m, n, *K) the weight of the one convolution that gives the same outputs."""
        weight = self.core
        if self.into is not None:
            weight = torch.einsum("rc...,cn->rn...", weight, self.into.to(weight))
        return weight if self.out is None else torch.einsum("mr,rn...->mn...", self.out.to(weight), weight)


def factorable(network: Network) -> list[str]:
    """Paths of the convolutions that can be factored, in graph order: larger than 1x1, not grouped, called once, with
    float32 weights that are nobody else's."""
    calls = network.modules_called()
    owners = Counter(id(getattr(network.module.get_submodule(path), "weight", None)) for path in calls)
    return [
        path
        for path, nodes in calls.items()
        if len(nodes) == 1 and _dense(leaf := network.module.get_submodule(path)) and owners[id(leaf.weight)] == 1
    ]


def _dense(leaf: Any) -> bool:
    return (
        isinstance(leaf, CONVS)
        and leaf.groups == 1
        and leaf.weight[0, 0].numel() > 1
        and leaf.weight.dtype == torch.float32
    )


def combined(slices: Tensor, kept: Sequence[int]) -> Tensor:
    """(units, len(kept)) float64: every row of ``slices`` (units, ...) as the best combination of the kept ones; a kept
    one is itself. Kept rows that depend on each other are no trouble: the shortest of the best is taken."""
    flat = slices.detach().double().cpu().flatten(1)
    index = torch.as_tensor(list(kept))
    result = torch.zeros(len(flat), len(index), dtype=torch.float64)
    result[index, torch.arange(len(index))] = 1.0
    others = torch.ones(len(flat), dtype=torch.bool)
    others[index] = False
    if bool(others.any()):
        result[others] = torch.linalg.lstsq(flat[index].T, flat[others].T, driver="gelsd").solution.T
    return result


def by_weights(leaf: Any, factoring: Factoring) -> Triple:
    """The triple that is nearest to a convolution's weights with the factoring's slices and filters kept."""
    core = leaf.weight.detach().double().cpu()
    into = out = None
    if factoring.inputs is not None:
        into = combined(core.transpose(0, 1), factoring.inputs).T
        core = core[:, list(factoring.inputs)]
    if factoring.outputs is not None:
        out = combined(core, factoring.outputs)
        core = core[list(factoring.outputs)]
    return Triple(core, into, out, None if leaf.bias is None else leaf.bias.detach())


def factored(network: Network, factorings: Sequence[Factoring]) -> Network:
    """A network with these convolutions factored, as near to its weights as that can be. Raises UsageError for a layer
    that it does not have, that cannot be factored, or that lacks a slice or filter that is named."""
    known = set(factorable(network))
    triples = {}
    for f in factorings:
        if f.layer not in known:
            raise UsageError(
                f"the plan factors {f.layer}, which is no plain convolution larger than 1x1 of {network.origin}; it "
                "was made for another network"
            )
        leaf: Any = network.module.get_submodule(f.layer)
        for kept, full in ((f.inputs, leaf.in_channels), (f.outputs, leaf.out_channels)):
            if kept is not None and (not kept or len(set(kept)) < len(kept) or not 0 <= min(kept) <= max(kept) < full):
                raise UsageError(f"the plan keeps {len(kept)} of {full} channels of {f.layer}, some twice or not there")
        triples[f.layer] = by_weights(leaf, f)
    return insert(network, triples)


def insert(network: Network, triples: Mapping[str, Triple]) -> Network:
    """A network with triples in the place of convolutions (module path -> triple). The last convolution of each keeps
    the path and the node name, and so do all that read it; the given network stays as it is."""
    new = network.copy()
    for path, triple in triples.items():
        leaf: Any = new.module.get_submodule(path)
        one = CONVS[leaf.weight.dim() - 3]
        chain: list[tuple[str, Any]] = []
        if triple.into is not None:
            chain.append(("in", _filled(leaf, one(1, 1, 1), triple.into.reshape(*triple.into.shape, *_ones(leaf)))))
        shape = {name: getattr(leaf, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        chain.append(("core", _filled(leaf, one(1, 1, leaf.kernel_size, **shape), triple.core)))
        if triple.out is not None:
            chain.append(("out", _filled(leaf, one(1, 1, 1), triple.out.reshape(*triple.out.shape, *_ones(leaf)))))
        last = chain.pop()[1]
        if triple.bias is not None:
            last.bias = nn.Parameter(triple.bias.detach().to(leaf.weight))
        paths = {suffix: _free(new, f"{path}_{suffix}") for suffix, _ in chain}
        for call in network.modules_called()[path]:
            _chain(new, call.name, paths)
        for suffix, module in chain:
            place(new.module, paths[suffix], module)
        place(new.module, path, last)
    return rebuilt(new)


def _chain(network: Network, name: str, paths: Mapping[str, str]) -> None:
    """Put calls of new modules (suffix -> path) in front of the call of this name."""
    call = next(n for n in network.module.graph.nodes if n.name == name)
    source = call.args[0]
    assert isinstance(source, fx.Node)
    for suffix, path in paths.items():
        with network.module.graph.inserting_before(call):
            source = network.module.graph.create_node("call_module", path, (source,), name=f"{name}_{suffix}")
    call.args = (source, *call.args[1:])


def _filled(leaf: Any, module: Any, weight: Tensor) -> Any:
    """A convolution with this weight and no bias, of the same precision and place, trained where ``leaf`` is."""
    module.out_channels, module.in_channels = weight.shape[0], weight.shape[1]
    module.weight = nn.Parameter(weight.detach().to(leaf.weight).contiguous(), requires_grad=leaf.weight.requires_grad)
    module.bias = None
    return module.train(leaf.training)


def _ones(leaf: Any) -> tuple[int, ...]:
    return (1,) * (leaf.weight.dim() - 2)


def _free(network: Network, path: str) -> str:
    taken = {name for name, _ in network.module.named_modules()} | set(network.module.state_dict())
    while path in taken:
        path += "_"
    return path


def inner_layers(network: Network, factoring: Factoring) -> dict[str, str] | None:
    """Paths of the convolutions of a factored layer by their role, "in", "core" and "out"; None where it is gone."""
    calls = network.modules_called()
    if factoring.layer not in calls:
        return None
    node: fx.Node = calls[factoring.layer][0]
    found = {}
    if factoring.outputs is not None:
        found["out"] = str(node.target)
        node = node.all_input_nodes[0]
    found["core"] = str(node.target)
    if factoring.inputs is not None:
        found["in"] = str(node.all_input_nodes[0].target)
    return found


def merged(network: Network, original: Network, factorings: Sequence[Factoring]) -> Network:
    """``original`` with the weights that the factored layers of ``network`` come to: the oracle of a factoring."""
    new = original.copy()
    for f in factorings:
        paths = inner_layers(network, f)
        if paths is None:
            raise UsageError(f"{network.origin} has no layer {f.layer} to merge")
        weights: dict[str, Any] = {role: network.module.get_submodule(path).weight for role, path in paths.items()}
        triple = Triple(
            weights["core"].detach().double(),
            weights["in"].detach().double().flatten(1) if "in" in weights else None,
            weights["out"].detach().double().flatten(1) if "out" in weights else None,
        )
        leaf: Any = new.module.get_submodule(f.layer)
        last: Any = network.module.get_submodule(f.layer)
        with torch.no_grad():
            leaf.weight.copy_(triple.composed())
            leaf.bias = None if last.bias is None else nn.Parameter(last.bias.detach().clone())
    return new
