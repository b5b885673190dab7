"""Whole networks of many families, exported and run against torch: random weights, random norm statistics."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from exported import assert_clean, largest_error
from support import allow_torchvision, randomise_norms
from torch import nn

from edgeprune.deploy.export import to_onnx
from edgeprune.deploy.verify import verify
from edgeprune.graph.lift import lift

MODELS = Path(__file__).parents[2] / "tools" / "models.py"

FAST = ["mobilenetv3_small_050", "regnety_002", "convnext_atto"]
SLOW = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet26t", "seresnet18", "densenet121", "vgg11_bn",
    "mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mnasnet_small",
    "efficientnet_b0", "efficientnetv2_rw_t", "tf_efficientnet_b0", "inception_v3", "inception_v4",
    "inception_resnet_v2", "inception_next_atto", "xception41", "regnetx_002", "ghostnet_050", "ghostnetv2_100",
    "convnext_pico", "convnextv2_pico", "hrnet_w18_small", "skresnet18", "fastvit_t8", "repvit_m0_9", "repghostnet_050",
    "res2net50_26w_4s", "resnest14d", "dla34", "dpn48b", "vovnet39a", "ese_vovnet19b_dw", "cspresnet50",
    "cspdarknet53", "darknet53", "selecsls42b", "mixnet_s", "repvgg_a0", "mobileone_s0", "starnet_s1", "nf_resnet26",
    "dm_nfnet_f0", "resnetv2_50x1_bit", "resnetv2_50", "botnet26t_256", "poolformer_s12", "mobilevit_xxs", "levit_128s",
    "tinynet_e", "lcnet_050", "hardcorenas_a", "rexnet_100", "convmixer_768_32", "coatnet_nano_rw_224",
    "vit_tiny_patch16_224", "mixer_s32_224", "hgnet_tiny", "efficientformer_l1", "nextvit_small", "focalnet_tiny_srf",
]  # fmt: skip
TORCHVISION = [
    "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "mnasnet0_5", "regnet_y_400mf", "mobilenet_v3_small",
    "densenet121", "alexnet", "efficientnet_b0",
]  # fmt: skip


# with random norm statistics torch's own float32 and float64 differ by half of the output here
CHAOTIC = {"efficientnetv2_rw_t"}


def _checked(module: nn.Module, size: int | tuple[int, ...] = 64, randomise: bool = True) -> None:
    torch.manual_seed(0)
    shape = (1, 3, size, size) if isinstance(size, int) else (1, *size)
    network = lift((randomise_norms(module) if randomise else module).eval(), [shape])
    model = to_onnx(network)
    assert_clean(model)
    assert largest_error(network, model) <= 1e-4


def _timm(name: str) -> None:
    if not allow_torchvision():
        pytest.skip("torchvision and timm are not installed")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name)
    fixed = any(part in name for part in ("vit_", "mixer", "levit", "coatnet", "botnet", "efficientformer", "nextvit"))
    size = tuple(module.default_cfg["input_size"]) if fixed else 96 if "inception" in name else 64
    _checked(module, size, name not in CHAOTIC)


@pytest.mark.parametrize("name", FAST)
def test_small_networks(name):
    _timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_timm(name):
    _timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    if not allow_torchvision():
        pytest.skip("torchvision is not installed")
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name in ("googlenet",) else {}
    _checked(getattr(models, name)(weights=None, **options), 96)


def _factory(name: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("benchmark_models", MODELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("resnet56_proj", 32), ("mobilenet_v2", 64)])
def test_benchmark_networks(name, size):
    _checked(_factory(name), size)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("EDGEPRUNE_DATA"), reason="EDGEPRUNE_DATA is not set")
@pytest.mark.parametrize(
    ("name", "path", "size"),
    [
        ("resnet20", "cifar10_models/resnet20.pt", 32),
        ("resnet56", "cifar10_models/resnet56.pt", 32),
        ("resnet56_proj", "cifar10_models/resnet56_proj.pt", 32),
        ("mobilenet_v2", "imagenet/mobilenet_v2.pt", 224),
    ],
)
def test_trained_networks(name, path, size):
    module = _factory(name)
    module.load_state_dict(torch.load(Path(os.environ["EDGEPRUNE_DATA"], path), weights_only=True))
    network = lift(module, [(1, 3, size, size)])
    result = verify(to_onnx(network), network)
    assert result.error <= 1e-5
    assert result.agreement == 1.0
