"""Train the network of the demo and write examples/digits/digits.pt2 (310 s on one thread of a busy machine).

    python tools/train_digits.py [OUTPUT]

A residual network of 23 convolutions (21 of 3x3 in ten blocks, two projections) for 1 x 32 x 32, 378 570 parameters,
trained by edgeprune's own loop on labels alone. The held-out scans are looked at once, at the end.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from edgeprune.graph.lift import lift
from edgeprune.graph.load import save
from edgeprune.train.config import Progress, TrainConfig
from edgeprune.train.evaluate import evaluate
from edgeprune.train.finetune import finetune

ROOT = Path(__file__).parents[1]
STAGES = ((32, 4), (48, 4), (64, 2))  # channels, blocks
CONFIG = TrainConfig(epochs=25, batch_size=32, lr=0.05, augment="crop", seed=1)


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a 1x1 projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """(N, 1, 32, 32) -> (N, 10) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, STAGES[0][0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(STAGES[0][0])
        blocks, c_in = [], STAGES[0][0]
        for number, (channels, count) in enumerate(STAGES):
            for i in range(count):
                blocks.append(Block(c_in, channels, stride=2 if number and i == 0 else 1))
                c_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c_in, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(functional.relu(self.bn(self.conv(x))))
        return self.classifier(x.mean((2, 3)))


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = DigitNet()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def main(output: Path) -> None:
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    net = build(CONFIG.seed)

    def show(p: Progress) -> None:
        if p.step % 100 == 0 or p.step == p.steps:
            print(f"step {p.step} of {p.steps}, loss {p.loss:.3f}, {p.left_s:.0f} s left", flush=True)

    history = finetune(net, None, data.train(), CONFIG, output.with_suffix(".checkpoint"), show)
    print(f"{sum(p.numel() for p in net.parameters())} parameters, {history.seconds:.0f} s")
    print(f"top-1: train {evaluate(net, data.train()):.4f}, test {evaluate(net, data.test()):.4f}")
    save(lift(net, [(1, 1, data.SIZE, data.SIZE)], "digits"), output)
    output.with_suffix(".checkpoint").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "digits" / "digits.pt2")
