"""The network as it ships: batch norms and other per-channel arithmetic in the weights, nothing that does no work.

    fold(network)        a new network that computes the same in evaluation mode
    denormals(network)   how many float32 weights are subnormal (each may slow a runtime down several times over)

A node keeps its name if and only if it computes what it computed before: a convolution that took in the batch norm
behind it is called by the *batch norm's* name, since that is the value it now gives. Module paths stay.

What is exact, and therefore done
    back      a per-channel affine map (batch norm, or multiplication, division, addition, subtraction with a constant)
              goes into the convolution, transposed convolution or linear before it if nobody else reads that one
    shortcut  a convolution's affine output plus an affine map of its own input is one convolution (fold_residual.py)
    forward   a batch norm whose readers are all unpadded convolutions, or linears on (N, C), goes into them
    left      every other batch norm becomes aten.mul and aten.add of two buffers of shape (C, 1, 1)
    factors   a multiplication with a constant goes into all weights that read it or those it comes from (fold_scale.py)
    gone      clamps of what lies within their bounds, dropout, contiguous, clone, expand by nothing, relu of relu,
              unused nodes and modules
A module called more than once is cloned for the calls that fold differently. All arithmetic is in float64; results
are rounded once, and subnormal weights become zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.affine import Link, absorb, feed, of_batch_norm
from edgeprune.graph.affine_nodes import ADD, MUL, AffineNodes
from edgeprune.graph.fold_residual import residual_links
from edgeprune.graph.fold_scale import drop_idle_clamps, move_scales
from edgeprune.graph.network import CONVS, DROPOUTS, Network
from edgeprune.graph.sharing import clone, has, own_modules

aten = torch.ops.aten

_NORMAL_MIN = torch.finfo(torch.float32).tiny
_NO_OPS = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_IDEMPOTENT = (aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.abs.default)


def fold(network: Network) -> Network:
    """See the module's docstring. The given network is not changed."""
    folded = network.copy()
    module = folded.module.eval()
    _drop_idle(folded)
    folder = _Folder(folded)
    folder.back()
    folder.forward()
    drop_idle_clamps(module)
    move_scales(folder.nodes, folder.names)
    folder.rest()
    _rebuild(module, folder.names)
    _flush(module)
    return folded


def denormals(network: Network) -> int:
    """Count of float32 parameters and buffers that are not zero and smaller than 1.18e-38 in magnitude."""
    return sum(int(_subnormal(t).sum()) for t in _float32(network.module))


def _float32(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.dtype == torch.float32]


def _subnormal(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor != 0) & (tensor.abs() < _NORMAL_MIN)


def _flush(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in _float32(module):
            tensor.masked_fill_(_subnormal(tensor), 0.0)


def _rebuild(module: fx.GraphModule, names: dict[fx.Node, str]) -> None:
    """Take dead nodes and unused modules out and give nodes their new names, which only a new graph allows."""
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = graph.create_node(node.op, node.target, args, kwargs, names.get(node, node.name))
    module.graph = graph
    module.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*module.named_parameters(), *module.named_buffers())]:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if name not in used and type(owner) in (nn.Module, type(module)):
            delattr(owner, leaf)
    graph.lint()
    module.recompile()


def _drop_idle(network: Network) -> None:
    """Remove what gives back its input."""
    graph, module = network.module.graph, network.module
    for node in list(graph.nodes):
        idle = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), DROPOUTS)
        if node.op == "call_function":
            source = node.args[0] if node.args else None
            idle = node.target in _NO_OPS
            if node.target is aten.view.default:
                node.target = aten.reshape.default  # without the copies that contiguous makes a view may not exist
            if node.target is aten.expand.default:
                idle = all(size == -1 for size in node.args[1])
            if node.target in _IDEMPOTENT and isinstance(source, fx.Node) and source.op == "call_function":
                same = source.args[1:] == node.args[1:] and source.kwargs == node.kwargs
                idle = source.target is node.target and same
        if idle:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


