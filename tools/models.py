"""Networks for the benchmarks and the documentation, in plain torch: ``--factory tools/models.py:resnet56``.

Every factory takes no arguments and returns a module in evaluation mode with random weights from a fixed seed, batch
norm statistics as initialised, so that a state_dict can be loaded over it and two calls give equal networks.

    resnet20, resnet56     CIFAR, 3x32x32, parameter-free shortcut (stride-2 slice, zero channels): He et al. 2016, A
    resnet56_proj          the same with a projection (1x1 convolution and batch norm): option B of the paper
    mobilenet_v2           ImageNet, 3x224x224: Sandler et al. 2018; torchvision's keys (features.*, classifier.1.*)
    vgg12                  CIFAR, 3x32x32, plain: three stages of four convolutions; after Simonyan and Zisserman 2015
    resnet18, resnet50     ImageNet, 3x224x224: He et al. 2016; torchvision's keys (layer1.0.conv1, downsample.0, fc)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def resnet20() -> nn.Module:
    """CIFAR ResNet-20, 269 722 parameters, parameter-free shortcut."""
    return _seeded(lambda: CifarResNet(3))


def resnet56() -> nn.Module:
    """CIFAR ResNet-56, 853 018 parameters, parameter-free shortcut."""
    return _seeded(lambda: CifarResNet(9))


def resnet56_proj() -> nn.Module:
    """CIFAR ResNet-56, 855 770 parameters, projection shortcut."""
    return _seeded(lambda: CifarResNet(9, projection=True))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0, 3 504 872 parameters."""
    return _seeded(MobileNetV2)


def vgg12() -> nn.Module:
    """Plain CIFAR network of twelve convolutions with batch norm, 170 170 parameters."""
    return _seeded(Vgg)


def resnet18() -> nn.Module:
    """ResNet-18, 11 689 512 parameters."""
    return _seeded(lambda: ResNet(_Basic, (2, 2, 2, 2)))


def resnet50() -> nn.Module:
    """ResNet-50 (stride in the 3x3 convolution), 25 557 032 parameters."""
    return _seeded(lambda: ResNet(_Bottleneck, (3, 4, 6, 3)))


def _seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


class _CifarBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.padding = stride, (c_out - c_in) // 2
        self.shortcut = nn.Sequential()
        if projection and (stride != 1 or c_in != c_out):
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            self.padding, self.stride = 0, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images; input (N, 3, 32, 32), output (N, 10) logits."""

    def __init__(self, n: int, projection: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1, projection)
        self.layer2 = self._stage(16, 32, n, 2, projection)
        self.layer3 = self._stage(32, 64, n, 2, projection)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(c_in: int, c_out: int, n: int, stride: int, projection: bool) -> nn.Sequential:
        first = _CifarBlock(c_in, c_out, stride, projection)
        return nn.Sequential(first, *(_CifarBlock(c_out, c_out, 1, projection) for _ in range(n - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Vgg(nn.Module):
    """Stages of equally wide 3x3 convolutions, pooled by two in between; (N, 3, 32, 32) to (N, 10) logits."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 4):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(x).mean((2, 3)))


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(c_in, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _projection(c_in, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class ResNet(nn.Module):
    """Input (N, 3, H, W), output (N, 1000) logits."""

    def __init__(self, block: type[_Basic] | type[_Bottleneck], depths: tuple[int, int, int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c_in = 64
        for i, depth in enumerate(depths):
            width, blocks = 64 * 2**i, []
            for j in range(depth):
                blocks.append(block(c_in, width, 2 if i and not j else 1))
                c_in = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _ConvNormRelu6(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class _InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        layers: list[nn.Module] = [_ConvNormRelu6(c_in, hidden, 1)] if expand != 1 else []
        layers += [_ConvNormRelu6(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, c_out, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Input (N, 3, H, W), output (N, 1000) logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_ConvNormRelu6(3, 32, 3, 2)]
        c_in = 32
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expand, c_out, depth, stride in stages:
            for i in range(depth):
                layers.append(_InvertedResidual(c_in, c_out, stride if i == 0 else 1, expand))
                c_in = c_out
        self.features = nn.Sequential(*layers, _ConvNormRelu6(c_in, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
