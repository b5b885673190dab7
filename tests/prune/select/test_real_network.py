"""What the choices in docs/decisions.md rest on, on a trained ResNet-20 and photographs it was not measured with."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import models

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.methods import SELECTORS
from edgeprune.prune.judge import Judge
from edgeprune.prune.sensitivity import rank_groups
from edgeprune.train.data import open_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EDGEPRUNE_DATA"), reason="EDGEPRUNE_DATA is not set"),
]
DATA = f"{Path(__file__).parents[3]}/tools/cifar10.py:calibration"


@pytest.fixture(scope="module")
def damage():
    """Method -> geometric mean over groups, a quarter and half of each cut, of the damage as a share of magnitude's."""
    module = models.resnet20()
    weights = Path(os.environ["EDGEPRUNE_DATA"], "cifar10_models/resnet20.pt")
    module.load_state_dict(torch.load(weights, weights_only=True))
    network = lift(module.eval(), [(1, 3, 32, 32)])
    batches = [x for x, _ in open_data(DATA, (1, 3, 32, 32)).batches(64, limit=192)]
    judge, channels = Judge(network, network, batches, images=192), analyse(network)
    probes = {g.name: [round(0.75 * g.size), round(0.5 * g.size)] for g in channels.groups}
    found = {}
    for name in (
        "magnitude",
        "cap",
        "thinet",
        "thinet-omp",
        "fp-backward",
        "fp-omp",
        "magnitude-in",
        "fp-backward-out",
    ):
        rankings = rank_groups(judge, channels, SELECTORS[name].function, widths=probes)
        found[name] = np.log([[rankings[g].damage[w] for w in widths] for g, widths in probes.items()])
    return {name: np.exp((values - found["magnitude"]).mean()) for name, values in found.items()}


@pytest.mark.parametrize(("name", "limit"), [("cap", 0.8), ("thinet", 0.9), ("thinet-omp", 0.85)])
def test_methods_that_look_at_images_beat_magnitude(damage, name, limit):
    assert damage[name] < limit


@pytest.mark.parametrize("name", ["fp-backward", "fp-omp", "magnitude-in"])
def test_the_input_side_beats_magnitude_and_the_output_side(damage, name):
    assert damage[name] < 0.95
    assert damage[name] < 0.9 * damage["fp-backward-out"]