class _Folder:
    def __init__(self, network: Network):
        self.network = network
        self.module = network.module
        self.graph = network.module.graph
        self.nodes = AffineNodes(network)
        self.names: dict[fx.Node, str] = {}  # new names of nodes that took the place of others

    # --- back -------------------------------------------------------------------------------------------------------

    def back(self) -> None:
        """Every affine map goes into the weights before it. One pass in graph order takes whole chains, since the
        producer stands in the place of what it took in when the next link is reached."""
        chosen: dict[fx.Node, list[tuple[fx.Node, Link]]] = {}
        tail: dict[fx.Node, fx.Node] = {}  # last node of a chain -> the producer that will give its value
        for node in self.graph.nodes:
            if self.nodes.is_weighted(node):
                tail[node] = node
                continue
            links = self._affine_link(node, tail) or residual_links(self.nodes, node, tail)
            if links is not None:
                producer, maps = links
                chosen.setdefault(producer, []).extend((node, link) for link in maps)
                tail[node] = producer
        self._apply(chosen)

    def _affine_link(self, node: fx.Node, tail: dict[fx.Node, fx.Node]) -> tuple[fx.Node, list[Link]] | None:
        source = self.nodes.source(node)
        producer = tail.get(source) if source is not None else None
        if source is None or producer is None or len(source.users) != 1:
            return None
        affine = self.nodes.affine(node, producer)
        return None if affine is None else (producer, [affine])

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Batch norms that nothing took in go into their readers where that is exact."""
        for node in list(self.graph.nodes):
            if (
                not self.nodes.is_norm(node)
                or not node.users
                or not all(self._takes(user, node) for user in node.users)
            ):
                continue
            affine = of_batch_norm(self.nodes.leaf(node))
            for leaf in own_modules(self.module, node.users):
                feed(leaf, affine)
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)

    def _takes(self, user: fx.Node, norm: fx.Node) -> bool:
        if user.op != "call_module":
            return False
        leaf = self.nodes.leaf(user)
        if isinstance(leaf, nn.Linear):
            return self.nodes.rank(norm) == 2
        # with padding the border would see the shift, which zeros do not carry
        return isinstance(leaf, CONVS) and (leaf.padding == "valid" or _all_zero(leaf.padding))

    # --- both -------------------------------------------------------------------------------------------------------

    def _apply(self, chosen: dict[fx.Node, list[tuple[fx.Node, Link]]]) -> None:
        """Change each module once for all its calls that fold the same; clones for those that fold differently."""
        for path, calls in self.network.modules_called().items():
            kinds: dict[tuple[Any, ...], list[fx.Node]] = {}
            for call in calls:
                links = (node for node, _ in chosen.get(call, []))
                kinds.setdefault(tuple(n.target if n.op == "call_module" else n for n in links), []).append(call)
            targets = [path] + [
                clone(self.module, path) for _ in range(len(kinds) - 1)
            ]  # all cloned before any is changed
            for target, members in zip(targets, kinds.values(), strict=True):
                for call in members:
                    call.target = target
                if members[0] in chosen:
                    absorb(self.module.get_submodule(target), [link for _, link in chosen[members[0]]])
        for producer, chain in chosen.items():
            last = chain[-1][0]
            last.replace_all_uses_with(producer)
            gone = list(dict.fromkeys(node for node, _ in chain))
            shortcuts = [n for node in gone for n in node.all_input_nodes if n not in gone and n is not producer]
            for node in reversed(gone):
                self.graph.erase_node(node)
            for node in dict.fromkeys(shortcuts):
                self._erase_idle(node)
            self.names[producer] = last.name

    def _erase_idle(self, node: fx.Node) -> None:
        """Take out what only led into a folded shortcut."""
        while not node.users and (node.op == "call_function" or self.nodes.is_norm(node)):
            source = self.nodes.source(node)
            self.graph.erase_node(node)
            if source is None:
                break
            node = source

    # --- rest -------------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """What is left becomes two element-wise calls."""
        for node in list(self.graph.nodes):
            if not self.nodes.is_norm(node):
                continue
            affine, ones = of_batch_norm(self.nodes.leaf(node)), [1] * (self.nodes.rank(node) - 2)
            with self.graph.inserting_before(node):
                value = node.args[0]
                for call, kind, constant in ((MUL, "scale", affine.scale), (ADD, "shift", affine.shift)):
                    path = f"{node.target}_{kind}"
                    if not has(self.module, path):
                        owner, _, leaf = path.rpartition(".")
                        constant = constant.to(self.nodes.leaf(node).running_var.dtype).reshape(-1, *ones)
                        self.module.get_submodule(owner).register_buffer(leaf, constant)
                    value = self.graph.call_function(call, (value, self.graph.get_attr(path)))
            self.names[value] = node.name
            node.replace_all_uses_with(value)
            self.graph.erase_node(node)


def _all_zero(padding: Any) -> bool:
    return not isinstance(padding, str) and all(p == 0 for p in padding)
