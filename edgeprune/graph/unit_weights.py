"""The weights that belong to single units of a channel group, in whatever layer they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.graph.network import CONV_TRANSPOSES


@dataclass(frozen=True, slots=True)
class UnitWeights:
    """What a convolution, linear layer or batch norm has for each unit of a group.

    inputs: whether the units lie on what the layer reads; else they lie on what it gives
    index:  (units, multiplicity) positions of each unit along those channels
    """

    leaf: nn.Module
    inputs: bool
    index: np.ndarray

    def energy(self) -> Tensor:
        """(units,) sums of squared weights, without bias."""
        rows = _channels(self.leaf, self.inputs).detach()
        return rows.square().flatten(2).sum(2).flatten()[self._positions(rows)].sum(1)

    @torch.no_grad()
    def multiply(self, factors: Tensor) -> None:
        """Scale, in place, the weights of each unit; factors: (units,)."""
        rows = _channels(self.leaf, self.inputs)
        rows.mul_(self._spread(factors, rows))

    @torch.no_grad()
    def multiply_bias(self, factors: Tensor) -> None:
        """Scale, in place, what the layer adds to each unit of what it gives."""
        bias = _bias(self.leaf)
        if not self.inputs and bias is not None:
            bias.mul_(self._spread(factors, bias))

    @torch.no_grad()
    def copy(self, other: UnitWeights, units: Tensor) -> None:
        """Take over weights and biases of some units, (units,) bool, from the same layer of another network."""
        pairs = [(_channels(self.leaf, self.inputs), _channels(other.leaf, self.inputs))]
        mine, theirs = _bias(self.leaf), _bias(other.leaf)
        if not self.inputs and mine is not None and theirs is not None:
            pairs.append((mine, theirs))
        for new, old in pairs:
            stays = self._spread((~units).to(new), new)
            new.copy_(new * stays + old.to(new) * (1 - stays))

    def _positions(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self.index).to(like.device)

    def _spread(self, factors: Tensor, rows: Tensor) -> Tensor:
        """The factor of each channel's unit, 1 where there is none, to be multiplied with ``rows``."""
        spread = torch.ones(rows.shape[:2], dtype=rows.dtype, device=rows.device).flatten()
        positions = self._positions(rows)
        spread[positions] = factors.to(rows)[:, None].expand(positions.shape)
        return spread.reshape(*rows.shape[:2], *[1] * (rows.dim() - 2))


def _channels(leaf: Any, inputs: bool) -> Tensor:
    """The weight as (groups, channels of a group, the rest of what is read, and so on), a view; channel c of what the
    layer reads or gives is number c of the first two dims."""
    weight: Tensor = leaf.weight
    if weight.dim() == 1:
        return weight[None, :, None]
    rows = weight.unflatten(0, (getattr(leaf, "groups", 1), -1))
    return rows if inputs == isinstance(leaf, CONV_TRANSPOSES) else rows.transpose(1, 2)


def _bias(leaf: Any) -> Tensor | None:
    """As (1, channels)."""
    return None if leaf.bias is None else leaf.bias[None]
