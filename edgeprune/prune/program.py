"""Running a network piecewise: from known activations on, with joins bypassed and modules exchanged.

Judging a cut means running the network hundreds of times with one small thing changed. A ``Program`` is a view of a
network with such a change; making one costs nothing and leaves the network alone. Everything runs in evaluation mode,
whatever mode the modules are in, and without gradients unless the caller enables them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgeprune.errors import DataError
from edgeprune.graph.blocks import Block
from edgeprune.graph.network import BATCH_NORMS, DROPOUTS, Network

Batches = Sequence[tuple[Tensor, ...]]
Values = dict[str, list[Any]]  # node name -> its value for every batch
Also = Mapping[str, Sequence[str]]  # node name -> values that must be there besides those it reads
MINI_BATCH = 64  # images run at once: small enough to stay in the caches, large enough to amortise the calls


class Program:
    """A view of ``network`` without the branches of ``removed`` blocks, and with ``modules`` in place of its own."""

    def __init__(
        self, network: Network, removed: Sequence[Block] = (), modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.network = network
        self.removed = tuple(removed)
        self.modules = dict(modules or {})
        by_name = {n.name: n for n in network.module.graph.nodes}
        self._bypass = {by_name[b.join]: by_name[b.shortcut] for b in self.removed}
        self.placeholders = [n for n in by_name.values() if n.op == "placeholder"]
        self.output = next(n for n in by_name.values() if n.op == "output")
        self.nodes = self._live(self.output)
        self.by_name = {n.name: n for n in self.nodes}
        self.order = {n.name: i for i, n in enumerate(self.nodes)}
        self.users: dict[str, list[fx.Node]] = {n.name: [] for n in self.nodes}
        for node in self.nodes:
            for source in self.sources(node):
                self.users[source.name].append(node)

    def without(self, *blocks: Block) -> Program:
        return Program(self.network, (*self.removed, *blocks), self.modules)

    def exchanged(self, modules: Mapping[str, nn.Module]) -> Program:
        new = object.__new__(Program)  # the graph is the same: only the modules differ
        new.__dict__.update(self.__dict__)
        new.modules = {**self.modules, **modules}
        return new

    def leaf(self, node: fx.Node) -> Any:
        """The module a node calls."""
        return self.module(str(node.target))

    def module(self, path: str) -> Any:
        return self.modules[path] if path in self.modules else self.network.module.get_submodule(path)

    def through(self, node: fx.Node) -> fx.Node:
        """The node whose value stands where ``node`` did."""
        while node in self._bypass:
            node = self._bypass[node]
        return node

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that ``node`` reads, without repetition."""
        return list(dict.fromkeys(self.through(n) for n in node.all_input_nodes))

    def needed(self, wanted: Iterable[str], known: Iterable[str], also: Also | None = None) -> list[fx.Node]:
        """Nodes to execute, in order, so that ``wanted`` are there when ``known`` are given."""
        names, given = set(wanted), set(known)
        found: list[fx.Node] = []
        for node in reversed(self.nodes):
            if node.name in names and node.name not in given:
                found.append(node)
                names.update(n.name for n in self.sources(node))
                names.update(also.get(node.name, ()) if also else ())
        return found[::-1]

    def execute(self, node: fx.Node, env: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> Any:
        """The value of one node for one batch."""
        if node.op == "placeholder":
            return inputs[self.placeholders.index(node)]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.network.module)
        args: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[self.through(n).name])
        if node.op == "call_module":
            return _evaluate(self.leaf(node), args[0])
        if node.op == "output":
            return tuple(args[0]) if isinstance(args[0], (tuple, list)) else (args[0],)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _live(self, output: fx.Node) -> list[fx.Node]:
        needed = {output}
        order = list(self.network.module.graph.nodes)
        for node in reversed(order):
            if node in needed:
                needed.update(self.sources(node))
        return [n for n in order if n in needed]


def _evaluate(leaf: Any, x: Tensor) -> Tensor:
    if isinstance(leaf, BATCH_NORMS):
        return F.batch_norm(x, leaf.running_mean, leaf.running_var, leaf.weight, leaf.bias, False, 0.0, leaf.eps)
    return x if isinstance(leaf, DROPOUTS) else leaf(x)


