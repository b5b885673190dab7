"""Small networks with every operator that channels can run through, singly and in random composition."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def conv_norm(c_in: int, c_out: int, k: int = 3, **kwargs) -> nn.Sequential:
    kwargs.setdefault("padding", k // 2)
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, bias=False, **kwargs), nn.BatchNorm2d(c_out))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(c, max(2, c // 4), 1), nn.Conv2d(max(2, c // 4), c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    def __init__(self, c: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c, hidden), nn.ReLU(), conv_norm(hidden, c))

    def forward(self, x):
        return F.relu(x + self.body(x))


class PaddedShortcut(nn.Module):
    """Option A of He et al.: the shortcut is a strided slice and zero channels on both sides."""

    def __init__(self, c: int, before: int, after: int):
        super().__init__()
        self.body = conv_norm(c, c + before + after, stride=2)
        self.pads = (0, 0, 0, 0, before, after)

    def forward(self, x):
        return F.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], self.pads))


class ZerosShortcut(nn.Module):
    """The same with a tensor of zeros and cat."""

    def __init__(self, c: int, more: int):
        super().__init__()
        self.body, self.more = conv_norm(c, c + more), more

    def forward(self, x):
        zeros = torch.zeros(x.shape[0], self.more, x.shape[2], x.shape[3])
        return F.relu(self.body(x) + torch.cat([x, zeros], 1))


class Concat(nn.Module):
    def __init__(self, c: int, more: int):
        super().__init__()
        self.branch = conv_norm(c, more)

    def forward(self, x):
        return torch.cat([x, F.relu(self.branch(x))], 1)


class Split(nn.Module):
    """Res2Net's: pieces are worked on one after the other, each with the last one's result."""

    def __init__(self, c: int, pieces: int, how: str = "split"):
        super().__init__()
        self.how, self.width, self.pieces = how, c // pieces, pieces
        self.convs = nn.ModuleList(conv_norm(self.width, self.width) for _ in range(pieces - 1))

    def forward(self, x):
        parts = {"split": lambda: x.split(self.width, 1), "chunk": lambda: x.chunk(self.pieces, 1),
                 "slice": lambda: [x[:, i * self.width : (i + 1) * self.width] for i in range(self.pieces)],
                 }[self.how]()  # fmt: skip
        out = [parts[0]]
        for part, conv in zip(parts[1:], self.convs, strict=False):
            out.append(F.relu(conv(part + out[-1] if len(out) > 1 else part)))
        return torch.cat(out, 1)


class UnevenSplit(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.sizes = [c // 3, c - c // 3]
        self.conv = conv_norm(self.sizes[1], self.sizes[1])

    def forward(self, x):
        a, b = torch.split(x, self.sizes, 1)
        return torch.cat([self.conv(b), a], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int, native: bool = False):
        super().__init__()
        self.groups, self.native = groups, native

    def forward(self, x):
        if self.native:
            return (
                F.channel_shuffle(x, self.groups)
                if hasattr(F, "channel_shuffle")
                else nn.ChannelShuffle(self.groups)(x)
            )
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Twice(nn.Module):
    """One convolution called two times."""

    def __init__(self, c: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.conv(F.relu(self.norm(self.conv(x)))))


class Tied(nn.Module):
    """Two convolutions of different dilation that share one weight."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.a = nn.Conv2d(c, c_out, 3, padding=1)
        self.b = nn.Conv2d(c, c_out, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.merge = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x):
        return self.merge(F.relu(self.a(x)) * torch.sigmoid(self.b(x)))


