"""Weights that the forward computes from other weights: worked out once, so that they become plain weights.

Weight standardisation and parametrisations (weight norm) compute the weight of a convolution at every call. What
depends on stored tensors alone is the same every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

_MAX_VALUES = 1 << 28  # of all results together: a graph may come out of a file nobody vouches for


class Constants:
    """The stored and computable tensors of a graph of ATen calls on attributes (``source``)."""

    def __init__(self, source: nn.Module):
        self.source = source
        self._values: dict[fx.Node, Any] = {}
        self._fixed: dict[fx.Node, bool] = {}
        self._left = _MAX_VALUES

    def tensor(self, value: Any) -> torch.Tensor | None:
        """The tensor that an argument is at every call, or None if it depends on the inputs (or cannot be known)."""
        if not isinstance(value, fx.Node) or not self._is_fixed(value):
            return None
        try:
            found = self._value(value)
        except _TooLargeError:
            return None
        return found if isinstance(found, torch.Tensor) else None

    def path(self, value: fx.Node, leaf: str) -> str:
        """Where the tensor belongs: ``layer1.0.conv1`` for its attribute ``layer1.0.conv1.weight`` (leaf "weight"), an
        oddly named attribute itself, the common owner of the attributes that a computed tensor is made of."""
        if value.op == "get_attr":
            owner, _, last = str(value.target).rpartition(".")
            return owner if last == leaf and owner else str(value.target)
        owners = [name.rpartition(".")[0].split(".parametrizations")[0] for name in sorted(self._sources(value))]
        common = owners[0].split(".") if owners else []
        for owner in owners[1:]:
            parts = owner.split(".")
            while common and parts[: len(common)] != common:
                common.pop()
        return ".".join(p for p in common if p) or value.name

    def _is_fixed(self, node: fx.Node) -> bool:
        if node not in self._fixed:
            stack = [node]
            while stack:  # without recursion: graphs are deep
                top = stack[-1]
                if top.op in ("get_attr", "placeholder"):
                    self._fixed[top] = top.op == "get_attr" and isinstance(self._attribute(top), torch.Tensor)
                waiting = [] if top in self._fixed else [a for a in top.all_input_nodes if a not in self._fixed]
                if waiting:
                    stack.extend(waiting)
                    continue
                if top not in self._fixed:
                    pure = isinstance(top.target, torch._ops.OpOverload) and not _random(top.target)
                    pure = pure or getattr(top.target, "__name__", "") == "getitem"
                    self._fixed[top] = (
                        bool(top.all_input_nodes) and pure and all(self._fixed[a] for a in top.all_input_nodes)
                    )
                stack.pop()
        return self._fixed[node]

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = self._attribute(node)
            else:
                args = fx.node.map_arg(node.args, self._value)
                kwargs = fx.node.map_arg(node.kwargs, self._value)
                self._left -= _values_of(node, args, kwargs)
                if self._left < 0:
                    raise _TooLargeError
                with torch.no_grad():
                    self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def _sources(self, node: fx.Node) -> set[str]:
        found: set[str] = set()
        stack, seen = [node], {node}
        while stack:
            top = stack.pop()
            if top.op == "get_attr":
                found.add(str(top.target))
            fresh = [a for a in top.all_input_nodes if a not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return found


class _TooLargeError(Exception):
    pass


def _values_of(node: fx.Node, args: Any, kwargs: Any) -> int:
    """How many values the call makes, found by a run without values: broadcasting can make much of little."""
    if getattr(node.target, "__name__", "") == "getitem":
        return 0

    def empty(value: Any) -> Any:
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    try:
        result = node.target(  # type: ignore[operator]
            *torch.utils._pytree.tree_map(empty, args), **torch.utils._pytree.tree_map(empty, dict(kwargs))
        )
    except NotImplementedError as error:  # an operator without a shape function cannot be vetted
        raise _TooLargeError from error
    return sum(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))


def _random(target: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in target.tags or "dropout" in str(target)
