import pytest
import torch
from support import allow_torchvision
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.count import count
from edgeprune.graph.lift import lift


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)  # 8*36 weights, 8x8 out: 64*8*18
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)  # 8x8 in: 64*8*16
        self.head = nn.Linear(4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        x = self.up(self.norm(x))
        x = F.conv2d(x, self.kernel * 2)  # 256*4*4
        x = self.head(x.mean((2, 3)))
        return x[:, None] @ x[:, :, None]  # 3


def test_every_kind_is_counted():
    size = count(lift(Mixed().eval(), [(1, 4, 8, 8)]))
    assert size.params == 8 * 18 + 16 + (8 * 16 + 4) + 15 + 16
    assert size.macs == 64 * 8 * 18 + 64 * 8 * 16 + 256 * 16 + 12 + 3


def test_a_module_called_twice_works_twice():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    once, twice = (count(lift(nn.Sequential(*[conv] * n), [(1, 3, 5, 5)])) for n in (1, 2))
    assert (once.params, once.macs) == (9, 225)
    assert (twice.params, twice.macs) == (9, 450)


def test_attention():
    class Attention(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    size = count(lift(Attention(), [(1, 2, 5, 4), (1, 2, 7, 4)]))
    assert size.macs == 2 * 5 * 7 * 4 * 2


@pytest.mark.skipif(not allow_torchvision(), reason="torchvision and timm are not installed")
@pytest.mark.parametrize(
    ("name", "params", "macs"), [("resnet18", 11_689_512, 1.814e9), ("resnet50", 25_557_032, 4.089e9)]
)
def test_known_networks(name, params, macs):
    timm = pytest.importorskip("timm")
    size = count(lift(timm.create_model(name).eval(), [(1, 3, 224, 224)]))
    assert size.params == params
    assert size.macs == pytest.approx(macs, rel=0.002)
