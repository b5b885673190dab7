"""One small model of every convolutional family that channel labels are known to cover, from timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cifar import models
from support import allow_torchvision, randomise_norms
from torch import nn


@dataclass(frozen=True)
class Family:
    """``share``: the share of the filters (classifiers not counted) that must be prunable. ``fast``: in quick tests."""

    family: str
    model: str
    source: str = "timm"
    size: int = 64
    share: float = 1.0
    fast: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Random weights, random batch-norm statistics, evaluation mode."""
        torch.manual_seed(0)
        return randomise_norms(_SOURCES[self.source](self.model, **self.kwargs)).eval()


def _timm(name: str, **kwargs: Any) -> nn.Module:
    allow_torchvision()  # timm imports torchvision where there is one
    import timm

    return timm.create_model(name, pretrained=False, **kwargs)


def _torchvision(name: str, **kwargs: Any) -> nn.Module:
    allow_torchvision()
    import torchvision

    return torchvision.models.get_model(name, weights=None, **kwargs)


def _ours(name: str) -> nn.Module:
    return getattr(models, name)()


_SOURCES: dict[str, Callable[..., nn.Module]] = {"timm": _timm, "torchvision": _torchvision, "here": _ours}

FAMILIES = (
    Family("ResNet, zero padding", "resnet20", "here", 32, fast=True),
    Family("ResNet, projection", "resnet56_proj", "here", 32),
    Family("ResNet", "resnet18", "torchvision", fast=True),
    Family("ResNet", "resnet50", "torchvision"),
    Family("ResNet-D", "resnet26d"),
    Family("Wide ResNet", "wide_resnet50_2", "torchvision"),
    Family("ResNeXt", "resnext26ts"),
    Family("ResNeXt", "resnext50_32x4d"),
    Family("SE-ResNet", "seresnet33ts"),
    Family("ECA-ResNet", "eca_resnet33ts", share=0.85),
    Family("ResNeSt", "resnest14d"),
    Family("Res2Net", "res2net50_26w_4s"),
    Family("SKNet", "skresnet18"),
    Family("RegNet X", "regnetx_002"),
    Family("RegNet Y", "regnety_002"),
    Family("DenseNet", "densenet121"),
    Family("DPN", "dpn48b", size=96),
    Family("DLA", "dla46_c"),
    Family("HRNet", "hrnet_w18_small"),
    Family("VoVNet", "ese_vovnet19b_slim"),
    Family("CSPNet", "cspresnet50"),
    Family("CSPNet", "cs3darknet_s"),
    Family("SelecSLS", "selecsls42b"),
    Family("HGNet", "hgnetv2_b0"),
    Family("TResNet", "tresnet_m"),
    Family("VGG", "vgg11_bn", "torchvision", 32),
    Family("AlexNet", "alexnet", "torchvision"),
    Family("GoogLeNet", "googlenet", "torchvision", kwargs={"init_weights": False}),
    Family("Inception", "inception_v3", size=96),
    Family("Inception-ResNet", "inception_resnet_v2", size=96),
    Family("Xception", "xception41"),
    Family("NASNet", "nasnetalarge", size=96, kwargs={"num_features": 384, "stem_size": 16}),
    Family("MobileNet v1", "mobilenetv1_100"),
    Family("MobileNet v2", "mobilenet_v2", "torchvision", fast=True),
    Family("MobileNet v3", "mobilenetv3_small_050"),
    Family("MobileNet v4", "mobilenetv4_conv_small"),
    Family("MNASNet", "mnasnet0_5", "torchvision"),
    Family("EfficientNet", "efficientnet_b0"),
    Family("GhostNet", "ghostnet_050"),
    Family("GhostNet v2", "ghostnetv2_100"),
    Family("MixNet", "mixnet_s"),
    Family("ShuffleNet v2", "shufflenet_v2_x0_5", "torchvision", share=0.9, fast=True),
    Family("SqueezeNet", "squeezenet1_1", "torchvision"),
    Family("RepVGG", "repvgg_a0"),
    Family("MobileOne", "mobileone_s0"),
    Family("FastViT", "fastvit_t8"),
    Family("RepViT", "repvit_m0_9"),
    Family("ConvNeXt", "convnext_atto", fast=True),
    Family("InceptionNeXt", "inception_next_atto"),
    Family("PoolFormer", "poolformer_s12"),
    Family("StarNet", "starnet_s050"),
)