def run(program: Program, batches: Batches, wanted: Sequence[str] = (), known: Values | None = None) -> Values:
    """Values of the ``wanted`` nodes (default: the output, under the name of the output node) for every batch.

    known: values that need not be computed again, for all batches.
    """
    known = known or {}
    names = list(wanted) or [program.output.name]
    nodes = program.needed(names, known)
    last = _last_uses(program, nodes, names)
    result: Values = {name: [] for name in names}
    for i, inputs in enumerate(batches):
        env: dict[str, Any] = {name: values[i] for name, values in known.items()}
        for node in nodes:
            env[node.name] = program.execute(node, env, inputs)
            for name in last[node.name]:
                del env[name]
        for name in names:
            result[name].append(env[name])
    return result


def sweep(
    program: Program,
    batches: Batches,
    before: Callable[[fx.Node, Values], None],
    known: Values | None = None,
    wanted: Sequence[str] = (),
    also: Also | None = None,
) -> Values:
    """As ``run``, but node by node over all batches. ``before(node, values)`` is called when all that a node reads is
    there (and what ``also`` says, which must be computed earlier), and may exchange ``program.modules`` of nodes not
    yet executed."""
    known = known or {}
    names = list(wanted) or [program.output.name]
    nodes = program.needed(names, known, also)
    last = _last_uses(program, nodes, names, also)
    values: Values = dict(known)
    for node in nodes:
        before(node, values)
        reads = [n.name for n in program.sources(node)]
        values[node.name] = [
            program.execute(node, {name: values[name][i] for name in reads}, inputs) for i, inputs in enumerate(batches)
        ]
        for name in last[node.name]:
            del values[name]
    return {name: values[name] for name in names}


def _last_uses(
    program: Program, nodes: Sequence[fx.Node], wanted: Sequence[str], also: Also | None = None
) -> dict[str, list[str]]:
    """Node name -> values nobody reads after it."""
    last: dict[str, str] = {}
    for node in nodes:
        last[node.name] = node.name
        for source in program.sources(node):
            last[source.name] = node.name
        for name in also.get(node.name, ()) if also else ():
            last[name] = node.name
    uses: dict[str, list[str]] = {n.name: [] for n in nodes}
    for name, user in last.items():
        if name not in wanted:
            uses[user].append(name)
    return uses


def outputs(program: Program, batches: Batches, known: Values | None = None) -> list[Tensor]:
    """All network outputs over all batches, each (images, ...)."""
    with torch.no_grad():
        values = run(program, batches, known=known)[program.output.name]
    return [torch.cat(parts) for parts in zip(*values, strict=True)]


def divergence(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """``||f - f'||^2 / ||f - mean f||^2``, f the expected values and their mean that over the images; averaged over
    outputs. Outputs that never vary are compared with their own energy."""
    errors = []
    for a, e in zip(actual, expected, strict=True):
        e64 = e.double()
        scale = (e64 - e64.mean(0, keepdim=True)).square().sum()
        if float(scale) <= 1e-12 * float(e64.square().sum()):
            scale = e64.square().sum()
        errors.append(float((a.double() - e64).square().sum() / scale.clamp_min(1e-30)))
    return sum(errors) / len(errors)


def as_batches(batches: Iterable[Any], network: Network, images: int | None = None) -> Batches:
    """Calibration data in mini batches on the network's device, at most ``images`` of them.

    batches: tensors or tuples of tensors, (n, ...) each; more tensors than the network has inputs (labels) are ignored.
    Raises DataError when there is no image.
    """
    arity = len(network.input_shapes)
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    taken: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in batches:
        tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)[:arity]
        taken.append(tensors)
        count += len(tensors[0])
        if images is not None and count >= images:
            break
    if not count:
        raise DataError("the calibration data holds no image; expected at least one batch: check --data")
    joined = [torch.cat(parts)[:images].to(device) for parts in zip(*taken, strict=True)]
    return list(zip(*(t.split(MINI_BATCH) for t in joined), strict=True))
