"""Run a network on integer labels: which channels belong together.

A convolution or linear gives each output channel a fresh label, element-wise operators unite the labels they meet,
structural operators are executed on the labels themselves. Whatever is not understood is frozen, so that an unknown
network is pruned less, never wrongly.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeprune.graph import ops
from edgeprune.graph.labels import Labels, Units, along, from_tensor, frozen
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network, shapes
from edgeprune.graph.ops import Kind, arguments, kind_of

# A bare tensor with more elements than this gets no labels (it would be a weight, and weights computed in the forward
# are frozen anyway).
_LARGEST_PARAMETER = 1 << 16


class Propagation:
    """After ``run()``: ``labels`` of every node that gives one tensor, ``units``, ``unknown`` operators."""

    def __init__(self, network: Network):
        self.network = network
        self.units = Units()
        self.labels: dict[str, Labels] = {}
        self.unknown: dict[str, None] = {}
        self._shapes = shapes(network)
        self._env: Any = {}  # fx.Node -> Labels, a tuple of them, or a number
        self._parameters: dict[tuple[int, int], np.ndarray] = {}
        self._batched: set[fx.Node] = set()  # depends on an input, so that dim 0 is the batch

    def run(self) -> Propagation:
        for node in self.network.module.graph.nodes:
            if node.op == "placeholder" or any(n in self._batched for n in node.all_input_nodes):
                self._batched.add(node)
            value = self._value(node)
            self._env[node] = value
            if isinstance(value, Labels):
                self.labels[node.name] = value
        return self

    # -- one node ------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return frozen(self._shapes[node.name])
        if node.op == "get_attr":
            return self._bare(node)
        if node.op == "call_module":
            return self._module(node)
        if node.op == "output":
            self._freeze(node.all_input_nodes)
            return None
        return self._call(node)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = self._env[node.args[0]], node.args[1]  # type: ignore[index]
            if isinstance(source, (tuple, list)):
                return source[index]  # type: ignore[index]
            return self._frozen_output(node)
        kind = kind_of(node.target)
        if kind is Kind.SIZE:
            return self._size(node)
        rule = (
            {
                Kind.ELEMENTWISE: self._elementwise,
                Kind.CHANNELWISE: self._channelwise,
                Kind.POOLING: self._pooling,
                Kind.REDUCTION: self._reduction,
                Kind.ALONG: self._along,
                Kind.STRUCTURAL: self._structural,
                Kind.FACTORY: self._factory,
            }.get(kind)
            if kind is not None
            else None
        )  # type: ignore[arg-type]
        if rule is not None:
            return rule(node)
        if kind is None and any(self._tensors(n) for n in node.all_input_nodes):
            self.unknown[ops.name_of(node.target)] = None
        self._freeze(node.all_input_nodes)
        return self._frozen_output(node)

    def _frozen_output(self, node: fx.Node) -> Labels | None:
        shape = self._shapes.get(node.name)
        return frozen(shape) if shape is not None else None

    def _tensors(self, node: fx.Node) -> list[Labels]:
        value = self._env[node]
        values = value if isinstance(value, (tuple, list)) else [value]
        return [v for v in values if isinstance(v, Labels)]

    def _freeze(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            for labels in self._tensors(node):
                if labels.ids is not None:
                    self.units.freeze(labels.ids)

    def _refuse(self, node: fx.Node) -> Any:
        """A known operator used in a way that no cut respects: everything it touches stays whole."""
        self._freeze(node.all_input_nodes)
        return self._frozen_output(node)

    def _out(self, node: fx.Node, axis: int | None, ids: np.ndarray | None) -> Labels:
        shape = self._shapes[node.name]
        return frozen(shape) if axis is None or ids is None else along(self.units, shape, axis, ids)

    def _evaluated(self, value: Any) -> Any:
        """Arguments with nodes replaced: labels by tensors of integers, sizes by numbers."""

        def one(n: fx.Node) -> Any:
            v = self._env[n]
            return v.tensor() if isinstance(v, Labels) else v

        return fx.node.map_arg(value, one)

    # -- tensors and modules -------------------------------------------------------------------------------------

    def _share(self, tensor: torch.Tensor | None, dim: int, ids: np.ndarray) -> None:
        """``ids`` lie along ``dim`` of ``tensor``; wherever the same tensor is used again, they are the same units."""
        if tensor is not None:
            known = self._parameters.setdefault((id(tensor), dim), ids)
            self.units.unite(known, ids)

    def _bare(self, node: fx.Node) -> Any:
        tensor = operator.attrgetter(str(node.target))(self.network.module)
        if not isinstance(tensor, torch.Tensor):
            return None
        dims = [d for d, size in enumerate(tensor.shape) if size > 1]
        if len(dims) != 1 or tensor.numel() > _LARGEST_PARAMETER or not tensor.is_floating_point():
            return frozen(tensor.shape)
        ids = self.units.fresh(tensor.shape[dims[0]])
        self._share(tensor, dims[0], ids)
        return along(self.units, tensor.shape, dims[0], ids)

    def _module(self, node: fx.Node) -> Labels:
        module = self.network.module.get_submodule(str(node.target))
        x: Labels = self._env[node.args[0]]  # type: ignore[index]
        if isinstance(module, (*CONVS, *CONV_TRANSPOSES)):
            return self._convolution(node, module, x)
        if isinstance(module, nn.Linear):
            last = len(x.shape) - 1
            if x.axis not in (None, last):
                self._freeze(node.all_input_nodes)
            ids, out = x.vector(last), self.units.fresh(module.out_features)
            self._share(module.weight, 0, out)
            self._share(module.weight, 1, ids)
            self._share(module.bias, 0, out)
            return self._out(node, last, out)
        if isinstance(module, BATCH_NORMS):
            if x.axis not in (None, 1):
                self._freeze(node.all_input_nodes)
            ids = x.vector(1)
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                self._share(tensor, 0, ids)
            return self._out(node, x.axis, x.ids)
        return self._out(node, x.axis, x.ids)  # dropout

    def _convolution(self, node: fx.Node, module: Any, x: Labels) -> Labels:
        if x.axis not in (None, 1):
            self._freeze(node.all_input_nodes)
        ids, groups = x.vector(1), module.groups
        transposed = isinstance(module, CONV_TRANSPOSES)
        in_dim, out_dim = (0, 1) if transposed else (1, 0)
        if groups > 1 and groups == module.in_channels:  # depthwise: output i * m + j belongs to input i
            out = np.repeat(ids, module.out_channels // groups)
            self._share(module.weight, 0, ids if transposed else out)
        else:
            out = self.units.fresh(module.out_channels)
            if groups > 1:  # equal counts per group: the same offset in every group goes together
                self._couple(ids, groups)
                self._couple(out, groups)
            inner_in = ids if transposed else ids[: len(ids) // groups]
            inner_out = out[: len(out) // groups] if transposed else out
            self._share(module.weight, in_dim, inner_in)
            self._share(module.weight, out_dim, inner_out)
        self._share(module.bias, 0, out)
        return self._out(node, 1, out)

    def _couple(self, ids: np.ndarray, groups: int) -> None:
        rows = ids.reshape(groups, -1)
        self.units.unite(rows, rows[0])

    # -- rules per kind ------------------------------------------------------------------------------------------

    def _size(self, node: fx.Node) -> Any:
        args, kwargs = node.args, node.kwargs
        if node.target is torch.ops.aten.sym_size.int:
            x = self._env[args[0]]  # type: ignore[index]
            dim = int(arguments(node)["dim"]) % len(x.shape)
            if dim == x.axis:
                self.units.freeze(x.ids)
            return x.shape[dim]
        if any(self._tensors(n) for n in node.all_input_nodes):
            return self._refuse(node)
        try:
            return node.target(*self._evaluated(args), **self._evaluated(kwargs))  # type: ignore[operator]
        except Exception:
            return None  # a number that only a real run knows

    def _elementwise(self, node: fx.Node) -> Labels | None:
        """Broadcasting: an operand of size 1 along the labelled axis serves any number of channels."""
        shape = self._shapes.get(node.name)
        if shape is None:
            return self._refuse(node)
        operands = [v for n in node.all_input_nodes for v in self._tensors(n)]
        axes = {v.axis + len(shape) - len(v.shape) for v in operands if v.axis is not None}
        if len(axes) != 1:
            return self._refuse(node)
        (axis,) = axes
        ids: np.ndarray | None = None
        for v in operands:
            own = axis - (len(shape) - len(v.shape))
            if own < 0 or v.shape[own] == 1:
                continue
            vector = v.vector(own)
            if ids is not None:
                self.units.unite(ids, vector)
            ids = vector
        if ids is None or len(ids) != shape[axis]:
            return self._refuse(node)
        return self._out(node, axis, ids)

    def _channelwise(self, node: fx.Node) -> Labels | None:
        name, args = ops.name_of(node.target), arguments(node)
        x: Labels = self._env[args["self"] if "self" in args else args["input"]]
        if x.axis is None or x.ids is None:
            return self._refuse(node)
        parameters = [self._env[args[k]] for k in ("weight", "bias", "running_mean", "running_var")
                      if isinstance(args.get(k), fx.Node)]  # fmt: skip
        own = 0
        if name in ("layer_norm", "rms_norm"):
            own = x.axis - (len(x.shape) - len(args["normalized_shape"]))
            if own < 0:
                self._freeze(n for n in node.all_input_nodes if self._env[n] is not x)
                return self._out(node, x.axis, x.ids)
        elif name == "glu":
            if int(args["dim"]) % len(x.shape) != x.axis:
                return self._out(node, x.axis, x.ids)
            first, second = np.split(x.ids, 2)
            self.units.unite(first, second)
            return self._out(node, x.axis, first)
        elif x.axis != 1:
            return self._refuse(node)
        elif name == "group_norm" and args["num_groups"] != x.shape[1]:
            self._couple(x.ids, int(args["num_groups"]))
        for p in parameters:
            if len(p.shape) > own and p.shape[own] == x.shape[x.axis]:
                self.units.unite(x.ids, p.vector(own))
            elif not (name == "prelu" and np.prod(p.shape) == 1):
                return self._refuse(node)
        return self._out(node, x.axis, x.ids)

    def _pooling(self, node: fx.Node) -> Any:
        """Works on the last k dims; labels along one of them are lost."""
        (x,) = self._tensors(node.all_input_nodes[0])
        spatial = ops.SPATIAL_DIMS[ops.name_of(node.target)]
        if x.axis is None or x.axis >= len(x.shape) - spatial:
            return self._refuse(node)
        shape = self._shapes.get(node.name)
        if shape is not None:
            return self._out(node, x.axis, x.ids)
        # values and indices; the users of both are getitem nodes, whose shapes are known
        users = {u.args[1]: self._shapes[u.name] for u in node.users if u.target is operator.getitem}
        return tuple(along(self.units, users[i], x.axis, x.ids) if i in users else None for i in range(2))  # type: ignore[index, arg-type]

    def _reduction(self, node: fx.Node) -> Any:
        shape = self._shapes.get(node.name)
        values = self._tensors(node.all_input_nodes[0])
        args = arguments(node)
        if shape is None or len(values) != 1 or len(node.all_input_nodes) != 1:
            return self._refuse(node)
        (x,) = values
        rank = len(x.shape)
        dim = args.get("dim")
        dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        dims = {int(d) % rank for d in dims} if rank else set()
        if x.axis is None or x.axis in dims:
            return frozen(shape) if ops.name_of(node.target) == "sum" else self._refuse(node)
        keep = bool(args.get("keepdim", False))
        axis = x.axis if keep else x.axis - sum(d < x.axis for d in dims)
        return self._out(node, axis, x.ids)

    def _along(self, node: fx.Node) -> Any:
        (x,) = self._tensors(node.all_input_nodes[0])
        dim = arguments(node).get("dim")
        if node.name not in self._shapes or not isinstance(dim, int) or x.axis in (None, dim % len(x.shape)):
            return self._refuse(node)
        return self._out(node, x.axis, x.ids)

    def _factory(self, node: fx.Node) -> Any:
        """A constant has no channels of its own: those along dim 1 (or its only one) follow whatever they meet."""
        shape = self._shapes.get(node.name)
        if not shape or any(self._tensors(n) for n in node.all_input_nodes):
            return self._refuse(node)
        axis = min(1, len(shape) - 1)
        if isinstance(arguments(node)["size"][axis], fx.Node):
            return frozen(shape)
        return self._out(node, axis, self.units.fresh(shape[axis]))

    # -- structural operators ------------------------------------------------------------------------------------

    def _structural(self, node: fx.Node) -> Any:
        name = ops.name_of(node.target)
        inputs = [v for n in node.all_input_nodes for v in self._tensors(n)]
        if all(v.axis is None for v in inputs):
            return self._refuse(node)
        special = {"cat": self._cat, "concat": self._cat, "stack": self._stack, "pad": self._pad,
                   "constant_pad_nd": self._pad}.get(name)  # fmt: skip
        if special is not None:
            return special(node)
        (x,) = inputs if len(inputs) == 1 else (None,)
        if x is None or not self._refittable(node, name, x):
            return self._refuse(node)
        if name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"):
            return self._rearranged(node, name, x)
        try:
            result = node.target(*self._evaluated(node.args), **self._evaluated(node.kwargs))  # type: ignore[operator]
        except Exception:
            return self._refuse(node)
        unflattened = len(x.shape) == 2 and isinstance(result, torch.Tensor) and result.dim() > 2
        first = node not in self._batched
        if isinstance(result, (tuple, list)):
            return tuple(from_tensor(self.units, t, first) for t in result)
        labels = from_tensor(self.units, result, first, 1 if unflattened else None)
        if labels.shape != self._shapes.get(node.name) or self._size_is_computed(node, name, labels):
            if labels.ids is not None:
                self.units.freeze(labels.ids)
            return self._refuse(node)
        return labels

    def _refittable(self, node: fx.Node, name: str, x: Labels) -> bool:
        """Whether the operator's arguments can be refitted when channels of its input are cut."""
        args = arguments(node)
        rank = len(x.shape)
        dim = args.get("dim")
        on_axis = isinstance(dim, int) and dim % rank == x.axis
        if name in ("roll", "flip"):
            dims = args["dims"]
            return bool(dims) and x.axis not in {d % rank for d in dims}
        if name in ("index_select", "repeat_interleave"):
            return isinstance(dim, int) and not on_axis
        if name in ("reflection_pad1d", "replication_pad1d"):
            return x.axis is not None and x.axis < rank - 1
        if name in ("reflection_pad2d", "replication_pad2d"):
            return x.axis is not None and x.axis < rank - 2
        if on_axis and name in ("slice", "narrow", "split", "split_with_sizes", "select"):
            numbers = [args.get(k) for k in ("start", "end", "length", "split_size", "split_sizes", "index")]
            flat = [v for n in numbers for v in (n if isinstance(n, (list, tuple)) else [n])]
            return not any(isinstance(v, fx.Node) for v in flat) and args.get("step", 1) == 1
        return True

    def _size_is_computed(self, node: fx.Node, name: str, out: Labels) -> bool:
        """Whether the output's size along its axis is a number computed in the graph, which no refit can change."""
        args = arguments(node)
        if out.axis is None:
            return False
        if name in ("view", "reshape", "_unsafe_view", "expand"):
            return isinstance(args["size" if "size" in args else "shape"][out.axis], fx.Node)
        if name == "unflatten":
            position = out.axis - int(args["dim"]) % (len(out.shape) - len(args["sizes"]) + 1)
            return 0 <= position < len(args["sizes"]) and isinstance(args["sizes"][position], fx.Node)
        return False

    def _cat(self, node: fx.Node) -> Labels | None:
        args = arguments(node)
        pieces = [v for n in args["tensors"] for v in self._tensors(n)]
        dim = int(args["dim"]) % len(self._shapes[node.name])
        axes = {v.axis for v in pieces if v.axis is not None}
        if any(len(v.shape) <= dim for v in pieces):
            return self._refuse(node)
        if axes == {dim}:
            return self._out(node, dim, np.concatenate([v.vector(dim) for v in pieces]))
        return self._joined(node, pieces, axes, shift=False, dim=dim)

    def _stack(self, node: fx.Node) -> Labels | None:
        args = arguments(node)
        pieces = [v for n in args["tensors"] for v in self._tensors(n)]
        dim = int(args["dim"]) % len(self._shapes[node.name])
        return self._joined(node, pieces, {v.axis for v in pieces if v.axis is not None}, shift=True, dim=dim)

    def _joined(self, node: fx.Node, pieces: Sequence[Labels], axes: set[int], shift: bool, dim: int) -> Labels | None:
        """Joined along another dim than their channels: the pieces' channels are the same."""
        if len(axes) != 1:
            return self._refuse(node)
        (axis,) = axes
        ids = pieces[0].vector(axis)
        for v in pieces[1:]:
            self.units.unite(ids, v.vector(axis))
        return self._out(node, axis + (shift and dim <= axis), ids)

    def _pad(self, node: fx.Node) -> Labels | None:
        """A zero channel is a channel that exists and unites with what it is added to."""
        args = arguments(node)
        (x,) = self._tensors(args["self"])
        assert x.axis is not None
        assert x.ids is not None
        from_back = len(x.shape) - 1 - x.axis
        amounts = args["pad"][2 * from_back : 2 * from_back + 2]
        if not amounts or tuple(amounts) == (0, 0):
            return self._out(node, x.axis, x.ids)
        if any(isinstance(a, fx.Node) or a < 0 for a in amounts) or args.get("mode", "constant") != "constant":
            return self._refuse(node)
        before, after = (self.units.fresh(a) for a in amounts)
        return self._out(node, x.axis, np.concatenate([before, x.ids, after]))

    def _rearranged(self, node: fx.Node, name: str, x: Labels) -> Labels | None:
        """Pixel and channel shuffles, on one position of the image instead of all."""
        if x.axis != 1 or ("pixel" in name and len(x.shape) != 4):
            return self._refuse(node)
        assert x.ids is not None
        if name == "pixel_shuffle":
            r = int(arguments(node)["upscale_factor"])
            rows = x.ids.reshape(-1, r * r)
            self.units.unite(rows, rows[:, :1])
            return self._out(node, 1, rows[:, 0])
        if name == "pixel_unshuffle":
            return self._out(node, 1, np.repeat(x.ids, int(arguments(node)["downscale_factor"]) ** 2))
        groups = int(arguments(node)["groups"])
        self._couple(x.ids, groups)
        return self._out(node, 1, x.ids.reshape(groups, -1).T.ravel())