class ChannelsLastNorm(nn.Module):
    """ConvNeXt's block: depthwise, layer norm over channels-last, two linears, layer scale."""

    def __init__(self, c: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.gamma = nn.Parameter(torch.rand(c))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.gamma, self.bias = nn.Parameter(torch.rand(1, c, 1, 1)), nn.Parameter(torch.rand(c, 1, 1))

    def forward(self, x):
        return x * self.gamma + self.bias


class SelectiveKernel(nn.Module):
    """Two branches weighted by a softmax over the branches (SKNet, ResNeSt)."""

    def __init__(self, c: int):
        super().__init__()
        self.a, self.b = conv_norm(c, c), conv_norm(c, c, 5)
        self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, 2 * c, 1)

    def forward(self, x):
        both = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        gate = self.up(F.relu(self.down(both.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(x.shape[0], 2, x.shape[1], 1, 1).softmax(1)
        return (both * gate).sum(1)


class Glu(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, 2 * c, 1)

    def forward(self, x):
        return F.glu(self.conv(x), 1)


class SpaceToDepth(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, c * 4, h // 2, w // 2)


# name -> (channels in) -> (module, channels out, scale of height and width)
Piece = Callable[[random.Random, int], tuple[nn.Module, int, float]]


def _out(r: random.Random) -> int:
    return r.choice([4, 6, 8, 12])


def _grouped(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    groups = r.choice([g for g in (2, 3, 4) if c % g == 0] or [1])
    c_out = groups * r.choice([2, 3, 4])
    return nn.Sequential(nn.Conv2d(c, c_out, 3, padding=1, groups=groups), nn.BatchNorm2d(c_out), nn.ReLU()), c_out, 1


def _transposed(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    groups = r.choice([g for g in (1, 2, c) if c % g == 0])
    c_out = c * r.choice([1, 2]) if groups == c else groups * r.choice([2, 4])
    return nn.Sequential(nn.ConvTranspose2d(c, c_out, 2, 2, groups=groups), nn.BatchNorm2d(c_out), nn.ReLU()), c_out, 2


def _plain(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    c_out, dilation = _out(r), r.choice([1, 2])
    conv = nn.Conv2d(c, c_out, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(conv, r.choice([nn.ReLU(), nn.Sigmoid(), nn.Hardswish(), nn.GELU()])), c_out, 1


def _depthwise(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    m = r.choice([1, 2])
    return nn.Sequential(nn.Conv2d(c, c * m, 3, padding=1, groups=c), nn.BatchNorm2d(c * m), nn.ReLU()), c * m, 1


def _shuffle(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    return Shuffle(r.choice([g for g in (2, 3) if c % g == 0] or [1]), r.random() < 0.5), c, 1


def _split(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    pieces = r.choice([g for g in (2, 3) if c % g == 0] or [1])
    return (Split(c, pieces, r.choice(["split", "chunk", "slice"])) if pieces > 1 else nn.Identity()), c, 1


def _group_norm(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    return nn.GroupNorm(r.choice([g for g in (1, 2, 3, c) if c % g == 0]), c), c, 1


def _pixel_shuffle(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    return nn.Sequential(nn.Conv2d(c, 16, 1), nn.PixelShuffle(2)), 4, 2


def _zeros(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    before, after = r.choice([0, 1, 2]), r.choice([1, 2])
    if r.random() < 0.5:
        return ZerosShortcut(c, after), c + after, 1
    return PaddedShortcut(c, before, after), c + before + after, 0.5


def _tied(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    c_out = _out(r)
    return Tied(c, c_out), c_out, 1


def _concat(r: random.Random, c: int) -> tuple[nn.Module, int, float]:
    more = r.choice([2, 4])
    return Concat(c, more), c + more, 1


PIECES: dict[str, Piece] = {
    "plain": _plain,
    "grouped": _grouped,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "squeeze_excite": lambda r, c: (SqueezeExcite(c), c, 1),
    "residual": lambda r, c: (Residual(c, _out(r)), c, 1),
    "zero_padding": _zeros,
    "concat": _concat,
    "split": _split,
    "uneven_split": lambda r, c: (UnevenSplit(c), c, 1),
    "shuffle": _shuffle,
    "twice": lambda r, c: (Twice(c), c, 1),
    "tied": _tied,
    "prelu": lambda r, c: (nn.PReLU(r.choice([1, c])), c, 1),
    "group_norm": _group_norm,
    "channels_last": lambda r, c: (ChannelsLastNorm(c), c, 1),
    "layer_scale": lambda r, c: (LayerScale(c), c, 1),
    "selective": lambda r, c: (SelectiveKernel(c), c, 1),
    "glu": lambda r, c: (Glu(c), c, 1),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": lambda r, c: (nn.PixelUnshuffle(2), 4 * c, 0.5),
    "space_to_depth": lambda r, c: (SpaceToDepth(), 4 * c, 0.5),
    "pool": lambda r, c: (r.choice([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)]), c, 0.5),
    "upsample": lambda r, c: (nn.Upsample(scale_factor=2, mode=r.choice(["nearest", "bilinear"])), c, 2),
    "instance_norm": lambda r, c: (nn.InstanceNorm2d(c, affine=True), c, 1),
}


class Composed(nn.Module):
    """A convolution, some pieces, a convolution, and a linear on the flattened map. Input (N, 3, 16, 16)."""

    def __init__(self, names: list[str], seed: int = 0, flatten: bool = True):
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        channels, side = r.choice([6, 8, 12]), 16.0
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        for name in names:
            piece, c_out, scale = PIECES[name](r, channels)
            if not 2 <= side * scale <= 32 or c_out > 64:
                continue
            layers.append(piece)
            channels, side = c_out, side * scale
        layers += [nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.flatten = flatten
        self.head = nn.Linear(6 * int(side) ** 2 if flatten else 6, 5, bias=False)
        for layer in self.modules():  # loud weights, quiet biases: the input must reach the output
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.uniform_(layer.bias, 0.0, 0.2)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))
