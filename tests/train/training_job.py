"""A small training run, here or in a process of its own, to be killed.

python training_job.py CHECKPOINT RESULT SETTINGS_AS_JSON. Not a test. It has all that a run may carry along: dropout,
batch norm, augmentation, labels, validation, an average.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeprune.train import pace
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.finetune import finetune


def network(width, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4),
        )  # fmt: skip
        return module.eval()


def samples(count, seed):
    """Four classes: which quarter of the image is bright."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    x = rng.integers(0, 120, (count, 16, 16, 3))
    for image, label in zip(x, y, strict=True):
        top, left = divmod(int(label), 2)
        image[8 * top : 8 * top + 8, 8 * left : 8 * left + 8] += 100
    return DataSet.from_arrays(x.astype(np.uint8), y, mean="imagenet")


def fingerprint(module):
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(path, settings, pause_s=0.0):
    """-> the history as a dict, with the fingerprint of the trained weights."""
    student = network(6, 1)

    def progress(p):
        if pause_s:
            print(p.step, p.steps, flush=True)
            time.sleep(pause_s)

    config = TrainConfig(batch_size=16, checkpoint_s=0.05, **settings)
    history = finetune(
        student, network(12, 0), samples(200, 0), config, Path(path), progress, validation=samples(100, 1)
    )
    return {**history.to_dict(), "fingerprint": fingerprint(student)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    pace.TOLERANCE = 1e6  # a busy machine shortens a run, which another test looks at
    settings = json.loads(sys.argv[3])
    pause_s = settings.pop("pause_s", 0.0)
    if fitting := settings.pop("fitting", None):  # as if so many steps were found to fit into the time limit
        pace.Pace.steps = lambda self, *_: fitting
    result = run(sys.argv[1], settings, pause_s)
    Path(sys.argv[2]).write_text(json.dumps(result))
