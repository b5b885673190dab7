import numpy as np
import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.masking import masked_outputs
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.taylor import changes


def test_scores_match_small_real_changes():
    """With a linear tail the first-order change is the change."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 8))
    linear = lift(module, [(1, 3, 8, 8)])
    channels = analyse(linear)
    judge = Judge(linear, linear, [images(64)])
    scores = changes(judge, channels.groups, draws=400)["0"]
    x = images(64)[:32]  # what it differentiates
    with torch.no_grad():
        full = module(x)
        real = []
        for unit in range(8):
            masked = masked_outputs(linear, channels, {"0": [u for u in range(8) if u != unit]}, (x,))[0]
            real.append(float((masked - full).square().sum()))
    np.testing.assert_allclose(scores / 400, real, rtol=0.25)
