"""The network as it ships: batch norms and other per-channel arithmetic in the weights, nothing that does no work.

    fold(network)        a new network that computes the same in evaluation mode
    denormals(network)   how many float32 weights are subnormal (each may slow a runtime down several times over)

A node keeps its name if and only if it computes what it computed before: a convolution that took in the batch norm
behind it is called by the *batch norm's* name, since that is the value it now gives. Module paths stay.

What is exact, and therefore done
    back      a per-channel affine map (batch norm, or multiplication, division, addition, subtraction with a constant)
              goes into the convolution, transposed convolution or linear before it if nobody else reads that one
    forward   a batch norm whose readers are all unpadded convolutions, or linears on (N, C), goes into them
    left      every other batch norm becomes aten.mul and aten.add of two buffers of shape (C, 1, 1)
    gone      dropout, contiguous, clone, expand by nothing, relu of relu, unused nodes and modules
A module called more than once is cloned for the calls that fold differently. All arithmetic is in float64; results
are rounded once, and subnormal weights become zero.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.affine import Affine, absorb, feed, of_batch_norm
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, DROPOUTS, Network, shapes

aten = torch.ops.aten

_NORMAL_MIN = torch.finfo(torch.float32).tiny
_NO_OPS = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_IDEMPOTENT = (aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.abs.default)
_MUL, _ADD = aten.mul.Tensor, aten.add.Tensor
_DIV, _SUB = aten.div.Tensor, aten.sub.Tensor
_RSUBS = (aten.rsub.Scalar, aten.rsub.Tensor)


def fold(network: Network) -> Network:
    """See the module's docstring. The given network is not changed."""
    folded = network.copy()
    module = folded.module.eval()
    _drop_idle(folded)
    folder = _Folder(folded)
    folder.back()
    folder.forward()
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
        self.names: dict[fx.Node, str] = {}  # new names of nodes that took the place of others
        self._ranks: dict[str, int] | None = None

    # --- back -------------------------------------------------------------------------------------------------------

    def back(self) -> None:
        """Every affine map goes into the weights before it. One pass in graph order takes whole chains, since the
        producer stands in the place of what it took in when the next link is reached."""
        chosen: dict[fx.Node, list[tuple[fx.Node, Affine]]] = {}
        tail: dict[fx.Node, fx.Node] = {}  # last node of a chain -> the producer that will give its value
        for node in self.graph.nodes:
            if self._is_producer(node):
                tail[node] = node
                continue
            source = self._source(node)
            producer = tail.get(source) if source is not None else None
            if source is None or producer is None or len(source.users) != 1:
                continue
            affine = self._affine(node, producer)
            if affine is not None:
                chosen.setdefault(producer, []).append((node, affine))
                tail[node] = producer
        self._apply(chosen)

    def _is_producer(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        return isinstance(self._leaf(node), (*CONVS, *CONV_TRANSPOSES, nn.Linear))

    def _is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._leaf(node), BATCH_NORMS)

    def _leaf(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target))

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The one activation that ``node`` reads, if it can be a per-channel affine map of it."""
        if self._is_norm(node):
            return node.all_input_nodes[0]
        if node.op != "call_function" or node.target not in (_MUL, _ADD, _DIV, _SUB, *_RSUBS):
            return None
        if set(node.kwargs) - {"alpha"} or len(node.args) != 2:
            return None
        activations = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(activations) != 1 or (node.target is _DIV and node.args[0] is not activations[0]):
            return None
        return activations[0]

    def _affine(self, node: fx.Node, producer: fx.Node) -> Affine | None:
        leaf = self._leaf(producer)
        if node.op == "call_module":
            if isinstance(leaf, nn.Linear) and self._rank(producer) != 2:
                return None  # the batch norm's channels are not the linear's features
            return of_batch_norm(self._leaf(node))
        other = next(a for a in node.args if a is not self._source(node))
        value = self._constant(other)
        if value is None:
            return None
        if isinstance(leaf, nn.Linear):
            channels, rank, dim = leaf.out_features, self._rank(producer), self._rank(producer) - 1
        else:
            channels, rank, dim = leaf.out_channels, leaf.weight.dim(), 1
        if value.dim() > rank:
            return None
        full = (1,) * (rank - value.dim()) + tuple(value.shape)
        if any(size != 1 and not (d == dim and size == channels) for d, size in enumerate(full)):
            return None
        value = value.reshape(-1) if value.numel() == channels else value.reshape(())
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        if node.target is _MUL:
            return Affine(value, zero)
        if node.target is _DIV:
            return Affine(1 / value, zero)
        alpha: Any = node.kwargs.get("alpha", 1)
        if node.target in _RSUBS:
            return Affine(-one * alpha, value)
        if node.target is _ADD:
            return Affine(one, alpha * value) if node.args[1] is other else Affine(one * alpha, value)
        return Affine(one, -alpha * value) if node.args[1] is other else Affine(-one * alpha, value)

    def _constant(self, value: Any) -> torch.Tensor | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = operator.attrgetter(str(value.target))(self.module)
            return tensor.detach().double() if tensor.is_floating_point() else None
        return None

    def _rank(self, node: fx.Node) -> int:
        if self._ranks is None:
            self._ranks = {name: len(shape) for name, shape in shapes(self.network).items()}
        return self._ranks[node.name]

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Batch norms that nothing took in go into their readers where that is exact."""
        for node in list(self.graph.nodes):
            if not self._is_norm(node) or not node.users or not all(self._takes(user, node) for user in node.users):
                continue
            affine = of_batch_norm(self._leaf(node))
            for path in dict.fromkeys(str(user.target) for user in node.users):
                calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == path]
                mine = [n for n in calls if n in node.users]
                target = path if len(mine) == len(calls) else self._clone(path)
                for call in mine:
                    call.target = target
                feed(self.module.get_submodule(target), affine)
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)

    def _takes(self, user: fx.Node, norm: fx.Node) -> bool:
        if user.op != "call_module":
            return False
        leaf = self._leaf(user)
        if isinstance(leaf, nn.Linear):
            return self._rank(norm) == 2
        # with padding the border would see the shift, which zeros do not carry
        return isinstance(leaf, CONVS) and (leaf.padding == "valid" or _all_zero(leaf.padding))

    def _clone(self, path: str) -> str:
        number = 2
        while _has(self.module, f"{path}_{number}"):
            number += 1
        self.module.add_submodule(f"{path}_{number}", copy.deepcopy(self.module.get_submodule(path)))
        return f"{path}_{number}"

    # --- both -------------------------------------------------------------------------------------------------------

    def _apply(self, chosen: dict[fx.Node, list[tuple[fx.Node, Affine]]]) -> None:
        """Change each module once for all its calls that fold the same; clones for those that fold differently."""
        for path, calls in self.network.modules_called().items():
            kinds: dict[tuple[Any, ...], list[fx.Node]] = {}
            for call in calls:
                links = (node for node, _ in chosen.get(call, []))
                kinds.setdefault(tuple(n.target if n.op == "call_module" else n for n in links), []).append(call)
            targets = [path] + [self._clone(path) for _ in range(len(kinds) - 1)]  # all cloned before any is changed
            for target, members in zip(targets, kinds.values(), strict=True):
                for call in members:
                    call.target = target
                if members[0] in chosen:
                    absorb(self.module.get_submodule(target), [affine for _, affine in chosen[members[0]]])
        for producer, chain in chosen.items():
            last = chain[-1][0]
            last.replace_all_uses_with(producer)
            for node, _ in reversed(chain):
                self.graph.erase_node(node)
            self.names[producer] = last.name

    # --- rest -------------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """What is left becomes two element-wise calls."""
        for node in list(self.graph.nodes):
            if not self._is_norm(node):
                continue
            affine, ones = of_batch_norm(self._leaf(node)), [1] * (self._rank(node) - 2)
            with self.graph.inserting_before(node):
                value = node.args[0]
                for call, kind, constant in ((_MUL, "scale", affine.scale), (_ADD, "shift", affine.shift)):
                    path = f"{node.target}_{kind}"
                    if not _has(self.module, path):
                        owner, _, leaf = path.rpartition(".")
                        constant = constant.to(self._leaf(node).running_var.dtype).reshape(-1, *ones)
                        self.module.get_submodule(owner).register_buffer(leaf, constant)
                    value = self.graph.call_function(call, (value, self.graph.get_attr(path)))
            self.names[value] = node.name
            node.replace_all_uses_with(value)
            self.graph.erase_node(node)


def _all_zero(padding: Any) -> bool:
    return not isinstance(padding, str) and all(p == 0 for p in padding)


def _has(module: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
        return True
    except AttributeError:
        return False
