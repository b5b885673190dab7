"""What turns stored pixels into the numbers a network expects: ``(x / scale - mean) / std`` per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgeprune.errors import DataError

KNOWN = {
    "none": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

Statistic = str | float | Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Integers are divided by ``scale`` first; floats are taken to be scaled already.

    mean, std: one number per channel, or a single one for all; ``None`` leaves floats as they are.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 255.0

    @staticmethod
    def parse(mean: Statistic, std: Statistic, scale: float, channels: int) -> Normalisation:
        """Names (``imagenet``, ``none``), numbers, or text such as ``0.5,0.5,0.5``. Raises DataError."""
        if isinstance(mean, str) and mean in KNOWN:
            if std is not None and std != mean:
                raise DataError(f"mean {mean!r} is a name and brings its own std: leave std out")
            names_mean, names_std = KNOWN[mean]
            result = Normalisation(names_mean, names_std, scale)
        else:
            result = Normalisation(_numbers("mean", mean), _numbers("std", std), scale)
        for what, values in (("mean", result.mean), ("std", result.std)):
            if values is not None and len(values) not in (1, channels):
                raise DataError(
                    f"{what} has {len(values)} numbers, the network's input has {channels} channels: "
                    f"give 1 or {channels} numbers, or none"
                )
        if result.std is not None and any(s <= 0 for s in result.std):
            raise DataError(f"std must be positive, got {result.std}")
        if not scale > 0:
            raise DataError(f"scale must be positive, got {scale}")
        return result

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, C, ...) of any dtype; returns new float32 values of the same shape."""
        integers = not x.is_floating_point()
        x = x.to(torch.float32)
        scale = self.scale if integers else 1.0
        if self.mean is None and self.std is None:
            return x.div(scale) if scale != 1.0 else x
        shape = (1, -1, *(1,) * (x.dim() - 2))
        std = torch.tensor(self.std or (1.0,), dtype=torch.float64, device=x.device).reshape(shape)
        mean = torch.tensor(self.mean or (0.0,), dtype=torch.float64, device=x.device).reshape(shape)
        return (x * (1.0 / (scale * std)).float()).sub_((mean / std).float())


def _numbers(what: str, value: Statistic) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            return tuple(float(v) for v in value.replace(";", ",").split(","))
        return (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    except (TypeError, ValueError):
        raise DataError(
            f"{what} is {value!r}; expected {', '.join(KNOWN)}, a number, or one number per channel such as 0.5,0.5,0.5"
        ) from None
